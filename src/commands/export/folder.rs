//! A model of several parts to a folder of files: prompts, or noise alone, to pixels.

use super::{Level, MAX_NAMES, passes};
use crate::cli::ExportArgs;
use crate::commands::without_effect;
use crate::output::{say, warn};
use crate::prompts;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dmd_export::lint::{lint, read};
use dmd_export::{Decoding, ExportOptions, FolderReport, OneStep, Parts, TextEncoding, ToldBy, weights_sha256};
use dmd_models::encoders::{TextEncoder, TextEncoders};
use dmd_models::{Autoencoder, ModelFolder, Way, Weights};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

/// Prompts that the files are proven with, where they take any.
const PROMPTS: [&str; 3] = ["a red apple, flat style", "a photo of a black cat on a sofa", ""];

/// Whether a model is told text.
pub fn hears_text(folder: &ModelFolder) -> bool {
    folder.config.takes().told.get(Way::Text).is_some()
}

/// Whether a folder is to be written: for a model of several parts, where the name is not that of a file.
pub fn is_asked_for(args: &ExportArgs, folder: &ModelFolder) -> bool {
    let is_file = args.onnx.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx"));
    !is_file && (hears_text(folder) || !folder.parts.is_empty() || args.decoder.is_some())
}

/// Refuses options of such a folder where one file is written.
pub fn needs_one_file(args: &ExportArgs, folder: &ModelFolder) -> Result<()> {
    let (onnx, generator) = (args.onnx.display(), args.generator.display());
    ensure!(
        !hears_text(folder),
        "{onnx}: {generator} is told text, which makes several files of it: give --onnx a folder, --onnx DIR"
    );
    let one_file = "one file is written, whose name ends in .onnx, and it holds the generator alone";
    without_effect("--decoder", args.decoder.is_some(), one_file)?;
    let no_text = "the model is told no text";
    without_effect("--prompts", args.prompts.is_some(), no_text)?;
    without_effect("--fixed-prompt", args.fixed_prompt.is_some(), no_text)
}

/// Exports every part.
pub fn run(args: &ExportArgs, folder: &ModelFolder, path: &Path, options: ExportOptions) -> Result<Value> {
    without_effect(
        "--report",
        args.report,
        "it compares one file with its network; each part is compared as it is written",
    )?;
    if !hears_text(folder) {
        let no_text = "the model is told no text";
        without_effect("--prompts", args.prompts.is_some(), no_text)?;
        without_effect("--fixed-prompt", args.fixed_prompt.is_some(), no_text)?;
    }
    let [channels, height, width] = folder.sample_shape()?;
    let (decoder, decoder_hash) = decoder(args, folder, channels)?;
    let factor = decoder.as_ref().map_or(1, Autoencoder::factor);
    let text = folder.text(&Device::Cpu, factor)?;
    let (told, rows, encoding) = told(args, folder, text)?;
    let generators = passes(folder, path, Level::of(args))?;
    let step = |generator| OneStep { generator, size: [height, width], told: told.clone(), latents: decoder.is_some() };
    let text_hash = match encoding {
        Some(_) => text_hash(folder)?,
        None => String::new(),
    };
    let of_network = weights_sha256(&folder.weights.to(DType::F32, &Device::Cpu)?)?;
    let parts = Parts {
        passes: generators.into_iter().map(step).collect(),
        rows,
        text: encoding,
        decoder: decoder.map(|autoencoder| Decoding { autoencoder, size: [height, width] }),
        weights_sha256: [text_hash, of_network, decoder_hash],
        data: folder.about.data.clone(),
    };
    let one_prompt = args.fixed_prompt.is_some().then_some(0);
    let options = ExportOptions { fixed_label: options.fixed_label.or(one_prompt), ..options };
    // Without a last slash, which would be the name of what lies aside.
    let onnx: std::path::PathBuf = args.onnx.components().collect();
    let report = dmd_export::export_folder(&parts, &options, &onnx)?;
    tell(&report);
    let mut result = serde_json::to_value(&report)?;
    if let Some(target) = args.target {
        for (at, part) in report.parts.iter().enumerate() {
            let linted = lint(&read(&part.path)?, target);
            say(&format!("{}: {linted}", part.path.display()));
            if !linted.is_whole() {
                let (file, taken, nodes) = (part.path.display(), linted.taken, linted.nodes);
                warn(&format!(
                    "{target} takes {taken} of {nodes} nodes of {file}; `dmd lint {file} --target {target}` tells why"
                ));
            }
            result["parts"][at]["lint"] = serde_json::to_value(&linted)?;
        }
    }
    Ok(result)
}

fn tell(report: &FolderReport) {
    for part in &report.parts {
        say(&format!("{}: {} nodes, {:.2} MB", part.path.display(), part.nodes, part.bytes as f64 / 1e6));
        part.engines.iter().for_each(|verdict| say(&format!("  {verdict}")));
        let (shown, left) = part.kept_float.split_at(part.kept_float.len().min(MAX_NAMES));
        if !shown.is_empty() {
            let more = if left.is_empty() { String::new() } else { format!(" and {} more", left.len()) };
            say(&format!("  kept in fp32, so that the likeness holds: {}{more}", shown.join(", ")));
        }
    }
    say("the whole path, to pixels:");
    report.engines.iter().for_each(|verdict| say(&format!("  {verdict}")));
}

/// What makes pictures of latents, the folder's own or another one, and the hash of its weights.
fn decoder(args: &ExportArgs, folder: &ModelFolder, channels: usize) -> Result<(Option<Autoencoder>, String)> {
    let hash = |path: &Path| -> Result<String> {
        Ok(weights_sha256(&Autoencoder::weights(path)?.to(DType::F32, &Device::Cpu)?)?)
    };
    let Some(path) = &args.decoder else {
        let part = ["vae", "vqvae"].iter().find_map(|name| folder.parts.get(*name));
        return match (folder.decoder(&Device::Cpu)?, part) {
            (Some(decoder), Some(part)) => Ok((Some(decoder), hash(&part.path)?)),
            (decoder, _) => Ok((decoder, String::new())),
        };
    };
    let decoder = Autoencoder::load(path, &Device::Cpu).context("--decoder")?;
    let takes = decoder.latent_channels();
    ensure!(
        takes == channels,
        "--decoder {}: it takes latents of {takes} channels, the network makes {channels}",
        path.display()
    );
    Ok((Some(decoder), hash(path)?))
}

/// How the generator is told what to make; names of what it may be told, where that is part of the file; and what reads
/// prompts, where they are free.
fn told(
    args: &ExportArgs,
    folder: &ModelFolder,
    text: Option<TextEncoders>,
) -> Result<(ToldBy, Vec<String>, Option<TextEncoding>)> {
    let Some(encoders) = text else { return Ok((ToldBy::Label, folder.classes(), None)) };
    let baked = match (&args.fixed_prompt, &args.prompts) {
        (Some(prompt), _) => Some(vec![prompt.clone()]),
        (None, Some(path)) => Some(of_file(path)?),
        (None, None) => None,
    };
    let Some(prompts) = baked else {
        let prompts = PROMPTS.map(String::from).to_vec();
        let (numbers, examples) = (encoders.n_numbers(), encoders.encode(&PROMPTS)?);
        return Ok((ToldBy::Text { examples, numbers }, vec![], Some(TextEncoding { encoders, prompts })));
    };
    let all: Vec<&str> = prompts.iter().map(String::as_str).collect();
    for (i, left_out) in encoders.cut(&all)? {
        warn(&format!(
            "the prompt \"{}\" has more than the {} tokens that the text encoder reads; left out: \"{left_out}\"",
            prompts[i],
            encoders.room()
        ));
    }
    Ok((ToldBy::OneOf(encoders.encode(&all)?), prompts, None))
}

/// The prompts of a file, each of which becomes a row.
fn of_file(path: &Path) -> Result<Vec<String>> {
    let prompts = prompts::read(path)?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = prompts.iter().find(|prompt| !seen.insert(prompt.as_str())) {
        bail!(
            "--prompts {}: \"{twice}\" is there twice; each prompt is a row of its own, found by its words",
            path.display()
        );
    }
    Ok(prompts)
}

/// The hash of all text encoders' weights.
fn text_hash(folder: &ModelFolder) -> Result<String> {
    let mut all = Weights::default();
    for name in ["text_encoder", "text_encoder_2"] {
        let Some(part) = folder.parts.get(name) else { continue };
        for (tensor, values) in TextEncoder::weights(&part.path)?.to(DType::F32, &Device::Cpu)?.iter() {
            all.insert(format!("{name}.{tensor}"), values.clone());
        }
    }
    Ok(weights_sha256(&all)?)
}
