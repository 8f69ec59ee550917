//! One training step of a picture model, noise level by noise level: the generator's sample, the same with noise, what
//! each score makes of it, and the gradient that follows.

use crate::config::{self, Config, RealScoreSettings, check_prompts};
use crate::loss::distribution_matching;
use crate::output::say;
use crate::picture::{grid, labelled_table};
use crate::prompts;
use crate::random::picture_noise;
use crate::sample::{Model, Sampler, labels_in_turn};
use crate::train::Run;
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use dmd_models::{Condition, Denoiser, Eager, ModelFolder};
use image::RgbImage;
use ndarray::Array4;
use serde_json::{Value, json};
use std::path::Path;

/// Pictures in a cell.
const PICTURES: usize = 3;
/// Sides of a cell's pictures are enlarged to about this many pixels.
const SIDE: u32 = 64;
/// Noise levels shown, where the teacher knows them.
const SIGMAS: [f64; 6] = [0.05, 0.2, 0.5, 1.0, 2.5, 10.0];
const STEPS: usize = 18;

/// What takes part in the step.
pub struct Players {
    teacher: ModelFolder,
    generator: Model,
    fake_score: Denoiser,
    /// The run's guidance of the real score; none without.
    guidance: RealScoreSettings,
    /// What a teacher of text is told.
    prompts: Vec<String>,
    /// What the fake score is, in words.
    pub fake_score_is: String,
}

impl Players {
    /// `generator`: a generator's folder; else that of the run; else the teacher's own samples stand in for it. The fake
    /// score is that of the run's last checkpoint; without a run it is the teacher, as when a run begins. `prompts`: a file
    /// for a teacher of text; else that of the run.
    pub fn load(teacher: &Path, generator: Option<&Path>, run: Option<&Path>, prompts: Option<&Path>) -> Result<Self> {
        let teacher = ModelFolder::load(teacher, &Device::Cpu).context("the teacher")?;
        let folder = generator.map(Path::to_path_buf).or_else(|| run.map(|run| run.join("generator")));
        let generator = match &folder {
            None => Model::teacher(teacher.denoiser(&Device::Cpu)?, Sampler::Heun, STEPS, 1.0),
            Some(folder) => {
                let loaded = ModelFolder::load(folder, &Device::Cpu).context("the generator")?;
                ensure!(
                    loaded.sample_shape()? == teacher.sample_shape()?,
                    "{}: its pictures are not of the teacher's size",
                    folder.display()
                );
                let generator = loaded.generator(&Device::Cpu)?;
                let generator = generator.with_context(|| format!("{}: holds no generator", folder.display()))?;
                Model::of_steps(generator.denoiser, loaded.about.sigmas(), 0)
            }
        };
        let mut config = Config::default();
        let (fake_score, fake_score_is) = match run {
            None => (teacher.denoiser(&Device::Cpu)?, "the teacher".into()),
            Some(run) => {
                let checkpoint = Run::last_checkpoint_in(run)?
                    .with_context(|| format!("{}: holds no checkpoint yet", run.display()))?;
                let weights = checkpoint.part("fake_score")?;
                let is = format!("that of {} at step {}", run.display(), checkpoint.step);
                config = config::read(&run.join("config.toml"))?;
                let fake_score = teacher.denoiser_on(&weights).context("the run's fake score")?;
                (fake_score, is)
            }
        };
        config.prompts = prompts.map_or(config.prompts, |path| path.display().to_string());
        check_prompts(&config, &teacher.config.takes())?;
        let prompts = match config.prompts.is_empty() {
            true => Vec::new(),
            false => prompts::read(Path::new(&config.prompts))?,
        };
        Ok(Players { teacher, generator, fake_score, fake_score_is, guidance: config.real_score, prompts })
    }

    /// The picture, and its numbers by noise level.
    pub fn panel(&self, seed: u64) -> Result<(RgbImage, Value)> {
        let mut pipeline = self.teacher.pipeline(&Device::Cpu)?;
        let RealScoreSettings { mut guidance_scale, ref negative, .. } = self.guidance;
        if let Some(text) = &mut pipeline.text {
            guidance_scale = text.guide(guidance_scale);
        }
        if !negative.is_empty() {
            pipeline.guide_away_from(negative)?;
        }
        let real_score = &pipeline.denoiser;
        let shape = self.teacher.sample_shape()?;
        let cond = match self.prompts.is_empty() {
            true => Condition::of_classes(labels_in_turn(PICTURES, real_score.n_classes()), &Device::Cpu)?,
            false => {
                let in_turn = self.prompts.iter().cycle().take(PICTURES).map(String::as_str);
                pipeline.condition(&in_turn.collect::<Vec<_>>())?
            }
        };
        let noise = picture_noise(seed, 0, PICTURES, shape, &Device::Cpu)?;
        let x = self.generator.make(&noise, &cond, PICTURES, &|_| {})?.pictures;
        let x = Tensor::from_vec(x.iter().copied().collect::<Vec<f32>>(), x.dim(), &Device::Cpu)?;
        let eps = picture_noise(seed, PICTURES as u64, PICTURES, shape, &Device::Cpu)?;

        let scale = (SIDE / pipeline.picture_shape(shape)[2].max(1) as u32).max(1);
        let cell = |samples: &Tensor| -> Result<RgbImage> {
            let images = pipeline.pictures(samples)?;
            let values = images.flatten_all()?.to_vec1()?;
            Ok(grid(&Array4::from_shape_vec(images.dims4()?, values)?, PICTURES, scale))
        };
        let mut rows: Vec<(&str, Vec<RgbImage>)> =
            ["x", "x_t", "x0_real", "x0_fake", "grad"].map(|name| (name, Vec::new())).into();
        let (mut columns, mut numbers) = (Vec::new(), Vec::new());
        say(&format!("{:>8} {:>14} {:>14} {:>10}", "sigma", "|x - x0_real|", "|fake - real|", "|grad|"));
        let known = real_score.levels.sigma_min()..=real_score.levels.sigma_max();
        for sigma in SIGMAS.into_iter().filter(|sigma| known.contains(sigma)) {
            let x_t = (&x + (&eps * sigma)?)?;
            let x0_real = real_score.denoise_guided(&Eager, &x_t, &[sigma], &cond, guidance_scale)?;
            let x0_fake = self.fake_score.denoise(&Eager, &x_t, &[sigma], &cond)?;
            let (grad, step) = gradient(&x, &x0_real, &x0_fake)?;
            // Noise would drive x_t out of what a picture can show.
            let shown = (&x_t / (1.0 + sigma * sigma).sqrt())?;
            for ((_, cells), samples) in rows.iter_mut().zip([&x, &shown, &x0_real, &x0_fake, &grad]) {
                cells.push(cell(samples)?);
            }
            columns.push(format!("sigma {sigma}"));
            let [error, gap, size] = step;
            say(&format!("{sigma:8} {error:14.4} {gap:14.4} {size:10.4}"));
            numbers.push(json!({ "sigma": sigma, "real_error": error, "score_gap": gap, "gradient": size }));
        }
        Ok((labelled_table(&columns, &rows), json!(numbers)))
    }
}

/// The loss's own gradient at x, in units of its elements, with mean|x − x0_real|, mean|x0_fake − x0_real| and mean|grad|.
fn gradient(x: &Tensor, x0_real: &Tensor, x0_fake: &Tensor) -> Result<(Tensor, [f64; 3])> {
    let var = Var::from_tensor(x)?;
    let matching = distribution_matching(&var, x0_real, x0_fake, None, 0.0)?;
    let grads = matching.loss.backward()?;
    // The loss is a mean: its gradient with respect to one element is that element's own over their number.
    let grad = (grads.get(&var).context("the loss has no gradient")? * x.elem_count() as f64)?;
    let number = |t: &Tensor| -> Result<f64> { Ok(f64::from(t.to_scalar::<f32>()?)) };
    let size = number(&grad.abs()?.mean_all()?)?;
    Ok((grad, [number(&matching.real_error)?, number(&matching.score_gap)?, size]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reference 7.1's point: g = −4.2845528455.
    #[test]
    fn the_gradient_is_shown_per_element() {
        let one = |v: f32| Tensor::full(v, (1, 1, 1, 1), &Device::Cpu).unwrap();
        let (grad, [error, gap, size]) = gradient(&one(0.2), &one(0.08), &one(-0.434_146_34)).unwrap();
        let grad: Vec<f32> = grad.flatten_all().unwrap().to_vec1().unwrap();
        assert!((grad[0] + 4.284_552_8).abs() < 1e-4 && (size - 4.284_552_8).abs() < 1e-4);
        assert!((error - 0.12).abs() < 1e-6 && (gap - 0.514_146_34).abs() < 1e-6);
    }
}
