//! Kernel distance between two sets of feature vectors (Bińkowski et al. 2018, "Demystifying MMD GANs", section 4): KID
//! where the features are Inception's. Unbiased, so that two samples of one distribution come out at zero on average,
//! whatever their number, and a value may be a little below zero.

use anyhow::{Result, ensure};
use ndarray::{Array2, ArrayView2};

/// The squared maximum mean discrepancy of `a` `[N, D]` and `b` `[M, D]` under the kernel (x·y/D + 1)³.
pub fn kernel_distance(a: ArrayView2<f64>, b: ArrayView2<f64>) -> Result<f64> {
    let ([n, d], [m, other]) = ([a.nrows(), a.ncols()], [b.nrows(), b.ncols()]);
    ensure!(n > 1 && m > 1, "kernel distance of {n} and {m} samples, expected at least 2 each");
    ensure!(d == other && d > 0, "kernel distance of features with {d} and {other} values, expected equal numbers");
    let kernel = |x: ArrayView2<f64>, y: ArrayView2<f64>| -> Array2<f64> {
        x.dot(&y.t()).mapv(|dot| (dot / d as f64 + 1.0).powi(3))
    };
    let within = |x: ArrayView2<f64>| {
        let k = kernel(x, x);
        let n = x.nrows() as f64;
        (k.sum() - k.diag().sum()) / (n * (n - 1.0))
    };
    Ok(within(a) + within(b) - 2.0 * kernel(a, b).sum() / (n * m) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    /// One dimension, by hand: a = {0, 1}, b = {1, 2}, k(x, y) = (xy + 1)³. Within a: k(0, 1) = 1; within b: k(1, 2) =
    /// 27; between: 1, 1, 8, 27, mean 9.25. 1 + 27 − 18.5 = 9.5.
    #[test]
    fn the_distance_is_the_unbiased_estimate() {
        let found = kernel_distance(array![[0.0], [1.0]].view(), array![[1.0], [2.0]].view()).unwrap();
        assert!((found - 9.5).abs() < 1e-12, "{found}");
        assert!(kernel_distance(array![[0.0]].view(), array![[1.0], [2.0]].view()).is_err());
        assert!(kernel_distance(array![[0.0], [1.0]].view(), array![[1.0, 1.0], [2.0, 1.0]].view()).is_err());
    }

    /// Halves of one sample are at zero within their error, a shifted one is not.
    #[test]
    fn one_distribution_is_at_zero_on_average() {
        let draws = dmd_runtime::noise::Stream::new(3, 0, 0).normal(8000);
        let all = Array2::from_shape_vec((1000, 8), draws.into_iter().map(f64::from).collect()).unwrap();
        let (a, b) = all.view().split_at(ndarray::Axis(0), 500);
        let same = kernel_distance(a, b).unwrap();
        let moved = kernel_distance(a, b.mapv(|v| v + 0.5).view()).unwrap();
        assert!(same.abs() < 0.02 && moved > 0.2, "{same} {moved}");
    }
}
