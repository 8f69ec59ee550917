//! `dmd bench ops`: every fused operation beside its composite of candle's operations, and beside what this machine can
//! do at most. Here those of the CPU.

use super::bench_gpu_ops;
use crate::cli::BenchOpsArgs;
use crate::config::at_least_one;
use crate::device::check_precision;
use crate::eval::median;
use crate::output::say;
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use dmd_models::ops::{self, AdamwStep};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::time::Instant;

/// Times each operation, forward alone and forward with backward.
pub fn run(args: &BenchOpsArgs) -> Result<Value> {
    at_least_one("--steps", args.steps as u64)?;
    at_least_one("--batch", args.batch as u64)?;
    let device = args.device.open()?;
    check_precision(args.precision, &device)?;
    if device.is_cuda() {
        return bench_gpu_ops::run(args, &device);
    }
    let bench =
        Bench { steps: args.steps, peak_gflops: peak_gflops(args.steps)?, peak_gbytes: peak_gbytes(args.steps)? };
    say(&format!(
        "{} threads; matrix product of 1024: {:.0} GFLOP/s; copy of 64 MiB: {:.1} GB/s",
        rayon::current_num_threads(),
        bench.peak_gflops,
        bench.peak_gbytes
    ));
    say(HEAD);
    let rows: Vec<Value> = cases(args.batch)?.iter().map(|case| bench.row(case)).collect::<Result<_>>()?;
    Ok(json!({
        "threads": rayon::current_num_threads(),
        "peak_gflops": bench.peak_gflops,
        "peak_gbytes": bench.peak_gbytes,
        "results": rows,
    }))
}

const HEAD: &str = "| operation | forward, ms | with backward, ms | composite | faster | GFLOP/s | GB/s | of the peak |\n|---|---|---|---|---|---|---|---|";

/// What the machine does at most: 10⁹ multiplications and additions a second, in a large matrix product; the fastest of
/// some repetitions.
pub fn peak_gflops(steps: usize) -> Result<f64> {
    const SIDE: usize = 1024;
    let a = Tensor::ones((SIDE, SIDE), DType::F32, &Device::Cpu)?;
    let product = laps(steps, || Ok(_ = a.matmul(&a)?))?;
    Ok(2.0 * (SIDE * SIDE * SIDE) as f64 / per_1e9(fastest(product)))
}

/// And 10⁹ bytes a second, read and written, in a large copy.
fn peak_gbytes(steps: usize) -> Result<f64> {
    let from = vec![1f32; 16 << 20];
    let mut to = vec![0f32; from.len()];
    let share = from.len() / rayon::current_num_threads();
    let copy = laps(steps, || {
        to.par_chunks_mut(share).zip(from.par_chunks(share)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })?;
    Ok(2.0 * size_of_val(&from[..]) as f64 / per_1e9(fastest(copy)))
}

/// What to divide operations or bytes by for 10⁹ of them a second.
pub fn per_1e9(ms: f64) -> f64 {
    ms * 1e6
}

type Op = dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// An operation with its inputs, all of which get a gradient.
struct Case {
    name: String,
    inputs: Vec<Var>,
    fused: Box<Op>,
    composite: Box<Op>,
    /// Multiplications and additions of a forward pass; backward is taken for twice that.
    flops: f64,
    /// Bytes that a forward pass has to read and write.
    bytes: f64,
}

struct Bench {
    steps: usize,
    peak_gflops: f64,
    peak_gbytes: f64,
}

impl Bench {
    fn row(&self, case: &Case) -> Result<Value> {
        let inputs: Vec<Tensor> = case.inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let constants: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
        let forward = milliseconds(self.steps, || Ok(_ = (case.fused)(&constants)?))?;
        let both = |op: &Op| milliseconds(self.steps, || Ok(_ = op(&inputs)?.backward()?));
        let (fused, composite) = (both(&case.fused)?, both(&case.composite)?);
        let (gflops, gbytes) = (case.flops / per_1e9(forward), case.bytes / per_1e9(forward));
        // An operation is held to whichever of the two would hold it up for longer.
        let share = (gflops / self.peak_gflops).max(gbytes / self.peak_gbytes);
        say(&format!(
            "| {} | {forward:.3} | {fused:.3} | {composite:.3} | {:.1}× | {gflops:.0} | {gbytes:.1} | {:.0} % |",
            case.name,
            composite / fused,
            100.0 * share
        ));
        Ok(json!({
            "what": case.name,
            "forward_ms": forward,
            "ms": fused,
            "composite_ms": composite,
            "gflops": gflops,
            "gbytes": gbytes,
            "share_of_peak": share,
        }))
    }
}

/// The shapes of the small UNets here.
fn cases(b: usize) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for [c, o, side, kernel, stride] in [
        [64, 64, 32, 3, 1],
        [64, 64, 16, 3, 1],
        [64, 64, 8, 3, 1],
        [128, 64, 16, 3, 1],
        [64, 64, 16, 1, 1],
        [3, 32, 32, 3, 1],
        [64, 64, 16, 3, 2],
    ] {
        let out = side / stride;
        let padding = kernel / 2;
        cases.push(Case {
            name: format!("conv2d {kernel}x{kernel}, {c} to {o}, {side}x{side}, stride {stride}"),
            inputs: vec![values(&[b, c, side, side])?, values(&[o, c, kernel, kernel])?, values(&[o])?],
            fused: Box::new(move |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding)),
            composite: Box::new(move |t| ops::conv2d_composite(&t[0], &t[1], Some(&t[2]), stride, padding)),
            flops: 2.0 * (b * c * o * out * out * kernel * kernel) as f64,
            bytes: 4.0 * (b * c * side * side + b * o * out * out) as f64,
        });
    }
    for side in [32, 16] {
        let n = b * 64 * side * side;
        cases.push(Case {
            name: format!("group norm and SiLU, 64, {side}x{side}"),
            inputs: vec![values(&[b, 64, side, side])?, values(&[64])?, values(&[64])?],
            fused: Box::new(|t| ops::group_norm(&t[0], &t[1], &t[2], 8, 1e-5, true)),
            composite: Box::new(|t| ops::group_norm_composite(&t[0], &t[1], &t[2], 8, 1e-5, true)),
            flops: 0.0,
            bytes: 8.0 * n as f64,
        });
    }
    let shape = [b, 64, 16, 16];
    cases.push(Case {
        name: "attention, 2 heads of 32, 16x16".into(),
        inputs: vec![values(&shape)?, values(&shape)?, values(&shape)?],
        fused: Box::new(|t| ops::attention(&t[0], &t[1], &t[2], 2)),
        composite: Box::new(|t| ops::attention_composite(&t[0], &t[1], &t[2], 2)),
        flops: 4.0 * (b * 64 * 256 * 256) as f64,
        bytes: 16.0 * (b * 64 * 256) as f64,
    });
    let n = (b * 64 * 256) as f64;
    cases.push(Case {
        name: "upsample 2x, 64, 16x16".into(),
        inputs: vec![values(&shape)?],
        fused: Box::new(|t| ops::upsample_2x(&t[0])),
        composite: Box::new(|t| t[0].upsample_nearest2d(32, 32)),
        flops: 0.0,
        bytes: 20.0 * n,
    });
    cases.push(Case {
        name: "concat, 64 and 64, 16x16".into(),
        inputs: vec![values(&shape)?, values(&shape)?],
        fused: Box::new(|t| ops::concat(&t[0], &t[1])),
        composite: Box::new(|t| Tensor::cat(&[&t[0], &t[1]], 1)),
        flops: 0.0,
        bytes: 16.0 * n,
    });
    cases.extend([adamw_case()?]);
    Ok(cases)
}

/// A million weights; "with backward" is the same work again, as there is no backward.
fn adamw_case() -> Result<Case> {
    const N: usize = 1 << 20;
    let step = AdamwStep { grad_scale: 1.0, betas: [0.9, 0.999], rate: 1e-4, root_scale: 1.0, keep: 1.0, eps: 1e-8 };
    let moments = || Var::zeros((2, N), DType::F32, &Device::Cpu);
    let (fused_var, fused_moments) = (values(&[N])?, moments()?);
    let (plain_var, plain_moments) = (values(&[N])?, moments()?);
    Ok(Case {
        name: "AdamW, a million weights".into(),
        inputs: vec![values(&[N])?],
        fused: Box::new(move |t| {
            ops::adamw(&fused_var, &fused_moments, &t[0].detach(), step)?;
            t[0].narrow(0, 0, 1)
        }),
        composite: Box::new(move |t| {
            ops::adamw_composite(&plain_var, &plain_moments, &t[0].detach(), step)?;
            t[0].narrow(0, 0, 1)
        }),
        flops: 0.0,
        // Gradient read; weights and both moments read and written, the moments read once more.
        bytes: 4.0 * 9.0 * N as f64,
    })
}

/// Numbers around zero.
fn values(shape: &[usize]) -> Result<Var> {
    let n = shape.iter().product();
    let draws = dmd_runtime::noise::Stream::new(0, u32::try_from(n)?, 0).normal(n);
    Ok(Var::from_tensor(&Tensor::from_vec(draws, shape, &Device::Cpu)?)?)
}

/// Median of some repetitions.
fn milliseconds(steps: usize, work: impl FnMut() -> Result<()>) -> Result<f64> {
    Ok(median(&mut laps(steps, work)?))
}

pub fn fastest(laps: Vec<f64>) -> f64 {
    laps.into_iter().fold(f64::INFINITY, f64::min)
}

/// Times in milliseconds, after two repetitions that do not count.
fn laps(steps: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut laps = Vec::new();
    for lap in 0..steps + 2 {
        let started = Instant::now();
        work()?;
        if lap >= 2 {
            laps.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(laps)
}
