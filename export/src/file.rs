//! From a network to a file under its final name: everything before is written aside and checked there, so that a
//! file which exists is a file that works.

use crate::fold::{Folded, fold, fold_upsampling};
use crate::graph::{Element, Graph, NodeId, Op};
use crate::limits::Limit;
use crate::lower::lower;
use crate::onnx::{ExternalData, Lowered};
use crate::passes::merge;
use crate::precision::{activations, half, weights};
use crate::trace::trace_all;
use crate::verify::{self, EngineVerdict, Samples, Status, Subject, verify};
use crate::{Dialect, Error, Form, Input, LayerSensitivity, Module, Precision, Result, Value, check, onnx};
use candle_core::Tensor;
use candle_onnx::onnx::ModelProto;
use dmd_models::Weights;
use dmd_runtime::{EngineChoice, Info, ModuleInfo, Output, Port};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// What a file says of its model beyond the network itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelInfo {
    /// Names of the rows, classes or prompts, by label. Empty for a module whose own count is known: numbers become the
    /// names.
    pub classes: Vec<String>,
    /// From [`weights_sha256`]; tells which weights a file was made of.
    pub weights_sha256: String,
}

/// How a file is made.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportOptions {
    /// Which operators it is spelled in.
    pub dialect: Dialect,
    /// How its numbers are stored and computed.
    pub precision: Precision,
    /// The least PSNR against fp32, in dB, for other precisions than it; `None` is the precision's own
    /// ([`Precision::min_psnr_db`]).
    pub min_psnr_db: Option<f64>,
    /// How far w8a8 may fall below w8, in PSNR: the worst layers stay in single precision until it does not. `None` is
    /// [`MAX_DROP_DB`].
    pub max_drop_db: Option<f64>,
    /// Whether the weights go into `FILE.data`, each on a page of its own, to be mapped rather than read.
    pub external_data: bool,
    /// The most bytes that the file and its data may have.
    pub max_size: Option<usize>,
    /// Which engines verify the file.
    pub engines: EngineChoice,
    /// Whether a file is written that no engine has run.
    pub allow_unverified: bool,
    /// Pictures per run.
    pub batch: Batch,
    /// The class that every picture is of; the graph then takes no label.
    pub fixed_label: Option<usize>,
    /// f32 `(B, C, H, W)` around [-1, 1], not clipped, or u8 `(B, H, W, C)`.
    pub output: Output,
    /// Whether an existing file is replaced.
    pub force: bool,
    /// Largest difference between an engine's f32 pictures and candle's, as a part of candle's largest value.
    /// u8 pictures may differ by one step.
    pub tolerance: f64,
    /// The most bytes that making and checking the file may take; `None` where that is not known.
    pub max_memory: Option<u64>,
    /// ONNX Runtime's library for the check; `None` searches where `dmd_runtime` does.
    pub library: Option<PathBuf>,
}

impl Default for ExportOptions {
    /// One f32 picture per run in the portable dialect, within 1e-4.
    fn default() -> Self {
        ExportOptions {
            dialect: Dialect::Portable,
            precision: Precision::Fp32,
            min_psnr_db: None,
            max_drop_db: None,
            external_data: false,
            max_size: None,
            engines: EngineChoice::Auto,
            allow_unverified: false,
            batch: Batch::Fixed(1),
            fixed_label: None,
            output: Output::F32,
            force: false,
            tolerance: 1e-4,
            max_memory: None,
            library: None,
        }
    }
}

/// w8a8 next to w8, where nothing else is asked for.
pub const MAX_DROP_DB: f64 = 10.0;

/// How many pictures one run makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// This many, written into every shape: what phones' accelerators want.
    Fixed(usize),
    /// As many as there are noises; the only axis of the file that is free.
    Dynamic,
}

impl Batch {
    /// Pictures in the traced graph.
    fn traced(self) -> usize {
        match self {
            Batch::Fixed(n) => n,
            Batch::Dynamic => 1,
        }
    }
}

/// What was written, and what the engines make of it.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// The file.
    pub path: PathBuf,
    /// Operators in it.
    pub nodes: usize,
    /// Constants in it.
    pub initializers: usize,
    /// Its size, external data included.
    pub bytes: usize,
    /// What the file is.
    pub dialect: Dialect,
    /// How its numbers are stored and computed.
    pub precision: Precision,
    /// For w8a8, what each layer costs, the worst first.
    pub layers: Vec<LayerSensitivity>,
    /// For fp16, the nodes kept in single precision because the likeness asked for would not hold without, the worst
    /// first.
    pub kept_float: Vec<String>,
    /// How often each rewrite of [`fold`](mod@crate::fold) was applied.
    pub folded: Folded,
    /// One verdict per engine; none of them failed, and one at least passed unless the file may be unverified.
    pub engines: Vec<EngineVerdict>,
}

/// Writes a module as an ONNX file, after every engine present has been seen to give from it what candle does.
/// On any error, nothing is left under `path` that was not there before.
pub fn export<M: Module>(module: &M, info: &ModelInfo, options: &ExportOptions, path: &Path) -> Result<ExportReport> {
    export_passes(std::slice::from_ref(module), info, options, path)
}

/// Writes a generator of several passes as one file, whose graph is one pass: [`export`], with the weights stored once
/// and a table of what differs between the passes. `passes` is the same module held at one noise level after the
/// other, descending; its first input is the noise, and its first output is shaped as that. The first pass makes a picture of unit noise; each other one of `x/sigma + eps`, the picture so far
/// noised to its own level and divided by it, which [`dmd_runtime::Generator`] and the checks here do in between.
pub fn export_passes<M: Module>(
    passes: &[M],
    info: &ModelInfo,
    options: &ExportOptions,
    path: &Path,
) -> Result<ExportReport> {
    prepare(passes, info, options, path)?.verify()
}

/// [`export_passes`] up to the engines. Of passes that are given away, nothing is left in memory once the file's own
/// spelling of the weights is there.
pub fn prepare<M: Module>(
    given: impl AsRef<[M]>,
    info: &ModelInfo,
    options: &ExportOptions,
    path: &Path,
) -> Result<Prepared> {
    let passes = given.as_ref();
    let module = check_passes(passes, options)?;
    let inputs = module.inputs();
    let classes = class_names(module.max_classes(), &info.classes)?;
    check_settings(&inputs, &classes, options)?;
    if path.exists() && !options.force {
        return Err(Error::Exists { path: path.into() });
    }
    let mut graph = traced(passes, &inputs, classes.len(), options)?;
    let mut folded = fold(&mut graph)?;
    if options.dialect.transposes_convs(options.precision) {
        folded.extend(fold_upsampling(&mut graph)?);
    }
    let labels = if options.fixed_label.is_some() { 0 } else { classes.len() };
    let metadata = describe(passes, info, &graph, classes, options).to_metadata();
    let dynamic_batch = options.batch == Batch::Dynamic;
    let outputs = module.outputs();
    let names: Vec<&str> = outputs.iter().map(|gives| gives.name.as_str()).collect();
    let lowered = lower(&graph, &names, options.dialect, dynamic_batch)?;
    // What follows works on the file's own spelling.
    drop(graph);
    check_memory(&lowered, &inputs, options)?;
    let subject = Subject { passes, batch: options.batch.traced(), labels, fixed: options.fixed_label };
    // The unwritable path is found before the time for what follows is spent.
    let aside = Aside::new(path, options.external_data, options.force)?;
    let samples = subject.samples()?;
    // The network goes where it has been looked at for the last time and another spelling is about to be made.
    let (mut layers, mut kept_float) = (vec![], vec![]);
    let mut graph = match options.precision {
        Precision::Fp32 => lowered.graph,
        Precision::Fp16 => {
            let calibration = subject.calibration()?;
            drop(given);
            let least = options.min_psnr_db.unwrap_or(Precision::Fp16.min_psnr_db());
            let graph;
            (graph, kept_float) = half::rewrite(lowered, &calibration, least)?;
            half::check_finite(&graph, &calibration)?;
            graph
        }
        Precision::W8 => {
            drop(given);
            weights::rewrite(lowered.graph)?
        }
        Precision::W8a8 => {
            let calibration = subject.calibration()?;
            drop(given);
            let most = options.max_drop_db.unwrap_or(MAX_DROP_DB);
            let graph;
            (graph, layers) = activations::rewrite(&lowered.graph, &calibration, most)?;
            graph
        }
    };
    onnx::share_constants(&mut graph);
    let mut model = onnx::model(graph, options.dialect, &metadata);
    onnx::number_values(&mut model);
    // This is the file, but for types that some dialects leave out.
    check::check(&model, options.dialect.rules(options.precision, dynamic_batch))?;
    onnx::forget_types(&mut model, options.dialect);
    let files = Files::of(&model, path, options.external_data)?;
    if let Some(limit) = options.max_size.filter(|limit| files.bytes > *limit) {
        return Err(Error::OverMaxSize { bytes: files.bytes, limit });
    }
    aside.write(&files)?;
    let bytes = files.bytes;
    drop(files);
    let (dialect, precision) = (options.dialect, options.precision);
    let (nodes, initializers) = counts(&model);
    let path = path.into();
    let engines = vec![];
    let report =
        ExportReport { path, nodes, initializers, bytes, dialect, precision, layers, kept_float, folded, engines };
    Ok(Prepared { aside, model, samples, options: options.clone(), report })
}

/// A file that lies aside, with the network's pictures that it has to make. It is removed where it is not verified.
pub struct Prepared {
    aside: Aside,
    model: ModelProto,
    samples: Samples,
    options: ExportOptions,
    /// All but the engines.
    report: ExportReport,
}

impl Prepared {
    /// Runs the file in every engine that is asked for, one after the other, and gives it its name if it makes the
    /// network's pictures in all of them.
    pub fn verify(self) -> Result<ExportReport> {
        let Prepared { aside, model, samples, options, report } = self;
        let engines = verify(&aside.model(), model, &samples, &options);
        accept(&engines, options.allow_unverified)?;
        aside.rename()?;
        Ok(ExportReport { engines, ..report })
    }
}

/// What goes into a file, and into the one beside it.
struct Files<'a> {
    model: Cow<'a, ModelProto>,
    data: Option<ExternalData<'a>>,
    /// Of both.
    bytes: usize,
}

impl<'a> Files<'a> {
    fn of(model: &'a ModelProto, path: &Path, external_data: bool) -> Result<Self> {
        if !external_data {
            return Ok(Files { model: Cow::Borrowed(model), data: None, bytes: onnx::encoded_len(model)? });
        }
        let name = data_path(path).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (model, data) = onnx::with_external_data(model, &name);
        let bytes = onnx::encoded_len(&model)? + data.bytes;
        Ok(Files { model: Cow::Owned(model), data: Some(data), bytes })
    }
}

/// Where the weights of a file lie that has them outside: `FILE.data`.
fn data_path(path: &Path) -> PathBuf {
    with_suffix(path, ".data")
}

/// The folder `FILE.partial`, for what is on its way to a file. One that a crash has left is used again.
pub(crate) fn partial_folder(path: &Path) -> Result<PathBuf> {
    let folder = with_suffix(path, ".partial");
    if !folder.is_dir() {
        fs::create_dir(&folder).map_err(Error::io(path))?;
    }
    Ok(folder)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// SHA-256 over all weights in the order of their names: name, a zero byte, rank and dimensions as little-endian u64,
/// values as little-endian f32. The same for a file in f16 and its f32 copy.
pub fn weights_sha256(weights: &Weights) -> Result<String> {
    let mut hash = Sha256::new();
    for (name, tensor) in weights.iter() {
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update((tensor.rank() as u64).to_le_bytes());
        tensor.dims().iter().for_each(|dim| hash.update((*dim as u64).to_le_bytes()));
        let values = tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        values.iter().for_each(|value| hash.update(value.to_le_bytes()));
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn traced<M: Module>(passes: &[M], inputs: &[Input], classes: usize, options: &ExportOptions) -> Result<Graph> {
    let ports: Vec<(&str, Element, Vec<usize>)> = inputs
        .iter()
        .map(|input| {
            let element = if input.is_ids() { Element::I32 } else { Element::F32 };
            (input.name.as_str(), element, [&[options.batch.traced()], &input.shape[..]].concat())
        })
        .collect();
    let one = |module: &M| {
        let (rows, told) = match options.fixed_label {
            None => (classes, module.told(classes)?.try_map(|rows| Ok::<_, Error>(Value::PerRow(rows.clone())))?),
            Some(row) => {
                let row = |rows: &Tensor| Ok::<_, Error>(Value::Constant(rows.narrow(0, row, 1)?));
                (0, module.told(classes)?.try_map(row)?)
            }
        };
        trace_all(&ports, rows, |b, inputs| module.run(b, inputs, &told))
    };
    let mut graph = match passes {
        [module] => one(module)?,
        _ => merge(&passes.iter().map(one).collect::<Result<Vec<_>>>()?)?,
    };
    let shapes: Vec<Vec<usize>> = graph.outputs().iter().map(|id| graph.node(*id).shape.clone()).collect();
    if passes[0].sigma().is_some() && shapes.first() != ports.first().map(|port| &port.2) {
        let noise = inputs.first().map(|input| &input.shape);
        let found = shapes.first();
        return Err(Error::Setting(format!("the network makes {found:?} of noise {noise:?}, expected the same shape")));
    }
    if options.output == Output::U8 {
        let [output] = graph.outputs() else { return Err(Error::Setting("only a picture is given as bytes".into())) };
        // [-1, 1] to 0..256, rounded down at the end: half up.
        let levels = graph.push("levels", Op::Affine { mul: 127.5, add: 128.0 }, vec![*output])?;
        let pixels = graph.push("pixels", Op::ToU8, vec![levels])?;
        graph.finish(vec![pixels]);
    }
    Ok(graph)
}

/// The first pass, of one at least.
fn check_passes<'a, M: Module>(passes: &'a [M], options: &ExportOptions) -> Result<&'a M> {
    let sigmas: Vec<f64> = passes.iter().filter_map(Module::sigma).collect();
    let first = passes.first().ok_or_else(|| Error::Setting("there is no pass to export".into()))?;
    if (passes.len() > 1 && sigmas.len() != passes.len()) || !sigmas.windows(2).all(|pair| pair[0] > pair[1]) {
        return Err(Error::Setting(format!("the passes have the noise levels {sigmas:?}, expected descending ones")));
    }
    let is_picture = first.outputs().iter().all(|gives| gives.form == Form::Picture);
    if options.output == Output::U8 && !is_picture {
        return Err(Error::Setting("output u8 is for pictures; this file gives none: export f32".into()));
    }
    if passes.len() > 1 && options.output == Output::U8 {
        return Err(Error::Setting(format!(
            "output u8 with {} passes: each pass but the first goes on from the picture before, for which bytes are too \
             coarse; export f32, which dmd-runtime turns into bytes at the end",
            passes.len()
        )));
    }
    Ok(first)
}

fn check_settings(inputs: &[Input], classes: &[String], options: &ExportOptions) -> Result<()> {
    if let Some(label) = options.fixed_label.filter(|label| *label >= classes.len()) {
        return Err(Error::Setting(match classes.len() {
            0 => format!("fixed label {label}, but the network takes no label"),
            n => format!("fixed label {label}, expected one of the network's {n}: 0 to {}", n - 1),
        }));
    }
    for Input { name: input, shape, .. } in inputs {
        let axis = |at: usize| match shape.len() {
            3 => ["channels", "height", "width"][at].to_string(),
            _ => format!("axis {} of {input}", at + 1),
        };
        let mut named = vec![("batch".to_string(), options.batch.traced())];
        named.extend(shape.iter().enumerate().map(|(at, side)| (axis(at), *side)));
        if let Some((name, _)) = named.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Setting(format!("{name} is 0, expected at least 1")));
        }
        // Twice the lengths of an upsampled value and their product stay within 64 bits.
        let too_long = named.iter().find(|(_, value)| !Limit::Length.allows(*value));
        let values = named.iter().try_fold(1u64, |all, (_, n)| all.checked_mul(*n as u64));
        let too_many = named.first().filter(|_| !values.is_some_and(|n| Limit::Values.allows(n)));
        if let Some((name, value)) = too_long.or(too_many) {
            let (most, sides) =
                (Limit::Values.most(), shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" × "));
            return Err(Error::Setting(format!(
                "{name} is {value}, with {sides} values a sample of {input}: expected {most} values in a run at most; \
                 lower --batch, or make runs of any number with --dynamic-batch"
            )));
        }
    }
    check_likeness(options)?;
    match options.tolerance > 0.0 {
        true => Ok(()),
        false => Err(Error::Setting(format!("tolerance is {}, expected a positive number", options.tolerance))),
    }
}

/// Refuses a run that cannot fit, before its pictures are made. An engine holds the values that are still to be read, and
/// their copies in its own order; beside them lie noises and pictures, expected and found.
fn check_memory(lowered: &Lowered, inputs: &[Input], options: &ExportOptions) -> Result<()> {
    let Some(most) = options.max_memory else { return Ok(()) };
    let of_each: usize = inputs.iter().map(|input| input.shape.iter().product::<usize>()).sum();
    let samples = verify::MIN_SAMPLES.max(options.batch.traced()) * of_each * size_of::<f32>();
    let needed = 4 * samples as u64 + 2 * onnx::peak_value_bytes(&lowered.graph);
    if needed <= most {
        return Ok(());
    }
    Err(Error::Setting(format!(
        "batch is {}: to check the file takes about {} MiB, and {} MiB are free; lower --batch, or make runs of any number \
         with --dynamic-batch",
        options.batch.traced(),
        needed >> 20,
        most >> 20
    )))
}

/// What is asked of the PSNR, which not every precision is held to.
fn check_likeness(options: &ExportOptions) -> Result<()> {
    let asked = [
        ("min_psnr_db", options.min_psnr_db, &[Precision::Fp16, Precision::W8, Precision::W8a8][..]),
        ("max_drop_db", options.max_drop_db, &[Precision::W8a8]),
    ];
    for (name, value, precisions) in asked {
        let Some(value) = value else { continue };
        if !value.is_finite() || value < 0.0 {
            return Err(Error::Setting(format!("{name} is {value}, expected 0 or more, in dB")));
        }
        if !precisions.contains(&options.precision) {
            let names: Vec<&str> = precisions.iter().map(|precision| precision.name()).collect();
            return Err(Error::Setting(format!(
                "{name} is {value}, which says nothing of a file in {}: leave it out, or export with --precision {}",
                options.precision,
                names.join(" or ")
            )));
        }
    }
    Ok(())
}

/// One name for every label of the file.
fn class_names(max: usize, names: &[String]) -> Result<Vec<String>> {
    match (max, names.len()) {
        (usize::MAX, 0) => {
            Err(Error::Setting("the network takes any number of classes: name those of the file".into()))
        }
        (max, 0) => Ok((0..max).map(|label| label.to_string()).collect()),
        (max, n) if n <= max => Ok(names.to_vec()),
        (0, n) => Err(Error::Setting(format!("{n} classes are named, but the network takes no label"))),
        (max, n) => Err(Error::Setting(format!("{n} classes are named, the network has {max}"))),
    }
}

/// What the file says of itself.
fn describe<M: Module>(
    passes: &[M],
    info: &ModelInfo,
    graph: &Graph,
    classes: Vec<String>,
    options: &ExportOptions,
) -> ModuleInfo {
    let fixed_class = options.fixed_label.map(|label| classes[label].clone());
    let batch = (options.batch != Batch::Dynamic).then_some(graph.batch);
    let port = |name: &str, kind: &str, of_each: &[usize]| {
        let shape = std::iter::once(batch).chain(of_each.iter().copied().map(Some)).collect();
        Port { name: name.into(), kind: kind.into(), shape }
    };
    let of_node = |name: &str, id: NodeId| {
        let node = graph.node(id);
        let kind = match node.op {
            Op::ToU8 => "u8",
            Op::Input(Element::I32) => "i32",
            _ => "f32",
        };
        port(name, kind, &node.shape[1..])
    };
    let mut inputs: Vec<Port> = graph.inputs().map(|id| of_node(&graph.node(id).name, id)).collect();
    inputs.extend(graph.index().map(|name| port(name, "i64", &[])));
    let outputs = passes[0].outputs();
    let outputs = outputs.iter().zip(graph.outputs()).map(|(gives, id)| of_node(&gives.name, *id)).collect();
    ModuleInfo {
        dialect: options.dialect.name().into(),
        precision: options.precision.name().into(),
        sigmas: passes.iter().filter_map(Module::sigma).collect(),
        inputs,
        outputs,
        classes: if fixed_class.is_some() { vec![] } else { classes },
        fixed_class,
        weights_sha256: info.weights_sha256.clone(),
        ..Info::default().module()
    }
}

/// A file is kept if no engine failed on it and one at least has run it.
pub(crate) fn accept(engines: &[EngineVerdict], allow_unverified: bool) -> Result<()> {
    let failed: Vec<String> =
        engines.iter().filter(|verdict| matches!(verdict.status, Status::Failed(_))).map(ToString::to_string).collect();
    if !failed.is_empty() {
        return Err(Error::Verification(failed));
    }
    if !allow_unverified && engines.iter().all(|verdict| verdict.status != Status::Passed) {
        return Err(Error::Unverified(engines.iter().map(ToString::to_string).collect()));
    }
    Ok(())
}

fn counts(model: &ModelProto) -> (usize, usize) {
    model.graph.as_ref().map_or((0, 0), |graph| (graph.node.len(), graph.initializer.len()))
}

/// The files in a folder `FILE.partial`, removed when this goes; under their own names, so that the model finds its data.
struct Aside {
    folder: PathBuf,
    path: PathBuf,
    has_data: bool,
}

impl Aside {
    /// The folder, empty yet.
    fn new(path: &Path, has_data: bool, force: bool) -> Result<Self> {
        if path.is_dir() {
            let source = std::io::Error::new(std::io::ErrorKind::IsADirectory, "it is a folder, expected a file name");
            return Err(Error::io(path)(source));
        }
        if has_data && data_path(path).exists() && !force {
            return Err(Error::Exists { path: data_path(path) });
        }
        Ok(Aside { folder: partial_folder(path)?, path: path.into(), has_data })
    }

    fn write(&self, files: &Files) -> Result<()> {
        let create = |file| fs::File::create(file).map(BufWriter::new).map_err(Error::io(&self.path));
        onnx::write(&files.model, &mut create(self.model())?).map_err(Error::io(&self.path))?;
        if let Some(data) = &files.data {
            data.write(&mut create(self.data())?).map_err(Error::io(&self.path))?;
        }
        Ok(())
    }

    fn model(&self) -> PathBuf {
        self.folder.join(self.path.file_name().unwrap_or_default())
    }

    fn data(&self) -> PathBuf {
        data_path(&self.model())
    }

    /// The data first: a model is there only when all of it is.
    fn rename(self) -> Result<()> {
        let sync_and_rename = |from: &Path, to: &Path| {
            fs::File::open(from)?.sync_all()?;
            fs::rename(from, to)
        };
        if self.has_data {
            sync_and_rename(&self.data(), &data_path(&self.path)).map_err(Error::io(&self.path))?;
        }
        let orphan = if self.has_data { None } else { data_of(&self.path) };
        sync_and_rename(&self.model(), &self.path).map_err(Error::io(&self.path))?;
        // Nothing reads it any more; the new file stands whole whether it goes or not.
        orphan.into_iter().for_each(|data| _ = fs::remove_file(data));
        Ok(())
    }
}

/// The weights of the file that is replaced, if it is one of ours and has them outside.
fn data_of(path: &Path) -> Option<PathBuf> {
    let name = Info::read(path).ok()?.file.external_data?;
    Some(data_path(path)).filter(|data| data.file_name() == Some(name.as_ref()))
}

impl Drop for Aside {
    fn drop(&mut self) {
        // After a rename there is only the folder left, and nothing else can be done about a failure here.
        _ = fs::remove_file(self.model());
        _ = fs::remove_file(self.data());
        _ = fs::remove_dir(&self.folder);
    }
}
