//! CLIP's text transformer (Radford et al. 2021, arXiv:2103.00020): transformers' `CLIPTextModel` and
//! `CLIPTextModelWithProjection`.

use crate::backend::{Activation, Backend, Block};
use crate::layers::{Conv2d, Draws, Embedding, Init, LayerNorm, Linear, Random, Scope, Source};
use crate::networks::config::Fields;
use crate::ops::{Mask, TokenAt};
use crate::{Error, Result, Weights, limits};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The fields of `config.json`, with transformers' defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    /// Rows of the table of tokens.
    pub vocab_size: usize,
    /// Channels of a token.
    pub hidden_size: usize,
    /// Channels inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Channels of the projected token, where there is a projection.
    pub projection_dim: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Runs of channels that attend on their own.
    pub num_attention_heads: usize,
    /// Tokens at most.
    pub max_position_embeddings: usize,
    /// Non-linearity of the feed-forward layers.
    pub hidden_act: Activation,
    /// Added to the variance in every norm.
    pub layer_norm_eps: f64,
    /// The token that the pooled output is taken at. 2 stands for the largest id of a prompt: configs of before 2023 have it,
    /// whatever the token is.
    pub eos_token_id: u32,
    /// The class.
    pub architectures: Option<[ClipClass; 1]>,
}

/// Whether the pooled output is projected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClipClass {
    /// It is not.
    CLIPTextModel,
    /// It is.
    CLIPTextModelWithProjection,
}

impl Default for ClipConfig {
    fn default() -> Self {
        ClipConfig {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
            architectures: None,
        }
    }
}

impl Fields for ClipConfig {
    const CLASSES: &'static [&'static str] = &["CLIPTextModel"];

    // What starts training, what is dropped in it, and what transformers' Python does with the model around it. The tokens
    // that the tokenizer has of its own are not read here, where many configs have them wrong.
    const WITHOUT_EFFECT: &'static [&'static str] = &[
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dropout",
        "dtype",
        "initializer_factor",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
    ];

    fn fixed() -> Vec<(&'static str, Vec<Value>)> {
        let mut fixed = vec![
            ("model_type", vec![json!("clip_text_model"), json!("clip")]),
            ("pruned_heads", vec![json!({})]),
            ("quantization_config", vec![Value::Null]),
        ];
        for flag in ["add_cross_attention", "is_decoder", "is_encoder_decoder"] {
            fixed.push((flag, vec![json!(false)]));
        }
        fixed
    }

    fn validate(&self) -> Result<()> {
        for (name, n, limits) in [
            ("vocab_size", self.vocab_size, limits::ROWS),
            ("hidden_size", self.hidden_size, limits::CHANNELS),
            ("intermediate_size", self.intermediate_size, limits::CHANNELS),
            ("projection_dim", self.projection_dim, limits::CHANNELS),
            ("num_hidden_layers", self.num_hidden_layers, limits::LAYERS),
            ("num_attention_heads", self.num_attention_heads, limits::CHANNELS),
            ("max_position_embeddings", self.max_position_embeddings, limits::TOKENS),
        ] {
            limits::check(name, n, limits)?;
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(Error::Config(format!(
                "hidden_size {} does not divide into num_attention_heads {}",
                self.hidden_size, self.num_attention_heads
            )));
        }
        match self.layer_norm_eps > 0.0 {
            true => Ok(()),
            false => Err(Error::Config(format!("layer_norm_eps is {}, expected more than 0", self.layer_norm_eps))),
        }
    }
}

/// The transformer with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct ClipText {
    config: ClipConfig,
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    norm: LayerNorm,
    projection: Option<Conv2d>,
}

/// What is known of tokens, each a map `(B, C, 1, N)`.
#[derive(Clone, Debug)]
pub struct States<V> {
    /// Before the last block, without a norm.
    pub penultimate: V,
    /// Behind it and the last norm.
    pub last: V,
}

impl ClipText {
    /// Fresh weights, without a projection.
    pub fn init(config: &ClipConfig, draw: &mut Draws) -> Result<Weights> {
        let mut source = Random::new(draw);
        Self::build(config, &mut source, false)?;
        Ok(source.weights)
    }

    /// Takes its parameters from `source`, by transformers' names without a first `text_model`; with the projection if the
    /// config's class has one, or `projected` where it names none.
    pub fn build(config: &ClipConfig, source: &mut dyn Source, projected: bool) -> Result<Self> {
        config.validate()?;
        let mut root = Scope::root(source);
        let (width, eps) = (config.hidden_size, config.layer_norm_eps);
        let projected =
            config.architectures.map_or(projected, |[class]| class == ClipClass::CLIPTextModelWithProjection);
        let mut table = |name: &str, rows: usize| {
            let mut scope = root.at(format!("embeddings.{name}"));
            let weight = scope.tensor("weight", &[rows, width], Init::Normal(0.02))?;
            Ok::<_, Error>(Embedding { name: format!("embeddings.{name}"), weight })
        };
        Ok(ClipText {
            tokens: table("token_embedding", config.vocab_size)?,
            positions: table("position_embedding", config.max_position_embeddings)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::build(root.at(format!("encoder.layers.{i}")), config))
                .collect::<Result<_>>()?,
            norm: root.layer_norm("final_layer_norm", width, eps)?,
            projection: match projected {
                true => Some(root.projection("text_projection", [width, config.projection_dim], false)?),
                false => None,
            },
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Channels of the pooled output.
    pub fn pooled_width(&self) -> usize {
        if self.projection.is_some() { self.config.projection_dim } else { self.config.hidden_size }
    }

    /// Where its weights lie.
    pub fn device(&self) -> &Device {
        self.tokens.weight.device()
    }

    /// What is known of tokens by their ids, i64 `(B, N)`, at most as many as it has positions for. A token sees those
    /// before it.
    pub fn run<B: Backend>(&self, b: &B, ids: &B::Value) -> Result<States<B::Value>> {
        let n = b.dims(ids).get(1).copied().unwrap_or(0);
        let most = self.config.max_position_embeddings;
        if n == 0 || n > most {
            return Err(Error::Config(format!("{n} tokens, this text encoder takes 1 to {most}")));
        }
        let places = Tensor::arange(0i64, n as i64, self.device())?.reshape((1, n))?;
        let places = b.embedding(&b.constant(&places)?, &self.positions)?;
        let mut x = b.add(&b.embedding(ids, &self.tokens)?, &places)?;
        let mut penultimate = x.clone();
        for layer in &self.layers {
            penultimate = x;
            x = b.block(layer, &penultimate, &[])?;
        }
        Ok(States { penultimate, last: b.layer_norm(&x, &self.norm)? })
    }

    /// Which token the pooled output is taken at.
    pub fn end(&self) -> TokenAt {
        match self.config.eos_token_id {
            2 => TokenAt::Largest,
            end => TokenAt::Id(end),
        }
    }

    /// The last state at the end token `end` of each prompt, projected if there is a projection: `(B, pooled_width)`. `last`
    /// is `(B, C, 1, N)`, of prompts with these ids.
    pub fn pooled<B: Backend>(&self, b: &B, last: &B::Value, ids: &B::Value, end: TokenAt) -> Result<B::Value> {
        let rows = b.token_at(last, ids, end)?;
        match &self.projection {
            Some(Conv2d { name, weight, .. }) => {
                b.linear(&rows, &Linear { name: name.clone(), weight: weight.clone(), bias: None })
            }
            None => Ok(rows),
        }
    }
}

/// Attention to what came before, then two layers token by token, each behind a norm.
#[derive(Clone, Debug)]
struct Layer {
    heads: usize,
    norm1: LayerNorm,
    q: Conv2d,
    k: Conv2d,
    v: Conv2d,
    out: Conv2d,
    norm2: LayerNorm,
    fc1: Conv2d,
    act: Activation,
    fc2: Conv2d,
}

impl Layer {
    fn build(mut scope: Scope, config: &ClipConfig) -> Result<Self> {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let mut projection = |name: &str, zero| scope.pointwise(&format!("self_attn.{name}"), [width; 2], zero);
        let (q, k, v) = (projection("q_proj", false)?, projection("k_proj", false)?, projection("v_proj", false)?);
        Ok(Layer {
            heads: config.num_attention_heads,
            out: projection("out_proj", true)?,
            norm1: scope.layer_norm("layer_norm1", width, eps)?,
            norm2: scope.layer_norm("layer_norm2", width, eps)?,
            fc1: scope.pointwise("mlp.fc1", [width, inner], false)?,
            act: config.hidden_act,
            fc2: scope.pointwise("mlp.fc2", [inner, width], true)?,
            q,
            k,
            v,
        })
    }
}

impl Block for Layer {
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, _: &[&B::Value]) -> Result<B::Value> {
        let h = b.layer_norm(x, &self.norm1)?;
        let (q, k, v) = (b.conv2d(&h, &self.q)?, b.conv2d(&h, &self.k)?, b.conv2d(&h, &self.v)?);
        let x = b.add(x, &b.conv2d(&b.masked_attention(&q, &k, &v, self.heads, Mask::Causal)?, &self.out)?)?;
        let h = b.conv2d(&b.layer_norm(&x, &self.norm2)?, &self.fc1)?;
        b.add(&x, &b.conv2d(&b.activation(&h, self.act)?, &self.fc2)?)
    }
}
