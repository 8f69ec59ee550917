//! Accelerators by ONNX Runtime: those that its library was built with, and plug-ins, which are libraries of their own.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::AsPointer;
use ort::device::Device;
use ort::ep::{self, ExecutionProvider, ExecutionProviderDispatch};
use ort::session::builder::SessionBuilder;

use super::runtime::Runtime;
use crate::engine::placing::Refusal;
use crate::library::binary;
use crate::placement::Step;
use crate::printable::printable_lines;
use crate::{Accelerator, ComputeUnits, CoreMl, PlugIn, Qnn};

/// A builder whose session asks the accelerator first, and ONNX Runtime's name of that.
pub(super) fn add(
    builder: SessionBuilder,
    accelerator: &Accelerator,
    threads: usize,
    runtime: &Runtime,
) -> Result<(SessionBuilder, String), Refusal> {
    match accelerator {
        Accelerator::Cpu => Ok((builder, ep::CPU::NAME.into())),
        Accelerator::OpenVino { device, cache } => {
            let provider = ep::OpenVINO::default().with_device_type(device).with_num_threads(threads);
            let provider = match cache {
                Some(folder) => provider.with_cache_dir(folder.display()),
                None => provider,
            };
            classic::<ep::OpenVINO>(builder, accelerator, provider.build(), runtime)
        }
        Accelerator::Xnnpack => {
            let threads = threads.try_into().unwrap_or(std::num::NonZeroUsize::MIN);
            let provider = ep::XNNPACK::default().with_intra_op_num_threads(threads);
            classic::<ep::XNNPACK>(builder, accelerator, provider.build(), runtime)
        }
        Accelerator::CoreMl(CoreMl { units, cache }) => {
            let units = match units {
                ComputeUnits::All => ep::coreml::ComputeUnits::All,
                ComputeUnits::NeuralEngine => ep::coreml::ComputeUnits::CPUAndNeuralEngine,
                ComputeUnits::Gpu => ep::coreml::ComputeUnits::CPUAndGPU,
            };
            let provider = ep::CoreML::default().with_model_format(ep::coreml::ModelFormat::MLProgram);
            let provider = provider.with_compute_units(units);
            let provider = match cache {
                Some(folder) => provider.with_model_cache_dir(folder.display()),
                None => provider,
            };
            classic::<ep::CoreML>(builder, accelerator, provider.build(), runtime)
        }
        Accelerator::Nnapi { fp16 } => {
            let provider = ep::NNAPI::default().with_fp16(*fp16).with_disable_cpu(true);
            classic::<ep::NNAPI>(builder, accelerator, provider.build(), runtime)
        }
        Accelerator::DirectMl { device } => {
            let provider = ep::DirectML::default().with_device_id(index(*device)?);
            classic::<ep::DirectML>(builder, accelerator, provider.build(), runtime)
        }
        Accelerator::Cuda { device } => {
            let provider = ep::CUDA::default().with_device_id(index(*device)?).with_tf32(false);
            classic::<ep::CUDA>(builder, accelerator, provider.build(), runtime)
        }
        Accelerator::TensorRt { device, fp16, cache } => {
            let provider = ep::TensorRT::default().with_device_id(index(*device)?).with_fp16(*fp16);
            let provider = match cache {
                Some(folder) => provider
                    .with_engine_cache(true)
                    .with_engine_cache_path(folder.display())
                    .with_timing_cache(true)
                    .with_timing_cache_path(folder.display()),
                None => provider,
            };
            classic::<ep::TensorRT>(builder, accelerator, provider.build(), runtime)
        }
        Accelerator::WebGpu(plug_in) => add_plug_in(builder, "WebGpuExecutionProvider", plug_in, runtime),
        Accelerator::OpenVinoPlugIn(plug_in) => add_plug_in(builder, "OpenVINOExecutionProvider", plug_in, runtime),
        Accelerator::Custom { name, plug_in, .. } => add_plug_in(builder, name, plug_in, runtime),
        Accelerator::Qnn(Qnn { library, backend, soc_model, htp_arch, options, .. }) => {
            let mut plug_in = PlugIn::new(library);
            plug_in.options.push(("backend_type".into(), backend.clone()));
            plug_in.options.extend(soc_model.map(|model| ("soc_model".into(), model.to_string())));
            plug_in.options.extend(htp_arch.map(|arch| ("htp_arch".into(), arch.to_string())));
            plug_in.options.extend(options.iter().cloned());
            add_plug_in(builder, "QNNExecutionProvider", &plug_in, runtime)
        }
    }
}

fn index(device: u32) -> Result<i32, Refusal> {
    i32::try_from(device).map_err(|_| (Step::Device, format!("there is no device {device}")))
}

/// One that the library was built with.
fn classic<E: ExecutionProvider>(
    builder: SessionBuilder,
    accelerator: &Accelerator,
    provider: ExecutionProviderDispatch,
    runtime: &Runtime,
) -> Result<(SessionBuilder, String), Refusal> {
    if !E::is_available().map_err(|error| (Step::Registered, said(&error)))? {
        let reason = format!("this ONNX Runtime {} is built without it: {}", runtime.version, accelerator.remedy());
        return Err((Step::Registered, reason));
    }
    let builder = builder.with_execution_providers([provider.error_on_failure()]);
    Ok((builder.map_err(|error| (Step::Session, said(&error)))?, E::NAME.into()))
}

/// A plug-in that was loaded: never again, since a process cannot load one twice, and keeps what it has.
struct Loaded {
    library: PathBuf,
    /// What its devices call it.
    provider: Result<String, Refusal>,
}

static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

fn add_plug_in(
    builder: SessionBuilder,
    name: &str,
    plug_in: &PlugIn,
    runtime: &Runtime,
) -> Result<(SessionBuilder, String), Refusal> {
    let provider = load(name, &plug_in.library, runtime)?;
    let prefix = format!("{provider}.");
    let prefixed = |(key, value): &(String, String)| {
        let key = key.strip_prefix(&prefix).unwrap_or(key);
        (format!("{prefix}{key}"), value.clone())
    };
    let options: Vec<_> = plug_in.options.iter().map(prefixed).collect();
    check_options(plug_in, &prefix)?;
    let device = runtime.environment.devices().find(|device| device.ep().is_ok_and(|name| name == provider));
    let device = device.ok_or_else(no_device)?;
    let builder = builder.with_devices([device], Some(&options)).map_err(|error| (Step::Session, said(&error)))?;
    Ok((builder, provider))
}

/// Refuses an option that the plug-in cannot know. ONNX Runtime hands over any, and plug-ins pass over those that they do not
/// know without a word; but whoever reads an option has its name, as a text of its own, in the library.
fn check_options(PlugIn { library, options }: &PlugIn, prefix: &str) -> Result<(), Refusal> {
    if options.is_empty() {
        return Ok(());
    }
    let bytes = std::fs::read(library).map_err(|error| (Step::Session, format!("{}: {error}", library.display())))?;
    let of_a_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let has = |name: &[u8]| {
        !name.is_empty()
            && bytes.windows(name.len()).enumerate().any(|(at, window)| {
                let before = at.checked_sub(1).and_then(|at| bytes.get(at));
                window == name && ![before, bytes.get(at + name.len())].into_iter().flatten().any(of_a_name)
            })
    };
    let name = |(key, _): &(String, String)| key.strip_prefix(prefix).unwrap_or(key).to_owned();
    match options.iter().map(name).find(|name| !has(name.as_bytes())) {
        Some(name) => Err((Step::Session, format!("{}: has no option {name:?}", library.display()))),
        None => Ok(()),
    }
}

/// Loads a plug-in once, and gives the name under which its devices are found.
fn load(name: &str, library: &Path, runtime: &Runtime) -> Result<String, Refusal> {
    let failed = |reason: String| (Step::Registered, format!("{}: {reason}", library.display()));
    if !library.is_absolute() {
        return Err(failed("is a relative path; ONNX Runtime takes plug-ins by an absolute one".into()));
    }
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = loaded.iter().find(|found| found.library == library) {
        return found.provider.clone();
    }
    binary::check(library).map_err(failed)?;
    let names = || -> Vec<String> {
        runtime.environment.devices().filter_map(|device| device.ep().ok().map(String::from)).collect()
    };
    let before = names();
    let registered = runtime.environment.register_ep_library(name, library);
    let provider = match registered {
        Err(error) => Err(failed(said(&error))),
        Ok(()) => names().into_iter().find(|name| !before.contains(name)).ok_or_else(no_device),
    };
    loaded.push(Loaded { library: library.into(), provider: provider.clone() });
    provider
}

/// What a compiled model depends on beside the file: the provider, its version and the library's, and the options.
pub(super) fn maker(provider: &str, accelerator: &Accelerator, runtime: &Runtime) -> String {
    let device = runtime.environment.devices().find(|device| device.ep().is_ok_and(|name| name == provider));
    let version = device.and_then(|device| version(&device)).unwrap_or_default();
    let options = match accelerator {
        // Where a library lies, and where the cache is, changes nothing.
        Accelerator::Qnn(Qnn { backend, soc_model, htp_arch, options, .. }) => {
            format!("{backend} {soc_model:?} {htp_arch:?} {options:?}")
        }
        other => format!("{other:?}"),
    };
    format!("{provider} {version} onnxruntime {} {options}", runtime.version)
}

/// The version that a plug-in gives its device.
fn version(device: &Device<'_>) -> Option<String> {
    let api = ort::api();
    // SAFETY: the device lives as long as the environment, its metadata as long as the device, and the text as long as that;
    // both are null where there is none.
    unsafe {
        let about = (api.EpDevice_EpMetadata)(device.ptr());
        let version = if about.is_null() { return None } else { (api.GetKeyValue)(about, c"version".as_ptr()) };
        (!version.is_null()).then(|| CStr::from_ptr(version).to_string_lossy().into_owned())
    }
}

fn no_device() -> Refusal {
    (Step::Device, "the plug-in finds no device on this machine".into())
}

fn said<T>(error: &ort::Error<T>) -> String {
    printable_lines(&error.to_string())
}
