//! What can be exported: inputs by name, outputs by name, and what lies between, over a backend. A generator is one
//! ([`OneStep`]); a user's own network is one impl away.

use crate::Result;
use candle_core::{Device, Tensor};
use dmd_models::encoders::{Autoencoder, TextEncoders};
use dmd_models::{Axis, Backend, Condition, Generator, Told, Way};

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

/// A denoiser held at one noise level, as a file: noise to a picture, or to latents.
#[derive(Clone, Debug)]
pub struct OneStep {
    /// The generator.
    pub generator: Generator,
    /// Height and width of a sample.
    pub size: [usize; 2],
    /// What it is told, and how.
    pub told: ToldBy,
    /// Whether its samples are latents, which a decoder makes pictures of.
    pub latents: bool,
}

/// How a file is told what its network is told.
#[derive(Clone, Debug)]
pub enum ToldBy {
    /// By the label of a class, where the network knows classes; not at all elsewhere.
    Label,
    /// By inputs `text` `(B, N, C)` and, where the network hears pooled text, `vector` `(B, P)`.
    Text {
        /// What prompts are made of, a row for each: calibration and proof feed it.
        examples: Condition<Tensor>,
        /// How many numbers stand behind the pooled text, the same in all rows: sizes and a guidance scale, which become
        /// part of the file.
        numbers: usize,
    },
    /// By the label of one of these rows, which become part of the file: what is made of them alone, such as keys and
    /// values of attention, is computed beforehand.
    OneOf(Condition<Tensor>),
}

impl OneStep {
    /// A generator of pictures, or of samples that nothing here decodes.
    pub fn new(generator: Generator, size: [usize; 2]) -> Self {
        OneStep { generator, size, told: ToldBy::Label, latents: false }
    }

    /// A generator of several passes, one after the other.
    pub fn passes(passes: &[Generator], size: [usize; 2]) -> Vec<Self> {
        passes.iter().map(|generator| OneStep::new(generator.clone(), size)).collect()
    }

    /// The vectors of the examples, cut into pooled text `(rows, P)` and the numbers behind it `(1, n)`.
    fn vectors(&self) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let ToldBy::Text { examples, numbers } = &self.told else { return Ok((None, None)) };
        let Some(vector) = examples.get(Way::Vector) else { return Ok((None, None)) };
        let pooled = vector.dims()[1].saturating_sub(*numbers);
        let part = |start: usize, len: usize| match len {
            0 => Ok(None),
            _ => vector.narrow(1, start, len)?.contiguous().map(Some),
        };
        Ok((part(0, pooled)?, part(pooled, *numbers)?.map(|numbers| numbers.narrow(0, 0, 1)).transpose()?))
    }
}

impl Module for OneStep {
    fn inputs(&self) -> Vec<Input> {
        let [height, width] = self.size;
        let mut inputs = vec![Input::noise([self.generator.denoiser.network.takes().channels, height, width])];
        let feature = |name: &str, rows: &Tensor| Input {
            name: name.into(),
            shape: rows.dims()[1..].to_vec(),
            like: Like::Features(rows.clone()),
        };
        if let ToldBy::Text { examples, .. } = &self.told {
            inputs.extend(examples.get(Way::Text).map(|rows| feature("text", rows)));
            inputs.extend(self.vectors().ok().and_then(|(pooled, _)| pooled).map(|rows| feature("vector", &rows)));
        }
        inputs
    }

    fn outputs(&self) -> Vec<Gives> {
        match self.latents {
            true => vec![Gives { name: "latents".into(), form: Form::Plain }],
            false => vec![Gives { name: "image".into(), form: Form::Picture }],
        }
    }

    fn max_classes(&self) -> usize {
        match (&self.told, self.generator.denoiser.network.takes().told.get(Way::Label)) {
            (ToldBy::OneOf(rows), _) => rows.iter().next().map_or(0, |(_, rows)| rows.dims()[0]),
            (ToldBy::Label, Some(Told::Id(n))) => n.unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    fn told(&self, n: usize) -> Result<Condition<Tensor>> {
        match &self.told {
            ToldBy::OneOf(rows) => {
                rows.try_map(|rows| Ok(rows.narrow(0, 0, n)?.to_device(&Device::Cpu)?.contiguous()?))
            }
            _ => Ok(Condition::of_classes(0..n as i64, &Device::Cpu)?),
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
        let ToldBy::Text { .. } = &self.told else {
            return Ok(vec![self.generator.generate(b, &inputs[0], told)?]);
        };
        let (pooled, numbers) = self.vectors()?;
        let numbers = match (numbers, b.dims(&inputs[0])[0]) {
            (Some(row), n) => Some(b.constant(&row.broadcast_as((n, row.dims()[1]))?.contiguous()?)?),
            (None, _) => None,
        };
        let vector = match (pooled.and(inputs.get(2)), numbers) {
            (Some(pooled), Some(numbers)) => Some(b.join(pooled, &numbers, Axis::Channels)?),
            (pooled, numbers) => pooled.cloned().or(numbers),
        };
        let ways = [(Way::Text, inputs.get(1).cloned()), (Way::Vector, vector)];
        let told = ways.into_iter().filter_map(|(way, value)| Some((way, value?))).collect();
        Ok(vec![self.generator.generate(b, &inputs[0], &told)?])
    }
}

/// What makes a network's text of a prompt's ids, as a file: `ids` `(B, N)`, or for several encoders side by side `ids`,
/// `ids_2` …, to `text` `(B, N, C)` and, where the network hears pooled text, `vector` `(B, P)`.
#[derive(Clone, Debug)]
pub struct TextEncoding {
    /// The encoders.
    pub encoders: TextEncoders,
    /// Prompts that calibration and proof feed it.
    pub prompts: Vec<String>,
}

impl Module for TextEncoding {
    fn inputs(&self) -> Vec<Input> {
        let prompts: Vec<&str> = self.prompts.iter().map(String::as_str).collect();
        let input = |(i, ids): (usize, Tensor)| Input {
            name: if i == 0 { "ids".into() } else { format!("ids_{}", i + 1) },
            shape: ids.dims()[1..].to_vec(),
            like: Like::Ids(ids),
        };
        // A prompt that has no tokens is refused where text is made of it.
        self.encoders.ids(&prompts).unwrap_or_default().into_iter().enumerate().map(input).collect()
    }

    fn outputs(&self) -> Vec<Gives> {
        let names = ["text", "vector"].into_iter().take(if self.encoders.size.is_some() { 2 } else { 1 });
        names.map(|name| Gives { name: name.into(), form: Form::Plain }).collect()
    }

    fn sigma(&self) -> Option<f64> {
        None
    }

    fn device(&self) -> Device {
        self.encoders.device()
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        _: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        let (text, pooled) = self.encoders.run(b, inputs)?;
        Ok(std::iter::once(text).chain(pooled).collect())
    }
}

/// What makes pictures of latents, as a file: `latents` `(B, C, H, W)`, as the network makes them, to `image`.
#[derive(Clone, Debug)]
pub struct Decoding {
    /// The decoder's autoencoder.
    pub autoencoder: Autoencoder,
    /// Height and width of latents.
    pub size: [usize; 2],
}

impl Module for Decoding {
    fn inputs(&self) -> Vec<Input> {
        let [height, width] = self.size;
        let shape = vec![self.autoencoder.latent_channels(), height, width];
        vec![Input { name: "latents".into(), shape, like: Like::Normal }]
    }

    fn sigma(&self) -> Option<f64> {
        None
    }

    fn device(&self) -> Device {
        self.autoencoder.device().map_or(Device::Cpu, Device::clone)
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        _: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        Ok(vec![self.autoencoder.decode_by(b, &inputs[0])?])
    }
}
