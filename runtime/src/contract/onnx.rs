//! Reads what an ONNX file says of itself, without an engine: metadata, inputs, outputs, nodes, and what its weights are.
//!
//! This is a walk over the protobuf messages of onnx.proto that seeks over the weights, so that a file of any size
//! costs a few small reads. It trusts nothing: every length is checked against its parent's end before it is used, and
//! what is kept is held to a [`Budget`].

use std::io::{BufReader, Read, Seek};

use super::graph::{Attribute, Constant, Model, Node, Outside, Port, few};
use crate::limits::Budget;

/// What an ONNX file of `bytes` bytes holds.
pub(super) fn model(reader: impl Read + Seek, bytes: u64) -> Result<Model, Broken> {
    let mut model = Model { file_bytes: bytes, ..Model::default() };
    let mut walk = Walk { reader: BufReader::new(reader), at: 0, budget: Budget::of_a_file() };
    match walk.model(bytes, &mut model) {
        Ok(()) if model.has_graph => Ok(model),
        Ok(()) => broken("there is no graph in it"),
        Err(Broken::Format(reason)) => broken(format!("byte {} of {bytes}: {reason}", walk.at)),
        Err(error) => Err(error),
    }
}

/// Why reading stopped.
pub(super) enum Broken {
    Io(std::io::Error),
    Format(String),
}

type Walked<T> = Result<T, Broken>;

fn broken<T>(reason: impl Into<String>) -> Walked<T> {
    Err(Broken::Format(reason.into()))
}

/// A reader that knows where it is.
struct Walk<R> {
    reader: BufReader<R>,
    at: u64,
    budget: Budget,
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
                (20, field) => self.foreign(field, "a training graph", model)?,
                (25, field) => self.foreign(field, "functions of its own", model)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    fn foreign(&mut self, field: Field, what: &str, model: &mut Model) -> Walked<()> {
        model.foreign = Some(what.into());
        self.skip(field)
    }

    fn graph(&mut self, end: u64, model: &mut Model) -> Walked<()> {
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => {
                    let node = self.node(self.at + n)?;
                    model.nodes.push(node);
                }
                (5, Field::Len(n)) => {
                    let constant = self.constant(self.at + n)?;
                    model.constants.push(constant);
                }
                (11, Field::Len(n)) => {
                    let port = self.port(self.at + n)?;
                    model.inputs.push(port);
                }
                (12, Field::Len(n)) => {
                    let port = self.port(self.at + n)?;
                    model.outputs.push(port);
                }
                (15, field) => self.foreign(field, "sparse weights", model)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(())
    }

    fn node(&mut self, end: u64) -> Walked<Node> {
        let mut node = Node::default();
        self.items(1)?;
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => node.inputs.push(self.string(n)?),
                (2, Field::Len(n)) => node.outputs.push(self.string(n)?),
                (3, Field::Len(n)) => node.name = self.string(n)?,
                (4, Field::Len(n)) => node.operator = self.string(n)?,
                (5, Field::Len(n)) => {
                    let attribute = self.attribute(self.at + n)?;
                    node.attributes.push(attribute);
                }
                (7, Field::Len(n)) => node.domain = self.string(n)?,
                (_, field) => self.skip(field)?,
            }
        }
        Ok(node)
    }

    fn attribute(&mut self, end: u64) -> Walked<Attribute> {
        let (mut attribute, mut number_of_its_own) = (Attribute::default(), None);
        self.items(1)?;
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Len(n)) => attribute.name = self.string(n)?,
                (3, Field::Number(value)) => number_of_its_own = Some(value.cast_signed()),
                (8, Field::Number(value)) => {
                    self.items(1)?;
                    attribute.ints.push(value.cast_signed());
                }
                (8, Field::Len(n)) => self.varints(n, &mut attribute.ints)?,
                (number @ (5 | 6 | 10 | 11 | 14 | 15 | 21..=23), field) => {
                    attribute.foreign = Some(match number {
                        6 | 11 => "a graph",
                        21 => "a reference to a function's argument",
                        14 | 15 => "a type",
                        _ => "a tensor",
                    });
                    self.skip(field)?;
                }
                (_, field) => self.skip(field)?,
            }
        }
        if number_of_its_own.is_some() && !attribute.ints.is_empty() {
            attribute.foreign = Some("both a number and a list");
        }
        attribute.ints.extend(number_of_its_own);
        Ok(attribute)
    }

    /// A `TensorProto`, without its numbers where they are many.
    fn constant(&mut self, end: u64) -> Walked<Constant> {
        let mut constant = Constant::default();
        let (mut outside, mut is_outside) = (Vec::new(), false);
        self.items(1)?;
        while let Some((number, field)) = self.field(end)? {
            match (number, field) {
                (1, Field::Number(dim)) => {
                    self.items(1)?;
                    constant.dims.push(dim);
                }
                (1, Field::Len(n)) => {
                    let mut dims = Vec::new();
                    self.varints(n, &mut dims)?;
                    constant.dims.extend(dims.into_iter().map(i64::cast_unsigned));
                }
                (2, Field::Number(element)) => constant.element = element,
                // f32, as many bytes as in the raw form.
                (4 | 9, Field::Len(n)) => self.numbers(n, &mut constant)?,
                // Numbers in as many bytes as each needs.
                (5 | 7, Field::Len(n)) => self.compact(n, &mut constant)?,
                (8, Field::Len(n)) => constant.name = self.string(n)?,
                (13, Field::Len(n)) => outside.push(self.entry(self.at + n)?),
                (14, Field::Number(location)) => is_outside = location == 1,
                (_, field) => self.skip(field)?,
            }
        }
        if is_outside {
            constant.outside = Some(place(&constant.name, outside).or_else(broken)?);
        }
        Ok(constant)
    }

    /// Numbers as they are in memory.
    fn numbers(&mut self, n: u64, constant: &mut Constant) -> Walked<()> {
        constant.held = constant.held.saturating_add(n);
        if constant.held > few(constant.element) {
            return self.skip(Field::Len(n));
        }
        self.items(n / 8)?;
        let mut bytes = vec![0; n as usize];
        self.reader.read_exact(&mut bytes).map_err(Broken::Io)?;
        self.at += n;
        constant.few.extend(bytes);
        Ok(())
    }

    /// `int32_data` and `int64_data`, which hold i8, u8, f16 and i32, or i64. They are counted, and kept where they are few.
    fn compact(&mut self, n: u64, constant: &mut Constant) -> Walked<()> {
        let end = self.at + n;
        let size = super::graph::element_type(constant.element).map_or(8, |(_, size)| size);
        while self.at < end {
            let value = self.varint(end)?;
            constant.held = constant.held.saturating_add(size);
            if constant.held <= few(constant.element) {
                constant.few.extend(&value.to_le_bytes()[..size as usize]);
            }
        }
        Ok(())
    }

    fn varints(&mut self, n: u64, to: &mut Vec<i64>) -> Walked<()> {
        let end = self.at + n;
        while self.at < end {
            self.items(1)?;
            to.push(self.varint(end)?.cast_signed());
        }
        Ok(())
    }

    fn port(&mut self, end: u64) -> Walked<Port> {
        let mut port = Port::default();
        self.items(1)?;
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
                    self.items(1)?;
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
        self.items(1)?;
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
        self.items(1)?;
        self.budget.text(n).map_err(Broken::Format)?;
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

    fn items(&mut self, n: u64) -> Walked<()> {
        self.budget.items(n).map_err(Broken::Format)
    }
}

/// Where a constant lies that is not in the file.
fn place(name: &str, entries: Vec<(String, String)>) -> Result<Outside, String> {
    let mut outside = Outside::default();
    let mut seen = Vec::new();
    for (key, value) in entries {
        let number = || value.parse().map_err(|_| format!("{key} {value:?} of constant {name:?} is no number"));
        match key.as_str() {
            // Readers differ in which of two they take.
            _ if seen.contains(&key) => return Err(format!("constant {name:?} has {key:?} twice")),
            "offset" => outside.offset = number()?,
            "length" => outside.length = Some(number()?),
            "location" => outside.location = value,
            _ => {}
        }
        seen.push(key);
    }
    Ok(outside)
}
