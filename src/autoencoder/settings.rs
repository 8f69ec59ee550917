//! What an autoencoder's training can be told.

use crate::config::{WrongUsage, at_least_one, count, fraction, not_negative, optimizer, parts_of_batch, positive};
use crate::optim::{AdamW, Decay};
use crate::train::Settings;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// What `dmd autoencoder train --config` may hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderSettings {
    /// The pictures: a folder or a zip.
    pub data: String,
    /// Height and width in pixels.
    pub size: [usize; 2],
    /// One channel instead of three.
    pub grey: bool,
    /// `kl` for AutoencoderKL, `tiny` for AutoencoderTiny.
    pub kind: Kind,
    /// Its config.json; empty for one of `kind` with latents of a quarter of the side.
    pub network: String,
    /// Updates.
    pub steps: u64,
    /// Pictures per update.
    pub batch: usize,
    /// Parts that an update's batch is run in, to save memory; the gradient is that of the whole batch.
    pub accumulate: usize,
    /// Everything random follows from it.
    pub seed: u64,
    /// Mirror half of the pictures.
    pub flip: bool,
    /// Fraction of the pictures kept for the validation loss.
    pub held_out: f64,
    /// How pictures are compared: `l1`, as for Stable Diffusion's, or `l2`.
    pub distance: Pixels,
    /// Weight of the latents' KL divergence from the unit normal, of which both are taken per value of a picture: 1e-6 for
    /// Stable Diffusion's (Rombach et al. 2022, appendix G).
    pub kl: f64,
    /// An ONNX network that compares pictures too, such as LPIPS; empty for none.
    pub perceptual: String,
    /// Its weight beside the pixels': 1 for Stable Diffusion's.
    pub perceptual_weight: f64,
    /// Learning rate.
    pub rate: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// How the rate goes on.
    pub decay: Decay,
    /// Decay of the average of the weights that is saved.
    pub ema: f64,
    /// Steps between lines of metrics.jsonl.
    pub log_every: u64,
    /// Steps between checkpoints, sample grids and validation.
    pub checkpoint_every: u64,
    /// Source and licence of the pictures, recorded in the autoencoder.
    pub about_data: String,
    /// The optimiser.
    pub optimizer: AdamW,
}

/// A class of autoencoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// AutoencoderKL: latents are Gaussians.
    Kl,
    /// AutoencoderTiny: latents are numbers, and the decoder is a few convolutions.
    Tiny,
}

/// A distance pixel by pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pixels {
    /// Mean difference.
    L1,
    /// Mean square.
    L2,
}

impl Settings for AutoencoderSettings {
    const OF_NO_WEIGHT: &'static [&'static str] = &["data", "network", "log_every", "checkpoint_every", "about_data"];
    const ON_THE_WAY: &'static [&'static str] = &["steps", "accumulate", "rate", "decay"];
}

impl Default for AutoencoderSettings {
    fn default() -> Self {
        AutoencoderSettings {
            data: String::new(),
            size: [64, 64],
            grey: false,
            kind: Kind::Kl,
            network: String::new(),
            steps: 10_000,
            batch: 32,
            accumulate: 1,
            seed: 0,
            flip: false,
            held_out: 0.05,
            distance: Pixels::L1,
            kl: 1e-6,
            perceptual: String::new(),
            perceptual_weight: 1.0,
            rate: 1e-3,
            warmup: 100,
            decay: Decay::Cosine,
            ema: 0.999,
            log_every: 50,
            checkpoint_every: 500,
            about_data: String::new(),
            optimizer: AdamW { betas: [0.9, 0.99], weight_decay: 0.0, clip: 1.0, ..AdamW::default() },
        }
    }
}

impl AutoencoderSettings {
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
        fraction("held_out", self.held_out)?;
        fraction("ema", self.ema)?;
        not_negative("kl", self.kl)?;
        not_negative("perceptual_weight", self.perceptual_weight)?;
        ensure!(
            !self.perceptual.is_empty() || self.perceptual_weight == Self::default().perceptual_weight,
            "perceptual_weight is {}, but there is no network for it: name one in perceptual",
            self.perceptual_weight
        );
        positive("rate", self.rate)?;
        optimizer(&self.optimizer)
    }

    /// What its `config.json` will hold, for pictures of this many channels. Latents are as the network makes them until
    /// their spread is known.
    pub fn network(&self, channels: usize) -> Result<Value> {
        let mut config = match (self.network.as_str(), self.kind) {
            ("", Kind::Kl) => json!({
                "_class_name": "AutoencoderKL",
                "block_out_channels": [32, 64, 64],
                "down_block_types": vec!["DownEncoderBlock2D"; 3],
                "up_block_types": vec!["UpDecoderBlock2D"; 3],
                "layers_per_block": 1,
                "latent_channels": 4,
                "norm_num_groups": 8,
            }),
            ("", Kind::Tiny) => json!({
                "_class_name": "AutoencoderTiny",
                "encoder_block_out_channels": [32, 32, 32],
                "decoder_block_out_channels": [32, 32, 32],
                "num_encoder_blocks": [1, 2, 2],
                "num_decoder_blocks": [2, 2, 1],
                "latent_channels": 4,
            }),
            (path, _) => {
                let text = std::fs::read_to_string(Path::new(path)).with_context(|| path.to_string())?;
                serde_json::from_str(&text).with_context(|| path.to_string())?
            }
        };
        let expected = match self.kind {
            Kind::Kl => "AutoencoderKL",
            Kind::Tiny => "AutoencoderTiny",
        };
        let class = config["_class_name"].as_str().unwrap_or("missing");
        ensure!(class == expected, "{}: _class_name is {class}, expected {expected} (kind)", self.network);
        for name in ["in_channels", "out_channels"] {
            let found = config.get(name).and_then(Value::as_u64).unwrap_or(channels as u64);
            ensure!(
                self.network.is_empty() || found == channels as u64,
                "{}: {name} is {found}, the pictures have {channels} channels",
                self.network
            );
            config[name] = json!(channels);
        }
        if self.kind == Kind::Kl {
            config["sample_size"] = json!(self.size[0]);
        }
        config["_diffusers_version"] = json!("0.42.0");
        config["scaling_factor"] = json!(1.0);
        Ok(config)
    }
}
