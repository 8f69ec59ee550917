//! Convolution on the CPU. The forward pass and both gradients read the picture as planes (see [`super::tile`]): moved
//! sideways once per kernel column, a few pictures at a time, so that they stay in the second-level cache. The gradient
//! of the picture is a convolution with the kernel turned round, except where a stride skips pixels: there a matrix
//! product's columns are scattered back.

use super::simd::sum;
use super::tile::{Forward, Packed, PackedGradient, Planes, SLACK, WeightGradient};
use super::{Gemm, Values, on_cpu_f32, values, written};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;

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

struct Conv2d {
    stride: usize,
    padding: usize,
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

/// All the sizes of one convolution.
struct Geometry {
    batch: usize,
    channels: usize,
    height: usize,
    width: usize,
    out_channels: usize,
    out_height: usize,
    out_width: usize,
    kernel: [usize; 2],
    stride: usize,
    padding: usize,
}

/// Floats of planes that a thread works on at a time: three quarters of a megabyte, a little less than a second-level
/// cache.
const GROUP: usize = 3 << 16;

type Scratch = std::thread::LocalKey<RefCell<Vec<f32>>>;

thread_local! {
    /// Memory that lives as long as its thread: planes, and the columns of a strided gradient.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// The same for packed gradients.
    static GRADIENT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Geometry {
    fn new(x: &[usize], w: &[usize], conv: &Conv2d) -> Result<Self> {
        let (&[batch, channels, height, width], &[out_channels, w_channels, kh, kw]) = (x, w) else {
            bail!("conv2d: input {x:?} and weight {w:?}, expected four axes each")
        };
        let Conv2d { stride, padding } = *conv;
        let fits = height + 2 * padding >= kh && width + 2 * padding >= kw;
        let fits = fits && [channels, height, width, out_channels, kh, kw].iter().all(|&size| size > 0);
        if w_channels != channels || stride == 0 || !fits {
            bail!("conv2d: input {x:?}, weight {w:?}, stride {stride}, padding {padding} do not go together");
        }
        Ok(Geometry {
            batch,
            channels,
            height,
            width,
            out_channels,
            out_height: (height + 2 * padding - kh) / stride + 1,
            out_width: (width + 2 * padding - kw) / stride + 1,
            kernel: [kh, kw],
            stride,
            padding,
        })
    }

    fn pixels_in(&self) -> usize {
        self.height * self.width
    }

    fn pixels_out(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Length of a patch.
    fn taps(&self) -> usize {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// Planes per input channel. A stride of 1 lets the taps of a kernel column share a plane; other strides read
    /// different pixels for each.
    fn planes_per_channel(&self) -> usize {
        let [kh, kw] = self.kernel;
        if self.stride == 1 { kw } else { kh * kw }
    }

    /// Taps that lie in one plane, a row apart.
    fn taps_per_plane(&self) -> usize {
        if self.stride == 1 { self.kernel[0] } else { 1 }
    }

    /// Floats of a plane.
    fn plane_size(&self) -> usize {
        (self.out_height + self.taps_per_plane() - 1) * self.out_width
    }

    /// Floats of one picture's planes.
    fn planes_size(&self) -> usize {
        self.channels * self.planes_per_channel() * self.plane_size()
    }

    /// Whether the picture can be read as it lies: 1×1, stride 1, whole vectors.
    fn in_place(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.padding == 0 && self.pixels_in().is_multiple_of(SLACK)
    }

    /// Lays out pictures `(n, C, H, W)` as planes and hands them over.
    fn with_planes<R>(&self, pictures: &[f32], work: impl FnOnce(Planes) -> R) -> R {
        let (plane, rows, row) = (self.plane_size(), self.taps_per_plane(), self.out_width);
        if self.in_place() {
            return work(Planes { values: pictures, plane, rows, row });
        }
        let n_pictures = pictures.len() / (self.channels * self.pixels_in());
        with_scratch(&SCRATCH, n_pictures * self.planes_size() + SLACK, |buffer| {
            let channels = buffer.chunks_exact_mut(self.planes_per_channel() * plane);
            for (channel, planes) in pictures.chunks_exact(self.pixels_in()).zip(channels) {
                for (i, plane) in planes.chunks_exact_mut(plane).enumerate() {
                    // Either all of a column's rows or, strided, one of them.
                    self.lay(channel, plane, i / self.kernel[1], i % self.kernel[1]);
                }
            }
            let end = buffer.len() - SLACK;
            buffer[end..].fill(0.0);
            work(Planes { values: buffer, plane, rows, row })
        })
    }

    /// One plane: `to[y][x] = channel[y·stride + dy − padding][x·stride + dx − padding]`, zero outside.
    fn lay(&self, channel: &[f32], to: &mut [f32], dy: usize, dx: usize) {
        if self.stride == 1 && self.out_width == self.width {
            return self.lay_whole(channel, to, dx);
        }
        let (start, end) = self.inside(dx);
        for (y, line) in to.chunks_exact_mut(self.out_width).enumerate() {
            let row = (y * self.stride + dy).checked_sub(self.padding).filter(|&row| row < self.height);
            let Some(row) = row.filter(|_| start < end) else {
                line.fill(0.0);
                continue;
            };
            line[..start].fill(0.0);
            line[end..].fill(0.0);
            let from = &channel[row * self.width + start * self.stride + dx - self.padding..];
            line[start..end].iter_mut().zip(from.iter().step_by(self.stride)).for_each(|(to, v)| *to = *v);
        }
    }

    /// The same where rows keep their length: one copy of the whole picture, then zeros where it wrapped round. Rows of
    /// 8 or 16 pixels are too short to be copied one by one.
    fn lay_whole(&self, channel: &[f32], to: &mut [f32], dx: usize) {
        let (above, pixels) = (self.padding * self.width, channel.len());
        to[..above].fill(0.0);
        to[above + pixels..].fill(0.0);
        let picture = &mut to[above..above + pixels];
        let wrapped = dx.abs_diff(self.padding).min(self.width);
        let kept = pixels - wrapped;
        if dx < self.padding {
            picture[wrapped..].copy_from_slice(&channel[..kept]);
            picture.chunks_exact_mut(self.width).for_each(|row| row[..wrapped].fill(0.0));
        } else {
            picture[..kept].copy_from_slice(&channel[wrapped..]);
            picture.chunks_exact_mut(self.width).for_each(|row| row[self.width - wrapped..].fill(0.0));
        }
    }

    /// The output columns `start..end` whose input at kernel column `dx` lies inside the picture.
    fn inside(&self, dx: usize) -> (usize, usize) {
        let start = self.padding.saturating_sub(dx).div_ceil(self.stride).min(self.out_width);
        let end = (self.width + self.padding).saturating_sub(dx).div_ceil(self.stride).min(self.out_width);
        (start, end.max(start))
    }

    /// Goes through one channel's taps, `(in the order of the planes, in a weight's order)`.
    fn each_tap(&self, mut f: impl FnMut(usize, usize)) {
        let [kh, kw] = self.kernel;
        for dy in 0..kh {
            for dx in 0..kw {
                f(if self.stride == 1 { dx * kh + dy } else { dy * kw + dx }, dy * kw + dx);
            }
        }
    }

    fn forward(&self, x: &[f32], weights: &Packed, bias: &[f32]) -> Vec<f32> {
        let (picture, pixels) = (self.channels * self.pixels_in(), self.pixels_out());
        let fill = |y: &mut [MaybeUninit<f32>]| {
            y.par_chunks_exact_mut(self.out_channels * pixels).zip(x.par_chunks_exact(picture)).enumerate().for_each(
                |(i, (y, x))| {
                    // One row of biases for all, or one per picture.
                    let bias = &bias[i * self.out_channels % bias.len()..][..self.out_channels];
                    self.with_planes(x, |planes| pulp::Arch::new().dispatch(Forward { weights, bias, planes, y }));
                },
            );
        };
        // SAFETY: the chunks are whole pictures, and the kernel writes all of its picture.
        unsafe { written(self.batch * self.out_channels * pixels, fill) }
    }

    /// Weights `(O, C, kh, kw)` for [`Self::forward`].
    fn pack(&self, w: &[f32]) -> Packed {
        let (taps, per_channel) = (self.taps(), self.kernel[0] * self.kernel[1]);
        Packed::new(self.out_channels, taps, |o, line| {
            let channels = line.chunks_exact_mut(per_channel).zip(w[o * taps..].chunks_exact(per_channel));
            channels.for_each(|(line, w)| self.each_tap(|k, natural| line[k] = w[natural]));
        })
    }

    /// The convolution that gives the picture's gradient, where there is one of the same kind. It takes
    /// [`Self::pack_turned`].
    fn turned(&self) -> Option<Geometry> {
        let [kh, kw] = self.kernel;
        (self.stride == 1 && kh == kw && self.padding < kh).then(|| Geometry {
            channels: self.out_channels,
            out_channels: self.channels,
            height: self.out_height,
            width: self.out_width,
            out_height: self.height,
            out_width: self.width,
            padding: kh - 1 - self.padding,
            ..*self
        })
    }

    /// `w` with input and output channels exchanged and kernels turned by 180 degrees.
    fn pack_turned(&self, w: &[f32]) -> Packed {
        let (taps, per_channel) = (self.taps(), self.kernel[0] * self.kernel[1]);
        Packed::new(self.channels, self.out_channels * per_channel, |c, line| {
            for (line, w) in line.chunks_exact_mut(per_channel).zip(w.chunks_exact(taps)) {
                let w = &w[c * per_channel..][..per_channel];
                self.each_tap(|k, natural| line[k] = w[per_channel - 1 - natural]);
            }
        })
    }

    fn picture_gradient(&self, w: &[f32], grad: &[f32]) -> Vec<f32> {
        match self.turned() {
            Some(turned) => turned.forward(grad, &self.pack_turned(w), &vec![0f32; self.channels]),
            None => self.scattered(w, grad),
        }
    }

    fn weight_gradient(&self, x: &[f32], grad: &[f32]) -> Vec<f32> {
        let (picture, gradient) = (self.channels * self.pixels_in(), self.out_channels * self.pixels_out());
        // One share of the batch per thread, fixed by the shape and the number of threads: the sums over the batch come
        // out the same every time.
        let share = self.batch.div_ceil(rayon::current_num_threads()).max(1);
        let partial: Vec<Vec<f32>> = x
            .par_chunks(share * picture)
            .zip(grad.par_chunks(share * gradient))
            .map(|(x, grad)| self.weight_gradient_of_share(x, grad))
            .collect();
        let mut by_plane = partial.into_iter();
        let mut sum = by_plane.next().unwrap_or_else(|| vec![0f32; self.out_channels * self.taps()]);
        by_plane.for_each(|dw| sum.iter_mut().zip(dw).for_each(|(sum, v)| *sum += v));
        let per_channel = self.kernel[0] * self.kernel[1];
        let mut weight = vec![0f32; sum.len()];
        for (to, from) in weight.chunks_exact_mut(per_channel).zip(sum.chunks_exact(per_channel)) {
            self.each_tap(|k, natural| to[natural] = from[k]);
        }
        weight
    }

    /// The gradient of the weights, in the order of the planes, over some of the pictures.
    fn weight_gradient_of_share(&self, x: &[f32], grad: &[f32]) -> Vec<f32> {
        let (picture, pixels, channels) = (self.channels * self.pixels_in(), self.pixels_out(), self.out_channels);
        let size = if self.in_place() { picture } else { self.planes_size() };
        let group = (GROUP / size).max(1);
        let starts: Vec<usize> =
            (0..group).flat_map(|i| (0..pixels).step_by(SLACK).map(move |at| i * size + at)).collect();
        let mut dw = vec![0f32; channels * self.taps()];
        for (x, grad) in x.chunks(group * picture).zip(grad.chunks(group * channels * pixels)) {
            let pictures = x.len() / picture;
            with_scratch(&GRADIENT, PackedGradient::size(pictures, channels, pixels), |buffer| {
                let grad = PackedGradient::new(grad, channels, pixels, buffer);
                let starts = &starts[..pictures * pixels.div_ceil(SLACK)];
                self.with_planes(x, |planes| {
                    pulp::Arch::new().dispatch(WeightGradient { planes, starts, grad, dw: &mut dw });
                });
            });
        }
        dw
    }

    /// The gradient of the biases, one row for all or one per picture.
    fn bias_gradient(&self, grad: &[f32], n: usize) -> Vec<f32> {
        let sums: Vec<f32> =
            grad.par_chunks_exact(self.pixels_out()).with_min_len(self.out_channels).map(sum).collect();
        let mut db = vec![0f32; n];
        sums.iter().enumerate().for_each(|(i, sum)| db[i % n] += sum);
        db
    }

    /// The picture's gradient as a matrix product whose columns are added back to the pixels that they came from.
    fn scattered(&self, w: &[f32], grad: &[f32]) -> Vec<f32> {
        let (picture, pixels, k) = (self.channels * self.pixels_in(), self.pixels_out(), self.taps());
        let mut dx = vec![0f32; self.batch * picture];
        let gradients = grad.par_chunks((self.out_channels * pixels).max(1));
        dx.par_chunks_mut(picture.max(1)).zip(gradients).for_each(|(dx, grad)| {
            with_scratch(&SCRATCH, k * pixels, |columns| {
                let (lhs, rhs) = ((w, 1, k), (grad, pixels, 1));
                Gemm { m: k, n: pixels, k: self.out_channels, lhs, rhs, alpha: 1.0, accumulate: false }.run(columns);
                self.scatter(columns, dx);
            });
        });
        dx
    }

    fn scatter(&self, columns: &[f32], dx_picture: &mut [f32]) {
        let [kh, kw] = self.kernel;
        for (k, columns) in columns.chunks_exact(self.pixels_out()).enumerate() {
            let (channel, dy, dx) = (k / (kh * kw), k / kw % kh, k % kw);
            let plane = &mut dx_picture[channel * self.pixels_in()..][..self.pixels_in()];
            let (start, end) = self.inside(dx);
            if start == end {
                continue;
            }
            for (y, line) in columns.chunks_exact(self.out_width).enumerate() {
                let row = (y * self.stride + dy).checked_sub(self.padding).filter(|&row| row < self.height);
                let Some(row) = row else { continue };
                let to = &mut plane[row * self.width..][..self.width][start * self.stride + dx - self.padding..];
                to.iter_mut().step_by(self.stride).zip(&line[start..end]).for_each(|(to, v)| *to += v);
            }
        }
    }
}

/// `len` floats of this thread's scratch memory, from the start of a cache line on; they hold what was left in them.
fn with_scratch<R>(scratch: &'static Scratch, len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    const LINE: usize = 64;
    scratch.with_borrow_mut(|scratch| {
        let enough = len + LINE / size_of::<f32>();
        if scratch.len() < enough {
            scratch.resize(enough, 0.0);
        }
        let start = scratch.as_ptr().align_offset(LINE);
        work(&mut scratch[start..start + len])
    })
}
