//! Runs an ONNX graph of ours node by node on candle, showing every value on the way: what calibration looks at, and
//! what the check for overflow trusts. Values are f32; one that the file declares as f16 is rounded to it, so that what
//! an accelerator would lose is lost here too. Quantised values are whole numbers in f32.

use crate::onnx::{Attributes, constants, dims, element_type, maps_channels, values_f32, values_i64};
use crate::{Error, Result};
use candle_core::{D, DType, Device, IndexOp, Tensor};
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::{GraphProto, NodeProto, TensorProto};
use dmd_models::layers::Conv2d;
use dmd_models::{Backend, Eager, ops};
use std::collections::{HashMap, HashSet};

/// A graph ready to be run.
pub(crate) struct Interpreter<'a> {
    graph: &'a GraphProto,
    /// Made into tensors where they are read: the graph and its tensors together would be the weights twice.
    constants: HashMap<&'a str, &'a TensorProto>,
    half: HashSet<&'a str>,
    /// Nodes that read and give f16, whatever the graph declares.
    nodes_in_half: HashSet<&'a str>,
    /// The last node that reads a value, by place.
    last_use: HashMap<&'a str, usize>,
}

/// Looks at a node, what it reads and what it gives, the latter before it is rounded to its declared type, and hands it on.
pub(crate) type See<'a> = dyn FnMut(&NodeProto, &[&Tensor], Tensor) -> Result<Tensor> + 'a;

impl<'a> Interpreter<'a> {
    pub fn new(graph: &'a GraphProto) -> Self {
        let half = graph.value_info.iter().filter(|info| element_type(info) == Some(DataType::Float16 as i32));
        let reads = graph.node.iter().enumerate().flat_map(|(at, node)| node.input.iter().map(move |name| (name, at)));
        Interpreter {
            graph,
            constants: constants(graph),
            half: half.map(|info| info.name.as_str()).collect(),
            nodes_in_half: HashSet::new(),
            last_use: reads.map(|(name, at)| (name.as_str(), at)).collect(),
        }
    }

    /// Computes as if these nodes of a graph in single precision were in half precision.
    pub fn in_half(self, nodes: HashSet<&'a str>) -> Self {
        Interpreter { nodes_in_half: nodes, ..self }
    }

    /// The outputs for feeds by name: f32, whole numbers i64; u8 pictures come as f32 too.
    pub fn run(&self, feeds: &[(String, Tensor)], see: &mut See) -> Result<Vec<Tensor>> {
        let mut values: HashMap<&str, Tensor> =
            feeds.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        let asked: Vec<&str> = self.graph.output.iter().map(|output| output.name.as_str()).collect();
        for (at, node) in self.graph.node.iter().enumerate() {
            let in_half = self.nodes_in_half.contains(node.name.as_str());
            let read = |(i, name): (usize, &String)| match self.value(&values, name)? {
                value if in_half && value.dtype().is_float() && reads_half(node, i) => through_half(&value),
                value => Ok(value),
            };
            let inputs: Vec<Tensor> = node.input.iter().enumerate().map(read).collect::<Result<_>>()?;
            let inputs: Vec<&Tensor> = inputs.iter().collect();
            let outputs = evaluate(node, &inputs)?;
            let mut given = Vec::with_capacity(outputs.len());
            for (name, output) in node.output.iter().zip(outputs) {
                let output = see(node, &inputs, output)?;
                let rounded = self.half.contains(name.as_str()) || in_half && output.dtype().is_float();
                given.push((name.as_str(), if rounded { through_half(&output)? } else { output }));
            }
            values.extend(given);
            values.retain(|name, _| asked.contains(name) || self.last_use.get(name).is_some_and(|last| *last > at));
        }
        asked.into_iter().map(|name| self.value(&values, name)).collect()
    }

    /// Whether its output is bytes.
    pub fn ends_in_bytes(&self) -> bool {
        self.graph.output.iter().any(|output| element_type(output) == Some(DataType::Uint8 as i32))
    }

    fn value(&self, values: &HashMap<&str, Tensor>, name: &str) -> Result<Tensor> {
        match (values.get(name), self.constants.get(name)) {
            (Some(value), _) => Ok(value.clone()),
            (None, Some(tensor)) => constant(tensor),
            (None, None) => Err(Error::Malformed(vec![format!("value \"{name}\" is read before it is computed")])),
        }
    }
}

/// Whether an input of a node in half precision is in it: a Resize takes its region and its factors in single precision
/// always.
pub(crate) fn reads_half(node: &NodeProto, input: usize) -> bool {
    node.op_type != "Resize" || input == 0
}

/// The nearest f16, as f32.
pub(crate) fn through_half(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F16)?.to_dtype(DType::F32)?)
}

fn constant(tensor: &TensorProto) -> Result<Tensor> {
    Ok(match tensor.data_type {
        kind if kind == DataType::Int64 as i32 => Tensor::from_vec(values_i64(tensor), dims(tensor), &Device::Cpu)?,
        _ => Tensor::from_vec(values_f32(tensor)?, dims(tensor), &Device::Cpu)?,
    })
}

fn evaluate(node: &NodeProto, x: &[&Tensor]) -> Result<Vec<Tensor>> {
    let attributes = Attributes(node);
    let one = |tensor: candle_core::Result<Tensor>| Ok(vec![tensor?]);
    match node.op_type.as_str() {
        "Add" => one(x[0].broadcast_add(x[1])),
        "Sub" => one(x[0].broadcast_sub(x[1])),
        "Mul" => one(x[0].broadcast_mul(x[1])),
        "Div" => one(x[0].broadcast_div(x[1])),
        "Sqrt" => one(x[0].sqrt()),
        "Relu" => one(x[0].relu()),
        "Sigmoid" => one(sigmoid(x[0])),
        "Tanh" => one(x[0].tanh()),
        "Erf" => one(x[0].erf()),
        "Gelu" => one(x[0].gelu_erf()),
        "Softplus" => one(softplus(x[0])),
        "Conv" => Ok(vec![conv(node, x)?]),
        "ConvTranspose" => {
            let pads = attributes.ints("pads")?;
            let pads = [0, 1, 2, 3].map(|at| pads[at] as usize);
            let stride = attributes.ints("strides")?[0] as usize;
            one(ops::conv_transpose2d(x[0], x[1], x.get(2).copied(), stride, pads))
        }
        "MatMul" => one(x[0].contiguous()?.broadcast_matmul(&x[1].contiguous()?)),
        "Softmax" => one(softmax(x[0])),
        "InstanceNormalization" => one(instance_norm(x[0], x[1], x[2], attributes.float("epsilon")?)),
        "GroupNormalization" => one(group_norm(node, x)?),
        "ReduceMean" => {
            let axis = match x.get(1) {
                Some(axes) => axes.i(0)?.to_scalar::<i64>()?,
                None => attributes.ints("axes")?[0],
            };
            one(x[0].mean_keepdim(axis as usize))
        }
        "Reshape" => one(x[0].contiguous()?.reshape(target_shape(x[0].dims(), &x[1].to_vec1::<i64>()?))),
        "Transpose" => {
            let perm: Vec<usize> = attributes.ints("perm")?.iter().map(|axis| *axis as usize).collect();
            one(x[0].permute(perm)?.contiguous())
        }
        "Resize" => Ok(vec![Eager.upsample_2x(x[0])?]),
        "AveragePool" => Ok(vec![Eager.avg_pool_2x(x[0])?]),
        "Pad" => Ok(vec![Eager.pad_right_bottom(x[0])?]),
        "Concat" => one(Tensor::cat(x, attributes.int("axis")? as usize)),
        "Split" => split(x[0], &x[1].to_vec1::<i64>()?, attributes.int("axis")? as usize),
        "Slice" => {
            let [start, end, axis] = [1, 2, 3].map(|at| Ok::<_, Error>(x[at].i(0)?.to_scalar::<i64>()? as usize));
            let start = start?;
            one(x[0].narrow(axis?, start, end? - start)?.contiguous())
        }
        "Gather" => {
            let rows = x[0].index_select(&x[1].flatten_all()?, 0)?;
            one(rows.reshape([x[1].dims(), &x[0].dims()[1..]].concat()))
        }
        "Clip" => one(x[0].clamp(&x[1].broadcast_as(x[0].shape())?, &x[2].broadcast_as(x[0].shape())?)),
        // To u8, which drops the fraction of what is not negative; between floats, the declared type does it.
        "Cast" if attributes.int("to")? == DataType::Uint8 as i64 => one(x[0].floor()),
        "Cast" => one(x[0].to_dtype(DType::F32)),
        "QuantizeLinear" => one(quantize_linear(x)?),
        "DequantizeLinear" => one(dequantize_linear(node, x)?),
        other => Err(Error::Malformed(vec![format!("node \"{}\": no meaning is known for {other}", node.name)])),
    }
}

fn sigmoid(x: &Tensor) -> candle_core::Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

/// log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|).
fn softplus(x: &Tensor) -> candle_core::Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

fn softmax(x: &Tensor) -> candle_core::Result<Tensor> {
    let powers = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

fn conv(node: &NodeProto, x: &[&Tensor]) -> Result<Tensor> {
    let attributes = Attributes(node);
    if let (true, [x, scale, shift]) = (maps_channels(node), x) {
        let per_channel = |values: &Tensor| values.reshape((1, values.elem_count(), 1, 1));
        return Ok(x.broadcast_mul(&per_channel(scale)?)?.broadcast_add(&per_channel(shift)?)?);
    }
    let [pads, strides] = [attributes.ints("pads")?, attributes.ints("strides")?];
    let at = |i: usize| pads[i] as usize;
    let (weight, bias) = (x[1].clone(), x.get(2).map(|bias| (*bias).clone()));
    let mut layer = Conv2d { name: String::new(), weight, bias, stride: strides[0] as usize, padding: at(0) };
    if pads.iter().all(|pad| *pad == pads[0]) {
        return Ok(Eager.conv2d(x[0], &layer)?);
    }
    layer.padding = 0;
    Ok(Eager.conv2d(&x[0].pad_with_zeros(2, at(0), at(2))?.pad_with_zeros(3, at(1), at(3))?, &layer)?)
}

fn instance_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f64) -> candle_core::Result<Tensor> {
    let flat = x.flatten_from(2)?;
    let centered = flat.broadcast_sub(&flat.mean_keepdim(2)?)?;
    let deviation = (centered.sqr()?.mean_keepdim(2)? + eps)?.sqrt()?;
    let per_channel = |values: &Tensor| values.reshape((1, values.elem_count(), 1));
    let normalized = centered.broadcast_div(&deviation)?.broadcast_mul(&per_channel(scale)?)?;
    normalized.broadcast_add(&per_channel(shift)?)?.reshape(x.shape())
}

fn group_norm(node: &NodeProto, x: &[&Tensor]) -> Result<candle_core::Result<Tensor>> {
    let attributes = Attributes(node);
    let groups = attributes.int("num_groups")? as usize;
    let (batch, per_channel) = (x[0].dims()[0], (1, x[1].elem_count(), 1, 1));
    let ones = Tensor::ones(groups, DType::F32, &Device::Cpu)?;
    let grouped = x[0].reshape((batch, groups, ()))?;
    let normalized = instance_norm(&grouped, &ones, &ones.zeros_like()?, attributes.float("epsilon")?)?;
    let scaled = normalized.reshape(x[0].shape())?.broadcast_mul(&x[1].reshape(per_channel)?)?;
    Ok(scaled.broadcast_add(&x[2].reshape(per_channel)?))
}

/// The shape that a Reshape asks for; −1 stands for whatever is left over.
fn target_shape(from: &[usize], to: &[i64]) -> Vec<usize> {
    let known: usize = to.iter().filter(|dim| **dim >= 0).map(|dim| *dim as usize).product();
    let rest = from.iter().product::<usize>() / known.max(1);
    to.iter().map(|dim| usize::try_from(*dim).unwrap_or(rest)).collect()
}

fn split(x: &Tensor, widths: &[i64], axis: usize) -> Result<Vec<Tensor>> {
    let mut start = 0;
    let mut part = |width: &i64| {
        start += *width as usize;
        Ok(x.narrow(axis, start - *width as usize, *width as usize)?.contiguous()?)
    };
    widths.iter().map(&mut part).collect()
}

/// Round half to even, then into the range of the zero point's type.
fn quantize_linear(x: &[&Tensor]) -> Result<candle_core::Result<Tensor>> {
    let [scale, zero] = [x[1].to_scalar::<f32>()?, x[2].to_scalar::<f32>()?];
    let values = x[0].flatten_all()?.to_vec1::<f32>()?;
    let values = values.into_iter().map(|x| ((x / scale).round_ties_even() + zero).clamp(-128.0, 127.0)).collect();
    Ok(Tensor::from_vec::<_, f32>(values, x[0].shape(), &Device::Cpu))
}

fn dequantize_linear(node: &NodeProto, x: &[&Tensor]) -> Result<candle_core::Result<Tensor>> {
    let shape = match x[1].rank() {
        0 => vec![],
        _ => {
            let mut shape = vec![1; x[0].rank()];
            shape[Attributes(node).int("axis")? as usize] = x[1].elem_count();
            shape
        }
    };
    let centered = match x.get(2) {
        Some(zero) => x[0].broadcast_sub(&zero.reshape(shape.as_slice())?)?,
        None => x[0].clone(),
    };
    Ok(centered.broadcast_mul(&x[1].reshape(shape)?))
}
