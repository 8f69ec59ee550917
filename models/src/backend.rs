//! A network is written once, over [`Backend`], and interpreted by whoever implements it: those of
//! [`interpret`](crate::interpret) run it or count what it costs, the exporter's `Trace` turns it into a graph. Operations
//! stay at the level of the field (convolution, group norm, attention), so that each can spell them as suits it.

use crate::Result;
use crate::condition::Condition;
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear};
use crate::networks::{Architecture, Want};
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
    /// max(x, 0).
    Relu,
}

/// The operations of the networks here. `Value` is what flows between them: shapes below are those of the values.
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

    /// `(B, C)` to `(B, O)`.
    fn linear(&self, x: &Self::Value, layer: &Linear) -> Result<Self::Value>;

    /// Group norm of `(B, C, H, W)`, biased variance, affine per channel, then the activation if there is one.
    fn group_norm(&self, x: &Self::Value, layer: &GroupNorm, act: Option<Activation>) -> Result<Self::Value>;

    /// Pointwise, any shape.
    fn activation(&self, x: &Self::Value, act: Activation) -> Result<Self::Value>;

    /// Integer ids `(B,)`, i64, to rows `(B, width)`.
    fn embedding(&self, ids: &Self::Value, layer: &Embedding) -> Result<Self::Value>;

    /// Ids `(B,)` to `(B, 2·F)`: sines and cosines of `id · frequencies` (`frequencies`: f32 `(F,)`), cosines first
    /// when `flip`; diffusers' `Timesteps` applied to class labels.
    fn sinusoid(&self, ids: &Self::Value, frequencies: &Tensor, flip: bool) -> Result<Self::Value>;

    /// Multi-head attention over pixels: q, k, v `(B, C, H, W)` with C split into `heads` runs of channels,
    /// scores scaled by 1/√(C/heads), softmax over keys. Returns `(B, C, H, W)`.
    fn attention(&self, q: &Self::Value, k: &Self::Value, v: &Self::Value, heads: usize) -> Result<Self::Value>;

    /// Sum of two values of one shape; `(1, C)` broadcasts against `(B, C)`.
    fn add(&self, x: &Self::Value, y: &Self::Value) -> Result<Self::Value>;

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
    fn concat(&self, x: &Self::Value, y: &Self::Value) -> Result<Self::Value>;

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
