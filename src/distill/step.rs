//! The heart: one update of the generator, one of the fake score.
//!
//! ```text
//! x      = G(noise, label)                                 generator, with gradient
//! x_t    = x + sigma·eps, sigma drawn in t_range           noise injection
//! x0_real, x0_fake = real_score(x_t), fake_score(x_t)      no gradient
//! grad   = h(r)·(x0_fake − x0_real) / mean|x − x0_real|    h = 1: reverse KL
//! loss   = ½·mse(x, stop(x − grad))  + λ_gan·softplus(−logit)  + λ_reg·distance(G(pair.noise), pair.image)
//! then, ratio times: fake_score learns to denoise the generator's samples (and its heads to tell real from fake)
//! ```

use super::discriminator::Discriminator;
use super::draw::{Draw, Injection};
use crate::config::{Config, ScoreLoss};
use crate::loss::{
    RatioBins, approximate_r1, denoising, density_ratio, discriminator, distribution_matching, generator_adversarial,
    score_identity,
};
use crate::optim::{Optimizer, average_into, ramped_decay, rate_at};
use crate::pairs::Pairs;
use crate::random::{Purpose, Random};
use crate::regression::Comparison;
use crate::run::finite;
use crate::sample::input_of_pass;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor, Var};
use dmd_models::{Denoiser, Eager, ModelFolder, Prediction, Weights};
use std::collections::BTreeMap;

/// Generator, real score and fake score with what trains them.
pub struct Networks {
    /// The student, with gradient, and its noise levels, one per pass.
    generator: Denoiser,
    /// The same weights outside the autograd graph.
    generator_still: Denoiser,
    /// Its noise levels, one per pass, descending.
    pub sigmas: Vec<f64>,
    /// The teacher, frozen.
    real_score: Denoiser,
    /// The critic, with gradient.
    fake_score: Denoiser,
    /// The same weights outside the autograd graph.
    fake_score_still: Denoiser,
    /// Heads on the critic's encoder, for the adversarial term and the density ratio.
    pub discriminator: Option<Discriminator>,
    /// Mean density ratios, for divergences other than reverse KL.
    pub ratio_bins: RatioBins,
    /// The regression term's pairs and its distance.
    regression: Option<(Pairs, Comparison)>,
    /// Real pictures in the teacher's labels.
    reality: Option<Reality>,
    /// The generator's weights.
    pub generator_vars: BTreeMap<String, Var>,
    /// The fake score's weights.
    pub fake_vars: BTreeMap<String, Var>,
    /// Moving averages of the generator's weights, the exported one first.
    pub averages: Vec<Average>,
    /// Moments of the generator.
    pub generator_optimizer: Optimizer,
    /// Moments of the fake score.
    pub fake_optimizer: Optimizer,
    /// What both rates are multiplied by; below 1 after a run came back from trouble.
    pub rate_factor: f64,
    /// The samples of the generator's last update, for a critic that shares them.
    last_samples: Option<Samples>,
    /// `(C, H, W)` of a picture.
    shape: [usize; 3],
}

/// A moving average of the generator's weights.
pub struct Average {
    /// What an update leaves of it.
    pub decay: f64,
    /// Its values.
    pub vars: BTreeMap<String, Var>,
    /// A view of them to build a network on.
    pub view: Weights,
}

/// Real pictures, as floats when drawn.
pub struct Reality {
    /// All of them.
    pub pictures: crate::data::Pictures,
}

/// What the networks begin as, and what they learn from besides the teacher: by default, nothing.
#[derive(Default)]
pub struct Beginning {
    /// The generator's weights; none for the teacher's.
    pub generator: Option<Weights>,
    /// The fake score's weights; none for the teacher's.
    pub fake_score: Option<Weights>,
    /// Real pictures, labelled as the teacher's classes.
    pub reality: Option<Reality>,
    /// Noise–picture pairs.
    pub pairs: Option<Pairs>,
}

/// Pictures of the generator with their labels.
struct Samples {
    x: Tensor,
    label: Option<Tensor>,
}

/// The numbers that tell how a run goes; those of terms that are off are absent.
#[derive(Clone, Debug, Default)]
pub struct Health(BTreeMap<&'static str, f64>);

impl FromIterator<(&'static str, f64)> for Health {
    fn from_iter<I: IntoIterator<Item = (&'static str, f64)>>(numbers: I) -> Self {
        Health(numbers.into_iter().collect())
    }
}

impl Health {
    /// The number of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// Names as in metrics.jsonl, in reading order.
    pub fn values(&self) -> Vec<(&'static str, f64)> {
        ORDER.iter().filter_map(|name| Some((*name, self.get(name)?))).collect()
    }

    /// Sets a number.
    pub fn set(&mut self, name: &'static str, value: f64) {
        self.0.insert(name, value);
    }

    /// Adds a share of another's numbers to these.
    pub fn add(&mut self, other: &Health, share: f64) {
        for (name, value) in &other.0 {
            *self.0.entry(name).or_insert(0.0) += share * value;
        }
    }
}

/// Distribution-matching (or score-identity) loss, the critic's mean loss, the other terms; mean and standard deviation
/// of the samples; mean|x − x0_real| and mean|x0_fake − x0_real|; what the discriminator thinks of real and fake;
/// the norm of the generator's gradient before clipping.
const ORDER: [&str; 13] = [
    "loss_dm",
    "loss_fake",
    "loss_gan",
    "loss_discriminator",
    "loss_regression",
    "sample_mean",
    "sample_std",
    "real_error",
    "score_gap",
    "d_real",
    "d_fake",
    "h_max",
    "grad_norm",
];

impl Networks {
    /// All three begin as the teacher, unless `beginning` says otherwise.
    pub fn new(
        teacher: &ModelFolder,
        sigmas: &[f64],
        config: &Config,
        beginning: Beginning,
        random: &Random,
    ) -> Result<Self> {
        let device = &random.device;
        let start = teacher.weights.to(DType::F32, device)?;
        let or_start = |weights: Option<Weights>| weights.map_or(Ok(start.clone()), |w| w.to(DType::F32, device));
        let student = or_start(beginning.generator)?;
        let (generator_view, generator_vars) = student.trainable()?;
        let (fake_view, fake_vars) = or_start(beginning.fake_score)?.trainable()?;
        let average = |&decay: &f64| -> Result<Average> {
            let (view, vars) = student.trainable()?;
            Ok(Average { decay, vars, view })
        };
        let [height, width] = teacher.size()?;
        let shape = [teacher.config.in_channels, height, width];
        let real_score = teacher.denoiser_on(&start.detached())?;
        let gan = &config.loss.gan;
        let discriminator = match gan.on() {
            true => Some(Discriminator::new(
                &feature_shapes(&real_score, shape)?,
                gan.resolutions,
                config.optimizer,
                random,
            )?),
            false => None,
        };
        let regression = match beginning.pairs {
            Some(pairs) => {
                let comparison = Comparison::new(&config.loss.regression.distance, &real_score)?;
                Some((pairs, comparison))
            }
            None => None,
        };
        Ok(Networks {
            generator: teacher.denoiser_on(&generator_view)?,
            generator_still: teacher.denoiser_on(&generator_view.detached())?,
            sigmas: sigmas.to_vec(),
            real_score,
            fake_score: teacher.denoiser_on(&fake_view)?,
            fake_score_still: teacher.denoiser_on(&fake_view.detached())?,
            discriminator,
            ratio_bins: RatioBins::new(RATIO_BINS, config.loss.ratio_memory),
            regression,
            reality: beginning.reality,
            generator_optimizer: Optimizer::new(&generator_vars, config.optimizer)?,
            fake_optimizer: Optimizer::new(&fake_vars, config.optimizer)?,
            averages: config.generator.ema.decays().iter().map(average).collect::<Result<_>>()?,
            generator_vars,
            fake_vars,
            rate_factor: 1.0,
            last_samples: None,
            shape,
        })
    }

    /// The teacher, as the student sees it.
    pub fn real_score(&self) -> &Denoiser {
        &self.real_score
    }

    /// One update of the generator and of its averages; nothing else changes.
    pub fn update_generator(&mut self, config: &Config, random: &Random, step: u64) -> Result<Health> {
        let draw = self.draw_for_generator(config, random, step)?;
        let (mut health, mut gradients, mut samples) = (Health::default(), None, Vec::new());
        let share = 1.0 / config.accumulate as f64;
        for part in draw.parts(config.accumulate)? {
            let (x, loss, measured) = self.generator_loss(config, step, &part)?;
            self.generator_optimizer.gradients(&(loss * share)?.backward()?).add_to(&mut gradients)?;
            health.add(&measured, share);
            samples.push(x.detach());
        }
        let s = &config.generator;
        let rate = self.rate_factor * rate_at(s.rate, s.decay, s.warmup, step, config.steps);
        let gradients = gradients.expect("a batch has at least one part: accumulate was checked");
        health.set("grad_norm", self.generator_optimizer.update(&gradients, rate).context("loss_dm")?);
        for average in &self.averages {
            average_into(&average.vars, &self.generator_vars, ramped_decay(average.decay, step))?;
        }
        let x = Tensor::cat(&samples, 0)?;
        let (mean, std) = mean_and_std(&x)?;
        health.set("sample_mean", mean);
        health.set("sample_std", std);
        self.last_samples = Some(Samples { x, label: draw.label });
        Ok(health)
    }

    /// The generator's loss on one part of a batch: its samples, the loss with its graph, and its numbers.
    fn generator_loss(&mut self, config: &Config, step: u64, draw: &Draw) -> Result<(Tensor, Tensor, Health)> {
        let (terms, label, sigma) = (&config.loss, draw.label.as_ref(), &draw.injection.sigma);
        let mut health = Health::default();
        let x = self.generator.denoise(&Eager, &draw.input, &[draw.level], label)?;

        // Distribution matching stops here: the scores judge the sample, no gradient passes through them.
        let through = matches!(terms.scores, ScoreLoss::ScoreIdentity { .. });
        let x_t = draw.injection.add_to(&if through { x.clone() } else { x.detach() })?;
        let scale = config.real_score.guidance_scale;
        let x0_real = self.real_score.denoise_guided(&Eager, &x_t, sigma, label, scale)?;
        let x0_fake = self.fake_score_still.denoise(&Eager, &x_t, sigma, label)?;
        let h = self.divergence_weights(config, step, &x_t, draw)?;
        let matching = distribution_matching(&x, &x0_real, &x0_fake, h.as_deref())?;
        let mut loss = match terms.scores {
            ScoreLoss::DistributionMatching => matching.loss,
            ScoreLoss::ScoreIdentity { alpha } => score_identity(&x, &x0_real, &x0_fake, alpha)?,
        };
        health.set("loss_dm", finite("loss_dm", &loss)?);
        health.set("real_error", scalar(&matching.real_error)?);
        health.set("score_gap", scalar(&matching.score_gap)?);
        if let Some(h) = h {
            health.set("h_max", h.into_iter().fold(0.0, f64::max));
        }

        if let (Some(d), Some(injection)) = (&self.discriminator, &draw.adversary)
            && terms.gan.weight > 0.0
            && step >= terms.gan.start_step
        {
            // Through the critic's encoder, which stays as it is, to the sample.
            let maps = self.fake_score_still.features(&Eager, &injection.add_to(&x)?, &injection.sigma, label)?;
            let loss_gan = generator_adversarial(&d.heads_still.logit(&maps)?)?;
            health.set("loss_gan", finite("loss_gan", &loss_gan)?);
            loss = (loss + (loss_gan * terms.gan.weight)?)?;
        }
        if let (Some((_, comparison)), Some(pair)) = (&self.regression, &draw.pair) {
            let sigma = self.sigmas[0];
            let remade = self.generator.denoise(&Eager, &(&pair.noise * sigma)?, &[sigma], pair.label.as_ref())?;
            let loss_regression = comparison.distance(&remade, &pair.image, pair.label.as_ref())?;
            health.set("loss_regression", finite("loss_regression", &loss_regression)?);
            loss = (loss + (loss_regression * terms.regression.weight)?)?;
        }
        Ok((x, loss, health))
    }

    /// h(r) of every sample, mean 1, from the discriminator's logit at x_t; none for reverse KL, and none before the
    /// discriminator has joined.
    fn divergence_weights(
        &mut self,
        config: &Config,
        step: u64,
        x_t: &Tensor,
        draw: &Draw,
    ) -> Result<Option<Vec<f64>>> {
        let divergence = config.loss.divergence;
        let Some(d) = &self.discriminator else { return Ok(None) };
        if !divergence.needs_discriminator() || step < config.loss.gan.start_step {
            return Ok(None);
        }
        let sigma = &draw.injection.sigma;
        let maps = self.fake_score_still.features(&Eager, &x_t.detach(), sigma, draw.label.as_ref())?;
        let logits: Vec<f32> = d.heads_still.logit(&maps)?.to_vec1()?;
        let ratios: Vec<f64> = logits.into_iter().map(|logit| density_ratio(f64::from(logit))).collect();
        let [low, high] = config.generator.t_range.map(|t| t * (self.real_score.levels.len() - 1) as f64);
        let levels: Vec<f64> = sigma
            .iter()
            .map(|&s| ((self.real_score.levels.index_of(s) - low) / (high - low)).clamp(0.0, 1.0))
            .collect();
        Ok(Some(self.ratio_bins.weights(divergence, &ratios, &levels)))
    }

    /// One update of the fake score (and of the discriminator), the `turn`-th of this step; nothing else changes.
    pub fn update_fake_score(&mut self, config: &Config, random: &Random, step: u64, turn: u64) -> Result<Health> {
        let draw = self.draw_for_fake_score(config, random, step, turn)?;
        let (mut health, mut of_score, mut of_heads) = (Health::default(), None, None);
        let share = 1.0 / config.accumulate as f64;
        for part in draw.parts(config.accumulate)? {
            let (loss, measured) = self.fake_score_loss(config, step, &part)?;
            let grads = (loss * share)?.backward()?;
            self.fake_optimizer.gradients(&grads).add_to(&mut of_score)?;
            if let Some(d) = &self.discriminator {
                d.optimizer.gradients(&grads).add_to(&mut of_heads)?;
            }
            health.add(&measured, share);
        }
        let s = &config.fake_score;
        let update = step * config.ratio + turn;
        let rate = self.rate_factor * rate_at(s.rate, s.decay, s.warmup, update, config.steps * config.ratio);
        let of_score = of_score.expect("a batch has at least one part: accumulate was checked");
        self.fake_optimizer.update(&of_score, rate).context("loss_fake")?;
        if let (Some(d), Some(gradients)) = (&mut self.discriminator, of_heads)
            && step >= config.loss.gan.start_step
        {
            d.optimizer.update(&gradients, rate).context("loss_discriminator")?;
        }
        Ok(health)
    }

    /// The critic's loss on one part of a batch.
    fn fake_score_loss(&self, config: &Config, step: u64, draw: &Draw) -> Result<(Tensor, Health)> {
        let mut health = Health::default();
        let (label, injection, gan) = (draw.label.as_ref(), &draw.injection, &config.loss.gan);
        // Stop: the generator's samples are data here.
        let x = match &draw.samples {
            Some(x) => x.clone(),
            None => self.generator_still.denoise(&Eager, &draw.input, &[draw.level], label)?,
        };
        let denoised = self.fake_score.denoise(&Eager, &injection.add_to(&x)?, &injection.sigma, label)?;
        let weight = |&sigma: &f64| config.fake_score.weight.at(sigma, self.sigma_data());
        let mut loss = denoising(&denoised, &x, &injection.sigma.iter().map(weight).collect::<Vec<_>>())?;
        health.set("loss_fake", finite("loss_fake", &loss)?);

        if let (Some(d), Some(on_fake), Some((real, on_real))) = (&self.discriminator, &draw.adversary, &draw.real)
            && step >= gan.start_step
        {
            let logit = |x_t: &Tensor, sigma: &[f64], label: Option<&Tensor>| -> Result<Tensor> {
                d.heads.logit(&self.fake_score.features(&Eager, x_t, sigma, label)?)
            };
            let logit_fake = logit(&on_fake.add_to(&x)?, &on_fake.sigma, label)?;
            let (real_t, real_label) = (on_real.add_to(&real.images)?, real.label.as_ref());
            let logit_real = logit(&real_t, &on_real.sigma, real_label)?;
            let mut loss_d = discriminator(&logit_fake, &logit_real)?;
            if gan.r1 > 0.0 {
                let nearby = (&real_t + (&on_fake.eps * R1_NOISE)?)?;
                loss_d =
                    (loss_d + (approximate_r1(&logit_real, &logit(&nearby, &on_real.sigma, real_label)?)? * gan.r1)?)?;
            }
            health.set("loss_discriminator", finite("loss_discriminator", &loss_d)?);
            health.set("d_real", mean_probability(&logit_real)?);
            health.set("d_fake", mean_probability(&logit_fake)?);
            loss = (loss + (loss_d * gan.critic_weight)?)?;
        }
        Ok((loss, health))
    }

    /// The generator's samples without gradient, `(B, C, H, W)`, from the noise of the critic's first turn of a step.
    pub fn sample(&self, config: &Config, random: &Random, step: u64) -> Result<Tensor> {
        let draw = self.draw_for_fake_score(config, random, step, 0)?;
        Ok(self.generator_still.denoise(&Eager, &draw.input, &[draw.level], draw.label.as_ref())?)
    }

    fn draw_for_generator(&self, config: &Config, random: &Random, step: u64) -> Result<Draw> {
        let n = config.batch;
        let label = random.labels(Purpose::GeneratorLabel, step, n, self.real_score.n_classes())?;
        let noise = random.normal(Purpose::GeneratorNoise, step, &self.shape_of(n))?;
        let (input, level) = self.simulate(random, step * (config.ratio + 1), &noise, label.as_ref())?;
        let gan = &config.loss.gan;
        let adversary = match gan.on() && gan.weight > 0.0 && step >= gan.start_step {
            true => {
                Some(self.injection(random, [Purpose::AdversaryLevel, Purpose::AdversaryEps], step, n, gan.t_range)?)
            }
            false => None,
        };
        let pair = match &self.regression {
            Some((pairs, _)) => {
                let picks = random.stream(Purpose::PairBatch, step).below(n, u32::try_from(pairs.len())?);
                Some(pairs.batch(&picks, &random.device)?)
            }
            None => None,
        };
        let purposes = [Purpose::GeneratorLevel, Purpose::GeneratorEps];
        let injection = self.injection(random, purposes, step, n, config.generator.t_range)?;
        Ok(Draw { input, level, label, samples: None, injection, adversary, real: None, pair })
    }

    fn draw_for_fake_score(&self, config: &Config, random: &Random, step: u64, turn: u64) -> Result<Draw> {
        let (n, update) = (config.batch, step * config.ratio + turn);
        let shared =
            self.last_samples.as_ref().filter(|_| turn == 0 && config.samples == crate::config::Samples::Shared);
        let label = match shared {
            Some(samples) => samples.label.clone(),
            None => random.labels(Purpose::CriticLabel, update, n, self.real_score.n_classes())?,
        };
        let noise = random.normal(Purpose::CriticNoise, update, &self.shape_of(n))?;
        let (input, level) = match shared {
            Some(_) => (noise, self.sigmas[0]),
            None => self.simulate(random, step * (config.ratio + 1) + 1 + turn, &noise, label.as_ref())?,
        };
        let gan = &config.loss.gan;
        let (adversary, real) = match (&self.reality, gan.on() && step >= gan.start_step) {
            (Some(reality), true) => {
                let adversary =
                    self.injection(random, [Purpose::FakeLevel, Purpose::FakeEps], update, n, gan.t_range)?;
                let purposes = [Purpose::DiscriminatorLevel, Purpose::DiscriminatorEps];
                let injection = self.injection(random, purposes, update, n, gan.t_range)?;
                (Some(adversary), Some((reality.batch(random, update, n)?, injection)))
            }
            _ => (None, None),
        };
        let purposes = [Purpose::CriticLevel, Purpose::CriticEps];
        let injection = self.injection(random, purposes, update, n, config.fake_score.t_range)?;
        let samples = shared.map(|samples| samples.x.clone());
        Ok(Draw { input, level, label, samples, injection, adversary, real, pair: None })
    }

    /// What a pass of the generator gets, and its noise level: a few-step generator's pass is drawn, and the passes
    /// before it are run without gradient (backward simulation, DMD2, section 4.5).
    fn simulate(&self, random: &Random, key: u64, noise: &Tensor, label: Option<&Tensor>) -> Result<(Tensor, f64)> {
        let n_passes = self.sigmas.len();
        let pass = random.indices(Purpose::Pass, key, 1, [0, n_passes - 1])[0];
        let eps = |pass: usize| random.normal(Purpose::PassEps, key * n_passes as u64 + pass as u64, noise.dims());
        let generate = |input: &Tensor, sigma: f64| -> Result<Tensor> {
            Ok(self.generator_still.denoise(&Eager, input, &[sigma], label)?)
        };
        let input = input_of_pass(generate, &self.sigmas[..=pass], noise, eps)?;
        Ok((input, self.sigmas[pass]))
    }

    /// Noise levels uniform over the table's indices, as in DMD and DMD2, and unit noise to go with them.
    fn injection(
        &self,
        random: &Random,
        [level, eps]: [Purpose; 2],
        key: u64,
        n: usize,
        [low, high]: [f64; 2],
    ) -> Result<Injection> {
        let levels = &self.real_score.levels;
        let indices = random.indices(level, key, n, levels.index_range(low, high));
        let sigma = indices.into_iter().map(|i| levels.sigma(i)).collect();
        Ok(Injection { sigma, eps: random.normal(eps, key, &self.shape_of(n))? })
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

/// Ranges of noise levels that keep a mean density ratio each (10 in f-distill).
const RATIO_BINS: usize = 10;
/// Noise on a real picture for the approximate R1 penalty.
const R1_NOISE: f64 = 0.1;

/// Shapes `(C, H, W)` of the encoder's maps, found by running it once.
fn feature_shapes(denoiser: &Denoiser, [c, h, w]: [usize; 3]) -> Result<Vec<[usize; 3]>> {
    let x = Tensor::zeros((1, c, h, w), DType::F32, denoiser.unet.device())?;
    let label = match denoiser.n_classes() {
        Some(_) => Some(Tensor::zeros(1, DType::I64, denoiser.unet.device())?),
        None => None,
    };
    let maps = denoiser.features(&Eager, &x, &[denoiser.levels.sigma_max()], label.as_ref())?;
    maps.iter()
        .map(|map| {
            let (_, c, h, w) = map.dims4()?;
            Ok([c, h, w])
        })
        .collect()
}

/// Mean of sigmoid(logit): what share the discriminator takes for real.
fn mean_probability(logit: &Tensor) -> Result<f64> {
    let logits: Vec<f32> = logit.detach().to_vec1()?;
    ensure!(!logits.is_empty(), "no logits");
    Ok(logits.iter().map(|l| 1.0 / (1.0 + (-f64::from(*l)).exp())).sum::<f64>() / logits.len() as f64)
}

fn mean_and_std(x: &Tensor) -> Result<(f64, f64)> {
    let mean = scalar(&x.mean_all()?)?;
    let variance = scalar(&(x - mean)?.sqr()?.mean_all()?)?;
    Ok((mean, variance.sqrt()))
}

fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}
