//! Operators that compute in integers, as ONNX Runtime sees them before a provider is asked: DequantizeLinear for each
//! input, the operator, and QuantizeLinear for each output are one unit, taken or refused together, in which the
//! operator reads and gives integers. This is the way of its `QDQ::GetAllNodeUnits`; the activation that it lets stand
//! between an operator and QuantizeLinear, and operators whose QuantizeLinear may be missing, are left out.

use super::facts::Facts;
use super::rules::lists;
use candle_onnx::onnx::{NodeProto, ValueInfoProto};
use serde::Deserialize;
use std::collections::HashMap;

/// Which operators make a unit, and what has to hold of its element types; part of rules.toml.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quantised {
    pub source: String,
    /// Only one input is dequantized.
    one_input: String,
    /// The same, and the numbers pass through unchanged: scale and zero point have to stay.
    moves: String,
    /// Every input, all of one type.
    alike: String,
    /// Every input; where the first is signed, so is the second.
    weighted: String,
}

/// One unit, by places in the graph.
pub(super) struct Unit {
    /// The operator.
    pub node: usize,
    /// The nodes DequantizeLinear before it and QuantizeLinear after it.
    pub around: Vec<usize>,
    /// The operator, reading what its DequantizeLinear read.
    pub as_one: NodeProto,
}

/// All units of a graph, and whether each node stands for itself (also) outside of them.
pub(super) fn of(
    nodes: &[&NodeProto],
    ends: &[ValueInfoProto],
    facts: &Facts,
    table: &Quantised,
) -> (Vec<Unit>, Vec<bool>) {
    let graph = Linked::new(nodes, ends);
    let units: Vec<Unit> = (0..graph.nodes.len()).filter_map(|i| unit(i, &graph, facts, table)).collect();
    let mut uses = vec![0; graph.nodes.len()];
    units.iter().flat_map(|unit| &unit.around).for_each(|i| uses[*i] += 1);
    units.iter().for_each(|unit| uses[unit.node] = usize::MAX);
    // ONNX Runtime gives every reader of a DequantizeLinear one of its own.
    let alone = |i: usize| uses[i] == 0 || graph.nodes[i].op_type == DQ && uses[i] < graph.readers(i);
    let alone = (0..graph.nodes.len()).map(alone).collect();
    (units, alone)
}

const DQ: &str = "DequantizeLinear";
const Q: &str = "QuantizeLinear";

/// The unit around an operator, where it is one.
fn unit(i: usize, graph: &Linked, facts: &Facts, table: &Quantised) -> Option<Unit> {
    let node = graph.nodes[i];
    let listed = |operators: &str| node.domain.is_empty() && lists(operators, &node.op_type);
    let before: Vec<Option<usize>> = node.input.iter().map(|name| graph.giver(name, DQ)).collect();
    let dequantized: Vec<usize> = before.iter().copied().flatten().collect();
    let given = node.input.iter().filter(|name| !name.is_empty()).count();
    let expected = match listed(&table.alike) || listed(&table.weighted) {
        true => given,
        false => usize::from(listed(&table.moves) || listed(&table.one_input)),
    };
    if expected == 0 || dequantized.len() != expected {
        return None;
    }
    let outputs = node.output.iter().filter(|name| !name.is_empty());
    let quantized: Option<Vec<usize>> = outputs.map(|name| graph.only_reader(name, Q)).collect();
    let quantized = quantized.filter(|nodes| !nodes.is_empty())?;

    let kinds = |nodes: &[usize], value: fn(&NodeProto) -> &[String]| -> Vec<Option<i32>> {
        nodes.iter().map(|i| facts.kind(value(graph.nodes[*i]).first()?)).collect()
    };
    let (read, given) = (kinds(&dequantized, |node| &node.input), kinds(&quantized, |node| &node.output));
    let scales_stay = || quantized.iter().all(|q| same_scale(graph.nodes[dequantized[0]], graph.nodes[*q], facts));
    let fits = given.iter().all(|kind| *kind == read[0])
        && (!listed(&table.alike) || read.iter().all(|kind| *kind == read[0]))
        && (!listed(&table.weighted) || read[0] != Some(INT8) || read.get(1).is_none_or(|kind| *kind == read[0]))
        && (!listed(&table.moves) || scales_stay());

    let mut as_one = node.clone();
    for (name, before) in as_one.input.iter_mut().zip(before) {
        if let Some(integers) = before.and_then(|i| graph.nodes[i].input.first()) {
            name.clone_from(integers);
        }
    }
    fits.then(|| Unit { node: i, around: dequantized.into_iter().chain(quantized).collect(), as_one })
}

const INT8: i32 = candle_onnx::onnx::tensor_proto::DataType::Int8 as i32;

/// Whether a DequantizeLinear and a QuantizeLinear have one scale and one zero point, by name or by number.
fn same_scale(dequantize: &NodeProto, quantize: &NodeProto, facts: &Facts) -> bool {
    let integers = |name: &str| facts.integers(name).map(|n| n.iter().map(|n| *n as f32).collect());
    let numbers = |name: &String| -> Option<Vec<f32>> { facts.floats(name).or_else(|| integers(name)) };
    (1..3).all(|place| {
        let (a, b) = (dequantize.input.get(place), quantize.input.get(place));
        a == b || a.and_then(numbers).is_some_and(|a| Some(a) == b.and_then(numbers))
    })
}

/// A graph with its edges.
struct Linked<'a> {
    nodes: &'a [&'a NodeProto],
    givers: HashMap<&'a str, usize>,
    /// Who reads a value; the graph itself, where it is an output, stands as `None`.
    readers: HashMap<&'a str, Vec<Option<usize>>>,
}

impl<'a> Linked<'a> {
    fn new(nodes: &'a [&'a NodeProto], ends: &'a [ValueInfoProto]) -> Self {
        let named = |names: &'a [String], i| names.iter().filter(|name| !name.is_empty()).map(move |n| (n.as_str(), i));
        let places = nodes.iter().enumerate();
        let givers = places.clone().flat_map(|(i, node)| named(&node.output, i)).collect();
        let mut readers: HashMap<&str, Vec<Option<usize>>> = HashMap::new();
        for (name, i) in places.flat_map(|(i, node)| named(&node.input, i)) {
            readers.entry(name).or_default().push(Some(i));
        }
        ends.iter().for_each(|info| readers.entry(&info.name).or_default().push(None));
        Linked { nodes, givers, readers }
    }

    /// The node of this operator that gives a value.
    fn giver(&self, name: &str, operator: &str) -> Option<usize> {
        self.givers.get(name).copied().filter(|i| self.nodes[*i].op_type == operator)
    }

    /// The node of this operator that reads a value, where nothing else does.
    fn only_reader(&self, name: &str, operator: &str) -> Option<usize> {
        match self.readers.get(name)?.as_slice() {
            [Some(i)] => Some(*i).filter(|i| self.nodes[*i].op_type == operator),
            _ => None,
        }
    }

    /// How often the first output of a node is read.
    fn readers(&self, i: usize) -> usize {
        self.nodes[i].output.first().and_then(|name| self.readers.get(name.as_str())).map_or(0, Vec::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_onnx::onnx::tensor_proto::DataType;
    use candle_onnx::onnx::{GraphProto, TensorProto};

    /// A graph from lines `name operator: inputs`, where `w…` are constants of int8, `b` of int32, `s…` scales, and `y`
    /// the output; each unit as its names, and the nodes that stand for themselves.
    fn units(lines: &[&str]) -> (Vec<String>, String) {
        let table: Quantised = toml::from_str(
            "source = ''\none_input = 'Sigmoid'\nmoves = 'Reshape'\nalike = 'Add'\nweighted = 'Conv MatMul'",
        )
        .unwrap();
        let node = |line: &&str| {
            let (head, inputs) = line.split_once(':').unwrap();
            let (name, operator) = head.split_once(' ').unwrap();
            let input = inputs.split_whitespace().map(String::from).collect();
            let op_type = match operator {
                "dq" => DQ.into(),
                "q" => Q.into(),
                other => other.into(),
            };
            NodeProto { name: name.into(), op_type, input, output: vec![name.into()], ..Default::default() }
        };
        let constant = |name: &str, kind: DataType, bytes: &[u8]| TensorProto {
            name: name.into(),
            data_type: kind as i32,
            raw_data: bytes.to_vec(),
            ..Default::default()
        };
        let initializer = vec![
            constant("w", DataType::Int8, &[7]),
            constant("u", DataType::Uint8, &[7]),
            constant("b", DataType::Int32, &[7, 0, 0, 0]),
            constant("z", DataType::Int8, &[0]),
            constant("s", DataType::Float, &1f32.to_le_bytes()),
            constant("s2", DataType::Float, &2f32.to_le_bytes()),
        ];
        let output = vec![ValueInfoProto { name: "y".into(), ..Default::default() }];
        let graph = GraphProto { node: lines.iter().map(node).collect(), initializer, output, ..Default::default() };
        let (nodes, mut facts) = (graph.node.iter().collect::<Vec<_>>(), Facts::default());
        facts.read(&graph, &nodes, &mut |_, _| vec![]);
        let (units, alone) = of(&nodes, &graph.output, &facts, &table);
        let name = |i: usize| graph.node[i].name.as_str();
        let names = |unit: Unit| [unit.node].into_iter().chain(unit.around).map(name).collect::<Vec<_>>().join(" ");
        let alone = (0..graph.node.len()).filter(|i| alone[*i]).map(name).collect::<Vec<_>>().join(" ");
        (units.into_iter().map(names).collect(), alone)
    }

    #[test]
    fn a_convolution_is_one_with_what_stands_around_it() {
        let lines =
            ["x q: x0 s z", "a dq: x s z", "k dq: w s", "c dq: b s", "n Conv: a k c", "o q: n s2 z", "y dq: o s2 z"];
        assert_eq!(units(&lines), (vec!["n a k c o".into()], "x y".into()));
        // Weights alone make no unit, nor do unsigned weights of signed activations.
        assert_eq!(units(&["k dq: w s", "n Conv: x0 k", "y q: n s z"]).0, [""; 0]);
        assert_eq!(units(&["a dq: w s", "k dq: u s", "n Conv: a k", "o q: n s z", "y dq: o s z"]).0, [""; 0]);
        // The output is read twice, or is the graph's own.
        let twice = ["a dq: w s", "k dq: w s", "n Conv: a k", "o q: n s z", "y Relu: n"];
        assert_eq!(units(&twice), (vec![], "a k n o y".into()));
        assert_eq!(units(&["a dq: w s", "k dq: w s", "y MatMul: a k"]).0, [""; 0]);
    }

    #[test]
    fn a_value_with_other_readers_stands_for_itself_too() {
        let lines = ["a dq: w s z", "n Sigmoid: a", "o q: n s z", "m Add: a a", "p q: m s z", "y Relu: a"];
        assert_eq!(units(&lines), (vec!["n a o".into(), "m a a p".into()], "a y".into()));
        assert_eq!(units(&lines[..5]).1, "");
    }

    #[test]
    fn what_only_moves_numbers_keeps_its_scale() {
        assert_eq!(units(&["a dq: w s z", "n Reshape: a b", "o q: n s z"]).0, ["n a o"]);
        assert_eq!(units(&["a dq: w s z", "n Reshape: a b", "o q: n s2 z"]).0, [""; 0]);
    }
}
