//! What becomes of a run after an update that was no number: it skips a few, then goes back to a checkpoint at lower rates,
//! then stops.

use super::{Checkpoint, Run, Trainee, stopped};
use crate::config::GuardSettings;
use crate::output;
use anyhow::Result;
use serde_json::{Value, json};

/// How often a run was in trouble.
pub(super) struct Guards<'a> {
    settings: &'a GuardSettings,
    /// Updates skipped so far, and how many of them in a row.
    n_skipped: u64,
    skipped_in_a_row: u64,
    /// Times that the run went back to a checkpoint, and where to, the last time.
    n_returns: u64,
    returned_to: Option<u64>,
}

/// What to do next.
pub(super) enum Recovery {
    /// On with the next update.
    Skip,
    /// Back to this step.
    Return(u64),
}

impl<'a> Guards<'a> {
    pub fn new(settings: &'a GuardSettings) -> Self {
        Guards { settings, n_skipped: 0, skipped_in_a_row: 0, n_returns: 0, returned_to: None }
    }

    /// After a loss or gradient that is no number, in the update after `step`: skips it, goes back to the last checkpoint,
    /// or gives up.
    pub fn recover(
        &mut self,
        run: &Run,
        trainee: &mut impl Trainee,
        step: u64,
        error: anyhow::Error,
    ) -> Result<Recovery> {
        // A first update that fails is no bad luck: the teacher or the settings are at fault.
        if step > 0 && self.skipped_in_a_row < self.settings.skip {
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
            Some(checkpoint) if self.n_returns < self.settings.returns => {
                let step = checkpoint.step;
                trainee.restore(&checkpoint)?;
                run.forget_after(step)?;
                run.rewind_log(step)?;
                self.n_returns += 1;
                (self.skipped_in_a_row, self.returned_to) = (0, Some(step));
                trainee.slow_down(self.factor());
                output::warn(&format!("{error:#}; going on from step {step} at {} of the rates", self.factor()));
                Ok(Recovery::Return(step))
            }
            _ => Err(stopped(step + 1, error)),
        }
    }

    /// After an update that was made.
    pub fn went_well(&mut self) {
        self.skipped_in_a_row = 0;
    }

    /// Whether the last update was skipped.
    pub fn in_trouble(&self) -> bool {
        self.skipped_in_a_row > 0
    }

    pub fn n_skipped(&self) -> u64 {
        self.n_skipped
    }

    /// What the rates are multiplied by: each return halves them.
    fn factor(&self) -> f64 {
        0.5f64.powi(self.n_returns as i32)
    }

    pub fn save(&self, state: &mut Value) {
        state["n_skipped"] = json!(self.n_skipped);
        state["skipped_in_a_row"] = json!(self.skipped_in_a_row);
        state["n_returns"] = json!(self.n_returns);
    }

    /// Takes back what was saved; returns the factor of the rates.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> f64 {
        // Teachers of earlier versions knew no guards.
        let saved = |name: &str| checkpoint.state[name].as_u64().unwrap_or(0);
        self.n_skipped = saved("n_skipped");
        self.skipped_in_a_row = saved("skipped_in_a_row");
        self.n_returns = saved("n_returns");
        self.factor()
    }
}
