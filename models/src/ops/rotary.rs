//! Rotary positions (Su et al. 2021, arXiv:2104.09864): every pair of a head's channels turned by an angle of its pixel.

use super::simd::vectorised;
use super::{fits, on_cpu_f32, values, written};
use crate::shapes;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Which channels of a head are a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// 2p and 2p + 1 (Flux).
    Neighbours,
    /// p and p + width/2 (Llama, MiniT2I).
    Halves,
}

/// The turns of every pixel, for maps `(B, heads·2·P, H, W)` of P pairs in each head.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Cosines of the angles, f32 `(P, H·W)`.
    pub cos: Tensor,
    /// Their sines.
    pub sin: Tensor,
    /// How channels are paired.
    pub pairs: Pairs,
}

impl Rotary {
    /// Whether it fits a map of this shape.
    fn check(&self, dims: &[usize]) -> Result<()> {
        fits(shapes::rotary(dims, self.cos.dims()))?;
        match self.sin.dims() == self.cos.dims() {
            true => Ok(()),
            false => bail!("rotary: sines {:?} and cosines {:?}", self.sin.dims(), self.cos.dims()),
        }
    }
}

/// `(a, b)` of each pair to `(a·cos − b·sin, b·cos + a·sin)`. f32 on the CPU runs fused, anything else through
/// [`rotary_composite`].
pub fn rotary(x: &Tensor, by: &Rotary) -> Result<Tensor> {
    by.check(x.dims())?;
    if !on_cpu_f32(&[x, &by.cos, &by.sin]) {
        return rotary_composite(x, by);
    }
    let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    x.contiguous()?.apply_op1(Turn { cos: values(&by.cos)?, sin: values(&by.sin)?, pairs: by.pairs })
}

/// The same by candle's own operations.
pub fn rotary_composite(x: &Tensor, by: &Rotary) -> Result<Tensor> {
    by.check(x.dims())?;
    let (b, c, h, w) = x.dims4()?;
    let (pairs, pixels) = by.cos.dims2()?;
    // (B, heads, pairs, 2, pixels) or (B, heads, 2, pairs, pixels).
    let (split, axis) = match by.pairs {
        Pairs::Neighbours => ([b, c / (2 * pairs), pairs, 2, pixels], 3),
        Pairs::Halves => ([b, c / (2 * pairs), 2, pairs, pixels], 2),
    };
    let x = x.contiguous()?.reshape(&split[..])?;
    let angles = |t: &Tensor| t.to_dtype(x.dtype())?.reshape((1, 1, pairs, pixels))?.unsqueeze(axis);
    let (cos, sin) = (angles(&by.cos)?, angles(&by.sin)?);
    let (first, second) = (x.narrow(axis, 0, 1)?, x.narrow(axis, 1, 1)?);
    let turned = |a: &Tensor, b: &Tensor| Ok::<_, candle_core::Error>((a.broadcast_mul(&cos)?, b.broadcast_mul(&sin)?));
    let ((a, b_sin), (b_cos, a_sin)) = (turned(&first, &second)?, turned(&second, &first)?);
    Tensor::cat(&[(a - b_sin)?, (b_cos + a_sin)?], axis)?.reshape((b, c, h, w))
}

struct Turn {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: Pairs,
}

impl CustomOp1 for Turn {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let &[_, _, h, w] = layout.dims() else { bail!("rotary: shape {:?}", layout.dims()) };
        let (x, pixels) = (values(x, layout, self.name())?, h * w);
        let head = 2 * self.cos.len();
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_mut(head).zip(x.par_chunks(head)).for_each(|(y, x)| match self.pairs {
                Pairs::Neighbours => {
                    let rows = x.chunks(2 * pixels).zip(y.chunks_mut(2 * pixels)).enumerate();
                    rows.for_each(|(i, (x, y))| turn(x, self.angles(i * pixels, pixels), y));
                }
                Pairs::Halves => turn(x, self.angles(0, self.cos.len()), y),
            });
        };
        // SAFETY: the heads are all of y, and both halves of what `turn` gets are written whole.
        let y = unsafe { written(x.len(), fill) };
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Turn { cos: self.cos.clone(), sin: self.sin.iter().map(|s| -s).collect(), pairs: self.pairs };
        grad.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}

impl Turn {
    fn angles(&self, first: usize, len: usize) -> [&[f32]; 2] {
        [&self.cos, &self.sin].map(|angles| &angles[first..first + len])
    }
}

vectorised! {
    /// The first half of x and the second are the parts of as many pairs as there are angles.
    #[allow(clippy::needless_range_loop)] // One index into several slices.
    fn turn(x: &[f32], angles: [&[f32]; 2], y: &mut [MaybeUninit<f32>]) {
        let ([cos, sin], n) = (angles, angles[0].len());
        let ((a, b), (to_a, to_b)) = (x.split_at(n), y.split_at_mut(n));
        for i in 0..n {
            to_a[i].write(a[i] * cos[i] - b[i] * sin[i]);
            to_b[i].write(b[i] * cos[i] + a[i] * sin[i]);
        }
    }
}
