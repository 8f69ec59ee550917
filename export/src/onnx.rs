//! Writing ONNX: a builder that keeps names, static shapes and constants in order, and the encoding of a whole file.
//! Bytes depend on the graph and the metadata alone: the same generator gives the same file.

use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_onnx::onnx::attribute_proto::AttributeType;
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::tensor_shape_proto::{Dimension, dimension};
use candle_onnx::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use prost::Message;
use std::collections::HashMap;

/// Version of the file format's container; 8 goes with opset 17.
pub(crate) const IR_VERSION: i64 = 8;

/// Protobuf counts bytes in 31 bits.
const MAX_BYTES: usize = i32::MAX as usize;

/// A whole model around a graph. `metadata` goes in as it stands, in this order.
pub(crate) fn model(graph: GraphProto, opset: i64, metadata: &[(&str, String)]) -> ModelProto {
    let entry = |(key, value): &(&str, String)| StringStringEntryProto { key: key.to_string(), value: value.clone() };
    ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: opset }],
        producer_name: "dmd".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(graph),
        metadata_props: metadata.iter().map(entry).collect(),
        ..Default::default()
    }
}

/// The bytes of the file.
pub(crate) fn encode(model: &ModelProto) -> Result<Vec<u8>> {
    match model.encoded_len() {
        bytes if bytes > MAX_BYTES => Err(Error::TooLarge { bytes, limit: MAX_BYTES }),
        _ => Ok(model.encode_to_vec()),
    }
}

/// A graph under construction. A node's value bears the node's name.
pub(crate) struct Builder {
    graph: GraphProto,
    /// Small constants by content: type, shape, bytes.
    shared: HashMap<(i32, Vec<i64>, Vec<u8>), String>,
}

impl Builder {
    pub fn new(name: &str) -> Self {
        Builder { graph: GraphProto { name: name.into(), ..Default::default() }, shared: HashMap::new() }
    }

    pub fn input(&mut self, name: &str, kind: DataType, shape: &[usize]) -> String {
        self.graph.input.push(value_info(name, kind, shape));
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
        let infos = outputs.iter().map(|(name, shape)| value_info(name, DataType::Float, shape));
        self.graph.value_info.extend(infos);
    }

    /// A parameter with a name of its own, seen in the shape `dims`.
    pub fn weight(&mut self, name: &str, tensor: &Tensor, dims: &[usize]) -> Result<String> {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        self.graph.initializer.push(initializer(name, DataType::Float, dims, little_endian(&values)));
        Ok(name.into())
    }

    /// A small f32 constant; equal ones are stored once, under the first one's name.
    pub fn floats(&mut self, name: &str, values: &[f32]) -> String {
        self.constant(name, DataType::Float, &[values.len()], little_endian(values))
    }

    /// A number that broadcasts against anything.
    pub fn scalar(&mut self, value: f32) -> String {
        self.constant(&format!("scalar_{value}"), DataType::Float, &[], value.to_le_bytes().to_vec())
    }

    /// A constant shape or list of lengths.
    pub fn integers(&mut self, values: &[usize]) -> String {
        let name = values.iter().map(|value| value.to_string()).collect::<Vec<_>>().join("x");
        let bytes = values.iter().flat_map(|value| (*value as i64).to_le_bytes()).collect();
        self.constant(&format!("shape_{name}"), DataType::Int64, &[values.len()], bytes)
    }

    fn constant(&mut self, name: &str, kind: DataType, dims: &[usize], bytes: Vec<u8>) -> String {
        let constant = initializer(name, kind, dims, bytes);
        let key = (constant.data_type, constant.dims.clone(), constant.raw_data.clone());
        if let Some(name) = self.shared.get(&key) {
            return name.clone();
        }
        self.shared.insert(key, name.into());
        self.graph.initializer.push(constant);
        name.into()
    }

    /// The finished graph, whose output `name` is `value` under a new name.
    pub fn finish(mut self, value: &str, name: &str, kind: DataType, shape: &[usize]) -> GraphProto {
        let values = self.graph.node.iter_mut().flat_map(|node| node.input.iter_mut().chain(&mut node.output));
        values.filter(|found| *found == value).for_each(|found| *found = name.into());
        self.graph.value_info.retain(|info| info.name != value);
        self.graph.output.push(value_info(name, kind, shape));
        self.graph
    }
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

fn initializer(name: &str, kind: DataType, dims: &[usize], raw_data: Vec<u8>) -> TensorProto {
    let dims = dims.iter().map(|dim| *dim as i64).collect();
    TensorProto { name: name.into(), data_type: kind as i32, dims, raw_data, ..Default::default() }
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn value_info(name: &str, kind: DataType, shape: &[usize]) -> ValueInfoProto {
    let length = |n: &usize| Dimension { value: Some(dimension::Value::DimValue(*n as i64)), ..Default::default() };
    let shape = Some(TensorShapeProto { dim: shape.iter().map(length).collect() });
    let tensor = type_proto::Tensor { elem_type: kind as i32, shape };
    let r#type = Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() });
    ValueInfoProto { name: name.into(), r#type, ..Default::default() }
}
