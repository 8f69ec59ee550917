//! What an optimiser does to all variables of a network at once: AdamW with clipping, and the moving average. On the CPU
//! tensor by tensor; on an NVIDIA GPU (f32) by `gpu/kernels/optimizer.cu`, launched once for all tensors and without
//! waiting, where the kernels themselves leave undone what must not happen.

use super::adamw::{AdamwStep, adamw, average_into, sum_of_squares};
use candle_core::{DType, Result, Tensor, Var};

/// A variable, its moments `(2, n)` as [`adamw`] takes them, and its gradient.
#[derive(Clone, Copy, Debug)]
pub struct Parameter<'a> {
    /// The variable.
    pub var: &'a Var,
    /// Means, then mean squares.
    pub moments: &'a Var,
    /// Of the variable's shape.
    pub grad: &'a Tensor,
}

/// One update of AdamW of a whole network, whose gradient is scaled down to the norm `clip` where it is longer; sets
/// `step.grad_scale` accordingly. Returns the norm before that, a scalar of f64 or f32. Where the norm or `guard` (a
/// scalar: the sum of the losses) is not finite, neither is the norm returned, and nothing is changed.
pub fn adamw_all(parameters: &[Parameter], guard: &Tensor, clip: f64, step: AdamwStep) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if !parameters.is_empty() && parameters.iter().all(|p| cuda::takes(&[p.var, p.moments, p.grad, guard])) {
        return cuda::adamw_all(parameters, guard, clip, step);
    }
    let norm = sum_of_squares(parameters.iter().map(|p| p.grad))?.sqrt() + 0.0 * value(guard)?;
    if norm.is_finite() {
        let step = AdamwStep { grad_scale: if norm > clip { clip / norm } else { 1.0 }, ..step };
        parameters.iter().try_for_each(|p| adamw(p.var, p.moments, p.grad, step))?;
    }
    Tensor::new(norm, guard.device())
}

/// `average ← average + (value − average)·(1 − decay)` for pairs of average and value, unless `norm`, as [`adamw_all`]
/// returned it for the values, says that they were not updated.
pub fn average_all(pairs: &[(&Var, &Tensor)], decay: f64, norm: &Tensor) -> Result<()> {
    #[cfg(feature = "cuda")]
    if !pairs.is_empty() && pairs.iter().all(|(average, value)| cuda::takes(&[average, value, norm])) {
        return cuda::average_all(pairs, decay, norm);
    }
    if value(norm)?.is_finite() {
        pairs.iter().try_for_each(|(average, value)| average_into(average, value, decay))?;
    }
    Ok(())
}

/// The value of a scalar. Waits for the device.
fn value(scalar: &Tensor) -> Result<f64> {
    scalar.to_dtype(DType::F64)?.to_scalar()
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::Parameter;
    use crate::ops::AdamwStep;
    use crate::ops::gpu::{Arg, Grid, OPTIMIZER, address, device_of, launch, unwritten};
    use candle_core::{DType, Result, Tensor, Var, bail};

    /// Values in a chunk, and threads of a block; `optimizer.cu` has the same.
    const CHUNK: usize = 8192;
    const THREADS: usize = 256;
    const THREADS_OF_NORM: usize = 1024;

    /// Whether the kernels take them.
    pub fn takes(tensors: &[&Tensor]) -> bool {
        tensors.iter().all(|t| t.device().is_cuda() && t.dtype() == DType::F32)
    }

    pub fn adamw_all(parameters: &[Parameter], guard: &Tensor, clip: f64, step: AdamwStep) -> Result<Tensor> {
        // They must live until the kernels are launched; from then on the stream's order protects their memory.
        let grads = parameters.iter().map(|p| p.grad.contiguous()).collect::<Result<Vec<_>>>()?;
        let rows = parameters.iter().zip(&grads).map(|(p, grad)| row(&[p.var, p.moments, grad], &[1, 2, 1]));
        let table = Table::new(rows.collect::<Result<_>>()?, guard)?;
        let norm = norm(&table, guard)?;
        let [b1, b2] = step.betas;
        let scalars = [clip, b1, b2, 1.0 - b1, 1.0 - b2, step.rate, step.root_scale, step.keep, step.eps];
        let scalars = scalars.map(|scalar| Arg::F32(scalar as f32));
        table.launch("adamw", std::iter::once(address(&norm)?).chain(scalars))?;
        Ok(norm)
    }

    pub fn average_all(pairs: &[(&Var, &Tensor)], decay: f64, norm: &Tensor) -> Result<()> {
        let values = pairs.iter().map(|(_, value)| value.contiguous()).collect::<Result<Vec<_>>>()?;
        let rows = pairs.iter().zip(&values).map(|((average, _), value)| row(&[average, value], &[1, 1]));
        let table = Table::new(rows.collect::<Result<_>>()?, norm)?;
        table.launch("average", [address(norm)?, Arg::F32((1.0 - decay) as f32)].into_iter())
    }

    /// The norm of the gradients of a table, a scalar; not finite where `guard` is not.
    fn norm(table: &Table, guard: &Tensor) -> Result<Tensor> {
        // There may be no chunk at all, but there is no tensor without a value.
        let partial = unwritten(table.n_chunks.max(1), DType::F32, guard.device())?;
        table.launch("gradient_squares", std::iter::once(address(&partial)?))?;
        let norm = unwritten((), DType::F32, guard.device())?;
        let grid = Grid { blocks: [1, 1, 1], threads: THREADS_OF_NORM, shared_bytes: 0 };
        let args = [address(&partial)?, Arg::I32(table.n_chunks as i32), address(guard)?, address(&norm)?];
        launch(&device_of(guard)?, OPTIMIZER, "gradient_norm", grid, &args)?;
        Ok(norm)
    }

    /// What the kernels know of one variable: its length, and where it and what belongs to it lie.
    struct Row {
        len: usize,
        addresses: [u64; 3],
    }

    /// Of tensors that have so many times the first one's values.
    fn row(tensors: &[&Tensor], times: &[usize]) -> Result<Row> {
        let len = tensors[0].elem_count();
        let mut addresses = [0; 3];
        for ((tensor, times), to) in tensors.iter().zip(times).zip(&mut addresses) {
            if tensor.elem_count() != times * len || !tensor.device().same_device(tensors[0].device()) {
                bail!("optimizer: {} values beside a variable of {len}, or on another GPU", tensor.elem_count());
            }
            match address(tensor)? {
                Arg::Address(address) => *to = address,
                other => bail!("optimizer: {other:?} is no address"),
            }
        }
        Ok(Row { len, addresses })
    }

    /// Rows in device memory, as `struct Row` of `optimizer.cu` has them. A network has a few hundred, so the table is
    /// below the 64 KiB up to which the driver copies without waiting.
    struct Table {
        rows: Tensor,
        n_rows: usize,
        n_chunks: usize,
    }

    impl Table {
        /// On the device of `beside`.
        fn new(rows: Vec<Row>, beside: &Tensor) -> Result<Self> {
            let (mut values, mut n_chunks) = (Vec::new(), 0);
            for Row { len, addresses } in &rows {
                values.extend([n_chunks as i64, *len as i64]);
                values.extend(addresses.map(|address| address as i64));
                n_chunks += len.div_ceil(CHUNK);
            }
            let table = Tensor::from_vec(values, (rows.len(), 5), beside.device())?;
            Ok(Table { rows: table, n_rows: rows.len(), n_chunks })
        }

        /// One block for each chunk.
        fn launch(&self, function: &str, args: impl Iterator<Item = Arg>) -> Result<()> {
            let table = [address(&self.rows)?, Arg::I32(self.n_rows as i32)];
            let grid = Grid { blocks: [self.n_chunks, 1, 1], threads: THREADS, shared_bytes: 0 };
            let args: Vec<Arg> = table.into_iter().chain(args).collect();
            launch(&device_of(&self.rows)?, OPTIMIZER, function, grid, &args)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const STEP: AdamwStep =
        AdamwStep { grad_scale: 1.0, betas: [0.9, 0.99], rate: 0.1, root_scale: 1.0, keep: 0.99, eps: 1e-8 };

    /// Two variables of a network: weights, moments and gradients, then one update. The norm, and all that it changed.
    fn update(grads: [&[f32]; 2], guard: f32) -> (f64, Vec<Vec<f32>>) {
        let var = |values: &[f32]| Var::new(values, &Device::Cpu).unwrap();
        let grads = grads.map(|grad| var(grad).as_detached_tensor());
        let vars = [var(&[1.0, -2.0]), var(&[3.0])];
        let moments = [2, 1].map(|n| Var::ones((2, n), DType::F32, &Device::Cpu).unwrap());
        let average = var(&[0.5, 0.5]);
        let parameters = [0, 1].map(|i| Parameter { var: &vars[i], moments: &moments[i], grad: &grads[i] });
        let norm = adamw_all(&parameters, &Tensor::new(guard, &Device::Cpu).unwrap(), 1.0, STEP).unwrap();
        average_all(&[(&average, &vars[0])], 0.9, &norm).unwrap();
        let values = |var: &Var| var.flatten_all().unwrap().to_vec1().unwrap();
        (value(&norm).unwrap(), vars.iter().chain(&moments).chain([&average]).map(values).collect())
    }

    #[test]
    fn a_network_is_clipped_by_the_norm_of_all_its_gradients() {
        let (norm, found) = update([&[2.0, -1.0], &[2.0]], 1.0);
        assert_eq!(norm, 3.0);
        // m = 0.9 + 0.1·g/3, v = 0.99 + 0.01·(g/3)², p·0.99 − 0.1·m/√v.
        let expected = |p: f32, g: f32| p * 0.99 - 0.1 * (0.9 + 0.1 * g / 3.0) / (0.99 + 0.01 * g * g / 9.0).sqrt();
        let weights = [found[0][0], found[0][1], found[1][0]];
        for (found, (p, g)) in weights.into_iter().zip([(1.0, 2.0), (-2.0, -1.0), (3.0, 2.0)]) {
            assert!((found - expected(p, g)).abs() < 1e-6, "{found}");
        }
        assert!((found[4][0] - (0.45 + 0.1 * found[0][0])).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn a_norm_or_a_guard_that_is_not_finite_leaves_everything_as_it_was() {
        let before = [vec![1.0, -2.0], vec![3.0], vec![1.0; 4], vec![1.0; 2], vec![0.5; 2]];
        for (grad, guard) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (2.0, f32::NAN), (2.0, f32::NEG_INFINITY)] {
            let (norm, found) = update([&[2.0, grad], &[2.0]], guard);
            assert!(!norm.is_finite(), "{grad} {guard}: {norm}");
            assert_eq!(found, before, "{grad} {guard}");
        }
    }
}
