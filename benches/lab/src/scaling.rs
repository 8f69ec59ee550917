//! How an update's time grows with the batch and with the area of the pictures, as a plot.

use anyhow::Result;
use candle_core::Device;
use dmd::commands::bench_train::random_teacher;
use dmd::commands::{check_free, make_parent};
use dmd::config::Config;
use dmd::distill::{Beginning, Networks};
use dmd::eval::median;
use dmd::output::{result, say};
use dmd::picture::{labelled_panel, save};
use dmd::plot::growth;
use dmd::random::Random;
use std::path::PathBuf;
use std::time::Instant;

/// `dmd-lab scaling`.
#[derive(Debug, clap::Args)]
pub struct ScalingArgs {
    /// The network: a UNet2DModel's config.json.
    #[arg(long, value_name = "CONFIG.json")]
    pub unet: PathBuf,
    /// The plot to write.
    #[arg(long, value_name = "PLOT.png")]
    pub out: PathBuf,
    /// Timed repetitions; each figure is their median.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Replace an existing file.
    #[arg(long)]
    pub force: bool,
}

/// Batches, at the network's own size.
const BATCHES: [usize; 6] = [2, 4, 8, 16, 32, 64];
/// Sides of the pictures, at a batch of [`BATCH`].
const SIDES: [usize; 5] = [8, 16, 32, 64, 128];
const BATCH: usize = 4;

/// Times updates of the generator and draws them.
pub fn run(args: &ScalingArgs) -> Result<()> {
    check_free(&args.out, args.force)?;
    let by_batch = BATCHES.map(|batch| (batch as f64, batch, None));
    let by_area = SIDES.map(|side| ((side * side) as f64, BATCH, Some(side)));
    let time = |points: &[(f64, usize, Option<usize>)]| -> Result<Vec<(f64, f64)>> {
        points.iter().map(|&(x, batch, side)| Ok((x, update_ms(args, batch, side)?))).collect()
    };
    let (batch, area) = (time(&by_batch)?, time(&by_area)?);
    for (what, points) in [("batch", &batch), ("pixels", &area)] {
        for (x, ms) in points {
            result(&format!("{what:<7} {x:>6}  {ms:>9.2} ms  {:>8.4} ms each", ms / x))?;
        }
    }
    make_parent(&args.out)?;
    let caption = |what: &str, points: &[(f64, f64)]| {
        let (first, last) = (points[0], points[points.len() - 1]);
        format!("{what} {} to {}\n{:.1} to {:.0} ms", first.0, last.0, first.1, last.1)
    };
    let captions = [caption("batch", &batch), caption("pixels", &area)];
    let panels = [
        (captions[0].as_str(), growth(&batch, "samples in a batch")?),
        (captions[1].as_str(), growth(&area, "pixels of a sample")?),
    ];
    save(&args.out, &labelled_panel(&panels))?;
    say(&format!("the plot: {}", args.out.display()));
    Ok(())
}

/// Median milliseconds of an update of the generator.
fn update_ms(args: &ScalingArgs, batch: usize, side: Option<usize>) -> Result<f64> {
    let config = Config { batch, ..Config::default() };
    let folder = random_teacher(&args.unet, side)?;
    let random = Random { seed: 0, device: Device::Cpu };
    let mut networks = Networks::new(&folder, &[2.5], &config, Beginning::default(), &random)?;
    let mut laps = Vec::new();
    for step in 0..u64::from(args.steps) + 1 {
        let started = Instant::now();
        networks.update_generator(&config, &random, step)?;
        // The first one finds its memory.
        if step > 0 {
            laps.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(median(&mut laps))
}
