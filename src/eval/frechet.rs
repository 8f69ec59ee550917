//! Fréchet distance between two sets of feature vectors (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update
//! Rule"): the squared Wasserstein-2 distance of the normals with their means and covariances (Dowson and Landau 1982). FID
//! where the features are Inception's. Biased upwards by about a constant over the number of pictures, so that scores of
//! different numbers do not compare, and nothing with fewer pictures than features means anything.

use super::Counts;
use anyhow::{Result, ensure};
use nalgebra::DMatrix;
use ndarray::{Array1, Array2, ArrayView2, Axis};
use rayon::prelude::*;

/// `|m_a − m_b|² + tr(C_a + C_b − 2·(C_a·C_b)^½)` of the rows of `a` `[N, D]` and `b` `[M, D]`, N and M above D, for several
/// samples of the rows, each given by how often every row counts.
pub fn frechet_distance_of(a: ArrayView2<f64>, b: ArrayView2<f64>, counts: &[Counts]) -> Result<Vec<f64>> {
    let ([n, d], [m, other]) = ([a.nrows(), a.ncols()], [b.nrows(), b.ncols()]);
    ensure!(d == other && d > 0, "fréchet distance of features with {d} and {other} values, expected equal numbers");
    ensure!(
        n > d && m > d,
        "fréchet distance of {n} and {m} samples of {d} features, expected more samples than features"
    );
    let distance = |counts: &Counts| {
        let ((mean_a, cov_a), (mean_b, cov_b)) = (moments(a, &counts.a), moments(b, &counts.b));
        let apart = (&mean_a - &mean_b).mapv(|x| x * x).sum();
        apart + cov_a.diag().sum() + cov_b.diag().sum() - 2.0 * trace_of_root(&cov_a, &cov_b)
    };
    // Each of them takes d³ operations, on one core.
    Ok(counts.par_iter().map(distance).collect())
}

/// Mean and covariance (over N − 1) of counted rows.
fn moments(rows: ArrayView2<f64>, counts: &[u32]) -> (Array1<f64>, Array2<f64>) {
    let counts: Array1<f64> = counts.iter().map(|&n| f64::from(n)).collect();
    let n = counts.sum();
    let mean = rows.t().dot(&counts) / n;
    let centred = &rows - &mean;
    let counted = &centred * &counts.insert_axis(Axis(1));
    let covariance = centred.t().dot(&counted) / (n - 1.0);
    (mean, covariance)
}

/// tr (A·B)^½: with A = L·Lᵀ, the product has the eigenvalues of Lᵀ·B·L, which is symmetric.
fn trace_of_root(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    let root = lower_root(a);
    let product = root.t().dot(b).dot(&root);
    let d = product.nrows();
    let symmetric = DMatrix::from_fn(d, d, |i, j| 0.5 * (product[[i, j]] + product[[j, i]]));
    symmetric.symmetric_eigenvalues().iter().map(|value| value.max(0.0).sqrt()).sum()
}

/// L with L·Lᵀ = A, by Cholesky's rule. A may be singular, as where a feature never changes: its column is zero then.
fn lower_root(a: &Array2<f64>) -> Array2<f64> {
    let d = a.nrows();
    let smallest = 1e-14 * a.diag().fold(0.0_f64, |largest, value| largest.max(*value));
    let mut root = Array2::<f64>::zeros((d, d));
    for column in 0..d {
        let done = root.row(column).to_owned();
        let pivot = a[[column, column]] - done.dot(&done);
        if pivot <= smallest {
            continue;
        }
        let pivot = pivot.sqrt();
        root[[column, column]] = pivot;
        for row in column + 1..d {
            root[[row, column]] = (a[[row, column]] - root.row(row).dot(&done)) / pivot;
        }
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distance(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
        frechet_distance_of(a.view(), b.view(), &[Counts::once(a.nrows(), b.nrows())]).unwrap()[0]
    }

    fn rows(n: usize, d: usize, value: impl Fn(f64) -> f64) -> Array2<f64> {
        Array2::from_shape_fn((n, d), |(row, column)| value((row * d + column) as f64))
    }

    /// As everybody computes it (numpy 2.4.6, scipy 1.17.1):
    ///
    /// ```python
    /// a = np.sin(0.7*np.arange(36)+0.1).reshape(12, 3) + 0.3*np.cos(1.3*np.arange(36)).reshape(12, 3)
    /// b = 1.2*np.cos(0.9*np.arange(30)).reshape(10, 3) + 0.25
    /// def fid(a, b):
    ///     m, n = a.mean(0), b.mean(0)
    ///     c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    ///     return ((m - n)**2).sum() + np.trace(c + d - 2*scipy.linalg.sqrtm(c @ d).real)
    /// fid(a, b)                                       # 0.5063332272552712
    /// fid(a[[0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7]], b)    # 0.6767121046885207
    /// ```
    #[test]
    fn the_distance_is_scipys() {
        let a = rows(12, 3, |i| (0.7 * i + 0.1).sin() + 0.3 * (1.3 * i).cos());
        let b = rows(10, 3, |i| 1.2 * (0.9 * i).cos() + 0.25);
        assert!((distance(&a, &b) - 0.506_333_227_255_271_2).abs() < 1e-9, "{}", distance(&a, &b));
        assert!(distance(&a, &a).abs() < 1e-7);
        let counts = Counts { a: vec![2, 1, 3, 1, 1, 1, 1, 1, 0, 0, 0, 0], b: vec![1; 10] };
        let counted = frechet_distance_of(a.view(), b.view(), &[counts]).unwrap()[0];
        // These covariances are nearly singular, where scipy's root has some 1e-8 of error.
        assert!((counted - 0.676_712_104_688_520_7).abs() < 1e-7, "{counted}");
        // A feature that never changes, 0.5 in the one and 0.75 in the other, adds the square of 0.25.
        let with = |rows: &Array2<f64>, value: f64| {
            ndarray::concatenate![Axis(1), rows.view(), Array2::from_elem((rows.nrows(), 1), value).view()]
        };
        let singular = distance(&with(&a, 0.5), &with(&b, 0.75));
        assert!((singular - 0.506_333_227_255_271_2 - 0.0625).abs() < 1e-9, "{singular}");
    }

    #[test]
    fn more_features_than_samples_are_refused() {
        let error = |n: usize| {
            let rows = rows(n, 3, f64::sin);
            frechet_distance_of(rows.view(), rows.view(), &[]).map_err(|error| error.to_string())
        };
        assert_eq!(
            error(3).unwrap_err(),
            "fréchet distance of 3 and 3 samples of 3 features, expected more samples than features"
        );
        assert!(error(4).is_ok_and(|distances| distances.is_empty()));
    }
}
