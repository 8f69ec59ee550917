//! ONNX Runtime's own format, `.ort`, which its minimal builds load, and the list of operators that such a build has to
//! contain. ONNX Runtime itself writes the format, with its optimisations done; the list is read off the optimised graph.

use crate::{Error, Result, lint};
use candle_onnx::onnx::{GraphProto, ModelProto};
use dmd_runtime::{EngineChoice, Generator, Info, Options, Output, Request, Rewrite, rewrite};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
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
    /// Largest difference between its pictures and those of the ONNX file.
    pub max_abs_difference: f64,
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

/// Largest difference between the two files' f32 pictures, as a part of the largest value; bytes may differ by one.
/// Optimised once or anew, sums run in another order.
const TOLERANCE: f64 = 1e-4;

/// Writes an exported file as an `.ort` file, after it was seen to give the same pictures. On any error nothing is left
/// under `ort` that was not there before.
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
    let optimised = Aside(ort.with_extension("optimised.onnx"));
    // Where nothing can be written, the system says so more plainly than ONNX Runtime.
    fs::write(&optimised.0, []).map_err(Error::io(ort))?;
    let version = rewrite(onnx, &optimised.0, Rewrite::Optimise, library)?;
    let required_operators = operators(&lint::read(&optimised.0)?);
    let aside = Aside(ort.with_extension("partial.ort"));
    rewrite(&optimised.0, &aside.0, Rewrite::Ort, library)?;
    let max_abs_difference = compare(onnx, &aside.0, &info, library)?;
    fs::rename(&aside.0, ort).map_err(Error::io(ort))?;
    let bytes = fs::metadata(ort).map_err(Error::io(ort))?.len();
    Ok(OrtReport { path: ort.into(), bytes, onnxruntime: version, required_operators, max_abs_difference })
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

/// The largest difference between the pictures of two files; an error where it is too large.
fn compare(onnx: &Path, ort: &Path, info: &Info, library: Option<&Path>) -> Result<f64> {
    let options = || Options { engine: EngineChoice::OnnxRuntime, library: library.map(Into::into), threads: None };
    let output = info.output;
    let request = Request { seed: 0, labels: vec![], batch: PICTURES.max(info.classes.len()) };
    let expected = Generator::load(onnx, options())?.generate(&request)?.to_f32();
    let found = Generator::load(ort, options())?.generate(&request)?.to_f32();
    let largest = expected.iter().fold(0f64, |max, x| max.max(f64::from(x.abs())));
    let limit = if output == Output::U8 { 1.01 / 127.5 } else { TOLERANCE * largest };
    let pairs = expected.iter().zip(&found);
    let difference = pairs.fold(0f64, |max, (a, b)| max.max(f64::from((a - b).abs())));
    if difference > limit {
        let verdict =
            format!("ONNX Runtime: the .ort file differs by {difference:.3e}, at most {limit:.3e} is allowed");
        return Err(Error::Verification(vec![verdict]));
    }
    Ok(difference)
}

/// A file that is not wanted in the end, unless it was renamed.
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove, and nothing else can be done about a failure here.
        _ = fs::remove_file(&self.0);
    }
}
