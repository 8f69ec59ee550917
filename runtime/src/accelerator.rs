//! What may compute a graph in the place of the processor. Naming one asks for it; whether it does is proven when a file is
//! loaded, and told by [`Placement`](crate::Placement).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use crate::Error;

/// An accelerator that ONNX Runtime can hand a graph to, as far as the library or the plug-in at hand has it.
///
/// ```
/// use dmd_runtime::{Accelerator, Options, Qnn};
///
/// let options = Options {
///     accelerators: vec![
///         Accelerator::Qnn(Qnn { soc_model: Some(57), ..Qnn::new("/opt/qnn/libonnxruntime_providers_qnn.so") }),
///         Accelerator::OpenVino { device: "CPU".into(), cache: None },
///     ],
///     ..Options::default()
/// };
/// # assert_eq!(options.accelerators[1].to_string(), "OpenVINO (CPU)");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Accelerator {
    /// The processor, by ONNX Runtime's own kernels: what stands behind it in a list is never asked.
    Cpu,
    /// Intel's OpenVINO, in a library that is built with it.
    OpenVino {
        /// Its name of a device: `CPU`, `GPU`, `GPU.1`, `NPU`, `AUTO:GPU,CPU`.
        device: String,
        /// Where it keeps what it has compiled, from one start to the next.
        cache: Option<PathBuf>,
    },
    /// XNNPACK's kernels on the processor, in the libraries for Android and iOS.
    Xnnpack,
    /// Apple's Core ML, as an ML program.
    CoreMl(CoreMl),
    /// Android's NNAPI, without its own emulation on the processor.
    Nnapi {
        /// Whether it may compute in half precision.
        fp16: bool,
    },
    /// Windows' DirectML.
    DirectMl {
        /// Which GPU, from 0.
        device: u32,
    },
    /// NVIDIA's GPUs by CUDA and cuDNN, without TF32.
    Cuda {
        /// Which GPU, from 0.
        device: u32,
    },
    /// NVIDIA's GPUs by TensorRT.
    TensorRt {
        /// Which GPU, from 0.
        device: u32,
        /// Whether it may compute in half precision.
        fp16: bool,
        /// Where it keeps engines and timings, from one start to the next: building one takes minutes.
        cache: Option<PathBuf>,
    },
    /// Any GPU by WebGPU, a plug-in (`onnxruntime-ep-webgpu`).
    WebGpu(PlugIn),
    /// Qualcomm's Hexagon and Adreno by QNN, a plug-in (`onnxruntime-qnn`).
    Qnn(Qnn),
    /// OpenVINO as a plug-in (`onnxruntime-ep-openvino`).
    OpenVinoPlugIn(PlugIn),
    /// A plug-in of somebody else's.
    Custom {
        /// The name to register it under.
        name: String,
        /// Its library, and its options.
        plug_in: PlugIn,
        /// Whether it computes in half precision, and is held to that.
        fp16: bool,
    },
}

/// A plug-in of ONNX Runtime's: a library with accelerators that are not part of ONNX Runtime's own.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlugIn {
    /// The library, by an absolute path: ONNX Runtime looks for another one beside its own library.
    pub library: PathBuf,
    /// The plug-in's options by its own names, without a prefix.
    #[serde(default)]
    pub options: Vec<(String, String)>,
}

/// What Qualcomm's QNN is told.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qnn {
    /// The plug-in's library, by an absolute path.
    pub library: PathBuf,
    /// Which of QNN's backends: `htp` for Hexagon, `gpu` for Adreno.
    #[serde(default = "htp")]
    pub backend: String,
    /// The chip, by Qualcomm's number (57: Snapdragon 8 Gen 3). Its simulator on a desktop needs it.
    pub soc_model: Option<u32>,
    /// Hexagon's architecture (75: that of the chip above).
    pub htp_arch: Option<u32>,
    /// Where it keeps what it has compiled, from one start to the next; `dmd compile` fills such a folder before an app ships
    /// it. What is in it is for the same file, options, plug-in and ONNX Runtime alone, and is compiled anew for others.
    pub cache: Option<PathBuf>,
    /// Further options by the plug-in's own names.
    #[serde(default)]
    pub options: Vec<(String, String)>,
}

/// What Core ML is told. It compiles in the folder for temporary files (`TMPDIR`), which a sandboxed app sets before it
/// starts a thread, and leaves the result in `cache`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoreMl {
    /// What may compute.
    pub units: ComputeUnits,
    /// Where it keeps what it has compiled, from one start to the next: without it, every start compiles anew.
    pub cache: Option<PathBuf>,
}

/// Apple's units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeUnits {
    /// All of them, as Core ML chooses.
    #[default]
    All,
    /// The Neural Engine and the processor.
    NeuralEngine,
    /// The GPU and the processor.
    Gpu,
}

fn htp() -> String {
    "htp".into()
}

impl PlugIn {
    /// A plug-in by the absolute path of its library, without options.
    pub fn new(library: impl Into<PathBuf>) -> Self {
        Self { library: library.into(), options: Vec::new() }
    }
}

impl Qnn {
    /// Hexagon, by the absolute path of the plug-in's library.
    pub fn new(library: impl Into<PathBuf>) -> Self {
        Self {
            library: library.into(),
            backend: htp(),
            soc_model: None,
            htp_arch: None,
            cache: None,
            options: Vec::new(),
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("CPU"),
            Self::OpenVino { device, .. } => write!(f, "OpenVINO ({device})"),
            Self::Xnnpack => f.write_str("XNNPACK"),
            Self::CoreMl(_) => f.write_str("Core ML"),
            Self::Nnapi { .. } => f.write_str("NNAPI"),
            Self::DirectMl { device } => write!(f, "DirectML ({device})"),
            Self::Cuda { device } => write!(f, "CUDA ({device})"),
            Self::TensorRt { device, .. } => write!(f, "TensorRT ({device})"),
            Self::WebGpu(_) => f.write_str("WebGPU"),
            Self::Qnn(Qnn { backend, .. }) => write!(f, "QNN ({backend})"),
            Self::OpenVinoPlugIn(_) => f.write_str("OpenVINO (plug-in)"),
            Self::Custom { name, .. } => f.write_str(name),
        }
    }
}

/// As command lines name it: `cpu`, `openvino:DEVICE`, `xnnpack`, `coreml`, `nnapi`, `directml:N`, `cuda:N`, `tensorrt:N`;
/// and plug-ins `webgpu=LIBRARY`, `qnn=LIBRARY`, `openvino=LIBRARY`, `custom=LIBRARY`, with options behind commas:
/// `qnn=/opt/qnn/libonnxruntime_providers_qnn.so,soc_model=57`. Devices that are not named are `CPU` and 0.
impl FromStr for Accelerator {
    type Err = Error;

    fn from_str(given: &str) -> Result<Self, Error> {
        let named = if given.contains('=') { plug_in(given) } else { built_in(given) };
        named.map_err(|reason| Error::Accelerator { given: given.into(), reason })
    }
}

fn built_in(given: &str) -> Result<Accelerator, String> {
    let (name, device) = given.split_once(':').map_or((given, None), |(name, device)| (name, Some(device)));
    let number = || {
        let number = device.unwrap_or("0").parse();
        number.map_err(|_| format!("{:?} is no number of a device", device.unwrap_or_default()))
    };
    let found = match name {
        "openvino" => Accelerator::OpenVino { device: device.unwrap_or("CPU").into(), cache: None },
        "directml" => Accelerator::DirectMl { device: number()? },
        "cuda" => Accelerator::Cuda { device: number()? },
        "tensorrt" => Accelerator::TensorRt { device: number()?, fp16: false, cache: None },
        "cpu" | "xnnpack" | "coreml" | "nnapi" if device.is_some() => return Err(format!("{name} has no devices")),
        "cpu" => Accelerator::Cpu,
        "xnnpack" => Accelerator::Xnnpack,
        "coreml" => Accelerator::CoreMl(CoreMl::default()),
        "nnapi" => Accelerator::Nnapi { fp16: false },
        "webgpu" | "qnn" | "custom" => return Err(format!("is a plug-in, expected {name}=LIBRARY")),
        _ => {
            return Err(
                "expected cpu, openvino[:DEVICE], xnnpack, coreml, nnapi, directml[:N], cuda[:N], tensorrt[:N], \
                        or one of the plug-ins webgpu, qnn, openvino and custom as NAME=LIBRARY"
                    .into(),
            );
        }
    };
    Ok(found)
}

fn plug_in(given: &str) -> Result<Accelerator, String> {
    let (named, options) = given.split_once(',').unwrap_or((given, ""));
    let (name, library) = named.split_once('=').ok_or("expected NAME=LIBRARY before the first comma")?;
    let option = |option: &str| match option.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(format!("{option:?} is no option, expected NAME=VALUE")),
    };
    let options = options.split(',').filter(|option| !option.is_empty());
    let mut plug_in = PlugIn { options: options.map(option).collect::<Result<_, _>>()?, ..PlugIn::new(library) };
    let mut take = |key: &str| {
        let at = plug_in.options.iter().position(|(name, _)| name == key)?;
        Some(plug_in.options.remove(at).1)
    };
    match name {
        "webgpu" => Ok(Accelerator::WebGpu(plug_in)),
        "openvino" => Ok(Accelerator::OpenVinoPlugIn(plug_in)),
        "custom" => Ok(Accelerator::Custom { name: "Custom".into(), plug_in, fp16: false }),
        "qnn" => {
            let backend = take("backend_type").unwrap_or_else(htp);
            let mut number = |key: &str| {
                let number = take(key).map(|value| value.parse().map_err(|_| format!("{key} {value:?} is no number")));
                number.transpose()
            };
            let (soc_model, htp_arch) = (number("soc_model")?, number("htp_arch")?);
            let cache = take("cache").map(PathBuf::from);
            let PlugIn { library, options } = plug_in;
            Ok(Accelerator::Qnn(Qnn { library, backend, soc_model, htp_arch, cache, options }))
        }
        _ => Err(format!("{name:?} is no plug-in, expected webgpu, qnn, openvino or custom")),
    }
}

#[cfg_attr(not(feature = "onnxruntime"), allow(dead_code))]
impl Accelerator {
    /// Where what is compiled for it is kept by this crate. Others keep it themselves, or end the process when they are asked
    /// to compile (WebGPU).
    pub(crate) fn cache(&self) -> Option<&Path> {
        if let Self::Qnn(qnn) = self { qnn.cache.as_deref() } else { None }
    }

    /// Whether it computes in half precision whatever the file's own.
    pub(crate) fn computes_half(&self) -> bool {
        match self {
            Self::Cpu | Self::Xnnpack | Self::DirectMl { .. } | Self::Cuda { .. } => false,
            Self::WebGpu(_) | Self::OpenVinoPlugIn(_) => false,
            Self::OpenVino { device, .. } => device != "CPU",
            Self::CoreMl(_) | Self::Qnn(_) => true,
            Self::Nnapi { fp16 } | Self::TensorRt { fp16, .. } | Self::Custom { fp16, .. } => *fp16,
        }
    }

    /// Where a library that has it comes from.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::OpenVino { .. } => "pip install onnxruntime-openvino",
            Self::Cuda { .. } | Self::TensorRt { .. } => "pip install onnxruntime-gpu",
            Self::DirectMl { .. } => "pip install onnxruntime-directml, on Windows",
            Self::CoreMl(_) => "take ONNX Runtime's library for macOS or iOS",
            Self::Nnapi { .. } => "take ONNX Runtime's library for Android",
            Self::Xnnpack => "take ONNX Runtime's library for Android or iOS, or build it with XNNPACK",
            Self::Cpu | Self::WebGpu(_) | Self::Qnn(_) | Self::OpenVinoPlugIn(_) | Self::Custom { .. } => {
                "install the plug-in"
            }
        }
    }
}
