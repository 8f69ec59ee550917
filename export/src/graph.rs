//! The graph between tracing and lowering: operations of the field over static shapes, parameters inside them.
//! It knows nothing of ONNX; a dialect decides how each operation is spelled.

use crate::{Error, Result};
use candle_core::Tensor;
use dmd_models::ops::{Mask, Patches, Rotary};
use dmd_models::{Activation, Axis, shapes};
use std::collections::{BTreeSet, HashSet};

/// A module as a list of nodes, each after those it reads; the inputs come first.
#[derive(Clone, Debug)]
pub struct Graph {
    nodes: Vec<Node>,
    n_inputs: usize,
    outputs: Vec<NodeId>,
    /// Which nodes read each one, once for each time.
    readers: Vec<Vec<NodeId>>,
    /// Nodes that were changed, or are read by others than before, since this was last taken.
    touched: Vec<NodeId>,
    /// Samples per run.
    pub batch: usize,
    /// Number of labels; 0 for a module that is told nothing by row.
    pub classes: usize,
    /// Noise levels that the graph can be held at, one per run.
    pub passes: usize,
}

/// A place in a [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(usize);

impl NodeId {
    /// The place as a number, counted from the start of the graph.
    pub fn index(self) -> usize {
        self.0
    }
}

/// An operation, what it reads, and the one value it gives.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique within the graph, after the layer it came from: `down_blocks.1.resnets.0.conv1`.
    pub name: String,
    /// What is done.
    pub op: Op,
    /// What it reads, in the order that [`Op`] states.
    pub inputs: Vec<NodeId>,
    /// Shape of the value.
    pub shape: Vec<usize>,
    /// The layer it came from, if one did; empty for sums, concatenations and the like.
    pub(crate) layer: String,
}

/// Operations of the field. x, y stand for the inputs; parameters are f32 tensors on the CPU.
#[derive(Clone, Debug)]
pub enum Op {
    /// What the file is given, `(B, ...)`: one of the leading nodes.
    Input(Element),
    /// A tensor that does not depend on any input.
    Constant(Tensor),
    /// A row of a table `(rows, ...)` for every sample, `(B, ...)`: row `label`, or where there are several passes,
    /// `pass · classes + label`.
    Lookup(Tensor),
    /// Rows of a table `(entries, C)` for ids `(B, N)`, as a map `(B, C, 1, N)`.
    Embedding(Tensor),
    /// The features of tokens `(B, N, C)` as a map `(B, C, 1, N)`.
    Tokens,
    /// The same back.
    States,
    /// Of the tokens of x `(B, C, 1, N)`, whose ids are y `(B, N)`, each sample's first with this id, or first of all:
    /// `(B, C)`.
    TokenAt(u32),
    /// Affine map of x `(B, C)`.
    Linear {
        /// `(O, C)`.
        weight: Tensor,
        /// `(O,)`.
        bias: Option<Tensor>,
    },
    /// Columns of x `(B, C)`.
    Columns {
        /// The first.
        start: usize,
        /// How many.
        len: usize,
    },
    /// Convolution of x.
    Conv2d(Conv),
    /// Transposed convolution of x, with a weight `(in, out, kh, kw)`: every pixel adds a multiple of the weight,
    /// `stride` apart, and `pads` are cut off the sum.
    ConvTranspose2d(Conv),
    /// Group normalisation of x `(B, C, H, W)`, then `x·scale + shift` per channel if there is an affine map.
    GroupNorm {
        /// Number of groups; divides C.
        groups: usize,
        /// Added to the variance.
        eps: f64,
        /// Scale and shift, `(C,)` each.
        affine: Option<[Tensor; 2]>,
    },
    /// Normalisation of every pixel of x `(B, C, H, W)` over each run of `width` channels, then `x·scale + shift` per
    /// channel if there is an affine map.
    ChannelNorm {
        /// Channels of a run; divides C.
        width: usize,
        /// Whether the mean is taken off (layer norm), or not (RMS norm).
        centred: bool,
        /// Added to the mean square.
        eps: f64,
        /// Scale and shift, `(C,)` each.
        affine: Option<[Tensor; 2]>,
    },
    /// Pointwise non-linearity of x.
    Activation(Activation),
    /// The first half of the channels of x times this non-linearity of the second.
    Gated(Activation),
    /// Attention over pixels of query `(B, C, H, W)`, key and value `(B, C, H', W')`, or of one x `(B, 3C, H, W)` that
    /// holds them in this order; scores times `scale`, softmax over keys. A mask of padding `(B, keys)` comes after them.
    Attention {
        /// Runs of channels that attend on their own.
        heads: usize,
        /// Factor of the scores; 1 once it has been folded into the query.
        scale: f64,
        /// Which keys a query sees.
        mask: Mask<()>,
    },
    /// Pairs of the channels of x `(B, C, H, W)` turned by an angle of each pixel.
    Rotary(Rotary),
    /// x·y, one shape.
    Mul,
    /// x + y, one shape, or one that broadcasts to the other.
    Add,
    /// x `(B, C, H, W)` plus y `(B or 1, C)` at every pixel.
    AddPerChannel,
    /// x `(B, C, H, W)` times y `(B or 1, C)` at every pixel.
    ScalePerChannel,
    /// x `(B, C, H, W)` times y `(B, 1)`: the coefficients of a pass's noise level.
    ScalePerPicture,
    /// x·mul + add.
    Affine {
        /// Factor.
        mul: f64,
        /// Summand.
        add: f64,
    },
    /// x and y joined along an axis.
    Concat(Axis),
    /// A part of x along an axis.
    Slice {
        /// The axis.
        axis: Axis,
        /// Its first place.
        start: usize,
        /// How many.
        len: usize,
    },
    /// The pixels of x in other rows, (H, W).
    Grid([usize; 2]),
    /// Every pixel of x a patch of `side`.
    Shuffle {
        /// Pixels of a patch's side.
        side: usize,
        /// Their order among the channels.
        patches: Patches,
    },
    /// Every patch of x a pixel.
    Unshuffle {
        /// Pixels of a patch's side.
        side: usize,
        /// Their order among the channels.
        patches: Patches,
    },
    /// Nearest neighbour, both sides doubled.
    Upsample2x,
    /// Mean of 2×2 blocks; a last odd row or column is dropped.
    AvgPool2x,
    /// A row of zeros below and a column on the right.
    PadRightBottom,
    /// Clips x to 0..255 and rounds down: `(B, C, H, W)` to u8 `(B, H, W, C)`.
    ToU8,
}

/// The type of an input's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Single precision.
    F32,
    /// Whole numbers of 32 bits: ids of tokens.
    I32,
}

/// The parameters of a convolution.
#[derive(Clone, Debug)]
pub struct Conv {
    /// `(out, in, kh, kw)`.
    pub weight: Tensor,
    /// `(out,)`.
    pub bias: Option<Tensor>,
    /// Step between two outputs, both directions.
    pub stride: usize,
    /// Zeros above, left, below, right.
    pub pads: [usize; 4],
}

impl Graph {
    /// A graph that holds nothing but its inputs, by name and with their shapes `(B, ...)`.
    pub(crate) fn new(inputs: &[(&str, Element, Vec<usize>)], classes: usize) -> Self {
        let input = |(name, element, shape): &(&str, Element, Vec<usize>)| {
            let (op, shape) = (Op::Input(*element), shape.clone());
            Node { name: name.to_string(), op, inputs: vec![], shape, layer: name.to_string() }
        };
        let nodes: Vec<Node> = inputs.iter().map(input).collect();
        let batch = nodes.first().and_then(|node| node.shape.first()).copied().unwrap_or(0);
        let (readers, n_inputs) = (vec![vec![]; nodes.len()], nodes.len());
        Graph { nodes, n_inputs, outputs: vec![], readers, touched: vec![], batch, classes, passes: 1 }
    }

    /// The same inputs, and nothing else.
    pub(crate) fn of_inputs(&self) -> Self {
        let nodes = self.nodes[..self.n_inputs].to_vec();
        Graph { readers: vec![vec![]; nodes.len()], nodes, outputs: vec![], touched: vec![], passes: 1, ..*self }
    }

    /// The places of the inputs.
    pub fn inputs(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.n_inputs).map(NodeId)
    }

    /// Rows of its tables; 0 where nothing depends on a label or a pass.
    pub fn rows(&self) -> usize {
        if self.passes > 1 { self.passes * self.classes.max(1) } else { self.classes }
    }

    /// The input that says which row of the tables each sample is of, where there are any: the `label`, or where there are
    /// several passes the `row`.
    pub(crate) fn index(&self) -> Option<&'static str> {
        match (self.passes > 1, self.classes > 0) {
            (true, _) => Some("row"),
            (false, true) => Some("label"),
            (false, false) => None,
        }
    }

    /// The nodes, each after those it reads.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The places of all nodes, in order.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).map(NodeId)
    }

    /// The nodes that give the outputs.
    pub fn outputs(&self) -> &[NodeId] {
        &self.outputs
    }

    /// Whether a node gives an output.
    pub fn is_output(&self, id: NodeId) -> bool {
        self.outputs.contains(&id)
    }

    /// The node at a place.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// The operation at a place, to be changed.
    pub(crate) fn op_mut(&mut self, id: NodeId) -> &mut Op {
        self.touched.push(id);
        &mut self.nodes[id.0].op
    }

    /// Lets a node read other values. What nothing reads then is gone for all that is asked of the graph, and from its
    /// nodes with the next [`sweep`](Self::sweep).
    pub(crate) fn set_inputs(&mut self, id: NodeId, inputs: Vec<NodeId>) {
        inputs.iter().for_each(|input| self.readers[input.0].push(id));
        let before = std::mem::replace(&mut self.nodes[id.0].inputs, inputs);
        self.touched.push(id);
        self.forget(id, before);
    }

    /// Takes back that a node reads these values, and all that only it needed.
    fn forget(&mut self, reader: NodeId, inputs: Vec<NodeId>) {
        let mut open: Vec<(NodeId, NodeId)> = inputs.into_iter().map(|input| (reader, input)).collect();
        while let Some((reader, id)) = open.pop() {
            let readers = &mut self.readers[id.0];
            if let Some(place) = readers.iter().position(|other| *other == reader) {
                readers.swap_remove(place);
            }
            self.touched.push(id);
            if !self.is_needed(id) {
                open.extend(std::mem::take(&mut self.nodes[id.0].inputs).into_iter().map(|input| (id, input)));
            }
        }
    }

    /// Whether anything reads a node, or asks for it.
    pub(crate) fn is_needed(&self, id: NodeId) -> bool {
        id.0 < self.n_inputs || self.is_output(id) || !self.readers[id.0].is_empty()
    }

    /// The nodes that were changed since this was last asked, and what reads them or is read by them, two steps far.
    pub(crate) fn take_touched(&mut self) -> BTreeSet<NodeId> {
        let mut all: BTreeSet<NodeId> = std::mem::take(&mut self.touched).into_iter().collect();
        let mut edge: Vec<NodeId> = all.iter().copied().collect();
        for _ in 0..2 {
            let beside = |id: &NodeId| self.readers[id.0].iter().chain(&self.nodes[id.0].inputs).copied();
            let next: Vec<NodeId> = edge.iter().flat_map(beside).collect();
            edge = next.into_iter().filter(|id| all.insert(*id)).collect();
        }
        all.retain(|id| self.is_needed(*id));
        all
    }

    /// Appends a node of this layer, which may be empty. It gets its name from [`Graph::name_nodes`].
    pub(crate) fn push(&mut self, layer: &str, op: Op, inputs: Vec<NodeId>) -> Result<NodeId> {
        let shapes: Vec<&[usize]> = inputs.iter().map(|id| self.node(*id).shape.as_slice()).collect();
        let shape = op.shape(self.batch, &shapes).map_err(|message| {
            let name = if layer.is_empty() { op.kind() } else { layer };
            Error::Node { node: name.into(), message }
        })?;
        let id = NodeId(self.nodes.len());
        inputs.iter().for_each(|input| self.readers[input.0].push(id));
        self.nodes.push(Node { name: String::new(), op, inputs, shape, layer: layer.into() });
        self.readers.push(vec![]);
        Ok(id)
    }

    /// Gives a node another operation on the same inputs, and a name of its own within the module of its layer.
    pub(crate) fn replace(&mut self, id: NodeId, part: &str, op: Op) -> Result<()> {
        let layer = match module_of(&self.node(id).layer) {
            "" => part.to_string(),
            module => format!("{module}.{part}"),
        };
        let inputs = &self.nodes[id.0].inputs;
        let shapes: Vec<&[usize]> = inputs.iter().map(|id| self.node(*id).shape.as_slice()).collect();
        let shape = op.shape(self.batch, &shapes).map_err(|message| Error::Node { node: layer.clone(), message })?;
        let node = &mut self.nodes[id.0];
        (node.op, node.shape, node.layer) = (op, shape, layer);
        self.touched.push(id);
        Ok(())
    }

    /// Declares the outputs, drops what they do not need and gives every node its name.
    pub(crate) fn finish(&mut self, outputs: Vec<NodeId>) {
        self.outputs = outputs;
        self.sweep();
        self.name_nodes();
    }

    /// How often the value of a node is read; an output counts as read once more.
    pub fn n_uses(&self, id: NodeId) -> usize {
        self.readers[id.0].len() + self.outputs.iter().filter(|output| **output == id).count()
    }

    /// The nodes that read a value.
    pub fn consumers(&self, id: NodeId) -> Vec<NodeId> {
        let mut readers = self.readers[id.0].clone();
        readers.sort_unstable();
        readers.dedup();
        readers
    }

    /// Lets everything that read `from` read `to`, which must come earlier.
    pub(crate) fn redirect(&mut self, from: NodeId, to: NodeId) {
        let readers = std::mem::take(&mut self.readers[from.0]);
        for reader in &readers {
            let inputs = &mut self.nodes[reader.0].inputs;
            inputs.iter_mut().filter(|input| **input == from).for_each(|input| *input = to);
        }
        self.touched.extend(&readers);
        self.touched.push(to);
        self.readers[to.0].extend(readers);
        self.outputs.iter_mut().filter(|output| **output == from).for_each(|output| *output = to);
        if !self.is_needed(from) {
            let inputs = std::mem::take(&mut self.nodes[from.0].inputs);
            self.forget(from, inputs);
        }
    }

    /// Removes every node that the outputs do not need. The inputs stay.
    pub(crate) fn sweep(&mut self) {
        let mut needed = vec![false; self.nodes.len()];
        needed[..self.n_inputs].fill(true);
        self.outputs.iter().for_each(|output| needed[output.0] = true);
        for i in (0..self.nodes.len()).rev() {
            if needed[i] {
                self.nodes[i].inputs.iter().for_each(|input| needed[input.0] = true);
            }
        }
        let mut place = vec![NodeId(0); self.nodes.len()];
        let mut kept = 0;
        for (i, needed) in needed.iter().enumerate() {
            place[i] = NodeId(kept);
            kept += usize::from(*needed);
        }
        let mut needed = needed.into_iter();
        self.nodes.retain(|_| needed.next().unwrap_or(true));
        for input in self.nodes.iter_mut().flat_map(|node| &mut node.inputs) {
            *input = place[input.0];
        }
        self.outputs.iter_mut().for_each(|output| *output = place[output.0]);
        self.touched.clear();
        self.readers = vec![vec![]; self.nodes.len()];
        for (id, node) in self.nodes.iter().enumerate() {
            node.inputs.iter().for_each(|input| self.readers[input.0].push(NodeId(id)));
        }
    }

    /// A node of a layer is named after it. A sum or a product is named after the layer before it, a concatenation or
    /// a resampling after the layer that it prepares: `up_blocks.0.resnets.1.concat`.
    pub(crate) fn name_nodes(&mut self) {
        let names: Vec<String> = (0..self.nodes.len()).map(|i| self.name_of(i)).collect();
        let mut taken: HashSet<String> = RESERVED.iter().map(|name| name.to_string()).collect();
        taken.extend(self.nodes[..self.n_inputs].iter().map(|node| node.name.clone()));
        for (i, name) in names.into_iter().enumerate().skip(self.n_inputs) {
            let mut unique = name.clone();
            for n in 2.. {
                if taken.insert(unique.clone()) {
                    break;
                }
                unique = format!("{name}_{n}");
            }
            self.nodes[i].name = unique;
        }
    }

    fn name_of(&self, i: usize) -> String {
        let node = &self.nodes[i];
        if !node.layer.is_empty() {
            return node.layer.clone();
        }
        let named = |i: &usize| {
            let node = &self.nodes[*i];
            *i >= self.n_inputs && !node.layer.is_empty() && !matches!(node.op, Op::Activation(_))
        };
        let (before, after) = ((0..i).rev().find(named), (i..self.nodes.len()).find(named));
        let neighbour = if node.op.prepares() { after.or(before) } else { before.or(after) };
        match neighbour.map_or("", |n| module_of(&self.nodes[n].layer)) {
            "" => node.op.kind().to_string(),
            module => format!("{module}.{}", node.op.kind()),
        }
    }
}

/// Names of files' inputs and outputs.
const RESERVED: [&str; 7] = ["noise", "label", "row", "image", "latents", "text", "vector"];

/// The module that a layer belongs to: `a.attentions.0` for `a.attentions.0.to_q` and for `a.attentions.0.to_out.0`.
fn module_of(layer: &str) -> &str {
    let parent = |name: &'_ str| name.rfind('.').map_or(0, |dot| dot);
    let end = parent(layer);
    let is_index = layer[end..].trim_start_matches('.').parse::<usize>().is_ok();
    let end = if is_index { parent(&layer[..end]) } else { end };
    &layer[..end]
}

impl Op {
    /// A word for the operation, as it stands in names.
    pub fn kind(&self) -> &'static str {
        match self {
            Op::Input(_) => "input",
            Op::Constant(_) => "constant",
            Op::Lookup(_) => "lookup",
            Op::Embedding(_) => "embedding",
            Op::Tokens => "tokens",
            Op::States => "states",
            Op::TokenAt(_) => "token",
            Op::Linear { .. } => "linear",
            Op::Columns { .. } => "columns",
            Op::Conv2d(_) => "conv",
            Op::ConvTranspose2d(_) => "conv_transpose",
            Op::GroupNorm { .. } => "norm",
            Op::ChannelNorm { .. } => "norm",
            Op::Activation(act) => activation_name(*act),
            Op::Gated(_) => "gated",
            Op::Rotary(_) => "rotary",
            Op::Mul => "product",
            Op::Slice { .. } => "slice",
            Op::Grid(_) => "grid",
            Op::Shuffle { .. } => "shuffle",
            Op::Unshuffle { .. } => "unshuffle",
            Op::Attention { .. } => "attention",
            Op::Add => "add",
            Op::AddPerChannel => "shift",
            Op::ScalePerChannel => "scale",
            Op::ScalePerPicture => "level",
            Op::Affine { .. } => "affine",
            Op::Concat(_) => "concat",
            Op::Upsample2x => "upsample",
            Op::AvgPool2x => "pool",
            Op::PadRightBottom => "pad",
            Op::ToU8 => "to_u8",
        }
    }

    /// The affine map of a norm.
    pub(crate) fn affine_of_norm(&mut self) -> Option<&mut Option<[Tensor; 2]>> {
        match self {
            Op::GroupNorm { affine, .. } | Op::ChannelNorm { affine, .. } => Some(affine),
            _ => None,
        }
    }

    /// Whether the operation belongs to the layer after it rather than to the one before.
    fn prepares(&self) -> bool {
        matches!(self, Op::Concat(_) | Op::Upsample2x | Op::AvgPool2x | Op::PadRightBottom)
    }

    /// The shape of the value, from the shapes of the inputs; or why there is none.
    fn shape(&self, batch: usize, inputs: &[&[usize]]) -> std::result::Result<Vec<usize>, String> {
        match (self, inputs) {
            (Op::Constant(tensor), []) => Ok(tensor.dims().to_vec()),
            (Op::Lookup(table), []) => Ok([&[batch], &table.dims()[1..]].concat()),
            (Op::Embedding(table), [ids @ [_, _]]) => shapes::embedding(ids, table.dims()),
            (Op::Tokens, [x]) => shapes::tokens(x),
            (Op::States, [x]) => shapes::states(x),
            (Op::TokenAt(_), [x, ids]) => shapes::token_at(x, ids),
            (Op::Linear { weight, .. }, [x]) => shapes::linear(x, weight.dims()),
            (Op::Columns { start, len }, [x]) => shapes::columns(x, *start, *len),
            (Op::Conv2d(Conv { weight, stride, pads, .. }), [x]) => shapes::conv2d(x, weight.dims(), *stride, *pads),
            (Op::ConvTranspose2d(Conv { weight, stride, pads, .. }), [x]) => {
                shapes::conv_transpose2d(x, weight.dims(), *stride, *pads)
            }
            (Op::GroupNorm { groups, .. }, [x]) => shapes::group_norm(x, *groups),
            (Op::Activation(_) | Op::Affine { .. }, [x]) => Ok(x.to_vec()),
            (Op::ChannelNorm { width, .. }, [x]) => shapes::norm(x, *width),
            (Op::Gated(_), [x]) => shapes::gated(x),
            (Op::Attention { heads, mask: Mask::Padding(()), .. }, [q, k, v, keys]) => {
                shapes::attention(q, k, v, *heads, Mask::Padding(keys))
            }
            (Op::Attention { heads, mask: Mask::None, .. }, [q, k, v]) => {
                shapes::attention(q, k, v, *heads, Mask::None)
            }
            (Op::Attention { heads, mask: Mask::Causal, .. }, [q, k, v]) => {
                shapes::attention(q, k, v, *heads, Mask::Causal)
            }
            (Op::Attention { heads, .. }, [[b, c, h, w]]) if *heads > 0 && c.is_multiple_of(3 * heads) => {
                Ok(vec![*b, c / 3, *h, *w])
            }
            (Op::Rotary(by), [x]) => shapes::rotary(x, by.cos.dims()),
            (Op::Mul, [x, y]) => shapes::mul(x, y),
            (Op::Slice { axis, start, len }, [x]) => shapes::slice(x, axis.of_map(), *start, *len),
            (Op::Grid(sides), [x]) => shapes::grid(x, *sides),
            (Op::Shuffle { side, .. }, [x]) => shapes::shuffle(x, *side),
            (Op::Unshuffle { side, .. }, [x]) => shapes::unshuffle(x, *side),
            (Op::Add, [x, y]) => shapes::add(x, y),
            (Op::AddPerChannel | Op::ScalePerChannel, [x, v]) => shapes::per_channel(x, v),
            (Op::ScalePerPicture, [x @ [b, _, _, _], [bv, 1]]) if b == bv => Ok(x.to_vec()),
            (Op::Concat(axis), [x, y]) => shapes::concat(x, y, axis.of_map()),
            (Op::Upsample2x, [x]) => shapes::upsample_2x(x),
            (Op::AvgPool2x, [x]) => shapes::avg_pool_2x(x),
            (Op::PadRightBottom, [x]) => shapes::pad_right_bottom(x),
            (Op::ToU8, [[b, c, h, w]]) => Ok(vec![*b, *h, *w, *c]),
            _ => Err(format!("{} does not take {inputs:?}", self.kind())),
        }
    }
}

fn activation_name(act: Activation) -> &'static str {
    match act {
        Activation::Silu => "silu",
        Activation::Mish => "mish",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_tanh",
        Activation::QuickGelu => "quick_gelu",
        Activation::Relu => "relu",
        Activation::Tanh => "tanh",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_noise() -> (Graph, NodeId) {
        (Graph::new(&[("noise", Element::F32, vec![1, 3, 4, 4])], 0), NodeId(0))
    }

    #[test]
    fn a_layers_module_is_what_holds_it() {
        assert_eq!(module_of("down_blocks.1.resnets.0.conv1"), "down_blocks.1.resnets.0");
        assert_eq!(module_of("down_blocks.1.attentions.0.to_out.0"), "down_blocks.1.attentions.0");
        assert_eq!(module_of("conv_in"), "");
        assert_eq!(module_of("0"), "");
    }

    #[test]
    fn a_sum_of_unequal_shapes_is_refused_by_its_name() {
        let (mut graph, noise) = of_noise();
        let up = graph.push("up", Op::Upsample2x, vec![noise]).unwrap();
        let error = graph.push("sum", Op::Add, vec![noise, up]).unwrap_err();
        assert!(error.to_string().contains("node \"sum\": cannot add [1, 3, 4, 4] and [1, 3, 8, 8]"), "{error}");
    }

    #[test]
    fn what_the_picture_does_not_need_is_swept() {
        let (mut graph, noise) = of_noise();
        graph.push("unused", Op::Upsample2x, vec![noise]).unwrap();
        let kept = graph.push("", Op::Affine { mul: 2.0, add: 0.0 }, vec![noise]).unwrap();
        graph.finish(vec![kept]);
        let names: Vec<&str> = graph.nodes().iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["noise", "affine"]);
    }
}
