//! What one update draws: a whole batch at once, so that running it in parts changes nothing but the memory it takes.

use super::networks::Networks;
use crate::classes::listed;
use crate::config::{Config, Samples};
use crate::data::Pictures;
use crate::fingerprint;
use crate::pairs::PairBatch;
use crate::prompts::Prompts;
use crate::random::{Purpose, Random};
use crate::rows::{Made, Rows};
use crate::sample::input_of_pass;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use dmd_models::{Autoencoder, Condition, ModelFolder, Weights};
use std::ops::Range;
use std::path::Path;

/// Noise to inject: one level per sample, and unit noise `(B, C, H, W)`.
pub struct Injection {
    /// Standard deviations.
    pub sigma: Vec<f64>,
    /// Unit normal.
    pub eps: Tensor,
}

impl Injection {
    /// x_t = x + sigma·eps.
    pub fn add_to(&self, x: &Tensor) -> Result<Tensor> {
        let sigma: Vec<f32> = self.sigma.iter().map(|&s| s as f32).collect();
        let sigma = Tensor::from_vec(sigma, (x.dim(0)?, 1, 1, 1), x.device())?;
        Ok((x + self.eps.broadcast_mul(&sigma)?)?)
    }

    fn part(&self, first: usize, len: usize) -> Result<Self> {
        Ok(Injection { sigma: self.sigma[first..first + len].to_vec(), eps: self.eps.narrow(0, first, len)? })
    }
}

/// Real pictures `(B, C, H, W)` in [-1, 1] with what a network is told of them.
pub struct Images {
    /// The pictures.
    pub images: Tensor,
    /// Of each way one row per sample.
    pub cond: Condition<Tensor>,
}

/// One update's draws; what a term does not need is absent.
pub struct Draw {
    /// What the generator gets: noise at `level`, or a simulated picture noised to it.
    pub input: Tensor,
    /// The noise level of the generator's pass.
    pub level: f64,
    /// Of each way one row per sample.
    pub cond: Condition<Tensor>,
    /// What the critic is told in their place, where some samples are shown without a condition.
    pub told: Option<Condition<Tensor>>,
    /// Samples made before, in the place of new ones.
    pub samples: Option<Tensor>,
    /// Noise before the scores, or for the critic's loss.
    pub injection: Injection,
    /// Noise before the discriminator sees the samples.
    pub adversary: Option<Injection>,
    /// Real pictures and the noise before the discriminator sees them.
    pub real: Option<(Images, Injection)>,
    /// Noise–picture pairs of the regression term.
    pub pair: Option<PairBatch>,
}

impl Draw {
    /// The batch in `n` equal parts.
    pub fn parts(&self, n: usize) -> Result<Vec<Draw>> {
        let len = self.input.dim(0)? / n;
        (0..n).map(|i| self.part(i * len, len)).collect()
    }

    fn part(&self, first: usize, len: usize) -> Result<Draw> {
        let narrow = |x: &Tensor| x.narrow(0, first, len);
        let samples = self.samples.as_ref().map(narrow).transpose()?;
        Ok(Draw {
            input: narrow(&self.input)?,
            level: self.level,
            cond: self.cond.try_map(narrow)?,
            told: self.told.as_ref().map(|told| told.try_map(narrow)).transpose()?,
            samples,
            injection: self.injection.part(first, len)?,
            adversary: self.adversary.as_ref().map(|injection| injection.part(first, len)).transpose()?,
            real: match &self.real {
                Some((real, injection)) => {
                    let images = Images { images: narrow(&real.images)?, cond: real.cond.try_map(narrow)? };
                    Some((images, injection.part(first, len)?))
                }
                None => None,
            },
            pair: match &self.pair {
                Some(pair) => Some(PairBatch {
                    noise: narrow(&pair.noise)?,
                    image: narrow(&pair.image)?,
                    cond: pair.cond.try_map(narrow)?,
                }),
                None => None,
            },
        })
    }
}

/// What latents are called in a shard.
const X0: &str = "x0";

/// Real pictures, as floats when drawn.
pub struct Reality {
    /// All of them; without pixels once they are kept as latents.
    pub pictures: crate::data::Pictures,
    /// The latents `x0` behind them, and their shape.
    latents: Option<(Rows, [usize; 3])>,
    /// Of each picture the numbers of its captions among all captions; empty where there are none.
    captions: Vec<Range<usize>>,
}

impl Reality {
    /// Pictures for a teacher, read from `path`: of its size, channels and classes. Labels become the teacher's.
    pub fn new(mut pictures: Pictures, path: &Path, teacher: &ModelFolder) -> Result<Self> {
        if let Some(n) = teacher.n_classes() {
            let labels = pictures.labels_of(path, &teacher.classes())?;
            pictures.labels = labels.with_context(|| {
                format!(
                    "{}: has no class folders, the teacher has {n} classes ({})",
                    path.display(),
                    listed(&teacher.classes())
                )
            })?;
        }
        let mut end = 0;
        let captions = pictures.captions.iter().map(|captions| {
            end += captions.len();
            end - captions.len()..end
        });
        Ok(Reality { captions: captions.collect(), latents: None, pictures })
    }

    /// By what the pictures and their captions are known again, wherever they lie.
    pub fn sha256(&self) -> String {
        let pictures = fingerprint::pictures(&self.pictures);
        match self.captions.is_empty() {
            true => pictures,
            false => fingerprint::prompts(self.pictures.captions.iter().flatten().chain([&pictures])),
        }
    }

    /// Encodes the pictures once and keeps their latents `(C, H, W)` in `folder`, a draw of each where they are Gaussian, as
    /// in DMD2's data; `known` are the hashes of the autoencoder and of the pictures.
    pub fn keep(
        &mut self,
        folder: &Path,
        by: &Autoencoder,
        shape: [usize; 3],
        known: [&str; 2],
        random: &Random,
    ) -> Result<()> {
        let (p, shapes) = (&self.pictures, [(X0, shape.to_vec())].into());
        let of = [("autoencoders", known[0]), ("pictures", known[1])];
        let latents = |i: usize| -> Result<Tensor> {
            let (pixels, _) = p.batch(&[i], &[false]);
            let picture = Tensor::from_vec(pixels, (1, p.channels, p.height, p.width), &random.device)?;
            let [c, h, w] = shape;
            let noise = random.normal(Purpose::Latents, i as u64, &[1, c, h, w])?;
            Ok(by.encode(&picture)?.sample(&noise)?.to_device(&Device::Cpu)?)
        };
        let rows = Made { what: "latents", of: &of, shapes: &shapes }.keep(folder, p.len(), |range| {
            let mut shard = Weights::default();
            shard.insert(X0, Tensor::cat(&range.map(latents).collect::<Result<Vec<_>>>()?, 0)?);
            Ok(shard)
        })?;
        self.latents = Some((rows, shape));
        self.pictures.pixels = Vec::new();
        Ok(())
    }

    /// A batch drawn with replacement; of `prompts`, where the network is told text, each picture's captions.
    pub fn batch(&self, random: &Random, key: u64, n: usize, prompts: Option<&Prompts>) -> Result<Images> {
        let p = &self.pictures;
        let picks = random.stream(Purpose::RealBatch, key).below(n, u32::try_from(p.len())?);
        let picks: Vec<usize> = picks.into_iter().map(|i| i as usize).collect();
        let images = match &self.latents {
            Some((rows, shape)) => {
                let latents = picks.iter().map(|i| rows.row(X0, *i, shape)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&latents, 0)?.to_device(&random.device)?
            }
            None => {
                let (pixels, _) = p.batch(&picks, &vec![false; n]);
                Tensor::from_vec(pixels, (n, p.channels, p.height, p.width), &random.device)?
            }
        };
        let cond = match prompts {
            Some(prompts) => {
                let chosen = random.stream(Purpose::Caption, key).uniform(n);
                let captions = picks.iter().zip(chosen).map(|(i, chosen)| {
                    let Range { start, end } = self.captions[*i];
                    let one = start + (chosen * (end - start) as f64) as usize;
                    (prompts.first_caption + one.min(end - 1)) as u32
                });
                prompts.told(&captions.collect::<Vec<_>>(), &random.device)?
            }
            None => Condition::of_classes(picks.iter().filter_map(|i| p.labels.get(*i).copied()), &random.device)?,
        };
        Ok(Images { images, cond })
    }
}

impl Networks {
    pub(super) fn draw_for_generator(&self, config: &Config, random: &Random, step: u64) -> Result<Draw> {
        let n = config.batch;
        let cond = self.draw_condition(random, Purpose::GeneratorLabel, step, n)?;
        let noise = random.normal(Purpose::GeneratorNoise, step, &self.shape_of(n))?;
        let (input, level) = self.simulate(random, step * (config.ratio + 1), &noise, &cond)?;
        let gan = &config.loss.gan;
        let adversary = match gan.weight > 0.0 && step >= gan.start_step {
            true => {
                Some(self.injection(random, [Purpose::AdversaryLevel, Purpose::AdversaryEps], step, n, gan.t_range)?)
            }
            false => None,
        };
        let pair = match &self.regression {
            Some((pairs, _)) => {
                let picks = random.stream(Purpose::PairBatch, step).below(n, u32::try_from(pairs.len())?);
                Some(pairs.batch(&picks, self.prompts.as_ref(), &random.device)?)
            }
            None => None,
        };
        let purposes = [Purpose::GeneratorLevel, Purpose::GeneratorEps];
        let injection = self.injection(random, purposes, step, n, config.generator.t_range)?;
        Ok(Draw { input, level, cond, told: None, samples: None, injection, adversary, real: None, pair })
    }

    pub(super) fn draw_for_fake_score(&self, config: &Config, random: &Random, step: u64, turn: u64) -> Result<Draw> {
        let (n, update) = (config.batch, step * config.ratio + turn);
        let shared = self.last_samples.as_ref().filter(|_| turn == 0 && config.samples == Samples::Shared);
        let cond = match shared {
            Some(samples) => samples.cond.clone(),
            None => self.draw_condition(random, Purpose::CriticLabel, update, n)?,
        };
        let noise = random.normal(Purpose::CriticNoise, update, &self.shape_of(n))?;
        let (input, level) = match shared {
            Some(_) => (noise, self.sigmas[0]),
            None => self.simulate(random, step * (config.ratio + 1) + 1 + turn, &noise, &cond)?,
        };
        let gan = &config.loss.gan;
        let (adversary, real) = match &self.reality {
            Some(reality) if step >= gan.start_step => {
                let adversary =
                    self.injection(random, [Purpose::FakeLevel, Purpose::FakeEps], update, n, gan.t_range)?;
                let purposes = [Purpose::DiscriminatorLevel, Purpose::DiscriminatorEps];
                let injection = self.injection(random, purposes, update, n, gan.t_range)?;
                (Some(adversary), Some((reality.batch(random, update, n, self.prompts.as_ref())?, injection)))
            }
            _ => (None, None),
        };
        let purposes = [Purpose::CriticLevel, Purpose::CriticEps];
        let injection = self.injection(random, purposes, update, n, config.fake_score.t_range)?;
        let samples = shared.map(|samples| samples.x.clone());
        let dropout = config.fake_score.dropout;
        let told = match &self.real_score.unconditional {
            Some(unconditional) if dropout > 0.0 => {
                let silent = random.stream(Purpose::CriticDropout, update).uniform(n);
                let silent: Vec<bool> = silent.into_iter().map(|u| u < dropout).collect();
                Some(cond.without(unconditional, &silent)?)
            }
            _ => None,
        };
        Ok(Draw { input, level, cond, told, samples, injection, adversary, real, pair: None })
    }

    /// What the networks are told of `n` samples: prompts, or classes where there are any.
    fn draw_condition(&self, random: &Random, purpose: Purpose, step: u64, n: usize) -> Result<Condition<Tensor>> {
        match &self.prompts {
            Some(prompts) => prompts.draw(random, purpose, step, n),
            None => random.condition(purpose, step, n, self.real_score.n_classes()),
        }
    }

    /// What a pass of the generator gets, and its noise level: a few-step generator's pass is drawn, and the passes
    /// before it are run without gradient (backward simulation, DMD2, section 4.5).
    fn simulate(&self, random: &Random, key: u64, noise: &Tensor, cond: &Condition<Tensor>) -> Result<(Tensor, f64)> {
        let n_passes = self.sigmas.len();
        let pass = random.indices(Purpose::Pass, key, 1, [0, n_passes - 1])[0];
        let eps = |pass: usize| random.normal(Purpose::PassEps, key * n_passes as u64 + pass as u64, noise.dims());
        let generate = |input: &Tensor, sigma: f64| -> Result<Tensor> {
            Ok(self.generator_still.denoise(&self.training, input, &[sigma], cond)?)
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
}
