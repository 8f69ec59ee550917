//! What a machine does at most, measured: what times of passes are compared with.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// 10⁹ multiplications and additions a second, in a large matrix product of this dtype; the fastest of some repetitions.
pub fn gflops(device: &Device, dtype: DType, repetitions: usize) -> Result<f64> {
    let side: usize = if device.is_cpu() { 1024 } else { 8192 };
    let a = Tensor::ones((side, side), dtype, device)?;
    Ok(2.0 * (side as f64).powi(3) / per_second(device, repetitions, || Ok(_ = a.matmul(&a)?))?)
}

/// 10⁹ bytes a second, read and written, in a large copy.
pub fn gbytes(device: &Device, repetitions: usize) -> Result<f64> {
    let n: usize = if device.is_cpu() { 16 << 20 } else { 64 << 20 };
    let bytes = (2 * size_of::<f32>() * n) as f64;
    if !device.is_cpu() {
        let from = Tensor::ones(n, DType::F32, device)?;
        return Ok(bytes / per_second(device, repetitions, || Ok(_ = from.copy()?))?);
    }
    use rayon::prelude::*;
    let (from, mut to) = (vec![1f32; n], vec![0f32; n]);
    let share = n / rayon::current_num_threads();
    let copy = || {
        to.par_chunks_mut(share).zip(from.par_chunks(share)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    };
    Ok(bytes / per_second(device, repetitions, copy)?)
}

/// What to divide a call's operations by for 10⁹ of them a second, after two calls that do not count. A GPU is sent
/// several calls without waiting in between.
fn per_second(device: &Device, repetitions: usize, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let calls = if device.is_cpu() { 1 } else { 8 };
    let mut fastest = f64::INFINITY;
    for repetition in 0..repetitions + 2 {
        device.synchronize()?;
        let started = Instant::now();
        (0..calls).try_for_each(|_| call())?;
        device.synchronize()?;
        if repetition >= 2 {
            fastest = fastest.min(started.elapsed().as_secs_f64() / calls as f64);
        }
    }
    Ok(fastest * 1e9)
}
