//! Random numbers made on an NVIDIA GPU, by `gpu/kernels/philox.cu`.

use super::gpu::{Arg, Grid, PHILOX, address, device_of, launch, unwritten};
use candle_core::{DType, Device, Result, Shape, Tensor};

/// Unit normals, f32: the numbers of `dmd_runtime::noise::Stream::new(seed, purpose, index).normal(n)` in the order of
/// the tensor, but for the last bit of about one in 10^8. Does not wait, and copies nothing to the device.
pub fn philox_normal(seed: u64, purpose: u32, index: u64, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let normals = unwritten(shape, DType::F32, device)?;
    let n = normals.elem_count();
    let args = [address(&normals)?, Arg::U64(n as u64), Arg::U64(seed), Arg::U32(purpose), Arg::U64(index)];
    launch(&device_of(&normals)?, PHILOX, "philox_normal", Grid::over(n.div_ceil(2)), &args)?;
    Ok(normals)
}
