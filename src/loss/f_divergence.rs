//! f-divergences between the data and the generator (Xu et al. 2025, "One-step Diffusion Models with f-Divergence
//! Distribution Matching"). With r = p/q, data over generator, at the noised sample, D_f = E_q f(r) and its gradient is
//! distribution matching's, each sample weighted by h(r) = f''(r)·r² (their theorem 1). The ratio comes from a
//! discriminator's logit.

use serde::{Deserialize, Serialize};

/// Which divergence is brought down; the names are those of the paper's table 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Divergence {
    /// −log r, h = 1: distribution matching itself. Seeks modes; needs no discriminator.
    #[default]
    ReverseKl,
    /// (r + 1)·log((1 + 1/r)/2), h = 1/(r + 1).
    SoftenedReverseKl,
    /// r·log r − (r + 1)·log((r + 1)/2), h = r/(r + 1).
    JensenShannon,
    /// 1 − √r, h = √r/4.
    SquaredHellinger,
    /// r·log r, h = r. Covers modes; its weights vary most.
    ForwardKl,
    /// (r − 1)·log r, h = r + 1.
    Jeffreys,
    /// 1/(2r) − ½, h = 1/r. Seeks modes hardest.
    Neyman,
}

impl Divergence {
    /// All of them.
    pub const ALL: [Divergence; 7] = [
        Divergence::ReverseKl,
        Divergence::SoftenedReverseKl,
        Divergence::JensenShannon,
        Divergence::SquaredHellinger,
        Divergence::ForwardKl,
        Divergence::Jeffreys,
        Divergence::Neyman,
    ];

    /// f(r), with f(1) = 0.
    pub fn f(self, r: f64) -> f64 {
        match self {
            Divergence::ReverseKl => -r.ln(),
            Divergence::SoftenedReverseKl => (r + 1.0) * ((1.0 + 1.0 / r) / 2.0).ln(),
            Divergence::JensenShannon => r * r.ln() - (r + 1.0) * ((r + 1.0) / 2.0).ln(),
            Divergence::SquaredHellinger => 1.0 - r.sqrt(),
            Divergence::ForwardKl => r * r.ln(),
            Divergence::Jeffreys => (r - 1.0) * r.ln(),
            Divergence::Neyman => 0.5 / r - 0.5,
        }
    }

    /// h(r) = f''(r)·r².
    pub fn h(self, r: f64) -> f64 {
        match self {
            Divergence::ReverseKl => 1.0,
            Divergence::SoftenedReverseKl => 1.0 / (r + 1.0),
            Divergence::JensenShannon => r / (r + 1.0),
            Divergence::SquaredHellinger => r.sqrt() / 4.0,
            Divergence::ForwardKl => r,
            Divergence::Jeffreys => r + 1.0,
            Divergence::Neyman => 1.0 / r,
        }
    }

    /// Whether h depends on r, which only a discriminator can tell.
    pub fn needs_discriminator(self) -> bool {
        self != Divergence::ReverseKl
    }
}

/// r = e^logit, the logit within ±10 and the ratio within [0.1, 20]: an overconfident discriminator must not decide a
/// batch alone (the limits of the paper's own code).
pub fn density_ratio(logit: f64) -> f64 {
    logit.clamp(-10.0, 10.0).exp().clamp(0.1, 20.0)
}

/// Moving averages of the ratio over ranges of noise levels, so that every range has ratios around 1. The ranges are
/// even in table index: ranges even in sigma would put 64 % of the draws of a Karras table into the first one.
#[derive(Clone, Debug, PartialEq)]
pub struct RatioBins {
    /// Mean ratio per bin; 0 where none was seen yet.
    pub means: Vec<f32>,
    /// What a new batch leaves of the old mean; 0 forgets it.
    pub keep: f64,
}

impl RatioBins {
    /// `n` bins without history.
    pub fn new(n: usize, keep: f64) -> Self {
        RatioBins { means: vec![0.0; n], keep }
    }

    /// Weights h of a batch, their mean 1: ratios over their bin's mean first, then h over the batch's mean (the
    /// two-stage normalisation). `levels`: each sample's noise level, as a fraction of the range in [0, 1].
    pub fn weights(&mut self, divergence: Divergence, ratios: &[f64], levels: &[f64]) -> Vec<f64> {
        let n = self.means.len();
        let bins: Vec<usize> = levels.iter().map(|l| ((l * n as f64) as usize).min(n - 1)).collect();
        for bin in 0..n {
            let seen: Vec<f64> = ratios.iter().zip(&bins).filter(|(_, b)| **b == bin).map(|(r, _)| *r).collect();
            if seen.is_empty() {
                continue;
            }
            let mean = seen.iter().sum::<f64>() / seen.len() as f64;
            let old = f64::from(self.means[bin]);
            let keep = if old == 0.0 { 0.0 } else { self.keep };
            self.means[bin] = (old * keep + mean * (1.0 - keep)) as f32;
        }
        let h = ratios.iter().zip(&bins).map(|(r, &bin)| divergence.h(r / f64::from(self.means[bin]).max(EPS)));
        let h: Vec<f64> = h.collect();
        let mean = (h.iter().sum::<f64>() / h.len() as f64).max(EPS);
        h.into_iter().map(|h| h / mean).collect()
    }
}

/// Floor of the means divided by; ratios are at least 0.1, so only a bug reaches it.
const EPS: f64 = 1e-6;

#[cfg(test)]
mod tests {
    use super::*;
    use Divergence::*;

    /// p = N(0.7, 1), q = N(−0.1, 1): the integrals over q by the midpoint rule.
    fn expectation(f: impl Fn(f64) -> f64) -> f64 {
        let (m, theta) = (0.7, -0.1);
        let (n, low, high) = (200_000, -14.0, 14.0);
        let step = (high - low) / f64::from(n);
        let density = |x: f64, m: f64| (-0.5 * (x - m) * (x - m)).exp() / std::f64::consts::TAU.sqrt();
        let at = |i: i32| low + (f64::from(i) + 0.5) * step;
        let ratio = |x: f64| (-0.5 * ((x - m).powi(2) - (x - theta).powi(2))).exp();
        (0..n).map(at).map(|x| density(x, theta) * f(ratio(x)) * step).sum()
    }

    /// Reference 7.5: D_f and E_q h; the closed forms are δ²/2, δ², 1 − e^{−δ²/8}, (e^{δ²} − 1)/2 for δ = −0.8.
    #[test]
    fn divergences_between_gaussians_have_their_closed_forms() {
        let expected = [
            (ReverseKl, 0.32, 1.0),
            (ForwardKl, 0.32, 1.0),
            (Jeffreys, 0.64, 2.0),
            (SquaredHellinger, 0.076_884, 0.230_779),
            (JensenShannon, 0.148_356, 0.430_324),
            (SoftenedReverseKl, 0.171_644, 0.569_676),
            (Neyman, 0.448_240, 1.896_481),
        ];
        for (divergence, d, h) in expected {
            let found = (expectation(|r| divergence.f(r)), expectation(|r| divergence.h(r)));
            assert!((found.0 - d).abs() < 2e-6 && (found.1 - h).abs() < 2e-6, "{divergence:?}: {found:?}");
        }
    }

    /// h = f''·r², by differences; and the identities between them.
    #[test]
    fn weights_follow_from_the_divergences() {
        for r in [0.1, 0.5, 1.0, 3.0, 20.0] {
            for divergence in Divergence::ALL {
                let e = 1e-4 * r;
                let second = (divergence.f(r + e) - 2.0 * divergence.f(r) + divergence.f(r - e)) / (e * e);
                assert!((second * r * r / divergence.h(r) - 1.0).abs() < 1e-5, "{divergence:?} at {r}");
                assert!(divergence.f(1.0).abs() < 1e-15);
            }
            assert!((JensenShannon.h(r) + SoftenedReverseKl.h(r) - 1.0).abs() < 1e-15);
            assert!((Jeffreys.h(r) - ForwardKl.h(r) - ReverseKl.h(r)).abs() < 1e-15);
            assert!((ForwardKl.h(r) * Neyman.h(r) - 1.0).abs() < 1e-15);
        }
        assert_eq!((JensenShannon.h(1.0), SoftenedReverseKl.h(1.0)), (0.5, 0.5));
    }

    /// dD/dθ = −E_q[h]·(m − θ), the paper's theorem, by moving θ.
    #[test]
    fn the_gradient_is_the_weighted_one() {
        let d = |theta: f64, divergence: Divergence| {
            let (m, n, low) = (0.7, 100_000, -14.0);
            let step = 28.0 / f64::from(n);
            let density = |x: f64, m: f64| (-0.5 * (x - m) * (x - m)).exp() / std::f64::consts::TAU.sqrt();
            let term = |i: i32| {
                let x = low + (f64::from(i) + 0.5) * step;
                density(x, theta) * divergence.f((-0.5 * ((x - m).powi(2) - (x - theta).powi(2))).exp()) * step
            };
            (0..n).map(term).sum::<f64>()
        };
        for divergence in Divergence::ALL {
            let slope = (d(-0.1 + 1e-4, divergence) - d(-0.1 - 1e-4, divergence)) / 2e-4;
            let expected = -expectation(|r| divergence.h(r)) * 0.8;
            assert!((slope - expected).abs() < 1e-5, "{divergence:?}: {slope} for {expected}");
        }
    }

    #[test]
    fn ratios_are_clipped() {
        assert_eq!((density_ratio(100.0), density_ratio(-100.0), density_ratio(0.0)), (20.0, 0.1, 1.0));
    }

    #[test]
    fn weights_average_one_and_constant_logits_weigh_nothing() {
        for divergence in Divergence::ALL {
            let levels = [0.0, 0.1, 0.35, 0.5, 0.99, 1.0];
            let w = RatioBins::new(10, 0.5).weights(divergence, &[0.3, 5.0, 1.0, 20.0, 0.1, 2.0], &levels);
            assert!((w.iter().sum::<f64>() / 6.0 - 1.0).abs() < 1e-12, "{divergence:?}: {w:?}");
            let w = RatioBins::new(10, 0.5).weights(divergence, &[3.0; 6], &levels);
            assert!(w.iter().all(|w| (w - 1.0).abs() < 1e-6), "{divergence:?}: {w:?}");
        }
    }

    #[test]
    fn bins_remember_as_much_as_they_are_told() {
        let mut bins = RatioBins::new(2, 0.5);
        bins.weights(ForwardKl, &[2.0, 4.0], &[0.1, 0.2]);
        assert_eq!(bins.means, [3.0, 0.0]);
        bins.weights(ForwardKl, &[1.0, 8.0], &[0.1, 0.9]);
        assert_eq!(bins.means, [2.0, 8.0]);
        bins.keep = 0.0;
        bins.weights(ForwardKl, &[7.0], &[0.0]);
        assert_eq!(bins.means, [7.0, 8.0]);
    }
}
