//! How far the samples of a generator of the plane are from the data, in numbers that can be read off a picture.

use super::Point;
use super::mixture::Mixture;
use anyhow::Result;
use dmd::eval::sliced_wasserstein;
use ndarray::Array2;
use serde::Serialize;

/// A sample is near a mode within this many of its spreads; 98.9 % of the data are.
const NEAR: f64 = 3.0;
/// Directions of the distance, evenly around half a circle.
const DIRECTIONS: usize = 64;

/// What is measured on a set of samples.
#[derive(Clone, Debug, Serialize)]
pub struct Scores {
    /// Share of the samples near each mode.
    pub shares: Vec<f64>,
    /// Modes with at least a quarter of the samples that they should have.
    pub n_covered: usize,
    /// Share of the samples near no mode.
    pub between: f64,
    /// Standard deviation of the samples near a mode, around their own middle, over that of the data; the mean over
    /// modes with samples, each weighed by how many. Not a number where no sample is near a mode.
    pub spread: f64,
    /// Sliced Wasserstein distance to the data.
    pub distance: f64,
}

/// Measures `samples` against the mixture and a set of its points.
pub fn scores(mixture: &Mixture, samples: &[Point], data: &[Point]) -> Result<Scores> {
    let n = samples.len() as f64;
    let mut near = vec![Vec::new(); mixture.means.len()];
    for &x in samples {
        let (mode, distance) = mixture.nearest(x);
        if distance <= NEAR * mixture.spread {
            near[mode].push(x);
        }
    }
    let shares: Vec<f64> = near.iter().map(|points| points.len() as f64 / n).collect();
    let expected = 1.0 / shares.len() as f64;
    let inside: f64 = shares.iter().sum();
    let squares: f64 = near.iter().map(|points| squares(points)).sum();
    Ok(Scores {
        n_covered: shares.iter().filter(|share| **share >= 0.25 * expected).count(),
        between: 1.0 - inside,
        spread: (squares / (2.0 * inside * n)).sqrt() / mixture.spread,
        distance: sliced_wasserstein(rows(samples).view(), rows(data).view(), directions().view())?,
        shares,
    })
}

/// Sum of the squared distances to the points' own middle.
fn squares(points: &[Point]) -> f64 {
    let n = points.len().max(1) as f64;
    let middle = [0, 1].map(|i| points.iter().map(|p| p[i]).sum::<f64>() / n);
    points.iter().map(|p| (p[0] - middle[0]).powi(2) + (p[1] - middle[1]).powi(2)).sum()
}

fn rows(points: &[Point]) -> Array2<f32> {
    Array2::from_shape_fn((points.len(), 2), |(i, j)| points[i][j] as f32)
}

fn directions() -> Array2<f32> {
    let angle = |i: usize| i as f64 * std::f64::consts::PI / DIRECTIONS as f64;
    Array2::from_shape_fn((DIRECTIONS, 2), |(i, j)| (if j == 0 { angle(i).cos() } else { angle(i).sin() }) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use dmd::random::Random;

    #[test]
    fn the_data_score_as_data_and_one_point_does_not() {
        let ring = Mixture::ring();
        let random = Random { seed: 0, device: Device::Cpu };
        let [a, b] = [0, 1].map(|draw| ring.sample(&random, draw, 4096));
        let of_data = scores(&ring, &a, &b).unwrap();
        assert_eq!(of_data.n_covered, 6);
        assert!((of_data.between - 0.011).abs() < 0.005, "{of_data:?}");
        // Cut at three spreads, a Gaussian's own is 0.975.
        assert!((of_data.spread - 0.975).abs() < 0.02 && of_data.distance < 0.03, "{of_data:?}");

        let collapsed = scores(&ring, &vec![ring.means[2]; 100], &b).unwrap();
        assert_eq!((collapsed.n_covered, collapsed.shares[2]), (1, 1.0));
        assert!(collapsed.spread < 1e-12, "{collapsed:?}");
        // From one mode to the others: a chord's root mean square is radius·√2, a random direction sees 1/√2 of it or less.
        assert!(collapsed.distance > 0.5, "{collapsed:?}");
        let nowhere = scores(&ring, &[[5.0, 5.0]], &b).unwrap();
        assert!(nowhere.between == 1.0 && nowhere.spread.is_nan());
    }
}
