//! What a network is told of each prompt of a list: states of the text encoders, made once and kept in the run's folder, or
//! made as they are asked for where they would take too much of a disk.

use crate::config::{Config, RealScoreSettings};
use crate::fingerprint;
use crate::output::{say, warn};
use crate::random::{Purpose, Random};
use crate::rows::{Made, Rows};
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use dmd_models::encoders::TextEncoders;
use dmd_models::{Autoencoder, Condition, Denoiser, ModelFolder, Way, Weights};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Prompts to draw from, with what reads them.
pub struct Prompts {
    /// Those that are drawn, each with the same chance; then captions of pictures that are not.
    pub texts: Vec<String>,
    n_drawn: usize,
    /// The number of the first caption.
    pub first_caption: usize,
    /// One row of each way: what stands for the negative prompt, or for nothing.
    pub unsaid: Condition<Tensor>,
    /// The scale that is left for classifier-free guidance: 1, none, for a network that is told the scale.
    pub guidance_scale: f64,
    /// What the drawn ones are known again by, with what reads them.
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
    /// In a folder.
    Kept(Rows),
}

impl Prompts {
    /// The prompts of these settings for a model, on this device, and captions of pictures, which are the prompts where there
    /// are no others; none where the model is told no text. Else as [`Prompts::new`].
    pub fn for_run(
        model: &ModelFolder,
        config: &Config,
        captions: Vec<String>,
        device: &Device,
    ) -> Result<Option<Self>> {
        // Told here whether it can be read, and read again whenever somebody looks.
        let factor = model.decoder(&Device::Cpu)?.as_ref().map_or(1, Autoencoder::factor);
        let Some(encoders) = model.text(device, factor)? else { return Ok(None) };
        let (texts, captions) = match config.prompts.is_empty() {
            true => (captions, None),
            false => (super::read(Path::new(&config.prompts))?, Some(captions)),
        };
        let RealScoreSettings { negative, guidance_scale, .. } = &config.real_score;
        let mut prompts = Self::new(texts, encoders, fingerprint::text(model)?, negative, *guidance_scale)?;
        if let Some(captions) = captions {
            prompts.first_caption = prompts.texts.len();
            prompts.texts.extend(captions);
        }
        prompts.say_what_is_cut(negative)?;
        Ok(Some(prompts))
    }

    /// Prompts with this guidance, away from `negative` where it is not empty; `text_sha256` is what the encoders are known
    /// by.
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
        let known = Known { text_sha256, prompts_sha256: fingerprint::prompts(&texts), negative: negative.into() };
        Ok(Prompts {
            n_drawn: texts.len(),
            first_caption: 0,
            texts,
            unsaid,
            guidance_scale,
            known,
            states: States::Made(encoders),
        })
    }

    fn say_what_is_cut(&self, negative: &str) -> Result<()> {
        let States::Made(encoders) = &self.states else { return Ok(()) };
        let all: Vec<&str> = self.texts.iter().map(String::as_str).chain([negative]).collect();
        let cut = encoders.cut(&all)?;
        if let Some((i, left_out)) = cut.first() {
            warn(&format!(
                "{} of {} prompts have more than the {} tokens that the text encoder reads; of \"{}\" is left out: \"{left_out}\"",
                cut.len(),
                self.texts.len(),
                encoders.room(),
                all[*i]
            ));
        }
        Ok(())
    }

    /// How many are drawn from.
    #[allow(clippy::len_without_is_empty)] // a file of prompts has at least one
    pub fn len(&self) -> usize {
        self.n_drawn
    }

    /// Makes all states and keeps them in `folder`, going on where an earlier call stopped, and lets the encoders go; leaves
    /// it where they would take more than `most` bytes. Both are said.
    pub fn keep(&mut self, folder: &Path, most: u64) -> Result<()> {
        let States::Made(encoders) = &self.states else { return Ok(()) };
        let n = self.texts.len();
        let values: usize = self.unsaid.iter().map(|(_, row)| row.elem_count()).sum();
        let bytes = (values * size_of::<f32>()) as u64 * n as u64;
        if bytes > most {
            say(&format!(
                "text states of {n} prompts would take {:.1} GB, more than the {:.1} that are kept: they are made as they are needed, and the text encoder stays in memory",
                bytes as f64 / 1e9,
                most as f64 / 1e9
            ));
            return Ok(());
        }
        let shapes = self.unsaid.iter().map(|(way, row)| (name(way), row.dims()[1..].to_vec())).collect();
        let prompts_sha256 = fingerprint::prompts(&self.texts);
        let of = [("text encoders or tokenizers", &*self.known.text_sha256), ("prompts", &*prompts_sha256)];
        let made = Made { what: "text states", of: &of, shapes: &shapes };
        let rows = made.keep(folder, n, |range| {
            let texts: Vec<&str> = self.texts[range].iter().map(String::as_str).collect();
            let encode = |texts: &[&str]| Ok(encoders.encode(texts)?.try_map(|rows| rows.to_device(&Device::Cpu))?);
            let parts = texts.chunks(AT_ONCE).map(encode).collect::<Result<Vec<_>>>()?;
            let mut shard = Weights::default();
            Condition::cat(&parts)?.iter().for_each(|(way, states)| shard.insert(name(way), states.clone()));
            Ok(shard)
        })?;
        self.states = States::Kept(rows);
        Ok(())
    }

    /// What a network is told of the prompts of these numbers, a row of each way for each, on this device.
    pub fn told(&self, picks: &[u32], device: &Device) -> Result<Condition<Tensor>> {
        let rows: Vec<Condition<Tensor>> = match &self.states {
            States::Made(encoders) => {
                let texts: Vec<&str> = picks.iter().map(|&i| self.texts[i as usize].as_str()).collect();
                texts.chunks(AT_ONCE).map(|texts| Ok(encoders.encode(texts)?)).collect::<Result<_>>()?
            }
            States::Kept(rows) => {
                let row = |&i: &u32| {
                    let ways = self.unsaid.iter();
                    ways.map(|(way, row)| Ok((way, rows.row(name(way), i as usize, &row.dims()[1..])?))).collect()
                };
                picks.iter().map(row).collect::<Result<_>>()?
            }
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
}

/// Prompts through the encoders at a time.
const AT_ONCE: usize = 16;

/// What the states of a way are called in a shard.
fn name(way: Way) -> &'static str {
    match way {
        Way::Label => "label",
        Way::Text => "text",
        Way::Vector => "vector",
        Way::Map => "map",
    }
}
