//! Everything that is drawn: three times as large as shown and reduced, so that edges are smooth. Here too are plots with
//! axes; `plane::figure` draws without.

use anyhow::{Result, anyhow};
use dmd::picture::labelled_panel;
use image::imageops::{FilterType, crop_imm, replace, resize};
use image::{Rgb, RgbImage};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use std::ops::Range;

/// How much larger a picture is drawn than shown.
pub const OVERSIZE: u32 = 3;

pub const PAPER: RGBColor = RGBColor(247, 248, 250);
pub const INK: RGBColor = RGBColor(200, 66, 20);
pub const SECOND_INK: RGBColor = RGBColor(30, 100, 180);

/// What a picture that is shown at this width and height is drawn on.
pub fn paper([width, height]: [u32; 2]) -> RgbImage {
    RgbImage::from_pixel(width * OVERSIZE, height * OVERSIZE, Rgb([PAPER.0, PAPER.1, PAPER.2]))
}

pub type Area<'a> = DrawingArea<BitMapBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
pub type DrawError<'a> = DrawingAreaErrorKind<<BitMapBackend<'a> as DrawingBackend>::ErrorType>;

/// Draws on an oversize background in the coordinates of these two ranges, upwards, and reduces it.
pub fn draw(
    mut background: RgbImage,
    [x, y]: [Range<f64>; 2],
    f: impl for<'a> FnOnce(&Area<'a>) -> std::result::Result<(), DrawError<'a>>,
) -> Result<RgbImage> {
    let (width, height) = background.dimensions();
    {
        let area = BitMapBackend::with_buffer(&mut background, (width, height)).into_drawing_area();
        let coordinates = Cartesian2d::new(x, y, (0..width as i32, height as i32..0));
        let area = area.apply_coord_spec(coordinates);
        f(&area).map_err(|error| anyhow!("the picture cannot be drawn: {error}"))?;
        area.present().map_err(|error| anyhow!("the picture cannot be drawn: {error}"))?;
    }
    Ok(resize(&background, width / OVERSIZE, height / OVERSIZE, FilterType::Triangle))
}

/// Side of a plot's plane, in pixels.
const SIDE: u32 = 480;
/// Room for words left of the plane, above it, right of it and below it.
const ROOM: [u32; 4] = [96, 28, 36, 56];
/// Between words and what they belong to.
const GAP: u32 = 10;

/// Milliseconds against something that grows, both axes logarithmic, a decade as wide as high; the pale line is growth in
/// proportion from the first one.
pub fn growth(points: &[(f64, f64)], x_axis: &str) -> Result<RgbImage> {
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.log10(), y.log10())).collect();
    let (first, last) = (logs[0], logs[logs.len() - 1]);
    let ends = |(low, high): (f64, f64), (_, y): &(f64, f64)| (y.min(low), y.max(high));
    let (lowest, highest) = logs.iter().fold((first.1, first.1), ends);
    let extent = (last.0 - first.0).max(highest - lowest);
    const MARGIN: f64 = 0.15;
    let range = |from: f64| from - MARGIN..from + extent + MARGIN;
    let plane = Plane { right: range(first.0), up: range(lowest) };

    let heights: Vec<f64> = (-3..7)
        .flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)))
        .filter(|height| plane.up.contains(&height.log10()))
        .collect();
    let across = heights.iter().map(|y| vec![(plane.right.start, y.log10()), (plane.right.end, y.log10())]);
    let upright = logs.iter().map(|(x, _)| vec![(*x, plane.up.start), (*x, plane.up.end)]);
    let grid = across.chain(upright).map(|line| (line, BLACK.mix(0.12).stroke_width(2)));
    let legend = |row: f64| [0.03, 0.09].map(|share| plane.at(share, 0.05 + 0.06 * row)).to_vec();
    let (measured, pale) = (INK.stroke_width(6), SECOND_INK.mix(0.35).stroke_width(4));
    let proportion = vec![first, (first.0 + extent, first.1 + extent)];
    let lines = [(proportion, pale), (logs.clone(), measured), (legend(0.0), measured), (legend(1.0), pale)];
    let drawn = plane.draw(&grid.chain(lines).collect::<Vec<_>>(), &logs)?;

    let [left, top, right, below] = ROOM;
    let mut canvas = RgbImage::from_pixel(left + SIDE + right, top + SIDE + below, Rgb([255; 3]));
    replace(&mut canvas, &drawn, left.into(), top.into());
    // Words with a point at their right end, under their middle, or at their left end.
    let before = |words: &RgbImage, [x, y]: [u32; 2]| [x.saturating_sub(GAP + words.width()), y - words.height() / 2];
    let under = |words: &RgbImage, [x, _]: [u32; 2], row: u32| [x - words.width() / 2, top + SIDE + GAP + 26 * row];
    let after = |words: &RgbImage, [x, y]: [u32; 2]| [x + GAP, y - words.height() / 2];
    let on_canvas = |point| std::array::from_fn(|i| [left, top][i] + plane.pixel(point)[i]);
    for y in &heights {
        let tick = words(&y.to_string());
        place(&mut canvas, &tick, before(&tick, on_canvas((plane.right.start, y.log10()))));
    }
    for (x, log) in points.iter().map(|(x, _)| x).zip(&logs) {
        let tick = words(&x.to_string());
        place(&mut canvas, &tick, under(&tick, on_canvas(*log), 0));
    }
    for (row, name) in ["measured", "in proportion"].into_iter().enumerate() {
        let name = words(name);
        place(&mut canvas, &name, after(&name, on_canvas(legend(row as f64)[1])));
    }
    let (unit, axis) = (words("ms"), words(x_axis));
    place(&mut canvas, &unit, before(&unit, [left, top / 2]));
    place(&mut canvas, &axis, under(&axis, [left + SIDE / 2, 0], 1));
    Ok(canvas)
}

/// The logarithms that a plot shows, to the right and up.
struct Plane {
    right: Range<f64>,
    up: Range<f64>,
}

impl Plane {
    /// Lines and, in ink, dots.
    fn draw(&self, lines: &[(Vec<(f64, f64)>, ShapeStyle)], dots: &[(f64, f64)]) -> Result<RgbImage> {
        draw(paper([SIDE; 2]), [self.right.clone(), self.up.clone()], |area| {
            lines.iter().try_for_each(|(line, style)| area.draw(&PathElement::new(line.clone(), *style)))?;
            dots.iter().try_for_each(|dot| area.draw(&Circle::new(*dot, 14, INK.filled())))
        })
    }

    /// The point at these shares of the way from the left and from the top.
    fn at(&self, from_left: f64, from_top: f64) -> (f64, f64) {
        let Plane { right, up } = self;
        (right.start + from_left * (right.end - right.start), up.end - from_top * (up.end - up.start))
    }

    /// Where a point lies, from the left and from the top.
    fn pixel(&self, (x, y): (f64, f64)) -> [u32; 2] {
        let share = |range: &Range<f64>, at: f64| (at - range.start) / (range.end - range.start);
        [share(&self.right, x), 1.0 - share(&self.up, y)].map(|share| (share * f64::from(SIDE)).round() as u32)
    }
}

/// Words as a picture of their own, cut to their letters of 16 pixels.
fn words(text: &str) -> RgbImage {
    let panel = labelled_panel(&[(text, RgbImage::new(16 * text.chars().count() as u32, 0))]);
    let dark = || panel.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] < 128);
    let ends = |at: fn((u32, u32, &Rgb<u8>)) -> u32| dark().map(at).min().zip(dark().map(at).max()).unwrap_or((0, 0));
    let ((left, right), (top, bottom)) = (ends(|(x, _, _)| x), ends(|(_, y, _)| y));
    crop_imm(&panel, left, top, right + 1 - left, bottom + 1 - top).to_image()
}

/// Puts the letters, without the paper around them, where this is their left upper corner.
fn place(canvas: &mut RgbImage, words: &RgbImage, [left, top]: [u32; 2]) {
    for (x, y, letter) in words.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] < 128) {
        canvas.get_pixel_mut_checked(left + x, top + y).into_iter().for_each(|pixel| *pixel = *letter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_its_points_where_its_ticks_say() {
        let plot = growth(&[(2.0, 10.0), (4.0, 20.0), (8.0, 40.0)], "samples").unwrap();
        let [left, top, right, below] = ROOM;
        assert_eq!(plot.dimensions(), (left + SIDE + right, top + SIDE + below));
        // The middle point lies in the middle of the plane.
        let middle = [left + SIDE / 2, top + SIDE / 2];
        let [r, _, b] = plot.get_pixel(middle[0], middle[1]).0;
        assert!(r > 180 && b < 60, "{:?}", plot.get_pixel(middle[0], middle[1]));
        let n_black = |left: u32, top: u32, width: u32, height: u32| {
            let inside = (left..left + width).flat_map(|x| (top..top + height).map(move |y| (x, y)));
            inside.filter(|&(x, y)| plot.get_pixel(x, y).0 == [0; 3]).count()
        };
        assert!(n_black(middle[0] - 8, top + SIDE + GAP, 16, 16) > 40, "4 is written below it");
        assert!(n_black(left - GAP - 32, middle[1] - 8, 32, 16) > 80, "20 is written left of it");
        assert_eq!(n_black(0, middle[1] - 8, left - GAP - 32, 16), 0);
    }

    #[test]
    fn times_that_do_not_grow_stay_in_the_plane() {
        let plot = growth(&[(2.0, 10.0), (4.0, 8.0), (8.0, 9.0)], "samples").unwrap();
        let lowest = plot.enumerate_pixels().filter(|(_, _, p)| p.0[0] > 180 && p.0[2] < 60).map(|(_, y, _)| y).max();
        assert!(lowest.is_some_and(|y| y < ROOM[1] + SIDE), "{lowest:?}");
    }
}
