//! Finished pictures, as arrays or as images of the `image` crate.

use image::{DynamicImage, GrayAlphaImage, GrayImage, RgbImage, RgbaImage};
use ndarray::{Array4, ArrayView3, ArrayView4, Axis};

use crate::Output;

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

impl Images {
    pub(crate) fn new(pixels: Pixels, labels: Vec<usize>) -> Self {
        Self { pixels, labels }
    }

    /// The number of pictures.
    pub fn len(&self) -> usize {
        match &self.pixels {
            Pixels::F32(values) => values.len_of(Axis(0)),
            Pixels::U8(values) => values.len_of(Axis(0)),
        }
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
        match &self.pixels {
            Pixels::F32(values) => values.clone(),
            Pixels::U8(values) => values.view().permuted_axes([0, 3, 1, 2]).map(|v| f32::from(*v) / 127.5 - 1.0),
        }
    }

    /// Pixels u8 `(N, H, W, C)`, rounded by [`quantize`] where the file gives f32.
    pub fn to_u8(&self) -> Array4<u8> {
        match &self.pixels {
            Pixels::F32(values) => {
                let mut pixels = Array4::zeros(values.view().permuted_axes([0, 2, 3, 1]).raw_dim());
                pixels.zip_mut_with(&values.view().permuted_axes([0, 2, 3, 1]), |pixel, x| *pixel = quantize(*x));
                pixels
            }
            Pixels::U8(values) => values.clone(),
        }
    }

    /// One image per picture: grey, grey with alpha, RGB or RGBA for 1 to 4 channels. More channels become one tall
    /// grey image, one channel below the other.
    pub fn to_images(&self) -> Vec<DynamicImage> {
        self.to_u8().outer_iter().map(image).collect()
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

fn image(pixels: ArrayView3<'_, u8>) -> DynamicImage {
    const FITS: &str = "the buffer has the size of the array";
    let (height, width, channels) = pixels.dim();
    let (w, h) = (width as u32, height as u32);
    let interleaved = || pixels.iter().copied().collect::<Vec<u8>>();
    match channels {
        1 => GrayImage::from_raw(w, h, interleaved()).expect(FITS).into(),
        2 => GrayAlphaImage::from_raw(w, h, interleaved()).expect(FITS).into(),
        3 => RgbImage::from_raw(w, h, interleaved()).expect(FITS).into(),
        4 => RgbaImage::from_raw(w, h, interleaved()).expect(FITS).into(),
        _ => {
            let planes = pixels.permuted_axes([2, 0, 1]).iter().copied().collect();
            GrayImage::from_raw(w, h * channels as u32, planes).expect(FITS).into()
        }
    }
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
}
