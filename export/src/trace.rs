//! Tracing by partial evaluation. [`Trace`] interprets a network on values of three kinds: known now, known for every
//! class, or known only when the file runs. Operations on the first two are carried out at once, for the second with
//! the classes as the batch; only the third leaves a node. So the time embedding, the class embedding and everything
//! computed from them is gone from the graph, and what remains of a class is one row of a table.

use crate::graph::{Conv, Element, Graph, NodeId, Op};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use dmd_models::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use dmd_models::ops::{Mask, Patches, Rotary, TokenAt, UNSEEN};
use dmd_models::{Activation, Axis, Backend, Condition, Eager};
use std::cell::RefCell;

/// Traces a network, given as a function of a backend, the noise and what it is told: the class, where there are any.
/// `noise` is `[B, C, H, W]`; `classes` is how many there are, 0 for none.
///
/// ```
/// use dmd_models::{Activation, Backend};
///
/// let graph = dmd_export::trace([1, 3, 8, 8], 0, |b, noise, _| {
///     b.upsample_2x(&b.activation(noise, Activation::Silu)?)
/// })?;
/// let names: Vec<&str> = graph.nodes().iter().map(|node| node.name.as_str()).collect();
/// assert_eq!(names, ["noise", "silu", "upsample"]);
/// # Ok::<(), dmd_export::Error>(())
/// ```
pub fn trace<F>(noise: [usize; 4], classes: usize, network: F) -> Result<Graph>
where
    F: FnOnce(&Trace, &Value, &Condition<Value>) -> dmd_models::Result<Value>,
{
    let told = Condition::of_classes(0..classes as i64, &Device::Cpu)?;
    let told = told.try_map(|rows| Ok::<_, Error>(Value::PerRow(rows.clone())))?;
    trace_all(&[("noise", Element::F32, noise.to_vec())], classes, |b, inputs| Ok(vec![network(b, &inputs[0], &told)?]))
}

/// Traces a function of a backend and these inputs, given with their shapes `(B, ...)`, to outputs. Tables have so many
/// rows.
pub(crate) fn trace_all<F>(inputs: &[(&str, Element, Vec<usize>)], rows: usize, module: F) -> Result<Graph>
where
    F: FnOnce(&Trace, &[Value]) -> dmd_models::Result<Vec<Value>>,
{
    let graph = Graph::new(inputs, rows);
    let inputs: Vec<Value> = graph.inputs().map(Value::Node).collect();
    let trace = Trace { graph: RefCell::new(graph) };
    let given = module(&trace, &inputs)?;
    let outputs = given.iter().map(|value| trace.lift(value)).collect::<Traced<_>>()?;
    let mut graph = trace.graph.into_inner();
    graph.finish(outputs);
    Ok(graph)
}

/// The backend that writes down what it cannot compute.
#[derive(Debug)]
pub struct Trace {
    graph: RefCell<Graph>,
}

/// What flows through a traced network.
#[derive(Clone, Debug)]
pub enum Value {
    /// Known now.
    Constant(Tensor),
    /// Known up to a row, which the file is told: `(rows, ...)`, the value for every class in turn. It stands for
    /// `(B, ...)`.
    PerRow(Tensor),
    /// Known when the file runs.
    Node(NodeId),
}

type Traced<T> = dmd_models::Result<T>;

impl Trace {
    /// Carries out `now` where every argument is known, else appends the operation that `later` gives.
    fn apply(
        &self,
        name: &str,
        args: &[&Value],
        now: impl FnOnce(&[Tensor]) -> Traced<Tensor>,
        later: impl FnOnce() -> Traced<Op>,
    ) -> Traced<Value> {
        if args.iter().any(|arg| matches!(arg, Value::Node(_))) {
            let inputs = args.iter().map(|arg| self.lift(arg)).collect::<Traced<_>>()?;
            return Ok(Value::Node(self.graph.borrow_mut().push(name, later()?, inputs).map_err(refused)?));
        }
        let per_row = args.iter().any(|arg| matches!(arg, Value::PerRow(_)));
        let known: Vec<Tensor> = args.iter().map(|arg| self.known(arg, per_row)).collect::<Traced<_>>()?;
        let result = now(&known)?;
        Ok(if per_row { Value::PerRow(result) } else { Value::Constant(result) })
    }

    /// A known value as a tensor; with as many rows as there are, if there are values per row about.
    fn known(&self, value: &Value, per_row: bool) -> Traced<Tensor> {
        match value {
            Value::Constant(tensor) if per_row && tensor.rank() > 0 => {
                let mut shape = tensor.dims().to_vec();
                if shape[0] != 1 {
                    let message = format!("a constant of {} samples meets a value that depends on the class", shape[0]);
                    return Err(dmd_models::Error::Unsupported(message));
                }
                shape[0] = self.graph.borrow().classes;
                Ok(tensor.broadcast_as(shape)?.contiguous()?)
            }
            Value::Constant(tensor) | Value::PerRow(tensor) => Ok(tensor.clone()),
            Value::Node(_) => Err(dmd_models::Error::Unsupported("a value of the graph is not known now".into())),
        }
    }

    /// The node of a value; known values get one here.
    fn lift(&self, value: &Value) -> Traced<NodeId> {
        let op = match value {
            Value::Node(id) => return Ok(*id),
            Value::Constant(tensor) => Op::Constant(tensor.clone()),
            Value::PerRow(table) => Op::Lookup(table.clone()),
        };
        self.graph.borrow_mut().push("", op, vec![]).map_err(refused)
    }
}

impl Backend for Trace {
    type Value = Value;

    fn constant(&self, tensor: &Tensor) -> Traced<Value> {
        Ok(Value::Constant(here(tensor)?))
    }

    fn dims(&self, x: &Value) -> Vec<usize> {
        let graph = self.graph.borrow();
        match x {
            Value::Constant(tensor) => tensor.dims().to_vec(),
            Value::PerRow(table) => [&[graph.batch], &table.dims()[1..]].concat(),
            Value::Node(id) => graph.node(*id).shape.clone(),
        }
    }

    fn conv2d(&self, x: &Value, layer: &Conv2d) -> Traced<Value> {
        let weight = match here(&layer.weight)? {
            pointwise if pointwise.rank() == 2 => pointwise.unsqueeze(2)?.unsqueeze(3)?,
            weight => weight,
        };
        let layer = Conv2d { weight, bias: here_if_any(&layer.bias)?, ..layer.clone() };
        let later = || {
            let (weight, bias) = (layer.weight.clone(), layer.bias.clone());
            Ok(Op::Conv2d(Conv { weight, bias, stride: layer.stride, pads: [layer.padding; 4] }))
        };
        self.apply(&layer.name, &[x], |t| Eager.conv2d(&t[0], &layer), later)
    }

    fn conv_transpose2d(&self, x: &Value, layer: &ConvTranspose2d) -> Traced<Value> {
        let layer = ConvTranspose2d { weight: here(&layer.weight)?, bias: here_if_any(&layer.bias)?, ..layer.clone() };
        let later = || {
            let (weight, bias) = (layer.weight.clone(), layer.bias.clone());
            Ok(Op::ConvTranspose2d(Conv { weight, bias, stride: layer.stride, pads: layer.pads()? }))
        };
        self.apply(&layer.name, &[x], |t| Eager.conv_transpose2d(&t[0], &layer), later)
    }

    fn linear(&self, x: &Value, layer: &Linear) -> Traced<Value> {
        let (weight, bias) = (here(&layer.weight)?, here_if_any(&layer.bias)?);
        let layer = Linear { name: layer.name.clone(), weight, bias };
        let later = || Ok(Op::Linear { weight: layer.weight.clone(), bias: layer.bias.clone() });
        self.apply(&layer.name, &[x], |t| Eager.linear(&t[0], &layer), later)
    }

    fn group_norm(&self, x: &Value, layer: &GroupNorm, act: Option<Activation>) -> Traced<Value> {
        let layer = GroupNorm { weight: here(&layer.weight)?, bias: here(&layer.bias)?, ..layer.clone() };
        let later = || {
            let affine = Some([layer.weight.clone(), layer.bias.clone()]);
            Ok(Op::GroupNorm { groups: layer.groups, eps: layer.eps, affine })
        };
        let y = self.apply(&layer.name, &[x], |t| Eager.group_norm(&t[0], &layer, None), later)?;
        match act {
            Some(act) => {
                let op = Op::Activation(act);
                let name = format!("{}.{}", layer.name, op.kind());
                self.apply(&name, &[&y], |t| Eager.activation(&t[0], act), || Ok(op))
            }
            None => Ok(y),
        }
    }

    fn activation(&self, x: &Value, act: Activation) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.activation(&t[0], act), || Ok(Op::Activation(act)))
    }

    fn embedding(&self, ids: &Value, layer: &Embedding) -> Traced<Value> {
        let layer = Embedding { weight: here(&layer.weight)?, ..layer.clone() };
        let later = || Ok(Op::Embedding(layer.weight.clone()));
        self.apply(&layer.name, &[ids], |t| Eager.embedding(&t[0], &layer), later)
    }

    fn tokens(&self, states: &Value) -> Traced<Value> {
        self.apply("", &[states], |t| Eager.tokens(&t[0]), || Ok(Op::Tokens))
    }

    fn states(&self, x: &Value) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.states(&t[0]), || Ok(Op::States))
    }

    fn token_at(&self, x: &Value, ids: &Value, at: TokenAt) -> Traced<Value> {
        let later = || match at {
            TokenAt::Id(id) => Ok(Op::TokenAt(id)),
            TokenAt::Largest => Err(dmd_models::Error::Unsupported(
                "a file finds the end of a prompt by its id, and eos_token_id 2 stands for the largest one: there are \
                 tokens with larger ids than the end's; say its id in the text encoder's config.json"
                    .into(),
            )),
        };
        self.apply("", &[x, ids], |t| Eager.token_at(&t[0], &t[1], at), later)
    }

    fn sinusoid(&self, ids: &Value, frequencies: &Tensor, flip: bool) -> Traced<Value> {
        let frequencies = here(frequencies)?;
        let later = || Err(not_a_picture("sinusoid", ""));
        self.apply("", &[ids], |t| Eager.sinusoid(&t[0], &frequencies, flip), later)
    }

    fn layer_norm(&self, x: &Value, layer: &LayerNorm) -> Traced<Value> {
        let affine = match &layer.affine {
            Some([scale, shift]) => Some([here(scale)?, here(shift)?]),
            None => None,
        };
        let layer = LayerNorm { affine, ..layer.clone() };
        let width = self.dims(x).get(1).copied().unwrap_or(0);
        let later = || Ok(Op::ChannelNorm { width, centred: true, eps: layer.eps, affine: layer.affine.clone() });
        self.apply(&layer.name, &[x], |t| Eager.layer_norm(&t[0], &layer), later)
    }

    fn rms_norm(&self, x: &Value, layer: &RmsNorm) -> Traced<Value> {
        let layer = RmsNorm { weight: here(&layer.weight)?, ..layer.clone() };
        let (channels, width) = (self.dims(x).get(1).copied().unwrap_or(0), layer.weight.elem_count());
        let later = || {
            let scale = layer.weight.repeat(channels / width.max(1))?;
            let affine = Some([scale.clone(), scale.zeros_like()?]);
            Ok(Op::ChannelNorm { width, centred: false, eps: layer.eps, affine })
        };
        self.apply(&layer.name, &[x], |t| Eager.rms_norm(&t[0], &layer), later)
    }

    fn masked_attention(&self, q: &Value, k: &Value, v: &Value, heads: usize, mask: Mask<&Value>) -> Traced<Value> {
        let width = self.dims(q).get(1).copied().unwrap_or(1) / heads.max(1);
        let scale = 1.0 / (width as f64).sqrt();
        let later = || Ok(Op::Attention { heads, scale, mask: mask.map(|_| ()) });
        let Mask::Padding(seen) = mask else {
            let mask = if matches!(mask, Mask::Causal) { Mask::Causal } else { Mask::None };
            return self.apply("", &[q, k, v], |t| Eager.masked_attention(&t[0], &t[1], &t[2], heads, mask), later);
        };
        // Where all is known, the keys that are seen; in a graph, what is added to scores.
        if [q, k, v, seen].iter().all(|value| !matches!(value, Value::Node(_))) {
            let now = |t: &[Tensor]| Eager.masked_attention(&t[0], &t[1], &t[2], heads, Mask::Padding(&t[3]));
            return self.apply("", &[q, k, v, seen], now, later);
        }
        let bias = self.affine(seen, &[-UNSEEN], UNSEEN)?;
        self.apply("", &[q, k, v, &bias], |_| Err(not_a_picture("attention", "")), later)
    }

    fn gated(&self, x: &Value, act: Activation) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.gated(&t[0], act), || Ok(Op::Gated(act)))
    }

    fn rotary(&self, x: &Value, by: &Rotary) -> Traced<Value> {
        let by = Rotary { cos: here(&by.cos)?, sin: here(&by.sin)?, pairs: by.pairs };
        self.apply("", &[x], |t| Eager.rotary(&t[0], &by), || Ok(Op::Rotary(by.clone())))
    }

    fn mul(&self, x: &Value, y: &Value) -> Traced<Value> {
        self.apply("", &[x, y], |t| Eager.mul(&t[0], &t[1]), || Ok(Op::Mul))
    }

    fn mul_per_channel(&self, x: &Value, v: &Value) -> Traced<Value> {
        self.apply("", &[x, v], |t| Eager.mul_per_channel(&t[0], &t[1]), || Ok(Op::ScalePerChannel))
    }

    fn slice(&self, x: &Value, axis: Axis, start: usize, len: usize) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.slice(&t[0], axis, start, len), || Ok(Op::Slice { axis, start, len }))
    }

    fn grid(&self, x: &Value, sides: [usize; 2]) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.grid(&t[0], sides), || Ok(Op::Grid(sides)))
    }

    fn shuffle(&self, x: &Value, side: usize, patches: Patches) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.shuffle(&t[0], side, patches), || Ok(Op::Shuffle { side, patches }))
    }

    fn unshuffle(&self, x: &Value, side: usize, patches: Patches) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.unshuffle(&t[0], side, patches), || Ok(Op::Unshuffle { side, patches }))
    }

    fn add(&self, x: &Value, y: &Value) -> Traced<Value> {
        self.apply("", &[x, y], |t| Eager.add(&t[0], &t[1]), || Ok(Op::Add))
    }

    fn add_per_channel(&self, x: &Value, v: &Value) -> Traced<Value> {
        self.apply("", &[x, v], |t| Eager.add_per_channel(&t[0], &t[1]), || Ok(Op::AddPerChannel))
    }

    fn modulate(&self, x: &Value, scale: &Value, shift: &Value) -> Traced<Value> {
        let x = self.mul_per_channel(x, &self.affine(scale, &[1.0], 1.0)?)?;
        self.add_per_channel(&x, shift)
    }

    fn columns(&self, x: &Value, start: usize, len: usize) -> Traced<Value> {
        // Of a vector that was joined of two, the one that they are of: what is known of it stays known.
        if let Value::Node(id) = x {
            let node = self.graph.borrow().node(*id).clone();
            if let (Op::Concat(Axis::Channels), &[first, second]) = (&node.op, node.inputs.as_slice()) {
                let width = self.graph.borrow().node(first).shape[1];
                let part = match start {
                    _ if start + len <= width => Some((first, start)),
                    _ if start >= width => Some((second, start - width)),
                    _ => None,
                };
                if let Some((part, start)) = part {
                    let constant = match &self.graph.borrow().node(part).op {
                        Op::Constant(tensor) => Some(tensor.clone()),
                        _ => None,
                    };
                    return self.columns(&constant.map_or(Value::Node(part), Value::Constant), start, len);
                }
            }
        }
        if self.dims(x).get(1) == Some(&len) && start == 0 {
            return Ok(x.clone());
        }
        self.apply("", &[x], |t| Eager.columns(&t[0], start, len), || Ok(Op::Columns { start, len }))
    }

    fn affine(&self, x: &Value, mul: &[f64], add: f64) -> Traced<Value> {
        if mul.is_empty() || mul.iter().any(|m| *m != mul[0]) {
            let message = format!("a file holds one noise level, not one per sample (affine by {mul:?})");
            return Err(dmd_models::Error::Unsupported(message));
        }
        let mul = mul[0];
        self.apply("", &[x], |t| Eager.affine(&t[0], &[mul], add), || Ok(Op::Affine { mul, add }))
    }

    fn join(&self, x: &Value, y: &Value, axis: Axis) -> Traced<Value> {
        self.apply("", &[x, y], |t| Eager.join(&t[0], &t[1], axis), || Ok(Op::Concat(axis)))
    }

    fn upsample_2x(&self, x: &Value) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.upsample_2x(&t[0]), || Ok(Op::Upsample2x))
    }

    fn avg_pool_2x(&self, x: &Value) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.avg_pool_2x(&t[0]), || Ok(Op::AvgPool2x))
    }

    fn pad_right_bottom(&self, x: &Value) -> Traced<Value> {
        self.apply("", &[x], |t| Eager.pad_right_bottom(&t[0]), || Ok(Op::PadRightBottom))
    }
}

/// The tensor on the CPU, f32 unless it counts something, outside the autograd graph.
fn here(tensor: &Tensor) -> Traced<Tensor> {
    let tensor = tensor.detach().to_device(&Device::Cpu)?;
    Ok(if tensor.dtype().is_float() { tensor.to_dtype(DType::F32)? } else { tensor })
}

fn here_if_any(tensor: &Option<Tensor>) -> Traced<Option<Tensor>> {
    tensor.as_ref().map(here).transpose()
}

fn refused(error: Error) -> dmd_models::Error {
    dmd_models::Error::Unsupported(error.to_string())
}

/// Vectors come from time and class alone and are known; a backend has no way from a picture to a vector.
fn not_a_picture(operation: &str, layer: &str) -> dmd_models::Error {
    dmd_models::Error::Unsupported(format!(
        "{operation} {layer}: takes vectors or classes, not what depends on the noise"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmd_models::Way;

    fn linear(rows: &[[f32; 2]; 2]) -> Linear {
        Linear { name: "proj".into(), weight: Tensor::new(rows, &Device::Cpu).unwrap(), bias: None }
    }

    fn table() -> Embedding {
        let weight = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu).unwrap();
        Embedding { name: "class_embedding".into(), weight }
    }

    #[test]
    fn what_depends_on_constants_only_leaves_no_node() {
        let graph = trace([2, 2, 1, 1], 0, |b, noise, _| {
            let time = b.constant(&Tensor::new(&[[3f32, 4.0]], &Device::Cpu)?)?;
            let time = b.linear(&b.activation(&time, Activation::Relu)?, &linear(&[[1.0, 0.0], [0.0, 2.0]]))?;
            b.add_per_channel(noise, &time)
        });
        let graph = graph.unwrap();
        let kinds: Vec<_> = graph.nodes().iter().map(|node| node.op.kind()).collect();
        assert_eq!(kinds, ["input", "constant", "shift"]);
        let Op::Constant(time) = &graph.nodes()[1].op else { panic!("a constant") };
        assert_eq!(time.to_vec2::<f32>().unwrap(), [[3.0, 8.0]]);
    }

    #[test]
    fn what_depends_on_the_class_becomes_one_row_per_class() {
        let graph = trace([4, 2, 1, 1], 3, |b, noise, cond| {
            let rows = b.embedding(cond.get(Way::Label).unwrap(), &table())?;
            let time = b.constant(&Tensor::new(&[[10f32, 20.0]], &Device::Cpu)?)?;
            let rows = b.add(&rows, &time)?;
            assert_eq!(b.dims(&rows), [4, 2]);
            b.add_per_channel(noise, &b.linear(&rows, &linear(&[[1.0, 1.0], [0.0, 1.0]]))?)
        });
        let graph = graph.unwrap();
        let Op::Lookup(rows) = &graph.nodes()[1].op else { panic!("a lookup") };
        assert_eq!(rows.to_vec2::<f32>().unwrap(), [[33.0, 22.0], [37.0, 24.0], [41.0, 26.0]]);
        assert_eq!(graph.nodes().len(), 3);
    }

    #[test]
    fn one_noise_level_per_sample_is_refused() {
        let error = trace([2, 1, 1, 1], 0, |b, noise, _| b.affine(noise, &[1.0, 2.0], 0.0)).unwrap_err();
        assert!(error.to_string().contains("one noise level"), "{error}");
    }
}
