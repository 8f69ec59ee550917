//! What a node must give: the type and shape of each value, from those of what it reads, as ONNX's operators define
//! them. The check holds the lowering's own statements against this.

use crate::onnx::Attributes;
use candle_onnx::onnx::NodeProto;
use candle_onnx::onnx::tensor_proto::DataType;

/// Type and shape of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Typed {
    pub kind: i32,
    pub dims: Vec<i64>,
}

/// What a node reads: its type and shape, and its whole numbers if it is a constant of them.
pub(crate) struct Read<'a> {
    pub typed: &'a Typed,
    pub numbers: Option<Vec<i64>>,
}

/// The values that a node gives, or why it cannot be.
pub(crate) fn infer(node: &NodeProto, x: &[Read]) -> Result<Vec<Typed>, String> {
    let attributes = Attributes(node);
    let int = |name: &str| attributes.int(name).map_err(|error| error.to_string());
    let ints = |name: &str| attributes.ints(name).map(<[i64]>::to_vec).map_err(|error| error.to_string());
    let read = |at: usize| x.get(at).map(|read| read.typed).ok_or_else(|| format!("input {at} is missing"));
    let numbers = |at: usize| {
        let constant = x.get(at).and_then(|read| read.numbers.clone());
        constant.ok_or_else(|| format!("input {at} is no constant of whole numbers"))
    };
    let first = read(0)?;
    let like = |dims: Vec<i64>| vec![Typed { kind: first.kind, dims }];
    let rank4 = || match first.dims[..] {
        [b, c, h, w] => Ok([b, c, h, w]),
        _ => Err(format!("reads {:?}, expected rank 4", first.dims)),
    };
    Ok(match node.op_type.as_str() {
        "Add" | "Sub" | "Mul" | "Div" => like(broadcast(&same_kind(x)?)?),
        "Sqrt" | "Relu" | "Sigmoid" | "Tanh" | "Erf" | "Gelu" | "Softplus" | "Softmax" => {
            is_float(first)?;
            like(first.dims.clone())
        }
        "Clip" => {
            same_kind(x)?;
            like(first.dims.clone())
        }
        "Conv" | "ConvTranspose" => {
            same_kind(x)?;
            let transposed = node.op_type == "ConvTranspose";
            let ([b, c, h, w], weight) = (rank4()?, &read(1)?.dims);
            let (pads, strides, kernel) = (ints("pads")?, ints("strides")?, ints("kernel_shape")?);
            // Left out where it is 1.
            let groups = int("group").unwrap_or(1);
            let (input, output) = match weight[..] {
                [input, output, ..] if transposed => (input, output * groups),
                [output, input, ..] => (input * groups, output),
                _ => (0, 0),
            };
            let fits = weight.len() == 4 && input == c && output % groups == 0 && weight[2..] == kernel[..];
            if !fits || pads.len() != 4 || strides.len() != 2 || strides.contains(&0) {
                return Err(format!("weight {weight:?} with kernel {kernel:?} does not fit {:?}", first.dims));
            }
            if x.len() > 2 && read(2)?.dims != [output] {
                return Err(format!("the bias has shape {:?}, expected [{output}]", read(2)?.dims));
            }
            let side = |n: i64, axis: usize| {
                let pads = pads[axis] + pads[axis + 2];
                if transposed {
                    (n - 1) * strides[axis] + kernel[axis] - pads
                } else {
                    (n + pads - kernel[axis]) / strides[axis] + 1
                }
            };
            like(vec![b, output, side(h, 0), side(w, 1)])
        }
        "InstanceNormalization" | "GroupNormalization" => {
            same_kind(x)?;
            let channels = first.dims.get(1).copied().unwrap_or(0);
            if read(1)?.dims != [channels] || read(2)?.dims != [channels] {
                return Err(format!("scale and shift do not fit {:?}", first.dims));
            }
            like(first.dims.clone())
        }
        "ReduceMean" => {
            let axes = if x.len() > 1 { numbers(1)? } else { ints("axes")? };
            let dims = first.dims.iter().enumerate();
            like(dims.map(|(axis, dim)| if axes.contains(&(axis as i64)) { 1 } else { *dim }).collect())
        }
        "MatMul" => {
            same_kind(x)?;
            match (&first.dims[..], &read(1)?.dims[..]) {
                ([stack @ .., n, k], [stack2 @ .., k2, m]) if stack == stack2 && k == k2 => {
                    like([stack, &[*n, *m]].concat())
                }
                (x, y) => return Err(format!("cannot multiply {x:?} and {y:?}")),
            }
        }
        "Reshape" => {
            let (mut to, all) = (numbers(1)?, first.dims.iter().product::<i64>());
            let known = to.iter().filter(|dim| **dim != -1).product::<i64>();
            to.iter_mut().filter(|dim| **dim == -1).for_each(|dim| *dim = all / known.max(1));
            if to.iter().product::<i64>() != all {
                return Err(format!("cannot reshape {:?} to {to:?}", first.dims));
            }
            like(to)
        }
        "Transpose" => {
            let perm = ints("perm")?;
            let mut sorted = perm.clone();
            sorted.sort_unstable();
            if !sorted.into_iter().eq(0..first.dims.len() as i64) {
                return Err(format!("cannot order {:?} by {perm:?}", first.dims));
            }
            like(perm.iter().map(|axis| first.dims[*axis as usize]).collect())
        }
        "Resize" => {
            let [b, c, h, w] = rank4()?;
            like(vec![b, c, 2 * h, 2 * w])
        }
        "AveragePool" => {
            let [b, c, h, w] = rank4()?;
            like(vec![b, c, h / 2, w / 2])
        }
        "Pad" => {
            let (pads, rank) = (numbers(1)?, first.dims.len());
            if pads.len() != 2 * rank {
                return Err(format!("{} pads for rank {rank}", pads.len()));
            }
            like((0..rank).map(|axis| first.dims[axis] + pads[axis] + pads[axis + rank]).collect())
        }
        "Concat" => {
            same_kind(x)?;
            let axis = int("axis")? as usize;
            let mut dims = first.dims.clone();
            for other in &x[1..] {
                let beside = |axis: usize| other.typed.dims[axis];
                let fits = other.typed.dims.len() == dims.len()
                    && (0..dims.len()).all(|at| at == axis || dims[at] == beside(at));
                if !fits {
                    return Err(format!("cannot join {dims:?} and {:?}", other.typed.dims));
                }
                dims[axis] += beside(axis);
            }
            like(dims)
        }
        "Split" => {
            let (widths, axis) = (numbers(1)?, int("axis")? as usize);
            if Some(&widths.iter().sum()) != first.dims.get(axis) {
                return Err(format!("cannot split {:?} into {widths:?}", first.dims));
            }
            let part = |width: &i64| {
                let mut dims = first.dims.clone();
                dims[axis] = *width;
                Typed { kind: first.kind, dims }
            };
            widths.iter().map(part).collect()
        }
        "Slice" => {
            let [start, end, axis] = [numbers(1)?, numbers(2)?, numbers(3)?].map(|numbers| numbers[0]);
            let mut dims = first.dims.clone();
            if start < 0 || end <= start || dims.get(axis as usize).is_none_or(|dim| end > *dim) {
                return Err(format!("cannot take {start} to {end} of {dims:?}"));
            }
            dims[axis as usize] = end - start;
            like(dims)
        }
        "Gather" => {
            if ![DataType::Int64 as i32, DataType::Int32 as i32].contains(&read(1)?.kind) {
                return Err("the index is not of whole numbers".into());
            }
            like([&read(1)?.dims, &first.dims[1..]].concat())
        }
        "Cast" => vec![Typed { kind: int("to")? as i32, dims: first.dims.clone() }],
        "QuantizeLinear" => {
            is_float(first)?;
            vec![Typed { kind: read(2)?.kind, dims: first.dims.clone() }]
        }
        "DequantizeLinear" => {
            let scale = read(1)?;
            let per_axis = || int("axis").ok().and_then(|axis| first.dims.get(axis as usize).copied());
            if !scale.dims.is_empty() && Some(scale.dims[0]) != per_axis() {
                return Err(format!("{:?} scales do not fit {:?}", scale.dims, first.dims));
            }
            if x.len() > 2 && read(2)?.kind != first.kind {
                return Err("the zero point is of another type than the values".into());
            }
            vec![Typed { kind: scale.kind, dims: first.dims.clone() }]
        }
        other => return Err(format!("nothing is known of {other}")),
    })
}

fn is_float(x: &Typed) -> Result<(), String> {
    let floats = [DataType::Float as i32, DataType::Float16 as i32];
    if floats.contains(&x.kind) { Ok(()) } else { Err(format!("reads type {}, expected floats", x.kind)) }
}

/// The shapes of inputs that must all be floats of one type.
fn same_kind<'a>(x: &[Read<'a>]) -> Result<Vec<&'a [i64]>, String> {
    is_float(x[0].typed)?;
    match x.iter().find(|read| read.typed.kind != x[0].typed.kind) {
        Some(other) => Err(format!("reads types {} and {}", x[0].typed.kind, other.typed.kind)),
        None => Ok(x.iter().map(|read| read.typed.dims.as_slice()).collect()),
    }
}

/// The shape of what is repeated along axes of length 1, aligned at the last.
fn broadcast(shapes: &[&[i64]]) -> Result<Vec<i64>, String> {
    let rank = shapes.iter().map(|shape| shape.len()).max().unwrap_or(0);
    let at = |shape: &[i64], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |axis| shape[axis]);
    let axis = |axis: usize| {
        let mut lengths: Vec<i64> = shapes.iter().map(|shape| at(shape, axis)).filter(|n| *n != 1).collect();
        lengths.dedup();
        match lengths[..] {
            [] => Ok(1),
            [n] => Ok(n),
            _ => Err(format!("{shapes:?} do not fit together")),
        }
    };
    (0..rank).map(axis).collect()
}
