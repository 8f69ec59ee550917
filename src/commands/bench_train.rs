//! `dmd bench train`: the work of one distillation iteration, timed step by step. Prints the keys that a PyTorch peer of
//! the same work prints.

use crate::cli::BenchTrainArgs;
use crate::config::Config;
use crate::distill::{Beginning, Networks, check_memory};
use crate::eval::median;
use crate::memory::Work;
use crate::output::result;
use crate::random::{Purpose, Random};
use crate::{device, memory};
use anyhow::{Context, Result};
use candle_core::{DType, Device};
use dmd_models::cost::cost;
use dmd_models::folder::{About, Kind, Scheduler};
use dmd_models::networks::unet2d::SampleSize;
use dmd_models::{ModelFolder, NetworkConfig, Precision, UNetConfig, peak};
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
    let gflop = cost(&networks.real_score().network, networks.shape())?.flops * args.batch as f64 / 1e9;
    let mut timer = Timer { args, device: &on, n_parameters, laps: Vec::new() };
    let mut step = 0;
    timer.time("one_step_sample", SAMPLE, || {
        step += 1;
        networks.sample(&config, &random, step).map(drop)
    })?;
    timer.time("generator_update", GENERATOR, || {
        step += 1;
        networks.update_generator(&config, &random, step).map(drop)
    })?;
    timer.time("critic_update", CRITIC, || {
        step += 1;
        networks.update_fake_score(&config, &random, step, 0).map(drop)
    })?;
    timer.time(&format!("iteration_ratio_{}", args.ratio), GENERATOR + args.ratio * CRITIC, || {
        step += 1;
        networks.update_generator(&config, &random, step)?;
        (0..args.ratio).try_for_each(|turn| networks.update_fake_score(&config, &random, step, turn).map(drop))
    })?;
    let peak = memory::peak_bytes(&on);
    // Last, and without the networks: the matrices on a GPU are large, and would count among the memory.
    drop(networks);
    let dtype = if args.precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
    let gflops = peak::gflops(&on, dtype, args.steps)?;
    result(&format!("floor: the arithmetic alone, at the {gflops:.0} GFLOP/s of a large matrix product"))?;
    let mut rows: Vec<Value> = timer.laps.iter().map(|lap| timer.row(lap, gflop, gflops)).collect::<Result<_>>()?;
    result(&format!("{:<20} {}", "peak_memory", memory::readable(peak)))?;
    rows.push(json!({ "what": "peak_memory", "mib": peak.map(|bytes| bytes >> 20) }));
    Ok(json!({ "results": rows, "peak_gflops": gflops }))
}

/// Forward passes' worth of arithmetic of each work, a backward pass being two: one pass.
const SAMPLE: u64 = 1;
/// A pass of each network, and back through one.
const GENERATOR: u64 = 5;
/// A pass of two networks, and back through one.
const CRITIC: u64 = 4;

/// Work that was timed.
struct Lap {
    what: String,
    /// Forward passes' worth of arithmetic.
    passes: u64,
    /// Median.
    ms: f64,
}

struct Timer<'a> {
    args: &'a BenchTrainArgs,
    device: &'a Device,
    n_parameters: usize,
    laps: Vec<Lap>,
}

impl Timer<'_> {
    fn time(&mut self, what: &str, passes: u64, mut work: impl FnMut() -> Result<()>) -> Result<()> {
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
            laps.push(started.elapsed().as_secs_f64() * 1e3);
        }
        self.laps.push(Lap { what: what.into(), passes, ms: median(&mut laps) });
        Ok(())
    }

    /// The figure beside its floor, for people and for programs: `gflop` of a pass, at so many a second.
    fn row(&self, lap: &Lap, gflop: f64, gflops: f64) -> Result<Value> {
        let Lap { what, passes, ms } = lap;
        let gflop = gflop * *passes as f64;
        let (floor_ms, images_per_s) = (gflop / gflops * 1e3, self.args.batch as f64 / ms * 1e3);
        let share = floor_ms / ms;
        result(&format!(
            "{what:<20} {ms:>9.2} ms {images_per_s:>9.1} images/s  floor {floor_ms:>8.2} ms ({gflop:.1} GFLOP), {:.0} % of it",
            100.0 * share
        ))?;
        Ok(json!({
            "peer": format!("dmd {}", crate::VERSION),
            "what": what,
            "unet": self.args.unet,
            "params": self.n_parameters,
            "batch": self.args.batch,
            "device": device::name(self.device),
            "threads": rayon::current_num_threads(),
            "ms": ms,
            "images_per_s": images_per_s,
            "gflop": gflop,
            "floor_ms": floor_ms,
            "share_of_peak": share,
        }))
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
    let config = NetworkConfig::from(config);
    let weights = config.init(&mut |_, n| {
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
    let scheduler = Scheduler::edm(0.002, 80.0, 0.5)?;
    Ok(ModelFolder { config, scheduler, weights, about, parts: Default::default(), settings: Default::default() })
}
