//! What a file says of itself, checked against its graph; and whether the graph is one that may run. This is the one
//! place that knows how the description is written: the exporter asks for it ([`Info::to_metadata`]), and only
//! examples/web reads it a second time, in JavaScript.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::limits::{self, MAX_PICTURE_VALUES};
use crate::{Error, Result, printable};

mod folder;
mod graph;
mod metadata;
mod onnx;
mod operators;
mod ort_file;
mod outside;
mod sizes;

pub use folder::{FolderInfo, MODEL_JSON, Part, PromptLimits};
use graph::Model;
#[cfg(feature = "tract")]
pub(crate) use graph::bytes;
pub use operators::OPERATORS;

/// The newest format of the description that this build reads, and the one that it writes.
pub const FORMAT: u32 = 3;

/// The description of an exported generator.
///
/// ```no_run
/// let info = dmd_runtime::Info::read("emoji-32.onnx")?;
/// println!("{} × {} pixels, classes {:?}", info.width, info.height, info.classes);
/// # Ok::<(), dmd_runtime::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Info {
    /// The version of the description.
    pub format: u32,
    /// The version of dmd that wrote the file.
    pub version: String,
    /// Which operators the graph is spelled in.
    pub dialect: String,
    /// How numbers are stored and computed: fp32, fp16, w8 or w8a8.
    pub precision: String,
    /// The noise level of each pass that makes a picture, descending; one at least. They are folded into the graph.
    pub sigmas: Vec<f64>,
    /// Pictures in one engine call; where the batch is dynamic, the fewest.
    pub batch: usize,
    /// Whether the graph takes any number of pictures at once.
    pub dynamic_batch: bool,
    /// Colours of a picture: 1 for grey, 3 for red, green and blue.
    pub channels: usize,
    /// Rows of a picture.
    pub height: usize,
    /// Columns of a picture.
    pub width: usize,
    /// How the graph gives its pictures.
    pub output: Output,
    /// The names of the classes, by label; empty where the graph takes no labels.
    pub classes: Vec<String>,
    /// The one class that all pictures are of, where a label was folded into the graph.
    pub fixed_class: Option<String>,
    /// A hash of the weights before they were folded.
    pub weights_sha256: String,
    /// What the file is made of.
    #[serde(flatten)]
    pub file: FileInfo,
}

/// The description of any exported file: of a generator, or of a part of a model around one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModuleInfo {
    /// The version of the description.
    #[serde(skip)]
    pub format: u32,
    /// The version of dmd that wrote the file.
    pub version: String,
    /// Which operators the graph is spelled in.
    pub dialect: String,
    /// How numbers are stored and computed: fp32, fp16, w8 or w8a8.
    pub precision: String,
    /// The noise level of each pass that makes a sample of noise, descending; none where none is made of noise.
    pub sigmas: Vec<f64>,
    /// What the graph takes, in its order.
    pub inputs: Vec<Port>,
    /// What it gives, in its order.
    pub outputs: Vec<Port>,
    /// The names of its rows, which the input `label` chooses from, or `row` where there are several passes: classes, or
    /// prompts.
    pub classes: Vec<String>,
    /// The one row that all samples are of, where it was folded into the graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_class: Option<String>,
    /// A hash of the weights before they were folded.
    pub weights_sha256: String,
    /// What the file is made of.
    #[serde(skip)]
    pub file: FileInfo,
}

/// What is found in a file, whatever it says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FileInfo {
    /// The version of ONNX's operators.
    pub opset: u64,
    /// Operators in the graph.
    pub nodes: usize,
    /// Bytes of weights, in the file and beside it.
    pub weight_bytes: u64,
    /// The file beside it that holds the weights, where there is one.
    pub external_data: Option<String>,
    /// Bytes of the file.
    pub bytes: u64,
    /// The number of values of the largest thing that the graph computes, of one batch, or of one picture where the batch is
    /// free: an engine takes four bytes for each at least.
    pub largest_value: usize,
    /// The file that holds the weights, links resolved.
    #[serde(skip)]
    pub(crate) data: Option<PathBuf>,
}

/// How a graph gives its pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// f32 `(B, C, H, W)` in `[-1, 1]`.
    #[default]
    F32,
    /// u8 `(B, H, W, C)`.
    U8,
}

/// An input or output of a graph, by its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// The type of its elements: `f32`, `u8`, `i32` or `i64`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its shape; `None` for the number of samples where that is free.
    pub shape: Vec<Option<usize>>,
}

impl Default for Info {
    /// One picture of no size at noise level 1, for the exporter to fill in.
    fn default() -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            dialect: String::new(),
            precision: "fp32".into(),
            sigmas: vec![1.0],
            batch: 1,
            dynamic_batch: false,
            channels: 0,
            height: 0,
            width: 0,
            output: Output::F32,
            classes: vec![],
            fixed_class: None,
            weights_sha256: String::new(),
            file: FileInfo::default(),
        }
    }
}

/// A file, or what is in one.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    File(&'a Path),
    Bytes(&'a [u8]),
    /// What is in a file, and stays there while somebody holds the map.
    Map(&'a Path, &'a Arc<Mmap>),
}

/// A [`Source`] that is there for as long as it is kept, to be opened once more.
pub(crate) enum Kept {
    File(PathBuf),
    Bytes(Vec<u8>),
    Map(PathBuf, Arc<Mmap>),
}

impl Kept {
    pub fn of(source: Source<'_>) -> Self {
        match source {
            Source::File(path) => Self::File(path.into()),
            Source::Bytes(bytes) => Self::Bytes(bytes.into()),
            Source::Map(path, map) => Self::Map(path.into(), map.clone()),
        }
    }

    pub fn source(&self) -> Source<'_> {
        match self {
            Self::File(path) => Source::File(path),
            Self::Bytes(bytes) => Source::Bytes(bytes),
            Self::Map(path, map) => Source::Map(path, map),
        }
    }
}

impl<'a> Source<'a> {
    /// What errors call it.
    pub fn path(self) -> &'a Path {
        match self {
            Source::File(path) | Source::Map(path, _) => path,
            Source::Bytes(_) => Path::new("the model in memory"),
        }
    }

    /// What is in memory of it.
    pub fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Source::File(_) => None,
            Source::Bytes(bytes) => Some(bytes),
            Source::Map(_, map) => Some(map),
        }
    }

    /// Whether it is in ONNX Runtime's own format: by its mark, or of a file by its name, which promises the mark.
    pub fn is_ort(self) -> bool {
        let Some(bytes) = self.bytes() else {
            let begins = || {
                let mut first = [0; 8];
                let read = File::open(self.path()).and_then(|mut file| file.read_exact(&mut first));
                read.is_ok() && first[4..] == *ort_file::MARK
            };
            return self.path().extension().is_some_and(|extension| extension.eq_ignore_ascii_case("ort")) || begins();
        };
        bytes.get(4..8) == Some(ort_file::MARK)
    }

    fn model(self) -> Result<Model> {
        let io = |source| Error::Io { path: self.path().into(), source };
        let not_onnx = |reason| Error::NotOnnx { path: self.path().into(), reason };
        let read = match self.bytes() {
            None => {
                let path = self.path();
                let file = File::open(path).map_err(io)?;
                let about = file.metadata().map_err(io)?;
                if about.is_dir() {
                    let reason = "is a folder, expected an .onnx file";
                    return Err(io(std::io::Error::new(std::io::ErrorKind::IsADirectory, reason)));
                }
                if !about.is_file() {
                    return Err(io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "is no regular file")));
                }
                if self.is_ort() {
                    let bytes = std::fs::read(path).map_err(io)?;
                    return ort_file::model(&bytes).map_err(not_onnx);
                }
                onnx::model(file, about.len())
            }
            Some(bytes) if self.is_ort() => return ort_file::model(bytes).map_err(not_onnx),
            Some(bytes) => onnx::model(Cursor::new(bytes), bytes.len() as u64),
        };
        read.map_err(|error| match error {
            onnx::Broken::Io(source) => io(source),
            onnx::Broken::Format(reason) => not_onnx(reason),
        })
    }
}

impl Info {
    /// Reads the description without loading the weights or an engine, and checks it against the graph: that the graph has
    /// no operators but those of [`OPERATORS`], and asks for no more memory than its limits allow.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::of(Source::File(path.as_ref()))
    }

    /// The same of a file's bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::of(Source::Bytes(bytes))
    }

    pub(crate) fn of(source: Source<'_>) -> Result<Self> {
        let (model, module) = described(source)?;
        let mut info = metadata::of_pictures(module).map_err(inconsistent(source))?;
        info.file = checked(source, &model, &info.module())?;
        Ok(info)
    }

    /// The same, as any file is described.
    pub fn module(&self) -> ModuleInfo {
        ModuleInfo {
            format: self.format,
            version: self.version.clone(),
            dialect: self.dialect.clone(),
            precision: self.precision.clone(),
            sigmas: self.sigmas.clone(),
            inputs: self.inputs(),
            outputs: self.outputs(),
            classes: self.classes.clone(),
            fixed_class: self.fixed_class.clone(),
            weights_sha256: self.weights_sha256.clone(),
            file: self.file.clone(),
        }
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }

    /// Passes that make a picture.
    pub fn passes(&self) -> usize {
        self.sigmas.len()
    }

    /// What the graph takes: unit normal `noise`, and where there are classes or several passes, an index for each picture.
    pub fn inputs(&self) -> Vec<Port> {
        let mut inputs = vec![self.port("noise", "f32", [self.channels, self.height, self.width].to_vec())];
        inputs.extend(self.index().map(|name| self.port(name, "i64", vec![])));
        inputs
    }

    /// What the graph gives: `image`.
    pub fn outputs(&self) -> Vec<Port> {
        let Self { channels, height, width, .. } = *self;
        vec![match self.output {
            Output::F32 => self.port("image", "f32", vec![channels, height, width]),
            Output::U8 => self.port("image", "u8", vec![height, width, channels]),
        }]
    }

    /// The entries of an ONNX file's metadata that say all this.
    pub fn to_metadata(&self) -> Vec<(&'static str, String)> {
        self.module().to_metadata()
    }

    /// Whether the graph takes labels.
    pub fn labelled(&self) -> bool {
        !self.classes.is_empty()
    }

    fn port(&self, name: &str, kind: &str, of_each: Vec<usize>) -> Port {
        let batch = (!self.dynamic_batch).then_some(self.batch);
        let shape = std::iter::once(batch).chain(of_each.into_iter().map(Some)).collect();
        Port { name: name.into(), kind: kind.into(), shape }
    }

    /// The graph's second input, where there is one: the `label` of each picture, or where there are several passes the
    /// `row` of its tables, `pass · classes + label`.
    pub(crate) fn index(&self) -> Option<&'static str> {
        match (self.passes(), self.labelled()) {
            (1, false) => None,
            (1, true) => Some("label"),
            _ => Some("row"),
        }
    }

    /// The label of a class, by its name or its number.
    pub fn class(&self, name: &str) -> Option<usize> {
        let by_name = self.classes.iter().position(|class| class == name);
        by_name.or_else(|| name.parse().ok().filter(|label| *label < self.classes.len()))
    }

    /// Values of one picture. Checked against overflow when the file was read.
    pub(crate) fn values(&self) -> usize {
        self.channels * self.height * self.width
    }
}

impl ModuleInfo {
    /// Reads the description as [`Info::read`] does, of any file of `dmd export`.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::of(Source::File(path.as_ref()))
    }

    pub(crate) fn of(source: Source<'_>) -> Result<Self> {
        let (model, mut info) = described(source)?;
        info.file = checked(source, &model, &info)?;
        Ok(info)
    }

    /// Samples in one engine call; `None` where that is free.
    pub fn batch(&self) -> Option<usize> {
        self.inputs.first().and_then(|port| port.shape.first().copied().flatten())
    }

    /// The entries of an ONNX file's metadata that say all this.
    pub fn to_metadata(&self) -> Vec<(&'static str, String)> {
        metadata::write(self)
    }
}

fn inconsistent(source: Source<'_>) -> impl Fn(String) -> Error {
    move |reason| Error::Inconsistent { path: source.path().into(), reason }
}

/// A file, and what it says of itself.
fn described(source: Source<'_>) -> Result<(Model, ModuleInfo)> {
    let model = source.model()?;
    let path = || source.path().to_path_buf();
    let Some(format) = metadata::format(&model).map_err(inconsistent(source))? else {
        return Err(Error::NotOurs { path: path(), found: describe(&model) });
    };
    if format > FORMAT {
        return Err(Error::NewerFormat { path: path(), found: format });
    }
    let info = metadata::read(&model, format).map_err(inconsistent(source))?;
    Ok((model, info))
}

/// What is found in a file, whose graph is held to its description.
fn checked(source: Source<'_>, model: &Model, info: &ModuleInfo) -> Result<FileInfo> {
    let found = || -> Result<FileInfo, String> {
        let inputs = check_graph(info, model)?;
        operators::check(model)?;
        let beside = if let Source::File(path) = source { Some(path) } else { None };
        Ok(FileInfo {
            opset: model.opset.unwrap_or(0),
            nodes: model.nodes.len(),
            weight_bytes: model.weight_bytes(),
            external_data: model.outside().next().map(|(_, part)| part.location.clone()),
            bytes: model.file_bytes,
            largest_value: sizes::check(model, &inputs)?,
            data: outside::locate(beside, model)?,
        })
    };
    found().map_err(inconsistent(source))
}

/// The graph must be what the metadata promises, so that whatever runs it later needs no checks of its own. Gives the
/// shapes of its inputs, of one sample where the batch is free.
fn check_graph(info: &ModuleInfo, model: &Model) -> Result<Vec<(String, Vec<u64>)>, String> {
    let fixed = |port: &Port| port.shape.iter().map(|n| n.unwrap_or(1) as u64).collect::<Vec<u64>>();
    for port in info.inputs.iter().chain(&info.outputs) {
        let sizes = fixed(port);
        if limits::values(sizes.iter().copied(), MAX_PICTURE_VALUES).is_none() {
            return Err(format!(
                "the metadata asks for {sizes:?} values at once, at most {MAX_PICTURE_VALUES} are allowed"
            ));
        }
        if sizes.is_empty() || sizes.contains(&0) || port.shape[0] != info.inputs[0].shape[0] {
            return Err(format!(
                "{port:?} in the metadata has a length of 0, or another number of samples than others"
            ));
        }
    }
    let rows = info.sigmas.len().max(1) * info.classes.len().max(1);
    if let Some(found) = model.pass_rows().filter(|found| *found != rows as u64) {
        let (passes, classes) = (info.sigmas.len(), info.classes.len());
        return Err(format!(
            "the graph's pass_table has {found} rows, {passes} noise levels and {classes} classes ask for {rows}"
        ));
    }
    check_ports("input", &model.inputs, &info.inputs)?;
    check_ports("output", &model.outputs, &info.outputs)?;
    // Engines give outputs in the graph's order.
    if model.outputs.iter().zip(&info.outputs).any(|(found, port)| found.name != port.name) {
        let found = describe_ports(&model.outputs);
        return Err(format!("the graph has the outputs [{found}], the metadata names them in another order"));
    }
    Ok(info.inputs.iter().map(|port| (port.name.clone(), fixed(port))).collect())
}

fn check_ports(kind: &str, found: &[graph::Port], expected: &[Port]) -> Result<(), String> {
    for Port { name, kind: element, shape } in expected {
        let wanted = describe_type(element, shape.iter().map(|n| n.map(|n| n as u64)));
        let Some(port) = found.iter().find(|port| port.name == *name) else {
            return Err(format!("the graph has no {kind} {name:?} ({wanted}); it has [{}]", describe_ports(found)));
        };
        let is = describe_type(&port.kind(), port.shape.iter().copied());
        if is != wanted {
            return Err(format!("{kind} {name:?} of the graph is {is}, the metadata says {wanted}"));
        }
    }
    if found.len() > expected.len() {
        let names: Vec<_> = expected.iter().map(|port| &port.name).collect();
        return Err(format!("the graph has the {kind}s [{}], expected only {names:?}", describe_ports(found)));
    }
    Ok(())
}

fn describe(model: &Model) -> String {
    let producer = if model.producer.is_empty() { "an unnamed program" } else { &model.producer };
    let (inputs, outputs) = (describe_ports(&model.inputs), describe_ports(&model.outputs));
    let keys: Vec<_> = model.metadata.iter().map(|(key, _)| key.as_str()).collect();
    format!("by {producer:?}, with inputs [{inputs}], outputs [{outputs}] and metadata keys {keys:?}")
}

fn describe_ports(ports: &[graph::Port]) -> String {
    let one = |port: &graph::Port| {
        format!("{}: {}", printable(&port.name), describe_type(&port.kind(), port.shape.iter().copied()))
    };
    ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn describe_type(element: &str, shape: impl Iterator<Item = Option<u64>>) -> String {
    let shape: Vec<_> = shape.map(|dim| dim.map_or("?".into(), |n| n.to_string())).collect();
    format!("{element} [{}]", shape.join(", "))
}
