//! Resnets, and what changes the size of a map.

use super::add_scaled;
use crate::backend::{Activation, Axis, Backend, Block};
use crate::layers::{Conv2d, GroupNorm, Linear, Scope};
use crate::{Error, Result};

/// Norm, activation, convolution, twice, with the time embedding in between and a shortcut around.
#[derive(Clone, Debug)]
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    shape: ResnetShape,
}

/// What resnets of one network have in common, and where one of them differs.
#[derive(Clone, Copy, Debug)]
pub struct ResnetShape {
    /// Width of the time embedding; none in autoencoders.
    pub time_dim: Option<usize>,
    /// Groups of both norms.
    pub groups: usize,
    /// Added to their variances.
    pub eps: f64,
    /// The non-linearity.
    pub act: Activation,
    /// The embedding enters as it is, without the non-linearity.
    pub skip_time_act: bool,
    /// The embedding scales and shifts after the second norm, instead of being added before it.
    pub scale_shift: bool,
    /// The sum with the input is divided by this.
    pub output_scale: f64,
    /// What happens to the map's size inside.
    pub resample: Option<Resample>,
}

/// To twice or half the height and width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Resample {
    /// Nearest neighbour.
    Up,
    /// The mean of 2×2 blocks.
    Down,
}

impl ResnetBlock {
    /// Takes its parameters from `scope`.
    pub fn build(mut scope: Scope, [input, output]: [usize; 2], shape: ResnetShape) -> Result<Self> {
        let ResnetShape { time_dim, groups, eps, scale_shift, .. } = shape;
        let projected = if scale_shift { 2 * output } else { output };
        Ok(ResnetBlock {
            norm1: scope.group_norm("norm1", input, groups, eps)?,
            conv1: scope.conv2d("conv1", [input, output], 3, 1, false)?,
            time_emb_proj: match time_dim {
                Some(time_dim) => Some(scope.linear("time_emb_proj", [time_dim, projected])?),
                None => None,
            },
            norm2: scope.group_norm("norm2", output, groups, eps)?,
            conv2: scope.conv2d("conv2", [output, output], 3, 1, true)?,
            conv_shortcut: match input == output {
                true => None,
                false => Some(scope.conv2d("conv_shortcut", [input, output], 1, 1, false)?),
            },
            shape,
        })
    }
}

impl Block for ResnetBlock {
    /// Reads the embedding of time and class beside x, if it was built for one.
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, beside: &[&B::Value]) -> Result<B::Value> {
        let ResnetShape { act, skip_time_act, scale_shift, output_scale, resample, .. } = self.shape;
        let mut h = b.group_norm(x, &self.norm1, Some(act))?;
        let mut x = x.clone();
        match resample {
            Some(Resample::Up) => (x, h) = (b.upsample_2x(&x)?, b.upsample_2x(&h)?),
            Some(Resample::Down) => (x, h) = (b.avg_pool_2x(&x)?, b.avg_pool_2x(&h)?),
            None => {}
        }
        let emb = match (&self.time_emb_proj, beside) {
            (Some(proj), [emb]) if skip_time_act => Some(b.linear(emb, proj)?),
            (Some(proj), [emb]) => Some(b.linear(&b.activation(emb, act)?, proj)?),
            (None, []) => None,
            _ => return Err(Error::Unsupported("a resnet reads the embedding it was built for beside x".into())),
        };
        h = if let (true, Some(emb)) = (scale_shift, &emb) {
            let width = b.dims(emb)[1] / 2;
            let (scale, shift) = (b.columns(emb, 0, width)?, b.columns(emb, width, width)?);
            let h = b.group_norm(&b.conv2d(&h, &self.conv1)?, &self.norm2, None)?;
            b.activation(&b.modulate(&h, &scale, &shift)?, act)?
        } else {
            let h = match &emb {
                Some(emb) => b.conv2d_add_per_channel(&h, &self.conv1, emb)?,
                None => b.conv2d(&h, &self.conv1)?,
            };
            b.group_norm(&h, &self.norm2, Some(act))?
        };
        h = b.conv2d(&h, &self.conv2)?;
        if let Some(conv) = &self.conv_shortcut {
            x = b.conv2d(&x, conv)?;
        }
        add_scaled(b, &x, &h, output_scale)
    }
}

/// From one resolution to the next.
#[derive(Clone, Debug)]
pub enum Resampler {
    /// Strided convolution, after a row and a column of zeros if `pad`.
    DownConv {
        /// Of stride 2.
        conv: Conv2d,
        /// diffusers' `downsample_padding` 0.
        pad: bool,
    },
    /// Doubling, then convolution.
    UpConv(Conv2d),
    /// A resnet that resamples inside.
    Resnet(Box<ResnetBlock>),
}

impl Resampler {
    /// x `(B, C, H, W)` with the embedding of time and class. `sides`, where they are known, are those of the map that the
    /// result meets: one less than twice where an odd side was halved.
    pub fn forward<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        emb: &B::Value,
        sides: Option<[usize; 2]>,
    ) -> Result<B::Value> {
        match self {
            Resampler::DownConv { conv, pad: true } => b.conv2d(&b.pad_right_bottom(x)?, conv),
            Resampler::DownConv { conv, pad: false } => b.conv2d(x, conv),
            Resampler::UpConv(conv) => {
                let mut doubled = b.upsample_2x(x)?;
                for (axis, side) in [Axis::Rows, Axis::Tokens].into_iter().zip(sides.into_iter().flatten()) {
                    if b.dims(&doubled)[axis.of_map()] > side {
                        doubled = b.slice(&doubled, axis, 0, side)?;
                    }
                }
                b.conv2d(&doubled, conv)
            }
            Resampler::Resnet(block) => b.block(&**block, x, &[emb]),
        }
    }
}
