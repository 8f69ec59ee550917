//! The CPU's operations, at the shapes of the small UNets here.

use crate::{median, per_1e9};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use dmd_models::ops::{self, AdamwStep, Parameter};
use dmd_models::peak;
use std::time::Instant;

const HEAD: &str = "| operation | forward, ms | with backward, ms | composite | faster | GFLOP/s | GB/s | of the peak | with backward |\n|---|---|---|---|---|---|---|---|---|";

/// Times each operation, forward alone and, where it has a way back, forward with backward.
pub fn run(batch: usize, steps: usize) -> Result<()> {
    let on = Device::Cpu;
    let bench =
        Bench { steps, peak_gflops: peak::gflops(&on, DType::F32, steps)?, peak_gbytes: peak::gbytes(&on, steps)? };
    println!(
        "{} threads; matrix product of 1024: {:.0} GFLOP/s; copy of 64 MiB: {:.1} GB/s",
        rayon::current_num_threads(),
        bench.peak_gflops,
        bench.peak_gbytes
    );
    println!("{HEAD}");
    cases(batch)?.iter().try_for_each(|case| bench.row(case))
}

type Op = dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// An operation with its inputs, all of which get a gradient where it has a way back.
struct Case {
    name: String,
    inputs: Vec<Var>,
    fused: Box<Op>,
    composite: Box<Op>,
    /// Multiplications and additions of a forward pass; backward is taken for twice that.
    flops: f64,
    /// Bytes that a forward pass has to read and write.
    bytes: f64,
    /// And a backward pass; none for what an optimiser does, which has no way back.
    bytes_back: Option<f64>,
}

struct Bench {
    steps: usize,
    peak_gflops: f64,
    peak_gbytes: f64,
}

impl Bench {
    fn row(&self, case: &Case) -> Result<()> {
        let inputs: Vec<Tensor> = case.inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let constants: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
        let alone = |op: &Op| milliseconds(self.steps, || Ok(_ = op(&constants)?));
        let both = |op: &Op| milliseconds(self.steps, || Ok(_ = op(&inputs)?.backward()?));
        let forward = alone(&case.fused)?;
        let with_backward =
            case.bytes_back.map(|bytes| Ok::<_, anyhow::Error>((both(&case.fused)?, bytes))).transpose()?;
        let composite = if with_backward.is_some() { both(&case.composite)? } else { alone(&case.composite)? };
        let (gflops, gbytes) = (case.flops / per_1e9(forward), case.bytes / per_1e9(forward));
        let share = self.share(forward, case.flops, case.bytes);
        let ms = with_backward.map(|(ms, _)| ms);
        let share_with_backward = with_backward.map(|(ms, back)| self.share(ms, 3.0 * case.flops, case.bytes + back));
        println!(
            "| {} | {forward:.3} | {} | {composite:.3} | {:.1}× | {gflops:.0} | {gbytes:.1} | {:.0} % | {} |",
            case.name,
            ms.map_or_else(String::new, |ms| format!("{ms:.3}")),
            composite / ms.unwrap_or(forward),
            100.0 * share,
            share_with_backward.map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share))
        );
        Ok(())
    }

    /// What so many operations and bytes in so long are of the most that the machine does; an operation is held to
    /// whichever of the two would hold it up for longer.
    fn share(&self, ms: f64, flops: f64, bytes: f64) -> f64 {
        (flops / per_1e9(ms) / self.peak_gflops).max(bytes / per_1e9(ms) / self.peak_gbytes)
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
        cases.push(convolution(b, [c, o, side], kernel, stride)?);
    }
    // What one picture alone takes, however many the others are timed with.
    let one = convolution(1, [64, 64, 16], 3, 1)?;
    cases.push(Case { name: format!("{}, batch 1", one.name), ..one });
    for side in [32, 16] {
        cases.push(norm(b, side)?);
    }
    cases.push(attention(b)?);
    cases.extend(maps(b)?);
    cases.extend([squares()?, adamw()?, adamw_of_many()?, average()?]);
    Ok(cases)
}

fn convolution(b: usize, [c, o, side]: [usize; 3], kernel: usize, stride: usize) -> Result<Case> {
    let (out, padding) = (side / stride, kernel / 2);
    let bytes = 4.0 * (b * c * side * side + b * o * out * out) as f64;
    Ok(Case {
        name: format!("conv2d {kernel}x{kernel}, {c} to {o}, {side}x{side}, stride {stride}"),
        inputs: vec![values(&[b, c, side, side])?, values(&[o, c, kernel, kernel])?, values(&[o])?],
        fused: Box::new(move |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding)),
        composite: Box::new(move |t| ops::conv2d_composite(&t[0], &t[1], Some(&t[2]), stride, padding)),
        flops: 2.0 * (b * c * o * out * out * kernel * kernel) as f64,
        bytes,
        // The picture's gradient, and that of the weights.
        bytes_back: Some(2.0 * bytes),
    })
}

fn norm(b: usize, side: usize) -> Result<Case> {
    let n = (b * 64 * side * side) as f64;
    Ok(Case {
        name: format!("group norm and SiLU, 64, {side}x{side}"),
        inputs: vec![values(&[b, 64, side, side])?, values(&[64])?, values(&[64])?],
        fused: Box::new(|t| ops::group_norm(&t[0], &t[1], &t[2], 8, 1e-5, true)),
        composite: Box::new(|t| ops::group_norm_composite(&t[0], &t[1], &t[2], 8, 1e-5, true)),
        flops: 0.0,
        bytes: 8.0 * n,
        bytes_back: Some(12.0 * n),
    })
}

fn attention(b: usize) -> Result<Case> {
    let shape = [b, 64, 16, 16];
    let n = (b * 64 * 256) as f64;
    Ok(Case {
        name: "attention, 2 heads of 32, 16x16".into(),
        inputs: vec![values(&shape)?, values(&shape)?, values(&shape)?],
        fused: Box::new(|t| ops::attention(&t[0], &t[1], &t[2], 2, ops::Mask::None)),
        composite: Box::new(|t| ops::attention_composite(&t[0], &t[1], &t[2], 2, ops::Mask::None)),
        flops: 4.0 * 256.0 * n,
        bytes: 16.0 * n,
        // The three inputs, the result and its gradient read, three gradients written.
        bytes_back: Some(32.0 * n),
    })
}

/// Operations that only move pictures; each way moves as much as the other.
fn maps(b: usize) -> Result<Vec<Case>> {
    let (shape, large) = ([b, 64, 16, 16], [b, 64, 32, 32]);
    let n = (b * 64 * 256) as f64;
    let case = |name: &str, inputs, fused, composite, bytes| Case {
        name: name.into(),
        inputs,
        fused,
        composite,
        flops: 0.0,
        bytes,
        bytes_back: Some(bytes),
    };
    Ok(vec![
        case(
            "upsample 2x, 64, 16x16",
            vec![values(&shape)?],
            Box::new(|t| ops::upsample_2x(&t[0])),
            Box::new(|t| t[0].upsample_nearest2d(32, 32)),
            20.0 * n,
        ),
        case(
            "average pooling 2x, 64, 32x32",
            vec![values(&large)?],
            Box::new(|t| ops::avg_pool_2x(&t[0])),
            Box::new(|t| t[0].avg_pool2d(2)),
            20.0 * n,
        ),
        case(
            "concat, 64 and 64, 16x16",
            vec![values(&shape)?, values(&shape)?],
            Box::new(|t| ops::concat(&t[0], &t[1], 1)),
            Box::new(|t| Tensor::cat(&[&t[0], &t[1]], 1)),
            16.0 * n,
        ),
    ])
}

const MILLION: usize = 1 << 20;
const STEP: AdamwStep =
    AdamwStep { grad_scale: 1.0, betas: [0.9, 0.999], rate: 1e-4, root_scale: 1.0, keep: 1.0, eps: 1e-8 };
/// The norm that gradients are scaled down to; those here are longer.
const CLIP: f64 = 10.0;
const DECAY: f64 = 0.999;

/// A gradient's norm; clipping by it is a factor within AdamW, and a pass of its own in the composite.
fn squares() -> Result<Case> {
    Ok(Case {
        name: "norm and clipping, a million weights".into(),
        inputs: vec![values(&[MILLION])?],
        fused: Box::new(|t| Tensor::new(CLIP / ops::sum_of_squares(t.iter())?.sqrt(), &Device::Cpu)),
        composite: Box::new(|t| &t[0] * clip_composite(t)?),
        flops: 0.0,
        bytes: 4.0 * MILLION as f64,
        bytes_back: None,
    })
}

fn adamw() -> Result<Case> {
    let network = || Ok::<_, anyhow::Error>((values(&[MILLION])?, moments(MILLION)?));
    let (fused, plain) = (network()?, network()?);
    Ok(Case {
        name: "AdamW, a million weights".into(),
        inputs: vec![values(&[MILLION])?],
        fused: Box::new(move |t| {
            ops::adamw(&fused.0, &fused.1, &t[0], STEP)?;
            Ok(t[0].clone())
        }),
        composite: Box::new(move |t| {
            ops::adamw_composite(&plain.0, &plain.1, &t[0], STEP)?;
            Ok(t[0].clone())
        }),
        flops: 0.0,
        // Gradient read; weights and both moments read and written, the moments read once more.
        bytes: 4.0 * 9.0 * MILLION as f64,
        bytes_back: None,
    })
}

/// A whole update, as training makes it: a network has its weights in many tensors, most of them small.
fn adamw_of_many() -> Result<Case> {
    const TENSORS: usize = 150;
    const EACH: usize = 3000;
    let each = |_| Ok::<_, anyhow::Error>((values(&[EACH])?, moments(EACH)?));
    let network = || (0..TENSORS).map(each).collect::<Result<Vec<_>>>();
    let (fused, plain) = (network()?, network()?);
    let guard = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    Ok(Case {
        name: format!("norm, clipping and AdamW, {TENSORS} tensors of {EACH}"),
        inputs: (0..TENSORS).map(|_| values(&[EACH])).collect::<Result<_>>()?,
        fused: Box::new(move |grads| {
            let parameter = |((var, moments), grad)| Parameter { var, moments, grad };
            let parameters: Vec<Parameter> =
                fused.iter().map(|(var, moments)| (var, moments)).zip(grads).map(parameter).collect();
            ops::adamw_all(&parameters, &guard, CLIP, STEP)
        }),
        composite: Box::new(move |grads| {
            let step = AdamwStep { grad_scale: clip_composite(grads)?, ..STEP };
            let update =
                |((var, moments), grad): (&(Var, Var), &Tensor)| ops::adamw_composite(var, moments, grad, step);
            plain.iter().zip(grads).try_for_each(update)?;
            Ok(grads[0].clone())
        }),
        flops: 0.0,
        // As above, and the gradient read once more.
        bytes: 4.0 * 10.0 * (TENSORS * EACH) as f64,
        bytes_back: None,
    })
}

fn average() -> Result<Case> {
    let (fused, plain) = (values(&[MILLION])?, values(&[MILLION])?);
    Ok(Case {
        name: "moving average, a million weights".into(),
        inputs: vec![values(&[MILLION])?],
        fused: Box::new(move |t| {
            ops::average_into(&fused, &t[0], DECAY)?;
            Ok(t[0].clone())
        }),
        composite: Box::new(move |t| {
            plain.set(&((plain.as_tensor() * DECAY)? + (&t[0] * (1.0 - DECAY))?)?)?;
            Ok(t[0].clone())
        }),
        flops: 0.0,
        bytes: 4.0 * 3.0 * MILLION as f64,
        bytes_back: None,
    })
}

/// AdamW's moments of so many weights, none yet.
fn moments(n: usize) -> Result<Var> {
    Ok(Var::zeros((2, n), DType::F32, &Device::Cpu)?)
}

/// What gradients are multiplied by to clip them, by candle's own operations.
fn clip_composite(grads: &[Tensor]) -> candle_core::Result<f64> {
    let squares = grads.iter().map(|grad| grad.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from));
    Ok(CLIP / squares.sum::<candle_core::Result<f64>>()?.sqrt())
}

/// Numbers around zero.
fn values(shape: &[usize]) -> Result<Var> {
    let n = shape.iter().product();
    let draws = dmd_noise::Stream::new(0, u32::try_from(n)?, 0).normal(n);
    Ok(Var::from_tensor(&Tensor::from_vec(draws, shape, &Device::Cpu)?)?)
}

/// Median of some repetitions.
fn milliseconds(steps: usize, work: impl FnMut() -> Result<()>) -> Result<f64> {
    Ok(median(&mut laps(steps, work)?))
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
