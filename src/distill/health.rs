//! The numbers that tell how a run goes.

use anyhow::{Result, ensure};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The numbers that tell how a run goes; those of terms that are off are absent.
#[derive(Clone, Debug, Default)]
pub struct Health(BTreeMap<&'static str, f64>);

impl FromIterator<(&'static str, f64)> for Health {
    fn from_iter<I: IntoIterator<Item = (&'static str, f64)>>(numbers: I) -> Self {
        Health(numbers.into_iter().collect())
    }
}

impl Health {
    /// The number of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// Names as in metrics.jsonl, in reading order.
    pub fn values(&self) -> Vec<(&'static str, f64)> {
        ORDER.iter().filter_map(|name| Some((*name, self.get(name)?))).collect()
    }

    /// Sets a number.
    pub fn set(&mut self, name: &'static str, value: f64) {
        self.0.insert(name, value);
    }

    /// Adds a share of another's numbers to these.
    pub fn add(&mut self, other: &Health, share: f64) {
        for (name, value) in &other.0 {
            *self.0.entry(name).or_insert(0.0) += share * value;
        }
    }
}

/// Distribution-matching (or score-identity) loss, the critic's mean loss, the other terms; mean and standard deviation
/// of the samples; mean|x − x0_real| and mean|x0_fake − x0_real|; what the discriminator thinks of real and fake;
/// the norm of the generator's gradient before clipping.
const ORDER: [&str; 13] = [
    "loss_dm",
    "loss_fake",
    "loss_gan",
    "loss_discriminator",
    "loss_regression",
    "sample_mean",
    "sample_std",
    "real_error",
    "score_gap",
    "d_real",
    "d_fake",
    "h_max",
    "grad_norm",
];

/// Mean of sigmoid(logit): what share the discriminator takes for real.
pub(super) fn mean_probability(logit: &Tensor) -> Result<f64> {
    let logits: Vec<f32> = logit.detach().to_vec1()?;
    ensure!(!logits.is_empty(), "no logits");
    Ok(logits.iter().map(|l| 1.0 / (1.0 + (-f64::from(*l)).exp())).sum::<f64>() / logits.len() as f64)
}

/// Mean and standard deviation of all values.
pub(super) fn mean_and_std(x: &Tensor) -> Result<(f64, f64)> {
    let mean = scalar(&x.mean_all()?)?;
    let variance = scalar(&(x - mean)?.sqr()?.mean_all()?)?;
    Ok((mean, variance.sqrt()))
}

/// The value of a scalar f32.
pub(super) fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}
