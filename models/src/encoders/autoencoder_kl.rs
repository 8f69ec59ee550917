//! diffusers' `AutoencoderKL`: a Gaussian over latents for a picture, and a picture for latents (Rombach et al. 2022,
//! arXiv:2112.10752).

use super::coder::{DownBlock, Half, Shape, UpBlock};
use super::scaling::Scaling;
use crate::backend::{Activation, Backend};
use crate::layers::{Conv2d, Scope, Source};
use crate::networks::config::Fields;
use crate::{Error, Result, limits};
use serde::{Deserialize, Serialize};

/// The fields of `config.json`, with diffusers' defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderKlConfig {
    /// Channels of a picture that is encoded.
    pub in_channels: usize,
    /// Of one that is decoded.
    pub out_channels: usize,
    /// The encoder's levels, finest first.
    pub down_block_types: Vec<DownBlock>,
    /// The decoder's, coarsest first.
    pub up_block_types: Vec<UpBlock>,
    /// Channels of each level, finest first.
    pub block_out_channels: Vec<usize>,
    /// Resnets of a level; the decoder has one more.
    pub layers_per_block: usize,
    /// Non-linearity of the resnets.
    pub act_fn: Activation,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Groups of every norm.
    pub norm_num_groups: usize,
    /// A diffusion model sees latents times this.
    pub scaling_factor: f64,
    /// After this was taken off.
    pub shift_factor: Option<f64>,
    /// Mean of each channel of latents, in the place of that.
    pub latents_mean: Option<Vec<f64>>,
    /// And standard deviation, which they are divided by.
    pub latents_std: Option<Vec<f64>>,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether one precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the coarsest maps attend.
    pub mid_block_add_attention: bool,
}

impl Default for AutoencoderKlConfig {
    fn default() -> Self {
        AutoencoderKlConfig {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DownBlock::DownEncoderBlock2D],
            up_block_types: vec![UpBlock::UpDecoderBlock2D],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl AutoencoderKlConfig {
    fn shape(&self) -> Shape<'_> {
        Shape {
            channels: &self.block_out_channels,
            layers: self.layers_per_block,
            groups: self.norm_num_groups,
            act: self.act_fn,
            mid_attention: self.mid_block_add_attention,
        }
    }

    fn scaling(&self) -> Result<Scaling> {
        match (&self.latents_mean, &self.latents_std, self.shift_factor) {
            (None, None, shift) => Scaling::of_all(self.scaling_factor, shift.unwrap_or(0.0)),
            (Some(mean), Some(std), None | Some(0.0)) => {
                Scaling::of_channels(self.scaling_factor, mean, std, self.latent_channels)
            }
            (Some(_), Some(_), Some(shift)) => Err(Error::Config(format!(
                "shift_factor is {shift} beside latents_mean, expected null: pipelines read one or the other"
            ))),
            _ => Err(Error::Config("one of latents_mean and latents_std is null, expected both or none".into())),
        }
    }
}

impl Fields for AutoencoderKlConfig {
    const CLASSES: &'static [&'static str] = &["AutoencoderKL"];
    // The size of pictures when it was trained, which tiles are cut by; and every pass is single precision here.
    const WITHOUT_EFFECT: &'static [&'static str] = &["sample_size", "force_upcast"];

    fn validate(&self) -> Result<()> {
        self.shape().validate(&self.down_block_types, &self.up_block_types)?;
        for (name, n) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
        ] {
            limits::check(name, n, limits::CHANNELS)?;
        }
        self.scaling().map(|_| ())
    }
}

/// The autoencoder with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct AutoencoderKl {
    config: AutoencoderKlConfig,
    scaling: Scaling,
    encoder: Half,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Half,
}

impl AutoencoderKl {
    /// Takes its parameters from `source`, by diffusers' names.
    pub fn build(config: &AutoencoderKlConfig, source: &mut dyn Source) -> Result<Self> {
        config.validate()?;
        let (shape, mut root) = (config.shape(), Scope::root(source));
        let latents = config.latent_channels;
        let mut conv = |used: bool, name: &str, channels: usize| match used {
            true => root.conv2d(name, [channels; 2], 1, 1, false).map(Some),
            false => Ok(None),
        };
        let quant_conv = conv(config.use_quant_conv, "quant_conv", 2 * latents)?;
        let post_quant_conv = conv(config.use_post_quant_conv, "post_quant_conv", latents)?;
        Ok(AutoencoderKl {
            encoder: shape.encoder(root.at("encoder"), [config.in_channels, 2 * latents], &config.down_block_types)?,
            decoder: shape.decoder(root.at("decoder"), [latents, config.out_channels], &config.up_block_types)?,
            quant_conv,
            post_quant_conv,
            scaling: config.scaling()?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    pub(super) fn factor(&self) -> usize {
        self.config.shape().factor()
    }

    pub(super) fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    pub(super) fn weight(&self) -> &Conv2d {
        self.decoder.conv_in()
    }

    /// Latents as a diffusion model makes them, `(B, latent_channels, h, w)`, to pictures in [-1, 1].
    pub fn decode<B: Backend>(&self, b: &B, latents: &B::Value) -> Result<B::Value> {
        let mut z = self.scaling.raw(b, latents, self.weight().weight.device())?;
        if let Some(conv) = &self.post_quant_conv {
            z = b.conv2d(&z, conv)?;
        }
        self.decoder.forward(b, &z)
    }

    /// Pictures in [-1, 1] to mean and logarithm of the variance of raw latents, joined: `(B, 2·latent_channels, h, w)`.
    pub fn moments<B: Backend>(&self, b: &B, pictures: &B::Value) -> Result<B::Value> {
        let h = self.encoder.forward(b, pictures)?;
        match &self.quant_conv {
            Some(conv) => b.conv2d(&h, conv),
            None => Ok(h),
        }
    }
}
