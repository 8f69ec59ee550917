//! `dmd bench export`: one model in every dialect and precision, as a table.

use super::export::{info, passes, reference};
use super::{engine_options, model_path};
use crate::cli::{BenchExportArgs, Engine};
use crate::output::result;
use crate::report::table;
use anyhow::{Context, Result};
use candle_core::Device;
use dmd_export::lint::{Target, lint, read};
use dmd_export::{Dialect, ExportOptions, Precision};
use dmd_models::ModelFolder;
use serde_json::{Value, json};
use std::path::Path;

/// Exports, runs and compares.
pub fn run(args: &BenchExportArgs, threads: Option<usize>) -> Result<Value> {
    let model = model_path(&args.model)?;
    let folder = ModelFolder::load(&model, &Device::Cpu)?;
    let passes = passes(&folder, &model, args.sigma)?;
    let info = info(&folder)?;
    let reference = reference(&passes, None)?;
    let scratch = scratch()?;
    let mut rows = Vec::new();
    let mut body = format!("{HEAD}\n");
    result(HEAD)?;
    for dialect in Dialect::ALL {
        let mut fp32_bytes = None;
        for precision in Precision::ALL {
            let path = scratch.0.join(format!("{dialect}-{precision}.onnx"));
            let options = ExportOptions { dialect, precision, force: true, ..ExportOptions::default() };
            let report = dmd_export::export_passes(&passes, &info, &options, &path)?;
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
            rows.push(json!({ "dialect": dialect, "precision": precision, "bytes": report.bytes, "nodes": report.nodes, "taken_whole_by": whole, "measured": measured }));
        }
    }
    if let Some(path) = &args.table {
        let name = args.model.file_name().unwrap_or(args.model.as_os_str());
        table::replace(path, &format!("dmd bench export {}", name.display()), &body)?;
    }
    Ok(json!({ "results": rows }))
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

/// A folder for the files, removed at the end.
struct Scratch(std::path::PathBuf);

fn scratch() -> Result<Scratch> {
    let path = std::env::temp_dir().join(format!("dmd-bench-export-{}", std::process::id()));
    std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
    Ok(Scratch(path))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is the system's to clean up.
        _ = std::fs::remove_dir_all(&self.0);
    }
}
