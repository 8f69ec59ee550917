//! By what a run, a teacher and pairs know again what they began with, wherever it lies: SHA-256 of its content, and of
//! JSON with sorted keys and without what is at its default, so that a setting of a later version disowns nothing.

mod legacy;

use crate::data::Pictures;
use anyhow::{Context, Result};
use candle_core::{DType, Device};
use dmd_models::{ModelFolder, NetworkConfig};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

/// What something is known by, now and in what earlier versions wrote.
pub struct Fingerprint {
    /// Written from now on.
    pub now: String,
    /// None where what is known now cannot be told in the words of then.
    legacy: Option<String>,
}

impl Fingerprint {
    /// Whether this is what was written.
    pub fn is(&self, written: &str) -> bool {
        written == self.now || Some(written) == self.legacy.as_deref()
    }
}

/// A teacher's weights and what gives them their meaning.
pub fn teacher(teacher: &ModelFolder) -> Result<Fingerprint> {
    let weights = dmd_export::weights_sha256(&teacher.weights.to(DType::F32, &Device::Cpu)?)?;
    let known = json!({
        "weights": weights,
        teacher.config.part(): teacher.config.described()?,
        "scheduler": teacher.scheduler.json(),
    });
    Ok(Fingerprint { now: of_json(known), legacy: legacy::teacher(teacher, &weights) })
}

/// What reads prompts: the configs and weights of a model's text encoders, and their tokenizers.
pub fn text(model: &ModelFolder) -> Result<String> {
    parts(model, &["text_encoder", "tokenizer"])
}

/// What makes pictures of latents, and latents of pictures.
pub fn autoencoder(model: &ModelFolder) -> Result<String> {
    parts(model, &["vae", "vqvae"])
}

/// The configs and weights of the parts whose names begin so.
fn parts(model: &ModelFolder, names: &[&str]) -> Result<String> {
    let mut known = serde_json::Map::new();
    for (name, part) in model.parts.iter().filter(|(name, _)| names.iter().any(|begin| name.starts_with(begin))) {
        let files = std::fs::read_dir(&part.path).with_context(|| part.path.display().to_string())?;
        let mut files: Vec<_> = files.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        // How weights are cut into shards says nothing of them.
        let small = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            [".json", ".txt"].iter().any(|end| name.ends_with(end)) && !name.ends_with(".index.json")
        };
        files.retain(|path| small(path));
        for path in files {
            known.insert(format!("{name}/{}", path.file_name().unwrap_or_default().display()), json!(file(&path)?));
        }
        if let Some(weights) = part.weights()? {
            let weights = weights.to(DType::F32, &Device::Cpu)?;
            known.insert(name.clone(), json!(dmd_export::weights_sha256(&weights)?));
        }
    }
    Ok(of_json(Value::Object(known)))
}

/// Prompts, in their order.
pub fn prompts<'a>(texts: impl IntoIterator<Item = &'a String>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hex(hash)
}

/// What a teacher learns, and what learns it; `beside` has what else is known, in an object.
pub fn lesson(pictures: &Pictures, network: &NetworkConfig, beside: Value) -> Result<Fingerprint> {
    let mut known = json!({
        "pictures": self::pictures(pictures),
        "classes": pictures.classes,
        network.part(): network.described()?,
    });
    for (name, value) in beside.as_object().into_iter().flatten() {
        known[name] = value.clone();
    }
    Ok(Fingerprint { now: of_json(known), legacy: legacy::lesson(pictures, network) })
}

/// What an autoencoder learns, and its `config.json`.
pub fn of_autoencoder(pictures: &Pictures, config: &Value) -> String {
    of_json(json!({ "pictures": self::pictures(pictures), "autoencoder": config }))
}

/// Pictures with their labels, in their order.
pub fn pictures(pictures: &Pictures) -> String {
    let mut hash = Sha256::new();
    for size in [pictures.channels, pictures.height, pictures.width] {
        hash.update((size as u64).to_le_bytes());
    }
    hash.update(&pictures.pixels);
    pictures.labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
    hex(hash)
}

/// Numbers, whose lists are told apart by their order alone.
pub fn numbers(lists: &[&[f32]], labels: &[i64]) -> String {
    let mut hash = Sha256::new();
    for part in lists.iter().flat_map(|list| list.chunks(1 << 16)) {
        hash.update(part.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
    }
    labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
    hex(hash)
}

/// A file's bytes.
pub fn file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut open = || std::io::copy(&mut std::fs::File::open(path)?, &mut hash);
    open().with_context(|| path.display().to_string())?;
    Ok(hex(hash))
}

fn of_json(mut value: Value) -> String {
    value.sort_all_objects();
    hex(Sha256::new_with_prefix(value.to_string()))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_fields_changes_no_fingerprint() {
        let hash = |text: &str| of_json(serde_json::from_str(text).unwrap());
        assert_eq!(hash(r#"{ "a": { "c": 1, "d": 2 }, "b": 3 }"#), hash(r#"{ "b": 3, "a": { "d": 2, "c": 1 } }"#));
        assert_ne!(hash(r#"{ "a": 1, "b": 2 }"#), hash(r#"{ "a": 2, "b": 1 }"#));
    }

    /// By the program before fingerprints were of JSON, in the run that it left of this folder.
    #[test]
    fn a_teacher_is_known_by_what_earlier_versions_wrote() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures");
        for (name, written) in [("edm-tiny", EDM_TINY), ("ddpm-tiny", DDPM_TINY)] {
            let folder = ModelFolder::load(&fixtures.join(name), &Device::Cpu).unwrap();
            let found = teacher(&folder).unwrap();
            assert!(found.is(written), "{name}: {:?}", found.legacy);
            assert!(found.is(&found.now) && found.now != written);
        }
    }
    const EDM_TINY: &str = "f919e3be21340f8229c765bd0e6d27e4aca6369842f93b5bd747a0f57a552819";
    const DDPM_TINY: &str = "4ed3d7835aaf8c2634dab38dc8961886ce817a0c2c0d9688de660bb86ed39635";
}
