//! ONNX Runtime by the `ort` crate, its library loaded at run time.

use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use ort::environment::Environment;
use ort::session::Session;
use ort::session::builder::GraphOptimizationLevel;

use super::{Engine, EngineInfo, EngineKind, Feed, Out, Rewrite, threads};
use crate::contract::Source;
use crate::printable::printable_lines;
use crate::{Error, Info, Options, Result};

mod run;
mod runtime;

use run::Runner;
pub(super) use runtime::runtime;

struct OnnxRuntime {
    runner: Runner,
    /// Where the session's weights lie, if they do not lie in memory of its own. Freed after the session.
    _map: Option<Arc<Mmap>>,
}

pub(super) fn info(library: Option<&Path>) -> Result<EngineInfo> {
    let runtime::Runtime { library, version, warning, .. } = runtime(library)?;
    Ok(EngineInfo { kind: EngineKind::OnnxRuntime, version, library: Some(library), warning })
}

pub(super) fn open(source: Source<'_>, info: &Info, options: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    let runtime = runtime(options.library.as_deref())?;
    let failed = |reason: String| Error::Load { path: source.path().into(), engine: EngineKind::OnnxRuntime, reason };
    let session = session(&runtime.environment, source, threads(options));
    let session = session.map_err(|error| failed(printable_lines(&error.to_string())))?;
    let runner = Runner::new(session, info).map_err(failed)?;
    let map = if let Source::Map(_, map) = source { source.is_ort().then(|| map.clone()) } else { None };
    Ok((Box::new(OnnxRuntime { runner, _map: map }), self::info(options.library.as_deref())?))
}

pub(super) fn session(environment: &Environment, source: Source<'_>, threads: usize) -> ort::Result<Session> {
    let mut builder = Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(threads)?
        .with_inter_threads(1)?
        // It must read the bytes as they were read for the checks.
        .with_config_entry("session.load_model_format", if source.is_ort() { "ORT" } else { "ONNX" })?;
    if matches!(source, Source::Map(..)) && source.is_ort() {
        builder = builder
            .with_config_entry("session.use_ort_model_bytes_directly", "1")?
            .with_config_entry("session.use_ort_model_bytes_for_initializers", "1")?;
    }
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
        Session::builder(&runtime.environment)?
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
    fn run(&self, feeds: &[Feed<'_>], out: Out<'_>) -> Result<(), String> {
        self.runner.run(feeds, out).map_err(|error| printable_lines(&error.to_string()))
    }
}
