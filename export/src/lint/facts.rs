//! What is known of every value of a graph before it runs: its type, its shape, and its numbers where it is constant.
//! Shapes come from the file where it states them, and are inferred where it does not.

use super::shapes;
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::tensor_shape_proto::dimension::Value;
use candle_onnx::onnx::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use std::collections::HashMap;

/// One dimension after the other; `None` for one that the file leaves open.
pub(super) type Shape = Vec<Option<u64>>;

/// What is known of the values of a graph, those of the graphs around it included.
#[derive(Clone, Default)]
pub(super) struct Facts<'a> {
    opset: i64,
    kinds: HashMap<&'a str, i32>,
    shapes: HashMap<&'a str, Shape>,
    constants: HashMap<&'a str, &'a TensorProto>,
    producers: HashMap<&'a str, &'a NodeProto>,
}

impl<'a> Facts<'a> {
    /// What holds outside of all graphs of a model.
    pub fn outside(model: &ModelProto) -> Self {
        let set = model.opset_import.iter().find(|set| matches!(set.domain.as_str(), "" | "ai.onnx"));
        Facts { opset: set.map_or(1, |set| set.version), ..Default::default() }
    }

    /// Everything about a graph that stands inside another one, of which `outer` tells.
    pub fn of(graph: &'a GraphProto, outer: &Facts<'a>) -> Self {
        let mut facts = outer.clone();
        graph.initializer.iter().for_each(|tensor| facts.add_constant(&tensor.name, tensor));
        for info in graph.input.iter().chain(&graph.output).chain(&graph.value_info) {
            facts.add_info(info);
        }
        for node in &graph.node {
            match constant_of(node) {
                Some(tensor) => facts.add_constant(&node.output[0], tensor),
                None => facts.infer(node),
            }
        }
        facts
    }

    /// The version of ai.onnx that the file is written in.
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// The element type, a number of `TensorProto.DataType`.
    pub fn kind(&self, name: &str) -> Option<i32> {
        self.kinds.get(name).copied()
    }

    /// The shape; `None` where not even the rank is known.
    pub fn shape(&self, name: &str) -> Option<&Shape> {
        self.shapes.get(name)
    }

    /// Whether the shape is known and every dimension of it is a positive number, or the value is stored in the file.
    pub fn is_static(&self, name: &str) -> bool {
        let positive = |dim: &Option<u64>| dim.is_some_and(|n| n > 0);
        self.is_constant(name) || self.shape(name).is_some_and(|shape| shape.iter().all(positive))
    }

    /// Whether the value is stored in the file.
    pub fn is_constant(&self, name: &str) -> bool {
        self.constants.contains_key(name)
    }

    /// The node that gives a value; `None` for inputs of the graph and constants.
    pub fn producer(&self, name: &str) -> Option<&'a NodeProto> {
        self.producers.get(name).copied()
    }

    /// The numbers of a constant of integers.
    pub fn integers(&self, name: &str) -> Option<Vec<i64>> {
        let tensor = self.constants.get(name)?;
        match DataType::try_from(tensor.data_type).ok()? {
            DataType::Int64 if tensor.raw_data.is_empty() => Some(tensor.int64_data.clone()),
            DataType::Int64 => Some(tensor.raw_data.as_chunks().0.iter().map(|n| i64::from_le_bytes(*n)).collect()),
            DataType::Int32 if tensor.raw_data.is_empty() => {
                Some(tensor.int32_data.iter().map(|n| (*n).into()).collect())
            }
            DataType::Int32 => {
                Some(tensor.raw_data.as_chunks().0.iter().map(|n| i32::from_le_bytes(*n).into()).collect())
            }
            DataType::Int8 | DataType::Uint8 if tensor.raw_data.is_empty() => {
                Some(tensor.int32_data.iter().map(|n| (*n).into()).collect())
            }
            DataType::Int8 => Some(tensor.raw_data.iter().map(|n| (*n as i8).into()).collect()),
            DataType::Uint8 => Some(tensor.raw_data.iter().map(|n| (*n).into()).collect()),
            _ => None,
        }
    }

    /// The numbers of a constant of f32.
    pub fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.constants.get(name)?;
        (tensor.data_type == DataType::Float as i32).then(|| match tensor.raw_data.is_empty() {
            true => tensor.float_data.clone(),
            false => tensor.raw_data.as_chunks().0.iter().map(|n| f32::from_le_bytes(*n)).collect(),
        })
    }

    fn add_constant(&mut self, name: &'a str, tensor: &'a TensorProto) {
        self.kinds.insert(name, tensor.data_type);
        self.shapes.insert(name, tensor.dims.iter().map(|n| dimension(*n)).collect());
        self.constants.insert(name, tensor);
    }

    /// What the file itself says of a value.
    fn add_info(&mut self, info: &'a ValueInfoProto) {
        let Some(tensor) = tensor_type(info) else { return };
        self.kinds.insert(&info.name, tensor.elem_type);
        if let Some(shape) = stated_shape(info) {
            self.shapes.insert(&info.name, shape);
        }
    }

    /// What follows for the outputs of a node from its inputs, where the file does not say it.
    fn infer(&mut self, node: &'a NodeProto) {
        self.producers.extend(node.output.iter().filter(|name| !name.is_empty()).map(|name| (name.as_str(), node)));
        if let Some(output) = node.output.first()
            && !self.kinds.contains_key(output.as_str())
            && let Some(kind) = shapes::output_type(node, self)
        {
            self.kinds.insert(output, kind);
        }
        if node.output.iter().all(|output| self.shapes.contains_key(output.as_str())) {
            return;
        }
        for (output, shape) in node.output.iter().zip(shapes::output_shapes(node, self)) {
            // What the file states and leaves open, the inputs may still tell.
            let stated = self.shapes.get(output.as_str());
            if let Some(shape) = shape
                && stated.is_none_or(|stated| stated.len() != shape.len())
            {
                let sensible = |n: Option<u64>| n.filter(|n| *n <= MAX_DIMENSION);
                self.shapes.insert(output, shape.into_iter().map(sensible).collect());
            }
        }
    }
}

/// No real dimension is longer, and sums and products of these stay within 64 bits.
const MAX_DIMENSION: u64 = 1 << 31;

fn dimension(n: i64) -> Option<u64> {
    u64::try_from(n).ok().filter(|n| *n <= MAX_DIMENSION)
}

fn tensor_type(info: &ValueInfoProto) -> Option<&type_proto::Tensor> {
    match info.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor),
        _ => None,
    }
}

/// The shape that the file gives for a value.
pub(super) fn stated_shape(info: &ValueInfoProto) -> Option<Shape> {
    let dim = |value: &Option<Value>| match value {
        Some(Value::DimValue(n)) => dimension(*n),
        _ => None,
    };
    Some(tensor_type(info)?.shape.as_ref()?.dim.iter().map(|d| dim(&d.value)).collect())
}

/// The tensor of a node Constant, which ONNX Runtime stores as an initializer when it loads the file.
pub(super) fn constant_of(node: &NodeProto) -> Option<&TensorProto> {
    let is_constant = node.op_type == "Constant" && node.domain.is_empty() && !node.output.is_empty();
    is_constant.then(|| node.attribute.iter().find_map(|attribute| attribute.t.as_ref())).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// onnx's own inference, stored beside the models, which state no shapes but those of their ends. Where onnx knows
    /// nothing, as behind a shape that is computed, no more is claimed here.
    #[test]
    fn shapes_are_those_that_onnx_infers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lint");
        let stored = std::fs::read_to_string(folder.join("shapes.json")).unwrap();
        let stored: HashMap<String, HashMap<String, Vec<u64>>> = serde_json::from_str(&stored).unwrap();
        let mut compared = 0;
        for (name, shapes) in &stored {
            let model = crate::lint::read(&folder.join(name).with_extension("onnx")).unwrap();
            let graph = model.graph.as_ref().unwrap();
            let facts = Facts::of(graph, &Facts::default());
            for output in graph.node.iter().flat_map(|node| &node.output) {
                let expected = shapes.get(output);
                let found = facts.shape(output).map(|s| s.iter().map(|n| n.unwrap_or(0)).collect::<Vec<_>>());
                let is_end = graph.output.iter().any(|info| info.name == *output);
                assert!(is_end || found.as_ref() == expected, "{output} of {name}: {found:?}, onnx says {expected:?}");
                compared += usize::from(expected.is_some());
            }
        }
        assert!(stored.len() == 22 && compared > 200, "{compared}");
    }
}
