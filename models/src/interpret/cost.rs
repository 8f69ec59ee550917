//! What a pass of a network costs, counted on shapes alone: the arithmetic, and the values that a backward pass needs.

use crate::backend::{Activation, Backend, Block};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear};
use crate::networks::Network;
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

#[derive(Default)]
struct Counter {
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

    fn sinusoid(&self, ids: &Vec<usize>, frequencies: &Tensor, _: bool) -> Result<Vec<usize>> {
        self.shaped(shapes::sinusoid(ids, frequencies.elem_count()))
    }

    fn attention(&self, q: &Vec<usize>, k: &Vec<usize>, v: &Vec<usize>, heads: usize) -> Result<Vec<usize>> {
        let dims = shapes::attention(q, k, v, heads).map_err(Error::Unsupported)?;
        let flops = 4 * q.iter().product::<usize>() * k[2] * k[3];
        self.gives(dims, flops)
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

    fn concat(&self, x: &Vec<usize>, y: &Vec<usize>) -> Result<Vec<usize>> {
        self.shaped(shapes::concat(x, y))
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
