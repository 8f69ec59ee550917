//! `dmd teacher train`: settings from the file and the options, pictures, training.

use crate::cli::TeacherTrainArgs;
use crate::data::{self, DataOptions};
use crate::output::say;
use crate::teacher::{self, Lesson, TeacherSettings, check, default_text_unet, default_unet};
use crate::{config, device, memory};
use anyhow::{Context, Result, ensure};
use dmd_models::networks::config::from_json;
use dmd_models::networks::unet2d::SampleSize;
use dmd_models::networks::unet2d_condition::UNet2DConditionConfig;
use dmd_models::{NetworkConfig, Told, UNetConfig, Way};
use serde_json::Value;
use std::path::Path;

/// Trains a teacher.
pub fn run(args: &TeacherTrainArgs) -> Result<Value> {
    let settings = settings(args)?;
    settings.validate()?;
    let device = args.device.open()?;
    say(&format!("training on {}", device::name(&device)));
    let options = DataOptions {
        captions: settings.text,
        size: settings.size,
        grey: settings.grey,
        unconditional: settings.unconditional || settings.text,
        strict: args.strict,
    };
    let pictures = data::load_aloud(&args.data, &options)?;
    if let ([_, .., folder], []) = (&pictures.shared[..], &pictures.classes[..])
        && !settings.unconditional
        && !settings.text
    {
        say(&format!("all pictures lie in one folder, {folder}: one class is none, so the teacher learns no classes"));
    }
    check(&settings, &pictures)?;
    let lesson = Lesson::new(&settings, &pictures, &device)?;
    let network = network(&settings, &lesson)?;
    let result = teacher::train(&settings, network, &lesson, &args.out, &device, args.force)?;
    say(&format!("peak memory {}", memory::readable(memory::peak_bytes(&device))));
    let prompt = if settings.text { " --prompt TEXT" } else { "" };
    say(&format!("teacher in {0}: dmd sample {0}{prompt} --out grid.png", args.out.display()));
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
    s.text |= args.text;
    s.vocabulary = args.vocabulary.unwrap_or(s.vocabulary);
    for (given, setting) in
        [(&args.unet, &mut s.unet), (&args.decoder, &mut s.decoder), (&args.text_encoder, &mut s.text_encoder)]
    {
        if let Some(path) = given {
            *setting = path.display().to_string();
        }
    }
    if let Some(text) = &args.about_data {
        s.about_data = text.clone();
    }
    Ok(s)
}

/// The network that the settings name, fitted to what it learns.
fn network(settings: &TeacherSettings, lesson: &Lesson) -> Result<NetworkConfig> {
    Ok(match &lesson.text {
        Some(text) => text_unet(settings, lesson.shape()?, text.config.hidden_size)?.into(),
        None => unet(settings, lesson)?.into(),
    })
}

fn read(path: &str) -> Result<(&Path, String)> {
    Ok((Path::new(path), std::fs::read_to_string(path).with_context(|| path.to_string())?))
}

/// What a network of any kind has to be like.
fn check_network(path: &Path, channels: usize, found: [usize; 2], dropout: f64) -> Result<()> {
    for (name, value) in ["in_channels", "out_channels"].into_iter().zip(found) {
        ensure!(value == channels, "{}: {name} is {value}, the samples have {channels} channels", path.display());
    }
    ensure!(
        dropout == 0.0,
        "{}: dropout is {dropout}, teachers are trained without it here: set it to 0",
        path.display()
    );
    Ok(())
}

fn sample_size([height, width]: [usize; 2]) -> Option<SampleSize> {
    Some(if height == width { SampleSize::Square(height) } else { SampleSize::Rectangle([height, width]) })
}

fn text_unet(settings: &TeacherSettings, [c, h, w]: [usize; 3], tokens: usize) -> Result<UNet2DConditionConfig> {
    if settings.unet.is_empty() {
        return Ok(default_text_unet([h, w], c, tokens));
    }
    let (path, text) = read(&settings.unet)?;
    let mut unet: UNet2DConditionConfig = from_json(path, &text)?;
    check_network(path, c, [unet.in_channels, unet.out_channels], unet.dropout)?;
    unet.sample_size = sample_size([h, w]);
    let told = NetworkConfig::from(unet.clone()).takes().told;
    ensure!(
        told.iter().all(|(way, _)| way == Way::Text) && told.get(Way::Text) == Some(&Told::Tokens(tokens)),
        "{}: expected a network that is told text alone, in tokens of {tokens} channels (cross_attention_dim), as its text encoder makes them",
        path.display()
    );
    Ok(unet)
}

fn unet(settings: &TeacherSettings, lesson: &Lesson) -> Result<UNetConfig> {
    let [channels, height, width] = lesson.shape()?;
    let classes = lesson.pictures.classes.len();
    // One row more for "no class", which dropped labels teach.
    let n_rows = classes + usize::from(settings.label_dropout > 0.0);
    if settings.unet.is_empty() {
        return Ok(default_unet([height, width], channels, n_rows));
    }
    let (path, text) = read(&settings.unet)?;
    let mut unet = UNetConfig::from_json(path, &text)?;
    check_network(path, channels, [unet.in_channels, unet.out_channels], unet.dropout)?;
    ensure!(
        unet.class_embed_type.is_none(),
        "{}: class_embed_type must be null, classes are a table here",
        path.display()
    );
    unet.check_size(height, width)?;
    unet.sample_size = sample_size([height, width]);
    // The data decide how many classes there are.
    unet.num_class_embeds = (n_rows > 0).then_some(n_rows);
    Ok(unet)
}
