//! How large everything in a graph is, before an engine takes memory for it or spends time on it: the shapes of all
//! values, by ONNX's rules for the operators of [`OPERATORS`](super::OPERATORS).

use std::collections::HashMap;

use super::graph::{Constant, Model, Node};
use super::operators::describe;
use crate::limits::{self, MAX_PRODUCTS, MAX_VALUES};

type Dims = Vec<u64>;

/// The dialects stop at 4; ONNX Runtime's own operators have a few more.
const MAX_RANK: usize = 8;

/// The number of values of the largest input, value or output of the graph, whose inputs have these shapes.
pub(super) fn check(model: &Model, inputs: &[(String, Dims)]) -> Result<usize, String> {
    let mut known: HashMap<&str, Dims> = HashMap::new();
    let constants: HashMap<&str, &Constant> = model.constants.iter().map(|c| (c.name.as_str(), c)).collect();
    let given = inputs.iter().map(|(name, dims)| (name.as_str(), dims.clone()));
    for (name, dims) in model.constants.iter().map(|c| (c.name.as_str(), c.dims.clone())).chain(given) {
        define(&mut known, name, dims)?;
    }
    let mut numbers: HashMap<&str, Vec<Int>> = HashMap::new();
    let (mut largest, mut products) = (0, 0u128);
    for node in in_order(model)? {
        let failed = |what: String| format!("node {}: {what}", describe(node));
        let read = |name: &String| {
            let (name, constant) = (name.as_str(), constants.get(name.as_str()));
            let whole = || constant?.whole().map(|whole| whole.into_iter().map(Int::from).collect());
            let numbers = numbers.get(name).cloned().or_else(whole);
            Read { dims: known.get(name), floats: constant.and_then(|constant| constant.floats()), numbers }
        };
        let reads: Vec<Read> = node.inputs.iter().map(read).collect();
        if let (Some(given), [output]) = (compute(node, &reads), node.outputs.as_slice()) {
            numbers.insert(output, given);
        }
        let Given { values, products_of_each } = infer(node, &reads).map_err(failed)?;
        if values.len() < node.outputs.len() {
            return Err(failed(format!("it gives {} values, {} are named", values.len(), node.outputs.len())));
        }
        for (name, dims) in node.outputs.iter().zip(values) {
            if dims.len() > MAX_RANK {
                return Err(failed(format!("it gives a value of rank {}, expected {MAX_RANK} at most", dims.len())));
            }
            let n = limits::values(dims.iter().copied(), MAX_VALUES).filter(|n| *n > 0);
            let n = n.ok_or_else(|| failed(format!("it gives {dims:?}, expected 1 to {MAX_VALUES} values")))?;
            largest = largest.max(n);
            products = products.saturating_add(products_of_each.saturating_mul(n as u128));
            define(&mut known, name, dims).map_err(failed)?;
        }
        if products > MAX_PRODUCTS {
            return Err(failed(format!("up to here there are more than {MAX_PRODUCTS} products to compute")));
        }
    }
    Ok(largest)
}

fn define<'a>(known: &mut HashMap<&'a str, Dims>, name: &'a str, dims: Dims) -> Result<(), String> {
    match known.insert(name, dims) {
        None => Ok(()),
        Some(_) => Err(format!("value {name:?} is defined twice")),
    }
}

/// The nodes, each after those whose values it reads. `.ort` files list them as they were made.
fn in_order(model: &Model) -> Result<Vec<&Node>, String> {
    let mut made_by: HashMap<&str, usize> = HashMap::new();
    for (at, node) in model.nodes.iter().enumerate() {
        made_by.extend(node.outputs.iter().map(|name| (name.as_str(), at)));
    }
    let makers = |node: &Node| -> Vec<usize> {
        node.inputs.iter().filter_map(|name| made_by.get(name.as_str()).copied()).collect()
    };
    let mut readers: Vec<Vec<usize>> = vec![vec![]; model.nodes.len()];
    let mut waits_for: Vec<usize> = Vec::with_capacity(model.nodes.len());
    for (at, node) in model.nodes.iter().enumerate() {
        let makers = makers(node);
        waits_for.push(makers.len());
        makers.into_iter().for_each(|maker| readers[maker].push(at));
    }
    let mut order: Vec<usize> = (0..model.nodes.len()).filter(|at| waits_for[*at] == 0).collect();
    let mut next = 0;
    while let Some(at) = order.get(next).copied() {
        next += 1;
        for reader in &readers[at] {
            waits_for[*reader] -= 1;
            if waits_for[*reader] == 0 {
                order.push(*reader);
            }
        }
    }
    match model.nodes.iter().enumerate().find(|(at, _)| waits_for[*at] > 0) {
        Some((_, node)) => Err(format!("node {}: it reads its own value, by way of others", describe(node))),
        None => Ok(order.into_iter().map(|at| &model.nodes[at]).collect()),
    }
}

/// An input of a node: its shape, and its numbers where they are few and known.
struct Read<'a> {
    dims: Option<&'a Dims>,
    floats: Option<Vec<f32>>,
    numbers: Option<Vec<Int>>,
}

/// Whole numbers that follow from shapes alone, with which `.ort` files spell norms out.
fn compute(node: &Node, reads: &[Read]) -> Option<Vec<Int>> {
    let numbers = |at: usize| reads.get(at)?.numbers.as_ref();
    let ints = |name: &str| node.attributes.iter().find(|attribute| attribute.name == name)?.ints.first().copied();
    match node.operator.as_str() {
        "Shape" => {
            let dims: Vec<Int> = reads.first()?.dims?.iter().map(|n| Int::from(*n)).collect();
            let rank = dims.len() as i64;
            let clamp = |at: i64| if at < 0 { at.saturating_add(rank) } else { at }.clamp(0, rank) as usize;
            let (start, end) = (clamp(ints("start").unwrap_or(0)), clamp(ints("end").unwrap_or(rank)));
            Some(dims.get(start..end)?.to_vec())
        }
        "Concat" => {
            let parts: Vec<_> = (0..reads.len()).map(|at| numbers(at).cloned()).collect::<Option<_>>()?;
            let is_shape = parts.iter().map(Vec::len).sum::<usize>() <= MAX_RANK;
            is_shape.then(|| parts.concat())
        }
        "Div" => match (numbers(0)?.as_slice(), numbers(1)?.as_slice()) {
            ([n], [m]) => Some(vec![n.checked_div(*m)?]),
            _ => None,
        },
        _ => None,
    }
}

/// What a node gives.
struct Given {
    values: Vec<Dims>,
    /// Products, or sums, that each number of them takes.
    products_of_each: u128,
}

/// Whole numbers of a node, wide enough that no product of a length and an attribute overflows.
type Int = i128;

fn infer(node: &Node, reads: &[Read]) -> Result<Given, String> {
    let read = |at: usize| -> Result<&Dims, String> {
        let name = node.inputs.get(at).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| format!("input {at} is missing"))?;
        reads[at].dims.ok_or_else(|| format!("nothing gives its input {name:?}"))
    };
    // Inputs that may be left out at the end, or by an empty name.
    let has = |at: usize| node.inputs.get(at).is_some_and(|name| !name.is_empty());
    let numbers = |at: usize| -> Result<Vec<Int>, String> {
        let numbers = reads.get(at).and_then(|read| read.numbers.clone());
        numbers.ok_or_else(|| format!("input {at} is no constant of a few whole numbers in the file"))
    };
    let ints = |name: &str| -> Option<Vec<Int>> {
        let attribute = node.attributes.iter().find(|attribute| attribute.name == name)?;
        Some(attribute.ints.iter().map(|n| Int::from(*n)).collect())
    };
    let int = |name: &str, default: Int| ints(name).and_then(|ints| ints.first().copied()).unwrap_or(default);
    let x = read(0)?;
    for at in (1..node.inputs.len()).filter(|at| has(*at)) {
        read(at)?;
    }
    let rank = x.len();
    let axis = |axis: Int| -> Result<usize, String> {
        let at = if axis < 0 { axis + rank as Int } else { axis };
        usize::try_from(at).ok().filter(|at| *at < rank).ok_or_else(|| format!("there is no axis {axis} in {x:?}"))
    };
    if node.attributes.iter().any(|attribute| attribute.name == "auto_pad" && attribute.text != "NOTSET") {
        return Err("its pads are not given by numbers".into());
    }
    let one = |dims: Dims| Ok(Given { values: vec![dims], products_of_each: 1 });
    let sum_of = |dims: Dims, n: u128| Ok(Given { values: vec![dims], products_of_each: n.max(1) });
    match node.operator.as_str() {
        "Add" | "BiasGelu" | "Div" | "Mul" | "Sub" => one(broadcast(x, read(1)?)?),
        "QLinearAdd" | "QLinearMul" => one(broadcast(x, read(3)?)?),
        "Shape" => one(vec![rank as u64]),
        "Cast"
        | "Clip"
        | "DequantizeLinear"
        | "Erf"
        | "Exp"
        | "Gelu"
        | "GroupNormalization"
        | "InstanceNormalization"
        | "QLinearSigmoid"
        | "QLinearSoftmax"
        | "QuantizeLinear"
        | "QuickGelu"
        | "Relu"
        | "Sigmoid"
        | "Softmax"
        | "Softplus"
        | "Sqrt"
        | "Tanh" => one(x.clone()),
        operator @ ("Conv" | "ConvTranspose" | "FusedConv" | "QLinearConv") => {
            let transposed = operator == "ConvTranspose";
            let (weight, groups) = (read(if operator == "QLinearConv" { 3 } else { 1 })?, int("group", 1).max(1));
            let (Some(spatial), true) = (x.get(2..), weight.len() == rank) else {
                return Err(format!("a weight of {weight:?} does not fit {x:?}"));
            };
            let channels = if transposed {
                Int::from(weight[1]).checked_mul(groups).ok_or("too many groups")?
            } else {
                weight[0].into()
            };
            let kernel = ints("kernel_shape").unwrap_or_else(|| weight[2..].iter().map(|n| Int::from(*n)).collect());
            if !kernel.iter().copied().eq(weight[2..].iter().map(|n| Int::from(*n))) {
                return Err(format!("a kernel of {kernel:?} is not that of the weight, {weight:?}"));
            }
            let windows = Windows::of(spatial, kernel, &ints)?;
            let dims = if transposed { windows.transposed(spatial) } else { windows.along(spatial) };
            // Of a transposed convolution too, each number is a sum over the input's channels at some places of the kernel.
            let inner = u128::from(if transposed { x[1] } else { weight[1] }) * values(&weight[2..]);
            sum_of([vec![x[0], length(channels)?], dims?].concat(), inner)
        }
        "AveragePool" => {
            let (Some(spatial), Some(kernel)) = (x.get(2..), ints("kernel_shape")) else {
                return Err(format!("it has no window, or {x:?} no picture"));
            };
            let inner = kernel.iter().fold(1u128, |n, k| n.saturating_mul(k.unsigned_abs()));
            sum_of([&x[..2], &Windows::of(spatial, kernel, &ints)?.along(spatial)?].concat(), inner)
        }
        "Concat" => one(joined(axis(int("axis", 0))?, (0..reads.len()).map(read))?),
        // A scale and a zero point first, then three inputs for each part.
        "QLinearConcat" => one(joined(int("axis", 0) as usize, (2..reads.len()).step_by(3).map(read))?),
        "Gather" => {
            let axis = axis(int("axis", 0))?;
            one([&x[..axis], read(1)?, &x[axis + 1..]].concat())
        }
        operator @ ("FusedMatMul" | "MatMul" | "MatMulIntegerToFloat" | "QLinearMatMul") => {
            let y = read(if operator == "QLinearMatMul" { 3 } else { 1 })?;
            let product = product(x, y, int("transA", 0) != 0, int("transB", 0) != 0);
            let batches = int("transBatchA", 0) == 0 && int("transBatchB", 0) == 0;
            let (dims, inner) =
                product.filter(|_| batches).ok_or_else(|| format!("{x:?} and {y:?} cannot be multiplied"))?;
            sum_of(dims, inner.into())
        }
        "Pad" => {
            let pads = numbers(1)?;
            if pads.len() != 2 * rank {
                return Err(format!("{} pads do not fit {x:?}", pads.len()));
            }
            let padded = (0..rank).map(|at| length(Int::from(x[at]) + pads[at] + pads[at + rank]));
            one(padded.collect::<Result<_, _>>()?)
        }
        "ReduceMax" | "ReduceMean" | "ReduceSum" => {
            let given = if has(1) { Some(numbers(1)?) } else { ints("axes") };
            let all = if int("noop_with_empty_axes", 0) == 0 { 0..rank as Int } else { 0..0 };
            let axes = given.filter(|axes| !axes.is_empty()).unwrap_or_else(|| all.collect());
            let axes = axes.into_iter().map(axis).collect::<Result<Vec<_>, _>>()?;
            let kept = int("keepdims", 1) != 0;
            let dims = (0..rank).filter(|at| kept || !axes.contains(at));
            let dims = dims.map(|at| if axes.contains(&at) { 1 } else { x[at] });
            sum_of(dims.collect(), axes.iter().fold(1, |n: u128, at| n.saturating_mul(x[*at].into())))
        }
        "Reshape" => {
            let (to, all) = (numbers(1)?, values(x));
            let copied =
                |(at, dim): (usize, &Int)| if *dim == 0 { x.get(at).map_or(0, |n| Int::from(*n)) } else { *dim };
            let mut to: Vec<Int> = to.iter().enumerate().map(copied).collect();
            let known = to.iter().filter(|dim| **dim != -1).try_fold(1, |n: Int, dim| n.checked_mul(*dim)).unwrap_or(0);
            if let Some(open) = to.iter().position(|dim| *dim == -1) {
                to[open] = (all as Int).checked_div(known).unwrap_or(0);
            }
            if to.iter().try_fold(1, |n: Int, dim| n.checked_mul(*dim)) != Some(all as Int) {
                return Err(format!("{x:?} has not as many values as {to:?}"));
            }
            one(to.into_iter().map(length).collect::<Result<_, _>>()?)
        }
        "Resize" => {
            let scales = reads.get(2).and_then(|read| read.floats.clone());
            let scales = scales.filter(|scales| !has(3) && scales.len() == rank);
            let scales = scales.ok_or_else(|| format!("its scales are no {rank} constants of f32 in the file"))?;
            let scaled = x.iter().zip(&scales).map(|(n, scale)| length((*n as f64 * f64::from(*scale)).floor() as Int));
            one(scaled.collect::<Result<_, _>>()?)
        }
        "Slice" => {
            let (starts, ends) = (numbers(1)?, numbers(2)?);
            let axes = if has(3) { numbers(3)? } else { (0..starts.len() as Int).collect() };
            if has(4) || starts.len() != ends.len() || starts.len() != axes.len() {
                return Err("it is not given by starts, ends and axes".into());
            }
            let mut dims = x.clone();
            for ((start, end), at) in starts.into_iter().zip(ends).zip(axes) {
                let at = axis(at)?;
                let all = Int::from(dims[at]);
                let clamp = |n: Int| if n < 0 { n + all } else { n }.clamp(0, all);
                dims[at] = length(clamp(end) - clamp(start))?;
            }
            one(dims)
        }
        "Split" => {
            let axis = axis(int("axis", 0))?;
            let lengths = numbers(1)?;
            if lengths.iter().sum::<Int>() != Int::from(x[axis]) {
                return Err(format!("{lengths:?} are no parts of {x:?}"));
            }
            let part = |n: Int| Ok([&x[..axis], &[length(n)?], &x[axis + 1..]].concat());
            Ok(Given { values: lengths.into_iter().map(part).collect::<Result<_, String>>()?, products_of_each: 1 })
        }
        "Transpose" => {
            let perm = ints("perm").unwrap_or_else(|| (0..rank as Int).rev().collect());
            let mut sorted = perm.clone();
            sorted.sort_unstable();
            if !sorted.into_iter().eq(0..rank as Int) {
                return Err(format!("{perm:?} is no order of the axes of {x:?}"));
            }
            one(perm.into_iter().map(|at| x[at as usize]).collect())
        }
        _ => Err("its shape is not known here".into()),
    }
}

/// Parts side by side.
fn joined<'a>(axis: usize, mut parts: impl Iterator<Item = Result<&'a Dims, String>>) -> Result<Dims, String> {
    let mut dims = parts.next().ok_or("it joins nothing")??.clone();
    for part in parts {
        let part = part?;
        let beside =
            |dims: &Dims| dims.iter().enumerate().filter(|(at, _)| *at != axis).map(|(_, n)| *n).collect::<Dims>();
        if axis >= dims.len() || part.len() != dims.len() || beside(part) != beside(&dims) {
            return Err(format!("{part:?} cannot be joined to {dims:?}"));
        }
        dims[axis] = length(Int::from(dims[axis]) + Int::from(part[axis]))?;
    }
    Ok(dims)
}

/// The shape of a product of matrices, and how long its sums are.
fn product(x: &Dims, y: &Dims, x_turned: bool, y_turned: bool) -> Option<(Dims, u64)> {
    let ([x_stack @ .., x_rows, x_columns], [y_stack @ .., y_rows, y_columns]) = (&x[..], &y[..]) else { return None };
    let (n, k) = if x_turned { (x_columns, x_rows) } else { (x_rows, x_columns) };
    let (k2, m) = if y_turned { (y_columns, y_rows) } else { (y_rows, y_columns) };
    let stack = broadcast(x_stack, y_stack).ok().filter(|_| k == k2)?;
    Some(([stack, vec![*n, *m]].concat(), *k))
}

/// Windows that move over a picture.
struct Windows {
    kernel: Vec<Int>,
    strides: Vec<Int>,
    /// Before and behind, of both together.
    pads: Vec<Int>,
}

impl Windows {
    fn of(spatial: &[u64], kernel: Vec<Int>, ints: &impl Fn(&str) -> Option<Vec<Int>>) -> Result<Self, String> {
        let n = spatial.len();
        let strides = ints("strides").unwrap_or_else(|| vec![1; n]);
        let pads = ints("pads").unwrap_or_else(|| vec![0; 2 * n]);
        if kernel.len() != n
            || strides.len() != n
            || pads.len() != 2 * n
            || strides.iter().chain(&kernel).any(|n| *n < 1)
        {
            return Err(format!("kernel {kernel:?}, strides {strides:?} and pads {pads:?} do not fit {spatial:?}"));
        }
        Ok(Self { kernel, strides, pads: (0..n).map(|at| pads[at] + pads[at + n]).collect() })
    }

    fn along(&self, spatial: &[u64]) -> Result<Dims, String> {
        let side = |(at, n): (usize, &u64)| {
            length((Int::from(*n) + self.pads[at] - self.kernel[at]).div_euclid(self.strides[at]) + 1)
        };
        spatial.iter().enumerate().map(side).collect()
    }

    fn transposed(&self, spatial: &[u64]) -> Result<Dims, String> {
        let side =
            |(at, n): (usize, &u64)| length((Int::from(*n) - 1) * self.strides[at] + self.kernel[at] - self.pads[at]);
        spatial.iter().enumerate().map(side).collect()
    }
}

fn length(n: Int) -> Result<u64, String> {
    let fits = u64::try_from(n).ok().filter(|n| (1..=MAX_VALUES as u64).contains(n));
    fits.ok_or_else(|| format!("a length becomes {n}, expected 1 to {MAX_VALUES}"))
}

fn values(dims: &[u64]) -> u128 {
    dims.iter().fold(1u128, |n, dim| n.saturating_mul((*dim).into()))
}

/// The shape of what is repeated along axes of length 1, aligned at the last.
fn broadcast(x: &[u64], y: &[u64]) -> Result<Dims, String> {
    let rank = x.len().max(y.len());
    let at = |dims: &[u64], axis: usize| (axis + dims.len()).checked_sub(rank).map_or(1, |axis| dims[axis]);
    let side = |axis| match (at(x, axis), at(y, axis)) {
        (n, m) if n == m || m == 1 => Ok(n),
        (1, m) => Ok(m),
        _ => Err(format!("{x:?} and {y:?} do not fit together")),
    };
    (0..rank).map(side).collect()
}
