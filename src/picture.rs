//! What a person looks at: grids of samples, panels of grids with captions, PNG files.

use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Context, Result};
use font8x8::UnicodeFonts;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, replace};
use image::{ImageFormat, Rgb, RgbImage};
use ndarray::{Array4, ArrayView3, Axis};

use crate::aside::write_aside;

const WHITE: Rgb<u8> = Rgb([255; 3]);
const BLACK: Rgb<u8> = Rgb([0; 3]);
/// A value that is no number must be seen, not hidden.
const MAGENTA: Rgb<u8> = Rgb([255, 0, 255]);
/// White pixels between and around the pictures of a grid.
const GAP: u32 = 2;
/// White pixels between the grids of a panel, and around all of it.
const MARGIN: u32 = 12;
/// Side of a letter, before it is enlarged.
const LETTER: u32 = 8;

/// Pictures `[N, C, H, W]` in `[-1, 1]`, row by row, each pixel `scale` pixels wide. One channel (or two) gives grey,
/// three and more show the first three as red, green, blue.
pub fn grid(images: &Array4<f32>, columns: usize, scale: u32) -> RgbImage {
    let (n, _, height, width) = images.dim();
    let (columns, scale) = (columns.max(1), scale.max(1));
    let (cell_h, cell_w) = (height as u32 * scale + GAP, width as u32 * scale + GAP);
    let n_rows = n.div_ceil(columns) as u32;
    let mut canvas = RgbImage::from_pixel(columns as u32 * cell_w + GAP, n_rows * cell_h + GAP, WHITE);
    for (index, image) in images.axis_iter(Axis(0)).enumerate() {
        let (left, top) = ((index % columns) as u32 * cell_w + GAP, (index / columns) as u32 * cell_h + GAP);
        let picture = RgbImage::from_fn(width as u32 * scale, height as u32 * scale, |x, y| {
            pixel(&image, (y / scale) as usize, (x / scale) as usize)
        });
        replace(&mut canvas, &picture, left.into(), top.into());
    }
    canvas
}

/// A grid with a caption under each picture: the captions in turn, in letters of 8 pixels, cut where they are too long.
pub fn captioned(images: &Array4<f32>, captions: &[String], columns: usize, scale: u32) -> RgbImage {
    let (n, _, height, width) = images.dim();
    let (columns, scale) = (columns.max(1), scale.max(1));
    let (cell_h, cell_w) = (height as u32 * scale, width as u32 * scale);
    let letters = (cell_w / LETTER).max(1) as usize;
    let lines: Vec<Vec<String>> = captions.iter().map(|caption| wrapped(caption, letters)).collect();
    let line = LETTER + 2;
    let below = GAP + line * lines.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let (step_h, step_w) = (cell_h + below + GAP, cell_w + GAP);
    let rows = n.div_ceil(columns) as u32;
    let mut canvas = RgbImage::from_pixel(columns as u32 * step_w + GAP, rows * step_h + GAP, WHITE);
    for (index, image) in images.axis_iter(Axis(0)).enumerate() {
        let (left, top) = ((index % columns) as u32 * step_w + GAP, (index / columns) as u32 * step_h + GAP);
        let picture = grid(&image.insert_axis(Axis(0)).to_owned(), 1, scale);
        let picture = imageops::crop_imm(&picture, GAP, GAP, cell_w, cell_h).to_image();
        replace(&mut canvas, &picture, left.into(), top.into());
        for (i, text) in lines[index % lines.len().max(1)..].iter().take(1).flatten().enumerate() {
            write_text(&mut canvas, text, left, top + cell_h + GAP + i as u32 * line, 1);
        }
    }
    canvas
}

/// A caption in at most three lines of so many letters, broken between words where it can be.
fn wrapped(caption: &str, letters: usize) -> Vec<String> {
    const LINES: usize = 3;
    let mut lines: Vec<String> = vec![String::new()];
    for word in caption.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        let last = lines.last().map_or(0, |line| line.chars().count());
        if last > 0 && last + 1 + word.len() > letters {
            lines.push(String::new());
        }
        while let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            let room = letters.saturating_sub(line.chars().count()).min(word.len());
            line.extend(word.drain(..room));
            if word.is_empty() || lines.len() > LINES {
                break;
            }
            lines.push(String::new());
        }
        if lines.len() > LINES {
            break;
        }
    }
    if lines.len() > LINES {
        lines.truncate(LINES);
        if let Some(line) = lines.last_mut() {
            let kept: String = line.chars().take(letters.saturating_sub(2)).collect();
            *line = kept + "..";
        }
    }
    lines
}

/// One picture `[C, H, W]` in `[-1, 1]`, as large as it is.
pub fn single(image: &ArrayView3<f32>) -> RgbImage {
    let (_, height, width) = image.dim();
    RgbImage::from_fn(width as u32, height as u32, |x, y| pixel(image, y as usize, x as usize))
}

/// A number of columns that makes a grid of `n` nearly square: without holes where a factor of `n` is near its root.
pub fn columns(n: usize) -> usize {
    let root = (1..=n).find(|root| root * root >= n).unwrap_or(1);
    (root..=root + root / 2).find(|columns| n.is_multiple_of(*columns)).unwrap_or(root)
}

/// Grids side by side, each under its caption (lines are parted by `\n`). Letters are 16 pixels tall where all captions
/// fit over their grids so, else 8.
pub fn labelled_panel(panels: &[(&str, RgbImage)]) -> RgbImage {
    let caption_width =
        |caption: &str| LETTER * caption.lines().map(|line| line.chars().count()).max().unwrap_or(0) as u32;
    let fits = panels.iter().all(|(caption, image)| 2 * caption_width(caption) <= image.width());
    let scale = if fits { 2 } else { 1 };
    let n_lines = panels.iter().map(|(caption, _)| caption.lines().count()).max().unwrap_or(0) as u32;
    let line_height = (LETTER + 2) * scale;
    let widths: Vec<u32> =
        panels.iter().map(|(caption, image)| image.width().max(scale * caption_width(caption))).collect();
    let top = MARGIN + n_lines * line_height + if n_lines > 0 { MARGIN / 2 } else { 0 };
    let height = top + panels.iter().map(|(_, image)| image.height()).max().unwrap_or(0) + MARGIN;
    let width = MARGIN + widths.iter().map(|width| width + MARGIN).sum::<u32>();

    let mut canvas = RgbImage::from_pixel(width, height, WHITE);
    let mut left = MARGIN;
    for ((caption, image), width) in panels.iter().zip(widths) {
        for (line, text) in caption.lines().enumerate() {
            write_text(&mut canvas, text, left + GAP, MARGIN + line as u32 * line_height, scale);
        }
        replace(&mut canvas, image, left.into(), top.into());
        left += width + MARGIN;
    }
    canvas
}

/// Pictures in rows and columns, a name above each column and before each row. All columns are as wide as the widest
/// picture.
pub fn labelled_table(columns: &[String], rows: &[(&str, Vec<RgbImage>)]) -> RgbImage {
    let (line, gap) = (2 * LETTER, MARGIN / 2);
    let side = 2 * LETTER * rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) as u32 + MARGIN;
    let cell = rows.iter().flat_map(|(_, pictures)| pictures).map(RgbImage::width).max().unwrap_or(0);
    let heights: Vec<u32> =
        rows.iter().map(|(_, pictures)| pictures.iter().map(RgbImage::height).max().unwrap_or(line)).collect();
    let width = MARGIN + side + columns.len() as u32 * (cell + gap) + MARGIN - gap.min(MARGIN);
    let height = 2 * MARGIN + line + gap + heights.iter().map(|height| height + gap).sum::<u32>() - gap;
    let mut canvas = RgbImage::from_pixel(width, height, WHITE);
    let left = |column: usize| MARGIN + side + column as u32 * (cell + gap);
    for (column, name) in columns.iter().enumerate() {
        write_text(&mut canvas, name, left(column) + GAP, MARGIN, 2);
    }
    let mut top = MARGIN + line + gap;
    for ((name, pictures), height) in rows.iter().zip(heights) {
        write_text(&mut canvas, name, MARGIN, top + height.saturating_sub(line) / 2, 2);
        for (column, picture) in pictures.iter().enumerate() {
            replace(&mut canvas, picture, left(column).into(), top.into());
        }
        top += height + gap;
    }
    canvas
}

/// Writes a picture in the format that its name asks for, whole or not at all.
pub fn save(path: &Path, image: &RgbImage) -> Result<()> {
    /// As photos are kept; the encoder's own is 75.
    const JPEG_QUALITY: u8 = 95;
    let mut bytes = Cursor::new(Vec::new());
    match format(path)? {
        ImageFormat::Jpeg => JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode_image(image)?,
        format => image.write_to(&mut bytes, format)?,
    }
    write_aside(path, |file| Ok(file.write_all(bytes.get_ref())?))
}

/// The format that a name asks for; PNG without an ending.
pub fn format(path: &Path) -> Result<ImageFormat> {
    let Some(ending) = path.extension() else { return Ok(ImageFormat::Png) };
    let format = ImageFormat::from_extension(ending).filter(|format| WRITTEN.contains(format));
    format
        .with_context(|| format!("{}: pictures are written as .png, .jpg, .webp, .bmp, .gif or .tiff", path.display()))
}

const WRITTEN: [ImageFormat; 6] =
    [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Gif, ImageFormat::Tiff];

/// The bytes of a PNG.
pub fn png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    image.write_to(&mut png, ImageFormat::Png)?;
    Ok(png.into_inner())
}

/// `floor(clamp(127.5 x + 128, 0, 255))`, as EDM writes its samples; the inverse of `x / 127.5 - 1` for every byte.
pub fn to_byte(x: f32) -> u8 {
    (x * 127.5 + 128.0).clamp(0.0, 255.0) as u8
}

fn pixel(image: &ArrayView3<f32>, y: usize, x: usize) -> Rgb<u8> {
    let n_channels = image.dim().0;
    let values = [0, 1, 2].map(|channel| if n_channels < 3 { image[[0, y, x]] } else { image[[channel, y, x]] });
    if values.iter().any(|value| value.is_nan()) { MAGENTA } else { Rgb(values.map(to_byte)) }
}

fn write_text(canvas: &mut RgbImage, text: &str, left: u32, top: u32, scale: u32) {
    for (index, letter) in text.chars().enumerate() {
        let rows = font8x8::BASIC_FONTS.get(letter).or_else(|| font8x8::LATIN_FONTS.get(letter));
        // The lowest bit is the leftmost pixel. A letter that the font lacks is a box.
        let rows = rows.unwrap_or([0, 126, 66, 66, 66, 66, 126, 0]);
        for (x, y) in (0..LETTER * scale).flat_map(|x| (0..LETTER * scale).map(move |y| (x, y))) {
            if rows[(y / scale) as usize] >> (x / scale) & 1 == 1 {
                let place = (left + index as u32 * LETTER * scale + x, top + y);
                canvas.get_pixel_mut_checked(place.0, place.1).into_iter().for_each(|pixel| *pixel = BLACK);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_way_to_floats_and_back() {
        for byte in 0..=255_u8 {
            assert_eq!(to_byte(f32::from(byte) / 127.5 - 1.0), byte);
        }
        assert_eq!([-9.0, f32::INFINITY, f32::NEG_INFINITY].map(to_byte), [0, 255, 0]);
    }

    #[test]
    fn grid_places_pictures_row_by_row_and_enlarges_them() {
        let images = Array4::from_shape_fn((3, 3, 2, 2), |(n, c, _, _)| if n == c { 1.0 } else { -1.0 });
        let grid = grid(&images, 2, 3);
        assert_eq!(grid.dimensions(), (2 + 2 * 8, 2 + 2 * 8));
        let at = |x, y| grid.get_pixel(x, y).0;
        assert_eq!(at(2, 2), [255, 0, 0]);
        assert_eq!(at(7, 7), [255, 0, 0]);
        assert_eq!(at(8, 2), [255; 3], "the gap is white");
        assert_eq!(at(10, 2), [0, 255, 0]);
        assert_eq!(at(2, 10), [0, 0, 255]);
        assert_eq!(at(12, 12), [255; 3], "an empty place is white");
    }

    #[test]
    fn grid_shows_grey_as_grey_and_nan_as_magenta() {
        let grid = grid(&ndarray::array![[[[0.0, f32::NAN]]]], 1, 1);
        assert_eq!(grid.get_pixel(2, 2).0, [128; 3]);
        assert_eq!(grid.get_pixel(3, 2).0, [255, 0, 255]);
        assert_eq!(super::grid(&Array4::zeros((0, 3, 4, 4)), columns(0), 1).dimensions(), (8, 2));
    }

    #[test]
    fn columns_are_near_square() {
        let expected =
            [(0, 1), (1, 1), (2, 2), (3, 3), (4, 2), (7, 3), (8, 4), (10, 5), (12, 4), (16, 4), (49, 7), (64, 8)];
        for (n, n_columns) in expected {
            assert_eq!(columns(n), n_columns, "for {n} pictures");
        }
    }

    #[test]
    fn panel_holds_captions_above_whole_grids() {
        let dark = || RgbImage::from_pixel(40, 20, BLACK);
        let panel = labelled_panel(&[("teacher\n18 steps × 2", dark()), ("ü→", dark())]);
        // The first caption is wider than its grid: 12 letters of 8 pixels.
        assert_eq!(panel.dimensions(), (12 + 96 + 12 + 40 + 12, 12 + 20 + 6 + 20 + 12));
        let n_black = |left: u32, top: u32, width: u32, height: u32| {
            let inside = (left..left + width).flat_map(|x| (top..top + height).map(move |y| (x, y)));
            inside.filter(|&(x, y)| *panel.get_pixel(x, y) == BLACK).count()
        };
        assert_eq!(n_black(12, 38, 40, 20), 800);
        assert_eq!(n_black(120, 38, 40, 20), 800);
        assert!(n_black(12, 12, 96, 10) > 50 && n_black(12, 22, 96, 10) > 50 && n_black(120, 12, 40, 10) > 20);
        assert_eq!(labelled_panel(&[]).dimensions(), (12, 24));
    }

    #[test]
    fn a_table_has_its_pictures_in_place_and_its_names_beside_them() {
        let dark = || RgbImage::from_pixel(40, 20, BLACK);
        let table = labelled_table(&["a".into(), "b".into()], &[("x", vec![dark(), dark()]), ("yy", vec![dark()])]);
        let (side, top) = (12 + 2 * 16 + 12, 12 + 16 + 6);
        assert_eq!(table.dimensions(), (side + 2 * 40 + 6 + 12, top + 20 + 6 + 20 + 12));
        let n_black = |left: u32, top: u32, width: u32, height: u32| {
            let inside = (left..left + width).flat_map(|x| (top..top + height).map(move |y| (x, y)));
            inside.filter(|&(x, y)| *table.get_pixel(x, y) == BLACK).count()
        };
        assert_eq!([n_black(side, top, 40, 20), n_black(side + 46, top, 40, 20)], [800; 2]);
        assert_eq!([n_black(side, top + 26, 40, 20), n_black(side + 46, top + 26, 40, 20)], [800, 0]);
        assert!(n_black(side, 12, 40, 16) > 20 && n_black(side + 46, 12, 40, 16) > 20 && n_black(12, top, 40, 20) > 20);
    }

    #[test]
    fn a_picture_is_written_as_its_name_says_and_an_error_names_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let image = RgbImage::from_fn(5, 4, |x, y| Rgb([x as u8, y as u8, 200]));
        let path = folder.path().join("a.png");
        save(&path, &image).unwrap();
        assert_eq!(image::open(&path).unwrap().into_rgb8(), image);
        for (name, begins) in [
            ("b.JPG", &b"\xff\xd8"[..]),
            ("c.webp", b"RIFF"),
            ("d.bmp", b"BM"),
            ("e", b"\x89PNG"),
            ("f.tif", b"II*"),
            ("g.gif", b"GIF8"),
        ] {
            let path = folder.path().join(name);
            save(&path, &image).unwrap();
            assert!(std::fs::read(&path).unwrap().starts_with(begins), "{name}");
        }
        let error = save(Path::new("a.xyz"), &image).unwrap_err().to_string();
        assert!(error.starts_with("a.xyz: pictures are written as .png, .jpg"), "{error}");
        let error = save(&folder.path().join("no/such/a.png"), &image).unwrap_err();
        assert!(format!("{error:#}").contains("a.png: cannot write"), "{error:#}");
    }
}
