//! Convolution on the CPU. The forward pass and both gradients read the picture as planes (see [`super::tile`]): moved
//! sideways once per kernel column, a few pictures at a time, so that they stay in the second-level cache. The gradient
//! of the picture is a convolution with the kernel turned round; where a stride skips pixels, several, of a part of the
//! kernel each.

use super::planes::{Geometry, with_scratch};
use super::simd::sum;
use super::tile::{BLOCK, Forward, Packed, PackedGradient, SLACK, WeightGradient};
use super::{Values, on_cpu_f32, values, written};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// x `(B, C, H, W)`, weight `(O, C, kh, kw)`, zero padding on all sides; bias `(O,)`, or `(B, O)` for one per sample.
/// Returns `(B, O, H', W')`. f32 on the CPU runs fused, anything else through [`conv2d_composite`].
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    if !on_cpu_f32(&[x, weight]) {
        return conv2d_composite(x, weight, bias, stride, padding);
    }
    let bias = match bias {
        Some(bias) => bias.contiguous()?,
        None => Tensor::zeros(weight.dim(0)?, x.dtype(), x.device())?,
    };
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias, Conv2d { stride, padding })
}

/// The same by candle's own operations.
pub fn conv2d_composite(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    let y = x.conv2d(weight, padding, stride, 1, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape(((), weight.dim(0)?, 1, 1))?),
        None => Ok(y),
    }
}

pub struct Conv2d {
    pub stride: usize,
    pub padding: usize,
}

impl CustomOp3 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
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
        let g = Geometry::new(x_layout.dims(), w_layout.dims(), self)?;
        let (x, w) = (values(x, x_layout, self.name())?, values(w, w_layout, self.name())?);
        let b = values(b, b_layout, self.name())?;
        if b.len() != g.out_channels && b_layout.dims() != [g.batch, g.out_channels] {
            bail!("conv2d: bias {:?}, expected ({},) or a row of it per sample", b_layout.dims(), g.out_channels);
        }
        let y = g.forward(x, &g.pack(w), b);
        Ok((CpuStorage::F32(y), Shape::from((g.batch, g.out_channels, g.out_height, g.out_width))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = Geometry::new(x.dims(), w.dims(), self)?;
        let grad = grad.contiguous()?;
        let of = |t| Values::of(t, self.name());
        let (x_values, grad_values) = (of(x)?, of(&grad)?);
        let tensor = |v: Vec<f32>, like: &Tensor| Tensor::from_vec(v, like.dims(), x.device()).map(Some);
        let dx = if x.track_op() { tensor(g.picture_gradient(&of(w)?, &grad_values), x)? } else { None };
        let dw = if w.track_op() { tensor(g.weight_gradient(&x_values, &grad_values), w)? } else { None };
        let db = if b.track_op() { tensor(g.bias_gradient(&grad_values, b.elem_count()), b)? } else { None };
        Ok((dx, dw, db))
    }
}

/// Floats of planes that a thread works on at a time: three quarters of a megabyte, a little less than a second-level
/// cache.
const GROUP: usize = 3 << 16;

thread_local! {
    /// Memory for packed gradients that lives as long as its thread.
    static GRADIENT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Geometry {
    fn forward(&self, x: &[f32], weights: &Packed, bias: &[f32]) -> Vec<f32> {
        let out = self.out_channels * self.pixels();
        let whole = self.batch - self.batch % rayon::current_num_threads();
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_exact_mut(out).zip(x.par_chunks_exact(self.picture())).enumerate().for_each(|(i, (y, x))| {
                // One row of biases for all, or one per picture.
                let bias = &bias[i * self.out_channels % bias.len()..][..self.out_channels];
                let run = |weights, bias, y| {
                    self.with_planes(x, |planes| pulp::Arch::new().dispatch(Forward { weights, bias, planes, y }));
                };
                if i < whole {
                    run(weights.whole(), bias, y);
                } else {
                    weights.split(bias, y).into_par_iter().for_each(|(weights, bias, y)| run(weights, bias, y));
                }
            });
        };
        // SAFETY: the chunks are whole pictures, and the kernel writes all of its picture's channels.
        unsafe { written(self.batch * out, fill) }
    }

    /// Into how many parts by channels those pictures are cut that are left over when every thread has taken as many
    /// whole ones: so many that threads get the same again.
    fn parts(&self) -> usize {
        let threads = rayon::current_num_threads();
        match self.batch % threads {
            0 => 1,
            left if threads.is_multiple_of(left) => threads / left,
            _ => threads,
        }
    }

    /// Where the taps of an output channel are among its weights.
    fn places(&self) -> Vec<usize> {
        self.taps(|c, dy, dx| (c * self.kernel[0] + dy) * self.kernel[1] + dx)
    }

    /// Weights `(O, C, kh, kw)` for [`Self::forward`].
    fn pack(&self, w: &[f32]) -> Packed {
        Packed::new(w, self.out_channels, self.n_taps(), &self.places(), self.parts())
    }

    /// The picture's gradient, of those pixels at a time that the same taps meet: with a stride of 1, of all.
    fn picture_gradient(&self, w: &[f32], grad: &[f32]) -> Vec<f32> {
        let bias = vec![0f32; self.channels];
        let mut parts = self.turned().map(|turned| {
            let part = turned.geometry.forward(grad, &turned.pack(self, w), &bias);
            (turned, part)
        });
        if self.stride == 1 {
            return parts.next().map_or_else(Vec::new, |(_, dx)| dx);
        }
        let mut dx = vec![0f32; self.batch * self.picture()];
        parts.for_each(|(turned, part)| turned.spread(&part, self, &mut dx));
        dx
    }

    /// The convolutions that give the picture's gradient.
    fn turned(&self) -> impl Iterator<Item = Turned> {
        let axis = move |axis: usize| {
            (0..self.kernel[axis].min(self.stride)).filter_map(move |tap| Axis::new(self, axis, tap))
        };
        axis(0).flat_map(move |rows| axis(1).map(move |columns| Turned::new(self, rows, columns)))
    }

    fn weight_gradient(&self, x: &[f32], grad: &[f32]) -> Vec<f32> {
        // A share per thread, fixed by the shape and the number of threads: the sums over the batch come out the same
        // every time.
        let (pictures, channels) = self.share();
        let starts = |end, step| (0..end).step_by(step).map(move |start: usize| start..(start + step).min(end));
        let shares: Vec<_> = starts(self.out_channels, channels)
            .flat_map(|channels| starts(self.batch, pictures).map(move |pictures| (pictures, channels.clone())))
            .collect();
        let partial: Vec<Vec<f32>> = shares
            .into_par_iter()
            .map(|(pictures, channels)| self.weight_gradient_of_share(x, grad, pictures, channels))
            .collect();
        let (n_taps, places) = (self.n_taps(), self.places());
        let mut weight = vec![0f32; self.out_channels * n_taps];
        let partial = partial.par_chunks(self.batch.div_ceil(pictures).max(1));
        weight.par_chunks_mut(channels * n_taps).zip(partial).for_each(|(weight, partial)| {
            for part in partial {
                for (to, from) in weight.chunks_exact_mut(n_taps).zip(part.chunks_exact(n_taps)) {
                    places.iter().zip(from).for_each(|(place, v)| to[*place] += v);
                }
            }
        });
        weight
    }

    /// How many pictures, and how many channels of their gradient, a thread takes: all of one and its share of the other,
    /// whichever leaves less to the busiest.
    fn share(&self) -> (usize, usize) {
        let (threads, batch) = (rayon::current_num_threads(), self.batch.max(1));
        let (pictures, channels) = (batch.div_ceil(threads), self.out_channels.div_ceil(threads).max(BLOCK));
        match batch * channels < pictures * self.out_channels {
            true => (batch, channels),
            false => (pictures, self.out_channels),
        }
    }

    /// The gradient of some channels' weights, in the order of the planes, over some of the pictures.
    fn weight_gradient_of_share(&self, x: &[f32], grad: &[f32], of: Range<usize>, channels: Range<usize>) -> Vec<f32> {
        let (picture, pixels, size) = (self.picture(), self.pixels(), self.laid_out());
        let group = (GROUP / size).max(1);
        let starts: Vec<usize> =
            (0..group).flat_map(|i| (0..pixels).step_by(SLACK).map(move |at| i * size + at)).collect();
        let grad: Vec<&[f32]> = grad
            .chunks_exact(self.out_channels * pixels)
            .map(|grad| &grad[channels.start * pixels..channels.end * pixels])
            .collect();
        let mut dw = vec![0f32; channels.len() * self.n_taps()];
        let x = x[of.start * picture..of.end * picture].chunks(group * picture);
        for (x, grad) in x.zip(grad[of].chunks(group)) {
            with_scratch(&GRADIENT, PackedGradient::size(grad.len(), channels.len(), pixels), |buffer| {
                let starts = &starts[..grad.len() * pixels.div_ceil(SLACK)];
                let grad = PackedGradient::new(grad, channels.len(), pixels, buffer);
                self.with_planes(x, |planes| {
                    pulp::Arch::new().dispatch(WeightGradient { planes, starts, grad, dw: &mut dw });
                });
            });
        }
        dw
    }

    /// The gradient of the biases, one row for all or one per picture.
    fn bias_gradient(&self, grad: &[f32], n: usize) -> Vec<f32> {
        let sums: Vec<f32> = grad.par_chunks_exact(self.pixels()).with_min_len(self.out_channels).map(sum).collect();
        let mut db = vec![0f32; n];
        sums.iter().enumerate().for_each(|(i, sum)| db[i % n] += sum);
        db
    }
}

/// Rows or columns of a picture's gradient, every `stride`-th, as the convolution that gives them sees them.
#[derive(Clone, Copy)]
struct Axis {
    /// The first pixel.
    first: usize,
    /// How many pixels.
    len: usize,
    /// The first of the taps that meet them, every `stride`-th.
    tap: usize,
    /// How many taps.
    kernel: usize,
    padding: isize,
}

impl Axis {
    /// Those pixels, if any, that `tap` and every `stride`-th tap after it meet.
    fn new(g: &Geometry, axis: usize, tap: usize) -> Option<Self> {
        let (kernel, size) = ((g.kernel[axis] - tap).div_ceil(g.stride), [g.height, g.width][axis]);
        // Output `i` meets pixel `i·stride + shift` by this tap.
        let shift = tap as isize - g.padding[axis];
        let start = 0usize.saturating_add_signed(-shift).div_ceil(g.stride);
        let end = size.saturating_add_signed(-shift).div_ceil(g.stride);
        let first = (start * g.stride).saturating_add_signed(shift);
        let padding = kernel as isize - 1 - start as isize;
        (start < end).then(|| Axis { first, len: end - start, tap, kernel, padding })
    }
}

/// The convolution of an output's gradient that gives the picture's at some rows and columns.
struct Turned {
    rows: Axis,
    columns: Axis,
    geometry: Geometry,
}

impl Turned {
    fn new(g: &Geometry, rows: Axis, columns: Axis) -> Self {
        let geometry = Geometry {
            batch: g.batch,
            channels: g.out_channels,
            height: g.out_height,
            width: g.out_width,
            out_channels: g.channels,
            out_height: rows.len,
            out_width: columns.len,
            kernel: [rows.kernel, columns.kernel],
            stride: 1,
            padding: [rows.padding, columns.padding],
        };
        Turned { rows, columns, geometry }
    }

    /// Of the weights of `g`: input and output channels exchanged, and what kernels have here turned by 180 degrees.
    fn pack(&self, g: &Geometry, w: &[f32]) -> Packed {
        let (here, [kh, kw]) = (&self.geometry, g.kernel);
        let places = here.taps(|o, dy, dx| {
            let row = self.rows.tap + (self.rows.kernel - 1 - dy) * g.stride;
            let column = self.columns.tap + (self.columns.kernel - 1 - dx) * g.stride;
            o * g.n_taps() + row * kw + column
        });
        Packed::new(w, g.channels, kh * kw, &places, here.parts())
    }

    /// Writes what this gives to its pixels of the picture's gradient.
    fn spread(&self, part: &[f32], g: &Geometry, dx: &mut [f32]) {
        let channels = dx.par_chunks_exact_mut(g.height * g.width).zip(part.par_chunks_exact(self.geometry.pixels()));
        channels.for_each(|(dx, part)| {
            let lines = dx.chunks_exact_mut(g.width).skip(self.rows.first).step_by(g.stride);
            for (line, part) in lines.zip(part.chunks_exact(self.columns.len)) {
                let to = line.iter_mut().skip(self.columns.first).step_by(g.stride);
                to.zip(part).for_each(|(to, v)| *to = *v);
            }
        });
    }
}
