//! One number per sample and channel added to every pixel: how the time embedding enters a resnet.

use super::simd::{dispatch, sum_by};
use super::{Values, on_cpu_f32, values};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// x `(B, C, H, W)` plus v `(B or 1, C)`.
pub fn add_per_channel(x: &Tensor, v: &Tensor) -> Result<Tensor> {
    if !on_cpu_f32(&[x, v]) {
        return add_per_channel_composite(x, v);
    }
    x.contiguous()?.apply_op2(&v.contiguous()?, AddPerChannel)
}

/// The same by candle's own operations.
pub fn add_per_channel_composite(x: &Tensor, v: &Tensor) -> Result<Tensor> {
    x.broadcast_add(&v.unsqueeze(2)?.unsqueeze(3)?)
}

struct AddPerChannel;

impl CustomOp2 for AddPerChannel {
    fn name(&self) -> &'static str {
        "add_per_channel"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (&[b, c, h, w], &[rows, columns]) = (x_layout.dims(), v_layout.dims()) else {
            bail!("add_per_channel: shapes {:?} and {:?}", x_layout.dims(), v_layout.dims())
        };
        if columns != c || (rows != b && rows != 1) {
            bail!("add_per_channel: shapes {:?} and {:?}", x_layout.dims(), v_layout.dims());
        }
        let (x, v) = (values(x, x_layout, self.name())?, values(v, v_layout, self.name())?);
        let mut y = vec![0f32; x.len()];
        let planes = y.par_chunks_mut((h * w).max(1)).zip(x.par_chunks((h * w).max(1))).enumerate();
        planes.with_min_len(c).for_each(|(i, (y, x))| {
            let add = v[i % v.len()];
            dispatch(|| y.iter_mut().zip(x).for_each(|(y, x)| *y = x + add));
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, v: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dv = if v.track_op() { Some(sums_per_channel(grad, v)?) } else { None };
        Ok((x.track_op().then(|| grad.clone()), dv))
    }
}

/// Sums over pixels, and over the batch where `v` has one row, in the order of the batch.
fn sums_per_channel(grad: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = grad.dims4()?;
    let grad = grad.contiguous()?;
    let values = Values::of(&grad, "add_per_channel")?;
    let planes: Vec<f32> = values.par_chunks((h * w).max(1)).map(|plane| dispatch(|| sum_by(plane, |g| g))).collect();
    let mut dv = vec![0f32; v.elem_count()];
    let n = dv.len().max(1);
    planes.iter().enumerate().for_each(|(i, sum)| dv[i % n] += sum);
    Tensor::from_vec(dv, v.dims(), v.device())
}
