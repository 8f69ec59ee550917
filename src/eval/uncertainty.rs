//! How far a score can be trusted: its standard error, and the floor that two halves of the reference are at.

use crate::random::{Purpose, Random};
use anyhow::Result;

/// How often every row of two samples counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Of the first.
    pub a: Vec<u32>,
    /// Of the second.
    pub b: Vec<u32>,
}

impl Counts {
    /// Every row once.
    pub fn once(n_a: usize, n_b: usize) -> Self {
        Counts { a: vec![1; n_a], b: vec![1; n_b] }
    }
}

/// A score, and what it is worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// The score.
    pub value: f64,
    /// Its standard error, by the bootstrap over both samples (Efron 1979). Near the floor it errs to the safe side.
    pub standard_error: f64,
    /// What two samples of the reference, as many pictures each, score against each other: the least that can be told from
    /// nothing. None where the halves are too small to tell.
    pub floor: Option<f64>,
}

impl Measured {
    /// Two standard errors to each side.
    pub fn interval(&self) -> [f64; 2] {
        [-2.0, 2.0].map(|side| self.value + side * self.standard_error)
    }
}

/// What halves of a sample say of all of it.
#[derive(Clone, Copy, Debug)]
pub enum Floor {
    /// The mean of halves' scores shrinks with this power of their size.
    Mean(f64),
    /// The score is zero on average: what counts is its size, which shrinks with the number.
    Size,
}

/// A score of the rows of a model's pictures against those of a reference, of which picture i has the label `labels[i]`.
/// `score` gives those of several samples, between the two or, `within`, between the reference and itself.
pub fn measure(
    n: usize,
    labels: &[i64],
    floor: Floor,
    n_draws: usize,
    between: impl Fn(&[Counts]) -> Result<Vec<f64>>,
    within: impl Fn(&[Counts]) -> Result<Vec<f64>>,
) -> Result<Measured> {
    let n_reference = labels.len();
    let mut samples = vec![Counts::once(n, n_reference)];
    samples
        .extend((0..n_draws as u64).map(|draw| Counts { a: drawn(n, 2 * draw), b: drawn(n_reference, 2 * draw + 1) }));
    let scores = between(&samples)?;
    let (value, drawn) = (scores[0], &scores[1..]);
    let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
    let variance = drawn.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / (drawn.len() as f64 - 1.0);
    let halves: Vec<Counts> = (0..SPLITS).map(|split| halves(labels, split)).collect();
    // The floor of n pictures against n of the reference, by halves of the reference.
    let ratio = (n_reference / 2) as f64 / (2.0 / (1.0 / n as f64 + 1.0 / n_reference as f64));
    let floor = within(&halves).ok().filter(|_| n_reference >= 4).map(|scores| {
        let mean = |of: &dyn Fn(f64) -> f64| scores.iter().map(|score| of(*score)).sum::<f64>() / scores.len() as f64;
        match floor {
            Floor::Mean(power) => mean(&|score| score) * ratio.powf(power),
            Floor::Size => mean(&|score| score * score).sqrt() * ratio,
        }
    });
    Ok(Measured { value, standard_error: variance.sqrt(), floor })
}

/// Ways to halve a reference.
const SPLITS: u64 = 8;

/// As many rows as there are, drawn with replacement.
fn drawn(n: usize, draw: u64) -> Vec<u32> {
    let mut counts = vec![0; n];
    random().stream(Purpose::Bootstrap, draw).below(n, n as u32).into_iter().for_each(|row| counts[row as usize] += 1);
    counts
}

/// Two halves, each with half of the pictures of every label.
fn halves(labels: &[i64], split: u64) -> Counts {
    let order = random().stream(Purpose::Halves, split).uniform(labels.len());
    let mut rows: Vec<usize> = (0..labels.len()).collect();
    rows.sort_by(|&i, &j| labels[i].cmp(&labels[j]).then(order[i].total_cmp(&order[j])));
    let mut counts = Counts { a: vec![0; labels.len()], b: vec![0; labels.len()] };
    for (place, row) in rows.into_iter().enumerate() {
        let half = if place % 2 == 0 { &mut counts.a } else { &mut counts.b };
        half[row] = 1;
    }
    counts
}

fn random() -> Random {
    Random { seed: 0, device: candle_core::Device::Cpu }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::sliced_wasserstein_of;
    use dmd_runtime::noise::Stream;
    use ndarray::Array2;

    fn rows(n: usize, seed: u64, shift: f32) -> Array2<f32> {
        Array2::from_shape_vec((n, 6), Stream::new(seed, 0, 0).normal(n * 6)).unwrap() + shift
    }

    /// What scores of 40 other draws spread by, and what draws of the same distribution are apart.
    #[test]
    fn errors_and_floors_are_those_of_fresh_draws() {
        let n = 200;
        let directions = Array2::from_shape_vec((32, 6), Stream::new(9, 0, 0).normal(32 * 6)).unwrap();
        let score = |a: &Array2<f32>, b: &Array2<f32>, counts: &[Counts]| {
            sliced_wasserstein_of(a.view(), b.view(), directions.view(), counts)
        };
        for shift in [0.0, 0.2] {
            let fresh: Vec<f64> = (0..40)
                .map(|i| score(&rows(n, 100 + i, shift), &rows(n, 200 + i, 0.0), &[Counts::once(n, n)]).unwrap()[0])
                .collect();
            let mean = fresh.iter().sum::<f64>() / 40.0;
            let spread = (fresh.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 39.0).sqrt();
            let measured: Vec<Measured> = (0..6)
                .map(|i| {
                    let (a, b) = (rows(n, 300 + i, shift), rows(n, 400 + i, 0.0));
                    measure(n, &vec![0; n], Floor::Mean(0.5), 40, |c| score(&a, &b, c), |c| score(&b, &b, c)).unwrap()
                })
                .collect();
            let of = |get: fn(&Measured) -> f64| measured.iter().map(get).sum::<f64>() / 6.0;
            let (error, floor) = (of(|m| m.standard_error), of(|m| m.floor.unwrap()));
            assert!((0.7..1.8).contains(&(error / spread)), "shift {shift}: error {error}, spread {spread}");
            let same: Vec<f64> = (0..40)
                .map(|i| score(&rows(n, 500 + i, 0.0), &rows(n, 600 + i, 0.0), &[Counts::once(n, n)]).unwrap()[0])
                .collect();
            let same = same.iter().sum::<f64>() / 40.0;
            assert!((floor / same - 1.0).abs() < 0.12, "shift {shift}: floor {floor}, fresh draws {same}");
        }
    }

    #[test]
    fn halves_share_no_row_and_have_every_label_alike() {
        let labels: Vec<i64> = (0..40).map(|i| i % 4).collect();
        let counts = halves(&labels, 3);
        assert!(counts.a.iter().zip(&counts.b).all(|(a, b)| a + b == 1));
        for label in 0..4 {
            let n = (0..40).filter(|&i| labels[i] == label && counts.a[i] == 1).count();
            assert_eq!(n, 5);
        }
        assert_ne!(counts, halves(&labels, 4));
        assert_eq!(drawn(50, 1).iter().sum::<u32>(), 50);
        assert_ne!(drawn(50, 1), drawn(50, 2));
    }
}
