//! The UNet of diffusers' `UNet2DModel`, over [`Backend`]. Every field of its `config.json` is honoured, or refused by
//! name with the reason. Tensor names and the order of operations are diffusers' (0.42), so that its weights load here
//! and ours load there with equal outputs.

use super::architecture::{Architecture, Takes, Want};
use super::config::{Fields, NetworkFields};
use crate::backend::{Activation, Backend};
use crate::blocks::{
    Attention, AttentionBlock, AttentionShape, Beside, Ends, Layers, Levels, Place, Plan, ResnetShape, TimeProjection,
    TimestepEmbedding,
};
use crate::condition::{Condition, Way};
use crate::layers::{Embedding, Init, Scope, Source};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

mod config;
pub use crate::blocks::Resampling;
pub use config::{ClassEmbedding, SampleSize, TimeEmbedding, TimeScaleShift, UNetConfig};

/// A UNet with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    time_proj: TimeProjection,
    time_embedding: TimestepEmbedding,
    class_embedding: Option<ClassTable>,
    levels: Levels,
}

impl Architecture for UNet {
    type Config = UNetConfig;

    fn build(config: &UNetConfig, source: &mut dyn Source) -> Result<Self> {
        config.validate()?;
        let mut root = Scope::root(source);
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
        let levels = Levels::build(config, &mut root)?;
        Ok(UNet { config: config.clone(), time_proj, time_embedding, class_embedding, levels })
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
        self.takes().check(cond)?;
        let centred = if self.config.center_input_sample { b.affine(x, &[2.0], -1.0)? } else { x.clone() };
        let emb = self.embed(b, t, cond)?;
        let beside = Beside { emb: &emb, text: None };
        let encoded = self.levels.encode(b, &centred, &beside)?;
        if want == Want::Maps {
            return Ok(encoded.maps());
        }
        let y = self.levels.decode(b, encoded, &beside)?;
        Ok(vec![match self.config.time_embedding_type {
            // diffusers divides by the timestep here, which is a sigma for these (score SDE) networks.
            TimeEmbedding::Fourier => b.affine(&y, &t.iter().map(|t| 1.0 / t).collect::<Vec<_>>(), 0.0)?,
            _ => y,
        }])
    }
}

impl UNet {
    /// The configuration this network was built from.
    pub fn config(&self) -> &UNetConfig {
        &self.config
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

impl UNetConfig {
    /// What all its resnets have in common.
    fn resnet(&self) -> ResnetShape {
        ResnetShape {
            time_dim: Some(self.time_dim()),
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            act: self.act_fn,
            skip_time_act: false,
            scale_shift: self.resnet_time_scale_shift == TimeScaleShift::ScaleShift,
            output_scale: 1.0,
            resample: None,
        }
    }

    fn attention_shape(&self, channels: usize) -> AttentionShape {
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
                TimeProjection::Fourier { weight: weight.to_dtype(DType::F32)?.to_vec1()?, log: true, flip: false }
            }
            TimeEmbedding::Learned => {
                let entries = self.num_train_timesteps.unwrap_or(0);
                let weight = scope.tensor("weight", &[entries, width], Init::Normal(1.0))?;
                TimeProjection::Learned { table: Embedding { name: scope.path(""), weight } }
            }
        })
    }
}

impl Plan for UNetConfig {
    fn ends(&self) -> Ends {
        Ends {
            io: [self.in_channels, self.out_channels],
            kernels: [3, 3],
            channels: self.block_out_channels.clone(),
            downsample_padding: self.downsample_padding,
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            act: Activation::Silu,
        }
    }

    fn layers(&self, at: Place) -> Result<Option<Layers>> {
        let resnet = self.resnet();
        Ok(match at {
            Place::Down(i) => {
                Some(Layers { n: self.layers_per_block, resnet, resampling: self.down_block(i)?.resampling })
            }
            Place::Up(i) => {
                Some(Layers { n: self.layers_per_block + 1, resnet, resampling: self.up_block(i)?.resampling })
            }
            Place::Middle => self.mid_block_type.as_ref().map(|_| Layers {
                n: 2,
                resnet: ResnetShape { output_scale: self.mid_block_scale_factor, ..resnet },
                resampling: Resampling::Conv,
            }),
        })
    }

    fn attention(&self, scope: Scope, at: Place, layer: usize, channels: usize) -> Result<Option<Attention>> {
        let shape = self.attention_shape(channels);
        let shape = match at {
            Place::Down(i) => self.down_block(i)?.attention.then_some(shape),
            Place::Up(i) => self.up_block(i)?.attention.then_some(shape),
            Place::Middle => (self.add_attention && layer == 0).then(|| {
                // diffusers leaves the norm out of the middle attention when the resnets are of the scale_shift kind.
                let default_groups = match self.resnet_time_scale_shift {
                    TimeScaleShift::Default => Some(self.norm_num_groups),
                    TimeScaleShift::ScaleShift => None,
                };
                let groups = self.attn_norm_num_groups.or(default_groups);
                AttentionShape { groups, output_scale: self.mid_block_scale_factor, ..shape }
            }),
        };
        shape.map(|shape| Ok(Attention::Pixels(AttentionBlock::build(scope, shape)?))).transpose()
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
