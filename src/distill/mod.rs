//! Distribution Matching Distillation (Yin et al. 2024): what the loop of `train` is given for
//! it, around `step.rs`. Begins from a teacher's folder and ends with a generator's.

mod networks;
pub use networks::{Average, Beginning, Networks};
mod draw;
mod step;
pub use draw::Reality;
mod discriminator;
mod health;
pub use health::Health;
mod monitor;
use monitor::Monitor;

use crate::config::{Config, Distance, ScoreLoss, Sigma, SigmaName, check_critic, check_guidance, check_prompts};
use crate::data::{self, DataOptions};
use crate::device::check_precision;
use crate::fingerprint::{self, Fingerprint};
use crate::memory::{self, Needs, Work};
use crate::pairs::Pairs;
use crate::prompts::{Known, Prompts};
use crate::random::{Random, picture_noise};
use crate::sample::Model;
use crate::train::{self, Checkpoint, Numbers, Parts, Run, Schedule, Trainee, restore_vars, vars_as_weights};
use crate::{output, picture};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use dmd_models::cost::cost;
use dmd_models::folder::{About, Kind};
use dmd_models::{ModelFolder, Pipeline, Way, Weights};
use serde_json::{Value, json};
use std::path::Path;

/// Distils the teacher in `teacher` into `out/generator`. Running it again on the same folder continues, and ends with
/// the same weights, bit for bit on the CPU. Returns what a script would want to know.
pub fn distill(config: &Config, teacher: &Path, out: &Path, device: &Device, force: bool) -> Result<Value> {
    config.validate()?;
    check_precision(config.precision, device)?;
    let no_room = |error| memory::explained(error, Work::Networks);
    let teacher_folder = ModelFolder::load(teacher, device).context("the teacher").map_err(no_room)?;
    ensure!(teacher_folder.about.kind == Kind::Teacher, "{}: is a generator, expected a teacher", teacher.display());
    // First what can be refused, then what leaves a trace in `out`.
    let begins = force || !Run::has_begun(out);
    let mut distillation = Distillation::new(config, teacher_folder, begins, out, device).map_err(no_room)?;
    let schedule = Schedule {
        n_steps: config.steps,
        log_every: config.log_every,
        sample_every: config.sample_every,
        checkpoint_every: config.checkpoint_every,
        guards: config.guards.clone(),
        work: Work::Training(config.batch / config.accumulate),
    };
    let outcome = train::train(&mut distillation, config, &schedule, out, force)?;
    let mut result = json!({
        "out": out,
        "generator": out.join("generator"),
        "steps": config.steps,
        "sigma": distillation.networks.sigmas[0],
        "skipped": outcome.n_skipped,
        "seconds": outcome.seconds,
        "peak_memory_bytes": memory::peak_bytes(device),
    });
    for (name, value) in outcome.numbers {
        result[name] = json!(value);
    }
    Ok(result)
}

struct Distillation<'a> {
    config: &'a Config,
    networks: Networks,
    random: Random,
    /// The generator's folder, but for its weights.
    folder: ModelFolder,
    teacher: Fingerprint,
    /// What the run learns from besides the teacher, by its content: what it is called in `state.json`, what it is called
    /// in a message, the hash.
    known: Vec<(&'static str, &'static str, String)>,
    /// Where the generators go.
    out: &'a Path,
    monitor: Monitor,
}

/// Refuses a batch that does not fit into memory.
pub fn check_memory(config: &Config, teacher: &ModelFolder, device: &Device) -> Result<()> {
    let [passes, whole_passes] = passes(config);
    let needs = Needs {
        cost: cost(&teacher.denoiser(&Device::Cpu)?.network, teacher.sample_shape()?)?,
        grad_checkpoint: config.grad_checkpoint,
        precision: config.precision,
        passes,
        whole_passes,
        pictures: config.batch / config.accumulate,
        n_parameters: teacher.weights.n_parameters(),
        // Three networks, one gradient at a time, two pairs of moments, and the averages.
        copies: 8 + config.generator.ema.decays().len(),
    };
    memory::check(&needs, device)
}

/// Passes that the larger of the two updates goes back through at once, and those of a distance, whose blocks are kept
/// whatever the settings say.
fn passes(config: &Config) -> [f64; 2] {
    // Down to the bottleneck, for the maps that a discriminator or a distance looks at: what runs of dmd2 and dmd took.
    const ENCODER: f64 = 0.4;
    let if_so = |condition: bool, passes: f64| if condition { passes } else { 0.0 };
    let (gan, regression) = (&config.loss.gan, &config.loss.regression);
    let guided_fake = config.fake_score.guidance_scale != 1.0;
    // Score identity goes back through both scores, and through both answers of a guided one.
    let scores = match config.loss.scores {
        ScoreLoss::DistributionMatching => 0.0,
        ScoreLoss::ScoreIdentity { .. } => {
            2.0 + if_so(config.real_score.guidance_scale != 1.0, 1.0) + if_so(guided_fake, 1.0)
        }
    };
    let regresses = regression.weight > 0.0;
    let generator = 1.0 + scores + if_so(gan.weight > 0.0, ENCODER) + if_so(regresses, 1.0);
    let fake_score = 1.0 + if_so(guided_fake, 1.0) + if_so(gan.on(), 2.0 * ENCODER + if_so(gan.r1 > 0.0, ENCODER));
    let distance = if_so(regresses && regression.distance == Distance::TeacherFeatures, ENCODER);
    [generator.max(fake_score), distance]
}

impl<'a> Distillation<'a> {
    /// `begins`: nothing will be restored from a checkpoint.
    fn new(config: &'a Config, teacher: ModelFolder, begins: bool, out: &'a Path, device: &Device) -> Result<Self> {
        check_prompts(config, &teacher.config.takes())?;
        let known_teacher = fingerprint::teacher(&teacher)?;
        let sigmas = noise_levels(config, &teacher)?;
        let guidance = config.real_score.guidance_scale;
        check_guidance("real_score.guidance_scale", guidance, &teacher.config.takes(), teacher.about.null_class)?;
        check_critic(config, &teacher.config.takes(), teacher.about.null_class)?;
        check_memory(config, &teacher, device)?;
        let random = Random { seed: config.seed, device: device.clone() };
        let beginning = beginning(config, &teacher, &sigmas, begins, device)?;
        let known = known(config, &beginning)?;
        let networks = Networks::new(&teacher, &sigmas, config, beginning, &random)?;
        let about = About {
            kind: Kind::Generator,
            sigma: Some(sigmas[0]),
            steps: if sigmas.len() > 1 { sigmas } else { Vec::new() },
            run: Some(serde_json::to_value(config)?),
            version: crate::VERSION.into(),
            ..teacher.about
        };
        // The networks have the teacher's weights.
        let folder = ModelFolder { about, weights: Weights::default(), ..teacher };
        Ok(Distillation {
            config,
            networks,
            random,
            folder,
            teacher: known_teacher,
            known,
            out,
            monitor: Monitor::default(),
        })
    }
}

impl Trainee for Distillation<'_> {
    /// Text states of all prompts, and latents of all pictures.
    fn prepare(&mut self, run: &Run) -> Result<()> {
        if let Some(prompts) = &mut self.networks.prompts {
            prompts.keep(&run.path("text"), KEPT_BYTES)?;
        }
        if let Some(reality) = &mut self.networks.reality
            && let Some(autoencoder) = self.folder.decoder(&self.random.device)?
        {
            let data = self.known.iter().find(|(name, ..)| *name == DATA).map_or("", |(.., sha256)| sha256);
            let known = [&*fingerprint::autoencoder(&self.folder)?, data];
            reality.keep(&run.path("latents"), &autoencoder, self.folder.sample_shape()?, known, &self.random)?;
        }
        Ok(())
    }

    /// One update of the generator, then `ratio` of the fake score.
    fn update(&mut self, step: u64) -> Result<Numbers> {
        let mut health = self.networks.update_generator(self.config, &self.random, step)?;
        for turn in 0..self.config.ratio {
            let measured = self.networks.update_fake_score(self.config, &self.random, step, turn)?;
            health.add(&measured, 1.0 / self.config.ratio as f64);
        }
        self.monitor
            .observe(&health, self.networks.guidance_scale > 1.0)
            .iter()
            .for_each(|warning| output::warn(warning));
        Ok(health.values())
    }

    /// Of a generator of text, what another prompt changes, in the parts of what another noise changes.
    fn validate(&mut self) -> Result<Option<(&'static str, f64)>> {
        let n = (self.config.batch / self.config.accumulate).clamp(2, GRID);
        let effect = self.networks.prompt_effect(&self.random, n)?;
        effect.and_then(|effect| self.monitor.prompts(effect)).iter().for_each(|warning| output::warn(warning));
        Ok(effect.map(|effect| ("prompt_effect", effect)))
    }

    fn slow_down(&mut self, factor: f64) {
        self.networks.rate_factor = factor;
    }

    fn parts(&self) -> Result<Parts> {
        let n = &self.networks;
        let mut parts = vec![
            ("generator".to_string(), vars_as_weights(&n.generator_vars)),
            ("fake_score".to_string(), vars_as_weights(&n.fake_vars)),
            ("optimizer_generator".to_string(), n.generator_optimizer.state()?),
            ("optimizer_fake_score".to_string(), n.fake_optimizer.state()?),
        ];
        parts.extend((0..n.averages.len()).map(|i| (average_part(i), vars_as_weights(&n.averages[i].vars))));
        if let Some(d) = &n.discriminator {
            parts.push(("discriminator".into(), vars_as_weights(&d.vars)));
            parts.push(("optimizer_discriminator".into(), d.optimizer.state()?));
        }
        Ok(parts)
    }

    fn state(&self) -> Value {
        let n = &self.networks;
        let mut state = json!({
            "n_updates_generator": n.generator_optimizer.n_updates(),
            "n_updates_fake_score": n.fake_optimizer.n_updates(),
            "teacher_sha256": self.teacher.now,
            "monitor": self.monitor,
        });
        if let Some(d) = &n.discriminator {
            state["n_updates_discriminator"] = json!(d.optimizer.n_updates());
            state["ratio_means"] = json!(n.ratio_bins.means);
        }
        for (name, _, sha256) in &self.known {
            state[*name] = json!(sha256);
        }
        state
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        ensure!(
            checkpoint.known("teacher_sha256").is_some_and(|written| self.teacher.is(written)),
            "the run was started with another teacher (its weights or its configuration differ); use that one, or --force to begin anew"
        );
        for (name, what, sha256) in &self.known {
            ensure!(
                checkpoint.known(name).is_none_or(|written| written == sha256),
                "the run was started with other {what}; give it the same, another --out, or --force to begin anew"
            );
        }
        let n = &mut self.networks;
        restore_vars(&n.generator_vars, &checkpoint.part("generator")?)?;
        restore_vars(&n.fake_vars, &checkpoint.part("fake_score")?)?;
        for (i, average) in n.averages.iter().enumerate() {
            restore_vars(&average.vars, &checkpoint.part(&average_part(i))?)?;
        }
        n.generator_optimizer
            .restore(&checkpoint.part("optimizer_generator")?, checkpoint.count("n_updates_generator")?)?;
        n.fake_optimizer
            .restore(&checkpoint.part("optimizer_fake_score")?, checkpoint.count("n_updates_fake_score")?)?;
        if let Some(d) = &mut n.discriminator {
            restore_vars(&d.vars, &checkpoint.part("discriminator")?)?;
            d.optimizer
                .restore(&checkpoint.part("optimizer_discriminator")?, checkpoint.count("n_updates_discriminator")?)?;
            n.ratio_bins.means = checkpoint.numbers("ratio_means")?.into_iter().map(|mean| mean as f32).collect();
        }
        let monitor = checkpoint.state.get("monitor").cloned();
        self.monitor = monitor.map(serde_json::from_value).transpose()?.unwrap_or_default();
        Ok(())
    }

    /// The exported average as `generator`, the others beside it under their decay.
    fn write_model(&mut self) -> Result<()> {
        for (i, average) in self.networks.averages.iter().enumerate() {
            let name = if i == 0 { "generator".to_string() } else { format!("generator-ema-{}", average.decay) };
            self.folder.weights = average.view.detached();
            self.folder.save(&self.out.join(&name), DType::F32).with_context(|| name)?;
        }
        Ok(())
    }

    fn draw_samples(&self, path: &Path) -> Result<()> {
        let denoiser = self.folder.denoiser_on(&self.networks.averages[0].view.detached())?;
        let shape = self.folder.sample_shape()?;
        let noise = picture_noise(self.config.seed, 0, GRID, shape, &Device::Cpu)?;
        let cond = self.networks.told_in_turn(GRID, &self.random.device)?;
        // The decoder is in memory only while somebody looks.
        let decoder = self.folder.decoder(&self.random.device)?;
        let pipeline = Pipeline { text: None, denoiser, decoder };
        let model = Model::of_steps(pipeline, &self.networks.sigmas, self.config.seed);
        let images = model.make(&noise, &cond, GRID, &|_| {})?.pictures;
        let (columns, scale) = (picture::columns(GRID), (128 / images.dim().2.max(1) as u32).max(1));
        let grid = match &self.networks.prompts {
            Some(prompts) => picture::captioned(&images, &prompts.texts, columns, scale),
            None => picture::grid(&images, columns, scale),
        };
        picture::save(path, &grid)
    }
}

/// By this name a checkpoint knows the pictures.
const DATA: &str = "data_sha256";
/// Text states of so many bytes are kept on the disk, at most: of 72,000 prompts for Stable Diffusion 1.5.
const KEPT_BYTES: u64 = 16 << 30;

/// What a run learns from besides the teacher, as [`Distillation::known`] has it.
fn known(config: &Config, beginning: &Beginning) -> Result<Vec<(&'static str, &'static str, String)>> {
    let mut known = Vec::new();
    if let Some(Known { text_sha256, prompts_sha256, .. }) = beginning.prompts.as_ref().map(|prompts| &prompts.known) {
        known.push(("prompts_sha256", "prompts (the lines under --prompts differ)", prompts_sha256.clone()));
        let what = "text encoders or tokenizers (those of the teacher differ)";
        known.push(("text_sha256", what, text_sha256.clone()));
    }
    if let Some(reality) = &beginning.reality {
        known.push((DATA, "pictures (the files under --data, or how they are labelled, differ)", reality.sha256()));
    }
    if let Some(pairs) = &beginning.pairs {
        known.push(("pairs_sha256", "pairs (the numbers under --pairs differ)", pairs.sha256()));
        if let Distance::Onnx(path) = &config.loss.regression.distance {
            let features = fingerprint::file(Path::new(path)).context("loss.regression.distance")?;
            known.push(("features_sha256", "features (the file of loss.regression.distance differs)", features));
        }
    }
    Ok(known)
}

/// Pictures in a sample grid.
const GRID: usize = 16;

fn average_part(i: usize) -> String {
    if i == 0 { "generator_ema".into() } else { format!("generator_ema_{}", i + 1) }
}

/// The generator's noise levels, one per pass.
fn noise_levels(config: &Config, teacher: &ModelFolder) -> Result<Vec<f64>> {
    let levels = teacher.scheduler.levels()?;
    let timesteps = config.generator.timestep.all();
    if let Some(timestep) = timesteps.iter().find(|timestep| **timestep >= levels.len()) {
        bail!(
            "generator.timestep is {timestep}, expected below {}, the number of the teacher's noise levels",
            levels.len()
        );
    }
    let (name, sigmas) = match (timesteps, &config.generator.steps[..], config.generator.sigma) {
        ([_, ..], ..) => ("timestep", timesteps.iter().map(|timestep| levels.sigma(*timestep)).collect()),
        ([], [], Sigma::Value(sigma)) => ("sigma", vec![sigma]),
        ([], [], Sigma::Named(SigmaName::Max)) => ("sigma", vec![levels.sigma_max()]),
        ([], steps, _) => ("steps", steps.to_vec()),
    };
    let [low, high] = [levels.sigma_min(), levels.sigma_max()];
    for sigma in &sigmas {
        ensure!(
            (low..=high).contains(sigma),
            "generator.{name} is {sigma}, expected within the teacher's noise levels, {low} to {high}: \
             --set generator.{name}={} takes the highest",
            if name == "sigma" { "max".into() } else { format!("[{high}]") }
        );
    }
    Ok(sigmas)
}

/// What the networks begin as, and the pairs and pictures they learn from; each refused where it does not go with the
/// teacher; `sigmas` are the run's passes.
fn beginning(
    config: &Config,
    teacher: &ModelFolder,
    sigmas: &[f64],
    begins: bool,
    device: &Device,
) -> Result<Beginning> {
    let reality = match config.loss.gan.on() {
        true => Some(reality(Path::new(&config.data), teacher)?),
        false => None,
    };
    let captions = reality.iter().flat_map(|reality| reality.pictures.captions.iter().flatten()).cloned();
    let prompts = Prompts::for_run(teacher, config, captions.collect(), device)?;
    let pairs = &config.loss.regression;
    let pairs = match pairs.weight > 0.0 {
        true => {
            Some(Pairs::load(Path::new(&pairs.pairs), teacher, prompts.as_ref(), config.real_score.guidance_scale)?)
        }
        false => None,
    };
    // What a run started from is in its checkpoint, and may be gone or have gone on since.
    let (generator, fake_score) = match config.generator.start.is_empty() || !begins {
        true => (None, None),
        false => start_of(Path::new(&config.generator.start), teacher, sigmas)?,
    };
    Ok(Beginning { generator, fake_score, reality, pairs, prompts })
}

/// Real pictures of the teacher's kind, with captions where it is told text.
fn reality(path: &Path, teacher: &ModelFolder) -> Result<Reality> {
    let [mut channels, mut height, mut width] = teacher.sample_shape()?;
    if let Some(autoencoder) = teacher.decoder(&Device::Cpu)? {
        let factor = autoencoder.factor();
        [channels, height, width] = [autoencoder.picture_channels(), factor * height, factor * width];
        // The smallest picture tells whether it encodes at all.
        let smallest = Tensor::zeros((1, channels, factor, factor), DType::F32, &Device::Cpu)?;
        autoencoder.encode(&smallest).context("loss.gan encodes real pictures by the teacher's autoencoder")?;
    }
    let captions = teacher.config.takes().told.get(Way::Text).is_some();
    let options = DataOptions::of_model([channels, height, width], teacher.n_classes().is_some())?;
    Reality::new(data::load_aloud(path, &DataOptions { captions, ..options })?, path, teacher)
}

/// Generator and, where `path` is a run with a checkpoint, fake score to go on from; `sigmas` are the new run's passes.
fn start_of(path: &Path, teacher: &ModelFolder, sigmas: &[f64]) -> Result<(Option<Weights>, Option<Weights>)> {
    let inner = path.join("generator");
    let is_run = inner.is_dir();
    let folder = ModelFolder::load(if is_run { &inner } else { path }, &Device::Cpu).context("generator.start")?;
    ensure!(
        folder.config == teacher.config && folder.scheduler.json() == teacher.scheduler.json(),
        "generator.start: {} is another network than the teacher's (its config.json or its scheduler differ)",
        path.display()
    );
    ensure!(
        folder.about.kind == Kind::Generator,
        "generator.start: {} is a teacher, which is where a run begins anyway: leave it out, or give a run or its generator",
        path.display()
    );
    // A generator of one pass may become one of several, whose first pass is its own.
    let held = folder.about.sigmas();
    ensure!(
        held.first() == sigmas.first(),
        "generator.start: {} is held at sigma {held:?}, and this run's generator at {sigmas:?}: set generator.sigma (or generator.steps) to begin with {}",
        path.display(),
        held.first().copied().unwrap_or_default()
    );
    let fake_score = match is_run {
        true => Run::last_checkpoint_in(path)?.map(|checkpoint| checkpoint.part("fake_score")).transpose()?,
        false => None,
    };
    Ok((Some(folder.weights), fake_score))
}
