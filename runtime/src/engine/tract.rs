//! tract: a pure Rust engine. Slower than ONNX Runtime, and always there.
//!
//! It may panic on a broken graph, so that every call into it is caught.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::floats::FloatPrecisionTranslator;
use tract_onnx::tract_core::internal::{RunOptions, multithread::Executor};
use tract_onnx::tract_core::transform::ModelTransform;

use super::{Engine, EngineInfo, EngineKind, Out, threads};
use crate::{Error, Info, Options, Result, ort_file};

/// tract does not tell its version; Cargo.toml pins it.
const VERSION: &str = "0.23.9";

struct Tract {
    plan: Arc<TypedRunnableModel>,
    /// `[B, C, H, W]`.
    shape: [usize; 4],
    /// Whether the graph lists its label or row before its noise.
    index_first: bool,
}

pub(super) fn info() -> Result<EngineInfo> {
    Ok(EngineInfo { kind: EngineKind::Tract, version: VERSION.into(), library: None, warning: None })
}

pub(super) fn open(path: &Path, info: &Info, options: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    let failed = |reason| Error::Load { path: path.into(), engine: EngineKind::Tract, reason };
    if ort_file::has_its_name(path) {
        return Err(failed("only ONNX Runtime runs .ort files; give tract the .onnx file".into()));
    }
    let engine = caught(|| load(path, info, threads(options)));
    Ok((Box::new(engine.map_err(failed)?), self::info()?))
}

fn load(path: &Path, info: &Info, threads: usize) -> TractResult<Tract> {
    // tract plans for shapes that are fixed: where the batch is free, one picture, however many there will be. The
    // shapes of the file would contradict that.
    let onnx = tract_onnx::onnx().with_ignore_value_info(info.dynamic_batch);
    let mut model = onnx.model_for_path(path)?;
    let first = model.input_outlets()?.first().copied();
    let index_first = first.is_some_and(|outlet| model.node(outlet.node).name != "noise");
    let executor = if threads > 1 { Executor::multithread(threads) } else { Executor::SingleThread };
    let options = RunOptions { executor: Some(executor), ..RunOptions::default() };
    let shape = [info.batch, info.channels, info.height, info.width];
    if info.dynamic_batch {
        for at in 0..model.input_outlets()?.len() {
            let fact =
                if info.index().is_some() && (at == 0) == index_first { i64::fact([1]) } else { f32::fact(shape) };
            model.set_input_fact(at, fact.into())?;
        }
        model.set_output_fact(0, InferenceFact::default())?;
    }
    let mut model = model.into_typed()?;
    if info.precision == "fp16" {
        // In software, halves take minutes where singles take milliseconds. The weights keep their rounding.
        FloatPrecisionTranslator::new(DatumType::F16, DatumType::F32).transform(&mut model)?;
    }
    let plan = model.into_optimized()?.into_runnable_with_options(&options)?;
    Ok(Tract { plan, shape, index_first })
}

impl Engine for Tract {
    fn run(&mut self, noise: &[f32], index: &[i64], mut out: Out<'_>) -> Result<(), String> {
        let (batch, values) = (self.shape[0], self.shape.iter().product());
        let rows = |call: usize| index.get(call * batch..(call + 1) * batch).unwrap_or_default();
        for (call, noise) in noise.chunks_exact(values).enumerate() {
            let image = caught(|| self.try_run(noise, rows(call)))?;
            match out.part(call * values, values) {
                part @ Out::F32(_) => {
                    let view = image.to_plain_array_view::<f32>().map_err(|error| format!("{error:#}"))?;
                    part.fill_f32(view.as_slice().ok_or("the output is not contiguous")?, values)?;
                }
                part @ Out::U8(_) => {
                    let view = image.to_plain_array_view::<u8>().map_err(|error| format!("{error:#}"))?;
                    part.fill_u8(view.as_slice().ok_or("the output is not contiguous")?, values)?;
                }
            }
        }
        Ok(())
    }
}

impl Tract {
    fn try_run(&self, noise: &[f32], index: &[i64]) -> TractResult<TValue> {
        let mut inputs = tvec![Tensor::from_shape(&self.shape, noise)?.into_tvalue()];
        if !index.is_empty() {
            let at = if self.index_first { 0 } else { 1 };
            inputs.insert(at, Tensor::from_shape(&[index.len()], index)?.into_tvalue());
        }
        Ok(self.plan.run(inputs)?.remove(0))
    }
}

/// A result or a panic of tract as text.
fn caught<T>(call: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| format!("{error:#}")),
        Err(panic) => Err(format!("it panicked: {}", message(&*panic))),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("for an unknown reason")
}
