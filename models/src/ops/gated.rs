//! Pointwise non-linearities and gated maps, x·f(g), as one pass forward and one back.

use super::simd::{exp, sigmoid, vectorised};
use super::{Values, on_cpu_f32, values, written};
use crate::Activation;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// f(x), any shape. What candle has no operation of its own for runs fused where it is f32 on the CPU, anything else
/// through [`activation_composite`].
pub fn activation(x: &Tensor, act: Activation) -> Result<Tensor> {
    match act {
        Activation::GeluTanh | Activation::QuickGelu if on_cpu_f32(&[x]) => x.contiguous()?.apply_op1(Pointwise(act)),
        _ => activation_composite(x, act),
    }
}

/// The same by candle's own operations.
pub fn activation_composite(x: &Tensor, act: Activation) -> Result<Tensor> {
    match act {
        Activation::Silu => x.silu(),
        // log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|): no overflow at either end.
        Activation::Mish => x * (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?.tanh()?,
        Activation::Gelu => x.gelu_erf(),
        Activation::Relu => x.relu(),
        Activation::Tanh => x.tanh(),
        // Not candle's own gelu, whose gradient is another formula's.
        Activation::GeluTanh => (x * 0.5)? * (((x + (x.powf(3.0)? * CUBIC)?)? * ROOT_2_OVER_PI)?.tanh()? + 1.0)?,
        Activation::QuickGelu => x * ((x * -QUICK)?.exp()? + 1.0)?.recip()?,
    }
}

/// x `(B, 2C, H, W)`: the first C channels times f of the others, `(B, C, H, W)` (GEGLU where f is gelu). f32 on the CPU
/// runs fused, anything else through [`gated_composite`].
pub fn gated(x: &Tensor, act: Activation) -> Result<Tensor> {
    match on_cpu_f32(&[x]) {
        true => x.contiguous()?.apply_op1(Gated(act)),
        false => gated_composite(x, act),
    }
}

/// The same by candle's own operations.
pub fn gated_composite(x: &Tensor, act: Activation) -> Result<Tensor> {
    let c = x.dim(1)? / 2;
    x.narrow(1, 0, c)? * activation_composite(&x.narrow(1, c, c)?.contiguous()?, act)?
}

/// √(2/π), and the factor of x³, of gelu by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2).
const ROOT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;
/// And that of x in its form by a sigmoid, CLIP's "quick_gelu".
const QUICK: f64 = 1.702;

/// Values that one task takes.
const PART: usize = 4096;

struct Pointwise(Activation);

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout, self.name())?;
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_mut(PART).zip(x.par_chunks(PART)).for_each(|(y, x)| forward(self.0, x, None, y));
        };
        // SAFETY: the parts are all of y, and each is written whole.
        let y = unsafe { written(x.len(), fill) };
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (xs, gs) = (Values::of(x, self.name())?, Values::of(&grad, self.name())?);
        let fill = |dx: &mut [MaybeUninit<f32>]| {
            let inputs = xs.par_chunks(PART).zip(gs.par_chunks(PART));
            dx.par_chunks_mut(PART).zip(inputs).for_each(|(dx, (x, grad))| backward(self.0, x, grad, None, dx));
        };
        // SAFETY: the parts are all of dx, and each is written whole.
        let dx = unsafe { written(xs.len(), fill) };
        Tensor::from_vec(dx, x.dims(), x.device()).map(Some)
    }
}

struct Gated(Activation);

impl CustomOp1 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let &[b, c, h, w] = layout.dims() else { bail!("gated: shape {:?}", layout.dims()) };
        if c % 2 != 0 {
            bail!("gated: {c} channels are no two halves");
        }
        let (x, half) = (values(x, layout, self.name())?, (c / 2 * h * w).max(1));
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_mut(half).zip(x.par_chunks(2 * half)).for_each(|(y, x)| {
                let (values, gates) = x.split_at(half);
                let parts = y.par_chunks_mut(PART).zip(values.par_chunks(PART).zip(gates.par_chunks(PART)));
                parts.for_each(|(y, (values, gates))| forward(self.0, gates, Some(values), y));
            });
        };
        // SAFETY: every sample of y is half as long as one of x, and each part of it is written whole.
        let y = unsafe { written(x.len() / 2, fill) };
        Ok((CpuStorage::F32(y), Shape::from((b, c / 2, h, w))))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let half = (y.elem_count() / y.dim(0)?.max(1)).max(1);
        let (xs, gs) = (Values::of(x, self.name())?, Values::of(&grad, self.name())?);
        let fill = |dx: &mut [MaybeUninit<f32>]| {
            let samples = xs.par_chunks(2 * half).zip(gs.par_chunks(half));
            dx.par_chunks_mut(2 * half).zip(samples).for_each(|(dx, (x, grad))| {
                let ((values, gates), (to_values, to_gates)) = (x.split_at(half), dx.split_at_mut(half));
                let inputs = values.par_chunks(PART).zip(gates.par_chunks(PART)).zip(grad.par_chunks(PART));
                let outputs = to_values.par_chunks_mut(PART).zip(to_gates.par_chunks_mut(PART));
                outputs.zip(inputs).for_each(|((to_values, to_gates), ((values, gates), grad))| {
                    forward(self.0, gates, Some(grad), to_values);
                    backward(self.0, gates, grad, Some(values), to_gates);
                });
            });
        };
        // SAFETY: both halves of every sample of dx are written whole.
        let dx = unsafe { written(xs.len(), fill) };
        Tensor::from_vec(dx, x.dims(), x.device()).map(Some)
    }
}

/// Runs a loop with `$f` as the function of an activation, f32 to its value and slope, chosen before the loop.
macro_rules! with_function {
    ($act:expr, $f:ident => $body:expr) => {
        match $act {
            Activation::Silu => {
                let $f = silu;
                $body
            }
            Activation::Mish => {
                let $f = mish;
                $body
            }
            Activation::Gelu => {
                let $f = gelu;
                $body
            }
            Activation::GeluTanh => {
                let $f = gelu_tanh;
                $body
            }
            Activation::QuickGelu => {
                let $f = quick_gelu;
                $body
            }
            Activation::Relu => {
                let $f = relu;
                $body
            }
            Activation::Tanh => {
                let $f = tanh;
                $body
            }
        }
    };
}

vectorised! {
    /// f(x), times another factor if there is one.
    fn forward(act: Activation, x: &[f32], factor: Option<&[f32]>, y: &mut [MaybeUninit<f32>]) {
        with_function!(act, f => match factor {
            Some(factor) => y.iter_mut().zip(x).zip(factor).for_each(|((y, x), by)| _ = y.write(f(*x)[0] * by)),
            None => y.iter_mut().zip(x).for_each(|(y, x)| _ = y.write(f(*x)[0])),
        });
    }
}

vectorised! {
    /// f′(x)·grad, times another factor if there is one.
    fn backward(act: Activation, x: &[f32], grad: &[f32], factor: Option<&[f32]>, dx: &mut [MaybeUninit<f32>]) {
        let inputs = dx.iter_mut().zip(x).zip(grad);
        with_function!(act, f => match factor {
            Some(factor) => {
                inputs.zip(factor).for_each(|(((dx, x), grad), by)| _ = dx.write(f(*x)[1] * grad * by));
            }
            None => inputs.for_each(|((dx, x), grad)| _ = dx.write(f(*x)[1] * grad)),
        });
    }
}

#[inline(always)]
fn silu(x: f32) -> [f32; 2] {
    let s = sigmoid(x);
    [x * s, s * (1.0 + x * (1.0 - s))]
}

/// tanh(softplus(x)) = (1 − t²)/(1 + t²) with t = sigmoid(−x).
#[inline(always)]
fn mish(x: f32) -> [f32; 2] {
    let t = sigmoid(-x);
    let below = 1.0 / (1.0 + t * t);
    let gate = (1.0 - t * t) * below;
    [x * gate, gate + x * (4.0 * t * t * (1.0 - t) * below * below)]
}

#[inline(always)]
fn gelu(x: f32) -> [f32; 2] {
    const ROOT_1_OVER_2PI: f32 = 0.398_942_3;
    let below = 0.5 + 0.5 * erf(x * std::f32::consts::FRAC_1_SQRT_2);
    [x * below, below + x * ROOT_1_OVER_2PI * exp(-0.5 * x * x)]
}

/// ½(1 + tanh u) is sigmoid(2u).
#[inline(always)]
fn gelu_tanh(x: f32) -> [f32; 2] {
    let (a, b) = (2.0 * ROOT_2_OVER_PI as f32, (2.0 * ROOT_2_OVER_PI * CUBIC) as f32);
    let s = sigmoid(x * (a + b * x * x));
    [x * s, s + x * s * (1.0 - s) * (a + 3.0 * b * x * x)]
}

#[inline(always)]
fn quick_gelu(x: f32) -> [f32; 2] {
    let s = sigmoid(QUICK as f32 * x);
    [x * s, s + QUICK as f32 * x * s * (1.0 - s)]
}

#[inline(always)]
fn relu(x: f32) -> [f32; 2] {
    [x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }]
}

/// tanh x = 2·sigmoid(2x) − 1.
#[inline(always)]
fn tanh(x: f32) -> [f32; 2] {
    let y = 2.0 * sigmoid(2.0 * x) - 1.0;
    [y, 1.0 - y * y]
}

/// The error function to a few units in the last place, without branches: the quotient of polynomials in x² that Eigen
/// and XLA use.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let mut above = -2.726_142_3e-10;
    for c in [2.770_681_3e-8, -2.101_024e-6, -5.692_506_5e-5, -7.349_906_5e-4, -2.954_6e-3, -1.609_603_3e-2] {
        above = above * square + c;
    }
    let mut below = -1.456_607_2e-5;
    for c in [-2.133_740_5e-4, -1.682_827e-3, -7.373_329_5e-3, -1.426_473_9e-2] {
        below = below * square + c;
    }
    x * above / below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_matches_libm_over_its_range() {
        for i in -500..=500 {
            let x = i as f32 * 0.01;
            let gap = f64::from(erf(x)) - libm::erf(f64::from(x));
            assert!(gap.abs() < 4e-7, "erf({x}) is off by {gap}");
        }
    }
}
