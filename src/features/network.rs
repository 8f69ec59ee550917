//! An ONNX network run on candle tensors, so that gradients flow through it.

use super::feeding::{Feeding, Layout, with_outputs};
use crate::loss::perceptual;
use crate::onnx_sizes;
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{Device, Tensor};
use candle_onnx::onnx::{GraphProto, ModelProto, NodeProto, ValueInfoProto, tensor_shape_proto, type_proto};
use dmd_export::missing_operator;
use prost::Message;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The network, which computes on the CPU, wherever the pictures are.
pub struct FeatureNetwork {
    path: PathBuf,
    feeding: Feeding,
    /// What pictures go into: one input for features, two for a network that is a distance itself.
    ports: Vec<Port>,
    /// Weights by name.
    weights: HashMap<String, Tensor>,
    /// In order, each as a graph of its own, whose values are the next one's.
    nodes: Vec<(NodeProto, ModelProto)>,
    outputs: Vec<String>,
}

/// An input, with what its declaration fixes.
struct Port {
    name: String,
    /// Type and shape, to hold pictures to.
    declared: ModelProto,
    layout: Layout,
}

impl Port {
    fn of(input: &ValueInfoProto) -> Self {
        let shape = match input.r#type.as_ref().and_then(|kind| kind.value.as_ref()) {
            Some(type_proto::Value::TensorType(tensor)) => tensor.shape.as_ref(),
            _ => None,
        };
        let axis = |dim: &tensor_shape_proto::Dimension| match dim.value {
            Some(tensor_shape_proto::dimension::Value::DimValue(n)) => usize::try_from(n).ok().filter(|n| *n > 0),
            _ => None,
        };
        let axes: Vec<Option<usize>> = shape.iter().flat_map(|shape| &shape.dim).map(axis).collect();
        let declared = alone(GraphProto { input: vec![input.clone()], ..Default::default() });
        Port { name: input.name.clone(), declared, layout: Layout::of(&axes) }
    }
}

impl FeatureNetwork {
    /// Reads the file and finds its inputs.
    pub fn load(path: &Path) -> Result<Self> {
        let path_text = path.display();
        let feeding = Feeding::beside(path)?;
        let bytes = with_outputs(std::fs::read(path).context(path_text.to_string())?, &feeding.output);
        let model = ModelProto::decode(bytes.as_slice())
            .map_err(|error| anyhow!("{path_text}: is no ONNX file: {}", first_line(&error)))?;
        let graph = model.graph.with_context(|| format!("{path_text}: holds no graph"))?;
        let is_weight = |name: &String| graph.initializer.iter().any(|tensor| tensor.name == *name);
        let inputs = graph.input.iter().filter(|input| !is_weight(&input.name));
        let ports: Vec<Port> = inputs.map(Port::of).collect();
        ensure!(
            (1..=2).contains(&ports.len()),
            "{path_text}: has {} inputs, expected one, a batch of pictures, or two batches to compare",
            ports.len()
        );
        let outputs: Vec<String> = match feeding.output.is_empty() {
            true => graph.output.iter().map(|output| output.name.clone()).collect(),
            false => feeding.output.clone(),
        };
        ensure!(!outputs.is_empty(), "{path_text}: has no outputs");
        let output = graph.initializer.iter().map(|tensor| named(&tensor.name)).collect();
        let weights = alone(GraphProto { initializer: graph.initializer, output, ..Default::default() });
        let weights = candle_onnx::simple_eval(&weights, HashMap::new())
            .map_err(|error| anyhow!("{path_text}: cannot be read: {}", first_line(&error)))?;
        let nodes = graph.node.into_iter().map(by_itself).collect();
        Ok(FeatureNetwork { path: path.to_path_buf(), feeding, ports, weights, nodes, outputs })
    }

    /// What it is fed.
    pub fn feeding(&self) -> &Feeding {
        &self.feeding
    }

    /// Whether its maps have their channels last.
    pub fn channels_last(&self) -> bool {
        self.ports[0].layout.channels_last
    }

    /// How far pictures `(B, C, H, W)` are from others, a scalar: by their features, or the mean of what a network of two
    /// inputs says (LPIPS).
    pub fn distance(&self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        match self.ports.len() {
            1 => perceptual(&self.features(x)?, &self.features(target)?),
            _ => {
                let distances = self.outputs(&[x, target])?;
                let [distance] = &distances[..] else {
                    bail!("{}: has {} outputs, expected one, the distance", self.path.display(), distances.len());
                };
                Ok(distance.mean_all()?)
            }
        }
    }

    /// All outputs for pictures `(B, C, H, W)`; each `(B, C', …)`.
    pub fn features(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        let path = self.path.display();
        ensure!(self.ports.len() == 1, "{path}: has 2 inputs, expected one: it compares pictures and has no features");
        let maps = self.outputs(&[images])?;
        for (name, map) in self.outputs.iter().zip(&maps) {
            ensure!(
                map.rank() >= 2 && map.dim(0)? == images.dim(0)?,
                "{path}: output \"{name}\" is {:?}, expected a row of channels or more per picture",
                map.dims()
            );
        }
        Ok(maps)
    }

    /// All outputs, on the device of the pictures, which go in as many at a time, and as large, as the inputs ask for.
    fn outputs(&self, images: &[&Tensor]) -> Result<Vec<Tensor>> {
        let path = self.path.display();
        let n = images[0].dim(0)?;
        let at_a_time = self.ports.iter().find_map(|port| port.layout.batch).unwrap_or(n);
        ensure!(n % at_a_time == 0, "{path}: takes {at_a_time} pictures at a time, of which {n} are no multiple");
        let mut parts: Vec<Vec<Tensor>> = vec![Vec::new(); self.outputs.len()];
        for first in (0..n).step_by(at_a_time) {
            let part = |x: &&Tensor| x.narrow(0, first, at_a_time);
            let part = images.iter().map(part).collect::<candle_core::Result<Vec<_>>>()?;
            let mut values = self.values(&part).map_err(|error| {
                let text = error.to_string();
                let reason = match missing_operator(&text) {
                    Some(operator) => format!("candle has no operator {operator}; take a network without it"),
                    None => first_line(&text),
                };
                anyhow!("{path}: cannot be run on pictures {:?}: {reason}", part[0].dims())
            })?;
            for (name, parts) in self.outputs.iter().zip(&mut parts) {
                parts.push(values.remove(name).with_context(|| format!("{path}: no output \"{name}\""))?);
            }
        }
        let joined = |parts: Vec<Tensor>| -> candle_core::Result<Tensor> {
            let whole = if parts.len() == 1 { parts[0].clone() } else { Tensor::cat(&parts, 0)? };
            whole.to_device(images[0].device())
        };
        Ok(parts.into_iter().map(joined).collect::<candle_core::Result<_>>()?)
    }

    /// Every value of the graph.
    fn values(&self, images: &[Tensor]) -> candle_core::Result<HashMap<String, Tensor>> {
        let mut values = self.weights.clone();
        for (port, images) in self.ports.iter().zip(images) {
            let images = self.feeding.fed(&images.to_device(&Device::Cpu)?, &port.layout)?;
            values.insert(port.name.clone(), images);
            candle_onnx::simple_eval(&port.declared, values.clone())?;
        }
        for (node, graph) in &self.nodes {
            onnx_sizes::check_room(node, &values)?;
            let x = node.input.first().and_then(|name| values.get(name));
            let computed = match (node.op_type.as_str(), x) {
                ("MaxPool", Some(x)) => max_pool(node, x)?,
                ("GlobalAveragePool", Some(x)) => x.mean_keepdim((2, 3))?,
                _ => {
                    values.extend(candle_onnx::simple_eval(graph, values.clone())?);
                    continue;
                }
            };
            values.extend(node.output.first().map(|name| (name.clone(), computed)));
        }
        Ok(values)
    }
}

/// The largest value of every window, as pointwise maxima of shifted pictures. candle's own pooling is not taken: the
/// gradient that it gives back is too small, by the number of values in a window (candle-core 0.11.1), and there is none
/// where windows overlap. `x` is `(B, C, H, W)`.
fn max_pool(node: &NodeProto, x: &Tensor) -> candle_core::Result<Tensor> {
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
    let ints = |name: &str, default: Vec<i64>| attribute(name).map_or(default, |attribute| attribute.ints.clone());
    let plain = ints("dilations", vec![1; 2]).iter().all(|dilation| *dilation == 1)
        && attribute("ceil_mode").is_none_or(|mode| mode.i == 0)
        && attribute("auto_pad").is_none_or(|pad| pad.s == b"NOTSET" || pad.s == b"VALID");
    let (kernel, stride) = (ints("kernel_shape", vec![]), ints("strides", vec![1; 2]));
    let pads = ints("pads", vec![0; 4]);
    let (&[rows, columns], &[down, right], &[top, left, bottom, end], true) =
        (kernel.as_slice(), stride.as_slice(), pads.as_slice(), plain)
    else {
        candle_core::bail!("MaxPool is taken over two axes, without dilation, ceil_mode and automatic padding")
    };
    let x = &padded(&padded(x, 2, [top, bottom])?, 3, [left, end])?;
    let (_, _, h, w) = x.dims4()?;
    let (h, w) = (h as i64, w as i64);
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

/// With values before and after along an axis that no maximum takes.
fn padded(x: &Tensor, axis: usize, pads: [i64; 2]) -> candle_core::Result<Tensor> {
    let edge = |n: i64| -> candle_core::Result<Option<Tensor>> {
        let mut dims = x.dims().to_vec();
        dims[axis] = usize::try_from(n).map_err(candle_core::Error::wrap)?;
        (n > 0).then(|| Tensor::full(f32::MIN, dims, x.device())).transpose()
    };
    let parts = [edge(pads[0])?, Some(x.clone()), edge(pads[1])?];
    Tensor::cat(&parts.into_iter().flatten().collect::<Vec<_>>(), axis)
}

/// A graph as a model.
fn alone(graph: GraphProto) -> ModelProto {
    ModelProto { graph: Some(graph), ..Default::default() }
}

/// A node, and the graph of it alone.
fn by_itself(node: NodeProto) -> (NodeProto, ModelProto) {
    let output = node.output.iter().filter(|name| !name.is_empty()).map(|name| named(name)).collect();
    (node.clone(), alone(GraphProto { node: vec![node], output, ..Default::default() }))
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
    use crate::loss::l2;
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
        // Padding is never the largest.
        let pads = AttributeProto { name: "pads".into(), ints: vec![1; 4], ..Default::default() };
        let node = NodeProto { attribute: [node.attribute, vec![pads]].concat(), ..Default::default() };
        let pooled = max_pool(&node, &(x.as_tensor() - 100.0).unwrap()).unwrap();
        let pooled = pooled.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(pooled, [7.0, 9.0, 11.0, 19.0, 21.0, 23.0, 31.0, 33.0, 35.0].map(|largest| largest - 100.0));
    }

    /// A network of these inputs and nodes `(operator, inputs, output)`, the last of which is the output.
    fn network(inputs: &[&str], batch: Option<usize>, nodes: &[(&str, [&str; 2], &str)]) -> FeatureNetwork {
        let layout = Layout { batch, ..Layout::default() };
        let port = |name: &&str| Port { layout: layout.clone(), ..Port::of(&named(name)) };
        let node = |(operator, input, output): &(&str, [&str; 2], &str)| {
            by_itself(NodeProto {
                op_type: operator.to_string(),
                input: input.map(String::from).into(),
                output: vec![output.to_string()],
                ..Default::default()
            })
        };
        FeatureNetwork {
            path: "made.onnx".into(),
            feeding: Feeding::default(),
            ports: inputs.iter().map(port).collect(),
            weights: HashMap::new(),
            nodes: nodes.iter().map(node).collect(),
            outputs: vec![nodes[nodes.len() - 1].2.into()],
        }
    }

    fn pictures(seed: u64) -> Var {
        let values = dmd_runtime::noise::Stream::new(seed, 0, 0).normal(3 * 2 * 4 * 4);
        Var::from_tensor(&Tensor::from_vec(values, (3, 2, 4, 4), &Device::Cpu).unwrap()).unwrap()
    }

    /// A network that compares: here (a − b)², whose mean is the l2 distance, with its gradient.
    #[test]
    fn a_network_of_two_inputs_is_the_distance() {
        let squares = network(&["a", "b"], None, &[("Sub", ["a", "b"], "d"), ("Mul", ["d", "d"], "y")]);
        let [x, target] = [1, 2].map(pictures);
        let value_and_gradient = |distance: Tensor| {
            let grad = distance.backward().unwrap().get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (distance.to_scalar::<f32>().unwrap(), grad)
        };
        let found = value_and_gradient(squares.distance(&x, &target).unwrap());
        let expected = value_and_gradient(l2(&x, &target).unwrap());
        assert!((found.0 - expected.0).abs() < 1e-6, "{} {}", found.0, expected.0);
        assert!(found.1.iter().zip(&expected.1).all(|(a, b)| (a - b).abs() < 1e-6));
        assert!(squares.features(&x).unwrap_err().to_string().contains("has no features"));
    }

    #[test]
    fn a_network_for_one_picture_gets_one_at_a_time() {
        let nodes = [("Mul", ["a", "a"], "y")];
        let [any, one, two] = [None, Some(1), Some(2)].map(|batch| network(&["a"], batch, &nodes));
        let [x, target] = [3, 4].map(pictures);
        let distance = |network: &FeatureNetwork| network.distance(&x, &target).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(distance(&any), distance(&one));
        assert!(two.features(&x).unwrap_err().to_string().contains("takes 2 pictures at a time, of which 3"));
    }
}
