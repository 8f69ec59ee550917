//! Doubling by nearest neighbour and halving by the mean of 2×2 blocks. Each is the other's gradient, up to a factor 4.

use super::{on_cpu_f32, values, written};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// `(B, C, H, W)` to `(B, C, 2H, 2W)`.
pub fn upsample_2x(x: &Tensor) -> Result<Tensor> {
    if on_cpu_f32(&[x]) {
        return x.contiguous()?.apply_op1(Upsample);
    }
    let (b, c, h, w) = x.dims4()?;
    x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.contiguous()?.reshape((b, c, 2 * h, 2 * w))
}

/// `(B, C, H, W)` to `(B, C, ⌊H/2⌋, ⌊W/2⌋)`.
pub fn avg_pool_2x(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    // Even sizes are all that a network with skip connections can use; candle serves the rest.
    if on_cpu_f32(&[x]) && h % 2 == 0 && w % 2 == 0 {
        return x.contiguous()?.apply_op1(SumBlocks)?.affine(0.25, 0.0);
    }
    x.avg_pool2d(2)
}

struct Upsample;

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample_2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let &[b, c, h, w] = layout.dims() else { bail!("upsample_2x: shape {:?}", layout.dims()) };
        let x = values(x, layout, self.name())?;
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_mut((4 * w).max(1)).zip(x.par_chunks(w.max(1))).with_min_len(h).for_each(|(rows, x)| {
                for row in rows.chunks_exact_mut(2 * w) {
                    row.chunks_exact_mut(2).zip(x).for_each(|(pair, v)| pair.fill(MaybeUninit::new(*v)));
                }
            });
        };
        // SAFETY: every row of x fills two rows of y.
        let y = unsafe { written(4 * x.len(), fill) };
        Ok((CpuStorage::F32(y), Shape::from((b, c, 2 * h, 2 * w))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1(SumBlocks)?))
    }
}

/// Sums of 2×2 blocks of even pictures.
struct SumBlocks;

impl CustomOp1 for SumBlocks {
    fn name(&self) -> &'static str {
        "sum_blocks_2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let &[b, c, h, w] = layout.dims() else { bail!("sum_blocks_2x: shape {:?}", layout.dims()) };
        if h % 2 != 0 || w % 2 != 0 {
            bail!("sum_blocks_2x: {h}x{w} is not even");
        }
        let x = values(x, layout, self.name())?;
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_mut((w / 2).max(1)).zip(x.par_chunks((2 * w).max(1))).with_min_len(h).for_each(|(y, rows)| {
                let (first, second) = rows.split_at(w);
                for (y, (a, b)) in y.iter_mut().zip(first.chunks_exact(2).zip(second.chunks_exact(2))) {
                    y.write((a[0] + a[1]) + (b[0] + b[1]));
                }
            });
        };
        // SAFETY: every pair of rows of x fills a row of y.
        let y = unsafe { written(x.len() / 4, fill) };
        Ok((CpuStorage::F32(y), Shape::from((b, c, h / 2, w / 2))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        upsample_2x(grad).map(Some)
    }
}
