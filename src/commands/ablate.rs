//! `dmd ablate`: what each part of the method is for, in pictures.

use super::{check_free, model_path};
use crate::ablate::{levels::Players, toy};
use crate::cli::AblateArgs;
use crate::output::say;
use crate::picture::save;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::time::Instant;

/// Draws the plane's experiments, or one step of a picture model.
pub fn run(args: &AblateArgs) -> Result<Value> {
    crate::config::at_least_one("--steps", args.steps)?;
    let started = Instant::now();
    let mut result = match &args.teacher {
        None => {
            toy::files(&args.out).iter().try_for_each(|path| check_free(path, args.force))?;
            toy::run(args.seed, args.steps, &args.out)?
        }
        Some(teacher) => {
            let path = args.out.join("levels.png");
            check_free(&path, args.force)?;
            let generator = args.generator.as_deref().map(model_path).transpose()?;
            let players = Players::load(&model_path(teacher)?, generator.as_deref(), args.run.as_deref())?;
            std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
            let (picture, levels) = players.panel(args.seed)?;
            save(&path, &picture)?;
            say(&format!("the fake score is {}; the picture: {}", players.fake_score_is, path.display()));
            json!({ "picture": path, "fake_score": players.fake_score_is, "levels": levels })
        }
    };
    result["seconds"] = json!(started.elapsed().as_secs_f64());
    Ok(result)
}
