//! `dmd inspect`: what a file or folder of ours holds, without running it.

use super::is_exported;
use crate::classes::listed;
use crate::cli::InspectArgs;
use crate::output;
use anyhow::{Context, Result, bail};
use candle_core::Device;
use dmd_models::{ModelFolder, Weights, read_metadata};
use dmd_runtime::printable;
use serde_json::{Value, json};
use std::path::Path;

/// Describes a path.
pub fn run(args: &InspectArgs) -> Result<Value> {
    let path = &args.path;
    let found = if is_exported(path) {
        serde_json::to_value(dmd_runtime::Info::read(path)?)?
    } else if ModelFolder::is_at(path) {
        model(path)?
    } else if path.join("config.toml").exists() {
        training_run(path)?
    } else if path.extension().is_some_and(|e| e == "safetensors") {
        tensors(path)?
    } else if path.exists() {
        bail!("{}: not a model folder, a run, an .onnx, .ort or .safetensors file", path.display());
    } else {
        bail!("{}: no such file or folder", path.display());
    };
    let mut text = Vec::new();
    lines(&found, 0, &mut text);
    output::result(&text.join("\n"))?;
    Ok(found)
}

/// A line for each value, those of an object below its name; what is null or empty is left out, and what stands beside in
/// words. Texts from files are made harmless.
fn lines(object: &Value, depth: usize, text: &mut Vec<String>) {
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    let told = |(key, value): &(&String, &Value)| !is_empty(value) && (*key != "prediction" || depth > 0);
    for (key, value) in object.as_object().into_iter().flatten().filter(told) {
        let key = format!("{:indent$}{}", "", printable(key), indent = 2 * depth);
        let shown =
            |value: &Value| printable(&value.as_str().map_or_else(|| value.to_string(), String::from)).into_owned();
        match value {
            Value::Null => {}
            Value::Object(_) => {
                text.push(key);
                lines(value, depth + 1, text);
            }
            Value::Array(values) => {
                text.push(format!("{key:<24} {}", listed(&values.iter().map(shown).collect::<Vec<_>>())));
            }
            value => text.push(format!("{key:<24} {}", shown(value))),
        }
    }
}

fn model(path: &Path) -> Result<Value> {
    let folder = ModelFolder::load(path, &Device::Cpu)?;
    let levels = folder.scheduler.levels()?;
    let [channels, height, width] = folder.sample_shape()?;
    let mut network = json!({ "class": folder.config.class() });
    for (key, value) in folder.config.described()?.as_object().into_iter().flatten() {
        network[key] = value.clone();
    }
    let dtypes: std::collections::BTreeSet<String> =
        folder.weights.iter().map(|(_, t)| format!("{:?}", t.dtype())).collect();
    Ok(json!({
        "kind": folder.about.kind,
        "size": [height, width],
        "channels": channels,
        "classes": folder.classes(),
        "parameters": folder.weights.n_parameters(),
        "dtype": dtypes,
        "scheduler": folder.scheduler.class_name(),
        "prediction": format!("{:?}", folder.scheduler.prediction()),
        "predicts": folder.scheduler.prediction().to_string(),
        "sigma_range": [levels.sigma_min(), levels.sigma_max()],
        "sigma": folder.about.sigma,
        "steps": folder.about.sigmas(),
        "data": folder.about.data,
        "made_by": made_by(&folder),
        "network": network,
        "parts": folder.parts.iter().map(|(name, part)| (name.clone(), json!(part.class))).collect::<serde_json::Map<_, _>>(),
        "run": folder.about.run,
    }))
}

/// The program that wrote a folder, where it says so.
fn made_by(folder: &ModelFolder) -> Option<String> {
    if !folder.about.version.is_empty() {
        return Some(format!("dmd {}", folder.about.version));
    }
    let scheduler = folder.scheduler.json()["_diffusers_version"].as_str();
    scheduler.map(|version| format!("diffusers {version}"))
}

fn training_run(path: &Path) -> Result<Value> {
    let file = path.join("config.toml");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let config: toml::Table = toml::from_str(&text).with_context(|| file.display().to_string())?;
    let metrics = std::fs::read_to_string(path.join("metrics.jsonl")).unwrap_or_default();
    let last: Option<Value> = metrics.lines().last().and_then(|line| serde_json::from_str(line).ok());
    let checkpoints = std::fs::read_dir(path.join("checkpoints")).into_iter().flatten().flatten();
    let mut checkpoints: Vec<String> =
        checkpoints.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|n| n.starts_with("step-")).collect();
    checkpoints.sort();
    Ok(
        json!({ "kind": "run", "config": config, "last_metrics": last, "checkpoints": checkpoints, "generator": path.join("generator").is_dir() }),
    )
}

fn tensors(path: &Path) -> Result<Value> {
    let weights = Weights::load(path, &Device::Cpu)?;
    let list: serde_json::Map<String, Value> =
        weights.iter().map(|(name, t)| (name.to_string(), json!(format!("{:?} {:?}", t.dims(), t.dtype())))).collect();
    Ok(
        json!({ "kind": "tensors", "parameters": weights.n_parameters(), "metadata": read_metadata(path)?, "tensors": list }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_nested_is_indented_what_is_long_is_cut_and_names_command_no_terminal() {
        let classes: Vec<String> = (0..1000).map(|i| format!("c{i}")).collect();
        let found = json!({ "kind": "run", "none": null, "config": { "steps": 3, "gan": { "r1": 0.5 } }, "classes": classes, "a\u{1b}[2J": "b\nc" });
        let mut text = Vec::new();
        lines(&found, 0, &mut text);
        text.sort();
        let line = |key: &str, value: &str| format!("{key:<24} {value}");
        let mut expected = vec![
            line("kind", "run"),
            "config".into(),
            line("  steps", "3"),
            "  gan".into(),
            line("    r1", "0.5"),
            line("classes", "c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 990 more"),
            line("a\\u{1b}[2J", "b\\nc"),
        ];
        expected.sort();
        assert_eq!(text, expected);
    }
}
