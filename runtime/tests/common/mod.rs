//! Small files made by hand: an ONNX file is protobuf, whose wire format fits in two functions.

#![allow(dead_code, reason = "each test file uses its own part")]

/// Field `number` of a message, its bytes behind their length.
pub fn field(number: u64, bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [varint(number << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

/// Field `number` of a message, a whole number.
pub fn number(number: u64, value: u64) -> Vec<u8> {
    [varint(number << 3), varint(value)].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

pub const F32: u64 = 1;
pub const I64: u64 = 7;
pub const F16: u64 = 10;

/// A `NodeProto`, named like its first output; attributes as they are on the wire.
pub fn node(operator: &str, inputs: &[&str], outputs: &[&str], attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = [field(3, outputs[0]), field(4, operator)].concat();
    inputs.iter().for_each(|input| bytes.extend(field(1, input)));
    outputs.iter().for_each(|output| bytes.extend(field(2, output)));
    attributes.iter().for_each(|attribute| bytes.extend(field(5, attribute)));
    bytes
}

/// An `AttributeProto` of a list of whole numbers.
pub fn ints(name: &str, values: &[u64]) -> Vec<u8> {
    let values = values.iter().flat_map(|value| number(8, *value));
    [field(1, name), number(20, 7), values.collect()].concat()
}

pub fn int(name: &str, value: u64) -> Vec<u8> {
    [field(1, name), number(20, 2), number(3, value)].concat()
}

/// A `TensorProto` with its bytes.
pub fn constant(name: &str, element: u64, dims: &[u64], bytes: &[u8]) -> Vec<u8> {
    let dims = dims.iter().flat_map(|dim| number(1, *dim));
    [dims.collect(), number(2, element), field(8, name), field(9, bytes)].concat()
}

pub fn floats(name: &str, dims: &[u64], values: &[f32]) -> Vec<u8> {
    constant(name, F32, dims, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

pub fn whole(name: &str, values: &[i64]) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    constant(name, I64, &[values.len() as u64], &bytes)
}

/// A `TensorProto` whose bytes are elsewhere: `entries` of its `external_data`.
pub fn outside(name: &str, dims: &[u64], entries: &[(&str, &str)]) -> Vec<u8> {
    let dims = dims.iter().flat_map(|dim| number(1, *dim));
    let entries = entries.iter().flat_map(|(key, value)| field(13, entry(key, value)));
    [dims.collect(), number(2, F32), field(8, name), entries.collect(), number(14, 1)].concat()
}

/// A `StringStringEntryProto`.
pub fn entry(key: &str, value: &str) -> Vec<u8> {
    [field(1, key), field(2, value)].concat()
}

/// A file that passes for one of dmd's own: noise `(1, 1, H, W)` through the nodes to `image`. Without any, a convolution
/// by the 1 × 1 weight 0.5 makes it; with some, that makes `pre`, from which they go on.
#[derive(Clone)]
pub struct Tiny {
    pub shape: [u64; 4],
    pub nodes: Vec<Vec<u8>>,
    pub weight: Vec<u8>,
    pub constants: Vec<Vec<u8>>,
    /// Format 1 where it is 1; of another one, the metadata is all that there is.
    pub format: u32,
    pub metadata: Vec<(String, String)>,
    /// Further fields of the graph and of the model.
    pub graph: Vec<u8>,
    pub model: Vec<u8>,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            shape: [1, 1, 4, 4],
            nodes: vec![],
            weight: floats("weight", &[1, 1, 1, 1], &[0.5]),
            constants: vec![],
            format: 1,
            metadata: vec![],
            graph: vec![],
            model: vec![],
        }
    }
}

impl Tiny {
    pub fn with_nodes(nodes: &[Vec<u8>]) -> Self {
        Self { nodes: nodes.to_vec(), ..Self::default() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let port = |name: &str| {
            let dims = self.shape.iter().flat_map(|dim| field(1, number(1, *dim)));
            let tensor = [number(1, F32), field(2, dims.collect::<Vec<_>>())].concat();
            [field(1, name), field(2, field(1, tensor))].concat()
        };
        let made = if self.nodes.is_empty() { "image" } else { "pre" };
        let conv = node("Conv", &["noise", "weight"], &[made], &[ints("kernel_shape", &[1, 1])]);
        let mut graph = field(2, "generator");
        std::iter::once(&conv).chain(&self.nodes).for_each(|node| graph.extend(field(1, node)));
        std::iter::once(&self.weight).chain(&self.constants).for_each(|constant| graph.extend(field(5, constant)));
        graph.extend([field(11, port("noise")), field(12, port("image")), self.graph.clone()].concat());
        let [batch, channels, height, width] = self.shape.map(|side| side.to_string());
        let own = [
            ("format", "1"),
            ("version", "0.1.0"),
            ("dialect", "portable"),
            ("sigma", "2.5"),
            ("batch", &batch),
            ("channels", &channels),
            ("height", &height),
            ("width", &width),
            ("output", "f32"),
            ("classes", "[]"),
            ("weights_sha256", "0"),
        ];
        let own = own.map(|(key, value)| (format!("dmd.{key}"), value.to_string()));
        let own = own.into_iter().filter(|_| self.format == 1);
        let changed = |key: &String| self.metadata.iter().any(|(other, _)| other == key);
        let metadata = own.filter(|(key, _)| !changed(key)).chain(self.metadata.clone());
        let metadata = metadata.flat_map(|(key, value)| field(14, entry(&key, &value)));
        let opset = field(8, number(2, 17));
        [number(1, 8), field(2, "dmd"), field(7, graph), opset, metadata.collect(), self.model.clone()].concat()
    }
}
