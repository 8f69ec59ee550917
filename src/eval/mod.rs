//! Scores of samples, and the order statistics that benches report.

mod frechet;
mod kernel_distance;
mod sliced_wasserstein;
mod uncertainty;
pub use frechet::frechet_distance_of;
pub use kernel_distance::{kernel_distance, kernel_distance_of};
pub use sliced_wasserstein::{as_rows, sliced_wasserstein, sliced_wasserstein_of};
pub use uncertainty::{Counts, Floor, Measured, measure};

use crate::random::{Purpose, Random};
use anyhow::Result;
use ndarray::{Array2, Array4};

/// Directions of the distance between two sets of pictures.
const DIRECTIONS: usize = 256;

/// Sliced Wasserstein distance between two sets of pictures `(N, C, H, W)` in [-1, 1], always over the same 256
/// directions.
pub fn distance(a: &Array4<f32>, b: &Array4<f32>) -> Result<f64> {
    let (a, b) = (as_rows(a), as_rows(b));
    sliced_wasserstein(a.view(), b.view(), directions(a.ncols())?.view())
}

/// Directions in pictures of so many values, the same every time.
pub fn directions(n_values: usize) -> Result<Array2<f32>> {
    let random = Random { seed: 0, device: candle_core::Device::Cpu };
    let draws = random.stream(Purpose::Directions, 0).normal(DIRECTIONS * n_values);
    Ok(Array2::from_shape_vec((DIRECTIONS, n_values), draws)?)
}

/// The middle value; sorts its argument.
pub fn median(values: &mut [f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value below which this fraction lies; sorts its argument. Not a number for no values.
pub fn percentile(values: &mut [f64], fraction: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * fraction).round() as usize).copied().unwrap_or(f64::NAN)
}
