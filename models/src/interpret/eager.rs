//! Every operation at once, on candle tensors.

use super::tape;
use crate::backend::{Activation, Axis, Backend};
use crate::condition::Condition;
use crate::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use crate::networks::{Architecture, Want};
use crate::ops::{Mask, Patches, Rotary, TokenAt};
use crate::{Precision, Result, ops};
use candle_core::Tensor;

/// Runs every operation at once on candle tensors; gradients flow wherever candle tracks them. On a GPU, a network whose
/// weights need none runs on a [`Tape`](super::Tape) in f32.
#[derive(Clone, Copy, Debug, Default)]
pub struct Eager;

impl Backend for Eager {
    type Value = Tensor;

    fn network(
        &self,
        network: &impl Architecture,
        x: &Tensor,
        t: &[f64],
        cond: &Condition<Tensor>,
        want: Want,
    ) -> Result<Vec<Tensor>> {
        let settings =
            tape::Settings { precision: Precision::F32, checkpoint: false, anywhere: false, gradients: None };
        match tape::pass(network, x, t, cond, want, settings)? {
            Some(maps) => Ok(maps),
            None => network.run(self, x, t, cond, want),
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

    fn conv_transpose2d(&self, x: &Tensor, layer: &ConvTranspose2d) -> Result<Tensor> {
        Ok(ops::conv_transpose2d(x, &layer.weight, layer.bias.as_ref(), layer.stride, layer.pads()?)?)
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
        Ok(ops::activation(x, act)?)
    }

    fn embedding(&self, ids: &Tensor, layer: &Embedding) -> Result<Tensor> {
        Ok(ops::embedding(&layer.weight, ids)?)
    }

    fn tokens(&self, states: &Tensor) -> Result<Tensor> {
        Ok(ops::tokens(states)?)
    }

    fn states(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::states(x)?)
    }

    fn token_at(&self, x: &Tensor, ids: &Tensor, at: TokenAt) -> Result<Tensor> {
        Ok(ops::token_at(x, ids, at)?)
    }

    fn sinusoid(&self, ids: &Tensor, frequencies: &Tensor, flip: bool) -> Result<Tensor> {
        Ok(ops::sinusoid(ids, frequencies, flip)?)
    }

    fn layer_norm(&self, x: &Tensor, layer: &LayerNorm) -> Result<Tensor> {
        let affine = layer.affine.as_ref().map(|[scale, shift]| [scale, shift]);
        Ok(ops::layer_norm(x, affine, layer.eps)?)
    }

    fn rms_norm(&self, x: &Tensor, layer: &RmsNorm) -> Result<Tensor> {
        Ok(ops::rms_norm(x, &layer.weight, layer.eps)?)
    }

    fn gated(&self, x: &Tensor, act: Activation) -> Result<Tensor> {
        Ok(ops::gated(x, act)?)
    }

    fn masked_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: usize,
        mask: Mask<&Tensor>,
    ) -> Result<Tensor> {
        Ok(ops::attention(q, k, v, heads, mask)?)
    }

    fn rotary(&self, x: &Tensor, by: &Rotary) -> Result<Tensor> {
        Ok(ops::rotary(x, by)?)
    }

    fn mul(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok((x * y)?)
    }

    fn mul_per_channel(&self, x: &Tensor, v: &Tensor) -> Result<Tensor> {
        Ok(ops::mul_per_channel(x, v)?)
    }

    fn slice(&self, x: &Tensor, axis: Axis, start: usize, len: usize) -> Result<Tensor> {
        Ok(x.narrow(axis.of_map(), start, len)?.contiguous()?)
    }

    fn grid(&self, x: &Tensor, sides: [usize; 2]) -> Result<Tensor> {
        Ok(ops::grid(x, sides)?)
    }

    fn shuffle(&self, x: &Tensor, side: usize, patches: Patches) -> Result<Tensor> {
        Ok(ops::shuffle(x, side, patches)?)
    }

    fn unshuffle(&self, x: &Tensor, side: usize, patches: Patches) -> Result<Tensor> {
        Ok(ops::unshuffle(x, side, patches)?)
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(ops::add(x, y)?)
    }

    fn add_per_channel(&self, x: &Tensor, v: &Tensor) -> Result<Tensor> {
        Ok(ops::add_per_channel(x, v)?)
    }

    fn modulate(&self, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
        Ok(ops::modulate(x, scale, shift)?)
    }

    fn columns(&self, x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
        Ok(x.narrow(1, start, len)?)
    }

    fn affine(&self, x: &Tensor, mul: &[f64], add: f64) -> Result<Tensor> {
        Ok(ops::affine(x, mul, add)?)
    }

    fn join(&self, x: &Tensor, y: &Tensor, axis: Axis) -> Result<Tensor> {
        Ok(ops::concat(x, y, axis.of_map())?)
    }

    fn upsample_2x(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::upsample_2x(x)?)
    }

    fn avg_pool_2x(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::avg_pool_2x(x)?)
    }

    fn pad_right_bottom(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::pad_right_bottom(x)?)
    }
}

/// The weight with four axes; a linear map over channels is a 1×1 convolution.
fn kernel(layer: &Conv2d) -> Result<Tensor> {
    Ok(match layer.weight.dims() {
        [output, input] => layer.weight.reshape((*output, *input, 1, 1))?,
        _ => layer.weight.clone(),
    })
}
