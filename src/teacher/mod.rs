//! Training a teacher from pictures, as EDM does it (Karras et al. 2022): log-normal noise levels, preconditioned
//! network, average of the weights. Ends as a diffusers folder.

mod draw;
use draw::Draw;
mod lesson;
pub use lesson::{Lesson, check};
use lesson::{TEXT, settings_of_pipeline};
mod settings;
pub use settings::{TeacherSettings, default_text_unet, default_unet};

use crate::device::check_precision;
use crate::fingerprint::{self, Fingerprint};
use crate::loss::{denoising, edm_weight};
use crate::memory::{self, Needs, Work};
use crate::optim::{Gradients, Optimizer, average_into, finite, ramped_decay, rate_at, read};
use crate::picture;
use crate::random::{Purpose, Random, picture_noise};
use crate::sample::{Model, Sampler, labels_in_turn};
use crate::train::{self, Checkpoint, Group, Numbers, Parts, Schedule, Trainee, restore_vars, vars_as_weights};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use dmd_models::cost::cost;
use dmd_models::encoders::TextEncoder;
use dmd_models::folder::{About, Kind, Scheduler};
use dmd_models::{Condition, Denoiser, ModelFolder, Network, NetworkConfig, Pipeline, Training, Weights};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Trains on a lesson and leaves a model folder in `out`, with the run beside it in `out/training`.
/// Returns what a script would want to know.
pub fn train(
    settings: &TeacherSettings,
    network: impl Into<NetworkConfig>,
    lesson: &Lesson,
    out: &Path,
    device: &Device,
    force: bool,
) -> Result<Value> {
    settings.validate()?;
    check_precision(settings.precision, device)?;
    train::check_out(out, "a teacher", force)?;
    let random = Random { seed: settings.seed, device: device.clone() };
    // First what can be refused, then what leaves a trace in `out`.
    let mut trainer = Trainer::new(settings, network.into(), lesson, out, random)
        .map_err(|error| memory::explained(error, Work::Networks))?;
    let at_a_time = settings.batch / settings.accumulate;
    let schedule = Schedule::of_pictures(settings.steps, settings.log_every, settings.checkpoint_every, at_a_time);
    let outcome = train::train(&mut trainer, settings, &schedule, &out.join("training"), force)?;
    let mut result = json!({
        "out": out,
        "steps": settings.steps,
        "parameters": trainer.weights.n_parameters(),
        "seconds": outcome.seconds,
        "peak_memory_bytes": memory::peak_bytes(device),
    });
    for (name, value) in outcome.numbers {
        result[name] = json!(value);
    }
    Ok(result)
}

struct Trainer<'a> {
    settings: &'a TeacherSettings,
    lesson: &'a Lesson<'a>,
    /// Where the model goes.
    out: &'a Path,
    train: Vec<usize>,
    held_out: Vec<usize>,
    random: Random,
    /// The network's, and those of a text encoder that is learned along, whose names begin with [`TEXT`].
    weights: Weights,
    vars: BTreeMap<String, Var>,
    average: BTreeMap<String, Var>,
    averaged: Weights,
    folder: ModelFolder,
    student: Student,
    /// What it is trained on.
    training: Training,
    optimizer: Optimizer,
    group: Group,
    /// What the rate is multiplied by.
    rate_factor: f64,
    /// Of the lesson and the network's description.
    fingerprint: Fingerprint,
}

/// A network, and what reads captions for it.
struct Student {
    denoiser: Denoiser,
    encoder: Option<TextEncoder>,
}

/// Refuses a batch that does not fit into memory.
fn check_memory(
    settings: &TeacherSettings,
    network: &Network,
    n_parameters: usize,
    shape: [usize; 3],
    device: &Device,
) -> Result<()> {
    let needs = Needs {
        cost: cost(network, shape)?,
        grad_checkpoint: settings.grad_checkpoint,
        precision: settings.precision,
        passes: 1.0,
        whole_passes: 0.0,
        pictures: settings.batch / settings.accumulate,
        n_parameters,
        // The network, its gradient, a pair of moments, and the average.
        copies: 5,
    };
    memory::check(&needs, device)
}

impl<'a> Trainer<'a> {
    fn new(
        settings: &'a TeacherSettings,
        config: NetworkConfig,
        lesson: &'a Lesson<'a>,
        out: &'a Path,
        random: Random,
    ) -> Result<Self> {
        let pictures = lesson.pictures;
        let (train, held_out) = pictures.split(settings.held_out, settings.seed);
        ensure!(!train.is_empty(), "no picture is left to train on");
        let mut draw = |name: &str, n: usize| random.stream(Purpose::Init, name_key(name)).uniform(n);
        let mut fresh = config.init(&mut draw)?;
        let network = config.network(&fresh)?;
        if let Some(text) = &lesson.text {
            fresh.extend("", text.init(&random)?);
        }
        check_memory(settings, &network, fresh.n_parameters(), lesson.shape()?, &random.device)?;
        let fresh = fresh.to(DType::F32, &random.device)?;
        let (weights, vars) = fresh.trainable()?;
        let (averaged, average) = fresh.trainable()?;
        let about = About {
            kind: Kind::Teacher,
            sigma: None,
            steps: Vec::new(),
            classes: pictures.classes.clone(),
            null_class: settings.label_dropout > 0.0 && lesson.text.is_none(),
            data: Some(settings.about_data.clone()).filter(|text| !text.is_empty()),
            version: crate::VERSION.into(),
            run: Some(serde_json::to_value(settings)?),
        };
        let scheduler = Scheduler::edm(settings.sigma_min, settings.sigma_max, settings.sigma_data)?;
        let fingerprint = fingerprint::lesson(pictures, &config, lesson.known()?)?;
        let mut network = averaged.detached();
        network.take_prefixed(TEXT);
        let folder = ModelFolder {
            config,
            scheduler,
            weights: network,
            about,
            parts: BTreeMap::new(),
            settings: settings_of_pipeline(lesson.text.is_some()),
        };
        let student = student(&folder, lesson, weights.clone())?;
        let optimizer = Optimizer::new(&vars, settings.optimizer)?;
        Ok(Trainer {
            settings,
            lesson,
            out,
            train,
            held_out,
            random,
            weights,
            vars,
            average,
            averaged,
            folder,
            student,
            training: Training::new(settings.precision, settings.grad_checkpoint),
            optimizer,
            group: Group::alone(),
            rate_factor: 1.0,
            fingerprint,
        })
    }

    fn averaged_student(&self) -> Result<Student> {
        student(&self.folder, self.lesson, self.averaged.detached())
    }

    fn draw(&self, step: u64) -> Result<Draw> {
        let s = self.settings;
        let n = s.batch;
        let picks = self.random.stream(Purpose::Batch, step).below(n, u32::try_from(self.train.len())?);
        let flips = self.random.stream(Purpose::Flip, step).below(n, 2);
        let dropped = self.random.stream(Purpose::LabelDropout, step).uniform(n);
        let noise = |purpose: Purpose| self.random.normal(purpose, step, &self.shape(n)?);
        Ok(Draw {
            picks: picks.into_iter().map(|i| self.train[i as usize]).collect(),
            flips: flips.into_iter().map(|f| s.flip && f == 1).collect(),
            chosen: self.random.stream(Purpose::Caption, step).uniform(n),
            latents: if self.lesson.is_drawn() { Some(noise(Purpose::Latents)?) } else { None },
            dropped: dropped.into_iter().map(|u| u < s.label_dropout).collect(),
            sigma: self.log_normal(&self.random.stream(Purpose::TeacherSigma, step).normal(n)),
            noise: noise(Purpose::TeacherNoise)?,
        })
    }

    /// EDM's loss of these pictures, some mirrored, some without their class or caption.
    fn loss(&self, student: &Student, draw: &Draw) -> Result<Tensor> {
        let (device, n) = (&self.random.device, draw.picks.len());
        let x0 = self.lesson.samples(&draw.picks, &draw.flips, draw.latents.as_ref(), device)?;
        let sigmas = Tensor::from_vec(draw.sigma.iter().map(|&s| s as f32).collect(), (n, 1, 1, 1), device)?;
        let x_t = (&x0 + draw.noise.broadcast_mul(&sigmas)?)?;
        let told = self.told(student, draw)?;
        let denoised = student.denoiser.denoise(&self.training, &x_t, &draw.sigma, &told)?;
        let weights: Vec<f64> = draw.sigma.iter().map(|&s| edm_weight(s, self.settings.sigma_data)).collect();
        denoising(&denoised, &x0, &weights)
    }

    /// What the network is told of these pictures.
    fn told(&self, student: &Student, draw: &Draw) -> Result<Condition<Tensor>> {
        let (pictures, picks) = (self.lesson.pictures, &draw.picks);
        if let (Some(text), Some(encoder)) = (&self.lesson.text, &student.encoder) {
            return text.told(&self.training, encoder, picks, &draw.chosen, &draw.dropped);
        }
        let mut labels: Vec<u32> = picks.iter().filter_map(|i| pictures.labels.get(*i).copied()).collect();
        for (label, _) in labels.iter_mut().zip(&draw.dropped).filter(|(_, dropped)| **dropped) {
            *label = pictures.classes.len() as u32;
        }
        Ok(Condition::of_classes(labels, &self.random.device)?)
    }

    /// The averaged network's loss on the pictures held out, always with the same noise, in parts as a batch is.
    fn validation_loss(&self) -> Result<Option<f64>> {
        let picks: Vec<usize> = self.held_out.iter().copied().take(MAX_VALIDATION).collect();
        if picks.is_empty() {
            return Ok(None);
        }
        let student = self.averaged_student()?;
        let (mut sum, mut n) = (0.0, 0);
        for (i, picks) in picks.chunks(VALIDATION_BATCH).enumerate() {
            let draws = self
                .random
                .stream(Purpose::Validation, i as u64)
                .normal(picks.len() * (1 + self.shape(1)?.iter().product::<usize>()));
            let (sigma, noise) = draws.split_at(picks.len());
            let noise = Tensor::from_slice(noise, &self.shape(picks.len())?[..], &self.random.device)?;
            let draw = Draw::plain(picks.to_vec(), self.log_normal(sigma), noise);
            for part in draw.parts(self.settings.accumulate)? {
                let loss = self.loss(&student, &part)?;
                sum += f64::from(loss.to_scalar::<f32>()?) * part.picks.len() as f64;
                n += part.picks.len();
            }
        }
        Ok(Some(sum / n as f64))
    }

    fn log_normal(&self, normal: &[f32]) -> Vec<f64> {
        let s = self.settings;
        normal.iter().map(|&z| (s.p_mean + s.p_std * f64::from(z)).exp().clamp(s.sigma_min, s.sigma_max)).collect()
    }

    fn shape(&self, n: usize) -> Result<[usize; 4]> {
        let [c, h, w] = self.lesson.shape()?;
        Ok([n, c, h, w])
    }
}

/// The network on its part of the weights, and the text encoder on the other.
fn student(folder: &ModelFolder, lesson: &Lesson, mut weights: Weights) -> Result<Student> {
    let learned = weights.take_prefixed(TEXT);
    let encoder = lesson.text.as_ref().map(|text| text.encoder(&learned)).transpose()?;
    Ok(Student { denoiser: folder.denoiser_on(&weights)?, encoder })
}

impl Trainee for Trainer<'_> {
    fn update(&mut self, step: u64) -> Result<Numbers> {
        let s = self.settings;
        let (mut gradients, mut losses) = (Gradients::default(), Vec::new());
        let share = 1.0 / s.accumulate as f64;
        for part in self.draw(step)?.parts(s.accumulate)? {
            let loss = (self.loss(&self.student, &part)? * share)?;
            gradients.add(self.optimizer.gradients(&self.training.backward(&loss)?))?;
            losses.push(loss.detach());
        }
        let gradients = self.group.sum(gradients)?;
        let loss = Tensor::stack(&losses, 0)?.sum_all()?;
        let rate = self.rate_factor * rate_at(s.rate, s.decay, s.warmup, step, s.steps);
        let norm = self.optimizer.update(&gradients, &loss, rate)?;
        average_into(&self.average, &self.vars, ramped_decay(s.ema, step), &norm)?;
        // The one moment that an update waits for the device.
        let numbers = read(&[loss, norm])?;
        Ok(vec![("loss", finite("loss", numbers[0])?), ("grad_norm", self.optimizer.settle(numbers[1])?)])
    }

    /// Weights that an update has ruined are not saved: a run that goes on would begin with them.
    fn validate(&mut self) -> Result<Option<(&'static str, f64)>> {
        let loss = self.validation_loss()?;
        loss.map(|loss| Ok(("validation_loss", finite("validation_loss", loss)?))).transpose()
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
        json!({ "n_updates": self.optimizer.n_updates(), "data_sha256": self.fingerprint.now })
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        ensure!(
            checkpoint.known("data_sha256").is_none_or(|written| self.fingerprint.is(written)),
            "the run was started on other pictures or another network (the files under --data or --unet have changed); give it the same, another --out, or --force to begin anew"
        );
        restore_vars(&self.vars, &checkpoint.part("weights")?)?;
        restore_vars(&self.average, &checkpoint.part("average")?)?;
        self.optimizer.restore(&checkpoint.part("optimizer")?, checkpoint.count("n_updates")?)
    }

    fn draw_samples(&self, path: &Path) -> Result<()> {
        let mut student = self.averaged_student()?;
        let [_, c, h, w] = self.shape(1)?;
        let noise = picture_noise(self.settings.seed, 0, GRID, [c, h, w], &Device::Cpu)?;
        let (told, captions) = match (&self.lesson.text, &student.encoder) {
            (Some(text), Some(encoder)) => {
                // Of pictures held out where there are any.
                let picks: Vec<usize> = self.held_out.iter().chain(&self.train).copied().cycle().take(GRID).collect();
                let draw = Draw::plain(picks, vec![1.0; GRID], noise.clone());
                if self.settings.label_dropout > 0.0 {
                    student.denoiser.unconditional = Some(text.unsaid(&self.training, encoder)?);
                }
                let captions = draw.picks.iter().map(|i| self.lesson.pictures.captions[*i][0].clone());
                (
                    Some(self.told(&student, &draw)?.try_map(|rows| Ok::<_, candle_core::Error>(rows.detach()))?),
                    captions.collect(),
                )
            }
            _ => (None, Vec::new()),
        };
        let labels = labels_in_turn(GRID, student.denoiser.n_classes());
        let guidance = if student.denoiser.unconditional.is_some() && told.is_some() { GUIDANCE } else { 1.0 };
        let pipeline = Pipeline { text: None, denoiser: student.denoiser, decoder: self.lesson.decoder().cloned() };
        let model = Model::teacher(pipeline, Sampler::Heun, 18, guidance);
        let told = told.map_or_else(|| model.of_labels(&labels, GRID), Ok)?;
        let images = model.make(&noise, &told, GRID, &|_| {})?.pictures;
        let scale = (128 / images.dim().2 as u32).max(1);
        let grid = match captions.is_empty() {
            true => picture::grid(&images, picture::columns(GRID), scale),
            false => picture::captioned(&images, &captions, picture::columns(GRID), scale),
        };
        picture::save(path, &grid)
    }

    fn write_model(&mut self) -> Result<()> {
        let learned = self.averaged.clone().take_prefixed(TEXT);
        self.folder.parts = self.lesson.parts(&learned, self.out)?;
        self.folder.write_into(self.out, DType::F32).context("the model folder")
    }
}

/// Of the grids of a teacher of text that can be guided.
const GUIDANCE: f64 = 3.0;
const MAX_VALIDATION: usize = 256;
const VALIDATION_BATCH: usize = 64;
/// Pictures in a sample grid.
const GRID: usize = 16;

/// A number for a parameter's name (FNV-1a), so that each has a stream of its own.
pub(crate) fn name_key(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
