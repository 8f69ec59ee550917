//! The heart: one update of the generator, one of the fake score.
//!
//! ```text
//! x      = G(noise, label)                                 generator, with gradient
//! x_t    = x + sigma·eps, sigma drawn in t_range           noise injection
//! x0_real, x0_fake = real_score(x_t), fake_score(x_t)      no gradient
//! grad   = (x0_fake − x0_real) / mean|x − x0_real|
//! loss   = ½·mse(x, stop(x − grad))
//! then, ratio times: fake_score learns to denoise the generator's samples
//! ```

use crate::config::Config;
use crate::loss::{denoising, distribution_matching, fake_score_weight};
use crate::optim::{AdamW, Decay, Optimizer, rate_at};
use crate::random::{Purpose, Random};
use crate::run::finite;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use dmd_models::denoiser::Generator;
use dmd_models::{Denoiser, Eager, ModelFolder, Prediction, Weights};
use std::collections::BTreeMap;

/// Generator, real score and fake score with what trains them.
pub struct Networks {
    /// The student, with gradient.
    generator: Generator,
    /// The same weights outside the autograd graph.
    generator_still: Generator,
    /// The teacher, frozen.
    real_score: Denoiser,
    /// The critic, with gradient.
    fake_score: Denoiser,
    /// The same weights outside the autograd graph.
    fake_score_still: Denoiser,
    /// The generator's weights.
    pub generator_vars: BTreeMap<String, Var>,
    /// The fake score's weights.
    pub fake_vars: BTreeMap<String, Var>,
    /// The moving average of the generator's weights.
    pub average: BTreeMap<String, Var>,
    /// A view of it to build a network on.
    pub averaged: Weights,
    /// Moments of the generator.
    pub generator_optimizer: Optimizer,
    /// Moments of the fake score.
    pub fake_optimizer: Optimizer,
    /// `(C, H, W)` of a picture.
    shape: [usize; 3],
}

/// The numbers that tell how a run goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    /// Distribution-matching loss.
    pub loss_dm: f64,
    /// Mean loss of the fake score over the step's updates.
    pub loss_fake: f64,
    /// Mean of the generator's samples.
    pub sample_mean: f64,
    /// Their standard deviation.
    pub sample_std: f64,
    /// mean|x − x0_real|.
    pub real_error: f64,
    /// mean|x0_fake − x0_real|.
    pub score_gap: f64,
    /// Norm of the generator's gradient before clipping.
    pub grad_norm: f64,
}

impl Health {
    /// Names as in metrics.jsonl.
    pub fn values(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("loss_dm", self.loss_dm),
            ("loss_fake", self.loss_fake),
            ("sample_mean", self.sample_mean),
            ("sample_std", self.sample_std),
            ("real_error", self.real_error),
            ("score_gap", self.score_gap),
            ("grad_norm", self.grad_norm),
        ]
    }
}

impl Networks {
    /// All three begin as the teacher.
    pub fn new(teacher: &ModelFolder, sigma: f64, settings: AdamW, device: &Device) -> Result<Self> {
        let start = teacher.weights.to(DType::F32, device)?;
        let (generator_view, generator_vars) = start.trainable()?;
        let (fake_view, fake_vars) = start.trainable()?;
        let (averaged, average) = start.trainable()?;
        let generator = |weights: &Weights| -> Result<Generator> {
            Ok(Generator { denoiser: teacher.denoiser_on(weights)?, sigma })
        };
        let [height, width] = teacher.size()?;
        Ok(Networks {
            generator: generator(&generator_view)?,
            generator_still: generator(&generator_view.detached())?,
            real_score: teacher.denoiser_on(&start.detached())?,
            fake_score: teacher.denoiser_on(&fake_view)?,
            fake_score_still: teacher.denoiser_on(&fake_view.detached())?,
            generator_optimizer: Optimizer::new(&generator_vars, settings)?,
            fake_optimizer: Optimizer::new(&fake_vars, settings)?,
            shape: [teacher.config.in_channels, height, width],
            generator_vars,
            fake_vars,
            average,
            averaged,
        })
    }

    /// One update of the generator; only the generator changes.
    pub fn update_generator(&mut self, config: &Config, random: &Random, step: u64) -> Result<Health> {
        let n = config.batch;
        let settings = &config.generator;
        let noise = random.normal(Purpose::GeneratorNoise, step, &self.shape_of(n))?;
        let label = random.labels(Purpose::GeneratorLabel, step, n, self.real_score.n_classes())?;
        let x = self.generator.generate(&Eager, &noise, label.as_ref())?;

        let sigma = self.draw_levels(random, Purpose::GeneratorLevel, step, n, settings.t_range);
        let eps = random.normal(Purpose::GeneratorEps, step, &self.shape_of(n))?;
        // Stop: the scores judge the sample, no gradient passes through them.
        let x_t = noised(&x.detach(), &sigma, &eps)?;
        let x0_real = self.real_score.denoise(&Eager, &x_t, &sigma, label.as_ref())?;
        let x0_fake = self.fake_score_still.denoise(&Eager, &x_t, &sigma, label.as_ref())?;

        let matching = distribution_matching(&x, &x0_real, &x0_fake, None)?;
        let loss_dm = finite(step + 1, "loss_dm", &matching.loss)?;
        let rate = rate_at(settings.rate, settings.decay, settings.warmup, step, config.steps);
        let grad_norm = self
            .generator_optimizer
            .update(&matching.loss.backward()?, rate)
            .with_context(|| format!("step {}: loss_dm", step + 1))?;
        let (sample_mean, sample_std) = mean_and_std(&x.detach())?;
        Ok(Health {
            loss_dm,
            loss_fake: 0.0,
            sample_mean,
            sample_std,
            real_error: scalar(&matching.real_error)?,
            score_gap: scalar(&matching.score_gap)?,
            grad_norm,
        })
    }

    /// One update of the fake score on fresh samples, the `turn`-th of this step; only the fake score changes.
    /// Returns its loss.
    pub fn update_fake_score(&mut self, config: &Config, random: &Random, step: u64, turn: u64) -> Result<f64> {
        let n = config.batch;
        let settings = &config.fake_score;
        let draw = step * config.ratio + turn;
        let noise = random.normal(Purpose::CriticNoise, draw, &self.shape_of(n))?;
        let label = random.labels(Purpose::CriticLabel, draw, n, self.real_score.n_classes())?;
        // Stop: the generator's samples are data here.
        let x = self.generator_still.generate(&Eager, &noise, label.as_ref())?;

        let sigma = self.draw_levels(random, Purpose::CriticLevel, draw, n, settings.t_range);
        let eps = random.normal(Purpose::CriticEps, draw, &self.shape_of(n))?;
        let denoised = self.fake_score.denoise(&Eager, &noised(&x, &sigma, &eps)?, &sigma, label.as_ref())?;
        let weights: Vec<f64> = sigma.iter().map(|&s| fake_score_weight(s, self.sigma_data())).collect();
        let loss = denoising(&denoised, &x, &weights)?;
        let value = finite(step + 1, "loss_fake", &loss)?;
        let rate = rate_at(settings.rate, Decay::Constant, settings.warmup, draw, config.steps * config.ratio);
        self.fake_optimizer.update(&loss.backward()?, rate).with_context(|| format!("step {}: loss_fake", step + 1))?;
        Ok(value)
    }

    /// The generator's samples without gradient, `(B, C, H, W)`.
    pub fn sample(&self, config: &Config, random: &Random, step: u64) -> Result<Tensor> {
        let noise = random.normal(Purpose::CriticNoise, step, &self.shape_of(config.batch))?;
        let label = random.labels(Purpose::CriticLabel, step, config.batch, self.real_score.n_classes())?;
        Ok(self.generator_still.generate(&Eager, &noise, label.as_ref())?)
    }

    /// Noise levels uniform over the table's indices, as in DMD and DMD2.
    fn draw_levels(&self, random: &Random, purpose: Purpose, step: u64, n: usize, [low, high]: [f64; 2]) -> Vec<f64> {
        let levels = &self.real_score.levels;
        let indices = random.indices(purpose, step, n, levels.index_range(low, high));
        indices.into_iter().map(|i| levels.sigma(i)).collect()
    }

    /// Standard deviation of the data: the teacher's own where it states one.
    fn sigma_data(&self) -> f64 {
        match self.real_score.prediction {
            Prediction::Edm { sigma_data, .. } => sigma_data,
            _ => 0.5,
        }
    }

    fn shape_of(&self, n: usize) -> [usize; 4] {
        let [c, h, w] = self.shape;
        [n, c, h, w]
    }
}

/// x + sigma·eps, sigma per sample.
fn noised(x: &Tensor, sigma: &[f64], eps: &Tensor) -> Result<Tensor> {
    let sigma: Vec<f32> = sigma.iter().map(|&s| s as f32).collect();
    let sigma = Tensor::from_vec(sigma, (x.dim(0)?, 1, 1, 1), x.device())?;
    Ok((x + eps.broadcast_mul(&sigma)?)?)
}

fn mean_and_std(x: &Tensor) -> Result<(f64, f64)> {
    let mean = scalar(&x.mean_all()?)?;
    let variance = scalar(&(x - mean)?.sqr()?.mean_all()?)?;
    Ok((mean, variance.sqrt()))
}

fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}
