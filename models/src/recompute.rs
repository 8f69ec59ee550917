//! Gradient checkpointing: a backend that keeps only the inputs of the network's blocks and computes what is within them
//! again when their gradient is wanted (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). One forward
//! pass more, for the memory of one block at a time.

use crate::backend::{Activation, Backend, Block, Eager, Network};
use crate::layers::{Conv2d, Embedding, GroupNorm, Linear};
use crate::tape::{self, Leaves};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor, Var};
use std::sync::{Arc, Mutex, PoisonError};

/// What networks are trained on: [`Eager`], with or without checkpointing, and on a GPU a [`Tape`](crate::tape::Tape).
/// [`Recompute::backward`] takes the place of `Tensor::backward`.
#[derive(Clone, Default)]
pub struct Recompute {
    on: bool,
    /// A tape on the CPU too.
    on_tape: bool,
    /// Gradients of weights within blocks, which are no part of the graph outside.
    within: Within,
    /// The same of whole passes on a tape.
    leaves: Leaves,
}

type Within = Arc<Mutex<Option<GradStore>>>;

impl Recompute {
    /// Recomputes if `on`; otherwise the same as [`Eager`].
    pub fn new(on: bool) -> Self {
        Recompute { on, ..Recompute::default() }
    }

    /// Runs on a tape whatever the device: slower than [`Eager`] on the CPU, and the same numbers. The tests compare.
    pub fn on_tape(on: bool) -> Self {
        Recompute { on, on_tape: true, ..Recompute::default() }
    }

    /// The gradients of a scalar that this backend computed.
    pub fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        let mut grads = loss.backward()?;
        if let Some(within) = take(&self.within) {
            grads.extend(within)?;
        }
        for (id, grad) in std::mem::take(&mut *self.leaves.lock().unwrap_or_else(PoisonError::into_inner)) {
            let sum = match grads.get_id(id) {
                Some(before) => (before + grad)?,
                None => grad,
            };
            grads.insert_id(id, sum);
        }
        Ok(grads)
    }
}

fn take(within: &Within) -> Option<GradStore> {
    within.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// One block as a single node of the graph.
struct Checkpoint<T> {
    block: T,
    /// The result, computed before the node is made, which then has a copy.
    y: Mutex<Option<Tensor>>,
    within: Within,
}

impl<T> Checkpoint<T> {
    fn take(&self) -> candle_core::Result<Tensor> {
        let y = self.y.lock().unwrap_or_else(PoisonError::into_inner).take();
        y.ok_or_else(|| candle_core::Error::Msg("checkpoint: run twice".into()))
    }
}

/// A scalar that stands for Σ y·grad without computing it: its gradient is `grad`. (A product would have a gradient for
/// `grad` too, as large as the result of the block, and it would be kept.)
struct Upstream(Tensor);

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        // Any value would do; the result's own copy is at hand.
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

impl<T: Block> CustomOp2 for Checkpoint<T> {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        tape::cpu_values(&self.take()?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        tape::cuda_values(&self.take()?)
    }

    fn bwd(
        &self,
        x: &Tensor,
        emb: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, emb) = (Var::from_tensor(&x.detach())?, Var::from_tensor(&emb.detach())?);
        let y = self.block.forward(&Eager, &x, &emb);
        let y = y.map_err(|error| candle_core::Error::Msg(error.to_string()));
        let mut grads = y?.apply_op1(Upstream(grad.clone()))?.backward()?;
        let (dx, demb) = (grads.remove(&x), grads.remove(&emb));
        let mut within = self.within.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *within {
            Some(within) => within.extend(grads)?,
            none => *none = Some(grads),
        }
        Ok((dx, demb))
    }
}

/// Hands an operation to [`Eager`] as it is.
macro_rules! as_eager {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $output:ty;)*) => {
        $(fn $name(&self, $($arg: $type),*) -> $output {
            Eager.$name($($arg),*)
        })*
    };
}

impl Backend for Recompute {
    type Value = Tensor;

    fn network(&self, network: &impl Network, x: &Tensor, label: Option<&Tensor>) -> Result<Vec<Tensor>> {
        match self.on_tape || x.device().is_cuda() {
            true => tape::pass(network, x, label, Some(&self.leaves), self.on),
            false => network.run(self, x, label),
        }
    }

    fn block(&self, block: &impl Block, x: &Tensor, emb: &Tensor) -> Result<Tensor> {
        if !self.on || !(x.track_op() || emb.track_op()) {
            return block.forward(&Eager, x, emb);
        }
        // The graph of this pass goes with it; only the numbers stay.
        let y = block.forward(&Eager, &x.detach(), &emb.detach())?.detach();
        let op = Checkpoint { block: block.clone(), y: Mutex::new(Some(y)), within: self.within.clone() };
        x.apply_op2(emb, op).map_err(Error::from)
    }

    as_eager! {
        fn constant(tensor: &Tensor) -> Result<Tensor>;
        fn conv2d(x: &Tensor, layer: &Conv2d) -> Result<Tensor>;
        fn conv2d_add_per_channel(x: &Tensor, layer: &Conv2d, v: &Tensor) -> Result<Tensor>;
        fn linear(x: &Tensor, layer: &Linear) -> Result<Tensor>;
        fn group_norm(x: &Tensor, layer: &GroupNorm, act: Option<Activation>) -> Result<Tensor>;
        fn activation(x: &Tensor, act: Activation) -> Result<Tensor>;
        fn embedding(ids: &Tensor, layer: &Embedding) -> Result<Tensor>;
        fn sinusoid(ids: &Tensor, frequencies: &Tensor, flip: bool) -> Result<Tensor>;
        fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor>;
        fn add(x: &Tensor, y: &Tensor) -> Result<Tensor>;
        fn add_per_channel(x: &Tensor, v: &Tensor) -> Result<Tensor>;
        fn modulate(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor>;
        fn columns(x: &Tensor, start: usize, len: usize) -> Result<Tensor>;
        fn affine(x: &Tensor, mul: &[f64], add: f64) -> Result<Tensor>;
        fn concat(x: &Tensor, y: &Tensor) -> Result<Tensor>;
        fn upsample_2x(x: &Tensor) -> Result<Tensor>;
        fn avg_pool_2x(x: &Tensor) -> Result<Tensor>;
        fn pad_right_bottom(x: &Tensor) -> Result<Tensor>;
    }

    fn dims(&self, x: &Tensor) -> Vec<usize> {
        x.dims().to_vec()
    }
}
