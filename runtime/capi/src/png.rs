//! Pictures as PNG files.

use png::{BitDepth, ColorType, Encoder};

use crate::memory;
use crate::status::{Failure, Status, bad_argument, border};

/// Writes the PNG file of one picture, bytes `(height, width, channels)` with 1 to 4 channels: grey, grey with alpha, RGB or
/// RGBA, as `dmd_generate_u8` and `dmd_generate_rgba` give them. A buffer of `height * width * channels + height + 1024`
/// bytes is nearly always enough.
///
/// # Safety
///
/// `pixels` is null or points to so many bytes, `buffer` is null or room for `size` bytes, `needed` null or room for a
/// number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_png(
    pixels: *const u8,
    height: u32,
    width: u32,
    channels: u32,
    buffer: *mut u8,
    size: usize,
    needed: *mut usize,
) -> Status {
    border(|| {
        let colours = match channels {
            1 => ColorType::Grayscale,
            2 => ColorType::GrayscaleAlpha,
            3 => ColorType::Rgb,
            4 => ColorType::Rgba,
            _ => return bad_argument(format!("a PNG has 1 to 4 channels, found {channels}")),
        };
        let bytes = [height, width, channels].iter().try_fold(1usize, |n, side| n.checked_mul(*side as usize));
        let Some(bytes @ 1..) = bytes else {
            return bad_argument(format!("there is no picture of {height} x {width} pixels"));
        };
        // SAFETY: as the caller's.
        let pixels = unsafe { memory::slice(pixels, bytes, "pixels")? };
        let written = encode(pixels, width, height, colours);
        let png = written
            .map_err(|error| Failure(Status::Other, format!("the picture cannot be written as PNG: {error}")))?;
        // SAFETY: as the caller's.
        unsafe { memory::give(&png, buffer, size, needed) }
    })
}

fn encode(pixels: &[u8], width: u32, height: u32, colours: ColorType) -> Result<Vec<u8>, png::EncodingError> {
    let mut png = Vec::new();
    let mut encoder = Encoder::new(&mut png, width, height);
    encoder.set_color(colours);
    encoder.set_depth(BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(png)
}
