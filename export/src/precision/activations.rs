//! w8a8: what convolutions and matrix products read is rounded to int8 too, by QuantizeLinear and DequantizeLinear
//! around them, which engines merge into integer kernels. Ranges come from the distribution that the file will see,
//! unit normal noise and every label, so that no data is needed. Layers differ widely in what they lose: each is
//! measured alone, and the worst stay in single precision until the picture is close enough (Zhao et al. 2024, "MixDQ").

use super::weights::{Quantized, quantized};
use super::{frame, outermost_convs, read_names, weights};
use crate::interpret::{Interpreter, See};
use crate::onnx::{
    Dim, constants, dims, element_type, initializer, int as int_attribute, little_endian, tensor_type, value_info,
    value_info_like, values_f32,
};
use crate::verify::{self, Feeds, Inputs};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::tensor_shape_proto::dimension;
use candle_onnx::onnx::{GraphProto, NodeProto, TensorProto, ValueInfoProto};
use dmd_runtime::Output;
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// What a layer costs if it alone is quantised.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerSensitivity {
    /// The node.
    pub node: String,
    /// PSNR of the pictures against fp32, in dB; of u8 pictures before they are clipped and rounded to bytes.
    pub psnr_db: f64,
    /// Whether it was kept in single precision.
    pub kept_float: bool,
}

/// Quantises all layers but as many of the worst as it takes to be within `max_drop_db` of the same graph with its
/// weights alone quantised.
pub(crate) fn rewrite(
    graph: &GraphProto,
    inputs: &Inputs,
    max_drop_db: f64,
) -> Result<(GraphProto, Vec<LayerSensitivity>)> {
    let calibration = calibrate(graph, inputs)?;
    let expected = &calibration.outputs[..inputs.n_measured_runs()];
    let psnr =
        |graph: &GraphProto| psnr_db(expected, &outputs(&Interpreter::new(graph), inputs, expected.len())?, graph);
    let wanted = psnr(&weights::rewrite(graph.clone())?)? - max_drop_db;
    let with = |layers: &HashSet<&str>| quantize(graph, layers, &calibration.ranges);
    let mut layers = Vec::new();
    for node in layers_of(graph) {
        layers.push((node, psnr(&with(&HashSet::from([node]))?)?));
    }
    layers.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(b.0)));
    // The fewest that may stay: between all quantised and none.
    let (mut low, mut high) = (0, layers.len());
    while low < high {
        let kept = low.midpoint(high);
        let close = psnr(&with(&layers[kept..].iter().map(|layer| layer.0).collect())?)? >= wanted;
        if close { high = kept } else { low = kept + 1 }
    }
    let result = with(&layers[high..].iter().map(|layer| layer.0).collect())?;
    let report = |(i, (node, psnr_db)): (usize, &(&str, f64))| LayerSensitivity {
        node: node.to_string(),
        psnr_db: *psnr_db,
        kept_float: i < high,
    };
    Ok((result, layers.iter().enumerate().map(report).collect()))
}

/// Sums of fewer products are not worth their rounding: to and from integers costs as much as they save. With 48
/// channels that leaves pointwise convolutions and attention in single precision, faster so on a CPU.
const MIN_PRODUCTS: i64 = 128;

/// Convolutions but the outermost, and products of two values, where each number is a long enough sum.
fn layers_of(graph: &GraphProto) -> Vec<&str> {
    let kept: HashSet<&str> = outermost_convs(graph).into_iter().collect();
    let weights = constants(graph);
    let infos: HashMap<&str, &ValueInfoProto> =
        graph.value_info.iter().map(|info| (info.name.as_str(), info)).collect();
    let products = |node: &NodeProto| match node.op_type.as_str() {
        "Conv" if !kept.contains(node.name.as_str()) => {
            weights.get(node.input[1].as_str()).map_or(0, |weight| weight.dims[1..].iter().product())
        }
        "MatMul" => infos.get(node.input[0].as_str()).and_then(|info| last_length(info)).unwrap_or(0),
        _ => 0,
    };
    graph.node.iter().filter(|node| products(node) >= MIN_PRODUCTS).map(|node| node.name.as_str()).collect()
}

/// The length of a value's last axis.
fn last_length(info: &ValueInfoProto) -> Option<i64> {
    match tensor_type(info)?.shape.as_ref()?.dim.last()?.value {
        Some(dimension::Value::DimValue(n)) => Some(n),
        _ => None,
    }
}

/// Numbers of a value that are kept to choose its range by.
const MAX_SEEN: usize = 1 << 15;

struct Calibration {
    ranges: HashMap<String, Range>,
    outputs: Vec<Vec<Tensor>>,
}

/// Runs the graph and chooses a range for whatever a layer reads or a convolution gives.
fn calibrate(graph: &GraphProto, inputs: &Inputs) -> Result<Calibration> {
    let layers: HashSet<&str> = layers_of(graph).into_iter().collect();
    let mut seen: HashMap<String, Vec<f32>> = HashMap::new();
    let interpreter = Interpreter::new(graph);
    let runs = inputs.runs()?;
    let mut outputs = Vec::with_capacity(runs.len());
    let mut keep = |name: &str, tensor: &Tensor| -> Result<()> {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let step = (values.len() * runs.len()).div_ceil(MAX_SEEN).max(1);
        let kept = seen.entry(name.into()).or_default();
        kept.extend(values.iter().step_by(step));
        // The extremes count whether they are among the kept or not.
        kept.extend([values.iter().copied().fold(0.0, f32::min), values.iter().copied().fold(0.0, f32::max)]);
        Ok(())
    };
    for feeds in &runs {
        let mut see = |node: &NodeProto, x: &[&Tensor], y: Tensor| -> Result<Tensor> {
            match node.op_type.as_str() {
                _ if !layers.contains(node.name.as_str()) => {}
                "Conv" => keep(&node.input[0], x[0]).and_then(|()| keep(&node.output[0], &y))?,
                _ => keep(&node.input[0], x[0]).and_then(|()| keep(&node.input[1], x[1]))?,
            }
            Ok(y)
        };
        outputs.push(output(&interpreter, feeds, &mut see)?);
    }
    let ranges = seen.into_iter().map(|(name, values)| (name, Range::of(&values))).collect();
    Ok(Calibration { ranges, outputs })
}

/// An affine map from −128..=127 to numbers: `(q − zero)·scale`.
#[derive(Clone, Copy, Debug)]
struct Range {
    scale: f32,
    zero: i8,
}

impl Range {
    /// The range with the least squared error; it always holds 0, which padding needs exactly.
    fn of(values: &[f32]) -> Self {
        let low = values.iter().copied().fold(0.0, f32::min);
        let high = values.iter().copied().fold(0.0, f32::max);
        let shrunk = (0..=12).map(|step| 1.0 - 0.05 * step as f32);
        let ranges = shrunk.map(|part| Range::between(low * part, high * part));
        let error = |range: &Range| -> f64 { values.iter().map(|x| f64::from(range.round(*x) - x).powi(2)).sum() };
        let best = ranges.map(|range| (error(&range), range)).min_by(|a, b| a.0.total_cmp(&b.0));
        best.map_or(Range { scale: 1.0, zero: 0 }, |(_, range)| range)
    }

    fn between(low: f32, high: f32) -> Self {
        let scale = (high - low) / 255.0;
        if scale <= f32::MIN_POSITIVE {
            return Range { scale: 1.0, zero: 0 };
        }
        Range { scale, zero: (-128.0 - low / scale).round_ties_even() as i8 }
    }

    fn round(self, x: f32) -> f32 {
        let zero = f32::from(self.zero);
        (((x / self.scale).round_ties_even() + zero).clamp(-128.0, 127.0) - zero) * self.scale
    }
}

/// The graph with these layers quantised.
fn quantize(graph: &GraphProto, layers: &HashSet<&str>, ranges: &HashMap<String, Range>) -> Result<GraphProto> {
    let infos = graph.value_info.iter().chain(&graph.input);
    let mut rewrite = Rewrite {
        constants: constants(graph),
        infos: infos.map(|info| (info.name.as_str(), info)).collect(),
        ranges,
        rounded: HashSet::new(),
        given: HashSet::new(),
        result: frame(graph),
    };
    for node in &graph.node {
        match (layers.contains(node.name.as_str()), node.op_type.as_str()) {
            (true, "Conv") => rewrite.conv(node)?,
            (true, _) => {
                let input = node.input.iter().map(|name| rewrite.rounded(name)).collect::<Result<_>>()?;
                rewrite.result.node.push(NodeProto { input, ..node.clone() });
            }
            (false, _) => rewrite.result.node.push(node.clone()),
        }
    }
    let Rewrite { mut result, .. } = rewrite;
    // What is still read of the source goes before what was made.
    let read = read_names(&result);
    let kept = graph.initializer.iter().filter(|tensor| read.contains(tensor.name.as_str())).cloned();
    let kept: Vec<TensorProto> = kept.collect();
    result.initializer.splice(..0, kept);
    Ok(result)
}

struct Rewrite<'a> {
    constants: HashMap<&'a str, &'a TensorProto>,
    infos: HashMap<&'a str, &'a ValueInfoProto>,
    ranges: &'a HashMap<String, Range>,
    /// Values that have been rounded, and constants that have been made.
    rounded: HashSet<String>,
    /// Values of quantised convolutions, which are on their range already.
    given: HashSet<String>,
    result: GraphProto,
}

impl<'a> Rewrite<'a> {
    /// An integer kernel takes over where everything around a convolution is quantised: what it reads, its weight, its
    /// bias as whole multiples of the products' step, and what it gives.
    fn conv(&mut self, node: &NodeProto) -> Result<()> {
        let (name, value) = (&node.name, &node.output[0]);
        let weight = self.floats(node, 1)?;
        let input = self.rounded(&node.input[0])?;
        let step = self.range(&node.input[0])?.scale;
        let Quantized { values, scales } = quantized(weight)?;
        let bytes = values.iter().map(|value| *value as u8).collect();
        let mut inputs = vec![input];
        inputs.push(self.constant(&node.input[1], initializer("", DataType::Int8, &dims(weight), bytes), &scales));
        if node.input.len() > 2 {
            let tensor = self.floats(node, 2)?;
            let scales: Vec<f32> = scales.iter().map(|scale| scale * step).collect();
            let whole = |(value, scale): (f32, &f32)| (value / scale).round_ties_even() as i32;
            let bytes = values_f32(tensor)?.into_iter().zip(&scales).map(whole).flat_map(i32::to_le_bytes).collect();
            // Two convolutions may share a bias, but not its step.
            let tensor = initializer("", DataType::Int32, &[scales.len()], bytes);
            inputs.push(self.constant(&format!("{name}.bias_of_products"), tensor, &scales));
        }
        let exact = format!("{name}.exact");
        self.result.node.push(NodeProto { input: inputs, output: vec![exact.clone()], ..node.clone() });
        self.declare(value, &exact, DataType::Float);
        self.given.insert(value.clone());
        self.pair(value, &exact, value)
    }

    /// The value behind a rounding to its range; made once.
    fn rounded(&mut self, name: &str) -> Result<String> {
        if self.given.contains(name) {
            return Ok(name.into());
        }
        let rounded = format!("{name}.rounded");
        if self.rounded.insert(rounded.clone()) {
            self.declare(name, &rounded, DataType::Float);
            self.pair(name, name, &rounded)?;
        }
        Ok(rounded)
    }

    /// QuantizeLinear and DequantizeLinear from value `from` to value `to`, over the range of `name`.
    fn pair(&mut self, name: &str, from: &str, to: &str) -> Result<()> {
        let Range { scale, zero } = self.range(name)?;
        let [step, origin, whole] = ["step", "zero", "int8"].map(|part| format!("{name}.{part}"));
        if self.rounded.insert(step.clone()) {
            self.result.initializer.push(initializer(&step, DataType::Float, &[], little_endian(&[scale])));
            self.result.initializer.push(initializer(&origin, DataType::Int8, &[], vec![zero as u8]));
        }
        let whole = if from == name { format!("{to}.int8") } else { whole };
        self.declare(name, &whole, DataType::Int8);
        for (operator, from, to) in [("QuantizeLinear", from, whole.as_str()), ("DequantizeLinear", &whole, to)] {
            self.result.node.push(NodeProto {
                name: format!("{to}.{}", if operator == "QuantizeLinear" { "quantize" } else { "dequantize" }),
                op_type: operator.into(),
                input: vec![from.into(), step.clone(), origin.clone()],
                output: vec![to.into()],
                ..Default::default()
            });
        }
        Ok(())
    }

    /// A constant as whole numbers times `scales`, one per output channel; made once.
    fn constant(&mut self, name: &str, whole: TensorProto, scales: &[f32]) -> String {
        let value = format!("{name}.float");
        if self.rounded.insert(value.clone()) {
            let [int, scale] = ["int", "scale"].map(|part| format!("{name}.{part}"));
            let dims: Vec<Dim> = dims(&whole).into_iter().map(Dim::Fixed).collect();
            self.result.initializer.push(TensorProto { name: int.clone(), ..whole });
            self.result.initializer.push(initializer(&scale, DataType::Float, &[scales.len()], little_endian(scales)));
            self.result.node.push(NodeProto {
                name: format!("{value}.dequantize"),
                op_type: "DequantizeLinear".into(),
                input: vec![int, scale],
                output: vec![value.clone()],
                attribute: vec![int_attribute("axis", 0)],
                ..Default::default()
            });
            self.result.value_info.push(value_info(&value, DataType::Float, &dims));
        }
        value
    }

    /// The constant of f32 that a node reads.
    fn floats(&self, node: &NodeProto, at: usize) -> Result<&'a TensorProto> {
        let found = self.constants.get(node.input[at].as_str()).copied();
        found.filter(|tensor| tensor.data_type == DataType::Float as i32).ok_or_else(|| no_constant(node, at))
    }

    fn range(&self, name: &str) -> Result<Range> {
        let found = self.ranges.get(name).copied();
        found.ok_or_else(|| Error::Malformed(vec![format!("value \"{name}\" was not seen while calibrating")]))
    }

    /// States the shape of a new value, which is that of another.
    fn declare(&mut self, like: &str, name: &str, kind: DataType) {
        self.result.value_info.extend(self.infos.get(like).map(|info| value_info_like(info, name, kind)));
    }
}

fn no_constant(node: &NodeProto, at: usize) -> Error {
    Error::Node { node: node.name.clone(), message: format!("\"{}\" is no constant of f32", node.input[at]) }
}

/// What the graph makes in the first runs.
pub(super) fn outputs(interpreter: &Interpreter, inputs: &Inputs, n_runs: usize) -> Result<Vec<Vec<Tensor>>> {
    let runs = inputs.runs()?.into_iter().take(n_runs);
    runs.map(|feeds| output(interpreter, &feeds, &mut |_, _, y| Ok(y))).collect()
}

/// What it makes in one run; where it ends in bytes, what is clipped and rounded to them. The bytes would hide what a layer
/// costs: nothing is left of a difference where the picture is white, and most of a small one rounds away.
pub(super) fn output(interpreter: &Interpreter, feeds: &Feeds, see: &mut See) -> Result<Vec<Tensor>> {
    let mut unclipped = None;
    let outputs = interpreter.run(feeds, &mut |node, x, y| {
        if node.op_type == "Clip" && interpreter.ends_in_bytes() {
            unclipped = Some(x[0].clone());
        }
        see(node, x, y)
    })?;
    Ok(unclipped.map_or(outputs, |picture| vec![picture]))
}

/// Peak signal to noise ratio of outputs, the worst of them; of pictures that span what they may, of anything else what it
/// does here.
pub(super) fn psnr_db(expected: &[Vec<Tensor>], found: &[Vec<Tensor>], graph: &GraphProto) -> Result<f64> {
    let mut worst = f64::INFINITY;
    for (at, port) in graph.output.iter().enumerate() {
        let (mut sum, mut low, mut high) = (0f64, f64::INFINITY, f64::NEG_INFINITY);
        for (a, b) in expected.iter().zip(found) {
            let number = |x: Tensor| -> candle_core::Result<f64> { Ok(f64::from(x.to_scalar::<f32>()?)) };
            sum += number((&a[at] - &b[at])?.sqr()?.mean_all()?)?;
            (low, high) = (low.min(number(a[at].min_all()?)?), high.max(number(a[at].max_all()?)?));
        }
        let span = match (port.name.as_str(), element_type(port)) {
            (_, Some(kind)) if kind == DataType::Uint8 as i32 => verify::peak(Output::U8),
            ("image", _) => verify::peak(Output::F32),
            _ => high - low,
        };
        match verify::psnr_db(sum / expected.len() as f64, span) {
            // Values that are no numbers are as far away as can be.
            psnr if psnr.is_nan() => return Ok(f64::NEG_INFINITY),
            psnr => worst = worst.min(psnr),
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_zero_exactly_and_rounds_within_half_a_step() {
        for values in [vec![-0.3f32, 0.0, 2.5], vec![1.0, 2.0], vec![-4.0, -1.0], vec![0.0]] {
            let range = Range::of(&values);
            assert_eq!(range.round(0.0), 0.0, "{range:?}");
            for x in &values {
                // The zero point is rounded too, which may cost the extremes half a step.
                assert!((range.round(*x) - x).abs() <= range.scale * 1.001, "{x} in {range:?}");
            }
        }
    }

    /// One outlier among many small values: the step is set by the many.
    #[test]
    fn a_range_gives_outliers_up_where_that_pays() {
        let mut values: Vec<f32> = (0..100_000).map(|i| (i as f32 * 0.618_034).fract()).collect();
        values.push(2.2);
        let range = Range::of(&values);
        assert!(range.scale < 2.15 / 255.0 && range.round(2.2) < 2.1, "{range:?}");
        assert!((range.round(1.0) - 1.0).abs() <= range.scale, "{range:?}");
    }
}
