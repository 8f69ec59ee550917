//! `cargo xtask server-test`: the example of a service, which is a workspace of its own, built and tested with warnings
//! refused.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::chores;
use crate::setup::{self, Environment};
use crate::venv::succeed;

/// Fetches the sources of what it is built with.
pub fn fetch() -> Result<ExitCode> {
    succeed(&mut cargo(&setup::protoc_only()?, "fetch"))?;
    Ok(ExitCode::SUCCESS)
}

/// Its tests, in ONNX Runtime.
pub fn run() -> Result<ExitCode> {
    succeed(cargo(&setup::everything()?, "test").arg("--release").env("RUSTFLAGS", "-D warnings"))?;
    eprintln!("server-test: passed");
    Ok(ExitCode::SUCCESS)
}

fn cargo(environment: &Environment, task: &str) -> Command {
    let manifest: PathBuf = ["examples", "server", "Cargo.toml"].iter().collect();
    let mut command = chores::cargo(environment);
    command.args([task, "--locked", "--manifest-path"]).arg(setup::root().join(manifest));
    command
}
