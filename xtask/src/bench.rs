//! `cargo xtask bench`: training beside PyTorch, in turn, in an environment of its own. What is measured and how is in
//! benches/peers.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::venv::{self, succeed};
use crate::{chores, setup};

pub fn run(args: &[OsString]) -> Result<ExitCode> {
    let environment = setup::protoc_only()?;
    let python = venv::python()?;
    let on_gpu = args.windows(2).any(|pair| pair[0] == "--device" && pair[1] == "cuda");
    let dmd = chores::built_dmd(&environment, if on_gpu { &["cuda"] } else { &[] })?;
    let script = setup::root().join("benches").join("peers").join("compare.py");
    succeed(Command::new(python).arg(script).arg("--dmd").arg(dmd).args(args))?;
    Ok(ExitCode::SUCCESS)
}
