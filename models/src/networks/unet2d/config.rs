//! `config.json` of a `UNet2DModel`: what each field may be here, and why the rest is refused.

use crate::blocks::Resampling;
use crate::condition::{Condition, Way};
use crate::networks::config::{self, Fields, NetworkFields};
use crate::networks::{Takes, Told};
use crate::{Activation, Error, Result, limits};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// The fields of diffusers' `UNet2DModel`, with its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    /// Height and width of a picture; needed wherever pictures are made.
    pub sample_size: Option<SampleSize>,
    /// Channels in.
    pub in_channels: usize,
    /// Channels out.
    pub out_channels: usize,
    /// Whether the network first maps x to 2x − 1.
    pub center_input_sample: bool,
    /// How a timestep becomes a vector.
    pub time_embedding_type: TimeEmbedding,
    /// Width of the embedding; four times the first block when absent.
    pub time_embedding_dim: Option<usize>,
    /// Shift in the positional frequencies' exponent.
    pub freq_shift: f64,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Block types on the way down: `DownBlock2D`, `AttnDownBlock2D`, `ResnetDownsampleBlock2D`.
    pub down_block_types: Vec<String>,
    /// `UNetMidBlock2D`, or null for none.
    pub mid_block_type: Option<String>,
    /// Block types on the way up: `UpBlock2D`, `AttnUpBlock2D`, `ResnetUpsampleBlock2D`.
    pub up_block_types: Vec<String>,
    /// Channels of each level.
    pub block_out_channels: Vec<usize>,
    /// Resnets per level on the way down (one more on the way up).
    pub layers_per_block: usize,
    /// Residual sums of the middle block are divided by this.
    pub mid_block_scale_factor: f64,
    /// 1: symmetric; 0: a row and a column of zeros on the right and below.
    pub downsample_padding: usize,
    /// How `AttnDownBlock2D` halves.
    pub downsample_type: Resampling,
    /// How `AttnUpBlock2D` doubles.
    pub upsample_type: Resampling,
    /// Dropout in the resnets. Distillation and sampling run without it (DMD, section 4).
    pub dropout: f64,
    /// Non-linearity of the resnets.
    pub act_fn: Activation,
    /// Channels of one attention head; one head over all channels when null.
    pub attention_head_dim: Option<usize>,
    /// Groups of every norm.
    pub norm_num_groups: usize,
    /// Groups of the middle attention's norm.
    pub attn_norm_num_groups: Option<usize>,
    /// Added to every variance.
    pub norm_eps: f64,
    /// How the time embedding enters a resnet.
    pub resnet_time_scale_shift: TimeScaleShift,
    /// Attention in the middle block.
    pub add_attention: bool,
    /// `timestep`, `identity`, or null for a table of `num_class_embeds` rows.
    pub class_embed_type: Option<String>,
    /// Number of classes.
    pub num_class_embeds: Option<usize>,
    /// Rows of a learned time embedding.
    pub num_train_timesteps: Option<usize>,
}

impl Default for UNetConfig {
    fn default() -> Self {
        let strings = |s: &[&str]| s.iter().map(|s| s.to_string()).collect();
        UNetConfig {
            sample_size: None,
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_type: TimeEmbedding::Positional,
            time_embedding_dim: None,
            freq_shift: 0.0,
            flip_sin_to_cos: true,
            down_block_types: strings(&["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]),
            mid_block_type: Some("UNetMidBlock2D".into()),
            up_block_types: strings(&["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]),
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            downsample_type: Resampling::Conv,
            upsample_type: Resampling::Conv,
            dropout: 0.0,
            act_fn: Activation::Silu,
            attention_head_dim: Some(8),
            norm_num_groups: 32,
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: TimeScaleShift::Default,
            add_attention: true,
            class_embed_type: None,
            num_class_embeds: None,
            num_train_timesteps: None,
        }
    }
}

/// One number for a square, or `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a whole number, or two: [height, width]")]
pub enum SampleSize {
    /// Height and width alike.
    Square(usize),
    /// Height, width.
    Rectangle([usize; 2]),
}

/// `time_embedding_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeEmbedding {
    /// Sines and cosines of fixed frequencies.
    Positional,
    /// Sines and cosines of stored random frequencies of log t.
    Fourier,
    /// A table.
    Learned,
}

/// `resnet_time_scale_shift`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeScaleShift {
    /// Added before the second norm.
    Default,
    /// Scales and shifts after the second norm.
    ScaleShift,
}

/// What the two class fields mean together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClassEmbedding {
    /// Unconditional.
    None,
    /// A table of this many rows.
    Table(usize),
    /// Sinusoids of the label through a network of two layers.
    Timestep,
    /// The caller gives the vector itself.
    Identity,
}

/// What a block's type name says.
pub(super) struct BlockKind {
    pub attention: bool,
    pub resampling: Resampling,
}

impl UNetConfig {
    /// Reads `config.json`. An unknown key, a value of a wrong kind, or a combination that this network does not have
    /// is refused by name.
    pub fn from_json(path: &Path, text: &str) -> Result<Self> {
        config::from_json(path, text)
    }

    /// Height and width, where the config states them.
    pub fn size(&self) -> Option<[usize; 2]> {
        self.sample_size.map(|size| match size {
            SampleSize::Square(side) => [side, side],
            SampleSize::Rectangle(size) => size,
        })
    }

    /// Whether pictures of this size can be halved at every level, so that the way up meets the way down.
    pub fn check_size(&self, height: usize, width: usize) -> Result<()> {
        let halvings = self.block_out_channels.len() - 1;
        let factor = 1usize.checked_shl(halvings as u32).unwrap_or(usize::MAX);
        if height == 0 || width == 0 || !height.is_multiple_of(factor) || !width.is_multiple_of(factor) {
            return Err(Error::Config(format!(
                "sample_size {height}x{width} cannot be halved {halvings} times ({} levels): both sides must be multiples of {factor}",
                halvings + 1
            )));
        }
        Ok(())
    }

    /// Width of the time and class embedding.
    pub fn time_dim(&self) -> usize {
        self.time_embedding_dim.unwrap_or(4 * self.block_out_channels[0])
    }

    /// How labels enter.
    pub fn class_embedding(&self) -> ClassEmbedding {
        match (self.class_embed_type.as_deref(), self.num_class_embeds) {
            (Some("timestep"), _) => ClassEmbedding::Timestep,
            (Some(_), _) => ClassEmbedding::Identity,
            (None, Some(n)) => ClassEmbedding::Table(n),
            (None, None) => ClassEmbedding::None,
        }
    }

    pub(super) fn down_block(&self, i: usize) -> Result<BlockKind> {
        let (attention, resampling) = match plain(&self.down_block_types[i]) {
            "DownBlock2D" => (false, Resampling::Conv),
            "AttnDownBlock2D" => (true, self.downsample_type),
            "ResnetDownsampleBlock2D" => (false, Resampling::Resnet),
            other => {
                return Err(unsupported_block(
                    "down_block_types",
                    other,
                    "DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D",
                ));
            }
        };
        Ok(BlockKind { attention, resampling })
    }

    pub(super) fn up_block(&self, i: usize) -> Result<BlockKind> {
        let (attention, resampling) = match plain(&self.up_block_types[i]) {
            "UpBlock2D" => (false, Resampling::Conv),
            "AttnUpBlock2D" => (true, self.upsample_type),
            "ResnetUpsampleBlock2D" => (false, Resampling::Resnet),
            other => {
                return Err(unsupported_block(
                    "up_block_types",
                    other,
                    "UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D",
                ));
            }
        };
        Ok(BlockKind { attention, resampling })
    }
}

impl Fields for UNetConfig {
    const CLASSES: &'static [&'static str] = &["UNet2DModel"];
    // What diffusers' `EMAModel` adds of itself to the config of averaged weights.
    const WITHOUT_EFFECT: &'static [&'static str] = &[
        "decay",
        "inv_gamma",
        "max_value",
        "min_decay",
        "min_value",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    ];

    // The first releases had other names.
    fn modern(key: &str) -> &str {
        match key {
            "image_size" | "resolution" => "sample_size",
            "num_res_blocks" => "layers_per_block",
            "block_channels" => "block_out_channels",
            "down_blocks" => "down_block_types",
            "up_blocks" => "up_block_types",
            "downscale_freq_shift" => "freq_shift",
            "resnet_num_groups" => "norm_num_groups",
            "resnet_act_fn" => "act_fn",
            "resnet_eps" => "norm_eps",
            "num_head_channels" => "attention_head_dim",
            _ => key,
        }
    }

    fn validate(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Config(message));
        let levels = self.block_out_channels.len();
        if levels == 0 || self.block_out_channels.contains(&0) {
            return refuse(format!(
                "block_out_channels is {:?}, expected at least one level and no zero",
                self.block_out_channels
            ));
        }
        for (name, types) in [("down_block_types", &self.down_block_types), ("up_block_types", &self.up_block_types)] {
            if types.len() != levels {
                return refuse(format!(
                    "{name} has {} entries, block_out_channels {levels}: they must be as many",
                    types.len()
                ));
            }
        }
        for i in 0..levels {
            self.down_block(i)?;
            self.up_block(i)?;
        }
        if let Some(mid) = self.mid_block_type.as_deref()
            && mid != "UNetMidBlock2D"
        {
            return refuse(format!("mid_block_type is {mid}, supported: UNetMidBlock2D or null"));
        }
        limits::check("levels of block_out_channels", levels, limits::LEVELS)?;
        limits::check("layers_per_block", self.layers_per_block, limits::LAYERS)?;
        let channels = self.block_out_channels.iter().map(|&channels| ("block_out_channels", channels));
        let widths = [
            ("in_channels", Some(self.in_channels)),
            ("out_channels", Some(self.out_channels)),
            ("norm_num_groups", Some(self.norm_num_groups)),
            ("attention_head_dim", self.attention_head_dim),
            ("attn_norm_num_groups", self.attn_norm_num_groups),
            ("time_embedding_dim", self.time_embedding_dim),
        ];
        for (name, value) in channels.chain(widths.into_iter().filter_map(|(name, value)| Some((name, value?)))) {
            limits::check(name, value, limits::CHANNELS)?;
        }
        for (name, rows) in
            [("num_class_embeds", self.num_class_embeds), ("num_train_timesteps", self.num_train_timesteps)]
        {
            rows.map_or(Ok(()), |rows| limits::check(name, rows, limits::ROWS))?;
        }
        for side in self.size().into_iter().flatten() {
            limits::check("sample_size", side, limits::SIDE)?;
        }
        if self.downsample_padding > 1 {
            return refuse(format!(
                "downsample_padding is {}, supported: 0 and 1 (others do not halve the picture)",
                self.downsample_padding
            ));
        }
        if !(self.norm_eps > 0.0 && self.mid_block_scale_factor.is_finite() && self.mid_block_scale_factor != 0.0) {
            return refuse(format!(
                "norm_eps is {} and mid_block_scale_factor {}, expected a positive and a non-zero number",
                self.norm_eps, self.mid_block_scale_factor
            ));
        }
        let half = self.block_out_channels[0] / 2;
        if self.time_embedding_type == TimeEmbedding::Positional && (half == 0 || self.freq_shift >= half as f64) {
            return refuse(format!(
                "freq_shift is {}, expected below {half} (half of the first block's channels)",
                self.freq_shift
            ));
        }
        if self.time_embedding_type == TimeEmbedding::Learned && self.num_train_timesteps.unwrap_or(0) == 0 {
            return refuse("time_embedding_type is learned, which needs num_train_timesteps".into());
        }
        match self.class_embed_type.as_deref() {
            None | Some("identity") => {}
            Some("timestep") if self.time_embedding_type == TimeEmbedding::Positional && self.block_out_channels[0].is_multiple_of(2) => {}
            Some("timestep") => return refuse("class_embed_type is timestep, which needs time_embedding_type positional and an even first block (a label 0 has no logarithm, and diffusers shares the projection)".into()),
            Some(other) => return refuse(format!("class_embed_type is {other}, supported: null, timestep, identity")),
        }
        match self.size() {
            Some([height, width]) => self.check_size(height, width),
            None => Ok(()),
        }
    }

    fn to_fields(&self) -> Result<Map<String, Value>> {
        let mut fields = config::fields(self)?;
        if self.freq_shift.fract() == 0.0 {
            fields.insert("freq_shift".into(), (self.freq_shift as i64).into());
        }
        Ok(fields)
    }
}

impl NetworkFields for UNetConfig {
    const PART: &'static str = "unet";
    const LANDMARK: &'static str = "conv_in.weight";

    fn why_no_model(&self) -> Option<String> {
        if self.in_channels != self.out_channels {
            return Some(format!(
                "in_channels {} and out_channels {} differ: a denoiser returns what it takes (learned variances are not supported)",
                self.in_channels, self.out_channels
            ));
        }
        if self.class_embed_type.is_some() {
            return Some("class_embed_type timestep and identity have no list of classes to draw from, supported for whole models: null with num_class_embeds".into());
        }
        (self.time_embedding_type == TimeEmbedding::Learned).then(|| "time_embedding_type is learned, a table of whole timesteps: the noise levels of sampling and distillation lie between them, supported for whole models: positional, fourier".into())
    }

    fn takes(&self) -> Takes {
        let (way, told) = match self.class_embedding() {
            ClassEmbedding::None => (Way::Label, None),
            ClassEmbedding::Table(n) => (Way::Label, Some(Told::Id(Some(n)))),
            ClassEmbedding::Timestep => (Way::Label, Some(Told::Id(None))),
            ClassEmbedding::Identity => (Way::Vector, Some(Told::Values(vec![self.time_dim()]))),
        };
        Takes { channels: self.in_channels, size: self.size(), told: Condition::of(way, told) }
    }

    // Those of diffusers that take any UNet2DModel: one scales its noise and its network's input and hands on classes, and
    // nothing in it is of consistency models; one takes these schedulers as they are; one makes DDIM's of all others.
    fn pipeline(&self, scheduler: &str) -> &'static str {
        let scales = ["EDM", "Euler", "KDPM2Ancestral"].iter().any(|begin| scheduler.starts_with(begin));
        let plain = ["DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler"];
        if scales || self.num_class_embeds.is_some() {
            "ConsistencyModelPipeline"
        } else if plain.contains(&scheduler) {
            "DDPMPipeline"
        } else {
            "DDIMPipeline"
        }
    }
}

/// diffusers drops this prefix of old files too.
fn plain(block: &str) -> &str {
    block.strip_prefix("UNetRes").unwrap_or(block)
}

fn unsupported_block(field: &str, name: &str, supported: &str) -> Error {
    let reason = match name {
        n if n.contains("CrossAttn") => "cross-attention needs text, which UNet2DModel does not take",
        n if n.contains("Skip") => "the skip-convolution blocks use FIR resampling, which no edge accelerator has",
        _ => "not a block of the supported kinds",
    };
    Error::Config(format!("{field} holds {name}: {reason}; supported: {supported}"))
}
