//! The networks of the plane: a few dense layers with SiLU between them.

use anyhow::Result;
use candle_core::{Tensor, Var};
use dmd::random::{Purpose, Random};
use std::collections::BTreeMap;

/// Width of hidden layers, unless an experiment is about it.
pub const WIDTH: usize = 64;
/// Hidden layers.
const HIDDEN: usize = 3;

/// `(B, inputs)` to `(B, outputs)`, f32. The last layer begins at zero: the network says nothing yet.
pub struct Mlp {
    layers: Vec<[Var; 2]>,
}

impl Mlp {
    /// Fresh weights, the `which`-th network of a seed; `width`: that of its hidden layers.
    pub fn new(inputs: usize, width: usize, outputs: usize, random: &Random, which: u64) -> Result<Self> {
        let widths: Vec<usize> =
            std::iter::once(inputs).chain([width; HIDDEN]).chain(std::iter::once(outputs)).collect();
        let layer = |(i, pair): (usize, &[usize])| -> Result<[Var; 2]> {
            let gain = if i == HIDDEN { 0.0 } else { (2.0 / pair[0] as f64).sqrt() };
            let weight = (random.normal(Purpose::Init, 16 * which + i as u64, pair)? * gain)?;
            Ok([Var::from_tensor(&weight)?, Var::zeros(pair[1], weight.dtype(), weight.device())?])
        };
        Ok(Mlp { layers: widths.windows(2).enumerate().map(layer).collect::<Result<_>>()? })
    }

    /// With gradient.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, |var| var.as_tensor().clone())
    }

    /// The same outside the autograd graph.
    pub fn still(&self, x: &Tensor) -> Result<Tensor> {
        self.run(&x.detach(), Var::as_detached_tensor)
    }

    /// Its weights by name.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        let named = |(i, [weight, bias]): (usize, &[Var; 2])| {
            [(format!("{i}.weight"), weight.clone()), (format!("{i}.bias"), bias.clone())]
        };
        self.layers.iter().enumerate().flat_map(named).collect()
    }

    fn run(&self, x: &Tensor, get: impl Fn(&Var) -> Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, [weight, bias]) in self.layers.iter().enumerate() {
            x = x.matmul(&get(weight))?.broadcast_add(&get(bias))?;
            if i + 1 < self.layers.len() {
                x = x.silu()?;
            }
        }
        Ok(x)
    }
}
