//! What is read of a file to judge it: all of its graph but the weights.

/// A file, whichever format it has.
#[derive(Debug, Default)]
pub(crate) struct Model {
    /// Whether it is in ONNX Runtime's own format, as ONNX Runtime wrote it.
    pub is_ort: bool,
    pub producer: String,
    /// The version of ONNX's operators.
    pub opset: Option<u64>,
    pub metadata: Vec<(String, String)>,
    pub has_graph: bool,
    pub inputs: Vec<Port>,
    pub outputs: Vec<Port>,
    pub nodes: Vec<Node>,
    pub constants: Vec<Constant>,
    /// What is in the file that no file of ours has, in words.
    pub foreign: Option<String>,
    pub file_bytes: u64,
}

/// An input or output of the graph.
#[derive(Debug, Default)]
pub(crate) struct Port {
    pub name: String,
    /// A number of `TensorProto.DataType`; 0 where there is none.
    pub element: u64,
    /// `None` for a dimension that is not fixed.
    pub shape: Vec<Option<u64>>,
}

#[derive(Debug, Default)]
pub(crate) struct Node {
    pub name: String,
    pub domain: String,
    pub operator: String,
    /// Empty names for inputs that are left out.
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub attributes: Vec<Attribute>,
}

#[derive(Debug, Default)]
pub(crate) struct Attribute {
    pub name: String,
    /// A whole number, or a list of them.
    pub ints: Vec<i64>,
    /// Text, where it was read: of `.ort` files alone, whose operators have attributes that `dmd export` writes none of.
    pub text: String,
    /// What it holds that is no number and no text: a graph, a tensor.
    pub foreign: Option<&'static str>,
}

/// A weight or another constant.
#[derive(Debug, Default)]
pub(crate) struct Constant {
    pub name: String,
    /// A number of `TensorProto.DataType`.
    pub element: u64,
    pub dims: Vec<u64>,
    /// Bytes that it has in the file.
    pub held: u64,
    /// Those bytes, little-endian, if they are few: numbers that decide shapes.
    pub few: Vec<u8>,
    /// Where it is, if not in the file.
    pub outside: Option<Outside>,
}

/// A part of the file beside.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outside {
    pub location: String,
    pub offset: u64,
    /// `None` where the file does not say it: as much as the constant needs.
    pub length: Option<u64>,
}

const F32: u64 = 1;
const I64: u64 = 7;

/// The most bytes of a constant of this type that are kept. Whole numbers may be the lengths of a table's parts, two for
/// each block of a network that attends to a prompt.
pub(crate) fn few(element: u64) -> u64 {
    if element == I64 { 4096 } else { 256 }
}

/// Its name, and the bytes of an element; `None` for types that no file of ours has.
pub(crate) fn element_type(element: u64) -> Option<(&'static str, u64)> {
    Some(match element {
        F32 => ("f32", 4),
        2 => ("u8", 1),
        3 => ("i8", 1),
        6 => ("i32", 4),
        I64 => ("i64", 8),
        10 => ("f16", 2),
        _ => return None,
    })
}

/// The bytes of a constant of this type and shape; `None` where there cannot be one.
pub(crate) fn bytes(element: u64, mut dims: impl Iterator<Item = u64>) -> Option<u64> {
    let (_, size) = element_type(element)?;
    dims.try_fold(size, u64::checked_mul)
}

impl Port {
    /// The type of its elements, by name.
    pub fn kind(&self) -> String {
        element_type(self.element).map_or_else(|| format!("type {}", self.element), |(name, _)| name.into())
    }
}

impl Model {
    /// Rows of the table that tells the passes apart.
    pub fn pass_rows(&self) -> Option<u64> {
        // In half precision the name goes on.
        let is_table = |constant: &&Constant| constant.name.split('.').next() == Some("pass_table");
        self.constants.iter().find(is_table)?.dims.first().copied()
    }

    /// Where weights lie that are not in the file.
    pub fn outside(&self) -> impl Iterator<Item = (&Constant, &Outside)> {
        self.constants.iter().filter_map(|constant| Some((constant, constant.outside.as_ref()?)))
    }

    /// Bytes of all weights, wherever they are.
    pub fn weight_bytes(&self) -> u64 {
        let bytes =
            |constant: &Constant| if constant.outside.is_some() { constant.bytes() } else { Some(constant.held) };
        self.constants.iter().filter_map(bytes).fold(0, u64::saturating_add)
    }
}

impl Constant {
    /// What its type and shape ask for; `None` where that cannot be.
    pub fn bytes(&self) -> Option<u64> {
        bytes(self.element, self.dims.iter().copied())
    }

    /// Its numbers, if it has few and they are whole.
    pub fn whole(&self) -> Option<Vec<i64>> {
        (self.element == I64 && self.is_small()).then(|| words(&self.few).map(i64::from_le_bytes).collect())
    }

    /// Its numbers, if it has few and they are f32.
    pub fn floats(&self) -> Option<Vec<f32>> {
        (self.element == F32 && self.is_small()).then(|| words(&self.few).map(f32::from_le_bytes).collect())
    }

    fn is_small(&self) -> bool {
        self.outside.is_none() && self.bytes() == Some(self.few.len() as u64)
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}
