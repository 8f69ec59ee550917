//! `dmd bench export`: one model in every dialect and precision, as a table.

use super::engine_options;
use super::export::{generator, info};
use crate::aside::write_aside;
use crate::cli::{BenchExportArgs, Engine};
use crate::output::say;
use crate::report::export::Reference;
use anyhow::{Context, Result};
use candle_core::Device;
use dmd_export::{Dialect, ExportOptions, Precision};
use dmd_models::ModelFolder;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// Exports, runs and compares.
pub fn run(args: &BenchExportArgs, threads: Option<usize>) -> Result<Value> {
    let folder = ModelFolder::load(&args.model, &Device::Cpu)?;
    let generator = generator(&folder, &args.model, args.sigma)?;
    let info = info(&folder)?;
    let [height, width] = info.size;
    let reference = Reference::of(&generator, [folder.config.in_channels, height, width], None)?;
    let scratch = scratch()?;
    let mut rows = Vec::new();
    let mut table = format!("{HEAD}\n");
    for dialect in Dialect::ALL {
        for precision in Precision::ALL {
            let path = scratch.0.join(format!("{dialect}-{precision}.onnx"));
            let options = ExportOptions { dialect, precision, force: true, ..ExportOptions::default() };
            let report = dmd_export::export(&generator, &info, &options, &path)?;
            let (measured, _) = reference.measure(&path, engine_options(Engine::Auto, threads))?;
            let line = format!(
                "| {dialect} | {precision} | {:.1} | {} | {:.1} | {:.1e} | {:.5} | {:.2} |",
                report.bytes as f64 / 1e3,
                report.nodes,
                measured.psnr_db,
                measured.max_difference,
                measured.distance,
                measured.latency_ms
            );
            say(&line);
            table += &format!("{line}\n");
            rows.push(json!({ "dialect": dialect, "precision": precision, "bytes": report.bytes, "nodes": report.nodes, "measured": measured }));
        }
    }
    if let Some(path) = &args.table {
        replace_table(path, &table)?;
    }
    Ok(json!({ "results": rows }))
}

const HEAD: &str = "| dialect | precision | kB | nodes | PSNR, dB | largest difference | distance | ms |\n|---|---|---|---|---|---|---|---|";

/// What stands around the table in a page that has one.
const BEGIN: &str = "<!-- table: dmd bench export -->\n";
const END: &str = "<!-- end of table -->\n";

fn replace_table(path: &Path, table: &str) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let parts = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) =
        parts.with_context(|| format!("{}: has no lines {BEGIN:?} and {END:?} around a table", path.display()))?;
    write_aside(path, |file| Ok(write!(file, "{before}{BEGIN}{table}{END}{after}")?))
}

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
