//! The numbers that tell how a run goes.

use crate::optim::{finite, read};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;

/// The numbers that tell how a run goes; those of terms that are off are absent. What a device is still computing is
/// pending until [`Health::read`].
#[derive(Clone, Debug, Default)]
pub struct Health {
    values: BTreeMap<&'static str, f64>,
    pending: Vec<Pending>,
}

/// A number that a device may still be computing.
#[derive(Clone, Debug)]
struct Pending {
    name: &'static str,
    /// A scalar outside the autograd graph.
    scalar: Tensor,
    /// What it counts for in the number of its name.
    share: f64,
    /// A loss must be finite.
    is_loss: bool,
}

impl FromIterator<(&'static str, f64)> for Health {
    fn from_iter<I: IntoIterator<Item = (&'static str, f64)>>(numbers: I) -> Self {
        Health { values: numbers.into_iter().collect(), pending: Vec::new() }
    }
}

impl Health {
    /// The number of this name; none while it is pending.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.get(name).copied()
    }

    /// Names as in metrics.jsonl, in reading order.
    pub fn values(&self) -> Vec<(&'static str, f64)> {
        ORDER.iter().filter_map(|name| Some((*name, self.get(name)?))).collect()
    }

    /// Sets a number.
    pub fn set(&mut self, name: &'static str, value: f64) {
        self.values.insert(name, value);
    }

    /// Sets a number that a device is computing, a scalar of f32 or f64.
    pub fn pend(&mut self, name: &'static str, scalar: &Tensor) {
        self.pending.push(Pending { name, scalar: scalar.detach(), share: 1.0, is_loss: false });
    }

    /// Sets the mean and the standard deviation of samples, whatever their shape.
    pub(super) fn pend_samples(&mut self, x: &Tensor) -> Result<()> {
        let (mean, std) = mean_and_std(x)?;
        self.pend("sample_mean", &mean);
        self.pend("sample_std", &std);
        Ok(())
    }

    /// Sets a loss, an f32 scalar, that a device is computing. One that is not finite is [`NotFinite`] when it is read.
    ///
    /// [`NotFinite`]: crate::optim::NotFinite
    pub fn pend_loss(&mut self, name: &'static str, loss: &Tensor) {
        self.pending.push(Pending { name, scalar: loss.detach(), share: 1.0, is_loss: true });
    }

    /// The sum of the pending losses, a scalar that is finite only where each of them is.
    pub fn sum_of_losses(&self) -> Result<Tensor> {
        let losses = self.pending.iter().filter(|pending| pending.is_loss).map(|pending| Ok(pending.scalar.clone()));
        let sum = losses.reduce(|sum, loss| sum? + loss?).context("no loss is pending")?;
        Ok(sum?)
    }

    /// Waits, once, for all that is pending and for the norms of updates, which it returns. The first loss that is not
    /// finite is the error.
    pub fn read(&mut self, norms: &[Tensor]) -> Result<Vec<f64>> {
        let pending = std::mem::take(&mut self.pending);
        let scalars: Vec<Tensor> = pending.iter().map(|pending| &pending.scalar).chain(norms).cloned().collect();
        let mut values = read(&scalars)?;
        let norms = values.split_off(pending.len());
        for (Pending { name, share, is_loss, .. }, value) in pending.into_iter().zip(values) {
            let value = if is_loss { finite(name, value)? } else { value };
            self.add_to(name, share * value);
        }
        Ok(norms)
    }

    /// Adds a share of another's numbers to these.
    pub fn add(&mut self, other: &Health, share: f64) {
        other.values.iter().for_each(|(name, value)| self.add_to(name, share * value));
        let pending = other.pending.iter().cloned();
        self.pending.extend(pending.map(|pending| Pending { share: share * pending.share, ..pending }));
    }

    fn add_to(&mut self, name: &'static str, value: f64) {
        *self.values.entry(name).or_insert(0.0) += value;
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

/// Mean of sigmoid(logit), an f64 scalar: what share the discriminator takes for real.
pub(super) fn mean_probability(logit: &Tensor) -> Result<Tensor> {
    let logit = logit.detach().to_dtype(DType::F64)?;
    Ok((logit.neg()?.exp()? + 1.0)?.recip()?.mean_all()?)
}

/// Mean (f32) and standard deviation (f64) of all values, scalars. In two passes, since the mean of the squares less the
/// square of the mean would lose the digits of a narrow distribution.
fn mean_and_std(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let mean = x.mean_all()?;
    let variance = x.broadcast_sub(&mean)?.sqr()?.mean_all()?;
    Ok((mean, variance.to_dtype(DType::F64)?.sqrt()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::NotFinite;
    use candle_core::Device;

    fn scalar(value: f32) -> Tensor {
        Tensor::new(value, &Device::Cpu).unwrap()
    }

    #[test]
    fn pending_numbers_of_two_parts_are_read_as_their_mean() {
        let mut health = Health::default();
        for (loss, error) in [(1.0, 0.25), (3.0, 0.75)] {
            let mut part = Health::default();
            part.pend_loss("loss_dm", &scalar(loss));
            part.pend("real_error", &scalar(error));
            part.set("h_max", 2.0);
            health.add(&part, 0.5);
        }
        assert_eq!(health.values(), [("h_max", 2.0)]);
        assert_eq!(health.sum_of_losses().unwrap().to_scalar::<f32>().unwrap(), 4.0);
        assert_eq!(health.read(&[scalar(5.0)]).unwrap(), [5.0]);
        assert_eq!(health.values(), [("loss_dm", 2.0), ("real_error", 0.5), ("h_max", 2.0)]);
    }

    #[test]
    fn the_first_loss_that_is_not_finite_is_named() {
        let mut health = Health::default();
        health.pend("real_error", &scalar(f32::NAN));
        health.pend_loss("loss_dm", &scalar(1.0));
        health.pend_loss("loss_gan", &scalar(f32::INFINITY));
        health.pend_loss("loss_regression", &scalar(f32::NEG_INFINITY));
        assert!(!health.sum_of_losses().unwrap().to_scalar::<f32>().unwrap().is_finite());
        let error = health.read(&[scalar(f32::NAN)]).unwrap_err();
        assert!(error.is::<NotFinite>() && error.to_string() == "loss_gan is inf", "{error}");
    }

    #[test]
    fn monitors_agree_with_their_formulas() {
        let values = [-1.0f32, 0.5, 2.0, 2.5];
        let x = Tensor::new(&values, &Device::Cpu).unwrap();
        let (mean, std) = mean_and_std(&x).unwrap();
        // (4 + 0.25 + 1 + 2.25) / 4.
        assert_eq!(read(&[mean, std]).unwrap(), [1.0, 1.875f64.sqrt()]);
        let expected = values.iter().map(|l| 1.0 / (1.0 + (-f64::from(*l)).exp())).sum::<f64>() / 4.0;
        assert!((read(&[mean_probability(&x).unwrap()]).unwrap()[0] - expected).abs() < 1e-12);
    }
}
