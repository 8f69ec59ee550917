//! Reads what an ONNX file says of itself, without an engine: metadata, inputs, outputs and counts.
//!
//! This is a walk over the protobuf messages of onnx.proto that seeks over the weights, so that a file of any size
//! costs a few small reads. It trusts nothing: every length is checked against its parent's end before it is used,
//! and every stored tensor must hold the bytes that its dimensions ask for, so that no engine is led to allocate
//! for a size that the file only claims.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use crate::{Error, Result};

/// The part of a `ModelProto` that matters here.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub producer: String,
    pub opset: Option<u64>,
    pub metadata: Vec<(String, String)>,
    pub has_graph: bool,
    pub inputs: Vec<Port>,
    pub outputs: Vec<Port>,
    pub nodes: usize,
    /// Rows of the table that tells the passes apart.
    pub pass_rows: Option<u64>,
    /// Weights in the file itself.
    pub weight_bytes: u64,
    /// Weights that lie elsewhere.
    pub outside: Vec<Outside>,
    pub file_bytes: u64,
}

/// Where a weight lies that is not in the file.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    pub location: String,
    pub offset: u64,
    pub length: u64,
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

pub(crate) const F32: u64 = 1;
pub(crate) const U8: u64 = 2;
pub(crate) const I64: u64 = 7;

/// The longest string, value info or metadata value that is read; far over what any real file holds.
const MAX_BYTES: u64 = 1 << 24;

pub(crate) fn read(path: &Path) -> Result<Model> {
    let io = |source| Error::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let about = file.metadata().map_err(io)?;
    if about.is_dir() {
        let source = std::io::Error::new(std::io::ErrorKind::IsADirectory, "is a folder, expected an .onnx file");
        return Err(io(source));
    }
    let file_bytes = about.len();
    let mut model = Model { file_bytes, ..Model::default() };
    let mut walk = Walk { reader: BufReader::new(file), at: 0 };
    match walk.model(file_bytes, &mut model) {
        Ok(()) if model.has_graph => Ok(model),
        Ok(()) => Err(Error::NotOnnx { path: path.into(), reason: "there is no graph in it".into() }),
        Err(Broken::Format(reason)) => {
            let reason = format!("byte {} of {file_bytes}: {reason}", walk.at);
            Err(Error::NotOnnx { path: path.into(), reason })
        }
        Err(Broken::Io(source)) => Err(io(source)),
    }
}

/// Whether a weight of this name tells the passes apart. In half precision the name goes on.
pub(crate) fn is_pass_table(name: &str) -> bool {
    name.split('.').next() == Some("pass_table")
}

enum Broken {
    Io(std::io::Error),
    Format(String),
}

type Walked<T> = std::result::Result<T, Broken>;

fn broken<T>(reason: impl Into<String>) -> Walked<T> {
    Err(Broken::Format(reason.into()))
}

/// A reader that knows where it is.
struct Walk<R> {
    reader: BufReader<R>,
    at: u64,
}

/// What matters of a `TensorProto`.
struct Tensor {
    name: String,
    /// Its first dimension.
    rows: Option<u64>,
    /// What it holds.
    bytes: u64,
    /// Where the rest is.
    outside: Option<Outside>,
}

/// One field's value, as the wire has it. The bytes of `Len` have not been read yet.
enum Field {
    Number(u64),
    Len(u64),
}

impl<R: Read + Seek> Walk<R> {
    fn model(&mut self, end: u64, model: &mut Model) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (2, Field::Len(n)) => model.producer = self.string(n)?,
                (7, Field::Len(n)) => {
                    model.has_graph = true;
                    self.graph(self.at + n, model)?;
                }
                (8, Field::Len(n)) => self.opset(self.at + n, model)?,
                (14, Field::Len(n)) => {
                    let entry = self.entry(self.at + n)?;
                    model.metadata.push(entry);
                }
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    fn graph(&mut self, end: u64, model: &mut Model) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => {
                    model.nodes += 1;
                    self.node(self.at + n)?;
                }
                (5, Field::Len(n)) => {
                    let tensor = self.tensor(self.at + n)?;
                    model.weight_bytes += tensor.bytes;
                    model.outside.extend(tensor.outside);
                    if is_pass_table(&tensor.name) {
                        model.pass_rows = tensor.rows;
                    }
                }
                (11, Field::Len(n)) => {
                    let port = self.port(self.at + n)?;
                    model.inputs.push(port);
                }
                (12, Field::Len(n)) => {
                    let port = self.port(self.at + n)?;
                    model.outputs.push(port);
                }
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    /// Checks the constants among a node's attributes.
    fn node(&mut self, end: u64) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (5, Field::Len(n)) => self.attribute(self.at + n)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    fn attribute(&mut self, end: u64) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (5 | 10, Field::Len(n)) => {
                    self.tensor(self.at + n)?;
                }
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    /// A `TensorProto`, after a check that its dimensions ask for no more elements than it holds.
    fn tensor(&mut self, end: u64) -> Walked<Tensor> {
        let (mut elements, mut bytes, mut external, mut rows) = (1u64, 0u64, false, None);
        let mut outside = Outside::default();
        let mut name = String::new();
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Number(dim)) => {
                    rows = rows.or(Some(dim));
                    elements = elements.saturating_mul(dim);
                }
                (1, Field::Len(n)) => {
                    let dims_end = self.at + n;
                    while self.at < dims_end {
                        let dim = self.varint(dims_end)?;
                        rows = rows.or(Some(dim));
                        elements = elements.saturating_mul(dim);
                    }
                }
                (8, Field::Len(n)) => name = self.string(n)?,
                (13, Field::Len(n)) => {
                    let (key, value) = self.entry(self.at + n)?;
                    let number = || value.parse().or_else(|_| broken(format!("{key} {value:?} of tensor {name:?}")));
                    match key.as_str() {
                        "offset" => outside.offset = number()?,
                        "length" => outside.length = number()?,
                        "location" => outside.location = value,
                        _ => {}
                    }
                }
                (14, Field::Number(location)) => external = location == 1,
                (4..=7 | 9..=11, Field::Len(n)) => {
                    bytes = bytes.saturating_add(n);
                    self.skip(Field::Len(n))?;
                }
                // Numbers that are not packed: a byte each at least.
                (4..=7 | 10..=11, Field::Number(_)) => bytes += 1,
                (_, field) => self.skip(field)?,
            }
        }
        // The smallest element type has four to a byte.
        let held = if external { outside.length } else { bytes };
        if elements > held.saturating_mul(4) && elements > 0 {
            return broken(format!("tensor {name:?} claims {elements} elements and holds {held} bytes"));
        }
        Ok(Tensor { name, rows, bytes, outside: external.then_some(outside) })
    }

    fn port(&mut self, end: u64) -> Walked<Port> {
        let mut port = Port::default();
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => port.name = self.string(n)?,
                (2, Field::Len(n)) => self.value_type(self.at + n, &mut port)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(port)
    }

    /// `TypeProto`, and in it `tensor_type`.
    fn value_type(&mut self, end: u64, port: &mut Port) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => self.tensor_type(self.at + n, port)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    fn tensor_type(&mut self, end: u64, port: &mut Port) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Number(element)) => port.element = element,
                (2, Field::Len(n)) => self.shape(self.at + n, port)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    fn shape(&mut self, end: u64, port: &mut Port) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => {
                    let dim = self.number_at(self.at + n, 1)?;
                    port.shape.push(dim);
                }
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    fn opset(&mut self, end: u64, model: &mut Model) -> Walked<()> {
        let (mut domain, mut version) = (String::new(), None);
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => domain = self.string(n)?,
                (2, Field::Number(value)) => version = Some(value),
                (_, field) => self.skip(field)?,
            }
        }
        if domain.is_empty() || domain == "ai.onnx" {
            model.opset = version;
        }
        Ok(())
    }

    fn entry(&mut self, end: u64) -> Walked<(String, String)> {
        let mut entry = (String::new(), String::new());
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => entry.0 = self.string(n)?,
                (2, Field::Len(n)) => entry.1 = self.string(n)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(entry)
    }

    /// The last number of field `wanted` up to `end`.
    fn number_at(&mut self, end: u64, wanted: u64) -> Walked<Option<u64>> {
        let mut found = None;
        while let Some((number, field)) = self.field(end)? {
            match field {
                Field::Number(value) if number == wanted => found = Some(value),
                field => self.skip(field)?,
            }
        }
        Ok(found)
    }

    /// The next field before `end`, which is where the message ends.
    fn field(&mut self, end: u64) -> Walked<Option<(u64, Field)>> {
        if self.at == end {
            return Ok(None);
        }
        let tag = self.varint(end)?;
        let field = match tag & 7 {
            0 => Field::Number(self.varint(end)?),
            1 => Field::Number(u64::from_le_bytes(self.array(end)?)),
            2 => {
                let n = self.varint(end)?;
                if n > end - self.at {
                    return broken(format!("a field of {n} bytes where {} are left", end - self.at));
                }
                Field::Len(n)
            }
            5 => Field::Number(u64::from(u32::from_le_bytes(self.array(end)?))),
            kind => return broken(format!("unknown wire type {kind}")),
        };
        match tag >> 3 {
            0 => broken("a field with number 0"),
            number => Ok(Some((number, field))),
        }
    }

    fn varint(&mut self, end: u64) -> Walked<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array(end)?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        broken("a number longer than ten bytes")
    }

    fn array<const N: usize>(&mut self, end: u64) -> Walked<[u8; N]> {
        if end - self.at < N as u64 {
            return broken("a field runs over the end of its message");
        }
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(Broken::Io)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn string(&mut self, n: u64) -> Walked<String> {
        if n > MAX_BYTES {
            return broken(format!("a string of {n} bytes"));
        }
        let mut bytes = vec![0; n as usize];
        self.reader.read_exact(&mut bytes).map_err(Broken::Io)?;
        self.at += n;
        String::from_utf8(bytes).or_else(|_| broken("a string that is not UTF-8"))
    }

    fn skip(&mut self, field: Field) -> Walked<()> {
        if let Field::Len(n) = field {
            let n = i64::try_from(n).or_else(|_| broken("a length over 2^63"))?;
            self.reader.seek_relative(n).map_err(Broken::Io)?;
            self.at += n as u64;
        }
        Ok(())
    }
}
