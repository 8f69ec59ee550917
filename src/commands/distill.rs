//! `dmd distill`: settings from the file and the options, then the run.

use crate::cli::DistillArgs;
use crate::config::{self, Config};
use crate::distill;
use crate::output::say;
use anyhow::Result;
use serde_json::Value;

/// Distils a teacher.
pub fn run(args: &DistillArgs) -> Result<Value> {
    let mut config: Config = match &args.config {
        Some(path) => config::read(path)?,
        None => Config::default(),
    };
    config.steps = args.steps.unwrap_or(config.steps);
    config.batch = args.batch.unwrap_or(config.batch);
    config.seed = args.seed.unwrap_or(config.seed);
    config.validate()?;
    let device = args.device.open()?;
    let result = distill::distill(&config, &args.teacher, &args.out, &device, args.force)?;
    let generator = args.out.join("generator");
    say(&format!("generator in {0}: dmd export {0} --onnx generator.onnx", generator.display()));
    Ok(result)
}
