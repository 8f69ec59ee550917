//! What a file says of itself: the `dmd.*` entries of its metadata, checked against its graph; and whether the graph is
//! one that may run.

use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::limits::{self, MAX_PICTURE_VALUES};
use crate::{Error, Result, printable};

mod graph;
mod onnx;
mod operators;
mod ort_file;
mod outside;
mod sizes;

pub(crate) use graph::bytes;
use graph::{Model, Port};
pub use operators::OPERATORS;

/// The newest `dmd.format` that this build reads.
pub const FORMAT: u32 = 2;

/// The description of an exported generator.
///
/// ```no_run
/// let info = dmd_runtime::Info::read("emoji-32.onnx")?;
/// println!("{} × {} pixels, classes {:?}", info.width, info.height, info.classes);
/// # Ok::<(), dmd_runtime::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Info {
    /// `dmd.format`: the version of this description.
    pub format: u32,
    /// `dmd.version`: the version of dmd that wrote the file.
    pub version: String,
    /// `dmd.dialect`: which operators the graph is spelled in.
    pub dialect: String,
    /// `dmd.precision`: how numbers are stored and computed: fp32, fp16, w8 or w8a8.
    pub precision: String,
    /// `dmd.sigma`: the noise level at which the generator was trained. It is folded into the graph.
    pub sigma: f64,
    /// `dmd.steps`: the noise levels of the passes that make a picture, descending from `sigma`; `[sigma]` for one pass.
    pub steps: Vec<f64>,
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
    /// The names of the classes, by label; empty where there are none.
    pub classes: Vec<String>,
    /// Whether the graph takes labels; so where there are classes.
    pub labelled: bool,
    /// The one class that all pictures are of, where a label was folded into the graph.
    pub fixed_class: Option<String>,
    /// A hash of the weights before they were folded.
    pub weights_sha256: String,
    /// The version of ONNX's operators.
    pub opset: u64,
    /// Operators in the graph.
    pub nodes: usize,
    /// Bytes of weights, in the file and beside it.
    pub weight_bytes: u64,
    /// The file beside it that holds the weights, where there is one.
    pub external_data: Option<String>,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// That file, links resolved.
    #[serde(skip)]
    pub(crate) data: Option<PathBuf>,
    /// The number of values of the largest value in the graph, of one batch; of one picture where the batch is free.
    #[serde(skip)]
    pub(crate) largest_value: usize,
}

/// A file, or what is in one.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    File(&'a Path),
    Bytes(&'a [u8]),
}

impl<'a> Source<'a> {
    /// What errors call it.
    pub fn path(self) -> &'a Path {
        match self {
            Source::File(path) => path,
            Source::Bytes(_) => Path::new("the model in memory"),
        }
    }

    /// Whether it is in ONNX Runtime's own format: by its name, as ONNX Runtime decides, or where it has none by its mark.
    pub fn is_ort(self) -> bool {
        match self {
            Source::File(path) => path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("ort")),
            Source::Bytes(bytes) => bytes.get(4..8) == Some(ort_file::MARK),
        }
    }

    fn model(self) -> Result<Model> {
        let io = |source| Error::Io { path: self.path().into(), source };
        let not_onnx = |reason| Error::NotOnnx { path: self.path().into(), reason };
        let read = match self {
            Source::File(path) => {
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
            Source::Bytes(bytes) if self.is_ort() => return ort_file::model(bytes).map_err(not_onnx),
            Source::Bytes(bytes) => onnx::model(Cursor::new(bytes), bytes.len() as u64),
        };
        read.map_err(|error| match error {
            onnx::Broken::Io(source) => io(source),
            onnx::Broken::Format(reason) => not_onnx(reason),
        })
    }
}

/// How a graph gives its pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// f32 `(B, C, H, W)` in `[-1, 1]`.
    F32,
    /// u8 `(B, H, W, C)`.
    U8,
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
        let model = source.model()?;
        let path = || source.path().to_path_buf();
        if !model.metadata.iter().any(|(key, _)| key == "dmd.format") {
            return Err(Error::NotOurs { path: path(), found: describe(&model) });
        }
        let inconsistent = |reason| Error::Inconsistent { path: path(), reason };
        let format = number(&model, "dmd.format").map_err(inconsistent)?;
        if format > FORMAT {
            return Err(Error::NewerFormat { path: path(), found: format });
        }
        let mut info = from_metadata(&model, format).map_err(inconsistent)?;
        let inputs = check_graph(&info, &model).map_err(inconsistent)?;
        operators::check(&model).map_err(inconsistent)?;
        info.largest_value = sizes::check(&model, &inputs).map_err(inconsistent)?;
        let beside = if let Source::File(path) = source { Some(path) } else { None };
        info.data = outside::locate(beside, &model).map_err(inconsistent)?;
        Ok(info)
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }

    /// The number of values of the largest thing that the graph computes, of one batch, or of one picture where the batch is
    /// free: an engine takes four bytes for each at least.
    pub fn largest_value(&self) -> usize {
        self.largest_value
    }

    /// Passes that make a picture.
    pub fn passes(&self) -> usize {
        self.steps.len()
    }

    /// The graph's second input, where there is one: the `label` of each picture, or where there are several passes the
    /// `row` of its tables, `pass · classes + label`.
    pub(crate) fn index(&self) -> Option<&'static str> {
        match (self.passes(), self.labelled) {
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

fn from_metadata(model: &Model, format: u32) -> Result<Info, String> {
    let sigma: f64 = number(model, "dmd.sigma")?;
    if !(sigma.is_finite() && sigma > 0.0) {
        return Err(format!("dmd.sigma is {sigma}, expected a positive number"));
    }
    let classes = text(model, "dmd.classes")?;
    let classes: Vec<String> = serde_json::from_str(classes)
        .map_err(|error| format!("dmd.classes is {classes:?}, expected a JSON array of names: {error}"))?;
    let output = match text(model, "dmd.output")? {
        "f32" => Output::F32,
        "u8" => Output::U8,
        other => return Err(format!("dmd.output is {other:?}, expected \"f32\" or \"u8\"")),
    };
    Ok(Info {
        format,
        version: text(model, "dmd.version")?.into(),
        dialect: text(model, "dmd.dialect")?.into(),
        precision: optional(model, "dmd.precision")?.unwrap_or_else(|| "fp32".into()),
        sigma,
        steps: steps(model, sigma, output)?,
        batch: size(model, "dmd.batch")?,
        dynamic_batch: optional(model, "dmd.dynamic_batch")?.unwrap_or(false),
        channels: size(model, "dmd.channels")?,
        height: size(model, "dmd.height")?,
        width: size(model, "dmd.width")?,
        output,
        labelled: !classes.is_empty(),
        fixed_class: optional(model, "dmd.fixed_class")?,
        classes,
        weights_sha256: text(model, "dmd.weights_sha256")?.into(),
        opset: model.opset.unwrap_or(0),
        nodes: model.nodes.len(),
        weight_bytes: model.weight_bytes(),
        external_data: model.outside().next().map(|(_, part)| part.location.clone()),
        file_bytes: model.file_bytes,
        data: None,
        largest_value: 0,
    })
}

/// The noise levels of all passes; files of one pass have no list.
fn steps(model: &Model, sigma: f64, output: Output) -> Result<Vec<f64>, String> {
    if !model.metadata.iter().any(|(key, _)| key == "dmd.steps") {
        return Ok(vec![sigma]);
    }
    let text = text(model, "dmd.steps")?;
    let wrong = |what: &str| format!("dmd.steps is {text:?}, expected {what}");
    let steps: Vec<f64> = serde_json::from_str(text).map_err(|_| wrong("a JSON array of noise levels"))?;
    let descending = steps.windows(2).all(|pair| pair[0] > pair[1]) && steps.iter().all(|step| *step > 0.0);
    match steps.first() {
        Some(first) if descending && *first == sigma && steps.len() > 1 => {}
        _ => return Err(wrong(&format!("two noise levels or more, descending from dmd.sigma, {sigma}"))),
    }
    match output {
        Output::F32 => Ok(steps),
        Output::U8 => {
            Err(format!("dmd.output is \"u8\" with {} passes, which go on from each other's f32", steps.len()))
        }
    }
}

/// The graph must be what the metadata promises, so that whatever runs it later needs no checks of its own. Gives the
/// shapes of its inputs, of one picture where the batch is free.
fn check_graph(info: &Info, model: &Model) -> Result<Vec<(&'static str, Vec<u64>)>, String> {
    let Info { batch, channels, height, width, .. } = *info;
    let sizes = [batch, channels, height, width].map(|size| size as u64);
    if limits::values(sizes, MAX_PICTURE_VALUES).is_none() {
        return Err(format!(
            "the metadata asks for {sizes:?} values at once, at most {MAX_PICTURE_VALUES} are allowed"
        ));
    }
    let batch = (!info.dynamic_batch).then_some(batch);
    let shape = |dims: [usize; 3]| [vec![batch], dims.map(Some).to_vec()].concat();
    let image = match info.output {
        Output::F32 => ("image", graph::F32, shape([channels, height, width])),
        Output::U8 => ("image", graph::U8, shape([height, width, channels])),
    };
    let mut inputs = vec![("noise", graph::F32, shape([channels, height, width]))];
    inputs.extend(info.index().map(|index| (index, graph::I64, vec![batch])));
    let rows = info.passes() * info.classes.len().max(1);
    if let Some(found) = model.pass_rows().filter(|found| *found != rows as u64) {
        let (steps, classes) = (info.passes(), info.classes.len());
        return Err(format!(
            "the graph's pass_table has {found} rows, {steps} dmd.steps and {classes} classes ask for {rows}"
        ));
    }
    check_ports("input", &model.inputs, &inputs)?;
    check_ports("output", &model.outputs, &[image])?;
    let fixed = |shape: Vec<Option<usize>>| shape.into_iter().map(|n| n.unwrap_or(1) as u64).collect();
    Ok(inputs.into_iter().map(|(name, _, shape)| (name, fixed(shape))).collect())
}

fn check_ports(kind: &str, found: &[Port], expected: &[(&str, u64, Vec<Option<usize>>)]) -> Result<(), String> {
    for (name, element, shape) in expected {
        let wanted = describe_type(*element, shape.iter().map(|n| n.map(|n| n as u64)));
        let Some(port) = found.iter().find(|port| port.name == *name) else {
            return Err(format!("the graph has no {kind} {name:?} ({wanted}); it has [{}]", describe_ports(found)));
        };
        let is = describe_type(port.element, port.shape.iter().copied());
        if is != wanted {
            return Err(format!("{kind} {name:?} of the graph is {is}, the metadata says {wanted}"));
        }
    }
    if found.len() > expected.len() {
        let names: Vec<_> = expected.iter().map(|(name, ..)| *name).collect();
        return Err(format!("the graph has the {kind}s [{}], expected only {names:?}", describe_ports(found)));
    }
    Ok(())
}

fn text<'a>(model: &'a Model, key: &str) -> Result<&'a str, String> {
    let mut values = model.metadata.iter().filter(|(name, _)| name == key);
    match (values.next(), values.next()) {
        (Some((_, value)), None) => Ok(value),
        (None, _) => Err(format!("the metadata has no {key}")),
        (Some(_), Some(_)) => Err(format!("the metadata has {key} twice")),
    }
}

/// An entry that files have only where it says something.
fn optional<T: std::str::FromStr>(model: &Model, key: &str) -> Result<Option<T>, String> {
    if !model.metadata.iter().any(|(name, _)| name == key) {
        return Ok(None);
    }
    let value = text(model, key)?;
    value.parse().map(Some).map_err(|_| format!("{key} is {value:?}, expected another value"))
}

fn number<T: std::str::FromStr>(model: &Model, key: &str) -> Result<T, String> {
    let value = text(model, key)?;
    value.parse().map_err(|_| format!("{key} is {value:?}, expected a number"))
}

fn size(model: &Model, key: &str) -> Result<usize, String> {
    match number(model, key)? {
        0 => Err(format!("{key} is 0, expected at least 1")),
        size => Ok(size),
    }
}

fn describe(model: &Model) -> String {
    let producer = if model.producer.is_empty() { "an unnamed program" } else { &model.producer };
    let (inputs, outputs) = (describe_ports(&model.inputs), describe_ports(&model.outputs));
    let keys: Vec<_> = model.metadata.iter().map(|(key, _)| key.as_str()).collect();
    format!("by {producer:?}, with inputs [{inputs}], outputs [{outputs}] and metadata keys {keys:?}")
}

fn describe_ports(ports: &[Port]) -> String {
    let one =
        |port: &Port| format!("{}: {}", printable(&port.name), describe_type(port.element, port.shape.iter().copied()));
    ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn describe_type(element: u64, shape: impl Iterator<Item = Option<u64>>) -> String {
    let element = graph::element_type(element).map_or_else(|| format!("type {element}"), |(name, _)| name.into());
    let shape: Vec<_> = shape.map(|dim| dim.map_or("?".into(), |n| n.to_string())).collect();
    format!("{element} [{}]", shape.join(", "))
}
