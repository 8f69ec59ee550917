//! `dmd lint`: which nodes of an ONNX file an accelerator takes.

use super::exported_file;
use crate::cli::LintArgs;
use crate::output::result;
use anyhow::Result;
use dmd_export::lint;
use serde_json::Value;

/// Judges a file.
pub fn run(args: &LintArgs) -> Result<Value> {
    exported_file(&args.onnx)?;
    let report = lint::lint(&lint::read(&args.onnx)?, args.target);
    result(&report.to_string())?;
    Ok(serde_json::to_value(&report)?)
}
