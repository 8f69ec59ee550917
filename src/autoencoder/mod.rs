//! Training an autoencoder from pictures, which a latent model's teacher stands on: pixels, the latents' KL divergence
//! from the unit normal, and, where there is one, a network that compares pictures (Rombach et al. 2022, section 3.1).
//! Ends as a part of a diffusers folder, `vae/`, whose scaling factor brings the latents of the pictures to unit spread.

mod settings;
pub use settings::{AutoencoderSettings, Kind, Pixels};

use crate::data::Pictures;
use crate::features::FeatureNetwork;
use crate::fingerprint;
use crate::loss::{kl_to_noise, l1, l2};
use crate::memory::{self, Work};
use crate::optim::{Gradients, Optimizer, average_into, finite, ramped_decay, rate_at, read};
use crate::picture;
use crate::random::{Purpose, Random};
use crate::teacher::name_key;
use crate::train::{self, Checkpoint, Group, Numbers, Parts, Schedule, Trainee, restore_vars, vars_as_weights};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor, Var};
use dmd_models::{Autoencoder, Weights, write_whole};
use ndarray::Array4;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Trains on `pictures` and leaves the autoencoder in `out`, with the run beside it in `out/training`.
/// Returns what a script would want to know.
pub fn train(
    settings: &AutoencoderSettings,
    pictures: &Pictures,
    out: &Path,
    random: Random,
    force: bool,
) -> Result<Value> {
    settings.validate()?;
    train::check_out(out, "an autoencoder", force)?;
    let device = random.device.clone();
    let mut trainer =
        Trainer::new(settings, pictures, out, random).map_err(|error| memory::explained(error, Work::Networks))?;
    let at_a_time = settings.batch / settings.accumulate;
    let schedule = Schedule::of_pictures(settings.steps, settings.log_every, settings.checkpoint_every, at_a_time);
    let outcome = train::train(&mut trainer, settings, &schedule, &out.join("training"), force)?;
    let [c, h, w] = trainer.latent_shape()?;
    let mut result = json!({
        "out": out,
        "steps": settings.steps,
        "parameters": trainer.weights.n_parameters(),
        "latents": [c, h, w],
        "scaling_factor": trainer.scaling_factor()?,
        "psnr": trainer.psnr()?,
        "seconds": outcome.seconds,
        "peak_memory_bytes": memory::peak_bytes(&device),
    });
    for (name, value) in outcome.numbers {
        result[name] = json!(value);
    }
    Ok(result)
}

struct Trainer<'a> {
    settings: &'a AutoencoderSettings,
    pictures: &'a Pictures,
    /// Where the autoencoder goes.
    out: &'a Path,
    /// Its `config.json`, at a scaling factor of 1.
    config: Value,
    train: Vec<usize>,
    held_out: Vec<usize>,
    random: Random,
    weights: Weights,
    vars: BTreeMap<String, Var>,
    average: BTreeMap<String, Var>,
    averaged: Weights,
    autoencoder: Autoencoder,
    perceptual: Option<FeatureNetwork>,
    optimizer: Optimizer,
    group: Group,
    /// What the rate is multiplied by.
    rate_factor: f64,
    /// Of the pictures and the description of the network.
    lesson: String,
}

impl<'a> Trainer<'a> {
    fn new(settings: &'a AutoencoderSettings, pictures: &'a Pictures, out: &'a Path, random: Random) -> Result<Self> {
        let config = settings.network(pictures.channels)?;
        let (train, held_out) = pictures.split(settings.held_out, settings.seed);
        ensure!(!train.is_empty(), "no picture is left to train on");
        let mut draw = |name: &str, n: usize| random.stream(Purpose::Init, name_key(name)).uniform(n);
        let in_config = || settings.network.clone();
        let fresh = Autoencoder::init(&config, &mut draw).with_context(in_config)?.to(DType::F32, &random.device)?;
        let (weights, vars) = fresh.trainable()?;
        let (averaged, average) = fresh.trainable()?;
        let autoencoder = Autoencoder::new(&config, weights.clone())?;
        let factor = autoencoder.factor();
        ensure!(
            settings.size.iter().all(|side| side.is_multiple_of(factor)),
            "size is {}×{}, expected sides that are multiples of {factor}, by which latents are smaller",
            settings.size[0],
            settings.size[1]
        );
        let perceptual = match settings.perceptual.as_str() {
            "" => None,
            path => Some(FeatureNetwork::load(Path::new(path)).context("perceptual")?),
        };
        let optimizer = Optimizer::new(&vars, settings.optimizer)?;
        let lesson = fingerprint::of_autoencoder(pictures, &config);
        Ok(Trainer {
            settings,
            pictures,
            out,
            config,
            train,
            held_out,
            random,
            weights,
            vars,
            average,
            averaged,
            autoencoder,
            perceptual,
            optimizer,
            group: Group::alone(),
            rate_factor: 1.0,
            lesson,
        })
    }

    fn averaged_autoencoder(&self) -> Result<Autoencoder> {
        Ok(Autoencoder::new(&self.config, self.averaged.detached())?)
    }

    /// Pictures `(B, C, H, W)` in [-1, 1], some of them mirrored.
    fn batch(&self, picks: &[usize], flips: &[bool]) -> Result<Tensor> {
        let Pictures { channels, height, width, .. } = self.pictures;
        let (pixels, _) = self.pictures.batch(picks, flips);
        Ok(Tensor::from_vec(pixels, (picks.len(), *channels, *height, *width), &self.random.device)?)
    }

    fn latent_shape(&self) -> Result<[usize; 3]> {
        let factor = self.autoencoder.factor();
        let [h, w] = self.settings.size;
        Ok([self.autoencoder.latent_channels(), h / factor, w / factor])
    }

    /// How far pictures are from what is left of them.
    fn distance(&self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        let pixels = match self.settings.distance {
            Pixels::L1 => l1(x, target)?,
            Pixels::L2 => l2(x, target)?,
        };
        match &self.perceptual {
            Some(network) => Ok((pixels + (network.distance(x, target)? * self.settings.perceptual_weight)?)?),
            None => Ok(pixels),
        }
    }

    /// The loss of these pictures, and its two parts.
    fn loss(&self, pictures: &Tensor, noise: &Tensor) -> Result<[Tensor; 3]> {
        let encoded = self.autoencoder.encode(pictures)?;
        let distance = self.distance(&self.autoencoder.decode(&encoded.sample(noise)?)?, pictures)?;
        let kl = kl_to_noise(&encoded.mean, encoded.std.as_ref())?;
        let values = pictures.elem_count() / pictures.dim(0)?;
        let loss = (&distance + (&kl * (self.settings.kl / values as f64))?)?;
        Ok([loss, distance.detach(), kl.detach()])
    }

    /// Of pictures held out, or of the others where there are none: a few, in parts, with what is left of them.
    fn remade(&self, autoencoder: &Autoencoder, n: usize) -> Result<Vec<[Tensor; 2]>> {
        let picks = if self.held_out.is_empty() { &self.train } else { &self.held_out };
        let picks: Vec<usize> = picks.iter().copied().take(n).collect();
        let part = |picks: &[usize]| {
            let pictures = self.batch(picks, &vec![false; picks.len()])?;
            Ok([autoencoder.decode(&autoencoder.encode(&pictures)?.mean)?.detach(), pictures])
        };
        picks.chunks((self.settings.batch / self.settings.accumulate).max(1)).map(part).collect()
    }

    /// Peak signal to noise of the averaged autoencoder, in dB.
    fn psnr(&self) -> Result<f64> {
        let (mut sum, mut n) = (0.0, 0.0);
        for [remade, pictures] in self.remade(&self.averaged_autoencoder()?, MEASURED)? {
            let error = l2(&remade.clamp(-1f32, 1f32)?, &pictures)?;
            sum += f64::from(error.to_scalar::<f32>()?) * pictures.dim(0)? as f64;
            n += pictures.dim(0)? as f64;
        }
        Ok(-10.0 * (sum / n / 4.0).max(1e-12).log10())
    }

    /// What brings the latents of pictures to unit spread: 1 over their standard deviation, of all channels together, as for
    /// Stable Diffusion's (Rombach et al. 2022, appendix G).
    fn scaling_factor(&self) -> Result<f64> {
        let autoencoder = self.averaged_autoencoder()?;
        let (mut sum, mut squares, mut n) = (0.0, 0.0, 0.0);
        for (i, picks) in self.train[..self.train.len().min(MEASURED)].chunks(self.settings.batch).enumerate() {
            let encoded = autoencoder.encode(&self.batch(picks, &vec![false; picks.len()])?)?;
            let noise = self.random.normal(Purpose::Validation, i as u64, encoded.mean.dims())?;
            let latents = encoded.sample(&noise)?.detach();
            let total = |x: Tensor| -> Result<f64> { Ok(f64::from(x.sum_all()?.to_scalar::<f32>()?)) };
            sum += total(latents.clone())?;
            squares += total(latents.sqr()?)?;
            n += latents.elem_count() as f64;
        }
        let variance = squares / n - (sum / n).powi(2);
        Ok(if variance > 0.0 { variance.sqrt().recip() } else { 1.0 })
    }
}

impl Trainee for Trainer<'_> {
    fn update(&mut self, step: u64) -> Result<Numbers> {
        let s = self.settings;
        let picks = self.random.stream(Purpose::Batch, step).below(s.batch, u32::try_from(self.train.len())?);
        let picks: Vec<usize> = picks.into_iter().map(|i| self.train[i as usize]).collect();
        let flips: Vec<bool> =
            self.random.stream(Purpose::Flip, step).below(s.batch, 2).into_iter().map(|f| s.flip && f == 1).collect();
        let [c, h, w] = self.latent_shape()?;
        let noise = self.random.normal(Purpose::Latents, step, &[s.batch, c, h, w])?;
        let (mut gradients, mut losses) = (Gradients::default(), Vec::new());
        let (len, share) = (s.batch / s.accumulate, 1.0 / s.accumulate as f64);
        for first in (0..s.batch).step_by(len) {
            let part = first..first + len;
            let pictures = self.batch(&picks[part.clone()], &flips[part])?;
            let [loss, distance, kl] = self.loss(&pictures, &noise.narrow(0, first, len)?)?;
            let loss = (loss * share)?;
            gradients.add(self.optimizer.gradients(&loss.backward()?))?;
            losses.push(Tensor::stack(&[loss.detach(), (distance * share)?, (kl * share)?], 0)?);
        }
        let gradients = self.group.sum(gradients)?;
        let losses = Tensor::stack(&losses, 0)?.sum(0)?;
        let rate = self.rate_factor * rate_at(s.rate, s.decay, s.warmup, step, s.steps);
        let norm = self.optimizer.update(&gradients, &losses.get(0)?, rate)?;
        average_into(&self.average, &self.vars, ramped_decay(s.ema, step), &norm)?;
        // The one moment that an update waits for the device.
        let numbers = read(&[losses.get(0)?, losses.get(1)?, losses.get(2)?, norm])?;
        Ok(vec![
            ("loss", finite("loss", numbers[0])?),
            ("loss_pictures", numbers[1]),
            ("kl", numbers[2]),
            ("grad_norm", self.optimizer.settle(numbers[3])?),
        ])
    }

    /// How far held-out pictures are from what is left of them.
    fn validate(&mut self) -> Result<Option<(&'static str, f64)>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let (mut sum, mut n) = (0.0, 0.0);
        for [remade, pictures] in self.remade(&self.averaged_autoencoder()?, MEASURED)? {
            sum += f64::from(self.distance(&remade, &pictures)?.to_scalar::<f32>()?) * pictures.dim(0)? as f64;
            n += pictures.dim(0)? as f64;
        }
        Ok(Some(("validation_loss", finite("validation_loss", sum / n)?)))
    }

    fn slow_down(&mut self, factor: f64) {
        self.rate_factor = factor;
    }

    fn parts(&self) -> Result<Parts> {
        Ok(vec![
            ("weights".into(), vars_as_weights(&self.vars)),
            ("average".into(), vars_as_weights(&self.average)),
            ("optimizer".into(), self.optimizer.state()?),
        ])
    }

    fn state(&self) -> Value {
        json!({ "n_updates": self.optimizer.n_updates(), "data_sha256": self.lesson })
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        ensure!(
            checkpoint.known("data_sha256").is_none_or(|written| written == self.lesson),
            "the run was started on other pictures or another network (the files under --data or --network have changed); give it the same, another --out, or --force to begin anew"
        );
        restore_vars(&self.vars, &checkpoint.part("weights")?)?;
        restore_vars(&self.average, &checkpoint.part("average")?)?;
        self.optimizer.restore(&checkpoint.part("optimizer")?, checkpoint.count("n_updates")?)
    }

    /// Pictures, and below each what is left of it.
    fn draw_samples(&self, path: &Path) -> Result<()> {
        let parts = self.remade(&self.averaged_autoencoder()?, SHOWN)?;
        let row = |i: usize| Tensor::cat(&parts.iter().map(|part| part[i].clone()).collect::<Vec<_>>(), 0);
        let both = Tensor::cat(&[row(1)?, row(0)?], 0)?;
        let shape = both.dims4()?;
        let images = Array4::from_shape_vec(shape, both.flatten_all()?.to_vec1::<f32>()?)?;
        picture::save(path, &picture::grid(&images, shape.0 / 2, (128 / shape.2 as u32).max(1)))
    }

    fn write_model(&mut self) -> Result<()> {
        let mut config = self.config.clone();
        config["scaling_factor"] = json!(self.scaling_factor()?);
        let about = json!({
            "data": self.settings.about_data,
            "run": self.settings,
            "version": crate::VERSION,
        });
        std::fs::create_dir_all(self.out).with_context(|| self.out.display().to_string())?;
        let metadata =
            BTreeMap::from([("format".to_string(), "pt".to_string()), ("dmd".to_string(), about.to_string())]);
        self.averaged.to(DType::F32, &candle_core::Device::Cpu)?.save(&self.out.join(WEIGHTS), &metadata)?;
        Ok(write_whole(&self.out.join("config.json"), format!("{config:#}\n").as_bytes())?)
    }
}

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
/// Pictures that are measured at a checkpoint.
const MEASURED: usize = 256;
/// Pictures in a sample grid.
const SHOWN: usize = 8;
