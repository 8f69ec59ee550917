//! Where the parts of a model lie: in folders of their own as pipelines are saved, or in the root as the oldest models on
//! the hub have them. Parts that make it another kind of model are refused, whatever they are called.

use super::json;
use crate::weights::missing;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The stem of a network's weights.
pub(super) const WEIGHTS: &str = "diffusion_pytorch_model";

/// Where things lie.
pub(super) struct Layout {
    /// The folder of the network's `config.json` and weights.
    pub unet: PathBuf,
    /// `scheduler_config.json`.
    pub scheduler: PathBuf,
    /// The class that the index gives the scheduler, which is the one that diffusers loads.
    pub scheduler_class: Option<String>,
}

impl Layout {
    /// Finds the parts of a pixel model, or says what the folder is instead.
    pub fn of(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            let what = if path.exists() { "is a file, expected a model folder" } else { "no such folder" };
            return Err(Error::file(path, what));
        }
        let parts = parts(path)?;
        for (name, part) in &parts {
            if let Some(reason) = part.why_not(name) {
                return Err(Error::file(
                    path,
                    format!(
                        "{}: only pixel-space UNet2DModel pipelines are supported, not latent or text-conditional ones",
                        part.said(name, reason)
                    ),
                ));
            }
        }
        let scheduler_class = parts.get("scheduler").map(|part| part.class.clone());
        Ok(Layout { unet: unet(path)?, scheduler: scheduler(path)?, scheduler_class })
    }
}

/// A part of a pipeline: what `model_index.json` or its own config calls it.
#[derive(Default)]
struct Part {
    class: String,
    /// Keys of its `config.json`.
    keys: Vec<String>,
    has_folder: bool,
}

impl Part {
    /// Why a model with this part is none that is taken; none for a part that does not change what the network makes.
    fn why_not(&self, name: &str) -> Option<&'static str> {
        const LATENT: &str = "which decodes latents";
        let (name, class) = (name.to_ascii_lowercase(), self.class.to_ascii_lowercase());
        let named = |words: &[&str]| words.iter().any(|word| name.contains(word) || class.contains(word));
        let has = |keys: &[&str]| self.keys.iter().any(|key| keys.contains(&key.as_str()));
        if named(&["vae", "vqgan", "vqmodel", "movq", "autoencoder", "taesd", "first_stage"])
            || name == "decoder"
            || has(&["latent_channels", "num_vq_embeddings", "vq_embed_dim", "decoder_block_out_channels"])
        {
            return Some(LATENT);
        }
        if named(&["featureextractor", "feature_extractor", "imageprocessor", "image_processor", "safety", "watermark"])
        {
            return None;
        }
        let of_text = ["tokenizer", "text", "t5", "bert", "llama", "gemma", "qwen"];
        if ["tokenizer", "text_"].iter().any(|begin| name.starts_with(begin))
            || of_text.iter().any(|word| class.contains(word))
        {
            return Some("which reads text");
        }
        let known = ["unet2dmodel", ""].contains(&class.as_str()) || class.ends_with("scheduler");
        (!known || name == "transformer").then_some("another network than a UNet2DModel")
    }

    fn said(&self, name: &str, reason: &str) -> String {
        let class = if self.class.is_empty() { String::new() } else { format!(" ({})", self.class) };
        match self.has_folder {
            true => format!("has a {name}/ folder{class}, {reason}"),
            false => format!("model_index.json names a part {name}{class}, {reason}"),
        }
    }
}

/// All parts, by what the index says and by the configs of the folders.
fn parts(path: &Path) -> Result<BTreeMap<String, Part>> {
    let mut parts: BTreeMap<String, Part> = BTreeMap::new();
    let index_path = path.join("model_index.json");
    if index_path.exists() {
        let index = json::read(&index_path)?;
        let entries = index.as_object().ok_or_else(|| Error::file(&index_path, "not a JSON object"))?;
        // A part is [library, class], both null where it was left out; the rest are settings of the pipeline.
        for (name, entry) in entries.iter().filter(|(name, _)| !name.starts_with('_')) {
            if let Some([Value::String(_), Value::String(class)]) = entry.as_array().map(Vec::as_slice) {
                parts.insert(name.clone(), Part { class: class.clone(), ..Part::default() });
            }
        }
    }
    for entry in fs::read_dir(path).map_err(Error::io(path))?.flatten().filter(|entry| entry.path().is_dir()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let config = json::read(&entry.path().join("config.json")).unwrap_or_default();
        // A network of diffusers says its class, one of transformers its architectures.
        let class = [&config["_class_name"], &config["architectures"][0]].into_iter().find_map(Value::as_str);
        // The network's own folder is read later, with what there is to say of it. The averages beside it are no part.
        if ["unet", "unet_ema", "scheduler"].contains(&name.as_str()) {
            continue;
        }
        let part = parts.entry(name).or_default();
        part.has_folder = true;
        part.keys = config.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect();
        if let Some(class) = class.filter(|_| part.class.is_empty()) {
            part.class = class.to_string();
        }
    }
    // Its config says more of it.
    parts.remove("unet");
    Ok(parts)
}

/// The folder of the network.
fn unet(path: &Path) -> Result<PathBuf> {
    let inner = path.join("unet");
    if inner.is_dir() {
        return Ok(inner);
    }
    let averages = path.join("unet_ema");
    if averages.is_dir() && !path.join("config.json").exists() {
        log::warn!("{}: there is no unet/, so unet_ema/ is taken", path.display());
        return Ok(averages);
    }
    if path.join("config.json").exists() && scheduler_in(path).is_some() {
        return Ok(path.to_path_buf());
    }
    let found = match path.join("config.json").exists() {
        true => " (a bare UNet: put it into a folder unet/ beside a folder scheduler/)",
        false => "",
    };
    let parent = whole_model_beside(path);
    Err(Error::file(path, format!("not a diffusers folder: it has no unet/{}", parent.as_deref().unwrap_or(found))))
}

/// The scheduler's file, or where one should be.
fn scheduler(path: &Path) -> Result<PathBuf> {
    let expected = path.join("scheduler/scheduler_config.json");
    match scheduler_in(path) {
        Some(found) => Ok(found),
        None if path.join("scheduler").is_dir() => Ok(expected),
        None => {
            let beside = whole_model_beside(path).unwrap_or_default();
            Err(Error::file(
                path,
                format!(
                    "has no scheduler/scheduler_config.json, which says what noise levels the network knows{beside}"
                ),
            ))
        }
    }
}

fn scheduler_in(path: &Path) -> Option<PathBuf> {
    let candidates = ["scheduler/scheduler_config.json", "scheduler_config.json"].map(|name| path.join(name));
    candidates.into_iter().find(|path| path.exists())
}

/// Where the whole model is, for a checkpoint of a training script, or for a network that was taken out of its folder.
fn whole_model_beside(path: &Path) -> Option<String> {
    let of_training = ["optimizer.bin", "optimizer.pt", "scheduler.bin", "random_states_0.pkl", "scaler.pt"];
    let is_checkpoint = of_training.iter().any(|name| path.join(name).exists())
        || path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("checkpoint-"));
    let what = if is_checkpoint { " (a checkpoint of a training script)" } else { "" };
    let parent = fs::canonicalize(path).ok()?.parent()?.to_path_buf();
    if scheduler_in(&parent).is_some() {
        return Some(format!("{what}: the whole model is in {}", parent.display()));
    }
    is_checkpoint.then(|| {
        format!(
            "{what}: give the folder that the script saved its pipeline to, or put that one's scheduler/ beside unet/"
        )
    })
}

/// The weights of a network: those without a variant's name, else those of the only variant.
pub(super) fn weights_file(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(missing(folder))?.flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    for plain in [format!("{WEIGHTS}.safetensors"), format!("{WEIGHTS}.safetensors.index.json")] {
        if names.contains(&plain) {
            return Ok(folder.join(plain));
        }
    }
    let variants: Vec<(&str, &str)> = names.iter().filter_map(|name| Some((variant(name)?, name.as_str()))).collect();
    // The same weights in less precision; the one that keeps most.
    let precisions = ["fp32", "fp16", "bf16"];
    let taken = match variants[..] {
        [one] => Some(one),
        _ if variants.iter().all(|(variant, _)| precisions.contains(variant)) => {
            precisions.iter().find_map(|precision| variants.iter().find(|(variant, _)| variant == precision)).copied()
        }
        _ => None,
    };
    let Some((variant, name)) = taken else { return Err(Error::file(folder, no_weights(&names, &variants))) };
    if !precisions.contains(&variant) {
        log::warn!("{}: the weights are those of the variant \"{variant}\"", folder.display());
    }
    Ok(folder.join(name))
}

/// The variant in the name of a whole file or of an index of shards.
fn variant(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(WEIGHTS)?.strip_prefix('.')?;
    let variant = match rest.strip_prefix("safetensors.index.") {
        Some(rest) => rest.strip_suffix(".json")?,
        None => rest.strip_suffix(".safetensors").or_else(|| rest.strip_suffix(".safetensors.index.json"))?,
    };
    let is_shard =
        variant.split_once("-of-").is_some_and(|(_, n)| n.bytes().next().is_some_and(|b| b.is_ascii_digit()));
    (!variant.is_empty() && !is_shard).then_some(variant)
}

/// What to do about a folder without weights that can be taken.
fn no_weights(names: &[String], variants: &[(&str, &str)]) -> String {
    let plain = format!("{WEIGHTS}.safetensors");
    if !variants.is_empty() {
        let variants: Vec<&str> = variants.iter().map(|(_, name)| *name).collect();
        return format!(
            "has several variants and no {plain}: give that name to the one that is meant, of {}",
            variants.join(", ")
        );
    }
    let ends = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    let remedy = if let Some(shard) = names.iter().find(|name| name.contains("-of-") && name.ends_with(".safetensors"))
    {
        format!("; there is {shard}, a shard without its index {plain}.index.json")
    } else if let Some(other) = ends(&[".safetensors"]) {
        format!("; there is {other}: give it that name if these are the network's weights")
    } else if names.contains(&format!("{WEIGHTS}.bin")) {
        "; there is a pickled .bin, save it again with save_pretrained(…, safe_serialization=True)".to_string()
    } else if let Some(other) =
        ends(&[".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx", ".gguf"])
    {
        format!(
            "; there is {other}, which is not read here: load it in Python and save it with save_pretrained(…, safe_serialization=True)"
        )
    } else {
        String::new()
    };
    format!("has no {plain}{remedy}")
}
