//! Pictures of the plane: samples over the data's density, and paths of two numbers. Words are written by `picture`.

use super::Point;
use super::mixture::Mixture;
use anyhow::Result;
use dmd::plot::{INK, OVERSIZE, PAPER, SECOND_INK, draw, paper};
use image::imageops::replace;
use image::{Rgb, RgbImage};
use plotters::prelude::*;
use std::ops::Range;

/// Width of a picture, in pixels.
const WIDTH: u32 = 320;
/// Height of a picture of paths.
const PATH_HEIGHT: u32 = 200;
/// The part of a path that is shown.
const PATH: Range<f64> = -1.0..1.1;
/// Colour of the highest density.
const DENSE: [f64; 3] = [92.0, 150.0, 205.0];

/// Samples as dots over the mixture's density: what lies within `extent` of the middle, right and up.
pub fn scatter(mixture: &Mixture, samples: &[Point], extent: [f64; 2]) -> Result<RgbImage> {
    let width = WIDTH * OVERSIZE;
    let height = (f64::from(WIDTH) * extent[1] / extent[0]).round() as u32 * OVERSIZE;
    let peak = mixture.log_density(mixture.means[0], 0.0);
    let place = |pixel: u32, of: u32, extent: f64| ((f64::from(pixel) + 0.5) / f64::from(of) * 2.0 - 1.0) * extent;
    let density = RgbImage::from_fn(width, height, |x, y| {
        let x = [place(x, width, extent[0]), -place(y, height, extent[1])];
        // The root brings out the flanks.
        let share = (0.5 * (mixture.log_density(x, 0.0) - peak)).exp().min(1.0);
        let mix = |paper: u8, dense: f64| (f64::from(paper) * (1.0 - share) + dense * share) as u8;
        Rgb([mix(PAPER.0, DENSE[0]), mix(PAPER.1, DENSE[1]), mix(PAPER.2, DENSE[2])])
    });
    // What lies outside would be drawn on the edge.
    let inside = |p: &&Point| p[0].abs() < extent[0] && p[1].abs() < extent[1];
    draw(density, extent.map(|e| -e..e), |plane| {
        for &[x, y] in samples.iter().filter(inside) {
            plane.draw(&Circle::new((x, y), 6, INK.mix(0.4).filled()))?;
        }
        Ok(())
    })
}

/// The two numbers of a path, red and blue, against the step, and where they should end as pale lines.
pub fn paths(path: &[[f64; 2]], targets: [f64; 2]) -> Result<RgbImage> {
    let last = path.len().max(1) as f64;
    draw(paper([WIDTH, PATH_HEIGHT]), [0.0..last, PATH], |plane| {
        plane.draw(&PathElement::new([(0.0, 0.0), (last, 0.0)], BLACK.mix(0.15).stroke_width(2)))?;
        for (i, ink) in [INK, SECOND_INK].into_iter().enumerate() {
            let target = [(0.0, targets[i]), (last, targets[i])];
            plane.draw(&PathElement::new(target, ink.mix(0.35).stroke_width(3)))?;
            let points: Vec<(f64, f64)> = path.iter().enumerate().map(|(step, v)| (step as f64, v[i])).collect();
            plane.draw(&PathElement::new(points, ink.stroke_width(6)))?;
        }
        Ok(())
    })
}

/// Pictures under each other, on white.
pub fn stack(rows: &[RgbImage]) -> RgbImage {
    let width = rows.iter().map(RgbImage::width).max().unwrap_or(0);
    let mut canvas = RgbImage::from_pixel(width, rows.iter().map(RgbImage::height).sum(), Rgb([255; 3]));
    let mut top = 0;
    for row in rows {
        replace(&mut canvas, row, 0, top);
        top += i64::from(row.height());
    }
    canvas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_red_where_it_lies_and_the_density_is_blue() {
        let mixture = Mixture { means: vec![[0.65, 0.65]], spread: 0.1 };
        let empty = scatter(&mixture, &[], [1.3, 1.3]).unwrap();
        let dotted = scatter(&mixture, &[[-0.65, 0.65]; 20], [1.3, 1.3]).unwrap();
        assert_eq!(empty.dimensions(), (320, 320));
        let blue = empty.get_pixel(240, 80).0;
        assert!(blue.iter().zip([92u8, 150, 205]).all(|(a, b)| a.abs_diff(b) <= 2), "{blue:?}");
        let [r, _, b] = dotted.get_pixel(80, 80).0;
        assert!(r > 180 && b < 60, "{:?}", dotted.get_pixel(80, 80));
        assert_eq!(empty.get_pixel(80, 80).0, [247, 248, 250]);
        assert_eq!(dotted.get_pixel(240, 240), empty.get_pixel(240, 240), "below, nothing is drawn");
    }

    #[test]
    fn rows_stand_under_each_other() {
        let row = |w, h, v| RgbImage::from_pixel(w, h, Rgb([v; 3]));
        let all = stack(&[row(4, 2, 10), row(6, 3, 20)]);
        assert_eq!(all.dimensions(), (6, 5));
        assert_eq!((all.get_pixel(0, 1).0[0], all.get_pixel(5, 1).0[0], all.get_pixel(5, 2).0[0]), (10, 255, 20));
    }
}
