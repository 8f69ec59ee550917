//! The portable dialect: opset 17, the operators of ai.onnx alone, every shape static and of rank 4 at most, every
//! constant an initializer. It is what the CPU, CoreML, QNN, DirectML, CUDA and WebGPU providers of ONNX Runtime take
//! without falling back, and what tract takes.

use crate::check::Rules;
use crate::graph::{Conv, Graph, Node, NodeId, Op};
use crate::onnx::{Builder, float, int, ints, string};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_onnx::onnx::GraphProto;
use candle_onnx::onnx::tensor_proto::DataType;
use dmd_models::Activation;
use std::collections::HashMap;

/// The name in `dmd.dialect`.
pub(crate) const NAME: &str = "portable";

/// Version of ai.onnx: the first with everything used here; 18 moves arguments into inputs, which some refuse.
pub(crate) const OPSET: i64 = 17;

/// What a file in this dialect is held to.
pub(crate) const RULES: Rules = Rules { opset: OPSET, operators: OPERATORS, max_rank: 4 };

/// All operators that this dialect uses.
const OPERATORS: &[&str] = &[
    "Add",
    "AveragePool",
    "Cast",
    "Clip",
    "Concat",
    "Conv",
    "Div",
    "Erf",
    "Gather",
    "InstanceNormalization",
    "MatMul",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Split",
    "Tanh",
    "Transpose",
];

/// Spells a graph in this dialect.
pub(crate) fn lower(graph: &Graph) -> Result<GraphProto> {
    let mut lowering = Lowering { graph, file: Builder::new("generator"), values: HashMap::new() };
    for id in graph.ids() {
        if let Some(value) = lowering.node(graph.node(id))? {
            lowering.values.insert((id, Form::Whole), value);
        }
        if id.index() == 0 && graph.classes > 0 {
            lowering.class_tables()?;
        }
    }
    let output = graph.node(graph.output());
    if output.inputs.is_empty() {
        return Err(refuse(output, "the picture does not depend on the noise"));
    }
    let value = lowering.value(graph.output())?;
    let kind = if matches!(output.op, Op::ToU8) { DataType::Uint8 } else { DataType::Float };
    Ok(lowering.file.finish(&value, "image", kind, &output.shape))
}

struct Lowering<'a> {
    graph: &'a Graph,
    file: Builder,
    /// The names of what each node gives. Constants and rows of tables get theirs when something reads them.
    values: HashMap<(NodeId, Form), String>,
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
    fn node(&mut self, node: &Node) -> Result<Option<String>> {
        if node.shape.len() > 4 {
            return Err(refuse(node, format!("shape {:?}: the portable dialect stops at rank 4", node.shape)));
        }
        let (name, shape) = (node.name.as_str(), node.shape.as_slice());
        let x = match node.inputs.first() {
            Some(id) => self.value(*id)?,
            None => String::new(),
        };
        let x = x.as_str();
        Ok(Some(match &node.op {
            Op::Constant(_) | Op::Lookup(_) => return Ok(None),
            Op::Noise => self.file.input(name, DataType::Float, shape),
            Op::Conv2d(conv) => self.conv(node, conv, x)?,
            Op::GroupNorm { groups, eps, affine } => self.group_norm(node, *groups, *eps, affine.as_ref(), x)?,
            Op::Activation(act) => self.activation(node, *act, x),
            Op::Attention { heads, scale } => self.attention(node, *heads, *scale)?,
            Op::Add | Op::Concat => {
                let y = self.value(node.inputs[1])?;
                match node.op {
                    Op::Add => self.file.node(name, "Add", &[x, &y], vec![], shape),
                    _ => self.file.node(name, "Concat", &[x, &y], vec![int("axis", 1)], shape),
                }
            }
            Op::AddPerChannel => {
                let y = self.per_channel(node.inputs[1])?;
                self.file.node(name, "Add", &[x, &y], vec![], shape)
            }
            Op::ScalePerChannel => {
                let y = self.per_channel(node.inputs[1])?;
                self.file.node(name, "Mul", &[x, &y], vec![], shape)
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
        }))
    }

    /// All that depends on the label is one table with a row for each: one lookup, cut into its parts.
    fn class_tables(&mut self) -> Result<()> {
        let (graph, batch) = (self.graph, self.graph.batch);
        let label = self.file.input("label", DataType::Int64, &[batch]);
        let (mut ids, mut tables, mut outputs) = (vec![], vec![], vec![]);
        for id in graph.ids() {
            if let Op::Lookup(table) = &graph.node(id).op {
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
        let table = self.file.weight("class_table", &table, &[rows, width, 1, 1])?;
        if let [(name, shape)] = outputs.as_slice() {
            self.file.node(name, "Gather", &[&table, &label], vec![], shape);
            return Ok(());
        }
        let row = self.file.node("class_table.row", "Gather", &[&table, &label], vec![], &[batch, width, 1, 1]);
        let widths: Vec<usize> = outputs.iter().map(|(_, shape)| shape[1]).collect();
        let widths = self.file.integers(&widths);
        self.file.nodes("class_table.split", "Split", &[&row, &widths], vec![int("axis", 1)], &outputs);
        Ok(())
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
            _ => Err(refuse(node, "only constants and class tables are added to every pixel")),
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

    fn conv(&mut self, node: &Node, conv: &Conv, x: &str) -> Result<String> {
        let (name, dims) = (&node.name, conv.weight.dims());
        let weight = self.file.weight(&format!("{name}.weight"), &conv.weight, dims)?;
        let mut inputs = vec![x, &weight];
        let bias = match &conv.bias {
            Some(bias) => Some(self.file.weight(&format!("{name}.bias"), bias, bias.dims())?),
            None => None,
        };
        inputs.extend(bias.as_deref());
        let (kernel, strides) = (ints("kernel_shape", &dims[2..]), ints("strides", &[conv.stride; 2]));
        Ok(self.file.node(name, "Conv", &inputs, vec![kernel, strides, ints("pads", &conv.pads)], &node.shape))
    }

    /// No provider has GroupNormalization on the CPU, and every one has this: a group becomes a channel of instance
    /// normalisation.
    fn group_norm(
        &mut self,
        node: &Node,
        groups: usize,
        eps: f64,
        affine: Option<&[Tensor; 2]>,
        x: &str,
    ) -> Result<String> {
        let (name, shape) = (&node.name, &node.shape);
        let [b, c, h, w] = dims4(node)?;
        let epsilon = vec![float("epsilon", eps)];
        if let (Some([scale, shift]), true) = (affine, groups == c) {
            let scale = self.file.weight(&format!("{name}.weight"), scale, &[c])?;
            let shift = self.file.weight(&format!("{name}.bias"), shift, &[c])?;
            return Ok(self.file.node(name, "InstanceNormalization", &[x, &scale, &shift], epsilon, shape));
        }
        let ones = self.file.floats(&format!("ones_{groups}"), &vec![1.0; groups]);
        let zeros = self.file.floats(&format!("zeros_{groups}"), &vec![0.0; groups]);
        let grouped = [b, groups, c / groups * h * w];
        let normalized = self.reshape(&format!("{name}.groups"), x, &grouped);
        let inputs = [normalized.as_str(), &ones, &zeros];
        let part = format!("{name}.normalize");
        let normalized = self.file.node(&part, "InstanceNormalization", &inputs, epsilon, &grouped);
        let Some([scale, shift]) = affine else { return Ok(self.reshape(name, &normalized, shape)) };
        let normalized = self.reshape(&format!("{name}.channels"), &normalized, shape);
        let scale = self.file.weight(&format!("{name}.weight"), scale, &[1, c, 1, 1])?;
        let shift = self.file.weight(&format!("{name}.bias"), shift, &[1, c, 1, 1])?;
        let scaled = self.file.node(&format!("{name}.scale"), "Mul", &[&normalized, &scale], vec![], shape);
        Ok(self.file.node(name, "Add", &[&scaled, &shift], vec![], shape))
    }

    fn activation(&mut self, node: &Node, act: Activation, x: &str) -> String {
        let name = node.name.as_str();
        let mut step = |part: &str, operator: &str, inputs: &[&str]| {
            let name = if part.is_empty() { name.to_string() } else { format!("{name}.{part}") };
            self.file.node(&name, operator, inputs, vec![], &node.shape)
        };
        match act {
            Activation::Relu => step("", "Relu", &[x]),
            Activation::Silu => {
                let gate = step("sigmoid", "Sigmoid", &[x]);
                step("", "Mul", &[x, &gate])
            }
            Activation::Mish => {
                let gate = step("softplus", "Softplus", &[x]);
                let gate = step("tanh", "Tanh", &[&gate]);
                step("", "Mul", &[x, &gate])
            }
            Activation::Gelu => {
                // x/2·(1 + erf(x/√2)), step by step as the engines' fusions expect it.
                let [root, one, half] = [std::f32::consts::SQRT_2, 1.0, 0.5].map(|value| self.file.scalar(value));
                let mut step = |part: &str, operator: &str, inputs: &[&str]| {
                    self.file.node(&format!("{name}.{part}"), operator, inputs, vec![], &node.shape)
                };
                let erf = step("div", "Div", &[x, &root]);
                let erf = step("erf", "Erf", &[&erf]);
                let gate = step("add", "Add", &[&erf, &one]);
                let gated = step("gate", "Mul", &[x, &gate]);
                self.file.node(name, "Mul", &[&gated, &half], vec![], &node.shape)
            }
        }
    }

    /// One matrix product per head, heads beside the batch. Keys are the last axis of the scores, where softmax is
    /// cheap; both transpositions are of the two last axes, which engines merge into the products.
    fn attention(&mut self, node: &Node, heads: usize, scale: f64) -> Result<String> {
        let name = &node.name;
        let [b, c, h, w] = dims4(node)?;
        let [_, _, kh, kw] = dims4(self.graph.node(node.inputs[1]))?;
        let (rows, width, queries, keys) = (b * heads, c / heads, h * w, kh * kw);
        let mut split = |part: &str, input: usize, pixels: usize| -> Result<String> {
            let x = self.value(node.inputs[input])?;
            Ok(self.reshape(&format!("{name}.{part}"), &x, &[rows, width, pixels]))
        };
        let (q, k, v) = (split("query", 0, queries)?, split("key", 1, keys)?, split("value", 2, keys)?);
        let part = |part: &str| format!("{name}.{part}");
        let q = self.transpose_last(&part("query_rows"), &q, [rows, queries, width]);
        let mut scores = self.file.node(&part("scores"), "MatMul", &[&q, &k], vec![], &[rows, queries, keys]);
        if scale != 1.0 {
            let factor = self.file.scalar(scale as f32);
            scores = self.file.node(&part("scaled"), "Mul", &[&scores, &factor], vec![], &[rows, queries, keys]);
        }
        let weights = vec![int("axis", -1)];
        let weights = self.file.node(&part("weights"), "Softmax", &[&scores], weights, &[rows, queries, keys]);
        let weights = self.transpose_last(&part("weights_by_key"), &weights, [rows, keys, queries]);
        let mixed = self.file.node(&part("mix"), "MatMul", &[&v, &weights], vec![], &[rows, width, queries]);
        Ok(self.reshape(name, &mixed, &node.shape))
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

    fn reshape(&mut self, name: &str, x: &str, shape: &[usize]) -> String {
        let dims = self.file.integers(shape);
        self.file.node(name, "Reshape", &[x, &dims], vec![], shape)
    }

    fn transpose_last(&mut self, name: &str, x: &str, shape: [usize; 3]) -> String {
        self.file.node(name, "Transpose", &[x], vec![ints("perm", &[0, 2, 1])], &shape)
    }
}

/// The shape of a picture-like value.
fn dims4(node: &Node) -> Result<[usize; 4]> {
    node.shape[..].try_into().map_err(|_| refuse(node, format!("shape {:?}, expected rank 4", node.shape)))
}

fn refuse(node: &Node, message: impl Into<String>) -> Error {
    Error::Node { node: node.name.clone(), message: message.into() }
}
