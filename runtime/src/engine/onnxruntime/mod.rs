//! ONNX Runtime by the `ort` crate, its library loaded at run time.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::Mmap;
use ort::compiler::ModelCompiler;
use ort::environment::Environment;
use ort::ep::{self, ExecutionProvider};
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use super::placing::{Candidate, Refusal};
use super::{Engine, EngineInfo, EngineKind, Feed, Out, Rewrite, threads};
use crate::contract::Source;
use crate::placement::Step;
use crate::printable::printable_lines;
use crate::{Accelerator, Error, ModuleInfo, Options, Result};

mod assignment;
mod cache;
mod provider;
mod run;
mod runtime;

use assignment::{ProfileFolder, TOLD_FROM};
use cache::Entry;
use run::Runner;
pub(super) use runtime::runtime;

struct OnnxRuntime {
    runner: Runner,
    /// Held while an accelerator runs: not every provider can do two things at once, whatever it promises.
    one_at_a_time: Option<Mutex<()>>,
    /// Where the session's weights lie, if they do not lie in memory of its own. Freed after the session.
    _map: Option<Arc<Mmap>>,
}

pub(super) fn info(library: Option<&Path>) -> Result<EngineInfo> {
    let runtime::Runtime { library, version, warning, .. } = runtime(library)?;
    Ok(EngineInfo { kind: EngineKind::OnnxRuntime, version, library: Some(library), warning })
}

pub(super) fn open(source: Source<'_>, info: &ModuleInfo, options: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    let runtime = runtime(options.library.as_deref())?;
    let failed = |reason: String| Error::Load { path: source.path().into(), engine: EngineKind::OnnxRuntime, reason };
    let session = session(&runtime.environment, source, options);
    let session = session.map_err(|error| failed(printable_lines(&error.to_string())))?;
    let runner = Runner::new(Arc::new(session), info).map_err(failed)?;
    let engine = OnnxRuntime { runner, one_at_a_time: None, _map: kept_map(source) };
    Ok((Box::new(engine), self::info(options.library.as_deref())?))
}

/// Loads a file for an accelerator, which is not proven yet.
pub(super) fn accelerated(
    source: Source<'_>,
    info: &ModuleInfo,
    options: &Options,
    accelerator: &Accelerator,
) -> Result<Candidate, Refusal> {
    let runtime = runtime(options.library.as_deref()).map_err(|error| (Step::Registered, error.to_string()))?;
    let no_session = |error: String| (Step::Session, printable_lines(&error));
    // Older libraries need the profile of a run to tell what ran where.
    let profiled = runtime::minor(&runtime.version).is_none_or(|minor| minor < TOLD_FROM);
    let folder =
        if profiled { Some(ProfileFolder::new().map_err(|error| no_session(error.to_string()))?) } else { None };
    let builder = || -> ort::Result<SessionBuilder> {
        let builder = builder(&runtime.environment, source, options)?;
        let builder = builder.with_config_entry("session.record_ep_graph_assignment_info", "1")?;
        Ok(match &folder {
            Some(folder) => builder.with_profiling(folder.prefix())?,
            None => builder,
        })
    };
    let builder = builder().map_err(|error| no_session(error.to_string()))?;
    let (builder, provider) = provider::add(builder, accelerator, threads(options), &runtime)?;
    let entry = accelerator.cache().map(|folder| {
        let maker = provider::maker(&provider, accelerator, &runtime);
        Entry::of(folder, source, info.file.data.as_deref(), &maker)
    });
    let session = match entry.transpose().map_err(|error| no_session(format!("its cache: {error}")))? {
        Some(entry) => compiled(builder, source, &entry),
        None => commit(builder, source),
    };
    let session = Arc::new(session.map_err(|error| no_session(error.to_string()))?);
    let runner = Runner::new(session.clone(), info).map_err(no_session)?;
    let nodes = move || {
        let told = assignment::told(&session).map_err(|error| printable_lines(&error.to_string()))?;
        match folder {
            Some(_folder) => assignment::corrected(told, &assignment::profile(&session)?),
            None => Ok(told),
        }
    };
    let engine = OnnxRuntime { runner, one_at_a_time: Some(Mutex::new(())), _map: kept_map(source) };
    Ok(Candidate { engine: Box::new(engine), provider, nodes: Box::new(nodes) })
}

/// Loads what was compiled before, or compiles it and keeps it. Where either fails, the file is loaded as without a cache.
fn compiled(builder: SessionBuilder, source: Source<'_>, entry: &Entry) -> ort::Result<Session> {
    let load = |model: &[u8]| {
        let mut builder = builder.clone().with_config_entry("session.load_model_format", "ONNX")?;
        builder.commit_from_memory(model)
    };
    if let Some(model) = entry.read() {
        match load(&model) {
            Ok(session) => return Ok(session),
            Err(error) => {
                log::warn!("what was compiled before is of no use here: {}", printable_lines(&error.to_string()))
            }
        }
    }
    let compile = || -> ort::Result<Vec<u8>> {
        let compiler = ModelCompiler::new(builder.clone())?.with_embed_ep_context()?;
        let compiler = match source.bytes() {
            None => compiler.with_model_from_file(source.path())?,
            Some(bytes) => compiler.with_model_from_memory(bytes)?,
        };
        Ok(compiler.compile_to_buffer()?.to_vec())
    };
    let kept = compile().map_err(|error| printable_lines(&error.to_string())).and_then(|model| {
        entry.write(&model).map_err(|error| error.to_string())?;
        load(&model).map_err(|error| printable_lines(&error.to_string()))
    });
    kept.or_else(|reason| {
        log::warn!("what is compiled is not kept: {reason}");
        commit(builder, source)
    })
}

/// The map that a session leaves its weights in.
fn kept_map(source: Source<'_>) -> Option<Arc<Mmap>> {
    if let Source::Map(_, map) = source { source.is_ort().then(|| map.clone()) } else { None }
}

pub(super) fn session(environment: &Environment, source: Source<'_>, options: &Options) -> ort::Result<Session> {
    commit(on_processor(builder(environment, source, options)?, environment)?, source)
}

fn builder(environment: &Environment, source: Source<'_>, options: &Options) -> ort::Result<SessionBuilder> {
    // The highest level keeps weights a second time, in layouts of this processor's.
    let level = if options.low_memory { GraphOptimizationLevel::Level2 } else { GraphOptimizationLevel::All };
    let mut builder = Session::builder(environment)?
        .with_optimization_level(level)?
        .with_intra_threads(threads(options))?
        .with_inter_threads(1)?
        // It must read the bytes as they were read for the checks.
        .with_config_entry("session.load_model_format", if source.is_ort() { "ORT" } else { "ONNX" })?;
    if options.low_memory {
        let frees = ep::CPU::default().with_arena_allocator(false).build().error_on_failure();
        builder = builder.with_memory_pattern(false)?.with_execution_providers([frees])?;
    }
    if matches!(source, Source::Map(..)) && source.is_ort() {
        builder = builder
            .with_config_entry("session.use_ort_model_bytes_directly", "1")?
            .with_config_entry("session.use_ort_model_bytes_for_initializers", "1")?;
    }
    Ok(builder)
}

/// Names the processor. Where a session is not told what runs it, `ort` lets ONNX Runtime choose from all devices that are
/// registered, among them those of plug-ins that other sessions asked for.
fn on_processor(builder: SessionBuilder, environment: &Environment) -> ort::Result<SessionBuilder> {
    let processor = environment.devices().find(|device| device.ep().is_ok_and(|name| name == ep::CPU::NAME));
    let processor = processor.ok_or_else(|| ort::Error::new("the library has no device for the processor"))?;
    Ok(builder.with_devices([processor], None)?)
}

fn commit(mut builder: SessionBuilder, source: Source<'_>) -> ort::Result<Session> {
    match source.bytes() {
        None => builder.commit_from_file(source.path()),
        Some(bytes) => builder.commit_from_memory(bytes),
    }
}

/// Writes what the library makes of a file; gives the library's version.
pub(super) fn rewrite(from: &Path, to: &Path, rewrite: Rewrite, library: Option<&Path>) -> Result<String> {
    let runtime = runtime(library)?;
    let (level, format) = match rewrite {
        // One level below the highest, whose layouts suit this machine's processor alone.
        Rewrite::Optimise => (GraphOptimizationLevel::Level2, "ONNX"),
        Rewrite::Ort => (GraphOptimizationLevel::Disable, "ORT"),
    };
    let written = || -> ort::Result<Session> {
        on_processor(Session::builder(&runtime.environment)?, &runtime.environment)?
            .with_optimization_level(level)?
            .with_config_entry("session.save_model_format", format)?
            .with_optimized_model_path(to)?
            .commit_from_file(from)
    };
    let failed = |error: ort::Error| Error::Load {
        path: from.into(),
        engine: EngineKind::OnnxRuntime,
        reason: printable_lines(&error.to_string()),
    };
    written().map_err(failed)?;
    Ok(runtime.version)
}

impl Engine for OnnxRuntime {
    fn run(&self, feeds: &[Feed<'_>], outs: &mut [Out<'_>]) -> Result<(), String> {
        let _turn = self.one_at_a_time.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner));
        self.runner.run(feeds, outs).map_err(|error| printable_lines(&error.to_string()))
    }
}
