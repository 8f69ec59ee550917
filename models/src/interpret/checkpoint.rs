//! Gradient checkpointing: of a block, only what it reads is kept, and what is within it is computed again when its
//! gradient is wanted (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). One forward pass more, for the
//! memory of one block at a time.

use crate::Result;
use crate::backend::{Backend, Block};

/// A backend that can run a part of a network twice.
pub(super) trait Replay: Backend {
    /// What runs the part.
    type Inner: Backend<Value = Self::Value>;

    /// A value in the form in which it is kept until the part runs again.
    fn kept(&self, x: &Self::Value) -> Result<Self::Value>;

    /// The part's result, with nothing noted for a way back; and whether there is a gradient that wants one, of an input
    /// or of a weight within.
    fn forget(
        &self,
        inputs: &[Self::Value],
        part: &impl Fn(&Self::Inner, &[Self::Value]) -> Result<Self::Value>,
    ) -> Result<(Self::Value, bool)>;

    /// The result with a way back to inputs and weights, which runs the part again.
    fn recall(
        &self,
        y: Self::Value,
        inputs: Vec<Self::Value>,
        part: impl Fn(&Self::Inner, &[Self::Value]) -> Result<Self::Value> + Send + 'static,
    ) -> Result<Self::Value>;
}

/// A block of which only inputs and result are kept.
pub(super) fn checkpoint<B: Replay>(b: &B, block: &impl Block, x: &B::Value, beside: &[&B::Value]) -> Result<B::Value> {
    let inputs = std::iter::once(&x).chain(beside).map(|value| b.kept(value)).collect::<Result<Vec<_>>>()?;
    let block = block.clone();
    let part = move |b: &B::Inner, inputs: &[B::Value]| {
        let beside: Vec<&B::Value> = inputs[1..].iter().collect();
        block.forward(b, &inputs[0], &beside)
    };
    match b.forget(&inputs, &part)? {
        (y, true) => b.recall(y, inputs, part),
        (y, false) => Ok(y),
    }
}
