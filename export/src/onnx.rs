//! Writing ONNX: a builder that keeps names, static shapes and constants in order, and the encoding of a whole file.
//! Bytes depend on the graph and the metadata alone: the same generator gives the same file.

use crate::{Dialect, Error, Result};
use candle_core::{DType, Tensor};
use candle_onnx::onnx::attribute_proto::AttributeType;
use candle_onnx::onnx::tensor_proto::{DataLocation, DataType};
use candle_onnx::onnx::tensor_shape_proto::{Dimension, dimension};
use candle_onnx::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use prost::{Message, encode_length_delimiter, length_delimiter_len};
use sha2::{Digest, Sha256};
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::{self, Write};

/// Protobuf counts bytes in 31 bits.
const MAX_BYTES: usize = i32::MAX as usize;

/// A whole model around a graph. `metadata` goes in as it stands, in this order.
pub(crate) fn model(graph: GraphProto, dialect: Dialect, metadata: &[(&str, String)]) -> ModelProto {
    let entry = |(key, value): &(&str, String)| StringStringEntryProto { key: key.to_string(), value: value.clone() };
    ModelProto {
        ir_version: dialect.ir_version(),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: dialect.opset() }],
        producer_name: "dmd".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(graph),
        metadata_props: metadata.iter().map(entry).collect(),
        ..Default::default()
    }
}

/// Stores constants of one type, shape and content once, under the first one's name. What a precision makes of a graph
/// has many: scales and zero points that happen to be equal, zeros, and steps of values that share their range.
pub(crate) fn share_constants(graph: &mut GraphProto) {
    let (mut first, mut names) = (HashMap::new(), HashMap::new());
    graph.initializer.retain(|constant| match first.entry(content_hash(constant)) {
        Entry::Occupied(first) => {
            names.insert(constant.name.clone(), String::clone(first.get()));
            false
        }
        Entry::Vacant(place) => {
            place.insert(constant.name.clone());
            true
        }
    });
    rename(graph.node.iter_mut().flat_map(|node| &mut node.input), &names);
}

/// Numbers the values that nobody asks for. Nodes, weights, inputs and outputs keep their names.
pub(crate) fn number_values(model: &mut ModelProto) {
    let Some(graph) = &mut model.graph else { return };
    let named: HashSet<&str> = graph.output.iter().map(|info| info.name.as_str()).collect();
    let values = graph.node.iter().flat_map(|node| &node.output).filter(|name| !named.contains(name.as_str()));
    let numbers = values.enumerate().map(|(i, name)| (name.clone(), i.to_string())).collect();
    rename(graph.node.iter_mut().flat_map(|node| node.input.iter_mut().chain(&mut node.output)), &numbers);
    rename(graph.value_info.iter_mut().map(|info| &mut info.name), &numbers);
}

fn rename<'a>(found: impl Iterator<Item = &'a mut String>, names: &HashMap<String, String>) {
    found.for_each(|name| {
        if let Some(other) = names.get(name) {
            name.clone_from(other);
        }
    });
}

/// Leaves types and shapes of values out, which every engine infers for itself. GroupNormalization alone says nothing of
/// its value to ONNX's plain inference, so that a dialect with it keeps them.
pub(crate) fn forget_types(model: &mut ModelProto, dialect: Dialect) {
    match (&mut model.graph, dialect) {
        (Some(graph), Dialect::Portable | Dialect::Nnapi) => graph.value_info.clear(),
        (_, Dialect::Native) | (None, _) => {}
    }
}

/// The size of the file; an error where protobuf cannot count it.
pub(crate) fn encoded_len(model: &ModelProto) -> Result<usize> {
    let Encoded { frame, graph_len, .. } = encoded(model);
    match frame.len() + graph_len {
        bytes if bytes > MAX_BYTES => Err(Error::TooLarge { bytes, limit: MAX_BYTES }),
        bytes => Ok(bytes),
    }
}

/// Writes the file constant by constant, so that the weights are not held a second time.
pub(crate) fn write(model: &ModelProto, to: &mut impl Write) -> io::Result<()> {
    let Encoded { frame, graph, .. } = encoded(model);
    to.write_all(&frame)?;
    to.write_all(&graph)?;
    for constant in constants_of(model) {
        to.write_all(&[GRAPH_INITIALIZER])?;
        to.write_all(&constant.encode_length_delimited_to_vec())?;
    }
    to.flush()
}

/// A file but for the constants, which come last.
struct Encoded {
    /// All but the graph, then the graph's key and length.
    frame: Vec<u8>,
    graph: Vec<u8>,
    /// Bytes of the graph with its constants.
    graph_len: usize,
}

/// Keys of fields on the wire whose length follows: `ModelProto.graph` (7), `GraphProto.node` (1) and `initializer` (5),
/// `NodeProto.attribute` (5).
const MODEL_GRAPH: u8 = 7 << 3 | 2;
const GRAPH_NODE: u8 = 1 << 3 | 2;
const GRAPH_INITIALIZER: u8 = 5 << 3 | 2;
const NODE_ATTRIBUTE: u8 = 5 << 3 | 2;

/// `AttributeProto.f` (2) and `i` (3), each with a value of zero.
const ATTRIBUTE_FLOAT_ZERO: [u8; 5] = [2 << 3 | 5, 0, 0, 0, 0];
const ATTRIBUTE_INT_ZERO: [u8; 2] = [3 << 3, 0];

fn constants_of(model: &ModelProto) -> impl Iterator<Item = &TensorProto> {
    model.graph.iter().flat_map(|graph| &graph.initializer)
}

fn encoded(model: &ModelProto) -> Encoded {
    let framed = |len: usize| 1 + length_delimiter_len(len) + len;
    let (model_frame, mut graph) = without_constants(model);
    let nodes: Vec<Vec<u8>> = std::mem::take(&mut graph.node).into_iter().map(node_bytes).collect();
    let mut bytes = Vec::new();
    nodes.iter().for_each(|node| push_field(&mut bytes, GRAPH_NODE, node));
    bytes.extend(graph.encode_to_vec());
    let graph_len = bytes.len() + constants_of(model).map(|constant| framed(constant.encoded_len())).sum::<usize>();
    let mut frame = model_frame.encode_to_vec();
    push_key(&mut frame, MODEL_GRAPH, graph_len);
    Encoded { frame, graph: bytes, graph_len }
}

/// A node whose attributes of zero stand in the file, as Python's onnx has them: prost leaves zeros out, and a reader that
/// asks whether there is a value (ONNX Runtime's providers ask for the axis of scales) then takes it for missing.
fn node_bytes(mut node: NodeProto) -> Vec<u8> {
    let attributes = std::mem::take(&mut node.attribute).into_iter().map(|attribute| {
        let mut bytes = attribute.encode_to_vec();
        match AttributeType::try_from(attribute.r#type) {
            Ok(AttributeType::Int) if attribute.i == 0 => bytes.extend(ATTRIBUTE_INT_ZERO),
            Ok(AttributeType::Float) if attribute.f == 0.0 => bytes.extend(ATTRIBUTE_FLOAT_ZERO),
            _ => {}
        }
        bytes
    });
    let mut bytes = node.encode_to_vec();
    attributes.for_each(|attribute| push_field(&mut bytes, NODE_ATTRIBUTE, &attribute));
    bytes
}

fn push_field(bytes: &mut Vec<u8>, key: u8, value: &[u8]) {
    push_key(bytes, key, value.len());
    bytes.extend(value);
}

fn push_key(bytes: &mut Vec<u8>, key: u8, len: usize) {
    bytes.push(key);
    encode_length_delimiter(len, bytes).expect("a vector grows as it must");
}

/// The model without its graph, and the graph without its constants.
fn without_constants(model: &ModelProto) -> (ModelProto, GraphProto) {
    let frame = ModelProto {
        ir_version: model.ir_version,
        opset_import: model.opset_import.clone(),
        producer_name: model.producer_name.clone(),
        producer_version: model.producer_version.clone(),
        metadata_props: model.metadata_props.clone(),
        ..Default::default()
    };
    let graph = model.graph.as_ref().map(|graph| GraphProto {
        name: graph.name.clone(),
        node: graph.node.clone(),
        input: graph.input.clone(),
        output: graph.output.clone(),
        value_info: graph.value_info.clone(),
        ..Default::default()
    });
    (frame, graph.unwrap_or_default())
}

/// A graph in a dialect, in single precision.
pub(crate) struct Lowered {
    pub graph: GraphProto,
    /// Names of the nodes that stay in single precision.
    pub islands: BTreeSet<String>,
}

/// A graph under construction. A node's value bears the node's name.
pub(crate) struct Builder {
    graph: GraphProto,
    dynamic_batch: bool,
    /// Nodes that must compute in single precision whatever the file's own is.
    islands: BTreeSet<String>,
    /// Constants by the hash of their content (type, shape, bytes).
    shared: HashMap<[u8; 32], String>,
}

impl Builder {
    /// With `dynamic_batch`, the first axis of every value is free.
    pub fn new(name: &str, dynamic_batch: bool) -> Self {
        let graph = GraphProto { name: name.into(), ..Default::default() };
        Builder { graph, dynamic_batch, islands: BTreeSet::new(), shared: HashMap::new() }
    }

    pub fn input(&mut self, name: &str, kind: DataType, shape: &[usize]) -> String {
        self.graph.input.push(value_info(name, kind, &self.dims(shape)));
        name.into()
    }

    /// Appends a node whose value is f32 of this shape.
    pub fn node(
        &mut self,
        name: &str,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
        shape: &[usize],
    ) -> String {
        self.nodes(name, operator, inputs, attributes, &[(name.to_string(), shape.to_vec())]);
        name.into()
    }

    /// Appends a node with several f32 values.
    pub fn nodes(
        &mut self,
        name: &str,
        operator: &str,
        inputs: &[&str],
        attribute: Vec<AttributeProto>,
        outputs: &[(String, Vec<usize>)],
    ) {
        self.graph.node.push(NodeProto {
            name: name.into(),
            op_type: operator.into(),
            input: inputs.iter().map(|input| input.to_string()).collect(),
            output: outputs.iter().map(|(name, _)| name.clone()).collect(),
            attribute,
            ..Default::default()
        });
        for (name, shape) in outputs {
            self.graph.value_info.push(value_info(name, DataType::Float, &self.dims(shape)));
        }
    }

    /// A shape for the file; traced for one picture where the number of them is free.
    fn dims(&self, shape: &[usize]) -> Vec<Dim> {
        let mut dims: Vec<Dim> = shape.iter().map(|n| Dim::Fixed(*n)).collect();
        if let (true, Some(first)) = (self.dynamic_batch, dims.first_mut()) {
            *first = Dim::Batch(shape[0]);
        }
        dims
    }

    /// A parameter, seen in the shape `dims`. Equal ones are stored once, under the first one's name.
    pub fn weight(&mut self, name: &str, tensor: &Tensor, dims: &[usize]) -> Result<String> {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(self.constant(name, DataType::Float, dims, little_endian(&values)))
    }

    /// A small f32 constant.
    pub fn floats(&mut self, name: &str, values: &[f32]) -> String {
        self.constant(name, DataType::Float, &[values.len()], little_endian(values))
    }

    /// A number that broadcasts against anything.
    pub fn scalar(&mut self, value: f32) -> String {
        self.constant(&format!("scalar_{value}"), DataType::Float, &[], value.to_le_bytes().to_vec())
    }

    /// A constant shape or list of lengths.
    pub fn integers(&mut self, values: &[i64]) -> String {
        let name = values.iter().map(|value| value.to_string()).collect::<Vec<_>>().join("x");
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(&format!("shape_{name}"), DataType::Int64, &[values.len()], bytes)
    }

    fn constant(&mut self, name: &str, kind: DataType, dims: &[usize], bytes: Vec<u8>) -> String {
        let constant = initializer(name, kind, dims, bytes);
        match self.shared.entry(content_hash(&constant)) {
            Entry::Occupied(first) => first.get().clone(),
            Entry::Vacant(place) => {
                self.graph.initializer.push(constant);
                place.insert(name.into()).clone()
            }
        }
    }

    /// Appends a node as [`node`](Self::node) does, which computes in single precision whatever the file's own is.
    pub fn island(
        &mut self,
        name: &str,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
        shape: &[usize],
    ) -> String {
        self.islands.insert(name.into());
        self.node(name, operator, inputs, attributes, shape)
    }

    /// Makes an output of a value, under a new name.
    pub fn output(&mut self, value: &str, name: &str, kind: DataType, shape: &[usize]) {
        let values = self.graph.node.iter_mut().flat_map(|node| node.input.iter_mut().chain(&mut node.output));
        values.filter(|found| *found == value).for_each(|found| *found = name.into());
        self.graph.value_info.retain(|info| info.name != value);
        self.graph.output.push(value_info(name, kind, &self.dims(shape)));
    }

    /// The finished graph.
    pub fn finish(self) -> Lowered {
        Lowered { graph: self.graph, islands: self.islands }
    }
}

/// The attributes of a node, by name; a missing one is a fault of the graph.
pub(crate) struct Attributes<'a>(pub &'a NodeProto);

impl Attributes<'_> {
    pub fn int(&self, name: &str) -> Result<i64> {
        self.find(name).map(|attribute| attribute.i)
    }

    pub fn float(&self, name: &str) -> Result<f64> {
        self.find(name).map(|attribute| f64::from(attribute.f))
    }

    pub fn ints(&self, name: &str) -> Result<&[i64]> {
        self.find(name).map(|attribute| attribute.ints.as_slice())
    }

    fn find(&self, name: &str) -> Result<&AttributeProto> {
        let found = self.0.attribute.iter().find(|attribute| attribute.name == name);
        found.ok_or_else(|| {
            Error::Malformed(vec![format!("node \"{}\" ({}) has no attribute {name}", self.0.name, self.0.op_type)])
        })
    }
}

/// Whether a convolution is the affine map of a norm: each channel on its own, pointwise.
pub(crate) fn maps_channels(node: &NodeProto) -> bool {
    node.op_type == "Conv" && Attributes(node).int("group").is_ok()
}

/// The constants of a graph by name.
pub(crate) fn constants(graph: &GraphProto) -> HashMap<&str, &TensorProto> {
    graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect()
}

/// The most bytes that the values of a graph in single precision take at a time, each from the node that gives it to the
/// last one that reads it.
pub(crate) fn peak_value_bytes(graph: &GraphProto) -> u64 {
    let infos = graph.value_info.iter().chain(&graph.input).chain(&graph.output);
    let bytes: HashMap<&str, u64> = infos.map(|info| (info.name.as_str(), value_bytes(info))).collect();
    let reads = graph.node.iter().enumerate().flat_map(|(at, node)| node.input.iter().map(move |name| (name, at)));
    let last_use: HashMap<&String, usize> = reads.collect();
    let (mut live, mut peak) = (0u64, 0u64);
    for (at, node) in graph.node.iter().enumerate() {
        let of = |name: &String| bytes.get(name.as_str()).copied().unwrap_or(0);
        live += node.output.iter().map(of).sum::<u64>();
        peak = peak.max(live);
        let read: BTreeSet<&String> = node.input.iter().filter(|name| last_use.get(name) == Some(&at)).collect();
        live = live.saturating_sub(read.into_iter().map(of).sum());
    }
    peak
}

fn value_bytes(info: &ValueInfoProto) -> u64 {
    let dims = tensor_type(info).and_then(|tensor| tensor.shape.as_ref()).map(|shape| shape.dim.as_slice());
    let length = |dim: &Dimension| match dim.value {
        Some(dimension::Value::DimValue(n)) => n.unsigned_abs(),
        _ => 1,
    };
    size_of::<f32>() as u64 * dims.unwrap_or_default().iter().map(length).product::<u64>()
}

/// The shape of a constant.
pub(crate) fn dims(tensor: &TensorProto) -> Vec<usize> {
    tensor.dims.iter().map(|dim| *dim as usize).collect()
}

/// The numbers of a constant of f32, f16, int8 or int32, as f32.
pub(crate) fn values_f32(tensor: &TensorProto) -> Result<Vec<f32>> {
    let bytes = tensor.raw_data.as_slice();
    Ok(match DataType::try_from(tensor.data_type) {
        Ok(DataType::Float) => words(bytes).map(f32::from_le_bytes).collect(),
        Ok(DataType::Float16) => words(bytes).map(|word| half::f16::from_le_bytes(word).to_f32()).collect(),
        Ok(DataType::Int8) => bytes.iter().map(|byte| f32::from(*byte as i8)).collect(),
        Ok(DataType::Int32) => words(bytes).map(|word| i32::from_le_bytes(word) as f32).collect(),
        other => return Err(Error::Malformed(vec![format!("constant \"{}\" has type {other:?}", tensor.name)])),
    })
}

/// The numbers of a constant of int64.
pub(crate) fn values_i64(tensor: &TensorProto) -> Vec<i64> {
    words(&tensor.raw_data).map(i64::from_le_bytes).collect()
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

/// The type of a value's elements, a number of `DataType`.
pub(crate) fn element_type(info: &ValueInfoProto) -> Option<i32> {
    tensor_type(info).map(|tensor| tensor.elem_type)
}

/// What is said of a value that is a tensor.
pub(crate) fn tensor_type(info: &ValueInfoProto) -> Option<&type_proto::Tensor> {
    match info.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor),
        _ => None,
    }
}

/// The same shape under another name and of another type.
pub(crate) fn value_info_like(info: &ValueInfoProto, name: &str, kind: DataType) -> ValueInfoProto {
    let mut info = ValueInfoProto { name: name.into(), ..info.clone() };
    if let Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) = &mut info.r#type {
        tensor.elem_type = kind as i32;
    }
    info
}

/// Tensors of fewer bytes stay in the model, where a name and an offset would cost as much.
const MIN_EXTERNAL_BYTES: usize = 1024;

/// External tensors begin on a page, large ones where every system can map them by themselves (64 KiB on Windows).
const PAGE: usize = 4096;
const MAP_GRANULARITY: usize = 65536;
const LARGE: usize = 1 << 20;

/// What goes into the file beside a model, which is written without a copy of it.
#[derive(Default)]
pub(crate) struct ExternalData<'a> {
    /// Bytes and where they begin, ascending.
    parts: Vec<(usize, &'a [u8])>,
    pub bytes: usize,
}

impl<'a> ExternalData<'a> {
    /// Finds a place for a constant; gives where it begins.
    fn place(&mut self, bytes: &'a [u8]) -> usize {
        let offset = self.bytes.next_multiple_of(if bytes.len() < LARGE { PAGE } else { MAP_GRANULARITY });
        self.parts.push((offset, bytes));
        self.bytes = offset + bytes.len();
        offset
    }

    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        static PADDING: [u8; MAP_GRANULARITY] = [0; MAP_GRANULARITY];
        let mut at = 0;
        for (offset, bytes) in &self.parts {
            to.write_all(&PADDING[..offset - at])?;
            to.write_all(bytes)?;
            at = offset + bytes.len();
        }
        to.flush()
    }
}

/// The model without its large constants, and those for a file called `location`.
pub(crate) fn with_external_data<'a>(model: &'a ModelProto, location: &str) -> (ModelProto, ExternalData<'a>) {
    let mut outside = ExternalData::default();
    let (mut light, mut graph) = without_constants(model);
    graph.initializer = constants_of(model).map(|tensor| moved_out(tensor, location, &mut outside)).collect();
    light.graph = Some(graph);
    (light, outside)
}

fn moved_out<'a>(tensor: &'a TensorProto, location: &str, outside: &mut ExternalData<'a>) -> TensorProto {
    let length = tensor.raw_data.len();
    if length < MIN_EXTERNAL_BYTES {
        return tensor.clone();
    }
    let offset = outside.place(&tensor.raw_data);
    let entry = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
    TensorProto {
        name: tensor.name.clone(),
        dims: tensor.dims.clone(),
        data_type: tensor.data_type,
        data_location: DataLocation::External as i32,
        external_data: vec![
            entry("location", location.into()),
            entry("offset", offset.to_string()),
            entry("length", length.to_string()),
        ],
        ..Default::default()
    }
}

/// One axis of a value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dim {
    Fixed(usize),
    /// So many times the number of pictures, which is free.
    Batch(usize),
}

/// What makes two constants one.
fn content_hash(constant: &TensorProto) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(constant.data_type.to_le_bytes());
    hash.update((constant.dims.len() as u64).to_le_bytes());
    constant.dims.iter().for_each(|dim| hash.update(dim.to_le_bytes()));
    hash.update(&constant.raw_data);
    hash.finalize().into()
}

/// An integer attribute.
pub(crate) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: AttributeType::Int as i32, i: value, ..Default::default() }
}

/// A list of integers.
pub(crate) fn ints(name: &str, values: &[usize]) -> AttributeProto {
    let ints = values.iter().map(|value| *value as i64).collect();
    AttributeProto { name: name.into(), r#type: AttributeType::Ints as i32, ints, ..Default::default() }
}

/// A number.
pub(crate) fn float(name: &str, value: f64) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: AttributeType::Float as i32, f: value as f32, ..Default::default() }
}

/// A word.
pub(crate) fn string(name: &str, value: &str) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: AttributeType::String as i32, s: value.into(), ..Default::default() }
}

pub(crate) fn initializer(name: &str, kind: DataType, dims: &[usize], raw_data: Vec<u8>) -> TensorProto {
    let dims = dims.iter().map(|dim| *dim as i64).collect();
    TensorProto { name: name.into(), data_type: kind as i32, dims, raw_data, ..Default::default() }
}

pub(crate) fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn value_info(name: &str, kind: DataType, shape: &[Dim]) -> ValueInfoProto {
    let value = |dim: &Dim| match dim {
        Dim::Fixed(n) => dimension::Value::DimValue(*n as i64),
        Dim::Batch(1) => dimension::Value::DimParam(BATCH.into()),
        Dim::Batch(n) => dimension::Value::DimParam(format!("{n}*{BATCH}")),
    };
    let length = |dim: &Dim| Dimension { value: Some(value(dim)), ..Default::default() };
    let shape = Some(TensorShapeProto { dim: shape.iter().map(length).collect() });
    let tensor = type_proto::Tensor { elem_type: kind as i32, shape };
    let r#type = Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() });
    ValueInfoProto { name: name.into(), r#type, ..Default::default() }
}

/// The name of the axis that `--dynamic-batch` leaves free.
pub(crate) const BATCH: &str = "batch";

#[cfg(test)]
mod tests {
    use super::*;

    /// What a reader of protobuf's second version sees: whether a field is there at all.
    #[test]
    fn zeros_stand_in_the_file() {
        let float = |name: &str, f: f32| AttributeProto { f, r#type: AttributeType::Float as i32, ..int(name, 0) };
        let node = NodeProto {
            op_type: "Mixed".into(),
            attribute: vec![int("axis", 0), int("group", 3), float("alpha", 0.0), ints("pads", &[0, 0])],
            ..Default::default()
        };
        let bias = initializer("bias", DataType::Float, &[300], vec![1; 1200]);
        let graph = GraphProto { name: "g".into(), node: vec![node], initializer: vec![bias], ..Default::default() };
        let model = model(graph, Dialect::Portable, &[("key", "value".into())]);
        let mut file = Vec::new();
        write(&model, &mut file).unwrap();
        assert_eq!(file.len(), encoded_len(&model).unwrap());
        assert_eq!(ModelProto::decode(file.as_slice()).unwrap(), model);
        // name (1) "axis", type (20) INT (2), i (3) 0; name "alpha", type FLOAT (1), f (2) 0.
        for field in [b"\x0a\x04axis\xa0\x01\x02\x18\x00".as_slice(), b"\x0a\x05alpha\xa0\x01\x01\x15\x00\x00\x00\x00"]
        {
            assert!(file.windows(field.len()).any(|window| window == field), "{field:?}");
        }
    }
}
