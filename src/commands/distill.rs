//! `dmd distill`: settings from the file and the options, then the run.

use super::{model_path, without_effect};
use crate::cli::{DistillArgs, SettingsArgs};
use crate::config::{self, Config, check_critic, check_guidance, check_prompts};
use crate::output::say;
use crate::{device, distill, memory, pairs};
use anyhow::{Context, Result};
use clap::ValueEnum;
use dmd_models::folder::Kind;
use dmd_models::{ModelFolder, Takes};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Distils a teacher.
pub fn run(args: &DistillArgs) -> Result<Value> {
    let config = settings(&args.settings)?;
    config.validate()?;
    let (gan, regression) = (&config.loss.gan, &config.loss.regression);
    let looks = "no term of the loss looks at pictures; loss.gan (--recipe dmd2, sida or f-js) does";
    without_effect("--data", args.settings.data.is_some() && !gan.on(), looks)?;
    let compares = "loss.regression.weight is 0; --recipe dmd has the regression term";
    without_effect("--pairs", args.settings.pairs.is_some() && regression.weight == 0.0, compares)?;
    let teacher = model_path(&args.teacher)?;
    check_beforehand(&config, &teacher)?;
    let device = args.device.open()?;
    say(&format!("training on {}", device::name(&device)));
    let result = distill::distill(&config, &teacher, &args.out, &device, args.force)?;
    say(&format!("peak memory {}", memory::readable(memory::peak_bytes(&device))));
    let generator = args.out.join("generator");
    // A model of several parts is exported as a folder of files.
    let several = generator.join("vae").exists() || generator.join("text_encoder").exists();
    let onnx = if several { "app-model" } else { "generator.onnx" };
    say(&format!("generator in {0}: dmd export {0} --onnx {onnx}", generator.display()));
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
    let text = |path: &PathBuf| path.display().to_string();
    config.data = args.data.as_ref().map_or(config.data, text);
    config.prompts = args.prompts.as_ref().map_or(config.prompts, text);
    config.real_score.negative = args.negative.clone().unwrap_or(config.real_score.negative);
    config.loss.regression.pairs = args.pairs.as_ref().map_or(config.loss.regression.pairs, text);
    config.generator.start = args.start.as_ref().map_or(config.generator.start, text);
    Ok(config)
}

/// Refuses what would be found out only after weights and pictures are read, where the settings and small files tell.
fn check_beforehand(config: &Config, teacher: &Path) -> Result<()> {
    let regression = &config.loss.regression;
    let Some((takes, null_class)) = small_files(teacher) else { return Ok(()) };
    let guidance = config.real_score.guidance_scale;
    check_guidance("real_score.guidance_scale", guidance, &takes, null_class)?;
    check_critic(config, &takes, null_class)?;
    check_prompts(config, &takes)?;
    if let Some([height, width]) = takes.size.filter(|_| regression.weight > 0.0) {
        pairs::manifest_for(Path::new(&regression.pairs), [takes.channels, height, width], guidance)?;
    }
    Ok(())
}

/// What a teacher's network takes, and whether it knows pictures without a class, by the small files of its folder; none
/// where there is something amiss, which the loader will say.
pub fn small_files(teacher: &Path) -> Option<(Takes, bool)> {
    let (config, about) = ModelFolder::glance(teacher).ok()?;
    (about.kind == Kind::Teacher).then(|| (config.takes(), about.null_class))
}
