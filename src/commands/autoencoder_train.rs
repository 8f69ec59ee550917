//! `dmd autoencoder train`: settings from the file and the options, pictures, training.

use crate::autoencoder::{self, AutoencoderSettings};
use crate::cli::AutoencoderTrainArgs;
use crate::data::{self, DataOptions};
use crate::output::say;
use crate::random::Random;
use crate::{config, device, memory};
use anyhow::Result;
use serde_json::Value;

/// Trains an autoencoder.
pub fn run(args: &AutoencoderTrainArgs) -> Result<Value> {
    let settings = settings(args)?;
    settings.validate()?;
    let device = args.device.open()?;
    say(&format!("training on {}", device::name(&device)));
    let options = DataOptions {
        size: settings.size,
        grey: settings.grey,
        unconditional: true,
        captions: false,
        strict: args.strict,
    };
    let pictures = data::load_aloud(&args.data, &options)?;
    let random = Random { seed: settings.seed, device: device.clone() };
    let result = autoencoder::train(&settings, &pictures, &args.out, random, args.force)?;
    say(&format!("peak memory {}", memory::readable(memory::peak_bytes(&device))));
    let latents: Vec<String> = result["latents"].as_array().into_iter().flatten().map(Value::to_string).collect();
    let psnr = result["psnr"].as_f64().unwrap_or(f64::NAN);
    say(&format!("autoencoder in {}: latents of {}, pictures at {psnr:.1} dB", args.out.display(), latents.join("×")));
    Ok(result)
}

fn settings(args: &AutoencoderTrainArgs) -> Result<AutoencoderSettings> {
    let mut s: AutoencoderSettings = match &args.config {
        Some(path) => config::read(path)?,
        None => AutoencoderSettings::default(),
    };
    s.data = args.data.display().to_string();
    s.size = args.size.unwrap_or(s.size);
    s.grey |= args.grey;
    s.kind = args.kind.unwrap_or(s.kind);
    s.flip |= args.flip;
    s.steps = args.steps.unwrap_or(s.steps);
    s.batch = args.batch.unwrap_or(s.batch);
    s.accumulate = args.accumulate.unwrap_or(s.accumulate);
    s.seed = args.seed.unwrap_or(s.seed);
    s.rate = args.rate.unwrap_or(s.rate);
    for (given, setting) in [(&args.network, &mut s.network), (&args.perceptual, &mut s.perceptual)] {
        if let Some(path) = given {
            *setting = path.display().to_string();
        }
    }
    if let Some(text) = &args.about_data {
        s.about_data = text.clone();
    }
    Ok(s)
}
