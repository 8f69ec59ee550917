//! `cargo xtask bench`: training beside PyTorch, in turn, in an environment of its own. What is measured and how is in
//! benches/peers.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::venv::{self, succeed};
use crate::{chores, onnxruntime, setup};

pub fn run(args: &[OsString]) -> Result<ExitCode> {
    let script = setup::root().join("benches").join("peers").join("compare.py");
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        // Any Python can say what there is; nothing is built or fetched for it.
        succeed(Command::new(onnxruntime::python_with_pip()?).arg(script).arg("--help"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let environment = setup::protoc_only()?;
    let python = venv::python()?;
    let dmd = chores::built_dmd(&environment, if on_gpu(args) { &["cuda"] } else { &[] })?;
    succeed(Command::new(python).arg(script).arg("--dmd").arg(dmd).args(args))?;
    Ok(ExitCode::SUCCESS)
}

/// `--device cuda` or `--device=cuda`.
fn on_gpu(args: &[OsString]) -> bool {
    args.windows(2).any(|pair| pair[0] == "--device" && pair[1] == "cuda")
        || args.iter().any(|arg| arg == "--device=cuda")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_asked_for_with_and_without_an_equals_sign() {
        let on_gpu = |line: &str| on_gpu(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>());
        assert!(on_gpu("--against-torch --device cuda --batch 256") && on_gpu("--batch 256 --device=cuda"));
        assert!(!on_gpu("--against-torch") && !on_gpu("--device cpu") && !on_gpu("--device=cpu"));
    }
}
