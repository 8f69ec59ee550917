//! Joining along an axis: copies, shared among the threads.

use super::{fits, on_cpu_f32, values, written};
use crate::shapes;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Maps `(B, C, H, W)` that differ along `axis` alone, or vectors `(B, C)`, as one.
pub fn concat(x: &Tensor, y: &Tensor, axis: usize) -> Result<Tensor> {
    fits(shapes::concat(x.dims(), y.dims(), axis))?;
    if on_cpu_f32(&[x, y]) {
        return x.contiguous()?.apply_op2(&y.contiguous()?, Concat { axis });
    }
    Tensor::cat(&[x, y], axis)
}

struct Concat {
    axis: usize,
}

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, y: &CpuStorage, ly: &Layout) -> Result<(CpuStorage, Shape)> {
        let run = |layout: &Layout| layout.dims()[self.axis..].iter().product::<usize>();
        let (first, second) = (run(lx), run(ly));
        let (x, y) = (values(x, lx, self.name())?, values(y, ly, self.name())?);
        let fill = |joined: &mut [MaybeUninit<f32>]| {
            let sources = x.par_chunks_exact(first).zip(y.par_chunks_exact(second));
            joined.par_chunks_exact_mut(first + second).zip(sources).for_each(|(joined, (x, y))| {
                joined[..first].write_copy_of_slice(x);
                joined[first..].write_copy_of_slice(y);
            });
        };
        // SAFETY: every run is the two parts that are copied into it.
        let joined = unsafe { written(x.len() + y.len(), fill) };
        Ok((CpuStorage::F32(joined), Shape::from(fits(shapes::concat(lx.dims(), ly.dims(), self.axis))?)))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (first, second) = (x.dim(self.axis)?, y.dim(self.axis)?);
        Ok((Some(grad.narrow(self.axis, 0, first)?), Some(grad.narrow(self.axis, first, second)?)))
    }
}
