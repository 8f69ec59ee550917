//! The two inner kernels of convolution, in registers: a block of output channels times a few vectors of pixels, and a
//! block of output channels times a few taps. Written over `pulp`'s vectors, so one text serves AVX-512, AVX2, NEON and
//! plain code.
//!
//! What a convolution reads is laid out as *planes*: the picture's channels, moved sideways once per kernel column, with
//! the padding in place. A tap is then a plane and a whole number of rows to go down: a contiguous run of memory, for
//! all pixels at once, and no matrix of columns is ever written. With a stride, a plane has the pixels that its column
//! meets and no others, and its rows in as many groups as there are steps in the stride.

#![expect(clippy::needless_range_loop, reason = "kernels index several arrays by one number")]

use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Most output channels of a block, and most vectors beside it: 24 sums in 32 registers, 12 in 16.
pub const BLOCK: usize = 6;

/// Floats that a kernel may read past the last plane.
pub const SLACK: usize = 16;

/// The planes of one picture and how taps lie in them, n to a plane: tap `k` of pixel `p` is at
/// `k / n · plane + rows[k % n] + p`.
#[derive(Clone, Copy)]
pub struct Planes<'a> {
    /// All planes, one after the other, and [`SLACK`] more values.
    pub values: &'a [f32],
    /// From one plane to the next.
    pub plane: usize,
    /// Where each tap of a plane begins in it.
    pub rows: &'a [usize],
}

impl Planes<'_> {
    /// Where tap `k` of pixel 0 is.
    fn tap(&self, k: usize) -> usize {
        k / self.rows.len() * self.plane + self.rows[k % self.rows.len()]
    }

    /// One past the last value that `n` vectors of `lanes` from pixel `at` touch, for taps below `k`.
    fn reach(&self, k: usize, at: usize, n: usize, lanes: usize) -> usize {
        let furthest = self.rows.iter().max().unwrap_or(&0);
        (k - 1) / self.rows.len() * self.plane + furthest + at + n * lanes
    }
}

/// Calls a method with the block's size as constants.
macro_rules! by_block {
    ($m:expr, $n:expr, $tile:ident.$run:ident($($arg:expr),*)) => {
        match ($m, $n) {
            (1, 1) => $tile.$run::<_, 1, 1>($($arg),*),
            (2, 1) => $tile.$run::<_, 2, 1>($($arg),*),
            (3, 1) => $tile.$run::<_, 3, 1>($($arg),*),
            (4, 1) => $tile.$run::<_, 4, 1>($($arg),*),
            (5, 1) => $tile.$run::<_, 5, 1>($($arg),*),
            (6, 1) => $tile.$run::<_, 6, 1>($($arg),*),
            (1, 2) => $tile.$run::<_, 1, 2>($($arg),*),
            (2, 2) => $tile.$run::<_, 2, 2>($($arg),*),
            (3, 2) => $tile.$run::<_, 3, 2>($($arg),*),
            (4, 2) => $tile.$run::<_, 4, 2>($($arg),*),
            (5, 2) => $tile.$run::<_, 5, 2>($($arg),*),
            (6, 2) => $tile.$run::<_, 6, 2>($($arg),*),
            (1, 4) => $tile.$run::<_, 1, 4>($($arg),*),
            (2, 4) => $tile.$run::<_, 2, 4>($($arg),*),
            (3, 4) => $tile.$run::<_, 3, 4>($($arg),*),
            (4, 4) => $tile.$run::<_, 4, 4>($($arg),*),
            (5, 4) => $tile.$run::<_, 5, 4>($($arg),*),
            (6, 4) => $tile.$run::<_, 6, 4>($($arg),*),
            sizes => unreachable!("a block of {sizes:?}"),
        }
    };
}

/// Weights `(O, K)` as the forward kernel reads them: blocks of channels, tap by tap.
pub struct Packed {
    values: Vec<f32>,
    blocks: Vec<usize>,
    taps: usize,
    parts: usize,
}

/// The weights of some of the channels.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    values: &'a [f32],
    blocks: &'a [usize],
    taps: usize,
}

impl Packed {
    /// Of the weights `w`, where channel `o` has tap `k` at `o · channel + taps[k]`. The blocks go evenly into `parts`, or
    /// into as many as have a whole block each.
    pub fn new(w: &[f32], channels: usize, channel: usize, taps: &[usize], parts: usize) -> Self {
        let parts = parts.min(channels / BLOCK).max(1);
        let blocks = blocks(channels, parts);
        let mut values = vec![0f32; channels * taps.len()];
        let (mut rest, mut first) = (&mut values[..], 0);
        let mut tasks = Vec::with_capacity(blocks.len());
        for &width in &blocks {
            let (block, others) = rest.split_at_mut(width * taps.len());
            tasks.push((&w[first * channel..], width, block));
            (rest, first) = (others, first + width);
        }
        tasks.into_par_iter().for_each(|(w, width, block)| {
            for (tap, channels) in taps.iter().zip(block.chunks_exact_mut(width)) {
                channels.iter_mut().enumerate().for_each(|(lane, to)| *to = w[lane * channel + tap]);
            }
        });
        Packed { values, blocks, taps: taps.len(), parts }
    }

    /// All of them.
    pub fn whole(&self) -> Part<'_> {
        Part { values: &self.values, blocks: &self.blocks, taps: self.taps }
    }

    /// Part by part, with its biases and its output.
    pub fn split<'a>(&'a self, bias: &'a [f32], y: &'a mut [MaybeUninit<f32>]) -> Vec<Share<'a>> {
        let pixels = y.len() / bias.len();
        let (mut values, mut bias, mut y) = (&self.values[..], bias, y);
        let part = |blocks: &'a [usize]| {
            let channels: usize = blocks.iter().sum();
            Some((
                Part { values: values.split_off(..channels * self.taps)?, blocks, taps: self.taps },
                bias.split_off(..channels)?,
                y.split_off_mut(..channels * pixels)?,
            ))
        };
        self.blocks.chunks(self.blocks.len() / self.parts).filter_map(part).collect()
    }
}

/// Some channels' weights, biases and output.
type Share<'a> = (Part<'a>, &'a [f32], &'a mut [MaybeUninit<f32>]);

/// Splits channels into blocks of nearly equal size, whose number is a multiple of `parts`.
fn blocks(channels: usize, parts: usize) -> Vec<usize> {
    let n = channels.div_ceil(BLOCK).next_multiple_of(parts);
    (0..n).map(|i| (i + 1) * channels / n - i * channels / n).collect()
}

/// y `(O, pixels)` = bias + weights · taps, for one picture.
pub struct Forward<'a> {
    /// Weights of all channels of `y`.
    pub weights: Part<'a>,
    /// One per channel.
    pub bias: &'a [f32],
    /// The picture.
    pub planes: Planes<'a>,
    /// Output, whole rows of pixels per channel, all of which is written.
    pub y: &'a mut [MaybeUninit<f32>],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { weights, bias, planes, y } = self;
        let pixels = y.len() / bias.len();
        let mut at = 0;
        while at < pixels {
            let left = (pixels - at).div_ceil(S::F32_LANES);
            let n = match left {
                4.. if S::REGISTER_COUNT >= 32 => 4,
                2.. => 2,
                _ => 1,
            };
            let mut first = 0;
            for &m in weights.blocks {
                let rows = first..first + m;
                let tile = Tile {
                    weights: &weights.values[first * weights.taps..(first + m) * weights.taps],
                    bias: &bias[rows],
                    planes,
                    at,
                    y: &mut y[first * pixels..(first + m) * pixels],
                };
                by_block!(m, n, tile.run(simd));
                first += m;
            }
            at += n * S::F32_LANES;
        }
    }
}

/// A block of channels times a few vectors of pixels, all their sums in registers.
struct Tile<'a> {
    /// Tap by tap, the block's channels.
    weights: &'a [f32],
    bias: &'a [f32],
    planes: Planes<'a>,
    /// The first pixel.
    at: usize,
    /// The block's rows of pixels.
    y: &'a mut [MaybeUninit<f32>],
}

impl Tile<'_> {
    #[inline(always)]
    fn run<S: Simd, const M: usize, const N: usize>(self, simd: S) {
        let Tile { weights, bias, planes, at, y } = self;
        let (pixels, n_taps) = (y.len() / M, weights.len() / M);
        assert!(planes.reach(n_taps, at, N, S::F32_LANES) <= planes.values.len());
        let mut sums = [[simd.splat_f32s(0.0); N]; M];
        for m in 0..M {
            sums[m] = [simd.splat_f32s(bias[m]); N];
        }
        let mut weights = weights.chunks_exact(M);
        for plane in 0..n_taps / planes.rows.len() {
            for row in planes.rows {
                let Some(weights) = weights.next() else { return };
                // SAFETY: `reach` bounds every tap's vectors, and was asserted above.
                let x = unsafe { load::<S, N>(simd, planes.values, plane * planes.plane + row + at) };
                for m in 0..M {
                    let w = simd.splat_f32s(weights[m]);
                    for n in 0..N {
                        sums[m][n] = simd.mul_add_e_f32s(w, x[n], sums[m][n]);
                    }
                }
            }
        }
        // Through memory of its own: a loop too long to unroll would otherwise keep the sums out of registers above.
        let mut finished = [[simd.splat_f32s(0.0); N]; M];
        for m in 0..M {
            for n in 0..N {
                finished[m][n] = sums[m][n];
            }
        }
        for (row, finished) in y.chunks_exact_mut(pixels).zip(&finished) {
            let row = &mut row[at..];
            let n = row.len().min(N * S::F32_LANES);
            row[..n].write_copy_of_slice(&bytemuck::cast_slice(finished)[..n]);
        }
    }
}

/// `N` vectors from `at` on.
///
/// # Safety
/// `at + N·lanes` values must be there.
#[inline(always)]
unsafe fn load<S: Simd, const N: usize>(simd: S, values: &[f32], at: usize) -> [S::f32s; N] {
    debug_assert!(at + N * S::F32_LANES <= values.len());
    let mut vectors = [simd.splat_f32s(0.0); N];
    for (n, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: inside `values` by the caller's promise; vectors are plain floats, read without alignment.
        *vector = unsafe { values.as_ptr().add(at + n * S::F32_LANES).cast::<S::f32s>().read_unaligned() };
    }
    vectors
}

/// The gradient of an output `(pictures, O, pixels)` as the kernel below reads it: blocks of channels, within each a
/// vector of pixels at a time, with zeros after a picture's last pixel.
pub struct PackedGradient<'a> {
    values: &'a [f32],
    blocks: Vec<usize>,
    /// Vectors of all pictures.
    vectors: usize,
}

/// Pixels that are packed together: a vector of the widest kind, several of others.
const LANES: usize = SLACK;

impl<'a> PackedGradient<'a> {
    /// How many floats the packed form of `pictures` takes.
    pub fn size(pictures: usize, channels: usize, pixels: usize) -> usize {
        pictures * channels * pixels.next_multiple_of(LANES)
    }

    /// Packs what `pictures` has of each into `buffer`, which has [`Self::size`] floats.
    pub fn new(pictures: &[&[f32]], channels: usize, pixels: usize, buffer: &'a mut [f32]) -> Self {
        let (blocks, per_picture) = (blocks(channels, 1), pixels.div_ceil(LANES));
        let vectors = pictures.len() * per_picture;
        let (mut rest, mut first) = (&mut *buffer, 0);
        for &width in &blocks {
            let (block, others) = rest.split_at_mut(width * vectors * LANES);
            for (picture, grad) in pictures.iter().enumerate() {
                for (m, row) in grad[first * pixels..(first + width) * pixels].chunks_exact(pixels).enumerate() {
                    for (i, from) in row.chunks(LANES).enumerate() {
                        let to = &mut block[((picture * per_picture + i) * width + m) * LANES..][..LANES];
                        to[..from.len()].copy_from_slice(from);
                        to[from.len()..].fill(0.0);
                    }
                }
            }
            (rest, first) = (others, first + width);
        }
        PackedGradient { values: buffer, blocks, vectors }
    }
}

/// dw `(O, K)` += grad · tapsᵀ, summed over the pixels of some pictures.
pub struct WeightGradient<'a> {
    /// The first picture.
    pub planes: Planes<'a>,
    /// Where each vector of pixels is in `planes`, for the first tap.
    pub starts: &'a [usize],
    /// The gradient of the same pictures.
    pub grad: PackedGradient<'a>,
    /// Taps in the order of the planes.
    pub dw: &'a mut [f32],
}

impl WithSimd for WeightGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let WeightGradient { planes, starts, grad, dw } = self;
        let n_taps = dw.len() / grad.blocks.iter().sum::<usize>();
        let (mut values, mut dw) = (grad.values, dw);
        for m in grad.blocks {
            let (block, others) = values.split_at(m * grad.vectors * LANES);
            let (rows, other_rows) = dw.split_at_mut(m * n_taps);
            let mut k = 0;
            while k < n_taps {
                let n = match n_taps - k {
                    4.. if S::REGISTER_COUNT >= 32 => 4,
                    2.. => 2,
                    _ => 1,
                };
                let taps = Taps { planes, starts, grad: block, k, dw: &mut *rows };
                by_block!(m, n, taps.run(simd));
                k += n;
            }
            (values, dw) = (others, other_rows);
        }
    }
}

/// A block of channels times a few taps, all their sums in registers.
struct Taps<'a> {
    planes: Planes<'a>,
    starts: &'a [usize],
    /// The block's gradient.
    grad: &'a [f32],
    /// The first tap.
    k: usize,
    /// The block's rows of taps.
    dw: &'a mut [f32],
}

impl Taps<'_> {
    #[inline(always)]
    fn run<S: Simd, const M: usize, const N: usize>(self, simd: S) {
        let Taps { planes, starts, grad, k, dw } = self;
        let mut taps = [0; N];
        for n in 0..N {
            taps[n] = planes.tap(k + n);
            assert!(starts.last().is_none_or(|last| taps[n] + last + LANES <= planes.values.len()));
        }
        let mut sums = [[simd.splat_f32s(0.0); N]; M];
        for (&start, grad) in starts.iter().zip(grad.chunks_exact(M * LANES)) {
            for part in (0..LANES).step_by(S::F32_LANES) {
                let mut x = [simd.splat_f32s(0.0); N];
                for n in 0..N {
                    // SAFETY: the last start's reach was asserted above, and starts ascend.
                    [x[n]] = unsafe { load::<S, 1>(simd, planes.values, taps[n] + start + part) };
                }
                for m in 0..M {
                    // SAFETY: the chunk has M times LANES values, and `part` is below LANES by a whole vector.
                    let [g] = unsafe { load::<S, 1>(simd, grad, m * LANES + part) };
                    for n in 0..N {
                        sums[m][n] = simd.mul_add_e_f32s(g, x[n], sums[m][n]);
                    }
                }
            }
        }
        let n_taps = dw.len() / M;
        for m in 0..M {
            for n in 0..N {
                dw[m * n_taps + k + n] += simd.reduce_sum_f32s(sums[m][n]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Scalar128b, Scalar256b, Scalar512b};

    const CHANNELS: usize = 7;
    const PIXELS: usize = 21;

    /// Two planes of two taps each, three pixels a row; nothing beyond the slack can be read without being out of bounds.
    fn planes(values: &[f32]) -> Planes<'_> {
        Planes { values, plane: PIXELS + 3, rows: &[0, 3] }
    }

    fn numbers(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.7 + seed).sin()).collect()
    }

    fn tap(values: &[f32], k: usize, pixel: usize) -> f32 {
        values[k / 2 * (PIXELS + 3) + k % 2 * 3 + pixel]
    }

    /// On vectors of plain code, which Miri can follow: `MIRIFLAGS="-Zmiri-tree-borrows -Zmiri-ignore-leaks
    /// -Zmiri-disable-isolation" cargo +nightly miri test --lib tile`, in models/.
    fn check<S: Simd>(simd: S) {
        let values = [numbers(2 * (PIXELS + 3), 0.1), vec![f32::NAN; SLACK]].concat();
        let (weights, bias) = (numbers(CHANNELS * 4, 0.2), numbers(CHANNELS, 0.3));
        let packed = Packed::new(&weights, CHANNELS, 4, &[0, 1, 2, 3], 1);
        let mut y = vec![MaybeUninit::uninit(); CHANNELS * PIXELS];
        simd.vectorize(Forward { weights: packed.whole(), bias: &bias, planes: planes(&values), y: &mut y });
        for (i, y) in y.iter().enumerate() {
            let (o, pixel) = (i / PIXELS, i % PIXELS);
            let expected = bias[o] + (0..4).map(|k| weights[o * 4 + k] * tap(&values, k, pixel)).sum::<f32>();
            // SAFETY: the kernel has written all of y; Miri would say so if it had not.
            assert!((unsafe { y.assume_init() } - expected).abs() < 1e-5, "channel {o}, pixel {pixel}");
        }

        let finite = [&values[..2 * (PIXELS + 3)], &[0.0; SLACK]].concat();
        let grad = numbers(CHANNELS * PIXELS, 0.4);
        let mut buffer = vec![f32::NAN; PackedGradient::size(1, CHANNELS, PIXELS)];
        let mut dw = vec![1f32; CHANNELS * 4];
        let packed = PackedGradient::new(&[&grad], CHANNELS, PIXELS, &mut buffer);
        let starts: Vec<usize> = (0..PIXELS).step_by(SLACK).collect();
        simd.vectorize(WeightGradient { planes: planes(&finite), starts: &starts, grad: packed, dw: &mut dw });
        for (i, dw) in dw.iter().enumerate() {
            let (o, k) = (i / 4, i % 4);
            let expected = 1.0 + (0..PIXELS).map(|p| grad[o * PIXELS + p] * tap(&values, k, p)).sum::<f32>();
            assert!((dw - expected).abs() < 1e-5, "channel {o}, tap {k}");
        }
    }

    #[test]
    fn kernels_of_every_width_give_the_sums_of_plain_loops() {
        check(Scalar128b);
        check(Scalar256b);
        check(Scalar512b);
    }

    /// Where this machine has them: `dispatch` would only ever run the widest.
    #[test]
    fn kernels_of_every_instruction_set_give_the_sums_of_plain_loops() {
        #[cfg(target_arch = "x86_64")]
        {
            pulp::x86::V3::try_new().into_iter().for_each(check);
            pulp::x86::V4::try_new().into_iter().for_each(check);
        }
        #[cfg(target_arch = "aarch64")]
        pulp::aarch64::Neon::try_new().into_iter().for_each(check);
    }

    #[test]
    fn parts_of_weights_give_the_bits_of_the_whole() {
        let values = [numbers(2 * (PIXELS + 3), 0.1), vec![0.0; SLACK]].concat();
        let (weights, bias) = (numbers(31 * 4, 0.2), numbers(31, 0.3));
        let y = |parts: usize| {
            let packed = Packed::new(&weights, 31, 4, &[0, 1, 2, 3], parts);
            let mut y = vec![MaybeUninit::uninit(); 31 * PIXELS];
            let shares = packed.split(&bias, &mut y);
            assert_eq!(shares.len(), parts.min(31 / BLOCK));
            for (weights, bias, y) in shares {
                Scalar256b.vectorize(Forward { weights, bias, planes: planes(&values), y });
            }
            // SAFETY: the shares are all of y, and the kernel has written each.
            y.into_iter().map(|y| unsafe { y.assume_init() }.to_bits()).collect::<Vec<_>>()
        };
        assert!([2, 3, 5, 31].iter().all(|parts| y(*parts) == y(1)));
    }
}
