//! The shape of what a node gives, for the operators of picture networks. An operator that is not here gives a value
//! of unknown shape, as it would be for ONNX's own inference without propagation of data, GroupNormalization among
//! them: ONNX defines it as a function, whose shape neither onnx 1.23 nor ONNX Runtime 1.31 infers.

use super::facts::{Facts, Shape, Typed};
use crate::limits::Limit;
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::{AttributeProto, NodeProto};
use std::collections::HashMap;

/// What a node gives, as far as it follows from what it reads and from the ends of the graphs in it.
pub(super) fn outputs(node: &NodeProto, facts: &Facts, branches: &[Vec<Typed>]) -> Vec<Typed> {
    let own = matches!(node.domain.as_str(), "" | "ai.onnx");
    if node.op_type == "If" && own {
        return match branches {
            [then, other] => then.iter().zip(other).map(|(a, b)| either(a, b)).collect(),
            _ => vec![],
        };
    }
    let shapes = match node.domain.as_str() {
        "com.microsoft" => vec![contributed(node, facts)],
        _ if own => output_shapes(node, facts),
        _ => vec![],
    };
    let kind = |i: usize| if own { output_kind(node, facts, i) } else { None };
    let shapes = shapes.into_iter().chain(std::iter::repeat(None));
    shapes.take(node.output.len()).enumerate().map(|(i, shape)| Typed { kind: kind(i), shape }).collect()
}

/// What holds of a value that is the one or the other.
fn either(a: &Typed, b: &Typed) -> Typed {
    let shape = a.shape.as_ref().zip(b.shape.as_ref()).filter(|(a, b)| a.len() == b.len());
    let shape = shape.map(|(a, b)| a.iter().zip(b).map(|(a, b)| (*a).filter(|_| a == b)).collect());
    Typed { kind: a.kind.filter(|_| a.kind == b.kind), shape }
}

/// The element type of an output.
fn output_kind(node: &NodeProto, facts: &Facts, output: usize) -> Option<i32> {
    use DataType::*;
    let input = |i: usize| node.input.get(i).and_then(|name| facts.kind(name));
    let stated = |name: &str| int(node, name).map(|kind| kind as i32);
    match (node.op_type.as_str(), output) {
        ("Cast", _) => stated("to"),
        ("CastLike", _) => input(1),
        ("Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero" | "NonMaxSuppression", _) => Some(Int64 as i32),
        ("MaxPool" | "TopK", 1) => Some(Int64 as i32),
        ("Dropout", 1) => Some(Bool as i32),
        (
            "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Not" | "And" | "Or" | "Xor" | "IsNaN"
            | "IsInf",
            _,
        ) => Some(Bool as i32),
        ("Where", _) => input(1),
        ("OneHot", _) => input(2),
        ("QuantizeLinear", _) => Some(input(2).unwrap_or(Uint8 as i32)),
        ("DequantizeLinear", _) => input(1),
        ("DynamicQuantizeLinear", 1) => Some(Float as i32),
        ("DynamicQuantizeLinear", _) => Some(Uint8 as i32),
        ("ConvInteger" | "MatMulInteger", _) => Some(Int32 as i32),
        ("QLinearConv" | "QLinearMatMul", _) => input(7),
        ("RandomNormal" | "RandomUniform", _) => stated("dtype").or(Some(Float as i32)),
        ("RandomNormalLike" | "RandomUniformLike" | "EyeLike", _) => stated("dtype").or_else(|| input(0)),
        ("ConstantOfShape", _) => {
            let value = node.attribute.iter().find_map(|attribute| attribute.t.as_ref());
            Some(value.map_or(Float as i32, |tensor| tensor.data_type))
        }
        _ => input(0),
    }
}

/// The shapes of the outputs in turn.
fn output_shapes(node: &NodeProto, facts: &Facts) -> Vec<Option<Shape>> {
    let x = || node.input.first().and_then(|name| facts.shape(name)).cloned();
    match node.op_type.as_str() {
        "Split" => split(node, facts).unwrap_or_default(),
        "DynamicQuantizeLinear" => vec![x(), Some(vec![]), Some(vec![])],
        "Dropout" => vec![x(); 2],
        "MaxPool" => vec![first_output(node, facts); 2],
        "TopK" => vec![top_k(node, facts); 2],
        "LSTM" | "GRU" | "RNN" => recurrent(node, facts).unwrap_or_default(),
        _ => vec![first_output(node, facts)],
    }
}

/// Operators of ONNX Runtime's own that have the shape of what they read, or of its product.
fn contributed(node: &NodeProto, facts: &Facts) -> Option<Shape> {
    let shape = |i: usize| node.input.get(i).and_then(|name| facts.shape(name));
    match node.op_type.as_str() {
        "BiasGelu" | "DequantizeLinear" | "FastGelu" | "Gelu" | "QLinearLeakyRelu" | "QLinearSigmoid"
        | "QLinearSoftmax" | "QuantizeLinear" | "QuickGelu" => shape(0).cloned(),
        "QLinearAdd" | "QLinearMul" => Some(broadcast(shape(0)?, shape(3)?)),
        "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" => matmul(shape(0)?, shape(1)?),
        _ => None,
    }
}

/// The last states and the outputs of a recurrent network: X is (steps, batch, inputs), with `layout` 1 the batch first.
fn recurrent(node: &NodeProto, facts: &Facts) -> Option<Vec<Option<Shape>>> {
    let [first, second, _] = facts.shape(node.input.first()?)?[..] else { return None };
    let hidden = int(node, "hidden_size").and_then(|n| u64::try_from(n).ok());
    let directions = Some(if word(node, "direction").is_some_and(|word| word == "bidirectional") { 2 } else { 1 });
    let (all, last) = match int(node, "layout") {
        Some(1) => (vec![first, second, directions, hidden], vec![first, directions, hidden]),
        _ => (vec![first, directions, second, hidden], vec![directions, second, hidden]),
    };
    Some(vec![Some(all), Some(last.clone()), Some(last)])
}

fn top_k(node: &NodeProto, facts: &Facts) -> Option<Shape> {
    let mut x = facts.shape(node.input.first()?)?.clone();
    let axis = place(int(node, "axis").unwrap_or(-1), x.len())?;
    let k = match node.input.get(1) {
        Some(name) => facts.integers(name)?.first().copied(),
        None => int(node, "k"),
    };
    x[axis] = u64::try_from(k?).ok();
    Some(x)
}

fn first_output(node: &NodeProto, facts: &Facts) -> Option<Shape> {
    let shape = |i: usize| node.input.get(i).and_then(|name| facts.shape(name));
    let x = || shape(0).cloned();
    match node.op_type.as_str() {
        "Abs"
        | "Acos"
        | "Acosh"
        | "Asin"
        | "Asinh"
        | "Atan"
        | "Atanh"
        | "BatchNormalization"
        | "Bernoulli"
        | "BitwiseNot"
        | "Cast"
        | "CastLike"
        | "Ceil"
        | "Celu"
        | "Clip"
        | "Cos"
        | "Cosh"
        | "CumSum"
        | "DequantizeLinear"
        | "Elu"
        | "Erf"
        | "Exp"
        | "EyeLike"
        | "Floor"
        | "Gelu"
        | "HardSigmoid"
        | "HardSwish"
        | "Hardmax"
        | "Identity"
        | "InstanceNormalization"
        | "IsInf"
        | "IsNaN"
        | "LRN"
        | "LayerNormalization"
        | "LeakyRelu"
        | "Log"
        | "LogSoftmax"
        | "LpNormalization"
        | "MeanVarianceNormalization"
        | "Mish"
        | "Neg"
        | "Not"
        | "PRelu"
        | "QuantizeLinear"
        | "RandomNormalLike"
        | "RandomUniformLike"
        | "Reciprocal"
        | "Relu"
        | "ReverseSequence"
        | "Round"
        | "Scatter"
        | "ScatterElements"
        | "ScatterND"
        | "Selu"
        | "Shrink"
        | "Sigmoid"
        | "Sign"
        | "Sin"
        | "Sinh"
        | "Softmax"
        | "Softplus"
        | "Softsign"
        | "Sqrt"
        | "Swish"
        | "Tan"
        | "Tanh"
        | "ThresholdedRelu"
        | "Trilu" => x(),
        "Add" | "And" | "BitShift" | "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" | "Div" | "Equal" | "Greater"
        | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Max" | "Mean" | "Min" | "Mod" | "Mul" | "Or" | "Pow" | "Sub"
        | "Sum" | "Where" | "Xor" => {
            let shapes: Option<Vec<&Shape>> = (0..node.input.len()).map(shape).collect();
            shapes?.into_iter().cloned().reduce(|a, b| broadcast(&a, &b))
        }
        "Conv" | "ConvInteger" => windows(node, x()?, shape(1)?.first().copied()?, shape(1)?.get(2..)?),
        "QLinearConv" => windows(node, x()?, shape(3)?.first().copied()?, shape(3)?.get(2..)?),
        "ConvTranspose" => transposed_windows(node, x()?, shape(1)?),
        "AveragePool" | "MaxPool" | "LpPool" => {
            let x = x()?;
            let kernel: Shape = ints(node, "kernel_shape")?.iter().map(|n| u64::try_from(*n).ok()).collect();
            let channels = *x.get(1)?;
            windows(node, x, channels, &kernel)
        }
        "GlobalAveragePool" | "GlobalLpPool" | "GlobalMaxPool" => {
            Some(x()?.into_iter().enumerate().map(|(i, n)| if i < 2 { n } else { Some(1) }).collect())
        }
        "MatMul" | "MatMulInteger" => matmul(shape(0)?, shape(1)?),
        "QLinearMatMul" => matmul(shape(0)?, shape(3)?),
        "Einsum" => einsum(&word(node, "equation")?, &(0..node.input.len()).map(shape).collect::<Option<Vec<_>>>()?),
        "Gemm" => {
            let side = |shape: &Shape, transposed: &str, i: usize| {
                let flipped = int(node, transposed) == Some(1);
                shape.get(if flipped { 1 - i } else { i }).copied()
            };
            Some(vec![side(shape(0)?, "transA", 0)?, side(shape(1)?, "transB", 1)?])
        }
        "Reshape" => match facts.integers(node.input.get(1)?) {
            Some(wanted) => reshape(shape(0)?, &wanted, int(node, "allowzero") == Some(1)),
            // How many dimensions there are is the length of the shape that is computed.
            None => Some(vec![None; shape(1)?.first().copied()??.try_into().ok().filter(|n| Limit::Rank.allows(*n))?]),
        },
        "Flatten" => {
            let x = x()?;
            let axis = place(int(node, "axis").unwrap_or(1), x.len() + 1)?;
            Some(vec![product(&x[..axis]), product(&x[axis..])])
        }
        "Transpose" => {
            let x = x()?;
            let perm = ints(node, "perm").unwrap_or_else(|| (0..x.len() as i64).rev().collect());
            perm.iter().map(|axis| x.get(place(*axis, x.len())?).copied()).collect()
        }
        "Concat" => {
            let mut joined = x()?;
            let axis = place(int(node, "axis")?, joined.len())?;
            let lengths = (0..node.input.len()).map(|i| shape(i)?.get(axis).copied());
            let lengths: Option<Vec<Option<u64>>> = lengths.collect();
            joined[axis] = lengths?.into_iter().try_fold(0u64, |all, n| all.checked_add(n?));
            Some(joined)
        }
        "GatherElements" => shape(1).cloned(),
        "GatherND" => {
            let (x, ids, batch) = (x()?, shape(1)?, usize::try_from(int(node, "batch_dims").unwrap_or(0)).ok()?);
            let (last, rest) = ids.split_last()?;
            let taken = batch.checked_add(usize::try_from((*last)?).ok()?)?;
            Some([rest, x.get(taken..)?].concat())
        }
        "GridSample" => {
            let ([n, c, ..], [_, sides @ .., _]) = (shape(0)?.as_slice(), shape(1)?.as_slice()) else { return None };
            Some([&[*n, *c], sides].concat())
        }
        "OneHot" => {
            let mut shape = x()?;
            let axis = place(int(node, "axis").unwrap_or(-1), shape.len() + 1)?;
            let depth = facts.integers(node.input.get(1)?).and_then(|depth| u64::try_from(*depth.first()?).ok());
            shape.insert(axis, depth);
            Some(shape)
        }
        "NonZero" => Some(vec![Some(x()?.len() as u64), None]),
        "RandomNormal" | "RandomUniform" => Some(ints(node, "shape")?.iter().map(|n| u64::try_from(*n).ok()).collect()),
        "Gather" => {
            let (x, ids) = (x()?, shape(1)?);
            let axis = place(int(node, "axis").unwrap_or(0), x.len())?;
            Some([&x[..axis], ids, &x[axis + 1..]].concat())
        }
        "Squeeze" => {
            let x = x()?;
            let axes = places(&axes(node, facts, 1)?, x.len())?;
            Some(x.iter().enumerate().filter(|(i, _)| !axes.contains(i)).map(|(_, n)| *n).collect())
        }
        "Unsqueeze" => {
            let (mut x, axes) = (x()?.into_iter(), axes(node, facts, 1)?);
            let rank = Some(x.len() + axes.len()).filter(|rank| Limit::Rank.allows(*rank))?;
            let axes = places(&axes, rank)?;
            (0..rank).map(|i| if axes.contains(&i) { Some(Some(1)) } else { x.next() }).collect()
        }
        "Slice" => slice(node, facts),
        "Pad" => {
            let pads = match node.input.get(1) {
                Some(name) => facts.integers(name)?,
                None => ints(node, "pads")?,
            };
            let x = x()?;
            let added = |i: usize| Some(pads.get(i)?.saturating_add(*pads.get(x.len() + i)?));
            let padded =
                |(i, n): (usize, &Option<u64>)| Some(n.zip(added(i)).map(|(n, more)| n.saturating_add_signed(more)));
            (pads.len() == 2 * x.len()).then(|| x.iter().enumerate().map(padded).collect()).flatten()
        }
        "Expand" => {
            let wanted: Shape = facts.integers(node.input.get(1)?)?.iter().map(|n| u64::try_from(*n).ok()).collect();
            Some(broadcast(shape(0)?, &wanted))
        }
        "Tile" => {
            let repeats = facts.integers(node.input.get(1)?)?;
            let times = |(n, r): (&Option<u64>, &i64)| (*n)?.checked_mul(u64::try_from(*r).ok()?);
            Some(x()?.iter().zip(&repeats).map(times).collect())
        }
        "Resize" | "Upsample" => resize(node, facts, shape(0)?),
        "DepthToSpace" | "SpaceToDepth" => {
            let (x, block) = (x()?, u64::try_from(int(node, "blocksize")?).ok()?);
            let grows = node.op_type == "DepthToSpace";
            let scale =
                |n: Option<u64>, up, by| n.and_then(|n: u64| if up { n.checked_mul(by) } else { n.checked_div(by) });
            let [b, c, h, w] = x[..] else { return None };
            Some(vec![b, scale(c, !grows, block.checked_mul(block)?), scale(h, grows, block), scale(w, grows, block)])
        }
        "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceL1" | "ReduceL2"
        | "ReduceSumSquare" | "ReduceLogSum" | "ReduceLogSumExp" => {
            let x = x()?;
            let all = || (0..x.len() as i64).collect();
            let axes = if node.input.get(1).is_some_and(|name| !name.is_empty()) || ints(node, "axes").is_some() {
                axes(node, facts, 1)?
            } else {
                all()
            };
            reduced(&x, &places(&axes, x.len())?, int(node, "keepdims") != Some(0))
        }
        "ArgMax" | "ArgMin" => {
            let x = x()?;
            let axis = place(int(node, "axis").unwrap_or(0), x.len())?;
            reduced(&x, &[axis], int(node, "keepdims") != Some(0))
        }
        "Shape" => {
            let rank = shape(0)?.len() as i64;
            let at = |name: &str, open: i64| {
                let place = int(node, name).unwrap_or(open);
                (if place < 0 { place.saturating_add(rank) } else { place }).clamp(0, rank)
            };
            Some(vec![u64::try_from((at("end", rank) - at("start", 0)).max(0)).ok()])
        }
        "Size" => Some(vec![]),
        "ConstantOfShape" => {
            let dims = facts.integers(node.input.first()?)?;
            Some(dims.iter().map(|n| u64::try_from(*n).ok()).collect())
        }
        _ => None,
    }
}

/// Shapes aligned at their last dimensions; a 1 stretches.
fn broadcast(a: &Shape, b: &Shape) -> Shape {
    let rank = a.len().max(b.len());
    let dim = |shape: &Shape, i: usize| match (i + shape.len()).checked_sub(rank) {
        Some(i) => shape[i],
        None => Some(1),
    };
    (0..rank)
        .map(|i| match (dim(a, i), dim(b, i)) {
            (Some(1), other) | (other, Some(1)) => other,
            (Some(n), None) | (None, Some(n)) => Some(n),
            (n, _) => n,
        })
        .collect()
}

/// A window of this kernel moved over all but the first two dimensions.
fn windows(node: &NodeProto, x: Shape, channels: Option<u64>, kernel: &[Option<u64>]) -> Option<Shape> {
    let sides = x.len().checked_sub(2)?;
    let per_side = |name: &str| ints(node, name).unwrap_or_else(|| vec![1; sides]);
    let (strides, dilations) = (per_side("strides"), per_side("dilations"));
    let pads = ints(node, "pads").unwrap_or_else(|| vec![0; 2 * sides]);
    let auto_pad = word(node, "auto_pad").unwrap_or_default();
    let up = int(node, "ceil_mode") == Some(1);
    let side = |i: usize| {
        // Wide enough that no number of a broken file overflows.
        let (n, k) = (i128::from(x[i + 2]?), i128::from((*kernel.get(i)?)?));
        let (stride, dilation) = (i128::from(*strides.get(i)?), i128::from(*dilations.get(i)?));
        if stride < 1 {
            return None;
        }
        if auto_pad.starts_with("SAME") {
            return u64::try_from((n + stride - 1) / stride).ok();
        }
        let room = n + i128::from(*pads.get(i)?) + i128::from(*pads.get(sides + i)?) - dilation * (k - 1) - 1;
        u64::try_from(if up { (room + stride - 1) / stride } else { room / stride } + 1).ok()
    };
    Some([x[0], channels].into_iter().chain((0..sides).map(side)).collect())
}

/// A transposed convolution with a weight `(in, out/groups, kernel...)`.
fn transposed_windows(node: &NodeProto, x: Shape, weight: &Shape) -> Option<Shape> {
    let sides = x.len().checked_sub(2)?;
    let per_side = |name: &str, value: i64| ints(node, name).unwrap_or_else(|| vec![value; sides]);
    let (strides, dilations, more) = (per_side("strides", 1), per_side("dilations", 1), per_side("output_padding", 0));
    let pads = ints(node, "pads").unwrap_or_else(|| vec![0; 2 * sides]);
    let stated = ints(node, "output_shape");
    let is_same = word(node, "auto_pad").is_some_and(|word| word.starts_with("SAME"));
    let side = |i: usize| {
        if let Some(sides) = &stated {
            return u64::try_from(*sides.get(i)?).ok();
        }
        // Wide enough that no number of a broken file overflows.
        let (n, k) = (i128::from(x[i + 2]?), i128::from((*weight.get(i + 2)?)?));
        let (stride, dilation) = (i128::from(*strides.get(i)?), i128::from(*dilations.get(i)?));
        if is_same {
            return u64::try_from(n * stride).ok();
        }
        let cut = i128::from(*pads.get(i)?) + i128::from(*pads.get(sides + i)?);
        u64::try_from((n - 1) * stride + dilation * (k - 1) + 1 + i128::from(*more.get(i)?) - cut).ok()
    };
    let groups = u64::try_from(int(node, "group").unwrap_or(1)).ok()?;
    let channels = weight.get(1)?.and_then(|n| n.checked_mul(groups));
    Some([x[0], channels].into_iter().chain((0..sides).map(side)).collect())
}

/// An equation like `bij,bjk->bik`: a letter is a length. What it leaves implicit or gathers in an ellipsis is not
/// looked at.
fn einsum(equation: &str, inputs: &[&Shape]) -> Option<Shape> {
    let equation: String = equation.split_whitespace().collect();
    let (read, given) = equation.split_once("->").filter(|_| !equation.contains('.'))?;
    let mut lengths: HashMap<char, Option<u64>> = HashMap::new();
    for (letters, shape) in read.split(',').zip(inputs) {
        if letters.chars().count() != shape.len() {
            return None;
        }
        for (letter, n) in letters.chars().zip(shape.iter()) {
            let known = lengths.entry(letter).or_default();
            *known = known.filter(|n| *n != 1).or(*n);
        }
    }
    given.chars().map(|letter| lengths.get(&letter).copied()).collect()
}

fn matmul(a: &Shape, b: &Shape) -> Option<Shape> {
    let ([.., rows, _], [.., _, columns]) = (a.as_slice(), b.as_slice()) else { return None };
    let mut shape = broadcast(&a[..a.len() - 2].to_vec(), &b[..b.len() - 2].to_vec());
    shape.extend([*rows, *columns]);
    Some(shape)
}

/// A 0 copies a dimension, a -1 is what is left.
fn reshape(x: &Shape, wanted: &[i64], allow_zero: bool) -> Option<Shape> {
    let copied = |(i, n): (usize, &i64)| match n {
        0 if !allow_zero => x.get(i).copied().flatten(),
        n => u64::try_from(*n).ok(),
    };
    let mut shape: Shape = wanted.iter().enumerate().map(copied).collect();
    if let Some(rest) = wanted.iter().position(|n| *n == -1) {
        let others: Option<u64> =
            shape.iter().enumerate().filter(|(i, _)| *i != rest).try_fold(1u64, |all, (_, n)| all.checked_mul((*n)?));
        shape[rest] = product(x).zip(others).and_then(|(all, others)| all.checked_div(others));
    }
    Some(shape)
}

fn split(node: &NodeProto, facts: &Facts) -> Option<Vec<Option<Shape>>> {
    let x = facts.shape(node.input.first()?)?;
    let axis = place(int(node, "axis").unwrap_or(0), x.len())?;
    let n = node.output.len() as u64;
    let lengths: Shape = match node.input.get(1).filter(|name| !name.is_empty()) {
        Some(name) => facts.integers(name)?.iter().map(|n| u64::try_from(*n).ok()).collect(),
        None => match ints(node, "split") {
            Some(lengths) => lengths.iter().map(|n| u64::try_from(*n).ok()).collect(),
            None => vec![x[axis].filter(|all| n > 0 && all % n == 0).map(|all| all / n); node.output.len()],
        },
    };
    let part = |length: &Option<u64>| {
        let mut shape = x.clone();
        shape[axis] = *length;
        Some(shape)
    };
    Some(lengths.iter().take(node.output.len()).map(part).collect())
}

fn slice(node: &NodeProto, facts: &Facts) -> Option<Shape> {
    let numbers = |i: usize, name: &str| match node.input.get(i).filter(|name| !name.is_empty()) {
        Some(input) => facts.integers(input),
        None => ints(node, name),
    };
    let mut shape = facts.shape(node.input.first()?)?.clone();
    let (starts, ends) = (numbers(1, "starts")?, numbers(2, "ends")?);
    let axes = numbers(3, "axes").unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = numbers(4, "steps").unwrap_or_else(|| vec![1; starts.len()]);
    for (i, axis) in axes.iter().enumerate() {
        let axis = place(*axis, shape.len())?;
        let (start, end, step) = (*starts.get(i)?, *ends.get(i)?, *steps.get(i)?);
        shape[axis] = shape[axis].and_then(|n| {
            let n = i64::try_from(n).ok()?;
            let at = |place: i64| if place < 0 { place.saturating_add(n) } else { place };
            // Backwards the last place is one before the first element.
            let (low, high) = if step > 0 { (0, n) } else { (-1, n - 1) };
            let room = (at(end).clamp(low, high) - at(start).clamp(0, high.max(0))) * step.signum();
            let step = u64::try_from(step.checked_abs()?).ok().filter(|step| *step > 0)?;
            u64::try_from(room).map_or(Some(0), |room| Some(room.div_ceil(step)))
        });
    }
    Some(shape)
}

/// By sizes where they are given, else by scales, rounded down.
fn resize(node: &NodeProto, facts: &Facts, x: &Shape) -> Option<Shape> {
    let input = |i: usize| node.input.get(i).filter(|name| !name.is_empty());
    if let Some(sizes) = input(3) {
        return Some(facts.integers(sizes)?.iter().map(|n| u64::try_from(*n).ok()).collect());
    }
    let scales = facts.floats(input(2).or(input(1))?)?;
    let scaled = |(n, scale): (&Option<u64>, &f32)| n.map(|n| (n as f64 * f64::from(*scale)).floor() as u64);
    (scales.len() == x.len()).then(|| x.iter().zip(&scales).map(scaled).collect())
}

fn reduced(x: &Shape, axes: &[usize], keep: bool) -> Option<Shape> {
    let kept = x.iter().enumerate().filter(|(i, _)| keep || !axes.contains(i));
    Some(kept.map(|(i, n)| if axes.contains(&i) { Some(1) } else { *n }).collect())
}

/// Axes are an input since opset 13 or 18, an attribute before.
fn axes(node: &NodeProto, facts: &Facts, input: usize) -> Option<Vec<i64>> {
    match node.input.get(input).filter(|name| !name.is_empty()) {
        Some(name) => facts.integers(name),
        None => ints(node, "axes"),
    }
}

fn places(axes: &[i64], rank: usize) -> Option<Vec<usize>> {
    axes.iter().map(|axis| place(*axis, rank)).collect()
}

/// An axis counted from the end where it is negative; `None` where there is no such axis.
fn place(axis: i64, rank: usize) -> Option<usize> {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|axis| *axis < rank)
}

fn product(dims: &[Option<u64>]) -> Option<u64> {
    dims.iter().try_fold(1u64, |all, n| all.checked_mul((*n)?))
}

pub(super) fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

pub(super) fn int(node: &NodeProto, name: &str) -> Option<i64> {
    attribute(node, name).map(|attribute| attribute.i)
}

pub(super) fn ints(node: &NodeProto, name: &str) -> Option<Vec<i64>> {
    attribute(node, name).map(|attribute| attribute.ints.clone())
}

fn word(node: &NodeProto, name: &str) -> Option<String> {
    attribute(node, name).map(|attribute| String::from_utf8_lossy(&attribute.s).into_owned())
}
