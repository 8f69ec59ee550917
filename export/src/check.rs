//! Whether a model is what its dialect promises: named nodes in order, every value defined once and before it is read,
//! static shapes, the dialect's operators and no others, and every type and shape that which the operators give. It
//! trusts nothing that the lowering says of itself.

use crate::infer::{Read, Typed, infer};
use crate::onnx::{BATCH, constants, tensor_type, values_i64};
use crate::{Error, Result};
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::tensor_shape_proto::dimension;
use candle_onnx::onnx::{GraphProto, ModelProto, TensorProto, ValueInfoProto, type_proto};
use std::collections::{HashMap, HashSet};

/// What a dialect allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub opset: i64,
    pub ir_version: i64,
    pub operators: [&'static [&'static str]; 3],
    pub max_rank: usize,
    /// Whether the first axis of every value is free.
    pub dynamic_batch: bool,
}

/// Fails naming every rule that is broken.
pub(crate) fn check(model: &ModelProto, rules: Rules) -> Result<()> {
    let mut problems = Vec::new();
    if model.ir_version != rules.ir_version {
        problems.push(format!("IR version {}, expected {}", model.ir_version, rules.ir_version));
    }
    match model.opset_import.as_slice() {
        [opset] if opset.domain.is_empty() && opset.version == rules.opset => {}
        other => problems.push(format!("operator sets {other:?}, expected ai.onnx {} alone", rules.opset)),
    }
    match &model.graph {
        Some(graph) => check_graph(graph, rules, &mut problems),
        None => problems.push("there is no graph".into()),
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Malformed(problems)) }
}

fn check_graph(graph: &GraphProto, rules: Rules, problems: &mut Vec<String>) {
    let mut defined = HashSet::new();
    for name in graph.input.iter().map(|i| &i.name).chain(graph.initializer.iter().map(|i| &i.name)) {
        if !defined.insert(name.as_str()) {
            problems.push(format!("value \"{name}\" is defined twice"));
        }
    }
    graph.initializer.iter().for_each(|tensor| check_initializer(tensor, rules, problems));
    let infos = graph.value_info.iter().chain(&graph.output);
    let shapes: HashMap<&str, &ValueInfoProto> = infos.map(|info| (info.name.as_str(), info)).collect();
    let mut names = HashSet::new();
    let mut read = HashSet::new();
    for node in &graph.node {
        let mut complain =
            |problem: String| problems.push(format!("node \"{}\" ({}): {problem}", node.name, node.op_type));
        if node.name.is_empty() || !names.insert(node.name.as_str()) {
            complain("the name is empty or taken".into());
        }
        if !node.domain.is_empty() || !rules.operators.iter().any(|some| some.contains(&node.op_type.as_str())) {
            complain("the dialect does not have this operator".into());
        }
        for input in &node.input {
            read.insert(input.as_str());
            if !defined.contains(input.as_str()) {
                complain(format!("reads \"{input}\" before it is defined"));
            }
        }
        for output in &node.output {
            if !defined.insert(output.as_str()) {
                complain(format!("defines \"{output}\" again"));
            }
            if let Some(problem) = shape_problem(shapes.get(output.as_str()).copied(), rules) {
                complain(format!("value \"{output}\" {problem}"));
            }
        }
    }
    if problems.is_empty() {
        // Only in a graph that is otherwise in order.
        check_types(graph, problems);
    }
    for info in &graph.input {
        problems.extend(shape_problem(Some(info), rules).map(|problem| format!("input \"{}\" {problem}", info.name)));
    }
    for output in &graph.output {
        if !defined.contains(output.name.as_str()) {
            problems.push(format!("output \"{}\" is never computed", output.name));
        }
    }
    let mut typed = HashSet::new();
    for ValueInfoProto { name, .. } in &graph.value_info {
        if !defined.contains(name.as_str()) || !typed.insert(name.as_str()) {
            problems.push(format!("the type of \"{name}\" is stated twice, or of a value that there is not"));
        }
    }
    let unread = graph.initializer.iter().filter(|tensor| !read.contains(tensor.name.as_str()));
    problems.extend(unread.map(|tensor| format!("initializer \"{}\" is read by no node", tensor.name)));
}

/// Holds the stated type and shape of every value to what its node gives. A free batch stands for this many pictures,
/// a number that no length in a graph has by chance.
const PROBE: i64 = 7919;

fn check_types(graph: &GraphProto, problems: &mut Vec<String>) {
    let infos = graph.value_info.iter().chain(&graph.output).chain(&graph.input);
    let mut stated: HashMap<&str, Typed> =
        infos.filter_map(|info| Some((info.name.as_str(), typed(tensor_type(info)?)))).collect();
    let constants = constants(graph);
    for (name, tensor) in &constants {
        stated.insert(name, Typed { kind: tensor.data_type, dims: tensor.dims.clone() });
    }
    for node in &graph.node {
        let read = |name: &String| {
            let constant = constants.get(name.as_str()).filter(|tensor| tensor.data_type == DataType::Int64 as i32);
            Some(Read { typed: stated.get(name.as_str())?, numbers: constant.map(|tensor| values_i64(tensor)) })
        };
        let reads: Option<Vec<Read>> = node.input.iter().map(read).collect();
        let given = reads.ok_or_else(|| "reads a value of no type".into()).and_then(|reads| infer(node, &reads));
        let found: std::result::Result<Vec<Typed>, String> = match given {
            Ok(given) if given.len() != node.output.len() => Err(format!("gives {} values", given.len())),
            other => other,
        };
        let complaint = match found {
            Err(problem) => Some(problem),
            Ok(given) => node.output.iter().zip(given).find_map(|(name, given)| {
                let stated = stated.get(name.as_str())?;
                (*stated != given).then(|| format!("value \"{name}\" is {given:?}, stated as {stated:?}"))
            }),
        };
        problems.extend(complaint.map(|problem| format!("node \"{}\" ({}): {problem}", node.name, node.op_type)));
    }
}

fn typed(tensor: &type_proto::Tensor) -> Typed {
    let length = |value: &Option<dimension::Value>| match value {
        Some(dimension::Value::DimValue(n)) => *n,
        Some(dimension::Value::DimParam(name)) => {
            PROBE * name.strip_suffix(BATCH).and_then(|n| n.trim_end_matches('*').parse().ok()).unwrap_or(1)
        }
        None => 0,
    };
    let dims = tensor.shape.iter().flat_map(|shape| &shape.dim).map(|dim| length(&dim.value)).collect();
    Typed { kind: tensor.elem_type, dims }
}

fn check_initializer(tensor: &TensorProto, rules: Rules, problems: &mut Vec<String>) {
    let element_bytes = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Int8) => 1,
        Ok(DataType::Float16) => 2,
        Ok(DataType::Float | DataType::Int32) => 4,
        Ok(DataType::Int64) => 8,
        _ => return problems.push(format!("initializer \"{}\" has type {}", tensor.name, tensor.data_type)),
    };
    let bytes = tensor.dims.iter().product::<i64>() * element_bytes;
    if tensor.dims.len() > rules.max_rank || tensor.raw_data.len() as i64 != bytes {
        let (dims, found) = (&tensor.dims, tensor.raw_data.len());
        problems.push(format!("initializer \"{}\" of shape {dims:?} holds {found} bytes", tensor.name));
    }
}

/// What is wrong with the stated shape of a value, if anything.
fn shape_problem(info: Option<&ValueInfoProto>, rules: Rules) -> Option<String> {
    let Some(tensor) = info.and_then(tensor_type) else { return Some("has no type".into()) };
    let dims = &tensor.shape.as_ref()?.dim;
    let sound = |at: usize, value: &Option<dimension::Value>| match value {
        Some(dimension::Value::DimValue(n)) => *n > 0,
        Some(dimension::Value::DimParam(name)) => rules.dynamic_batch && at == 0 && name.ends_with(BATCH),
        None => false,
    };
    if dims.len() > rules.max_rank || !dims.iter().enumerate().all(|(at, dim)| sound(at, &dim.value)) {
        return Some(format!("has a shape that is not static and of rank {} at most: {dims:?}", rules.max_rank));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{self, Builder};
    use crate::{Dialect, Precision};
    use std::collections::BTreeSet;

    /// A model of one node, changed by `spoil`, and what the check says of it.
    fn verdict(spoil: impl FnOnce(&mut ModelProto)) -> String {
        let mut file = Builder::new("test", false);
        file.input("noise", DataType::Float, &[1, 3, 4, 4]);
        let two = file.scalar(2.0);
        let value = file.node("double", "Mul", &["noise", &two], vec![], &[1, 3, 4, 4]);
        let value = file.node("clamp", "Relu", &[&value], vec![], &[1, 3, 4, 4]);
        file.output(&value, "image", DataType::Float, &[1, 3, 4, 4]);
        let graph = file.finish().graph;
        let mut model = onnx::model(graph, Dialect::Portable, &[]);
        spoil(&mut model);
        match check(&model, Dialect::Portable.rules(Precision::Fp32, false)) {
            Ok(()) => "sound".into(),
            Err(error) => error.to_string(),
        }
    }

    /// The runtime refuses what is not on its list, so that an operator which a dialect gains has to be put there, and one
    /// which no dialect has any more to be taken off. Attributes are seen to by every file that a test writes: the engines
    /// that check it load it through the runtime.
    #[test]
    fn the_runtime_takes_the_operators_of_all_dialects_and_no_others() {
        let all = Dialect::ALL.into_iter().flat_map(|dialect| Precision::ALL.map(|p| dialect.rules(p, false)));
        let written: BTreeSet<&str> = all.flat_map(|rules| rules.operators.concat()).collect();
        let taken: BTreeSet<&str> = dmd_runtime::OPERATORS.iter().map(|(operator, _)| *operator).collect();
        assert_eq!(written, taken);
    }

    fn graph(model: &mut ModelProto) -> &mut GraphProto {
        model.graph.as_mut().unwrap()
    }

    fn set_height(info: &mut ValueInfoProto, height: i64) {
        let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_mut().and_then(|kind| kind.value.as_mut())
        else {
            panic!("a tensor")
        };
        tensor.shape.as_mut().unwrap().dim[2].value = Some(dimension::Value::DimValue(height));
    }

    #[test]
    fn a_sound_model_passes_and_each_fault_is_named() {
        assert_eq!(verdict(|_| {}), "sound");
        type Spoil = fn(&mut ModelProto);
        let faults: [(&str, Spoil); 13] = [
            ("IR version 7, expected 8", |model| model.ir_version = 7),
            ("stated as Typed { kind: 1, dims: [1, 3, 5, 4] }", |model| set_height(&mut graph(model).value_info[0], 5)),
            ("reads types 1 and 10", |model| {
                let two = &mut graph(model).initializer[0];
                (two.data_type, two.raw_data) = (DataType::Float16 as i32, vec![0, 0x40]);
            }),
            ("operator sets", |model| model.opset_import[0].version = 18),
            ("the name is empty or taken", |model| graph(model).node[1].name = "double".into()),
            ("does not have this operator", |model| graph(model).node[1].op_type = "Identity".into()),
            ("before it is defined", |model| graph(model).node.reverse()),
            ("has no type", |model| graph(model).value_info.clear()),
            ("stated twice", |model| graph(model).value_info.extend_from_within(..)),
            ("a value that there is not", |model| graph(model).value_info[0].name = "0".into()),
            ("never computed", |model| graph(model).output[0].name = "picture".into()),
            ("read by no node", |model| graph(model).node[0].input[1] = "noise".into()),
            ("holds 2 bytes", |model| graph(model).initializer[0].raw_data.truncate(2)),
        ];
        for (expected, spoil) in faults {
            let found = verdict(spoil);
            assert!(found.contains(expected), "expected {expected:?} in {found:?}");
        }
    }
}
