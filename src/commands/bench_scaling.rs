//! `dmd bench scaling`: how an update's time grows with the batch and with the area of the pictures, as a plot.

use super::bench_train::random_teacher;
use crate::ablate::figure;
use crate::cli::BenchScalingArgs;
use crate::config::{Config, at_least_one};
use crate::distill::{Beginning, Networks};
use crate::eval::median;
use crate::output::say;
use crate::picture::{labelled_panel, save_png};
use crate::random::Random;
use anyhow::Result;
use candle_core::Device;
use serde_json::{Value, json};
use std::time::Instant;

/// Batches, at the network's own size.
const BATCHES: [usize; 6] = [2, 4, 8, 16, 32, 64];
/// Sides of the pictures, at a batch of [`BATCH`].
const SIDES: [usize; 5] = [8, 16, 32, 64, 128];
const BATCH: usize = 4;

/// Times updates of the generator and draws them.
pub fn run(args: &BenchScalingArgs) -> Result<Value> {
    super::check_free(&args.out, args.force)?;
    at_least_one("--steps", args.steps as u64)?;
    let by_batch = BATCHES.map(|batch| (batch as f64, batch, None));
    let by_area = SIDES.map(|side| ((side * side) as f64, BATCH, Some(side)));
    let time = |points: &[(f64, usize, Option<usize>)]| -> Result<Vec<(f64, f64)>> {
        points.iter().map(|&(x, batch, side)| Ok((x, update_ms(args, batch, side)?))).collect()
    };
    let (batch, area) = (time(&by_batch)?, time(&by_area)?);
    for (what, points) in [("batch", &batch), ("pixels", &area)] {
        for (x, ms) in points {
            say(&format!("{what:<7} {x:>6}  {ms:>9.2} ms  {:>8.4} ms each", ms / x));
        }
    }
    super::make_parent(&args.out)?;
    let caption = |what: &str, points: &[(f64, f64)]| {
        let (first, last) = (points[0], points[points.len() - 1]);
        format!("{what} {} to {}\n{:.1} to {:.0} ms", first.0, last.0, first.1, last.1)
    };
    let captions = [caption("batch", &batch), caption("pixels", &area)];
    let panels = [(captions[0].as_str(), figure::growth(&batch)?), (captions[1].as_str(), figure::growth(&area)?)];
    save_png(&args.out, &labelled_panel(&panels))?;
    say(&format!("the plot: {}", args.out.display()));
    Ok(json!({ "plot": args.out, "by_batch": batch, "by_area": area }))
}

/// Median milliseconds of an update of the generator.
fn update_ms(args: &BenchScalingArgs, batch: usize, side: Option<usize>) -> Result<f64> {
    let config = Config { batch, ..Config::default() };
    let folder = random_teacher(&args.unet, side)?;
    let random = Random { seed: 0, device: Device::Cpu };
    let mut networks = Networks::new(&folder, &[2.5], &config, Beginning::default(), &random)?;
    let mut laps = Vec::new();
    for step in 0..args.steps as u64 + 1 {
        let started = Instant::now();
        networks.update_generator(&config, &random, step)?;
        // The first one finds its memory.
        if step > 0 {
            laps.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(median(&mut laps))
}
