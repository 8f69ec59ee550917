//! Distribution Matching Distillation (Yin et al. 2024): the loop around `step.rs`, with its checkpoints, samples and
//! metrics. Begins from a teacher's folder and ends with a generator's.

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

use crate::config::{Config, Distance, ScoreLoss, Sigma, SigmaName, check_guidance};
use crate::data::{self, DataOptions};
use crate::device::check_precision;
use crate::fingerprint::{self, Fingerprint};
use crate::memory::{self, Needs, Work};
use crate::optim::NotFinite;
use crate::pairs::Pairs;
use crate::random::{Random, picture_noise};
use crate::run::{self, Checkpoint, Parts, Run};
use crate::sample::{Model, labels_in_turn};
use crate::{output, picture};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dmd_models::cost::cost;
use dmd_models::folder::{About, Kind};
use dmd_models::{ModelFolder, Weights};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

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
    let mut distillation = Distillation::new(config, teacher_folder, begins, device).map_err(no_room)?;
    let mut run = Run::open(out, config, force)?;
    let checkpoint = run.last_checkpoint()?;
    match &checkpoint {
        Some(checkpoint) => distillation.restore(checkpoint)?,
        None => ensure!(begins, "{}: its checkpoints were removed just now; run the same command again", out.display()),
    }
    let first = run.go_on(checkpoint.as_ref(), config.steps)?;
    if first < config.steps {
        run.check_room(&distillation.parts()?)?;
    }
    // The grid of a checkpoint may be missing where the run was killed.
    if checkpoint.is_none() || (distillation.samples_due(first) && !run.path(sample_file(first)).exists()) {
        distillation.draw_samples(&run, first)?;
    }
    run::stop_on_signals()?;
    let bar = output::progress(config.steps, first)?;
    let started = Instant::now();
    let mut health = None;
    let training = Work::Training(config.batch / config.accumulate);
    let mut step = first;
    while step < config.steps {
        let measured = match distillation.step(step) {
            Err(error) if error.is::<NotFinite>() => match distillation.recover(&run, step, error)? {
                Recovery::Skip => None,
                Recovery::Return(earlier) => {
                    step = earlier;
                    bar.set_position(step);
                    continue;
                }
            },
            measured => Some(measured.map_err(|error| memory::explained(error, training))?),
        };
        step += 1;
        bar.inc(1);
        let last = step == config.steps;
        if let Some(measured) = measured {
            let warnings = distillation.monitor.observe(&measured);
            warnings.iter().for_each(|warning| output::warn(warning));
            if step.is_multiple_of(config.log_every) || last {
                let values = measured.values();
                bar.set_message(run::readable(&values));
                run.log(step, &values)?;
                output::line_without_terminal(&format!("step {step}/{}  {}", config.steps, run::readable(&values)));
            }
            health = Some(measured);
        }
        if distillation.samples_due(step) {
            distillation.draw_samples(&run, step)?;
        }
        // In the middle of trouble there is nothing to go back to.
        let due = step.is_multiple_of(config.checkpoint_every) && distillation.skipped_in_a_row == 0;
        if due || last || run::asked_to_stop() {
            run.checkpoint(step, &distillation.parts()?, &distillation.state())?;
        }
        if run::asked_to_stop() && !last {
            bar.abandon();
            bail!("interrupted at step {step} of {}; run the same command again to continue", config.steps);
        }
    }
    bar.finish_and_clear();
    distillation.save_generators(out)?;
    let mut result = json!({
        "out": out,
        "generator": out.join("generator"),
        "steps": config.steps,
        "sigma": distillation.networks.sigmas[0],
        "skipped": distillation.n_skipped,
        "seconds": started.elapsed().as_secs_f64(),
        "peak_memory_bytes": memory::peak_bytes(device),
    });
    for (name, value) in health.iter().flat_map(Health::values) {
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
    /// Updates skipped so far, and how many of them in a row.
    n_skipped: u64,
    skipped_in_a_row: u64,
    /// Times that the run went back to a checkpoint, and where to, the last time.
    n_returns: u64,
    returned_to: Option<u64>,
    monitor: Monitor,
}

/// Refuses a batch that does not fit into memory.
pub fn check_memory(config: &Config, teacher: &ModelFolder, device: &Device) -> Result<()> {
    let [height, width] = teacher.size()?;
    let [passes, whole_passes] = passes(config);
    let needs = Needs {
        cost: cost(&teacher.denoiser(&Device::Cpu)?.network, [teacher.config.in_channels, height, width])?,
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
    // Score identity goes back through both scores, and through both answers of a guided one.
    let scores = match config.loss.scores {
        ScoreLoss::DistributionMatching => 0.0,
        ScoreLoss::ScoreIdentity { .. } => 2.0 + if_so(config.real_score.guidance_scale != 1.0, 1.0),
    };
    let regresses = regression.weight > 0.0;
    let generator = 1.0 + scores + if_so(gan.weight > 0.0, ENCODER) + if_so(regresses, 1.0);
    let fake_score = 1.0 + if_so(gan.on(), 2.0 * ENCODER + if_so(gan.r1 > 0.0, ENCODER));
    let distance = if_so(regresses && regression.distance == Distance::TeacherFeatures, ENCODER);
    [generator.max(fake_score), distance]
}

/// What becomes of a run after an update that was no number.
enum Recovery {
    /// On with the next update.
    Skip,
    /// Back to this step.
    Return(u64),
}

impl<'a> Distillation<'a> {
    /// `begins`: nothing will be restored from a checkpoint.
    fn new(config: &'a Config, teacher: ModelFolder, begins: bool, device: &Device) -> Result<Self> {
        let known_teacher = fingerprint::teacher(&teacher)?;
        let sigmas = noise_levels(config, &teacher)?;
        let guidance = config.real_score.guidance_scale;
        check_guidance("real_score.guidance_scale", guidance, &teacher.config, teacher.about.null_class)?;
        check_memory(config, &teacher, device)?;
        let random = Random { seed: config.seed, device: device.clone() };
        let beginning = beginning(config, &teacher, &sigmas, begins)?;
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
        let folder = ModelFolder { about, ..teacher };
        let (n_skipped, skipped_in_a_row, n_returns) = (0, 0, 0);
        Ok(Distillation {
            config,
            networks,
            random,
            folder,
            teacher: known_teacher,
            known,
            n_skipped,
            skipped_in_a_row,
            n_returns,
            returned_to: None,
            monitor: Monitor::default(),
        })
    }

    /// One update of the generator, then `ratio` of the fake score.
    fn step(&mut self, step: u64) -> Result<Health> {
        let mut health = self.networks.update_generator(self.config, &self.random, step)?;
        for turn in 0..self.config.ratio {
            let measured = self.networks.update_fake_score(self.config, &self.random, step, turn)?;
            health.add(&measured, 1.0 / self.config.ratio as f64);
        }
        self.skipped_in_a_row = 0;
        Ok(health)
    }

    /// After a loss or gradient that is no number: skips the update, goes back to the last checkpoint, or gives up.
    fn recover(&mut self, run: &Run, step: u64, error: anyhow::Error) -> Result<Recovery> {
        let guards = &self.config.guards;
        // A first update that fails is no bad luck: the teacher or the settings are at fault.
        let began = self.networks.fake_optimizer.n_updates() > 0;
        if began && self.skipped_in_a_row < guards.skip {
            self.n_skipped += 1;
            self.skipped_in_a_row += 1;
            output::warn(&format!("step {}: {error:#}; this update is skipped", step + 1));
            return Ok(Recovery::Skip);
        }
        let newest = run.last_checkpoint()?;
        // From a checkpoint that was tried before, and led here again, to the one before it.
        let tried = newest.as_ref().is_some_and(|newest| self.returned_to.is_some_and(|to| newest.step <= to));
        let earlier = newest.as_ref().filter(|_| tried).map(|newest| run.checkpoint_before(newest.step)).transpose()?;
        match earlier.flatten().or(newest) {
            Some(checkpoint) if self.n_returns < guards.returns => {
                let (n_returns, n_skipped) = (self.n_returns + 1, self.n_skipped);
                let step = checkpoint.step;
                self.restore(&checkpoint)?;
                run.forget_after(step)?;
                run.rewind_log(step)?;
                (self.n_returns, self.n_skipped) = (n_returns, n_skipped);
                (self.skipped_in_a_row, self.returned_to) = (0, Some(step));
                self.networks.rate_factor = 0.5f64.powi(n_returns as i32);
                output::warn(&format!(
                    "{error:#}; going on from step {step} at {} of the rates",
                    self.networks.rate_factor
                ));
                Ok(Recovery::Return(step))
            }
            _ => Err(run::stopped(step + 1, error)),
        }
    }

    /// What a checkpoint holds: weights and moments,
    fn parts(&self) -> Result<Parts> {
        let n = &self.networks;
        let mut parts = vec![
            ("generator".to_string(), run::vars_as_weights(&n.generator_vars)),
            ("fake_score".to_string(), run::vars_as_weights(&n.fake_vars)),
            ("optimizer_generator".to_string(), n.generator_optimizer.state()?),
            ("optimizer_fake_score".to_string(), n.fake_optimizer.state()?),
        ];
        parts.extend((0..n.averages.len()).map(|i| (average_part(i), run::vars_as_weights(&n.averages[i].vars))));
        if let Some(d) = &n.discriminator {
            parts.push(("discriminator".into(), run::vars_as_weights(&d.vars)));
            parts.push(("optimizer_discriminator".into(), d.optimizer.state()?));
        }
        Ok(parts)
    }

    /// and the numbers beside them.
    fn state(&self) -> Value {
        let n = &self.networks;
        let mut state = json!({
            "n_updates_generator": n.generator_optimizer.n_updates(),
            "n_updates_fake_score": n.fake_optimizer.n_updates(),
            "teacher_sha256": self.teacher.now,
            "n_skipped": self.n_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "n_returns": self.n_returns,
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
        run::restore_vars(&n.generator_vars, &checkpoint.part("generator")?)?;
        run::restore_vars(&n.fake_vars, &checkpoint.part("fake_score")?)?;
        for (i, average) in n.averages.iter().enumerate() {
            run::restore_vars(&average.vars, &checkpoint.part(&average_part(i))?)?;
        }
        n.generator_optimizer
            .restore(&checkpoint.part("optimizer_generator")?, checkpoint.count("n_updates_generator")?)?;
        n.fake_optimizer
            .restore(&checkpoint.part("optimizer_fake_score")?, checkpoint.count("n_updates_fake_score")?)?;
        if let Some(d) = &mut n.discriminator {
            run::restore_vars(&d.vars, &checkpoint.part("discriminator")?)?;
            d.optimizer
                .restore(&checkpoint.part("optimizer_discriminator")?, checkpoint.count("n_updates_discriminator")?)?;
            n.ratio_bins.means = checkpoint.numbers("ratio_means")?.into_iter().map(|mean| mean as f32).collect();
        }
        self.n_skipped = checkpoint.count("n_skipped")?;
        self.skipped_in_a_row = checkpoint.count("skipped_in_a_row")?;
        self.n_returns = checkpoint.count("n_returns")?;
        let monitor = checkpoint.state.get("monitor").cloned();
        self.monitor = monitor.map(serde_json::from_value).transpose()?.unwrap_or_default();
        n.rate_factor = 0.5f64.powi(self.n_returns as i32);
        Ok(())
    }

    /// The exported average as `generator`, the others beside it under their decay.
    fn save_generators(&mut self, out: &Path) -> Result<()> {
        for (i, average) in self.networks.averages.iter().enumerate() {
            let name = if i == 0 { "generator".to_string() } else { format!("generator-ema-{}", average.decay) };
            self.folder.weights = average.view.detached();
            self.folder.save(&out.join(&name), DType::F32).with_context(|| name)?;
        }
        Ok(())
    }

    fn samples_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.config.sample_every) || step == self.config.steps
    }

    /// A grid of the averaged generator's pictures, from the same noise every time.
    fn draw_samples(&self, run: &Run, step: u64) -> Result<()> {
        let denoiser = self.folder.denoiser_on(&self.networks.averages[0].view.detached())?;
        let [h, w] = self.folder.size()?;
        let labels = labels_in_turn(GRID, denoiser.n_classes());
        let noise = picture_noise(self.config.seed, 0, GRID, [self.folder.config.in_channels, h, w], &Device::Cpu)?;
        let model = Model::of_steps(denoiser, &self.networks.sigmas, self.config.seed);
        let images = model.pictures(&noise, &labels, GRID)?;
        let grid = picture::grid(&images, picture::columns(GRID), (128 / h as u32).max(1));
        picture::save_png(&run.path(sample_file(step)), &grid)
    }
}

fn sample_file(step: u64) -> String {
    format!("samples/step-{step:08}.png")
}

/// What a run learns from besides the teacher, as [`Distillation::known`] has it.
fn known(config: &Config, beginning: &Beginning) -> Result<Vec<(&'static str, &'static str, String)>> {
    let mut known = Vec::new();
    if let Some(reality) = &beginning.reality {
        known.push((
            "data_sha256",
            "pictures (the files under --data, or how they are labelled, differ)",
            reality.sha256(),
        ));
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
    let (name, sigmas) = match (&config.generator.steps[..], config.generator.sigma) {
        ([], Sigma::Value(sigma)) => ("sigma", vec![sigma]),
        ([], Sigma::Named(SigmaName::Max)) => ("sigma", vec![levels.sigma_max()]),
        (steps, _) => ("steps", steps.to_vec()),
    };
    let [low, high] = [levels.sigma_min(), levels.sigma_max()];
    for sigma in &sigmas {
        ensure!(
            (low..=high).contains(sigma),
            "generator.{name} is {sigma}, expected within the teacher's noise levels, {low} to {high}"
        );
    }
    Ok(sigmas)
}

/// What the networks begin as, and the pairs and pictures they learn from; each refused where it does not go with the
/// teacher; `sigmas` are the run's passes.
fn beginning(config: &Config, teacher: &ModelFolder, sigmas: &[f64], begins: bool) -> Result<Beginning> {
    let pairs = &config.loss.regression;
    let pairs = match pairs.weight > 0.0 {
        true => Some(Pairs::load(Path::new(&pairs.pairs), teacher, config.real_score.guidance_scale)?),
        false => None,
    };
    let reality = match config.loss.gan.on() {
        true => {
            let options = DataOptions {
                size: teacher.size()?,
                grey: teacher.config.in_channels == 1,
                unconditional: teacher.n_classes().is_none(),
                strict: false,
            };
            Some(Reality::new(data::load(Path::new(&config.data), &options)?, teacher)?)
        }
        false => None,
    };
    // What a run started from is in its checkpoint, and may be gone or have gone on since.
    let (generator, fake_score) = match config.generator.start.is_empty() || !begins {
        true => (None, None),
        false => start_of(Path::new(&config.generator.start), teacher, sigmas)?,
    };
    Ok(Beginning { generator, fake_score, reality, pairs })
}

/// Generator and, where `path` is a run with a checkpoint, fake score to go on from; `sigmas` are the new run's passes.
fn start_of(path: &Path, teacher: &ModelFolder, sigmas: &[f64]) -> Result<(Option<Weights>, Option<Weights>)> {
    let inner = path.join("generator");
    let is_run = inner.is_dir();
    let folder = ModelFolder::load(if is_run { &inner } else { path }, &Device::Cpu).context("generator.start")?;
    ensure!(
        folder.config == teacher.config && folder.scheduler.json() == teacher.scheduler.json(),
        "generator.start: {} is another network than the teacher's (its unet/config.json or its scheduler differ)",
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
