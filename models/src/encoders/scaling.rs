//! Between what an autoencoder calls latents and what a diffusion model is trained on: raw = scaled·std + mean.

use crate::backend::Backend;
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// One number for all channels, or one for each.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scaling {
    pub std: Vec<f64>,
    pub mean: Vec<f64>,
}

impl Scaling {
    /// `scaling_factor` and `shift_factor`, as Stable Diffusion 3's pipelines read them: raw = scaled/factor + shift.
    pub fn of_all(factor: f64, shift: f64) -> Result<Self> {
        if !(factor.is_finite() && factor != 0.0 && shift.is_finite()) {
            return Err(Error::Config(format!(
                "scaling_factor is {factor} and shift_factor {shift}, expected finite numbers, the first of them not 0"
            )));
        }
        Ok(Scaling { std: vec![1.0 / factor], mean: vec![shift] })
    }

    /// `latents_mean` and `latents_std` beside it, as SDXL's read them: raw = scaled·std/factor + mean.
    pub fn of_channels(factor: f64, mean: &[f64], std: &[f64], channels: usize) -> Result<Self> {
        Scaling::of_all(factor, 0.0)?;
        for (name, list) in [("latents_mean", mean), ("latents_std", std)] {
            if list.len() != channels {
                let n = list.len();
                return Err(Error::Config(format!(
                    "{name} has {n} numbers, expected one for each of {channels} channels"
                )));
            }
        }
        if !std.iter().all(|std| *std > 0.0) {
            return Err(Error::Config(format!("latents_std is {std:?}, expected positive numbers")));
        }
        Ok(Scaling { std: std.iter().map(|std| std / factor).collect(), mean: mean.to_vec() })
    }

    /// What the autoencoder decodes.
    pub fn raw<B: Backend>(&self, b: &B, scaled: &B::Value, device: &Device) -> Result<B::Value> {
        affine(b, scaled, &self.std, &self.mean, device)
    }

    /// What the diffusion model sees.
    pub fn scaled<B: Backend>(&self, b: &B, raw: &B::Value, device: &Device) -> Result<B::Value> {
        let mul: Vec<f64> = self.std.iter().map(|std| 1.0 / std).collect();
        let add: Vec<f64> = self.mean.iter().zip(&mul).map(|(mean, mul)| -mean * mul).collect();
        affine(b, raw, &mul, &add, device)
    }
}

/// x·mul + add, all channels alike or each by its own.
fn affine<B: Backend>(b: &B, x: &B::Value, mul: &[f64], add: &[f64], device: &Device) -> Result<B::Value> {
    match (mul, add) {
        ([mul], [add]) if *mul == 1.0 && *add == 0.0 => Ok(x.clone()),
        ([mul], [add]) => b.affine(x, &[*mul], *add),
        _ => {
            let row = |values: &[f64]| Tensor::from_iter(values.iter().map(|v| *v as f32), device)?.reshape((1, ()));
            b.add_per_channel(&b.mul_per_channel(x, &b.constant(&row(mul)?)?)?, &b.constant(&row(add)?)?)
        }
    }
}
