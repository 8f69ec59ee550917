//! What is known of every value of a graph before it runs: its type, its shape, and its numbers where it is constant.
//! Shapes come from the file where it states them, and are inferred where it does not.

use super::{folding, shapes};
use crate::limits::Limit;
use candle_onnx::onnx::tensor_proto::{DataLocation, DataType};
use candle_onnx::onnx::tensor_shape_proto::dimension::Value;
use candle_onnx::onnx::{
    GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto, type_proto,
};
use std::collections::HashMap;

/// One dimension after the other; `None` for one that the file leaves open.
pub(super) type Shape = Vec<Option<u64>>;

/// The type and the shape of a value, as far as they are known: the element type is a number of `TensorProto.DataType`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Typed {
    pub kind: Option<i32>,
    pub shape: Option<Shape>,
}

/// What is known of the values of a graph, those of the graphs around it included.
#[derive(Default)]
pub(super) struct Facts<'a> {
    opset: i64,
    values: HashMap<&'a str, Fact<'a>>,
    /// How many graphs are open, one in the other.
    depth: usize,
    /// What the names of inner graphs stood for around them.
    hidden: Vec<(&'a str, Option<Fact<'a>>)>,
}

#[derive(Default)]
struct Fact<'a> {
    typed: Typed,
    constant: Option<Constant<'a>>,
    producer: Option<&'a NodeProto>,
    depth: usize,
}

/// A graph that is open, from [`Facts::read`] to [`Facts::leave`].
pub(super) struct Open<'a> {
    hidden: usize,
    /// What the file itself says of values that nodes will give.
    stated: HashMap<&'a str, Typed>,
}

impl<'a> Facts<'a> {
    /// What holds outside of all graphs of a model.
    pub fn outside(model: &ModelProto) -> Self {
        let set = model.opset_import.iter().find(|set| matches!(set.domain.as_str(), "" | "ai.onnx"));
        Facts { opset: set.map_or(1, |set| set.version), ..Default::default() }
    }

    /// Goes into a graph, of which nothing is known yet but what it is fed and what it holds.
    fn enter(&mut self, graph: &'a GraphProto) -> Open<'a> {
        self.depth += 1;
        let hidden = self.hidden.len();
        for info in &graph.input {
            self.set(&info.name, Fact { typed: stated_type(info), ..Default::default() });
        }
        for tensor in &graph.initializer {
            self.set(&tensor.name, Constant::Tensor(tensor).into());
        }
        for sparse in &graph.sparse_initializer {
            sparse.values.iter().for_each(|values| self.set(&values.name, Constant::Sparse(sparse).into()));
        }
        let infos = graph.output.iter().chain(&graph.value_info);
        Open { hidden, stated: infos.map(|info| (info.name.as_str(), stated_type(info))).collect() }
    }

    /// Goes into a graph and through its nodes. `inner` goes through the graphs in them, and tells of their outputs.
    pub fn read(
        &mut self,
        graph: &'a GraphProto,
        nodes: &[&'a NodeProto],
        inner: &mut dyn FnMut(&mut Self, &'a GraphProto) -> Vec<Typed>,
    ) -> Open<'a> {
        let mut open = self.enter(graph);
        for node in nodes {
            let graphs = node.attribute.iter().filter_map(|attribute| attribute.g.as_ref());
            let branches: Vec<Vec<Typed>> = graphs.map(|graph| inner(self, graph)).collect();
            self.add(node, &mut open, &branches);
        }
        open
    }

    /// Takes down what a node gives. `branches` are the ends of the graphs in it.
    fn add(&mut self, node: &'a NodeProto, open: &mut Open<'a>, branches: &[Vec<Typed>]) {
        if let Some(constant) = Constant::of(node) {
            return self.set(&node.output[0], constant.into());
        }
        let mut inferred = shapes::outputs(node, self, branches).into_iter();
        let mut folded = folding::folded(node, self).filter(|numbers| Limit::Numbers.allows(numbers.len()));
        for name in &node.output {
            let inferred = inferred.next().unwrap_or_default();
            let typed = match open.stated.remove(name.as_str()) {
                Some(stated) => stated.or(inferred),
                None => inferred,
            };
            let constant = folded.take().map(Constant::Folded);
            self.set(name, Fact { typed, constant, producer: Some(node), ..Default::default() });
        }
    }

    /// Leaves a graph; the types of its outputs.
    pub fn leave(&mut self, graph: &'a GraphProto, open: Open<'a>) -> Vec<Typed> {
        let end = |info: &ValueInfoProto| {
            self.values.get(info.name.as_str()).map_or_else(|| stated_type(info), |fact| fact.typed.clone())
        };
        let ends = graph.output.iter().map(end).collect();
        self.depth -= 1;
        for (name, before) in self.hidden.split_off(open.hidden) {
            match before {
                Some(fact) => self.values.insert(name, fact),
                None => self.values.remove(name),
            };
        }
        ends
    }

    /// The version of ai.onnx that the file is written in.
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// The element type, a number of `TensorProto.DataType`.
    pub fn kind(&self, name: &str) -> Option<i32> {
        self.values.get(name)?.typed.kind
    }

    /// The shape; `None` where not even the rank is known.
    pub fn shape(&self, name: &str) -> Option<&Shape> {
        self.values.get(name)?.typed.shape.as_ref()
    }

    /// Whether the shape is known and every dimension of it is a positive number, or the value is stored in the file.
    pub fn is_static(&self, name: &str) -> bool {
        let positive = |dim: &Option<u64>| dim.is_some_and(|n| n > 0);
        self.is_constant(name) || self.shape(name).is_some_and(|shape| shape.iter().all(positive))
    }

    /// Whether the value is stored in the file.
    pub fn is_constant(&self, name: &str) -> bool {
        self.constant(name).is_some()
    }

    /// The node that gives a value; `None` for inputs of the graph and constants.
    pub fn producer(&self, name: &str) -> Option<&'a NodeProto> {
        self.values.get(name)?.producer
    }

    /// The numbers of a constant of integers, where they are few and stand in the file.
    pub fn integers(&self, name: &str) -> Option<Vec<i64>> {
        self.constant(name)?.integers()
    }

    /// The numbers of a constant of f32, where they are few and stand in the file.
    pub fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.constant(name)?.floats()
    }

    /// Whether the value follows from shapes, and no accelerator sees how.
    pub fn is_folded(&self, name: &str) -> bool {
        matches!(self.constant(name), Some(Constant::Folded(_)))
    }

    fn constant(&self, name: &str) -> Option<&Constant<'a>> {
        self.values.get(name)?.constant.as_ref()
    }

    /// What a name stands for in the graph that was entered last.
    fn set(&mut self, name: &'a str, fact: Fact<'a>) {
        if name.is_empty() {
            return;
        }
        let shape = fact.typed.shape.filter(|shape| Limit::Rank.allows(shape.len())).map(|shape| {
            let sensible = |n: Option<u64>| n.filter(|n| Limit::Length.allows(*n));
            shape.into_iter().map(sensible).collect()
        });
        let typed = Typed { shape, ..fact.typed };
        let before = self.values.insert(name, Fact { typed, depth: self.depth, ..fact });
        if self.depth > 1 && before.as_ref().is_none_or(|fact| fact.depth < self.depth) {
            self.hidden.push((name, before));
        }
    }
}

impl Typed {
    /// What the file states, and where it leaves something open, what was inferred; where they contradict each other, the
    /// file's word alone, as ONNX's own inference has it.
    fn or(self, inferred: Typed) -> Typed {
        let shape = match (self.shape, inferred.shape) {
            (None, inferred) => inferred,
            (Some(stated), Some(inferred)) if agree(&stated, &inferred) => {
                Some(stated.into_iter().zip(inferred).map(|(stated, inferred)| stated.or(inferred)).collect())
            }
            (stated, _) => stated,
        };
        Typed { kind: self.kind.or(inferred.kind), shape }
    }
}

fn agree(a: &Shape, b: &Shape) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || a.is_none() || b.is_none())
}

fn dimension(n: i64) -> Option<u64> {
    u64::try_from(n).ok()
}

fn dimensions(dims: &[i64]) -> Option<Shape> {
    Limit::Rank.allows(dims.len()).then(|| dims.iter().map(|n| dimension(*n)).collect())
}

/// What the file says of a value.
fn stated_type(info: &ValueInfoProto) -> Typed {
    let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_ref().and_then(|kind| kind.value.as_ref()) else {
        return Typed::default();
    };
    let dim = |value: &Option<Value>| match value {
        Some(Value::DimValue(n)) => dimension(*n),
        _ => None,
    };
    let dims = tensor.shape.as_ref().map(|shape| &shape.dim).filter(|dims| Limit::Rank.allows(dims.len()));
    let shape = dims.map(|dims| dims.iter().map(|d| dim(&d.value)).collect());
    Typed { kind: Some(tensor.elem_type).filter(|kind| *kind != DataType::Undefined as i32), shape }
}

/// Where the numbers of a constant stand.
enum Constant<'a> {
    Tensor(&'a TensorProto),
    Sparse(&'a SparseTensorProto),
    Int(i64),
    Ints(&'a [i64]),
    Float(f32),
    Floats(&'a [f32]),
    String,
    Strings(usize),
    /// Nowhere: they follow from shapes.
    Folded(Vec<i64>),
}

/// Whether a node is one that ONNX Runtime stores as an initializer when it loads the file.
pub(super) fn is_constant(node: &NodeProto) -> bool {
    Constant::of(node).is_some()
}

impl<'a> Constant<'a> {
    /// The value of a node Constant, by whichever attribute it has it.
    fn of(node: &'a NodeProto) -> Option<Self> {
        if node.op_type != "Constant" || !matches!(node.domain.as_str(), "" | "ai.onnx") || node.output.is_empty() {
            return None;
        }
        node.attribute.iter().find_map(|attribute| match attribute.name.as_str() {
            "value" => attribute.t.as_ref().map(Constant::Tensor),
            "sparse_value" => attribute.sparse_tensor.as_ref().map(Constant::Sparse),
            "value_int" => Some(Constant::Int(attribute.i)),
            "value_ints" => Some(Constant::Ints(&attribute.ints)),
            "value_float" => Some(Constant::Float(attribute.f)),
            "value_floats" => Some(Constant::Floats(&attribute.floats)),
            "value_string" => Some(Constant::String),
            "value_strings" => Some(Constant::Strings(attribute.strings.len())),
            _ => None,
        })
    }

    fn typed(&self) -> Typed {
        let row = |kind: DataType, n: usize| (kind as i32, Some(vec![Some(n as u64)]));
        let one = |kind: DataType| (kind as i32, Some(vec![]));
        let (kind, shape) = match *self {
            Constant::Tensor(tensor) => (tensor.data_type, dimensions(&tensor.dims)),
            Constant::Sparse(sparse) => {
                (sparse.values.as_ref().map_or(0, |values| values.data_type), dimensions(&sparse.dims))
            }
            Constant::Int(_) => one(DataType::Int64),
            Constant::Ints(values) => row(DataType::Int64, values.len()),
            Constant::Float(_) => one(DataType::Float),
            Constant::Floats(values) => row(DataType::Float, values.len()),
            Constant::String => one(DataType::String),
            Constant::Strings(n) => row(DataType::String, n),
            Constant::Folded(ref values) => row(DataType::Int64, values.len()),
        };
        Typed { kind: Some(kind).filter(|kind| *kind != DataType::Undefined as i32), shape }
    }

    fn integers(&self) -> Option<Vec<i64>> {
        match self {
            Constant::Tensor(tensor) => integers(tensor),
            Constant::Sparse(sparse) => dense(sparse, integers),
            Constant::Int(value) => Some(vec![*value]),
            Constant::Ints(values) => Limit::Numbers.allows(values.len()).then(|| values.to_vec()),
            Constant::Folded(values) => Some(values.clone()),
            _ => None,
        }
    }

    fn floats(&self) -> Option<Vec<f32>> {
        match self {
            Constant::Tensor(tensor) => floats(tensor),
            Constant::Sparse(sparse) => dense(sparse, floats),
            Constant::Float(value) => Some(vec![*value]),
            Constant::Floats(values) => Limit::Numbers.allows(values.len()).then(|| values.to_vec()),
            _ => None,
        }
    }
}

impl<'a> From<Constant<'a>> for Fact<'a> {
    fn from(constant: Constant<'a>) -> Self {
        Fact { typed: constant.typed(), constant: Some(constant), ..Default::default() }
    }
}

/// How many numbers a tensor of these dimensions holds, where they are few enough to be looked at.
fn count(dims: &[i64]) -> Option<usize> {
    let n = dims.iter().try_fold(1usize, |n, dim| n.checked_mul(usize::try_from(*dim).ok()?))?;
    Limit::Numbers.allows(n).then_some(n)
}

fn integers(tensor: &TensorProto) -> Option<Vec<i64>> {
    let small = |values: &[i32]| values.iter().map(|n| i64::from(*n)).collect();
    let n = inside(tensor)?;
    let values: Vec<i64> = match (DataType::try_from(tensor.data_type).ok()?, tensor.raw_data.as_slice()) {
        (DataType::Int64, []) => tensor.int64_data.clone(),
        (DataType::Int32 | DataType::Int8 | DataType::Uint8, []) => small(&tensor.int32_data),
        (DataType::Int64, raw) => raw.as_chunks().0.iter().map(|n| i64::from_le_bytes(*n)).collect(),
        (DataType::Int32, raw) => raw.as_chunks().0.iter().map(|n| i32::from_le_bytes(*n).into()).collect(),
        (DataType::Int8, raw) => raw.iter().map(|n| (*n as i8).into()).collect(),
        (DataType::Uint8, raw) => raw.iter().map(|n| (*n).into()).collect(),
        _ => return None,
    };
    (values.len() == n).then_some(values)
}

fn floats(tensor: &TensorProto) -> Option<Vec<f32>> {
    let n = inside(tensor).filter(|_| tensor.data_type == DataType::Float as i32)?;
    let values: Vec<f32> = match tensor.raw_data.as_slice() {
        [] => tensor.float_data.clone(),
        raw => raw.as_chunks().0.iter().map(|n| f32::from_le_bytes(*n)).collect(),
    };
    (values.len() == n).then_some(values)
}

/// How many numbers a tensor has in the file itself, where they are few.
fn inside(tensor: &TensorProto) -> Option<usize> {
    let stored = tensor.raw_data.len().max(tensor.int64_data.len()).max(tensor.int32_data.len());
    let few = Limit::Numbers.allows(stored.max(tensor.float_data.len()) / size_of::<i64>());
    count(&tensor.dims).filter(|_| few && tensor.data_location != DataLocation::External as i32)
}

/// All numbers of a sparse tensor. Its places are counted through the whole tensor, or given axis by axis.
fn dense<T: Clone + Default>(
    sparse: &SparseTensorProto,
    numbers: impl Fn(&TensorProto) -> Option<Vec<T>>,
) -> Option<Vec<T>> {
    let mut all = vec![T::default(); count(&sparse.dims)?];
    let (values, places) = (numbers(sparse.values.as_ref()?)?, integers(sparse.indices.as_ref()?)?);
    let rank = places.len().checked_div(values.len()).unwrap_or(1).max(1);
    for (value, place) in values.into_iter().zip(places.chunks(rank)) {
        let place = match place {
            [place] => *place,
            axes => axes
                .iter()
                .zip(&sparse.dims)
                .try_fold(0i64, |place, (at, n)| place.checked_mul(*n)?.checked_add(*at))?,
        };
        *all.get_mut(usize::try_from(place).ok()?)? = value;
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn ends<'a>(facts: &mut Facts<'a>, graph: &'a GraphProto) -> Vec<Typed> {
        let open = facts.read(graph, &graph.node.iter().collect::<Vec<_>>(), &mut ends);
        facts.leave(graph, open)
    }

    /// onnx's own inference, stored beside the models, which state no shapes but those of their ends. Where onnx knows
    /// nothing, as behind a shape that the input leaves open, no more is claimed here.
    #[test]
    fn shapes_are_those_that_onnx_infers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lint");
        let stored = std::fs::read_to_string(folder.join("shapes.json")).unwrap();
        let stored: HashMap<String, HashMap<String, Vec<u64>>> = serde_json::from_str(&stored).unwrap();
        let mut compared = 0;
        for (name, shapes) in &stored {
            let model = crate::lint::read(&folder.join(name).with_extension("onnx")).unwrap();
            let graph = model.graph.as_ref().unwrap();
            let written = crate::lint::functions::written_out(&model);
            let mut facts = Facts::outside(&model);
            facts.read(graph, &written.iter().map(|placed| &*placed.node).collect::<Vec<_>>(), &mut ends);
            let outputs = graph.node.iter().filter(|node| node.domain != "com.microsoft").flat_map(|node| &node.output);
            // ONNX Runtime reads a sparse constant, and a shape that is computed of known ones; onnx does not.
            for output in outputs.filter(|_| !["sparse", "folded"].contains(&name.as_str())) {
                let expected = shapes.get(output);
                let found = facts.shape(output).map(|s| s.iter().map(|n| n.unwrap_or(0)).collect::<Vec<_>>());
                let is_end = graph.output.iter().any(|info| info.name == *output);
                assert!(is_end || found.as_ref() == expected, "{output} of {name}: {found:?}, onnx says {expected:?}");
                compared += usize::from(expected.is_some());
            }
        }
        assert!(stored.len() == 31 && compared > 400, "{compared}");
    }

    #[test]
    fn a_name_in_an_inner_graph_hides_the_one_around_it_until_the_graph_is_left() {
        let constant = |dims: &[i64]| TensorProto { name: "x".into(), dims: dims.to_vec(), ..Default::default() };
        let graph = |dims: &[i64]| GraphProto { initializer: vec![constant(dims)], ..Default::default() };
        let (outer, inner) = (graph(&[1]), graph(&[2, 2]));
        let mut facts = Facts::default();
        facts.enter(&outer);
        let open = facts.enter(&inner);
        assert_eq!(facts.shape("x").unwrap().len(), 2);
        facts.leave(&inner, open);
        assert_eq!(facts.shape("x").unwrap().len(), 1);
    }

    #[test]
    fn a_sparse_constant_is_read_by_place_or_by_axis() {
        let longs = |values: &[i64], dims: &[i64]| TensorProto {
            data_type: DataType::Int64 as i32,
            dims: dims.to_vec(),
            int64_data: values.to_vec(),
            ..Default::default()
        };
        for places in [longs(&[1, 5], &[2]), longs(&[0, 1, 1, 2], &[2, 2])] {
            let sparse =
                SparseTensorProto { values: Some(longs(&[7, 9], &[2])), indices: Some(places), dims: vec![2, 3] };
            assert_eq!(Constant::Sparse(&sparse).integers(), Some(vec![0, 7, 0, 0, 0, 9]));
        }
        let beyond =
            SparseTensorProto { values: Some(longs(&[7], &[1])), indices: Some(longs(&[6], &[1])), dims: vec![2, 3] };
        assert_eq!(Constant::Sparse(&beyond).integers(), None);
    }

    #[test]
    fn numbers_outside_the_file_or_fewer_than_stated_are_not_known() {
        let whole = TensorProto {
            data_type: DataType::Int64 as i32,
            dims: vec![2],
            int64_data: vec![3, 4],
            ..Default::default()
        };
        let outside = TensorProto { data_location: DataLocation::External as i32, ..whole.clone() };
        let short = TensorProto { int64_data: vec![3], ..whole.clone() };
        let vast = TensorProto { dims: vec![1 << 40, 1 << 40], ..whole.clone() };
        let found = [whole, outside, short, vast].map(|tensor| Constant::Tensor(&tensor).integers());
        assert_eq!(found, [Some(vec![3, 4]), None, None, None]);
    }
}
