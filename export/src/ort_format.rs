//! ONNX Runtime's own format, `.ort`, which its minimal builds load, and the list of operators that such a build has to
//! contain. ONNX Runtime itself writes the format, with its optimisations done; the list is read off the optimised graph.

use crate::file::partial_folder;
use crate::verify::{Comparison, Demand, peak};
use crate::{Error, Precision, Result, lint};
use candle_onnx::onnx::{GraphProto, ModelProto};
use dmd_runtime::{EngineChoice, Generator, Images, Info, Options, Output, Request, Rewrite, rewrite};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// What was written, and what it needs.
#[derive(Clone, Debug, Serialize)]
pub struct OrtReport {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// The version of ONNX Runtime that wrote it; that one and later ones read it.
    pub onnxruntime: String,
    /// What a minimal build has to contain.
    pub required_operators: Vec<OperatorSet>,
    /// Largest difference between its pictures and those of the ONNX file: in values of [-1, 1], or in steps of u8.
    pub max_abs_difference: f64,
    /// Peak signal to noise ratio against the ONNX file, in dB; infinite where nothing differs.
    pub psnr_db: f64,
}

/// Operators of one domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OperatorSet {
    /// `ai.onnx`, or the domain of ONNX Runtime's own operators.
    pub domain: String,
    /// The version of the domain.
    pub opset: i64,
    /// Names, sorted.
    pub operators: Vec<String>,
}

/// Pictures that the two files are compared by.
const PICTURES: usize = 8;

/// Largest difference between the f32 pictures of two files in fp32, as a part of the largest value; bytes may differ by
/// one. Optimised once or anew, sums run in another order. What that changes is rounded up or down in other precisions,
/// which are held to the likeness that an export is held to ([`Precision::min_psnr_db`]).
const TOLERANCE: f64 = 1e-4;

/// Writes an exported file as an `.ort` file, after it was seen to give the same pictures, as far as its precision can.
/// On any error nothing is left under `ort` that was not there before.
///
/// ```no_run
/// let report = dmd_export::to_ort("emoji-32.onnx".as_ref(), "emoji-32.ort".as_ref(), false, None)?;
/// std::fs::write("operators.config", dmd_export::required_operators_config(&report.required_operators))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn to_ort(onnx: &Path, ort: &Path, force: bool, library: Option<PathBuf>) -> Result<OrtReport> {
    let info = Info::read(onnx)?;
    if ort.extension().is_none_or(|extension| extension != "ort") {
        return Err(Error::Setting(format!("{}: expected a name that ends in .ort", ort.display())));
    }
    if ort.exists() && !force {
        return Err(Error::Exists { path: ort.into() });
    }
    let library = library.as_deref();
    let mut aside = Aside::beside(ort)?;
    if let Some(name) = &info.file.external_data {
        aside.lend(onnx, name)?;
    }
    let written = || -> Result<_> {
        let version = rewrite(onnx, &aside.optimised, Rewrite::Optimise, library)?;
        let required_operators = operators(&lint::read(&aside.optimised)?);
        rewrite(&aside.optimised, &aside.ort, Rewrite::Ort, library)?;
        Ok((version, required_operators, compare(onnx, &aside.ort, &info, library)?))
    };
    let (onnxruntime, required_operators, comparison) =
        written().map_err(|error| aside.full_disk().map_or(error, Error::io(ort)))?;
    fs::rename(&aside.ort, ort).map_err(Error::io(ort))?;
    let bytes = fs::metadata(ort).map_err(Error::io(ort))?.len();
    let Comparison { max: max_abs_difference, psnr_db } = comparison;
    Ok(OrtReport { path: ort.into(), bytes, onnxruntime, required_operators, max_abs_difference, psnr_db })
}

/// The text that ONNX Runtime's build takes with `--include_ops_by_config`: `domain;opset;operators`, a line each.
///
/// ```
/// use dmd_export::{OperatorSet, required_operators_config};
///
/// let operators = vec!["Add".to_string(), "Conv".to_string()];
/// let sets = [OperatorSet { domain: "ai.onnx".into(), opset: 17, operators }];
/// assert!(required_operators_config(&sets).ends_with("\nai.onnx;17;Add,Conv\n"));
/// ```
pub fn required_operators_config(sets: &[OperatorSet]) -> String {
    let line = |set: &OperatorSet| format!("{};{};{}\n", set.domain, set.opset, set.operators.join(","));
    let lines: String = sets.iter().map(line).collect();
    format!(
        "# The operators of one file, for build.py --minimal_build --include_ops_by_config. Written by dmd.\n{lines}"
    )
}

fn operators(model: &ModelProto) -> Vec<OperatorSet> {
    let mut found: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    if let Some(graph) = &model.graph {
        collect(graph, &mut found);
    }
    let opset = |domain: &str| {
        let import = model.opset_import.iter().find(|import| plain(&import.domain) == domain);
        import.map_or(1, |import| import.version)
    };
    let set = |(domain, operators): (&str, BTreeSet<&str>)| OperatorSet {
        domain: domain.into(),
        opset: opset(domain),
        operators: operators.into_iter().map(String::from).collect(),
    };
    found.into_iter().map(set).collect()
}

fn collect<'a>(graph: &'a GraphProto, found: &mut BTreeMap<&'a str, BTreeSet<&'a str>>) {
    for node in &graph.node {
        found.entry(plain(&node.domain)).or_default().insert(&node.op_type);
        node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()).for_each(|inner| collect(inner, found));
    }
}

/// The domain of ONNX has two names.
fn plain(domain: &str) -> &str {
    if domain.is_empty() { "ai.onnx" } else { domain }
}

/// How far the pictures of two files are from each other; an error where that is too far for their precision.
fn compare(onnx: &Path, ort: &Path, info: &Info, library: Option<&Path>) -> Result<Comparison> {
    let precision: Precision = info.precision.parse()?;
    let request = Request { batch: PICTURES.max(info.classes.len()), ..Request::default() };
    let values = |path: &Path| -> Result<Vec<f64>> {
        let library = library.map(Into::into);
        let options = Options { engine: EngineChoice::OnnxRuntime, library, ..Options::default() };
        Ok(values(&Generator::load(path, options)?.generate(&request)?))
    };
    let (expected, found) = (values(onnx)?, values(ort)?);
    let largest = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
    let limit = Demand::of(precision, TOLERANCE, None).limit(info.output, largest);
    let comparison = Comparison::of(expected.into_iter().zip(found), peak(info.output));
    match limit.refusal(&comparison) {
        None => Ok(comparison),
        Some(refusal) => Err(Error::Verification(vec![format!("ONNX Runtime: the .ort file {refusal}")])),
    }
}

fn values(images: &Images) -> Vec<f64> {
    match images.output() {
        Output::F32 => images.to_f32().iter().map(|value| f64::from(*value)).collect(),
        Output::U8 => images.to_u8().iter().map(|value| f64::from(*value)).collect(),
    }
}

/// What is on its way, in a folder `FILE.partial` that is removed when this goes.
struct Aside {
    folder: PathBuf,
    optimised: PathBuf,
    ort: PathBuf,
    /// The weights of a file that has them outside, under the name that it knows them by.
    data: Option<PathBuf>,
}

/// More than a file can lack that fills a disk.
const ROOM: u64 = 1 << 20;

impl Aside {
    fn beside(ort: &Path) -> Result<Self> {
        let folder = partial_folder(ort)?;
        let (optimised, ort) = (folder.join("optimised.onnx"), folder.join("generator.ort"));
        Ok(Aside { folder, optimised, ort, data: None })
    }

    /// The optimised file looks for its weights where it lies, and only the last one holds them itself.
    fn lend(&mut self, onnx: &Path, name: &str) -> Result<()> {
        let (from, to) = (onnx.with_file_name(name), self.folder.join(name));
        let data = self.data.insert(to);
        // One that a crash has left may be of another file.
        _ = fs::remove_file(&*data);
        fs::hard_link(&from, &*data).or_else(|_| fs::copy(&from, &*data).map(drop)).map_err(Error::io(&from))
    }

    /// ONNX Runtime does not say that a disk is full: it leaves half a file. Then the system says so of what is written
    /// there once more.
    fn full_disk(&self) -> Option<io::Error> {
        let write_again = |path: &PathBuf| -> io::Result<()> {
            let bytes = fs::metadata(path).map_or(0, |file| file.len()) + ROOM;
            let mut file = fs::File::create(path)?;
            io::copy(&mut io::repeat(0).take(bytes), &mut file)?;
            file.sync_all()
        };
        [&self.optimised, &self.ort].into_iter().find_map(|path| write_again(path).err())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // After a rename there is one file less to remove, and nothing else can be done about a failure here.
        _ = fs::remove_file(&self.optimised);
        _ = fs::remove_file(&self.ort);
        self.data.iter().for_each(|data| _ = fs::remove_file(data));
        _ = fs::remove_dir(&self.folder);
    }
}
