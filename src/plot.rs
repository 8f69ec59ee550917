//! Everything that is drawn: three times as large as shown and reduced, so that edges are smooth. Here too are plots with
//! axes; the lab's `plane::figure` draws without.

use anyhow::{Result, anyhow};
use image::imageops::{FilterType, crop_imm, replace, resize};
use image::{Rgb, RgbImage};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use std::fmt::Write;
use std::ops::Range;

use crate::picture::labelled_panel;

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

/// A plot as lines and words in pixels, from the left and from the top, which are painted or written.
pub struct Chart {
    size: [u32; 2],
    lines: Vec<(Vec<[f64; 2]>, RGBColor, u32)>,
    words: Vec<(String, [u32; 2], Side)>,
}

/// Where words stand beside their point.
#[derive(Clone, Copy)]
enum Side {
    Before,
    Under,
    After,
}

/// Colours of a chart's curves, in turn.
const CURVES: [RGBColor; 6] =
    [INK, SECOND_INK, RGBColor(40, 140, 70), RGBColor(130, 60, 160), RGBColor(190, 140, 0), RGBColor(90, 90, 90)];

/// How long calls took: for each name and its times in milliseconds, the share of calls that took at most so long, over a
/// logarithmic axis of time. `None` where there is no time above zero.
pub fn spread(curves: &[(String, Vec<f64>)]) -> Option<Chart> {
    const WIDTH: u32 = 640;
    const ROW: u32 = 26;
    let [left, top, right, below] = ROOM;
    let logs = || curves.iter().flat_map(|(_, times)| times).filter(|ms| **ms > 0.0).map(|ms| ms.log10());
    let (fastest, slowest) = (logs().reduce(f64::min)?, logs().reduce(f64::max)?);
    // A tenth of what lies between, or a hundredth of the time itself.
    let margin = (0.05 * (slowest - fastest)).max(0.005);
    let (from, to) = (fastest - margin, slowest + margin);
    let across = |log: f64| f64::from(left) + (log - from) / (to - from) * f64::from(WIDTH);
    let down = |share: f64| f64::from(top) + (1.0 - share) * f64::from(SIDE);
    let (floor, ceiling) = (down(0.0), down(1.0));
    let (mut lines, mut words) = (Vec::new(), vec![("ms".into(), [left + WIDTH / 2, top + SIDE + ROW], Side::Under)]);
    let pale = RGBColor(225, 227, 230);
    for step in 0..=4 {
        let log = from + (to - from) * f64::from(step) / 4.0;
        lines.push((vec![[across(log), floor], [across(log), ceiling]], pale, 1));
        words.push((significant(10f64.powf(log)), [across(log) as u32, top + SIDE], Side::Under));
    }
    for percent in [0, 25, 50, 75, 90, 100] {
        let y = down(f64::from(percent) / 100.0);
        lines.push((vec![[f64::from(left), y], [f64::from(left + WIDTH), y]], pale, 1));
        words.push((format!("{percent}%"), [left, y as u32], Side::Before));
    }
    for (row, (name, times)) in curves.iter().enumerate() {
        let mut times = times.clone();
        times.sort_by(f64::total_cmp);
        let n = times.len() as f64;
        let steps = times
            .iter()
            .filter(|ms| **ms > 0.0)
            .enumerate()
            .flat_map(|(i, ms)| [i as f64, i as f64 + 1.0].map(|below| [across(ms.log10()), down(below / n)]));
        let (colour, y) = (CURVES[row % CURVES.len()], top + SIDE + below + ROW * row as u32 + ROW / 2);
        lines.push((steps.collect(), colour, 2));
        lines.push((vec![[f64::from(left), f64::from(y)], [f64::from(left) + 30.0, f64::from(y)]], colour, 2));
        words.push((name.clone(), [left + 30, y], Side::After));
    }
    let height = top + SIDE + below + ROW * curves.len() as u32 + GAP;
    Some(Chart { size: [left + WIDTH + right, height], lines, words })
}

/// With three digits that count.
fn significant(x: f64) -> String {
    let decimals = (2 - x.log10().floor() as i32).clamp(0, 6) as usize;
    format!("{x:.decimals$}")
}

impl Chart {
    /// Painted, words in letters of 16 pixels.
    pub fn painted(&self) -> Result<RgbImage> {
        let [width, height] = self.size.map(f64::from);
        let mut canvas = draw(paper(self.size), [0.0..width, 0.0..height], |area| {
            self.lines.iter().try_for_each(|(line, colour, wide)| {
                let upwards: Vec<_> = line.iter().map(|[x, y]| (*x, height - y)).collect();
                area.draw(&PathElement::new(upwards, colour.stroke_width(wide * OVERSIZE)))
            })
        })?;
        for (text, [x, y], side) in self.words.iter().filter(|(text, ..)| !text.trim().is_empty()) {
            let picture = words(text);
            let (half_width, half_height) = (picture.width() / 2, picture.height() / 2);
            let corner = match side {
                Side::Before => [x.saturating_sub(GAP + picture.width()), y.saturating_sub(half_height)],
                Side::Under => [x.saturating_sub(half_width), y + GAP],
                Side::After => [x + GAP, y.saturating_sub(half_height)],
            };
            place(&mut canvas, &picture, corner);
        }
        Ok(canvas)
    }

    /// As an SVG.
    pub fn svg(&self) -> String {
        let [width, height] = self.size;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
             font-size=\"15\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#f7f8fa\"/>\n"
        );
        for (line, RGBColor(r, g, b), wide) in &self.lines {
            let points: Vec<String> = line.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
            let points = points.join(" ");
            let style = format!("fill=\"none\" stroke=\"#{r:02x}{g:02x}{b:02x}\" stroke-width=\"{wide}\"");
            // Writing to a String cannot fail.
            let _ = writeln!(svg, "<polyline points=\"{points}\" {style}/>");
        }
        for (text, [x, y], side) in &self.words {
            let (x, y, anchor) = match side {
                Side::Before => (x.saturating_sub(GAP), y + 5, "end"),
                Side::Under => (*x, y + GAP + 12, "middle"),
                Side::After => (x + GAP, y + 5, "start"),
            };
            let text = text.replace('&', "&amp;").replace('<', "&lt;");
            let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{text}</text>");
        }
        svg + "</svg>\n"
    }
}

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
    fn a_curve_rises_from_no_call_at_the_fastest_to_all_at_the_slowest() {
        let chart = spread(&[("a <b>".into(), vec![4.0, 1.0]), ("c".into(), vec![2.0])]).unwrap();
        let curve = &chart.lines.iter().find(|(line, colour, _)| *colour == INK && line.len() == 4).unwrap().0;
        let [left, top, ..] = ROOM.map(f64::from);
        let side = f64::from(SIDE);
        // From 1 ms to 4 ms is all but a twentieth at each end of 1.1 times that.
        let ends = [left + 640.0 * 0.05 / 1.1, left + 640.0 * 1.05 / 1.1];
        let expected =
            [[ends[0], top + side], [ends[0], top + side / 2.0], [ends[1], top + side / 2.0], [ends[1], top]];
        for (found, expected) in curve.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-9, "{curve:?}");
        }
        let svg = chart.svg();
        assert!(svg.contains(">a &lt;b></text>") && svg.contains("stroke=\"#c84214\"") && svg.ends_with("</svg>\n"));
        let painted = chart.painted().unwrap();
        assert_eq!([painted.width(), painted.height()], chart.size);
        let [r, _, b] = painted.get_pixel(ends[0] as u32, (top + 0.75 * side) as u32).0;
        assert!(r > 180 && b < 60, "the first step is drawn: {r} {b}");
        assert!(spread(&[("none".into(), vec![])]).is_none());
        assert_eq!([0.012345, 1.0, 23.45, 1234.5].map(significant), ["0.0123", "1.00", "23.4", "1234"]);
    }

    #[test]
    fn times_that_do_not_grow_stay_in_the_plane() {
        let plot = growth(&[(2.0, 10.0), (4.0, 8.0), (8.0, 9.0)], "samples").unwrap();
        let lowest = plot.enumerate_pixels().filter(|(_, _, p)| p.0[0] > 180 && p.0[2] < 60).map(|(_, y, _)| y).max();
        assert!(lowest.is_some_and(|y| y < ROOM[1] + SIDE), "{lowest:?}");
    }
}
