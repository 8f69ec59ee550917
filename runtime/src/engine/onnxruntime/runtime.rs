//! The library of this process: found, looked at, and loaded once.
//!
//! `ort` panics where it must look for the library by itself, so that nothing of it is touched before [`runtime`] has found
//! a library, asked it for its version and its API, and handed it over.

use std::ffi::CStr;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;

use crate::library::{Host, Place, binary, libraries_at};
use crate::printable::printable_lines;
use crate::{Error, Result, Tried};

/// The library of this process, once it is found. It is never unloaded: its threads and its environment live on.
#[derive(Clone)]
pub(crate) struct Runtime {
    pub environment: Environment,
    pub library: PathBuf,
    pub version: String,
    pub warning: Option<String>,
}

static RUNTIME: Mutex<Option<Runtime>> = Mutex::new(None);

/// The library of this process; searches for it on the first call.
pub(crate) fn runtime(asked: Option<&Path>) -> Result<Runtime> {
    let mut runtime = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    match (&*runtime, asked) {
        (Some(runtime), None) => Ok(runtime.clone()),
        (Some(runtime), Some(asked)) => check_same(runtime, asked),
        (None, _) => {
            let found = search(asked)?;
            *runtime = Some(found.clone());
            Ok(found)
        }
    }
}

/// A library that is asked for by name must be the one in use.
fn check_same(runtime: &Runtime, asked: &Path) -> Result<Runtime> {
    let place = |reason| Tried { place: ASKED.into(), path: asked.into(), reason };
    let libraries = libraries_at(asked).map_err(|reason| Error::NoLibrary { tried: vec![place(reason)] })?;
    let resolved = |path: &PathBuf| path.canonicalize().ok();
    if libraries.iter().any(|library| resolved(library) == resolved(&runtime.library)) {
        return Ok(runtime.clone());
    }
    Err(Error::OtherLibraryLoaded { asked: asked.into(), loaded: runtime.library.clone() })
}

const ASKED: &str = "asked for";

fn search(asked: Option<&Path>) -> Result<Runtime> {
    let places = match asked {
        Some(path) => vec![Place { why: ASKED.into(), path: path.into(), is_name: false }],
        None => Host::here().places(),
    };
    let mut tried = Vec::new();
    for Place { why, path, is_name } in places {
        let libraries = if is_name { Ok(vec![path.clone()]) } else { libraries_at(&path) };
        let mut fail = |path: &Path, reason| tried.push(Tried { place: why.clone(), path: path.into(), reason });
        match libraries {
            Err(reason) => fail(&path, reason),
            Ok(libraries) => {
                for library in libraries {
                    match start(&library, is_name) {
                        Ok(runtime) => return Ok(Runtime { warning: overruled(&tried), ..runtime }),
                        Err(reason) => fail(&library, reason),
                    }
                }
            }
        }
    }
    Err(Error::NoLibrary { tried })
}

/// Somebody who sets the variable wants that library: say so where another had to be taken.
fn overruled(tried: &[Tried]) -> Option<String> {
    let Tried { path, reason, .. } = tried.iter().find(|tried| tried.place == "ORT_DYLIB_PATH")?;
    let warning = format!("ORT_DYLIB_PATH is not usable, another library is taken: {}: {reason}", path.display());
    log::warn!("{warning}");
    Some(warning)
}

/// Loads a library and makes the process's environment from it.
fn start(library: &Path, is_name: bool) -> Result<Runtime, String> {
    // A relative path would be searched beside the executable first.
    let library = if is_name { library.into() } else { std::path::absolute(library).map_err(|e| e.to_string())? };
    if !is_name {
        binary::check(&library)?;
    }
    let version = probe(&library)?;
    let builder = ort::init_from(&library).map_err(|error| error.to_string())?.with_logger(Arc::new(forward));
    // An app's users have not agreed to telemetry, which some builds of the library turn on by themselves.
    let environment = builder.with_name("dmd").with_telemetry(false).build().map_err(|error| error.to_string())?;
    environment.set_log_level(LogLevel::Warning);
    Ok(Runtime { environment, library, version, warning: None })
}

/// What ONNX Runtime has to say goes to the `log` crate, not to the app's standard error. Its errors come back as
/// results too, so that they are no more than warnings here.
fn forward(level: LogLevel, _category: &str, _id: &str, location: &str, message: &str) {
    let level = if level >= LogLevel::Warning { log::Level::Warn } else { log::Level::Debug };
    log::log!(target: "onnxruntime", level, "{} ({location})", printable_lines(message));
}

/// Loads a library and gives its version, if it is an ONNX Runtime that has our API.
fn probe(path: &Path) -> Result<String, String> {
    // SAFETY: loading runs the library's initialisers. The file is one that the user, the environment or a package
    // named as ONNX Runtime's, which is loaded to run its code.
    let library = unsafe { libloading::Library::new(path) }.map_err(|error| with_causes(&error))?;
    // SAFETY: the symbol has had this type in every version of ONNX Runtime.
    let base = unsafe { library.get::<unsafe extern "C" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase") }
        .map_err(|_| "is no ONNX Runtime: it does not export OrtGetApiBase")?;
    // SAFETY: the function takes nothing and gives a pointer to a static table, or null.
    let base = unsafe { base().as_ref() }.ok_or("OrtGetApiBase gave nothing")?;
    // SAFETY: the table's functions; the version is a static C string.
    let version = unsafe { CStr::from_ptr((base.GetVersionString)()) }.to_string_lossy().into_owned();
    // SAFETY: as above; null where the library is older than this API.
    let has_api = !unsafe { (base.GetApi)(ort::MINOR_VERSION) }.is_null();
    if !has_api || minor(&version).is_none_or(|minor| minor < ort::MINOR_VERSION) {
        return Err(format!("is ONNX Runtime {version}, expected 1.{} or newer", ort::MINOR_VERSION));
    }
    // Not unloaded: `ort` opens it again in a moment.
    mem::forget(library);
    Ok(version)
}

pub(crate) fn minor(version: &str) -> Option<u32> {
    let mut parts = version.split('.');
    (parts.next()? == "1").then(|| parts.next()?.parse().ok())?
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
