//! How the regression term compares two pictures: pixel by pixel, or by the features of a network.

use crate::config::Distance;
use crate::loss::{l2, perceptual, pseudo_huber};
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_onnx::onnx::{GraphProto, ModelProto, NodeProto, ValueInfoProto};
use dmd_export::missing_operator;
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
            Distance::Onnx(path) => {
                let network = FeatureNetwork::load(Path::new(path))?;
                // One black picture shows what it lacks before a run begins.
                let config = teacher.unet.config();
                let [h, w] = config.size().context("a teacher has a size")?;
                network.features(&Tensor::zeros((1, config.in_channels, h, w), DType::F32, &Device::Cpu)?)?;
                Comparison::Onnx(Box::new(network))
            }
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
    /// The input's type and shape, to hold pictures to.
    port: ModelProto,
    /// Weights by name.
    weights: HashMap<String, Tensor>,
    /// In order, each as a graph of its own, whose values are the next one's.
    nodes: Vec<(NodeProto, ModelProto)>,
    input: String,
    outputs: Vec<String>,
}

impl FeatureNetwork {
    /// Reads the file and finds its one input.
    pub fn load(path: &Path) -> Result<Self> {
        let path_text = path.display();
        ensure!(path.exists(), "{path_text}: no such file (loss.regression.distance)");
        let model = candle_onnx::read_file(path)
            .map_err(|error| anyhow!("{path_text}: is no ONNX file: {}", first_line(&error)))?;
        let graph = model.graph.with_context(|| format!("{path_text}: holds no graph"))?;
        let is_weight = |name: &String| graph.initializer.iter().any(|tensor| tensor.name == *name);
        let inputs: Vec<&ValueInfoProto> = graph.input.iter().filter(|input| !is_weight(&input.name)).collect();
        let [input] = inputs[..] else {
            bail!("{path_text}: has {} inputs, expected one, a batch of pictures", inputs.len());
        };
        let outputs: Vec<String> = graph.output.iter().map(|output| output.name.clone()).collect();
        ensure!(!outputs.is_empty(), "{path_text}: has no outputs");
        let (input, port) =
            (input.name.clone(), alone(GraphProto { input: vec![input.clone()], ..Default::default() }));
        let output = graph.initializer.iter().map(|tensor| named(&tensor.name)).collect();
        let weights = alone(GraphProto { initializer: graph.initializer, output, ..Default::default() });
        let weights = candle_onnx::simple_eval(&weights, HashMap::new())
            .map_err(|error| anyhow!("{path_text}: cannot be read: {}", first_line(&error)))?;
        let one = |node: NodeProto| {
            let output = node.output.iter().filter(|name| !name.is_empty()).map(|name| named(name)).collect();
            (node.clone(), alone(GraphProto { node: vec![node], output, ..Default::default() }))
        };
        let nodes = graph.node.into_iter().map(one).collect();
        Ok(FeatureNetwork { path: path.to_path_buf(), port, weights, nodes, input, outputs })
    }

    /// All outputs for pictures `(B, C, H, W)`; each `(B, C', …)`.
    pub fn features(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        let path = self.path.display();
        let mut values = self.values(images).map_err(|error| {
            let text = error.to_string();
            let reason = match missing_operator(&text) {
                Some(operator) => format!("candle has no operator {operator}; take a network without it"),
                None => first_line(&text),
            };
            anyhow!("{path}: cannot be run on pictures {:?}: {reason}", images.dims())
        })?;
        let take = |name: &String| -> Result<Tensor> {
            let map = values.remove(name).with_context(|| format!("{path}: no output \"{name}\""))?;
            ensure!(
                map.rank() >= 2 && map.dim(0)? == images.dim(0)?,
                "{path}: output \"{name}\" is {:?}, expected a row of channels or more per picture",
                map.dims()
            );
            Ok(map)
        };
        self.outputs.iter().map(take).collect()
    }

    /// Every value of the graph.
    fn values(&self, images: &Tensor) -> candle_core::Result<HashMap<String, Tensor>> {
        let mut values = self.weights.clone();
        values.insert(self.input.clone(), images.clone());
        candle_onnx::simple_eval(&self.port, values.clone())?;
        for (node, graph) in &self.nodes {
            match (node.op_type.as_str(), node.input.first().and_then(|name| values.get(name))) {
                ("MaxPool", Some(x)) => {
                    let pooled = max_pool(node, x)?;
                    values.insert(node.output[0].clone(), pooled);
                }
                _ => values.extend(candle_onnx::simple_eval(graph, values.clone())?),
            }
        }
        Ok(values)
    }
}

/// The largest value of every window, as pointwise maxima of shifted pictures. candle's own pooling is not taken: the
/// gradient that it gives back is too small, by the number of values in a window (candle-core 0.11.1), and there is none
/// where windows overlap. Windows without padding; `x` is `(B, C, H, W)`.
fn max_pool(node: &NodeProto, x: &Tensor) -> candle_core::Result<Tensor> {
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
    let ints = |name: &str, default: i64| match attribute(name) {
        Some(attribute) => attribute.ints.clone(),
        None => vec![default; 2],
    };
    let plain = ints("pads", 0).iter().all(|pad| *pad == 0)
        && ints("dilations", 1).iter().all(|dilation| *dilation == 1)
        && attribute("ceil_mode").is_none_or(|mode| mode.i == 0)
        && attribute("auto_pad").is_none_or(|pad| pad.s == b"NOTSET" || pad.s == b"VALID");
    let (kernel, stride) = (ints("kernel_shape", 0), ints("strides", 1));
    let (_, _, h, w) = x.dims4()?;
    let (h, w) = (h as i64, w as i64);
    let (&[rows, columns], &[down, right], true) = (kernel.as_slice(), stride.as_slice(), plain) else {
        candle_core::bail!("MaxPool is taken over two axes, without padding, dilation and ceil_mode")
    };
    if !(1..=h).contains(&rows) || !(1..=w).contains(&columns) || down < 1 || right < 1 {
        candle_core::bail!("MaxPool over {kernel:?} with strides {stride:?} does not fit {:?}", x.dims())
    }
    let shifted = |x: &Tensor, axis: usize, first: i64, [n, window, step]: [i64; 3]| {
        let places = Tensor::arange_step(first, first + n - window + 1, step, x.device())?;
        x.index_select(&places, axis)
    };
    let mut largest: Option<Tensor> = None;
    for row in 0..rows {
        let strip = shifted(x, 2, row, [h, rows, down])?;
        for column in 0..columns {
            let candidate = shifted(&strip, 3, column, [w, columns, right])?;
            largest = Some(match largest {
                Some(largest) => largest.maximum(&candidate)?,
                None => candidate,
            });
        }
    }
    Ok(largest.expect("a window has one value at least, as was checked"))
}

/// A graph as a model.
fn alone(graph: GraphProto) -> ModelProto {
    ModelProto { graph: Some(graph), ..Default::default() }
}

fn named(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: name.into(), ..Default::default() }
}

/// The first line of an error, which a backtrace may follow.
fn first_line(error: &impl ToString) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;
    use candle_onnx::onnx::AttributeProto;

    /// Windows of 3 × 3, two apart: on numbers that grow, the largest is the last of each, and its gradient is 1.
    #[test]
    fn windows_that_overlap_give_their_gradient_to_the_largest() {
        let ints =
            |name: &str, ints: [i64; 2]| AttributeProto { name: name.into(), ints: ints.into(), ..Default::default() };
        let attribute = vec![ints("kernel_shape", [3, 3]), ints("strides", [2, 2])];
        let node = NodeProto { attribute, ..Default::default() };
        let x = Tensor::arange(0f32, 36.0, &Device::Cpu).unwrap().reshape((1, 1, 6, 6)).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let pooled = max_pool(&node, x.as_tensor()).unwrap();
        assert_eq!(pooled.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [14.0, 16.0, 26.0, 28.0]);
        let gradient = pooled.sum_all().unwrap().backward().unwrap().get(&x).unwrap().flatten_all().unwrap();
        let taken = gradient.to_vec1::<f32>().unwrap();
        assert_eq!((0..36).filter(|i| taken[*i] == 1.0).collect::<Vec<_>>(), [14, 16, 26, 28]);
        assert_eq!(taken.iter().sum::<f32>(), 4.0);
        let padded =
            NodeProto { attribute: [node.attribute, vec![ints("pads", [1, 1])]].concat(), ..Default::default() };
        assert!(max_pool(&padded, x.as_tensor()).unwrap_err().to_string().contains("without padding"));
    }
}
