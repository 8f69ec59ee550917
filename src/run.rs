//! What a training run leaves on the disk, and how it is interrupted and taken up again. A checkpoint is written aside,
//! flushed and renamed, and the one before it stays until the new one stands: `kill -9` and a full disk cost at most
//! the steps since the last one.

use crate::config;
use crate::optim::{self, NotFinite};
use anyhow::{Context, Result, ensure};
use dmd_models::Weights;
use dmd_models::folder::replace_dir;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The folder of one run.
pub struct Run {
    folder: PathBuf,
}

/// A checkpoint as it was read.
pub struct Checkpoint {
    /// Updates made so far.
    pub step: u64,
    /// `state.json`.
    pub state: Value,
    folder: PathBuf,
}

/// Checkpoints kept; more than one so that a bad disk does not take the only one.
const KEPT: usize = 2;

impl Run {
    /// Opens or begins the run in `folder`. A folder that holds a run with the same settings is taken up again; one with
    /// other settings, or with something else in it, is refused unless `force`, which removes the old run.
    pub fn open<T: Serialize + DeserializeOwned + Default>(folder: &Path, settings: &T, force: bool) -> Result<Self> {
        let config_path = folder.join("config.toml");
        if force {
            for old in ["config.toml", "metrics.jsonl"] {
                _ = fs::remove_file(folder.join(old));
            }
            for old in ["checkpoints", "samples"] {
                _ = fs::remove_dir_all(folder.join(old));
            }
        }
        if config_path.exists() {
            let before: T =
                config::read(&config_path).context("the run's own settings cannot be read; --force begins anew")?;
            let differences = config::differences(settings, &before)?;
            ensure!(
                differences.is_empty(),
                "{}: holds a run with other settings ({}); give the same settings to continue it, another --out, or --force to begin anew",
                folder.display(),
                differences.join("; ")
            );
        } else {
            let occupied = folder.exists() && (!folder.is_dir() || fs::read_dir(folder)?.next().is_some());
            ensure!(
                !occupied || force,
                "{}: exists and is not a run of this kind; give another --out, or --force to write into it",
                folder.display()
            );
            let create = || -> Result<()> {
                fs::create_dir_all(folder)?;
                Ok(dmd_models::write_whole(&config_path, config::to_toml(settings)?.as_bytes())?)
            };
            create().with_context(|| format!("{}: cannot be written", folder.display()))?;
        }
        for part in ["checkpoints", "samples"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| part.display().to_string())?;
        }
        Ok(Run { folder: folder.to_path_buf() })
    }

    /// A path inside the run.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.join(name)
    }

    /// The newest checkpoint that can be read whole.
    pub fn last_checkpoint(&self) -> Result<Option<Checkpoint>> {
        Self::last_checkpoint_in(&self.folder)
    }

    /// The same of a run that is only read.
    pub fn last_checkpoint_in(folder: &Path) -> Result<Option<Checkpoint>> {
        newest(checkpoints(&folder.join("checkpoints"))?)
    }

    /// The last whole checkpoint before that of `step`.
    pub fn checkpoint_before(&self, step: u64) -> Result<Option<Checkpoint>> {
        let mut earlier = checkpoints(&self.path("checkpoints"))?;
        earlier.retain(|(other, _)| *other < step);
        newest(earlier)
    }

    /// Removes the checkpoints after `step`.
    pub fn forget_after(&self, step: u64) -> Result<()> {
        let later = checkpoints(&self.path("checkpoints"))?.into_iter().filter(|(other, _)| *other > step);
        later
            .into_iter()
            .try_for_each(|(_, folder)| fs::remove_dir_all(&folder).with_context(|| folder.display().to_string()))
    }

    /// Writes `checkpoints/step-N` with one safetensors file per part and `state.json`, then removes old ones.
    pub fn checkpoint(&self, step: u64, parts: &[(impl AsRef<str>, Weights)], state: &Value) -> Result<()> {
        let folder = self.path(format!("checkpoints/step-{step:08}"));
        let aside = self.path(format!("checkpoints/.step-{step:08}.partial"));
        let write = || -> Result<()> {
            _ = fs::remove_dir_all(&aside);
            fs::create_dir_all(&aside)?;
            for (name, weights) in parts {
                weights.save(&aside.join(format!("{}.safetensors", name.as_ref())), &BTreeMap::new())?;
            }
            dmd_models::write_whole(&aside.join("state.json"), state.to_string().as_bytes())?;
            Ok(replace_dir(&aside, &folder)?)
        };
        write().map_err(|error| {
            _ = fs::remove_dir_all(&aside);
            error.context(format!("the checkpoint of step {step} could not be written; the one before it is whole"))
        })?;
        let mut old = checkpoints(&self.path("checkpoints"))?;
        old.truncate(old.len().saturating_sub(KEPT));
        for (_, folder) in old {
            _ = fs::remove_dir_all(folder);
        }
        Ok(())
    }

    /// Appends to metrics.jsonl.
    pub fn log(&self, line: &Value) -> Result<()> {
        let path = self.path("metrics.jsonl");
        let append = || -> std::io::Result<()> {
            writeln!(fs::OpenOptions::new().create(true).append(true).open(&path)?, "{line}")
        };
        append().with_context(|| path.display().to_string())
    }

    /// Drops the lines after `step`, which a resumed run will write again.
    pub fn rewind_log(&self, step: u64) -> Result<()> {
        let path = self.path("metrics.jsonl");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        let early = |line: &&str| {
            let value = serde_json::from_str::<Value>(line);
            value.is_ok_and(|value| value.get("step").and_then(Value::as_u64).is_some_and(|s| s <= step))
        };
        let kept: String = text.lines().filter(early).flat_map(|line| [line, "\n"]).collect();
        Ok(dmd_models::write_whole(&path, kept.as_bytes())?)
    }
}

/// The last of these that is whole.
fn newest(mut folders: Vec<(u64, PathBuf)>) -> Result<Option<Checkpoint>> {
    while let Some((step, folder)) = folders.pop() {
        // A folder under its final name was flushed before it was renamed; a missing state means somebody's hand.
        if let Ok(text) = fs::read_to_string(folder.join("state.json")) {
            let state = serde_json::from_str(&text).with_context(|| folder.join("state.json").display().to_string())?;
            return Ok(Some(Checkpoint { step, state, folder }));
        }
    }
    Ok(None)
}

/// The checkpoints in a folder, oldest first.
fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix("step-").and_then(|s| s.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

impl Checkpoint {
    /// A list of numbers from `state.json`.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let list = self.state.get(name).and_then(Value::as_array);
        let numbers = list.and_then(|list| list.iter().map(Value::as_f64).collect());
        numbers.with_context(|| format!("{}: state.json lacks \"{name}\"", self.folder.display()))
    }

    /// One of its parts, on the CPU.
    pub fn part(&self, name: &str) -> Result<Weights> {
        Ok(Weights::load(&self.folder.join(format!("{name}.safetensors")), &candle_core::Device::Cpu)?)
    }

    /// A counter from `state.json`.
    pub fn count(&self, name: &str) -> Result<u64> {
        self.state
            .get(name)
            .and_then(Value::as_u64)
            .with_context(|| format!("{}: state.json lacks \"{name}\"", self.folder.display()))
    }
}

/// Copies a checkpoint's tensors into variables of the same names and shapes.
pub fn restore_vars(vars: &BTreeMap<String, candle_core::Var>, saved: &Weights) -> Result<()> {
    for (name, var) in vars {
        let tensor = saved.get(name).with_context(|| format!("the checkpoint lacks tensor \"{name}\""))?;
        var.set(&tensor.to_device(var.device())?).with_context(|| format!("the checkpoint's tensor \"{name}\""))?;
    }
    Ok(())
}

/// Variables as weights to save.
pub fn vars_as_weights(vars: &BTreeMap<String, candle_core::Var>) -> Weights {
    let mut weights = Weights::default();
    for (name, var) in vars {
        weights.insert(name.clone(), var.as_detached_tensor());
    }
    weights
}

/// When Ctrl-C, SIGTERM or SIGHUP asked to stop; the loops look at it between steps.
static STOP: OnceLock<Instant> = OnceLock::new();

/// A closed terminal sends SIGHUP twice (the kernel and the shell), and systemd SIGTERM with SIGHUP: within this time
/// two signals are one.
const ONE_SIGNAL: Duration = Duration::from_secs(1);

/// From now on Ctrl-C, SIGTERM or a closed terminal asks loops to save and stop; when asked again a second later or more,
/// the process ends at once. A process that `nohup` started goes on without its terminal.
pub fn stop_on_signals() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let handler = || {
        if STOP.get_or_init(Instant::now).elapsed() > ONE_SIGNAL {
            std::process::exit(1);
        }
    };
    let install = || {
        let unhearing = ignores_hangup();
        ctrlc::set_handler(handler).map_err(|e| e.to_string())?;
        if unhearing {
            ignore_hangup();
        }
        Ok(())
    };
    INSTALLED.get_or_init(install).clone().map_err(anyhow::Error::msg)
}

#[cfg(unix)]
fn ignores_hangup() -> bool {
    // SAFETY: without a new action, sigaction only fills in the old one, for which all zeros is a valid value.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGHUP, std::ptr::null(), &mut now) == 0 && now.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(unix)]
fn ignore_hangup() {
    // SAFETY: ignoring a signal installs no code.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
}

#[cfg(not(unix))]
fn ignores_hangup() -> bool {
    false
}

#[cfg(not(unix))]
fn ignore_hangup() {}

/// Whether somebody asked to stop.
pub fn asked_to_stop() -> bool {
    STOP.get().is_some()
}

/// A loss as a number; one that is not finite is [`NotFinite`].
pub fn finite(name: &'static str, loss: &candle_core::Tensor) -> Result<f64> {
    optim::finite(name, f64::from(loss.to_scalar::<f32>()?))
}

/// The error that ends a run at this step (counted from 1): what happened, and, for a loss or gradient that is not
/// finite, what to do.
pub fn stopped(step: u64, error: anyhow::Error) -> anyhow::Error {
    match error.is::<NotFinite>() {
        true => anyhow::anyhow!(
            "step {step}: {error:#}; the run stops here; lower the rate and run again, which goes on from the last checkpoint if there is one"
        ),
        false => error.context(format!("step {step}")),
    }
}

/// The line of one step for people: name and value, four digits.
pub fn readable(values: &[(&str, f64)]) -> String {
    values.iter().map(|(name, value)| format!("{name} {value:.4}")).collect::<Vec<_>>().join("  ")
}

/// The same for metrics.jsonl.
pub fn as_json(step: u64, elapsed_s: f64, values: &[(&str, f64)]) -> Value {
    let mut line = json!({ "step": step, "elapsed_s": (elapsed_s * 1e3).round() / 1e3 });
    for (name, value) in values {
        line[*name] = json!(value);
    }
    line
}
