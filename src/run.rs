//! What a training run leaves on the disk, and how it is interrupted and taken up again. A checkpoint is written aside,
//! flushed and renamed, and the one before it stays beside it: `kill -9` and a full disk cost at most the steps since the
//! last one, and damage to that one those since the one before.

use crate::config::{self, Difference};
use crate::lock::{self, Lock};
use crate::optim::{self, NotFinite};
use crate::output;
use anyhow::{Context, Result, anyhow, bail, ensure};
use dmd_models::Weights;
use dmd_models::folder::replace_dir;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

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

/// A checkpoint as it was read, whole.
pub struct Checkpoint {
    /// Updates made so far.
    pub step: u64,
    /// `state.json`.
    pub state: Value,
    folder: PathBuf,
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
            for old in ["checkpoints", "samples"] {
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
        checkpoints(&folder.join("checkpoints")).is_ok_and(|found| !found.is_empty())
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

    /// Writes `checkpoints/step-N` with one safetensors file per part and `state.json`, then removes all but the one
    /// before.
    pub fn checkpoint(&self, step: u64, parts: &Parts, state: &Value) -> Result<()> {
        let folder = self.path(format!("checkpoints/step-{step:08}"));
        let aside = self.path(format!("checkpoints/.step-{step:08}.partial"));
        let write = || -> Result<()> {
            _ = fs::remove_dir_all(&aside);
            fs::create_dir_all(&aside)?;
            let mut state = state.clone();
            for (name, weights) in parts {
                let path = aside.join(part_file(name));
                weights.save(&path, &BTreeMap::new())?;
                state["parts"][name] = json!(checksum(&path)?);
            }
            state["elapsed_s"] = json!(self.elapsed_s());
            dmd_models::write_whole(&aside.join("state.json"), state.to_string().as_bytes())?;
            Ok(replace_dir(&aside, &folder)?)
        };
        let mut others = checkpoints(&self.path("checkpoints"))?;
        others.retain(|(other, _)| *other != step);
        let (mut earlier, later): (Vec<_>, Vec<_>) = others.into_iter().partition(|(other, _)| *other < step);
        write().map_err(|error| {
            _ = fs::remove_dir_all(&aside);
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

    /// Refuses to begin a training whose checkpoint has no room on the disk: takes the room, and gives it back.
    pub fn check_room(&self, parts: &Parts) -> Result<()> {
        let aside = self.path("checkpoints/.room.partial");
        let size = |weights: &Weights| -> u64 {
            weights.iter().map(|(_, tensor)| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64).sum()
        };
        let take = || -> std::io::Result<()> {
            _ = fs::remove_dir_all(&aside);
            fs::create_dir_all(&aside)?;
            parts
                .iter()
                .try_for_each(|(name, weights)| take_room(&File::create(aside.join(part_file(name)))?, size(weights)))
        };
        let taken = take();
        _ = fs::remove_dir_all(&aside);
        match taken {
            // Where room cannot be taken beforehand, the checkpoint itself will tell.
            Err(error)
                if [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge]
                    .contains(&error.kind()) =>
            {
                let bytes: u64 = parts.iter().map(|(_, weights)| size(weights)).sum();
                bail!(
                    "{}: has no room for a checkpoint of {:.1} MB: {error}; make room, or give another --out",
                    self.folder.display(),
                    bytes as f64 / 1e6
                )
            }
            _ => Ok(()),
        }
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

/// What a checkpoint holds, by name.
pub type Parts = Vec<(String, Weights)>;

fn part_file(name: &str) -> String {
    format!("{name}.safetensors")
}

/// The last of these that is whole; where there are some and none is, an error.
fn newest(mut folders: Vec<(u64, PathBuf)>) -> Result<Option<Checkpoint>> {
    let mut damage = None;
    while let Some((step, folder)) = folders.pop() {
        match Checkpoint::read(step, folder) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => {
                if folders.last().is_some() {
                    output::warn(&format!("{error:#}: going back to the checkpoint before it"));
                }
                damage = Some(error);
            }
        }
    }
    damage.map_or(Ok(None), |error| Err(error.context("no checkpoint is whole; --force begins anew")))
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

/// Has the file system set bytes aside for a file, by its own measure: quotas and limits count.
#[cfg(target_os = "linux")]
fn take_room(file: &File, bytes: u64) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is the file's, which is open.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Elsewhere the bytes are written.
#[cfg(not(target_os = "linux"))]
fn take_room(mut file: &File, bytes: u64) -> std::io::Result<()> {
    std::io::copy(&mut std::io::repeat(0).take(bytes), &mut file).map(drop)
}

/// CRC-32 of a file.
fn checksum(path: &Path) -> std::io::Result<u32> {
    let (mut file, mut hash) = (File::open(path)?, crc32fast::Hasher::new());
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read(&mut bytes)? {
            0 => return Ok(hash.finalize()),
            n => hash.update(&bytes[..n]),
        }
    }
}

impl Checkpoint {
    /// Reads its state, and holds its parts to the checksums there. Earlier versions wrote none.
    fn read(step: u64, folder: PathBuf) -> Result<Self> {
        let path = folder.join("state.json");
        let read = || -> Result<Value> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        let state = read().with_context(|| format!("{}: is damaged", path.display()))?;
        for (name, written) in state["parts"].as_object().into_iter().flatten() {
            let path = folder.join(part_file(name));
            let found = checksum(&path).with_context(|| format!("{}: is damaged", path.display()))?;
            ensure!(Some(found.into()) == written.as_u64(), "{}: is damaged (its checksum differs)", path.display());
        }
        Ok(Checkpoint { step, state, folder })
    }

    /// A list of numbers from `state.json`.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let list = self.state.get(name).and_then(Value::as_array);
        let numbers = list.and_then(|list| list.iter().map(Value::as_f64).collect());
        numbers.with_context(|| format!("{}: state.json lacks \"{name}\"", self.folder.display()))
    }

    /// One of its parts, on the CPU.
    pub fn part(&self, name: &str) -> Result<Weights> {
        Ok(Weights::load(&self.folder.join(part_file(name)), &candle_core::Device::Cpu)?)
    }

    /// A counter from `state.json`.
    pub fn count(&self, name: &str) -> Result<u64> {
        self.state
            .get(name)
            .and_then(Value::as_u64)
            .with_context(|| format!("{}: state.json lacks \"{name}\"", self.folder.display()))
    }

    /// What the run began with, by what it was known then; earlier versions did not write down everything.
    pub fn known(&self, name: &str) -> Option<&str> {
        self.state.get(name).and_then(Value::as_str)
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
            "step {step}: {error:#}; the run stops here; give lower rates and run again, which goes on from the last checkpoint, or begins anew where there is none; where that fails at once, remove the last folder of checkpoints/, to go on from the one before"
        ),
        false => error.context(format!("step {step}")),
    }
}

/// The line of one step for people: name and value, four digits.
pub fn readable(values: &[(&str, f64)]) -> String {
    values.iter().map(|(name, value)| format!("{name} {value:.4}")).collect::<Vec<_>>().join("  ")
}
