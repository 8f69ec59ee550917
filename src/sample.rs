//! Noise to pictures: deterministic samplers for teachers, one pass for generators.

use crate::memory::{self, Work};
use crate::random::picture_noise;
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use dmd_models::cost::cost;
use dmd_models::{Condition, Denoiser, Eager, Pipeline};
use ndarray::Array4;

/// How the probability-flow ODE is integrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// Second order, two passes a step but the last (Karras et al. 2022, algorithm 1 without churn).
    Heun,
    /// First order, one pass a step.
    Euler,
}

impl Sampler {
    /// Network passes of a run.
    pub fn n_passes(self, n_steps: usize) -> usize {
        match self {
            Sampler::Heun => 2 * n_steps - 1,
            Sampler::Euler => n_steps,
        }
    }
}

/// noise `(B, C, H, W)`, unit normal, to x0 of the same shape, from sigma_max down to zero in `n_steps` steps,
/// guided where `guidance_scale` is not 1 ([`Denoiser::denoise_guided`]).
pub fn sample(
    denoiser: &Denoiser,
    noise: &Tensor,
    cond: &Condition<Tensor>,
    sampler: Sampler,
    n_steps: usize,
    guidance_scale: f64,
) -> Result<Tensor> {
    let sigmas = denoiser.levels.sampling_steps(n_steps)?;
    let denoise = |x: &Tensor, sigma: f64| -> Result<Tensor> {
        let x0 = denoiser.denoise_guided(&Eager, x, &[sigma], cond, guidance_scale)?;
        Ok(match denoiser.clip {
            Some(range) => x0.clamp(-range, range)?,
            None => x0,
        })
    };
    let mut x = (noise * sigmas[0])?;
    for pair in sigmas.windows(2) {
        let [sigma, next] = [pair[0], pair[1]];
        let x0 = denoise(&x, sigma)?;
        if next == 0.0 {
            // The step to zero lands on the estimate itself.
            return Ok(x0);
        }
        let slope = ((&x - x0)? / sigma)?;
        let euler = (&x + (&slope * (next - sigma))?)?;
        x = match sampler {
            Sampler::Euler => euler,
            Sampler::Heun => {
                let end_slope = ((&euler - denoise(&euler, next)?)? / next)?;
                (&x + ((slope + end_slope)? * (0.5 * (next - sigma)))?)?
            }
        };
    }
    Ok(x)
}

/// What the last pass of a few-step generator gets: `generate(input, sigma)` is one pass, `sigmas` are the noise levels up to and with that pass, `eps(i)` the
/// unit noise before pass i. For one level that is sigma·noise, untouched by any network; for more, what the passes
/// before made of it, noised to the next level each time (Yin et al. 2024, DMD2, section 4.5). No clipping in between.
pub fn input_of_pass(
    generate: impl Fn(&Tensor, f64) -> Result<Tensor>,
    sigmas: &[f64],
    noise: &Tensor,
    eps: impl Fn(usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut input = (noise * sigmas[0])?;
    for pass in 1..sigmas.len() {
        let x = generate(&input, sigmas[pass - 1])?;
        input = (x + (eps(pass)? * sigmas[pass])?)?;
    }
    Ok(input)
}

/// A model that makes pictures, on candle. Given a denoiser alone, its samples are the pictures.
pub struct Model {
    /// The model.
    pub pipeline: Pipeline,
    /// How noise becomes a sample.
    pub passes: Passes,
}

/// What a model made.
pub struct Made {
    /// Samples before they were decoded, `(N, C, H, W)`, where they were.
    pub latents: Option<Array4<f32>>,
    /// `(N, C, H, W)`, around [-1, 1].
    pub pictures: Array4<f32>,
}

/// How often the network runs for a sample.
#[derive(Clone, Debug)]
pub enum Passes {
    /// Many times: a teacher.
    Many {
        /// How it is sampled.
        sampler: Sampler,
        /// In how many steps.
        n_steps: usize,
        /// Classifier-free guidance; 1 for none.
        guidance_scale: f64,
    },
    /// Once, or a few times: a generator.
    Few {
        /// The noise level of each pass, descending.
        sigmas: Vec<f64>,
        /// Seed of the noise between passes.
        seed: u64,
    },
}

impl Model {
    /// A teacher.
    pub fn teacher(model: impl Into<Pipeline>, sampler: Sampler, n_steps: usize, guidance_scale: f64) -> Self {
        Model { pipeline: model.into(), passes: Passes::Many { sampler, n_steps, guidance_scale } }
    }

    /// A generator of as many passes as there are noise levels; `seed` is that of the noise between them.
    pub fn of_steps(model: impl Into<Pipeline>, sigmas: &[f64], seed: u64) -> Self {
        Model { pipeline: model.into(), passes: Passes::Few { sigmas: sigmas.to_vec(), seed } }
    }

    /// Refuses pictures that memory cannot hold: `n` of them, from samples of this size, `batch` at a time.
    pub fn check_memory(&self, n: usize, size: [usize; 2], batch: usize) -> Result<()> {
        let network = &self.pipeline.denoiser.network;
        let sample = [network.takes().channels, size[0], size[1]];
        let values = |shape: [usize; 3]| shape.iter().product::<usize>();
        let values = values(sample).max(values(self.pipeline.picture_shape(sample)));
        memory::check_pictures(cost(network, sample)?, values, n, batch, network.device())
    }

    /// Pictures `(N, C, H, W)`, around [-1, 1], from noise of the samples' shape, `batch` at a time.
    pub fn pictures(&self, noise: &Tensor, labels: &[i64], batch: usize) -> Result<Array4<f32>> {
        self.pictures_aloud(noise, labels, batch, &|_| {})
    }

    /// The same; `done` hears how many are made.
    pub fn pictures_aloud(
        &self,
        noise: &Tensor,
        labels: &[i64],
        batch: usize,
        done: &dyn Fn(usize),
    ) -> Result<Array4<f32>> {
        Ok(self.make(noise, &self.of_labels(labels, noise.dim(0)?)?, batch, done)?.pictures)
    }

    /// What a network of classes is told of `n` pictures; nothing where it has none.
    pub fn of_labels(&self, labels: &[i64], n: usize) -> Result<Condition<Tensor>> {
        let conditional = self.pipeline.denoiser.n_classes().is_some();
        ensure!(!conditional || labels.len() == n, "{} labels for {n} pictures", labels.len());
        Ok(Condition::of_classes(labels.iter().copied().filter(|_| conditional), &Device::Cpu)?)
    }

    /// The same of what the network is told, a row of each way for each picture.
    pub fn make(&self, noise: &Tensor, cond: &Condition<Tensor>, batch: usize, done: &dyn Fn(usize)) -> Result<Made> {
        let (n, channels, height, width) = noise.dims4()?;
        let [c, h, w] = self.pipeline.picture_shape([channels, height, width]);
        ensure!(batch > 0 && n > 0, "{n} pictures in batches of {batch}: expected at least 1 of each");
        let (mut pictures, mut latents) = (Vec::with_capacity(n * c * h * w), Vec::new());
        let values = |x: &Tensor| -> Result<Vec<f32>> { Ok(x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?) };
        for first in (0..n).step_by(batch) {
            let len = batch.min(n - first);
            let mut of_batch = || -> Result<()> {
                let cond = cond.try_map(|rows| rows.narrow(0, first, len))?;
                let x0 = self.batch(&noise.narrow(0, first, len)?, &cond, first)?;
                if self.pipeline.decoder.is_some() {
                    latents.extend(values(&x0)?);
                }
                pictures.extend(values(&self.pipeline.pictures(&x0)?)?);
                Ok(())
            };
            of_batch().map_err(|error| memory::explained(error, Work::Pictures(len)))?;
            done(first + len);
        }
        let latents = match self.pipeline.decoder {
            Some(_) => Some(Array4::from_shape_vec((n, channels, height, width), latents)?),
            None => None,
        };
        Ok(Made { latents, pictures: Array4::from_shape_vec((n, c, h, w), pictures)? })
    }

    /// The samples of a batch; `first` is the number of the first among all.
    fn batch(&self, noise: &Tensor, cond: &Condition<Tensor>, first: usize) -> Result<Tensor> {
        let denoiser = &self.pipeline.denoiser;
        let device = denoiser.network.device();
        let (len, c, h, w) = noise.dims4()?;
        let noise = noise.to_device(device)?;
        let cond = cond.try_map(|rows| rows.to_device(device))?;
        match &self.passes {
            Passes::Many { sampler, n_steps, guidance_scale } => {
                sample(denoiser, &noise, &cond, *sampler, *n_steps, *guidance_scale)
            }
            Passes::Few { sigmas, seed } => {
                let eps = |pass: usize| {
                    let noise = dmd_runtime::noise::refining_noise(*seed, pass, first as u64, len, [c, h, w]);
                    Ok(Tensor::from_vec(noise.into_raw_vec_and_offset().0, (len, c, h, w), device)?)
                };
                let pass = |input: &Tensor, sigma: f64| -> Result<Tensor> {
                    Ok(denoiser.denoise(&Eager, input, &[sigma], &cond)?)
                };
                pass(&input_of_pass(pass, sigmas, &noise, eps)?, sigmas[sigmas.len() - 1])
            }
        }
    }

    /// The pictures of a seed: noise as the runtime draws it, labels in turn.
    pub fn pictures_of_seed(
        &self,
        seed: u64,
        n: usize,
        [h, w]: [usize; 2],
        labels: &[i64],
        batch: usize,
    ) -> Result<Array4<f32>> {
        self.check_memory(n, [h, w], batch)?;
        let c = self.pipeline.denoiser.network.takes().channels;
        self.pictures(&picture_noise(seed, 0, n, [c, h, w], &Device::Cpu)?, labels, batch)
    }
}

/// Labels 0, 1, 2, … in turn: what a grid shows where none are asked for. Empty for an unconditional model.
pub fn labels_in_turn(n: usize, n_classes: Option<usize>) -> Vec<i64> {
    match n_classes {
        Some(classes) => (0..n).map(|i| (i % classes) as i64).collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmd_models::ModelFolder;

    /// Reference 7.8: with no pass before it the input is the scaled noise, and no network is asked; a generator that
    /// returns a constant c is found as c + sigma·eps before every later pass.
    #[test]
    fn backward_simulation_noises_what_the_pass_before_made() {
        let t = |values: [f32; 2]| Tensor::new(&values, &Device::Cpu).unwrap();
        let noise = t([0.5, -2.0]);
        let eps = |pass: usize| Ok(t([pass as f32, 1.0]));
        let never = |_: &Tensor, _: f64| -> Result<Tensor> { anyhow::bail!("asked") };
        let input = input_of_pass(never, &[80.0], &noise, eps).unwrap();
        assert_eq!(input.to_vec1::<f32>().unwrap(), [40.0, -160.0]);
        let seen = std::cell::RefCell::new(Vec::new());
        let constant = |_: &Tensor, sigma: f64| {
            seen.borrow_mut().push(sigma);
            Ok(t([0.25, 0.25]))
        };
        let input = input_of_pass(constant, &[80.0, 5.0, 0.5], &noise, eps).unwrap();
        assert_eq!(input.to_vec1::<f32>().unwrap(), [0.25 + 0.5 * 2.0, 0.25 + 0.5]);
        assert_eq!(seen.into_inner(), [80.0, 5.0]);
    }

    /// Reference 7.8: EDM's preconditioning around a silent network denoises N(0, s²), s = 0.5, exactly, and the
    /// probability-flow ODE leads from 80·noise to 80·noise·√((s² + σ²)/(s² + 80²)), here as far as σ = 0.002, from where
    /// the last step goes to the denoiser's answer. Twice the steps leave a quarter of Heun's error and half of Euler's.
    /// The multiples of the noise come from a program of twenty lines of Python, in f64.
    #[test]
    fn samplers_follow_the_ode_of_gaussian_data() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/edm-tiny");
        let mut silent = ModelFolder::load(&path, &Device::Cpu).unwrap();
        for name in ["conv_out.weight", "conv_out.bias"] {
            let zeros = silent.weights.get(name).unwrap().zeros_like().unwrap();
            silent.weights.insert(name, zeros);
        }
        let (low, high, variance) = (0.002f64, 80.0f64, 0.25);
        let limit =
            high * ((variance + low * low) / (variance + high * high)).sqrt() * variance / (variance + low * low);
        let noise = picture_noise(0, 0, 2, [3, 8, 8], &Device::Cpu).unwrap();
        let errors = |sampler, n_steps: [usize; 4], made: [f64; 4]| {
            let errors = n_steps.into_iter().zip(made).map(|(n_steps, made)| {
                let denoiser = silent.denoiser(&Device::Cpu).unwrap();
                let model = Model::teacher(denoiser, sampler, n_steps, 1.0);
                let pictures = model.pictures(&noise, &[0, 2], 1).unwrap();
                let noise: Vec<f32> = noise.flatten_all().unwrap().to_vec1().unwrap();
                // The ODE is linear: every value is the same multiple of its noise.
                for (x, noise) in pictures.iter().zip(&noise) {
                    let error = f64::from(*x) - made * f64::from(*noise);
                    assert!(error.abs() < 5e-6 * f64::from(noise.abs()), "{sampler:?}, {n_steps}: {x} from {noise}");
                }
                let (x, noise) = (pictures.iter().map(|x| f64::from(*x)), noise.iter().map(|z| f64::from(*z)));
                let multiple =
                    x.zip(noise.clone()).map(|(x, z)| x * z).sum::<f64>() / noise.map(|z| z * z).sum::<f64>();
                multiple - limit
            });
            errors.collect::<Vec<f64>>()
        };
        let heun =
            errors(Sampler::Heun, [18, 36, 72, 144], [0.527_624_637, 0.506_097_092, 0.501_425_626, 0.500_335_723]);
        let euler =
            errors(Sampler::Euler, [18, 36, 72, 144], [0.423_031_436, 0.460_996_216, 0.480_369_490, 0.490_148_229]);
        for (ratio, expected) in heun.windows(2).map(|pair| pair[0] / pair[1]).zip([4.5228, 4.2454, 4.1186]) {
            assert!((ratio - expected).abs() < 2e-3, "{ratio} for {expected}");
        }
        for ratio in euler.windows(2).map(|pair| pair[0] / pair[1]) {
            assert!((1.97..2.0).contains(&ratio), "{ratio}");
        }
    }
}
