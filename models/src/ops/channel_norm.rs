//! Layer norm and RMS norm of maps: every pixel is normalised by itself, over its channels or over runs of them. A pass
//! for the statistics, which reads rows of pixels, and one that writes; backward the same.

use super::simd::{dot, sum_by, vectorised};
use super::{Values, fits, on_cpu_f32, values, written};
use crate::shapes;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// x `(B, C, H, W)`: (x − mean)/√(var + eps) over the channels of each pixel (biased variance), times weight `(C,)` plus
/// bias `(C,)` where there are some. f32 on the CPU runs fused, anything else through [`layer_norm_composite`].
pub fn layer_norm(x: &Tensor, affine: Option<[&Tensor; 2]>, eps: f64) -> Result<Tensor> {
    let channels = x.dims4()?.1;
    let Some([weight, bias]) = affine else {
        let [one, zero] = [1f32, 0.0].map(|value| Tensor::full(value, channels, x.device()));
        let (one, zero) = (one?.to_dtype(x.dtype())?, zero?.to_dtype(x.dtype())?);
        return layer_norm(x, Some([&one, &zero]), eps);
    };
    fits(shapes::layer_norm(x.dims(), weight.elem_count()))?;
    match on_cpu_f32(&[x, weight, bias]) {
        true => ChannelNorm::apply(x, weight, bias, eps, true),
        false => layer_norm_composite(x, Some([weight, bias]), eps),
    }
}

/// The same by candle's own operations; statistics in f32 whatever the dtype, but for f64.
pub fn layer_norm_composite(x: &Tensor, affine: Option<[&Tensor; 2]>, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(internal(x))?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(1)?)?;
    let normal = centred.broadcast_div(&(centred.sqr()?.mean_keepdim(1)? + eps)?.sqrt()?)?.to_dtype(x.dtype())?;
    match affine {
        Some([w, b]) => normal.broadcast_mul(&per_channel(w)?)?.broadcast_add(&per_channel(b)?),
        None => Ok(normal),
    }
}

/// x `(B, n·width, H, W)`, weight `(width,)`: x/√(mean x² + eps)·weight over each run of `width` channels of a pixel.
/// f32 on the CPU runs fused, anything else through [`rms_norm_composite`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    fits(shapes::norm(x.dims(), weight.elem_count()))?;
    match on_cpu_f32(&[x, weight]) {
        true => ChannelNorm::apply(x, weight, &weight.zeros_like()?, eps, false),
        false => rms_norm_composite(x, weight, eps),
    }
}

/// The same by candle's own operations; statistics in f32 whatever the dtype, but for f64.
pub fn rms_norm_composite(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let width = weight.elem_count();
    let runs = x.to_dtype(internal(x))?.contiguous()?.reshape((b * c / width, width, h, w))?;
    let normal = runs.broadcast_div(&(runs.sqr()?.mean_keepdim(1)? + eps)?.sqrt()?)?.to_dtype(x.dtype())?;
    normal.broadcast_mul(&per_channel(weight)?)?.reshape((b, c, h, w))
}

fn internal(x: &Tensor) -> DType {
    if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

fn per_channel(v: &Tensor) -> Result<Tensor> {
    v.reshape((1, v.elem_count(), 1, 1))
}

/// Pixels whose sums a thread keeps at a time.
const TILE: usize = 64;
type Tile = [f32; TILE];

struct ChannelNorm {
    /// Whether the mean is taken off.
    centred: bool,
    eps: f32,
    /// Of every run, tiles of pixels: means, and 1/√(var + eps); kept from the forward pass.
    statistics: OnceLock<Vec<[Tile; 2]>>,
}

/// The sizes of an input: `runs` of `width` channels, each `pixels` long, which is `tiles` tiles.
#[derive(Clone, Copy)]
struct Sizes {
    width: usize,
    pixels: usize,
    tiles: usize,
}

impl Sizes {
    fn of(dims: &[usize], width: usize) -> Self {
        let pixels = dims[2] * dims[3];
        Sizes { width, pixels, tiles: pixels.div_ceil(TILE) }
    }

    fn run(self) -> usize {
        self.width * self.pixels
    }

    /// The run of a tile, its first pixel and how many it has.
    fn tile(self, i: usize) -> (usize, usize, usize) {
        let first = i % self.tiles * TILE;
        (i / self.tiles, first, (self.pixels - first).min(TILE))
    }

    /// The tiles of a row's run, and which row of the run it is.
    fn row(self, i: usize) -> (std::ops::Range<usize>, usize) {
        let run = i / self.width;
        (run * self.tiles..(run + 1) * self.tiles, i % self.width)
    }
}

impl ChannelNorm {
    fn apply(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64, centred: bool) -> Result<Tensor> {
        let op = ChannelNorm { centred, eps: eps as f32, statistics: OnceLock::new() };
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
    }
}

impl CustomOp3 for ChannelNorm {
    fn name(&self) -> &'static str {
        if self.centred { "layer_norm" } else { "rms_norm" }
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (x, w, b) = (values(x, x_layout, name)?, values(w, w_layout, name)?, values(b, b_layout, name)?);
        fits(shapes::norm(x_layout.dims(), w.len()))?;
        if b.len() != w.len() {
            bail!("{name}: {} weights and {} biases for {:?}", w.len(), b.len(), x_layout.dims());
        }
        let sizes = Sizes::of(x_layout.dims(), w.len());
        let tiles = x.len() / sizes.run() * sizes.tiles;
        let statistic = |i: usize| {
            let (run, first, len) = sizes.tile(i);
            statistics(&x[run * sizes.run()..][..sizes.run()], sizes, first, len, self.eps, self.centred)
        };
        let statistics: Vec<[Tile; 2]> = (0..tiles).into_par_iter().map(statistic).collect();
        let fill = |y: &mut [MaybeUninit<f32>]| {
            let rows = y.par_chunks_mut(sizes.pixels).zip(x.par_chunks(sizes.pixels));
            rows.with_min_len(8).enumerate().for_each(|(i, (y, x))| {
                let (tiles, channel) = sizes.row(i);
                normalise(x, &statistics[tiles], w[channel], b[channel], y);
            });
        };
        // SAFETY: the rows are all of y, and each is written whole.
        let y = unsafe { written(x.len(), fill) };
        _ = self.statistics.set(statistics);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let name = self.name();
        let Some(statistics) = self.statistics.get() else { bail!("{name}: backward before forward") };
        let (grad, sizes) = (grad.contiguous()?, Sizes::of(x.dims(), w.elem_count()));
        let (xs, ws, gs) = (Values::of(x, name)?, Values::of(w, name)?, Values::of(&grad, name)?);
        let (xs, ws, gs) = (&*xs, &*ws, &*gs);
        let means: Vec<[Tile; 2]> = (0..statistics.len())
            .into_par_iter()
            .map(|i| {
                let (run, first, len) = sizes.tile(i);
                let at = run * sizes.run()..(run + 1) * sizes.run();
                let inputs = [&xs[at.clone()], &gs[at], ws];
                gradient_means(inputs, sizes, [first, len], &statistics[i], self.centred)
            })
            .collect();
        let mut sums = vec![[0f32; 2]; xs.len() / sizes.pixels];
        let fill = |dx: &mut [MaybeUninit<f32>]| {
            let inputs = xs.par_chunks(sizes.pixels).zip(gs.par_chunks(sizes.pixels));
            let rows = dx.par_chunks_mut(sizes.pixels).zip(sums.par_iter_mut()).zip(inputs);
            rows.with_min_len(8).enumerate().for_each(|(i, ((dx, sums), (x, grad)))| {
                let (tiles, channel) = sizes.row(i);
                *sums = backward_row(x, grad, &statistics[tiles.clone()], &means[tiles], ws[channel], dx);
            });
        };
        // SAFETY: the rows are all of dx, and each is written whole.
        let dx = unsafe { written(xs.len(), fill) };
        let (mut dw, mut db) = (vec![0f32; sizes.width], vec![0f32; sizes.width]);
        for run in sums.chunks_exact(sizes.width) {
            for (c, [of_weight, of_bias]) in run.iter().enumerate() {
                dw[c] += of_weight;
                db[c] += of_bias;
            }
        }
        let device = x.device();
        let dx = Tensor::from_vec(dx, x.dims(), device)?;
        let [dw, db] = [(dw, w), (db, b)].map(|(grad, of)| Tensor::from_vec(grad, of.dims(), device).map(Some));
        Ok((Some(dx), dw?, db?))
    }
}

vectorised! {
    /// Mean and 1/√(var + eps) of `len` pixels from `first` on.
    fn statistics(x: &[f32], sizes: Sizes, first: usize, len: usize, eps: f32, centred: bool) -> [Tile; 2] {
        let (mut mean, mut scale, n) = ([0f32; TILE], [0f32; TILE], sizes.width as f32);
        let rows = || x.chunks_exact(sizes.pixels).map(|row| &row[first..first + len]);
        if centred {
            for row in rows() {
                mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            mean.iter_mut().for_each(|sum| *sum /= n);
        }
        for row in rows() {
            for ((sum, x), mean) in scale.iter_mut().zip(row).zip(&mean) {
                *sum += (x - mean) * (x - mean);
            }
        }
        scale.iter_mut().for_each(|sum| *sum = 1.0 / (*sum / n + eps).sqrt());
        [mean, scale]
    }
}

vectorised! {
    /// x̂·w + b along a row.
    fn normalise(x: &[f32], statistics: &[[Tile; 2]], w: f32, b: f32, y: &mut [MaybeUninit<f32>]) {
        for ((x, y), [mean, scale]) in x.chunks(TILE).zip(y.chunks_mut(TILE)).zip(statistics) {
            for (((y, x), mean), scale) in y.iter_mut().zip(x).zip(mean).zip(scale) {
                y.write((x - mean) * scale * w + b);
            }
        }
    }
}

vectorised! {
    /// Of each pixel the means of w·dy (none where the forward pass took no mean off) and of w·dy·x̂.
    #[allow(clippy::needless_range_loop)] // One index into several arrays.
    fn gradient_means(
        inputs: [&[f32]; 3], sizes: Sizes, range: [usize; 2], statistics: &[Tile; 2], centred: bool,
    ) -> [Tile; 2] {
        let ([x, grad, w], [first, len], [mean, scale]) = (inputs, range, statistics);
        let (mut means, mut along) = ([0f32; TILE], [0f32; TILE]);
        for ((x, grad), w) in x.chunks_exact(sizes.pixels).zip(grad.chunks_exact(sizes.pixels)).zip(w) {
            let (x, grad) = (&x[first..first + len], &grad[first..first + len]);
            for i in 0..len {
                let scaled = w * grad[i];
                means[i] += scaled;
                along[i] += scaled * ((x[i] - mean[i]) * scale[i]);
            }
        }
        let n = sizes.width as f32;
        for i in 0..TILE {
            means[i] = if centred { means[i] / n } else { 0.0 };
            along[i] /= n;
        }
        [means, along]
    }
}

vectorised! {
    /// dx = rstd·(w·dy − mean(w·dy) − x̂·mean(w·dy·x̂)) of a row; its Σ dy·x̂ and Σ dy.
    #[allow(clippy::needless_range_loop)] // One index into several arrays.
    fn backward_row(
        x: &[f32], grad: &[f32], statistics: &[[Tile; 2]], means: &[[Tile; 2]], w: f32, dx: &mut [MaybeUninit<f32>],
    ) -> [f32; 2] {
        let mut of_weight = 0f32;
        let tiles = x.chunks(TILE).zip(grad.chunks(TILE)).zip(dx.chunks_mut(TILE)).zip(statistics.iter().zip(means));
        for (((x, grad), dx), ([mean, scale], [m, along])) in tiles {
            let mut normal = [0f32; TILE];
            for i in 0..x.len() {
                normal[i] = (x[i] - mean[i]) * scale[i];
                dx[i].write(scale[i] * (w * grad[i] - m[i] - normal[i] * along[i]));
            }
            of_weight += dot(grad, &normal[..grad.len()]);
        }
        [of_weight, sum_by(grad, |v| v)]
    }
}
