//! The noise levels a model was trained on, as a table of sigmas in ascending order: index 0 is nearly clean, the last
//! index (T − 1) nearly pure noise. Everything is f64. Variance exploding throughout: x = x0 + sigma·noise; a variance
//! preserving model with cumulative product ᾱ sits at sigma = √((1 − ᾱ)/ᾱ).

use crate::{Error, Result};

/// A table of T sigmas, ascending.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseLevels {
    sigmas: Vec<f64>,
}

/// How the betas of a variance-preserving schedule run (diffusers' `beta_schedule`).
#[derive(Clone, Debug, PartialEq)]
pub enum Betas {
    /// Evenly spaced.
    Linear,
    /// Squares of evenly spaced roots (Stable Diffusion).
    ScaledLinear,
    /// From ᾱ(u) = cos²((u + 0.008)/1.008·π/2) (Nichol and Dhariwal 2021, equation 17).
    SquaredCosine,
    /// Given one by one.
    Trained(Vec<f64>),
}

/// ᾱ of the last level of a schedule rescaled to zero terminal SNR: sigma 4096 instead of infinity, as diffusers'
/// Euler scheduler has it.
const ZERO_SNR_ALPHA: f64 = 1.0 / (1u64 << 24) as f64;

impl NoiseLevels {
    /// The EDM table (Karras et al. 2022, equation 5), reversed: `(min^(1/ρ) + i/(n−1)·(max^(1/ρ) − min^(1/ρ)))^ρ`.
    pub fn karras(n: usize, sigma_min: f64, sigma_max: f64, rho: f64) -> Result<Self> {
        if !(sigma_min > 0.0 && sigma_max > sigma_min && sigma_max.is_finite() && rho > 0.0 && n >= 2) {
            return Err(Error::Config(format!(
                "sigma_min {sigma_min}, sigma_max {sigma_max}, rho {rho}, {n} levels: expected 0 < sigma_min < sigma_max, rho > 0, at least 2 levels"
            )));
        }
        let (low, high) = (sigma_min.powf(1.0 / rho), sigma_max.powf(1.0 / rho));
        let mut sigmas: Vec<f64> = (0..n).map(|i| (low + i as f64 / (n - 1) as f64 * (high - low)).powf(rho)).collect();
        // The ends exactly, whatever the powers round to.
        (sigmas[0], sigmas[n - 1]) = (sigma_min, sigma_max);
        Ok(NoiseLevels { sigmas })
    }

    /// Evenly spaced logarithms.
    pub fn exponential(n: usize, sigma_min: f64, sigma_max: f64) -> Result<Self> {
        let mut levels = Self::karras(n, sigma_min, sigma_max, 1.0)?;
        let (low, high) = (sigma_min.ln(), sigma_max.ln());
        for (i, sigma) in levels.sigmas.iter_mut().enumerate().skip(1).take(n - 2) {
            *sigma = (low + i as f64 / (n - 1) as f64 * (high - low)).exp();
        }
        Ok(levels)
    }

    /// The sigmas of a variance-preserving schedule of `n` betas from `start` to `end`.
    pub fn variance_preserving(betas: &Betas, n: usize, [start, end]: [f64; 2], zero_snr: bool) -> Result<Self> {
        let even = |i: usize, from: f64, to: f64| from + (to - from) * i as f64 / (n.max(2) - 1) as f64;
        let betas: Vec<f64> = match betas {
            Betas::Linear => (0..n).map(|i| even(i, start, end)).collect(),
            Betas::ScaledLinear => (0..n).map(|i| even(i, start.sqrt(), end.sqrt()).powi(2)).collect(),
            Betas::SquaredCosine => {
                let alpha_bar = |u: f64| ((u + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
                let beta = |i: usize| 1.0 - alpha_bar((i + 1) as f64 / n as f64) / alpha_bar(i as f64 / n as f64);
                (0..n).map(|i| beta(i).min(0.999)).collect()
            }
            Betas::Trained(betas) => betas.clone(),
        };
        if betas.len() < 2 || betas.iter().any(|b| !(0.0..1.0).contains(b)) {
            return Err(Error::Config(format!(
                "betas from {start} to {end} over {n} steps: expected at least two, each in [0, 1)"
            )));
        }
        let mut product = 1.0;
        let mut alphas: Vec<f64> = betas
            .iter()
            .map(|beta| {
                product *= 1.0 - beta;
                product
            })
            .collect();
        if zero_snr {
            rescale_zero_snr(&mut alphas);
        }
        let sigmas: Vec<f64> = alphas.iter().map(|a| ((1.0 - a) / a).sqrt()).collect();
        if sigmas.windows(2).any(|w| w[0] >= w[1]) || sigmas[0] <= 0.0 {
            return Err(Error::Config("the schedule's noise levels do not ascend".into()));
        }
        Ok(NoiseLevels { sigmas })
    }

    /// Number of levels, T.
    #[allow(clippy::len_without_is_empty)] // a table has at least two levels
    pub fn len(&self) -> usize {
        self.sigmas.len()
    }

    /// All sigmas, ascending.
    pub fn sigmas(&self) -> &[f64] {
        &self.sigmas
    }

    /// Sigma of a level; the last one beyond the end.
    pub fn sigma(&self, index: usize) -> f64 {
        self.sigmas[index.min(self.sigmas.len() - 1)]
    }

    /// Lowest sigma.
    pub fn sigma_min(&self) -> f64 {
        self.sigmas[0]
    }

    /// Highest sigma, that of T − 1.
    pub fn sigma_max(&self) -> f64 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// The (fractional) index of a sigma: exact at table entries, linear in log sigma between them, clamped outside.
    pub fn index_of(&self, sigma: f64) -> f64 {
        let above = self.sigmas.partition_point(|s| *s < sigma);
        if above == 0 {
            return 0.0;
        }
        if above == self.sigmas.len() {
            return (above - 1) as f64;
        }
        let (low, high) = (self.sigmas[above - 1].ln(), self.sigmas[above].ln());
        (above - 1) as f64 + (sigma.ln() - low) / (high - low)
    }

    /// The inclusive index range between two fractions of T: 0.02 and 0.98 of 1000 levels give 20 and 980.
    pub fn index_range(&self, min: f64, max: f64) -> [usize; 2] {
        let at = |fraction: f64| ((fraction * self.len() as f64).round() as usize).min(self.len() - 1);
        [at(min), at(max)]
    }

    /// `n` sigmas for a sampler, descending from sigma_max to sigma_min on the Karras curve with ρ = 7, then 0.
    /// One step goes straight from sigma_max to 0.
    pub fn sampling_steps(&self, n: usize) -> Result<Vec<f64>> {
        let mut steps = match n {
            0 => return Err(Error::Config("a sampler needs at least one step".into())),
            1 => vec![self.sigma_max()],
            _ => Self::karras(n, self.sigma_min(), self.sigma_max(), 7.0)?.sigmas,
        };
        steps.reverse();
        steps.push(0.0);
        Ok(steps)
    }
}

/// Lin et al. 2024, algorithm 1: shift and scale √ᾱ so that the last is zero and the first stays. The zero becomes 2^-24,
/// or less where the level before it is that low already (diffusers' linear betas: sigma 15406), so that sigmas ascend.
fn rescale_zero_snr(alphas: &mut [f64]) {
    let (first, last) = (alphas[0].sqrt(), alphas[alphas.len() - 1].sqrt());
    for alpha in alphas.iter_mut() {
        *alpha = ((alpha.sqrt() - last) * first / (first - last)).powi(2);
    }
    if let [.., before, end] = alphas {
        *end = ZERO_SNR_ALPHA.min(*before / 2.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn karras_table_has_the_published_values() {
        // reference: sigma 0.002 to 80, rho 7, 1000 bins
        let table = NoiseLevels::karras(1000, 0.002, 80.0, 7.0).unwrap();
        let expected = [
            (0, 0.002),
            (20, 0.0032316),
            (100, 0.0167514),
            (250, 0.1703123),
            (500, 2.5265068),
            (750, 17.6172694),
            (900, 45.5560147),
            (980, 72.0538987),
            (999, 80.0),
        ];
        for (i, sigma) in expected {
            assert!((table.sigma(i) / sigma - 1.0).abs() < 1e-5, "sigma_{i} = {}", table.sigma(i));
        }
        assert!((table.sigma(500) / 2.5265068 - 1.0).abs() < 1e-7);
        assert_eq!(table.index_range(0.02, 0.98), [20, 980]);
        assert_eq!(table.index_range(0.0, 1.0), [0, 999]);
    }

    #[test]
    fn variance_preserving_tables_have_the_published_values() {
        let linear = NoiseLevels::variance_preserving(&Betas::Linear, 1000, [1e-4, 0.02], false).unwrap();
        let scaled = NoiseLevels::variance_preserving(&Betas::ScaledLinear, 1000, [0.00085, 0.012], false).unwrap();
        for (table, t, sigma) in [
            (&linear, 999, 157.4),
            (&linear, 980, 130.1),
            (&linear, 440, 2.502),
            (&linear, 399, 2.031),
            (&scaled, 999, 14.61),
            (&scaled, 625, 2.502),
            (&scaled, 399, 1.161),
        ] {
            assert!((table.sigma(t) / sigma - 1.0).abs() < 6e-4, "sigma_{t} = {}", table.sigma(t));
        }
    }

    #[test]
    fn index_of_inverts_the_table() {
        let table = NoiseLevels::variance_preserving(&Betas::SquaredCosine, 1000, [1e-4, 0.02], false).unwrap();
        for i in [0, 1, 20, 500, 999] {
            assert!((table.index_of(table.sigma(i)) - i as f64).abs() < 1e-9);
        }
        assert_eq!(table.index_of(1e9), 999.0);
        assert_eq!(table.index_of(0.0), 0.0);
    }

    #[test]
    fn zero_snr_ends_at_sigma_4096() {
        let table = NoiseLevels::variance_preserving(&Betas::ScaledLinear, 1000, [0.00085, 0.012], true).unwrap();
        assert!((table.sigma_max() - 4096.0).abs() < 1e-3);
        assert!(NoiseLevels::variance_preserving(&Betas::Linear, 1000, [1e-4, 1.2], false).is_err());
    }
}
