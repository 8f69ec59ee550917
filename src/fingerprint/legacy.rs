//! What version 0.1.0 before JSON wrote: hashes of `{:?}`, whose text these structs hold fast as it was then.

use crate::data::Pictures;
use dmd_models::networks::unet2d::{Resampling, SampleSize, TimeEmbedding, TimeScaleShift};
use dmd_models::{Activation, ModelFolder, NetworkConfig};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub fn teacher(teacher: &ModelFolder, weights: &str) -> Option<String> {
    let unet = UNetConfig::of(&teacher.config)?;
    let scheduler = Scheduler::new(teacher.scheduler.json())?;
    Some(super::hex(Sha256::new_with_prefix(format!("{unet:?} {scheduler:?} {weights}"))))
}

pub fn lesson(pictures: &Pictures, network: &NetworkConfig) -> Option<String> {
    let mut hash = Sha256::new_with_prefix(&pictures.pixels);
    pictures.labels.iter().for_each(|label| hash.update(label.to_le_bytes()));
    hash.update(format!("{:?} {:?}", pictures.classes, UNetConfig::of(network)?));
    Some(super::hex(hash))
}

#[derive(Debug)]
#[allow(dead_code)] // read by Debug
struct UNetConfig {
    sample_size: Option<SampleSize>,
    in_channels: usize,
    out_channels: usize,
    center_input_sample: bool,
    time_embedding_type: TimeEmbedding,
    time_embedding_dim: Option<usize>,
    freq_shift: f64,
    flip_sin_to_cos: bool,
    down_block_types: Vec<String>,
    mid_block_type: Option<String>,
    up_block_types: Vec<String>,
    block_out_channels: Vec<usize>,
    layers_per_block: usize,
    mid_block_scale_factor: f64,
    downsample_padding: usize,
    downsample_type: Resampling,
    upsample_type: Resampling,
    dropout: f64,
    act_fn: Activation,
    attention_head_dim: Option<usize>,
    norm_num_groups: usize,
    attn_norm_num_groups: Option<usize>,
    norm_eps: f64,
    resnet_time_scale_shift: TimeScaleShift,
    add_attention: bool,
    class_embed_type: Option<String>,
    num_class_embeds: Option<usize>,
    num_train_timesteps: Option<usize>,
}

impl UNetConfig {
    /// None for networks that came later.
    fn of(now: &NetworkConfig) -> Option<Self> {
        let NetworkConfig::UNet2D(now) = now else { return None };
        Some(UNetConfig {
            sample_size: now.sample_size,
            in_channels: now.in_channels,
            out_channels: now.out_channels,
            center_input_sample: now.center_input_sample,
            time_embedding_type: now.time_embedding_type,
            time_embedding_dim: now.time_embedding_dim,
            freq_shift: now.freq_shift,
            flip_sin_to_cos: now.flip_sin_to_cos,
            down_block_types: now.down_block_types.clone(),
            mid_block_type: now.mid_block_type.clone(),
            up_block_types: now.up_block_types.clone(),
            block_out_channels: now.block_out_channels.clone(),
            layers_per_block: now.layers_per_block,
            mid_block_scale_factor: now.mid_block_scale_factor,
            downsample_padding: now.downsample_padding,
            downsample_type: now.downsample_type,
            upsample_type: now.upsample_type,
            dropout: now.dropout,
            act_fn: now.act_fn,
            attention_head_dim: now.attention_head_dim,
            norm_num_groups: now.norm_num_groups,
            attn_norm_num_groups: now.attn_norm_num_groups,
            norm_eps: now.norm_eps,
            resnet_time_scale_shift: now.resnet_time_scale_shift,
            add_attention: now.add_attention,
            class_embed_type: now.class_embed_type.clone(),
            num_class_embeds: now.num_class_embeds,
            num_train_timesteps: now.num_train_timesteps,
        })
    }
}

#[derive(Debug)]
#[allow(dead_code)] // read by Debug
struct Scheduler {
    json: Value,
    class_name: String,
    fields: Fields,
}

impl Scheduler {
    fn new(json: &Value) -> Option<Self> {
        let class_name = json.get("_class_name").and_then(Value::as_str).unwrap_or_default().to_string();
        Some(Scheduler { json: json.clone(), class_name, fields: serde_json::from_value(json.clone()).ok()? })
    }
}

#[derive(Debug, Deserialize)]
#[serde(default)]
#[allow(dead_code)] // read by Debug
struct Fields {
    num_train_timesteps: usize,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: String,
    trained_betas: Option<Vec<f64>>,
    prediction_type: String,
    rescale_betas_zero_snr: bool,
    clip_sample: Option<bool>,
    clip_sample_range: f64,
    use_flow_sigmas: bool,
    variance_type: Option<String>,
    sigma_min: Option<f64>,
    sigma_max: Option<f64>,
    sigma_data: f64,
    sigma_schedule: String,
    rho: f64,
}

impl Default for Fields {
    fn default() -> Self {
        Fields {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: "linear".into(),
            trained_betas: None,
            prediction_type: "epsilon".into(),
            rescale_betas_zero_snr: false,
            clip_sample: None,
            clip_sample_range: 1.0,
            use_flow_sigmas: false,
            variance_type: None,
            sigma_min: None,
            sigma_max: None,
            sigma_data: 0.5,
            sigma_schedule: "karras".into(),
            rho: 7.0,
        }
    }
}
