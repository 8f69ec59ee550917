//! `dmd export`: a generator's folder to a verified ONNX file.

use super::{check_free, make_parent};
use crate::cli::{ExportArgs, OutputKind};
use crate::output::say;
use anyhow::{Result, bail};
use candle_core::{DType, Device};
use dmd_export::{ExportOptions, ModelInfo, Output, weights_sha256};
use dmd_models::ModelFolder;
use serde_json::Value;

/// Exports a generator.
pub fn run(args: &ExportArgs) -> Result<Value> {
    crate::config::at_least_one("batch", args.batch as u64)?;
    check_free(&args.onnx, args.force)?;
    let folder = ModelFolder::load(&args.generator, &Device::Cpu)?;
    let Some(generator) = folder.generator(&Device::Cpu)? else {
        bail!(
            "{}: is a teacher, which needs many steps; distil it first (dmd distill) and export RUN/generator",
            args.generator.display()
        );
    };
    let info = ModelInfo {
        size: folder.size()?,
        classes: folder.classes(),
        weights_sha256: weights_sha256(&folder.weights.to(DType::F32, &Device::Cpu)?)?,
    };
    let output = match args.output {
        OutputKind::F32 => Output::F32,
        OutputKind::U8 => Output::U8,
    };
    let options = ExportOptions { batch: args.batch, output, force: args.force, ..ExportOptions::default() };
    make_parent(&args.onnx)?;
    let report = dmd_export::export(&generator, &info, &options, &args.onnx)?;
    for verdict in &report.engines {
        say(&verdict.to_string());
    }
    say(&format!("{}: {} nodes, {:.2} MB", args.onnx.display(), report.nodes, report.bytes as f64 / 1e6));
    Ok(serde_json::to_value(&report)?)
}
