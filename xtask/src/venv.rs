//! Virtual environments of Python's, made once under `.cache`: with the programs that ours is timed beside, for which an
//! environment that is active (VIRTUAL_ENV) is taken as it is instead, and with CUDA's toolkit.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{onnxruntime, setup};

/// The versions that the figures in the documents were taken with.
const PACKAGES: [&str; 5] =
    ["torch==2.15.0", "diffusers==0.42.1", "onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.31.1"];

/// Python with the peers. PyTorch's packages bring CUDA along.
pub fn python() -> Result<PathBuf> {
    if let Some(active) = env::var_os("VIRTUAL_ENV").filter(|folder| !folder.is_empty()) {
        return checked(python_in(Path::new(&active)));
    }
    let folder = setup::root().join(".cache").join("peers");
    checked(made(&folder, &PACKAGES, "PyTorch and ONNX Runtime (5 GB)")?)
}

/// Python of the environment in this folder with these packages, made where there is none; `what` they are, for people.
pub fn made(folder: &Path, packages: &[&str], what: &str) -> Result<PathBuf> {
    // Written last, so that an environment which was cut short is made anew, as is one of other versions.
    let list = folder.join("packages.txt");
    if fs::read_to_string(&list).ok().as_deref() != Some(&packages.join("\n")) {
        eprintln!("fetching {what} into {}", folder.display());
        succeed(Command::new(onnxruntime::python_with_pip()?).args(["-m", "venv", "--clear"]).arg(folder))?;
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        succeed(Command::new(python_in(folder)).args(install).args(packages))?;
        fs::write(&list, packages.join("\n")).with_context(|| format!("{} cannot be written", list.display()))?;
    }
    Ok(python_in(folder))
}

/// A package alone, without what it depends on, under `folder`: for the libraries in it.
pub fn unpacked(folder: &Path, requirement: &str, size: &str) -> Result<PathBuf> {
    let (target, whole) = (folder.join(requirement), folder.join(format!("{requirement}.whole")));
    // Written last, as above.
    if !whole.is_file() {
        eprintln!("fetching {requirement} ({size}) into {}", target.display());
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"];
        let only = ["--only-binary=:all:", "--retries", "1", "--timeout", "30", "--target"];
        let mut pip = Command::new(onnxruntime::python_with_pip()?);
        succeed(pip.args(install).args(only).arg(&target).arg(requirement).env("PIP_REQUIRE_VIRTUALENV", "0"))?;
        fs::write(&whole, "").with_context(|| format!("{} cannot be written", whole.display()))?;
    }
    Ok(target)
}

/// Where an environment's packages lie.
pub fn site_packages(python: &Path) -> Result<PathBuf> {
    let code = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
    let output = Command::new(python).args(["-c", code]).output().with_context(|| python.display().to_string())?;
    ensure!(output.status.success(), "{} does not say where its packages lie", python.display());
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn python_in(folder: &Path) -> PathBuf {
    if cfg!(windows) { folder.join("Scripts").join("python.exe") } else { folder.join("bin").join("python") }
}

/// Refuses an environment that lacks a package, before anything else is built or run for it.
fn checked(python: PathBuf) -> Result<PathBuf> {
    let names = PACKAGES.map(|package| package.split("==").next().unwrap_or(package)).join(", ");
    let import = Command::new(&python).args(["-c", &format!("import {names}")]).stderr(Stdio::null()).status();
    let remedy = || format!("{} lacks one of {names}; install them, or deactivate the environment", python.display());
    ensure!(import.is_ok_and(|status| status.success()), remedy());
    Ok(python)
}

/// Runs a program to its end; an exit code other than 0 is an error that shows the command.
pub fn succeed(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let status = command.status().with_context(|| format!("{} cannot be started", program.display()))?;
    let words: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    ensure!(status.success(), "{} {} failed: {status}", program.display(), words.join(" "));
    Ok(())
}
