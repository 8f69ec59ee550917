//! Where the parts of a model lie: in folders of their own as pipelines are saved, or in the root as the oldest models on
//! the hub have them. Parts that make it another kind of model are refused, whatever they are called.

use super::json;
use crate::encoders::TEXT_WEIGHTS;
use crate::weights::{missing, tensor_names, what_it_is};
use crate::{Error, Result, Weights};
use candle_core::Device;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The stem of a network's weights.
pub(crate) const WEIGHTS: &str = "diffusion_pytorch_model";

/// The pipeline whose index names the classes of its network, as `id2label`.
pub(super) const NAMES_CLASSES: &str = "DiTPipeline";

/// Names of the part that makes pictures of latents.
pub(crate) const DECODERS: [&str; 2] = ["vae", "vqvae"];

/// Names of text encoders and of their tokenizers.
pub(crate) const TEXT_ENCODERS: [[&str; 2]; 2] = [["text_encoder", "tokenizer"], ["text_encoder_2", "tokenizer_2"]];

/// Where things lie.
pub(super) struct Layout {
    /// The folder of the network's `config.json` and weights.
    pub network: PathBuf,
    /// The network's class where its own file names none.
    pub network_class: Option<String>,
    /// `scheduler_config.json`.
    pub scheduler: PathBuf,
    /// The class that the index gives the scheduler, which is the one that diffusers loads.
    pub scheduler_class: Option<String>,
    /// Parts beside the network and the scheduler: decoders, text encoders, tokenizers.
    pub parts: BTreeMap<String, Part>,
    /// What else the index says of the pipeline.
    pub settings: Map<String, Value>,
    /// Names that the index has for classes, by their number.
    pub classes: BTreeMap<usize, String>,
    /// What a person should know of how the parts were found.
    pub said: Vec<String>,
}

impl Layout {
    /// Finds the parts of a model, or says what the folder is instead.
    pub fn of(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            let what = if path.exists() { what_file(path) } else { "no such folder".into() };
            return Err(Error::file(path, what));
        }
        let index = index(path)?;
        let mut found = parts(path, &index)?;
        let mut said = Vec::new();
        // A UNet says its class itself, of all that it may be in `unet/`.
        let is_transformer = path.join("transformer").is_dir() && !path.join("unet").is_dir();
        let network_class = match is_transformer {
            true => found.remove("transformer").map(|part| part.class).filter(|class| !class.is_empty()),
            false => Some("UNet2DModel".into()),
        };
        let mut parts = BTreeMap::new();
        for (name, part) in found.iter() {
            if part.is_known(name) && part.has_folder {
                parts.insert(name.clone(), part.kept(path.join(name)));
            } else if is_transformer && name == DECODERS[0] {
                said.push(format!("has no {name}/: what the model makes are latents, and shown as they are"));
            } else if part.is_known(name) {
                return Err(Error::file(path, part.said(name, "which is not there")));
            } else if let Some(reason) = part.why_not(name) {
                return Err(Error::file(
                    path,
                    format!(
                        "{}: supported are UNet2DModel, UNet2DConditionModel and DiTTransformer2DModel with decoders AutoencoderKL, AutoencoderTiny and VQModel in vae/ or vqvae/, and CLIP's text encoders",
                        part.said(name, reason)
                    ),
                ));
            } else if name == "safety_checker" && part.has_folder {
                said.push("its safety checker is not used: pictures are not judged".into());
            }
        }
        let network = if is_transformer { path.join("transformer") } else { unet(path, &mut said)? };
        let scheduler_class = found.remove("scheduler").map(|part| part.class);
        let is_setting = |name: &str, value: &Value| !name.starts_with('_') && !value.is_array() && name != "id2label";
        let settings = index.iter().filter(|(name, value)| is_setting(name, value));
        let settings = settings.map(|(name, value)| (name.clone(), value.clone())).collect();
        let classes = index.get("id2label").and_then(Value::as_object).into_iter().flatten();
        let classes = classes.filter_map(|(id, name)| Some((id.parse().ok()?, name.as_str()?.to_string())));
        Ok(Layout {
            network,
            network_class,
            scheduler: scheduler(path)?,
            scheduler_class,
            parts,
            classes: classes.collect(),
            settings,
            said,
        })
    }
}

/// What a file in the place of a model folder is, and how it becomes one.
fn what_file(path: &Path) -> String {
    const CONVERT: &str =
        "in diffusers, StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes a folder of it";
    let start = fs::File::open(path).and_then(|file| {
        use std::io::Read;
        let mut start = Vec::new();
        file.take(512).read_to_end(&mut start).map(|_| start)
    });
    let pickle = |what: &String| what.contains("pickle");
    if let Some(what) = start.ok().and_then(|start| what_it_is(&start)).filter(pickle) {
        return format!("is a file, expected a model folder, and it is {what}; a whole checkpoint: {CONVERT}");
    }
    let names = tensor_names(path).unwrap_or_default();
    let any = |part: &str| names.iter().any(|name| name.contains(part));
    if any("lora_") || any(".lora") {
        return "is a LoRA, which changes a model and is none: in diffusers, load it into its model, fuse_lora() and save_pretrained(FOLDER)".into();
    }
    if any("model.diffusion_model.") {
        return format!(
            "is a whole model in one file, expected a folder of its parts: `dmd convert {} FOLDER` makes one of it",
            path.display()
        );
    }
    "is a file, expected a model folder".into()
}

/// A part of a pipeline that is kept as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The Python library that it is of.
    pub library: String,
    /// Its class there.
    pub class: String,
    /// The folder that it lies in.
    pub path: PathBuf,
}

impl Part {
    /// Its weights, in the file's own dtype, on the CPU; none where it has none, as a tokenizer.
    pub fn weights(&self) -> Result<Option<Weights>> {
        let has = |stem: &str| {
            let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
            entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{stem}.")))
        };
        let stem = [TEXT_WEIGHTS, WEIGHTS].into_iter().find(|stem| has(stem));
        stem.map(|stem| Weights::load(&weights_file(&self.path, stem)?, &Device::Cpu)).transpose()
    }

    /// Puts its files into this folder, by a second name where the disk can, for they may be many gigabytes.
    pub(super) fn copy_to(&self, path: &Path) -> Result<()> {
        copy_folder(&self.path, path)
    }
}

pub(crate) fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io(to))?;
    for entry in fs::read_dir(from).map_err(missing(from))? {
        let entry = entry.map_err(Error::io(from))?;
        // Links of a download are followed.
        let source = fs::canonicalize(entry.path()).map_err(missing(&entry.path()))?;
        let target = to.join(entry.file_name());
        if source.is_dir() {
            copy_folder(&source, &target)?;
        } else if fs::canonicalize(&target).ok().as_ref() != Some(&source) {
            _ = fs::remove_file(&target);
            fs::hard_link(&source, &target)
                .or_else(|_| fs::copy(&source, &target).map(drop))
                .map_err(Error::io(&target))?;
        }
    }
    Ok(())
}

/// A part of a pipeline: what `model_index.json` or its own config calls it.
#[derive(Default)]
struct Found {
    library: String,
    class: String,
    /// Keys of its `config.json`.
    keys: Vec<String>,
    has_folder: bool,
}

impl Found {
    fn kept(&self, path: PathBuf) -> Part {
        let library = if self.library.is_empty() { "diffusers" } else { &self.library };
        Part { library: library.into(), class: self.class.clone(), path }
    }

    /// Whether it is a decoder, a text encoder or a tokenizer of a kind that is read.
    fn is_known(&self, name: &str) -> bool {
        let classes: &[&str] = match name {
            _ if DECODERS.contains(&name) => &["AutoencoderKL", "AutoencoderTiny", "VQModel"],
            _ if TEXT_ENCODERS.iter().any(|[model, _]| *model == name) => {
                &["CLIPTextModel", "CLIPTextModelWithProjection"]
            }
            _ if TEXT_ENCODERS.iter().any(|[_, tokenizer]| *tokenizer == name) => {
                &["CLIPTokenizer", "CLIPTokenizerFast", ""]
            }
            _ => &[],
        };
        classes.contains(&self.class.as_str())
    }

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

/// What `model_index.json` says, where there is one.
fn index(path: &Path) -> Result<Map<String, Value>> {
    let path = path.join("model_index.json");
    if !path.exists() {
        return Ok(Map::new());
    }
    match json::read(&path)? {
        Value::Object(index) => Ok(index),
        _ => Err(Error::file(&path, "not a JSON object")),
    }
}

/// All parts, by what the index says and by the configs of the folders.
fn parts(path: &Path, index: &Map<String, Value>) -> Result<BTreeMap<String, Found>> {
    let mut parts: BTreeMap<String, Found> = BTreeMap::new();
    // A part is [library, class], both null where it was left out; the rest are settings of the pipeline.
    for (name, entry) in index.iter().filter(|(name, _)| !name.starts_with('_')) {
        if let Some([Value::String(library), Value::String(class)]) = entry.as_array().map(Vec::as_slice) {
            let (library, class) = (library.clone(), class.clone());
            parts.insert(name.clone(), Found { library, class, ..Found::default() });
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

/// The folder of a network that is no transformer.
fn unet(path: &Path, said: &mut Vec<String>) -> Result<PathBuf> {
    let inner = path.join("unet");
    if inner.is_dir() {
        return Ok(inner);
    }
    let averages = path.join("unet_ema");
    if averages.is_dir() && !path.join("config.json").exists() {
        said.push("there is no unet/, so unet_ema/ is taken".into());
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
    Err(Error::file(
        path,
        format!("not a diffusers folder: it has no unet/ or transformer/{}", parent.as_deref().unwrap_or(found)),
    ))
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
pub(crate) fn weights_file(folder: &Path, stem: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(missing(folder))?.flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    for plain in [format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json")] {
        if names.contains(&plain) {
            return Ok(folder.join(plain));
        }
    }
    let variants: Vec<(&str, &str)> =
        names.iter().filter_map(|name| Some((variant(name, stem)?, name.as_str()))).collect();
    // The same weights in less precision; the one that keeps most.
    let precisions = ["fp32", "fp16", "bf16"];
    let taken = match variants[..] {
        [one] => Some(one),
        _ if variants.iter().all(|(variant, _)| precisions.contains(variant)) => {
            precisions.iter().find_map(|precision| variants.iter().find(|(variant, _)| variant == precision)).copied()
        }
        _ => None,
    };
    let Some((variant, name)) = taken else { return Err(Error::file(folder, no_weights(&names, &variants, stem))) };
    if !precisions.contains(&variant) {
        log::warn!("{}: the weights are those of the variant \"{variant}\"", folder.display());
    }
    Ok(folder.join(name))
}

/// The variant in the name of a whole file or of an index of shards.
fn variant<'a>(name: &'a str, stem: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(stem)?.strip_prefix('.')?;
    let variant = match rest.strip_prefix("safetensors.index.") {
        Some(rest) => rest.strip_suffix(".json")?,
        None => rest.strip_suffix(".safetensors").or_else(|| rest.strip_suffix(".safetensors.index.json"))?,
    };
    let is_shard =
        variant.split_once("-of-").is_some_and(|(_, n)| n.bytes().next().is_some_and(|b| b.is_ascii_digit()));
    (!variant.is_empty() && !is_shard).then_some(variant)
}

/// What to do about a folder without weights that can be taken.
fn no_weights(names: &[String], variants: &[(&str, &str)], stem: &str) -> String {
    let plain = format!("{stem}.safetensors");
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
    } else if names.contains(&format!("{stem}.bin")) {
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
