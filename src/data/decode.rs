//! One picture: bytes of a file to `[C, H, W]` bytes of pixels.
//!
//! In this order: turn as EXIF says, flatten on white, (grey,) cut the centre, resize. Flattening comes before resizing,
//! because the colour behind transparent pixels is arbitrary and would bleed into the edges. Colour profiles are not
//! looked at: values are taken as sRGB and mixed as they are, as browsers do.

use std::io::Cursor;

use anyhow::{Context, Result, bail, ensure};
use image::imageops::FilterType;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use super::DataOptions;
use super::source::{ending, never_read};

/// Two bombs at a time must not fill a small machine: 16,384 pixels a side, 256 MiB a picture.
const MAX_SIDE: u32 = 16_384;
const MAX_DECODED_BYTES: u64 = 256 << 20;

/// Decodes a picture into `pixels`, `[C, H, W]` with the size and channels of `options`.
pub fn decode(name: &str, bytes: &[u8], options: &DataOptions, pixels: &mut [u8]) -> Result<()> {
    let image = flatten_on_white(read(name, bytes)?);
    let image = if options.grey { DynamicImage::ImageLuma8(image.to_luma8()) } else { image };
    let image = fit(image, options.size);
    let (height, width, channels) = (image.height() as usize, image.width() as usize, if options.grey { 1 } else { 3 });
    for (index, value) in image.as_bytes().iter().enumerate() {
        pixels[index % channels * height * width + index / channels] = *value;
    }
    Ok(())
}

/// The file's content says what it is; its name only where a format has no mark to know it by.
fn read(name: &str, bytes: &[u8]) -> Result<DynamicImage> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    if reader.format().is_none() && ending(name).as_deref() == Some("tga") {
        reader.set_format(ImageFormat::Tga);
    }
    // A raw photo may be a TIFF that holds a small preview: that is not the picture.
    ensure!(reader.format() != Some(ImageFormat::Tiff) || !never_read(name), "{}", not_read("a raw photo"));
    if !reader.format().is_some_and(|format| format.reading_enabled()) {
        let found = kind(bytes).or(reader.format().map(|format| format.extensions_str()[0]));
        bail!("{}", found.map_or("its content is no picture of a kind that is read".into(), not_read));
    }
    // The decoder fills what is missing with grey; the others notice by themselves.
    ensure!(
        reader.format() != Some(ImageFormat::Jpeg) || jpeg_has_end(bytes),
        "the JPEG is truncated: it has no end marker"
    );
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder()?;
    let n_bytes = decoder.total_bytes();
    ensure!(n_bytes <= MAX_DECODED_BYTES, "decoded it would take {n_bytes} bytes, the limit is {MAX_DECODED_BYTES}");
    let orientation = decoder.orientation().context("orientation")?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image)
}

fn not_read(kind: &str) -> String {
    match kind {
        "Git LFS" => "is a pointer of Git LFS and not the picture: fetch it with git lfs pull".into(),
        "HTML" => "is a web page and not the picture: the download failed".into(),
        kind => format!("its content is {kind}, which is not read here: convert it to PNG"),
    }
}

/// What a file is that is not read, by how it begins (at a byte, with this).
fn kind(bytes: &[u8]) -> Option<&'static str> {
    const KINDS: [(usize, &[u8], &str); 15] = [
        (4, b"ftypavi", "AVIF"),
        (4, b"ftyphe", "HEIC"),
        (4, b"ftypmif1", "HEIC"),
        (4, b"ftypmsf1", "HEIC"),
        (4, b"ftypcrx", "a raw photo"),
        (0, b"\xff\x0a", "JPEG XL"),
        (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
        (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
        (0, b"8BPS", "Photoshop's"),
        (0, b"gimp xcf", "GIMP's"),
        (0, b"<svg", "SVG"),
        (0, b"<?xml", "SVG"),
        (0, b"version https://git-lfs", "Git LFS"),
        (0, b"<!", "HTML"),
    ];
    let begins = |(at, mark, _): &&(usize, &[u8], &str)| bytes.get(*at..).is_some_and(|rest| rest.starts_with(mark));
    KINDS.iter().find(begins).map(|(.., kind)| *kind)
}

/// Whether the end marker (FF D9) comes after the first scan. It cannot stand within a scan, where FF is followed by 00 or
/// a restart; before the scan it may stand in a thumbnail, so that the segments there are stepped over by their length.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    let mut rest = bytes.get(2..).unwrap_or(&[]);
    while let [0xff, marker, high, low, ..] = *rest {
        if marker == START_OF_SCAN {
            return rest.windows(2).any(|pair| pair == [0xff, 0xd9]);
        }
        let is_padding = marker == 0xff;
        let n_bytes = if is_padding { 1 } else { 2 + usize::from(u16::from_be_bytes([high, low])) };
        rest = rest.get(n_bytes..).unwrap_or(&[]);
    }
    false
}

/// RGB with 8 bits. Transparent pixels are mixed with white in 16 bits and rounded once.
fn flatten_on_white(image: DynamicImage) -> DynamicImage {
    if !image.color().has_alpha() {
        return DynamicImage::ImageRgb8(image.into_rgb8());
    }
    const MAX: u64 = u16::MAX as u64;
    let image = image.into_rgba16();
    let mix = |value: u16, alpha: u16| {
        let on_white = u64::from(value) * u64::from(alpha) + MAX * (MAX - u64::from(alpha));
        ((on_white + MAX * 257 / 2) / (MAX * 257)) as u8
    };
    let flat = RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let [red, green, blue, alpha] = image.get_pixel(x, y).0;
        image::Rgb([mix(red, alpha), mix(green, alpha), mix(blue, alpha)])
    });
    DynamicImage::ImageRgb8(flat)
}

/// Cuts out the largest centred part of the wanted shape and resizes it. The same as resizing and then cropping, except
/// that a picture of one pixel by thousands costs nothing. Lanczos, with its support widened when the picture shrinks,
/// so that nothing aliases. A picture that has the size already passes untouched.
fn fit(image: DynamicImage, [height, width]: [usize; 2]) -> DynamicImage {
    let (h, w) = (image.height() as usize, image.width() as usize);
    if [h, w] == [height, width] {
        return image;
    }
    let rounded = |a: usize, b: usize, divisor: usize| ((a * b + divisor / 2) / divisor).max(1);
    let (crop_h, crop_w) = (h.min(rounded(w, height, width)), w.min(rounded(h, width, height)));
    let (top, left) = ((h - crop_h) / 2, (w - crop_w) / 2);
    let image = image.crop_imm(left as u32, top as u32, crop_w as u32, crop_h as u32);
    image.resize_exact(width as u32, height as u32, FilterType::Lanczos3)
}
