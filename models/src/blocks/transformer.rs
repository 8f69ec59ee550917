//! The transformer of text-to-image UNets (Rombach et al. 2022, arXiv:2112.10752): pixels attend to one another and to a
//! prompt's tokens (diffusers' `Transformer2DModel` and `BasicTransformerBlock` as its UNets have them).

use crate::backend::{Activation, Backend, Block};
use crate::layers::{Conv2d, GroupNorm, LayerNorm, Scope};
use crate::{Error, Result};

/// Norm and projection, blocks of attention and feed-forward, projection back, and the sum with what came in.
#[derive(Clone, Debug)]
pub struct Transformer {
    norm: GroupNorm,
    proj_in: Conv2d,
    blocks: Vec<TransformerBlock>,
    proj_out: Conv2d,
}

/// Its sizes.
#[derive(Clone, Copy, Debug)]
pub struct TransformerShape {
    /// In and out.
    pub channels: usize,
    /// Runs of channels that attend on their own.
    pub heads: usize,
    /// Blocks.
    pub layers: usize,
    /// Channels of the tokens of text.
    pub text: usize,
    /// Groups of the norm.
    pub groups: usize,
    /// Whether the projections are stored as linear maps, and not as 1×1 convolutions.
    pub linear: bool,
    /// Whether the first attention is to text too.
    pub only_text: bool,
}

/// Added to the variance of the first norm, whatever a config says of others.
const GROUP_EPS: f64 = 1e-6;
/// And of the norms in the blocks.
const LAYER_EPS: f64 = 1e-5;

impl Transformer {
    /// Takes its parameters from `scope`.
    pub fn build(mut scope: Scope, shape: TransformerShape) -> Result<Self> {
        let TransformerShape { channels, heads, layers, groups, linear, .. } = shape;
        if heads == 0 || heads > channels {
            return Err(Error::Config(format!(
                "{}: {channels} channels for {heads} heads: attention_head_dim is their number in this class",
                scope.path("transformer_blocks")
            )));
        }
        // Where the heads do not divide the channels, diffusers projects to the largest multiple.
        let inner = channels / heads * heads;
        let projection = |scope: &mut Scope, name: &str, io, zero| match linear {
            true => scope.pointwise(name, io, zero),
            false => scope.conv2d(name, io, 1, 1, zero),
        };
        let norm = scope.group_norm("norm", channels, groups, GROUP_EPS)?;
        let proj_in = projection(&mut scope, "proj_in", [channels, inner], false)?;
        let block = |i| TransformerBlock::build(scope.at(format!("transformer_blocks.{i}")), inner, shape);
        let blocks = (0..layers).map(block).collect::<Result<_>>()?;
        let proj_out = projection(&mut scope, "proj_out", [inner, channels], true)?;
        Ok(Transformer { norm, proj_in, blocks, proj_out })
    }

    /// x `(B, C, H, W)` and text `(B, C', 1, N)` to `(B, C, H, W)`.
    pub fn forward<B: Backend>(&self, b: &B, x: &B::Value, text: &B::Value) -> Result<B::Value> {
        let mut h = b.conv2d(&b.group_norm(x, &self.norm, None)?, &self.proj_in)?;
        for block in &self.blocks {
            h = b.block(block, &h, &[text])?;
        }
        b.add(x, &b.conv2d(&h, &self.proj_out)?)
    }
}

/// Attention to pixels, attention to text, and two layers pixel by pixel.
#[derive(Clone, Debug)]
pub struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    only_text: bool,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Conv2d,
    ff_out: Conv2d,
}

impl TransformerBlock {
    fn build(mut scope: Scope, width: usize, shape: TransformerShape) -> Result<Self> {
        let TransformerShape { heads, text, only_text, .. } = shape;
        let of_first = if only_text { text } else { width };
        Ok(TransformerBlock {
            norm1: scope.layer_norm("norm1", width, LAYER_EPS)?,
            attn1: Attention::build(scope.at("attn1"), [width, of_first], heads)?,
            only_text,
            norm2: scope.layer_norm("norm2", width, LAYER_EPS)?,
            attn2: Attention::build(scope.at("attn2"), [width, text], heads)?,
            norm3: scope.layer_norm("norm3", width, LAYER_EPS)?,
            ff_in: scope.pointwise("ff.net.0.proj", [width, 8 * width], false)?,
            ff_out: scope.pointwise("ff.net.2", [4 * width, width], false)?,
        })
    }
}

impl Block for TransformerBlock {
    /// Reads text beside x.
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, beside: &[&B::Value]) -> Result<B::Value> {
        let [text] = beside else { return Err(Error::Unsupported("a transformer reads text beside x".into())) };
        let h = b.layer_norm(x, &self.norm1)?;
        let x = b.add(x, &self.attn1.forward(b, &h, if self.only_text { text } else { &h })?)?;
        let x = b.add(&x, &self.attn2.forward(b, &b.layer_norm(&x, &self.norm2)?, text)?)?;
        let h = b.conv2d(&b.layer_norm(&x, &self.norm3)?, &self.ff_in)?;
        b.add(&x, &b.conv2d(&b.gated(&h, Activation::Gelu)?, &self.ff_out)?)
    }
}

/// Projections, attention, projection.
#[derive(Clone, Debug)]
struct Attention {
    to_q: Conv2d,
    to_k: Conv2d,
    to_v: Conv2d,
    to_out: Conv2d,
    heads: usize,
}

impl Attention {
    /// `others`: channels of what is attended to.
    fn build(mut scope: Scope, [width, others]: [usize; 2], heads: usize) -> Result<Self> {
        Ok(Attention {
            to_q: scope.projection("to_q", [width, width], false)?,
            to_k: scope.projection("to_k", [others, width], false)?,
            to_v: scope.projection("to_v", [others, width], false)?,
            to_out: scope.pointwise("to_out.0", [width, width], false)?,
            heads,
        })
    }

    fn forward<B: Backend>(&self, b: &B, x: &B::Value, to: &B::Value) -> Result<B::Value> {
        let (q, k, v) = (b.conv2d(x, &self.to_q)?, b.conv2d(to, &self.to_k)?, b.conv2d(to, &self.to_v)?);
        b.conv2d(&b.attention(&q, &k, &v, self.heads)?, &self.to_out)
    }
}
