//! What a pass of a network costs, counted on shapes alone: the arithmetic, and the values that a backward pass needs.

use crate::backend::{Activation, Axis, Backend, Block};
use crate::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use crate::networks::Network;
use crate::ops::{Mask, Patches, Rotary, TokenAt};
use crate::shapes::{self, Rule};
use crate::{Error, Result};
use candle_core::Tensor;
use std::cell::Cell;

/// Cost of one pass for one picture.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiplications and additions of convolutions, linear maps and attention, each counted as one; a backward pass
    /// takes twice as many.
    pub flops: f64,
    /// Values of all intermediate results, which a backward pass finds in memory.
    pub activations: usize,
    /// Of these, the ones that checkpointing keeps: what lies between the blocks.
    pub between: usize,
    /// The inside of the largest block, which it computes again.
    pub largest_block: usize,
}

/// Of a network for samples `(C, H, W)`.
pub fn cost(network: &Network, [c, h, w]: [usize; 3]) -> Result<Cost> {
    let counter = Counter::default();
    let cond = network.takes().told.try_map(|told| Ok::<_, Error>(told.batch(1)))?;
    network.forward(&counter, &vec![1, c, h, w], &[1.0], &cond)?;
    let Counter { flops, activations, between, largest_block } = counter;
    Ok(Cost {
        flops: flops.get(),
        activations: activations.get(),
        between: between.get(),
        largest_block: largest_block.get(),
    })
}

/// The backend that knows shapes alone, and counts what passes through it.
#[derive(Debug, Default)]
pub struct Counter {
    flops: Cell<f64>,
    activations: Cell<usize>,
    /// Of the activations, those outside of blocks, with the blocks' results.
    between: Cell<usize>,
    largest_block: Cell<usize>,
}

impl Counter {
    fn gives(&self, dims: Vec<usize>, flops: usize) -> Result<Vec<usize>> {
        self.flops.set(self.flops.get() + flops as f64);
        let size = dims.iter().product::<usize>();
        self.activations.set(self.activations.get() + size);
        self.between.set(self.between.get() + size);
        Ok(dims)
    }

    /// A result of this shape, without arithmetic.
    fn shaped(&self, rule: Rule) -> Result<Vec<usize>> {
        self.gives(rule.map_err(Error::Unsupported)?, 0)
    }
}

impl Backend for Counter {
    /// The shape.
    type Value = Vec<usize>;

    fn block(&self, block: &impl Block, x: &Vec<usize>, beside: &[&Vec<usize>]) -> Result<Vec<usize>> {
        let (activations, between) = (self.activations.get(), self.between.get());
        let y = block.forward(self, x, beside)?;
        let inside = self.activations.get() - activations;
        self.largest_block.set(self.largest_block.get().max(inside));
        self.between.set(between + y.iter().product::<usize>());
        Ok(y)
    }

    fn constant(&self, tensor: &Tensor) -> Result<Vec<usize>> {
        Ok(tensor.dims().to_vec())
    }

    fn dims(&self, x: &Vec<usize>) -> Vec<usize> {
        x.clone()
    }

    fn conv2d(&self, x: &Vec<usize>, layer: &Conv2d) -> Result<Vec<usize>> {
        let dims =
            shapes::conv2d(x, layer.weight.dims(), layer.stride, [layer.padding; 4]).map_err(refused(&layer.name))?;
        let flops = 2 * dims.iter().product::<usize>() * layer.weight.elem_count() / dims[1].max(1);
        self.gives(dims, flops)
    }

    fn conv2d_add_per_channel(&self, x: &Vec<usize>, layer: &Conv2d, v: &Vec<usize>) -> Result<Vec<usize>> {
        let y = self.conv2d(x, layer)?;
        shapes::per_channel(&y, v).map_err(refused(&layer.name))
    }

    fn conv_transpose2d(&self, x: &Vec<usize>, layer: &ConvTranspose2d) -> Result<Vec<usize>> {
        let dims = shapes::conv_transpose2d(x, layer.weight.dims(), layer.stride, layer.pads()?);
        let flops = 2 * x.iter().product::<usize>() * layer.weight.elem_count() / x.get(1).copied().unwrap_or(1).max(1);
        self.gives(dims.map_err(refused(&layer.name))?, flops)
    }

    fn linear(&self, x: &Vec<usize>, layer: &Linear) -> Result<Vec<usize>> {
        let dims = shapes::linear(x, layer.weight.dims()).map_err(refused(&layer.name))?;
        self.gives(dims, 2 * x[0] * layer.weight.elem_count())
    }

    fn group_norm(&self, x: &Vec<usize>, layer: &GroupNorm, act: Option<Activation>) -> Result<Vec<usize>> {
        let normal = self.shaped(shapes::group_norm(x, layer.groups))?;
        // SiLU is part of the norm; other activations keep a result of their own.
        if matches!(act, None | Some(Activation::Silu)) { Ok(normal) } else { self.shaped(Ok(normal)) }
    }

    fn activation(&self, x: &Vec<usize>, _: Activation) -> Result<Vec<usize>> {
        self.shaped(Ok(x.clone()))
    }

    fn embedding(&self, ids: &Vec<usize>, layer: &Embedding) -> Result<Vec<usize>> {
        self.shaped(shapes::embedding(ids, layer.weight.dims()))
    }

    fn tokens(&self, states: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::tokens(states))
    }

    fn states(&self, x: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::states(x))
    }

    fn token_at(&self, x: &Vec<usize>, ids: &Vec<usize>, _: TokenAt) -> Result<Vec<usize>> {
        self.shaped(shapes::token_at(x, ids))
    }

    fn sinusoid(&self, ids: &Vec<usize>, frequencies: &Tensor, _: bool) -> Result<Vec<usize>> {
        self.shaped(shapes::sinusoid(ids, frequencies.elem_count()))
    }

    fn layer_norm(&self, x: &Vec<usize>, layer: &LayerNorm) -> Result<Vec<usize>> {
        let channels = layer.affine.as_ref().map_or(x.get(1).copied().unwrap_or(0), |[scale, _]| scale.elem_count());
        self.shaped(shapes::layer_norm(x, channels))
    }

    fn rms_norm(&self, x: &Vec<usize>, layer: &RmsNorm) -> Result<Vec<usize>> {
        self.shaped(shapes::norm(x, layer.weight.elem_count()))
    }

    fn gated(&self, x: &Vec<usize>, _: Activation) -> Result<Vec<usize>> {
        self.shaped(shapes::gated(x))
    }

    fn masked_attention(
        &self,
        q: &Vec<usize>,
        k: &Vec<usize>,
        v: &Vec<usize>,
        heads: usize,
        mask: Mask<&Vec<usize>>,
    ) -> Result<Vec<usize>> {
        let dims = shapes::attention(q, k, v, heads, mask.map(Vec::as_slice)).map_err(Error::Unsupported)?;
        let flops = 4 * q.iter().product::<usize>() * k[2] * k[3];
        self.gives(dims, flops)
    }

    fn rotary(&self, x: &Vec<usize>, by: &Rotary) -> Result<Vec<usize>> {
        self.shaped(shapes::rotary(x, by.cos.dims()))
    }

    fn mul(&self, x: &Vec<usize>, y: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::mul(x, y))
    }

    fn mul_per_channel(&self, x: &Vec<usize>, v: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::per_channel(x, v))
    }

    fn slice(&self, x: &Vec<usize>, axis: Axis, start: usize, len: usize) -> Result<Vec<usize>> {
        self.shaped(shapes::slice(x, axis.of_map(), start, len))
    }

    fn grid(&self, x: &Vec<usize>, sides: [usize; 2]) -> Result<Vec<usize>> {
        shapes::grid(x, sides).map_err(Error::Unsupported)
    }

    fn shuffle(&self, x: &Vec<usize>, side: usize, _: Patches) -> Result<Vec<usize>> {
        self.shaped(shapes::shuffle(x, side))
    }

    fn unshuffle(&self, x: &Vec<usize>, side: usize, _: Patches) -> Result<Vec<usize>> {
        self.shaped(shapes::unshuffle(x, side))
    }

    fn add(&self, x: &Vec<usize>, y: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::add(x, y))
    }

    fn add_per_channel(&self, x: &Vec<usize>, v: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::per_channel(x, v))
    }

    fn modulate(&self, x: &Vec<usize>, scale: &Vec<usize>, shift: &Vec<usize>) -> Result<Vec<usize>> {
        let scaled = self.shaped(shapes::per_channel(x, scale))?;
        self.shaped(shapes::per_channel(&scaled, shift))
    }

    fn columns(&self, x: &Vec<usize>, start: usize, len: usize) -> Result<Vec<usize>> {
        shapes::columns(x, start, len).map_err(Error::Unsupported)
    }

    fn affine(&self, x: &Vec<usize>, _: &[f64], _: f64) -> Result<Vec<usize>> {
        self.shaped(Ok(x.clone()))
    }

    fn join(&self, x: &Vec<usize>, y: &Vec<usize>, axis: Axis) -> Result<Vec<usize>> {
        self.shaped(shapes::concat(x, y, axis.of_map()))
    }

    fn upsample_2x(&self, x: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::upsample_2x(x))
    }

    fn avg_pool_2x(&self, x: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::avg_pool_2x(x))
    }

    fn pad_right_bottom(&self, x: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::pad_right_bottom(x))
    }
}

/// Names the layer.
fn refused(layer: &str) -> impl Fn(String) -> Error {
    move |message| Error::Unsupported(format!("{layer}: {message}"))
}
