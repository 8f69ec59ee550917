//! fp16: weights and activations in half precision. Islands stay in single precision: the statistics of norms, whose
//! squares overflow and whose epsilon would vanish, everything from the last convolution on, where the picture is a
//! small difference of large numbers, and what reads the noise, which comes in single precision: a Cast of a graph's own
//! input is a node that CoreML leaves to the CPU. Where the picture is not like enough then, the nodes that lose most
//! become islands, too.

use super::activations::{output, outputs, psnr_db};
use super::{float_inputs, frame, places};
use crate::interpret::{Interpreter, reads_half, through_half};
use crate::onnx::{Attributes, Lowered, dims, element_type, initializer, int, value_info_like, values_f32};
use crate::verify::{Inputs, ONE_LEVEL_DB};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::{GraphProto, NodeProto, TensorProto, ValueInfoProto};
use dmd_runtime::noise::Stream;
use half::f16;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Rewrites a graph of f32, with as many more islands as it takes to be at `min_psnr_db` against it; they are named, the
/// worst first. The graph's constants are given up one by one, so that no two spellings of all are in memory.
pub(crate) fn rewrite(lowered: Lowered, inputs: &Inputs, min_psnr_db: f64) -> Result<(GraphProto, Vec<String>)> {
    let Lowered { mut graph, mut islands } = lowered;
    let lossy = lossy_nodes(&graph, &islands, inputs, min_psnr_db)?;
    islands.extend(lossy.iter().cloned());
    let (mut result, uses) = spell(&graph, &islands)?;
    let mut constants: Vec<_> = std::mem::take(&mut graph.initializer).into_iter().map(Some).collect();
    for (at, (place, half)) in uses.iter().enumerate() {
        let is_read_again = uses[at + 1..].iter().any(|(other, _)| other == place);
        let constant = &mut constants[*place];
        let tensor = if is_read_again { constant.clone() } else { constant.take() };
        let tensor = tensor.ok_or_else(|| Error::Malformed(vec!["a constant is read after its last use".into()]))?;
        result.initializer.push(if *half { halved(&tensor)? } else { tensor });
    }
    Ok((result, lossy))
}

/// The likeness is measured on other noise than the check's, and engines round on the way to a sum or at its end.
const MARGIN_DB: f64 = 0.5;

/// The nodes that have to stay in single precision, the worst first: the fewest of the ranking by [`losses`] with which
/// the likeness holds.
fn lossy_nodes(
    graph: &GraphProto,
    islands: &BTreeSet<String>,
    inputs: &Inputs,
    min_psnr_db: f64,
) -> Result<Vec<String>> {
    let is_u8 = Interpreter::new(graph).ends_in_bytes();
    // Of bytes no more is asked than that rounding them leaves.
    let wanted = MARGIN_DB + if is_u8 { min_psnr_db.min(ONE_LEVEL_DB) } else { min_psnr_db };
    let nodes = half_nodes(graph, islands);
    let expected = outputs(&Interpreter::new(graph), inputs, inputs.n_measured_runs())?;
    let likeness = |single: &[&str]| -> Result<f64> {
        let half = nodes.iter().copied().filter(|node| !single.contains(node)).collect();
        let found = outputs(&Interpreter::new(graph).in_half(half), inputs, expected.len())?;
        psnr_db(&expected, &found, graph)
    };
    if likeness(&[])? >= wanted {
        return Ok(vec![]);
    }
    let losses = losses(graph, &nodes, inputs)?;
    let mut ranked = nodes.clone();
    ranked.sort_by(|a, b| losses[b].total_cmp(&losses[a]));
    let (mut low, mut high) = (1, ranked.len());
    while low < high {
        let kept = low.midpoint(high);
        if likeness(&ranked[..kept])? >= wanted { high = kept } else { low = kept + 1 }
    }
    Ok(ranked.into_iter().take(high).map(String::from).collect())
}

/// What rounding each node's values costs the pictures, to first order: the square of each value's loss times that of its
/// effect. The effects on all pixels at once come from one way back, of a direction with random signs for each.
fn losses<'a>(graph: &GraphProto, nodes: &[&'a str], inputs: &Inputs) -> Result<HashMap<&'a str, f64>> {
    let mut losses: HashMap<&str, f64> = nodes.iter().map(|node| (*node, 0.0)).collect();
    let interpreter = Interpreter::new(graph);
    for (run, feeds) in inputs.runs()?.into_iter().take(inputs.n_measured_runs()).enumerate() {
        let mut probes = Vec::new();
        let mut see = |node: &NodeProto, _: &[&Tensor], y: Tensor| {
            if !y.dtype().is_float() || !losses.contains_key(node.name.as_str()) {
                return Ok(y);
            }
            let lost = (y.detach() - through_half(&y.detach())?)?.sqr()?;
            let probe = Var::zeros(y.shape(), y.dtype(), y.device())?;
            let probed = (y + probe.as_tensor())?;
            probes.push((node.name.clone(), lost, probe));
            Ok(probed)
        };
        let mut sum = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for (at, given) in output(&interpreter, &feeds, &mut see)?.into_iter().enumerate() {
            let direction = Stream::new(0, at as u32, run as u64).normal(given.elem_count());
            let direction = Tensor::from_vec(direction, given.shape(), given.device())?;
            sum = (sum + (given * direction)?.sum_all()?)?;
        }
        let gradients = sum.backward()?;
        for (node, lost, probe) in &probes {
            let (Some(effect), Some(loss)) = (gradients.get(probe), losses.get_mut(node.as_str())) else { continue };
            let all = f64::from((effect.sqr()? * lost)?.sum_all()?.to_scalar::<f32>()?);
            // What cannot be held at all is worse than what loses most.
            *loss += if all.is_nan() { f64::INFINITY } else { all };
        }
    }
    Ok(losses)
}

/// The nodes that are in half precision unless they are islands.
fn half_nodes<'a>(graph: &'a GraphProto, islands: &BTreeSet<String>) -> Vec<&'a str> {
    let (tail, inputs) = (tail(graph), float_inputs(graph));
    let single = |node: &NodeProto| {
        node.input.iter().any(|name| inputs.contains(name.as_str()))
            || tail.contains(node.name.as_str())
            || islands.contains(&node.name)
    };
    graph.node.iter().filter(|node| !single(node)).map(|node| node.name.as_str()).collect()
}

/// The rewritten graph without its constants, and which of the source's it reads, in half or single precision.
fn spell(graph: &GraphProto, islands: &BTreeSet<String>) -> Result<(GraphProto, Vec<(usize, bool)>)> {
    let half: HashSet<&str> = half_nodes(graph, islands).into_iter().collect();
    let infos = graph.value_info.iter().chain(&graph.input).chain(&graph.output);
    let mut rewrite = Rewrite {
        source: graph,
        places: places(graph),
        infos: infos.map(|info| (info.name.as_str(), info)).collect(),
        half_values: HashSet::new(),
        casts: HashSet::new(),
        constants: vec![],
        result: GraphProto { value_info: vec![], ..frame(graph) },
    };
    for node in &graph.node {
        rewrite.node(node, half.contains(node.name.as_str()))?;
    }
    Ok((rewrite.result, rewrite.constants))
}

/// Runs the graph on a picture of every label and looks at each value: one that half precision cannot hold is an error
/// that names its node.
pub(crate) fn check_finite(graph: &GraphProto, inputs: &Inputs) -> Result<()> {
    let half: HashSet<&str> = graph
        .value_info
        .iter()
        .filter(|info| element_type(info) == Some(DataType::Float16 as i32))
        .map(|info| info.name.as_str())
        .collect();
    let interpreter = Interpreter::new(graph);
    for feeds in inputs.runs()? {
        interpreter.run(&feeds, &mut |node, _, output| {
            if !output.dtype().is_float() {
                return Ok(output);
            }
            let value = largest(&output.flatten_all()?.to_vec1::<f32>()?);
            let limit = if half.contains(node.output[0].as_str()) { f16::MAX.to_f32() } else { f32::MAX };
            if value <= limit { Ok(output) } else { Err(Error::Overflow { node: node.name.clone(), value }) }
        })?;
    }
    Ok(())
}

/// The largest magnitude; infinite where there is a value that is no number.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |max, x| if x.is_nan() { f32::INFINITY } else { max.max(x.abs()) })
}

/// The nodes between the last convolutions, them included, and the picture.
pub(super) fn tail(graph: &GraphProto) -> HashSet<&str> {
    let makers: HashMap<&str, &NodeProto> =
        graph.node.iter().flat_map(|node| node.output.iter().map(move |name| (name.as_str(), node))).collect();
    let mut found = HashSet::new();
    let mut open: Vec<&str> = graph.output.iter().map(|output| output.name.as_str()).collect();
    while let Some(node) = open.pop().and_then(|name| makers.get(name)) {
        if found.insert(node.name.as_str())
            && matches!(node.op_type.as_str(), "Add" | "Mul" | "Clip" | "Transpose" | "Cast")
        {
            open.extend(node.input.iter().map(String::as_str).filter(|name| makers.contains_key(name)));
        }
    }
    found
}

struct Rewrite<'a> {
    source: &'a GraphProto,
    places: HashMap<&'a str, usize>,
    infos: HashMap<&'a str, &'a ValueInfoProto>,
    half_values: HashSet<&'a str>,
    /// Names of casts that the result has already.
    casts: HashSet<String>,
    /// Places in the source of the constants that the result reads, and whether in half precision.
    constants: Vec<(usize, bool)>,
    result: GraphProto,
}

impl<'a> Rewrite<'a> {
    fn node(&mut self, node: &'a NodeProto, half: bool) -> Result<()> {
        let mut copy = node.clone();
        for (at, name) in node.input.iter().enumerate() {
            copy.input[at] = self.input(name, half && reads_half(node, at));
        }
        let to_bytes = node.op_type == "Cast" && Attributes(node).int("to")? == DataType::Uint8 as i64;
        for name in &node.output {
            let Some(info) = self.infos.get(name.as_str()) else { continue };
            let mut info = (*info).clone();
            if half && !to_bytes {
                info = value_info_like(&info, name, DataType::Float16);
                self.half_values.insert(name);
            }
            if !self.source.output.iter().any(|output| output.name == *name) {
                self.result.value_info.push(info);
            }
        }
        self.result.node.push(copy);
        Ok(())
    }

    /// What a node reads instead of `name`, in half or single precision. Whole numbers are left alone.
    fn input(&mut self, name: &'a str, half: bool) -> String {
        if let Some(&place) = self.places.get(name) {
            let half = half && self.source.initializer[place].data_type == DataType::Float as i32;
            if !self.constants.contains(&(place, half)) {
                self.constants.push((place, half));
            }
            return if half { half_name(name) } else { name.into() };
        }
        if self.half_values.contains(name) == half || self.is_index(name) {
            return name.into();
        }
        let (kind, suffix) = if half { (DataType::Float16, "f16") } else { (DataType::Float, "f32") };
        let cast = format!("{name}.{suffix}");
        if self.casts.insert(cast.clone()) {
            self.result.node.push(NodeProto {
                name: cast.clone(),
                op_type: "Cast".into(),
                input: vec![name.into()],
                output: vec![cast.clone()],
                attribute: vec![int("to", kind as i64)],
                ..Default::default()
            });
            self.result.value_info.extend(self.infos.get(name).map(|info| value_info_like(info, &cast, kind)));
        }
        cast
    }

    fn is_index(&self, name: &str) -> bool {
        let whole = [DataType::Int64 as i32, DataType::Int32 as i32];
        self.infos.get(name).and_then(|info| element_type(info)).is_some_and(|kind| whole.contains(&kind))
    }
}

fn half_name(name: &str) -> String {
    format!("{name}.f16")
}

/// A constant in half precision, under a name of its own because an island may read it too.
fn halved(tensor: &TensorProto) -> Result<TensorProto> {
    let values = values_f32(tensor)?;
    let halves: Vec<f16> = values.iter().map(|value| f16::from_f32(*value)).collect();
    if let Some((value, _)) = values.iter().zip(&halves).find(|(_, half)| !half.is_finite()) {
        return Err(Error::Overflow { node: tensor.name.clone(), value: value.abs() });
    }
    let bytes = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
    Ok(initializer(&half_name(&tensor.name), DataType::Float16, &dims(tensor), bytes))
}
