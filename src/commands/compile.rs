//! `dmd compile`: what an accelerator compiles of an exported file, kept in a folder that an app ships. It is loaded from there
//! once, and its picture compared with the processor's: for Hexagon in Qualcomm's simulator, which is part of the plug-in.

use super::exported_file;
use crate::cli::CompileArgs;
use crate::output::{result, say};
use anyhow::{Context, Result, bail, ensure};
use dmd_runtime::{Accelerator, Generator, Options, Placement, Qnn};
use serde_json::{Value, json};
use std::time::Instant;

/// Compiles a file, or finds it compiled, and proves it.
pub fn run(args: &CompileArgs) -> Result<Value> {
    exported_file(&args.onnx)?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot be made", args.out.display()))?;
    let options = || {
        let (soc_model, htp_arch, cache) = (Some(args.qnn_soc), args.qnn_arch, Some(args.out.clone()));
        let qnn = Accelerator::Qnn(Qnn { soc_model, htp_arch, cache, ..Qnn::new(&args.qnn) });
        Options { accelerators: vec![qnn], ..Options::default() }
    };
    let load = || -> Result<(f64, Placement)> {
        let started = Instant::now();
        let placement = Generator::load(&args.onnx, options())?.placement();
        if let Some(passed) = placement.passed_over.first() {
            bail!("{}: {}: {}: {}", args.onnx.display(), passed.accelerator, passed.step, passed.reason);
        }
        Ok((started.elapsed().as_secs_f64() * 1e3, placement))
    };
    let ((compile_ms, _), (load_ms, placement)) = (load()?, load()?);
    let is_compiled = placement.nodes.iter().any(|node| node.operator == "EPContext");
    ensure!(is_compiled, "{}: nothing that was compiled was found there again ({placement})", args.out.display());
    say(&format!("a run of the proof is in both times: {compile_ms:.0} ms at first, {load_ms:.0} ms from the folder"));
    result(&format!("{}: {placement}", args.out.display()))?;
    Ok(json!({ "out": args.out, "compile_ms": compile_ms, "load_ms": load_ms, "placement": placement }))
}
