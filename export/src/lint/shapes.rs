//! The shape of what a node gives, for the operators of picture networks. An operator that is not here gives a value
//! of unknown shape, as it would be for ONNX's own inference without propagation of data, GroupNormalization among
//! them: ONNX defines it as a function, whose shape neither onnx 1.23 nor ONNX Runtime 1.31 infers.

use super::facts::{Facts, Shape, stated_shape};
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::{AttributeProto, NodeProto};

/// The element type of the first output, where it follows from the inputs.
pub(super) fn output_type(node: &NodeProto, facts: &Facts) -> Option<i32> {
    let kind = |i: usize| node.input.get(i).and_then(|name| facts.kind(name));
    match node.op_type.as_str() {
        "Cast" => int(node, "to").map(|to| to as i32),
        "Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero" => Some(DataType::Int64 as i32),
        "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Not" | "And" | "Or" | "IsNaN" => {
            Some(DataType::Bool as i32)
        }
        "Where" => kind(1),
        "QuantizeLinear" => Some(kind(2).unwrap_or(DataType::Uint8 as i32)),
        "DequantizeLinear" => kind(1),
        "ConstantOfShape" => {
            let value = node.attribute.iter().find_map(|attribute| attribute.t.as_ref());
            Some(value.map_or(DataType::Float as i32, |tensor| tensor.data_type))
        }
        _ => kind(0),
    }
}

/// The shapes of the outputs in turn, as far as they follow from the inputs.
pub(super) fn output_shapes(node: &NodeProto, facts: &Facts) -> Vec<Option<Shape>> {
    let n = node.output.len();
    match node.op_type.as_str() {
        "Split" => split(node, facts).unwrap_or_else(|| vec![None; n]),
        "If" => (0..n).map(|i| of_either_branch(node, i)).collect(),
        _ => vec![first_output(node, facts)],
    }
}

fn first_output(node: &NodeProto, facts: &Facts) -> Option<Shape> {
    let shape = |i: usize| node.input.get(i).and_then(|name| facts.shape(name));
    let x = || shape(0).cloned();
    match node.op_type.as_str() {
        "Abs"
        | "BatchNormalization"
        | "Cast"
        | "Ceil"
        | "Clip"
        | "Cos"
        | "DequantizeLinear"
        | "Dropout"
        | "Elu"
        | "Erf"
        | "Exp"
        | "Floor"
        | "Gelu"
        | "HardSigmoid"
        | "HardSwish"
        | "Identity"
        | "InstanceNormalization"
        | "LayerNormalization"
        | "LeakyRelu"
        | "Log"
        | "LogSoftmax"
        | "Mish"
        | "Neg"
        | "Not"
        | "PRelu"
        | "QuantizeLinear"
        | "QuickGelu"
        | "Reciprocal"
        | "Relu"
        | "Round"
        | "Sigmoid"
        | "Sign"
        | "Sin"
        | "Softmax"
        | "Softplus"
        | "Sqrt"
        | "Swish"
        | "Tanh" => x(),
        "Add" | "And" | "Div" | "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Max" | "Mean"
        | "Min" | "Mod" | "Mul" | "Or" | "Pow" | "Sub" | "Sum" | "Where" => {
            let shapes: Option<Vec<&Shape>> = (0..node.input.len()).map(shape).collect();
            shapes?.into_iter().cloned().reduce(|a, b| broadcast(&a, &b))
        }
        "Conv" => windows(node, x()?, shape(1)?.first().copied()?, shape(1)?.get(2..)?),
        "ConvTranspose" => transposed_windows(node, x()?, shape(1)?),
        "AveragePool" | "MaxPool" | "LpPool" => {
            let x = x()?;
            let kernel: Shape = ints(node, "kernel_shape")?.iter().map(|n| u64::try_from(*n).ok()).collect();
            let channels = *x.get(1)?;
            windows(node, x, channels, &kernel)
        }
        "GlobalAveragePool" | "GlobalMaxPool" => {
            Some(x()?.into_iter().enumerate().map(|(i, n)| if i < 2 { n } else { Some(1) }).collect())
        }
        "MatMul" => matmul(shape(0)?, shape(1)?),
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
            None => Some(vec![None; shape(1)?.first().copied()??.try_into().ok().filter(|n| *n <= MAX_RANK)?]),
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
            let rank = x.len() + axes.len();
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
        "Shape" if int(node, "start").is_none() && int(node, "end").is_none() => {
            Some(vec![Some(shape(0)?.len() as u64)])
        }
        "Size" => Some(vec![]),
        "ConstantOfShape" => {
            let dims = facts.integers(node.input.first()?)?;
            Some(dims.iter().map(|n| u64::try_from(*n).ok()).collect())
        }
        _ => None,
    }
}

/// What both branches state of an output.
fn of_either_branch(node: &NodeProto, i: usize) -> Option<Shape> {
    let stated = |name| stated_shape(attribute(node, name)?.g.as_ref()?.output.get(i)?);
    stated("then_branch").filter(|shape| stated("else_branch").as_ref() == Some(shape))
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

fn matmul(a: &Shape, b: &Shape) -> Option<Shape> {
    let ([.., rows, _], [.., _, columns]) = (a.as_slice(), b.as_slice()) else { return None };
    let mut shape = broadcast(&a[..a.len() - 2].to_vec(), &b[..b.len() - 2].to_vec());
    shape.extend([*rows, *columns]);
    Some(shape)
}

/// No real value has more dimensions.
const MAX_RANK: usize = 64;

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
            None => vec![x[axis].and_then(|all| all.checked_div(n)); node.output.len()],
        },
    };
    let part = |length: &Option<u64>| {
        let mut shape = x.clone();
        shape[axis] = *length;
        Some(shape)
    };
    Some(lengths.iter().map(part).collect())
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

fn int(node: &NodeProto, name: &str) -> Option<i64> {
    attribute(node, name).map(|attribute| attribute.i)
}

pub(super) fn ints(node: &NodeProto, name: &str) -> Option<Vec<i64>> {
    attribute(node, name).map(|attribute| attribute.ints.clone())
}

fn word(node: &NodeProto, name: &str) -> Option<String> {
    attribute(node, name).map(|attribute| String::from_utf8_lossy(&attribute.s).into_owned())
}
