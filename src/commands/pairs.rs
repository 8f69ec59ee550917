//! `dmd pairs`: noise-picture pairs of a teacher, for the regression term.

use super::distill::small_files;
use super::model_path;
use crate::cli::PairsArgs;
use crate::config::{Config, RealScoreSettings, check_guidance, check_prompts, count, not_negative};
use crate::output::{progress, say};
use crate::pairs::{self, Maker, Manifest};
use crate::prompts::Prompts;
use crate::{fingerprint, memory, train};
use anyhow::{Result, ensure};
use candle_core::Device;
use dmd_models::ModelFolder;
use dmd_models::folder::Kind;
use serde_json::{Value, json};
use std::time::Instant;

/// Makes pairs.
pub fn run(args: &PairsArgs) -> Result<Value> {
    count("-n", args.n as u64)?;
    count("--steps", args.steps as u64)?;
    count("--batch", args.batch as u64)?;
    count("--per-shard", args.per_shard as u64)?;
    not_negative("--guidance", args.guidance)?;
    let config = Config {
        prompts: args.prompts.as_ref().map_or_else(String::new, |path| path.display().to_string()),
        real_score: RealScoreSettings {
            guidance_scale: args.guidance,
            negative: args.negative.clone().unwrap_or_default(),
            rescale: 0.0,
        },
        ..Config::default()
    };
    config.validate()?;
    let path = model_path(&args.teacher)?;
    if let Some((takes, null_class)) = small_files(&path) {
        check_guidance("--guidance", args.guidance, &takes, null_class)?;
        check_prompts(&config, &takes)?;
    }
    let device = args.device.open()?;
    let teacher = ModelFolder::load(&path, &Device::Cpu)?;
    ensure!(teacher.about.kind == Kind::Teacher, "{}: is a generator, expected a teacher", path.display());
    let shape = teacher.sample_shape()?;
    // Noise and pictures of a shard are in memory at once.
    let in_memory = args.n.min(args.per_shard);
    let sizes = [&[2, in_memory], &shape[..]].concat();
    memory::room(&format!("{in_memory} pairs at a time (--per-shard)"), &sizes)?;
    let prompts = Prompts::for_run(&teacher, &config, Vec::new(), &device)?;
    let manifest = Manifest {
        teacher_sha256: fingerprint::teacher(&teacher)?.now,
        shape,
        guidance_scale: args.guidance,
        sampler_steps: args.steps,
        seed: args.seed,
        per_shard: args.per_shard,
        n: args.n,
        text: prompts.as_ref().map(|prompts| prompts.known.clone()),
    };
    train::stop_on_signals()?;
    let bar = progress(args.n as u64, 0)?;
    let started = Instant::now();
    let maker = Maker { teacher: &teacher, prompts: prompts.as_ref(), batch: args.batch, device: &device };
    let found = pairs::make(&maker, manifest, &args.out, args.force, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let made = args.n - found;
    let seconds = started.elapsed().as_secs_f64();
    say(&format!(
        "{n} pairs in {out} ({made} made in {seconds:.1} s): dmd distill --teacher {teacher} --recipe dmd --pairs {out}{as_here} --out RUN",
        n = args.n,
        out = args.out.display(),
        as_here = as_here(args),
        teacher = path.display()
    ));
    Ok(json!({ "pairs": args.n, "made": made, "seconds": seconds, "out": args.out }))
}

/// The options that the distillation must be given like these.
fn as_here(args: &PairsArgs) -> String {
    let mut options = String::new();
    if args.guidance != 1.0 {
        options += &format!(" --guidance {}", args.guidance);
    }
    if let Some(path) = &args.prompts {
        options += &format!(" --prompts {}", path.display());
    }
    if let Some(negative) = &args.negative {
        options += &format!(" --negative {negative:?}");
    }
    options
}
