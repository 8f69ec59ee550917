//! How the description is written: format 3 is one entry, `dmd`, a JSON object. Formats 1 and 2 had an entry for each
//! thing, and are read.

use super::graph::Model;
use super::{FORMAT, Info, ModuleInfo, Output};

/// The entry of format 3.
const ENTRY: &str = "dmd";

/// The entry that all formats have, so that a program that reads older ones alone can say that a file is newer.
const FORMAT_ENTRY: &str = "dmd.format";

pub(super) fn write(info: &ModuleInfo) -> Vec<(&'static str, String)> {
    let json = serde_json::to_string(info).expect("names, numbers and lists of them have a JSON form");
    vec![(FORMAT_ENTRY, FORMAT.to_string()), (ENTRY, json)]
}

/// The version of a file's description; `None` where it has none.
pub(super) fn format(model: &Model) -> Result<Option<u32>, String> {
    optional(model, FORMAT_ENTRY)
}

pub(super) fn read(model: &Model, format: u32) -> Result<ModuleInfo, String> {
    if format < 3 {
        return Ok(from_entries(model, format)?.module());
    }
    let info: ModuleInfo = serde_json::from_str(text(model, ENTRY)?)
        .map_err(|error| format!("{ENTRY} in the metadata is no description: {error}"))?;
    check_sigmas(&info.sigmas)?;
    Ok(ModuleInfo { format, ..info })
}

/// The description of a generator of pictures.
pub(super) fn of_pictures(module: ModuleInfo) -> Result<Info, String> {
    let ModuleInfo { inputs, outputs, .. } = module;
    // The pictures are as the noise is; what the rest must be follows from them, the classes and the passes.
    let noise = inputs.iter().find(|port| port.name == "noise").map(|port| port.shape.as_slice());
    let Some(&[batch, Some(channels), Some(height), Some(width)]) = noise else {
        return Err(format!("{ENTRY}.inputs has no noise of shape (B, C, H, W): {inputs:?}"));
    };
    if [batch.unwrap_or(1), channels, height, width].contains(&0) {
        return Err(format!("{ENTRY}.inputs has a length of 0, expected 1 at least: {inputs:?}"));
    }
    let info = Info {
        format: module.format,
        version: module.version,
        dialect: module.dialect,
        precision: module.precision,
        sigmas: module.sigmas,
        batch: batch.unwrap_or(1),
        dynamic_batch: batch.is_none(),
        channels,
        height,
        width,
        output: if outputs.first().is_some_and(|port| port.kind == "u8") { Output::U8 } else { Output::F32 },
        classes: module.classes,
        fixed_class: module.fixed_class,
        weights_sha256: module.weights_sha256,
        ..Info::default()
    };
    if info.sigmas.is_empty() {
        return Err("the noise levels are [], expected one at least".into());
    }
    if info.output == Output::U8 && info.sigmas.len() > 1 {
        return Err(format!("the output is u8 with {} passes, which go on from each other's f32", info.sigmas.len()));
    }
    for (what, found, expected) in [("inputs", inputs, info.inputs()), ("outputs", outputs, info.outputs())] {
        if found != expected {
            return Err(format!(
                "{ENTRY}.{what} are {found:?}, expected {expected:?} of a generator of pictures; a part of a model is \
                 opened as a Module"
            ));
        }
    }
    Ok(info)
}

/// An entry for each thing. Format 2 has `dmd.steps` and is of several passes.
fn from_entries(model: &Model, format: u32) -> Result<Info, String> {
    let classes = text(model, "dmd.classes")?;
    let classes: Vec<String> = serde_json::from_str(classes)
        .map_err(|error| format!("dmd.classes is {classes:?}, expected a JSON array of names: {error}"))?;
    let sigmas = sigmas(model)?;
    check_sigmas(&sigmas)?;
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
        sigmas,
        batch: size(model, "dmd.batch")?,
        dynamic_batch: optional(model, "dmd.dynamic_batch")?.unwrap_or(false),
        channels: size(model, "dmd.channels")?,
        height: size(model, "dmd.height")?,
        width: size(model, "dmd.width")?,
        output,
        classes,
        fixed_class: optional(model, "dmd.fixed_class")?,
        weights_sha256: text(model, "dmd.weights_sha256")?.into(),
        ..Info::default()
    })
}

/// The noise levels of all passes; files of one pass have no list.
fn sigmas(model: &Model) -> Result<Vec<f64>, String> {
    let sigma = number(model, "dmd.sigma")?;
    if !model.metadata.iter().any(|(key, _)| key == "dmd.steps") {
        return Ok(vec![sigma]);
    }
    let text = text(model, "dmd.steps")?;
    let wrong = |what: &str| format!("dmd.steps is {text:?}, expected {what}");
    let sigmas: Vec<f64> = serde_json::from_str(text).map_err(|_| wrong("a JSON array of noise levels"))?;
    match sigmas.as_slice() {
        [first, _, ..] if *first == sigma => Ok(sigmas),
        _ => Err(wrong(&format!("two noise levels or more, descending from dmd.sigma, {sigma}"))),
    }
}

fn check_sigmas(sigmas: &[f64]) -> Result<(), String> {
    let positive = sigmas.iter().all(|sigma| sigma.is_finite() && *sigma > 0.0);
    if !positive || !sigmas.windows(2).all(|pair| pair[0] > pair[1]) {
        return Err(format!("the noise levels are {sigmas:?}, expected positive ones, descending"));
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
