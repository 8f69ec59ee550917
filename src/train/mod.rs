//! The one loop of all training: a teacher and a generator give it their update, and it does everything around it:
//! checkpoints, going on from them, signals, guards, progress, metrics, sample grids.

mod group;
pub use group::Group;
mod guards;
use guards::{Guards, Recovery};
mod run;
pub use run::{Run, Settings};
mod checkpoint;
pub use checkpoint::{Checkpoint, Parts, restore_vars, vars_as_weights};
mod signals;
pub use signals::{asked_to_stop, stop_on_signals};

use crate::config::GuardSettings;
use crate::memory::{self, Work};
use crate::optim::NotFinite;
use crate::output;
use anyhow::{Result, bail};
use serde_json::Value;
use std::path::Path;
use std::time::Instant;

/// What the loop trains: networks with their optimisers, and what they learn from.
pub trait Trainee {
    /// Makes what training needs from the run's folder, after all was found fit to begin and before the first update.
    fn prepare(&mut self, _run: &Run) -> Result<()> {
        Ok(())
    }
    /// One update, counted from 0, and its numbers. A loss or gradient that is not finite is [`NotFinite`] and changes no
    /// weight.
    fn update(&mut self, step: u64) -> Result<Numbers>;
    /// What is measured before a checkpoint, if anything; not finite, the checkpoint is not written.
    fn validate(&mut self) -> Result<Option<(&'static str, f64)>>;
    /// From now on at this factor of the rates.
    fn slow_down(&mut self, factor: f64);
    /// What a checkpoint holds: weights and moments,
    fn parts(&self) -> Result<Parts>;
    /// and the numbers beside them.
    fn state(&self) -> Value;
    /// Takes them back; refuses a checkpoint that began with something else, before anything is changed.
    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()>;
    /// Draws a grid of pictures, from the same noise every time.
    fn draw_samples(&self, path: &Path) -> Result<()>;
    /// Writes the model as it stands at a checkpoint.
    fn write_model(&mut self) -> Result<()>;
}

/// Numbers of an update by their name in metrics.jsonl.
pub type Numbers = Vec<(&'static str, f64)>;

/// How long the loop goes on, and what it does how often.
pub struct Schedule {
    /// Updates.
    pub n_steps: u64,
    /// Updates between lines of metrics.jsonl,
    pub log_every: u64,
    /// between sample grids,
    pub sample_every: u64,
    /// between checkpoints.
    pub checkpoint_every: u64,
    /// What happens when it goes astray.
    pub guards: GuardSettings,
    /// What an update takes memory for.
    pub work: Work,
}

impl Schedule {
    /// Of a model that is trained on pictures: it is looked at whenever a checkpoint is written, and nothing is tried again.
    /// `at_a_time` pictures take memory.
    pub fn of_pictures(n_steps: u64, log_every: u64, checkpoint_every: u64, at_a_time: usize) -> Self {
        Schedule {
            n_steps,
            log_every,
            sample_every: checkpoint_every,
            checkpoint_every,
            guards: GuardSettings { skip: 0, returns: 0 },
            work: Work::Training(at_a_time),
        }
    }
}

/// Refuses a folder that holds something and no training of ours, unless `force`; `what` would be in it.
pub fn check_out(out: &Path, what: &str, force: bool) -> Result<()> {
    let occupied = out.exists() && (!out.is_dir() || out.read_dir()?.next().is_some());
    if occupied && !out.join("training").exists() && !force {
        bail!(
            "{}: exists and is not {what} in training; give another --out, or --force to write into it",
            out.display()
        );
    }
    Ok(())
}

/// What a training came to.
pub struct Outcome {
    /// The last update's numbers.
    pub numbers: Numbers,
    /// Updates skipped.
    pub n_skipped: u64,
    /// How long it took, in this process.
    pub seconds: f64,
}

/// Trains, in the run's `folder`. The same settings in the same folder go on, and end with the same weights, bit for bit
/// on the CPU.
pub fn train<S: Settings>(
    trainee: &mut impl Trainee,
    settings: &S,
    schedule: &Schedule,
    folder: &Path,
    force: bool,
) -> Result<Outcome> {
    let n_steps = schedule.n_steps;
    let mut run = Run::open(folder, settings, force)?;
    let checkpoint = run.last_checkpoint()?;
    let mut guards = Guards::new(&schedule.guards);
    if let Some(checkpoint) = &checkpoint {
        trainee.restore(checkpoint)?;
        trainee.slow_down(guards.restore(checkpoint));
    }
    let mut step = run.go_on(checkpoint.as_ref(), n_steps)?;
    let done_already = step == n_steps;
    if !done_already {
        run.check_room(&trainee.parts()?)?;
    }
    trainee.prepare(&run)?;
    let is_due = |step: u64, every: u64| step.is_multiple_of(every) || step == n_steps;
    // The grid of a checkpoint may be missing where the run was killed.
    let grid = run.sample_path(step);
    if checkpoint.is_none() || (is_due(step, schedule.sample_every) && !grid.exists()) {
        trainee.draw_samples(&grid)?;
    }
    stop_on_signals()?;
    let bar = output::progress(n_steps, step)?;
    let (started, mut numbers) = (Instant::now(), Numbers::new());
    while step < n_steps {
        let measured = match trainee.update(step) {
            Err(error) if error.is::<NotFinite>() => match guards.recover(&run, trainee, step, error)? {
                Recovery::Skip => None,
                Recovery::Return(earlier) => {
                    step = earlier;
                    bar.set_position(step);
                    continue;
                }
            },
            measured => Some(measured.map_err(|error| memory::explained(error, schedule.work))?),
        };
        step += 1;
        bar.inc(1);
        if let Some(measured) = measured {
            guards.went_well();
            numbers = measured;
            if is_due(step, schedule.checkpoint_every) {
                let validated = trainee.validate().map_err(|error| memory::explained(error, schedule.work));
                numbers.extend(validated.map_err(|error| stopped(step, error))?);
            }
            if is_due(step, schedule.log_every) {
                bar.set_message(readable(&numbers));
                run.log(step, &numbers)?;
                output::line_without_terminal(&format!("step {step}/{n_steps}  {}", readable(&numbers)));
            }
        }
        if is_due(step, schedule.sample_every) {
            trainee.draw_samples(&run.sample_path(step))?;
        }
        let (last, stop) = (step == n_steps, asked_to_stop());
        // In the middle of trouble there is nothing to go back to.
        if last || stop || (is_due(step, schedule.checkpoint_every) && !guards.in_trouble()) {
            let mut state = trainee.state();
            guards.save(&mut state);
            let parts = trainee.parts()?;
            checkpoint::check_finite(&parts).map_err(|error| stopped(step, error))?;
            run.checkpoint(step, &parts, &state)?;
            trainee.write_model()?;
        }
        if stop && !last {
            bar.abandon();
            bail!("interrupted at step {step} of {n_steps}; run the same command again to continue");
        }
    }
    bar.finish_and_clear();
    if done_already {
        // Killed between its last checkpoint and the model, a finished run would stay without it.
        trainee.write_model()?;
    }
    Ok(Outcome { numbers, n_skipped: guards.n_skipped(), seconds: started.elapsed().as_secs_f64() })
}

/// The error that ends a run at this step (counted from 1): what happened, and, for a loss or gradient that is not
/// finite, what to do.
fn stopped(step: u64, error: anyhow::Error) -> anyhow::Error {
    match error.is::<NotFinite>() {
        true => anyhow::anyhow!(
            "step {step}: {error:#}; the run stops here; give lower rates and run again, which goes on from the last checkpoint, or begins anew where there is none; where that fails at once, remove the last folder of checkpoints/, to go on from the one before"
        ),
        false => error.context(format!("step {step}")),
    }
}

/// The line of one step for people: name and value, four digits.
fn readable(values: &[(&str, f64)]) -> String {
    values.iter().map(|(name, value)| format!("{name} {value:.4}")).collect::<Vec<_>>().join("  ")
}
