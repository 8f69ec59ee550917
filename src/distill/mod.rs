//! Distribution Matching Distillation (Yin et al. 2024): the loop around [`step`], with its checkpoints, samples and
//! metrics. Begins from a teacher's folder and ends with a generator's.

pub mod step;
use step::{Health, Networks};

use crate::config::{Config, Sigma, SigmaName};
use crate::optim::{average_into, ramped_decay};
use crate::random::{Random, picture_noise};
use crate::run::{self, Checkpoint, Run};
use crate::sample::{Model, labels_in_turn};
use crate::{output, picture};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dmd_models::ModelFolder;
use dmd_models::denoiser::Generator;
use dmd_models::folder::{About, Kind};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::time::Instant;

/// Distils the teacher in `teacher` into `out/generator`. Running it again on the same folder continues, and ends with
/// the same weights, bit for bit on the CPU. Returns what a script would want to know.
pub fn distill(config: &Config, teacher: &Path, out: &Path, device: &Device, force: bool) -> Result<Value> {
    config.validate()?;
    let teacher_folder = ModelFolder::load(teacher, device).context("the teacher")?;
    ensure!(teacher_folder.about.kind == Kind::Teacher, "{}: is a generator, expected a teacher", teacher.display());
    // First what can be refused, then what leaves a trace in `out`.
    let mut distillation = Distillation::new(config, teacher_folder, device)?;
    let run = Run::open(out, config, force)?;
    let first = match run.last_checkpoint()? {
        Some(checkpoint) => distillation.restore(&run, &checkpoint)?,
        None => {
            run.rewind_log(0)?;
            distillation.draw_samples(&run, 0)?;
            0
        }
    };
    run::stop_on_signals()?;
    let bar = run::progress(config.steps, first)?;
    let started = Instant::now();
    let mut health = None;
    for step in first..config.steps {
        let measured = distillation.step(step)?;
        bar.inc(1);
        let done = step + 1;
        let last = done == config.steps;
        if done % config.log_every == 0 || last {
            let values = measured.values();
            bar.set_message(run::readable(&values));
            run.log(&run::as_json(done, started.elapsed().as_secs_f64(), &values))?;
            output::line_without_terminal(&format!("step {done}/{}  {}", config.steps, run::readable(&values)));
        }
        if done % config.sample_every == 0 || last {
            distillation.draw_samples(&run, done)?;
        }
        if done % config.checkpoint_every == 0 || last || run::asked_to_stop() {
            distillation.checkpoint(&run, done)?;
        }
        if run::asked_to_stop() && !last {
            bar.abandon();
            bail!("interrupted at step {done} of {}; run the same command again to continue", config.steps);
        }
        health = Some(measured);
    }
    bar.finish_and_clear();
    distillation.folder.save(&out.join("generator"), DType::F32).context("the generator")?;
    let mut result = json!({
        "out": out,
        "generator": out.join("generator"),
        "steps": config.steps,
        "sigma": distillation.sigma,
        "seconds": started.elapsed().as_secs_f64(),
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
    sigma: f64,
    /// The generator's folder; its weights are the moving average.
    folder: ModelFolder,
    teacher_sha256: String,
}

impl<'a> Distillation<'a> {
    fn new(config: &'a Config, teacher: ModelFolder, device: &Device) -> Result<Self> {
        let teacher_sha256 = fingerprint(&teacher)?;
        let levels = teacher.scheduler.levels()?;
        let sigma = match config.generator.sigma {
            Sigma::Value(sigma) => sigma,
            Sigma::Named(SigmaName::Max) => levels.sigma_max(),
        };
        let [low, high] = [levels.sigma_min(), levels.sigma_max()];
        ensure!(
            (low..=high).contains(&sigma),
            "generator.sigma is {sigma}, expected within the teacher's noise levels, {low} to {high}"
        );
        let random = Random { seed: config.seed, device: device.clone() };
        let networks = Networks::new(&teacher, sigma, config.optimizer, device)?;
        let about = About {
            kind: Kind::Generator,
            sigma: Some(sigma),
            run: Some(serde_json::to_value(config)?),
            version: crate::VERSION.into(),
            ..teacher.about
        };
        let folder = ModelFolder { about, weights: networks.averaged.detached(), ..teacher };
        Ok(Distillation { config, networks, random, sigma, folder, teacher_sha256 })
    }

    /// One update of the generator, then `ratio` of the fake score.
    fn step(&mut self, step: u64) -> Result<Health> {
        let mut health = self.networks.update_generator(self.config, &self.random, step)?;
        average_into(
            &self.networks.average,
            &self.networks.generator_vars,
            ramped_decay(self.config.generator.ema, step),
        )?;
        let mut sum = 0.0;
        for turn in 0..self.config.ratio {
            sum += self.networks.update_fake_score(self.config, &self.random, step, turn)?;
        }
        health.loss_fake = sum / self.config.ratio as f64;
        Ok(health)
    }

    fn checkpoint(&self, run: &Run, step: u64) -> Result<()> {
        let n = &self.networks;
        let parts = [
            ("generator", run::vars_as_weights(&n.generator_vars)),
            ("generator_ema", run::vars_as_weights(&n.average)),
            ("fake_score", run::vars_as_weights(&n.fake_vars)),
            ("optimizer_generator", n.generator_optimizer.state()),
            ("optimizer_fake_score", n.fake_optimizer.state()),
        ];
        let state = json!({
            "n_updates_generator": n.generator_optimizer.n_updates(),
            "n_updates_fake_score": n.fake_optimizer.n_updates(),
            "teacher_sha256": self.teacher_sha256,
        });
        run.checkpoint(step, &parts, &state)
    }

    fn restore(&mut self, run: &Run, checkpoint: &Checkpoint) -> Result<u64> {
        let same = checkpoint.state.get("teacher_sha256").and_then(Value::as_str) == Some(&self.teacher_sha256);
        ensure!(
            same,
            "the run was started with another teacher (its weights or its configuration differ); use that one, or --force to begin anew"
        );
        let n = &mut self.networks;
        run::restore_vars(&n.generator_vars, &checkpoint.part("generator")?)?;
        run::restore_vars(&n.average, &checkpoint.part("generator_ema")?)?;
        run::restore_vars(&n.fake_vars, &checkpoint.part("fake_score")?)?;
        n.generator_optimizer
            .restore(&checkpoint.part("optimizer_generator")?, checkpoint.count("n_updates_generator")?)?;
        n.fake_optimizer
            .restore(&checkpoint.part("optimizer_fake_score")?, checkpoint.count("n_updates_fake_score")?)?;
        run.rewind_log(checkpoint.step)?;
        output::say(&format!("continuing from step {}", checkpoint.step));
        Ok(checkpoint.step)
    }

    /// A grid of the averaged generator's pictures, from the same noise every time.
    fn draw_samples(&self, run: &Run, step: u64) -> Result<()> {
        let denoiser = self.folder.denoiser_on(&self.networks.averaged.detached())?;
        let [h, w] = self.folder.size()?;
        let labels = labels_in_turn(GRID, denoiser.n_classes());
        let noise = picture_noise(self.config.seed, 0, GRID, [self.folder.config.in_channels, h, w], &Device::Cpu)?;
        let images = Model::Generator(Generator { denoiser, sigma: self.sigma }).pictures(&noise, &labels, GRID)?;
        let grid = picture::grid(&images, picture::columns(GRID), (128 / h as u32).max(1));
        picture::save_png(&run.path(format!("samples/step-{step:08}.png")), &grid)
    }
}

/// Pictures in a sample grid.
const GRID: usize = 16;

/// A hash over the weights and what gives them their meaning, to tell one teacher from another.
fn fingerprint(teacher: &ModelFolder) -> Result<String> {
    let weights = dmd_export::weights_sha256(&teacher.weights.to(DType::F32, &Device::Cpu)?)?;
    let hash = Sha256::digest(format!("{:?} {:?} {weights}", teacher.config, teacher.scheduler));
    Ok(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}
