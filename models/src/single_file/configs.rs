//! What a single file does not say: the configs of its parts, told by the shapes of their tensors and by what all published
//! models of their kind have alike.

use super::Kind;
use crate::{Error, Result, Weights};
use serde_json::{Value, json};

/// How a UNet is made up, in the original names.
pub(super) struct UNetPlan {
    /// Resnets of a level.
    pub layers: usize,
    /// Whether a level has transformers, finest first.
    pub attends: Vec<bool>,
}

/// Height, width… of a tensor, by its original name.
fn dims<'a>(weights: &'a Weights, name: &str) -> Result<&'a [usize]> {
    match weights.get(name) {
        Some(tensor) if tensor.rank() > 0 => Ok(tensor.dims()),
        Some(_) => Err(Error::Config(format!("tensor \"{name}\" is a single number"))),
        None => Err(Error::Config(format!("has no tensor \"{name}\""))),
    }
}

/// A dimension of a tensor.
fn dim(weights: &Weights, name: &str, at: usize) -> Result<usize> {
    let dims = dims(weights, name)?;
    dims.get(at).copied().ok_or_else(|| Error::Config(format!("tensor \"{name}\" is {dims:?}")))
}

/// How many of these there are, counted from 0: each is known by the tensor that `name` gives.
fn count(weights: &Weights, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|i| weights.get(&name(*i)).is_some()).count()
}

impl UNetPlan {
    pub fn of(weights: &Weights) -> Result<Self> {
        let blocks = count(weights, |i| match i {
            0 => "input_blocks.0.0.weight".into(),
            _ if weights.get(&format!("input_blocks.{i}.0.op.weight")).is_some() => {
                format!("input_blocks.{i}.0.op.weight")
            }
            _ => format!("input_blocks.{i}.0.in_layers.0.weight"),
        });
        let downs = (0..blocks).filter(|i| weights.get(&format!("input_blocks.{i}.0.op.weight")).is_some()).count();
        let levels = downs + 1;
        if blocks <= levels || !(blocks - levels).is_multiple_of(levels) {
            return Err(Error::Config(format!(
                "its network has {blocks} input blocks and {downs} downsamplers, expected as many layers in every level"
            )));
        }
        let layers = (blocks - levels) / levels;
        let attends = (0..levels)
            .map(|level| weights.get(&format!("input_blocks.{}.1.proj_in.weight", 1 + level * (layers + 1))).is_some());
        Ok(UNetPlan { layers, attends: attends.collect() })
    }

    /// `config.json`. Heads are 8 in models whose projections are convolutions, and 64 wide in the others; the middle has
    /// as many transformer blocks as the last level is said to have.
    pub fn config(&self, weights: &Weights, kind: Kind, sample_size: usize) -> Result<Value> {
        let at = |level: usize| 1 + level * (self.layers + 1);
        let blocks = |place: &str| count(weights, |k| format!("{place}.transformer_blocks.{k}.norm1.weight"));
        let (mut channels, mut depths, mut cross, mut linear) = (Vec::new(), Vec::new(), None, false);
        let last = self.attends.len() - 1;
        for (level, attends) in self.attends.iter().enumerate() {
            channels.push(dim(weights, &format!("input_blocks.{}.0.out_layers.3.weight", at(level)), 0)?);
            let place = format!("input_blocks.{}.1", at(level));
            if *attends {
                linear = dims(weights, &format!("{place}.proj_in.weight"))?.len() == 2;
                cross = Some(dim(weights, &format!("{place}.transformer_blocks.0.attn2.to_k.weight"), 1)?);
            }
            depths.push(if level == last { blocks("middle_block.1").max(1) } else { blocks(&place).max(1) });
        }
        let types = |way: &str, attends: &bool| format!("{}{way}Block2D", if *attends { "CrossAttn" } else { "" });
        let heads = match linear {
            true => json!(channels.iter().map(|n| (n / 64).max(1)).collect::<Vec<_>>()),
            false => json!(8),
        };
        let mut config = json!({
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": "0.42.0",
            "sample_size": sample_size,
            "in_channels": dim(weights, "input_blocks.0.0.weight", 1)?,
            "out_channels": dim(weights, "out.2.weight", 0)?,
            "block_out_channels": channels,
            "layers_per_block": self.layers,
            "down_block_types": self.attends.iter().map(|a| types("Down", a)).collect::<Vec<_>>(),
            "up_block_types": self.attends.iter().rev().map(|a| types("Up", a)).collect::<Vec<_>>(),
            "cross_attention_dim": cross.ok_or_else(|| Error::Config("its network attends to no text".into()))?,
            "transformer_layers_per_block": depths,
            "attention_head_dim": heads,
            "use_linear_projection": linear,
        });
        if weights.get("label_emb.0.0.weight").is_some() {
            let told = dim(weights, "label_emb.0.0.weight", 1)?;
            if kind != Kind::Xl {
                return Err(Error::Config(format!(
                    "its network is told {told} numbers beside text (label_emb), which only SDXL's is supported for"
                )));
            }
            config["addition_embed_type"] = json!("text_time");
            config["addition_time_embed_dim"] = json!(256);
            config["projection_class_embeddings_input_dim"] = json!(told);
        }
        Ok(config)
    }
}

/// How an `AutoencoderKL` is made up.
pub(super) struct DecoderPlan {
    pub levels: usize,
    pub layers: usize,
}

impl DecoderPlan {
    pub fn of(weights: &Weights) -> Result<Self> {
        let levels = count(weights, |i| format!("decoder.up.{i}.block.0.conv1.weight"));
        let layers = count(weights, |i| format!("decoder.up.0.block.{i}.conv1.weight"));
        match levels > 0 && layers > 1 {
            true => Ok(DecoderPlan { levels, layers: layers - 1 }),
            false => Err(Error::Config("its autoencoder has no decoder".into())),
        }
    }

    /// `config.json`.
    pub fn config(&self, weights: &Weights, kind: Kind, picture: usize) -> Result<Value> {
        let channels = (0..self.levels).map(|i| dim(weights, &format!("decoder.up.{i}.block.0.conv1.weight"), 0));
        Ok(json!({
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.42.0",
            "in_channels": dim(weights, "encoder.conv_in.weight", 1)?,
            "out_channels": dim(weights, "decoder.conv_out.weight", 0)?,
            "block_out_channels": channels.collect::<Result<Vec<_>>>()?,
            "down_block_types": vec!["DownEncoderBlock2D"; self.levels],
            "up_block_types": vec!["UpDecoderBlock2D"; self.levels],
            "layers_per_block": self.layers,
            "latent_channels": dim(weights, "decoder.conv_in.weight", 1)?,
            "sample_size": picture,
            "scaling_factor": if kind == Kind::Xl { 0.13025 } else { 0.18215 },
            "force_upcast": true,
        }))
    }
}

/// `config.json` of a text encoder with weights by transformers' names; `open` says whether it is OpenCLIP's.
pub(super) fn clip(weights: &Weights, open: bool) -> Result<Value> {
    let inner = if weights.names().any(|name| name.starts_with("text_model.")) { "text_model." } else { "" };
    let name = |name: &str| format!("{inner}{name}");
    let layers = count(weights, |i| name(&format!("encoder.layers.{i}.layer_norm1.weight")));
    let hidden = dim(weights, &name("final_layer_norm.weight"), 0)?;
    let projection = dim(weights, "text_projection.weight", 0).ok();
    let class = if projection.is_some() { "CLIPTextModelWithProjection" } else { "CLIPTextModel" };
    Ok(json!({
        "architectures": [class],
        "model_type": "clip_text_model",
        "vocab_size": dim(weights, &name("embeddings.token_embedding.weight"), 0)?,
        "max_position_embeddings": dim(weights, &name("embeddings.position_embedding.weight"), 0)?,
        "hidden_size": hidden,
        "intermediate_size": dim(weights, &name("encoder.layers.0.mlp.fc1.weight"), 0)?,
        "projection_dim": projection.unwrap_or(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": (hidden / 64).max(1),
        "hidden_act": if open { "gelu" } else { "quick_gelu" },
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }))
}

/// `scheduler_config.json`.
pub(super) fn scheduler(kind: Kind, prediction: &str) -> Value {
    let mut config = json!({
        "_diffusers_version": "0.42.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "steps_offset": 1,
    });
    let more = match kind {
        Kind::Xl => json!({ "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading" }),
        _ => json!({
            "_class_name": "PNDMScheduler",
            "set_alpha_to_one": false,
            "skip_prk_steps": true,
            "timestep_spacing": "leading",
        }),
    };
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}
