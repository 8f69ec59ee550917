//! The levels of a UNet: resnets, with attention after each where a level has it, and what halves and doubles the map
//! between levels (diffusers' down, mid and up blocks). What differs between UNets is told by a [`Plan`].

use super::{AttentionBlock, Resample, Resampler, ResnetBlock, ResnetShape, Transformer};
use crate::backend::{Activation, Backend};
use crate::layers::{Conv2d, GroupNorm, Scope};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Where layers stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the way down, the outermost first.
    Down(usize),
    /// Between the ways.
    Middle,
    /// On the way up, the innermost first.
    Up(usize),
}

/// The layers of a place.
#[derive(Clone, Copy, Debug)]
pub struct Layers {
    /// How many.
    pub n: usize,
    /// What their resnets have in common.
    pub resnet: ResnetShape,
    /// How the next level is reached.
    pub resampling: Resampling,
}

/// `downsample_type`, `upsample_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resampling {
    /// A strided convolution down; nearest neighbour and a convolution up.
    Conv,
    /// A resnet that averages or doubles inside.
    Resnet,
}

/// What surrounds the levels.
#[derive(Clone, Debug)]
pub struct Ends {
    /// Channels of the sample and of the prediction.
    pub io: [usize; 2],
    /// Sides of the first and the last convolution's kernels, odd.
    pub kernels: [usize; 2],
    /// Channels of each level.
    pub channels: Vec<usize>,
    /// 1: convolutions that halve see a frame of zeros; 0: a row and a column on the right and below.
    pub downsample_padding: usize,
    /// Groups of the last norm.
    pub groups: usize,
    /// Added to its variance.
    pub eps: f64,
    /// The non-linearity after it.
    pub act: Activation,
}

/// What a configuration says of its levels.
pub trait Plan {
    /// What surrounds them.
    fn ends(&self) -> Ends;

    /// The layers of a place; none where it is left out, as the middle may be.
    fn layers(&self, at: Place) -> Result<Option<Layers>>;

    /// What follows the resnet of a layer, which gives so many channels.
    fn attention(&self, scope: Scope, at: Place, layer: usize, channels: usize) -> Result<Option<Attention>>;
}

/// What follows a resnet.
#[derive(Clone, Debug)]
pub enum Attention {
    /// To the map's own pixels.
    Pixels(AttentionBlock),
    /// To those and to text.
    Text(Transformer),
}

/// What layers read beside the map.
#[derive(Debug)]
pub struct Beside<'a, V> {
    /// The embedding of time and of what else is told, `(B or 1, width)`.
    pub emb: &'a V,
    /// A prompt's tokens, `(B, C, 1, N)`.
    pub text: Option<&'a V>,
}

/// The whole way, with parameters in place.
#[derive(Clone, Debug)]
pub struct Levels {
    conv_in: Conv2d,
    down: Vec<Level>,
    middle: Option<Level>,
    up: Vec<Level>,
    norm_out: GroupNorm,
    act: Activation,
    conv_out: Conv2d,
}

/// What the way up and the readers of maps need of the way down.
#[derive(Clone, Debug)]
pub struct Encoded<V> {
    /// What leaves the middle.
    pub bottleneck: V,
    skips: Vec<V>,
    /// Last map of every level, before it is shrunk.
    maps: Vec<V>,
}

impl<V> Encoded<V> {
    /// The last map of every level, the bottleneck in the place of the innermost.
    pub fn maps(self) -> Vec<V> {
        let Encoded { bottleneck, mut maps, .. } = self;
        maps.pop();
        maps.push(bottleneck);
        maps
    }
}

impl Levels {
    /// Takes its parameters from the network's scope.
    pub fn build(plan: &impl Plan, root: &mut Scope) -> Result<Self> {
        let ends = plan.ends();
        let channels = &ends.channels;
        let Some((&first, &last)) = channels.first().zip(channels.last()) else {
            return Err(Error::Config("block_out_channels names no level".into()));
        };
        let n = channels.len();
        let mut level = |name: String, at: Place, io: [usize; 3]| Level::build(plan, &ends, root.at(name), at, io);
        let down = (0..n).map(|i| {
            let input = channels[i.saturating_sub(1)];
            level(format!("down_blocks.{i}"), Place::Down(i), [input, 0, channels[i]])
        });
        let down = down.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let middle = level("mid_block".into(), Place::Middle, [last, 0, last])?;
        let up = (0..n).map(|i| {
            let at = n - 1 - i;
            let io = [channels[(at + 1).min(n - 1)], channels[at.saturating_sub(1)], channels[at]];
            level(format!("up_blocks.{i}"), Place::Up(i), io)
        });
        let up = up.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        Ok(Levels {
            conv_in: root.conv2d("conv_in", [ends.io[0], first], ends.kernels[0], 1, false)?,
            norm_out: root.group_norm("conv_norm_out", first, ends.groups, ends.eps)?,
            conv_out: root.conv2d("conv_out", [first, ends.io[1]], ends.kernels[1], 1, true)?,
            act: ends.act,
            down,
            middle,
            up,
        })
    }

    /// A tensor of it, which lies where all lie.
    pub fn weight(&self) -> &candle_core::Tensor {
        &self.conv_in.weight
    }

    /// The way down and the middle, x `(B, C, H, W)`.
    pub fn encode<B: Backend>(&self, b: &B, x: &B::Value, beside: &Beside<B::Value>) -> Result<Encoded<B::Value>> {
        let mut h = b.conv2d(x, &self.conv_in)?;
        let (mut skips, mut maps) = (vec![h.clone()], Vec::new());
        for level in &self.down {
            for layer in 0..level.resnets.len() {
                h = level.layer(b, layer, &h, beside)?;
                skips.push(h.clone());
            }
            // Without layers, what came in.
            maps.push(h.clone());
            if let Some(resampler) = &level.resampler {
                h = resampler.forward(b, &h, beside.emb, None)?;
                skips.push(h.clone());
            }
        }
        if let Some(middle) = &self.middle {
            for layer in 0..middle.resnets.len() {
                h = middle.layer(b, layer, &h, beside)?;
            }
        }
        Ok(Encoded { bottleneck: h, skips, maps })
    }

    /// The way up, to `(B, C', H, W)`.
    pub fn decode<B: Backend>(&self, b: &B, encoded: Encoded<B::Value>, beside: &Beside<B::Value>) -> Result<B::Value> {
        let Encoded { bottleneck: mut h, mut skips, .. } = encoded;
        for level in &self.up {
            for layer in 0..level.resnets.len() {
                let skip = skips.pop().ok_or_else(|| Error::Config("fewer skip connections than up layers".into()))?;
                h = level.layer(b, layer, &b.concat(&h, &skip)?, beside)?;
            }
            if let Some(resampler) = &level.resampler {
                let sides = skips.last().map(|skip| b.dims(skip)).and_then(|dims| Some([*dims.get(2)?, *dims.get(3)?]));
                h = resampler.forward(b, &h, beside.emb, sides)?;
            }
        }
        b.conv2d(&b.group_norm(&h, &self.norm_out, Some(self.act))?, &self.conv_out)
    }
}

/// The layers of one place.
#[derive(Clone, Debug)]
struct Level {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<Option<Attention>>,
    resampler: Option<Resampler>,
}

impl Level {
    /// `input`: channels that come in; `skip`: of the last skip connection; `output`: of every other map.
    fn build(
        plan: &impl Plan,
        ends: &Ends,
        mut scope: Scope,
        at: Place,
        [input, skip, output]: [usize; 3],
    ) -> Result<Option<Self>> {
        let Some(Layers { n, resnet, resampling }) = plan.layers(at)? else { return Ok(None) };
        let (mut resnets, mut attentions) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for layer in 0..n {
            let joined = match at {
                Place::Up(_) if layer + 1 == n => skip,
                Place::Up(_) => output,
                _ => 0,
            };
            let channels = if layer == 0 { input } else { output } + joined;
            resnets.push(ResnetBlock::build(scope.at(format!("resnets.{layer}")), [channels, output], resnet)?);
            attentions.push(plan.attention(scope.at(format!("attentions.{layer}")), at, layer, output)?);
        }
        let further = |i: usize| i + 1 < ends.channels.len();
        let resampler = match at {
            Place::Down(i) if further(i) => {
                Some(Resampler::down(scope, output, resampling, ends.downsample_padding, resnet)?)
            }
            Place::Up(i) if further(i) => Some(Resampler::up(scope, output, resampling, resnet)?),
            _ => None,
        };
        Ok(Some(Level { resnets, attentions, resampler }))
    }

    fn layer<B: Backend>(&self, b: &B, i: usize, x: &B::Value, beside: &Beside<B::Value>) -> Result<B::Value> {
        let h = b.block(&self.resnets[i], x, &[beside.emb])?;
        match (&self.attentions[i], beside.text) {
            (Some(Attention::Pixels(attention)), _) => b.block(attention, &h, &[]),
            (Some(Attention::Text(transformer)), Some(text)) => transformer.forward(b, &h, text),
            (Some(Attention::Text(_)), None) => Err(Error::Config("this network needs a text".into())),
            (None, _) => Ok(h),
        }
    }
}

impl Resampler {
    /// To half the sides.
    fn down(mut scope: Scope, channels: usize, how: Resampling, padding: usize, resnet: ResnetShape) -> Result<Self> {
        Ok(match how {
            Resampling::Conv => {
                let conv = scope.conv2d("downsamplers.0.conv", [channels, channels], 3, 2, false)?;
                Resampler::DownConv { conv: Conv2d { padding, ..conv }, pad: padding == 0 }
            }
            Resampling::Resnet => {
                let shape = ResnetShape { resample: Some(Resample::Down), ..resnet };
                Resampler::Resnet(Box::new(ResnetBlock::build(scope.at("downsamplers.0"), [channels; 2], shape)?))
            }
        })
    }

    /// To twice the sides.
    fn up(mut scope: Scope, channels: usize, how: Resampling, resnet: ResnetShape) -> Result<Self> {
        Ok(match how {
            Resampling::Conv => {
                Resampler::UpConv(scope.conv2d("upsamplers.0.conv", [channels, channels], 3, 1, false)?)
            }
            Resampling::Resnet => {
                let shape = ResnetShape { resample: Some(Resample::Up), ..resnet };
                Resampler::Resnet(Box::new(ResnetBlock::build(scope.at("upsamplers.0"), [channels; 2], shape)?))
            }
        })
    }
}
