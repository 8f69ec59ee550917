//! Timesteps to vectors.

use crate::backend::{Activation, Backend};
use crate::layers::{Embedding, Linear, Scope};
use crate::{Error, Result, ops};
use candle_core::{Device, Tensor};

/// Two linear layers with a non-linearity between them: what a network learns of a projected timestep.
#[derive(Clone, Debug)]
pub struct TimestepEmbedding([Linear; 2], Activation);

impl TimestepEmbedding {
    /// Takes its parameters from `scope`; SiLU is between them.
    pub fn build(scope: Scope, io: [usize; 2]) -> Result<Self> {
        Self::build_with(scope, io, Activation::Silu)
    }

    /// The same with another non-linearity.
    pub fn build_with(mut scope: Scope, [width, output]: [usize; 2], act: Activation) -> Result<Self> {
        let layers = [scope.linear("linear_1", [width, output])?, scope.linear("linear_2", [output, output])?];
        Ok(TimestepEmbedding(layers, act))
    }

    /// `(B or 1, width)` to `(B or 1, output)`.
    pub fn forward<B: Backend>(&self, b: &B, projected: &B::Value) -> Result<B::Value> {
        b.linear(&b.activation(&b.linear(projected, &self.0[0])?, self.1)?, &self.0[1])
    }
}

/// Timesteps to vectors, before any learned layer. f32 throughout, as diffusers does it.
#[derive(Clone, Debug)]
pub enum TimeProjection {
    /// sin(t·f) and cos(t·f), f geometric from 1 to 1/10000.
    Positional {
        /// The f.
        frequencies: Vec<f32>,
        /// Cosines first.
        flip: bool,
        /// A zero at the end, where the width is odd.
        odd: bool,
    },
    /// sin and cos of 2π·w·t, or of 2π·w·log t, with stored random w.
    Fourier {
        /// The w.
        weight: Vec<f32>,
        /// Of the logarithm.
        log: bool,
        /// Cosines first.
        flip: bool,
    },
    /// A table row per integer timestep.
    Learned {
        /// The rows.
        table: Embedding,
    },
}

impl TimeProjection {
    /// diffusers' `Timesteps` of this width.
    pub fn positional(width: usize, flip: bool, freq_shift: f64) -> Self {
        let half = width / 2;
        let frequency = |i: usize| {
            let exponent = -(10000f64.ln() as f32) * i as f32 / (half as f64 - freq_shift) as f32;
            exponent.exp()
        };
        TimeProjection::Positional { frequencies: (0..half).map(frequency).collect(), flip, odd: width % 2 == 1 }
    }

    /// Of the vectors.
    pub fn width(&self) -> usize {
        match self {
            TimeProjection::Positional { frequencies, odd, .. } => 2 * frequencies.len() + usize::from(*odd),
            TimeProjection::Fourier { weight, .. } => 2 * weight.len(),
            TimeProjection::Learned { table } => table.weight.dims()[1],
        }
    }

    /// f32 `(t.len(), width)`.
    pub fn embed(&self, t: &[f64], device: &Device) -> Result<Tensor> {
        let rows: Vec<f32> = match self {
            // A few numbers are sent at once; a table of them would wait for the GPU.
            TimeProjection::Positional { frequencies, flip, odd: false } if !device.is_cpu() => {
                let t = Tensor::from_vec(t.iter().map(|&t| t as f32).collect(), t.len(), device)?;
                let frequencies = Tensor::new(frequencies.as_slice(), device)?;
                return Ok(ops::sinusoid(&t, &frequencies, *flip)?);
            }
            TimeProjection::Positional { frequencies, flip, odd } => t
                .iter()
                .flat_map(|&t| {
                    let angles = frequencies.iter().map(|f| t as f32 * f);
                    let mut row = in_order(angles.clone().map(f32::sin), angles.map(f32::cos), *flip);
                    row.extend(odd.then_some(0.0));
                    row
                })
                .collect(),
            TimeProjection::Fourier { weight, log, flip } => t
                .iter()
                .flat_map(|&t| {
                    // The angles run to hundreds of turns: f64 until the sine is taken.
                    let t = if *log { t.ln() } else { t };
                    let angles = weight.iter().map(|&w| t * f64::from(w) * std::f64::consts::TAU);
                    in_order(angles.clone().map(|a| a.sin() as f32), angles.map(|a| a.cos() as f32), *flip)
                })
                .collect(),
            TimeProjection::Learned { table } => {
                let entries = table.weight.dims()[0];
                let ids = t.iter().map(|&t| {
                    let inside = t >= 0.0 && t < entries as f64 && t.fract() == 0.0;
                    let refuse = || {
                        Error::Config(format!(
                            "time_embedding_type learned: timestep {t} is not an integer below {entries}"
                        ))
                    };
                    inside.then_some(t as u32).ok_or_else(refuse)
                });
                let ids = Tensor::from_vec(ids.collect::<Result<Vec<u32>>>()?, t.len(), table.weight.device())?;
                return Ok(table.weight.index_select(&ids, 0)?);
            }
        };
        Ok(Tensor::from_vec(rows, (t.len(), self.width()), device)?)
    }
}

fn in_order(sines: impl Iterator<Item = f32>, cosines: impl Iterator<Item = f32>, cosines_first: bool) -> Vec<f32> {
    if cosines_first { cosines.chain(sines).collect() } else { sines.chain(cosines).collect() }
}
