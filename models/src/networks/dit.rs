//! The class-conditional transformer of Peebles and Xie (2023, arXiv:2212.09748), "Scalable Diffusion Models with
//! Transformers", as diffusers' `DiTTransformer2DModel` has it, and the older `Transformer2DModel` with `ada_norm_zero`.
//! A sample is cut into patches, each a token; blocks of attention and feed-forward are shifted, scaled and gated by the
//! embedding of time and class. Tokens stay where their patches are, as the pixels of a map.

use super::architecture::{Architecture, Takes, Told, Want};
use super::config::{self, Fields, NetworkFields};
use crate::backend::{Activation, Axis, Backend, Block};
use crate::blocks::{TimeProjection, TimestepEmbedding};
use crate::condition::{Condition, Way};
use crate::layers::{Conv2d, Embedding, Init, LayerNorm, Linear, Scope, Source};
use crate::ops::Patches;
use crate::{Error, Result, limits};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The fields of `config.json`, with diffusers' defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiTConfig {
    /// Runs of channels that attend on their own.
    pub num_attention_heads: usize,
    /// Channels of one of them.
    pub attention_head_dim: usize,
    /// Channels in.
    pub in_channels: usize,
    /// Channels out; twice as many as in where a variance was learned beside, which is left out here. As many as in when
    /// null.
    pub out_channels: Option<usize>,
    /// Blocks.
    pub num_layers: usize,
    /// Whether queries, keys and values have biases.
    pub attention_bias: bool,
    /// Height and width of a sample.
    pub sample_size: usize,
    /// Height and width of a patch.
    pub patch_size: usize,
    /// Non-linearity of the feed-forward layers.
    pub activation_fn: FeedForward,
    /// Number of classes; the table has a row more, for none.
    pub num_embeds_ada_norm: usize,
    /// Whether the norm before the feed-forward layer has weights.
    pub norm_elementwise_affine: bool,
    /// Added to its variance.
    pub norm_eps: f64,
    /// Positions are so much closer together: 1 in `DiTTransformer2DModel`, one for every 64 of the sample in the older class
    /// when null.
    pub interpolation_scale: Option<f64>,
}

/// `activation_fn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FeedForward {
    /// Gelu by the error function.
    #[serde(rename = "gelu")]
    Gelu,
    /// Gelu by tanh.
    #[serde(rename = "gelu-approximate")]
    GeluTanh,
    /// Half of the channels times gelu of the other.
    #[serde(rename = "geglu")]
    Geglu,
    /// x·sigmoid(1.702·x).
    #[serde(rename = "geglu-approximate")]
    QuickGelu,
    /// Half of the channels times SiLU of the other.
    #[serde(rename = "swiglu")]
    SwiGlu,
}

impl FeedForward {
    fn is_gated(self) -> bool {
        matches!(self, FeedForward::Geglu | FeedForward::SwiGlu)
    }

    fn forward<B: Backend>(self, b: &B, x: &B::Value) -> Result<B::Value> {
        match self {
            FeedForward::Gelu => b.activation(x, Activation::Gelu),
            FeedForward::GeluTanh => b.activation(x, Activation::GeluTanh),
            FeedForward::QuickGelu => b.activation(x, Activation::QuickGelu),
            FeedForward::Geglu => b.gated(x, Activation::Gelu),
            FeedForward::SwiGlu => b.gated(x, Activation::Silu),
        }
    }
}

impl Default for DiTConfig {
    fn default() -> Self {
        DiTConfig {
            num_attention_heads: 16,
            attention_head_dim: 72,
            in_channels: 4,
            out_channels: None,
            num_layers: 28,
            attention_bias: true,
            sample_size: 32,
            patch_size: 2,
            activation_fn: FeedForward::GeluTanh,
            num_embeds_ada_norm: 1000,
            norm_elementwise_affine: false,
            norm_eps: 1e-5,
            interpolation_scale: None,
        }
    }
}

impl DiTConfig {
    /// Reads `config.json`; what this network does not compute is refused by name.
    pub fn from_json(path: &Path, text: &str) -> Result<Self> {
        config::from_json(path, text)
    }

    fn width(&self) -> usize {
        self.num_attention_heads.saturating_mul(self.attention_head_dim)
    }

    fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    fn interpolation_scale(&self) -> f64 {
        self.interpolation_scale.unwrap_or((self.sample_size / 64).max(1) as f64)
    }
}

impl Fields for DiTConfig {
    const CLASSES: &'static [&'static str] = &["DiTTransformer2DModel", OLDER];

    fn fixed() -> Vec<(&'static str, Vec<Value>)> {
        let null = || vec![Value::Null];
        let mut fixed = vec![
            ("norm_type", vec![json!("ada_norm_zero")]),
            ("attention_type", vec![json!("default")]),
            ("cross_attention_dim", null()),
            ("caption_channels", null()),
            ("num_vector_embeds", null()),
            ("use_additional_conditions", vec![json!(null), json!(false)]),
        ];
        for flag in ["double_self_attention", "only_cross_attention", "use_linear_projection"] {
            fixed.push((flag, vec![json!(false)]));
        }
        fixed
    }

    // Scores are single precision everywhere here, there is no group norm, and nothing is dropped in use.
    const WITHOUT_EFFECT: &'static [&'static str] = &["upcast_attention", "norm_num_groups", "dropout"];

    fn validate(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Config(message));
        for (name, value) in [
            ("num_attention_heads", self.num_attention_heads),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads times attention_head_dim", self.width()),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels()),
        ] {
            limits::check(name, value, limits::CHANNELS)?;
        }
        limits::check("num_layers", self.num_layers, limits::LAYERS)?;
        limits::check("num_embeds_ada_norm", self.num_embeds_ada_norm, limits::ROWS)?;
        limits::check("sample_size", self.sample_size, limits::SIDE)?;
        limits::check("patch_size", self.patch_size, limits::SIDE)?;
        if !self.width().is_multiple_of(4) {
            return refuse(format!(
                "num_attention_heads {} times attention_head_dim {} is no multiple of 4, which positions need",
                self.num_attention_heads, self.attention_head_dim
            ));
        }
        if !self.sample_size.is_multiple_of(self.patch_size) {
            return refuse(format!(
                "sample_size {} is not made of patches of patch_size {}",
                self.sample_size, self.patch_size
            ));
        }
        let patches = self.sample_size / self.patch_size;
        limits::check("sample_size over patch_size, squared,", patches * patches, limits::TOKENS)?;
        if ![self.in_channels, 2 * self.in_channels].contains(&self.out_channels()) {
            return refuse(format!(
                "out_channels is {}, expected in_channels ({}) or twice as many",
                self.out_channels(),
                self.in_channels
            ));
        }
        if !(self.norm_eps > 0.0 && self.interpolation_scale() > 0.0) {
            return refuse("norm_eps and interpolation_scale must be positive".into());
        }
        Ok(())
    }

    fn settle(&mut self, class: &str) {
        self.interpolation_scale = Some(if class == OLDER { self.interpolation_scale() } else { 1.0 });
    }

    fn class(&self) -> &'static str {
        if self.interpolation_scale() == 1.0 { Self::CLASSES[0] } else { OLDER }
    }

    fn to_fields(&self) -> Result<Map<String, Value>> {
        let mut fields = config::fields(self)?;
        match self.class() {
            OLDER => _ = fields.insert("norm_type".into(), "ada_norm_zero".into()),
            _ => _ = fields.remove("interpolation_scale"),
        }
        Ok(fields)
    }
}

impl NetworkFields for DiTConfig {
    const PART: &'static str = "transformer";
    const LANDMARK: &'static str = "pos_embed.proj.weight";

    fn takes(&self) -> Takes {
        let labels = Told::Id(Some(self.num_embeds_ada_norm + 1));
        let size = Some([self.sample_size; 2]);
        Takes { channels: self.in_channels, size, told: Condition::of(Way::Label, labels) }
    }

    fn has_null_class(&self) -> bool {
        true
    }

    fn pipeline(&self, _scheduler: &str) -> &'static str {
        "DiTPipeline"
    }
}

/// The class of before, which has other networks beside this one.
const OLDER: &str = "Transformer2DModel";

/// The network with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct DiT {
    config: DiTConfig,
    patches: Conv2d,
    time: TimeProjection,
    blocks: Vec<(Embedder, TransformerBlock)>,
    norm_out: LayerNorm,
    proj_out_1: Linear,
    proj_out_2: Conv2d,
}

/// Time and class as one vector. Every block has one of its own; the published weights are all alike.
#[derive(Clone, Debug)]
struct Embedder {
    time: TimestepEmbedding,
    class: Embedding,
    /// To shift, scale and gate of both halves of the block.
    linear: Linear,
}

impl Architecture for DiT {
    type Config = DiTConfig;

    fn build(config: &DiTConfig, source: &mut dyn Source) -> Result<Self> {
        config.validate()?;
        let mut root = Scope::root(source);
        let (width, patch) = (config.width(), config.patch_size);
        let mut pos_embed = root.at("pos_embed");
        let patches =
            Conv2d { padding: 0, ..pos_embed.conv2d("proj", [config.in_channels, width], patch, patch, false)? };
        let mut blocks = Vec::with_capacity(config.num_layers);
        for i in 0..config.num_layers {
            let mut block = root.at(format!("transformer_blocks.{i}"));
            let embedder = Embedder::build(block.at("norm1"), config)?;
            blocks.push((embedder, TransformerBlock::build(block, config)?));
        }
        Ok(DiT {
            patches,
            time: TimeProjection::positional(TIME_WIDTH, true, 1.0),
            blocks,
            norm_out: LayerNorm { name: "norm_out".into(), affine: None, eps: 1e-6 },
            proj_out_1: zero_linear(&mut root, "proj_out_1", [width, 2 * width])?,
            proj_out_2: root.pointwise("proj_out_2", [width, patch * patch * config.out_channels()], true)?,
            config: config.clone(),
        })
    }

    fn takes(&self) -> Takes {
        self.config.takes()
    }

    fn device(&self) -> &Device {
        self.patches.weight.device()
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
        let Some(label) = cond.get(Way::Label) else {
            return Err(Error::Config("this network needs a class label".into()));
        };
        let time = b.constant(&self.time.embed(t, self.device())?)?;
        let tokens = b.conv2d(x, &self.patches)?;
        let sides = [b.dims(&tokens)[2], b.dims(&tokens)[3]];
        let mut h = b.add(&tokens, &b.constant(&self.positions(sides)?)?)?;
        let (mut embedding, mut maps) = (None, Vec::new());
        for (i, (embedder, block)) in self.blocks.iter().enumerate() {
            let emb = embedder.embed(b, &time, label)?;
            h = b.block(block, &h, &[&b.linear(&emb, &embedder.linear)?])?;
            embedding.get_or_insert(emb);
            if i == self.blocks.len() / 2 {
                maps.push(h.clone());
            }
        }
        if want == Want::Maps {
            maps.push(h);
            return Ok(maps);
        }
        let Some(embedding) = embedding else { return Err(Error::Config("num_layers is 0".into())) };
        let (width, both) = (self.config.width(), b.linear(&embedding, &self.proj_out_1)?);
        let (shift, scale) = (b.columns(&both, 0, width)?, b.columns(&both, width, width)?);
        let h = b.modulate(&b.layer_norm(&h, &self.norm_out)?, &scale, &shift)?;
        let y = b.shuffle(&b.conv2d(&h, &self.proj_out_2)?, self.config.patch_size, Patches::ChannelLast)?;
        match self.config.out_channels() == self.config.in_channels {
            true => Ok(vec![y]),
            false => Ok(vec![b.slice(&y, Axis::Channels, 0, self.config.in_channels)?]),
        }
    }
}

/// Of the sinusoids of a timestep.
const TIME_WIDTH: usize = 256;

impl DiT {
    /// The configuration this network was built from.
    pub fn config(&self) -> &DiTConfig {
        &self.config
    }

    /// Sines and cosines of the places of patches, `(1, width, h, w)`: half of the channels for columns, half for rows.
    fn positions(&self, [h, w]: [usize; 2]) -> Result<Tensor> {
        let DiTConfig { sample_size, patch_size, .. } = self.config;
        let scale = self.config.interpolation_scale();
        let base = (sample_size / patch_size) as f64;
        let quarter = self.config.width() / 4;
        let frequency = |i: usize| 10000f64.powf(-(i as f64) / quarter as f64);
        // diffusers spaces n places over the n that the network was made for.
        let place = |at: usize, n: usize| at as f64 / (n as f64 / base) / scale;
        let mut values = Vec::with_capacity(4 * quarter * h * w);
        for channel in 0..4 * quarter {
            let (part, frequency) = (channel / quarter, frequency(channel % quarter));
            for pixel in 0..h * w {
                let angle = frequency * if part < 2 { place(pixel % w, w) } else { place(pixel / w, h) };
                values.push(if part % 2 == 0 { angle.sin() } else { angle.cos() } as f32);
            }
        }
        Ok(Tensor::from_vec(values, (1, 4 * quarter, h, w), self.device())?)
    }
}

impl Embedder {
    fn build(mut scope: Scope, config: &DiTConfig) -> Result<Self> {
        let width = config.width();
        let mut emb = scope.at("emb");
        let time = TimestepEmbedding::build(emb.at("timestep_embedder"), [TIME_WIDTH, width])?;
        let class = emb.embedding("class_embedder.embedding_table", config.num_embeds_ada_norm + 1, width)?;
        Ok(Embedder { time, class, linear: zero_linear(&mut scope, "linear", [width, 6 * width])? })
    }

    /// `(B, width)`, behind its SiLU.
    fn embed<B: Backend>(&self, b: &B, time: &B::Value, label: &B::Value) -> Result<B::Value> {
        let sum = b.add(&b.embedding(label, &self.class)?, &self.time.forward(b, time)?)?;
        b.activation(&sum, Activation::Silu)
    }
}

/// A linear map that starts at zero: gates that are shut, so that training starts from the identity.
fn zero_linear(scope: &mut Scope, name: &str, [input, output]: [usize; 2]) -> Result<Linear> {
    let (name, mut scope) = (scope.path(name), scope.at(name));
    let weight = scope.tensor("weight", &[output, input], Init::Const(0.0))?;
    let bias = Some(scope.tensor("bias", &[output], Init::Const(0.0))?);
    Ok(Linear { name, weight, bias })
}

/// Attention, then two layers pixel by pixel.
#[derive(Clone, Debug)]
struct TransformerBlock {
    heads: usize,
    norm1: LayerNorm,
    to_q: Conv2d,
    to_k: Conv2d,
    to_v: Conv2d,
    to_out: Conv2d,
    norm3: LayerNorm,
    ff_in: Conv2d,
    act: FeedForward,
    ff_out: Conv2d,
}

impl TransformerBlock {
    fn build(mut scope: Scope, config: &DiTConfig) -> Result<Self> {
        let width = config.width();
        let inner = 4 * width * if config.activation_fn.is_gated() { 2 } else { 1 };
        let mut attn = scope.at("attn1");
        let mut projection = |name: &str| attn.projection(name, [width, width], config.attention_bias);
        let (to_q, to_k, to_v) = (projection("to_q")?, projection("to_k")?, projection("to_v")?);
        let to_out = attn.pointwise("to_out.0", [width, width], false)?;
        let norm3 = match config.norm_elementwise_affine {
            true => scope.layer_norm("norm3", width, config.norm_eps)?,
            false => LayerNorm { name: scope.path("norm3"), affine: None, eps: config.norm_eps },
        };
        Ok(TransformerBlock {
            heads: config.num_attention_heads,
            norm1: LayerNorm { name: scope.path("norm1.norm"), affine: None, eps: 1e-6 },
            to_q,
            to_k,
            to_v,
            to_out,
            norm3,
            ff_in: scope.pointwise("ff.net.0.proj", [width, inner], false)?,
            act: config.activation_fn,
            ff_out: scope.pointwise("ff.net.2", [4 * width, width], false)?,
        })
    }
}

impl Block for TransformerBlock {
    /// Beside x, shift, scale and gate of both halves, `(B or 1, 6·width)`.
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, beside: &[&B::Value]) -> Result<B::Value> {
        let [ada] = beside else { return Err(Error::Config("a transformer block reads one vector".into())) };
        let width = b.dims(x)[1];
        let part = |i: usize| b.columns(ada, i * width, width);
        let h = b.modulate(&b.layer_norm(x, &self.norm1)?, &part(1)?, &part(0)?)?;
        let (q, k, v) = (b.conv2d(&h, &self.to_q)?, b.conv2d(&h, &self.to_k)?, b.conv2d(&h, &self.to_v)?);
        let h = b.conv2d(&b.attention(&q, &k, &v, self.heads)?, &self.to_out)?;
        let x = b.add(x, &b.mul_per_channel(&h, &part(2)?)?)?;
        let h = b.modulate(&b.layer_norm(&x, &self.norm3)?, &part(4)?, &part(3)?)?;
        let h = b.conv2d(&self.act.forward(b, &b.conv2d(&h, &self.ff_in)?)?, &self.ff_out)?;
        b.add(&x, &b.mul_per_channel(&h, &part(5)?)?)
    }
}
