//! A model's parts in the order in which data passes through them.

use crate::encoders::{Autoencoder, TextEncoders};
use crate::error::printable;
use crate::{Condition, Denoiser, Error, Result};
use candle_core::Tensor;

/// From noise to pictures. Nothing outside knows whether there are latents between.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// Prompts to what the network is told of them, where it is told text.
    pub text: Option<TextEncoders>,
    /// Noise to samples.
    pub denoiser: Denoiser,
    /// Samples to pictures, where they are latents.
    pub decoder: Option<Autoencoder>,
}

/// Samples, shown as they are.
impl From<Denoiser> for Pipeline {
    fn from(denoiser: Denoiser) -> Self {
        Pipeline { text: None, denoiser, decoder: None }
    }
}

impl Pipeline {
    /// What the network is told of each prompt. What is cut of one that is too long is said.
    pub fn condition(&self, prompts: &[&str]) -> Result<Condition<Tensor>> {
        let Some(text) = &self.text else { return Err(Error::Config("this model takes no prompts".into())) };
        for (_, cut) in text.cut(prompts)? {
            log::warn!(
                "a prompt has more than the {} tokens that the text encoder reads; left out: \"{}\"",
                text.room(),
                printable(&cut)
            );
        }
        text.encode(prompts)
    }

    /// Guides away from this prompt, and no longer from nothing.
    pub fn guide_away_from(&mut self, negative: &str) -> Result<()> {
        self.denoiser.unconditional = Some(self.condition(&[negative])?);
        Ok(())
    }

    /// The guidance scale of diffusers' pipeline where none is given; 1, none, without text.
    pub fn usual_guidance(&self) -> f64 {
        match &self.text {
            Some(text) if text.guidance.is_some() => 1.0,
            Some(text) if text.size.is_some() => 5.0,
            Some(_) => 7.5,
            None => 1.0,
        }
    }

    /// Tells a network that hears of sizes that its pictures have this height and width. What it is guided away from is
    /// nothing again.
    pub fn resize(&mut self, size: [usize; 2]) -> Result<()> {
        if let Some(text) = &mut self.text {
            text.size = text.size.map(|_| size);
            self.denoiser.unconditional = Some(text.unsaid()?);
        }
        Ok(())
    }

    /// Pixels of a picture, in each direction, for one of a sample.
    pub fn factor(&self) -> usize {
        self.decoder.as_ref().map_or(1, Autoencoder::factor)
    }

    /// The pictures behind samples x0 `(B, C, H, W)`: around [-1, 1], `(B, C', factor·H, factor·W)` behind a decoder.
    pub fn pictures(&self, x0: &Tensor) -> Result<Tensor> {
        let Some(decoder) = &self.decoder else { return Ok(x0.clone()) };
        // One at a time: a decoder's maps are many times as large as a picture.
        let each = (0..x0.dim(0)?).map(|i| decoder.decode(&x0.narrow(0, i, 1)?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&each, 0)?)
    }

    /// The samples behind pictures `(B, C, H, W)` in [-1, 1]: their own means where there is a decoder.
    pub fn samples(&self, pictures: &Tensor) -> Result<Tensor> {
        match &self.decoder {
            Some(decoder) => Ok(decoder.encode(pictures)?.mean),
            None => Ok(pictures.clone()),
        }
    }

    /// `[C, H, W]` of the picture behind a sample of this shape.
    pub fn picture_shape(&self, [channels, height, width]: [usize; 3]) -> [usize; 3] {
        match &self.decoder {
            Some(decoder) => [decoder.picture_channels(), decoder.factor() * height, decoder.factor() * width],
            None => [channels, height, width],
        }
    }
}
