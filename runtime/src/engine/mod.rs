//! What runs a graph. Each engine is one file behind one trait; both may live in one process, so that a file can be
//! checked by the one against the other.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::contract::Source;
use crate::limits::MAX_THREADS_PER_CORE;
use crate::placement::Step;
use crate::{Accelerator, Error, ModuleInfo, Options, Result};

#[cfg(feature = "onnxruntime")]
pub mod network;
#[cfg(feature = "onnxruntime")]
mod onnxruntime;
#[cfg(feature = "tract")]
mod tract;

pub(crate) mod placing;
mod probe;

/// A loaded graph. The generator has checked the sizes of everything it hands over.
pub(crate) trait Engine: Send + Sync {
    /// Runs one full batch, or any number of samples where the file leaves it free, on a feed for each of the graph's
    /// inputs, and writes all outputs whole, in the file's order; an error is the engine's own reason. Many threads may
    /// call at once.
    fn run(&self, feeds: &[Feed<'_>], outs: &mut [Out<'_>]) -> Result<(), String>;
}

/// What one input of a graph is given, lent: its first axis counts samples.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// The input.
    pub name: &'a str,
    /// The shape of the values.
    pub shape: &'a [usize],
    /// As many as the shape says.
    pub values: Values<'a>,
}

/// The values of a feed, in C order.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Ids of tokens.
    I32(&'a [i32]),
    /// Labels and rows.
    I64(&'a [i64]),
}

impl Values<'_> {
    /// How many, and the name of their type.
    pub(crate) fn len_and_kind(&self) -> (usize, &'static str) {
        match self {
            Values::F32(values) => (values.len(), "f32"),
            Values::I32(values) => (values.len(), "i32"),
            Values::I64(values) => (values.len(), "i64"),
        }
    }
}

/// Where an output goes: the graph's element type, and room for all samples of the call.
#[cfg_attr(not(any(feature = "onnxruntime", feature = "tract")), allow(dead_code))]
pub(crate) enum Out<'a> {
    F32(&'a mut [f32]),
    U8(&'a mut [u8]),
}

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// ONNX Runtime, a library that is found when it is first needed.
    OnnxRuntime,
    /// tract, in pure Rust, part of the build.
    Tract,
}

impl EngineKind {
    pub(crate) fn feature(self) -> &'static str {
        match self {
            Self::OnnxRuntime => "onnxruntime",
            Self::Tract => "tract",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnnxRuntime => "ONNX Runtime",
            Self::Tract => "tract",
        })
    }
}

/// Which engine is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// ONNX Runtime where its library is found, else tract, with one warning.
    #[default]
    Auto,
    /// ONNX Runtime, or an error that lists every place where it was looked for.
    OnnxRuntime,
    /// tract.
    Tract,
}

/// What runs a loaded file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EngineInfo {
    /// Which engine.
    pub kind: EngineKind,
    /// Its version.
    pub version: String,
    /// The library that was loaded for it, as a full path, or as a name where the system's loader found it.
    pub library: Option<PathBuf>,
    /// What the user should know: for one that no library was found. Also logged, once, by the `log` crate.
    pub warning: Option<String>,
}

/// Whether an engine can be used here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EngineReport {
    /// Which engine.
    pub kind: EngineKind,
    /// Its version, where it can be used.
    pub version: Option<String>,
    /// Its library, where it has one.
    pub library: Option<PathBuf>,
    /// Why it cannot be used, where that is so.
    pub reason: Option<String>,
}

impl EngineReport {
    /// Whether the engine can be used.
    pub fn is_present(&self) -> bool {
        self.reason.is_none()
    }
}

/// Says of every engine whether it can be used here. `library` is as in [`Options`].
///
/// ```
/// for engine in dmd_runtime::engines(None) {
///     match &engine.reason {
///         None => println!("{} {}", engine.kind, engine.version.unwrap_or_default()),
///         Some(reason) => println!("{}: {reason}", engine.kind),
///     }
/// }
/// ```
pub fn engines(library: Option<&Path>) -> Vec<EngineReport> {
    let report = |kind, found: Result<EngineInfo>| match found {
        Ok(info) => EngineReport { kind, version: Some(info.version), library: info.library, reason: None },
        Err(error) => EngineReport { kind, version: None, library: None, reason: Some(error.to_string()) },
    };
    let onnxruntime = report(EngineKind::OnnxRuntime, onnxruntime_info(library));
    vec![onnxruntime, report(EngineKind::Tract, tract_info())]
}

/// What ONNX Runtime makes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rewrite {
    /// ONNX with the optimisations that hold on every processor; it may contain ONNX Runtime's own operators.
    Optimise,
    /// ONNX Runtime's own format, `.ort`, with the nodes as they are.
    Ort,
}

/// Lets ONNX Runtime read any ONNX file and write it in another form, and gives its version. `library` is as in
/// [`Options`]. The caller takes care of what stands at `to`.
pub fn rewrite(from: &Path, to: &Path, rewrite: Rewrite, library: Option<&Path>) -> Result<String> {
    rewrite_by_onnxruntime(from, to, rewrite, library)
}

/// Loads a file by the engine that the options ask for, on the processor.
pub(crate) fn cpu(source: Source<'_>, info: &ModuleInfo, options: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    let (engine, mut engine_info) = open_by_choice(source, info, options)?;
    if let Some(asked) = options.threads.filter(|asked| *asked > max_threads()) {
        let warning = format!("{asked} threads are too many for this machine: {} are used", max_threads());
        log::warn!("{warning}");
        engine_info.warning = Some(engine_info.warning.map_or(warning.clone(), |other| format!("{other}; {warning}")));
    }
    Ok((engine, engine_info))
}

fn open_by_choice(source: Source<'_>, info: &ModuleInfo, options: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    match options.engine {
        EngineChoice::OnnxRuntime => open_onnxruntime(source, info, options),
        EngineChoice::Tract => open_tract(source, info, options),
        EngineChoice::Auto => match open_onnxruntime(source, info, options) {
            // A library that was named and does not work is an error, not a reason for something slower.
            Err(error) if options.library.is_some() || !cfg!(feature = "tract") => Err(error),
            Err(Error::EngineDisabled { .. }) => open_tract(source, info, options),
            Err(Error::NoLibrary { tried }) => {
                let (engine, mut engine_info) = open_tract(source, info, options)?;
                let warning = format!(
                    "no usable ONNX Runtime library was found, so the slower engine tract is used: \
                     pip install onnxruntime, or set ORT_DYLIB_PATH; tried{}",
                    crate::library::list(&tried)
                );
                log::warn!("{warning}");
                engine_info.warning = Some(warning);
                Ok((engine, engine_info))
            }
            other => other,
        },
    }
}

#[cfg(feature = "onnxruntime")]
use onnxruntime::{info as onnxruntime_info, open as open_onnxruntime, rewrite as rewrite_by_onnxruntime};
#[cfg(feature = "tract")]
use tract::{info as tract_info, open as open_tract};

#[cfg(not(feature = "onnxruntime"))]
fn onnxruntime_info(_: Option<&Path>) -> Result<EngineInfo> {
    Err(Error::EngineDisabled { engine: EngineKind::OnnxRuntime })
}

#[cfg(not(feature = "onnxruntime"))]
fn open_onnxruntime(_: Source<'_>, _: &ModuleInfo, _: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    Err(Error::EngineDisabled { engine: EngineKind::OnnxRuntime })
}

/// Loads a file for an accelerator, which is not proven yet.
#[cfg(feature = "onnxruntime")]
fn accelerated(
    source: Source<'_>,
    info: &ModuleInfo,
    options: &Options,
    accelerator: &Accelerator,
) -> Result<placing::Candidate, placing::Refusal> {
    match options.engine {
        EngineChoice::Tract => Err((Step::Registered, "tract runs on the processor alone".into())),
        _ => onnxruntime::accelerated(source, info, options, accelerator),
    }
}

#[cfg(not(feature = "onnxruntime"))]
fn accelerated(
    _: Source<'_>,
    _: &ModuleInfo,
    _: &Options,
    _: &Accelerator,
) -> Result<placing::Candidate, placing::Refusal> {
    Err((Step::Registered, Error::EngineDisabled { engine: EngineKind::OnnxRuntime }.to_string()))
}

#[cfg(not(feature = "onnxruntime"))]
fn rewrite_by_onnxruntime(_: &Path, _: &Path, _: Rewrite, _: Option<&Path>) -> Result<String> {
    Err(Error::EngineDisabled { engine: EngineKind::OnnxRuntime })
}

#[cfg(not(feature = "tract"))]
fn tract_info() -> Result<EngineInfo> {
    Err(Error::EngineDisabled { engine: EngineKind::Tract })
}

#[cfg(not(feature = "tract"))]
fn open_tract(_: Source<'_>, _: &ModuleInfo, _: &Options) -> Result<(Box<dyn Engine>, EngineInfo)> {
    Err(Error::EngineDisabled { engine: EngineKind::Tract })
}

#[cfg(feature = "tract")]
impl Out<'_> {
    fn len(&self) -> usize {
        match self {
            Out::F32(out) => out.len(),
            Out::U8(out) => out.len(),
        }
    }

    /// The room for `n` values from `start` on.
    fn part(&mut self, start: usize, n: usize) -> Out<'_> {
        match self {
            Out::F32(out) => Out::F32(&mut out[start..start + n]),
            Out::U8(out) => Out::U8(&mut out[start..start + n]),
        }
    }
}

/// Threads to use: what was asked for within reason, else what the machine offers.
#[cfg(any(feature = "onnxruntime", feature = "tract"))]
fn threads(options: &Options) -> usize {
    options.threads.filter(|n| *n > 0).map_or_else(cores, |n| n.min(max_threads()))
}

/// The most threads that an engine is given, four for each core: more would only wait for each other.
pub fn max_threads() -> usize {
    cores().saturating_mul(MAX_THREADS_PER_CORE)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}
