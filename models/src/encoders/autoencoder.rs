//! An autoencoder of any kind. Scaling is its own: nobody outside knows of a scaling factor.

use super::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use super::autoencoder_tiny::{AutoencoderTiny, TinyConfig, diffusers_names};
use super::scaling::Scaling;
use super::vq_model::{VqConfig, VqModel};
use crate::folder::{WEIGHTS, json, plain_names, weights_file};
use crate::interpret::Eager;
use crate::layers::{Conv2d, Draws, Loader, Random, Source};
use crate::networks::config;
use crate::{Backend, Error, Result, Weights};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::path::Path;

/// Pictures to latents and back.
#[derive(Clone, Debug)]
pub enum Autoencoder {
    /// `AutoencoderKL`.
    Kl(AutoencoderKl),
    /// `AutoencoderTiny`, TAESD.
    Tiny(AutoencoderTiny),
    /// `VQModel`.
    Vq(VqModel),
}

/// What pictures are in latents, `(B, latent_channels, h, w)` each, as a diffusion model sees them.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The latents, or their mean.
    pub mean: Tensor,
    /// And their standard deviation, where they are a Gaussian.
    pub std: Option<Tensor>,
}

impl Encoded {
    /// A draw by `noise`, unit normal and shaped as the mean, which diffusion models are trained on.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        match &self.std {
            Some(std) => Ok((&self.mean + (std * noise)?)?),
            None => Ok(self.mean.clone()),
        }
    }
}

impl Autoencoder {
    /// Reads a part of a diffusers folder, `vae/` or `vqvae/`, or one of TAESD's own files. Weights become f32 on `device`.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let config = match path.is_dir() {
            true => json::read(&path.join("config.json"))?,
            false => serde_json::json!({"_class_name": "AutoencoderTiny"}),
        };
        Self::new(&config, Self::weights(path)?.to(DType::F32, device)?).map_err(|e| Error::file(path, e))
    }

    /// The weights of such a folder or file, in its own dtype.
    pub fn weights(path: &Path) -> Result<Weights> {
        let file = if path.is_dir() { weights_file(path, WEIGHTS)? } else { path.to_path_buf() };
        plain_names(Weights::load(&file, &Device::Cpu)?, LANDMARK, &file).map_err(|e| Error::file(&file, e))
    }

    /// From what `config.json` holds, and weights by diffusers' or TAESD's names. Fails naming every tensor that is missing,
    /// left over or of a wrong shape.
    pub fn new(config: &Value, weights: Weights) -> Result<Self> {
        let weights = diffusers_names(weights);
        let has = |half: &str| weights.names().any(|name| name.starts_with(half));
        if has("encoder.") && !has("decoder.") {
            return Err(Error::Config("an encoder alone: latents need its decoder".into()));
        }
        let mut loader = Loader::new(&weights);
        let made = Self::build(config, &mut loader, has("encoder."))?;
        loader.finish()?;
        Ok(made)
    }

    /// Fresh weights for what `config.json` holds.
    pub fn init(config: &Value, draw: &mut Draws) -> Result<Weights> {
        let mut source = Random::new(draw);
        Self::build(config, &mut source, true)?;
        Ok(source.weights)
    }

    /// `encodes`, where a tiny one has an encoder too.
    fn build(config: &Value, source: &mut dyn Source, encodes: bool) -> Result<Self> {
        Ok(match config["_class_name"].as_str() {
            Some("AutoencoderKL") => {
                Autoencoder::Kl(AutoencoderKl::build(&config::from_value::<AutoencoderKlConfig>(config)?, source)?)
            }
            Some("AutoencoderTiny") => {
                Autoencoder::Tiny(AutoencoderTiny::build(&config::from_value::<TinyConfig>(config)?, source, encodes)?)
            }
            Some("VQModel") => Autoencoder::Vq(VqModel::build(&config::from_value::<VqConfig>(config)?, source)?),
            other => {
                return Err(Error::Config(format!(
                    "_class_name is {}, supported: AutoencoderKL, AutoencoderTiny, VQModel",
                    other.unwrap_or("missing")
                )));
            }
        })
    }

    /// Pixels of a picture, in each direction, for one of latents.
    pub fn factor(&self) -> usize {
        match self {
            Autoencoder::Kl(kl) => kl.factor(),
            Autoencoder::Tiny(tiny) => tiny.factor(),
            Autoencoder::Vq(vq) => vq.factor(),
        }
    }

    /// Channels of latents.
    pub fn latent_channels(&self) -> usize {
        match self {
            Autoencoder::Kl(kl) => kl.config().latent_channels,
            Autoencoder::Tiny(tiny) => tiny.config().latent_channels,
            Autoencoder::Vq(vq) => vq.config().width(),
        }
    }

    /// Channels of decoded pictures.
    pub fn picture_channels(&self) -> usize {
        match self {
            Autoencoder::Kl(kl) => kl.config().out_channels,
            Autoencoder::Tiny(tiny) => tiny.config().out_channels,
            Autoencoder::Vq(vq) => vq.config().out_channels,
        }
    }

    /// Latents as a diffusion model makes them, `(B, latent_channels, h, w)`, to pictures in [-1, 1],
    /// `(B, picture_channels, factor·h, factor·w)`; a few values lie outside. Gradients reach the latents.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        check_channels("latents", latents, self.latent_channels())?;
        match self {
            Autoencoder::Vq(vq) => vq.decode(latents),
            _ => self.decode_by(&Eager, latents),
        }
    }

    /// The same over any backend. A codebook's nearest row is looked up by no backend, so that a `VQModel` is refused.
    pub fn decode_by<B: Backend>(&self, b: &B, latents: &B::Value) -> Result<B::Value> {
        match self {
            Autoencoder::Kl(kl) => kl.decode(b, latents),
            Autoencoder::Tiny(tiny) => tiny.decode(b, latents),
            Autoencoder::Vq(_) => Err(Error::Unsupported(
                "a VQModel looks for the nearest row of its codebook, which is no operation of networks here".into(),
            )),
        }
    }

    /// Pictures in [-1, 1], `(B, C, H, W)` with sides that are multiples of `factor`, to latents as a diffusion model sees
    /// them.
    pub fn encode(&self, pictures: &Tensor) -> Result<Encoded> {
        let (_, _, h, w) = pictures.dims4()?;
        let factor = self.factor();
        if !h.is_multiple_of(factor) || !w.is_multiple_of(factor) || h * w == 0 {
            return Err(Error::Config(format!("pictures of {h}×{w}, expected sides that are multiples of {factor}")));
        }
        check_channels("pictures", pictures, self.conv_in_channels())?;
        let device = pictures.device();
        match self {
            Autoencoder::Kl(kl) => {
                let moments = kl.moments(&Eager, pictures)?;
                let (mean, log_variance) =
                    (moments.narrow(1, 0, moments.dim(1)? / 2)?, moments.chunk(2, 1)?[1].clone());
                // The bounds are diffusers'.
                let std = (log_variance.clamp(-30f32, 20f32)? * 0.5)?.exp()?;
                // Of what the mean is divided by, the deviation is too; it is not shifted.
                let unshifted = Scaling { mean: vec![0.0; kl.scaling().std.len()], std: kl.scaling().std.clone() };
                Ok(Encoded {
                    mean: kl.scaling().scaled(&Eager, &mean.contiguous()?, device)?,
                    std: Some(unshifted.scaled(&Eager, &std, device)?),
                })
            }
            Autoencoder::Tiny(tiny) => {
                let mean = tiny.scaling().scaled(&Eager, &tiny.encode(&Eager, pictures)?, device)?;
                Ok(Encoded { mean, std: None })
            }
            Autoencoder::Vq(vq) => {
                let mean = vq.scaling().scaled(&Eager, &vq.encode(&Eager, pictures)?, device)?;
                Ok(Encoded { mean, std: None })
            }
        }
    }

    /// Where its weights lie.
    pub fn device(&self) -> Result<&Device> {
        Ok(self.first()?.weight.device())
    }

    fn first(&self) -> Result<&Conv2d> {
        match self {
            Autoencoder::Kl(kl) => Ok(kl.weight()),
            Autoencoder::Tiny(tiny) => tiny.weight(),
            Autoencoder::Vq(vq) => Ok(vq.weight()),
        }
    }

    fn conv_in_channels(&self) -> usize {
        match self {
            Autoencoder::Kl(kl) => kl.config().in_channels,
            Autoencoder::Tiny(tiny) => tiny.config().in_channels,
            Autoencoder::Vq(vq) => vq.config().in_channels,
        }
    }
}

/// What is before this name in a file is a wrapper's.
const LANDMARK: &str = "decoder.conv_in.weight";

fn check_channels(what: &str, x: &Tensor, expected: usize) -> Result<()> {
    match x.dims4()?.1 {
        found if found == expected => Ok(()),
        found => Err(Error::Config(format!("{what} have {found} channels, this autoencoder takes {expected}"))),
    }
}
