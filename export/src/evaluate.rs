//! Runs a [`Graph`] on candle tensors, operation by operation, with the parameters that stand in the graph. This is
//! how a rewrite is checked against the graph before it, without any file or engine.

use crate::Result;
use crate::graph::{Conv, Graph, Node, Op};
use candle_core::{Device, Tensor};
use dmd_models::layers::{Conv2d, Embedding, GroupNorm, Linear};
use dmd_models::ops::{self, Mask, TokenAt, UNSEEN};
use dmd_models::{Backend, Eager};

impl Graph {
    /// The outputs for the inputs, in order, and where there are tables their rows `(B,)`. CPU; f32, ids i64.
    pub fn run(&self, inputs: &[&Tensor], row: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let mut values: Vec<Tensor> = Vec::with_capacity(self.nodes().len());
        for (at, node) in self.nodes().iter().enumerate() {
            let x: Vec<&Tensor> = node.inputs.iter().map(|id| &values[id.index()]).collect();
            let value = match (&node.op, row, inputs.get(at)) {
                (Op::Input(_), _, Some(input)) => (*input).clone(),
                (Op::Lookup(table), Some(row), _) => table.index_select(row, 0)?,
                _ => evaluate(node, &x)?,
            };
            values.push(value);
        }
        Ok(self.outputs().iter().map(|output| values[output.index()].clone()).collect())
    }
}

fn evaluate(node: &Node, x: &[&Tensor]) -> dmd_models::Result<Tensor> {
    let b = Eager;
    match &node.op {
        Op::Input(_) | Op::Lookup(_) => {
            Err(dmd_models::Error::Unsupported(format!("node \"{}\" needs an input that was not given", node.name)))
        }
        Op::Constant(tensor) => Ok(tensor.clone()),
        Op::Embedding(weight) => b.embedding(x[0], &Embedding { name: node.name.clone(), weight: weight.clone() }),
        Op::Tokens => b.tokens(x[0]),
        Op::States => b.states(x[0]),
        Op::TokenAt(id) => b.token_at(x[0], x[1], TokenAt::Id(*id)),
        Op::Linear { weight, bias } => {
            b.linear(x[0], &Linear { name: node.name.clone(), weight: weight.clone(), bias: bias.clone() })
        }
        Op::Columns { start, len } => b.columns(x[0], *start, *len),
        Op::Conv2d(Conv { weight, bias, stride, pads: [top, left, below, right] }) => {
            let padded = x[0].pad_with_zeros(2, *top, *below)?.pad_with_zeros(3, *left, *right)?;
            let (name, weight, bias) = (node.name.clone(), weight.clone(), bias.clone());
            b.conv2d(&padded, &Conv2d { name, weight, bias, stride: *stride, padding: 0 })
        }
        Op::ConvTranspose2d(Conv { weight, bias, stride, pads }) => {
            Ok(ops::conv_transpose2d(x[0], weight, bias.as_ref(), *stride, *pads)?)
        }
        Op::GroupNorm { groups, eps, affine } => {
            let channels = node.shape[1];
            let [weight, bias] = match affine {
                Some(affine) => affine.clone(),
                None => [Tensor::full(1f32, channels, &Device::Cpu)?, Tensor::full(0f32, channels, &Device::Cpu)?],
            };
            b.group_norm(x[0], &GroupNorm { name: node.name.clone(), weight, bias, groups: *groups, eps: *eps }, None)
        }
        Op::ChannelNorm { width, centred, eps, affine } => {
            let affine = affine.as_ref();
            match centred {
                true => Ok(ops::layer_norm(x[0], affine.map(|[scale, shift]| [scale, shift]), *eps)?),
                false => {
                    let ones = Tensor::full(1f32, *width, &Device::Cpu)?;
                    let normal = ops::rms_norm(x[0], &ones, *eps)?;
                    let Some([scale, shift]) = affine else { return Ok(normal) };
                    let [scale, shift] = [scale, shift].map(|values| values.reshape((1, (), 1, 1)));
                    Ok(normal.broadcast_mul(&scale?)?.broadcast_add(&shift?)?)
                }
            }
        }
        Op::Activation(act) => b.activation(x[0], *act),
        Op::Gated(act) => b.gated(x[0], *act),
        Op::Rotary(by) => b.rotary(x[0], by),
        Op::Mul => b.mul(x[0], x[1]),
        Op::Slice { axis, start, len } => b.slice(x[0], *axis, *start, *len),
        Op::Grid(sides) => b.grid(x[0], *sides),
        Op::Shuffle { side, patches } => b.shuffle(x[0], *side, *patches),
        Op::Unshuffle { side, patches } => b.unshuffle(x[0], *side, *patches),
        Op::Attention { heads, scale, mask } => {
            // The backend divides the scores by √d itself; what is left of `scale` goes into the query.
            let width = (node.shape[1] / heads) as f64;
            let [q, k, v] = match x {
                [all] => [0, 1, 2].map(|part| all.narrow(1, part * node.shape[1], node.shape[1])),
                _ => [0, 1, 2].map(|part| Ok(x[part].clone())),
            };
            // The graph has what is added to the scores, the backend which keys are seen.
            let seen = x.get(3).map(|bias| bias.affine(-1.0 / UNSEEN, 1.0)).transpose()?;
            let mask = match (mask, &seen) {
                (Mask::Padding(()), Some(seen)) => Mask::Padding(seen),
                (Mask::Causal, _) => Mask::Causal,
                _ => Mask::None,
            };
            let q = (q?.contiguous()? * (scale * width.sqrt()))?;
            b.masked_attention(&q, &k?.contiguous()?, &v?.contiguous()?, *heads, mask)
        }
        Op::Add => b.add(x[0], x[1]),
        Op::AddPerChannel => b.add_per_channel(x[0], x[1]),
        Op::ScalePerChannel | Op::ScalePerPicture => Ok(x[0].broadcast_mul(&x[1].unsqueeze(2)?.unsqueeze(3)?)?),
        Op::Affine { mul, add } => b.affine(x[0], &[*mul], *add),
        Op::Concat(axis) => b.join(x[0], x[1], *axis),
        Op::Upsample2x => b.upsample_2x(x[0]),
        Op::AvgPool2x => b.avg_pool_2x(x[0]),
        Op::PadRightBottom => b.pad_right_bottom(x[0]),
        Op::ToU8 => Ok(x[0].clamp(0f32, 255f32)?.permute((0, 2, 3, 1))?.to_dtype(candle_core::DType::U8)?),
    }
}
