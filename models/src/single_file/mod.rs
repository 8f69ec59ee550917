//! A whole model in one safetensors file, in the layout of its first authors, as Stable Diffusion 1.x, 2.x and XL are
//! downloaded and shared; to a diffusers folder and back. Kinds are told apart by the names of their tensors.

mod configs;
mod names;

use crate::encoders::clip_vocabulary;
use crate::folder::{WEIGHTS, copy_folder, json, plain_names, replace_dir, weights_file, with_suffix};
use crate::{Error, ModelFolder, Result, Weights};
use candle_core::{Device, Tensor};
use configs::{DecoderPlan, UNetPlan};
use names::{JOINED, Renaming};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Which family a file is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stable Diffusion 1.x: CLIP's text encoder.
    Sd1,
    /// 2.x: OpenCLIP's, without its last block.
    Sd2,
    /// XL: both.
    Xl,
}

/// What a folder was made of, and what could not be read off the file.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The family.
    pub kind: Kind,
    /// What the network predicts, by diffusers' name: `epsilon` or `v_prediction`.
    pub prediction: String,
    /// What a person should know of it.
    pub said: Vec<String>,
}

/// How a file is made a folder of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// A diffusers folder of the same architecture: its configs, its tokenizers and its scheduler are taken, and parts that
    /// the file lacks.
    pub like: Option<&'a Path>,
    /// What the network predicts, by diffusers' name, where the file does not say.
    pub prediction: Option<&'a str>,
}

const UNET: &str = "model.diffusion_model.";
const DECODER: &str = "first_stage_model.";
/// Where the text encoders lie, first and second; OpenCLIP's are behind `model.`.
const CLIP: [&str; 2] = ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer."];
const OPEN_CLIP: [&str; 2] = ["cond_stage_model.model.", "conditioner.embedders.1.model."];
const LAYER_WEIGHTS: &str = "model";
/// Tokens of a prompt, framed.
const CLIP_LENGTH: usize = 77;

impl Kind {
    /// Its name among people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Sd1 => "Stable Diffusion 1",
            Kind::Sd2 => "Stable Diffusion 2",
            Kind::Xl => "Stable Diffusion XL",
        }
    }

    fn of(weights: &Weights) -> Result<Self> {
        let any = |prefix: &str| weights.names().any(|name| name.starts_with(prefix));
        let refuse = |message: &str| Err(Error::Config(message.into()));
        if !any(UNET) {
            return match any("down_blocks.") {
                true => refuse(
                    "holds a network by diffusers' names alone: put it into a model folder as unet/diffusion_pytorch_model.safetensors",
                ),
                false => refuse("is no whole model in one file: it has no tensor model.diffusion_model.…"),
            };
        }
        match (any("conditioner."), any("conditioner.embedders.0.model."), any(OPEN_CLIP[0])) {
            (true, true, _) => refuse("is the refiner of SDXL, which changes pictures and makes none"),
            (true, false, _) => Ok(Kind::Xl),
            (false, _, true) => Ok(Kind::Sd2),
            (false, ..) if weights.get(&format!("{UNET}label_emb.0.0.weight")).is_some() => Ok(Kind::Xl),
            _ => Ok(Kind::Sd1),
        }
    }

    /// Of each text encoder, where it lies in a file, and whether it is OpenCLIP's.
    fn text_encoders(self) -> &'static [(&'static str, bool)] {
        match self {
            Kind::Sd1 => &[(CLIP[0], false)],
            Kind::Sd2 => &[(OPEN_CLIP[0], true)],
            Kind::Xl => &[(CLIP[1], false), (OPEN_CLIP[1], true)],
        }
    }
}

/// Makes a diffusers folder of a file. Tensors keep their dtype. Nothing is at `out` before all of it is there; what was
/// there is replaced.
pub fn unpack(file: &Path, options: Options, out: &Path) -> Result<Unpacked> {
    let weights = Weights::load(file, &Device::Cpu)?;
    let aside = with_suffix(out, ".partial");
    _ = fs::remove_dir_all(&aside);
    let made = write_folder(weights, options, &aside).map_err(|e| match e {
        Error::Config(message) => Error::file(file, message),
        other => other,
    });
    let made = made.and_then(|made| {
        // Every tensor that is missing, left over or of a wrong shape.
        let folder = ModelFolder::load(&aside, &Device::Cpu)?;
        folder.decoder(&Device::Cpu)?;
        folder.text(&Device::Cpu, 1)?;
        drop(folder);
        replace_dir(&aside, out)?;
        Ok(made)
    });
    made.inspect_err(|_| _ = fs::remove_dir_all(&aside))
}

fn write_folder(mut weights: Weights, options: Options, out: &Path) -> Result<Unpacked> {
    let kind = Kind::of(&weights)?;
    let mut said = Vec::new();
    if weights.names().any(|name| name.starts_with("model_ema.")) {
        said.push("it holds averaged weights too (model_ema), which are not taken".into());
    }
    let v_prediction = weights.get("v_pred").is_some();
    let part = |name: &str| -> Result<std::path::PathBuf> {
        let path = out.join(name);
        fs::create_dir_all(&path).map_err(Error::io(&path))?;
        Ok(path)
    };
    let text = |path: &Path, value: &Value| crate::write_whole(path, format!("{value:#}\n").as_bytes());
    // The config of a part: that of the folder to be like, or what the tensors say.
    let config = |name: &str, told: Value| match options.like {
        Some(like) => json::read(&like.join(name).join("config.json")),
        None => Ok(told),
    };

    let network = weights.take_prefixed(UNET);
    let plan = UNetPlan::of(&network)?;
    let prediction = match (options.prediction, kind) {
        (Some(prediction), _) => prediction.to_string(),
        (None, _) if v_prediction => "v_prediction".into(),
        (None, Kind::Sd2) if options.like.is_none() => {
            said.push("it does not say what its network predicts: v is taken, as in Stable Diffusion 2 at 768 pixels; its base models predict epsilon (--prediction epsilon)".into());
            "v_prediction".into()
        }
        _ => "epsilon".into(),
    };
    let sample_size = match (kind, prediction.as_str()) {
        (Kind::Xl, _) => 128,
        (Kind::Sd2, "v_prediction") => 96,
        _ => 64,
    };
    let path = part("unet")?;
    text(&path.join("config.json"), &config("unet", plan.config(&network, kind, sample_size)?)?)?;
    let network = renamed(network, &names::unet(plan.layers, &plan.attends).to_diffusers())?;
    save(&network, &path.join(format!("{WEIGHTS}.safetensors")))?;
    drop(network);

    let mut index = json!({
        "_class_name": if kind == Kind::Xl { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" },
        "_diffusers_version": "0.42.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    match kind {
        Kind::Xl => index["force_zeros_for_empty_prompt"] = json!(true),
        _ => {
            index["safety_checker"] = json!([null, null]);
            index["feature_extractor"] = json!([null, null]);
        }
    }

    let path = part("vae")?;
    let decoder = weights.take_prefixed(DECODER);
    let has_decoder = decoder.names().next().is_some();
    match (has_decoder, options.like) {
        (true, _) => {
            let plan = DecoderPlan::of(&decoder)?;
            text(&path.join("config.json"), &config("vae", plan.config(&decoder, kind, sample_size * 8)?)?)?;
            let decoder = renamed(decoder, &names::autoencoder(plan.levels, plan.layers).to_diffusers())?;
            // Attention is stored as convolutions of one pixel.
            let decoder =
                decoder.map_named(|name, tensor| match name.contains(".attentions.") && tensor.rank() == 4 {
                    true => tensor.squeeze(3)?.squeeze(2),
                    false => Ok(tensor.clone()),
                })?;
            save(&decoder, &path.join(format!("{WEIGHTS}.safetensors")))?;
        }
        (false, Some(like)) => copy_folder(&like.join("vae"), &path)?,
        (false, None) => return Err(lacks("autoencoder", DECODER)),
    }

    for (i, (prefix, open)) in kind.text_encoders().iter().enumerate() {
        let suffix = if i == 0 { "" } else { "_2" };
        let (name, tokenizer) = (format!("text_encoder{suffix}"), format!("tokenizer{suffix}"));
        let path = part(&name)?;
        let encoder = weights.take_prefixed(prefix);
        let has_encoder = encoder.names().next().is_some();
        let class = match (has_encoder, options.like) {
            (true, _) => {
                let encoder = if *open { from_open_clip(encoder, kind)? } else { without(encoder, "position_ids") };
                let config = config(&name, configs::clip(&encoder, *open)?)?;
                text(&path.join("config.json"), &config)?;
                save(&encoder, &path.join(format!("{LAYER_WEIGHTS}.safetensors")))?;
                config
            }
            (false, Some(like)) => {
                copy_folder(&like.join(&name), &path)?;
                json::read(&path.join("config.json"))?
            }
            (false, None) => return Err(lacks("text encoder", prefix)),
        };
        index[&name] = json!(["transformers", class["architectures"][0].as_str().unwrap_or("CLIPTextModel")]);
        index[&tokenizer] = json!(["transformers", "CLIPTokenizer"]);
        let path = part(&tokenizer)?;
        match options.like {
            Some(like) => copy_folder(&like.join(&tokenizer), &path)?,
            None => clip_vocabulary::write(&path, &clip_vocabulary::clip(), CLIP_LENGTH, open.then_some("!"))?,
        }
    }

    let path = part("scheduler")?.join("scheduler_config.json");
    let scheduler = match options.like {
        Some(like) => {
            let mut scheduler = json::read(&like.join("scheduler/scheduler_config.json"))?;
            if options.prediction.is_some() || v_prediction {
                scheduler["prediction_type"] = json!(prediction);
            }
            scheduler
        }
        None => configs::scheduler(kind, &prediction),
    };
    text(&path, &scheduler)?;
    let prediction = scheduler["prediction_type"].as_str().unwrap_or("epsilon").to_string();
    index["scheduler"] = json!(["diffusers", scheduler["_class_name"]]);
    text(&out.join("model_index.json"), &index)?;
    Ok(Unpacked { kind, prediction, said })
}

/// Makes one file of a folder of Stable Diffusion 1, 2 or XL. Tensors keep their dtype. What was at `out` is replaced.
pub fn pack(folder: &Path, out: &Path) -> Result<Kind> {
    let read = |part: &str, stem: &str| -> Result<(Value, Weights)> {
        let path = folder.join(part);
        Ok((json::read(&path.join("config.json"))?, Weights::load(&weights_file(&path, stem)?, &Device::Cpu)?))
    };
    let in_folder = |error: Error| Error::file(folder, error);
    let (_, first) = read("text_encoder", LAYER_WEIGHTS)?;
    let open = json::read(&folder.join("text_encoder/config.json"))?["hidden_act"] == "gelu";
    let kind = match folder.join("text_encoder_2").is_dir() {
        true => Kind::Xl,
        false if open => Kind::Sd2,
        false => Kind::Sd1,
    };
    let mut all = Weights::default();

    let (config, network) = read("unet", WEIGHTS)?;
    let refuse =
        |what: &str| in_folder(Error::Config(format!("its {what}, which the layout of one file has no place for")));
    if config["_class_name"] != "UNet2DConditionModel" {
        return Err(refuse("network is no UNet2DConditionModel"));
    }
    let layers =
        config["layers_per_block"].as_u64().ok_or_else(|| refuse("levels have different numbers of layers"))?;
    let types = config["down_block_types"].as_array().cloned().unwrap_or_default();
    let attends: Vec<bool> = types.iter().map(|kind| kind == "CrossAttnDownBlock2D").collect();
    let names = names::unet(layers as usize, &attends).to_original();
    all.extend(UNET, renamed(network, &names).map_err(in_folder)?);

    let (config, decoder) = read("vae", WEIGHTS)?;
    if config["_class_name"] != "AutoencoderKL" {
        return Err(refuse("decoder is no AutoencoderKL"));
    }
    let levels = config["block_out_channels"].as_array().map_or(0, Vec::len);
    let layers = config["layers_per_block"].as_u64().unwrap_or(1) as usize;
    let decoder = plain_names(decoder, "decoder.conv_in.weight", folder).map_err(in_folder)?;
    let decoder = decoder.map_named(|name, tensor| match name.contains(".attentions.") && tensor.rank() == 2 {
        true => tensor.unsqueeze(2)?.unsqueeze(3),
        false => Ok(tensor.clone()),
    })?;
    let names = names::autoencoder(levels, layers).to_original();
    all.extend(DECODER, renamed(decoder, &names).map_err(in_folder)?);

    let second = match kind {
        Kind::Xl => Some(read("text_encoder_2", LAYER_WEIGHTS)?.1),
        _ => None,
    };
    for ((prefix, open), encoder) in kind.text_encoders().iter().zip([first].into_iter().chain(second)) {
        let encoder = with_text_model(without(encoder, "position_ids"));
        all.extend(prefix, if *open { to_open_clip(encoder).map_err(in_folder)? } else { encoder });
    }
    all.save(out, &BTreeMap::from([("format".to_string(), "pt".to_string())]))?;
    Ok(kind)
}

fn lacks(what: &str, prefix: &str) -> Error {
    Error::Config(format!(
        "has no {what} (tensors {prefix}…): --like FOLDER takes what is missing from a diffusers folder of the same architecture"
    ))
}

/// The same tensors by other names; one without another name is named.
fn renamed(weights: Weights, names: &Renaming) -> Result<Weights> {
    let mut other = Weights::default();
    for (name, tensor) in weights.iter() {
        let new = names.of(name).ok_or_else(|| {
            Error::Config(format!(
                "tensor \"{name}\" has no name in the other layout: the model is of another architecture"
            ))
        })?;
        other.insert(new, tensor.clone());
    }
    Ok(other)
}

fn without(weights: Weights, ending: &str) -> Weights {
    let mut kept = Weights::default();
    weights
        .iter()
        .filter(|(name, _)| !name.ends_with(ending))
        .for_each(|(name, tensor)| kept.insert(name, tensor.clone()));
    kept
}

/// As transformers 4 names them: version 5 leaves the prefix out.
fn with_text_model(weights: Weights) -> Weights {
    let mut named = Weights::default();
    for (name, tensor) in weights.iter() {
        let bare = !name.starts_with("text_model.") && !name.starts_with("text_projection.");
        named.insert(if bare { format!("text_model.{name}") } else { name.to_string() }, tensor.clone());
    }
    named
}

/// Blocks of Stable Diffusion 2's text encoder that are of use.
const SD2_BLOCKS: usize = 23;

/// OpenCLIP's tensors by transformers' names. Stable Diffusion 2 reads the states before the last block and projects
/// nothing, so that neither is of use to it.
fn from_open_clip(weights: Weights, kind: Kind) -> Result<Weights> {
    let blocks = (0..).take_while(|i| weights.get(&format!("transformer.resblocks.{i}.ln_1.weight")).is_some()).count();
    let blocks = if kind == Kind::Sd2 { blocks.min(SD2_BLOCKS) } else { blocks };
    let names = names::open_clip(blocks).to_diffusers();
    let mut found = Weights::default();
    for (name, tensor) in weights.iter() {
        let of_block = name.strip_prefix("transformer.resblocks.");
        let block = of_block.and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
        if block.is_some_and(|block| block >= blocks) || ["logit_scale", "attn_mask"].contains(&name) {
            continue;
        }
        if name == "text_projection" {
            if kind == Kind::Xl {
                found.insert("text_projection.weight", tensor.t()?.contiguous()?);
            }
        } else if let Some((block, (_, kind))) = block.zip(name.split_once(".attn.in_proj_")) {
            for (part, joined) in tensor.chunk(3, 0)?.into_iter().zip(JOINED) {
                let layer = format!("text_model.encoder.layers.{block}.self_attn.{joined}.{kind}");
                found.insert(layer, part.contiguous()?);
            }
        } else {
            let other = names.of(name);
            let other =
                other.ok_or_else(|| Error::Config(format!("tensor \"{name}\" is none of OpenCLIP's text encoder")))?;
            found.insert(other, tensor.clone());
        }
    }
    Ok(found)
}

fn to_open_clip(weights: Weights) -> Result<Weights> {
    let layer = |i: usize| format!("text_model.encoder.layers.{i}");
    let blocks = (0..).take_while(|i| weights.get(&format!("{}.layer_norm1.weight", layer(*i))).is_some()).count();
    let mut rest = Weights::default();
    let mut joined: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    for (name, tensor) in weights.iter() {
        match name {
            "text_projection.weight" => {}
            _ if JOINED.iter().any(|part| name.contains(&format!(".{part}."))) => {}
            _ => rest.insert(name, tensor.clone()),
        }
    }
    for block in 0..blocks {
        for kind in ["weight", "bias"] {
            for part in JOINED {
                let name = format!("{}.self_attn.{part}.{kind}", layer(block));
                let tensor = weights.get(&name).ok_or_else(|| Error::Config(format!("has no tensor \"{name}\"")))?;
                let whole = format!("transformer.resblocks.{block}.attn.in_proj_{kind}");
                joined.entry(whole).or_default().push(tensor.clone());
            }
        }
    }
    let mut found = renamed(rest, &names::open_clip(blocks).to_original())?;
    for (name, parts) in joined {
        found.insert(name, Tensor::cat(&parts, 0)?);
    }
    if let Some(projection) = weights.get("text_projection.weight") {
        found.insert("text_projection", projection.t()?.contiguous()?);
    }
    Ok(found)
}

fn save(weights: &Weights, path: &Path) -> Result<()> {
    if let Some((name, tensor)) = weights.iter().find(|(_, tensor)| !tensor.dtype().is_float()) {
        return Err(Error::Config(format!("tensor \"{name}\" is {:?}, expected F32, F16 or BF16", tensor.dtype())));
    }
    weights.save(path, &BTreeMap::from([("format".to_string(), "pt".to_string())]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NetworkConfig;

    /// Networks of published shapes at reduced width: what their tensors say is what their configs say, but for the heads,
    /// whose number goes by the width of published ones.
    #[test]
    fn configs_are_told_by_tensors() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/unet2d_condition");
        for (name, kind) in [("sd15", Kind::Sd1), ("sd21", Kind::Sd2), ("sdxl", Kind::Xl)] {
            let config = json::read(&fixtures.join(name).join("config.json")).unwrap();
            let ours = NetworkConfig::from_value(&config, None).unwrap();
            let draw = &mut |_: &str, n: usize| vec![0.0; n];
            let weights = ours.init(draw).unwrap();
            let types = config["down_block_types"].as_array().unwrap();
            let attends: Vec<bool> = types.iter().map(|kind| kind == "CrossAttnDownBlock2D").collect();
            let layers = config["layers_per_block"].as_u64().unwrap() as usize;
            let original = renamed(weights, &names::unet(layers, &attends).to_original()).unwrap();
            let plan = UNetPlan::of(&original).unwrap();
            assert_eq!((plan.layers, &plan.attends), (layers, &attends), "{name}");
            let told = plan.config(&original, kind, 64).unwrap();
            for key in [
                "block_out_channels",
                "down_block_types",
                "up_block_types",
                "layers_per_block",
                "cross_attention_dim",
                "in_channels",
                "out_channels",
                "use_linear_projection",
                "transformer_layers_per_block",
                "addition_embed_type",
                "projection_class_embeddings_input_dim",
            ] {
                let all = |told: &Value| told.as_array().cloned().unwrap_or(vec![told.clone(); attends.len()]);
                assert_eq!(all(&told[key]), all(&config[key]), "{name}: {key}");
            }
        }
    }
}
