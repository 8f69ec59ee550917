//! What can be exported: inputs by name, outputs by name, and what lies between, over a backend. A generator is one
//! ([`OneStep`]); a user's own network is one impl away.

use crate::Result;
use candle_core::{Device, Tensor};
use dmd_models::{Backend, Condition, Generator, Told, Way};

/// Whatever becomes a file. It is traced once, and run eagerly for the comparison, so both see the same code.
///
/// ```
/// use dmd_export::{Input, Module};
/// use dmd_models::{Activation, Backend, Condition, Result};
///
/// /// A picture that is the noise, squashed.
/// struct Squash;
///
/// impl Module for Squash {
///     fn inputs(&self) -> Vec<Input> {
///         vec![Input::noise([3, 8, 8])]
///     }
///
///     fn run<B: Backend>(&self, b: &B, x: &[B::Value], _: &Condition<B::Value>) -> Result<Vec<B::Value>> {
///         Ok(vec![b.activation(&x[0], Activation::Silu)?])
///     }
/// }
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("squash.onnx");
/// let report = dmd_export::export(&Squash, &Default::default(), &Default::default(), &path)?;
/// assert_eq!(report.nodes, 2); // Sigmoid and Mul
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Module {
    /// What it takes, in the order in which [`run`](Self::run) gets it.
    fn inputs(&self) -> Vec<Input>;

    /// What it gives, in the order in which [`run`](Self::run) does.
    fn outputs(&self) -> Vec<Gives> {
        vec![Gives { name: "image".into(), form: Form::Picture }]
    }

    /// The most rows that it can tell apart, classes or prompts: 0 for a network that is told nothing by row,
    /// `usize::MAX` where any number will do.
    fn max_classes(&self) -> usize {
        0
    }

    /// What it is told in each of `n` rows, `(n, …)` of each way: by default the numbers of classes.
    fn told(&self, n: usize) -> Result<Condition<Tensor>> {
        Ok(Condition::of_classes(0..n as i64, &Device::Cpu)?)
    }

    /// The noise level that it is held at, for the record; none for what makes no samples of noise.
    fn sigma(&self) -> Option<f64> {
        Some(1.0)
    }

    /// Where its weights lie.
    fn device(&self) -> Device {
        Device::Cpu
    }

    /// The values of the inputs, `(B, …)`, and of each way in `told` one row per sample, to those of the outputs: maps
    /// `(B, C, H, W)`, tokens as maps `(B, C, 1, N)`, vectors `(B, C)`.
    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        told: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>>;
}

/// An input of a file.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// The shape of one sample's.
    pub shape: Vec<usize>,
    /// What calibration and proof feed it.
    pub like: Like,
}

/// Values that an input has in use. They say its type, too.
#[derive(Clone, Debug)]
pub enum Like {
    /// f32, unit normal.
    Normal,
    /// f32, `(rows, …)`: one row after the other.
    Features(Tensor),
    /// i32, given as i64 `(rows, …)`: one row after the other.
    Ids(Tensor),
}

impl Input {
    /// Unit normal noise `[C, H, W]`.
    pub fn noise(shape: [usize; 3]) -> Self {
        Input { name: "noise".into(), shape: shape.into(), like: Like::Normal }
    }

    /// Whether it is whole numbers.
    pub(crate) fn is_ids(&self) -> bool {
        matches!(self.like, Like::Ids(_))
    }
}

/// An output of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gives {
    /// Its name.
    pub name: String,
    /// What it is.
    pub form: Form,
}

/// How a file gives what a module gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A picture `(B, C, H, W)` around [-1, 1], or as bytes `(B, H, W, C)` where they are asked for.
    Picture,
    /// A map `(B, C, H, W)`, or a vector `(B, C)`.
    Plain,
}

/// A denoiser held at one noise level, as a file: how large its samples are, and what it is told.
#[derive(Clone, Debug)]
pub struct OneStep {
    /// The generator.
    pub generator: Generator,
    /// Height and width of a sample.
    pub size: [usize; 2],
}

impl OneStep {
    /// A generator of several passes, one after the other.
    pub fn passes(passes: &[Generator], size: [usize; 2]) -> Vec<Self> {
        passes.iter().map(|generator| OneStep { generator: generator.clone(), size }).collect()
    }
}

impl Module for OneStep {
    fn inputs(&self) -> Vec<Input> {
        let [height, width] = self.size;
        vec![Input::noise([self.generator.denoiser.network.takes().channels, height, width])]
    }

    fn max_classes(&self) -> usize {
        match self.generator.denoiser.network.takes().told.get(Way::Label) {
            Some(Told::Id(n)) => n.unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    fn sigma(&self) -> Option<f64> {
        Some(self.generator.sigma)
    }

    fn device(&self) -> Device {
        self.generator.denoiser.network.device().clone()
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        told: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        Ok(vec![self.generator.generate(b, &inputs[0], told)?])
    }
}
