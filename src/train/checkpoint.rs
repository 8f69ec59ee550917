//! A checkpoint: a folder with one safetensors file per part and `state.json`, which holds the parts' checksums.

use crate::{optim, output};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};
use dmd_models::Weights;
use dmd_models::folder::replace_dir;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// A checkpoint as it was read, whole.
pub struct Checkpoint {
    /// Updates made so far.
    pub step: u64,
    /// `state.json`.
    pub state: Value,
    folder: PathBuf,
}

/// What a checkpoint holds, by name.
pub type Parts = Vec<(String, Weights)>;

fn part_file(name: &str) -> String {
    format!("{name}.safetensors")
}

/// Writes one into the folder of all, whole or not at all.
pub(super) fn write(checkpoints: &Path, step: u64, parts: &Parts, mut state: Value) -> Result<()> {
    let aside = checkpoints.join(format!(".step-{step:08}.partial"));
    let mut write = || -> Result<()> {
        _ = fs::remove_dir_all(&aside);
        fs::create_dir_all(&aside)?;
        for (name, weights) in parts {
            let path = aside.join(part_file(name));
            weights.save(&path, &BTreeMap::new())?;
            state["parts"][name] = json!(checksum(&path)?);
        }
        dmd_models::write_whole(&aside.join("state.json"), state.to_string().as_bytes())?;
        Ok(replace_dir(&aside, &checkpoints.join(format!("step-{step:08}")))?)
    };
    write().inspect_err(|_| _ = fs::remove_dir_all(&aside))
}

/// Refuses values that are not finite: a checkpoint is what a run goes back to.
pub(super) fn check_finite(parts: &Parts) -> Result<()> {
    for (part, weights) in parts {
        // Zero times a number is zero, unless the number is not finite; and so is the sum.
        let mut sum = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for (_, tensor) in weights.iter().filter(|(_, tensor)| tensor.dtype().is_float()) {
            sum = (tensor.affine(0.0, 0.0)?.sum_all()?.to_dtype(DType::F32)? + sum.to_device(tensor.device())?)?;
        }
        optim::finite("a value", f64::from(sum.to_scalar::<f32>()?))
            .with_context(|| format!("the checkpoint's {part}"))?;
    }
    Ok(())
}

/// Takes the room of a checkpoint on the disk, and gives it back; refused where there is none.
pub(super) fn check_room(checkpoints: &Path, parts: &Parts) -> Result<()> {
    let aside = checkpoints.join(".room.partial");
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
    const NO_ROOM: [ErrorKind; 3] = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge];
    match taken {
        // Where room cannot be taken beforehand, the checkpoint itself will tell.
        Err(error) if NO_ROOM.contains(&error.kind()) => {
            let bytes: u64 = parts.iter().map(|(_, weights)| size(weights)).sum();
            bail!("there is no room for a checkpoint of {:.1} MB: {error}", bytes as f64 / 1e6)
        }
        _ => Ok(()),
    }
}

/// The last of these that is whole; where there are some and none is, an error.
pub(super) fn newest(mut folders: Vec<(u64, PathBuf)>) -> Result<Option<Checkpoint>> {
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
pub(super) fn all(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
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
        Ok(Weights::load(&self.folder.join(part_file(name)), &Device::Cpu)?)
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
pub fn restore_vars(vars: &BTreeMap<String, Var>, saved: &Weights) -> Result<()> {
    for (name, var) in vars {
        let tensor = saved.get(name).with_context(|| format!("the checkpoint lacks tensor \"{name}\""))?;
        var.set(&tensor.to_device(var.device())?).with_context(|| format!("the checkpoint's tensor \"{name}\""))?;
    }
    Ok(())
}

/// Variables as weights to save.
pub fn vars_as_weights(vars: &BTreeMap<String, Var>) -> Weights {
    let mut weights = Weights::default();
    for (name, var) in vars {
        weights.insert(name.clone(), var.as_detached_tensor());
    }
    weights
}
