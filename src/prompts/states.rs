//! What a network is told of each prompt of a list: states of the text encoders, made once and kept in the run's folder, or
//! made as they are asked for where they would take too much of a disk.

use crate::config::{Config, RealScoreSettings};
use crate::fingerprint;
use crate::output::{self, say, warn};
use crate::random::{Purpose, Random};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use dmd_models::encoders::TextEncoders;
use dmd_models::{Autoencoder, Condition, Denoiser, ModelFolder, Way, Weights, read_row, write_whole};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Prompts to draw from, with what reads them.
pub struct Prompts {
    /// In their order; each has the same chance.
    pub texts: Vec<String>,
    /// One row of each way: what stands for the negative prompt, or for nothing.
    pub unsaid: Condition<Tensor>,
    /// The scale that is left for classifier-free guidance: 1, none, for a network that is told the scale.
    pub guidance_scale: f64,
    /// What they are known again by, with what reads them.
    pub known: Known,
    states: States,
}

/// By what prompts are known again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// Hash of the text encoders and their tokenizers.
    pub text_sha256: String,
    /// Hash of the prompts.
    pub prompts_sha256: String,
    /// What is guided away from; empty for nothing.
    pub negative: String,
}

enum States {
    /// Made as they are asked for.
    Made(TextEncoders),
    /// In a folder of shards.
    Kept(PathBuf),
}

/// `states.json`: whose states a folder holds.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// Hash of the text encoders and their tokenizers.
    text_sha256: String,
    /// Hash of the prompts.
    prompts_sha256: String,
    /// Prompts in all.
    n: usize,
    /// Prompts in a shard; the last one may hold fewer.
    per_shard: usize,
}

impl Prompts {
    /// The prompts of these settings for a model, on this device; none where the model is told no text. Else as
    /// [`Prompts::new`].
    pub fn for_run(model: &ModelFolder, config: &Config, device: &Device) -> Result<Option<Self>> {
        // Told here whether it can be read, and read again whenever somebody looks.
        let factor = model.decoder(&Device::Cpu)?.as_ref().map_or(1, Autoencoder::factor);
        let Some(encoders) = model.text(device, factor)? else { return Ok(None) };
        let texts = super::read(Path::new(&config.prompts))?;
        let RealScoreSettings { negative, guidance_scale } = &config.real_score;
        Self::new(texts, encoders, fingerprint::text(model)?, negative, *guidance_scale).map(Some)
    }

    /// Prompts with this guidance, away from `negative` where it is not empty; `text_sha256` is what the encoders are known
    /// by. What is cut of prompts that are too long is said.
    pub fn new(
        texts: Vec<String>,
        mut encoders: TextEncoders,
        text_sha256: String,
        negative: &str,
        guidance_scale: f64,
    ) -> Result<Self> {
        let guidance_scale = encoders.guide(guidance_scale);
        ensure!(
            negative.is_empty() || guidance_scale != 1.0,
            "the negative prompt is {negative:?}, and this teacher imitates guidance: it is guided away from nothing"
        );
        let unsaid = if negative.is_empty() { encoders.unsaid()? } else { encoders.encode(&[negative])? };
        let all: Vec<&str> = texts.iter().map(String::as_str).chain([negative]).collect();
        let cut = encoders.cut(&all)?;
        if let Some((i, left_out)) = cut.first() {
            warn(&format!(
                "{} of {} prompts have more than the {} tokens that the text encoder reads; of \"{}\" is left out: \"{left_out}\"",
                cut.len(),
                texts.len(),
                encoders.room(),
                all[*i]
            ));
        }
        let known = Known { text_sha256, prompts_sha256: fingerprint::prompts(&texts), negative: negative.into() };
        Ok(Prompts { texts, unsaid, guidance_scale, known, states: States::Made(encoders) })
    }

    /// How many there are.
    #[allow(clippy::len_without_is_empty)] // a file of prompts has at least one
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Makes all states and keeps them in `folder`, going on where an earlier call stopped, and lets the encoders go; leaves
    /// it where they would take more than `most` bytes. Both are said.
    pub fn keep(&mut self, folder: &Path, most: u64) -> Result<()> {
        let States::Made(encoders) = &self.states else { return Ok(()) };
        let values: usize = self.unsaid.iter().map(|(_, row)| row.elem_count()).sum();
        let bytes = (values * size_of::<f32>()) as u64 * self.len() as u64;
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        if bytes > most {
            say(&format!(
                "the text states of {} prompts would take {:.1} GB, more than the {:.1} that are kept: they are made as they are needed, and the text encoder stays in memory",
                self.len(),
                gigabytes(bytes),
                gigabytes(most)
            ));
            return Ok(());
        }
        let manifest = Manifest {
            text_sha256: self.known.text_sha256.clone(),
            prompts_sha256: self.known.prompts_sha256.clone(),
            n: self.len(),
            per_shard: PER_SHARD,
        };
        manifest.claim(folder)?;
        let bar = output::progress(self.len() as u64, 0)?;
        let mut made = 0;
        for (i, texts) in self.texts.chunks(PER_SHARD).enumerate() {
            let path = shard_path(folder, i);
            let whole = |(way, row): (Way, &Tensor)| {
                let shape = [&[texts.len()], &row.dims()[1..]].concat();
                read_row(&path, name(way), 0, &shape, &Device::Cpu).is_ok()
            };
            if !self.unsaid.iter().all(whole) {
                shard(encoders, texts)?.save(&path, &BTreeMap::new())?;
                made += texts.len();
            }
            bar.inc(texts.len() as u64);
        }
        bar.finish_and_clear();
        say(&format!(
            "text states of {} prompts ({made} made now) in {}: {:.3} GB",
            self.len(),
            folder.display(),
            gigabytes(bytes)
        ));
        self.states = States::Kept(folder.into());
        Ok(())
    }

    /// What a network is told of the prompts of these numbers, a row of each way for each, on this device.
    pub fn told(&self, picks: &[u32], device: &Device) -> Result<Condition<Tensor>> {
        let rows: Vec<Condition<Tensor>> = match &self.states {
            States::Made(encoders) => {
                let texts: Vec<&str> = picks.iter().map(|&i| self.texts[i as usize].as_str()).collect();
                texts.chunks(AT_ONCE).map(|texts| Ok(encoders.encode(texts)?)).collect::<Result<_>>()?
            }
            States::Kept(folder) => picks.iter().map(|&i| self.row(folder, i as usize)).collect::<Result<_>>()?,
        };
        Ok(Condition::cat(&rows)?.try_map(|rows| rows.to_device(device))?)
    }

    /// The same of `n` prompts drawn with equal chances.
    pub fn draw(&self, random: &Random, purpose: Purpose, step: u64, n: usize) -> Result<Condition<Tensor>> {
        self.told(&random.stream(purpose, step).below(n, u32::try_from(self.len())?), &random.device)
    }

    /// A network that these prompts guide.
    pub fn guide(&self, denoiser: Denoiser) -> Denoiser {
        Denoiser { unconditional: Some(self.unsaid.clone()), ..denoiser }
    }

    fn row(&self, folder: &Path, i: usize) -> Result<Condition<Tensor>> {
        let (path, first) = (shard_path(folder, i / PER_SHARD), i / PER_SHARD * PER_SHARD);
        let len = PER_SHARD.min(self.len() - first);
        let ways = self.unsaid.iter().map(|(way, row)| {
            let shape = [&[len], &row.dims()[1..]].concat();
            Ok((way, read_row(&path, name(way), i - first, &shape, &Device::Cpu)?))
        });
        ways.collect()
    }
}

/// Prompts in a shard: 60 MB for Stable Diffusion 1.5.
const PER_SHARD: usize = 256;
/// Prompts through the encoders at a time.
const AT_ONCE: usize = 16;

impl Manifest {
    /// Writes it into a folder that holds none; one that holds another's is refused.
    fn claim(&self, folder: &Path) -> Result<()> {
        let path = folder.join("states.json");
        if !path.exists() {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            return Ok(write_whole(&path, format!("{:#}\n", serde_json::to_value(self)?).as_bytes())?);
        }
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let found: Manifest = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        let of = match () {
            () if found.text_sha256 != self.text_sha256 => "another text encoder or tokenizer",
            () if found.prompts_sha256 != self.prompts_sha256 => "other prompts",
            () => "another version of this program",
        };
        ensure!(
            found == *self,
            "{}: holds the text states of {of}; remove it, or give --force, which begins anew",
            folder.display()
        );
        Ok(())
    }
}

/// The states of a shard's prompts, on the CPU; refused where one is not finite.
fn shard(encoders: &TextEncoders, texts: &[String]) -> Result<Weights> {
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let encode = |texts: &[&str]| Ok(encoders.encode(texts)?.try_map(|rows| rows.to_device(&Device::Cpu))?);
    let parts = texts.chunks(AT_ONCE).map(encode).collect::<Result<Vec<_>>>()?;
    let mut shard = Weights::default();
    for (way, states) in Condition::cat(&parts)?.iter() {
        let sum: f32 = states.abs()?.sum_all()?.to_dtype(DType::F32)?.to_scalar()?;
        ensure!(
            sum.is_finite(),
            "the text encoder makes values that are not finite of \"{}\" or a prompt after it",
            texts[0]
        );
        shard.insert(name(way), states.clone());
    }
    Ok(shard)
}

fn shard_path(folder: &Path, i: usize) -> PathBuf {
    folder.join(format!("shard-{i:05}.safetensors"))
}

/// What the states of a way are called in a shard.
fn name(way: Way) -> &'static str {
    match way {
        Way::Label => "label",
        Way::Text => "text",
        Way::Vector => "vector",
        Way::Map => "map",
    }
}
