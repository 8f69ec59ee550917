//! `cargo xtask export-test`: what the project exports, in the oldest and the newest ONNX Runtime that are promised, and in
//! the checker and the shape inference of Python's onnx. `cargo xtask test` has the version between, and no onnx.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::venv::{self, succeed};
use crate::{chores, onnxruntime, setup};

/// The first version whose API is asked for, in its last form, and the last one that was tried.
const VERSIONS: [&str; 2] = ["1.24.4", "1.32.0"];

const ONNX: [&str; 1] = ["onnx==1.23.2"];

/// Everything that writes a file, checks it or runs it.
const TESTS: [&str; 5] = ["export", "your_network", "runtime", "library", "path"];

pub fn fetch() -> Result<ExitCode> {
    fetched().map(|_| ExitCode::SUCCESS)
}

pub fn run() -> Result<ExitCode> {
    let (python, libraries) = fetched()?;
    let environment = setup::protoc_only()?;
    for (version, library) in VERSIONS.iter().zip(libraries) {
        eprintln!("export-test: ONNX Runtime {version}");
        succeed(
            chores::cargo(&environment)
                .args(["test", "--release", "--workspace"])
                .args(TESTS.iter().flat_map(|test| ["--test", test]))
                .env("ORT_DYLIB_PATH", library)
                .env("PYTHON", &python),
        )?;
    }
    eprintln!("export-test: passed in ONNX Runtime {} and in ONNX's checker", VERSIONS.join(" and "));
    Ok(ExitCode::SUCCESS)
}

/// A Python with onnx, and a library of each version.
fn fetched() -> Result<(PathBuf, Vec<PathBuf>)> {
    let cache = setup::root().join(".cache");
    let python = venv::made(&cache.join("onnx"), &ONNX, "ONNX's checker (90 MB)")?;
    let library = |version: &&str| -> Result<PathBuf> {
        let library = onnxruntime::find_or_fetch_version(&cache.join(format!("onnxruntime-{version}")), version);
        library.map(|library| library.path).with_context(|| format!("ONNX Runtime {version}"))
    };
    Ok((python, VERSIONS.iter().map(library).collect::<Result<_>>()?))
}
