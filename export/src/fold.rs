//! Exact rewrites of a traced graph: scalars and per-channel maps move into the parameters beside them, where they
//! cost nothing. Each rule keeps the function that the graph computes; parameters are combined in f64 and rounded once.
//! Every rule removes work or nodes, so that applying them until none fits comes to an end.

use crate::Result;
use crate::graph::{Conv, Graph, NodeId, Op};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};

/// How often each rule was applied.
pub type Folded = BTreeMap<&'static str, usize>;

/// Applies every rule until none fits, but for [`fold_upsampling`].
pub fn fold(graph: &mut Graph) -> Result<Folded> {
    Ok(apply(graph, &RULES)?.0)
}

/// Makes one transposed convolution of a doubling by nearest neighbour and the 3×3 convolution that reads it. Four
/// ninths of the products, sixteen ninths of the weights: whether that is a gain depends on the engine.
pub fn fold_upsampling(graph: &mut Graph) -> Result<Folded> {
    Ok(apply(graph, &[("upsampling_into_conv", upsampling_into_conv)])?.0)
}

/// Applies the first rule that fits anywhere, at the first node that it fits, until none does; and how often a rule has
/// looked at a node. A rule looks again where something has changed within its sight, and nowhere else.
fn apply(graph: &mut Graph, rules: &[(&'static str, Rule)]) -> Result<(Folded, usize)> {
    let (mut folded, mut n_looks) = (Folded::new(), 0);
    let mut to_look_at: Vec<BTreeSet<NodeId>> = vec![graph.ids().collect(); rules.len()];
    graph.take_touched();
    while let Some((place, id)) = to_look_at.iter_mut().enumerate().find_map(|(i, ids)| Some((i, ids.pop_first()?))) {
        if !graph.is_needed(id) {
            continue;
        }
        let (name, rule) = rules[place];
        n_looks += 1;
        let fits = rule(graph, id)?;
        let touched = graph.take_touched();
        if fits {
            *folded.entry(name).or_default() += 1;
            to_look_at.iter_mut().for_each(|ids| ids.extend(&touched));
        }
    }
    graph.sweep();
    graph.name_nodes();
    Ok((folded, n_looks))
}

/// Looks at one node and what stands before or behind it, two steps far; rewrites and says so, or leaves all as it was.
type Rule = fn(&mut Graph, NodeId) -> Result<bool>;

const RULES: [(&str, Rule); 13] = [
    ("affine_of_affine", affine_of_affine),
    ("level_of_level", level_of_level),
    ("identity", identity),
    ("affine_through_sum", affine_through_sum),
    ("map_into_previous_conv", map_into_previous_conv),
    ("map_into_norm", map_into_norm),
    ("norm_into_class_table", norm_into_class_table),
    ("map_into_next_conv", map_into_next_conv),
    ("norm_into_next_conv", norm_into_next_conv),
    ("scale_into_padded_conv", scale_into_padded_conv),
    ("attention_scale", attention_scale),
    ("one_projection", one_projection),
    ("padding_into_conv", padding_into_conv),
];

/// (x·m₁ + a₁)·m₂ + a₂ = x·m₁m₂ + (a₁m₂ + a₂).
fn affine_of_affine(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Op::Affine { mul, add } = graph.node(id).op else { return Ok(false) };
    let source = graph.node(graph.node(id).inputs[0]);
    let Op::Affine { mul: first_mul, add: first_add } = source.op else { return Ok(false) };
    let inputs = source.inputs.clone();
    *graph.op_mut(id) = Op::Affine { mul: first_mul * mul, add: first_add * mul + add };
    graph.set_inputs(id, inputs);
    Ok(true)
}

/// (x·s₁(row))·s₂(row) = x·(s₁·s₂)(row): a pass's sigma meets its c_in and its c_skip.
fn level_of_level(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let scale = |id: NodeId| match (&graph.node(id).op, graph.node(id).inputs.as_slice()) {
        (Op::ScalePerPicture, &[x, level]) => match &graph.node(level).op {
            Op::Lookup(table) => Some((x, level, table.clone())),
            _ => None,
        },
        _ => None,
    };
    let Some((source, level, second)) = scale(id) else { return Ok(false) };
    let Some((x, _, first)) = scale(source) else { return Ok(false) };
    if graph.n_uses(level) != 1 {
        return Ok(false);
    }
    *graph.op_mut(level) = Op::Lookup(narrow(&(wide(&first)? * wide(&second)?)?)?);
    graph.set_inputs(id, vec![x, level]);
    Ok(true)
}

/// x·1 + 0 = x. It stays where the picture would be no operation's result at all.
fn identity(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Op::Affine { mul: 1.0, add: 0.0 } = graph.node(id).op else { return Ok(false) };
    let source = graph.node(id).inputs[0];
    if graph.is_output(id) && graph.node(source).inputs.is_empty() {
        return Ok(false);
    }
    graph.redirect(id, source);
    Ok(true)
}

/// (x + y)·m + a = x·m + (y·m + a), where both sides can take the factor in.
fn affine_through_sum(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Op::Affine { mul, add } = graph.node(id).op else { return Ok(false) };
    let sum = graph.node(id).inputs[0];
    let sides = graph.node(sum).inputs.clone();
    let absorbs =
        |side: &NodeId| graph.n_uses(*side) == 1 && matches!(graph.node(*side).op, Op::Affine { .. } | Op::Conv2d(_));
    if !matches!(graph.node(sum).op, Op::Add) || graph.n_uses(sum) != 1 || !sides.iter().all(absorbs) {
        return Ok(false);
    }
    for (side, add) in sides.into_iter().zip([0.0, add]) {
        match graph.op_mut(side) {
            Op::Affine { mul: first_mul, add: first_add } => {
                *first_mul *= mul;
                *first_add = *first_add * mul + add;
            }
            Op::Conv2d(conv) => *conv = conv.before(&ChannelMap::uniform(conv.weight.dims()[0], mul, add)?)?,
            _ => {}
        }
    }
    graph.redirect(id, sum);
    Ok(true)
}

/// m·(W∗x + b) + a = (mW)∗x + (mb + a), per output channel: the time embedding ends here, and so does c_out.
fn map_into_previous_conv(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Some(map) = ChannelMap::of(graph, id)? else { return Ok(false) };
    let source = graph.node(id).inputs[0];
    if graph.n_uses(source) != 1 {
        return Ok(false);
    }
    let Op::Conv2d(conv) = graph.op_mut(source) else { return Ok(false) };
    *conv = conv.before(&map)?;
    graph.redirect(id, source);
    Ok(true)
}

/// m·(γ·n + β) + a = (mγ)·n + (mβ + a): adaptive group norm at one noise level.
fn map_into_norm(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Some(map) = ChannelMap::of(graph, id)? else { return Ok(false) };
    let norm = graph.node(id).inputs[0];
    if graph.n_uses(norm) != 1 {
        return Ok(false);
    }
    let Some(affine) = graph.op_mut(norm).affine_of_norm() else { return Ok(false) };
    let [scale, shift] = match affine {
        Some([scale, shift]) => {
            [narrow(&(wide(scale)? * &map.mul)?)?, narrow(&((wide(shift)? * &map.mul)? + &map.add)?)?]
        }
        None => [narrow(&map.mul)?, narrow(&map.add)?],
    };
    *affine = Some([scale, shift]);
    graph.redirect(id, norm);
    Ok(true)
}

/// s(y)·(γ·n + β) + t(y) = (γ·s(y))·n + (β·s(y) + t(y)): the norm's own map moves into both tables.
fn norm_into_class_table(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let lookup = |id: NodeId| match &graph.node(id).op {
        Op::Lookup(table) if graph.n_uses(id) == 1 => Some(table.clone()),
        _ => None,
    };
    let (Op::AddPerChannel, [scaled, shift]) = (&graph.node(id).op, graph.node(id).inputs.as_slice()) else {
        return Ok(false);
    };
    let (Op::ScalePerChannel, [norm, scale]) = (&graph.node(*scaled).op, graph.node(*scaled).inputs.as_slice()) else {
        return Ok(false);
    };
    let (Op::GroupNorm { affine: Some([gamma, beta]), .. } | Op::ChannelNorm { affine: Some([gamma, beta]), .. }) =
        &graph.node(*norm).op
    else {
        return Ok(false);
    };
    let (Some(scales), Some(shifts)) = (lookup(*scale), lookup(*shift)) else { return Ok(false) };
    if graph.n_uses(*scaled) != 1 || graph.n_uses(*norm) != 1 {
        return Ok(false);
    }
    let scales = wide(&scales)?;
    let shifts = narrow(&(scales.broadcast_mul(&wide(beta)?)? + wide(&shifts)?)?)?;
    let scales = narrow(&scales.broadcast_mul(&wide(gamma)?)?)?;
    let (norm, scale, shift) = (*norm, *scale, *shift);
    *graph.op_mut(scale) = Op::Lookup(scales);
    *graph.op_mut(shift) = Op::Lookup(shifts);
    if let Some(affine) = graph.op_mut(norm).affine_of_norm() {
        *affine = None;
    }
    Ok(true)
}

/// W∗(m·x + a) = (Wm)∗x + Σ Wa, per input channel. The border's zeros are not shifted, so a convolution that pads
/// takes the factor only where a = 0. c_in goes this way.
fn map_into_next_conv(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Op::Conv2d(conv) = &graph.node(id).op else { return Ok(false) };
    let source = graph.node(id).inputs[0];
    let Some(map) = ChannelMap::of(graph, source)? else { return Ok(false) };
    if conv.pads != [0; 4] && !map.is_scale()? {
        return Ok(false);
    }
    let (conv, input) = (conv.after(&map)?, graph.node(source).inputs[0]);
    *graph.op_mut(id) = Op::Conv2d(conv);
    graph.set_inputs(id, vec![input]);
    Ok(true)
}

/// The same for a norm's affine map, if all that read it are convolutions without padding (attention's projections).
fn norm_into_next_conv(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let (Op::GroupNorm { affine: Some([scale, shift]), .. } | Op::ChannelNorm { affine: Some([scale, shift]), .. }) =
        &graph.node(id).op
    else {
        return Ok(false);
    };
    let map = ChannelMap { mul: wide(scale)?, add: wide(shift)? };
    let convs = graph.consumers(id);
    let unpadded = |conv: &NodeId| matches!(&graph.node(*conv).op, Op::Conv2d(conv) if conv.pads == [0; 4]);
    if graph.is_output(id) || !convs.iter().all(unpadded) {
        return Ok(false);
    }
    for conv in convs {
        if let Op::Conv2d(conv) = graph.op_mut(conv) {
            *conv = conv.after(&map)?;
        }
    }
    if let Some(affine) = graph.op_mut(id).affine_of_norm() {
        *affine = None;
    }
    Ok(true)
}

/// W∗(m·x + a) = (Wm)∗(x + a/m) for a convolution that pads: one node less.
fn scale_into_padded_conv(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Op::Conv2d(conv) = &graph.node(id).op else { return Ok(false) };
    let source = graph.node(id).inputs[0];
    let Op::Affine { mul, add } = graph.node(source).op else { return Ok(false) };
    if mul == 1.0 || mul == 0.0 || graph.n_uses(source) != 1 {
        return Ok(false);
    }
    let conv = conv.after(&ChannelMap::uniform(conv.weight.dims()[1], mul, 0.0)?)?;
    *graph.op_mut(id) = Op::Conv2d(conv);
    *graph.op_mut(source) = Op::Affine { mul: 1.0, add: add / mul };
    Ok(true)
}

/// (s·q)·k = s·(q·k): the scores' factor goes into the query's convolution.
fn attention_scale(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Op::Attention { heads, scale, mask } = graph.node(id).op else { return Ok(false) };
    let query = graph.node(id).inputs[0];
    if scale == 1.0 || graph.n_uses(query) != 1 {
        return Ok(false);
    }
    let Op::Conv2d(conv) = graph.op_mut(query) else { return Ok(false) };
    *conv = conv.before(&ChannelMap::uniform(conv.weight.dims()[0], scale, 0.0)?)?;
    *graph.op_mut(id) = Op::Attention { heads, scale: 1.0, mask };
    Ok(true)
}

/// Query, key and value of one picture: three convolutions of it are one with all their channels.
fn one_projection(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let (Op::Attention { .. }, &[query, key, value]) = (&graph.node(id).op, graph.node(id).inputs.as_slice()) else {
        return Ok(false);
    };
    let projection = |id: NodeId| match &graph.node(id).op {
        Op::Conv2d(conv) if graph.n_uses(id) == 1 => Some((graph.node(id).inputs[0], conv)),
        _ => None,
    };
    let [Some((x, q)), Some((x_of_key, k)), Some((x_of_value, v))] = [query, key, value].map(projection) else {
        return Ok(false);
    };
    let alike =
        |conv: &Conv| (conv.stride, conv.pads, &conv.weight.dims()[1..]) == (q.stride, q.pads, &q.weight.dims()[1..]);
    if x != x_of_key || x != x_of_value || !alike(k) || !alike(v) {
        return Ok(false);
    }
    let bias = |conv: &Conv| {
        conv.bias.clone().map_or_else(|| Tensor::zeros(conv.weight.dims()[0], DType::F32, &Device::Cpu), Ok)
    };
    let weight = Tensor::cat(&[&q.weight, &k.weight, &v.weight], 0)?;
    let bias = Tensor::cat(&[bias(q)?, bias(k)?, bias(v)?], 0)?;
    let conv = Conv { weight, bias: Some(bias), ..*q };
    graph.replace(query, "to_qkv", Op::Conv2d(conv))?;
    graph.set_inputs(id, vec![query]);
    Ok(true)
}

/// Zeros around a picture, then a convolution that adds zeros around it.
fn padding_into_conv(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let [source] = graph.node(id).inputs[..] else { return Ok(false) };
    let (Op::PadRightBottom, inputs) = (&graph.node(source).op, graph.node(source).inputs.clone()) else {
        return Ok(false);
    };
    let Op::Conv2d(conv) = graph.op_mut(id) else { return Ok(false) };
    conv.pads[2] += 1;
    conv.pads[3] += 1;
    graph.set_inputs(id, inputs);
    Ok(true)
}

/// Of the pixels that a 3×3 window of a doubled picture covers, most are the same one: row 2i of the result is
/// w₀·x(i−1) + (w₁+w₂)·x(i), row 2i+1 is (w₀+w₁)·x(i) + w₂·x(i+1), and columns likewise. So pixel i of x adds
/// (w₂, w₁+w₂, w₀+w₁, w₀) to rows 2i−1 to 2i+2.
fn upsampling_into_conv(graph: &mut Graph, id: NodeId) -> Result<bool> {
    let Op::Conv2d(conv) = &graph.node(id).op else { return Ok(false) };
    let source = graph.node(id).inputs[0];
    let fits = conv.weight.dims()[2..] == [3, 3] && conv.stride == 1 && conv.pads == [1; 4];
    if !fits || !matches!(graph.node(source).op, Op::Upsample2x) || graph.n_uses(source) != 1 {
        return Ok(false);
    }
    let along = |weight: &Tensor, axis: usize| -> Result<Tensor> {
        let at = |i: usize| weight.narrow(axis, i, 1);
        Ok(Tensor::cat(&[at(2)?, (at(1)? + at(2)?)?, (at(0)? + at(1)?)?, at(0)?], axis)?)
    };
    let weight = along(&along(&wide(&conv.weight)?, 2)?, 3)?.transpose(0, 1)?;
    let conv = Conv { weight: narrow(&weight)?, bias: conv.bias.clone(), stride: 2, pads: [1; 4] };
    let small = graph.node(source).inputs.clone();
    *graph.op_mut(id) = Op::ConvTranspose2d(conv);
    graph.set_inputs(id, small);
    Ok(true)
}

/// x·mul + add, one number per channel, f64 `(C,)`.
struct ChannelMap {
    mul: Tensor,
    add: Tensor,
}

impl ChannelMap {
    /// What a node does to its first input, if that is a constant map per channel.
    fn of(graph: &Graph, id: NodeId) -> Result<Option<Self>> {
        let node = graph.node(id);
        let channels = match node.shape[..] {
            [_, channels, _, _] => channels,
            _ => return Ok(None),
        };
        if let Op::Affine { mul, add } = node.op {
            return Ok(Some(Self::uniform(channels, mul, add)?));
        }
        let Some(second) = node.inputs.get(1) else { return Ok(None) };
        let Op::Constant(values) = &graph.node(*second).op else { return Ok(None) };
        if values.dims() != [1, channels] {
            return Ok(None);
        }
        let values = wide(&values.squeeze(0)?)?;
        Ok(match node.op {
            Op::AddPerChannel => Some(ChannelMap { mul: values.ones_like()?, add: values }),
            Op::ScalePerChannel => Some(ChannelMap { add: values.zeros_like()?, mul: values }),
            _ => None,
        })
    }

    fn uniform(channels: usize, mul: f64, add: f64) -> Result<Self> {
        let all = |value: f64| Tensor::full(value, channels, &Device::Cpu);
        Ok(ChannelMap { mul: all(mul)?, add: all(add)? })
    }

    fn is_scale(&self) -> Result<bool> {
        Ok(self.add.to_vec1::<f64>()?.iter().all(|add| *add == 0.0))
    }
}

impl Conv {
    /// This convolution and then the map, as one convolution.
    fn before(&self, map: &ChannelMap) -> Result<Conv> {
        let bias = match &self.bias {
            Some(bias) => ((wide(bias)? * &map.mul)? + &map.add)?,
            None => map.add.clone(),
        };
        Ok(Conv { weight: scaled(&self.weight, &map.mul, 0)?, bias: Some(narrow(&bias)?), ..*self })
    }

    /// The map and then this convolution, as one convolution; exact where it does not pad, or the map only scales.
    fn after(&self, map: &ChannelMap) -> Result<Conv> {
        let per_input = map.add.reshape((1, map.add.elem_count(), 1, 1))?;
        let offset = wide(&self.weight)?.broadcast_mul(&per_input)?.sum((1, 2, 3))?;
        let bias = match &self.bias {
            Some(bias) => (wide(bias)? + offset)?,
            None => offset,
        };
        Ok(Conv { weight: scaled(&self.weight, &map.mul, 1)?, bias: Some(narrow(&bias)?), ..*self })
    }
}

/// A weight times one number per channel of `axis`; the same tensor, not a copy, where all are 1, as behind a time
/// embedding.
fn scaled(weight: &Tensor, mul: &Tensor, axis: usize) -> Result<Tensor> {
    if mul.to_vec1::<f64>()?.iter().all(|mul| *mul == 1.0) {
        return Ok(weight.clone());
    }
    let mut shape = [1; 4];
    shape[axis] = mul.elem_count();
    narrow(&wide(weight)?.broadcast_mul(&mul.reshape(&shape)?)?)
}

fn wide(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F64)?)
}

fn narrow(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Trace, Value, trace};
    use dmd_models::layers::{Conv2d, Embedding, GroupNorm};
    use dmd_models::{Activation, Backend, Condition, Way};
    use dmd_runtime::noise::Stream;

    const SHAPE: [usize; 4] = [3, 4, 6, 5];

    /// Unit normal numbers, different for every `index`.
    fn normal(index: u64, shape: &[usize]) -> Tensor {
        let values = Stream::new(0, 1, index).normal(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn conv(index: u64, io: [usize; 2], kernel: usize, padding: usize) -> Conv2d {
        let weight = (normal(index, &[io[1], io[0], kernel, kernel]) * 0.3).unwrap();
        let bias = Some(normal(index + 100, &[io[1]]));
        Conv2d { name: format!("conv_{index}"), weight, bias, stride: 1, padding }
    }

    fn norm(index: u64) -> GroupNorm {
        let (weight, bias) = (normal(index, &[4]), normal(index + 100, &[4]));
        GroupNorm { name: format!("norm_{index}"), weight, bias, groups: 2, eps: 1e-5 }
    }

    fn vector(b: &Trace, index: u64) -> dmd_models::Result<Value> {
        b.constant(&normal(index, &[1, 4]))
    }

    fn class_vector(b: &Trace, cond: &Condition<Value>, index: u64) -> dmd_models::Result<Value> {
        let table = Embedding { name: "class_embedding".into(), weight: normal(index, &[5, 4]) };
        b.embedding(cond.get(Way::Label).unwrap(), &table)
    }

    /// Traces, folds, and holds the folded graph to the pictures of the unfolded one; then to the rules that were
    /// to be applied and the operations that were to be left.
    fn check<F>(rules: &[(&'static str, usize)], left: &[&str], network: F)
    where
        F: FnOnce(&Trace, &Value, &Condition<Value>) -> dmd_models::Result<Value>,
    {
        let mut graph = trace(SHAPE, 5, network).unwrap();
        let (noise, label) = (normal(1000, &SHAPE), Tensor::new(&[4i64, 0, 2], &Device::Cpu).unwrap());
        let before = graph.run(&[&noise], Some(&label)).unwrap().remove(0);
        let mut folded = fold(&mut graph).unwrap();
        folded.extend(fold_upsampling(&mut graph).unwrap());
        let after = graph.run(&[&noise], Some(&label)).unwrap().remove(0);
        let scale = before.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let difference = (&before - &after).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference <= 4e-6 * scale, "the pictures moved by {difference}, their largest value is {scale}");
        assert_eq!(folded, rules.iter().copied().collect::<Folded>());
        let kinds: Vec<&str> = graph.nodes().iter().skip(1).map(|node| node.op.kind()).collect();
        assert_eq!(kinds, left);
    }

    #[test]
    fn affines_merge_and_identities_go() {
        check(&[("affine_of_affine", 2), ("identity", 1)], &["silu"], |b, x, _| {
            let x = b.affine(&b.affine(&b.affine(x, &[2.0], 1.0)?, &[0.25], 0.0)?, &[2.0], -0.5)?;
            b.activation(&x, Activation::Silu)
        });
    }

    #[test]
    fn c_in_goes_into_the_first_convolution() {
        check(&[("map_into_next_conv", 1)], &["conv"], |b, x, _| {
            b.conv2d(&b.affine(x, &[0.37], 0.0)?, &conv(1, [4, 2], 3, 1))
        });
    }

    #[test]
    fn a_shifted_input_goes_into_a_convolution_without_padding() {
        check(&[("map_into_next_conv", 1)], &["conv"], |b, x, _| {
            b.conv2d(&b.affine(x, &[2.0], -1.0)?, &conv(1, [4, 2], 3, 0))
        });
    }

    #[test]
    fn a_shifted_input_stays_shifted_before_a_convolution_that_pads() {
        check(&[("scale_into_padded_conv", 1)], &["affine", "conv"], |b, x, _| {
            b.conv2d(&b.affine(x, &[2.0], -1.0)?, &conv(1, [4, 2], 3, 1))
        });
    }

    #[test]
    fn the_time_embedding_goes_into_the_bias() {
        check(&[("map_into_previous_conv", 1)], &["conv", "silu"], |b, x, _| {
            let x = b.add_per_channel(&b.conv2d(x, &conv(1, [4, 4], 3, 1))?, &vector(b, 2)?)?;
            b.activation(&x, Activation::Silu)
        });
    }

    #[test]
    fn a_convolution_that_is_read_twice_keeps_its_weights() {
        check(&[], &["conv", "affine", "add"], |b, x, _| {
            let x = b.conv2d(x, &conv(1, [4, 4], 3, 1))?;
            b.add(&x, &b.affine(&x, &[2.0], 0.0)?)
        });
    }

    #[test]
    fn a_constant_modulation_goes_into_the_norm() {
        check(&[("map_into_norm", 2)], &["norm", "gelu"], |b, x, _| {
            let x = b.modulate(&b.group_norm(x, &norm(1), None)?, &vector(b, 2)?, &vector(b, 3)?)?;
            b.activation(&x, Activation::Gelu)
        });
    }

    #[test]
    fn a_norm_goes_into_the_class_tables_that_modulate_it() {
        let left = ["norm", "lookup", "scale", "lookup", "shift", "mish"];
        check(&[("norm_into_class_table", 1)], &left, |b, x, cond| {
            let (scale, shift) = (class_vector(b, cond, 2)?, class_vector(b, cond, 3)?);
            let x = b.modulate(&b.group_norm(x, &norm(1), None)?, &scale, &shift)?;
            b.activation(&x, Activation::Mish)
        });
    }

    #[test]
    fn the_coefficients_of_a_pass_meet_in_one_table() {
        let pass = |sigma: f64| {
            trace(SHAPE, 0, |b, noise, _| {
                let x = b.affine(noise, &[sigma], 0.0)?;
                let f = b.conv2d(&b.affine(&x, &[0.5 / sigma], 0.0)?, &conv(1, [4, 4], 3, 1))?;
                b.add(&b.affine(&x, &[1.0 / (1.0 + sigma)], 0.0)?, &b.affine(&f, &[0.1 * sigma], 0.0)?)
            })
            .unwrap()
        };
        let passes = [pass(8.0), pass(2.0), pass(0.5)];
        let mut graph = crate::passes::merge(&passes).unwrap();
        assert_eq!(graph.rows(), 3);
        let (folded, noise) = (fold(&mut graph).unwrap(), normal(1000, &SHAPE));
        assert_eq!(folded, Folded::from([("level_of_level", 2)]));
        let kinds: Vec<&str> = graph.nodes().iter().skip(1).map(|node| node.op.kind()).collect();
        assert_eq!(kinds, ["lookup", "level", "conv", "lookup", "level", "lookup", "level", "add"]);
        for (row, pass) in passes.iter().enumerate() {
            let rows = Tensor::full(row as i64, SHAPE[0], &Device::Cpu).unwrap();
            let run = |graph: &Graph, rows| graph.run(&[&noise], rows).unwrap().remove(0);
            let (expected, found) = (run(pass, None), run(&graph, Some(&rows)));
            let largest = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let difference = largest(&(&expected - found).unwrap());
            assert!(difference <= 4e-6 * largest(&expected), "pass {row} moved by {difference}");
        }
    }

    #[test]
    fn attention_loses_its_scale_and_its_norms_map() {
        let rules = [("attention_scale", 1), ("norm_into_next_conv", 1), ("one_projection", 1)];
        check(&rules, &["norm", "conv", "attention"], |b, x, _| {
            let x = b.group_norm(x, &norm(1), None)?;
            let project = |index| b.conv2d(&x, &conv(index, [4, 4], 1, 0));
            b.attention(&project(2)?, &project(3)?, &project(4)?, 2)
        });
    }

    #[test]
    fn attention_to_another_picture_keeps_its_projections() {
        let left = ["conv", "silu", "conv", "conv", "attention"];
        check(&[("attention_scale", 1)], &left, |b, x, _| {
            let query = b.conv2d(x, &conv(2, [4, 4], 1, 0))?;
            let other = b.activation(x, Activation::Silu)?;
            let project = |index| b.conv2d(&other, &conv(index, [4, 4], 1, 0));
            b.attention(&query, &project(3)?, &project(4)?, 2)
        });
    }

    #[test]
    fn a_norms_map_goes_into_a_plain_pointwise_convolution() {
        check(&[("norm_into_next_conv", 1)], &["norm", "conv", "silu"], |b, x, _| {
            let x = b.conv2d(&b.group_norm(x, &norm(1), None)?, &conv(2, [4, 6], 1, 0))?;
            b.activation(&x, Activation::Silu)
        });
        // What pads, or comes after an activation, cannot take it.
        check(&[], &["norm", "conv"], |b, x, _| b.conv2d(&b.group_norm(x, &norm(1), None)?, &conv(2, [4, 4], 3, 1)));
        check(&[], &["norm", "silu", "conv"], |b, x, _| {
            b.conv2d(&b.group_norm(x, &norm(1), Some(Activation::Silu))?, &conv(2, [4, 4], 1, 0))
        });
    }

    #[test]
    fn a_norm_that_something_else_reads_keeps_its_map() {
        check(&[], &["norm", "conv", "add"], |b, x, _| {
            let x = b.group_norm(x, &norm(1), None)?;
            b.add(&x, &b.conv2d(&x, &conv(2, [4, 4], 1, 0))?)
        });
    }

    #[test]
    fn padding_becomes_part_of_the_convolution() {
        check(&[("padding_into_conv", 1)], &["conv"], |b, x, _| {
            let down = Conv2d { stride: 2, ..conv(1, [4, 4], 3, 0) };
            b.conv2d(&b.pad_right_bottom(x)?, &down)
        });
    }

    #[test]
    fn upsampling_becomes_part_of_the_convolution() {
        let up = |b: &Trace, x: &Value, conv: &Conv2d| b.conv2d(&b.upsample_2x(x)?, conv);
        let rules = [("upsampling_into_conv", 2)];
        check(&rules, &["conv_transpose", "silu", "conv_transpose"], |b, x, _| {
            let x = b.activation(&up(b, x, &conv(1, [4, 6], 3, 1))?, Activation::Silu)?;
            up(b, &x, &Conv2d { bias: None, ..conv(2, [6, 2], 3, 1) })
        });
        check(&[], &["upsample", "conv"], |b, x, _| up(b, x, &conv(1, [4, 4], 1, 0)));
        check(&[], &["upsample", "conv"], |b, x, _| up(b, x, &conv(1, [4, 4], 3, 0)));
        check(&[], &["upsample", "conv"], |b, x, _| up(b, x, &Conv2d { stride: 2, ..conv(1, [4, 4], 3, 1) }));
        check(&[], &["upsample", "conv", "add"], |b, x, _| {
            let x = b.upsample_2x(x)?;
            b.add(&x, &b.conv2d(&x, &conv(1, [4, 4], 3, 1))?)
        });
    }

    /// One row of weights 1, 10, 100: what each output row sums, by hand.
    #[test]
    fn a_pixel_adds_the_sums_of_neighbouring_weights() {
        let weight = Tensor::new(&[[[[0f32, 1.0, 0.0], [0.0, 10.0, 0.0], [0.0, 100.0, 0.0]]]], &Device::Cpu).unwrap();
        let conv = Conv2d { name: "up".into(), weight, bias: None, stride: 1, padding: 1 };
        let mut graph = trace([1, 1, 2, 1], 0, |b, x, _| b.conv2d(&b.upsample_2x(x)?, &conv)).unwrap();
        fold_upsampling(&mut graph).unwrap();
        let Op::ConvTranspose2d(conv) = &graph.nodes()[1].op else { panic!("a transposed convolution") };
        let column = conv.weight.narrow(3, 1, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(column, [100.0, 110.0, 11.0, 1.0]);
        let x = Tensor::new(&[[[[1f32], [2.0]]]], &Device::Cpu).unwrap();
        let y = graph.run(&[&x], None).unwrap()[0]
            .narrow(3, 0, 1)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        // Rows 1 1 2 2 and a border of zeros.
        assert_eq!(y, [110.0, 211.0, 221.0, 22.0]);
    }

    /// Blocks one behind the other, in each of which four rules fit.
    fn blocks(n: usize) -> Graph {
        let shape = [1, 4, 1, 1];
        let network = |b: &Trace, noise: &Value, _: &Condition<Value>| {
            (0..n).try_fold(noise.clone(), |x, _| {
                let x = b.affine(&b.affine(&x, &[2.0], 0.0)?, &[0.5], 0.25)?;
                let y = b.add_per_channel(&b.conv2d(&x, &conv(1, [4, 4], 1, 0))?, &vector(b, 2)?)?;
                b.add(&x, &b.activation(&b.affine(&y, &[0.5], 0.0)?, Activation::Silu)?)
            })
        };
        trace(shape, 0, network).unwrap()
    }

    /// A network of ten times as many nodes takes ten times as many looks.
    #[test]
    fn folding_looks_at_each_node_a_few_times_however_long_the_network_is() {
        let (short, few) = apply(&mut blocks(20), &RULES).unwrap();
        let (long, many) = apply(&mut blocks(200), &RULES).unwrap();
        assert_eq!(short.values().sum::<usize>() * 10, long.values().sum::<usize>());
        assert!(many <= 11 * few, "{few} looks, then {many}");
    }

    #[test]
    fn the_output_range_passes_the_sum_into_the_last_convolution() {
        let rules = [
            ("affine_of_affine", 2),
            ("affine_through_sum", 1),
            ("map_into_next_conv", 1),
            ("map_into_previous_conv", 1),
        ];
        check(&rules, &["conv", "affine", "add"], |b, noise, _| {
            let x = b.affine(noise, &[80.0], 0.0)?;
            let f = b.conv2d(&b.affine(&x, &[0.02], 0.0)?, &conv(1, [4, 4], 3, 1))?;
            let x0 = b.add(&b.affine(&x, &[1e-3], 0.0)?, &b.affine(&f, &[0.5], 0.0)?)?;
            b.affine(&x0, &[127.5], 128.0)
        });
    }
}
