//! Kernel distance between two sets of feature vectors (Bińkowski et al. 2018, "Demystifying MMD GANs", section 4): KID
//! where the features are Inception's. Unbiased, so that two samples of one distribution come out at zero on average,
//! whatever their number, and a value may be a little below zero.

use super::Counts;
use anyhow::{Result, ensure};
use ndarray::{Array2, ArrayView2, s};

/// Rows of a kernel matrix at a time, so that a large one is never whole.
const ROWS: usize = 512;

/// The squared maximum mean discrepancy of `a` `[N, D]` and `b` `[M, D]` under the kernel (x·y/D + 1)³.
pub fn kernel_distance(a: ArrayView2<f64>, b: ArrayView2<f64>) -> Result<f64> {
    Ok(kernel_distance_of(a, b, &[Counts::once(a.nrows(), b.nrows())])?[0])
}

/// The same of several samples of the rows, each given by how often every row counts; a row is never compared with itself.
pub fn kernel_distance_of(a: ArrayView2<f64>, b: ArrayView2<f64>, counts: &[Counts]) -> Result<Vec<f64>> {
    let ([n, d], [m, other]) = ([a.nrows(), a.ncols()], [b.nrows(), b.ncols()]);
    ensure!(n > 1 && m > 1, "kernel distance of {n} and {m} samples, expected at least 2 each");
    ensure!(d == other && d > 0, "kernel distance of features with {d} and {other} values, expected equal numbers");
    let columns = |n: usize, of: &dyn Fn(&Counts) -> &Vec<u32>| {
        Array2::from_shape_fn((n, counts.len()), |(row, sample)| f64::from(of(&counts[sample])[row]))
    };
    let (in_a, in_b) = (columns(n, &|counts| &counts.a), columns(m, &|counts| &counts.b));
    let (aa, bb, ab) = (sums(a, a, &in_a, &in_a), sums(b, b, &in_b, &in_b), sums(a, b, &in_a, &in_b));
    let within = |x: ArrayView2<f64>, counts: &Array2<f64>, sum: f64, sample: usize| {
        let counts = counts.column(sample);
        let itself: f64 = x.rows().into_iter().zip(counts).map(|(x, n)| n * n * kernel(x.dot(&x), d)).sum();
        (sum - itself) / (counts.sum().powi(2) - counts.dot(&counts))
    };
    let between = |sample: usize| ab[sample] / (in_a.column(sample).sum() * in_b.column(sample).sum());
    let distance = |sample: usize| {
        within(a, &in_a, aa[sample], sample) + within(b, &in_b, bb[sample], sample) - 2.0 * between(sample)
    };
    Ok((0..counts.len()).map(distance).collect())
}

fn kernel(dot: f64, d: usize) -> f64 {
    (dot / d as f64 + 1.0).powi(3)
}

/// Σᵢⱼ cᵢ·k(xᵢ, yⱼ)·eⱼ for every column c of `in_x` and e of `in_y`.
fn sums(x: ArrayView2<f64>, y: ArrayView2<f64>, in_x: &Array2<f64>, in_y: &Array2<f64>) -> Vec<f64> {
    let mut sums = vec![0.0; in_x.ncols()];
    for first in (0..x.nrows()).step_by(ROWS) {
        let rows = s![first..(first + ROWS).min(x.nrows()), ..];
        let k = x.slice(rows).dot(&y.t()).mapv(|dot| kernel(dot, x.ncols()));
        let weighted = in_x.slice(rows).to_owned() * k.dot(in_y);
        sums.iter_mut().zip(weighted.columns()).for_each(|(sum, column)| *sum += column.sum());
    }
    sums
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

    /// Rows that count twice are compared with others twice, and not with themselves: of a = {0, 0, 1} that leaves k(0, 1)
    /// = 1 within; of b = {1, 2, 2}, 27; between, a mean of (2·1 + 4·1 + 8 + 2·27) / 9.
    #[test]
    fn counted_rows_are_repeated_rows() {
        let (a, b) = (array![[0.0], [1.0]], array![[1.0], [2.0]]);
        let counts = Counts { a: vec![2, 1], b: vec![1, 2] };
        let found = kernel_distance_of(a.view(), b.view(), &[counts]).unwrap()[0];
        let expected = 1.0 + 27.0 - 2.0 * 68.0 / 9.0;
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
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
