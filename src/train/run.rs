//! What a training run leaves on the disk, and how it is taken up again. A checkpoint is written aside,
//! flushed and renamed, and the one before it stays beside it: `kill -9` and a full disk cost at most the steps since the
//! last one, and damage to that one those since the one before.

use super::checkpoint::{self, Checkpoint, Parts};
use crate::config::{self, Difference};
use crate::lock::{self, Lock};
use crate::output;
use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Settings that a run is begun with, and what of them may be other when it is taken up again.
pub trait Settings: Serialize + DeserializeOwned + Default {
    /// What changes no weight: how often something is written, and paths, whose content is compared where it matters.
    const OF_NO_WEIGHT: &'static [&'static str];
    /// What may be changed on the way, such as rates: a change is said, and written into `changes.jsonl`.
    const ON_THE_WAY: &'static [&'static str];
}

/// The folder of one run, which is this process's.
pub struct Run {
    folder: PathBuf,
    /// The settings as TOML, and how they differ from those that the run was last given.
    settings: String,
    changes: Vec<Difference>,
    /// Seconds of training before this process, and since when it trains.
    seconds_before: f64,
    since: Instant,
    _lock: Lock,
}

/// Checkpoints kept; more than one so that damage to the last does not take the only one.
const KEPT: usize = 2;

impl Run {
    /// Opens or begins the run in `folder`, which no other process may hold. A folder that holds a run with the same
    /// settings, but for those that may change, is taken up again; one with other settings, or with something else in
    /// it, is refused unless `force`, which removes the old run.
    pub fn open<T: Settings>(folder: &Path, settings: &T, force: bool) -> Result<Self> {
        let config_path = folder.join("config.toml");
        ensure!(
            force || config_path.exists() || lock::is_free(folder)?,
            "{}: exists and is not a run of this kind; give another --out, or --force to write into it",
            folder.display()
        );
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot be written", folder.display()))?;
        let lock = Lock::take(folder)?;
        if force {
            for old in ["config.toml", "metrics.jsonl", "changes.jsonl"] {
                _ = fs::remove_file(folder.join(old));
            }
            for old in ["checkpoints", "samples", "text", "latents"] {
                _ = fs::remove_dir_all(folder.join(old));
            }
        }
        let mut run = Run {
            folder: folder.to_path_buf(),
            settings: config::to_toml(settings)?,
            changes: Vec::new(),
            seconds_before: 0.0,
            since: Instant::now(),
            _lock: lock,
        };
        if config_path.exists() {
            let before: T = config::read(&config_path)
                .map_err(|error| anyhow!("{error:#}: the run's own settings; --force begins anew"))?;
            run.changes = config::differences(settings, &before)?;
            let fixed = |change: &&Difference| {
                !T::OF_NO_WEIGHT.contains(&&*change.name) && !T::ON_THE_WAY.contains(&&*change.name)
            };
            let refused: Vec<String> = run.changes.iter().filter(fixed).map(Difference::to_string).collect();
            ensure!(
                refused.is_empty(),
                "{}: holds a run with other settings ({}); give the same settings to continue it (other {} may be given on the way), another --out, or --force to begin anew",
                folder.display(),
                refused.join("; "),
                T::ON_THE_WAY.join(", ")
            );
            run.changes.retain(|change| !T::OF_NO_WEIGHT.contains(&&*change.name));
        } else {
            run.write_settings()?;
        }
        for part in ["checkpoints", "samples"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| part.display().to_string())?;
        }
        Ok(run)
    }

    fn write_settings(&self) -> Result<()> {
        let path = self.path("config.toml");
        Ok(dmd_models::write_whole(&path, self.settings.as_bytes())?)
    }

    /// Whether the run in a folder has something to go on from.
    pub fn has_begun(folder: &Path) -> bool {
        checkpoint::all(&folder.join("checkpoints")).is_ok_and(|found| !found.is_empty())
    }

    /// After everything was found fit to go on from this checkpoint, or to begin where there is none: takes back what was
    /// logged after it, and records and says what is other from here on.
    pub fn go_on(&mut self, checkpoint: Option<&Checkpoint>, n_steps: u64) -> Result<u64> {
        let step = checkpoint.map_or(0, |checkpoint| checkpoint.step);
        ensure!(
            step <= n_steps,
            "{}: is at step {step}, beyond steps ({n_steps}); give {step} or more to go on",
            self.folder.display()
        );
        let logged = self.rewind_log(step)?;
        let saved = checkpoint.and_then(|checkpoint| checkpoint.state.get("elapsed_s")?.as_f64());
        self.seconds_before = logged.max(saved.unwrap_or(0.0));
        self.since = Instant::now();
        if checkpoint.is_some() {
            output::say(&format!("continuing from step {step}"));
            for Difference { name, now, before } in &self.changes {
                output::say(&format!("from here on {name} is {now}, was {before}"));
                self.append("changes.jsonl", &json!({ "step": step, "setting": name, "is": now, "was": before }))?;
            }
        }
        self.write_settings()?;
        Ok(step)
    }

    /// A path inside the run.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.join(name)
    }

    /// Seconds of training, those before an interruption with them.
    pub fn elapsed_s(&self) -> f64 {
        self.seconds_before + self.since.elapsed().as_secs_f64()
    }

    /// The newest checkpoint that can be read whole.
    pub fn last_checkpoint(&self) -> Result<Option<Checkpoint>> {
        Self::last_checkpoint_in(&self.folder)
    }

    /// The same of a run that is only read.
    pub fn last_checkpoint_in(folder: &Path) -> Result<Option<Checkpoint>> {
        checkpoint::newest(checkpoint::all(&folder.join("checkpoints"))?)
    }

    /// The last whole checkpoint before that of `step`.
    pub fn checkpoint_before(&self, step: u64) -> Result<Option<Checkpoint>> {
        let mut earlier = checkpoint::all(&self.path("checkpoints"))?;
        earlier.retain(|(other, _)| *other < step);
        checkpoint::newest(earlier)
    }

    /// Removes the checkpoints after `step`.
    pub fn forget_after(&self, step: u64) -> Result<()> {
        let later = checkpoint::all(&self.path("checkpoints"))?.into_iter().filter(|(other, _)| *other > step);
        later
            .into_iter()
            .try_for_each(|(_, folder)| fs::remove_dir_all(&folder).with_context(|| folder.display().to_string()))
    }

    /// Writes `checkpoints/step-N`, then removes all others but the one before.
    pub fn checkpoint(&self, step: u64, parts: &Parts, state: &Value) -> Result<()> {
        let folder = self.path("checkpoints");
        let mut others = checkpoint::all(&folder)?;
        others.retain(|(other, _)| *other != step);
        let (mut earlier, later): (Vec<_>, Vec<_>) = others.into_iter().partition(|(other, _)| *other < step);
        let mut state = state.clone();
        state["elapsed_s"] = json!(self.elapsed_s());
        checkpoint::write(&folder, step, parts, state).map_err(|error| {
            let left = match earlier.last() {
                Some((earlier, _)) => format!("that of step {earlier} is whole"),
                None => "there is none before it".into(),
            };
            error.context(format!("the checkpoint of step {step} could not be written; {left}"))
        })?;
        // Later ones were damaged, or the run would have gone on from there.
        earlier.truncate((earlier.len() + 1).saturating_sub(KEPT));
        for (_, folder) in earlier.into_iter().chain(later) {
            _ = fs::remove_dir_all(folder);
        }
        Ok(())
    }

    /// Refuses to begin a training whose checkpoint has no room on the disk.
    pub fn check_room(&self, parts: &Parts) -> Result<()> {
        checkpoint::check_room(&self.path("checkpoints"), parts)
            .with_context(|| format!("{}: make room, or give another --out", self.folder.display()))
    }

    /// Where the grid of a step is drawn.
    pub fn sample_path(&self, step: u64) -> PathBuf {
        self.path(format!("samples/step-{step:08}.png"))
    }

    /// Appends to metrics.jsonl.
    pub fn log(&self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut line = json!({ "step": step, "elapsed_s": (self.elapsed_s() * 1e3).round() / 1e3 });
        for (name, value) in values {
            line[*name] = json!(value);
        }
        self.append("metrics.jsonl", &line)
    }

    fn append(&self, name: &str, line: &Value) -> Result<()> {
        let path = self.path(name);
        let append =
            || fs::OpenOptions::new().create(true).append(true).open(&path)?.write_all(format!("{line}\n").as_bytes());
        append().with_context(|| path.display().to_string())
    }

    /// Drops the lines after `step`, which will be written again; returns the seconds of the last that stays.
    pub fn rewind_log(&self, step: u64) -> Result<f64> {
        let path = self.path("metrics.jsonl");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(0.0) };
        let (mut kept, mut seconds) = (String::new(), 0.0);
        for line in text.lines() {
            let value = serde_json::from_str(line).unwrap_or(Value::Null);
            if value["step"].as_u64().is_some_and(|of| of <= step) {
                kept += line;
                kept.push('\n');
                seconds = value["elapsed_s"].as_f64().unwrap_or(seconds);
            }
        }
        dmd_models::write_whole(&path, kept.as_bytes())?;
        Ok(seconds)
    }
}
