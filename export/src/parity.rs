//! Every operation of [`Backend`] in every interpreter: eager, training with and without checkpoints, a tape, counted
//! shapes, and traced: evaluated, folded, and spelled in each dialect for the interpreter of ours, candle-onnx and tract.
//! The reference is the same operation in f64, by candle-nn where it has one and by plain operations of candle elsewhere.

use crate::lower::lower;
use crate::{Dialect, Precision, check, fold, interpret, onnx, trace};
use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::ops::{sigmoid, softmax};
use dmd_models::cost::Counter;
use dmd_models::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use dmd_models::networks::{Takes, Want};
use dmd_models::ops::{Mask, Pairs, Patches, Rotary, TokenAt};
use dmd_models::{Activation, Architecture, Axis, Backend, Block, Condition, Eager, Training};
use std::cell::RefCell;
use std::collections::HashMap;

/// Each operation as a network: the shape of its input x, the shapes of its parameters p, what it does, and the reference.
macro_rules! operations {
    ($($name:ident $shape:expr, $params:expr, |$b:ident, $x:ident, $p:ident| $body:expr, $reference:expr;)*) => {
        #[derive(Clone, Copy, Debug, PartialEq)]
        #[allow(non_camel_case_types)]
        enum Operation { $($name),* }

        impl Operation {
            const ALL: &[Operation] = &[$(Operation::$name),*];

            fn shapes(self) -> ([usize; 4], Vec<Vec<usize>>) {
                let params: &[&[usize]];
                let x = match self { $(Operation::$name => { params = &$params; $shape })* };
                (x, params.iter().map(|shape| shape.to_vec()).collect())
            }

            fn run<B: Backend>(self, b: &B, x: &B::Value, p: &[Tensor]) -> dmd_models::Result<B::Value> {
                match self { $(Operation::$name => { let ($b, $x, $p) = (b, x, p); let _ = $p; $body })* }
            }

            fn reference(self, x: &Tensor, p: &[Tensor]) -> Result<Tensor> {
                match self { $(Operation::$name => {
                    let f: fn(&Tensor, &[Tensor]) -> Result<Tensor> = $reference;
                    f(x, p)
                })* }
            }
        }
    };
}

operations! {
    conv2d [2, 6, 5, 7], [&[3, 6, 3, 3], &[3]], |b, x, p| b.conv2d(x, &conv(p, 2, 1)), |x, p| {
        let config = candle_nn::Conv2dConfig { padding: 1, stride: 2, ..Default::default() };
        candle_nn::Conv2d::new(p[0].clone(), Some(p[1].clone()), config).forward(x)
    };
    conv2d_add_per_channel [2, 6, 5, 4], [&[8, 6, 3, 3], &[8], &[8, 2]],
        |b, x, p| b.conv2d_add_per_channel(x, &conv(p, 1, 1), &vector(b, &p[2])?), |x, p| {
            let config = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
            let y = candle_nn::Conv2d::new(p[0].clone(), Some(p[1].clone()), config).forward(x)?;
            y.broadcast_add(&of_vector(&p[2])?)
        };
    conv_transpose2d [2, 4, 3, 2], [&[4, 3, 3, 3], &[3]],
        |b, x, p| {
            let (weight, bias, name) = (p[0].clone(), Some(p[1].clone()), "up".into());
            b.conv_transpose2d(x, &ConvTranspose2d { name, weight, bias, stride: 2, padding: 1, output_padding: 1 })
        },
        |x, p| x.conv_transpose2d(&p[0], 1, 1, 2, 1)?.broadcast_add(&p[1].reshape((1, 3, 1, 1))?);
    join_of_vectors [2, 5, 2, 2], [&[2, 2], &[3, 2]],
        |b, x, p| b.add_per_channel(x, &b.join(&vector(b, &p[0])?, &vector(b, &p[1])?, Axis::Channels)?),
        |x, p| x.broadcast_add(&Tensor::cat(&[of_vector(&p[0])?, of_vector(&p[1])?], 1)?);
    linear [2, 3, 2, 2], [&[3, 2]], |b, x, p| b.add_per_channel(x, &vector(b, &p[0])?),
        |x, p| x.broadcast_add(&of_vector(&p[0])?);
    group_norm [2, 8, 4, 4], [&[8], &[8]],
        |b, x, p| {
            let (weight, bias) = (p[0].clone(), p[1].clone());
            let norm = GroupNorm { name: "norm".into(), weight, bias, groups: 2, eps: 1e-3 };
            b.group_norm(x, &norm, Some(Activation::Silu))
        },
        |x, p| candle_nn::GroupNorm::new(p[0].clone(), p[1].clone(), 8, 2, 1e-3)?.forward(x)?.silu();
    layer_norm [2, 8, 5, 3], [&[8], &[8]],
        |b, x, p| b.layer_norm(x, &LayerNorm { name: "norm".into(), affine: Some([p[0].clone(), p[1].clone()]), eps: 1e-2 }),
        |x, p| tokens_last(x, |t| candle_nn::ops::layer_norm_slow(t, &p[0], &p[1], 1e-2));
    layer_norm_plain [2, 6, 5, 3], [], |b, x, p| b.layer_norm(x, &LayerNorm { name: "norm".into(), affine: None, eps: 1e-2 }),
        |x, _| tokens_last(x, |t| {
            candle_nn::LayerNorm::new_no_bias(Tensor::ones(6, DType::F64, &Device::Cpu)?, 1e-2).forward(t)
        });
    rms_norm [2, 6, 5, 3], [&[6]], |b, x, p| b.rms_norm(x, &rms(&p[0])),
        |x, p| tokens_last(x, |t| candle_nn::RmsNorm::new(p[0].clone(), 1e-2).forward_diff(t));
    rms_norm_of_heads [2, 8, 5, 3], [&[4]], |b, x, p| b.rms_norm(x, &rms(&p[0])), |x, p| {
        let heads = x.reshape((4, 4, 5, 3))?;
        tokens_last(&heads, |t| candle_nn::RmsNorm::new(p[0].clone(), 1e-2).forward_diff(t))?.reshape((2, 8, 5, 3))
    };
    activation_silu [2, 8, 3, 3], [], |b, x, p| b.activation(x, Activation::Silu), |x, _| candle_nn::ops::silu(x);
    activation_mish [2, 3, 3, 3], [], |b, x, p| b.activation(x, Activation::Mish), |x, _| candle_nn::ops::mish(x);
    activation_gelu [2, 3, 3, 3], [], |b, x, p| b.activation(x, Activation::Gelu), |x, _| x.gelu_erf();
    activation_gelu_tanh [2, 3, 3, 3], [], |b, x, p| b.activation(x, Activation::GeluTanh), |x, _| x.gelu();
    activation_quick_gelu [2, 3, 3, 3], [], |b, x, p| b.activation(x, Activation::QuickGelu), |x, _| x * sigmoid(&(x * 1.702)?)?;
    activation_relu [2, 3, 3, 3], [], |b, x, p| b.activation(x, Activation::Relu), |x, _| x.relu();
    activation_tanh [2, 3, 3, 3], [], |b, x, p| b.activation(x, Activation::Tanh), |x, _| x.tanh();
    gated [2, 16, 3, 3], [], |b, x, p| b.gated(x, Activation::Gelu), |x, _| x.narrow(1, 0, 8)? * x.narrow(1, 8, 8)?.gelu_erf()?;
    gated_silu [2, 6, 3, 3], [], |b, x, p| b.gated(x, Activation::Silu),
        |x, _| x.narrow(1, 0, 3)? * candle_nn::ops::silu(&x.narrow(1, 3, 3)?)?;
    embedding [2, 3, 2, 2], [&[4, 3]], |b, x, p| {
        let ids = b.constant(&Tensor::new(&[2i64], &Device::Cpu)?)?;
        b.add_per_channel(x, &b.embedding(&ids, &table(&p[0]))?)
    }, |x, p| x.broadcast_add(&p[0].get(2)?.reshape((1, 3, 1, 1))?);
    embedding_of_tokens [2, 3, 1, 4], [&[5, 3]], |b, x, p| {
        let ids = b.constant(&Tensor::new(&[[2i64, 0, 2, 4]], &Device::Cpu)?)?;
        b.add(x, &b.embedding(&ids, &table(&p[0]))?)
    }, |x, p| {
        let ids = Tensor::new(&[2u32, 0, 2, 4], &Device::Cpu)?;
        x.broadcast_add(&candle_nn::Embedding::new(p[0].clone(), 3).forward(&ids)?.t()?.reshape((1, 3, 1, 4))?)
    };
    sinusoid [2, 4, 2, 2], [], |b, x, p| {
        let ids = b.constant(&Tensor::new(&[3i64], &Device::Cpu)?)?;
        b.add_per_channel(x, &b.sinusoid(&ids, &Tensor::new(&[1f32, 0.25], &Device::Cpu)?, true)?)
    }, |x, _| {
        let row = [3f64.cos(), 0.75f64.cos(), 3f64.sin(), 0.75f64.sin()];
        x.broadcast_add(&Tensor::new(&row, &Device::Cpu)?.reshape((1, 4, 1, 1))?)
    };
    sinusoid_of_several [2, 4, 2, 2], [], |b, x, p| {
        let ids = b.constant(&Tensor::new(&[[3f32, -0.5]], &Device::Cpu)?)?;
        b.add_per_channel(x, &b.sinusoid(&ids, &Tensor::new(&[0.25f32], &Device::Cpu)?, false)?)
    }, |x, _| {
        let row = [0.75f64.sin(), 0.75f64.cos(), (-0.125f64).sin(), (-0.125f64).cos()];
        x.broadcast_add(&Tensor::new(&row, &Device::Cpu)?.reshape((1, 4, 1, 1))?)
    };
    tokens [2, 2, 1, 3], [], |b, x, p| {
        let states = b.constant(&Tensor::new(&[[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]]], &Device::Cpu)?)?;
        b.add(x, &b.tokens(&states)?)
    }, |x, _| x.broadcast_add(&Tensor::new(&[1f64, 3.0, 5.0, 2.0, 4.0, 6.0], &Device::Cpu)?.reshape((1, 2, 1, 3))?);
    states [2, 2, 1, 3], [], |b, x, p| b.add(x, &b.tokens(&b.states(x)?)?), |x, _| x * 2.0;
    token_at [2, 3, 1, 5], [], |b, x, p| {
        // One sample has the id twice, and one not at all.
        let ids = b.constant(&Tensor::new(&[[9i64, 7, 3, 7, 8], [1, 2, 3, 4, 5]], &Device::Cpu)?)?;
        b.add_per_channel(x, &b.token_at(x, &ids, TokenAt::Id(7))?)
    }, |x, _| {
        let token = |sample: usize, at: usize| x.get(sample)?.narrow(2, at, 1);
        x.broadcast_add(&Tensor::stack(&[token(0, 1)?, token(1, 0)?], 0)?)
    };
    attention [2, 8, 3, 4], [&[8, 8], &[8, 8]],
        |b, x, p| b.attention(&b.conv2d(x, &projection(&p[0]))?, x, &b.conv2d(x, &projection(&p[1]))?, 2),
        |x, p| attention_by_rows(&of_projection(x, &p[0])?, x, &of_projection(x, &p[1])?, 2, None);
    masked_attention_to_others [2, 8, 3, 4], [&[8, 8]],
        |b, x, p| {
            let others = b.slice(&b.grid(&b.conv2d(x, &projection(&p[0]))?, [1, 12])?, Axis::Tokens, 3, 5)?;
            b.masked_attention(x, &others, &others, 4, Mask::None)
        },
        |x, p| {
            let others = of_projection(x, &p[0])?.reshape((2, 8, 1, 12))?.narrow(3, 3, 5)?;
            attention_by_rows(x, &others, &others, 4, None)
        };
    masked_attention_causal [2, 6, 1, 7], [&[6, 6]],
        |b, x, p| b.masked_attention(&b.conv2d(x, &projection(&p[0]))?, x, x, 3, Mask::Causal),
        |x, p| {
            let hidden = |i: usize| (0..7).map(move |j| if j > i { f64::NEG_INFINITY } else { 0.0 });
            let bias = Tensor::from_iter((0..7).flat_map(hidden), &Device::Cpu)?.reshape((1, 1, 7, 7))?;
            attention_by_rows(&of_projection(x, &p[0])?, x, x, 3, Some(bias))
        };
    masked_attention_padding [2, 6, 1, 5], [&[6, 6]],
        |b, x, p| {
            let seen = b.constant(&Tensor::new(&[[1f32, 1.0, 0.0, 1.0, 0.0]], &Device::Cpu)?)?;
            b.masked_attention(&b.conv2d(x, &projection(&p[0]))?, x, x, 1, Mask::Padding(&seen))
        },
        |x, p| {
            let hidden = f64::NEG_INFINITY;
            let bias = Tensor::new(&[0.0, 0.0, hidden, 0.0, hidden], &Device::Cpu)?.reshape((1, 1, 1, 5))?;
            attention_by_rows(&of_projection(x, &p[0])?, x, x, 1, Some(bias))
        };
    rotary [2, 8, 2, 3], [], |b, x, p| b.rotary(x, &angles(Pairs::Halves)), |x, _| {
        let by_head = x.reshape((2, 2, 4, 6))?.transpose(2, 3)?.contiguous()?;
        let (cos, sin) = rows_of_angles()?;
        candle_nn::rotary_emb::rope_slow(&by_head, &cos, &sin)?.transpose(2, 3)?.contiguous()?.reshape((2, 8, 2, 3))
    };
    rotary_neighbours [2, 8, 2, 3], [], |b, x, p| b.rotary(x, &angles(Pairs::Neighbours)), |x, _| {
        let by_head = x.reshape((2, 2, 4, 6))?.transpose(2, 3)?.contiguous()?;
        let (cos, sin) = rows_of_angles()?;
        candle_nn::rotary_emb::rope_i_slow(&by_head, &cos, &sin)?.transpose(2, 3)?.contiguous()?.reshape((2, 8, 2, 3))
    };
    add [2, 8, 3, 2], [&[8, 8]], |b, x, p| b.add(x, &b.conv2d(x, &projection(&p[0]))?), |x, p| x + of_projection(x, &p[0])?;
    mul [2, 8, 3, 2], [&[8, 8]], |b, x, p| b.mul(x, &b.conv2d(x, &projection(&p[0]))?), |x, p| x * of_projection(x, &p[0])?;
    add_per_channel [2, 8, 3, 2], [&[8, 2]], |b, x, p| b.add_per_channel(x, &vector(b, &p[0])?),
        |x, p| x.broadcast_add(&of_vector(&p[0])?);
    mul_per_channel [2, 3, 3, 2], [&[3, 2]], |b, x, p| b.mul_per_channel(x, &vector(b, &p[0])?),
        |x, p| x.broadcast_mul(&of_vector(&p[0])?);
    modulate [2, 8, 3, 2], [&[8, 2], &[8, 2]], |b, x, p| b.modulate(x, &vector(b, &p[0])?, &vector(b, &p[1])?),
        |x, p| x.broadcast_mul(&(of_vector(&p[0])? + 1.0)?)?.broadcast_add(&of_vector(&p[1])?);
    columns [2, 3, 3, 2], [&[8, 2]], |b, x, p| b.add_per_channel(x, &b.columns(&vector(b, &p[0])?, 4, 3)?),
        |x, p| x.broadcast_add(&of_vector(&p[0])?.narrow(1, 4, 3)?);
    affine [2, 3, 3, 2], [], |b, x, p| b.affine(x, &[-1.5], 0.25), |x, _| x.affine(-1.5, 0.25);
    concat [2, 8, 3, 2], [&[16, 8]], |b, x, p| b.concat(x, &b.conv2d(x, &projection(&p[0]))?),
        |x, p| Tensor::cat(&[x, &of_projection(x, &p[0])?], 1);
    join [2, 8, 1, 4], [&[8, 8]], |b, x, p| b.join(x, &b.conv2d(x, &projection(&p[0]))?, Axis::Tokens),
        |x, p| Tensor::cat(&[x, &of_projection(x, &p[0])?], 3);
    slice [2, 9, 3, 2], [], |b, x, p| b.slice(x, Axis::Channels, 2, 5), |x, _| x.narrow(1, 2, 5);
    slice_of_rows [2, 8, 5, 3], [], |b, x, p| b.slice(x, Axis::Rows, 1, 3), |x, _| x.narrow(2, 1, 3);
    slice_of_tokens [2, 8, 1, 7], [], |b, x, p| b.slice(x, Axis::Tokens, 3, 4), |x, _| x.narrow(3, 3, 4);
    grid [2, 8, 2, 6], [], |b, x, p| b.grid(x, [3, 4]), |x, _| x.reshape((2, 8, 3, 4));
    shuffle [2, 8, 3, 2], [], |b, x, p| b.shuffle(x, 2, Patches::ChannelFirst), |x, _| candle_nn::ops::pixel_shuffle(x, 2);
    shuffle_channel_last [2, 12, 3, 2], [], |b, x, p| b.shuffle(x, 2, Patches::ChannelLast), |x, _| {
        // diffusers' "nhwpqc->nchpwq".
        let x = x.permute((0, 2, 3, 1))?.contiguous()?.reshape(vec![2, 3, 2, 2, 2, 3])?;
        x.permute(vec![0, 5, 1, 3, 2, 4])?.contiguous()?.reshape((2, 3, 6, 4))
    };
    unshuffle [2, 3, 4, 6], [], |b, x, p| b.unshuffle(x, 2, Patches::ChannelFirst), |x, _| candle_nn::ops::pixel_unshuffle(x, 2);
    unshuffle_channel_last [2, 3, 6, 9], [], |b, x, p| b.unshuffle(x, 3, Patches::ChannelLast), |x, _| {
        let x = x.contiguous()?.reshape(vec![2, 3, 2, 3, 3, 3])?;
        x.permute(vec![0, 3, 5, 1, 2, 4])?.contiguous()?.reshape((2, 27, 2, 3))
    };
    upsample_2x [2, 8, 3, 2], [], |b, x, p| b.upsample_2x(x), |x, _| {
        x.reshape(vec![2, 8, 3, 1, 2, 1])?.broadcast_as(vec![2, 8, 3, 2, 2, 2])?.contiguous()?.reshape((2, 8, 6, 4))
    };
    avg_pool_2x [2, 3, 4, 6], [], |b, x, p| b.avg_pool_2x(x), |x, _| {
        x.reshape(vec![2, 3, 2, 2, 3, 2])?.mean_keepdim(3)?.mean_keepdim(5)?.reshape((2, 3, 2, 3))
    };
    pad_right_bottom [2, 3, 3, 2], [], |b, x, p| b.pad_right_bottom(x),
        |x, _| x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1);
}

fn conv(p: &[Tensor], stride: usize, padding: usize) -> Conv2d {
    Conv2d { name: "conv".into(), weight: p[0].clone(), bias: p.get(1).cloned(), stride, padding }
}

/// Another map, so that an operation of two has a second one with a gradient.
fn projection(weight: &Tensor) -> Conv2d {
    Conv2d { name: "projection".into(), weight: weight.clone(), bias: None, stride: 1, padding: 0 }
}

fn of_projection(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    weight.broadcast_matmul(&x.reshape((b, c, h * w))?)?.reshape((b, (), h, w))
}

const ROW: [f64; 2] = [0.3, -0.7];

/// A vector `(1, C)` with a gradient.
fn vector<B: Backend>(b: &B, weight: &Tensor) -> dmd_models::Result<B::Value> {
    let row = b.constant(&Tensor::new(&[ROW.map(|v| v as f32)], &Device::Cpu)?)?;
    b.linear(&row, &Linear { name: "vector".into(), weight: weight.clone(), bias: None })
}

fn of_vector(weight: &Tensor) -> Result<Tensor> {
    let row = Tensor::new(&[ROW], &Device::Cpu)?;
    candle_nn::Linear::new(weight.clone(), None).forward(&row)?.reshape((1, (), 1, 1))
}

fn rms(weight: &Tensor) -> RmsNorm {
    RmsNorm { name: "norm".into(), weight: weight.clone(), eps: 1e-2 }
}

fn table(weight: &Tensor) -> Embedding {
    Embedding { name: "table".into(), weight: weight.clone() }
}

/// Runs `f` on `(B, H, W, C)`.
fn tokens_last(x: &Tensor, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    f(&x.permute((0, 2, 3, 1))?.contiguous()?)?.permute((0, 3, 1, 2))?.contiguous()
}

/// `(pixels, pairs)`.
fn rows_of_angles() -> Result<(Tensor, Tensor)> {
    let angles = (values(&[6, 2], 50)? * 3.0)?;
    Ok((angles.cos()?, angles.sin()?))
}

fn angles(pairs: Pairs) -> Rotary {
    let (cos, sin) = rows_of_angles().unwrap();
    let [cos, sin] = [cos, sin].map(|t| t.t().unwrap().contiguous().unwrap().to_dtype(DType::F32).unwrap());
    Rotary { cos, sin, pairs }
}

/// As a textbook has it: a row for each token.
fn attention_by_rows(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, bias: Option<Tensor>) -> Result<Tensor> {
    let (b, c, h, w) = q.dims4()?;
    let rows = |t: &Tensor| t.contiguous()?.reshape((b, heads, c / heads, ()))?.transpose(2, 3)?.contiguous();
    let scores = (rows(q)?.matmul(&rows(k)?.t()?.contiguous()?)? / ((c / heads) as f64).sqrt())?;
    let scores = bias.map_or(Ok(scores.clone()), |bias| scores.broadcast_add(&bias))?;
    softmax(&scores, D::Minus1)?.matmul(&rows(v)?)?.transpose(2, 3)?.contiguous()?.reshape((b, c, h, w))
}

/// Numbers in (-1, 1), f64.
fn values(shape: &[usize], seed: usize) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let value = |i: usize| ((i as f64 + 1.0) * 78.233 + seed as f64 * 12.9898).sin() * 43758.5453;
    Tensor::from_vec((0..n).map(|i| 2.0 * (value(i) - value(i).floor()) - 1.0).collect(), shape, &Device::Cpu)
}

#[derive(Clone)]
struct Run {
    operation: Operation,
    params: Vec<Tensor>,
    /// Whether it is a block of its network, computed again on the way back.
    block: bool,
    device: Device,
}

impl Architecture for Run {
    type Config = ();

    fn build(_: &(), _: &mut dyn dmd_models::layers::Source) -> dmd_models::Result<Self> {
        Err(dmd_models::Error::Config("made by its test".into()))
    }

    fn takes(&self) -> Takes {
        Takes { channels: self.operation.shapes().0[1], size: None, told: Condition::none() }
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        _: &[f64],
        _: &Condition<B::Value>,
        _: Want,
    ) -> dmd_models::Result<Vec<B::Value>> {
        let y = if self.block { b.block(self, x, &[]) } else { self.operation.run(b, x, &self.params) };
        Ok(vec![y?])
    }
}

impl Block for Run {
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, _: &[&B::Value]) -> dmd_models::Result<B::Value> {
        self.operation.run(b, x, &self.params)
    }
}

/// An operation's inputs, value and gradients in f64.
struct Exact {
    operation: Operation,
    inputs: Vec<Tensor>,
    y: Tensor,
    /// Of Σ y·weight.
    gradients: Vec<Tensor>,
    weight: Tensor,
}

impl Exact {
    fn of(operation: Operation) -> Result<Self> {
        let (x, params) = operation.shapes();
        let shapes = std::iter::once(x.to_vec()).chain(params);
        let inputs = shapes.enumerate().map(|(i, shape)| values(&shape, i)).collect::<Result<Vec<_>>>()?;
        let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let y = operation.reference(&tensors[0], &tensors[1..])?;
        let weight = values(y.dims(), 99)?;
        let grads = (&y * &weight)?.sum_all()?.backward()?;
        let gradients = vars.iter().map(|var| grads.get(var).cloned().unwrap()).collect();
        Ok(Exact { operation, inputs, y: y.detach(), gradients, weight })
    }

    fn f32s(&self) -> Vec<Var> {
        self.inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap()).collect()
    }

    fn check(&self, how: &str, y: &Tensor) {
        close(&format!("{:?} {how}", self.operation), y, &self.y, 2e-5);
    }

    /// Value and gradients where `pass` runs the network and `back` goes back.
    fn check_training(
        &self,
        how: &str,
        block: bool,
        pass: impl FnOnce(&Run, &Tensor) -> Tensor,
        back: impl FnOnce(&Tensor) -> candle_core::backprop::GradStore,
    ) {
        let vars = self.f32s();
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let run = Run { operation: self.operation, params: tensors[1..].to_vec(), block, device: Device::Cpu };
        let y = pass(&run, &tensors[0]);
        self.check(how, &y);
        let grads = back(&(&y * self.weight.to_dtype(DType::F32).unwrap()).unwrap().sum_all().unwrap());
        for (i, (var, exact)) in vars.iter().zip(&self.gradients).enumerate() {
            let what = format!("{:?} {how}: gradient of input {i}", self.operation);
            let found = grads.get(var).unwrap_or_else(|| panic!("{what} is missing"));
            close(&what, found, exact, 1e-4);
        }
    }
}

fn close(what: &str, found: &Tensor, exact: &Tensor, tolerance: f64) {
    assert_eq!(found.dims(), exact.dims(), "{what}");
    let largest = |t: &Tensor| {
        t.abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
    };
    let gap = largest(&(found.detach().to_dtype(DType::F64).unwrap() - exact).unwrap());
    assert!(gap <= tolerance * largest(exact).max(1.0), "{what}: {gap} of {}", largest(exact));
}

/// Runs a check of every operation, and names all that fail.
fn for_every_operation(check: impl Fn(Exact)) {
    let fails = |operation: &&Operation| {
        let check = || check(Exact::of(**operation).unwrap());
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err()
    };
    let failed: Vec<&Operation> = Operation::ALL.iter().filter(fails).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn every_operation_trains_alike_in_every_interpreter() {
    for_every_operation(|exact| {
        let eager = |run: &Run, x: &Tensor| Architecture::forward(run, &Eager, x, &[1.0], &Condition::none()).unwrap();
        exact.check_training("by Eager", false, eager, |loss| loss.backward().unwrap());
        for (checkpoint, tape) in [(false, false), (true, false), (false, true), (true, true)] {
            let training = Training::new(Default::default(), checkpoint);
            let training = if tape { training.on_tape() } else { training };
            let pass =
                |run: &Run, x: &Tensor| Architecture::forward(run, &training, x, &[1.0], &Condition::none()).unwrap();
            let how = format!("in training, checkpoint {checkpoint}, tape {tape}");
            exact.check_training(&how, checkpoint, pass, |loss| training.backward(loss).unwrap());
        }
    });
}

#[test]
fn every_operation_has_one_shape() {
    for_every_operation(|exact| {
        let operation = exact.operation;
        let params: Vec<Tensor> = exact.f32s()[1..].iter().map(|var| var.as_tensor().clone()).collect();
        let counted = operation.run(&Counter::default(), &exact.inputs[0].dims().to_vec(), &params).unwrap();
        assert_eq!(counted, exact.y.dims(), "{operation:?}");
    });
}

#[test]
fn every_operation_means_the_same_in_a_graph_and_in_a_file() {
    let run_by = RefCell::new(HashMap::<&str, usize>::new());
    for_every_operation(|exact| {
        let operation = exact.operation;
        let vars = exact.f32s();
        let params: Vec<Tensor> = vars[1..].iter().map(|var| var.as_tensor().clone()).collect();
        let x = vars[0].as_tensor().detach();
        for dynamic in [false, true] {
            if dynamic && operation == Operation::token_at {
                // Its ids are of as many samples as x.
                continue;
            }
            let mut shape: [usize; 4] = x.dims().try_into().unwrap();
            if dynamic {
                shape[0] = 1;
            }
            let mut graph = trace(shape, 0, |b, noise, _| operation.run(b, noise, &params)).unwrap();
            if !dynamic {
                assert_eq!(graph.node(graph.outputs()[0]).shape, exact.y.dims(), "{operation:?}");
                exact.check("in a graph", &graph.run(&[&x], None).unwrap()[0]);
                fold::fold(&mut graph).unwrap();
                exact.check("folded", &graph.run(&[&x], None).unwrap()[0]);
            }
            for dialect in Dialect::ALL {
                let lowered = match lower(&graph, &["image"], dialect, dynamic) {
                    // It has no error function and no transposed convolution, and says so.
                    Err(error) if dialect == Dialect::Nnapi && error.to_string().contains("--dialect portable") => {
                        continue;
                    }
                    lowered => lowered.unwrap(),
                };
                let model = onnx::model(lowered.graph, dialect, &[]);
                check::check(&model, dialect.rules(Precision::Fp32, dynamic)).unwrap();
                let proto = model.graph.as_ref().unwrap();
                let how = format!("as {dialect}, dynamic {dynamic},");
                let feeds = [("noise".to_string(), x.clone())];
                let y = interpret::Interpreter::new(proto).run(&feeds, &mut |_, _, y| Ok(y)).unwrap();
                exact.check(&format!("{how} by the interpreter"), &y[0]);
                if dynamic {
                    continue;
                }
                let inputs = HashMap::from(feeds);
                // Since opset 18 the axes of a mean are an input, which candle-onnx passes over.
                let has_mean = dialect == Dialect::Native && proto.node.iter().any(|node| node.op_type == "ReduceMean");
                match candle_onnx::simple_eval(&model, inputs) {
                    Ok(_) if has_mean => {}
                    Ok(found) => {
                        exact.check(&format!("{how} by candle-onnx"), &found["image"]);
                        *run_by.borrow_mut().entry("candle-onnx").or_default() += 1;
                    }
                    Err(error) => println!("{operation:?} {how} by candle-onnx: {error}"),
                }
                // It has no GroupNormalization and no Gelu of its own.
                if dialect != Dialect::Native
                    || !matches!(operation, Operation::group_norm | Operation::activation_gelu | Operation::gated)
                {
                    exact.check(&format!("{how} by tract"), &by_tract(&model, &x));
                    *run_by.borrow_mut().entry("tract").or_default() += 1;
                }
            }
        }
    });
    let run_by = run_by.into_inner();
    println!("{run_by:?} of {}", Operation::ALL.len());
    // candle-onnx lacks a few operators (InstanceNormalization, Resize by scales); tract lacks none.
    assert!(run_by["candle-onnx"] >= 2 * Operation::ALL.len(), "{run_by:?}");
}

fn by_tract(model: &candle_onnx::onnx::ModelProto, x: &candle_core::Tensor) -> candle_core::Tensor {
    use tract_onnx::prelude::{Tensor as TractTensor, *};
    let mut bytes = Vec::new();
    onnx::write(model, &mut bytes).unwrap();
    let model = tract_onnx::onnx().model_for_read(&mut bytes.as_slice()).unwrap().into_optimized().unwrap();
    let noise = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let noise = TractTensor::from_shape(x.dims(), &noise).unwrap().into_tensor();
    let found = model.into_runnable().unwrap().run(tvec!(noise.into())).unwrap();
    let found = found[0].to_plain_array_view::<f32>().unwrap();
    candle_core::Tensor::from_vec(found.iter().copied().collect(), found.shape(), &Device::Cpu).unwrap()
}

/// A new operation of the trait without a case here fails, by its name.
#[test]
fn no_operation_is_left_out() {
    let source = include_str!("../../models/src/backend.rs");
    let start = source.find("pub trait Backend").unwrap();
    let body = &source[start..start + source[start..].find("\n}").unwrap()];
    let names = body.lines().filter_map(|line| line.strip_prefix("    fn ")?.split(['(', '<']).next());
    let cases: Vec<String> = Operation::ALL.iter().map(|operation| format!("{operation:?}")).collect();
    let structure = ["network", "block", "constant", "dims"];
    for name in names.filter(|name| !structure.contains(name)) {
        assert!(cases.iter().any(|case| case.starts_with(name)), "{name}");
    }
}
