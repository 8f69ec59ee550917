//! diffusers' `AutoencoderTiny`, and the files of TAESD itself (Ollin Boer Bohan's distilled autoencoders): latents as the
//! diffusion model sees them, a fiftieth of the work.

use super::scaling::Scaling;
use crate::backend::{Activation, Backend, Block};
use crate::layers::{Conv2d, Init, Scope, Source};
use crate::networks::config::Fields;
use crate::{Error, Result, Weights, limits};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The fields of `config.json`, with diffusers' defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TinyConfig {
    /// Channels of a picture that is encoded.
    pub in_channels: usize,
    /// Of one that is decoded.
    pub out_channels: usize,
    /// Channels of each of the encoder's levels: all of one number.
    pub encoder_block_out_channels: Vec<usize>,
    /// And of the decoder's.
    pub decoder_block_out_channels: Vec<usize>,
    /// Non-linearity inside the blocks; their sums have relu.
    pub act_fn: Activation,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Blocks of each of the encoder's levels, finest first.
    pub num_encoder_blocks: Vec<usize>,
    /// Blocks of each of the decoder's, coarsest first.
    pub num_decoder_blocks: Vec<usize>,
    /// A diffusion model sees latents times this; 1 in all that there are.
    pub scaling_factor: f64,
    /// After this was taken off.
    pub shift_factor: f64,
}

impl Default for TinyConfig {
    fn default() -> Self {
        TinyConfig {
            in_channels: 3,
            out_channels: 3,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            act_fn: Activation::Relu,
            latent_channels: 4,
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            scaling_factor: 1.0,
            shift_factor: 0.0,
        }
    }
}

impl Fields for TinyConfig {
    const CLASSES: &'static [&'static str] = &["AutoencoderTiny"];
    // How latents would be stored as bytes; a copy of decoder_block_out_channels; every pass is single precision here.
    const WITHOUT_EFFECT: &'static [&'static str] =
        &["latent_magnitude", "latent_shift", "block_out_channels", "force_upcast"];

    fn fixed() -> Vec<(&'static str, Vec<serde_json::Value>)> {
        vec![("upsample_fn", vec![json!("nearest")]), ("upsampling_scaling_factor", vec![json!(2)])]
    }

    fn validate(&self) -> Result<()> {
        for (name, n) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
        ] {
            limits::check(name, n, limits::CHANNELS)?;
        }
        for (half, channels, blocks) in [
            ("encoder", &self.encoder_block_out_channels, &self.num_encoder_blocks),
            ("decoder", &self.decoder_block_out_channels, &self.num_decoder_blocks),
        ] {
            limits::check(&format!("the number of {half}_block_out_channels"), channels.len(), limits::LEVELS)?;
            limits::check(&format!("{half}_block_out_channels"), channels[0], limits::CHANNELS)?;
            if channels.iter().any(|n| *n != channels[0]) {
                return Err(Error::Config(format!(
                    "{half}_block_out_channels is {channels:?}, expected one number throughout: there is nothing between the levels that would change it"
                )));
            }
            if blocks.len() != channels.len() {
                let (n, levels) = (blocks.len(), channels.len());
                return Err(Error::Config(format!(
                    "num_{half}_blocks has {n} entries, {half}_block_out_channels has {levels}"
                )));
            }
            for n in blocks {
                limits::check(&format!("num_{half}_blocks"), *n, 0..=*limits::LAYERS.end())?;
            }
        }
        if self.num_encoder_blocks.len() != self.num_decoder_blocks.len() {
            return Err(Error::Config(format!(
                "num_encoder_blocks {:?} and num_decoder_blocks {:?} are of unlike length",
                self.num_encoder_blocks, self.num_decoder_blocks
            )));
        }
        Scaling::of_all(self.scaling_factor, self.shift_factor).map(|_| ())
    }
}

/// The autoencoder with its parameters in place. Cheap to clone: the tensors are shared.
#[derive(Clone, Debug)]
pub struct AutoencoderTiny {
    config: TinyConfig,
    scaling: Scaling,
    /// None where a decoder came alone.
    encoder: Option<Vec<Layer>>,
    decoder: Vec<Layer>,
}

/// What a half is a list of.
#[derive(Clone, Debug)]
enum Layer {
    Conv(Conv2d),
    Act(Activation),
    Block(TinyBlock),
    Double,
}

impl AutoencoderTiny {
    /// Takes its parameters from `source`, by diffusers' names; the decoder's alone where there is no encoder.
    pub fn build(config: &TinyConfig, source: &mut dyn Source, with_encoder: bool) -> Result<Self> {
        config.validate()?;
        let mut root = Scope::root(source);
        let encoder = match with_encoder {
            true => Some(encoder(root.at("encoder.layers"), config)?),
            false => None,
        };
        let decoder = decoder(root.at("decoder.layers"), config)?;
        let scaling = Scaling::of_all(config.scaling_factor, config.shift_factor)?;
        Ok(AutoencoderTiny { encoder, decoder, scaling, config: config.clone() })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &TinyConfig {
        &self.config
    }

    pub(super) fn factor(&self) -> usize {
        1 << (self.config.num_decoder_blocks.len() - 1)
    }

    pub(super) fn scaling(&self) -> &Scaling {
        &self.scaling
    }

    pub(super) fn weight(&self) -> Result<&Conv2d> {
        let conv = self.decoder.iter().find_map(|layer| match layer {
            Layer::Conv(conv) => Some(conv),
            _ => None,
        });
        conv.ok_or_else(|| Error::Config("the decoder has no layers".into()))
    }

    /// Latents as a diffusion model makes them, `(B, latent_channels, h, w)`, to pictures in [-1, 1].
    pub fn decode<B: Backend>(&self, b: &B, latents: &B::Value) -> Result<B::Value> {
        let z = self.scaling.raw(b, latents, self.weight()?.weight.device())?;
        // Values far out are bent to ±3; and the network's own pictures are in [0, 1].
        let z = b.affine(&b.activation(&b.affine(&z, &[1.0 / 3.0], 0.0)?, Activation::Tanh)?, &[3.0], 0.0)?;
        b.affine(&run(b, &self.decoder, z)?, &[2.0], -1.0)
    }

    /// Pictures in [-1, 1] to raw latents, `(B, latent_channels, h, w)`.
    pub fn encode<B: Backend>(&self, b: &B, pictures: &B::Value) -> Result<B::Value> {
        let encoder = self.encoder.as_ref().ok_or_else(|| {
            Error::Config("this autoencoder came as a decoder alone: there is nothing to encode pictures by".into())
        })?;
        run(b, encoder, b.affine(pictures, &[0.5], 0.5)?)
    }
}

fn run<B: Backend>(b: &B, layers: &[Layer], x: B::Value) -> Result<B::Value> {
    layers.iter().try_fold(x, |x, layer| match layer {
        Layer::Conv(conv) => b.conv2d(&x, conv),
        Layer::Act(act) => b.activation(&x, *act),
        Layer::Block(block) => b.block(block, &x, &[]),
        Layer::Double => b.upsample_2x(&x),
    })
}

fn encoder(mut scope: Scope, config: &TinyConfig) -> Result<Vec<Layer>> {
    let channels = config.encoder_block_out_channels[0];
    let mut layers = Vec::new();
    for (level, blocks) in config.num_encoder_blocks.iter().enumerate() {
        layers.push(Layer::Conv(match level {
            0 => scope.conv2d("0", [config.in_channels, channels], 3, 1, false)?,
            _ => Conv2d { stride: 2, ..without_bias(&mut scope, layers.len(), channels)? },
        }));
        for _ in 0..*blocks {
            layers.push(Layer::Block(TinyBlock::build(scope.at(layers.len()), channels, config.act_fn)?));
        }
    }
    layers.push(Layer::Conv(scope.conv2d(
        &layers.len().to_string(),
        [channels, config.latent_channels],
        3,
        1,
        false,
    )?));
    Ok(layers)
}

fn decoder(mut scope: Scope, config: &TinyConfig) -> Result<Vec<Layer>> {
    let channels = config.decoder_block_out_channels[0];
    let first = scope.conv2d("0", [config.latent_channels, channels], 3, 1, false)?;
    let mut layers = vec![Layer::Conv(first), Layer::Act(config.act_fn)];
    for (level, blocks) in config.num_decoder_blocks.iter().enumerate() {
        for _ in 0..*blocks {
            layers.push(Layer::Block(TinyBlock::build(scope.at(layers.len()), channels, config.act_fn)?));
        }
        if level + 1 < config.num_decoder_blocks.len() {
            layers.push(Layer::Double);
            layers.push(Layer::Conv(without_bias(&mut scope, layers.len(), channels)?));
        }
    }
    layers.push(Layer::Conv(scope.conv2d(&layers.len().to_string(), [channels, config.out_channels], 3, 1, false)?));
    Ok(layers)
}

/// A 3×3 convolution as wide out as in.
fn without_bias(scope: &mut Scope, at: usize, channels: usize) -> Result<Conv2d> {
    let init = Init::Uniform(1.0 / (channels as f64 * 9.0).sqrt());
    let weight = scope.at(at).tensor("weight", &[channels, channels, 3, 3], init)?;
    Ok(Conv2d { name: scope.path(at), weight, bias: None, stride: 1, padding: 1 })
}

/// Three convolutions, and relu of the sum with what went in.
#[derive(Clone, Debug)]
struct TinyBlock {
    convs: [Conv2d; 3],
    act: Activation,
}

impl TinyBlock {
    fn build(mut scope: Scope, channels: usize, act: Activation) -> Result<Self> {
        let mut conv = |at: usize, zero| scope.conv2d(&format!("conv.{at}"), [channels; 2], 3, 1, zero);
        Ok(TinyBlock { convs: [conv(0, false)?, conv(2, false)?, conv(4, true)?], act })
    }
}

impl Block for TinyBlock {
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, _: &[&B::Value]) -> Result<B::Value> {
        let [first, second, third] = &self.convs;
        let h = b.activation(&b.conv2d(x, first)?, self.act)?;
        let h = b.activation(&b.conv2d(&h, second)?, self.act)?;
        b.activation(&b.add(x, &b.conv2d(&h, third)?)?, Activation::Relu)
    }
}

/// Names as diffusers has them. TAESD's own files hold one half each, whose layers have bare numbers; the decoder's count
/// the clamp before its first convolution.
pub(super) fn diffusers_names(weights: Weights) -> Weights {
    let number = |name: &str| {
        name.split_once('.').and_then(|(first, rest)| Some((first.parse::<usize>().ok()?, rest.to_string())))
    };
    if weights.names().any(|name| number(name).is_none()) {
        return weights;
    }
    // Without the clamp the first convolution is number 0.
    let is_encoder = weights.get("0.weight").is_some();
    let mut named = Weights::default();
    for (name, tensor) in weights.iter() {
        if let Some((at, rest)) = number(name) {
            let name = match is_encoder {
                true => format!("encoder.layers.{at}.{rest}"),
                false => format!("decoder.layers.{}.{rest}", at.saturating_sub(1)),
            };
            named.insert(name, tensor.clone());
        }
    }
    named
}
