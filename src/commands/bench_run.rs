//! `dmd bench run`: latency, load time and memory of an exported file.

use super::{engine_options, exported_file};
use crate::cli::BenchRunArgs;
use crate::eval::{median, percentile};
use crate::output::result;
use crate::{limits, memory};
use anyhow::Result;
use dmd_runtime::{Generator, Request};
use serde_json::{Value, json};
use std::time::Instant;

/// Times one pass.
pub fn run(args: &BenchRunArgs, threads: Option<usize>) -> Result<Value> {
    limits::count("--runs", args.runs as u64, limits::RUNS)?;
    exported_file(&args.onnx)?;
    let started = Instant::now();
    let generator = Generator::load(&args.onnx, engine_options(args.engine, threads))?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;
    let batch = generator.info().batch;
    let request = Request { batch, ..Request::default() };
    for _ in 0..WARM_UP {
        generator.generate(&request)?;
    }
    let (mut whole, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        let started = Instant::now();
        generator.generate(&request)?;
        whole.push(started.elapsed().as_secs_f64() * 1e3);
        let started = Instant::now();
        generator.warm_up()?;
        bare.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let (median_ms, p95_ms, engine_ms) = (median(&mut whole), percentile(&mut whole, 0.95), median(&mut bare));
    let peak = memory::peak_bytes(&candle_core::Device::Cpu);
    let engine = format!("{} {}", generator.engine().kind, generator.engine().version);
    result(&format!(
        "{engine}: {median_ms:.3} ms median, {p95_ms:.3} ms p95 for {batch} (engine alone {engine_ms:.3} ms), loaded in {load_ms:.1} ms, peak memory {}",
        memory::readable(peak)
    ))?;
    Ok(
        json!({ "engine": engine, "batch": batch, "runs": args.runs, "median_ms": median_ms, "p95_ms": p95_ms, "engine_ms": engine_ms, "load_ms": load_ms, "peak_memory_bytes": peak }),
    )
}

/// Passes before the clock starts.
const WARM_UP: usize = 5;
