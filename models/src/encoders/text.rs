//! Prompts to what a network is told of them: one text encoder, or several side by side.

use super::clip::{ClipConfig, ClipText};
use super::tokenizer::Tokenizer;
use crate::error::printable;
use crate::folder::{json, weights_file};
use crate::interpret::Eager;
use crate::layers::Loader;
use crate::networks::config;
use crate::{Condition, Error, Result, Way, Weights};
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
    /// was cropped above and left, height and width after. f32. Prompts that are too long are cut, which is said.
    pub fn encode(&self, prompts: &[&str]) -> Result<Condition<Tensor>> {
        let mut states = Vec::new();
        let mut pooled = None;
        for (i, encoder) in self.encoders.iter().enumerate() {
            let ids = encoder.ids(prompts, i == 0)?;
            let found = encoder.model.run(&Eager, &encoder.tensor(&ids)?)?;
            let layer = match self.layer {
                Layer::Last => &found.last,
                Layer::Penultimate => &found.penultimate,
            };
            states.push(layer.squeeze(2)?.transpose(1, 2)?.contiguous()?);
            if self.size.is_some() && i + 1 == self.encoders.len() {
                pooled = Some(encoder.model.pooled(&found.last, &ids)?);
            }
        }
        let mut told = vec![(Way::Text, Tensor::cat(&states, 2)?)];
        if let (Some(pooled), Some(size)) = (pooled, self.size) {
            told.push((Way::Vector, with_sizes(&pooled, size)?));
        }
        Ok(told.into_iter().collect())
    }

    /// Zeros in the place of all that is said by text, `(1, …)`: what SDXL is guided away from where no negative prompt is
    /// given.
    pub fn nothing(&self) -> Result<Condition<Tensor>> {
        let (Some(last), [n, width]) = (self.encoders.last(), self.text_shape()) else { return Ok(Condition::none()) };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, last.model.device());
        let mut told = vec![(Way::Text, zeros(&[1, n, width])?)];
        if let Some(size) = self.size {
            told.push((Way::Vector, with_sizes(&zeros(&[1, last.model.pooled_width()])?, size)?));
        }
        Ok(told.into_iter().collect())
    }

    /// Shape of the states of a prompt.
    pub fn text_shape(&self) -> [usize; 2] {
        let n = self.encoders.first().map_or(0, |encoder| encoder.tokenizer.length());
        [n, self.encoders.iter().map(|encoder| encoder.model.config().hidden_size).sum()]
    }
}

/// Numbers of the sizes of a picture.
const N_SIZES: usize = 6;

/// The pooled text `(B, P)` with the sizes of a picture that was not cropped behind it.
fn with_sizes(pooled: &Tensor, [height, width]: [usize; 2]) -> Result<Tensor> {
    let [h, w] = [height as f32, width as f32];
    let sizes = Tensor::new(&[[h, w, 0.0, 0.0, h, w]], pooled.device())?;
    Ok(Tensor::cat(&[pooled, &sizes.broadcast_as((pooled.dim(0)?, N_SIZES))?], 1)?)
}

impl TextEncoder {
    /// Reads a folder `text_encoder/` and its `tokenizer/`. Weights become f32 on `device`.
    pub fn load(model: &Path, tokenizer: &Path, device: &Device) -> Result<Self> {
        let path = model.join("config.json");
        let config = config::from_value(&json::read(&path)?).map_err(|e| Error::file(&path, e))?;
        let file = weights_file(model, WEIGHTS)?;
        let weights = Weights::load(&file, &Device::Cpu)?.to(DType::F32, device)?;
        let clip = read(&config, &weights).map_err(|e| Error::file(&file, e))?;
        Self::new(Tokenizer::load(tokenizer)?, clip).map_err(|e| Error::file(tokenizer, e))
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

    fn ids(&self, prompts: &[&str], say: bool) -> Result<Vec<Vec<u32>>> {
        let encode = |prompt: &&str| {
            let tokens = self.tokenizer.encode(prompt)?;
            if let Some(cut) = tokens.cut.filter(|_| say) {
                log::warn!(
                    "a prompt has more than the {} tokens that the text encoder reads; left out: \"{}\"",
                    self.tokenizer.length() - 2,
                    printable(&cut)
                );
            }
            Ok(tokens.ids)
        };
        prompts.iter().map(encode).collect()
    }

    fn tensor(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let flat: Vec<i64> = ids.iter().flatten().map(|id| i64::from(*id)).collect();
        Ok(Tensor::from_vec(flat, (ids.len(), self.tokenizer.length()), self.model.device())?)
    }
}

/// The stem of a text encoder's weights.
const WEIGHTS: &str = "model";

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
