//! What an optimiser does to a variable after a backward pass, each in one or two passes over the memory: the norm of a
//! gradient, AdamW, and the moving average. `optimizer.rs` does it to a whole network.

use super::simd::{sum_by, vectorised};
use super::{Values, on_cpu_f32};
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, Var, bail};

/// Sum of squares of some tensors together; in f64 from tensor to tensor. Waits for the device once.
pub fn sum_of_squares<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<f64> {
    let (mut sum, mut elsewhere) = (0.0, None::<Tensor>);
    for tensor in tensors {
        if on_cpu_f32(&[tensor]) {
            sum += f64::from(squares(&Values::of(&tensor.contiguous()?, "sum_of_squares")?));
            continue;
        }
        let squares = tensor.sqr()?.sum_all()?;
        elsewhere = Some(match elsewhere {
            Some(sum) => (sum + squares)?,
            None => squares,
        });
    }
    Ok(match elsewhere {
        Some(rest) => sum + f64::from(rest.to_scalar::<f32>()?),
        None => sum,
    })
}

vectorised! {
    fn squares(x: &[f32]) -> f32 {
        sum_by(x, |v| v * v)
    }
}

/// One update of AdamW (Loshchilov and Hutter 2019, algorithm 2), all of whose scalars are known.
#[derive(Clone, Copy, Debug)]
pub struct AdamwStep {
    /// What the gradient is multiplied by first, to clip it.
    pub grad_scale: f64,
    /// Decay of the mean and of the mean square.
    pub betas: [f64; 2],
    /// Rate over the mean's bias correction.
    pub rate: f64,
    /// 1/√ of the square's bias correction.
    pub root_scale: f64,
    /// What weight decay leaves of the weights.
    pub keep: f64,
    /// Added to the root of the square.
    pub eps: f64,
}

/// Updates `var` and its moments. `moments` is `(2, n)` for a variable of `n` values: means, then mean squares.
pub fn adamw(var: &Var, moments: &Var, grad: &Tensor, step: AdamwStep) -> Result<()> {
    let n = var.elem_count();
    if grad.dims() != var.dims() || moments.dims() != [2, n] {
        bail!("adamw: a gradient {:?} and moments {:?} for {:?}", grad.dims(), moments.dims(), var.dims());
    }
    let grad = grad.contiguous()?;
    if on_cpu_f32(&[var, &grad]) {
        let update_moments = |moments: &mut [f32], grad: &[f32]| {
            let (mean, square) = moments.split_at_mut(grad.len());
            moments_pass(mean, square, grad, step);
        };
        let update_weights = |weights: &mut [f32], moments: &[f32]| {
            let (mean, square) = moments.split_at(weights.len());
            weights_pass(weights, mean, square, step);
        };
        moments.inplace_op2(&grad, &InPlace(update_moments))?;
        return var.inplace_op2(moments, &InPlace(update_weights));
    }
    adamw_composite(var, moments, &grad, step)
}

/// The same by candle's own operations.
pub fn adamw_composite(var: &Var, moments: &Var, grad: &Tensor, step: AdamwStep) -> Result<()> {
    let [b1, b2] = step.betas;
    let (mean, square) = (moments.get(0)?.reshape(grad.shape())?, moments.get(1)?.reshape(grad.shape())?);
    let mean = ((mean * b1)? + (grad * ((1.0 - b1) * step.grad_scale))?)?;
    let square = ((square * b2)? + (grad.sqr()? * ((1.0 - b2) * step.grad_scale * step.grad_scale))?)?;
    moments.set(&Tensor::stack(&[mean.flatten_all()?, square.flatten_all()?], 0)?)?;
    let root = ((square.sqrt()? * step.root_scale)? + step.eps)?;
    var.set(&((var.as_tensor() * step.keep)? - (mean.div(&root)? * step.rate)?)?)
}

/// `average ← average + (value − average)·(1 − decay)`, the exponential moving average.
pub fn average_into(average: &Var, value: &Tensor, decay: f64) -> Result<()> {
    if average.dims() != value.dims() {
        bail!("average_into: {:?} into {:?}", value.dims(), average.dims());
    }
    if on_cpu_f32(&[average, value]) {
        let update = |average: &mut [f32], value: &[f32]| average_pass(average, value, (1.0 - decay) as f32);
        return average.inplace_op2(value, &InPlace(update));
    }
    average.set(&((average.as_tensor() * decay)? + (value * (1.0 - decay))?)?)
}

vectorised! {
    fn moments_pass(mean: &mut [f32], square: &mut [f32], grad: &[f32], step: AdamwStep) {
        let [b1, b2] = step.betas.map(|beta| beta as f32);
        let (to_mean, to_square) = ((1.0 - step.betas[0]) as f32, (1.0 - step.betas[1]) as f32);
        let scale = step.grad_scale as f32;
        for ((m, v), g) in mean.iter_mut().zip(square).zip(grad) {
            let g = g * scale;
            *m = *m * b1 + g * to_mean;
            *v = *v * b2 + g * g * to_square;
        }
    }
}

vectorised! {
    fn weights_pass(weights: &mut [f32], mean: &[f32], square: &[f32], step: AdamwStep) {
        let (keep, rate) = (step.keep as f32, step.rate as f32);
        let (root_scale, eps) = (step.root_scale as f32, step.eps as f32);
        for ((p, m), v) in weights.iter_mut().zip(mean).zip(square) {
            *p = *p * keep - m * rate / (v.sqrt() * root_scale + eps);
        }
    }
}

vectorised! {
    fn average_pass(average: &mut [f32], value: &[f32], share: f32) {
        average.iter_mut().zip(value).for_each(|(a, v)| *a += (v - *a) * share);
    }
}

/// A pass over a destination and a source, in place.
struct InPlace<F>(F);

impl<F: Fn(&mut [f32], &[f32])> InplaceOp2 for InPlace<F> {
    fn name(&self) -> &'static str {
        "in_place"
    }

    fn cpu_fwd(&self, to: &mut CpuStorage, to_layout: &Layout, from: &CpuStorage, layout: &Layout) -> Result<()> {
        match (to, from, to_layout.contiguous_offsets(), layout.contiguous_offsets()) {
            (CpuStorage::F32(to), CpuStorage::F32(from), Some((to_start, to_end)), Some((start, end))) => {
                self.0(&mut to[to_start..to_end], &from[start..end]);
                Ok(())
            }
            _ => bail!("in_place: needs contiguous f32 tensors"),
        }
    }
}
