//! Counter-based noise: the same numbers on every platform, for the trainer and for the app. `docs/noise.md` defines them
//! for ports to other languages, with test vectors.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a bijection of a 128-bit
//! counter under a 64-bit key. Nothing is carried from one draw to the next, so any draw can be repeated alone:
//! picture 5 of seed 7 is the same picture in any batch. Normals come from the `libm` crate, never from the
//! platform's own logarithm and sine, whose last bits differ between systems.

#![no_std]
#![deny(missing_docs)]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;

/// The purpose of the noise that becomes pictures: picture `i` of seed `s` is
/// `Stream::new(s, PICTURE_NOISE, i).normal(C * H * W)`.
pub const PICTURE_NOISE: u32 = 0;

/// The purpose of the noise between the passes of a few-step generator, plus the number of the pass.
pub const REFINING_NOISE: u32 = 0x100;

/// A sequence of random numbers, named by what it is for. Every method starts at its beginning.
///
/// The key is `seed`; the counter is `[block, purpose, low half of index, high half of index]`, where `block` counts
/// the groups of four words drawn. A stream repeats itself after 2^34 words.
///
/// ```
/// use dmd_noise::{PICTURE_NOISE, Stream};
///
/// let stream = Stream::new(7, PICTURE_NOISE, 0);
/// assert_eq!(stream.normal(4), stream.normal(8)[..4]);
/// assert_ne!(stream.normal(4), Stream::new(7, PICTURE_NOISE, 1).normal(4));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// What a user sets: one seed, one result.
    pub seed: u64,
    /// What the numbers are for, so that two uses never share them.
    pub purpose: u32,
    /// Which picture, or which training step.
    pub index: u64,
}

impl Stream {
    /// The stream of this seed, purpose and index.
    pub const fn new(seed: u64, purpose: u32, index: u64) -> Self {
        Self { seed, purpose, index }
    }

    /// `n` random words.
    pub fn words(&self, n: usize) -> Vec<u32> {
        self.blocks().flatten().take(n).collect()
    }

    /// `n` numbers in `[0, 1)`, each of 53 bits, from two words.
    pub fn uniform(&self, n: usize) -> Vec<f64> {
        self.pairs().map(unit).take(n).collect()
    }

    /// `n` integers in `[0, bound)`, each the high half of a 64-bit word times `bound`. The bias of this
    /// multiply-shift is below `bound / 2^64`. Zeros where `bound` is 0.
    pub fn below(&self, n: usize, bound: u32) -> Vec<u32> {
        self.pairs().map(|bits| ((u128::from(bits) * u128::from(bound)) >> 64) as u32).take(n).collect()
    }

    /// `n` unit normals, by Box and Muller's method in f64, rounded to f32.
    pub fn normal(&self, n: usize) -> Vec<f32> {
        let mut values = vec![0.0; n];
        self.fill_normal(&mut values);
        values
    }

    /// The first `values.len()` numbers of [`normal`](Self::normal), without an allocation.
    pub fn fill_normal(&self, values: &mut [f32]) {
        for (pair, block) in values.chunks_mut(2).zip(self.blocks()) {
            pair.copy_from_slice(&normal_pair(block)[..pair.len()]);
        }
    }

    fn blocks(&self) -> impl Iterator<Item = [u32; 4]> {
        let key = halves(self.seed);
        let [low, high] = halves(self.index);
        let purpose = self.purpose;
        (0u64..).map(move |block| philox4x32_10([block as u32, purpose, low, high], key))
    }

    fn pairs(&self) -> impl Iterator<Item = u64> {
        self.blocks().flat_map(|[a, b, c, d]| [join(a, b), join(c, d)])
    }
}

/// Two unit normals from one block: radius from the first 64 bits, angle from the last.
fn normal_pair([a, b, c, d]: [u32; 4]) -> [f32; 2] {
    // 1 - u lies in (0, 1], so that the logarithm is finite.
    let radius = libm::sqrt(-2.0 * libm::log(1.0 - unit(join(a, b))));
    let (sin, cos) = libm::sincos(core::f64::consts::TAU * unit(join(c, d)));
    [(radius * cos) as f32, (radius * sin) as f32]
}

/// The top 53 bits of a 64-bit word as a number in `[0, 1)`.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Ten rounds of Philox4x32; constants from the paper's Table 2.
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [low0, high0] = halves(0xD251_1F53 * u64::from(counter[0]));
        let [low1, high1] = halves(0xCD9E_8D57 * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines `philox4x32 10` of `kat_vectors` in the authors' library Random123.
    #[test]
    fn philox_gives_the_known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn counter_and_key_hold_the_parts_of_a_stream_in_the_documented_order() {
        let stream = Stream::new(0x0000_0002_0000_0001, 3, 0x0000_0005_0000_0004);
        let expected = [philox4x32_10([0, 3, 4, 5], [1, 2]), philox4x32_10([1, 3, 4, 5], [1, 2])].concat();
        assert_eq!(stream.words(8), expected);
        assert_eq!(stream.words(5), expected[..5]);
    }

    /// Frozen: a change of these is a change of every picture that users have seen.
    #[test]
    fn normals_are_the_numbers_of_record() {
        let words = [0x6627_e8d5u32, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
        assert_eq!(Stream::new(0, 0, 0).words(4), words);
        // python3: u, v = (0xe169c58d6627e8d5 >> 11) / 2**53, (0x9b00dbd8bc57ac4c >> 11) / 2**53
        //          r = math.sqrt(-2 * math.log(1 - u)); r * math.cos(2 * math.pi * v), r * math.sin(2 * math.pi * v)
        assert_eq!(Stream::new(0, 0, 0).normal(2), [-1.624_963_4_f32, -1.268_349_2]);
    }

    #[test]
    fn normals_have_the_moments_and_tails_of_a_unit_normal() {
        let n = 1 << 20;
        let values: Vec<f64> = Stream::new(1, PICTURE_NOISE, 0).normal(n).into_iter().map(f64::from).collect();
        let moment = |power: i32| values.iter().map(|x| x.powi(power)).sum::<f64>() / n as f64;
        // Five standard errors of each moment: sqrt(1, 2, 15, 96) / sqrt(n).
        for (power, expected, variance) in [(1, 0.0, 1.0f64), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let error = (moment(power) - expected).abs();
            assert!(error < 5.0 * (variance / n as f64).sqrt(), "moment {power} is off by {error}");
        }
        // P(|x| > 3) = 0.0026998.
        let tail = values.iter().filter(|x| x.abs() > 3.0).count() as f64 / n as f64;
        assert!((tail - 0.0026998).abs() < 5.0 * (0.0027f64 / n as f64).sqrt(), "{tail}");
        // Neighbours, and the two of one Box-Muller pair, are uncorrelated.
        for lag in [1, 2, 3] {
            let product = values.windows(lag + 1).map(|w| w[0] * w[lag]).sum::<f64>() / n as f64;
            assert!(product.abs() < 5.0 / (n as f64).sqrt(), "lag {lag}: {product}");
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let values = Stream::new(2, 9, 3).uniform(100_000);
        assert!(values.iter().all(|u| (0.0..1.0).contains(u)));
        let mut counts = [0f64; 10];
        values.iter().for_each(|u| counts[(u * 10.0) as usize] += 1.0);
        // Chi-squared with 9 degrees of freedom exceeds 33.7 once in 10,000.
        let chi_squared: f64 = counts.iter().map(|c| (c - 10_000.0).powi(2) / 10_000.0).sum();
        assert!(chi_squared < 33.7, "{chi_squared}");
    }

    #[test]
    fn integers_stay_below_the_bound_and_reach_every_value() {
        let values = Stream::new(3, 1, 0).below(1000, 7);
        assert!((0..7).all(|v| values.contains(&v)) && values.iter().all(|v| *v < 7));
        assert_eq!(Stream::new(3, 1, 0).below(3, 0), [0, 0, 0]);
        assert_eq!(Stream::new(3, 1, 0).below(3, 1), [0, 0, 0]);
    }
}
