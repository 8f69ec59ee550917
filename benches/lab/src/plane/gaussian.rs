//! A Gaussian of the plane, noised: what an affine generator makes, and so the exact fake score.

use super::Point;

/// N(mean, covariance).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gaussian {
    /// Its middle.
    pub mean: Point,
    /// Symmetric, positive definite.
    pub covariance: [[f64; 2]; 2],
}

impl Gaussian {
    /// What x = mean + factor·z makes of unit normal z.
    pub fn of_map(mean: Point, factor: [[f64; 2]; 2]) -> Self {
        let dot = |i: usize, j: usize| factor[i][0] * factor[j][0] + factor[i][1] * factor[j][1];
        Gaussian { mean, covariance: [[dot(0, 0), dot(0, 1)], [dot(1, 0), dot(1, 1)]] }
    }

    /// D(x, sigma) = mean + C·(C + sigma²)⁻¹·(x − mean).
    pub fn denoise(&self, x: Point, sigma: f64) -> Point {
        let (solved, _) = self.solve(x, sigma);
        let c = self.covariance;
        [0, 1].map(|i| self.mean[i] + c[i][0] * solved[0] + c[i][1] * solved[1])
    }

    /// Log density at x under noise sigma.
    pub fn log_density(&self, x: Point, sigma: f64) -> f64 {
        let (solved, determinant) = self.solve(x, sigma);
        let square = (x[0] - self.mean[0]) * solved[0] + (x[1] - self.mean[1]) * solved[1];
        -0.5 * square - 0.5 * determinant.ln() - std::f64::consts::TAU.ln()
    }

    /// (C + sigma²)⁻¹·(x − mean), and the determinant of the first.
    fn solve(&self, x: Point, sigma: f64) -> (Point, f64) {
        let [[a, b], [_, d]] = self.covariance;
        let (a, d) = (a + sigma * sigma, d + sigma * sigma);
        let determinant = a * d - b * b;
        let [u, v] = [x[0] - self.mean[0], x[1] - self.mean[1]];
        ([(d * u - b * v) / determinant, (a * v - b * u) / determinant], determinant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plane::mixture::Mixture;

    /// A round Gaussian is a mixture of one.
    #[test]
    fn a_round_one_agrees_with_the_mixture_of_one() {
        let round = Gaussian::of_map([0.3, -0.1], [[0.0, 0.4], [-0.4, 0.0]]);
        let mixture = Mixture { means: vec![[0.3, -0.1]], spread: 0.4 };
        for (x, sigma) in [([0.0, 0.0], 0.1), ([1.0, -2.0], 0.7)] {
            assert!((round.log_density(x, sigma) - mixture.log_density(x, sigma)).abs() < 1e-12);
            let (a, b) = (round.denoise(x, sigma), mixture.denoise(x, sigma));
            assert!((a[0] - b[0]).abs() < 1e-12 && (a[1] - b[1]).abs() < 1e-12);
        }
    }

    /// Tweedie: D = x + sigma²·∇log p, for a skew one.
    #[test]
    fn the_denoiser_follows_from_the_density() {
        let skew = Gaussian::of_map([0.1, 0.2], [[0.5, 0.0], [0.3, 0.2]]);
        let (x, sigma) = ([0.4, -0.6], 0.3);
        let slope = |to: [Point; 2]| (skew.log_density(to[1], sigma) - skew.log_density(to[0], sigma)) / 2e-5;
        let score = [slope([[0.4 - 1e-5, -0.6], [0.4 + 1e-5, -0.6]]), slope([[0.4, -0.6 - 1e-5], [0.4, -0.6 + 1e-5]])];
        let x0 = skew.denoise(x, sigma);
        assert!((0..2).all(|i| (x[i] + sigma * sigma * score[i] - x0[i]).abs() < 1e-8), "{x0:?}");
    }
}
