//! The two inner kernels of convolution, in registers: a block of output channels times a few vectors of pixels, and a
//! block of output channels times a few taps. Written over `pulp`'s vectors, so one text serves AVX-512, AVX2, NEON and
//! plain code.
//!
//! What a convolution reads is laid out as *planes*: the picture's channels, moved sideways once per kernel column, with
//! the padding in place. A tap is then a plane and a whole number of rows to go down: a contiguous run of memory, for
//! all pixels at once, and no matrix of columns is ever written.

use pulp::{Simd, WithSimd};

/// Most output channels of a block, and most vectors beside it: 24 sums in 32 registers, 12 in 16.
const BLOCK: usize = 6;

/// Floats that a kernel may read past the last plane.
pub const SLACK: usize = 16;

/// The planes of one picture and how taps lie in them: tap `k` of pixel `p` is at
/// `k / rows · plane + k % rows · row + p`.
#[derive(Clone, Copy)]
pub struct Planes<'a> {
    /// All planes, one after the other, and [`SLACK`] more values.
    pub values: &'a [f32],
    /// From one plane to the next.
    pub plane: usize,
    /// Taps in a plane.
    pub rows: usize,
    /// From one tap of a plane to the next.
    pub row: usize,
}

impl Planes<'_> {
    /// Where tap `k` of pixel 0 is.
    fn tap(&self, k: usize) -> usize {
        k / self.rows * self.plane + k % self.rows * self.row
    }

    /// One past the last value that `n` vectors of `lanes` from pixel `at` touch, for taps below `k`.
    fn reach(&self, k: usize, at: usize, n: usize, lanes: usize) -> usize {
        self.tap(k - 1).max((self.rows.min(k) - 1) * self.row) + at + n * lanes
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
}

impl Packed {
    /// `fill(o, row)` writes the taps of channel `o`, in the order of the planes.
    pub fn new(channels: usize, taps: usize, fill: impl Fn(usize, &mut [f32])) -> Self {
        let blocks = blocks(channels);
        let mut values = vec![0f32; channels * taps];
        let mut line = vec![0f32; taps];
        let mut first = 0;
        for &width in &blocks {
            let block = &mut values[first * taps..(first + width) * taps];
            for lane in 0..width {
                fill(first + lane, &mut line);
                block.iter_mut().skip(lane).step_by(width).zip(&line).for_each(|(to, v)| *to = *v);
            }
            first += width;
        }
        Packed { values, blocks, taps }
    }
}

/// Splits channels into blocks of nearly equal size.
fn blocks(channels: usize) -> Vec<usize> {
    let n = channels.div_ceil(BLOCK).max(1);
    (0..n).map(|i| (i + 1) * channels / n - i * channels / n).collect()
}

/// y `(O, pixels)` = bias + weights · taps, for one picture.
pub struct Forward<'a> {
    /// Weights of all channels of `y`.
    pub weights: &'a Packed,
    /// One per channel.
    pub bias: &'a [f32],
    /// The picture.
    pub planes: Planes<'a>,
    /// Output, whole rows of pixels per channel.
    pub y: &'a mut [f32],
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
            for &m in &weights.blocks {
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
    y: &'a mut [f32],
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
        for plane in 0..n_taps / planes.rows {
            for row in 0..planes.rows {
                let Some(weights) = weights.next() else { return };
                // SAFETY: `reach` bounds every tap's vectors, and was asserted above.
                let x = unsafe { load::<S, N>(simd, planes.values, plane * planes.plane + row * planes.row + at) };
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
            row[..n].copy_from_slice(&bytemuck::cast_slice(finished)[..n]);
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

/// dw `(O, K)` += grad · tapsᵀ, summed over the pixels of some pictures.
pub struct WeightGradient<'a> {
    /// The first picture.
    pub planes: Planes<'a>,
    /// From one picture's planes to the next one's.
    pub picture: usize,
    /// `(pictures, O, pixels)`.
    pub grad: &'a [f32],
    /// Pixels of an output plane.
    pub pixels: usize,
    /// Output channels.
    pub channels: usize,
    /// Taps in the order of the planes.
    pub dw: &'a mut [f32],
}

impl WithSimd for WeightGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let n_taps = self.dw.len() / self.channels;
        let mut first = 0;
        for m in blocks(self.channels) {
            let mut k = 0;
            while k < n_taps {
                let n = match n_taps - k {
                    4.. if S::REGISTER_COUNT >= 32 => 4,
                    2.. => 2,
                    _ => 1,
                };
                let gradient = &mut self;
                by_block!(m, n, gradient.run(simd, first, k));
                k += n;
            }
            first += m;
        }
    }
}

impl WeightGradient<'_> {
    /// The gradient of the weights of channels `first..first + M` at taps `k..k + N`.
    #[inline(always)]
    fn run<S: Simd, const M: usize, const N: usize>(&mut self, simd: S, first: usize, k: usize) {
        let (planes, pixels, lanes) = (self.planes, self.pixels, S::F32_LANES);
        let n_taps = self.dw.len() / self.channels;
        let mut taps = [0; N];
        for (n, tap) in taps.iter_mut().enumerate() {
            *tap = planes.tap(k + n);
        }
        let mut sums = [[simd.splat_f32s(0.0); N]; M];
        for (i, grad) in self.grad.chunks_exact(self.channels * pixels).enumerate() {
            let values = &planes.values[i * self.picture..];
            let grad = &grad[first * pixels..(first + M) * pixels];
            assert!(taps.iter().all(|tap| tap + pixels.next_multiple_of(lanes) <= values.len()));
            let whole = pixels / lanes * lanes;
            for at in (0..whole).step_by(lanes) {
                let mut x = [simd.splat_f32s(0.0); N];
                for n in 0..N {
                    // SAFETY: at + lanes is at most pixels, and the taps' reach was asserted above.
                    [x[n]] = unsafe { load::<S, 1>(simd, values, taps[n] + at) };
                }
                for m in 0..M {
                    // SAFETY: row m of M has `pixels` values.
                    let [g] = unsafe { load::<S, 1>(simd, grad, m * pixels + at) };
                    for n in 0..N {
                        sums[m][n] = simd.mul_add_e_f32s(g, x[n], sums[m][n]);
                    }
                }
            }
            if whole < pixels {
                for m in 0..M {
                    // Zeros beyond the last pixel, so what the taps find there does not count.
                    let g = simd.partial_load_f32s(&grad[m * pixels + whole..(m + 1) * pixels]);
                    for n in 0..N {
                        // SAFETY: the taps' reach, rounded up to whole vectors, was asserted above.
                        let [x] = unsafe { load::<S, 1>(simd, values, taps[n] + whole) };
                        sums[m][n] = simd.mul_add_e_f32s(g, x, sums[m][n]);
                    }
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                self.dw[(first + m) * n_taps + k + n] += simd.reduce_sum_f32s(sums[m][n]);
            }
        }
    }
}
