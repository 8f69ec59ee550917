//! Finished pictures: arrays, images of the `image` crate, pixels for a screen, or the caller's own memory.

#[cfg(feature = "image")]
use image::{DynamicImage, GrayAlphaImage, GrayImage, RgbImage, RgbaImage};
use ndarray::{Array4, ArrayView4};

use crate::limits::zeros;
use crate::{Error, Output, Result};

/// A batch of pictures, kept as the graph gave them.
#[derive(Clone, Debug, PartialEq)]
pub struct Images {
    pixels: Pixels,
    labels: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Pixels {
    /// `(N, C, H, W)`, about `[-1, 1]`.
    F32(Array4<f32>),
    /// `(N, H, W, C)`.
    U8(Array4<u8>),
}

/// One picture of [`Images`].
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    pixels: Raw<'a>,
    shape: [usize; 3],
    label: Option<usize>,
}

/// The caller's memory for pictures, one after the other, in the layout that is wanted.
#[derive(Debug)]
pub enum Buffer<'a> {
    /// f32 `(N, C, H, W)` in `[-1, 1]`, as of [`Images::to_f32`].
    F32(&'a mut [f32]),
    /// u8 `(N, H, W, C)`: three bytes for each pixel of a picture in colour.
    U8(&'a mut [u8]),
    /// u8 `(N, H, W, 4)`, red, green, blue and alpha, as screens take them; of a file of 1 to 4 channels. Opaque where the
    /// file has no alpha.
    Rgba(&'a mut [u8]),
}

/// Pictures one after the other, as a graph gives them: f32 `(N, C, H, W)` or u8 `(N, H, W, C)`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Raw<'a> {
    F32(&'a [f32]),
    U8(&'a [u8]),
}

impl Images {
    pub(crate) fn new(pixels: Pixels, labels: Vec<usize>) -> Self {
        Self { pixels, labels }
    }

    /// The number of pictures.
    pub fn len(&self) -> usize {
        self.dimensions().0
    }

    /// Whether there are none. [`Generator`](crate::Generator) never gives an empty batch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The class of each picture; empty where the generator has none.
    pub fn labels(&self) -> &[usize] {
        &self.labels
    }

    /// How the pictures are kept.
    pub fn output(&self) -> Output {
        match &self.pixels {
            Pixels::F32(_) => Output::F32,
            Pixels::U8(_) => Output::U8,
        }
    }

    /// The raw values of an f32 file, `(N, C, H, W)`, without a copy.
    pub fn as_f32(&self) -> Option<ArrayView4<'_, f32>> {
        match &self.pixels {
            Pixels::F32(values) => Some(values.view()),
            Pixels::U8(_) => None,
        }
    }

    /// The raw values of a u8 file, `(N, H, W, C)`, without a copy.
    pub fn as_u8(&self) -> Option<ArrayView4<'_, u8>> {
        match &self.pixels {
            Pixels::F32(_) => None,
            Pixels::U8(values) => Some(values.view()),
        }
    }

    /// Values f32 `(N, C, H, W)` in `[-1, 1]`: the graph's own, which may overshoot a little, or the middle of each
    /// step of a u8 file, which is within 1/255 of what was rounded.
    pub fn to_f32(&self) -> Array4<f32> {
        let (n, [channels, height, width]) = self.dimensions();
        let mut values = Array4::zeros((n, channels, height, width));
        write(self.raw(), [channels, height, width], Buffer::F32(values.as_slice_mut().expect(FRESH)));
        values
    }

    /// Pixels u8 `(N, H, W, C)`, rounded by [`quantize`] where the file gives f32.
    pub fn to_u8(&self) -> Array4<u8> {
        let (n, [channels, height, width]) = self.dimensions();
        let mut pixels = Array4::zeros((n, height, width, channels));
        write(self.raw(), [channels, height, width], Buffer::U8(pixels.as_slice_mut().expect(FRESH)));
        pixels
    }

    /// Picture `i`; `None` where there are not so many.
    pub fn get(&self, i: usize) -> Option<Image<'_>> {
        self.iter().nth(i)
    }

    /// One picture after the other.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Image<'_>> {
        let (n, shape) = self.dimensions();
        let values = shape.iter().product::<usize>();
        let all = self.raw();
        (0..n).map(move |i| {
            let part = i * values..(i + 1) * values;
            let pixels = match all {
                Raw::F32(all) => Raw::F32(&all[part]),
                Raw::U8(all) => Raw::U8(&all[part]),
            };
            Image { pixels, shape, label: self.labels.get(i).copied() }
        })
    }

    /// [`Image::to_image`] of each picture.
    #[cfg(feature = "image")]
    pub fn to_images(&self) -> Vec<DynamicImage> {
        self.iter().map(|image| image.to_image()).collect()
    }

    /// Pictures, and `[C, H, W]` of each.
    fn dimensions(&self) -> (usize, [usize; 3]) {
        match &self.pixels {
            Pixels::F32(values) => {
                let (n, channels, height, width) = values.dim();
                (n, [channels, height, width])
            }
            Pixels::U8(values) => {
                let (n, height, width, channels) = values.dim();
                (n, [channels, height, width])
            }
        }
    }

    fn raw(&self) -> Raw<'_> {
        match &self.pixels {
            Pixels::F32(values) => Raw::F32(values.as_slice().expect(FRESH)),
            Pixels::U8(values) => Raw::U8(values.as_slice().expect(FRESH)),
        }
    }
}

const FRESH: &str = "an array that was made whole is contiguous";

impl Image<'_> {
    /// Its class, where the generator has any.
    pub fn label(&self) -> Option<usize> {
        self.label
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Bytes `(H, W, 4)`: red, green, blue, alpha. A picture of more than four channels has none.
    pub fn to_rgba(&self) -> Result<Vec<u8>> {
        let [channels, height, width] = self.shape;
        check_colours(channels)?;
        let mut pixels = zeros(height * width * 4)?;
        write(self.pixels, self.shape, Buffer::Rgba(&mut pixels));
        Ok(pixels)
    }

    /// The picture for the `image` crate: grey, grey with alpha, RGB or RGBA for 1 to 4 channels. More channels become one
    /// tall grey image, one channel below the other.
    #[cfg(feature = "image")]
    pub fn to_image(&self) -> DynamicImage {
        const FITS: &str = "the buffer has the size of the image";
        let [channels, height, width] = self.shape;
        let (w, h) = (width as u32, height as u32);
        let mut bytes = vec![0; channels * height * width];
        write(self.pixels, self.shape, Buffer::U8(&mut bytes));
        match channels {
            1 => GrayImage::from_raw(w, h, bytes).expect(FITS).into(),
            2 => GrayAlphaImage::from_raw(w, h, bytes).expect(FITS).into(),
            3 => RgbImage::from_raw(w, h, bytes).expect(FITS).into(),
            4 => RgbaImage::from_raw(w, h, bytes).expect(FITS).into(),
            _ => {
                let planes = (0..channels).flat_map(|c| bytes.iter().skip(c).step_by(channels).copied()).collect();
                GrayImage::from_raw(w, h * channels as u32, planes).expect(FITS).into()
            }
        }
    }

    /// The picture in three colours; grey thrice where it has no colours.
    #[cfg(feature = "image")]
    pub fn to_rgb_image(&self) -> RgbImage {
        self.to_image().into_rgb8()
    }

    /// The bytes of a PNG file of it.
    #[cfg(feature = "image")]
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let mut png = std::io::Cursor::new(Vec::new());
        let written = self.to_image().write_to(&mut png, image::ImageFormat::Png);
        written.map_err(|error| Error::Png { reason: error.to_string() })?;
        Ok(png.into_inner())
    }
}

impl Buffer<'_> {
    /// Whether it holds `n` pictures `[C, H, W]` in its layout, no more and no less.
    pub(crate) fn check(&self, n: usize, [channels, height, width]: [usize; 3]) -> Result<()> {
        let (found, of_each) = match self {
            Buffer::F32(values) => (values.len(), channels),
            Buffer::U8(pixels) => (pixels.len(), channels),
            Buffer::Rgba(pixels) => {
                check_colours(channels)?;
                (pixels.len(), 4)
            }
        };
        let expected = n.saturating_mul(of_each * height * width);
        if found == expected { Ok(()) } else { Err(Error::BufferSize { found, expected }) }
    }

    /// The room for `n` pictures from `first` on, of `[C, H, W]`.
    pub(crate) fn part(&mut self, first: usize, n: usize, [channels, height, width]: [usize; 3]) -> Buffer<'_> {
        let part = |of_each: usize| first * of_each * height * width..(first + n) * of_each * height * width;
        match self {
            Buffer::F32(values) => Buffer::F32(&mut values[part(channels)]),
            Buffer::U8(pixels) => Buffer::U8(&mut pixels[part(channels)]),
            Buffer::Rgba(pixels) => Buffer::Rgba(&mut pixels[part(4)]),
        }
    }
}

fn check_colours(channels: usize) -> Result<()> {
    if (1..=4).contains(&channels) { Ok(()) } else { Err(Error::NoColours { channels }) }
}

/// Writes pictures `[C, H, W]` in another layout; both sides hold as many.
pub(crate) fn write(pictures: Raw<'_>, [channels, height, width]: [usize; 3], into: Buffer<'_>) {
    let area = height * width;
    let values = channels * area;
    match (pictures, into) {
        (Raw::F32(from), Buffer::F32(to)) => to.copy_from_slice(from),
        (Raw::U8(from), Buffer::U8(to)) => to.copy_from_slice(from),
        (Raw::F32(from), Buffer::U8(to)) => {
            for (from, to) in from.chunks_exact(values).zip(to.chunks_exact_mut(values)) {
                for (c, plane) in from.chunks_exact(area).enumerate() {
                    plane.iter().zip(to[c..].iter_mut().step_by(channels)).for_each(|(x, byte)| *byte = quantize(*x));
                }
            }
        }
        (Raw::U8(from), Buffer::F32(to)) => {
            for (from, to) in from.chunks_exact(values).zip(to.chunks_exact_mut(values)) {
                for (c, plane) in to.chunks_exact_mut(area).enumerate() {
                    let bytes = from[c..].iter().step_by(channels);
                    plane.iter_mut().zip(bytes).for_each(|(x, byte)| *x = f32::from(*byte) / 127.5 - 1.0);
                }
            }
        }
        (from, Buffer::Rgba(to)) => {
            for (i, picture) in to.chunks_exact_mut(4 * area).enumerate() {
                for (at, pixel) in picture.chunks_exact_mut(4).enumerate() {
                    let byte = |c: usize| match from {
                        Raw::F32(from) => quantize(from[i * values + c * area + at]),
                        Raw::U8(from) => from[i * values + at * channels + c],
                    };
                    let alpha = if channels % 2 == 0 { byte(channels - 1) } else { u8::MAX };
                    let colour = |c: usize| byte(if channels < 3 { 0 } else { c });
                    pixel.copy_from_slice(&[colour(0), colour(1), colour(2), alpha]);
                }
            }
        }
    }
}

/// A value in `[-1, 1]` as a byte, `floor(clamp(127.5 x + 128, 0, 255))`: rounds half up, exactly as a u8 file does
/// in its graph.
///
/// ```
/// assert_eq!([-1.5, -1.0, 0.0, 1.0, 2.0].map(dmd_runtime::quantize), [0, 0, 128, 255, 255]);
/// ```
pub fn quantize(x: f32) -> u8 {
    // The cast truncates, which is the floor of what is not negative, and takes NaN to 0.
    (x * 127.5 + 128.0).clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_half_up_with_clamping() {
        for byte in 0..=255u8 {
            let middle = f32::from(byte) / 127.5 - 1.0;
            assert_eq!(quantize(middle), byte);
        }
        // 127.5 x + 128 = 100 exactly starts byte 100; the next number below belongs to 99.
        let edge = -28.0f32 / 127.5;
        assert_eq!(quantize(edge + 1e-6), 100);
        assert_eq!(quantize(edge - 1e-6), 99);
        assert_eq!([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(quantize), [0, 255, 0]);
    }

    #[cfg(feature = "image")]
    #[test]
    fn channels_become_interleaved_colours() {
        let values = Array4::from_shape_fn((2, 3, 2, 2), |(n, c, y, x)| if n == 0 && c == y + x { 1.0 } else { -1.0 });
        let images = Images::new(Pixels::F32(values), vec![]);
        let picture = images.to_images()[0].to_rgb8();
        assert_eq!(picture.get_pixel(0, 0).0, [255, 0, 0]);
        assert_eq!(picture.get_pixel(1, 0).0, [0, 255, 0]);
        assert_eq!(picture.get_pixel(1, 1).0, [0, 0, 255]);
        assert_eq!(images.to_u8().dim(), (2, 2, 2, 3));
    }

    #[cfg(feature = "image")]
    #[test]
    fn every_number_of_channels_has_an_image() {
        for channels in 1..=5 {
            let images = Images::new(Pixels::F32(Array4::zeros((1, channels, 4, 6))), vec![]);
            let image = &images.to_images()[0];
            let (height, colours) = if channels > 4 { (4 * channels as u32, 1) } else { (4, channels as u8) };
            assert_eq!((image.width(), image.height(), image.color().channel_count()), (6, height, colours));
        }
    }

    #[test]
    fn f32_of_a_u8_file_rounds_back_to_the_same_bytes() {
        let bytes = Array4::from_shape_fn((1, 16, 16, 1), |(_, y, x, _)| (y * 16 + x) as u8);
        let images = Images::new(Pixels::U8(bytes.clone()), vec![3]);
        let again = Images::new(Pixels::F32(images.to_f32()), vec![3]);
        assert_eq!(again.to_u8(), bytes);
    }

    #[test]
    fn screens_get_four_bytes_of_every_number_of_colours() {
        // Bytes 10, 20, .. of one picture of two pixels, as (H, W, C).
        for (channels, expected) in [
            (1, [10, 10, 10, 255, 20, 20, 20, 255]),
            (2, [10, 10, 10, 20, 30, 30, 30, 40]),
            (3, [10, 20, 30, 255, 40, 50, 60, 255]),
            (4, [10, 20, 30, 40, 50, 60, 70, 80]),
        ] {
            let bytes = Array4::from_shape_fn((1, 1, 2, channels), |(_, _, x, c)| (10 * (x * channels + c + 1)) as u8);
            let images = Images::new(Pixels::U8(bytes), vec![]);
            assert_eq!(images.get(0).unwrap().to_rgba().unwrap(), expected, "{channels} channels");
            let floats = Images::new(Pixels::F32(images.to_f32()), vec![]);
            assert_eq!(floats.get(0).unwrap().to_rgba().unwrap(), expected, "{channels} channels of f32");
        }
        let many = Images::new(Pixels::U8(Array4::zeros((1, 1, 2, 5))), vec![]);
        assert!(matches!(many.get(0).unwrap().to_rgba(), Err(Error::NoColours { channels: 5 })));
        assert!(many.get(1).is_none());
    }

    #[cfg(feature = "image")]
    #[test]
    fn a_png_holds_the_pixels() {
        let bytes = Array4::from_shape_fn((2, 3, 2, 3), |(n, y, x, c)| (40 * n + 12 * y + 5 * x + c) as u8);
        let images = Images::new(Pixels::U8(bytes), vec![4, 9]);
        let second = images.get(1).unwrap();
        assert_eq!((second.label(), second.shape()), (Some(9), [3, 3, 2]));
        let read = image::load_from_memory(&second.to_png().unwrap()).unwrap();
        assert_eq!(read.to_rgb8(), second.to_rgb_image());
        assert_eq!(read.to_rgb8().get_pixel(1, 2).0, [69, 70, 71]);
    }
}
