//! What a pass of a network costs, counted on shapes alone: the arithmetic, and the values that a backward pass needs.

use crate::backend::{Activation, Backend, Block};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear};
use crate::unet::ClassEmbedding;
use crate::{Result, UNet};
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
    /// Of these, the ones that [`crate::Recompute`] keeps: what lies between the blocks.
    pub between: usize,
    /// The inside of the largest block, which it computes again.
    pub largest_block: usize,
}

/// Of a network for pictures `(C, H, W)`.
pub fn cost(unet: &UNet, [c, h, w]: [usize; 3]) -> Result<Cost> {
    let counter = Counter::default();
    let label = match unet.config().class_embedding() {
        ClassEmbedding::None => None,
        ClassEmbedding::Identity => Some(vec![1, unet.config().time_dim()]),
        ClassEmbedding::Table(_) | ClassEmbedding::Timestep => Some(vec![1]),
    };
    unet.forward(&counter, &vec![1, c, h, w], &[1.0], label.as_ref())?;
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

    /// A result like `x`.
    fn like(&self, x: &[usize]) -> Result<Vec<usize>> {
        self.gives(x.to_vec(), 0)
    }
}

impl Backend for Counter {
    /// The shape.
    type Value = Vec<usize>;

    fn block(&self, block: &impl Block, x: &Vec<usize>, emb: &Vec<usize>) -> Result<Vec<usize>> {
        let (activations, between) = (self.activations.get(), self.between.get());
        let y = block.forward(self, x, emb)?;
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
        let (output, kernel) = match layer.weight.dims() {
            [output, _, kernel, _] => (*output, *kernel),
            other => (other[0], 1),
        };
        let side = |n: usize| (n + 2 * layer.padding - kernel) / layer.stride + 1;
        let dims = vec![x[0], output, side(x[2]), side(x[3])];
        let flops = 2 * dims.iter().product::<usize>() * x[1] * kernel * kernel;
        self.gives(dims, flops)
    }

    fn conv2d_add_per_channel(&self, x: &Vec<usize>, layer: &Conv2d, _: &Vec<usize>) -> Result<Vec<usize>> {
        self.conv2d(x, layer)
    }

    fn linear(&self, x: &Vec<usize>, layer: &Linear) -> Result<Vec<usize>> {
        let dims = vec![x[0], layer.weight.dims()[0]];
        let flops = 2 * x[0] * layer.weight.elem_count();
        self.gives(dims, flops)
    }

    fn group_norm(&self, x: &Vec<usize>, _: &GroupNorm, act: Option<Activation>) -> Result<Vec<usize>> {
        let normal = self.like(x)?;
        // SiLU is part of the norm; other activations keep a result of their own.
        if matches!(act, None | Some(Activation::Silu)) { Ok(normal) } else { self.like(x) }
    }

    fn activation(&self, x: &Vec<usize>, _: Activation) -> Result<Vec<usize>> {
        self.like(x)
    }

    fn embedding(&self, ids: &Vec<usize>, layer: &Embedding) -> Result<Vec<usize>> {
        self.gives(vec![ids[0], layer.weight.dims()[1]], 0)
    }

    fn sinusoid(&self, ids: &Vec<usize>, frequencies: &Tensor, _: bool) -> Result<Vec<usize>> {
        self.gives(vec![ids[0], 2 * frequencies.elem_count()], 0)
    }

    fn attention(&self, q: &Vec<usize>, _: &Vec<usize>, _: &Vec<usize>, _: usize) -> Result<Vec<usize>> {
        let pixels = q[2] * q[3];
        self.gives(q.clone(), 4 * q[0] * q[1] * pixels * pixels)
    }

    fn add(&self, x: &Vec<usize>, _: &Vec<usize>) -> Result<Vec<usize>> {
        self.like(x)
    }

    fn add_per_channel(&self, x: &Vec<usize>, _: &Vec<usize>) -> Result<Vec<usize>> {
        self.like(x)
    }

    fn modulate(&self, x: &Vec<usize>, _: &Vec<usize>, _: &Vec<usize>) -> Result<Vec<usize>> {
        self.like(x)?;
        self.like(x)
    }

    fn columns(&self, x: &Vec<usize>, _: usize, len: usize) -> Result<Vec<usize>> {
        Ok(vec![x[0], len])
    }

    fn affine(&self, x: &Vec<usize>, _: &[f64], _: f64) -> Result<Vec<usize>> {
        self.like(x)
    }

    fn concat(&self, x: &Vec<usize>, y: &Vec<usize>) -> Result<Vec<usize>> {
        self.gives(vec![x[0], x[1] + y[1], x[2], x[3]], 0)
    }

    fn upsample_2x(&self, x: &Vec<usize>) -> Result<Vec<usize>> {
        self.gives(vec![x[0], x[1], 2 * x[2], 2 * x[3]], 0)
    }

    fn avg_pool_2x(&self, x: &Vec<usize>) -> Result<Vec<usize>> {
        self.gives(vec![x[0], x[1], x[2] / 2, x[3] / 2], 0)
    }

    fn pad_right_bottom(&self, x: &Vec<usize>) -> Result<Vec<usize>> {
        self.gives(vec![x[0], x[1], x[2] + 1, x[3] + 1], 0)
    }
}
