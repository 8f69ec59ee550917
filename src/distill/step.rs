//! The heart: one update of the generator, one of the fake score.
//!
//! ```text
//! x      = G(noise, cond)                                  generator, with gradient
//! x_t    = x + sigma·eps, sigma drawn in t_range           noise injection
//! x0_real, x0_fake = real_score(x_t), fake_score(x_t)      no gradient
//! grad   = h(r)·(x0_fake − x0_real) / mean|x − x0_real|    h = 1: reverse KL
//! loss   = ½·mse(x, stop(x − grad))  + λ_gan·softplus(−logit)  + λ_reg·distance(G(pair.noise), pair.image)
//! then, ratio times: fake_score learns to denoise the generator's samples (and its heads to tell real from fake)
//! ```

use super::draw::Draw;
use super::health::{Health, mean_probability};
use super::networks::{Networks, Samples};
use crate::config::{Config, ScoreLoss};
use crate::loss::{
    Matching, approximate_r1, denoising, density_ratio, discriminator, distribution_matching, generator_adversarial,
    rescaled_guidance, score_identity,
};
use crate::optim::{Gradients, average_into, ramped_decay, rate_at, read};
use crate::random::{Purpose, Random};
use anyhow::{Context, Result};
use candle_core::Tensor;
use dmd_models::Condition;

impl Networks {
    /// One update of the generator and of its averages; nothing else changes, unless the settings draw the fake score after.
    pub fn update_generator(&mut self, config: &Config, random: &Random, step: u64) -> Result<Health> {
        let draw = self.draw_for_generator(config, random, step)?;
        let (mut health, mut gradients, mut samples) = (Health::default(), Gradients::default(), Vec::new());
        let share = 1.0 / config.accumulate as f64;
        let parts = draw.parts(config.accumulate)?;
        let h = self.divergence_weights(config, step, &parts)?;
        for (i, part) in parts.iter().enumerate() {
            let h = h.as_ref().map(|h| &h[i * h.len() / parts.len()..(i + 1) * h.len() / parts.len()]);
            let (x, loss, measured) = self.generator_loss(config, part, h)?;
            gradients.add(self.generator_optimizer.gradients(&self.training.backward(&(loss * share)?)?))?;
            health.add(&measured, share);
            samples.push(x.detach());
        }
        let s = &config.generator;
        let rate = self.rate_factor * rate_at(s.rate, s.decay, s.warmup, step, config.steps);
        let gradients = self.group.sum(gradients)?;
        let norm = self.generator_optimizer.update(&gradients, &health.sum_of_losses()?, rate)?;
        for average in &self.averages {
            average_into(&average.vars, &self.generator_vars, ramped_decay(average.decay, step), &norm)?;
        }
        if config.fake_score.pull > 0.0 {
            // What the generator has just become, the critic has to learn anyway.
            average_into(&self.fake_vars, &self.generator_vars, 1.0 - config.fake_score.pull, &norm)?;
        }
        let x = Tensor::cat(&samples, 0)?;
        health.pend_samples(&x)?;
        // The one moment that an update waits for the device.
        let norms = health.read(&[norm])?;
        health.set("grad_norm", self.generator_optimizer.settle(norms[0]).context("loss_dm")?);
        self.last_samples = Some(Samples { x, cond: draw.cond });
        Ok(health)
    }

    /// The generator's loss on one part of a batch, `h` its samples' weights: its samples, the loss with its graph, and its
    /// numbers.
    fn generator_loss(&self, config: &Config, draw: &Draw, h: Option<&[f64]>) -> Result<(Tensor, Tensor, Health)> {
        let (terms, cond, sigma) = (&config.loss, &draw.cond, &draw.injection.sigma);
        let mut health = Health::default();
        let x = self.generator.denoise(&self.training, &draw.input, &[draw.level], cond)?;

        // Distribution matching stops here: the scores judge the sample, no gradient passes through them.
        let through = matches!(terms.scores, ScoreLoss::ScoreIdentity { .. });
        let x_t = draw.injection.add_to(&if through { x.clone() } else { x.detach() })?;
        let x0_real = self.x0_real(config, &x_t, sigma, cond)?;
        let of_fake = config.fake_score.guidance_scale;
        let x0_fake = self.fake_score_still.denoise_guided(&self.training, &x_t, sigma, cond, of_fake)?;
        let Matching { mut loss, real_error, score_gap } = match terms.scores {
            ScoreLoss::DistributionMatching => distribution_matching(&x, &x0_real, &x0_fake, h, terms.floor)?,
            ScoreLoss::ScoreIdentity { alpha } => score_identity(&x, &x0_real, &x0_fake, alpha, terms.floor)?,
        };
        health.pend_loss("loss_dm", &loss);
        health.pend("real_error", &real_error);
        health.pend("score_gap", &score_gap);
        if let Some(h) = h {
            health.set("h_max", h.iter().copied().fold(0.0, f64::max));
        }

        if let (Some(d), Some(injection)) = (&self.discriminator, &draw.adversary) {
            // Through the critic's encoder, which stays as it is, to the sample.
            let x_t = injection.add_to(&x)?;
            let maps = self.fake_score_still.features(&self.training, &x_t, &injection.sigma, cond)?;
            let loss_gan = generator_adversarial(&d.heads_still.logit(&maps)?)?;
            health.pend_loss("loss_gan", &loss_gan);
            loss = (loss + (loss_gan * terms.gan.weight)?)?;
        }
        if let (Some((_, comparison)), Some(pair)) = (&self.regression, &draw.pair) {
            let sigma = self.sigmas[0];
            let remade = self.generator.denoise(&self.training, &(&pair.noise * sigma)?, &[sigma], &pair.cond)?;
            let loss_regression = comparison.distance(&remade, &pair.image, &pair.cond)?;
            health.pend_loss("loss_regression", &loss_regression);
            loss = (loss + (loss_regression * terms.regression.weight)?)?;
        }
        Ok((x, loss, health))
    }

    /// The teacher's answer, guided as the settings say.
    fn x0_real(&self, config: &Config, x_t: &Tensor, sigma: &[f64], cond: &Condition<Tensor>) -> Result<Tensor> {
        let (scale, share) = (self.guidance_scale, config.real_score.rescale);
        if scale == 1.0 || share == 0.0 {
            return Ok(self.real_score.denoise_guided(&self.training, x_t, sigma, cond, scale)?);
        }
        let [with, without] = self.real_score.denoise_both(&self.training, x_t, sigma, cond)?;
        rescaled_guidance(&with, &without, scale, share)
    }

    /// h(r) of every sample of a batch, mean 1, from the discriminator's logit at x_t; none for reverse KL, and none before
    /// the discriminator has joined. The ratios are held against those of the whole batch, so the samples are made once
    /// more for it, without gradient. Waits for the device: the ratios' memory is kept here.
    fn divergence_weights(&mut self, config: &Config, step: u64, parts: &[Draw]) -> Result<Option<Vec<f64>>> {
        let divergence = config.loss.divergence;
        let Some(d) = &self.discriminator else { return Ok(None) };
        if !divergence.needs_discriminator() || step < config.loss.gan.start_step {
            return Ok(None);
        }
        let [low, high] = config.generator.t_range.map(|t| t * (self.real_score.levels.len() - 1) as f64);
        let (mut ratios, mut levels) = (Vec::new(), Vec::new());
        for draw in parts {
            let (cond, sigma) = (&draw.cond, &draw.injection.sigma);
            let x = self.generator_still.denoise(&self.training, &draw.input, &[draw.level], cond)?;
            let maps = self.fake_score_still.features(&self.training, &draw.injection.add_to(&x)?, sigma, cond)?;
            let logits: Vec<f32> = d.heads_still.logit(&maps)?.to_vec1()?;
            ratios.extend(logits.into_iter().map(|logit| density_ratio(f64::from(logit))));
            let index = |sigma: &f64| self.real_score.levels.index_of(*sigma);
            levels.extend(sigma.iter().map(|sigma| ((index(sigma) - low) / (high - low)).clamp(0.0, 1.0)));
        }
        Ok(Some(self.ratio_bins.weights(divergence, &ratios, &levels)))
    }

    /// One update of the fake score (and of the discriminator), the `turn`-th of this step; nothing else changes.
    pub fn update_fake_score(&mut self, config: &Config, random: &Random, step: u64, turn: u64) -> Result<Health> {
        let draw = self.draw_for_fake_score(config, random, step, turn)?;
        let (mut health, mut of_score, mut of_heads) = (Health::default(), Gradients::default(), Gradients::default());
        let share = 1.0 / config.accumulate as f64;
        for part in draw.parts(config.accumulate)? {
            let (loss, measured) = self.fake_score_loss(config, &part)?;
            let grads = self.training.backward(&(loss * share)?)?;
            of_score.add(self.fake_optimizer.gradients(&grads))?;
            if let (Some(d), Some(_)) = (&self.discriminator, &part.real) {
                of_heads.add(d.optimizer.gradients(&grads))?;
            }
            health.add(&measured, share);
        }
        let s = &config.fake_score;
        let update = step * config.ratio + turn;
        let rate = self.rate_factor * rate_at(s.rate, s.decay, s.warmup, update, config.steps * config.ratio);
        let (of_score, of_heads) = (self.group.sum(of_score)?, self.group.sum(of_heads)?);
        let mut norms = vec![self.fake_optimizer.update(&of_score, &health.sum_of_losses()?, rate)?];
        if let (Some(d), Some(_)) = (&mut self.discriminator, &draw.real) {
            // Guarded by the score's norm: the heads stay where the score did.
            norms.push(d.optimizer.update(&of_heads, &norms[0], rate)?);
        }
        let norms = health.read(&norms)?;
        self.fake_optimizer.settle(norms[0]).context("loss_fake")?;
        if let (Some(d), Some(norm)) = (&mut self.discriminator, norms.get(1)) {
            d.optimizer.settle(*norm).context("loss_discriminator")?;
        }
        Ok(health)
    }

    /// The critic's loss on one part of a batch.
    fn fake_score_loss(&self, config: &Config, draw: &Draw) -> Result<(Tensor, Health)> {
        let mut health = Health::default();
        let (cond, injection, gan) = (&draw.cond, &draw.injection, &config.loss.gan);
        // Stop: the generator's samples are data here.
        let x = match &draw.samples {
            Some(x) => x.clone(),
            None => self.generator_still.denoise(&self.training, &draw.input, &[draw.level], cond)?,
        };
        // A few may be told nothing, so that the critic learns what the guidance of its own answers needs.
        let (told, scale) = (draw.told.as_ref().unwrap_or(cond), config.fake_score.guidance_scale);
        let (x_t, sigma) = (injection.add_to(&x)?, &injection.sigma);
        let denoised = self.fake_score.denoise_guided(&self.training, &x_t, sigma, told, scale)?;
        let weight = |&sigma: &f64| config.fake_score.weight.at(sigma, self.sigma_data());
        let mut loss = denoising(&denoised, &x, &injection.sigma.iter().map(weight).collect::<Vec<_>>())?;
        health.pend_loss("loss_fake", &loss);

        if let (Some(d), Some(on_fake), Some((real, on_real))) = (&self.discriminator, &draw.adversary, &draw.real) {
            let logit = |x_t: &Tensor, sigma: &[f64], cond: &Condition<Tensor>| -> Result<Tensor> {
                d.heads.logit(&self.fake_score.features(&self.training, x_t, sigma, cond)?)
            };
            let logit_fake = logit(&on_fake.add_to(&x)?, &on_fake.sigma, cond)?;
            let real_t = on_real.add_to(&real.images)?;
            let logit_real = logit(&real_t, &on_real.sigma, &real.cond)?;
            let mut loss_d = discriminator(&logit_fake, &logit_real)?;
            if gan.r1 > 0.0 {
                let nearby = (&real_t + (&on_fake.eps * R1_NOISE)?)?;
                loss_d =
                    (loss_d + (approximate_r1(&logit_real, &logit(&nearby, &on_real.sigma, &real.cond)?)? * gan.r1)?)?;
            }
            health.pend_loss("loss_discriminator", &loss_d);
            health.pend("d_real", &mean_probability(&logit_real)?);
            health.pend("d_fake", &mean_probability(&logit_fake)?);
            loss = (loss + (loss_d * gan.critic_weight)?)?;
        }
        Ok((loss, health))
    }

    /// mean|G(z, c) − G(z, c')| over mean|G(z, c) − G(z', c)| for `n` noises and prompts in turn, c' the next prompt of each:
    /// 0 where prompts are ignored. None without text, or with one prompt.
    pub fn prompt_effect(&self, random: &Random, n: usize) -> Result<Option<f64>> {
        let Some(prompts) = self.prompts.as_ref().filter(|prompts| prompts.len() > 1) else { return Ok(None) };
        let told = |first: usize| -> Result<Condition<Tensor>> {
            let picks: Vec<u32> = (first..first + n).map(|i| (i % prompts.len()) as u32).collect();
            prompts.told(&picks, &random.device)
        };
        let noise = |key: u64| random.normal(Purpose::PromptEffect, key, &self.shape_of(n));
        let sigma = self.sigmas[0];
        let generate = |noise: &Tensor, cond: &Condition<Tensor>| -> Result<Tensor> {
            Ok(self.generator_still.denoise(&self.training, &(noise * sigma)?, &[sigma], cond)?)
        };
        let (z, cond) = (noise(0)?, told(0)?);
        let x = generate(&z, &cond)?;
        let far = |other: Tensor| -> Result<Tensor> { Ok((&x - other)?.abs()?.mean_all()?) };
        let distances = read(&[far(generate(&z, &told(1)?)?)?, far(generate(&noise(1)?, &cond)?)?])?;
        // Where other noise changes nothing either, the generator makes one picture, which the monitor says otherwise.
        Ok(Some(distances[0] / distances[1].max(f64::MIN_POSITIVE)))
    }

    /// The generator's samples without gradient, `(B, C, H, W)`, from the noise of the critic's first turn of a step.
    pub fn sample(&self, config: &Config, random: &Random, step: u64) -> Result<Tensor> {
        let draw = self.draw_for_fake_score(config, random, step, 0)?;
        Ok(self.generator_still.denoise(&self.training, &draw.input, &[draw.level], &draw.cond)?)
    }
}

/// Noise on a real picture for the approximate R1 penalty.
const R1_NOISE: f64 = 0.1;
