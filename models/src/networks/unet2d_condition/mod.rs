//! The UNet of diffusers' `UNet2DConditionModel`, which makes latents of pictures as a prompt says (Rombach et al. 2022,
//! arXiv:2112.10752): Stable Diffusion 1.x, 2.x and XL, latent consistency models, and their small children. Every field of its
//! `config.json` is honoured, or refused by name with the reason. Tensor names and the order of operations are diffusers'
//! (0.42).
//!
//! What it is told:
//!
//! | way | what |
//! |---|---|
//! | [`Way::Text`] | the states of a prompt's tokens, `(B, N, C)`; N as the text encoder has it |
//! | [`Way::Label`] | a class, where there is a class table; a number, where `class_embed_type` is `timestep` |
//! | [`Way::Vector`] | `(B, …)`, side by side and in this order what there is of: a class as a vector (`class_embed_type` `identity`, `projection`, `simple_projection`); pooled text and six numbers (height and width of the original picture, top and left of its crop, height and width asked for: `addition_embed_type` `text_time`); the guidance scale (`time_cond_proj_dim`), as pipelines take it: 1 is none |

use super::architecture::{Architecture, Takes, Want};
use crate::backend::{Axis, Backend};
use crate::blocks::{
    Attention, AttentionBlock, AttentionShape, Beside, Ends, Layers, Levels, Place, Plan, ResnetShape, TimeProjection,
    TimestepEmbedding, Transformer, TransformerShape,
};
use crate::condition::{Condition, Way};
use crate::layers::{Conv2d, Embedding, Init, Linear, Scope, Source};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

mod config;
use super::config::{Fields, NetworkFields};
use super::unet2d::{TimeEmbedding, TimeScaleShift};
use config::{BlockKind, ClassEmbedding, Parts};
pub use config::{PerLevel, UNet2DConditionConfig};

/// The network with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct UNet2DCondition {
    config: UNet2DConditionConfig,
    time_proj: TimeProjection,
    time_embedding: TimestepEmbedding,
    guidance: Option<Guidance>,
    class_embedding: Option<ClassEmbedder>,
    addition: Option<Addition>,
    encoder_hid_proj: Option<Conv2d>,
    levels: Levels,
}

impl Architecture for UNet2DCondition {
    type Config = UNet2DConditionConfig;

    fn build(config: &UNet2DConditionConfig, source: &mut dyn Source) -> Result<Self> {
        config.validate()?;
        let mut root = Scope::root(source);
        let time_proj = config.time_projection(&mut root)?;
        let io = [config.time_width(), config.time_dim()];
        let time_embedding = TimestepEmbedding::build_with(root.at("time_embedding"), io, config.act_fn)?;
        let guidance = match config.time_cond_proj_dim {
            Some(width) => Some(Guidance::build(root.at("time_embedding.cond_proj"), [width, config.time_width()])?),
            None => None,
        };
        let encoder_hid_proj = match (config.encoder_hid_dim, config.attended()) {
            (Some(width), Some(attended)) => Some(root.projection("encoder_hid_proj", [width, attended], true)?),
            _ => None,
        };
        let class_embedding = ClassEmbedder::build(config, &time_proj, &mut root)?;
        let addition = match (&config.addition_embed_type, config.projection_class_embeddings_input_dim) {
            (Some(_), Some(joined)) => Some(Addition {
                frequencies: config.sinusoid(config.addition_time_embed_dim.unwrap_or(0))?,
                flip: config.flip_sin_to_cos,
                mlp: TimestepEmbedding::build(root.at("add_embedding"), [joined, config.time_dim()])?,
            }),
            _ => None,
        };
        let levels = Levels::build(config, &mut root)?;
        let config = config.clone();
        Ok(UNet2DCondition {
            config,
            time_proj,
            time_embedding,
            guidance,
            class_embedding,
            addition,
            encoder_hid_proj,
            levels,
        })
    }

    fn takes(&self) -> Takes {
        self.config.takes()
    }

    fn device(&self) -> &Device {
        self.levels.weight().device()
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        cond: &Condition<B::Value>,
        want: Want,
    ) -> Result<Vec<B::Value>> {
        let takes = self.takes();
        takes.check(cond)?;
        takes.check_shapes(&cond.try_map(|told| Ok::<_, Error>(b.dims(told)))?)?;
        let emb = self.embed(b, t, cond)?;
        let text = match (cond.get(Way::Text), &self.encoder_hid_proj) {
            (Some(states), Some(projection)) => Some(b.conv2d(&b.tokens(states)?, projection)?),
            (Some(states), None) => Some(b.tokens(states)?),
            (None, _) => None,
        };
        let beside = Beside { emb: &emb, text: text.as_ref() };
        let centred = if self.config.center_input_sample { b.affine(x, &[2.0], -1.0)? } else { x.clone() };
        let encoded = self.levels.encode(b, &centred, &beside)?;
        match want {
            Want::Output => Ok(vec![self.levels.decode(b, encoded, &beside)?]),
            Want::Maps => Ok(encoded.maps()),
        }
    }
}

impl UNet2DCondition {
    /// The configuration this network was built from.
    pub fn config(&self) -> &UNet2DConditionConfig {
        &self.config
    }

    /// Time and all else that is told but text, `(B or 1, time_dim)`.
    fn embed<B: Backend>(&self, b: &B, t: &[f64], cond: &Condition<B::Value>) -> Result<B::Value> {
        let Parts { class, pooled, numbers, .. } = self.config.parts();
        let part = |start: usize, len: usize| match cond.get(Way::Vector) {
            Some(vector) => b.columns(vector, start, len),
            None => Err(Error::Config("this network needs a vector".into())),
        };
        let mut time = b.constant(&self.time_proj.embed(t, self.device())?)?;
        if let Some(guidance) = &self.guidance {
            let scale = part(class + pooled + numbers, 1)?;
            time = b.add(&guidance.embed(b, &scale)?, &time)?;
        }
        let mut emb = self.time_embedding.forward(b, &time)?;
        if let Some(act) = self.config.timestep_post_act {
            emb = b.activation(&emb, act)?;
        }
        if let Some(embedder) = &self.class_embedding {
            let told = if class > 0 { Some(part(0, class)?) } else { cond.get(Way::Label).cloned() };
            let told = told.ok_or_else(|| Error::Config("this network needs a class label".into()))?;
            emb = b.add(&embedder.embed(b, &told)?, &emb)?;
        }
        if let Some(addition) = &self.addition {
            let (pooled, numbers) = (part(class, pooled)?, part(class + pooled, numbers)?);
            emb = b.add(&addition.embed(b, &pooled, &numbers)?, &emb)?;
        }
        match self.config.time_embedding_act_fn {
            Some(act) => b.activation(&emb, act),
            None => Ok(emb),
        }
    }
}

/// The guidance scale that a latent consistency model imitates (Luo et al. 2023, arXiv:2310.04378): sinusoids of
/// 1000·(scale − 1), added to those of the timestep.
#[derive(Clone, Debug)]
struct Guidance {
    frequencies: Tensor,
    cond_proj: Linear,
}

impl Guidance {
    fn build(mut scope: Scope, [width, output]: [usize; 2]) -> Result<Self> {
        let weight = scope.tensor("weight", &[output, width], Init::Uniform(1.0 / (width as f64).sqrt()))?;
        let TimeProjection::Positional { frequencies, .. } = TimeProjection::positional(width, false, 1.0) else {
            return Err(Error::Config("sinusoids have frequencies".into()));
        };
        let frequencies = Tensor::new(frequencies, &Device::Cpu)?;
        Ok(Guidance { frequencies, cond_proj: Linear { name: scope.path(""), weight, bias: None } })
    }

    fn embed<B: Backend>(&self, b: &B, scale: &B::Value) -> Result<B::Value> {
        let w = b.affine(&b.affine(scale, &[1.0], -1.0)?, &[1000.0], 0.0)?;
        b.linear(&b.sinusoid(&w, &self.frequencies, false)?, &self.cond_proj)
    }
}

/// What is told of a class, to vectors of the time embedding's width.
#[derive(Clone, Debug)]
enum ClassEmbedder {
    Table(Embedding),
    Timestep { frequencies: Tensor, flip: bool, mlp: TimestepEmbedding },
    Identity,
    Projection(TimestepEmbedding),
    SimpleProjection(Linear),
}

impl ClassEmbedder {
    fn build(config: &UNet2DConditionConfig, time: &TimeProjection, root: &mut Scope) -> Result<Option<Self>> {
        const NAME: &str = "class_embedding";
        let output = config.time_dim();
        Ok(Some(match config.class_embedding() {
            ClassEmbedding::None => return Ok(None),
            ClassEmbedding::Table(n) => ClassEmbedder::Table(root.embedding(NAME, n, output)?),
            ClassEmbedding::Timestep => ClassEmbedder::Timestep {
                frequencies: config.sinusoid(time.width())?,
                flip: config.flip_sin_to_cos,
                mlp: TimestepEmbedding::build_with(root.at(NAME), [time.width(), output], config.act_fn)?,
            },
            ClassEmbedding::Identity => ClassEmbedder::Identity,
            ClassEmbedding::Projection(width) => {
                ClassEmbedder::Projection(TimestepEmbedding::build(root.at(NAME), [width, output])?)
            }
            ClassEmbedding::SimpleProjection(width) => {
                ClassEmbedder::SimpleProjection(root.linear(NAME, [width, output])?)
            }
        }))
    }

    fn embed<B: Backend>(&self, b: &B, told: &B::Value) -> Result<B::Value> {
        match self {
            ClassEmbedder::Table(table) => b.embedding(told, table),
            ClassEmbedder::Timestep { frequencies, flip, mlp } => {
                mlp.forward(b, &b.sinusoid(told, frequencies, *flip)?)
            }
            ClassEmbedder::Identity => Ok(told.clone()),
            ClassEmbedder::Projection(mlp) => mlp.forward(b, told),
            ClassEmbedder::SimpleProjection(linear) => b.linear(told, linear),
        }
    }
}

/// Pooled text, and sizes and crops as sinusoids (Podell et al. 2023, arXiv:2307.01952, section 2.2).
#[derive(Clone, Debug)]
struct Addition {
    frequencies: Tensor,
    flip: bool,
    mlp: TimestepEmbedding,
}

impl Addition {
    fn embed<B: Backend>(&self, b: &B, pooled: &B::Value, numbers: &B::Value) -> Result<B::Value> {
        let numbers = b.sinusoid(numbers, &self.frequencies, self.flip)?;
        self.mlp.forward(b, &b.join(pooled, &numbers, Axis::Channels)?)
    }
}

impl UNet2DConditionConfig {
    fn time_projection(&self, root: &mut Scope) -> Result<TimeProjection> {
        Ok(match self.time_embedding_type {
            TimeEmbedding::Fourier => {
                let weight = root.at("time_proj").tensor("weight", &[self.time_width() / 2], Init::Normal(1.0))?;
                let weight = weight.to_dtype(DType::F32)?.to_vec1()?;
                TimeProjection::Fourier { weight, log: false, flip: self.flip_sin_to_cos }
            }
            _ => TimeProjection::positional(self.time_width(), self.flip_sin_to_cos, self.freq_shift),
        })
    }

    /// The frequencies of a sinusoid of so many channels, like those of timesteps.
    fn sinusoid(&self, width: usize) -> Result<Tensor> {
        match TimeProjection::positional(width, self.flip_sin_to_cos, self.freq_shift) {
            TimeProjection::Positional { frequencies, .. } => Ok(Tensor::new(frequencies, &Device::Cpu)?),
            _ => Err(Error::Config("sinusoids have frequencies".into())),
        }
    }

    fn resnet(&self, kind: BlockKind) -> ResnetShape {
        let resamples = kind == BlockKind::Resnet;
        ResnetShape {
            time_dim: Some(self.time_dim()),
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            act: self.act_fn,
            skip_time_act: resamples && self.resnet_skip_time_act,
            scale_shift: self.resnet_time_scale_shift == TimeScaleShift::ScaleShift,
            output_scale: if resamples { self.resnet_out_scale_factor } else { 1.0 },
            resample: None,
        }
    }

    /// A place's block and its level.
    fn block(&self, at: Place) -> Result<(BlockKind, usize)> {
        let innermost = self.levels() - 1;
        Ok(match at {
            Place::Down(i) => (self.down_block(i)?, i),
            Place::Up(i) => (self.up_block(i)?, innermost - i),
            Place::Middle if self.mid_block_type.as_deref() == Some("UNetMidBlock2DCrossAttn") => {
                (BlockKind::CrossAttn, innermost)
            }
            Place::Middle => (BlockKind::Plain, innermost),
        })
    }
}

impl Plan for UNet2DConditionConfig {
    fn ends(&self) -> Ends {
        Ends {
            io: [self.in_channels, self.out_channels],
            kernels: [self.conv_in_kernel, self.conv_out_kernel],
            channels: self.block_out_channels.clone(),
            downsample_padding: self.downsample_padding,
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            act: self.act_fn,
        }
    }

    fn layers(&self, at: Place) -> Result<Option<Layers>> {
        let (kind, level) = self.block(at)?;
        let n = self.layers_per_block.get(level).copied().unwrap_or(0);
        let (resnet, resampling) = (self.resnet(kind), kind.resampling());
        Ok(match at {
            Place::Down(_) => Some(Layers { n, resnet, resampling }),
            Place::Up(_) => Some(Layers { n: n + 1, resnet, resampling }),
            // The middle without transformer is one resnet.
            Place::Middle => self.mid_block_type.as_ref().map(|_| Layers {
                n: if kind == BlockKind::CrossAttn { 2 } else { 1 },
                resnet: ResnetShape { output_scale: self.mid_block_scale_factor, ..resnet },
                resampling,
            }),
        })
    }

    fn attention(&self, scope: Scope, at: Place, layer: usize, channels: usize) -> Result<Option<Attention>> {
        let (kind, level) = self.block(at)?;
        let (groups, heads) = (self.norm_num_groups, self.attention_head_dim.get(level).copied().unwrap_or(0));
        let layers = match at {
            Place::Down(i) => self.transformer_layers(i, layer, false),
            Place::Up(i) => self.transformer_layers(i, layer, true),
            Place::Middle if layer == 0 => self.transformer_layers(level, 0, false),
            Place::Middle => return Ok(None),
        };
        Ok(match kind {
            BlockKind::Plain | BlockKind::Resnet => None,
            BlockKind::Attn => Some(Attention::Pixels(AttentionBlock::build(
                scope,
                AttentionShape {
                    channels,
                    head_dim: Some(heads),
                    groups: Some(groups),
                    eps: self.norm_eps,
                    output_scale: 1.0,
                },
            )?)),
            BlockKind::CrossAttn => Some(Attention::Text(Transformer::build(
                scope,
                TransformerShape {
                    channels,
                    heads,
                    layers: layers?,
                    text: self.cross_attention_dim.get(level).copied().unwrap_or(0),
                    groups,
                    linear: self.use_linear_projection,
                    only_text: at != Place::Middle && self.only_cross_attention.get(level).copied().unwrap_or(false),
                },
            )?)),
        })
    }
}
