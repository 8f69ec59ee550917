//! `dmd sample`: pictures of a teacher, a generator or an exported file, from a seed or from given noise.

use super::{check_free, engine_options, is_exported, make_parent, model_path, without_effect};
use crate::cli::{Engine, SampleArgs, WrongUsage};
use crate::device::Choice;
use crate::limits;
use crate::memory::{self, Work};
use crate::output::{self, say};
use crate::sample::{Made, Model, Passes, Sampler};
use crate::{classes, npy, picture, prompts};
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dmd_models::{Condition, ModelFolder, Pipeline};
use ndarray::{Array4, Axis};
use serde_json::{Value, json};
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

/// Makes pictures.
pub fn run(args: &SampleArgs, threads: Option<usize>) -> Result<Value> {
    if args.out.is_none() && args.npy.is_none() && args.latents.is_none() && args.pictures.is_none() {
        let text = "nothing to write: give --out GRID.png, --pictures DIR, --npy FILE.npy, --latents FILE.npy or several of them";
        return Err(WrongUsage(text.into()).into());
    }
    if let Some(path) = &args.out {
        picture::format(path).map_err(|error| WrongUsage(error.to_string()))?;
    }
    let files = args.out.iter().chain(&args.npy).chain(&args.latents);
    files.clone().try_for_each(|path| check_free(path, args.force))?;
    let prompts = match &args.prompts {
        Some(path) => prompts::read(path)?,
        None => args.prompt.clone(),
    };
    let mut source = Source::open(&model_path(&args.model)?, &sampling(args, threads))?;
    source.check_prompts(&prompts, "--prompt TEXT or --prompts FILE")?;
    without_effect(
        "--latents",
        args.latents.is_some() && !source.is_latent(),
        "this model makes pictures, not latents",
    )?;
    if let Some(size) = args.size {
        source.resize(size)?;
    }
    if let Some(negative) = &args.negative {
        without_effect("--negative", !source.is_teacher() || !source.is_told_text(), "it is for teachers of text")?;
        source.guide_away_from(negative)?;
    }
    if let Some(scale) = args.guidance {
        without_effect("--guidance", !source.is_teacher(), "it is for teachers")?;
        source.guide(scale)?;
    }
    let batch = batch(args, &source)?;
    let n = args.n.unwrap_or(if prompts.is_empty() { PICTURES } else { prompts.len() });
    limits::pictures("-n", n as u64, source.shape())?;
    if let Source::Folder { model, sample: [_, h, w], .. } = &source {
        model.check_memory(n, [*h, *w], batch)?;
    }
    let noise = noise(args, n, source.noise_shape())?;
    let labels = labels(&args.class, source.classes(), noise.dim().0)?;
    let singles = args.pictures.as_ref().map(|folder| singles(folder, args, &labels, source.classes(), noise.dim().0));
    let singles = singles.unwrap_or_default();
    singles.iter().try_for_each(|path| check_free(path, args.force))?;
    files.clone().chain(&singles).try_for_each(|path| make_parent(path))?;

    let bar = output::progress(noise.dim().0 as u64, 0)?;
    let started = Instant::now();
    let made = source.make(&noise, &labels, &prompts, batch, &|done| bar.set_position(done as u64));
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let Made { latents, pictures: images } = made?;
    if let Some(path) = &args.out {
        let scale = (128 / images.dim().2.max(1) as u32).max(1);
        let columns = picture::columns(images.dim().0);
        let grid = match prompts.is_empty() {
            true => picture::grid(&images, columns, scale),
            false => picture::captioned(&images, &prompts, columns, scale),
        };
        picture::save(path, &grid)?;
    }
    if let (Some(path), Some(latents)) = (&args.latents, &latents) {
        npy::write(path, latents)?;
    }
    if let Some(path) = &args.npy {
        npy::write(path, &images)?;
    }
    for (path, image) in singles.iter().zip(images.axis_iter(Axis(0))) {
        picture::save(path, &picture::single(&image))?;
    }
    let n = images.dim().0;
    let written: Vec<String> = files.chain(&args.pictures).map(|path| path.display().to_string()).collect();
    say(&format!(
        "{n} pictures by {} in {seconds:.2} s ({:.2} ms each): {}",
        source.name(),
        seconds * 1e3 / n as f64,
        written.join(", ")
    ));
    let mut result =
        json!({ "pictures": n, "model": source.name(), "seconds": seconds, "labels": labels, "written": written });
    if !prompts.is_empty() {
        result["prompts"] = json!(prompts);
    }
    Ok(result)
}

fn sampling(args: &SampleArgs, threads: Option<usize>) -> Sampling {
    let SampleArgs { device, engine, sampler, steps, seed, .. } = *args;
    Sampling { device, engine, sampler, steps, seed, threads }
}

/// Pictures per pass of a folder's model; an exported file says itself how many it takes.
fn batch(args: &SampleArgs, source: &Source) -> Result<usize> {
    let is_file = matches!(source, Source::File { .. });
    without_effect("--batch", args.batch.is_some() && is_file, "an exported file says itself how many it takes")?;
    limits::count("--batch", args.batch.unwrap_or(BATCH) as u64, limits::PICTURES)?;
    Ok(args.batch.unwrap_or(BATCH))
}

/// Where single pictures go: into the folder of their class where there are classes, so that they can be trained on.
fn singles(folder: &Path, args: &SampleArgs, labels: &[i64], classes: &[String], n: usize) -> Vec<PathBuf> {
    let name = |i: usize| match &args.noise {
        Some(_) => format!("{i:05}.png"),
        None => format!("seed{}-{i:05}.png", args.seed),
    };
    let of_class = |i: usize| {
        let class = labels.get(i).and_then(|label| classes.get(usize::try_from(*label).ok()?));
        // A class's name comes from a file: it must not lead out of the folder.
        let parts = Path::new(class.map_or("", String::as_str)).components();
        parts.filter(|part| matches!(part, Component::Normal(_))).collect::<PathBuf>()
    };
    (0..n).map(|i| folder.join(of_class(i)).join(name(i))).collect()
}

/// How pictures are made; what is not given is left to the model.
#[derive(Default)]
pub struct Sampling {
    /// Where a folder's model runs.
    pub device: Option<Choice>,
    /// What runs an exported file.
    pub engine: Option<Engine>,
    /// A teacher's sampler.
    pub sampler: Option<Sampler>,
    /// And its steps.
    pub steps: Option<usize>,
    /// Seed of the noise between passes.
    pub seed: u64,
    /// CPU threads.
    pub threads: Option<usize>,
}

/// What makes the pictures.
pub enum Source {
    /// A model folder, on candle.
    Folder {
        /// The model.
        model: Box<Model>,
        /// `(C, H, W)` of a sample, and so of its noise.
        sample: [usize; 3],
        /// Names of its classes.
        classes: Vec<String>,
    },
    /// An exported file, in the runtime.
    File {
        /// The file.
        generator: Box<dmd_runtime::Generator>,
        /// Seed of the noise between passes.
        seed: u64,
    },
}

impl Source {
    /// Opens a model; an option that it has no use for is refused.
    pub fn open(path: &Path, sampling: &Sampling) -> Result<Self> {
        let is_no_teacher = || without_effect("--sampler", sampling.sampler.is_some(), "it is for teachers");
        if is_exported(path) {
            is_no_teacher()?;
            without_effect("--device", sampling.device.is_some(), "an exported file runs on the CPU")?;
            let engine = engine_options(sampling.engine.unwrap_or(Engine::Auto), sampling.threads);
            let generator = dmd_runtime::Generator::load(path, engine)?;
            check_steps(sampling.steps, generator.info().passes())?;
            return Ok(Source::File { generator: Box::new(generator), seed: sampling.seed });
        }
        without_effect("--engine", sampling.engine.is_some(), "it is for exported files, this is a model folder")?;
        let device = sampling.device.unwrap_or_default().open()?;
        let folder = ModelFolder::load(path, &device);
        let folder = folder.map_err(|error| memory::explained(error.into(), Work::Networks))?;
        let pipeline = folder.pipeline(&device);
        let pipeline = pipeline.map_err(|error| memory::explained(error.into(), Work::Networks));
        let pipeline = pipeline.with_context(|| path.display().to_string())?;
        let model = match folder.about.sigmas() {
            [] => {
                let n_steps = sampling.steps.unwrap_or(STEPS);
                limits::count("--steps", n_steps as u64, limits::SAMPLER_STEPS)?;
                let guidance = pipeline.usual_guidance();
                Model::teacher(pipeline, sampling.sampler.unwrap_or(Sampler::Heun), n_steps, guidance)
            }
            sigmas => {
                is_no_teacher()?;
                check_steps(sampling.steps, sigmas.len())?;
                Model::of_steps(pipeline, sigmas, sampling.seed)
            }
        };
        Ok(Source::Folder { model: Box::new(model), sample: folder.sample_shape()?, classes: folder.classes() })
    }

    /// Whether it takes many steps, which can be guided.
    pub fn is_teacher(&self) -> bool {
        matches!(self, Source::Folder { model, .. } if matches!(model.passes, Passes::Many { .. }))
    }

    /// Whether it is told text.
    pub fn is_told_text(&self) -> bool {
        matches!(self, Source::Folder { model, .. } if model.pipeline.text.is_some())
    }

    /// Refuses prompts for a model that takes none, and one of text without; `remedy` are the options that give them.
    pub fn check_prompts(&self, prompts: &[String], remedy: &str) -> Result<()> {
        without_effect("--prompt", !prompts.is_empty() && !self.is_told_text(), "this model takes no text")?;
        match prompts.is_empty() && self.is_told_text() {
            true => Err(WrongUsage(format!("this model is told text: give {remedy}")).into()),
            false => Ok(()),
        }
    }

    /// Whether what it makes is decoded.
    pub fn is_latent(&self) -> bool {
        matches!(self, Source::Folder { model, .. } if model.pipeline.decoder.is_some())
    }

    /// Makes pictures of this height and width.
    pub fn resize(&mut self, [height, width]: [usize; 2]) -> Result<()> {
        without_effect("--size", matches!(self, Source::File { .. }), "an exported file has a size of its own")?;
        let Source::Folder { model, sample, .. } = self else { return Ok(()) };
        limits::count("--size", height.min(width) as u64, limits::SIDE)?;
        limits::count("--size", height.max(width) as u64, limits::SIDE)?;
        let factor = model.pipeline.factor();
        ensure!(
            height.is_multiple_of(factor) && width.is_multiple_of(factor),
            "--size {height}x{width}: the sides of this model's pictures are multiples of {factor}"
        );
        *sample = [sample[0], height / factor, width / factor];
        Ok(model.pipeline.resize([height, width])?)
    }

    /// Guides a teacher of text away from a prompt.
    pub fn guide_away_from(&mut self, negative: &str) -> Result<()> {
        match self {
            Source::Folder { model, .. } => Ok(model.pipeline.guide_away_from(negative)?),
            Source::File { .. } => Ok(()),
        }
    }

    /// Guides a teacher; others are left as they are.
    pub fn guide(&mut self, scale: f64) -> Result<()> {
        if let Source::Folder { model, .. } = self
            && let Model { pipeline, passes: Passes::Many { guidance_scale, .. } } = model.as_mut()
        {
            crate::config::not_negative("--guidance", scale)?;
            let denoiser = &pipeline.denoiser;
            let (takes, knows_none) = (denoiser.network.takes(), denoiser.unconditional.is_some());
            crate::config::check_guidance("--guidance", scale, &takes, knows_none)?;
            *guidance_scale = pipeline.text.as_mut().map_or(scale, |text| text.guide(scale));
        }
        Ok(())
    }

    /// `(C, H, W)` of a picture.
    pub fn shape(&self) -> [usize; 3] {
        match self {
            Source::Folder { model, sample, .. } => model.pipeline.picture_shape(*sample),
            Source::File { generator, .. } => generator.info().shape(),
        }
    }

    /// `(C, H, W)` of the noise of a picture.
    pub fn noise_shape(&self) -> [usize; 3] {
        match self {
            Source::Folder { sample, .. } => *sample,
            Source::File { generator, .. } => generator.info().shape(),
        }
    }

    /// Names of the classes; empty for an unconditional model.
    pub fn classes(&self) -> &[String] {
        match self {
            Source::Folder { classes, .. } => classes,
            Source::File { generator, .. } => &generator.info().classes,
        }
    }

    fn name(&self) -> String {
        match self {
            Source::Folder { model, .. } => match &model.passes {
                Passes::Many { sampler, n_steps, .. } => {
                    format!("the teacher ({n_steps} {sampler:?} steps)").to_lowercase()
                }
                Passes::Few { sigmas, .. } if sigmas.len() == 1 => "the generator".into(),
                Passes::Few { sigmas, .. } => format!("the generator ({} steps)", sigmas.len()),
            },
            Source::File { generator, .. } => format!("{} {}", generator.engine().kind, generator.engine().version),
        }
    }

    /// Pictures of this noise, and what was decoded, `batch` at a time on candle; prompts in turn where it is told text. `done`
    /// hears how many are made. One that is not finite is an error.
    pub fn make(
        &mut self,
        noise: &Array4<f32>,
        labels: &[i64],
        prompts: &[String],
        batch: usize,
        done: &dyn Fn(usize),
    ) -> Result<Made> {
        let made = match self {
            Source::File { generator, seed } => {
                let pictures = generator.run_seeded(noise.view(), labels, *seed)?.to_f32();
                Made { latents: None, pictures }
            }
            Source::Folder { model, .. } => {
                let values: Vec<f32> = noise.iter().copied().collect();
                let noise = Tensor::from_vec(values, noise.dim(), &Device::Cpu)?;
                match model.pipeline.text {
                    Some(_) => {
                        let told = told(&model.pipeline, prompts, noise.dim(0)?, batch)?;
                        model.make(&noise, &told, batch, done)?
                    }
                    None => model.make(&noise, &model.of_labels(labels, noise.dim(0)?)?, batch, done)?,
                }
            }
        };
        let broken = made.pictures.axis_iter(Axis(0)).position(|image| image.iter().any(|value| !value.is_finite()));
        ensure!(
            broken.is_none(),
            "picture {} of {} holds values that are not finite: its weights are broken, or it diverged in training",
            broken.unwrap_or(0),
            self.name()
        );
        Ok(made)
    }
}

/// What a network of text is told of `n` pictures: prompts in turn, each read once.
fn told(pipeline: &Pipeline, prompts: &[String], n: usize, batch: usize) -> Result<Condition<Tensor>> {
    let prompts: Vec<&str> = prompts.iter().take(n).map(String::as_str).collect();
    let parts: Vec<_> = prompts.chunks(batch).map(|part| pipeline.condition(part)).collect::<Result<_, _>>()?;
    let rows = Tensor::from_iter((0..n).map(|i| (i % prompts.len()) as u32), pipeline.denoiser.network.device())?;
    Ok(Condition::cat(&parts)?.try_map(|told| told.index_select(&rows, 0))?)
}

/// A generator's steps are its own.
fn check_steps(asked: Option<usize>, passes: usize) -> Result<()> {
    let Some(steps) = asked.filter(|steps| *steps != passes) else { return Ok(()) };
    let passes = if passes == 1 { "one pass".to_string() } else { format!("{passes} passes") };
    Err(WrongUsage(format!("--steps {steps}: this generator makes a picture in {passes}")).into())
}

/// Steps of a teacher's sampler where none are asked for: EDM's for pictures of this size, 35 passes.
const STEPS: usize = 18;
/// Pictures where no number is asked for.
const PICTURES: usize = 16;
/// Pictures per pass on candle where no number is asked for.
const BATCH: usize = 64;

fn noise(args: &SampleArgs, n: usize, shape: [usize; 3]) -> Result<Array4<f32>> {
    let Some(path) = &args.noise else {
        return Ok(dmd_runtime::picture_noise(args.seed, 0, n, shape));
    };
    let noise = npy::read(path, |[n, c, h, w]| {
        let [ec, eh, ew] = shape;
        ensure!([c, h, w] == shape, "noise of shape [{n}, {c}, {h}, {w}], expected [N, {ec}, {eh}, {ew}]");
        Ok(())
    })?;
    let n = noise.dim().0;
    ensure!(noise.iter().all(|v| v.is_finite()), "{}: holds values that are not finite", path.display());
    let wanted = args.n.unwrap_or(n);
    ensure!(wanted >= 1 && wanted <= n, "{}: holds {n} noises, -n asks for {wanted}", path.display());
    Ok(noise.slice(ndarray::s![..wanted, .., .., ..]).to_owned())
}

/// One label per picture, for a name, an index, or every class in turn; empty for an unconditional model.
pub fn labels(class: &str, classes: &[String], n: usize) -> Result<Vec<i64>> {
    if class == "all" {
        return Ok(if classes.is_empty() { Vec::new() } else { (0..n).map(|i| (i % classes.len()) as i64).collect() });
    }
    Ok(vec![classes::label("--class", class, classes)? as i64; n])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_go_by_name_index_or_in_turn() {
        let classes = ["cat".to_string(), "dog".to_string()];
        assert_eq!(labels("dog", &classes, 2).unwrap(), [1, 1]);
        assert_eq!(labels("0", &classes, 1).unwrap(), [0]);
        assert_eq!(labels("all", &classes, 3).unwrap(), [0, 1, 0]);
        assert!(labels("2", &classes, 1).is_err());
        assert!(labels("cat", &[], 1).is_err() && labels("all", &[], 1).unwrap().is_empty());
    }
}
