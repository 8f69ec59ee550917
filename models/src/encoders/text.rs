//! Prompts to what a network is told of them: one text encoder, or several side by side.

use super::clip::{ClipConfig, ClipText};
use super::tokenizer::Tokenizer;
use crate::folder::{json, weights_file};
use crate::interpret::Eager;
use crate::layers::Loader;
use crate::networks::config;
use crate::ops::TokenAt;
use crate::{Backend, Condition, Error, Result, Way, Weights};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// Text encoders side by side, and what a network is told of their answers.
#[derive(Clone, Debug)]
pub struct TextEncoders {
    /// In order; their states are joined channel by channel.
    pub encoders: Vec<TextEncoder>,
    /// Which states.
    pub layer: Layer,
    /// Height and width of the pictures to make, where the network is told them beside the pooled text of the last encoder.
    pub size: Option<[usize; 2]>,
    /// The guidance scale that the network is told, where it is one that imitates guidance.
    pub guidance: Option<f64>,
    /// Zeros stand for saying nothing, as for SDXL; else the empty prompt does.
    pub zeros: bool,
}

/// States of a text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Of the last block, behind the last norm: Stable Diffusion 1 and 2.
    Last,
    /// Before it, without the norm: SDXL.
    Penultimate,
}

/// A text encoder with its tokenizer.
#[derive(Clone, Debug)]
pub struct TextEncoder {
    tokenizer: Tokenizer,
    model: ClipText,
}

impl TextEncoders {
    /// What a network is told of each prompt: [`Way::Text`], states `(B, N, C)`; and, where it is told sizes, [`Way::Vector`]
    /// `(B, P + 6)`: the pooled text of the last encoder, then height and width of the picture before it was cropped, what
    /// was cropped above and left, height and width after; and the guidance scale if it is told. f32. Prompts that are too long
    /// are cut ([`TextEncoders::cut`]).
    pub fn encode(&self, prompts: &[&str]) -> Result<Condition<Tensor>> {
        let (states, pooled) = self.run(&Eager, &self.ids(prompts)?)?;
        self.told(states, pooled)
    }

    /// Ids of prompts, i64 `(B, N)`, for each encoder.
    pub fn ids(&self, prompts: &[&str]) -> Result<Vec<Tensor>> {
        self.encoders.iter().map(|encoder| encoder.ids(prompts)).collect()
    }

    /// States `(B, N, C)` of prompts with these ids, for each encoder `(B, N)`; and the pooled text of the last encoder,
    /// `(B, P)`, where the network is told it.
    pub fn run<B: Backend>(&self, b: &B, ids: &[B::Value]) -> Result<(B::Value, Option<B::Value>)> {
        let (mut states, mut pooled) = (None, None);
        for (i, (TextEncoder { tokenizer, model }, ids)) in self.encoders.iter().zip(ids).enumerate() {
            let found = model.run(b, ids)?;
            let layer = match self.layer {
                Layer::Last => &found.last,
                Layer::Penultimate => &found.penultimate,
            };
            states = Some(match states {
                Some(before) => b.concat(&before, layer)?,
                None => layer.clone(),
            });
            if self.size.is_some() && i + 1 == self.encoders.len() {
                let end = match model.end() {
                    // Every prompt has an end.
                    TokenAt::Largest if tokenizer.end() == tokenizer.largest_id() => TokenAt::Id(tokenizer.end()),
                    end => end,
                };
                pooled = Some(model.pooled(b, &found.last, ids, end)?);
            }
        }
        let states = states.ok_or_else(|| Error::Config("there is no text encoder".into()))?;
        Ok((b.states(&states)?, pooled))
    }

    /// How many numbers stand behind the pooled text in [`Way::Vector`].
    pub fn n_numbers(&self) -> usize {
        self.size.map_or(0, |_| 6) + self.guidance.map_or(0, |_| 1)
    }

    /// Where its weights lie.
    pub fn device(&self) -> Device {
        self.encoders.first().map_or(Device::Cpu, |encoder| encoder.model.device().clone())
    }

    /// What a network is told, `(1, …)`, where nothing is said: what it is guided away from without a negative prompt.
    pub fn unsaid(&self) -> Result<Condition<Tensor>> {
        if !self.zeros {
            return self.encode(&[""]);
        }
        let (Some(last), [n, width]) = (self.encoders.last(), self.text_shape()) else { return Ok(Condition::none()) };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, last.model.device());
        let pooled = match self.size {
            Some(_) => Some(zeros(&[1, last.model.pooled_width()])?),
            None => None,
        };
        self.told(zeros(&[1, n, width])?, pooled)
    }

    /// Which of these prompts are too long, and what the first encoder leaves out of each.
    pub fn cut(&self, prompts: &[&str]) -> Result<Vec<(usize, String)>> {
        let Some(first) = self.encoders.first() else { return Ok(Vec::new()) };
        let cut = prompts.iter().enumerate().map(|(i, prompt)| Ok((i, first.tokenizer.encode(prompt)?.cut)));
        let cut = cut.collect::<Result<Vec<_>>>()?;
        Ok(cut.into_iter().filter_map(|(i, cut)| Some((i, cut?))).collect())
    }

    /// Tokens of a prompt that are read.
    pub fn room(&self) -> usize {
        self.encoders.first().map_or(0, |encoder| encoder.tokenizer.length() - 2)
    }

    /// Guides by this scale, and returns what is left of it for classifier-free guidance: a network that imitates guidance is
    /// told the scale from now on, which leaves 1, none.
    pub fn guide(&mut self, scale: f64) -> f64 {
        match &mut self.guidance {
            Some(told) => {
                *told = scale;
                1.0
            }
            None => scale,
        }
    }

    /// States, and the vector of what else there is.
    fn told(&self, states: Tensor, pooled: Option<Tensor>) -> Result<Condition<Tensor>> {
        let mut numbers: Vec<f32> = Vec::new();
        if let Some([h, w]) = self.size.map(|size| size.map(|side| side as f32)) {
            numbers.extend([h, w, 0.0, 0.0, h, w]);
        }
        numbers.extend(self.guidance.map(|guidance| guidance as f32));
        let (n, width) = (states.dim(0)?, numbers.len());
        let numbers = Tensor::from_vec(numbers, (1, width), states.device())?.broadcast_as((n, width))?;
        let vector = match (pooled, width) {
            (Some(pooled), _) => Some(Tensor::cat(&[pooled, numbers.contiguous()?], 1)?),
            (None, 0) => None,
            (None, _) => Some(numbers.contiguous()?),
        };
        Ok([(Way::Text, Some(states)), (Way::Vector, vector)]
            .into_iter()
            .filter_map(|(way, v)| Some((way, v?)))
            .collect())
    }

    /// Shape of the states of a prompt.
    pub fn text_shape(&self) -> [usize; 2] {
        let n = self.encoders.first().map_or(0, |encoder| encoder.tokenizer.length());
        [n, self.encoders.iter().map(|encoder| encoder.model.config().hidden_size).sum()]
    }
}

impl TextEncoder {
    /// Reads a folder `text_encoder/` and its `tokenizer/`. Weights become f32 on `device`.
    pub fn load(model: &Path, tokenizer: &Path, device: &Device) -> Result<Self> {
        let path = model.join("config.json");
        let config = config::from_value(&json::read(&path)?).map_err(|e| Error::file(&path, e))?;
        let file = weights_file(model, WEIGHTS)?;
        let weights = Self::weights(model)?.to(DType::F32, device)?;
        let clip = read(&config, &weights).map_err(|e| Error::file(&file, e))?;
        Self::new(Tokenizer::load(tokenizer)?, clip).map_err(|e| Error::file(tokenizer, e))
    }

    /// The weights of a folder `text_encoder/`, in the file's own dtype.
    pub fn weights(model: &Path) -> Result<Weights> {
        Weights::load(&weights_file(model, WEIGHTS)?, &Device::Cpu)
    }

    /// A tokenizer and its text encoder, if they fit together.
    pub fn new(tokenizer: Tokenizer, model: ClipText) -> Result<Self> {
        let rows = model.config().vocab_size;
        if tokenizer.largest_id() as usize >= rows {
            return Err(Error::Config(format!(
                "its vocabulary has ids up to {}, the text encoder has a table of {rows} (vocab_size): they are not of one model",
                tokenizer.largest_id()
            )));
        }
        let tokenizer = tokenizer.at_most(model.config().max_position_embeddings);
        Ok(TextEncoder { tokenizer, model })
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Its transformer.
    pub fn model(&self) -> &ClipText {
        &self.model
    }

    /// Ids of prompts, i64 `(B, N)`.
    fn ids(&self, prompts: &[&str]) -> Result<Tensor> {
        let ids = prompts.iter().map(|prompt| Ok(self.tokenizer.encode(prompt)?.ids)).collect::<Result<Vec<_>>>()?;
        let flat: Vec<i64> = ids.iter().flatten().map(|id| i64::from(*id)).collect();
        Ok(Tensor::from_vec(flat, (ids.len(), self.tokenizer.length()), self.model.device())?)
    }
}

/// The stem of a text encoder's weights.
pub(crate) const WEIGHTS: &str = "model";

/// A text transformer on weights by transformers' names of either generation: version 5 writes a `CLIPTextModel` without
/// `text_model` before its names, and no positions that only count.
fn read(config: &ClipConfig, weights: &Weights) -> Result<ClipText> {
    let mut plain = Weights::default();
    for (name, tensor) in weights.iter() {
        let name = name.strip_prefix("text_model.").unwrap_or(name);
        if name != "embeddings.position_ids" {
            plain.insert(name, tensor.clone());
        }
    }
    let mut loader = Loader::new(&plain);
    let projected = plain.get("text_projection.weight").is_some();
    let clip = ClipText::build(config, &mut loader, projected)?;
    loader.finish()?;
    Ok(clip)
}
