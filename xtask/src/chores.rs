//! The tasks that start cargo or `dmd`. The exit code is always that of the program that was started.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::setup::{self, Environment};

pub fn demo(args: &[OsString]) -> Result<ExitCode> {
    let mut command = cargo(&setup::everything()?);
    become_program(command.args(["run", "--release", "--bin", "dmd", "--", "demo"]).args(args))
}

/// One profile for every crate, tests and programs alike, so that nothing is compiled twice.
pub fn test(args: &[OsString]) -> Result<ExitCode> {
    let mut command = cargo(&setup::everything()?);
    become_program(command.args(["test", "--release", "--workspace"]).args(args))
}

/// The quick refusals first; clippy and docs share the metadata of the dependencies, so they stand together.
pub fn check() -> Result<ExitCode> {
    let environment = setup::protoc_only()?;
    let clippy = ["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"];
    for (stage, args) in [
        ("format", &["fmt", "--all", "--check"][..]),
        ("clippy", &clippy),
        ("docs", &["doc", "--release", "--workspace", "--no-deps"]),
    ] {
        let status = check_stage(&environment, stage, args)?;
        if !status.success() {
            return Ok(exit_code(status));
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn ci() -> Result<ExitCode> {
    let checked = check()?;
    if checked == ExitCode::SUCCESS { test(&["--no-fail-fast".into()]) } else { Ok(checked) }
}

/// Runs `dmd` as it was last built, so that a build with CUDA stays one, and starts at once.
pub fn dmd(args: &[OsString]) -> Result<ExitCode> {
    let program = dmd_program(&env::current_exe()?).context("xtask does not lie in a target folder")?;
    let mut environment = setup::as_it_is();
    if !program.is_file() {
        environment = setup::everything()?;
        let status = run(cargo(&environment).args(["build", "--release", "--bin", "dmd"]))?;
        if !status.success() {
            return Ok(exit_code(status));
        }
    }
    become_program(environment.command(program).args(args))
}

/// What makes the documents, built anew where its sources have changed.
pub fn lab(args: &[OsString]) -> Result<ExitCode> {
    let mut command = cargo(&setup::everything()?);
    become_program(command.args(["run", "--quiet", "--release", "--bin", "dmd-lab", "--"]).args(args))
}

pub fn print_environment() -> Result<ExitCode> {
    let environment = setup::as_it_is();
    // Git's and MSYS's shells on Windows set MSYSTEM and read `export`.
    let powershell = cfg!(windows) && env::var_os("MSYSTEM").is_none();
    for (variable, path) in environment.variables() {
        println!("{}", shell_line(variable, path, powershell));
    }
    if environment.onnxruntime.is_none() && env::var_os("ORT_DYLIB_PATH").is_none() {
        eprintln!("ONNX Runtime: none here; cargo xtask setup fetches it");
    }
    Ok(ExitCode::SUCCESS)
}

/// `dmd`, built for release as the sources stand, with these features.
pub fn built_dmd(environment: &Environment, features: &[&str]) -> Result<PathBuf> {
    let features = features.iter().flat_map(|feature| ["--features", feature]);
    let status = run(cargo(environment).args(["build", "--release", "--bin", "dmd"]).args(features))?;
    ensure!(status.success(), "dmd cannot be built");
    dmd_program(&env::current_exe()?).context("xtask does not lie in a target folder")
}

/// Runs one stage and says what it took. A missing component skips its stage, aloud: without a network, rustup
/// cannot add it.
fn check_stage(environment: &Environment, stage: &str, args: &[&str]) -> Result<ExitStatus> {
    // `cargo doc --version` does not exist, and doc is part of cargo itself.
    if args[0] != "doc" && !is_installed(environment, args[0])? {
        eprintln!("== {stage}: SKIPPED; rustup component add rustfmt clippy");
        return Ok(ExitStatus::default());
    }
    eprintln!("== {stage}: cargo {}", args.join(" "));
    let start = Instant::now();
    // Read by `cargo doc` alone.
    let status = run(cargo(environment).args(args).env("RUSTDOCFLAGS", "-D warnings"))?;
    let verdict = if status.success() { "passed" } else { "FAILED" };
    eprintln!("== {stage}: {verdict} in {:.0} s", start.elapsed().as_secs_f64());
    Ok(status)
}

/// Whether cargo has this component's command.
pub fn is_installed(environment: &Environment, command: &str) -> Result<bool> {
    Ok(run(cargo(environment).args([command, "--version"]).stdout(Stdio::null()))?.success())
}

pub fn cargo(environment: &Environment) -> Command {
    environment.command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn run(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("{} cannot be started", command.get_program().display()))
}

/// Ends as the program that is started. Where the system can, it takes this process's place, so that Ctrl-C and
/// SIGTERM reach it and the shell waits until it has saved its work.
#[cfg(unix)]
fn become_program(command: &mut Command) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(error).with_context(|| format!("{} cannot be started", command.get_program().display()))
}

#[cfg(not(unix))]
fn become_program(command: &mut Command) -> Result<ExitCode> {
    run(command).map(exit_code)
}

/// A program that a signal ended has no code.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    ExitCode::from(code.unwrap_or(1))
}

/// `target/release/dmd`, seen from `target/debug/xtask`; right for a target folder of any name and place.
fn dmd_program(xtask: &Path) -> Option<PathBuf> {
    let target = xtask.parent()?.parent()?;
    Some(target.join("release").join(format!("dmd{}", env::consts::EXE_SUFFIX)))
}

/// A quote inside single quotes is written as `'\''` in a POSIX shell, doubled in PowerShell.
fn shell_line(variable: &str, path: &Path, powershell: bool) -> String {
    let path = path.display().to_string();
    if powershell {
        format!("$env:{variable} = '{}'", path.replace('\'', "''"))
    } else {
        format!("export {variable}='{}'", path.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dmd_lies_beside_the_profile_of_xtask() {
        let expected = Path::new("some/target/release").join(format!("dmd{}", env::consts::EXE_SUFFIX));
        assert_eq!(dmd_program(Path::new("some/target/debug/xtask")), Some(expected));
        assert_eq!(dmd_program(Path::new("")), None);
    }

    #[test]
    fn paths_are_quoted_for_the_shell() {
        let path = Path::new("/it's here/lib");
        assert_eq!(shell_line("PROTOC", path, false), r"export PROTOC='/it'\''s here/lib'");
        assert_eq!(shell_line("PROTOC", path, true), "$env:PROTOC = '/it''s here/lib'");
    }
}
