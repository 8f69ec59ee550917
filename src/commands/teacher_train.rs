//! `dmd teacher train`: settings from the file and the options, pictures, training.

use crate::cli::TeacherTrainArgs;
use crate::data::{self, DataOptions, Pictures};
use crate::output::say;
use crate::teacher::{self, TeacherSettings, default_unet};
use crate::{config, device, memory};
use anyhow::{Context, Result, ensure};
use dmd_models::UNetConfig;
use dmd_models::networks::unet2d::SampleSize;
use serde_json::Value;
use std::path::Path;

/// Trains a teacher.
pub fn run(args: &TeacherTrainArgs) -> Result<Value> {
    let settings = settings(args)?;
    settings.validate()?;
    let device = args.device.open()?;
    say(&format!("training on {}", device::name(&device)));
    let options = DataOptions {
        captions: false,
        size: settings.size,
        grey: settings.grey,
        unconditional: settings.unconditional,
        strict: args.strict,
    };
    let pictures = data::load_aloud(&args.data, &options)?;
    if let ([_, .., folder], []) = (&pictures.shared[..], &pictures.classes[..])
        && !settings.unconditional
    {
        say(&format!("all pictures lie in one folder, {folder}: one class is none, so the teacher learns no classes"));
    }
    let unet = unet(&settings, &pictures)?;
    let result = teacher::train(&settings, unet, &pictures, &args.out, &device, args.force)?;
    say(&format!("peak memory {}", memory::readable(memory::peak_bytes(&device))));
    say(&format!("teacher in {0}: dmd sample {0} --out grid.png", args.out.display()));
    Ok(result)
}

fn settings(args: &TeacherTrainArgs) -> Result<TeacherSettings> {
    let mut s: TeacherSettings = match &args.config {
        Some(path) => config::read(path)?,
        None => TeacherSettings::default(),
    };
    s.data = args.data.display().to_string();
    s.size = args.size.unwrap_or(s.size);
    s.grey |= args.grey;
    s.unconditional |= args.unconditional;
    s.flip |= args.flip;
    s.label_dropout = args.label_dropout.unwrap_or(s.label_dropout);
    s.steps = args.steps.unwrap_or(s.steps);
    s.batch = args.batch.unwrap_or(s.batch);
    s.accumulate = args.accumulate.unwrap_or(s.accumulate);
    s.grad_checkpoint |= args.grad_checkpoint;
    s.precision = args.precision.unwrap_or(s.precision);
    s.seed = args.seed.unwrap_or(s.seed);
    s.rate = args.rate.unwrap_or(s.rate);
    if let Some(path) = &args.unet {
        s.unet = path.display().to_string();
    }
    if let Some(text) = &args.about_data {
        s.about_data = text.clone();
    }
    Ok(s)
}

/// The network that the settings name, fitted to the pictures.
fn unet(settings: &TeacherSettings, pictures: &Pictures) -> Result<UNetConfig> {
    ensure!(
        settings.label_dropout == 0.0 || !pictures.classes.is_empty(),
        "label_dropout is {}, but the pictures have no classes to drop",
        settings.label_dropout
    );
    // One row more for "no class", which dropped labels teach.
    let n_rows = pictures.classes.len() + usize::from(settings.label_dropout > 0.0);
    if settings.unet.is_empty() {
        return Ok(default_unet(settings.size, pictures.channels, n_rows));
    }
    let path = Path::new(&settings.unet);
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut unet = UNetConfig::from_json(path, &text)?;
    for (name, value) in [("in_channels", unet.in_channels), ("out_channels", unet.out_channels)] {
        ensure!(
            value == pictures.channels,
            "{}: {name} is {value}, the pictures have {} channels",
            path.display(),
            pictures.channels
        );
    }
    ensure!(
        unet.class_embed_type.is_none(),
        "{}: class_embed_type must be null, classes are a table here",
        path.display()
    );
    ensure!(
        unet.dropout == 0.0,
        "{}: dropout is {}, teachers are trained without it here: set it to 0",
        path.display(),
        unet.dropout
    );
    let [height, width] = settings.size;
    unet.check_size(height, width)?;
    unet.sample_size =
        Some(if height == width { SampleSize::Square(height) } else { SampleSize::Rectangle([height, width]) });
    // The data decide how many classes there are.
    unet.num_class_embeds = (n_rows > 0).then_some(n_rows);
    Ok(unet)
}
