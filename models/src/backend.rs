//! A network is written once, over [`Backend`], and interpreted by whoever implements it: [`Eager`] runs it on candle
//! tensors, with gradients; the exporter's `Trace` turns it into a graph. Operations stay at the level of the field
//! (convolution, group norm, attention), so that each interpreter can spell them as suits it.

use crate::layers::{Conv2d, Embedding, GroupNorm, Linear};
use crate::tape::{self, Precision};
use crate::{Result, ops};
use candle_core::{DType, Tensor};

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

    /// A whole network. A backend may take it as one operation.
    fn network(&self, network: &impl Network, x: &Self::Value, label: Option<&Self::Value>) -> Result<Vec<Self::Value>>
    where
        Self: Sized,
    {
        network.run(self, x, label)
    }

    /// A block of the network. A backend may take it as one operation.
    fn block(&self, block: &impl Block, x: &Self::Value, emb: &Self::Value) -> Result<Self::Value>
    where
        Self: Sized,
    {
        block.forward(self, x, emb)
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

/// One run of a network, from a picture and perhaps a label to one map or several.
pub trait Network {
    /// What it computes in where a backend has the choice.
    fn precision(&self) -> Precision;

    /// Whether its weights are variables, so that gradients may reach them.
    fn trainable(&self) -> bool;

    /// Runs it. x `(B, C, H, W)`; label as in [`UNet::forward`](crate::UNet::forward).
    fn run<B: Backend>(&self, b: &B, x: &B::Value, label: Option<&B::Value>) -> Result<Vec<B::Value>>;
}

/// A part of a network with a large inside and one result: a resnet, or attention with what surrounds it.
pub trait Block: Clone + Send + Sync + 'static {
    /// x `(B, C, H, W)` and the embedding of time and class `(B or 1, width)`, which not every block reads, to
    /// `(B, C', H', W')`.
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, emb: &B::Value) -> Result<B::Value>;
}

/// Runs every operation at once on candle tensors; gradients flow wherever candle tracks them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Eager;

impl Backend for Eager {
    type Value = Tensor;

    fn network(&self, network: &impl Network, x: &Tensor, label: Option<&Tensor>) -> Result<Vec<Tensor>> {
        // Variables are left to candle, which is where their gradients are looked for.
        match x.device().is_cuda() && !network.trainable() {
            true => tape::pass(network, x, label, None, false),
            false => network.run(self, x, label),
        }
    }

    fn constant(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }

    fn dims(&self, x: &Tensor) -> Vec<usize> {
        x.dims().to_vec()
    }

    fn conv2d(&self, x: &Tensor, layer: &Conv2d) -> Result<Tensor> {
        Ok(ops::conv2d(x, &kernel(layer)?, layer.bias.as_ref(), layer.stride, layer.padding)?)
    }

    fn conv2d_add_per_channel(&self, x: &Tensor, layer: &Conv2d, v: &Tensor) -> Result<Tensor> {
        // A bias per sample, which costs nothing.
        let bias = match &layer.bias {
            Some(bias) => v.broadcast_add(bias)?,
            None => v.clone(),
        };
        Ok(ops::conv2d(x, &kernel(layer)?, Some(&bias), layer.stride, layer.padding)?)
    }

    fn linear(&self, x: &Tensor, layer: &Linear) -> Result<Tensor> {
        let y = x.matmul(&layer.weight.t()?)?;
        Ok(match &layer.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    fn group_norm(&self, x: &Tensor, layer: &GroupNorm, act: Option<Activation>) -> Result<Tensor> {
        let silu = act == Some(Activation::Silu);
        let y = ops::group_norm(x, &layer.weight, &layer.bias, layer.groups, layer.eps, silu)?;
        match act {
            Some(act) if !silu => self.activation(&y, act),
            _ => Ok(y),
        }
    }

    fn activation(&self, x: &Tensor, act: Activation) -> Result<Tensor> {
        Ok(match act {
            Activation::Silu => x.silu()?,
            Activation::Mish => (x * softplus(x)?.tanh()?)?,
            Activation::Gelu => x.gelu_erf()?,
            Activation::Relu => x.relu()?,
        })
    }

    fn embedding(&self, ids: &Tensor, layer: &Embedding) -> Result<Tensor> {
        Ok(layer.weight.index_select(ids, 0)?)
    }

    fn sinusoid(&self, ids: &Tensor, frequencies: &Tensor, flip: bool) -> Result<Tensor> {
        let ids = ids.to_dtype(DType::F32)?.unsqueeze(1)?;
        let angles = ids.broadcast_mul(&frequencies.to_device(ids.device())?.unsqueeze(0)?)?;
        let (sin, cos) = (angles.sin()?, angles.cos()?);
        Ok(if flip { Tensor::cat(&[cos, sin], 1)? } else { Tensor::cat(&[sin, cos], 1)? })
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
        Ok(ops::attention(q, k, v, heads)?)
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(if x.dims() == y.dims() { (x + y)? } else { x.broadcast_add(y)? })
    }

    fn add_per_channel(&self, x: &Tensor, v: &Tensor) -> Result<Tensor> {
        Ok(x.broadcast_add(&v.unsqueeze(2)?.unsqueeze(3)?)?)
    }

    fn modulate(&self, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
        let per_channel = |v: &Tensor| v.unsqueeze(2)?.unsqueeze(3);
        Ok(x.broadcast_mul(&(per_channel(scale)? + 1.0)?)?.broadcast_add(&per_channel(shift)?)?)
    }

    fn columns(&self, x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
        Ok(x.narrow(1, start, len)?)
    }

    fn affine(&self, x: &Tensor, mul: &[f64], add: f64) -> Result<Tensor> {
        if mul.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(x.affine(mul[0], add)?);
        }
        let mut shape = vec![1; x.rank()];
        shape[0] = mul.len();
        let mul: Vec<f32> = mul.iter().map(|&m| m as f32).collect();
        let scaled = x.broadcast_mul(&Tensor::from_vec(mul, shape, x.device())?.to_dtype(x.dtype())?)?;
        Ok(if add == 0.0 { scaled } else { (scaled + add)? })
    }

    fn concat(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(ops::concat(x, y)?)
    }

    fn upsample_2x(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::upsample_2x(x)?)
    }

    fn avg_pool_2x(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::avg_pool_2x(x)?)
    }

    fn pad_right_bottom(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?)
    }
}

/// The weight with four axes; a linear map over channels is a 1×1 convolution.
fn kernel(layer: &Conv2d) -> Result<Tensor> {
    Ok(match layer.weight.dims() {
        [output, input] => layer.weight.reshape((*output, *input, 1, 1))?,
        _ => layer.weight.clone(),
    })
}

/// log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|): no overflow at either end.
fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok((x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?)
}
