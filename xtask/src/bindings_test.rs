//! `cargo xtask bindings-test`: the runtime from Python, Kotlin and Swift. What is compared is in
//! runtime/capi/tests/bindings.rs and runtime/noise/tests/ports.rs, which skip what they do not find; here it is fetched.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::venv::{self, succeed};
use crate::{chores, setup, web};

const PYTHON: [&str; 2] = ["numpy==2.2.6", "hatchling==1.27.0"];

/// JetBrains' own package.
const KOTLIN: &str = "kotlin-compiler@2.4.20";

pub fn fetch() -> Result<ExitCode> {
    fetched().map(|_| ExitCode::SUCCESS)
}

pub fn run() -> Result<ExitCode> {
    let (python, kotlinc) = fetched()?;
    let environment = setup::everything()?;
    let mut tests = chores::cargo(&environment);
    tests.args(["test", "--release", "--workspace", "--test", "bindings", "--test", "ports", "--", "--nocapture"]);
    if let Some(kotlinc) = kotlinc {
        tests.env("KOTLINC", kotlinc);
    }
    succeed(tests.env("DMD_BINDINGS_PYTHON", python))?;
    eprintln!("bindings-test: passed");
    Ok(ExitCode::SUCCESS)
}

/// A Python that builds wheels, and Kotlin's compiler where npm and a JVM are here.
fn fetched() -> Result<(PathBuf, Option<PathBuf>)> {
    let cache = setup::root().join(".cache");
    let python = venv::made(&cache.join("bindings"), &PYTHON, "numpy and hatchling (70 MB)")?;
    Ok((python, kotlinc()?))
}

fn kotlinc() -> Result<Option<PathBuf>> {
    let reason = match (web::node_is_here(), Command::new("java").arg("-version").output()) {
        (Ok(()), Ok(_)) => None,
        (Err(reason), _) => Some(reason),
        (_, Err(error)) => Some(format!("java cannot be started: {error}")),
    };
    if let Some(reason) = reason {
        eprintln!("bindings-test: Kotlin is SKIPPED; {reason}");
        return Ok(None);
    }
    let folder = setup::root().join(".cache").join(KOTLIN.replace('@', "-"));
    let kotlinc = folder.join("node_modules/kotlin-compiler/bin/kotlinc");
    if !folder.join("whole").is_file() {
        eprintln!("fetching Kotlin's compiler (90 MB) into {}", folder.display());
        fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let install = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-save", "--prefix"];
        succeed(web::npm_or_node("npm").args(install).arg(&folder).arg(KOTLIN))?;
        make_executable(&kotlinc)?;
        fs::write(folder.join("whole"), "").with_context(|| folder.display().to_string())?;
    }
    Ok(Some(kotlinc))
}

/// npm makes only those of a package's files executable that it links.
#[cfg(unix)]
fn make_executable(program: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).with_context(|| program.display().to_string())
}

#[cfg(not(unix))]
fn make_executable(_: &std::path::Path) -> Result<()> {
    Ok(())
}
