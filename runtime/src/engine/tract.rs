//! tract: a pure Rust engine. Slower than ONNX Runtime, and always there.
//!
//! It may panic on a broken graph, so that every call into it is caught.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tract_onnx::Onnx;
use tract_onnx::model::ParseResult;
use tract_onnx::pb;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::floats::FloatPrecisionTranslator;
use tract_onnx::tract_core::internal::{RunOptions, bail, format_err, multithread::Executor};
use tract_onnx::tract_core::transform::ModelTransform;

use super::{Engine, EngineInfo, EngineKind, Feed, Out, Values, threads};
use crate::contract::{Source, bytes};
use crate::limits;
use crate::printable::printable_lines;
use crate::{Error, ModuleInfo, Options, Result};

/// tract does not tell its version; Cargo.toml pins it.
const VERSION: &str = "0.23.9";

struct Tract {
    plan: Arc<TypedRunnableModel>,
    /// The graph's inputs in its own order.
    inputs: Vec<String>,
    /// Samples in a call.
    batch: usize,
}

pub(super) fn info() -> Result<EngineInfo> {
    Ok(EngineInfo { kind: EngineKind::Tract, version: VERSION.into(), library: None, warning: None })
}

pub(super) fn open(source: Source<'_>, info: &ModuleInfo, options: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    let failed = |reason| Error::Load { path: source.path().into(), engine: EngineKind::Tract, reason };
    if source.is_ort() {
        return Err(failed("only ONNX Runtime runs .ort files; give tract the .onnx file".into()));
    }
    // Without memory tract ends the process. What it needs at least, two of the largest values, is asked for beforehand.
    drop(limits::room::<f32>(2 * info.file.largest_value)?);
    let engine = caught(|| load(source, info, threads(options)));
    Ok((Box::new(engine.map_err(failed)?), self::info()?))
}

fn load(source: Source<'_>, info: &ModuleInfo, threads: usize) -> TractResult<Tract> {
    // tract plans for shapes that are fixed: where the batch is free, one picture, however many there will be. The
    // shapes of the file would contradict that.
    let onnx = tract_onnx::onnx().with_ignore_value_info(info.batch().is_none());
    let proto = proto(source, info, &onnx)?;
    let folder = info.file.data.as_ref().and_then(|data| data.parent()?.to_str());
    let ParseResult { mut model, unresolved_inputs, .. } = onnx.parse(&proto, folder)?;
    if !unresolved_inputs.is_empty() {
        bail!("nothing gives {unresolved_inputs:?}");
    }
    drop(proto);
    let inputs: Vec<_> = model.input_outlets()?.iter().map(|outlet| model.node(outlet.node).name.clone()).collect();
    let executor = if threads > 1 { Executor::multithread(threads) } else { Executor::SingleThread };
    let options = RunOptions { executor: Some(executor), ..RunOptions::default() };
    if info.batch().is_none() {
        for port in &info.inputs {
            let at = inputs
                .iter()
                .position(|name| *name == port.name)
                .ok_or_else(|| format_err!("no input {}", port.name))?;
            let shape: TVec<usize> = port.shape.iter().map(|n| n.unwrap_or(1)).collect();
            let kind = match port.kind.as_str() {
                "i64" => DatumType::I64,
                "i32" => DatumType::I32,
                _ => DatumType::F32,
            };
            model.set_input_fact(at, kind.fact(shape).into())?;
        }
        (0..info.outputs.len()).try_for_each(|at| model.set_output_fact(at, InferenceFact::default()))?;
    }
    let mut model = model.into_typed()?;
    let is_half = |fact: &TypedFact| fact.datum_type == DatumType::F16;
    if model.nodes().iter().any(|node| node.outputs.iter().any(|output| is_half(&output.fact))) {
        // In software, halves take minutes where singles take milliseconds. The weights keep their rounding. What the file
        // says of its precision counts for nothing: other tools rewrite the graph and leave that as it was.
        FloatPrecisionTranslator::new(DatumType::F16, DatumType::F32).transform(&mut model)?;
    }
    let plan = model.into_optimized()?.into_runnable_with_options(&options)?;
    Ok(Tract { plan, inputs, batch: info.batch().unwrap_or(1) })
}

/// The file as a message, in which weights outside have the name of the file that holds them, links resolved, and the
/// length that the file may leave out.
fn proto(source: Source<'_>, info: &ModuleInfo, onnx: &Onnx) -> TractResult<pb::ModelProto> {
    let mut proto = match source {
        Source::File(path) => onnx.proto_model_for_path(path)?,
        Source::Bytes(mut bytes) => onnx.proto_model_for_read(&mut bytes)?,
        Source::Map(_, map) => onnx.proto_model_for_read(&mut &map[..])?,
    };
    let Some(name) = info.file.data.as_ref().and_then(|data| data.file_name()?.to_str()) else { return Ok(proto) };
    for constant in proto.graph.iter_mut().flat_map(|graph| &mut graph.initializer) {
        let length = bytes(constant.data_type as u64, constant.dims.iter().map(|dim| *dim as u64)).unwrap_or(0);
        let entries = &mut constant.external_data;
        entries.iter_mut().filter(|entry| entry.key == "location").for_each(|entry| entry.value = name.into());
        if !entries.is_empty() && !entries.iter().any(|entry| entry.key == "length") {
            entries.push(pb::StringStringEntryProto { key: "length".into(), value: length.to_string() });
        }
    }
    Ok(proto)
}

impl Engine for Tract {
    fn run(&self, feeds: &[Feed<'_>], outs: &mut [Out<'_>]) -> Result<(), String> {
        let samples = feeds.first().and_then(|feed| feed.shape.first()).copied().unwrap_or(0);
        let calls = samples / self.batch;
        for call in 0..calls {
            let found = caught(|| self.try_run(feeds, call * self.batch))?;
            if found.len() != outs.len() {
                return Err(format!("it has {} outputs, expected {}", found.len(), outs.len()));
            }
            for (found, out) in found.iter().zip(&mut *outs) {
                let values = out.len() / calls;
                match out.part(call * values, values) {
                    Out::F32(out) => copy(found, out)?,
                    Out::U8(out) => copy(found, out)?,
                }
            }
        }
        Ok(())
    }
}

/// Copies an output, if it is of the type and the size that the file promises.
fn copy<T: Datum + Copy>(image: &TValue, out: &mut [T]) -> Result<(), String> {
    let view = image.to_plain_array_view::<T>().map_err(|error| format!("{error:#}"))?;
    let values = view.as_slice().ok_or("the output is not contiguous")?;
    if values.len() != out.len() {
        return Err(format!("the output has {} values, the file says {}", values.len(), out.len()));
    }
    out.copy_from_slice(values);
    Ok(())
}

impl Tract {
    /// Runs one call on the samples from `first` on.
    fn try_run(&self, feeds: &[Feed<'_>], first: usize) -> TractResult<TVec<TValue>> {
        let input = |name: &String| {
            let feed = feeds
                .iter()
                .find(|feed| feed.name == name)
                .ok_or_else(|| format_err!("nothing is given for {name}"))?;
            let (mut shape, of_each) = (feed.shape.to_vec(), feed.shape[1..].iter().product::<usize>());
            shape[0] = self.batch;
            let part = first * of_each..(first + self.batch) * of_each;
            Ok(match feed.values {
                Values::F32(values) => Tensor::from_shape(&shape, &values[part])?,
                Values::I32(values) => Tensor::from_shape(&shape, &values[part])?,
                Values::I64(values) => Tensor::from_shape(&shape, &values[part])?,
            }
            .into_tvalue())
        };
        let inputs = self.inputs.iter().map(input).collect::<TractResult<_>>()?;
        self.plan.run(inputs)
    }
}

/// A result or a panic of tract as text.
fn caught<T>(call: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| printable_lines(&format!("{error:#}"))),
        Err(panic) => Err(printable_lines(&format!("it panicked: {}", message(&*panic)))),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("for an unknown reason")
}

#[cfg(test)]
#[path = "../../tests/common/mod.rs"]
mod common;

#[cfg(test)]
mod tests {
    use super::common::{F16, F32, Tiny, constant, int, node};
    use super::*;

    /// Half precision is computed in software, three hundred times slower: nothing of it may be left, whatever the metadata
    /// says, which other tools leave as it was.
    #[test]
    fn no_half_is_left_in_a_plan() {
        let nodes = [
            node("Cast", &["pre"], &["h"], &[int("to", F16)]),
            node("Mul", &["h", "two"], &["m"], &[]),
            node("Cast", &["m"], &["image"], &[int("to", F32)]),
        ];
        let two = constant("two", F16, &[], &0x4000u16.to_le_bytes());
        let bytes = Tiny { constants: vec![two], ..Tiny::with_nodes(&nodes) }.bytes();
        let info = ModuleInfo::of(Source::Bytes(&bytes)).unwrap();
        assert_eq!(info.precision, "fp32");
        let tract = load(Source::Bytes(&bytes), &info, 1).unwrap();
        let mut facts = tract.plan.model().nodes().iter().flat_map(|node| &node.outputs);
        assert!(facts.all(|output| output.fact.datum_type != DatumType::F16));
    }
}
