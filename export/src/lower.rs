//! From a graph to ONNX: the spelling that all dialects share, static shapes of rank 4 at most, every constant an
//! initializer. Where dialects differ, the one in use is asked.

use crate::graph::{Conv, Element, Graph, Node, NodeId, Op};
use crate::onnx::{Builder, Lowered, int, ints, string};
use crate::{Dialect, Error, Result};
use candle_core::{Device, Tensor};
use candle_onnx::onnx::tensor_proto::DataType;
use dmd_models::Activation;
use dmd_models::ops::{Mask, Pairs, Patches, Rotary, causal_bias};
use std::collections::HashMap;

/// Spells a graph in a dialect, its outputs under these names. With `dynamic_batch` the graph, traced for one sample, takes
/// any number of them: the first axis of every value is then the only one that is not fixed.
pub(crate) fn lower(graph: &Graph, outputs: &[&str], dialect: Dialect, dynamic_batch: bool) -> Result<Lowered> {
    let file = Builder::new("generator", dynamic_batch);
    let mut lowering = Lowering { graph, dialect, dynamic_batch, file, values: HashMap::new() };
    for id in graph.ids() {
        let node = graph.node(id);
        match (&node.op, node.shape.as_slice()) {
            (Op::Constant(_) | Op::Lookup(_), _) => {}
            // What is computed of vectors is computed of pictures of one pixel, which accelerators take.
            (op, &[b, c]) if !matches!(op, Op::Input(_)) => {
                let value = lowering.node(&Node { shape: vec![b, c, 1, 1], ..node.clone() })?;
                lowering.values.insert((id, Form::PerChannel), value);
            }
            _ => {
                let value = lowering.node(node)?;
                lowering.values.insert((id, Form::Whole), value);
            }
        }
        if Some(id) == graph.inputs().last() {
            lowering.tables()?;
        }
    }
    for (name, id) in outputs.iter().zip(graph.outputs()) {
        let output = graph.node(*id);
        if output.inputs.is_empty() {
            return Err(refuse(output, "an output does not depend on the inputs"));
        }
        let value = lowering.value(*id)?;
        let kind = if matches!(output.op, Op::ToU8) { DataType::Uint8 } else { DataType::Float };
        lowering.file.output(&value, name, kind, &output.shape);
    }
    Ok(lowering.file.finish())
}

/// A graph on its way into a file.
pub(crate) struct Lowering<'a> {
    graph: &'a Graph,
    dialect: Dialect,
    dynamic_batch: bool,
    pub(crate) file: Builder,
    /// The names of what each node gives. Constants and rows of tables get theirs when something reads them.
    values: HashMap<(NodeId, Form), String>,
}

/// A group norm to be spelled.
pub(crate) struct Norm<'a> {
    pub name: &'a str,
    pub groups: usize,
    pub eps: f64,
    pub affine: Option<&'a [Tensor; 2]>,
    pub shape: [usize; 4],
}

/// How a value is laid out in the file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Form {
    /// As the graph says.
    Whole,
    /// Channels as `(B, C, 1, 1)`, ready to meet a picture.
    PerChannel,
}

impl Lowering<'_> {
    /// Spells one node out and names its value.
    fn node(&mut self, node: &Node) -> Result<String> {
        if node.shape.len() > 4 {
            return Err(refuse(node, format!("shape {:?}: the dialects stop at rank 4", node.shape)));
        }
        let (name, shape) = (node.name.as_str(), node.shape.as_slice());
        let x = match node.inputs.first() {
            Some(id) => self.computed(*id)?,
            None => String::new(),
        };
        let x = x.as_str();
        Ok(match &node.op {
            Op::Constant(_) | Op::Lookup(_) => return Err(refuse(node, "it is spelled where it is read")),
            Op::Input(Element::F32) => self.file.input(name, DataType::Float, shape),
            Op::Input(Element::I32) => self.file.input(name, DataType::Int32, shape),
            Op::Conv2d(conv) => self.conv(node, "Conv", conv, x)?,
            Op::ConvTranspose2d(_) if self.dialect == Dialect::Nnapi => {
                return Err(refuse(node, "NNAPI has no transposed convolution; export with --dialect portable"));
            }
            Op::ConvTranspose2d(conv) => self.conv(node, "ConvTranspose", conv, x)?,
            Op::GroupNorm { groups, eps, affine } => {
                let (groups, eps, affine) = (*groups, *eps, affine.as_ref());
                let norm = Norm { name, groups, eps, affine, shape: dims4(node)? };
                self.dialect.group_norm(self, &norm, x)?
            }
            Op::ChannelNorm { width, centred, eps, affine } => {
                self.channel_norm(node, *width, *centred, *eps, affine.as_ref(), x)?
            }
            Op::Activation(act) => self.activation(node, *act, x)?,
            Op::Gated(act) => {
                let halves = ["values", "gates"].map(|half| (format!("{name}.{half}"), node.shape.clone()));
                self.dialect.split(self, name, x, &halves);
                let gate = Node { name: format!("{name}.gate"), ..node.clone() };
                let gate = self.activation(&gate, *act, &halves[1].0)?;
                self.step(node, "", "Mul", &[&halves[0].0, &gate])
            }
            Op::Attention { heads, scale, mask } => self.attention(node, *heads, *scale, *mask)?,
            Op::Rotary(by) => self.rotary(node, by, x)?,
            Op::Add | Op::Mul | Op::Concat(_) => {
                let y = self.computed(node.inputs[1])?;
                match node.op {
                    Op::Add => self.file.node(name, "Add", &[x, &y], vec![], shape),
                    Op::Mul => self.file.node(name, "Mul", &[x, &y], vec![], shape),
                    Op::Concat(axis) => {
                        let axis = int("axis", axis.of_map() as i64);
                        self.file.node(name, "Concat", &[x, &y], vec![axis], shape)
                    }
                    _ => return Err(refuse(node, "an operation of two values is not spelled")),
                }
            }
            Op::Slice { axis, start, len } => {
                let numbers = [*start, start + len, axis.of_map()].map(|at| self.file.integers(&[at as i64]));
                self.file.node(name, "Slice", &[x, &numbers[0], &numbers[1], &numbers[2]], vec![], shape)
            }
            Op::Grid(_) => self.reshape(name, x, shape),
            Op::Shuffle { side, patches } => self.shuffle(node, *side, *patches, x)?,
            Op::Unshuffle { side, patches } => self.unshuffle(node, *side, *patches, x)?,
            Op::AddPerChannel => {
                let y = self.per_channel(node.inputs[1])?;
                self.file.node(name, "Add", &[x, &y], vec![], shape)
            }
            Op::ScalePerChannel => {
                let y = self.per_channel(node.inputs[1])?;
                self.file.node(name, "Mul", &[x, &y], vec![], shape)
            }
            Op::ScalePerPicture => {
                let y = self.per_channel(node.inputs[1])?;
                self.file.island(name, "Mul", &[x, &y], vec![], shape)
            }
            Op::Affine { mul, add } => self.affine(node, *mul as f32, *add as f32, x),
            Op::Upsample2x => self.upsample(node, x),
            Op::AvgPool2x => {
                let attributes = vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])];
                self.file.node(name, "AveragePool", &[x], attributes, shape)
            }
            Op::PadRightBottom => {
                let pads = self.file.integers(&[0, 0, 0, 0, 0, 0, 1, 1]);
                self.file.node(name, "Pad", &[x, &pads], vec![], shape)
            }
            Op::ToU8 => self.pixels(node, x),
            Op::Embedding(table) => {
                let (table, [b, c, _, n]) =
                    (self.file.weight(&format!("{name}.table"), table, table.dims())?, dims4(node)?);
                let rows = self.file.node(&format!("{name}.rows"), "Gather", &[&table, x], vec![], &[b, n, c]);
                self.tokens(node, &rows)?
            }
            Op::Tokens => self.tokens(node, x)?,
            Op::States => {
                let [b, n, c] = [node.shape[0], node.shape[1], node.shape[2]];
                let rows = self.transpose(&format!("{name}.rows"), x, [0, 2, 3, 1], [b, 1, n, c]);
                self.reshape(name, &rows, shape)
            }
            Op::TokenAt(id) => self.token_at(node, *id, x)?,
            Op::Linear { weight, bias } => {
                let weight = weight.unsqueeze(2)?.unsqueeze(3)?;
                self.conv(node, "Conv", &Conv { weight, bias: bias.clone(), stride: 1, pads: [0; 4] }, x)?
            }
            Op::Columns { start, len } => {
                let numbers = [*start, start + len, 1].map(|at| self.file.integers(&[at as i64]));
                self.file.node(name, "Slice", &[x, &numbers[0], &numbers[1], &numbers[2]], vec![], shape)
            }
        })
    }

    /// All that depends on the label or the pass is one table with a row for each: one lookup, cut into its parts. The
    /// few numbers that scale a picture are looked up by themselves, in single precision always: what they lose, the
    /// whole picture loses.
    fn tables(&mut self) -> Result<()> {
        let (graph, batch) = (self.graph, self.graph.batch);
        let Some(index) = graph.index() else { return Ok(()) };
        let table_name = if index == "row" { "pass_table" } else { "class_table" };
        let index = self.file.input(index, DataType::Int64, &[batch]);
        let (mut ids, mut tables, mut outputs) = (vec![], vec![], vec![]);
        let scales_pictures = |id: &NodeId| {
            let readers = graph.consumers(*id);
            !readers.is_empty() && readers.iter().all(|reader| matches!(graph.node(*reader).op, Op::ScalePerPicture))
        };
        for id in graph.ids() {
            let (Op::Lookup(table), name) = (&graph.node(id).op, &graph.node(id).name) else { continue };
            if scales_pictures(&id) {
                let table = self.file.weight(&format!("{name}.table"), table, &[table.dims()[0], 1, 1, 1])?;
                let value = self.file.island(name, "Gather", &[&table, &index], vec![], &[batch, 1, 1, 1]);
                self.values.insert((id, Form::PerChannel), value);
            } else {
                let flat = table.flatten_from(1)?;
                outputs.push((graph.node(id).name.clone(), vec![batch, flat.dims()[1], 1, 1]));
                tables.push(flat);
                ids.push(id);
            }
        }
        for (id, (name, _)) in ids.iter().zip(&outputs) {
            self.values.insert((*id, Form::PerChannel), name.clone());
        }
        if ids.is_empty() {
            return Ok(());
        }
        let table = Tensor::cat(&tables, 1)?;
        let (rows, width) = table.dims2()?;
        let table = self.file.weight(table_name, &table, &[rows, width, 1, 1])?;
        if let [(name, shape)] = outputs.as_slice() {
            self.file.node(name, "Gather", &[&table, &index], vec![], shape);
            return Ok(());
        }
        let row =
            self.file.node(&format!("{table_name}.row"), "Gather", &[&table, &index], vec![], &[batch, width, 1, 1]);
        self.dialect.split(self, table_name, &row, &outputs);
        Ok(())
    }

    /// Tokens `(B, N, C)` as a map.
    fn tokens(&mut self, node: &Node, rows: &str) -> Result<String> {
        let [b, c, _, n] = dims4(node)?;
        let rows = self.reshape(&format!("{}.as_map", node.name), rows, &[b, 1, n, c]);
        Ok(self.transpose(&node.name, &rows, [0, 3, 1, 2], [b, c, 1, n]))
    }

    /// One token of each sample as a product of all with ones and zeros: no index is computed. The ids are far larger than
    /// half precision can tell apart.
    fn token_at(&mut self, node: &Node, id: u32, x: &str) -> Result<String> {
        let (name, [b, c, ..]) = (&node.name, dims4(node)?);
        let n = self.graph.node(node.inputs[1]).shape[1];
        let ids = self.value(node.inputs[1])?;
        let (part, row) = (|part: &str| format!("{name}.{part}"), [b, n]);
        let [one, zero, id] = [1.0, 0.0, id as f32].map(|value| self.file.scalar(value));
        // 1 where a token has the id, else 0.
        let to_floats = vec![int("to", DataType::Float as i64)];
        let floats = self.file.island(&part("ids"), "Cast", &[&ids], to_floats, &row);
        let off = self.file.island(&part("off"), "Sub", &[&floats, &id], vec![], &row);
        let far = self.file.island(&part("far"), "Mul", &[&off, &off], vec![], &row);
        let other = self.file.island(&part("other"), "Clip", &[&far, &zero, &one], vec![], &row);
        let has = self.file.island(&part("has"), "Sub", &[&one, &other], vec![], &row);
        // Of them the first; where there is none, the first of all.
        let matrix = |cell: fn(usize, usize) -> bool| {
            let cells = (0..n * n).map(|at| if cell(at / n, at % n) { 1f32 } else { 0.0 });
            Tensor::from_iter(cells, &Device::Cpu)?.reshape((n, n))
        };
        let before = self.file.weight(&format!("before_{n}"), &matrix(|from, to| from < to)?, &[n, n])?;
        let all = self.file.weight(&format!("all_{n}"), &matrix(|_, to| to == 0)?, &[n, n])?;
        let first = Tensor::from_iter((0..n).map(|at| if at == 0 { 1f32 } else { 0.0 }), &Device::Cpu)?;
        let first = self.file.weight(&format!("first_of_{n}"), &first, &[1, n])?;
        let mut still = |name: &str, from: &str, weight: &str| {
            let seen = self.file.node(&part(&format!("{name}_seen")), "MatMul", &[&has, weight], vec![], &row);
            let left = self.file.node(&part(&format!("{name}_left")), "Sub", &[from, &seen], vec![], &row);
            self.file.node(&part(name), "Relu", &[&left], vec![], &row)
        };
        let (none_before, none) = (still("none_before", &one, &before), still("none", &first, &all));
        let found = self.file.node(&part("found"), "Mul", &[&has, &none_before], vec![], &row);
        let chosen = self.file.node(&part("chosen"), "Add", &[&found, &none], vec![], &row);
        let chosen = self.reshape(&part("column"), &chosen, &[b, 1, n, 1]);
        let x = self.reshape(&part("tokens"), x, &[b, 1, c, n]);
        let token = self.file.node(&part("token"), "MatMul", &[&x, &chosen], vec![], &[b, 1, c, 1]);
        Ok(self.reshape(name, &token, &[b, c, 1, 1]))
    }

    /// The value as it is computed with: vectors as pictures of one pixel.
    fn computed(&mut self, id: NodeId) -> Result<String> {
        let node = self.graph.node(id);
        let is_vector = node.shape.len() == 2 && !matches!(node.op, Op::Input(Element::I32));
        if is_vector { self.per_channel(id) } else { self.value(id) }
    }

    /// The value as the graph has it.
    fn value(&mut self, id: NodeId) -> Result<String> {
        self.in_form(id, Form::Whole, |lowering, node| match &node.op {
            Op::Constant(tensor) => lowering.file.weight(&node.name, tensor, tensor.dims()),
            _ => {
                let row = lowering.per_channel(id)?;
                Ok(lowering.reshape(&format!("{}.whole", node.name), &row, &node.shape))
            }
        })
    }

    /// A constant or a row of a table, `(B, C)`, as `(B, C, 1, 1)`.
    fn per_channel(&mut self, id: NodeId) -> Result<String> {
        self.in_form(id, Form::PerChannel, |lowering, node| match &node.op {
            Op::Constant(tensor) => {
                let shape = [&node.shape[..], &[1, 1]].concat();
                lowering.file.weight(&format!("{}.per_channel", node.name), tensor, &shape)
            }
            Op::Input(Element::F32) => {
                let whole = lowering.value(id)?;
                Ok(lowering.reshape(
                    &format!("{}.per_channel", node.name),
                    &whole,
                    &[&node.shape[..], &[1, 1]].concat(),
                ))
            }
            _ => Err(refuse(node, "only vectors are added to every pixel")),
        })
    }

    /// The name of a value in a form, which is made once.
    fn in_form(
        &mut self,
        id: NodeId,
        form: Form,
        make: impl FnOnce(&mut Self, &Node) -> Result<String>,
    ) -> Result<String> {
        if let Some(name) = self.values.get(&(id, form)) {
            return Ok(name.clone());
        }
        let name = make(self, self.graph.node(id))?;
        self.values.insert((id, form), name.clone());
        Ok(name)
    }

    fn conv(&mut self, node: &Node, operator: &str, conv: &Conv, x: &str) -> Result<String> {
        let (name, dims) = (&node.name, conv.weight.dims());
        let weight = self.file.weight(&format!("{name}.weight"), &conv.weight, dims)?;
        let mut inputs = vec![x, &weight];
        let bias = match &conv.bias {
            Some(bias) => Some(self.file.weight(&format!("{name}.bias"), bias, bias.dims())?),
            None => None,
        };
        inputs.extend(bias.as_deref());
        let (kernel, strides) = (ints("kernel_shape", &dims[2..]), ints("strides", &[conv.stride; 2]));
        Ok(self.file.node(name, operator, &inputs, vec![kernel, strides, ints("pads", &conv.pads)], &node.shape))
    }

    /// What is left of a group norm once the groups `(B, G, n)` are normalised: the channels and their affine map. That
    /// is a pointwise convolution of each channel on its own, which every accelerator takes: one node where Mul and Add
    /// are two, and one pass over the picture less.
    pub(crate) fn ungrouped(&mut self, norm: &Norm, normalized: &str) -> Result<String> {
        let (name, shape) = (norm.name, norm.shape);
        let Some(affine) = norm.affine else { return Ok(self.reshape(name, normalized, &shape)) };
        let normalized = self.reshape(&format!("{name}.channels"), normalized, &shape);
        self.map_of_channels(name, affine, &shape, &normalized)
    }

    /// The affine map of each channel, as a convolution.
    fn map_of_channels(
        &mut self,
        name: &str,
        [scale, shift]: &[Tensor; 2],
        shape: &[usize],
        normalized: &str,
    ) -> Result<String> {
        let channels = shape[1];
        let scale = self.file.weight(&format!("{name}.weight"), scale, &[channels, 1, 1, 1])?;
        let shift = self.file.weight(&format!("{name}.bias"), shift, &[channels])?;
        let attributes = vec![
            int("group", channels as i64),
            ints("kernel_shape", &[1, 1]),
            ints("strides", &[1, 1]),
            ints("pads", &[0; 4]),
        ];
        Ok(self.file.node(name, "Conv", &[normalized, &scale, &shift], attributes, shape))
    }

    /// Means over the channels of each pixel, as differences and quotients: no engine's own normalisation is over channels
    /// that come first.
    fn channel_norm(
        &mut self,
        node: &Node,
        width: usize,
        centred: bool,
        eps: f64,
        affine: Option<&[Tensor; 2]>,
        x: &str,
    ) -> Result<String> {
        let (name, [b, c, h, w]) = (&node.name, dims4(node)?);
        let part = |part: &str| format!("{name}.{part}");
        // The axis of a run's channels, and the shapes of what is normalised and of its means.
        let (axis, runs, means) = match width == c {
            true => (1, [b, c, h, w], [b, 1, h, w]),
            false => (2, [b, c / width, width, h * w], [b, c / width, 1, h * w]),
        };
        let mut centered = if width == c { x.to_string() } else { self.reshape(&part("runs"), x, &runs) };
        if centred {
            let center = self.mean_of_run(&part("mean"), &centered, axis, &runs, &means)?;
            centered = self.file.island(&part("centered"), "Sub", &[&centered, &center], vec![], &runs);
        }
        let squares = self.file.island(&part("squares"), "Mul", &[&centered, &centered], vec![], &runs);
        let variance = self.mean_of_run(&part("variance"), &squares, axis, &runs, &means)?;
        let eps = self.file.scalar(eps as f32);
        let guarded = self.file.island(&part("guarded"), "Add", &[&variance, &eps], vec![], &means);
        let deviation = self.file.island(&part("deviation"), "Sqrt", &[&guarded], vec![], &means);
        let (is_last, whole) = (affine.is_none() && width == c, part("normalize"));
        let normal = if is_last { name } else { &whole };
        let normal = self.file.island(normal, "Div", &[&centered, &deviation], vec![], &runs);
        let Some(affine) = affine else {
            return Ok(if is_last { normal } else { self.reshape(name, &normal, &node.shape) });
        };
        let normal = if width == c { normal } else { self.reshape(&part("channels"), &normal, &node.shape) };
        self.map_of_channels(name, affine, &node.shape, &normal)
    }

    /// The mean of each pixel's channels, in later opsets a convolution where they are one run: candle-onnx, which every file
    /// is held to, knows a mean's axes as an attribute alone.
    fn mean_of_run(
        &mut self,
        name: &str,
        x: &str,
        axis: usize,
        runs: &[usize; 4],
        means: &[usize; 4],
    ) -> Result<String> {
        if self.dialect.opset() < 18 || axis != 1 {
            return Ok(self.mean(name, x, axis, means));
        }
        let weight = Tensor::full(1.0 / runs[1] as f32, (1, runs[1], 1, 1), &Device::Cpu)?;
        let weight = self.file.weight(&format!("mean_of_{}", runs[1]), &weight, weight.dims())?;
        let attributes = vec![ints("kernel_shape", &[1, 1]), ints("strides", &[1, 1]), ints("pads", &[0; 4])];
        Ok(self.file.island(name, "Conv", &[x, &weight], attributes, means))
    }

    /// The mean along an axis, which opset 18 made an input.
    pub(crate) fn mean(&mut self, name: &str, x: &str, axis: usize, shape: &[usize]) -> String {
        let keep = int("keepdims", 1);
        if self.dialect.opset() < 18 {
            return self.file.island(name, "ReduceMean", &[x], vec![ints("axes", &[axis]), keep], shape);
        }
        let axes = self.file.integers(&[axis as i64]);
        self.file.island(name, "ReduceMean", &[x, &axes], vec![keep], shape)
    }

    fn activation(&mut self, node: &Node, act: Activation, x: &str) -> Result<String> {
        Ok(match act {
            Activation::Relu => self.step(node, "", "Relu", &[x]),
            Activation::Tanh => self.step(node, "", "Tanh", &[x]),
            Activation::Silu => {
                let gate = self.step(node, "sigmoid", "Sigmoid", &[x]);
                self.step(node, "", "Mul", &[x, &gate])
            }
            Activation::Mish => self.dialect.mish(self, node, x),
            Activation::Gelu => self.dialect.gelu(self, node, x)?,
            // x·½(1 + tanh u) is x·sigmoid(2u), which every engine has.
            Activation::GeluTanh => {
                let root = 2.0 * (2.0 / std::f32::consts::PI).sqrt();
                let [linear, cubic] = [root, root * 0.044_715].map(|value| self.file.scalar(value));
                let square = self.step(node, "square", "Mul", &[x, x]);
                let slope = self.step(node, "cubic", "Mul", &[&square, &cubic]);
                let slope = self.step(node, "slope", "Add", &[&slope, &linear]);
                let gate = self.step(node, "inner", "Mul", &[x, &slope]);
                let gate = self.step(node, "sigmoid", "Sigmoid", &[&gate]);
                self.step(node, "", "Mul", &[x, &gate])
            }
            Activation::QuickGelu => {
                let factor = self.file.scalar(1.702);
                let gate = self.step(node, "inner", "Mul", &[x, &factor]);
                let gate = self.step(node, "sigmoid", "Sigmoid", &[&gate]);
                self.step(node, "", "Mul", &[x, &gate])
            }
        })
    }

    /// One operator on the way to a node's value, which has its shape; the last one has no `part` and its name.
    pub(crate) fn step(&mut self, node: &Node, part: &str, operator: &str, inputs: &[&str]) -> String {
        let name = if part.is_empty() { node.name.clone() } else { format!("{}.{part}", node.name) };
        self.file.node(&name, operator, inputs, vec![], &node.shape)
    }

    /// One matrix product per head. Keys are the last axis of the scores, where softmax is cheap; both transpositions are
    /// of the two last axes, which engines merge into the products.
    fn attention(&mut self, node: &Node, heads: usize, scale: f64, mask: Mask<()>) -> Result<String> {
        let name = &node.name;
        let [b, c, h, w] = dims4(node)?;
        let [.., kh, kw] = dims4(self.graph.node(*node.inputs.get(1).unwrap_or(&node.inputs[0])))?;
        let (width, queries, keys) = (c / heads, h * w, kh * kw);
        let part = |part: &str| format!("{name}.{part}");
        let parts = [("query", queries), ("key", keys), ("value", keys)];
        let parts = parts.map(|(name, pixels)| (part(name), vec![b, heads, width, pixels]));
        if let [all] = node.inputs[..] {
            let all = self.value(all)?;
            let all = self.reshape(&part("heads"), &all, &[b, 3 * heads, width, queries]);
            self.dialect.split(self, name, &all, &parts);
        } else {
            for ((name, shape), input) in parts.iter().zip(&node.inputs) {
                let x = self.value(*input)?;
                self.reshape(name, &x, shape);
            }
        }
        let [(q, _), (k, _), (v, _)] = parts;
        let q = self.transpose_last(&part("query_rows"), &q, [b, heads, queries, width]);
        let by_query = [b, heads, queries, keys];
        let mut scores = self.file.node(&part("scores"), "MatMul", &[&q, &k], vec![], &by_query);
        if scale != 1.0 {
            let factor = self.file.scalar(scale as f32);
            scores = self.file.node(&part("scaled"), "Mul", &[&scores, &factor], vec![], &by_query);
        }
        let bias = match mask {
            Mask::None => None,
            Mask::Causal => {
                let name = format!("causal_{keys}");
                Some(self.file.weight(&name, &causal_bias(keys)?, &[1, 1, queries, keys])?)
            }
            Mask::Padding(()) => {
                let (id, name) = (node.inputs[3], part("padding"));
                Some(match &self.graph.node(id).op {
                    Op::Constant(bias) => self.file.weight(&name, bias, &[bias.dims()[0], 1, 1, keys])?,
                    _ => {
                        let bias = self.value(id)?;
                        self.reshape(&name, &bias, &[b, 1, 1, keys])
                    }
                })
            }
        };
        if let Some(bias) = bias {
            scores = self.file.node(&part("masked"), "Add", &[&scores, &bias], vec![], &by_query);
        }
        let weights = self.file.node(&part("weights"), "Softmax", &[&scores], vec![int("axis", -1)], &by_query);
        let weights = self.transpose_last(&part("weights_by_key"), &weights, [b, heads, keys, queries]);
        let mixed = self.file.node(&part("mix"), "MatMul", &[&v, &weights], vec![], &[b, heads, width, queries]);
        Ok(self.reshape(name, &mixed, &node.shape))
    }

    /// The two parts of all pairs, cut apart and joined again. Pairs are the third axis: of a head's halves, or of each two
    /// neighbours.
    fn rotary(&mut self, node: &Node, by: &Rotary, x: &str) -> Result<String> {
        let (name, [b, c, _, _]) = (&node.name, dims4(node)?);
        let (pairs, pixels) = by.cos.dims2()?;
        let part = |part: &str| format!("{name}.{part}");
        let (lead, rest) = match by.pairs {
            Pairs::Halves => (c / (2 * pairs), pairs * pixels),
            Pairs::Neighbours => (c / 2, pixels),
        };
        let (whole, half) = ([b, lead, 2, rest], [b, lead, 1, rest]);
        let mut angles = |kind: &str, values: &Tensor| -> Result<String> {
            let dims = match by.pairs {
                Pairs::Halves => [1, 1, 1, rest],
                Pairs::Neighbours => [1, lead, 1, rest],
            };
            let heads = lead * rest / (pairs * pixels);
            let values = match by.pairs {
                Pairs::Halves => values.clone(),
                Pairs::Neighbours => values.unsqueeze(0)?.broadcast_as((heads, pairs, pixels))?.contiguous()?,
            };
            self.file.weight(&part(kind), &values, &dims)
        };
        let (cos, sin) = (angles("cos", &by.cos)?, angles("sin", &by.sin)?);
        let x = self.reshape(&part("pairs"), x, &whole);
        let ends = ["first", "second"].map(|end| (part(end), half.to_vec()));
        let lengths = self.file.integers(&[1, 1]);
        self.file.nodes(&part("split"), "Split", &[&x, &lengths], vec![int("axis", 2)], &ends);
        let mut times = |of: &str, by: &str, kind: &str| self.file.node(&part(kind), "Mul", &[of, by], vec![], &half);
        let [a, b] = ends.each_ref().map(|(name, _)| name.as_str());
        let (a_cos, b_sin) = (times(a, &cos, "first_cos"), times(b, &sin, "second_sin"));
        let (b_cos, a_sin) = (times(b, &cos, "second_cos"), times(a, &sin, "first_sin"));
        let turned = self.file.node(&part("turned_first"), "Sub", &[&a_cos, &b_sin], vec![], &half);
        let other = self.file.node(&part("turned_second"), "Add", &[&b_cos, &a_sin], vec![], &half);
        let joined = self.file.node(&part("joined"), "Concat", &[&turned, &other], vec![int("axis", 2)], &whole);
        Ok(self.reshape(name, &joined, &node.shape))
    }

    /// Reshapes and transpositions of rank 4, which every engine has: a patch's column goes behind the columns of the
    /// picture, then its row behind the rows.
    fn shuffle(&mut self, node: &Node, side: usize, patches: Patches, x: &str) -> Result<String> {
        let [b, c, high, wide] = dims4(node)?;
        let (h, w) = (high / side, wide / side);
        let part = |part: &str| format!("{}.{part}", node.name);
        let mut x = x.to_string();
        if patches == Patches::ChannelFirst {
            x = self.reshape(&part("channels"), &x, &[b, c, side * side, h * w]);
            x = self.transpose(&part("patches"), &x, [0, 2, 1, 3], [b, side * side, c, h * w]);
        }
        x = self.reshape(&part("columns"), &x, &[b, side, side, c * h * w]);
        x = self.transpose(&part("by_column"), &x, [0, 1, 3, 2], [b, side, c * h * w, side]);
        x = self.reshape(&part("rows"), &x, &[b, side, c * h, wide]);
        x = self.transpose(&part("by_row"), &x, [0, 2, 1, 3], [b, c * h, side, wide]);
        Ok(self.reshape(&node.name, &x, &node.shape))
    }

    /// The same back.
    fn unshuffle(&mut self, node: &Node, side: usize, patches: Patches, x: &str) -> Result<String> {
        let [b, channels, h, w] = dims4(node)?;
        let c = channels / (side * side);
        let part = |part: &str| format!("{}.{part}", node.name);
        let mut x = self.reshape(&part("rows"), x, &[b, c * h, side, w * side]);
        x = self.transpose(&part("by_row"), &x, [0, 2, 1, 3], [b, side, c * h, w * side]);
        x = self.reshape(&part("columns"), &x, &[b, side, c * h * w, side]);
        x = self.transpose(&part("by_column"), &x, [0, 1, 3, 2], [b, side, side, c * h * w]);
        if patches == Patches::ChannelFirst {
            x = self.reshape(&part("patches"), &x, &[b, side * side, c, h * w]);
            x = self.transpose(&part("channels"), &x, [0, 2, 1, 3], [b, c, side * side, h * w]);
        }
        Ok(self.reshape(&node.name, &x, &node.shape))
    }

    fn affine(&mut self, node: &Node, mul: f32, add: f32, x: &str) -> String {
        let (name, shape) = (node.name.as_str(), node.shape.as_slice());
        if mul == 1.0 {
            let add = self.file.scalar(add);
            return self.file.node(name, "Add", &[x, &add], vec![], shape);
        }
        let factor = self.file.scalar(mul);
        if add == 0.0 {
            return self.file.node(name, "Mul", &[x, &factor], vec![], shape);
        }
        let scaled = self.file.node(&format!("{name}.scale"), "Mul", &[x, &factor], vec![], shape);
        let add = self.file.scalar(add);
        self.file.node(name, "Add", &[&scaled, &add], vec![], shape)
    }

    fn upsample(&mut self, node: &Node, x: &str) -> String {
        // An omitted roi counts as a dynamic shape with ONNX Runtime's mobile checks; an empty one does not.
        let (roi, scales) = (self.file.floats("no_roi", &[]), self.file.floats("twice", &[1.0, 1.0, 2.0, 2.0]));
        let attributes = vec![
            string("coordinate_transformation_mode", "asymmetric"),
            string("mode", "nearest"),
            string("nearest_mode", "floor"),
        ];
        self.file.node(&node.name, "Resize", &[x, &roi, &scales], attributes, &node.shape)
    }

    fn pixels(&mut self, node: &Node, x: &str) -> String {
        let name = &node.name;
        let [b, h, w, c] = [node.shape[0], node.shape[1], node.shape[2], node.shape[3]];
        let (low, high) = (self.file.scalar(0.0), self.file.scalar(255.0));
        let clipped = self.file.node(&format!("{name}.clip"), "Clip", &[x, &low, &high], vec![], &[b, c, h, w]);
        let pixels = vec![ints("perm", &[0, 2, 3, 1])];
        let pixels = self.file.node(&format!("{name}.pixels"), "Transpose", &[&clipped], pixels, &node.shape);
        self.file.node(name, "Cast", &[&pixels], vec![int("to", DataType::Uint8 as i64)], &node.shape)
    }

    pub(crate) fn reshape(&mut self, name: &str, x: &str, shape: &[usize]) -> String {
        let mut dims: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        if self.dynamic_batch {
            // Whatever is left over.
            dims[0] = -1;
        }
        let dims = self.file.integers(&dims);
        self.file.node(name, "Reshape", &[x, &dims], vec![], shape)
    }

    /// Cuts x along its second axis.
    pub(crate) fn split(&mut self, name: &str, x: &str, parts: &[(String, Vec<usize>)]) {
        let lengths: Vec<i64> = parts.iter().map(|(_, shape)| shape[1] as i64).collect();
        let lengths = self.file.integers(&lengths);
        self.file.nodes(&format!("{name}.split"), "Split", &[x, &lengths], vec![int("axis", 1)], parts);
    }

    fn transpose_last(&mut self, name: &str, x: &str, shape: [usize; 4]) -> String {
        self.transpose(name, x, [0, 1, 3, 2], shape)
    }

    fn transpose(&mut self, name: &str, x: &str, perm: [usize; 4], shape: [usize; 4]) -> String {
        self.file.node(name, "Transpose", &[x], vec![ints("perm", &perm)], &shape)
    }
}

/// The shape of a picture-like value.
fn dims4(node: &Node) -> Result<[usize; 4]> {
    node.shape[..].try_into().map_err(|_| refuse(node, format!("shape {:?}, expected rank 4", node.shape)))
}

pub(crate) fn refuse(node: &Node, message: impl Into<String>) -> Error {
    Error::Node { node: node.name.clone(), message: message.into() }
}
