//! How the regression term compares two pictures: pixel by pixel, or by the features of a network.

use crate::config::Distance;
use crate::loss::{l2, perceptual, pseudo_huber};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use candle_onnx::onnx::{GraphProto, ModelProto};
use dmd_models::{Denoiser, Eager, ModelFolder};
use ndarray::{Array2, Array4};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A distance ready to be measured.
pub enum Comparison {
    /// Mean square.
    L2,
    /// Between square and absolute value.
    PseudoHuber,
    /// Features of the teacher's encoder.
    Teacher(Box<Denoiser>),
    /// Features of an ONNX network.
    Onnx(Box<FeatureNetwork>),
}

/// The noise level at which the teacher's encoder looks at clean pictures: low enough to see them whole.
const FEATURE_SIGMA: f64 = 0.1;

impl Comparison {
    /// Reads what the distance needs.
    pub fn new(distance: &Distance, teacher: &Denoiser) -> Result<Self> {
        Ok(match distance {
            Distance::L2 => Comparison::L2,
            Distance::PseudoHuber => Comparison::PseudoHuber,
            Distance::TeacherFeatures => Comparison::Teacher(Box::new(teacher.clone())),
            Distance::Onnx(path) => Comparison::Onnx(Box::new(FeatureNetwork::load(Path::new(path))?)),
        })
    }

    /// Distance of pictures f32 `(B, C, H, W)`, a scalar; the gradient reaches `x` only, networks stay as they are.
    pub fn distance(&self, x: &Tensor, target: &Tensor, label: Option<&Tensor>) -> Result<Tensor> {
        let features = |images: &Tensor| -> Result<Vec<Tensor>> {
            match self {
                Comparison::Teacher(teacher) => Ok(teacher.features(&Eager, images, &[FEATURE_SIGMA], label)?),
                Comparison::Onnx(network) => network.features(images),
                Comparison::L2 | Comparison::PseudoHuber => Ok(Vec::new()),
            }
        };
        match self {
            Comparison::L2 => l2(x, target),
            Comparison::PseudoHuber => pseudo_huber(x, target),
            _ => perceptual(&features(x)?, &features(&target.detach())?),
        }
    }
}

/// Features of pictures to score them by: a teacher's encoder, or any ONNX network.
pub enum Features {
    /// A model folder's encoder, seeing pictures without a class where the model knows that, else as its first class.
    Model(Box<Denoiser>),
    /// An ONNX network.
    Onnx(Box<FeatureNetwork>),
}

impl Features {
    /// Reads a model folder or an .onnx file.
    pub fn load(path: &Path) -> Result<Self> {
        match path.is_dir() {
            true => {
                let folder = ModelFolder::load(path, &Device::Cpu)?;
                Ok(Features::Model(Box::new(folder.denoiser(&Device::Cpu)?)))
            }
            false => Ok(Features::Onnx(Box::new(FeatureNetwork::load(path)?))),
        }
    }

    /// Maps of pictures f32 `(B, C, H, W)` in [-1, 1].
    pub fn of(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Features::Onnx(network) => network.features(images),
            Features::Model(denoiser) => {
                let label = denoiser.n_classes().map(|n| if denoiser.null_class { n as i64 } else { 0 });
                let label = label.map(|label| Tensor::full(label, images.dim(0)?, images.device())).transpose()?;
                Ok(denoiser.features(&Eager, images, &[FEATURE_SIGMA], label.as_ref())?)
            }
        }
    }

    /// One row per picture: every map's mean over positions, side by side.
    pub fn rows(&self, images: &Array4<f32>, batch: usize) -> Result<Array2<f64>> {
        let (n, c, h, w) = images.dim();
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(n);
        for first in (0..n).step_by(batch) {
            let len = batch.min(n - first);
            let part = images.slice(ndarray::s![first..first + len, .., .., ..]);
            let values: Vec<f32> = part.iter().map(|v| v.clamp(-1.0, 1.0)).collect();
            let maps = self.of(&Tensor::from_vec(values, (len, c, h, w), &Device::Cpu)?)?;
            let maps: Vec<Vec<Vec<f32>>> = maps
                .into_iter()
                .map(|map| Ok(if map.rank() > 2 { map.flatten_from(2)?.mean(2)? } else { map }.to_vec2()?))
                .collect::<Result<_>>()?;
            rows.extend((0..len).map(|i| maps.iter().flat_map(|map| &map[i]).map(|v| f64::from(*v)).collect()));
        }
        let width = rows[0].len();
        Ok(Array2::from_shape_vec((n, width), rows.concat())?)
    }
}

/// An ONNX network run on candle tensors, so that gradients flow through it.
pub struct FeatureNetwork {
    path: PathBuf,
    model: ModelProto,
    input: String,
    outputs: Vec<String>,
}

impl FeatureNetwork {
    /// Reads the file and finds its one input.
    pub fn load(path: &Path) -> Result<Self> {
        ensure!(path.exists(), "{}: no such file (loss.regression.distance)", path.display());
        let model = candle_onnx::read_file(path).with_context(|| format!("{}: is no ONNX file", path.display()))?;
        let graph: &GraphProto = model.graph.as_ref().with_context(|| format!("{}: holds no graph", path.display()))?;
        let inputs: Vec<&String> = graph
            .input
            .iter()
            .map(|input| &input.name)
            .filter(|name| graph.initializer.iter().all(|tensor| tensor.name != **name))
            .collect();
        let [input] = inputs[..] else {
            bail!("{}: has {} inputs, expected one, a batch of pictures", path.display(), inputs.len());
        };
        let input = input.clone();
        let outputs = graph.output.iter().map(|output| output.name.clone()).collect::<Vec<_>>();
        ensure!(!outputs.is_empty(), "{}: has no outputs", path.display());
        Ok(FeatureNetwork { path: path.to_path_buf(), model, input, outputs })
    }

    /// All outputs for pictures `(B, C, H, W)`; each `(B, C', …)`.
    pub fn features(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        let inputs = HashMap::from([(self.input.clone(), images.clone())]);
        let mut found = candle_onnx::simple_eval(&self.model, inputs)
            .with_context(|| format!("{}: cannot be run on candle's operations", self.path.display()))?;
        let take = |name: &String| -> Result<Tensor> {
            let map = found.remove(name).with_context(|| format!("{}: no output \"{name}\"", self.path.display()))?;
            ensure!(
                map.rank() >= 2 && map.dim(0)? == images.dim(0)?,
                "{}: output \"{name}\" is {:?}, expected a row of channels or more per picture",
                self.path.display(),
                map.dims()
            );
            Ok(map)
        };
        self.outputs.iter().map(take).collect()
    }
}
