//! A network is written once, over [`Backend`], and interpreted by whoever implements it: those of
//! [`interpret`](crate::interpret) run it or count what it costs, the exporter's `Trace` turns it into a graph. Operations
//! stay at the level of the field (convolution, group norm, attention), so that each can spell them as suits it.

use crate::Result;
use crate::condition::Condition;
use crate::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use crate::networks::{Architecture, Want};
use crate::ops::{Mask, Patches, Rotary, TokenAt};
use candle_core::Tensor;

/// Pointwise non-linearities of diffusers' `act_fn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// x·sigmoid(x), also called swish.
    #[serde(alias = "swish")]
    Silu,
    /// x·tanh(softplus(x)).
    Mish,
    /// x·Φ(x), with the exact error function.
    Gelu,
    /// x·½(1 + tanh(√(2/π)·(x + 0.044715·x³))).
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new", alias = "gelu-approximate")]
    GeluTanh,
    /// x·sigmoid(1.702·x).
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// tanh(x), which no `act_fn` names.
    #[serde(skip)]
    Tanh,
}

/// An axis along which maps are cut and joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// C of `(B, C, H, W)`.
    Channels,
    /// H of it.
    Rows,
    /// W of it: the tokens of `(B, C, 1, N)`.
    Tokens,
}

impl Axis {
    /// Its place in the shape of a map.
    pub fn of_map(self) -> usize {
        match self {
            Axis::Channels => 1,
            Axis::Rows => 2,
            Axis::Tokens => 3,
        }
    }
}

/// The operations of the networks here. Tokens are maps too, `(B, C, 1, N)`, or `(B, C, H, W)` while they are the places of a
/// picture: a linear layer of tokens is then a 1×1 convolution, and every operation of maps takes them. `Value` is what flows between them: shapes below are those of the values.
/// Parameters come in as layers, which carry the name that a graph node should get.
pub trait Backend {
    /// A tensor, or whatever stands for one.
    type Value: Clone;

    /// A run of a whole network. A backend may take it as one operation.
    fn network(
        &self,
        network: &impl Architecture,
        x: &Self::Value,
        t: &[f64],
        cond: &Condition<Self::Value>,
        want: Want,
    ) -> Result<Vec<Self::Value>>
    where
        Self: Sized,
    {
        network.run(self, x, t, cond, want)
    }

    /// A block of the network. A backend may take it as one operation.
    fn block(&self, block: &impl Block, x: &Self::Value, beside: &[&Self::Value]) -> Result<Self::Value>
    where
        Self: Sized,
    {
        block.forward(self, x, beside)
    }

    /// Brings in a tensor that does not depend on the network's input.
    fn constant(&self, tensor: &Tensor) -> Result<Self::Value>;

    /// Shape of a value.
    fn dims(&self, x: &Self::Value) -> Vec<usize>;

    /// `(B, C, H, W)` to `(B, O, H', W')`, zero padding.
    fn conv2d(&self, x: &Self::Value, layer: &Conv2d) -> Result<Self::Value>;

    /// `(B, C, H, W)` to `(B, O, H', W')`, each pixel adding to those around its place.
    fn conv_transpose2d(&self, x: &Self::Value, layer: &ConvTranspose2d) -> Result<Self::Value>;

    /// `(B, C)` to `(B, O)`.
    fn linear(&self, x: &Self::Value, layer: &Linear) -> Result<Self::Value>;

    /// Group norm of `(B, C, H, W)`, biased variance, affine per channel, then the activation if there is one.
    fn group_norm(&self, x: &Self::Value, layer: &GroupNorm, act: Option<Activation>) -> Result<Self::Value>;

    /// Layer norm of each pixel of `(B, C, H, W)` over its channels.
    fn layer_norm(&self, x: &Self::Value, layer: &LayerNorm) -> Result<Self::Value>;

    /// RMS norm of each pixel of `(B, n·width, H, W)` over runs of channels as wide as the weight.
    fn rms_norm(&self, x: &Self::Value, layer: &RmsNorm) -> Result<Self::Value>;

    /// Pointwise, any shape.
    fn activation(&self, x: &Self::Value, act: Activation) -> Result<Self::Value>;

    /// The first half of the channels of `(B, 2C, H, W)` times `act` of the second: GEGLU, SwiGLU.
    fn gated(&self, x: &Self::Value, act: Activation) -> Result<Self::Value>;

    /// Integer ids `(B,)`, i64, to rows `(B, width)`; of tokens `(B, N)` to a map `(B, width, 1, N)`.
    fn embedding(&self, ids: &Self::Value, layer: &Embedding) -> Result<Self::Value>;

    /// The features of tokens `(B, N, C)`, as text encoders give them and conditions hold them, as a map `(B, C, 1, N)`.
    fn tokens(&self, states: &Self::Value) -> Result<Self::Value>;

    /// The same back: a map `(B, C, 1, N)` as `(B, N, C)`.
    fn states(&self, x: &Self::Value) -> Result<Self::Value>;

    /// Of the tokens of x `(B, C, 1, N)`, whose ids are `(B, N)`, one of each sample: `(B, C)`.
    fn token_at(&self, x: &Self::Value, ids: &Self::Value, at: TokenAt) -> Result<Self::Value>;

    /// Numbers `(B,)` to `(B, 2·F)`: sines and cosines of `number · frequencies` (`frequencies`: f32 `(F,)`), cosines first
    /// when `flip`; diffusers' `Timesteps` applied to class labels. Several a sample, `(B, n)`, to `(B, n·2·F)`, one after
    /// the other.
    fn sinusoid(&self, ids: &Self::Value, frequencies: &Tensor, flip: bool) -> Result<Self::Value>;

    /// [`Backend::masked_attention`] to every key.
    fn attention(&self, q: &Self::Value, k: &Self::Value, v: &Self::Value, heads: usize) -> Result<Self::Value> {
        self.masked_attention(q, k, v, heads, Mask::None)
    }

    /// Multi-head attention over pixels: q `(B, C, H, W)`, k and v `(B, C, H', W')` with C split into `heads` runs of
    /// channels, scores scaled by 1/√(C/heads), softmax over the keys that the mask shows. Returns `(B, C, H, W)`. A mask of
    /// padding has no gradient.
    fn masked_attention(
        &self,
        q: &Self::Value,
        k: &Self::Value,
        v: &Self::Value,
        heads: usize,
        mask: Mask<&Self::Value>,
    ) -> Result<Self::Value>;

    /// Turns pairs of the channels of `(B, C, H, W)` by an angle of each pixel.
    fn rotary(&self, x: &Self::Value, by: &Rotary) -> Result<Self::Value>;

    /// Sum of two values of one shape; `(1, C)` broadcasts against `(B, C)`.
    fn add(&self, x: &Self::Value, y: &Self::Value) -> Result<Self::Value>;

    /// Product of two values of one shape.
    fn mul(&self, x: &Self::Value, y: &Self::Value) -> Result<Self::Value>;

    /// x `(B, C, H, W)` times v `(B or 1, C)` at every pixel.
    fn mul_per_channel(&self, x: &Self::Value, v: &Self::Value) -> Result<Self::Value>;

    /// x `(B, C, H, W)` plus v `(B or 1, C)` at every pixel.
    fn add_per_channel(&self, x: &Self::Value, v: &Self::Value) -> Result<Self::Value>;

    /// [`Backend::conv2d`], then [`Backend::add_per_channel`]: how the time embedding enters a resnet.
    fn conv2d_add_per_channel(&self, x: &Self::Value, layer: &Conv2d, v: &Self::Value) -> Result<Self::Value> {
        self.add_per_channel(&self.conv2d(x, layer)?, v)
    }

    /// x·(1 + scale) + shift, x `(B, C, H, W)`, scale and shift `(B or 1, C)`.
    fn modulate(&self, x: &Self::Value, scale: &Self::Value, shift: &Self::Value) -> Result<Self::Value>;

    /// Columns `start .. start + len` of `(B, C)`.
    fn columns(&self, x: &Self::Value, start: usize, len: usize) -> Result<Self::Value>;

    /// x·mul + add with host numbers, one for the whole batch or one per sample (`mul.len()` is 1 or B).
    fn affine(&self, x: &Self::Value, mul: &[f64], add: f64) -> Result<Self::Value>;

    /// Joins `(B, C₁, H, W)` and `(B, C₂, H, W)` along channels.
    fn concat(&self, x: &Self::Value, y: &Self::Value) -> Result<Self::Value> {
        self.join(x, y, Axis::Channels)
    }

    /// Joins two maps along an axis, or two vectors `(B, C)` along their channels.
    fn join(&self, x: &Self::Value, y: &Self::Value, axis: Axis) -> Result<Self::Value>;

    /// Places `start .. start + len` along an axis of a map.
    fn slice(&self, x: &Self::Value, axis: Axis, start: usize, len: usize) -> Result<Self::Value>;

    /// The pixels of a map in other rows: `(B, C, H, W)` to `(B, C, h, w)`, `[1, H·W]` for tokens.
    fn grid(&self, x: &Self::Value, sides: [usize; 2]) -> Result<Self::Value>;

    /// Every pixel a patch: `(B, side²·C, H, W)` to `(B, C, side·H, side·W)`.
    fn shuffle(&self, x: &Self::Value, side: usize, patches: Patches) -> Result<Self::Value>;

    /// Every patch a pixel: `(B, C, side·H, side·W)` to `(B, side²·C, H, W)`.
    fn unshuffle(&self, x: &Self::Value, side: usize, patches: Patches) -> Result<Self::Value>;

    /// Nearest neighbour, height and width doubled.
    fn upsample_2x(&self, x: &Self::Value) -> Result<Self::Value>;

    /// Mean of 2×2 blocks, stride 2; a last odd row or column is dropped.
    fn avg_pool_2x(&self, x: &Self::Value) -> Result<Self::Value>;

    /// Zeros on the right and below, one row and one column (diffusers' `downsample_padding` 0).
    fn pad_right_bottom(&self, x: &Self::Value) -> Result<Self::Value>;
}

/// A part of a network with a large inside and one result: a resnet, or attention with what surrounds it.
pub trait Block: Clone + Send + Sync + 'static {
    /// x `(B, C, H, W)`, and what the block reads beside it (two values at most), to `(B, C', H', W')`.
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, beside: &[&B::Value]) -> Result<B::Value>;
}
