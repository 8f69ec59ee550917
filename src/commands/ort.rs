//! `dmd ort`: an exported file in ONNX Runtime's own format, for its minimal builds.

use super::{check_free, make_parent};
use crate::aside::write_aside;
use crate::cli::OrtArgs;
use crate::output::say;
use anyhow::Result;
use dmd_export::{required_operators_config, to_ort};
use serde_json::Value;
use std::io::Write;

/// Converts a file.
pub fn run(args: &OrtArgs) -> Result<Value> {
    check_free(&args.out, args.force)?;
    if let Some(config) = &args.required_operators {
        check_free(config, args.force)?;
    }
    make_parent(&args.out)?;
    let report = to_ort(&args.onnx, &args.out, args.force, None)?;
    let megabytes = report.bytes as f64 / 1e6;
    let (out, version) = (args.out.display(), &report.onnxruntime);
    let (difference, psnr) = (report.max_abs_difference, report.psnr_db);
    say(&format!(
        "{out}: {megabytes:.2} MB by ONNX Runtime {version}, max difference {difference:.2e}, PSNR {psnr:.1} dB"
    ));
    if let Some(config) = &args.required_operators {
        make_parent(config)?;
        let text = required_operators_config(&report.required_operators);
        write_aside(config, |file| Ok(file.write_all(text.as_bytes())?))?;
        say(&format!("{}: what a minimal build has to contain", config.display()));
    }
    Ok(serde_json::to_value(&report)?)
}
