//! `dmd distill`: settings from the file and the options, then the run.

use crate::cli::{DistillArgs, SettingsArgs};
use crate::config::{self, Config};
use crate::distill;
use crate::memory;
use crate::output::say;
use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::Value;

/// Distils a teacher.
pub fn run(args: &DistillArgs) -> Result<Value> {
    let config = settings(&args.settings)?;
    config.validate()?;
    let device = args.device.open()?;
    let result = distill::distill(&config, &args.teacher, &args.out, &device, args.force)?;
    say(&format!("peak memory {}", memory::readable(memory::peak_bytes(&device))));
    let generator = args.out.join("generator");
    say(&format!("generator in {0}: dmd export {0} --onnx generator.onnx", generator.display()));
    Ok(result)
}

/// The settings that the command line comes to: recipe, file, single settings, options.
pub fn settings(args: &SettingsArgs) -> Result<Config> {
    let name = args.recipe.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string());
    let mut texts = vec![(format!("recipe {name}"), args.recipe.text().to_string())];
    if let Some(path) = &args.config {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        texts.push((path.display().to_string(), text));
    }
    for set in &args.sets {
        texts.push((format!("--set {set}"), config::assignment(set)?));
    }
    let mut config: Config = config::layered(&texts)?;
    config.steps = args.steps.unwrap_or(config.steps);
    config.batch = args.batch.unwrap_or(config.batch);
    config.grad_checkpoint |= args.grad_checkpoint;
    config.precision = args.precision.unwrap_or(config.precision);
    config.seed = args.seed.unwrap_or(config.seed);
    config.real_score.guidance_scale = args.guidance.unwrap_or(config.real_score.guidance_scale);
    let text = |path: &std::path::PathBuf| path.display().to_string();
    config.data = args.data.as_ref().map_or(config.data, text);
    config.loss.regression.pairs = args.pairs.as_ref().map_or(config.loss.regression.pairs, text);
    config.generator.start = args.start.as_ref().map_or(config.generator.start, text);
    Ok(config)
}
