//! The teacher of the plane: a mixture of equal Gaussians. Noised, it is again one, so that its density, its best
//! denoiser and its probability-flow ODE need no network.

use super::Point;
use anyhow::Result;
use dmd::random::{Purpose, Random};
use dmd_models::NoiseLevels;

/// Gaussians of equal weight and spread around these means.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// Middle of each mode.
    pub means: Vec<Point>,
    /// Standard deviation of each mode, in every direction.
    pub spread: f64,
}

impl Mixture {
    /// Six modes on a circle.
    pub fn ring() -> Self {
        let at = |k: usize| (k as f64 + 0.5) * std::f64::consts::TAU / 6.0;
        Mixture { means: (0..6).map(|k| [0.8 * at(k).cos(), 0.8 * at(k).sin()]).collect(), spread: 0.1 }
    }

    /// Two modes, left and right.
    pub fn two_modes() -> Self {
        Mixture { means: vec![[-0.6, 0.0], [0.6, 0.0]], spread: 0.1 }
    }

    /// Root of the mean variance per coordinate; the mean of all modes is zero.
    pub fn sigma_data(&self) -> f64 {
        let squares: f64 = self.means.iter().flatten().map(|v| v * v).sum();
        (squares / (2.0 * self.means.len() as f64) + self.spread * self.spread).sqrt()
    }

    /// `n` points of it, the `draw`-th such set of a seed.
    pub fn sample(&self, random: &Random, draw: u64, n: usize) -> Vec<Point> {
        let stream = random.stream(Purpose::AblationData, draw);
        let modes = random.stream(Purpose::AblationMode, draw).below(n, self.means.len() as u32);
        let noise = stream.normal(2 * n);
        let point = |(mode, noise): (u32, &[f32])| {
            let mean = self.means[mode as usize];
            [0, 1].map(|i| mean[i] + self.spread * f64::from(noise[i]))
        };
        modes.into_iter().zip(noise.chunks_exact(2)).map(point).collect()
    }

    /// D(x, sigma) = E[x0 | x]: each mode's own (s²·x + sigma²·mean)/(s² + sigma²), by the mode's share at x.
    pub fn denoise(&self, x: Point, sigma: f64) -> Point {
        let total = self.variance(sigma);
        let logs = self.logs(x, total);
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut mean) = (0.0, [0.0; 2]);
        for (log, mode) in logs.iter().zip(&self.means) {
            let share = (log - largest).exp();
            sum += share;
            (0..2).for_each(|i| mean[i] += share * mode[i]);
        }
        [0, 1].map(|i| (self.spread.powi(2) * x[i] + sigma * sigma * mean[i] / sum) / total)
    }

    /// Log density at x of the mixture under noise sigma.
    pub fn log_density(&self, x: Point, sigma: f64) -> f64 {
        let total = self.variance(sigma);
        let logs = self.logs(x, total);
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logs.iter().map(|log| (log - largest).exp()).sum();
        largest + sum.ln() - (std::f64::consts::TAU * total * self.means.len() as f64).ln()
    }

    /// Where the probability-flow ODE dx/dsigma = (x − D(x, sigma))/sigma takes unit normal `noise` from sigma 80 down to
    /// zero, by Heun's method (Karras et al. 2022, algorithm 1 without churn).
    pub fn follow_ode(&self, noise: Point, n_steps: usize) -> Result<Point> {
        let sigmas = NoiseLevels::karras(1000, 0.002, 80.0, 7.0)?.sampling_steps(n_steps)?;
        let slope = |x: Point, sigma: f64| {
            let x0 = self.denoise(x, sigma);
            [0, 1].map(|i| (x[i] - x0[i]) / sigma)
        };
        let mut x = noise.map(|z| z * sigmas[0]);
        for pair in sigmas.windows(2) {
            let [sigma, next] = [pair[0], pair[1]];
            let begin = slope(x, sigma);
            let euler = [0, 1].map(|i| x[i] + begin[i] * (next - sigma));
            // The step to zero lands on the estimate itself.
            let end = if next == 0.0 { begin } else { slope(euler, next) };
            x = [0, 1].map(|i| x[i] + 0.5 * (begin[i] + end[i]) * (next - sigma));
        }
        Ok(x)
    }

    /// The mode whose middle is nearest, and the distance to it.
    pub fn nearest(&self, x: Point) -> (usize, f64) {
        let distance = |mean: &Point| (x[0] - mean[0]).hypot(x[1] - mean[1]);
        let all = self.means.iter().map(distance).enumerate();
        all.min_by(|a, b| a.1.total_cmp(&b.1)).expect("a mixture has modes")
    }

    fn variance(&self, sigma: f64) -> f64 {
        self.spread * self.spread + sigma * sigma
    }

    /// −|x − mean|²/2T of every mode.
    fn logs(&self, x: Point, total: f64) -> Vec<f64> {
        let square = |mean: &Point| (x[0] - mean[0]).powi(2) + (x[1] - mean[1]).powi(2);
        self.means.iter().map(|mean| -square(mean) / (2.0 * total)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn one(mean: Point, spread: f64) -> Mixture {
        Mixture { means: vec![mean], spread }
    }

    /// One mode is reference 7.1's Gaussian: m 0.3, s 0.5, sigma 1, x_t −0.8 give 0.08.
    #[test]
    fn one_mode_has_the_gaussian_denoiser() {
        let x0 = one([0.3, 0.3], 0.5).denoise([-0.8, 1.0], 1.0);
        assert!((x0[0] - 0.08).abs() < 1e-12 && (x0[1] - 0.44).abs() < 1e-12, "{x0:?}");
    }

    /// Tweedie: D = x + sigma²·∇log p, by differences, near modes, between them and far away.
    #[test]
    fn the_denoiser_follows_from_the_density() {
        let ring = Mixture::ring();
        for (x, sigma) in [([0.7, 0.4], 0.05), ([0.1, -0.2], 0.3), ([2.0, -1.0], 1.0), ([0.0, 0.0], 0.5)] {
            let x0 = ring.denoise(x, sigma);
            for i in 0..2 {
                let moved = |e: f64| {
                    let mut x = x;
                    x[i] += e;
                    ring.log_density(x, sigma)
                };
                let score = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((x[i] + sigma * sigma * score - x0[i]).abs() < 1e-7, "at {x:?}, sigma {sigma}");
            }
        }
    }

    #[test]
    fn the_density_integrates_to_one_and_the_spread_is_that_of_samples() {
        let ring = Mixture::ring();
        let step = 0.02;
        let grid = || (-250..250).map(|i| (f64::from(i) + 0.5) * step);
        let sum: f64 = grid().flat_map(|x| grid().map(move |y| [x, y])).map(|x| ring.log_density(x, 0.4).exp()).sum();
        assert!((sum * step * step - 1.0).abs() < 1e-9, "{sum}");
        let random = Random { seed: 1, device: Device::Cpu };
        let samples = ring.sample(&random, 0, 20_000);
        let rms = (samples.iter().flatten().map(|v| v * v).sum::<f64>() / 40_000.0).sqrt();
        assert!((rms / ring.sigma_data() - 1.0).abs() < 0.01, "{rms} for {}", ring.sigma_data());
    }

    /// Reference 7.8: x(0) = m + (x(σ) − m)·s/√(s² + σ²); four times nearer for twice the steps.
    #[test]
    fn the_ode_has_its_closed_form() {
        let (mean, spread) = ([0.3, -0.2], 0.5);
        let teacher = one(mean, spread);
        let error = |n: usize| {
            let found = teacher.follow_ode([0.7, -1.3], n).unwrap();
            let exact = |i: usize, z: f64| mean[i] + (80.0 * z - mean[i]) * spread / (0.25f64 + 6400.0).sqrt();
            (found[0] - exact(0, 0.7)).hypot(found[1] - exact(1, -1.3))
        };
        let errors = [error(32), error(64), error(128)];
        assert!(errors[2] < 1e-3, "{errors:?}");
        for pair in errors.windows(2) {
            assert!((3.0..5.5).contains(&(pair[0] / pair[1])), "{errors:?}");
        }
    }
}
