//! A GPU's operations: the kernels of a network's pass, pictures with channels last, beside candle's own operations.

use crate::{median, per_1e9};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use dmd_models::ops::nhwc::{self, Attention, Norm, NormInput, Steps};
use dmd_models::ops::{self, AdamwStep, Parameter};
use dmd_models::peak;
use std::time::Instant;

type Work = Box<dyn Fn() -> candle_core::Result<()>>;

/// One operation, with the work of its way back, and both by candle.
struct Case {
    name: String,
    forward: Work,
    back: Work,
    composite: Work,
    /// Multiplications and additions of a forward pass.
    flops: f64,
    /// Bytes that a forward pass has to read and write.
    bytes: f64,
}

const HEAD: &str = "| operation | forward, ms | with backward, ms | candle | faster | TFLOP/s | GB/s | of the peak |\n|---|---|---|---|---|---|---|---|";

/// Times each operation on this GPU.
pub fn run(device: &Device, dtype: DType, batch: usize, steps: usize) -> Result<()> {
    let bench = Bench { device, dtype, batch };
    let (peak_tflops, peak_gbytes) = (peak::gflops(device, dtype, steps)? / 1e3, peak::gbytes(device, steps)?);
    println!("matrix product of 8192: {peak_tflops:.0} TFLOP/s; copy of 256 MiB: {peak_gbytes:.0} GB/s");
    println!("{HEAD}");
    for case in bench.cases()? {
        let forward = bench.milliseconds(steps, &case.forward)?;
        let both = forward + bench.milliseconds(steps, &case.back)?;
        // Many times as slow, and measured to a tenth all the same.
        let composite = bench.milliseconds(1, &case.composite)?;
        let (tflops, gbytes) = (case.flops / per_1e9(forward) / 1e3, case.bytes / per_1e9(forward));
        let share = (tflops / peak_tflops).max(gbytes / peak_gbytes);
        println!(
            "| {} | {forward:.3} | {both:.3} | {composite:.2} | {:.1}× | {tflops:.0} | {gbytes:.0} | {:.0} % |",
            case.name,
            composite / both,
            100.0 * share
        );
    }
    Ok(())
}

struct Bench<'a> {
    device: &'a Device,
    dtype: DType,
    batch: usize,
}

impl Bench<'_> {
    /// Median time of one call among many that are sent without waiting in between.
    fn milliseconds(&self, laps: usize, work: &Work) -> Result<f64> {
        const CALLS: usize = 8;
        let mut found = Vec::new();
        for lap in 0..=laps {
            self.device.synchronize()?;
            let started = Instant::now();
            (0..CALLS).try_for_each(|_| work())?;
            self.device.synchronize()?;
            if lap > 0 {
                found.push(started.elapsed().as_secs_f64() * 1e3 / CALLS as f64);
            }
        }
        Ok(median(&mut found))
    }

    /// Numbers around zero.
    fn values(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1.0, shape, self.device)?)
    }

    fn picture(&self, side: usize, channels: usize) -> Result<Tensor> {
        Ok(self.values(&[self.batch, side, side, channels])?.to_dtype(self.dtype)?)
    }

    /// The same with channels first, for candle.
    fn var(&self, shape: &[usize]) -> Result<Var> {
        Ok(Var::from_tensor(&self.values(shape)?)?)
    }

    /// The shapes of a UNet for CIFAR-10.
    fn cases(&self) -> Result<Vec<Case>> {
        let mut cases = Vec::new();
        for [c, o, side, kernel, stride] in [
            [128, 128, 32, 3, 1],
            [256, 256, 16, 3, 1],
            [256, 256, 8, 3, 1],
            [512, 256, 16, 3, 1],
            [256, 256, 16, 1, 1],
            [8, 128, 32, 3, 1],
            [128, 128, 32, 3, 2],
        ] {
            cases.push(self.convolution([c, o, side], kernel, stride)?);
        }
        for [c, side] in [[128, 32], [384, 32], [256, 16]] {
            cases.push(self.norm(c, side)?);
        }
        cases.push(self.attention()?);
        cases.extend(self.maps()?);
        cases.push(self.adamw()?);
        cases.extend(self.normal()?);
        Ok(cases)
    }

    fn convolution(&self, [c, o, side]: [usize; 3], kernel: usize, stride: usize) -> Result<Case> {
        let (b, out, size) = (self.batch, side / stride, self.dtype.size_in_bytes());
        let steps = Steps { stride, padding: kernel / 2 };
        let (x, w) = (self.picture(side, c)?, self.values(&[o, kernel, kernel, c])?.to_dtype(self.dtype)?);
        let dy = self.picture(out, o)?;
        let (plain_x, plain_w) = (self.var(&[b, c, side, side])?, self.var(&[o, c, kernel, kernel])?);
        let (x_again, w_again) = (x.clone(), w.clone());
        Ok(Case {
            name: format!("convolution {kernel}x{kernel}, {c} to {o}, {side}x{side}, stride {stride}"),
            forward: Box::new(move || nhwc::convolve(&x, &w, steps).map(drop)),
            back: Box::new(move || {
                nhwc::convolve_backward_data(&dy, &w_again, x_again.dims(), steps)?;
                nhwc::convolve_backward_filter(&x_again, &dy, w_again.dims(), steps).map(drop)
            }),
            composite: Box::new(move || {
                ops::conv2d_composite(&plain_x, &plain_w, None, stride, kernel / 2)?.backward().map(drop)
            }),
            flops: 2.0 * (b * c * o * out * out * kernel * kernel) as f64,
            bytes: (size * (b * c * side * side + b * o * out * out)) as f64,
        })
    }

    fn norm(&self, c: usize, side: usize) -> Result<Case> {
        let (x, dy) = (self.picture(side, c)?, self.picture(side, c)?);
        let (weight, beta) = (self.values(&[c])?, self.values(&[c])?);
        let norm = Norm { weight: weight.clone(), beta: beta.clone(), groups: 32, eps: 1e-5, silu: true };
        let (_, stats) = nhwc::group_norm(&x, None, &norm)?;
        let (x_again, norm_again) = (x.clone(), norm.clone());
        let plain = self.var(&[self.batch, c, side, side])?;
        let bytes = (2 * self.dtype.size_in_bytes() * x.elem_count()) as f64;
        Ok(Case {
            name: format!("group norm and SiLU, {c}, {side}x{side}"),
            forward: Box::new(move || nhwc::group_norm(&x, None, &norm).map(drop)),
            back: Box::new(move || {
                let input = NormInput { x: &x_again, bias: None, stats: &stats };
                nhwc::group_norm_backward(&input, &norm_again, &dy, None).map(drop)
            }),
            composite: Box::new(move || {
                ops::group_norm_composite(&plain, &weight, &beta, 32, 1e-5, true)?.backward().map(drop)
            }),
            flops: 0.0,
            bytes,
        })
    }

    fn attention(&self) -> Result<Case> {
        const HEADS: usize = 4;
        let qkv = [self.picture(16, 256)?, self.picture(16, 256)?, self.picture(16, 256)?];
        let dy = self.picture(16, 256)?;
        let elements = qkv[0].elem_count();
        let attention = move || Attention { heads: HEADS, qkv: qkv.clone(), biases: [None, None] };
        let (o, lse) = attention().forward()?;
        let again = attention.clone();
        let plain = [0; 3].map(|_| self.var(&[self.batch, 256, 16, 16]));
        let [q, k, v] = plain;
        let (q, k, v) = (q?, k?, v?);
        Ok(Case {
            name: format!("attention, {HEADS} heads of 64, 16x16"),
            forward: Box::new(move || attention().forward().map(drop)),
            back: Box::new(move || again().backward(&o, &lse, &dy).map(drop)),
            composite: Box::new(move || {
                ops::attention_composite(&q, &k, &v, HEADS, ops::Mask::None)?.backward().map(drop)
            }),
            flops: 4.0 * (elements * 256) as f64,
            bytes: (4 * self.dtype.size_in_bytes() * elements) as f64,
        })
    }

    /// Operations that only move maps.
    fn maps(&self) -> Result<Vec<Case>> {
        let (x, y) = (self.picture(32, 128)?, self.picture(32, 128)?);
        let small = self.picture(16, 128)?;
        let bytes = (self.dtype.size_in_bytes() * x.elem_count()) as f64;
        let (plain_x, plain_y) = (self.var(&[self.batch, 128, 32, 32])?, self.var(&[self.batch, 128, 32, 32])?);
        let plain_small = self.var(&[self.batch, 128, 16, 16])?;
        let joined = nhwc::concat((&x, None), (&y, None))?;
        let rows = x.reshape((1, x.elem_count() / 128, 128))?;
        let case = |name: &str, bytes: f64, forward: Work, back: Work, composite: Work| Case {
            name: format!("{name}, 128, 32x32"),
            forward,
            back,
            composite,
            flops: 0.0,
            bytes,
        };
        let nothing = || -> Work { Box::new(|| Ok(())) };
        let (a, b, c, d) = (x.clone(), y.clone(), x.clone(), y);
        let (p, q, r, s) = (plain_x.clone(), plain_y.clone(), plain_x.clone(), plain_y);
        Ok(vec![
            case(
                "sum of two",
                3.0 * bytes,
                Box::new(move || nhwc::add((&a, None), (&b, None)).map(drop)),
                nothing(),
                Box::new(move || (p.as_tensor() + q.as_tensor())?.backward().map(drop)),
            ),
            case(
                "joining two",
                4.0 * bytes,
                Box::new(move || nhwc::concat((&c, None), (&d, None)).map(drop)),
                Box::new(move || nhwc::split(&joined, 128).map(drop)),
                Box::new(move || Tensor::cat(&[r.as_tensor(), s.as_tensor()], 1)?.backward().map(drop)),
            ),
            case(
                "doubling from 16x16",
                1.25 * bytes,
                Box::new(move || nhwc::upsample((&small, None)).map(drop)),
                Box::new(move || nhwc::upsample_backward(&x).map(drop)),
                Box::new(move || plain_small.upsample_nearest2d(32, 32)?.backward().map(drop)),
            ),
            case(
                "sums over pixels",
                bytes,
                Box::new(move || nhwc::row_sums(&rows).map(drop)),
                nothing(),
                Box::new(move || plain_x.sum((0, 2, 3)).map(drop)),
            ),
        ])
    }

    /// As many weights as a UNet for CIFAR-10 has, in as many tensors.
    fn adamw(&self) -> Result<Case> {
        const TENSORS: usize = 350;
        const EACH: usize = 100_000;
        let step =
            AdamwStep { grad_scale: 1.0, betas: [0.9, 0.999], rate: 1e-4, root_scale: 1.0, keep: 1.0, eps: 1e-8 };
        let all = (0..TENSORS)
            .map(|_| Ok((self.var(&[EACH])?, Var::zeros((2, EACH), DType::F32, self.device)?, self.values(&[EACH])?)))
            .collect::<Result<Vec<(Var, Var, Tensor)>>>()?;
        let guard = Tensor::zeros((), DType::F32, self.device)?;
        let plain = all.clone();
        Ok(Case {
            name: format!("norm, clipping and AdamW, {TENSORS} tensors of {EACH}"),
            forward: Box::new(move || {
                let parameters: Vec<Parameter> =
                    all.iter().map(|(var, moments, grad)| Parameter { var, moments, grad }).collect();
                ops::adamw_all(&parameters, &guard, 10.0, step).map(drop)
            }),
            back: Box::new(|| Ok(())),
            composite: Box::new(move || {
                ops::sum_of_squares(plain.iter().map(|(_, _, grad)| grad))?;
                plain.iter().try_for_each(|(var, moments, grad)| ops::adamw_composite(var, moments, grad, step))
            }),
            flops: 0.0,
            // The gradient is read twice; weights and both moments are read and written.
            bytes: 4.0 * 8.0 * (TENSORS * EACH) as f64,
        })
    }

    /// The GPU makes its noise itself; beside it, the CPU's and the way there.
    #[cfg(feature = "cuda")]
    fn normal(&self) -> Result<Vec<Case>> {
        let n = self.batch * 3 * 32 * 32;
        let (device, there) = (self.device.clone(), self.device.clone());
        Ok(vec![Case {
            name: format!("{n} normals"),
            forward: Box::new(move || ops::philox_normal(0, 2, 0, &[n], &device).map(drop)),
            back: Box::new(|| Ok(())),
            composite: Box::new(move || {
                Tensor::from_vec(dmd_noise::Stream::new(0, 2, 0).normal(n), n, &there).map(drop)
            }),
            flops: 0.0,
            bytes: 4.0 * n as f64,
        }])
    }

    #[cfg(not(feature = "cuda"))]
    fn normal(&self) -> Result<Vec<Case>> {
        Ok(Vec::new())
    }
}
