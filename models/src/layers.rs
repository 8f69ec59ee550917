//! Layers: named parameters and nothing else. What is done with them is a [`Backend`](crate::backend::Backend)'s
//! business. Names are diffusers' tensor names without the final `.weight` or `.bias`.

use crate::{Error, Result, Weights, limits};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeSet;

/// Convolution over `(B, C, H, W)`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// Name of the layer inside the network, such as `down_blocks.1.resnets.0.conv1`.
    pub name: String,
    /// `(out, in, kh, kw)`; rank 2 `(out, in)` stands for a 1×1 kernel, as attention's projections are stored.
    pub weight: Tensor,
    /// `(out,)`.
    pub bias: Option<Tensor>,
    /// Step between two outputs, the same in both directions.
    pub stride: usize,
    /// Zeros on each side.
    pub padding: usize,
}

/// Transposed convolution over `(B, C, H, W)`: every pixel adds a multiple of the kernel, `stride` apart.
#[derive(Clone, Debug)]
pub struct ConvTranspose2d {
    /// Name of the layer inside the network.
    pub name: String,
    /// `(in, out, kh, kw)`.
    pub weight: Tensor,
    /// `(out,)`.
    pub bias: Option<Tensor>,
    /// Step between the places of two pixels.
    pub stride: usize,
    /// Rows and columns cut off on each side.
    pub padding: usize,
    /// Of these, kept on the right and below.
    pub output_padding: usize,
}

impl ConvTranspose2d {
    /// What is cut off above, left, below and right.
    pub fn pads(&self) -> Result<[usize; 4]> {
        let ConvTranspose2d { name, padding, output_padding, .. } = self;
        let end = padding.checked_sub(*output_padding).ok_or_else(|| {
            Error::Config(format!("{name}: output_padding {output_padding} is more than padding {padding}"))
        })?;
        Ok([*padding, *padding, end, end])
    }
}

/// Affine map of the last axis of `(B, C)`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Name of the layer inside the network.
    pub name: String,
    /// `(out, in)`.
    pub weight: Tensor,
    /// `(out,)`.
    pub bias: Option<Tensor>,
}

/// Group normalisation over `(B, C, H, W)` with an affine map per channel.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// Name of the layer inside the network.
    pub name: String,
    /// `(C,)`.
    pub weight: Tensor,
    /// `(C,)`.
    pub bias: Tensor,
    /// Number of groups; divides C.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
}

/// Layer normalisation of every pixel of `(B, C, H, W)` over its channels.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Name of the layer inside the network.
    pub name: String,
    /// Scale and shift `(C,)` each, if there are some.
    pub affine: Option<[Tensor; 2]>,
    /// Added to the variance.
    pub eps: f64,
}

/// Normalisation of every pixel of `(B, n·width, H, W)` by the root of its mean square over each run of `width` channels:
/// all of them, or those of a head.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// Name of the layer inside the network.
    pub name: String,
    /// `(width,)`.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

/// A table of vectors, looked up by an integer.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// Name of the layer inside the network.
    pub name: String,
    /// `(entries, width)`.
    pub weight: Tensor,
}

/// How a fresh parameter is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in ±bound (PyTorch's default for convolutions and linear maps, bound = 1/√fan_in).
    Uniform(f64),
    /// Normal with this standard deviation.
    Normal(f64),
    /// One value throughout.
    Const(f32),
}

/// Where a network under construction gets its parameters from: a file, or a random start.
pub trait Source {
    /// The parameter called `name`, f32 unless the file holds another dtype, of exactly this shape.
    fn tensor(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor>;
}

/// A [`Source`] seen from inside one module: every name gets the module's prefix.
pub struct Scope<'a> {
    source: &'a mut dyn Source,
    prefix: String,
}

impl<'a> Scope<'a> {
    /// The whole network.
    pub fn root(source: &'a mut dyn Source) -> Self {
        Scope { source, prefix: String::new() }
    }

    /// The submodule `name`.
    pub fn at(&mut self, name: impl std::fmt::Display) -> Scope<'_> {
        let prefix = self.path(name);
        Scope { source: self.source, prefix }
    }

    /// The full name of `name` in this module.
    pub fn path(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// A parameter of this module.
    pub fn tensor(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let path = self.path(name);
        self.source.tensor(&path, shape, init)
    }

    /// A square convolution `name` with bias; `zero` starts it at zero, as the last layer of a residual branch.
    pub fn conv2d(&mut self, name: &str, io: [usize; 2], kernel: usize, stride: usize, zero: bool) -> Result<Conv2d> {
        let [input, output] = io;
        let init = fan_in_init(input * kernel * kernel, zero);
        let mut scope = self.at(name);
        let weight = scope.tensor("weight", &[output, input, kernel, kernel], init)?;
        let bias = Some(scope.tensor("bias", &[output], init)?);
        Ok(Conv2d { name: scope.prefix, weight, bias, stride, padding: kernel / 2 })
    }

    /// A linear map `name` with bias.
    pub fn linear(&mut self, name: &str, io: [usize; 2]) -> Result<Linear> {
        let init = fan_in_init(io[0], false);
        let mut scope = self.at(name);
        let weight = scope.tensor("weight", &[io[1], io[0]], init)?;
        let bias = Some(scope.tensor("bias", &[io[1]], init)?);
        Ok(Linear { name: scope.prefix, weight, bias })
    }

    /// A linear map over channels, stored as rank 2 and used as a 1×1 convolution.
    pub fn pointwise(&mut self, name: &str, io: [usize; 2], zero: bool) -> Result<Conv2d> {
        let init = fan_in_init(io[0], zero);
        let mut scope = self.at(name);
        let weight = scope.tensor("weight", &[io[1], io[0]], init)?;
        let bias = Some(scope.tensor("bias", &[io[1]], init)?);
        Ok(Conv2d { name: scope.prefix, weight, bias, stride: 1, padding: 0 })
    }

    /// The same, with a bias if `bias`.
    pub fn projection(&mut self, name: &str, io: [usize; 2], bias: bool) -> Result<Conv2d> {
        if bias {
            return self.pointwise(name, io, false);
        }
        let mut scope = self.at(name);
        let weight = scope.tensor("weight", &[io[1], io[0]], fan_in_init(io[0], false))?;
        Ok(Conv2d { name: scope.prefix, weight, bias: None, stride: 1, padding: 0 })
    }

    /// A group norm `name`.
    pub fn group_norm(&mut self, name: &str, channels: usize, groups: usize, eps: f64) -> Result<GroupNorm> {
        let mut scope = self.at(name);
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::Config(format!(
                "{}: {channels} channels do not divide into {groups} groups (norm_num_groups)",
                scope.prefix
            )));
        }
        let weight = scope.tensor("weight", &[channels], Init::Const(1.0))?;
        let bias = scope.tensor("bias", &[channels], Init::Const(0.0))?;
        Ok(GroupNorm { name: scope.prefix, weight, bias, groups, eps })
    }

    /// A layer norm `name` with scale and shift.
    pub fn layer_norm(&mut self, name: &str, channels: usize, eps: f64) -> Result<LayerNorm> {
        let mut scope = self.at(name);
        let weight = scope.tensor("weight", &[channels], Init::Const(1.0))?;
        let bias = scope.tensor("bias", &[channels], Init::Const(0.0))?;
        Ok(LayerNorm { name: scope.prefix, affine: Some([weight, bias]), eps })
    }

    /// A norm `name` by the mean square of runs of `width` channels.
    pub fn rms_norm(&mut self, name: &str, width: usize, eps: f64) -> Result<RmsNorm> {
        let mut scope = self.at(name);
        let weight = scope.tensor("weight", &[width], Init::Const(1.0))?;
        Ok(RmsNorm { name: scope.prefix, weight, eps })
    }

    /// An embedding table `name`.
    pub fn embedding(&mut self, name: &str, entries: usize, width: usize) -> Result<Embedding> {
        let mut scope = self.at(name);
        let weight = scope.tensor("weight", &[entries, width], Init::Normal(1.0))?;
        Ok(Embedding { name: scope.prefix, weight })
    }
}

fn fan_in_init(fan_in: usize, zero: bool) -> Init {
    if zero { Init::Const(0.0) } else { Init::Uniform(1.0 / (fan_in as f64).sqrt()) }
}

/// Takes parameters out of [`Weights`] and keeps count of what was missing, left over or of a wrong shape, so that one
/// error names them all.
pub struct Loader<'a> {
    weights: &'a Weights,
    taken: BTreeSet<String>,
    problems: Vec<String>,
}

impl<'a> Loader<'a> {
    /// Reads from `weights`.
    pub fn new(weights: &'a Weights) -> Self {
        Loader { weights, taken: BTreeSet::new(), problems: Vec::new() }
    }

    /// Fails when a tensor was missing, mis-shaped, or was never asked for.
    pub fn finish(mut self) -> Result<()> {
        let extra = self.weights.names().filter(|name| !self.taken.contains(*name));
        self.problems.extend(extra.map(|name| format!("unexpected tensor \"{name}\"")));
        if self.problems.is_empty() {
            return Ok(());
        }
        Err(self.misfit())
    }

    fn misfit(&mut self) -> Error {
        let more = self.problems.len().saturating_sub(MAX_PROBLEMS);
        self.problems.truncate(MAX_PROBLEMS);
        let tail = if more > 0 { format!("; and {more} more") } else { String::new() };
        Error::Weights(self.problems.join("; ") + &tail)
    }
}

/// A wrong config makes every tensor wrong; the first few tell the story.
const MAX_PROBLEMS: usize = 12;

impl Source for Loader<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize], _init: Init) -> Result<Tensor> {
        self.taken.insert(name.to_string());
        match self.weights.get(name) {
            Some(tensor) if tensor.dims() == shape => return Ok(tensor.clone()),
            Some(tensor) => {
                self.problems.push(format!("tensor \"{name}\" has shape {:?}, expected {shape:?}", tensor.dims()))
            }
            None => self.problems.push(format!("tensor \"{name}\" {shape:?} is missing")),
        }
        if self.problems.len() > limits::MISSING_TENSORS {
            return Err(self.misfit());
        }
        // A stand-in, so that the walk goes on and finds the other problems; `finish` never lets it out. One number,
        // whatever the shape: a config may ask for what no memory holds.
        Ok(Tensor::zeros(1, DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
    }
}

/// A function that fills a parameter's place with uniform draws in [0, 1): `(name, count)` to values.
pub type Draws<'a> = dyn FnMut(&str, usize) -> Vec<f64> + 'a;

/// Draws fresh parameters, each from its own stream so that adding a layer does not change the others.
pub struct Random<'a> {
    draw: &'a mut Draws<'a>,
    /// What has been drawn so far.
    pub weights: Weights,
}

impl<'a> Random<'a> {
    /// Parameters from `draw`, uniform in [0, 1).
    pub fn new(draw: &'a mut Draws<'a>) -> Self {
        Random { draw, weights: Weights::default() }
    }
}

impl Source for Random<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let count: usize = shape.iter().product();
        if count > limits::PARAMETERS - self.weights.n_parameters().min(limits::PARAMETERS) {
            return Err(Error::Config(format!(
                "the network has more than {} parameters, which is more than is drawn here: its config asks for too wide or too many layers",
                limits::PARAMETERS
            )));
        }
        let values: Vec<f32> = match init {
            Init::Const(value) => vec![value; count],
            Init::Uniform(bound) => {
                (self.draw)(name, count).into_iter().map(|u| ((2.0 * u - 1.0) * bound) as f32).collect()
            }
            Init::Normal(std) => {
                let u = (self.draw)(name, 2 * count);
                // Box and Muller; 1 − u keeps the logarithm finite.
                u.chunks_exact(2)
                    .map(|p| {
                        let radius = libm::sqrt(-2.0 * libm::log(1.0 - p[0]));
                        (std * radius * libm::cos(std::f64::consts::TAU * p[1])) as f32
                    })
                    .collect()
            }
        };
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        self.weights.insert(name, tensor.clone());
        Ok(tensor)
    }
}
