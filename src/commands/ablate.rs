//! `dmd ablate`: one training step of a picture model, noise level by noise level.

use super::{check_free, make_parent, model_path};
use crate::cli::AblateArgs;
use crate::levels::Players;
use crate::output::say;
use crate::picture::save;
use anyhow::Result;
use serde_json::{Value, json};
use std::time::Instant;

/// Draws it.
pub fn run(args: &AblateArgs) -> Result<Value> {
    let started = Instant::now();
    let path = args.out.join("levels.png");
    check_free(&path, args.force)?;
    let generator = args.generator.as_deref().map(model_path).transpose()?;
    let players =
        Players::load(&model_path(&args.teacher)?, generator.as_deref(), args.run.as_deref(), args.prompts.as_deref())?;
    make_parent(&path)?;
    let (picture, levels) = players.panel(args.seed)?;
    save(&path, &picture)?;
    say(&format!("the fake score is {}; the picture: {}", players.fake_score_is, path.display()));
    let seconds = started.elapsed().as_secs_f64();
    Ok(json!({ "picture": path, "fake_score": players.fake_score_is, "levels": levels, "seconds": seconds }))
}
