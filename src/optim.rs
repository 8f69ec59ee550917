//! AdamW, gradient clipping and the exponential moving average, in place on a network's variables.

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use dmd_models::Weights;
use dmd_models::ops::{self, AdamwStep};
use documented::DocumentedFieldsOpt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Settings of AdamW (Loshchilov and Hutter 2019) other than its rate.
#[derive(Clone, Copy, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Decay of the mean and of the mean square of gradients: each 0 or more and below 1. The first is 0 in SiD, 0.9 in
    /// DMD and DMD2.
    pub betas: [f64; 2],
    /// Decoupled weight decay: 0 or more. 0.01 in DMD and DMD2.
    pub weight_decay: f64,
    /// Added to the root of the mean square: above 0.
    pub eps: f64,
    /// Largest L2 norm of a network's gradient; longer ones are scaled down to it: above 0. 10 in DMD and DMD2.
    pub clip: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { betas: [0.9, 0.999], weight_decay: 0.01, eps: 1e-8, clip: 10.0 }
    }
}

/// One network's variables with their moments.
pub struct Optimizer {
    settings: AdamW,
    parameters: Vec<Parameter>,
    n_updates: u64,
}

struct Parameter {
    name: String,
    var: Var,
    /// Means, then mean squares.
    moments: Var,
}

impl Parameter {
    /// The moments in the variable's shape.
    fn moments(&self) -> Result<[Tensor; 2]> {
        let row = |i| self.moments.as_detached_tensor().get(i)?.reshape(self.var.shape());
        Ok([row(0)?, row(1)?])
    }
}

impl Optimizer {
    /// Moments at zero.
    pub fn new(vars: &BTreeMap<String, Var>, settings: AdamW) -> Result<Self> {
        let parameter = |(name, var): (&String, &Var)| -> Result<Parameter> {
            let moments = Var::zeros((2, var.elem_count()), var.dtype(), var.device())?;
            Ok(Parameter { name: name.clone(), var: var.clone(), moments })
        };
        Ok(Optimizer { settings, parameters: vars.iter().map(parameter).collect::<Result<_>>()?, n_updates: 0 })
    }

    /// This network's part of what a backward pass found.
    pub fn gradients(&self, grads: &GradStore) -> Gradients {
        Gradients(self.parameters.iter().map(|p| grads.get(&p.var).cloned()).collect())
    }

    /// One update at this rate; returns the gradient's norm before clipping, a scalar that the device may still be
    /// computing. Variables without a gradient stay, and all do where the norm or `guard`, the sum of the losses, is not
    /// finite: a loss can be finite where its gradient is not, and no such weight may reach a checkpoint. Whoever reads
    /// the norm tells [`Optimizer::settle`], before the next update.
    pub fn update(&mut self, Gradients(grads): &Gradients, guard: &Tensor, rate: f64) -> Result<Tensor> {
        let present: Vec<ops::Parameter> = std::iter::zip(&self.parameters, grads)
            .filter_map(|(p, grad)| Some(ops::Parameter { var: &p.var, moments: &p.moments, grad: grad.as_ref()? }))
            .collect();
        let AdamW { betas, weight_decay, eps, clip } = self.settings;
        let corrections = betas.map(|beta| 1.0 - beta.powf((self.n_updates + 1) as f64));
        let step = AdamwStep {
            grad_scale: 1.0,
            betas,
            rate: rate / corrections[0],
            root_scale: corrections[1].sqrt().recip(),
            keep: 1.0 - rate * weight_decay,
            eps,
        };
        Ok(ops::adamw_all(&present, guard, clip, step)?)
    }

    /// Counts the update that had this norm. One that is not finite is [`NotFinite`]: no update was made.
    pub fn settle(&mut self, norm: f64) -> Result<f64> {
        let norm = finite("the gradient's norm", norm)?;
        self.n_updates += 1;
        Ok(norm)
    }

    /// An update down a loss, waited for; returns the gradient's norm before clipping.
    pub fn descend(&mut self, loss: &Tensor, grads: &Gradients, rate: f64) -> Result<f64> {
        let norm = self.update(grads, &loss.detach(), rate)?;
        self.settle(read(&[norm])?[0])
    }

    /// Moments by the name of their variable, for a checkpoint.
    pub fn state(&self) -> Result<Weights> {
        let mut state = Weights::default();
        for p in &self.parameters {
            let [mean, square] = p.moments()?;
            state.insert(format!("mean.{}", p.name), mean);
            state.insert(format!("square.{}", p.name), square);
        }
        Ok(state)
    }

    /// Takes moments back from a checkpoint after `n_updates`.
    pub fn restore(&mut self, state: &Weights, n_updates: u64) -> Result<()> {
        for p in &self.parameters {
            let saved = |kind: &str| -> Result<Tensor> {
                let name = format!("{kind}.{}", p.name);
                let saved = state.get(&name).with_context(|| format!("the optimiser's state lacks \"{name}\""))?;
                ensure!(saved.shape() == p.var.shape(), "the optimiser's state: \"{name}\" is {:?}", saved.shape());
                Ok(saved.flatten_all()?)
            };
            p.moments.set(&Tensor::stack(&[saved("mean")?, saved("square")?], 0)?)?;
        }
        self.n_updates = n_updates;
        Ok(())
    }

    /// How many updates were made.
    pub fn n_updates(&self) -> u64 {
        self.n_updates
    }
}

/// Gradients of one network, which parts of a batch add up in; at first none.
#[derive(Default)]
pub struct Gradients(Vec<Option<Tensor>>);

impl Gradients {
    /// Adds those of another part.
    pub fn add(&mut self, part: Gradients) -> Result<()> {
        let both = |(a, b): (Option<Tensor>, Option<Tensor>)| -> Result<Option<Tensor>> {
            Ok(match (a, b) {
                (Some(a), Some(b)) => Some((a + b)?),
                (a, b) => a.or(b),
            })
        };
        let before = std::mem::take(&mut self.0);
        self.0 = match before.is_empty() {
            true => part.0,
            false => before.into_iter().zip(part.0).map(both).collect::<Result<_>>()?,
        };
        Ok(())
    }
}

/// A loss or a gradient that is no number: the one error that a run may survive.
#[derive(Debug, thiserror::Error)]
#[error("{name} is {value}")]
pub struct NotFinite {
    /// What it is of.
    pub name: &'static str,
    /// Infinite or NaN.
    pub value: f64,
}

/// This number, or [`NotFinite`].
pub fn finite(name: &'static str, value: f64) -> Result<f64> {
    ensure!(value.is_finite(), NotFinite { name, value });
    Ok(value)
}

/// The values of scalars of one device. This is where a device is waited for: once, however many they are.
pub fn read(scalars: &[Tensor]) -> Result<Vec<f64>> {
    let row = |scalar: &Tensor| scalar.to_dtype(DType::F64)?.reshape(1);
    let rows = scalars.iter().map(row).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&rows, 0)?.to_vec1()?)
}

/// Exponential moving average of a network's variables: `average ← average·decay + value·(1 − decay)`. It stays where
/// the `norm` of the values' last update says that none was made.
pub fn average_into(
    averages: &BTreeMap<String, Var>,
    values: &BTreeMap<String, Var>,
    decay: f64,
    norm: &Tensor,
) -> Result<()> {
    let mut pairs = Vec::new();
    for (name, average) in averages {
        let value = values.get(name).with_context(|| format!("no variable \"{name}\" to average"))?;
        pairs.push((average, value.as_tensor()));
    }
    Ok(ops::average_all(&pairs, decay, norm)?)
}

/// The decay in force after `step` updates: averages over at most the last tenth of the run so far, until the set
/// decay is reached, so that the start is forgotten (Karras et al. 2022 ramp theirs up for the same reason).
pub fn ramped_decay(decay: f64, step: u64) -> f64 {
    decay.min((1.0 + step as f64) / (10.0 + step as f64))
}

/// Rate as a function of the step: linear warm-up from zero, then constant or down to zero along a half cosine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// The full rate to the end.
    Constant,
    /// Half a cosine down to zero at the last step.
    Cosine,
    /// A straight line down to zero at the last step.
    Linear,
}

/// The rate at `step` (from 0) of `n_steps`.
pub fn rate_at(rate: f64, decay: Decay, warmup: u64, step: u64, n_steps: u64) -> f64 {
    let ramp = if warmup == 0 { 1.0 } else { ((step + 1) as f64 / warmup as f64).min(1.0) };
    let left = match decay {
        Decay::Constant => 1.0,
        Decay::Linear => 1.0 - step as f64 / n_steps.max(1) as f64,
        Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / n_steps.max(1) as f64).cos()),
    };
    rate * ramp * left
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// The published update (Loshchilov and Hutter 2019, algorithm 2) written out in f64 beside it.
    #[test]
    fn adamw_follows_the_published_update() {
        let var = Var::new(&[1f32, -2.0], &Device::Cpu).unwrap();
        let vars = BTreeMap::from([("p".to_string(), var.clone())]);
        let settings = AdamW { betas: [0.9, 0.99], weight_decay: 0.01, eps: 1e-8, clip: f64::INFINITY };
        let mut optimizer = Optimizer::new(&vars, settings).unwrap();
        let (mut p, mut m, mut v) = ([1f64, -2.0], [0f64; 2], [0f64; 2]);
        for step in 1..=3 {
            let loss = (var.powf(3.0).unwrap() / 3.0).unwrap().sum_all().unwrap();
            let grads = optimizer.gradients(&loss.backward().unwrap());
            optimizer.descend(&loss, &grads, 0.1).unwrap();
            for i in 0..2 {
                let g = p[i] * p[i];
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.99 * v[i] + 0.01 * g * g;
                let step_size =
                    (m[i] / (1.0 - 0.9f64.powi(step))) / ((v[i] / (1.0 - 0.99f64.powi(step))).sqrt() + 1e-8);
                p[i] = p[i] * (1.0 - 0.1 * 0.01) - 0.1 * step_size;
            }
            let found: Vec<f32> = var.to_vec1().unwrap();
            assert!(found.iter().zip(p).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5), "{found:?} {p:?}");
        }
    }

    #[test]
    fn clipping_scales_to_the_norm() {
        let var = Var::new(&[3f32, 4.0], &Device::Cpu).unwrap();
        let vars = BTreeMap::from([("p".to_string(), var.clone())]);
        let mut optimizer = Optimizer::new(&vars, AdamW { clip: 1.0, ..AdamW::default() }).unwrap();
        let loss = (var.sqr().unwrap() * 0.5).unwrap().sum_all().unwrap();
        let grads = optimizer.gradients(&loss.backward().unwrap());
        assert!((optimizer.descend(&loss, &grads, 0.0).unwrap() - 5.0).abs() < 1e-6);
        let mean: Vec<f32> = optimizer.state().unwrap().get("mean.p").unwrap().to_vec1().unwrap();
        assert!((mean[0] - 0.06).abs() < 1e-6 && (mean[1] - 0.08).abs() < 1e-6);
    }

    #[test]
    fn an_update_without_a_finite_loss_and_gradient_is_neither_made_nor_averaged_nor_counted() {
        let tensor = |value: f32| Tensor::new(&[value], &Device::Cpu).unwrap();
        let map = |value: f32| BTreeMap::from([("p".to_string(), Var::from_tensor(&tensor(value)).unwrap())]);
        let (vars, averages) = (map(1.0), map(3.0));
        let mut optimizer = Optimizer::new(&vars, AdamW::default()).unwrap();
        let mut update = |grad: f32, guard: f32| {
            let guard = Tensor::new(guard, &Device::Cpu).unwrap();
            let norm = optimizer.update(&Gradients(vec![Some(tensor(grad))]), &guard, 0.1).unwrap();
            average_into(&averages, &vars, 0.5, &norm).unwrap();
            let settled = optimizer.settle(read(&[norm]).unwrap()[0]);
            let state = optimizer.state().unwrap();
            let values = [&vars["p"], &averages["p"], state.get("mean.p").unwrap(), state.get("square.p").unwrap()];
            let values = values.map(|values| values.to_vec1::<f32>().unwrap()[0]);
            (settled, values, optimizer.n_updates())
        };
        for (grad, guard) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, f32::NAN), (1.0, f32::INFINITY)] {
            let (settled, values, n_updates) = update(grad, guard);
            let error = settled.unwrap_err();
            assert!(error.is::<NotFinite>() && error.to_string().starts_with("the gradient's norm is "), "{error}");
            assert_eq!((values, n_updates), ([1.0, 3.0, 0.0, 0.0], 0));
        }
        let (settled, values, n_updates) = update(1.0, 1.0);
        assert_eq!((settled.unwrap(), n_updates), (1.0, 1));
        assert!(values[0] < 1.0 && values[1] < 3.0 && values[2] > 0.0 && values[3] > 0.0, "{values:?}");
    }

    #[test]
    fn rates_warm_up_and_decay() {
        assert_eq!(rate_at(1.0, Decay::Constant, 10, 4, 100), 0.5);
        assert_eq!(rate_at(1.0, Decay::Constant, 0, 99, 100), 1.0);
        assert!((rate_at(1.0, Decay::Cosine, 0, 50, 100) - 0.5).abs() < 1e-12);
        assert!((rate_at(1.0, Decay::Linear, 0, 75, 100) - 0.25).abs() < 1e-12);
    }
}
