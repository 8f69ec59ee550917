//! What networks are trained on, whatever the device.

use super::checkpoint::{Replay, checkpoint};
use super::eager::Eager;
use super::node::{Upstream, WeightGradients, node};
use super::tape::{self, Precision};
use crate::Result;
use crate::backend::{Activation, Axis, Backend, Block};
use crate::condition::Condition;
use crate::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use crate::networks::{Architecture, Want};
use crate::ops::{Mask, Patches, Rotary, TokenAt};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

/// [`Eager`], with or without checkpointing; on a GPU a [`Tape`](super::Tape) in the precision asked for.
/// [`Training::backward`] takes the place of `Tensor::backward`. Where nothing wants a gradient, nothing is kept.
#[derive(Clone, Debug, Default)]
pub struct Training {
    precision: Precision,
    checkpoint: bool,
    /// A tape on the CPU too.
    anywhere: bool,
    /// Of weights that candle's graph does not reach.
    gradients: WeightGradients,
}

impl Training {
    /// In this precision on a GPU (the CPU has f32); computes blocks again for their gradient if `checkpoint`.
    pub fn new(precision: Precision, checkpoint: bool) -> Self {
        Training { precision, checkpoint, ..Training::default() }
    }

    /// The same on a tape whatever the device: slower than [`Eager`] on the CPU, and the same numbers. The tests compare.
    pub fn on_tape(self) -> Self {
        Training { anywhere: true, ..self }
    }

    /// The gradients of a scalar that this backend computed.
    pub fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        let mut grads = loss.backward()?;
        self.gradients.move_to(&mut grads)?;
        Ok(grads)
    }
}

impl Replay for Training {
    type Inner = Eager;

    fn kept(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn forget(&self, inputs: &[Tensor], part: &impl Fn(&Eager, &[Tensor]) -> Result<Tensor>) -> Result<(Tensor, bool)> {
        let still: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
        // candle's graph of this pass goes with y; only the numbers stay.
        let y = part(&Eager, &still)?;
        Ok((y.detach(), y.track_op() || inputs.iter().any(Tensor::track_op)))
    }

    fn recall(
        &self,
        y: Tensor,
        inputs: Vec<Tensor>,
        part: impl Fn(&Eager, &[Tensor]) -> Result<Tensor> + Send + 'static,
    ) -> Result<Tensor> {
        let (still, gradients): (Vec<Tensor>, _) =
            (inputs.iter().map(Tensor::detach).collect(), self.gradients.clone());
        node(y, &inputs, move |grad| {
            let again = still.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<Var>>>()?;
            let y = part(&Eager, &again.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>())?;
            let mut grads = y.apply_op1(Upstream(grad))?.backward()?;
            let of_inputs = again.iter().map(|var| grads.remove(var)).collect();
            gradients.add_all(&grads)?;
            Ok(of_inputs)
        })
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

impl Backend for Training {
    type Value = Tensor;

    fn network(
        &self,
        network: &impl Architecture,
        x: &Tensor,
        t: &[f64],
        cond: &Condition<Tensor>,
        want: Want,
    ) -> Result<Vec<Tensor>> {
        let Training { precision, checkpoint, anywhere, ref gradients } = *self;
        let settings = tape::Settings { precision, checkpoint, anywhere, gradients: Some(gradients) };
        match tape::pass(network, x, t, cond, want, settings)? {
            Some(maps) => Ok(maps),
            None => network.run(self, x, t, cond, want),
        }
    }

    fn block(&self, block: &impl Block, x: &Tensor, beside: &[&Tensor]) -> Result<Tensor> {
        if self.checkpoint { checkpoint(self, block, x, beside) } else { block.forward(&Eager, x, beside) }
    }

    as_eager! {
        fn constant(tensor: &Tensor) -> Result<Tensor>;
        fn conv2d(x: &Tensor, layer: &Conv2d) -> Result<Tensor>;
        fn conv2d_add_per_channel(x: &Tensor, layer: &Conv2d, v: &Tensor) -> Result<Tensor>;
        fn conv_transpose2d(x: &Tensor, layer: &ConvTranspose2d) -> Result<Tensor>;
        fn linear(x: &Tensor, layer: &Linear) -> Result<Tensor>;
        fn group_norm(x: &Tensor, layer: &GroupNorm, act: Option<Activation>) -> Result<Tensor>;
        fn activation(x: &Tensor, act: Activation) -> Result<Tensor>;
        fn embedding(ids: &Tensor, layer: &Embedding) -> Result<Tensor>;
        fn tokens(states: &Tensor) -> Result<Tensor>;
        fn states(x: &Tensor) -> Result<Tensor>;
        fn token_at(x: &Tensor, ids: &Tensor, at: TokenAt) -> Result<Tensor>;
        fn sinusoid(ids: &Tensor, frequencies: &Tensor, flip: bool) -> Result<Tensor>;
        fn layer_norm(x: &Tensor, layer: &LayerNorm) -> Result<Tensor>;
        fn rms_norm(x: &Tensor, layer: &RmsNorm) -> Result<Tensor>;
        fn gated(x: &Tensor, act: Activation) -> Result<Tensor>;
        fn masked_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask<&Tensor>) -> Result<Tensor>;
        fn rotary(x: &Tensor, by: &Rotary) -> Result<Tensor>;
        fn mul(x: &Tensor, y: &Tensor) -> Result<Tensor>;
        fn mul_per_channel(x: &Tensor, v: &Tensor) -> Result<Tensor>;
        fn slice(x: &Tensor, axis: Axis, start: usize, len: usize) -> Result<Tensor>;
        fn grid(x: &Tensor, sides: [usize; 2]) -> Result<Tensor>;
        fn shuffle(x: &Tensor, side: usize, patches: Patches) -> Result<Tensor>;
        fn unshuffle(x: &Tensor, side: usize, patches: Patches) -> Result<Tensor>;
        fn add(x: &Tensor, y: &Tensor) -> Result<Tensor>;
        fn add_per_channel(x: &Tensor, v: &Tensor) -> Result<Tensor>;
        fn modulate(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor>;
        fn columns(x: &Tensor, start: usize, len: usize) -> Result<Tensor>;
        fn affine(x: &Tensor, mul: &[f64], add: f64) -> Result<Tensor>;
        fn join(x: &Tensor, y: &Tensor, axis: Axis) -> Result<Tensor>;
        fn upsample_2x(x: &Tensor) -> Result<Tensor>;
        fn avg_pool_2x(x: &Tensor) -> Result<Tensor>;
        fn pad_right_bottom(x: &Tensor) -> Result<Tensor>;
    }

    fn dims(&self, x: &Tensor) -> Vec<usize> {
        x.dims().to_vec()
    }
}
