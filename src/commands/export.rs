//! `dmd export`: a generator's folder to a verified ONNX file.

use super::{check_free, make_parent};
use crate::cli::{ExportArgs, OutputKind};
use crate::output::say;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dmd_export::{Batch, ExportOptions, ModelInfo, Output, weights_sha256};
use dmd_models::{Generator, ModelFolder};
use serde_json::Value;

/// Exports a generator.
pub fn run(args: &ExportArgs) -> Result<Value> {
    crate::config::at_least_one("batch", args.batch as u64)?;
    check_free(&args.onnx, args.force)?;
    let folder = ModelFolder::load(&args.generator, &Device::Cpu)?;
    let generator = generator(&folder, args)?;
    let classes = folder.classes();
    let info = ModelInfo {
        size: folder.size()?,
        weights_sha256: weights_sha256(&folder.weights.to(DType::F32, &Device::Cpu)?)?,
        classes: classes.clone(),
    };
    let output = match args.output {
        OutputKind::F32 => Output::F32,
        OutputKind::U8 => Output::U8,
    };
    let options = ExportOptions {
        dialect: args.dialect,
        batch: if args.dynamic_batch { Batch::Dynamic } else { Batch::Fixed(args.batch) },
        fixed_label: args.fixed_label.as_deref().map(|class| label(class, &classes)).transpose()?,
        output,
        force: args.force,
        ..ExportOptions::default()
    };
    make_parent(&args.onnx)?;
    let report = dmd_export::export(&generator, &info, &options, &args.onnx)?;
    for verdict in &report.engines {
        say(&verdict.to_string());
    }
    say(&format!("{}: {} nodes, {:.2} MB", args.onnx.display(), report.nodes, report.bytes as f64 / 1e6));
    Ok(serde_json::to_value(&report)?)
}

/// The folder's generator; or its teacher held at `--sigma`, where that is asked for.
fn generator(folder: &ModelFolder, args: &ExportArgs) -> Result<Generator> {
    let path = args.generator.display();
    match (folder.generator(&Device::Cpu)?, args.sigma) {
        (Some(generator), None) => Ok(generator),
        (Some(generator), Some(_)) => {
            bail!("{path}: is a generator already, held at sigma {}; leave --as-generator out", generator.sigma)
        }
        (None, None) => bail!(
            "{path}: is a teacher, which needs many steps; distil it first (dmd distill) and export RUN/generator, or \
             add --as-generator --sigma S to export it undistilled, as one step from that noise level"
        ),
        (None, Some(sigma)) => {
            let denoiser = folder.denoiser(&Device::Cpu)?;
            let [min, max] = [denoiser.levels.sigma_min(), denoiser.levels.sigma_max()];
            ensure!(
                sigma >= min && sigma <= max,
                "--sigma is {sigma}, expected {min} to {max}, what {path} was trained on"
            );
            Ok(Generator { denoiser, sigma })
        }
    }
}

/// A class by its name or its number.
fn label(class: &str, classes: &[String]) -> Result<usize> {
    ensure!(!classes.is_empty(), "--fixed-label {class}: the model has no classes");
    let by_name = classes.iter().position(|name| name == class);
    by_name.or_else(|| class.parse().ok().filter(|index| *index < classes.len())).with_context(|| {
        let last = classes.len() - 1;
        format!("--fixed-label {class}: no such class, the model has {} (0 to {last})", classes.join(", "))
    })
}
