//! A model of several parts as a folder: what reads prompts, what makes latents, what makes pictures of them, each a file
//! of its own, and `model.json`, which says what is there. Everything lies aside until the whole path, from a prompt to
//! pixels, is proven.

use crate::file::{ExportOptions, ExportReport, ModelInfo, accept, partial_folder, prepare};
use crate::module::{Decoding, Form, Gives, Input, Module, OneStep, TextEncoding, ToldBy};
use crate::verify::{Demand, EngineVerdict, Feeds, Opened, Subject, judge};
use crate::{Batch, Error, Output, Result};
use candle_core::{Device, Tensor};
use dmd_models::{Backend, Condition};
use dmd_runtime::{FolderInfo, Part, PromptLimits};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};

/// The parts of a model.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The generator at the noise level of each pass, all told alike.
    pub passes: Vec<OneStep>,
    /// Names of its classes, or of the prompts that are part of its file.
    pub rows: Vec<String>,
    /// What reads prompts, where the generator is told text by inputs.
    pub text: Option<TextEncoding>,
    /// What makes pictures of latents, where there are any.
    pub decoder: Option<Decoding>,
    /// Hashes of the weights of text encoder, generator and decoder ([`weights_sha256`](crate::weights_sha256)).
    pub weights_sha256: [String; 3],
    /// Where the data came from, and under which licence.
    pub data: Option<String>,
}

/// What was written, and what the engines make of it.
#[derive(Clone, Debug, Serialize)]
pub struct FolderReport {
    /// The folder.
    pub path: PathBuf,
    /// Each part, in the order in which data passes.
    pub parts: Vec<ExportReport>,
    /// What each engine makes of the whole path, against candle.
    pub engines: Vec<EngineVerdict>,
}

/// What three parts in a row may lose, next to one.
const WHOLE_TOLERANCE: f64 = 10.0;
const WHOLE_DB: f64 = 10.0;

/// Writes a model's parts into a folder, each verified as [`export`](crate::export) does, and then the whole path from
/// prompts or labels to pixels in every engine. On any error, nothing is left under `path` that was not there before. A
/// folder that is there is replaced where that is asked for and it is one of these.
pub fn export_folder(parts: &Parts, options: &ExportOptions, path: &Path) -> Result<FolderReport> {
    check_place(path, options.force)?;
    let aside = Aside(partial_folder(path)?);
    // What a crash has left may be of another model.
    fs::remove_dir_all(&aside.0).and_then(|()| fs::create_dir(&aside.0)).map_err(Error::io(path))?;
    let (mut reports, mut listed) = (Vec::new(), Vec::new());
    let [of_text, of_generator, of_decoder] = &parts.weights_sha256;
    let mut done = |name: &str, hash: &str, report: ExportReport| {
        listed.push(Part { name: name.into(), file: format!("{name}.onnx"), weights_sha256: hash.into() });
        reports.push(ExportReport { path: path.join(format!("{name}.onnx")), ..report });
    };
    let info = |hash: &str, rows: &[String]| ModelInfo { classes: rows.to_vec(), weights_sha256: hash.into() };
    let plain = ExportOptions { output: Output::F32, fixed_label: None, ..options.clone() };
    if let Some(text) = &parts.text {
        let file = aside.0.join("text_encoder.onnx");
        done("text_encoder", of_text, part(text, &info(of_text, &[]), &plain, &file)?);
    }
    let output = if parts.decoder.is_some() { Output::F32 } else { options.output };
    let of_passes = ExportOptions { output, ..options.clone() };
    let file = aside.0.join("generator.onnx");
    let prepared = prepare(&parts.passes, &info(of_generator, &parts.rows), &of_passes, &file);
    done("generator", of_generator, prepared.and_then(|file| file.verify()).map_err(in_part("generator"))?);
    if let Some(decoder) = &parts.decoder {
        let options = ExportOptions { fixed_label: None, ..options.clone() };
        done("decoder", of_decoder, part(decoder, &info(of_decoder, &[]), &options, &aside.0.join("decoder.onnx"))?);
    }
    let engines = prove(parts, options, &aside.0)?;
    accept(&engines, options.allow_unverified).map_err(in_part("the whole path"))?;
    let mut model = FolderInfo { parts: listed, data: parts.data.clone(), ..FolderInfo::default() };
    for (i, encoder) in parts.text.iter().flat_map(|text| &text.encoders.encoders).enumerate() {
        let tokenizer = encoder.tokenizer();
        let file = if i == 0 { "tokenizer.json".to_string() } else { format!("tokenizer_{}.json", i + 1) };
        write(&aside.0.join(&file), tokenizer.description()?.as_bytes(), path)?;
        let [begin, end, padding] = [tokenizer.begin(), tokenizer.end(), tokenizer.padding()];
        model.prompts.push(PromptLimits { tokenizer: file, begin, end, padding, tokens: tokenizer.length() });
    }
    write(&aside.0.join(dmd_runtime::MODEL_JSON), model.to_json().as_bytes(), path)?;
    dmd_models::folder::replace_dir(&aside.0, path)?;
    Ok(FolderReport { path: path.into(), parts: reports, engines })
}

/// One part as a file.
fn part<M: Module>(module: &M, info: &ModelInfo, options: &ExportOptions, file: &Path) -> Result<ExportReport> {
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let prepared = prepare(std::slice::from_ref(module), info, options, file);
    prepared.and_then(|file| file.verify()).map_err(in_part(&name))
}

fn in_part(name: &str) -> impl FnOnce(Error) -> Error {
    let part = name.to_string();
    move |source| Error::Part { part, source: Box::new(source) }
}

fn write(file: &Path, bytes: &[u8], path: &Path) -> Result<()> {
    let written = || {
        fs::write(file, bytes)?;
        fs::File::open(file)?.sync_all()
    };
    written().map_err(Error::io(path))
}

/// Refuses a place that is taken, by what is no folder of ours even where it may be replaced.
fn check_place(path: &Path, force: bool) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    if !force {
        return Err(Error::Exists { path: path.into() });
    }
    let is_empty = || fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    match path.join(dmd_runtime::MODEL_JSON).is_file() || is_empty() {
        true => Ok(()),
        false => Err(Error::Setting(format!(
            "{}: is there, and no folder that dmd export wrote, which has a {}: it is not replaced",
            path.display(),
            dmd_runtime::MODEL_JSON
        ))),
    }
}

/// The folder in which everything lies until it is whole.
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // After a rename there is none, and nothing else can be done about a failure here.
        _ = fs::remove_dir_all(&self.0);
    }
}

/// From ids to latents: text encoder and generator as one module.
struct FromIds<'a> {
    text: Option<&'a TextEncoding>,
    step: &'a OneStep,
}

impl Module for FromIds<'_> {
    fn inputs(&self) -> Vec<Input> {
        let noise = self.step.inputs().into_iter().take(1);
        noise.chain(self.text.iter().flat_map(|text| text.inputs())).collect()
    }

    fn outputs(&self) -> Vec<Gives> {
        vec![Gives { name: "latents".into(), form: Form::Plain }]
    }

    fn max_classes(&self) -> usize {
        self.step.max_classes()
    }

    fn told(&self, n: usize) -> Result<Condition<Tensor>> {
        self.step.told(n)
    }

    fn sigma(&self) -> Option<f64> {
        self.step.sigma()
    }

    fn device(&self) -> Device {
        self.step.device()
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        told: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        let mut all = vec![inputs[0].clone()];
        if let Some(text) = self.text {
            all.extend(text.run(b, &inputs[1..], &Condition::none())?);
        }
        self.step.run(b, &all, told)
    }
}

/// The whole path in every engine that is asked for, against candle.
fn prove(parts: &Parts, options: &ExportOptions, folder: &Path) -> Result<Vec<EngineVerdict>> {
    let passes: Vec<FromIds> = parts.passes.iter().map(|step| FromIds { text: parts.text.as_ref(), step }).collect();
    let by_label = matches!(parts.passes[0].told, ToldBy::Label | ToldBy::OneOf(_)) && options.fixed_label.is_none();
    let labels = if by_label { parts.rows.len() } else { 0 };
    let batch = if let Batch::Fixed(n) = options.batch { n } else { 1 };
    let subject = Subject { passes: &passes, batch, labels, fixed: options.fixed_label };
    let mut samples = subject.samples()?;
    if let Some(decoder) = &parts.decoder {
        samples.map_expected(Form::Picture, |latents| Ok(decoder.autoencoder.decode(latents)?))?;
    }
    let demand = match Demand::of(options.precision, options.tolerance, options.min_psnr_db) {
        Demand::Difference(tolerance) => Demand::Difference(WHOLE_TOLERANCE * tolerance),
        Demand::Psnr(least) => Demand::Psnr((least - WHOLE_DB).max(0.0)),
    };
    Ok(judge(options, demand, &samples, |kind| {
        let open = |name: &str| Opened::load(&folder.join(format!("{name}.onnx")), kind, options);
        let text = parts.text.is_some().then(|| open("text_encoder")).transpose()?;
        let generator = open("generator")?;
        let decoder = parts.decoder.is_some().then(|| open("decoder")).transpose()?;
        let latents = samples.through(batch, |feeds| {
            let mut told: Feeds = feeds.clone();
            if let Some(text) = &text {
                let (ids, others): (Feeds, Feeds) = told.into_iter().partition(|(name, _)| name.starts_with("ids"));
                told = others;
                told.extend(text.run(&ids)?);
            }
            Ok::<_, Error>(generator.run(&told)?.into_iter().map(|(_, value)| value).collect())
        })?;
        let Some(decoder) = decoder else { return Ok(latents) };
        let mut pictures = Vec::new();
        for first in (0..latents[0].dims()[0]).step_by(batch) {
            let feed = ("latents".to_string(), latents[0].narrow(0, first, batch)?.contiguous()?);
            pictures.extend(decoder.run(&vec![feed])?.into_iter().map(|(_, value)| value));
        }
        Ok(vec![Tensor::cat(&pictures, 0)?])
    }))
}
