//! Group normalisation with SiLU in one operation: two passes over the data forward, two backward, where the composite
//! takes a dozen each.

use super::simd::{dot, sigmoid, sum_by, vectorised};
use super::{Values, on_cpu_f32, values, written};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// x `(B, C, H, W)`, weight and bias `(C,)`: (x − mean)/√(var + eps) per sample and group (biased variance), times
/// weight plus bias, then SiLU if `silu`. f32 on the CPU runs fused, anything else through [`group_norm_composite`].
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    if !on_cpu_f32(&[x, weight, bias]) {
        return group_norm_composite(x, weight, bias, groups, eps, silu);
    }
    let op = GroupNorm { groups, eps: eps as f32, silu, statistics: OnceLock::new() };
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

/// The same by candle's own operations; statistics in f32 whatever the dtype.
pub fn group_norm_composite(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if groups == 0 || !c.is_multiple_of(groups) {
        bail!("group_norm: input {:?} with {groups} groups", x.dims());
    }
    let dtype = x.dtype();
    let internal = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let grouped = x.to_dtype(internal)?.reshape((b, groups, (c / groups) * h * w))?;
    let centred = grouped.broadcast_sub(&grouped.mean_keepdim(2)?)?;
    let variance = centred.sqr()?.mean_keepdim(2)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(dtype)?.reshape((b, c, h, w))?;
    let y = normal.broadcast_mul(&weight.reshape((1, c, 1, 1))?)?.broadcast_add(&bias.reshape((1, c, 1, 1))?)?;
    if silu { y.silu() } else { Ok(y) }
}

struct GroupNorm {
    groups: usize,
    eps: f32,
    silu: bool,
    /// Mean and 1/√(var + eps) of every sample's groups, kept from the forward pass.
    statistics: OnceLock<Vec<[f32; 2]>>,
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let channels = match x_layout.dims() {
            &[_, c, _, _] if self.groups > 0 && c % self.groups == 0 => c,
            dims => bail!("group_norm: input {dims:?} with {} groups", self.groups),
        };
        let name = self.name();
        let (x, w, b) = (values(x, x_layout, name)?, values(w, w_layout, name)?, values(b, b_layout, name)?);
        if w.len() != channels || b.len() != channels {
            bail!("group_norm: {} weights and {} biases for {channels} channels", w.len(), b.len());
        }
        let (per_group, pixels) = self.sizes(x_layout.dims());
        let mut statistics = Vec::new();
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_mut((per_group * pixels).max(1))
                .zip(x.par_chunks((per_group * pixels).max(1)))
                .enumerate()
                .map(|(i, (y, x))| {
                    let first = i % self.groups * per_group;
                    forward_group(x, &w[first..first + per_group], &b[first..first + per_group], self, y)
                })
                .collect_into_vec(&mut statistics);
        };
        // SAFETY: the groups are all of y, and each is written whole.
        let y = unsafe { written(x.len(), fill) };
        _ = self.statistics.set(statistics);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(statistics) = self.statistics.get() else { bail!("group_norm: backward before forward") };
        let grad = grad.contiguous()?;
        let (per_group, pixels) = self.sizes(x.dims());
        let channels = w.elem_count();
        let name = self.name();
        let (x_values, w_values, b_values) = (Values::of(x, name)?, Values::of(w, name)?, Values::of(b, name)?);
        let (x_all, w_all, b_all) = (&*x_values, &*w_values, &*b_values);
        let grad_values = Values::of(&grad, name)?;
        // Per sample and channel: Σ dz and Σ dz·x̂, whose sums over the batch are the parameters' gradients.
        let mut sums = vec![[0f32; 2]; x_all.len() / pixels.max(1)];
        let fill = |dx: &mut [MaybeUninit<f32>]| {
            dx.par_chunks_mut((per_group * pixels).max(1))
                .zip(sums.par_chunks_mut(per_group))
                .zip(x_all.par_chunks((per_group * pixels).max(1)))
                .zip(grad_values.par_chunks((per_group * pixels).max(1)))
                .enumerate()
                .for_each_init(Vec::new, |dz, (i, (((dx, sums), x), grad))| {
                    let first = i % self.groups * per_group;
                    let (w, b) = (&w_all[first..first + per_group], &b_all[first..first + per_group]);
                    dz.resize(x.len(), 0.0);
                    backward_group(Group { x, grad, w, b, statistics: statistics[i] }, self.silu, dz, dx, sums);
                });
        };
        // SAFETY: the groups are all of dx, and each is written whole.
        let dx = unsafe { written(x_all.len(), fill) };
        let (mut dw, mut db) = (vec![0f32; channels], vec![0f32; channels]);
        for sample in sums.chunks_exact(channels.max(1)) {
            for (c, [dz, dz_normal]) in sample.iter().enumerate() {
                db[c] += dz;
                dw[c] += dz_normal;
            }
        }
        let device = x.device();
        let dx = Tensor::from_vec(dx, x.dims(), device)?;
        Ok((Some(dx), Some(Tensor::from_vec(dw, channels, device)?), Some(Tensor::from_vec(db, channels, device)?)))
    }
}

impl GroupNorm {
    /// Channels per group, pixels per channel.
    fn sizes(&self, dims: &[usize]) -> (usize, usize) {
        (dims[1] / self.groups, dims[2] * dims[3])
    }
}

vectorised! {
    /// One group of one sample: y = SiLU?(x̂·w + b). Returns its mean and 1/√(var + eps).
    fn forward_group(x: &[f32], w: &[f32], b: &[f32], op: &GroupNorm, y: &mut [MaybeUninit<f32>]) -> [f32; 2] {
        let n = x.len() as f32;
        let mean = sum_by(x, |v| v) / n;
        let variance = sum_by(x, |v| (v - mean) * (v - mean)) / n;
        let rstd = 1.0 / (variance + op.eps).sqrt();
        let pixels = x.len() / w.len();
        for (c, (x, y)) in x.chunks_exact(pixels).zip(y.chunks_exact_mut(pixels)).enumerate() {
            let scale = rstd * w[c];
            let shift = b[c] - mean * scale;
            if op.silu {
                for (y, x) in y.iter_mut().zip(x) {
                    let z = x * scale + shift;
                    y.write(z * sigmoid(z));
                }
            } else {
                for (y, x) in y.iter_mut().zip(x) {
                    y.write(x * scale + shift);
                }
            }
        }
        [mean, rstd]
    }
}

/// What the backward pass of one group reads.
struct Group<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    w: &'a [f32],
    b: &'a [f32],
    /// Mean and 1/√(var + eps).
    statistics: [f32; 2],
}

vectorised! {
    /// With z = x̂·w + b and dz its gradient: dx = rstd·(w·dz − mean(w·dz) − x̂·mean(w·dz·x̂)).
    fn backward_group(group: Group<'_>, silu: bool, dz: &mut [f32], dx: &mut [MaybeUninit<f32>], sums: &mut [[f32; 2]]) {
        let Group { x, grad, w, b, statistics: [mean, rstd] } = group;
        let n = x.len() as f32;
        let pixels = x.len() / w.len();
        let (mut mean_dz, mut mean_dz_normal) = (0f32, 0f32);
        for c in 0..w.len() {
            let range = c * pixels..(c + 1) * pixels;
            let (x, grad, dz) = (&x[range.clone()], &grad[range.clone()], &mut dz[range]);
            if silu {
                let scale = rstd * w[c];
                let shift = b[c] - mean * scale;
                for ((dz, x), grad) in dz.iter_mut().zip(x).zip(grad) {
                    let z = x * scale + shift;
                    let s = sigmoid(z);
                    *dz = grad * s * (1.0 + z * (1.0 - s));
                }
            } else {
                dz.copy_from_slice(grad);
            }
            let sum = sum_by(dz, |v| v);
            let sum_normal = (dot(dz, x) - mean * sum) * rstd;
            sums[c] = [sum, sum_normal];
            mean_dz += w[c] * sum / n;
            mean_dz_normal += w[c] * sum_normal / n;
        }
        for (c, ((x, dz), dx)) in x.chunks_exact(pixels).zip(dz.chunks(pixels)).zip(dx.chunks_mut(pixels)).enumerate() {
            // rstd·(w·dz − m₁ − (x − mean)·rstd·m₂), gathered into one multiply-add chain.
            let (a, slope) = (rstd * w[c], rstd * rstd * mean_dz_normal);
            let offset = mean * slope - rstd * mean_dz;
            for ((dx, dz), x) in dx.iter_mut().zip(dz).zip(x) {
                dx.write(a * dz - slope * x + offset);
            }
        }
    }
}
