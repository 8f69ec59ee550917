//! Joining along channels: copies, shared among the threads.

use super::{on_cpu_f32, values, written};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// `(B, C₁, H, W)` and `(B, C₂, H, W)` to `(B, C₁ + C₂, H, W)`.
pub fn concat(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if on_cpu_f32(&[x, y]) {
        return x.contiguous()?.apply_op2(&y.contiguous()?, Concat);
    }
    Tensor::cat(&[x, y], 1)
}

struct Concat;

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, y: &CpuStorage, ly: &Layout) -> Result<(CpuStorage, Shape)> {
        let (&[b, c1, h, w], &[b2, c2, h2, w2]) = (lx.dims(), ly.dims()) else {
            bail!("concat: shapes {:?} and {:?}", lx.dims(), ly.dims())
        };
        let (first, second) = (c1 * h * w, c2 * h * w);
        if [b, h, w] != [b2, h2, w2] || first == 0 || second == 0 {
            bail!("concat: shapes {:?} and {:?}", lx.dims(), ly.dims());
        }
        let (x, y) = (values(x, lx, self.name())?, values(y, ly, self.name())?);
        let fill = |joined: &mut [MaybeUninit<f32>]| {
            let sources = x.par_chunks_exact(first).zip(y.par_chunks_exact(second));
            joined.par_chunks_exact_mut(first + second).zip(sources).for_each(|(joined, (x, y))| {
                joined[..first].write_copy_of_slice(x);
                joined[first..].write_copy_of_slice(y);
            });
        };
        // SAFETY: every sample is the two parts that are copied into it.
        let joined = unsafe { written(x.len() + y.len(), fill) };
        Ok((CpuStorage::F32(joined), Shape::from((b, c1 + c2, h, w))))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (c1, c2) = (x.dim(1)?, y.dim(1)?);
        Ok((Some(grad.narrow(1, 0, c1)?), Some(grad.narrow(1, c1, c2)?)))
    }
}
