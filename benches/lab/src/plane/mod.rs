//! What each part of the method is for, seen in two dimensions, where the teacher is known exactly. What is trained here goes through the losses and the optimiser of the
//! trainer itself; only the networks and the data are small.

pub mod gaussian;
pub mod mixture;
pub mod mlp;
pub mod scores;

pub mod ring;
pub mod two_modes;
pub mod two_time_scales;

pub mod figure;
pub mod toy;

use anyhow::Result;
use candle_core::{Device, Tensor};
use dmd::optim::{Optimizer, finite};
use dmd_models::NoiseLevels;

/// A point of the plane.
pub type Point = [f64; 2];

/// The noise levels of the plane's experiments: a Karras table up to 1, where modes 0.8 apart have run into one blob.
pub fn noise_levels() -> Result<NoiseLevels> {
    Ok(NoiseLevels::karras(1000, 0.01, 1.0, 7.0)?)
}

/// The generator's range of them, as fractions of the table: that of DMD and DMD2.
pub const T_RANGE: [f64; 2] = [0.02, 0.98];

/// Points as pictures of two channels and one pixel, `(n, 2, 1, 1)`, f32.
pub fn to_tensor(points: &[Point]) -> Result<Tensor> {
    let values = points.iter().flatten().map(|&v| v as f32).collect();
    Ok(Tensor::from_vec(values, (points.len(), 2, 1, 1), &Device::Cpu)?)
}

/// The way back.
pub fn to_points(tensor: &Tensor) -> Result<Vec<Point>> {
    let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
    Ok(values.chunks_exact(2).map(|p| [f64::from(p[0]), f64::from(p[1])]).collect())
}

/// x + sigma·eps, all `(n, 2, 1, 1)`, sigma per sample.
fn noised(x: &Tensor, sigma: &[f64], eps: &Tensor) -> Result<Tensor> {
    let sigma: Vec<f32> = sigma.iter().map(|&s| s as f32).collect();
    Ok((x + eps.broadcast_mul(&Tensor::from_vec(sigma, (x.dim(0)?, 1, 1, 1), &Device::Cpu)?)?)?)
}

/// One update down a loss, which must be finite.
fn descend(optimizer: &mut Optimizer, name: &'static str, loss: &Tensor, rate: f64) -> Result<()> {
    finite(name, f64::from(loss.to_scalar::<f32>()?))?;
    let grads = optimizer.gradients(&loss.backward()?);
    optimizer.descend(loss, &grads, rate)?;
    Ok(())
}
