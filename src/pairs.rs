//! Noise–picture pairs for the regression term (Yin et al. 2024, DMD, section 3.3): what the teacher's deterministic
//! sampler makes of a noise. A folder with `pairs.json` and safetensors shards, each with `noise` and `image` (f32
//! `(n, C, H, W)`, of latents where the network works on them) and, for a teacher with classes, `label` (i64 `(n,)`), for
//! one of text `prompt`, the numbers of prompts in their list. Made once, checked against the run's teacher and prompts.

use crate::config::{self, Difference};
use crate::fingerprint;
use crate::lock::{self, Lock};
use crate::prompts::{Known, Prompts};
use crate::random::{Purpose, Random, picture_noise};
use crate::sample::{Model, Sampler};
use crate::train;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use dmd_models::{Condition, ModelFolder, Weights, write_whole};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// `pairs.json`: whose pairs these are and how they were made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Hash of the teacher's weights, network and schedule.
    pub teacher_sha256: String,
    /// `(C, H, W)` of a picture.
    pub shape: [usize; 3],
    /// Guidance of the sampler; a run's `real_score.guidance_scale` must be the same.
    pub guidance_scale: f64,
    /// Steps of Heun's sampler.
    pub sampler_steps: usize,
    /// Seed of the noise: picture i's is the one that `dmd sample --seed` starts from.
    pub seed: u64,
    /// Pairs in a shard; the last one may hold fewer.
    pub per_shard: usize,
    /// Pairs in all.
    pub n: usize,
    /// Whose prompts, where the teacher is told text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<Known>,
}

/// What makes pairs.
pub struct Maker<'a> {
    /// The teacher.
    pub teacher: &'a ModelFolder,
    /// Its prompts, where it is told text.
    pub prompts: Option<&'a Prompts>,
    /// Pictures per pass.
    pub batch: usize,
    /// Where it runs.
    pub device: &'a Device,
}

/// Makes `manifest.n` pairs in `out`, which no other process may hold, going on where an earlier call stopped, or anew
/// with `force`; returns how many were there already. `step` is told how many are done.
pub fn make(
    maker: &Maker,
    mut manifest: Manifest,
    out: &Path,
    force: bool,
    mut step: impl FnMut(usize),
) -> Result<usize> {
    let Maker { teacher, prompts, batch, device } = *maker;
    let path = out.join(MANIFEST);
    ensure!(
        force || path.exists() || lock::is_free(out)?,
        "{}: exists and holds no pairs; give another --out, or --force to write into it",
        out.display()
    );
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let _lock = Lock::take(out)?;
    if force {
        remove_pairs(out)?;
    }
    if path.exists() {
        let before = read_manifest(out)?;
        if fingerprint::teacher(teacher)?.is(&before.teacher_sha256) {
            manifest.teacher_sha256.clone_from(&before.teacher_sha256);
        }
        let differences = config::differences(&manifest, &before)?;
        let differences: Vec<String> = differences.iter().map(Difference::to_string).collect();
        ensure!(
            differences.is_empty(),
            "{}: holds pairs made otherwise ({}); give the same options to go on, another --out, or --force to begin anew",
            out.display(),
            differences.join("; ")
        );
    } else {
        write_whole(&path, format!("{:#}\n", serde_json::to_value(&manifest)?).as_bytes())?;
    }
    let denoiser = teacher.denoiser(device)?;
    let n_classes = denoiser.n_classes();
    let (denoiser, guidance_scale) = match prompts {
        Some(prompts) => (prompts.guide(denoiser), prompts.guidance_scale),
        None => (denoiser, manifest.guidance_scale),
    };
    // A denoiser alone: pairs are of samples, as networks see them.
    let model = Model::teacher(denoiser, Sampler::Heun, manifest.sampler_steps, guidance_scale);
    let [_, height, width] = manifest.shape;
    model.check_memory(manifest.n.min(manifest.per_shard), [height, width], batch)?;
    let random = Random { seed: manifest.seed, device: Device::Cpu };
    let mut found = 0;
    for (i, first) in (0..manifest.n).step_by(manifest.per_shard).enumerate() {
        let len = manifest.per_shard.min(manifest.n - first);
        let path = shard_path(out, i);
        if path.exists() && read_shard(&path, &manifest, len).is_ok() {
            found += len;
            step(first + len);
            continue;
        }
        let noise = picture_noise(manifest.seed, first as u64, len, manifest.shape, &Device::Cpu)?;
        // Numbers of prompts or of classes, and what they stand for.
        let kinds = prompts.map(Prompts::len).or(n_classes);
        let drawn = match kinds {
            Some(kinds) => random.stream(Purpose::PairLabel, i as u64).below(len, u32::try_from(kinds)?),
            None => Vec::new(),
        };
        let cond = told(&drawn, prompts, &Device::Cpu)?;
        let images = model.make(&noise, &cond, batch, &|_| {})?.pictures;
        let finite = images.iter().all(|value| value.is_finite());
        ensure!(finite, "the teacher makes values that are not finite, among pictures {first} to {}", first + len - 1);
        let mut shard = Weights::default();
        shard.insert("image", Tensor::from_vec(images.into_raw_vec_and_offset().0, noise.dims(), &Device::Cpu)?);
        shard.insert("noise", noise);
        if !drawn.is_empty() {
            let drawn: Vec<i64> = drawn.into_iter().map(i64::from).collect();
            shard.insert(manifest.drawn(), Tensor::from_vec(drawn, len, &Device::Cpu)?);
        }
        shard.save(&path, &BTreeMap::new())?;
        step(first + len);
        if train::asked_to_stop() && first + len < manifest.n {
            bail!("interrupted after {} of {} pairs; run the same command again to go on", first + len, manifest.n);
        }
    }
    Ok(found)
}

/// Pairs in memory.
pub struct Pairs {
    shape: [usize; 3],
    noise: Vec<f32>,
    image: Vec<f32>,
    /// Of each pair the class, or the prompt.
    drawn: Vec<u32>,
}

/// Some of them as tensors.
pub struct PairBatch {
    /// Unit normal, `(B, C, H, W)`.
    pub noise: Tensor,
    /// The teacher's picture of it, of the same shape.
    pub image: Tensor,
    /// Of each way one row per pair.
    pub cond: Condition<Tensor>,
}

impl Pairs {
    /// Reads a folder that `make` wrote, and refuses pairs of another teacher, size, guidance or other prompts before reading
    /// shards.
    pub fn load(folder: &Path, teacher: &ModelFolder, prompts: Option<&Prompts>, guidance_scale: f64) -> Result<Self> {
        let shape = teacher.sample_shape()?;
        let manifest = manifest_for(folder, shape, guidance_scale)?;
        ensure!(
            fingerprint::teacher(teacher)?.is(&manifest.teacher_sha256),
            refusal(folder, "pairs were made by another teacher (its weights or its configuration differ)")
        );
        if let Some((was, is)) = manifest.text.as_ref().zip(prompts.map(|prompts| &prompts.known)) {
            let what = match () {
                () if was.text_sha256 != is.text_sha256 => "by another text encoder or tokenizer",
                () if was.prompts_sha256 != is.prompts_sha256 => "of other prompts (the lines under --prompts differ)",
                () => "away from another negative prompt",
            };
            ensure!(was == is, refusal(folder, format!("pairs were made {what}")));
        }
        let kinds = prompts.map(Prompts::len).or(teacher.n_classes()).unwrap_or(0);
        let mut pairs = Pairs { shape, noise: Vec::new(), image: Vec::new(), drawn: Vec::new() };
        for (i, first) in (0..manifest.n).step_by(manifest.per_shard).enumerate() {
            let path = shard_path(folder, i);
            let shard = read_shard(&path, &manifest, manifest.per_shard.min(manifest.n - first))?;
            let drawn: Vec<i64> = shard.get(manifest.drawn()).map_or(Ok(Vec::new()), |drawn| drawn.to_vec1())?;
            ensure!(
                drawn.is_empty() == (kinds == 0) && drawn.iter().all(|drawn| (0..kinds as i64).contains(drawn)),
                refusal(
                    &path,
                    match prompts {
                        Some(_) => format!("prompts are not those of the {kinds}"),
                        None => format!("labels are not those of the teacher's {kinds} classes"),
                    }
                )
            );
            let values = |name: &str| -> Result<Vec<f32>> {
                Ok(shard.get(name).context("checked when it was read")?.flatten_all()?.to_vec1()?)
            };
            pairs.noise.extend(values("noise")?);
            pairs.image.extend(values("image")?);
            pairs.drawn.extend(drawn.into_iter().map(|drawn| drawn as u32));
        }
        Ok(pairs)
    }

    /// By what they are known again, wherever they lie.
    pub fn sha256(&self) -> String {
        let drawn: Vec<i64> = self.drawn.iter().map(|drawn| i64::from(*drawn)).collect();
        fingerprint::numbers(&[&self.noise, &self.image], &drawn)
    }

    /// How many there are.
    #[allow(clippy::len_without_is_empty)] // a manifest has at least one
    pub fn len(&self) -> usize {
        self.image.len() / self.shape.iter().product::<usize>()
    }

    /// The pairs of these numbers, made of these prompts.
    pub fn batch(&self, picks: &[u32], prompts: Option<&Prompts>, device: &Device) -> Result<PairBatch> {
        let size: usize = self.shape.iter().product();
        let [c, h, w] = self.shape;
        let rows = |all: &[f32]| -> Result<Tensor> {
            let rows = picks.iter().flat_map(|&i| &all[i as usize * size..(i as usize + 1) * size]);
            Ok(Tensor::from_vec(rows.copied().collect(), (picks.len(), c, h, w), device)?)
        };
        let drawn: Vec<u32> = picks.iter().filter_map(|&i| self.drawn.get(i as usize).copied()).collect();
        let cond = told(&drawn, prompts, device)?;
        Ok(PairBatch { noise: rows(&self.noise)?, image: rows(&self.image)?, cond })
    }
}

impl Manifest {
    /// What the numbers in a shard are called that say what the teacher was told.
    fn drawn(&self) -> &'static str {
        if self.text.is_some() { "prompt" } else { "label" }
    }
}

/// What a network is told by these numbers, of prompts or of classes.
fn told(drawn: &[u32], prompts: Option<&Prompts>, device: &Device) -> Result<Condition<Tensor>> {
    match prompts {
        Some(prompts) => prompts.told(drawn, device),
        None => Ok(Condition::of_classes(drawn.iter().copied(), device)?),
    }
}

const MANIFEST: &str = "pairs.json";

fn remove_pairs(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == MANIFEST || name.starts_with("shard-") {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{}: no pairs (make them with `dmd pairs TEACHER --out PAIRS`)", path.display()))?;
    let manifest: Manifest = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    ensure!(manifest.n > 0 && manifest.per_shard > 0, "{}: holds no pairs", path.display());
    Ok(manifest)
}

/// The manifest of pairs, which must be of this size, `(C, H, W)`, and guidance. Reads nothing else.
pub fn manifest_for(folder: &Path, shape: [usize; 3], guidance_scale: f64) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    ensure!(
        manifest.shape == shape,
        refusal(folder, format!("pictures are {:?}, the teacher's {shape:?}", manifest.shape))
    );
    ensure!(
        manifest.guidance_scale == guidance_scale,
        refusal(
            folder,
            format!(
                "pairs were made with guidance {}, real_score.guidance_scale is {guidance_scale}",
                manifest.guidance_scale
            )
        )
    );
    Ok(manifest)
}

fn refusal(path: &Path, what: impl Display) -> anyhow::Error {
    anyhow::anyhow!("{}: {what}; make pairs for this run with `dmd pairs`", path.display())
}

fn shard_path(folder: &Path, i: usize) -> PathBuf {
    folder.join(format!("shard-{i:05}.safetensors"))
}

/// One shard with everything in it that the manifest promises.
fn read_shard(path: &Path, manifest: &Manifest, len: usize) -> Result<Weights> {
    let unfinished = || format!("{}: missing or damaged; run `dmd pairs` again to make it anew", path.display());
    let shard = Weights::load(path, &Device::Cpu).with_context(unfinished)?;
    let [c, h, w] = manifest.shape;
    for (name, shape, dtype) in [("noise", vec![len, c, h, w], DType::F32), ("image", vec![len, c, h, w], DType::F32)] {
        let tensor = shard.get(name).with_context(unfinished)?;
        ensure!(
            tensor.dims() == shape && tensor.dtype() == dtype,
            "{}: tensor \"{name}\" is {:?} {:?}, expected {shape:?} {dtype:?}",
            path.display(),
            tensor.dims(),
            tensor.dtype()
        );
        ensure!(
            tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.is_finite()),
            "{}: tensor \"{name}\" holds values that are not finite; run `dmd pairs` again to make it anew",
            path.display()
        );
    }
    let name = manifest.drawn();
    if let Some(drawn) = shard.get(name) {
        ensure!(
            drawn.dims() == [len] && drawn.dtype() == DType::I64,
            "{}: tensor \"{name}\" is {:?} {:?}, expected [{len}] I64",
            path.display(),
            drawn.dims(),
            drawn.dtype()
        );
    }
    Ok(shard)
}
