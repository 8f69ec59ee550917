//! A part of a pass that was computed outside of candle's graph, as one node of it; and the gradients of weights that
//! only such parts know.

use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Layout, Shape, Storage, Tensor, TensorId, Var, bail};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// Gradients of weights, by the weight. Passes that are one loss's add up in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct WeightGradients(Arc<Mutex<HashMap<TensorId, Tensor>>>);

impl WeightGradients {
    /// Adds that of one weight. Of a weight that was made of others (a base and its adapter), theirs.
    pub fn add(&self, weight: &Tensor, grad: Tensor) -> candle_core::Result<()> {
        match weight.is_variable() {
            true => self.add_to(weight.id(), &grad),
            false => self.add_all(&weight.apply_op1(Upstream(grad))?.backward()?),
        }
    }

    /// Adds all of a store.
    pub fn add_all(&self, grads: &GradStore) -> candle_core::Result<()> {
        grads.get_ids().try_for_each(|id| grads.get_id(*id).map_or(Ok(()), |grad| self.add_to(*id, grad)))
    }

    fn add_to(&self, id: TensorId, grad: &Tensor) -> candle_core::Result<()> {
        let mut all = self.0.lock();
        let sum = match all.remove(&id) {
            Some(before) => (before + grad)?,
            None => grad.clone(),
        };
        all.insert(id, sum);
        Ok(())
    }

    /// Adds everything to a store, and forgets it.
    pub fn move_to(&self, grads: &mut GradStore) -> candle_core::Result<()> {
        for (id, grad) in std::mem::take(&mut *self.0.lock()) {
            let sum = match grads.get_id(id) {
                Some(before) => (before + grad)?,
                None => grad,
            };
            grads.insert_id(id, sum);
        }
        Ok(())
    }
}

/// Puts `y` into candle's graph behind those of the `inputs` that are in it, or where none is, at its beginning. `back`
/// makes of y's gradient those of all inputs, once.
pub(super) fn node(
    y: Tensor,
    inputs: &[Tensor],
    back: impl FnOnce(Tensor) -> Result<Vec<Option<Tensor>>> + Send + 'static,
) -> Result<Tensor> {
    let tracked: Vec<bool> = inputs.iter().map(Tensor::track_op).collect();
    let mut args: Vec<Tensor> = inputs.iter().filter(|x| x.track_op()).cloned().collect();
    if args.is_empty() {
        args.push(Var::zeros((), DType::F32, y.device())?.as_tensor().clone());
    }
    let [first, rest @ ..] = &args[..] else { return Err(Error::Unsupported("a node without arguments".into())) };
    if rest.len() > 2 {
        return Err(Error::Unsupported(format!("a block reads {} values with gradients, at most 3", args.len())));
    }
    let back = move |grad: Tensor| -> Result<Vec<Option<Tensor>>> {
        let grads = back(grad)?;
        Ok(grads.into_iter().zip(tracked).filter_map(|(grad, tracked)| tracked.then_some(grad)).collect())
    };
    let node = Node { y: Mutex::new(Some(y)), back: Mutex::new(Some(Box::new(back))) };
    // candle's largest operation has three arguments; one that stands there twice gets its gradient once.
    Ok(first.apply_op3(rest.first().unwrap_or(first), rest.get(1).unwrap_or(first), node)?)
}

type Back = Box<dyn FnOnce(Tensor) -> Result<Vec<Option<Tensor>>> + Send>;

struct Node {
    /// The result, computed before the node is made, which then has a copy.
    y: Mutex<Option<Tensor>>,
    back: Mutex<Option<Back>>,
}

fn take<T>(once: &Mutex<Option<T>>) -> candle_core::Result<T> {
    let taken = once.lock().take();
    taken.ok_or_else(|| candle_core::Error::Msg("a part of a pass goes forward once and back once".into()))
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        "node"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = take(&self.y)?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cpu(cpu) => Ok((cpu.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("the result of a pass is not on the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let y = take(&self.y)?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cuda(cuda) => Ok((cuda.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("the result of a pass is not on the GPU"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = take(&self.back)?(grad.clone())?.into_iter();
        // candle expects one for each argument that it tracks, even where nothing came of it.
        let mut of = |arg: &Tensor| match grads.next() {
            Some(None) => arg.zeros_like().map(Some),
            Some(grad) => Ok(grad),
            None => Ok(None),
        };
        Ok((of(x)?, of(y)?, of(z)?))
    }
}

/// A scalar that stands for Σ y·grad without computing it: its gradient is `grad`. (A product would have a gradient for
/// `grad` too, as large as y, and it would be kept.)
pub(super) struct Upstream(pub Tensor);

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
        // Any value would do; the result's own copy is at hand.
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
