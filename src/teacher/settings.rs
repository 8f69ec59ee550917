//! Settings of a teacher's training, and the network for a picture size where none is given.

use crate::config::{WrongUsage, at_least_one, count, fraction, optimizer, parts_of_batch, positive};
use crate::optim::{AdamW, Decay};
use crate::train::Settings;
use anyhow::{Result, ensure};
use dmd_models::networks::unet2d::SampleSize;
use dmd_models::networks::unet2d_condition::{PerLevel, UNet2DConditionConfig};
use dmd_models::{Precision, UNetConfig};
use serde::{Deserialize, Serialize};

/// What `dmd teacher train --config` may hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TeacherSettings {
    /// The pictures: a folder or a zip.
    pub data: String,
    /// Height and width in pixels.
    pub size: [usize; 2],
    /// One channel instead of three.
    pub grey: bool,
    /// Folders are not classes.
    pub unconditional: bool,
    /// A UNet2DModel's config.json; empty for the one that goes with the size.
    pub unet: String,
    /// An autoencoder, as `dmd autoencoder train` and diffusers write them (a `vae/`), whose latents are learned in the place
    /// of pictures; empty for none.
    pub decoder: String,
    /// Whether captions are learned in the place of classes.
    pub text: bool,
    /// What reads captions: a CLIP text encoder's config.json, learned along; a model folder, whose text encoder stays as it
    /// is; empty for a small one, learned along.
    pub text_encoder: String,
    /// Tokens of the vocabulary that is learned from the captions, where the text encoder is learned along: 514 or more.
    pub vocabulary: usize,
    /// Updates.
    pub steps: u64,
    /// Pictures per update.
    pub batch: usize,
    /// Parts that an update's batch is run in, to save memory; the gradient is that of the whole batch.
    pub accumulate: usize,
    /// Whether the network's blocks are computed again for their gradient instead of being kept, to save memory.
    pub grad_checkpoint: bool,
    /// What the network computes in on a GPU: f32 (products in TF32) or bf16.
    pub precision: Precision,
    /// Everything random follows from it.
    pub seed: u64,
    /// Mirror half of the pictures.
    pub flip: bool,
    /// Fraction of pictures shown without their class or caption, so that the teacher can be guided.
    pub label_dropout: f64,
    /// Fraction of the pictures kept for the validation loss.
    pub held_out: f64,
    /// Learning rate.
    pub rate: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// How the rate goes on.
    pub decay: Decay,
    /// Decay of the average of the weights that is saved.
    pub ema: f64,
    /// Mean of log sigma in training.
    pub p_mean: f64,
    /// Standard deviation of log sigma in training.
    pub p_std: f64,
    /// Standard deviation that the preconditioning assumes of the data.
    pub sigma_data: f64,
    /// Lowest noise level.
    pub sigma_min: f64,
    /// Highest noise level.
    pub sigma_max: f64,
    /// Steps between lines of metrics.jsonl.
    pub log_every: u64,
    /// Steps between checkpoints, sample grids and validation.
    pub checkpoint_every: u64,
    /// Source and licence of the pictures, recorded in the model.
    pub about_data: String,
    /// The optimiser.
    pub optimizer: AdamW,
}

impl Settings for TeacherSettings {
    const OF_NO_WEIGHT: &'static [&'static str] =
        &["data", "unet", "decoder", "text_encoder", "log_every", "checkpoint_every", "about_data"];
    const ON_THE_WAY: &'static [&'static str] = &["steps", "accumulate", "grad_checkpoint", "rate", "decay"];
}

impl Default for TeacherSettings {
    fn default() -> Self {
        TeacherSettings {
            data: String::new(),
            size: [32, 32],
            grey: false,
            unconditional: false,
            unet: String::new(),
            decoder: String::new(),
            text: false,
            text_encoder: String::new(),
            vocabulary: 2000,
            steps: 10_000,
            batch: 64,
            accumulate: 1,
            grad_checkpoint: false,
            precision: Precision::F32,
            seed: 0,
            flip: false,
            label_dropout: 0.0,
            held_out: 0.05,
            rate: 1e-3,
            warmup: 100,
            decay: Decay::Cosine,
            ema: 0.999,
            p_mean: -1.2,
            p_std: 1.2,
            sigma_data: 0.5,
            sigma_min: 0.002,
            sigma_max: 80.0,
            log_every: 50,
            checkpoint_every: 500,
            about_data: String::new(),
            optimizer: AdamW { betas: [0.9, 0.99], weight_decay: 0.0, clip: 1.0, ..AdamW::default() },
        }
    }
}

impl TeacherSettings {
    /// Checks every field; the error names it, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(WrongUsage::of)
    }

    fn check(&self) -> Result<()> {
        self.size.iter().try_for_each(|side| count("size", *side as u64))?;
        count("steps", self.steps)?;
        count("batch", self.batch as u64)?;
        parts_of_batch(self.accumulate, self.batch)?;
        at_least_one("log_every", self.log_every)?;
        at_least_one("checkpoint_every", self.checkpoint_every)?;
        fraction("label_dropout", self.label_dropout)?;
        ensure!(
            self.label_dropout == 0.0 || !self.unconditional || self.text,
            "label_dropout is {}, but --unconditional leaves no classes to drop",
            self.label_dropout
        );
        let defaults = Self::default();
        ensure!(
            self.text || (self.text_encoder.is_empty() && self.vocabulary == defaults.vocabulary),
            "text_encoder and vocabulary are for teachers of text: say text = true, or --text"
        );
        ensure!(
            self.decoder.is_empty() || !self.flip,
            "flip is true, but mirrored pictures have other latents than the mirror of theirs: a decoder needs it false"
        );
        fraction("held_out", self.held_out)?;
        fraction("ema", self.ema)?;
        positive("rate", self.rate)?;
        positive("p_std", self.p_std)?;
        positive("sigma_data", self.sigma_data)?;
        positive("sigma_min", self.sigma_min)?;
        ensure!(
            self.sigma_max > self.sigma_min && self.sigma_max.is_finite(),
            "sigma_max is {}, expected above sigma_min ({})",
            self.sigma_max,
            self.sigma_min
        );
        ensure!(self.p_mean.is_finite(), "p_mean is {}, expected a number", self.p_mean);
        optimizer(&self.optimizer)
    }
}

/// A network of text for samples of this size, with tokens of this many channels: one level per halving, as
/// [`default_unet`], with transformers on those of at most 16 pixels.
pub fn default_text_unet(size: [usize; 2], channels: usize, tokens: usize) -> UNet2DConditionConfig {
    let plain = default_unet(size, channels, 0);
    let levels = plain.block_out_channels.len();
    let attends: Vec<bool> =
        (0..levels).map(|level| size[0].max(size[1]) >> level <= 16 || level + 1 == levels).collect();
    let types = |way: &str, attends: &bool| format!("{}{way}Block2D", if *attends { "CrossAttn" } else { "" });
    UNet2DConditionConfig {
        sample_size: plain.sample_size,
        in_channels: channels,
        out_channels: channels,
        layers_per_block: PerLevel::All(1),
        down_block_types: attends.iter().map(|a| types("Down", a)).collect(),
        up_block_types: attends.iter().rev().map(|a| types("Up", a)).collect(),
        attention_head_dim: PerLevel::Each(plain.block_out_channels.iter().map(|n| n / 32).collect()),
        block_out_channels: plain.block_out_channels,
        cross_attention_dim: PerLevel::All(tokens),
        norm_num_groups: 8,
        ..UNet2DConditionConfig::default()
    }
}

/// A network for pictures of this size: one level per halving down to 8 pixels or the last size that halves,
/// attention on the lowest.
pub fn default_unet(size: [usize; 2], channels: usize, n_classes: usize) -> UNetConfig {
    let mut levels = 1;
    while levels < 4 && size.iter().all(|s| s % (1 << levels) == 0 && s >> levels >= 8) {
        levels += 1;
    }
    let attention = |level: usize| level + 1 == levels;
    let down = |level| if attention(level) { "AttnDownBlock2D" } else { "DownBlock2D" };
    let up = |level| if attention(level) { "AttnUpBlock2D" } else { "UpBlock2D" };
    UNetConfig {
        sample_size: Some(if size[0] == size[1] { SampleSize::Square(size[0]) } else { SampleSize::Rectangle(size) }),
        in_channels: channels,
        out_channels: channels,
        layers_per_block: 1,
        block_out_channels: [32, 64, 128, 128][..levels].to_vec(),
        down_block_types: (0..levels).map(|l| down(l).to_string()).collect(),
        up_block_types: (0..levels).rev().map(|l| up(l).to_string()).collect(),
        attention_head_dim: Some(32),
        norm_num_groups: 8,
        num_class_embeds: (n_classes > 0).then_some(n_classes),
        ..UNetConfig::default()
    }
}
