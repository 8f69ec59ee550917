//! The halves of an autoencoder of resnets, which `AutoencoderKL` and `VQModel` share (diffusers' `Encoder` and `Decoder`).

use crate::backend::{Activation, Backend};
use crate::blocks::{AttentionBlock, AttentionShape, ResnetBlock, ResnetShape};
use crate::layers::{Conv2d, GroupNorm, Scope};
use crate::{Error, Result, limits};
use serde::{Deserialize, Serialize};

/// A level of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DownBlock {
    /// Resnets.
    DownEncoderBlock2D,
    /// Each followed by attention.
    AttnDownEncoderBlock2D,
}

/// A level of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UpBlock {
    /// Resnets.
    UpDecoderBlock2D,
    /// Each followed by attention.
    AttnUpDecoderBlock2D,
}

/// Added to the variance in every norm.
const EPS: f64 = 1e-6;

/// What both halves have in common.
pub(super) struct Shape<'a> {
    /// Finest level first.
    pub channels: &'a [usize],
    pub layers: usize,
    pub groups: usize,
    pub act: Activation,
    pub mid_attention: bool,
}

impl Shape<'_> {
    /// Refuses what no model has, and lists of unlike length.
    pub fn validate(&self, down: &[DownBlock], up: &[UpBlock]) -> Result<()> {
        limits::check("the number of block_out_channels", self.channels.len(), limits::LEVELS)?;
        for (name, n) in [("down_block_types", down.len()), ("up_block_types", up.len())] {
            if n != self.channels.len() {
                let levels = self.channels.len();
                return Err(Error::Config(format!("{name} has {n} entries, block_out_channels has {levels}")));
            }
        }
        for channels in self.channels {
            limits::check("block_out_channels", *channels, limits::CHANNELS)?;
        }
        limits::check("layers_per_block", self.layers, limits::LAYERS)?;
        limits::check("norm_num_groups", self.groups, limits::CHANNELS)
    }

    /// Pixels of a picture, in each direction, for one of latents.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    fn resnet(&self, scope: Scope, io: [usize; 2]) -> Result<ResnetBlock> {
        let shape = ResnetShape {
            time_dim: None,
            groups: self.groups,
            eps: EPS,
            act: self.act,
            skip_time_act: false,
            scale_shift: false,
            output_scale: 1.0,
            resample: None,
        };
        ResnetBlock::build(scope, io, shape)
    }

    /// One head over all channels.
    fn attention(&self, scope: Scope, channels: usize) -> Result<AttentionBlock> {
        let groups = Some(self.groups);
        AttentionBlock::build(scope, AttentionShape { channels, head_dim: None, groups, eps: EPS, output_scale: 1.0 })
    }

    fn level(&self, scope: &mut Scope, [input, output]: [usize; 2], layers: usize, attends: bool) -> Result<Level> {
        let mut level = Level { resnets: Vec::new(), attentions: Vec::new(), resample: None };
        for i in 0..layers {
            let input = if i == 0 { input } else { output };
            level.resnets.push(self.resnet(scope.at(format!("resnets.{i}")), [input, output])?);
            if attends {
                level.attentions.push(self.attention(scope.at(format!("attentions.{i}")), output)?);
            }
        }
        Ok(level)
    }

    fn middle(&self, mut scope: Scope, channels: usize) -> Result<Level> {
        let resnets = vec![
            self.resnet(scope.at("resnets.0"), [channels; 2])?,
            self.resnet(scope.at("resnets.1"), [channels; 2])?,
        ];
        let attentions = match self.mid_attention {
            true => vec![self.attention(scope.at("attentions.0"), channels)?],
            false => Vec::new(),
        };
        Ok(Level { resnets, attentions, resample: None })
    }

    /// `(B, input, H, W)` to `(B, output, H/factor, W/factor)`.
    pub fn encoder(&self, mut scope: Scope, [input, output]: [usize; 2], types: &[DownBlock]) -> Result<Half> {
        let (first, last) = (self.channels[0], self.channels[self.channels.len() - 1]);
        let conv_in = scope.conv2d("conv_in", [input, first], 3, 1, false)?;
        let mut levels = Vec::with_capacity(types.len());
        for (i, kind) in types.iter().enumerate() {
            let (input, output) = (self.channels[i.saturating_sub(1)], self.channels[i]);
            let attends = *kind == DownBlock::AttnDownEncoderBlock2D;
            let mut at = scope.at(format!("down_blocks.{i}"));
            let mut level = self.level(&mut at, [input, output], self.layers, attends)?;
            if i + 1 < types.len() {
                let conv = at.conv2d("downsamplers.0.conv", [output; 2], 3, 2, false)?;
                level.resample = Some(Conv2d { padding: 0, ..conv });
            }
            levels.push(level);
        }
        let middle = self.middle(scope.at("mid_block"), last)?;
        let norm_out = scope.group_norm("conv_norm_out", last, self.groups, EPS)?;
        let conv_out = scope.conv2d("conv_out", [last, output], 3, 1, false)?;
        Ok(Half { up: false, conv_in, levels, middle, norm_out, conv_out })
    }

    /// `(B, input, h, w)` to `(B, output, factor·h, factor·w)`.
    pub fn decoder(&self, mut scope: Scope, [input, output]: [usize; 2], types: &[UpBlock]) -> Result<Half> {
        let channels: Vec<usize> = self.channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let conv_in = scope.conv2d("conv_in", [input, first], 3, 1, false)?;
        let middle = self.middle(scope.at("mid_block"), first)?;
        let mut levels = Vec::with_capacity(types.len());
        for (i, kind) in types.iter().enumerate() {
            let (input, output) = (channels[i.saturating_sub(1)], channels[i]);
            let attends = *kind == UpBlock::AttnUpDecoderBlock2D;
            let mut at = scope.at(format!("up_blocks.{i}"));
            let mut level = self.level(&mut at, [input, output], self.layers + 1, attends)?;
            if i + 1 < types.len() {
                level.resample = Some(at.conv2d("upsamplers.0.conv", [output; 2], 3, 1, false)?);
            }
            levels.push(level);
        }
        let norm_out = scope.group_norm("conv_norm_out", last, self.groups, EPS)?;
        let conv_out = scope.conv2d("conv_out", [last, output], 3, 1, false)?;
        Ok(Half { up: true, conv_in, levels, middle, norm_out, conv_out })
    }
}

/// The encoder or the decoder.
#[derive(Clone, Debug)]
pub(super) struct Half {
    up: bool,
    conv_in: Conv2d,
    levels: Vec<Level>,
    middle: Level,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// Resnets, each with attention behind it if there is one; and what changes the size at the end.
#[derive(Clone, Debug)]
struct Level {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<AttentionBlock>,
    resample: Option<Conv2d>,
}

impl Half {
    pub fn forward<B: Backend>(&self, b: &B, x: &B::Value) -> Result<B::Value> {
        let mut h = b.conv2d(x, &self.conv_in)?;
        if self.up {
            h = self.middle.forward(b, h)?;
        }
        for level in &self.levels {
            h = level.forward(b, h)?;
            h = match &level.resample {
                Some(conv) if self.up => b.conv2d(&b.upsample_2x(&h)?, conv)?,
                Some(conv) => b.conv2d(&b.pad_right_bottom(&h)?, conv)?,
                None => h,
            };
        }
        if !self.up {
            h = self.middle.forward(b, h)?;
        }
        // SiLU whatever act_fn says, as in diffusers.
        b.conv2d(&b.group_norm(&h, &self.norm_out, Some(Activation::Silu))?, &self.conv_out)
    }

    pub fn conv_in(&self) -> &Conv2d {
        &self.conv_in
    }
}

impl Level {
    fn forward<B: Backend>(&self, b: &B, mut h: B::Value) -> Result<B::Value> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            h = b.block(resnet, &h, &[])?;
            if let Some(attention) = self.attentions.get(i) {
                h = b.block(attention, &h, &[])?;
            }
        }
        Ok(h)
    }
}
