//! diffusers' `VQModel`: latents are rows of a codebook (van den Oord et al. 2017, arXiv:1711.00937; Esser et al. 2021,
//! arXiv:2012.09841), as in the first unconditional latent models.

use super::coder::{DownBlock, Half, Shape, UpBlock};
use super::scaling::Scaling;
use crate::backend::{Activation, Backend};
use crate::interpret::Eager;
use crate::layers::{Conv2d, Embedding, Scope, Source};
use crate::networks::config::Fields;
use crate::{Result, limits};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The fields of `config.json`, with diffusers' defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VqConfig {
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
    /// Channels between the halves and the codebook.
    pub latent_channels: usize,
    /// Rows of the codebook.
    pub num_vq_embeddings: usize,
    /// Groups of every norm.
    pub norm_num_groups: usize,
    /// Width of a row, which latents have; `latent_channels` when null.
    pub vq_embed_dim: Option<usize>,
    /// A diffusion model sees latents times this.
    pub scaling_factor: f64,
    /// Whether the coarsest maps attend.
    pub mid_block_add_attention: bool,
}

impl Default for VqConfig {
    fn default() -> Self {
        VqConfig {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DownBlock::DownEncoderBlock2D],
            up_block_types: vec![UpBlock::UpDecoderBlock2D],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 3,
            num_vq_embeddings: 256,
            norm_num_groups: 32,
            vq_embed_dim: None,
            scaling_factor: 0.18215,
            mid_block_add_attention: true,
        }
    }
}

impl VqConfig {
    fn shape(&self) -> Shape<'_> {
        Shape {
            channels: &self.block_out_channels,
            layers: self.layers_per_block,
            groups: self.norm_num_groups,
            act: self.act_fn,
            mid_attention: self.mid_block_add_attention,
        }
    }

    /// Channels of what a diffusion model makes.
    pub fn width(&self) -> usize {
        self.vq_embed_dim.unwrap_or(self.latent_channels)
    }
}

impl Fields for VqConfig {
    const CLASSES: &'static [&'static str] = &["VQModel"];
    const WITHOUT_EFFECT: &'static [&'static str] = &["sample_size", "force_upcast"];

    fn fixed() -> Vec<(&'static str, Vec<serde_json::Value>)> {
        vec![("norm_type", vec![json!("group")]), ("lookup_from_codebook", vec![json!(false)])]
    }

    fn validate(&self) -> Result<()> {
        self.shape().validate(&self.down_block_types, &self.up_block_types)?;
        for (name, n) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
            ("vq_embed_dim", self.width()),
        ] {
            limits::check(name, n, limits::CHANNELS)?;
        }
        limits::check("num_vq_embeddings", self.num_vq_embeddings, limits::ROWS)?;
        Scaling::of_all(self.scaling_factor, 0.0).map(|_| ())
    }
}

/// The autoencoder with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct VqModel {
    config: VqConfig,
    scaling: Scaling,
    encoder: Half,
    quant_conv: Conv2d,
    codebook: Embedding,
    post_quant_conv: Conv2d,
    decoder: Half,
}

impl VqModel {
    /// Takes its parameters from `source`, by diffusers' names.
    pub fn build(config: &VqConfig, source: &mut dyn Source) -> Result<Self> {
        config.validate()?;
        let (shape, mut root) = (config.shape(), Scope::root(source));
        let (latents, width) = (config.latent_channels, config.width());
        Ok(VqModel {
            encoder: shape.encoder(root.at("encoder"), [config.in_channels, latents], &config.down_block_types)?,
            quant_conv: root.conv2d("quant_conv", [latents, width], 1, 1, false)?,
            codebook: root.embedding("quantize.embedding", config.num_vq_embeddings, width)?,
            post_quant_conv: root.conv2d("post_quant_conv", [width, latents], 1, 1, false)?,
            decoder: shape.decoder(root.at("decoder"), [latents, config.out_channels], &config.up_block_types)?,
            scaling: Scaling::of_all(config.scaling_factor, 0.0)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &VqConfig {
        &self.config
    }

    pub(super) fn factor(&self) -> usize {
        self.config.shape().factor()
    }

    pub(super) fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    pub(super) fn weight(&self) -> &Conv2d {
        &self.post_quant_conv
    }

    /// Latents as a diffusion model makes them, `(B, vq_embed_dim, h, w)`, by way of the nearest rows of the codebook, to
    /// pictures in [-1, 1]. The gradient passes by the codebook.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let z = self.scaling.raw(&Eager, latents, latents.device())?;
        let rows = self.nearest(&z.detach())?;
        let quantized = (&z + (rows - &z)?.detach())?;
        self.decoder.forward(&Eager, &Eager.conv2d(&quantized, &self.post_quant_conv)?)
    }

    /// Pictures in [-1, 1] to raw latents, `(B, vq_embed_dim, h, w)`, not yet moved to a row.
    pub fn encode<B: Backend>(&self, b: &B, pictures: &B::Value) -> Result<B::Value> {
        b.conv2d(&self.encoder.forward(b, pictures)?, &self.quant_conv)
    }

    /// The row of the codebook nearest to every pixel, in its place.
    fn nearest(&self, z: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = z.dims4()?;
        let table = &self.codebook.weight;
        // |z − e|² less |z|², which is the same for every row.
        let lengths = (table.sqr()?.sum(1)? * 0.5)?;
        let rows: Result<Vec<Tensor>> = (0..b)
            .map(|i| {
                let pixels = z.get(i)?.reshape((c, h * w))?.t()?.contiguous()?;
                let distances = lengths.broadcast_sub(&pixels.matmul(&table.t()?)?)?;
                let rows = table.index_select(&distances.argmin(1)?, 0)?;
                Ok(rows.t()?.contiguous()?.reshape((c, h, w))?)
            })
            .collect();
        Ok(Tensor::stack(&rows?, 0)?)
    }
}
