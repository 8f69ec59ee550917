//! Convolution on the CPU as matrix products, a few pictures at a time: the patches of a group of pictures are laid out
//! as columns in a buffer that stays in the cache (never those of the whole batch), and multiplied by `gemm`. Backward
//! walks the same groups: columns once for the weights' gradient, and the transposed product scattered back for the
//! picture's. candle's own backward convolves with a picture-sized kernel and takes several times as long.

use super::{Gemm, Values, on_cpu_f32, values};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::cell::RefCell;

/// x `(B, C, H, W)`, weight `(O, C, kh, kw)`, bias `(O,)`, zero padding on all sides; returns `(B, O, H', W')`.
/// f32 on the CPU runs fused, anything else through [`conv2d_composite`].
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
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
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
        if b.len() != g.out_channels {
            bail!("conv2d: bias has {} values, expected {}", b.len(), g.out_channels);
        }
        let y = g.forward(x, w, b);
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
        let wanted = Wanted { x: x.track_op(), weight: w.track_op() || b.track_op() };
        let values = |t| Values::of(t, self.name());
        let gradients = g.backward(&values(x)?, &values(w)?, &values(&grad)?, wanted);
        let device = x.device();
        let tensor = |v: Vec<f32>, like: &Tensor| Tensor::from_vec(v, like.dims(), device);
        let dx = if wanted.x { Some(tensor(gradients.x, x)?) } else { None };
        if !wanted.weight {
            return Ok((dx, None, None));
        }
        Ok((dx, Some(tensor(gradients.weight, w)?), Some(tensor(gradients.bias, b)?)))
    }
}

#[derive(Clone, Copy)]
struct Wanted {
    x: bool,
    weight: bool,
}

struct Gradients {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
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

/// Columns per matrix product: enough to keep its inner kernel busy, few enough for the second-level cache.
const COLUMNS: usize = 256;

thread_local! {
    /// Scratch that lives as long as its thread: columns, and the outputs of a group before they are dealt out.
    static SCRATCH: RefCell<[Vec<f32>; 3]> = const { RefCell::new([Vec::new(), Vec::new(), Vec::new()]) };
}

impl Geometry {
    fn new(x: &[usize], w: &[usize], conv: &Conv2d) -> Result<Self> {
        let (&[batch, channels, height, width], &[out_channels, w_channels, kh, kw]) = (x, w) else {
            bail!("conv2d: input {x:?} and weight {w:?}, expected four axes each")
        };
        let Conv2d { stride, padding } = *conv;
        let fits = height + 2 * padding >= kh && width + 2 * padding >= kw && kh > 0 && kw > 0;
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
    fn patch(&self) -> usize {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// 1×1, stride 1: the picture is its own matrix of columns.
    fn pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.padding == 0
    }

    /// Stride 1 with a padding that makes up for the kernel: a row of columns is then the picture, moved.
    fn keeps_size(&self) -> bool {
        self.stride == 1 && self.out_height == self.height && self.out_width == self.width
    }

    /// Pictures that share one matrix product.
    fn group(&self) -> usize {
        let by_size = COLUMNS.div_ceil(self.pixels_out().max(1));
        by_size.min(self.batch.div_ceil(rayon::current_num_threads())).max(1)
    }

    fn forward(&self, x: &[f32], w: &[f32], bias: &[f32]) -> Vec<f32> {
        let (pixels, group) = (self.pixels_out(), self.group());
        let mut y = vec![0f32; self.batch * self.out_channels * pixels];
        y.par_chunks_mut((group * self.out_channels * pixels).max(1))
            .zip(x.par_chunks((group * self.channels * self.pixels_in()).max(1)))
            .for_each(|(y, x)| {
                with_scratch(|[columns, product, _]| {
                    let n_pictures = y.len() / (self.out_channels * pixels);
                    let n = n_pictures * pixels;
                    let columns = self.columns(x, n_pictures, columns);
                    if n_pictures == 1 {
                        fill_rows(y, bias);
                        self.product(w, columns, n).run(y);
                    } else {
                        product.resize(self.out_channels * n, 0.0);
                        fill_rows(product, bias);
                        self.product(w, columns, n).run(product);
                        deal(product, y, self.out_channels, pixels);
                    }
                });
            });
        y
    }

    /// W·columns, added to what is there.
    fn product<'a>(&self, w: &'a [f32], columns: &'a [f32], n: usize) -> Gemm<'a> {
        let k = self.patch();
        Gemm { m: self.out_channels, n, k, lhs: (w, k, 1), rhs: (columns, n, 1), alpha: 1.0, accumulate: true }
    }

    fn backward(&self, x: &[f32], w: &[f32], grad: &[f32], wanted: Wanted) -> Gradients {
        let (pixels, k) = (self.pixels_out(), self.patch());
        let picture = self.channels * self.pixels_in();
        // One share of the batch per thread, fixed by the shape and the number of threads: the sums over the batch come
        // out the same every time.
        let share = self.batch.div_ceil(rayon::current_num_threads()).max(1);
        let turned = self.turned().filter(|_| wanted.x);
        let by_scatter = wanted.x && turned.is_none();
        let mut dx = match turned {
            Some(turned) => turned.forward(grad, &self.turn(w), &vec![0f32; self.channels]),
            None => vec![0f32; if wanted.x { x.len() } else { 0 }],
        };
        let wanted = Wanted { x: by_scatter, ..wanted };
        let mut no_dx = [];
        let mut dx_shares: Vec<&mut [f32]> =
            if by_scatter { &mut dx[..] } else { &mut no_dx[..] }.chunks_mut((share * picture).max(1)).collect();
        let n_shares = self.batch.div_ceil(share);
        dx_shares.resize_with(n_shares, || &mut []);
        let partial: Vec<(Vec<f32>, Vec<f32>)> = dx_shares
            .into_par_iter()
            .enumerate()
            .map(|(i, dx)| {
                let pictures = i * share..((i + 1) * share).min(self.batch);
                let x = &x[pictures.start * picture..pictures.end * picture];
                let grad =
                    &grad[pictures.start * self.out_channels * pixels..pictures.end * self.out_channels * pixels];
                self.backward_share(x, w, grad, dx, wanted)
            })
            .collect();
        let mut weight = vec![0f32; if wanted.weight { self.out_channels * k } else { 0 }];
        let mut bias = vec![0f32; if wanted.weight { self.out_channels } else { 0 }];
        for (dw, db) in &partial {
            weight.iter_mut().zip(dw).for_each(|(sum, v)| *sum += v);
            bias.iter_mut().zip(db).for_each(|(sum, v)| *sum += v);
        }
        Gradients { x: dx, weight, bias }
    }

    /// The convolution that gives the picture's gradient, where there is one of the same kind: stride 1, and a kernel
    /// that its padding centres. It multiplies long rows (O·kh·kw) where scattering multiplies short ones (O).
    fn turned(&self) -> Option<Geometry> {
        let [kh, kw] = self.kernel;
        let centred = self.stride == 1 && kh == kw && 2 * self.padding + 1 == kh && kh > 1;
        centred.then_some(Geometry {
            channels: self.out_channels,
            out_channels: self.channels,
            height: self.out_height,
            width: self.out_width,
            out_height: self.height,
            out_width: self.width,
            ..*self
        })
    }

    /// The weights that go with it: input and output channels exchanged, kernels turned by 180 degrees.
    fn turn(&self, w: &[f32]) -> Vec<f32> {
        let (c, o, taps) = (self.channels, self.out_channels, self.kernel[0] * self.kernel[1]);
        let mut turned = vec![0f32; w.len()];
        for (output, kernels) in w.chunks_exact(c * taps).enumerate() {
            for (input, kernel) in kernels.chunks_exact(taps).enumerate() {
                let to = &mut turned[(input * o + output) * taps..][..taps];
                to.iter_mut().rev().zip(kernel).for_each(|(to, v)| *to = *v);
            }
        }
        turned
    }

    fn backward_share(
        &self,
        x: &[f32],
        w: &[f32],
        grad: &[f32],
        dx: &mut [f32],
        wanted: Wanted,
    ) -> (Vec<f32>, Vec<f32>) {
        let (pixels, k, o) = (self.pixels_out(), self.patch(), self.out_channels);
        let (picture, group) = (self.channels * self.pixels_in(), self.group());
        let mut dw = vec![0f32; if wanted.weight { o * k } else { 0 }];
        let mut db = vec![0f32; if wanted.weight { o } else { 0 }];
        with_scratch(|[columns, rows, dcolumns]| {
            for (i, (x, grad)) in
                x.chunks((group * picture).max(1)).zip(grad.chunks((group * o * pixels).max(1))).enumerate()
            {
                let n_pictures = grad.len() / (o * pixels);
                let n = n_pictures * pixels;
                let grad = if n_pictures == 1 {
                    grad
                } else {
                    rows.resize(o * n, 0.0);
                    gather(grad, rows, o, pixels);
                    &rows[..]
                };
                if wanted.weight {
                    let columns = self.columns(x, n_pictures, columns);
                    Gemm { m: o, n: k, k: n, lhs: (grad, n, 1), rhs: (columns, 1, n), alpha: 1.0, accumulate: true }
                        .run(&mut dw);
                    super::simd::dispatch(|| {
                        for (sum, row) in db.iter_mut().zip(grad.chunks_exact(n)) {
                            *sum += super::simd::sum_by(row, |v| v);
                        }
                    });
                }
                if wanted.x {
                    let dx = &mut dx[i * group * picture..][..x.len()];
                    let product =
                        Gemm { m: k, n, k: o, lhs: (w, 1, k), rhs: (grad, n, 1), alpha: 1.0, accumulate: false };
                    if self.pointwise() && n_pictures == 1 {
                        product.run(dx);
                    } else {
                        dcolumns.resize(k * n, 0.0);
                        product.run(dcolumns);
                        self.scatter(dcolumns, n_pictures, dx);
                    }
                }
            }
        });
        (dw, db)
    }

    /// The patches of some pictures as a matrix `(patch, pictures·pixels)`.
    fn columns<'a>(&self, x: &'a [f32], n_pictures: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        if self.pointwise() && n_pictures == 1 {
            return x;
        }
        let n = n_pictures * self.pixels_out();
        buffer.resize(self.patch() * n, 0.0);
        self.each_row(|row, channel, dy, dx| {
            let (start, end) = self.inside(dx);
            let columns = &mut buffer[row * n..(row + 1) * n];
            for (picture, columns) in columns.chunks_exact_mut(self.pixels_out()).enumerate() {
                let plane = &x[(picture * self.channels + channel) * self.pixels_in()..][..self.pixels_in()];
                if self.keeps_size() {
                    shift(plane, columns, self.width, [dy, dx].map(|d| d as isize - self.padding as isize));
                    continue;
                }
                for (y, line) in columns.chunks_exact_mut(self.out_width).enumerate() {
                    let Some(from) = self.source_row(plane, y, dy) else {
                        line.fill(0.0);
                        continue;
                    };
                    line[..start].fill(0.0);
                    line[end..].fill(0.0);
                    let first = start * self.stride + dx - self.padding;
                    if self.stride == 1 {
                        line[start..end].copy_from_slice(&from[first..first + end - start]);
                    } else {
                        line[start..end]
                            .iter_mut()
                            .zip(from[first..].iter().step_by(self.stride))
                            .for_each(|(to, v)| *to = *v);
                    }
                }
            }
        });
        &buffer[..]
    }

    /// The transpose of [`Self::columns`]: adds every entry back to the pixel it came from. `dx` starts at zero.
    fn scatter(&self, columns: &[f32], n_pictures: usize, dx_pictures: &mut [f32]) {
        let n = n_pictures * self.pixels_out();
        self.each_row(|row, channel, dy, dx| {
            let (start, end) = self.inside(dx);
            let columns = &columns[row * n..(row + 1) * n];
            for (picture, columns) in columns.chunks_exact(self.pixels_out()).enumerate() {
                let plane = (picture * self.channels + channel) * self.pixels_in();
                let plane = &mut dx_pictures[plane..plane + self.pixels_in()];
                for (y, line) in columns.chunks_exact(self.out_width).enumerate() {
                    let Some(row) = (y * self.stride + dy).checked_sub(self.padding).filter(|&row| row < self.height)
                    else {
                        continue;
                    };
                    let to = &mut plane[row * self.width..(row + 1) * self.width];
                    let first = start * self.stride + dx - self.padding;
                    if self.stride == 1 {
                        to[first..first + end - start].iter_mut().zip(&line[start..end]).for_each(|(to, v)| *to += v);
                    } else {
                        to[first..].iter_mut().step_by(self.stride).zip(&line[start..end]).for_each(|(to, v)| *to += v);
                    }
                }
            }
        });
    }

    /// Every row of the matrix of columns: `(row, channel, dy, dx)`.
    fn each_row(&self, mut f: impl FnMut(usize, usize, usize, usize)) {
        let [kh, kw] = self.kernel;
        for row in 0..self.patch() {
            f(row, row / (kh * kw), row / kw % kh, row % kw);
        }
    }

    /// The input row under output row `y` at kernel row `dy`, unless it lies in the padding.
    fn source_row<'a>(&self, plane: &'a [f32], y: usize, dy: usize) -> Option<&'a [f32]> {
        let row = (y * self.stride + dy).checked_sub(self.padding).filter(|&row| row < self.height)?;
        Some(&plane[row * self.width..(row + 1) * self.width])
    }

    /// The output columns `start..end` whose input at kernel column `dx` lies inside the picture.
    fn inside(&self, dx: usize) -> (usize, usize) {
        let start = self.padding.saturating_sub(dx).div_ceil(self.stride).min(self.out_width);
        let end = (self.width + self.padding).saturating_sub(dx).div_ceil(self.stride).min(self.out_width);
        (start, end.max(start))
    }
}

/// `to[y][x] = from[y + dy][x + dx]`, zero outside; both planes are `width` wide and equally large. One copy of the whole
/// plane, then zeros where it wrapped round: rows of 8 or 16 pixels are too short to be copied one by one.
fn shift(from: &[f32], to: &mut [f32], width: usize, [dy, dx]: [isize; 2]) {
    let (len, width_i) = (from.len() as isize, width as isize);
    let offset = dy * width_i + dx;
    let rows_start = (-dy * width_i).clamp(0, len);
    let rows_end = (len - dy * width_i).clamp(0, len);
    let start = rows_start.max(-offset).min(len) as usize;
    let end = (rows_end.min(len - offset).max(0) as usize).max(start);
    to[..start].fill(0.0);
    to[end..].fill(0.0);
    if start < end {
        to[start..end].copy_from_slice(&from[(start as isize + offset) as usize..][..end - start]);
    }
    let wrapped = dx.unsigned_abs().min(width);
    let first = if dx < 0 { 0 } else { width - wrapped };
    if wrapped > 0 {
        to.chunks_exact_mut(width).for_each(|row| row[first..first + wrapped].fill(0.0));
    }
}

fn with_scratch<R>(work: impl FnOnce(&mut [Vec<f32>; 3]) -> R) -> R {
    SCRATCH.with_borrow_mut(work)
}

/// Every row gets its own constant.
fn fill_rows(matrix: &mut [f32], values: &[f32]) {
    let width = matrix.len() / values.len().max(1);
    matrix.chunks_exact_mut(width.max(1)).zip(values).for_each(|(row, v)| row.fill(*v));
}

/// `(O, pictures, pixels)` to `(pictures, O, pixels)`.
fn deal(rows: &[f32], pictures: &mut [f32], out_channels: usize, pixels: usize) {
    let n_pictures = rows.len() / (out_channels * pixels);
    for (picture, to) in pictures.chunks_exact_mut(out_channels * pixels).enumerate() {
        for (o, to) in to.chunks_exact_mut(pixels).enumerate() {
            to.copy_from_slice(&rows[(o * n_pictures + picture) * pixels..][..pixels]);
        }
    }
}

/// `(pictures, O, pixels)` to `(O, pictures, pixels)`.
fn gather(pictures: &[f32], rows: &mut [f32], out_channels: usize, pixels: usize) {
    let n_pictures = rows.len() / (out_channels * pixels);
    for (picture, from) in pictures.chunks_exact(out_channels * pixels).enumerate() {
        for (o, from) in from.chunks_exact(pixels).enumerate() {
            rows[(o * n_pictures + picture) * pixels..][..pixels].copy_from_slice(from);
        }
    }
}
