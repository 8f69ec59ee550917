//! The sizes of a convolution, and how it lays out pictures as planes for the kernels of [`super::tile`]: one for each
//! channel and kernel column, moved sideways by the column, with the padding in place.

use super::conv2d::Conv2d;
use super::tile::{Planes, SLACK};
use candle_core::{Result, bail};
use std::cell::RefCell;

/// All the sizes of one convolution.
pub struct Geometry {
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub out_channels: usize,
    pub out_height: usize,
    pub out_width: usize,
    pub kernel: [usize; 2],
    pub stride: usize,
    /// Zeros above and to the left; below zero, how much of the picture is left out there.
    pub padding: [isize; 2],
}

/// Memory of each thread.
pub type Scratch = std::thread::LocalKey<RefCell<Vec<f32>>>;

thread_local! {
    /// Memory for planes that lives as long as its thread.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Geometry {
    pub fn new(x: &[usize], w: &[usize], conv: &Conv2d) -> Result<Self> {
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
            padding: [padding as isize; 2],
        })
    }

    /// Floats of one input picture.
    pub fn picture(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Pixels of an output channel.
    pub fn pixels(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Length of a patch.
    pub fn n_taps(&self) -> usize {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// For each tap, in the order of the planes, what `place` gives for its channel, row and column.
    pub fn taps(&self, place: impl Fn(usize, usize, usize) -> usize) -> Vec<usize> {
        let ([kh, kw], mut places) = (self.kernel, Vec::with_capacity(self.n_taps()));
        for (c, dx) in (0..self.channels).flat_map(|c| (0..kw).map(move |dx| (c, dx))) {
            places.extend((0..kh).map(|dy| place(c, dy, dx)));
        }
        places
    }

    /// From one picture to the next, once they are laid out.
    pub fn laid_out(&self) -> usize {
        match self.in_place() {
            true => self.picture(),
            false => self.channels * self.kernel[1] * self.rows().count() * self.out_width,
        }
    }

    /// Whether a picture can be read as it lies: 1×1, stride 1, whole vectors.
    fn in_place(&self) -> bool {
        let same = [self.out_height, self.out_width] == [self.height, self.width] && self.padding == [0, 0];
        same && self.kernel == [1, 1] && self.stride == 1 && self.pixels().is_multiple_of(SLACK)
    }

    /// Lays out pictures `(n, C, H, W)` as planes and hands them over.
    pub fn with_planes<R>(&self, pictures: &[f32], work: impl FnOnce(Planes) -> R) -> R {
        let rows: Vec<usize> = self.rows().collect();
        let plane = rows.len() * self.out_width;
        let begin = |dy| rows.iter().take_while(|row| **row != dy).count() * self.out_width;
        let taps: Vec<usize> = (0..self.kernel[0]).map(begin).collect();
        if self.in_place() {
            return work(Planes { values: pictures, plane, rows: &taps });
        }
        let n_pictures = pictures.len() / self.picture();
        with_scratch(&SCRATCH, n_pictures * self.laid_out() + SLACK, |buffer| {
            let channels = pictures.chunks_exact(self.height * self.width);
            for (channel, planes) in channels.zip(buffer.chunks_exact_mut(self.kernel[1] * plane)) {
                planes.chunks_exact_mut(plane).enumerate().for_each(|(dx, plane)| self.lay(channel, plane, dx, &rows));
            }
            let end = buffer.len() - SLACK;
            buffer[end..].fill(0.0);
            work(Planes { values: buffer, plane, rows: &taps })
        })
    }

    /// The rows of a plane, counted from the first row of padding on: every `stride`-th from the first, then from the
    /// second and so on, so that every tap of the plane is a run of it.
    fn rows(&self) -> impl Iterator<Item = usize> {
        let (end, stride) = ((self.out_height - 1) * self.stride + self.kernel[0], self.stride);
        (0..stride.min(self.kernel[0])).flat_map(move |first| (first..end).step_by(stride))
    }

    /// One plane: `to[y][x] = channel[rows[y] − padding][x·stride + dx − padding]`, zero outside.
    fn lay(&self, channel: &[f32], to: &mut [f32], dx: usize, rows: &[usize]) {
        let [above, left] = [self.padding[0], self.padding[1] - dx as isize];
        let inner = 0..=rows.len() as isize - self.height as isize;
        if self.stride == 1 && self.out_width == self.width && inner.contains(&above) {
            return self.lay_whole(channel, to, above as usize, left);
        }
        let (start, end) = self.inside(left);
        for (line, row) in to.chunks_exact_mut(self.out_width).zip(rows) {
            let row = row.checked_add_signed(-above).filter(|&row| row < self.height && start < end);
            let Some(row) = row else {
                line.fill(0.0);
                continue;
            };
            line[..start].fill(0.0);
            line[end..].fill(0.0);
            let from = &channel[row * self.width..][..self.width][(start * self.stride).saturating_add_signed(-left)..];
            line[start..end].iter_mut().zip(from.iter().step_by(self.stride)).for_each(|(to, v)| *to = *v);
        }
    }

    /// The same where rows keep their length: one copy of the whole picture, `above` rows down and `left` pixels to the
    /// right, then zeros where it wrapped round. Rows of 8 or 16 pixels are too short to be copied one by one.
    fn lay_whole(&self, channel: &[f32], to: &mut [f32], above: usize, left: isize) {
        let (above, pixels) = (above * self.width, channel.len());
        to[..above].fill(0.0);
        to[above + pixels..].fill(0.0);
        let picture = &mut to[above..above + pixels];
        let wrapped = left.unsigned_abs().min(self.width);
        let kept = pixels - wrapped;
        if left > 0 {
            picture[wrapped..].copy_from_slice(&channel[..kept]);
            picture.chunks_exact_mut(self.width).for_each(|row| row[..wrapped].fill(0.0));
        } else {
            picture[..kept].copy_from_slice(&channel[wrapped..]);
            picture.chunks_exact_mut(self.width).for_each(|row| row[self.width - wrapped..].fill(0.0));
        }
    }

    /// The output columns `start..end` whose input lies inside the picture, `left` pixels to the left of them.
    fn inside(&self, left: isize) -> (usize, usize) {
        let end = self.width.saturating_add_signed(left).div_ceil(self.stride).min(self.out_width);
        let start = 0usize.saturating_add_signed(left).div_ceil(self.stride).min(end);
        (start, end)
    }
}

/// `len` floats of this thread's scratch memory, from the start of a cache line on; they hold what was left in them.
pub fn with_scratch<R>(scratch: &'static Scratch, len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
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
