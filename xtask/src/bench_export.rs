//! `cargo xtask bench-export`: exported files beside PyTorch and what torch.onnx.export writes, on one ONNX Runtime.
//!
//! What is measured is in benches/peers/export.py; here the networks and the files are prepared: the shipped
//! emoji-32, and a network of another shape that diffusers itself makes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::chores;
use crate::setup::{self, Environment};
use crate::venv::{self, succeed};

const SIGMA: &str = "2.5";

/// Dialect and precision of the files, under the names that the table gives them.
const FILES: [(&str, &str, &str); 4] = [
    ("portable fp32", "portable", "fp32"),
    ("native fp32", "native", "fp32"),
    ("nnapi fp32", "nnapi", "fp32"),
    ("portable w8a8", "portable", "w8a8"),
];

pub fn run() -> Result<ExitCode> {
    let peers = setup::root().join("benches").join("peers");
    let environment = setup::everything()?;
    let bench = Bench {
        python: venv::python()?,
        script: peers.join("export.py"),
        dmd: chores::built_dmd(&environment, &[])?,
        environment,
    };
    let scratch =
        bench.dmd.parent().and_then(Path::parent).context("dmd lies in no target folder")?.join("bench-export");
    fs::create_dir_all(&scratch).with_context(|| format!("{} cannot be made", scratch.display()))?;
    bench.compare(&setup::root().join("models").join("pretrained").join("emoji-32"), &scratch)?;
    let made = scratch.join("unet-32");
    succeed(bench.python().arg("make").arg(peers.join("unet-32.json")).arg(&made))?;
    bench.compare(&made, &scratch)?;
    Ok(ExitCode::SUCCESS)
}

struct Bench {
    environment: Environment,
    dmd: PathBuf,
    python: PathBuf,
    script: PathBuf,
}

impl Bench {
    /// Exports the teacher in every form and lets Python time them.
    fn compare(&self, teacher: &Path, scratch: &Path) -> Result<()> {
        let mut compare = self.python();
        compare.arg("compare").args([teacher.as_os_str(), SIGMA.as_ref()]);
        for (name, dialect, precision) in FILES {
            let file = scratch.join(format!("{dialect}-{precision}.onnx"));
            let mut export = self.environment.command(&self.dmd);
            export.arg("export").arg(teacher).args(["--as-generator", "--sigma", SIGMA, "--force"]);
            export.args(["--dialect", dialect, "--precision", precision, "--onnx"]).arg(&file);
            succeed(export.stdout(Stdio::null()))?;
            compare.arg(format!("{name}={}", file.display()));
        }
        succeed(&mut compare)
    }

    fn python(&self) -> Command {
        let mut command = Command::new(&self.python);
        command.args(["-W", "ignore"]).arg(&self.script);
        command
    }
}
