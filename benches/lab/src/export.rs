//! One model in every dialect and precision, as a table.

use crate::table;
use anyhow::Result;
use candle_core::Device;
use dmd::cli::Engine;
use dmd::commands::export::{Level, info, passes, reference};
use dmd::commands::{engine_options, model_path};
use dmd::output::result;
use dmd_export::lint::{Target, lint, read};
use dmd_export::{Dialect, ExportOptions, OneStep, Precision};
use dmd_models::ModelFolder;
use std::path::{Path, PathBuf};

/// `dmd-lab export`.
#[derive(Debug, clap::Args)]
pub struct ExportTableArgs {
    /// A generator's folder, or with --sigma a teacher's.
    pub model: PathBuf,
    /// Take a teacher, not distilled, as a generator held at this noise level.
    #[arg(long, value_name = "S")]
    pub sigma: Option<f64>,
    /// A page whose table is to be replaced.
    #[arg(long, value_name = "FILE.md")]
    pub table: Option<PathBuf>,
}

/// Exports, runs and compares.
pub fn run(args: &ExportTableArgs, threads: Option<usize>) -> Result<()> {
    let model = model_path(&args.model)?;
    let folder = ModelFolder::load(&model, &Device::Cpu)?;
    let passes = passes(&folder, &model, args.sigma.map(Level::Sigma))?;
    let info = info(&folder)?;
    let [_, height, width] = folder.sample_shape()?;
    let modules = OneStep::passes(&passes, [height, width]);
    let reference = reference(&passes, None)?;
    let scratch = tempfile::tempdir()?;
    let mut body = format!("{HEAD}\n");
    result(HEAD)?;
    for dialect in Dialect::ALL {
        let mut fp32_bytes = None;
        for precision in Precision::ALL {
            let path = scratch.path().join(format!("{dialect}-{precision}.onnx"));
            let options = ExportOptions { dialect, precision, force: true, ..ExportOptions::default() };
            let report = dmd_export::export_passes(&modules, &info, &options, &path)?;
            let measured = reference.measure(&path, engine_options(Engine::Auto, threads))?.measured;
            let part = report.bytes as f64 / *fp32_bytes.get_or_insert(report.bytes) as f64;
            let whole = taken_whole(&path)?;
            let line = format!(
                "| {dialect} | {precision} | {:.1} | {part:.3} | {} | {} | {:.1} | {:.1e} | {:.5} | {:.2} |",
                report.bytes as f64 / 1e3,
                report.nodes,
                if whole.is_empty() { "–".into() } else { whole.join(", ") },
                measured.psnr_db,
                measured.max_difference,
                measured.distance,
                measured.latency_ms
            );
            result(&line)?;
            body += &format!("{line}\n");
        }
    }
    if let Some(path) = &args.table {
        let name = args.model.file_name().unwrap_or(args.model.as_os_str());
        table::replace(path, &format!("dmd-lab export {}", name.display()), &body)?;
    }
    Ok(())
}

/// The accelerators that take every node in one piece, the lookup of the label apart, which may run before.
fn taken_whole(path: &Path) -> Result<Vec<&'static str>> {
    let model = read(path)?;
    let takes = |target: &Target| {
        let report = lint(&model, *target);
        report.partitions.len() == 1 && report.refused.iter().all(|refusal| refusal.operator == "Gather")
    };
    Ok(Target::ALL.into_iter().filter(takes).map(Target::name).collect())
}

const HEAD: &str = "| dialect | precision | kB | of fp32's | nodes | taken whole by | PSNR, dB | largest difference | distance | ms |\n|---|---|---|---|---|---|---|---|---|---|";
