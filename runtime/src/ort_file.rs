//! Reads what an `.ort` file says of itself, without an engine: what `onnx` reads of an ONNX file.
//!
//! The format is a flatbuffer by ONNX Runtime's schema ort.fbs, whose fields are numbered here as they stand there. It
//! trusts nothing: every position is looked up, and one outside of the file ends the reading.

use std::path::Path;

use crate::onnx::{self, Model, Port};
use crate::{Error, Result};

/// Whether a path is to be read as this format.
pub(crate) fn has_its_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("ort"))
}

pub(crate) fn read(path: &Path) -> Result<Model> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
    let broken = || Error::NotOnnx { path: path.into(), reason: "expected the format of ONNX Runtime, .ort".into() };
    model(&bytes).ok_or_else(broken)
}

fn model(bytes: &[u8]) -> Option<Model> {
    if bytes.get(4..8)? != b"ORTM" {
        return None;
    }
    let session = Table { bytes, at: usize::try_from(u32_at(bytes, 0)?).ok()? };
    let model = session.table(1)?;
    let graph = model.table(7)?;
    let [weights, values, nodes] = [0, 1, 2].map(|field| graph.tables(field));
    let (weights, values) = (weights?, values?);
    let entry = |entry: &Table| Some((entry.string(0)?.into(), entry.string(1)?.into()));
    let opsets = model.tables(1)?;
    let opset = opsets.iter().find(|set| matches!(set.string(0), Some("" | "ai.onnx")))?;
    let ports = |field: usize| {
        let names = graph.vector(field, 4).filter(|names| names.len() <= MAX_PORTS)?;
        names.map(|at| port(&values, string_at(bytes, at)?)).collect::<Option<Vec<_>>>()
    };
    Some(Model {
        producer: model.string(2).unwrap_or_default().into(),
        opset: opset.field(1).and_then(|at| i64_at(bytes, at)?.try_into().ok()),
        metadata: model.tables(9)?.iter().map(entry).collect::<Option<_>>()?,
        has_graph: true,
        inputs: ports(5)?,
        outputs: ports(6)?,
        nodes: nodes?.len(),
        pass_rows: weights.iter().find_map(pass_rows),
        weight_bytes: weights.iter().filter_map(|weight| Some(weight.vector(4, 1)?.len() as u64)).sum(),
        outside: Vec::new(),
        file_bytes: bytes.len() as u64,
    })
}

/// Rows of the table that tells the passes apart, if this is it.
fn pass_rows(weight: &Table) -> Option<u64> {
    let is_table = onnx::is_pass_table(weight.string(0)?);
    let at = weight.vector(2, 8).filter(|_| is_table)?.next()?;
    i64_at(weight.bytes, at)?.try_into().ok()
}

/// More inputs or outputs than any file of ours has, and few enough to look each up in turn.
const MAX_PORTS: usize = 16;

/// The type and shape of a value, by its name.
fn port(values: &[Table], name: &str) -> Option<Port> {
    let value = values.iter().find(|value| value.string(0) == Some(name))?;
    let tensor = value.table(2)?.table(2)?;
    let element = u32_at(tensor.bytes, tensor.field(0)?)?.into();
    let length = |dimension: &Table| -> Option<Option<u64>> {
        let value = dimension.table(0)?;
        // 1: a number. Otherwise it is a name, or nothing.
        let is_fixed = value.field(0).is_some_and(|at| value.bytes.get(at) == Some(&1));
        let number = value.field(1).and_then(|at| i64_at(value.bytes, at));
        Some(number.filter(|_| is_fixed).and_then(|number| number.try_into().ok()))
    };
    let shape = tensor.table(1)?.tables(0)?.iter().map(length).collect::<Option<_>>()?;
    Some(Port { name: name.into(), element, shape })
}

/// A table of a flatbuffer.
#[derive(Clone, Copy)]
struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Table<'a> {
    /// Where a field lies; `None` where it is left out.
    fn field(self, index: usize) -> Option<usize> {
        let layout = i64::try_from(self.at).ok()? - i64::from(u32_at(self.bytes, self.at)?.cast_signed());
        let layout = usize::try_from(layout).ok()?;
        let place = 4 + 2 * index;
        if place + 2 > usize::from(u16_at(self.bytes, layout)?) {
            return None;
        }
        match u16_at(self.bytes, layout.checked_add(place)?)? {
            0 => None,
            offset => self.at.checked_add(offset.into()),
        }
    }

    /// What a field points to.
    fn target(self, index: usize) -> Option<usize> {
        pointed(self.bytes, self.field(index)?)
    }

    fn table(self, index: usize) -> Option<Table<'a>> {
        Some(Table { bytes: self.bytes, at: self.target(index)? })
    }

    fn string(self, index: usize) -> Option<&'a str> {
        text(self.bytes, self.target(index)?)
    }

    /// The positions of a vector's elements of `size` bytes, all of which are in the file; none where it is left out.
    fn vector(self, index: usize, size: usize) -> Option<impl ExactSizeIterator<Item = usize> + use<>> {
        let (start, len) = match self.field(index) {
            None => (0, 0),
            Some(at) => {
                let at = pointed(self.bytes, at)?;
                (at.checked_add(4)?, usize::try_from(u32_at(self.bytes, at)?).ok()?)
            }
        };
        self.bytes.get(start..start.checked_add(len.checked_mul(size)?)?)?;
        Some((0..len).map(move |i| start + i * size))
    }

    fn tables(self, index: usize) -> Option<Vec<Table<'a>>> {
        let bytes = self.bytes;
        self.vector(index, 4)?.map(|at| Some(Table { bytes, at: pointed(bytes, at)? })).collect()
    }
}

/// The position that an offset at `at` leads to.
fn pointed(bytes: &[u8], at: usize) -> Option<usize> {
    at.checked_add(usize::try_from(u32_at(bytes, at)?).ok()?)
}

fn string_at(bytes: &[u8], at: usize) -> Option<&str> {
    text(bytes, pointed(bytes, at)?)
}

fn text(bytes: &[u8], at: usize) -> Option<&str> {
    let len = usize::try_from(u32_at(bytes, at)?).ok()?;
    let start = at.checked_add(4)?;
    std::str::from_utf8(bytes.get(start..start.checked_add(len)?)?).ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|word| u16::from_le_bytes(*word))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_le_bytes(*word))
}

fn i64_at(bytes: &[u8], at: usize) -> Option<i64> {
    bytes.get(at..)?.first_chunk().map(|word| i64::from_le_bytes(*word))
}
