//! `dmd bench train`: the work of one distillation iteration, timed step by step. Prints the keys that a PyTorch peer of
//! the same work prints.

use super::bench_ops::peak_gflops;
use crate::cli::BenchTrainArgs;
use crate::config::Config;
use crate::distill::{Beginning, Networks, check_memory};
use crate::eval::median;
use crate::memory::Work;
use crate::output::say;
use crate::random::{Purpose, Random};
use crate::{device, memory};
use anyhow::{Context, Result};
use candle_core::Device;
use dmd_models::cost::cost;
use dmd_models::folder::{About, Kind, Scheduler};
use dmd_models::unet::SampleSize;
use dmd_models::{ModelFolder, UNet, UNetConfig};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

/// Times sampling, the two updates, and a whole iteration.
pub fn run(args: &BenchTrainArgs) -> Result<Value> {
    let config = Config {
        batch: args.batch,
        ratio: args.ratio,
        grad_checkpoint: args.grad_checkpoint,
        precision: args.precision,
        ..Config::default()
    };
    config.validate()?;
    crate::config::at_least_one("--steps", args.steps as u64)?;
    let on = args.device.open()?;
    device::check_precision(args.precision, &on)?;
    let folder = random_teacher(&args.unet, None)?;
    check_memory(&config, &folder, &on)?;
    let n_parameters = folder.weights.n_parameters();
    let random = Random { seed: 0, device: on.clone() };
    let networks = Networks::new(&folder, &[2.5], &config, Beginning::default(), &random);
    let mut networks = networks.map_err(|error| memory::explained(error, Work::Networks))?;
    let cost = cost(&networks.real_score().unet, networks.shape())?;
    let gflops = peak_gflops(args.steps)?;
    // Of an iteration: three passes and a backward one for the generator, two and a backward one for each critic update.
    let passes = 5 + 4 * args.ratio;
    let gflop = cost.flops * (args.batch as u64 * passes) as f64 / 1e9;
    let floor_ms = gflop / gflops * 1e3;
    if on.is_cpu() {
        say(&format!("floor of an iteration: {gflop:.1} GFLOP, {floor_ms:.1} ms at {gflops:.0} GFLOP/s"));
    }
    let mut timer = Timer { args, device: &on, n_parameters, rows: Vec::new() };
    let mut step = 0;
    timer.time("one_step_sample", || {
        step += 1;
        networks.sample(&config, &random, step).map(drop)
    })?;
    timer.time("generator_update", || {
        step += 1;
        networks.update_generator(&config, &random, step).map(drop)
    })?;
    timer.time("critic_update", || {
        step += 1;
        networks.update_fake_score(&config, &random, step, 0).map(drop)
    })?;
    timer.time(&format!("iteration_ratio_{}", args.ratio), || {
        step += 1;
        networks.update_generator(&config, &random, step)?;
        (0..args.ratio).try_for_each(|turn| networks.update_fake_score(&config, &random, step, turn).map(drop))
    })?;
    let mut rows = timer.rows;
    let peak = memory::peak_bytes(&on);
    say(&format!("{:<20} {}", "peak_memory", memory::readable(peak)));
    rows.push(json!({ "what": "peak_memory", "mib": peak.map(|bytes| bytes >> 20) }));
    Ok(json!({ "results": rows, "gflop": gflop, "floor_ms": on.is_cpu().then_some(floor_ms) }))
}

struct Timer<'a> {
    args: &'a BenchTrainArgs,
    device: &'a Device,
    n_parameters: usize,
    rows: Vec<Value>,
}

impl Timer<'_> {
    fn time(&mut self, what: &str, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        let training = Work::Training(self.args.batch);
        let mut work = || work().map_err(|error| memory::explained(error, training));
        for _ in 0..WARM_UP {
            work()?;
        }
        let mut laps = Vec::new();
        for _ in 0..self.args.steps {
            self.device.synchronize()?;
            let started = Instant::now();
            work()?;
            self.device.synchronize()?;
            laps.push(started.elapsed().as_secs_f64());
        }
        let seconds = median(&mut laps);
        let images_per_s = self.args.batch as f64 / seconds;
        say(&format!("{what:<20} {:>9.2} ms {images_per_s:>9.1} images/s", seconds * 1e3));
        self.rows.push(json!({
            "peer": format!("dmd {}", crate::VERSION),
            "what": what,
            "unet": self.args.unet,
            "params": self.n_parameters,
            "batch": self.args.batch,
            "device": device::name(self.device),
            "threads": rayon::current_num_threads(),
            "ms": seconds * 1e3,
            "images_per_s": images_per_s,
        }));
        Ok(())
    }
}

/// Repetitions before the clock starts.
const WARM_UP: usize = 2;

/// A teacher of this shape with random weights, since only its size matters here; `side` of the pictures, unless it is the
/// network's own.
pub fn random_teacher(unet: &Path, side: Option<usize>) -> Result<ModelFolder> {
    let text = std::fs::read_to_string(unet).with_context(|| unet.display().to_string())?;
    let mut config = UNetConfig::from_json(unet, &text)?;
    config.sample_size = match side {
        Some(side) => Some(SampleSize::Square(side)),
        None => Some(config.sample_size.unwrap_or(SampleSize::Square(32))),
    };
    let random = Random { seed: 0, device: Device::Cpu };
    let mut index = 0;
    let weights = UNet::init(&config, &mut |_, n| {
        index += 1;
        random.stream(Purpose::Init, index).uniform(n)
    })?;
    let about = About {
        kind: Kind::Teacher,
        sigma: None,
        steps: Vec::new(),
        classes: Vec::new(),
        null_class: false,
        data: None,
        version: crate::VERSION.into(),
        run: None,
    };
    Ok(ModelFolder { config, scheduler: Scheduler::edm(0.002, 80.0, 0.5)?, weights, about })
}
