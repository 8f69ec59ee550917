//! The UNet of diffusers' `UNet2DModel`, over [`Backend`]. Every field of its `config.json` is honoured, or refused by
//! name with the reason. Tensor names and the order of operations are diffusers' (0.42), so that its weights load here
//! and ours load there with equal outputs.

use crate::backend::{Activation, Backend, Block, Network};
use crate::layers::{Conv2d, Draws, Embedding, GroupNorm, Init, Linear, Loader, Random, Scope, Source};
use crate::{Error, Result, Weights, ops};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

mod config;
pub use config::{ClassEmbedding, Resampling, SampleSize, TimeEmbedding, TimeScaleShift, UNetConfig};

/// A UNet with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    conv_in: Conv2d,
    time_proj: TimeProjection,
    time_embedding: [Linear; 2],
    class_embedding: Option<ClassTable>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Builds the network on these weights (diffusers' names); gradients reach whatever among them are variables.
    /// Fails naming every tensor that is missing, left over or of a wrong shape.
    pub fn new(config: &UNetConfig, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let mut loader = Loader::new(weights);
        let net = Self::build(config, &mut loader)?;
        loader.finish()?;
        Ok(net)
    }

    /// Fresh weights (CPU, f32): PyTorch's defaults, with the last layer of every residual branch and of the whole
    /// network at zero, so that training starts from the identity. `draw` gives uniform numbers in [0, 1) by name.
    pub fn init(config: &UNetConfig, draw: &mut Draws) -> Result<Weights> {
        config.validate()?;
        let mut random = Random::new(draw);
        Self::build(config, &mut random)?;
        Ok(random.weights)
    }

    /// The configuration this network was built from.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The device its weights lie on.
    pub fn device(&self) -> &Device {
        self.conv_in.weight.device()
    }

    /// Runs the network. x `(B, C, H, W)`; `t`: one timestep for all or one per sample; `label`: ids `(B,)` i64, or
    /// vectors `(B, time_embedding_dim)` for `class_embed_type` identity. Returns `(B, C', H, W)`.
    pub fn forward<B: Backend>(&self, b: &B, x: &B::Value, t: &[f64], label: Option<&B::Value>) -> Result<B::Value> {
        let mut outputs = b.network(&Run { unet: self, t, what: What::Output }, x, label)?;
        outputs.pop().ok_or_else(|| Error::Config("the network has no output".into()))
    }

    /// The same, operation by operation.
    fn decode<B: Backend>(&self, b: &B, x: &B::Value, t: &[f64], label: Option<&B::Value>) -> Result<B::Value> {
        let Encoded { bottleneck: mut h, emb, mut skips, .. } = self.encode(b, x, t, label)?;
        for block in &self.up_blocks {
            h = block.forward(b, h, &emb, &mut skips)?;
        }
        h = b.group_norm(&h, &self.conv_norm_out, Some(Activation::Silu))?;
        h = b.conv2d(&h, &self.conv_out)?;
        match self.config.time_embedding_type {
            // diffusers divides by the timestep here, which is a sigma for these (score SDE) networks.
            TimeEmbedding::Fourier => b.affine(&h, &t.iter().map(|t| 1.0 / t).collect::<Vec<_>>(), 0.0),
            _ => Ok(h),
        }
    }

    /// What the encoder sees: its last map of every resolution, finest first; the last one is the bottleneck, after the
    /// middle block. Arguments as in [`UNet::forward`].
    pub fn features<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        label: Option<&B::Value>,
    ) -> Result<Vec<B::Value>> {
        b.network(&Run { unet: self, t, what: What::Features }, x, label)
    }

    /// The way down and the middle.
    fn encode<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        label: Option<&B::Value>,
    ) -> Result<Encoded<B::Value>> {
        let centred = if self.config.center_input_sample { b.affine(x, &[2.0], -1.0)? } else { x.clone() };
        let emb = self.embed(b, t, label)?;
        let mut h = b.conv2d(&centred, &self.conv_in)?;
        let mut skips = vec![h.clone()];
        let mut maps = Vec::new();
        for block in &self.down_blocks {
            h = block.forward(b, h, &emb, &mut skips)?;
            // The last skip, or the one before where the block went on to shrink it.
            maps.push(skips[skips.len() - 1 - usize::from(block.downsampler.is_some())].clone());
        }
        if let Some(block) = &self.mid_block {
            h = block.forward(b, &h, &emb)?;
        }
        Ok(Encoded { bottleneck: h, emb, skips, maps })
    }

    /// Time and class as one vector per sample, `(B or 1, time_embedding_dim)`.
    fn embed<B: Backend>(&self, b: &B, t: &[f64], label: Option<&B::Value>) -> Result<B::Value> {
        let [linear_1, linear_2] = &self.time_embedding;
        let time = b.constant(&self.time_proj.embed(t, self.device())?)?;
        let hidden = b.activation(&b.linear(&time, linear_1)?, Activation::Silu)?;
        let time = b.linear(&hidden, linear_2)?;
        match (&self.class_embedding, label) {
            (None, None) => Ok(time),
            (Some(table), Some(label)) => b.add(&table.forward(b, label)?, &time),
            (Some(_), None) => Err(Error::Config("this UNet is class-conditional and needs a class label".into())),
            (None, Some(_)) => Err(Error::Config("this UNet takes no class label".into())),
        }
    }

    fn build(config: &UNetConfig, source: &mut dyn Source) -> Result<Self> {
        let mut root = Scope::root(source);
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let time_dim = config.time_dim();
        let time_proj = TimeProjection::build(config, &mut root)?;
        let mlp = |scope: &mut Scope, name: &str| -> Result<[Linear; 2]> {
            let mut scope = scope.at(name);
            Ok([
                scope.linear("linear_1", [time_proj.width(), time_dim])?,
                scope.linear("linear_2", [time_dim, time_dim])?,
            ])
        };
        let time_embedding = mlp(&mut root, "time_embedding")?;
        let class_embedding = match config.class_embedding() {
            ClassEmbedding::None => None,
            ClassEmbedding::Table(n) => Some(ClassTable::Embedding(root.embedding("class_embedding", n, time_dim)?)),
            ClassEmbedding::Timestep => {
                Some(ClassTable::Timestep { projection: time_proj.clone(), mlp: mlp(&mut root, "class_embedding")? })
            }
            ClassEmbedding::Identity => Some(ClassTable::Identity),
        };
        let n_blocks = channels.len();
        let mut down_blocks = Vec::with_capacity(n_blocks);
        for (i, &output) in channels.iter().enumerate() {
            let input = if i == 0 { first } else { channels[i - 1] };
            down_blocks.push(DownBlock::build(config, root.at(format!("down_blocks.{i}")), i, [input, output])?);
        }
        let mid_block = match config.mid_block_type {
            Some(_) => Some(MidBlock::build(config, root.at("mid_block"), last)?),
            None => None,
        };
        let mut up_blocks = Vec::with_capacity(n_blocks);
        for i in 0..n_blocks {
            let level = n_blocks - 1 - i;
            let below = channels[(level + 1).min(n_blocks - 1)];
            let skip = channels[level.saturating_sub(1)];
            let scope = root.at(format!("up_blocks.{i}"));
            up_blocks.push(UpBlock::build(config, scope, i, [below, skip, channels[level]])?);
        }
        Ok(UNet {
            conv_in: root.conv2d("conv_in", [config.in_channels, first], 3, 1, false)?,
            conv_norm_out: root.group_norm("conv_norm_out", first, config.norm_num_groups, config.norm_eps)?,
            conv_out: root.conv2d("conv_out", [first, config.out_channels], 3, 1, true)?,
            config: config.clone(),
            time_proj,
            time_embedding,
            class_embedding,
            down_blocks,
            mid_block,
            up_blocks,
        })
    }
}

/// One run of the network.
struct Run<'a> {
    unet: &'a UNet,
    t: &'a [f64],
    what: What,
}

/// What a run is for.
#[derive(Clone, Copy)]
enum What {
    Output,
    Features,
}

impl Network for Run<'_> {
    fn run<B: Backend>(&self, b: &B, x: &B::Value, label: Option<&B::Value>) -> Result<Vec<B::Value>> {
        match self.what {
            What::Output => Ok(vec![self.unet.decode(b, x, self.t, label)?]),
            What::Features => {
                let Encoded { bottleneck, mut maps, .. } = self.unet.encode(b, x, self.t, label)?;
                maps.pop();
                maps.push(bottleneck);
                Ok(maps)
            }
        }
    }
}

/// What the decoder and the readers of features need of the encoder.
struct Encoded<V> {
    bottleneck: V,
    emb: V,
    skips: Vec<V>,
    /// Last map of every resolution, before it is shrunk.
    maps: Vec<V>,
}

/// Timesteps to vectors, before any learned layer. f32 throughout, as diffusers does it.
#[derive(Clone, Debug)]
enum TimeProjection {
    /// sin(t·f) and cos(t·f), f geometric from 1 to 1/10000.
    Positional { frequencies: Vec<f32>, flip: bool, odd: bool },
    /// sin and cos of 2π·w·log t with stored random w.
    Fourier { weight: Vec<f32> },
    /// A table row per integer timestep.
    Learned { table: Embedding },
}

impl TimeProjection {
    fn build(config: &UNetConfig, root: &mut Scope) -> Result<Self> {
        let width = config.block_out_channels[0];
        let mut scope = root.at("time_proj");
        Ok(match config.time_embedding_type {
            TimeEmbedding::Positional => {
                let half = width / 2;
                let frequency = |i: usize| {
                    let exponent = -(10000f64.ln() as f32) * i as f32 / (half as f64 - config.freq_shift) as f32;
                    exponent.exp()
                };
                let frequencies = (0..half).map(frequency).collect();
                TimeProjection::Positional { frequencies, flip: config.flip_sin_to_cos, odd: width % 2 == 1 }
            }
            TimeEmbedding::Fourier => {
                let weight = scope.tensor("weight", &[width], Init::Normal(16.0))?;
                TimeProjection::Fourier { weight: weight.to_dtype(DType::F32)?.to_vec1()? }
            }
            TimeEmbedding::Learned => {
                let entries = config.num_train_timesteps.unwrap_or(0);
                let weight = scope.tensor("weight", &[entries, width], Init::Normal(1.0))?;
                TimeProjection::Learned { table: Embedding { name: scope.path(""), weight } }
            }
        })
    }

    fn width(&self) -> usize {
        match self {
            TimeProjection::Positional { frequencies, odd, .. } => 2 * frequencies.len() + usize::from(*odd),
            TimeProjection::Fourier { weight } => 2 * weight.len(),
            TimeProjection::Learned { table } => table.weight.dims()[1],
        }
    }

    /// f32 `(t.len(), width)`.
    fn embed(&self, t: &[f64], device: &Device) -> Result<Tensor> {
        let rows: Vec<f32> = match self {
            // A few numbers are sent at once; a table of them would wait for the GPU.
            TimeProjection::Positional { frequencies, flip, odd: false } if !device.is_cpu() => {
                let t = Tensor::from_vec(t.iter().map(|&t| t as f32).collect(), t.len(), device)?;
                let frequencies = Tensor::new(frequencies.as_slice(), device)?;
                return Ok(ops::sinusoid(&t, &frequencies, *flip)?);
            }
            TimeProjection::Positional { frequencies, flip, odd } => t
                .iter()
                .flat_map(|&t| {
                    let mut row = sines_and_cosines(frequencies.iter().map(|f| t as f32 * f), *flip);
                    row.extend(odd.then_some(0.0));
                    row
                })
                .collect(),
            TimeProjection::Fourier { weight } => t
                .iter()
                .flat_map(|&t| {
                    // The angles run to hundreds of turns: f64 until the sine is taken.
                    let log = t.ln();
                    let angles = weight.iter().map(|&w| log * f64::from(w) * std::f64::consts::TAU);
                    angles.clone().map(|a| a.sin() as f32).chain(angles.map(|a| a.cos() as f32)).collect::<Vec<f32>>()
                })
                .collect(),
            TimeProjection::Learned { table } => {
                let entries = table.weight.dims()[0];
                let ids = t.iter().map(|&t| {
                    let inside = t >= 0.0 && t < entries as f64 && t.fract() == 0.0;
                    let refuse = || {
                        Error::Config(format!(
                            "time_embedding_type learned: timestep {t} is not an integer below {entries}"
                        ))
                    };
                    inside.then_some(t as u32).ok_or_else(refuse)
                });
                let ids = Tensor::from_vec(ids.collect::<Result<Vec<u32>>>()?, t.len(), table.weight.device())?;
                return Ok(table.weight.index_select(&ids, 0)?);
            }
        };
        Ok(Tensor::from_vec(rows, (t.len(), self.width()), device)?)
    }
}

fn sines_and_cosines(angles: impl Iterator<Item = f32> + Clone, cosines_first: bool) -> Vec<f32> {
    let (sines, cosines) = (angles.clone().map(f32::sin), angles.map(f32::cos));
    if cosines_first { cosines.chain(sines).collect() } else { sines.chain(cosines).collect() }
}

/// Class labels to vectors of the time embedding's width.
#[derive(Clone, Debug)]
enum ClassTable {
    Embedding(Embedding),
    Timestep { projection: TimeProjection, mlp: [Linear; 2] },
    Identity,
}

impl ClassTable {
    fn forward<B: Backend>(&self, b: &B, label: &B::Value) -> Result<B::Value> {
        match self {
            ClassTable::Embedding(table) => b.embedding(label, table),
            ClassTable::Identity => Ok(label.clone()),
            ClassTable::Timestep { projection, mlp } => {
                let TimeProjection::Positional { frequencies, flip, .. } = projection else {
                    return Err(Error::Config("class_embed_type timestep needs time_embedding_type positional".into()));
                };
                let frequencies = Tensor::new(frequencies.as_slice(), &Device::Cpu)?;
                let hidden = b.linear(&b.sinusoid(label, &frequencies, *flip)?, &mlp[0])?;
                b.linear(&b.activation(&hidden, Activation::Silu)?, &mlp[1])
            }
        }
    }
}

/// Norm, activation, convolution, twice, with the time embedding in between and a shortcut around.
#[derive(Clone, Debug)]
struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    act: Activation,
    scale_shift: bool,
    output_scale: f64,
    resample: Option<Resample>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Resample {
    Up,
    Down,
}

impl ResnetBlock {
    fn build(config: &UNetConfig, mut scope: Scope, [input, output]: [usize; 2]) -> Result<Self> {
        let (groups, eps) = (config.norm_num_groups, config.norm_eps);
        let scale_shift = config.resnet_time_scale_shift == TimeScaleShift::ScaleShift;
        let projected = if scale_shift { 2 * output } else { output };
        Ok(ResnetBlock {
            norm1: scope.group_norm("norm1", input, groups, eps)?,
            conv1: scope.conv2d("conv1", [input, output], 3, 1, false)?,
            time_emb_proj: scope.linear("time_emb_proj", [config.time_dim(), projected])?,
            norm2: scope.group_norm("norm2", output, groups, eps)?,
            conv2: scope.conv2d("conv2", [output, output], 3, 1, true)?,
            conv_shortcut: match input == output {
                true => None,
                false => Some(scope.conv2d("conv_shortcut", [input, output], 1, 1, false)?),
            },
            act: config.act_fn,
            scale_shift,
            output_scale: 1.0,
            resample: None,
        })
    }

    fn resampling(mut self, resample: Resample) -> Self {
        self.resample = Some(resample);
        self
    }
}

impl Block for ResnetBlock {
    /// Reads the embedding of time and class beside x.
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, beside: &[&B::Value]) -> Result<B::Value> {
        let [emb] = beside else { return Err(Error::Unsupported("a resnet reads one vector beside x".into())) };
        let mut h = b.group_norm(x, &self.norm1, Some(self.act))?;
        let mut x = x.clone();
        match self.resample {
            Some(Resample::Up) => (x, h) = (b.upsample_2x(&x)?, b.upsample_2x(&h)?),
            Some(Resample::Down) => (x, h) = (b.avg_pool_2x(&x)?, b.avg_pool_2x(&h)?),
            None => {}
        }
        let emb = b.linear(&b.activation(emb, self.act)?, &self.time_emb_proj)?;
        h = if self.scale_shift {
            let width = b.dims(&emb)[1] / 2;
            let (scale, shift) = (b.columns(&emb, 0, width)?, b.columns(&emb, width, width)?);
            let h = b.group_norm(&b.conv2d(&h, &self.conv1)?, &self.norm2, None)?;
            b.activation(&b.modulate(&h, &scale, &shift)?, self.act)?
        } else {
            b.group_norm(&b.conv2d_add_per_channel(&h, &self.conv1, &emb)?, &self.norm2, Some(self.act))?
        };
        h = b.conv2d(&h, &self.conv2)?;
        if let Some(conv) = &self.conv_shortcut {
            x = b.conv2d(&x, conv)?;
        }
        add_scaled(b, &x, &h, self.output_scale)
    }
}

/// (x + h) / scale.
fn add_scaled<B: Backend>(b: &B, x: &B::Value, h: &B::Value, scale: f64) -> Result<B::Value> {
    let sum = b.add(x, h)?;
    if scale == 1.0 { Ok(sum) } else { b.affine(&sum, &[1.0 / scale], 0.0) }
}

/// Self-attention over pixels with a residual connection (diffusers' `Attention` in its UNet2D form).
#[derive(Clone, Debug)]
struct AttentionBlock {
    group_norm: Option<GroupNorm>,
    to_q: Conv2d,
    to_k: Conv2d,
    to_v: Conv2d,
    to_out: Conv2d,
    heads: usize,
    output_scale: f64,
}

impl AttentionBlock {
    fn build(config: &UNetConfig, mut scope: Scope, channels: usize, groups: Option<usize>) -> Result<Self> {
        let head_dim = config.attention_head_dim.unwrap_or(channels);
        let heads = channels / head_dim;
        if heads == 0 {
            return Err(Error::Config(format!(
                "attention_head_dim {head_dim} is larger than a block's {channels} channels"
            )));
        }
        // Where the head width does not divide the channels, diffusers projects to the largest multiple.
        let inner = heads * head_dim;
        Ok(AttentionBlock {
            group_norm: match groups {
                Some(groups) => Some(scope.group_norm("group_norm", channels, groups, config.norm_eps)?),
                None => None,
            },
            to_q: scope.pointwise("to_q", [channels, inner], false)?,
            to_k: scope.pointwise("to_k", [channels, inner], false)?,
            to_v: scope.pointwise("to_v", [channels, inner], false)?,
            to_out: scope.pointwise("to_out.0", [inner, channels], true)?,
            heads,
            output_scale: 1.0,
        })
    }
}

impl Block for AttentionBlock {
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, _: &[&B::Value]) -> Result<B::Value> {
        let h = match &self.group_norm {
            Some(norm) => b.group_norm(x, norm, None)?,
            None => x.clone(),
        };
        let (q, k, v) = (b.conv2d(&h, &self.to_q)?, b.conv2d(&h, &self.to_k)?, b.conv2d(&h, &self.to_v)?);
        let h = b.conv2d(&b.attention(&q, &k, &v, self.heads)?, &self.to_out)?;
        add_scaled(b, x, &h, self.output_scale)
    }
}

/// The resnets of one resolution, each followed by attention where the block's type says so.
#[derive(Clone, Debug)]
struct Stage {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<AttentionBlock>,
}

impl Stage {
    fn build(config: &UNetConfig, scope: &mut Scope, inputs: &[usize], output: usize, attention: bool) -> Result<Self> {
        let mut stage = Stage { resnets: Vec::new(), attentions: Vec::new() };
        for (i, &input) in inputs.iter().enumerate() {
            stage.resnets.push(ResnetBlock::build(config, scope.at(format!("resnets.{i}")), [input, output])?);
            if attention {
                let scope = scope.at(format!("attentions.{i}"));
                stage.attentions.push(AttentionBlock::build(config, scope, output, Some(config.norm_num_groups))?);
            }
        }
        Ok(stage)
    }

    fn layer<B: Backend>(&self, b: &B, i: usize, x: &B::Value, emb: &B::Value) -> Result<B::Value> {
        let h = b.block(&self.resnets[i], x, &[emb])?;
        match self.attentions.get(i) {
            Some(attention) => b.block(attention, &h, &[]),
            None => Ok(h),
        }
    }
}

#[derive(Clone, Debug)]
enum Resampler {
    /// Strided convolution, after a row and a column of zeros if `pad`.
    DownConv {
        conv: Conv2d,
        pad: bool,
    },
    /// Doubling, then convolution.
    UpConv(Conv2d),
    Resnet(Box<ResnetBlock>),
}

impl Resampler {
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, emb: &B::Value) -> Result<B::Value> {
        match self {
            Resampler::DownConv { conv, pad: true } => b.conv2d(&b.pad_right_bottom(x)?, conv),
            Resampler::DownConv { conv, pad: false } => b.conv2d(x, conv),
            Resampler::UpConv(conv) => b.conv2d(&b.upsample_2x(x)?, conv),
            Resampler::Resnet(block) => b.block(&**block, x, &[emb]),
        }
    }
}

#[derive(Clone, Debug)]
struct DownBlock {
    stage: Stage,
    downsampler: Option<Resampler>,
}

impl DownBlock {
    fn build(config: &UNetConfig, mut scope: Scope, i: usize, [input, output]: [usize; 2]) -> Result<Self> {
        let kind = config.down_block(i)?;
        let inputs: Vec<usize> = (0..config.layers_per_block).map(|l| if l == 0 { input } else { output }).collect();
        let stage = Stage::build(config, &mut scope, &inputs, output, kind.attention)?;
        let last = i + 1 == config.block_out_channels.len();
        let downsampler = match kind.resampling {
            _ if last => None,
            Resampling::Conv => {
                let mut conv = scope.conv2d("downsamplers.0.conv", [output, output], 3, 2, false)?;
                conv.padding = config.downsample_padding;
                Some(Resampler::DownConv { conv, pad: config.downsample_padding == 0 })
            }
            Resampling::Resnet => {
                let block = ResnetBlock::build(config, scope.at("downsamplers.0"), [output, output])?;
                Some(Resampler::Resnet(Box::new(block.resampling(Resample::Down))))
            }
        };
        Ok(DownBlock { stage, downsampler })
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        mut h: B::Value,
        emb: &B::Value,
        skips: &mut Vec<B::Value>,
    ) -> Result<B::Value> {
        for i in 0..self.stage.resnets.len() {
            h = self.stage.layer(b, i, &h, emb)?;
            skips.push(h.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            h = downsampler.forward(b, &h, emb)?;
            skips.push(h.clone());
        }
        Ok(h)
    }
}

#[derive(Clone, Debug)]
struct MidBlock {
    resnets: [ResnetBlock; 2],
    attention: Option<AttentionBlock>,
}

impl MidBlock {
    fn build(config: &UNetConfig, mut scope: Scope, channels: usize) -> Result<Self> {
        let output_scale = config.mid_block_scale_factor;
        let mut resnet = |name: &str| -> Result<ResnetBlock> {
            Ok(ResnetBlock { output_scale, ..ResnetBlock::build(config, scope.at(name), [channels, channels])? })
        };
        let resnets = [resnet("resnets.0")?, resnet("resnets.1")?];
        // diffusers leaves the norm out of the middle attention when the resnets are of the scale_shift kind.
        let default_groups = match config.resnet_time_scale_shift {
            TimeScaleShift::Default => Some(config.norm_num_groups),
            TimeScaleShift::ScaleShift => None,
        };
        let groups = config.attn_norm_num_groups.or(default_groups);
        let attention = match config.add_attention {
            true => {
                let block = AttentionBlock::build(config, scope.at("attentions.0"), channels, groups)?;
                Some(AttentionBlock { output_scale, ..block })
            }
            false => None,
        };
        Ok(MidBlock { resnets, attention })
    }

    fn forward<B: Backend>(&self, b: &B, x: &B::Value, emb: &B::Value) -> Result<B::Value> {
        let mut h = b.block(&self.resnets[0], x, &[emb])?;
        if let Some(attention) = &self.attention {
            h = b.block(attention, &h, &[])?;
        }
        b.block(&self.resnets[1], &h, &[emb])
    }
}

#[derive(Clone, Debug)]
struct UpBlock {
    stage: Stage,
    upsampler: Option<Resampler>,
}

impl UpBlock {
    /// `below`: channels coming from the level below; `skip`: channels of the last skip connection.
    fn build(config: &UNetConfig, mut scope: Scope, i: usize, [below, skip, output]: [usize; 3]) -> Result<Self> {
        let kind = config.up_block(i)?;
        let n_layers = config.layers_per_block + 1;
        let inputs: Vec<usize> = (0..n_layers)
            .map(|l| (if l == 0 { below } else { output }) + (if l + 1 == n_layers { skip } else { output }))
            .collect();
        let stage = Stage::build(config, &mut scope, &inputs, output, kind.attention)?;
        let last = i + 1 == config.block_out_channels.len();
        let upsampler = match kind.resampling {
            _ if last => None,
            Resampling::Conv => {
                Some(Resampler::UpConv(scope.conv2d("upsamplers.0.conv", [output, output], 3, 1, false)?))
            }
            Resampling::Resnet => {
                let block = ResnetBlock::build(config, scope.at("upsamplers.0"), [output, output])?;
                Some(Resampler::Resnet(Box::new(block.resampling(Resample::Up))))
            }
        };
        Ok(UpBlock { stage, upsampler })
    }

    fn forward<B: Backend>(
        &self,
        b: &B,
        mut h: B::Value,
        emb: &B::Value,
        skips: &mut Vec<B::Value>,
    ) -> Result<B::Value> {
        for i in 0..self.stage.resnets.len() {
            let skip = skips.pop().ok_or_else(|| Error::Config("fewer skip connections than up layers".into()))?;
            h = self.stage.layer(b, i, &b.concat(&h, &skip)?, emb)?;
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(b, &h, emb),
            None => Ok(h),
        }
    }
}
