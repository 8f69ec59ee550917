//! `dmd sample`: pictures of a teacher, a generator or an exported file, from a seed or from given noise.

use super::{check_free, engine_options, is_exported, make_parent};
use crate::cli::{SampleArgs, WrongUsage};
use crate::memory::{self, Work};
use crate::output::say;
use crate::sample::Model;
use crate::{npy, picture};
use anyhow::{Result, bail, ensure};
use candle_core::{Device, Tensor};
use dmd_models::ModelFolder;
use ndarray::Array4;
use serde_json::{Value, json};
use std::time::Instant;

/// Makes pictures.
pub fn run(args: &SampleArgs, threads: Option<usize>) -> Result<Value> {
    if args.out.is_none() && args.npy.is_none() {
        return Err(WrongUsage("nothing to write: give --out GRID.png, --npy FILE.npy or both".into()).into());
    }
    crate::config::at_least_one("batch", args.batch as u64)?;
    for path in args.out.iter().chain(&args.npy) {
        check_free(path, args.force)?;
    }
    let mut source = Source::open(args, threads)?;
    if let Source::Folder { model, shape: [_, h, w], .. } = &source {
        model.check_memory(args.n.unwrap_or(PICTURES), [*h, *w], args.batch)?;
    }
    let noise = noise(args, source.shape())?;
    let labels = labels(&args.class, source.classes(), noise.dim().0)?;
    args.out.iter().chain(&args.npy).try_for_each(|path| make_parent(path))?;
    let started = Instant::now();
    let images = source.pictures(&noise, &labels, args.batch)?;
    let seconds = started.elapsed().as_secs_f64();
    if let Some(path) = &args.out {
        let scale = (128 / images.dim().2.max(1) as u32).max(1);
        picture::save_png(path, &picture::grid(&images, picture::columns(images.dim().0), scale))?;
    }
    if let Some(path) = &args.npy {
        npy::write(path, &images)?;
    }
    let n = images.dim().0;
    let written: Vec<_> = args.out.iter().chain(&args.npy).map(|path| path.display().to_string()).collect();
    say(&format!(
        "{n} pictures by {} in {seconds:.2} s ({:.2} ms each): {}",
        source.name(),
        seconds * 1e3 / n as f64,
        written.join(", ")
    ));
    Ok(json!({ "pictures": n, "model": source.name(), "seconds": seconds, "labels": labels, "written": written }))
}

/// What makes the pictures.
pub enum Source {
    /// A model folder, on candle.
    Folder {
        /// The model.
        model: Box<Model>,
        /// `(C, H, W)`.
        shape: [usize; 3],
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
    /// Opens what `args.model` names.
    pub fn open(args: &SampleArgs, threads: Option<usize>) -> Result<Self> {
        if is_exported(&args.model) {
            let generator = dmd_runtime::Generator::load(&args.model, engine_options(args.engine, threads))?;
            check_steps(args.steps, generator.info().passes())?;
            return Ok(Source::File { generator: Box::new(generator), seed: args.seed });
        }
        let device = args.device.open()?;
        let folder = ModelFolder::load(&args.model, &device);
        let folder = folder.map_err(|error| memory::explained(error.into(), Work::Networks))?;
        let [h, w] = folder.size()?;
        let model = match folder.generator(&device)? {
            Some(generator) => {
                let sigmas = folder.about.sigmas();
                check_steps(args.steps, sigmas.len())?;
                Model::of_steps(generator.denoiser, sigmas, args.seed)
            }
            None => {
                let n_steps = args.steps.unwrap_or(STEPS);
                crate::config::at_least_one("--steps", n_steps as u64)?;
                let denoiser = folder.denoiser(&device)?;
                Model::Teacher { denoiser, sampler: args.sampler, n_steps, guidance_scale: args.guidance }
            }
        };
        Ok(Source::Folder {
            model: Box::new(model),
            shape: [folder.config.in_channels, h, w],
            classes: folder.classes(),
        })
    }

    /// `(C, H, W)` of a picture.
    pub fn shape(&self) -> [usize; 3] {
        match self {
            Source::Folder { shape, .. } => *shape,
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
            Source::Folder { model, .. } => match model.as_ref() {
                Model::Teacher { sampler, n_steps, .. } => {
                    format!("the teacher ({n_steps} {sampler:?} steps)").to_lowercase()
                }
                Model::Generator(_) => "the generator".into(),
                Model::FewSteps { sigmas, .. } => format!("the generator ({} steps)", sigmas.len()),
            },
            Source::File { generator, .. } => format!("{} {}", generator.engine().kind, generator.engine().version),
        }
    }

    /// Pictures of this noise, `batch` at a time on candle.
    pub fn pictures(&mut self, noise: &Array4<f32>, labels: &[i64], batch: usize) -> Result<Array4<f32>> {
        match self {
            Source::File { generator, seed } => Ok(generator.run_seeded(noise.view(), labels, *seed)?.to_f32()),
            Source::Folder { model, .. } => {
                let values: Vec<f32> = noise.iter().copied().collect();
                model.pictures(&Tensor::from_vec(values, noise.dim(), &Device::Cpu)?, labels, batch)
            }
        }
    }
}

/// A generator's steps are its own.
fn check_steps(asked: Option<usize>, passes: usize) -> Result<()> {
    let Some(steps) = asked.filter(|steps| *steps != passes) else { return Ok(()) };
    match passes {
        1 => bail!("--steps {steps}: this generator makes a picture in one pass"),
        _ => bail!("--steps {steps}: this generator makes a picture in {passes} passes"),
    }
}

/// Steps of a teacher's sampler where none are asked for: EDM's for pictures of this size, 35 passes.
const STEPS: usize = 18;
/// Pictures where no number is asked for.
const PICTURES: usize = 16;
/// More pictures than this in one call is a slip of the finger.
const MAX_PICTURES: usize = 1_000_000;

fn noise(args: &SampleArgs, shape: [usize; 3]) -> Result<Array4<f32>> {
    let Some(path) = &args.noise else {
        let n = args.n.unwrap_or(PICTURES);
        ensure!((1..=MAX_PICTURES).contains(&n), "-n is {n}, expected 1 to {MAX_PICTURES}");
        return Ok(dmd_runtime::picture_noise(args.seed, 0, n, shape));
    };
    let noise = npy::read(path)?;
    let (n, c, h, w) = noise.dim();
    let [ec, eh, ew] = shape;
    ensure!(
        [c, h, w] == shape,
        "{}: noise of shape [{n}, {c}, {h}, {w}], expected [N, {ec}, {eh}, {ew}]",
        path.display()
    );
    ensure!(noise.iter().all(|v| v.is_finite()), "{}: holds values that are not finite", path.display());
    let wanted = args.n.unwrap_or(n);
    ensure!(wanted >= 1 && wanted <= n, "{}: holds {n} noises, -n asks for {wanted}", path.display());
    Ok(noise.slice(ndarray::s![..wanted, .., .., ..]).to_owned())
}

/// One label per picture, for a name, an index, or every class in turn; empty for an unconditional model.
pub fn labels(class: &str, classes: &[String], n: usize) -> Result<Vec<i64>> {
    if classes.is_empty() {
        ensure!(class == "all", "--class {class}: the model has no classes");
        return Ok(Vec::new());
    }
    if class == "all" {
        return Ok((0..n).map(|i| (i % classes.len()) as i64).collect());
    }
    let by_name = classes.iter().position(|name| name == class);
    match by_name.or_else(|| class.parse().ok().filter(|index| *index < classes.len())) {
        Some(label) => Ok(vec![label as i64; n]),
        None => bail!(
            "--class {class}: no such class, the model has {} (0 to {}) or all",
            classes.join(", "),
            classes.len() - 1
        ),
    }
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
        assert_eq!(
            labels("fox", &classes, 1).unwrap_err().to_string(),
            "--class fox: no such class, the model has cat, dog (0 to 1) or all"
        );
        assert!(labels("2", &classes, 1).is_err());
        assert!(labels("cat", &[], 1).is_err() && labels("all", &[], 1).unwrap().is_empty());
    }
}
