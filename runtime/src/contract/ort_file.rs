//! Reads what an `.ort` file says of itself, without an engine: what `onnx` reads of an ONNX file.
//!
//! The format is a flatbuffer by ONNX Runtime's schema ort.fbs, whose fields are numbered here as they stand there. It
//! trusts nothing: every position is looked up, and one outside of the file ends the reading. Offsets may lead to the same
//! bytes over and over, so that what is read is held to a [`Budget`], not to the file's length.

use std::cell::RefCell;

use super::graph::{Attribute, Constant, Model, Node, Port, few};
use crate::limits::Budget;

/// What the format has at its fifth byte.
pub(super) const MARK: &[u8] = b"ORTM";

/// What an `.ort` file holds, or why it cannot be read.
pub(super) fn model(bytes: &[u8]) -> Result<Model, String> {
    let budget = RefCell::new(Reading { budget: Budget::of_a_file(), spent: None });
    let file = File { bytes, reading: &budget };
    let model = read(file);
    match (model, budget.into_inner().spent) {
        (_, Some(reason)) => Err(reason),
        (None, None) => Err("expected the format of ONNX Runtime, .ort".into()),
        (Some(model), None) => Ok(model),
    }
}

fn read(file: File) -> Option<Model> {
    if file.bytes.get(4..8)? != MARK {
        return None;
    }
    let session = Table { file, at: usize::try_from(file.u32_at(0)?).ok()? };
    let model = session.table(1)?;
    let graph = model.table(7)?;
    let entry = |entry: &Table| Some((entry.string(0)?, entry.string(1)?));
    let opsets = model.tables(1)?;
    let opset = opsets.iter().find(|set| matches!(set.string(0).as_deref(), Some("" | "ai.onnx")))?;
    let values = graph.tables(1)?;
    let ports = |field: usize| {
        let names = graph.strings(field).filter(|names| names.len() <= MAX_PORTS)?;
        names.into_iter().map(|name| port(&values, name)).collect::<Option<Vec<_>>>()
    };
    let has_sparse = graph.field(7).is_some() && !graph.tables(7)?.is_empty();
    Some(Model {
        is_ort: true,
        producer: model.string(2).unwrap_or_default(),
        opset: opset.field(1).and_then(|at| file.i64_at(at)?.try_into().ok()),
        metadata: model.tables(9)?.iter().map(entry).collect::<Option<_>>()?,
        has_graph: true,
        inputs: ports(5)?,
        outputs: ports(6)?,
        nodes: graph.tables(2)?.iter().map(node).collect::<Option<_>>()?,
        constants: graph.tables(0)?.iter().map(constant).collect::<Option<_>>()?,
        foreign: has_sparse.then(|| "sparse weights".into()),
        file_bytes: file.bytes.len() as u64,
    })
}

fn node(node: &Table) -> Option<Node> {
    Some(Node {
        name: node.string(0).unwrap_or_default(),
        domain: node.string(2).unwrap_or_default(),
        operator: node.string(5).unwrap_or_default(),
        inputs: node.strings(8)?,
        outputs: node.strings(9)?,
        attributes: node.tables(10)?.iter().map(attribute).collect::<Option<_>>()?,
    })
}

fn attribute(attribute: &Table) -> Option<Attribute> {
    let file = attribute.file;
    // INT is 2, STRING 3 and INTS 7, by the numbers of ONNX's AttributeProto.AttributeType; floats are of no interest.
    let kind = attribute.field(2).map_or(Some(0), |at| file.u32_at(at))?;
    let ints = match kind {
        2 => vec![attribute.field(4).map_or(Some(0), |at| file.i64_at(at))?],
        7 => attribute.vector(9, 8)?.map(|at| file.i64_at(at)).collect::<Option<_>>()?,
        _ => vec![],
    };
    let foreign = match kind {
        1..=3 | 6..=8 => [(6, "a tensor"), (7, "a graph"), (11, "a tensor"), (12, "a graph")]
            .into_iter()
            .find_map(|(field, what)| attribute.field(field).map(|_| what)),
        _ => Some("no number and no text"),
    };
    let text = if kind == 3 { attribute.string(5)? } else { String::new() };
    Some(Attribute { name: attribute.string(0)?, ints, text, foreign })
}

fn constant(tensor: &Table) -> Option<Constant> {
    let file = tensor.file;
    let dims = tensor.vector(2, 8)?.map(|at| file.i64_at(at).map(i64::cast_unsigned)).collect::<Option<_>>()?;
    let raw = tensor.bytes(4)?;
    let element = tensor.field(3).map_or(Some(0), |at| file.u32_at(at))?.into();
    let few = if raw.len() as u64 <= few(element) { raw.to_vec() } else { vec![] };
    file.take(|budget| budget.items(few.len() as u64 / 8))?;
    Some(Constant { name: tensor.string(0)?, element, dims, held: raw.len() as u64, few, outside: None })
}

/// More inputs or outputs than any file of ours has, and few enough to look each up in turn.
const MAX_PORTS: usize = 16;

/// The type and shape of a value, by its name.
fn port(values: &[Table], name: String) -> Option<Port> {
    let value = values.iter().find(|value| value.has_string(0, &name))?;
    let file = value.file;
    let tensor = value.table(2)?.table(2)?;
    let element = file.u32_at(tensor.field(0)?)?.into();
    let length = |dimension: &Table| -> Option<Option<u64>> {
        let value = dimension.table(0)?;
        // 1: a number. Otherwise it is a name, or nothing.
        let is_fixed = value.field(0).is_some_and(|at| file.bytes.get(at) == Some(&1));
        let number = value.field(1).and_then(|at| file.i64_at(at));
        Some(number.filter(|_| is_fixed).and_then(|number| number.try_into().ok()))
    };
    let shape = tensor.table(1)?.tables(0)?.iter().map(length).collect::<Option<_>>()?;
    Some(Port { name, element, shape })
}

/// The bytes, and what may still be read of them.
#[derive(Clone, Copy)]
struct File<'a> {
    bytes: &'a [u8],
    reading: &'a RefCell<Reading>,
}

struct Reading {
    budget: Budget,
    /// Why reading stopped, where the budget did not suffice.
    spent: Option<String>,
}

impl<'a> File<'a> {
    /// Takes something out of the budget.
    fn take(self, what: impl FnOnce(&mut Budget) -> Result<(), String>) -> Option<()> {
        let mut reading = self.reading.borrow_mut();
        what(&mut reading.budget).map_err(|reason| reading.spent = Some(reason)).ok()
    }

    /// The position that an offset at `at` leads to.
    fn pointed(self, at: usize) -> Option<usize> {
        at.checked_add(usize::try_from(self.u32_at(at)?).ok()?)
    }

    /// A length, and as many bytes.
    fn counted(self, at: usize) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32_at(at)?).ok()?;
        let start = at.checked_add(4)?;
        self.bytes.get(start..start.checked_add(len)?)
    }

    fn text(self, at: usize) -> Option<String> {
        let text = self.counted(at)?;
        self.take(|budget| budget.items(1).and_then(|()| budget.text(text.len() as u64)))?;
        Some(std::str::from_utf8(text).ok()?.into())
    }

    fn u16_at(self, at: usize) -> Option<u16> {
        self.bytes.get(at..)?.first_chunk().map(|word| u16::from_le_bytes(*word))
    }

    fn u32_at(self, at: usize) -> Option<u32> {
        self.bytes.get(at..)?.first_chunk().map(|word| u32::from_le_bytes(*word))
    }

    fn i64_at(self, at: usize) -> Option<i64> {
        self.bytes.get(at..)?.first_chunk().map(|word| i64::from_le_bytes(*word))
    }
}

/// A table of a flatbuffer.
#[derive(Clone, Copy)]
struct Table<'a> {
    file: File<'a>,
    at: usize,
}

impl<'a> Table<'a> {
    /// Where a field lies; `None` where it is left out.
    fn field(self, index: usize) -> Option<usize> {
        let file = self.file;
        let layout = i64::try_from(self.at).ok()? - i64::from(file.u32_at(self.at)?.cast_signed());
        let layout = usize::try_from(layout).ok()?;
        let place = 4 + 2 * index;
        if place + 2 > usize::from(file.u16_at(layout)?) {
            return None;
        }
        match file.u16_at(layout.checked_add(place)?)? {
            0 => None,
            offset => self.at.checked_add(offset.into()),
        }
    }

    fn table(self, index: usize) -> Option<Table<'a>> {
        Some(Table { file: self.file, at: self.file.pointed(self.field(index)?)? })
    }

    fn string(self, index: usize) -> Option<String> {
        self.file.text(self.file.pointed(self.field(index)?)?)
    }

    /// Whether a field is this text, without a copy of it.
    fn has_string(self, index: usize, text: &str) -> bool {
        let found = self.field(index).and_then(|at| self.file.counted(self.file.pointed(at)?));
        let alike = found.filter(|found| found.len() == text.len());
        alike.is_some_and(|found| {
            self.file.take(|budget| budget.text(found.len() as u64)).is_some() && found == text.as_bytes()
        })
    }

    fn strings(self, index: usize) -> Option<Vec<String>> {
        self.vector(index, 4)?.map(|at| self.file.text(self.file.pointed(at)?)).collect()
    }

    /// A vector of bytes; empty where it is left out.
    fn bytes(self, index: usize) -> Option<&'a [u8]> {
        match self.field(index) {
            None => Some(&[]),
            Some(at) => self.file.counted(self.file.pointed(at)?),
        }
    }

    /// The positions of a vector's elements of `size` bytes, all of which are in the file; none where it is left out.
    fn vector(self, index: usize, size: usize) -> Option<impl ExactSizeIterator<Item = usize> + use<>> {
        let file = self.file;
        let (start, len) = match self.field(index) {
            None => (0, 0),
            Some(at) => {
                let at = file.pointed(at)?;
                (at.checked_add(4)?, usize::try_from(file.u32_at(at)?).ok()?)
            }
        };
        file.bytes.get(start..start.checked_add(len.checked_mul(size)?)?)?;
        file.take(|budget| budget.items(len as u64))?;
        Some((0..len).map(move |i| start + i * size))
    }

    fn tables(self, index: usize) -> Option<Vec<Table<'a>>> {
        let file = self.file;
        self.vector(index, 4)?.map(|at| Some(Table { file, at: file.pointed(at)? })).collect()
    }
}
