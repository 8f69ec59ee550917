//! A model's parts in the order in which data passes through them.

use crate::encoders::Autoencoder;
use crate::{Denoiser, Error, Result};
use candle_core::Tensor;

/// From noise to pictures. Nothing outside knows whether there are latents between.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// Noise to samples.
    pub denoiser: Denoiser,
    /// Samples to pictures, where they are latents.
    pub decoder: Option<Autoencoder>,
}

/// Samples, shown as they are.
impl From<Denoiser> for Pipeline {
    fn from(denoiser: Denoiser) -> Self {
        Pipeline { denoiser, decoder: None }
    }
}

impl Pipeline {
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

    /// Refuses a decoder of other samples than these.
    pub(crate) fn check(&self) -> Result<()> {
        let (made, channels) =
            (self.denoiser.network.takes().channels, self.decoder.as_ref().map(|d| d.latent_channels()));
        match channels.filter(|channels| *channels != made) {
            Some(channels) => Err(Error::Config(format!(
                "the decoder takes latents of {channels} channels, the network makes {made}"
            ))),
            None => Ok(()),
        }
    }
}
