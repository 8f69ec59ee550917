//! The UNet of diffusers' `UNet2DModel`, over [`Backend`]. Every field of its `config.json` is honoured, or refused by
//! name with the reason. Tensor names and the order of operations are diffusers' (0.42), so that its weights load here
//! and ours load there with equal outputs.

use super::architecture::{Architecture, Takes, Want};
use super::config::{Fields, NetworkFields};
use crate::backend::{Activation, Backend};
use crate::blocks::{
    AttentionBlock, AttentionShape, Resample, Resampler, ResnetBlock, ResnetShape, TimeProjection, TimestepEmbedding,
};
use crate::condition::{Condition, Way};
use crate::layers::{Conv2d, Embedding, GroupNorm, Init, Scope, Source};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

mod config;
pub use config::{ClassEmbedding, Resampling, SampleSize, TimeEmbedding, TimeScaleShift, UNetConfig};

/// A UNet with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    conv_in: Conv2d,
    time_proj: TimeProjection,
    time_embedding: TimestepEmbedding,
    class_embedding: Option<ClassTable>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Architecture for UNet {
    type Config = UNetConfig;

    fn build(config: &UNetConfig, source: &mut dyn Source) -> Result<Self> {
        config.validate()?;
        let mut root = Scope::root(source);
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let time_dim = config.time_dim();
        let time_proj = config.time_projection(&mut root)?;
        let mlp = |scope: Scope| TimestepEmbedding::build(scope, [time_proj.width(), time_dim]);
        let time_embedding = mlp(root.at("time_embedding"))?;
        let class_embedding = match config.class_embedding() {
            ClassEmbedding::None => None,
            ClassEmbedding::Table(n) => Some(ClassTable::Embedding(root.embedding("class_embedding", n, time_dim)?)),
            ClassEmbedding::Timestep => {
                Some(ClassTable::Timestep { projection: time_proj.clone(), mlp: mlp(root.at("class_embedding"))? })
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

    fn takes(&self) -> Takes {
        self.config.takes()
    }

    fn device(&self) -> &Device {
        self.conv_in.weight.device()
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        cond: &Condition<B::Value>,
        want: Want,
    ) -> Result<Vec<B::Value>> {
        self.takes().check(cond)?;
        let encoded = self.encode(b, x, t, cond)?;
        match want {
            Want::Output => Ok(vec![self.decode(b, t, encoded)?]),
            Want::Maps => {
                let Encoded { bottleneck, mut maps, .. } = encoded;
                maps.pop();
                maps.push(bottleneck);
                Ok(maps)
            }
        }
    }
}

impl UNet {
    /// The configuration this network was built from.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The way up.
    fn decode<B: Backend>(&self, b: &B, t: &[f64], encoded: Encoded<B::Value>) -> Result<B::Value> {
        let Encoded { bottleneck: mut h, emb, mut skips, .. } = encoded;
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

    /// The way down and the middle.
    fn encode<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        cond: &Condition<B::Value>,
    ) -> Result<Encoded<B::Value>> {
        let centred = if self.config.center_input_sample { b.affine(x, &[2.0], -1.0)? } else { x.clone() };
        let emb = self.embed(b, t, cond)?;
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
    fn embed<B: Backend>(&self, b: &B, t: &[f64], cond: &Condition<B::Value>) -> Result<B::Value> {
        let time = self.time_embedding.forward(b, &b.constant(&self.time_proj.embed(t, self.device())?)?)?;
        match &self.class_embedding {
            Some(table) => b.add(&table.forward(b, cond)?, &time),
            None => Ok(time),
        }
    }
}

/// What the decoder and the readers of maps need of the encoder.
struct Encoded<V> {
    bottleneck: V,
    emb: V,
    skips: Vec<V>,
    /// Last map of every resolution, before it is shrunk.
    maps: Vec<V>,
}

impl UNetConfig {
    /// What all its resnets have in common.
    fn resnet(&self) -> ResnetShape {
        ResnetShape {
            time_dim: Some(self.time_dim()),
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            act: self.act_fn,
            scale_shift: self.resnet_time_scale_shift == TimeScaleShift::ScaleShift,
            output_scale: 1.0,
            resample: None,
        }
    }

    fn attention(&self, channels: usize) -> AttentionShape {
        AttentionShape {
            channels,
            head_dim: self.attention_head_dim,
            groups: Some(self.norm_num_groups),
            eps: self.norm_eps,
            output_scale: 1.0,
        }
    }

    fn time_projection(&self, root: &mut Scope) -> Result<TimeProjection> {
        let width = self.block_out_channels[0];
        let mut scope = root.at("time_proj");
        Ok(match self.time_embedding_type {
            TimeEmbedding::Positional => TimeProjection::positional(width, self.flip_sin_to_cos, self.freq_shift),
            TimeEmbedding::Fourier => {
                let weight = scope.tensor("weight", &[width], Init::Normal(16.0))?;
                TimeProjection::Fourier { weight: weight.to_dtype(DType::F32)?.to_vec1()? }
            }
            TimeEmbedding::Learned => {
                let entries = self.num_train_timesteps.unwrap_or(0);
                let weight = scope.tensor("weight", &[entries, width], Init::Normal(1.0))?;
                TimeProjection::Learned { table: Embedding { name: scope.path(""), weight } }
            }
        })
    }
}

/// What it is told of a class, to vectors of the time embedding's width.
#[derive(Clone, Debug)]
enum ClassTable {
    Embedding(Embedding),
    Timestep { projection: TimeProjection, mlp: TimestepEmbedding },
    Identity,
}

impl ClassTable {
    fn forward<B: Backend>(&self, b: &B, cond: &Condition<B::Value>) -> Result<B::Value> {
        let told = |way| cond.get(way).ok_or_else(|| Error::Config("this UNet is told no class".into()));
        match self {
            ClassTable::Embedding(table) => b.embedding(told(Way::Label)?, table),
            ClassTable::Identity => told(Way::Vector).cloned(),
            ClassTable::Timestep { projection, mlp } => {
                let TimeProjection::Positional { frequencies, flip, .. } = projection else {
                    return Err(Error::Config("class_embed_type timestep needs time_embedding_type positional".into()));
                };
                let frequencies = Tensor::new(frequencies.as_slice(), &Device::Cpu)?;
                mlp.forward(b, &b.sinusoid(told(Way::Label)?, &frequencies, *flip)?)
            }
        }
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
            stage.resnets.push(ResnetBlock::build(scope.at(format!("resnets.{i}")), [input, output], config.resnet())?);
            if attention {
                let scope = scope.at(format!("attentions.{i}"));
                stage.attentions.push(AttentionBlock::build(scope, config.attention(output))?);
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
                let shape = ResnetShape { resample: Some(Resample::Down), ..config.resnet() };
                Some(Resampler::Resnet(Box::new(ResnetBlock::build(
                    scope.at("downsamplers.0"),
                    [output, output],
                    shape,
                )?)))
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
        let shape = ResnetShape { output_scale, ..config.resnet() };
        let mut resnet = |name: &str| ResnetBlock::build(scope.at(name), [channels, channels], shape);
        let resnets = [resnet("resnets.0")?, resnet("resnets.1")?];
        // diffusers leaves the norm out of the middle attention when the resnets are of the scale_shift kind.
        let default_groups = match config.resnet_time_scale_shift {
            TimeScaleShift::Default => Some(config.norm_num_groups),
            TimeScaleShift::ScaleShift => None,
        };
        let groups = config.attn_norm_num_groups.or(default_groups);
        let attention = match config.add_attention {
            true => {
                let shape = AttentionShape { groups, output_scale, ..config.attention(channels) };
                Some(AttentionBlock::build(scope.at("attentions.0"), shape)?)
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
                let shape = ResnetShape { resample: Some(Resample::Up), ..config.resnet() };
                Some(Resampler::Resnet(Box::new(ResnetBlock::build(
                    scope.at("upsamplers.0"),
                    [output, output],
                    shape,
                )?)))
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
