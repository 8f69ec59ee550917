//! A network's pass on a GPU: a [`Backend`] whose pictures lie with channels last, in f32 or bf16, and which writes down
//! for itself how to go back. candle's own graph would add every gradient to a fresh zero tensor and knows no layout but
//! its own; here a gradient is handed on as it is, added up within the kernel that makes the next one, and freed with the
//! maps that it needed. To candle, the whole pass is one operation (`pass`).
//!
//! What no kernel takes (rare activations, odd numbers of channels) runs by candle's operations, and goes back by candle.

use super::checkpoint::{Replay, checkpoint};
use super::node::{WeightGradients, node};
use crate::backend::{Activation, Axis, Backend, Block};
use crate::condition::Condition;
use crate::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use crate::networks::{Architecture, Want};
use crate::ops::nhwc::{self, Attention, Norm, NormInput, RUN, Steps};
use crate::ops::{Mask, Patches, Rotary, TokenAt};
use crate::{Error, Result, ops, shapes};
use candle_core::{DType, Shape, Tensor, TensorId, Var};
use std::cell::{Cell, RefCell};

/// What a network computes in on a GPU. Weights, norms' statistics, losses and optimisers are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32, whose products a GPU takes in TF32: f32's range, 10 bits of fraction, sums in f32.
    #[default]
    F32,
    /// bfloat16, f32's range with 7 bits of fraction; sums in f32.
    Bf16,
}

impl std::str::FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err(format!("precision \"{text}\", expected f32 or bf16")),
        }
    }
}

impl Precision {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        self.dtype().size_in_bytes()
    }

    fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// How a network's pass is to run.
pub(super) struct Settings<'a> {
    pub precision: Precision,
    /// Whether blocks are computed again for their gradient.
    pub checkpoint: bool,
    /// On a tape on the CPU too.
    pub anywhere: bool,
    /// Where those of weights go; none where only candle's own graph could bring them.
    pub gradients: Option<&'a WeightGradients>,
}

/// Runs `network` on a tape, x f32 `(B, C, H, W)`; results f32, in candle's graph where there is a gradient to hand on.
/// The one place that decides what a pass runs on: none where it is for candle, on the CPU, or because weights want
/// gradients that have nowhere to go.
pub(super) fn pass(
    network: &impl Architecture,
    x: &Tensor,
    t: &[f64],
    cond: &Condition<Tensor>,
    want: Want,
    settings: Settings,
) -> Result<Option<Vec<Tensor>>> {
    if !(settings.anywhere || x.device().is_cuda()) {
        return Ok(None);
    }
    let tape = Tape::new(&settings);
    let input = tape.input(&x.detach(), x.track_op())?;
    let told = cond.try_map(|told| tape.told(told))?;
    let values = network.run(&tape, &input, t, &told, want)?;
    let outputs = values.iter().map(|value| tape.output(value)).collect::<Result<Vec<Value>>>()?;
    if tape.trains.get() && tape.gradients.is_none() {
        return Ok(None);
    }
    let tensors: Vec<Tensor> = outputs.iter().map(|output| output.data.clone()).collect();
    let nodes = tape.nodes.into_inner();
    if nodes.is_empty() {
        return Ok(Some(tensors));
    }
    let shapes: Vec<Shape> = tensors.iter().map(|t| t.shape().clone()).collect();
    // candle's operations have one result: several are joined to one, and taken apart by candle.
    let flat = tensors.iter().map(|t| t.flatten_all()).collect::<candle_core::Result<Vec<Tensor>>>()?;
    let slots = outputs.into_iter().map(|output| output.slot).zip(shapes.clone()).collect();
    let inputs = std::iter::once(&input).chain(told.iter().map(|(_, told)| told)).map(Value::target).collect();
    let recorded = Recorded { nodes, inputs, outputs: slots, gradients: tape.gradients.unwrap_or_default() };
    let all: Vec<Tensor> = std::iter::once(x).chain(cond.iter().map(|(_, told)| told)).cloned().collect();
    let joined = node(Tensor::cat(&flat, 0)?, &all, move |grad| recorded.back(&grad.contiguous()?))?;
    let mut start = 0;
    let part = |shape: Shape| -> Result<Tensor> {
        let part = joined.narrow(0, start, shape.elem_count())?.reshape(&shape)?;
        start += shape.elem_count();
        Ok(part)
    };
    Ok(Some(shapes.into_iter().map(part).collect::<Result<_>>()?))
}

/// Where a gradient goes.
#[derive(Clone, Debug)]
enum Slot {
    /// To what the tape computed as its n-th.
    Node(usize),
    /// To a weight.
    Leaf(Tensor),
}

/// A value of a pass. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Value {
    /// A picture `(B, H, W, padded)`, or anything else as it is.
    data: Tensor,
    /// A picture's own channels; none for anything else.
    channels: Option<usize>,
    /// Where its gradient goes, if anywhere.
    slot: Option<Slot>,
    /// Still to be added to a picture.
    bias: Option<Bias>,
}

/// `(1 or B, C)`, f32.
#[derive(Clone, Debug)]
struct Bias {
    data: Tensor,
    slot: Option<Slot>,
}

impl Value {
    fn picture(data: Tensor, channels: usize, slot: Option<Slot>) -> Self {
        Value { data, channels: Some(channels), slot, bias: None }
    }

    fn vector(data: Tensor, slot: Option<Slot>) -> Self {
        Value { data, channels: None, slot, bias: None }
    }

    fn wants_gradient(&self) -> bool {
        self.slot.is_some() || self.bias.as_ref().is_some_and(|bias| bias.slot.is_some())
    }

    /// Whether the kernels can take it.
    fn whole_runs(&self) -> bool {
        self.channels.is_some_and(|channels| channels.is_multiple_of(RUN))
    }

    fn biased(&self) -> nhwc::Biased<'_> {
        (&self.data, self.bias.as_ref().map(|bias| &bias.data))
    }

    /// Where gradients go, without what was computed.
    fn target(&self) -> Target {
        Target {
            slot: self.slot.clone(),
            bias: self.bias.as_ref().and_then(|bias| Some((bias.slot.clone()?, bias.data.dims()[0]))),
            channels: self.channels,
        }
    }
}

/// Where the gradient of a value goes.
struct Target {
    slot: Option<Slot>,
    /// And that of its bias, with its number of rows.
    bias: Option<(Slot, usize)>,
    /// A picture's own.
    channels: Option<usize>,
}

/// Gradients on their way back.
struct Gradients {
    nodes: Vec<Option<Tensor>>,
    weights: WeightGradients,
}

impl Gradients {
    fn add(&mut self, slot: &Slot, grad: Tensor) -> Result<()> {
        let sum = |before: Option<Tensor>, grad: Tensor| -> Result<Tensor> {
            match before {
                None => Ok(grad),
                Some(before) if grad.rank() == 4 && grad.dim(3)?.is_multiple_of(RUN) && before.is_contiguous() => {
                    Ok(nhwc::add((&before, None), (&grad, None))?)
                }
                Some(before) => Ok((before + grad)?),
            }
        };
        match slot {
            Slot::Node(i) => self.nodes[*i] = Some(sum(self.nodes[*i].take(), grad)?),
            Slot::Leaf(weight) => self.weights.add(weight, grad.reshape(weight.shape())?)?,
        }
        Ok(())
    }

    /// Takes what has come for a slot so far.
    fn take(&mut self, slot: Option<&Slot>) -> Option<Tensor> {
        match slot {
            Some(Slot::Node(i)) => self.nodes[*i].take(),
            _ => None,
        }
    }

    /// Hands a gradient to its value and, summed over a picture's pixels `(B, H, W, C)`, to the bias.
    fn add_to(&mut self, target: &Target, grad: Tensor) -> Result<()> {
        if let Some((slot, rows)) = &target.bias {
            let (b, h, w, padded) = grad.dims4()?;
            let parts = if *rows == 1 { (1, b * h * w, padded) } else { (b, h * w, padded) };
            let sums = nhwc::row_sums(&grad.reshape(parts)?)?;
            self.add(slot, sums.narrow(1, 0, target.channels.unwrap_or(padded))?.contiguous()?)?;
        }
        match &target.slot {
            Some(slot) => self.add(slot, grad),
            None => Ok(()),
        }
    }
}

/// Sums `(rows, C)` to `(1, C)`.
fn sum_rows(x: &Tensor) -> Result<Tensor> {
    Ok(nhwc::row_sums(&x.unsqueeze(0)?)?)
}

type Backward = Box<dyn FnOnce(&mut Gradients, Tensor) -> Result<()> + Send>;

/// The backend, for one pass.
pub struct Tape {
    dtype: DType,
    recording: bool,
    checkpoint: bool,
    /// Where gradients of weights go.
    gradients: Option<WeightGradients>,
    /// Whether a weight was met that wants one.
    trains: Cell<bool>,
    /// For each value how its gradient becomes those of what it was made of; none for an input.
    nodes: RefCell<Vec<Option<Backward>>>,
    /// Activations of vectors: every resnet wants the same one of the time embedding.
    activated: RefCell<Vec<(TensorId, Activation, Value)>>,
}

impl Tape {
    fn new(settings: &Settings) -> Self {
        Tape {
            dtype: settings.precision.dtype(),
            recording: true,
            checkpoint: settings.checkpoint,
            gradients: settings.gradients.cloned(),
            trains: Cell::default(),
            nodes: RefCell::default(),
            activated: RefCell::default(),
        }
    }

    /// A tape of the same kind, for a part of the pass.
    fn inner(&self, recording: bool) -> Self {
        Tape {
            dtype: self.dtype,
            recording,
            checkpoint: false,
            gradients: self.gradients.clone(),
            trains: Cell::default(),
            nodes: RefCell::default(),
            activated: RefCell::default(),
        }
    }

    /// Brings in a picture `(B, C, H, W)`.
    fn input(&self, x: &Tensor, wants_gradient: bool) -> Result<Value> {
        let c = x.dim(1)?;
        let data = nhwc::to_channels_last(&x.to_dtype(DType::F32)?, c.next_multiple_of(RUN), self.dtype)?;
        Ok(Value::picture(data, c, wants_gradient.then(|| self.node(None))))
    }

    /// Brings in what the network is told.
    fn told(&self, told: &Tensor) -> Result<Value> {
        match (told.rank(), told.track_op()) {
            (4, wants_gradient) => self.input(&told.detach(), wants_gradient),
            (_, wants_gradient) => Ok(Value::vector(told.detach(), wants_gradient.then(|| self.node(None)))),
        }
    }

    /// Takes a value out, a picture as f32 `(B, C, H, W)`.
    fn output(&self, x: &Value) -> Result<Value> {
        if x.channels.is_none() {
            return Ok(x.clone());
        }
        let (target, padded, dtype) = (x.target(), x.data.dim(3)?, self.dtype);
        let back = move |grads: &mut Gradients, grad: Tensor| {
            grads.add_to(&target, nhwc::to_channels_last(&grad, padded, dtype)?)
        };
        Ok(Value::vector(self.plain(x)?, self.record(x.wants_gradient(), back)))
    }

    /// A value as candle's operations know it, without gradient.
    fn plain(&self, x: &Value) -> Result<Tensor> {
        Ok(match x.channels {
            Some(channels) => nhwc::from_channels_last(&x.data, x.bias.as_ref().map(|bias| &bias.data), channels)?,
            None => x.data.clone(),
        })
    }

    /// A weight, f32.
    fn weight(&self, weight: &Tensor) -> Result<Value> {
        Ok(Value::vector(weight.detach().to_dtype(DType::F32)?.contiguous()?, self.leaf(weight)))
    }

    /// Each weight is asked: a frozen network may have some that are trained.
    fn leaf(&self, weight: &Tensor) -> Option<Slot> {
        let trains = weight.track_op();
        self.trains.set(self.trains.get() || trains);
        (trains && self.recording && self.gradients.is_some()).then(|| Slot::Leaf(weight.clone()))
    }

    fn node(&self, back: Option<Backward>) -> Slot {
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(back);
        Slot::Node(nodes.len() - 1)
    }

    /// Notes how a value's gradient goes on, if anybody `wants` it.
    fn record(
        &self,
        wants: bool,
        back: impl FnOnce(&mut Gradients, Tensor) -> Result<()> + Send + 'static,
    ) -> Option<Slot> {
        (self.recording && wants).then(|| self.node(Some(Box::new(back))))
    }

    /// The value with its bias added.
    fn settled(&self, x: &Value) -> Result<Value> {
        let (Some(bias), Some(channels)) = (&x.bias, x.channels) else { return Ok(x.clone()) };
        if !x.whole_runs() {
            return self.composite(&[x], |t| Ok(t[0].clone()));
        }
        let (data, target) = (nhwc::settle((&x.data, Some(&bias.data)))?, x.target());
        let slot = self.record(x.wants_gradient(), move |grads, grad| grads.add_to(&target, grad));
        Ok(Value::picture(data, channels, slot))
    }

    /// An operation by candle, forward and back. `f` gets f32 values, and may be called twice.
    fn composite(
        &self,
        inputs: &[&Value],
        f: impl Fn(&[Tensor]) -> candle_core::Result<Tensor> + Send + 'static,
    ) -> Result<Value> {
        let plain = inputs.iter().map(|x| self.plain(x)).collect::<Result<Vec<Tensor>>>()?;
        let y = f(&plain)?;
        let channels = if y.rank() == 4 { Some(y.dim(1)?) } else { None };
        let (wants, dtype) = (inputs.iter().any(|x| x.wants_gradient()), self.dtype);
        let targets: Vec<Target> = inputs.iter().map(|x| x.target()).collect();
        let back = move |grads: &mut Gradients, grad: Tensor| {
            let grad = match channels {
                Some(channels) => nhwc::from_channels_last(&grad, None, channels)?,
                None => grad,
            };
            let vars = plain.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<Var>>>()?;
            let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
            let mut found = (f(&tensors)? * grad.detach())?.sum_all()?.backward()?;
            for (target, var) in targets.iter().zip(&vars) {
                let Some(grad) = found.remove(var) else { continue };
                let grad = match target.channels {
                    Some(channels) => nhwc::to_channels_last(&grad, channels.next_multiple_of(RUN), dtype)?,
                    None => grad,
                };
                grads.add_to(target, grad)?;
            }
            Ok(())
        };
        let slot = self.record(wants, back);
        Ok(match channels {
            Some(c) => Value::picture(nhwc::to_channels_last(&y, c.next_multiple_of(RUN), dtype)?, c, slot),
            None => Value::vector(y, slot),
        })
    }

    /// The convolution without its bias.
    fn convolution(&self, x: &Value, layer: &Conv2d) -> Result<Value> {
        let x = self.settled(x)?;
        let Some(in_channels) = x.channels else {
            return Err(Error::Config(format!("{}: a convolution of something that is no picture", layer.name)));
        };
        let steps = Steps { stride: layer.stride, padding: layer.padding };
        let kernel = match layer.weight.dims() {
            [o, c] => layer.weight.detach().reshape((*o, *c, 1, 1))?,
            _ => layer.weight.detach(),
        };
        let out_channels = kernel.dim(0)?;
        let padded = [out_channels.next_multiple_of(RUN), x.data.dim(3)?];
        let w = nhwc::pack(&kernel, padded, self.dtype)?;
        let y = nhwc::convolve(&x.data, &w, steps)?;
        let (leaf, target) = (self.leaf(&layer.weight), x.target());
        let wants = leaf.is_some() || target.slot.is_some();
        let back = move |grads: &mut Gradients, grad: Tensor| {
            if let Some(leaf) = &leaf {
                let dw = nhwc::convolve_backward_filter(&x.data, &grad, w.dims(), steps)?;
                grads.add(leaf, nhwc::unpack(&dw, [out_channels, in_channels])?)?;
            }
            match &target.slot {
                Some(slot) => grads.add(slot, nhwc::convolve_backward_data(&grad, &w, x.data.dims(), steps)?),
                None => Ok(()),
            }
        };
        Ok(Value::picture(y, out_channels, self.record(wants, back)))
    }

    /// v `(1 or B, C)` plus a weight `(C,)`.
    fn add_to_rows(&self, v: &Value, weight: &Tensor) -> Result<Bias> {
        let weight = self.weight(weight)?;
        let data = v.data.broadcast_add(&weight.data)?;
        let (of_v, leaf) = (v.slot.clone(), weight.slot);
        let slot = self.record(of_v.is_some() || leaf.is_some(), move |grads, grad| {
            if let Some(leaf) = &leaf {
                grads.add(leaf, sum_rows(&grad)?)?;
            }
            of_v.map_or(Ok(()), |slot| grads.add(&slot, grad))
        });
        Ok(Bias { data, slot })
    }

    /// A network's pass backwards, from the gradients of some of its values.
    fn back(nodes: Vec<Option<Backward>>, seeds: Vec<(Slot, Tensor)>, weights: WeightGradients) -> Result<Gradients> {
        let mut grads = Gradients { nodes: nodes.iter().map(|_| None).collect(), weights };
        for (slot, grad) in seeds {
            grads.add(&slot, grad)?;
        }
        for (i, back) in nodes.into_iter().enumerate().rev() {
            // Inputs keep theirs; a node without a gradient was not used.
            let Some(back) = back else { continue };
            if let Some(grad) = grads.nodes[i].take() {
                back(&mut grads, grad)?;
            }
        }
        Ok(grads)
    }
}

impl Replay for Tape {
    type Inner = Tape;

    fn kept(&self, x: &Value) -> Result<Value> {
        if x.wants_gradient() { self.settled(x) } else { Ok(x.clone()) }
    }

    fn forget(&self, inputs: &[Value], part: &impl Fn(&Tape, &[Value]) -> Result<Value>) -> Result<(Value, bool)> {
        let inner = self.inner(false);
        let still: Vec<Value> = inputs.iter().map(|x| Value { slot: None, ..x.clone() }).collect();
        let y = part(&inner, &still)?;
        let trains = inner.trains.get();
        self.trains.set(self.trains.get() || trains);
        match trains || inputs.iter().any(Value::wants_gradient) {
            true => Ok((inner.settled(&y)?, true)),
            false => Ok((y, false)),
        }
    }

    fn recall(
        &self,
        y: Value,
        inputs: Vec<Value>,
        part: impl Fn(&Tape, &[Value]) -> Result<Value> + Send + 'static,
    ) -> Result<Value> {
        let inner = self.inner(true);
        let slot = self.record(true, move |grads, grad| {
            let fresh = |x: &Value| Value { slot: x.slot.as_ref().map(|_| inner.node(None)), ..x.clone() };
            let again: Vec<Value> = inputs.iter().map(fresh).collect();
            let y = inner.settled(&part(&inner, &again)?)?;
            let seed = y.slot.map(|slot| vec![(slot, grad)]).unwrap_or_default();
            let mut within = Tape::back(inner.nodes.into_inner(), seed, grads.weights.clone())?;
            for (outer, inner) in inputs.iter().zip(&again) {
                if let (Some(slot), Some(grad)) = (&outer.slot, within.take(inner.slot.as_ref())) {
                    grads.add(slot, grad)?;
                }
            }
            Ok(())
        });
        Ok(Value { slot, ..y })
    }
}

impl Backend for Tape {
    type Value = Value;

    fn block(&self, block: &impl Block, x: &Value, beside: &[&Value]) -> Result<Value> {
        if self.checkpoint { checkpoint(self, block, x, beside) } else { block.forward(self, x, beside) }
    }

    fn constant(&self, tensor: &Tensor) -> Result<Value> {
        match tensor.rank() {
            4 => self.input(&tensor.detach(), false),
            _ => Ok(Value::vector(tensor.detach(), None)),
        }
    }

    fn dims(&self, x: &Value) -> Vec<usize> {
        match (x.channels, x.data.dims()) {
            (Some(channels), &[b, h, w, _]) => vec![b, channels, h, w],
            (_, dims) => dims.to_vec(),
        }
    }

    fn conv2d(&self, x: &Value, layer: &Conv2d) -> Result<Value> {
        let y = self.convolution(x, layer)?;
        let bias = |bias: &Tensor| -> Result<Bias> {
            let bias = self.weight(bias)?;
            Ok(Bias { data: bias.data.unsqueeze(0)?, slot: bias.slot })
        };
        Ok(Value { bias: layer.bias.as_ref().map(bias).transpose()?, ..y })
    }

    fn conv2d_add_per_channel(&self, x: &Value, layer: &Conv2d, v: &Value) -> Result<Value> {
        let bias = match &layer.bias {
            Some(bias) => self.add_to_rows(v, bias)?,
            None => Bias { data: v.data.clone(), slot: v.slot.clone() },
        };
        Ok(Value { bias: Some(bias), ..self.convolution(x, layer)? })
    }

    fn conv_transpose2d(&self, x: &Value, layer: &ConvTranspose2d) -> Result<Value> {
        let (stride, pads, weight) = (layer.stride, layer.pads()?, self.weight(&layer.weight)?);
        match &layer.bias {
            Some(bias) => self.composite(&[x, &weight, &self.weight(bias)?], move |t| {
                ops::conv_transpose2d(&t[0], &t[1], Some(&t[2]), stride, pads)
            }),
            None => self.composite(&[x, &weight], move |t| ops::conv_transpose2d(&t[0], &t[1], None, stride, pads)),
        }
    }

    fn linear(&self, x: &Value, layer: &Linear) -> Result<Value> {
        let w = self.weight(&layer.weight)?;
        let data = x.data.matmul(&w.data.t()?)?;
        let (of_x, input, wants) = (x.slot.clone(), x.data.clone(), x.slot.is_some() || w.slot.is_some());
        let slot = self.record(wants, move |grads, grad| {
            if let Some(leaf) = &w.slot {
                grads.add(leaf, grad.t()?.matmul(&input)?)?;
            }
            of_x.map_or(Ok(()), |slot| grads.add(&slot, grad.matmul(&w.data)?))
        });
        let y = Value::vector(data, slot);
        match &layer.bias {
            Some(bias) => self.add_to_rows(&y, bias).map(|Bias { data, slot }| Value::vector(data, slot)),
            None => Ok(y),
        }
    }

    fn group_norm(&self, x: &Value, layer: &GroupNorm, act: Option<Activation>) -> Result<Value> {
        let (weight, beta) = (self.weight(&layer.weight)?, self.weight(&layer.bias)?);
        let (groups, eps, silu) = (layer.groups, layer.eps, act == Some(Activation::Silu));
        let y = if x.whole_runs() && nhwc::norm_fits(&x.data, groups) {
            let norm = Norm { weight: weight.data, beta: beta.data, groups, eps, silu };
            let bias = x.bias.as_ref().map(|bias| bias.data.clone());
            let (y, stats) = nhwc::group_norm(&x.data, bias.as_ref(), &norm)?;
            let (input, target, leaves) = (x.data.clone(), x.target(), [weight.slot, beta.slot]);
            let wants = x.wants_gradient() || leaves.iter().any(Option::is_some);
            let back = move |grads: &mut Gradients, grad: Tensor| {
                let existing = grads.take(target.slot.as_ref());
                let input = NormInput { x: &input, bias: bias.as_ref(), stats: &stats };
                let (dx, totals) = nhwc::group_norm_backward(&input, &norm, &grad, existing.as_ref())?;
                for (i, leaf) in leaves.iter().enumerate() {
                    if let Some(leaf) = leaf {
                        grads.add(leaf, sum_rows(&totals.get(i)?)?)?;
                    }
                }
                if let Some((slot, rows)) = &target.bias {
                    let of_bias = totals.get(2)?;
                    grads.add(slot, if *rows == 1 { sum_rows(&of_bias)? } else { of_bias })?;
                }
                target.slot.map_or(Ok(()), |slot| grads.add(&slot, dx))
            };
            Value::picture(y, x.data.dim(3)?, self.record(wants, back))
        } else {
            self.composite(&[x, &weight, &beta], move |t| {
                ops::group_norm_composite(&t[0], &t[1], &t[2], groups, eps, silu)
            })?
        };
        match act {
            Some(act) if !silu => self.activation(&y, act),
            _ => Ok(y),
        }
    }

    fn activation(&self, x: &Value, act: Activation) -> Result<Value> {
        let mut activated = self.activated.borrow_mut();
        if let Some((_, _, y)) = activated.iter().find(|(id, of, _)| *id == x.data.id() && *of == act) {
            return Ok(y.clone());
        }
        let y = self.composite(&[x], move |t| ops::activation(&t[0], act))?;
        if x.channels.is_none() {
            activated.push((x.data.id(), act, y.clone()));
        }
        Ok(y)
    }

    fn embedding(&self, ids: &Value, layer: &Embedding) -> Result<Value> {
        let ids = ids.data.clone();
        self.composite(&[&self.weight(&layer.weight)?], move |t| ops::embedding(&t[0], &ids))
    }

    fn tokens(&self, states: &Value) -> Result<Value> {
        self.composite(&[states], |t| ops::tokens(&t[0]))
    }

    fn states(&self, x: &Value) -> Result<Value> {
        self.composite(&[x], |t| ops::states(&t[0]))
    }

    fn token_at(&self, x: &Value, ids: &Value, at: TokenAt) -> Result<Value> {
        let ids = ids.data.clone();
        self.composite(&[x], move |t| ops::token_at(&t[0], &ids, at))
    }

    fn sinusoid(&self, ids: &Value, frequencies: &Tensor, flip: bool) -> Result<Value> {
        let frequencies = frequencies.clone();
        self.composite(&[ids], move |t| ops::sinusoid(&t[0], &frequencies, flip))
    }

    fn layer_norm(&self, x: &Value, layer: &LayerNorm) -> Result<Value> {
        let eps = layer.eps;
        match &layer.affine {
            Some([scale, shift]) => self.composite(&[x, &self.weight(scale)?, &self.weight(shift)?], move |t| {
                ops::layer_norm_composite(&t[0], Some([&t[1], &t[2]]), eps)
            }),
            None => self.composite(&[x], move |t| ops::layer_norm_composite(&t[0], None, eps)),
        }
    }

    fn rms_norm(&self, x: &Value, layer: &RmsNorm) -> Result<Value> {
        let eps = layer.eps;
        self.composite(&[x, &self.weight(&layer.weight)?], move |t| ops::rms_norm_composite(&t[0], &t[1], eps))
    }

    fn gated(&self, x: &Value, act: Activation) -> Result<Value> {
        self.composite(&[x], move |t| ops::gated_composite(&t[0], act))
    }

    fn masked_attention(&self, q: &Value, k: &Value, v: &Value, heads: usize, mask: Mask<&Value>) -> Result<Value> {
        let shared_bias = |x: &Value| x.bias.as_ref().is_none_or(|bias| bias.data.dims()[0] == 1);
        let fits = [q, k, v].into_iter().all(|x| x.whole_runs() && shared_bias(x) && x.data.dims() == q.data.dims());
        if !(fits && matches!(mask, Mask::None) && nhwc::attention_fits(&q.data, heads)) {
            let mask = mask.map(|seen| seen.data.clone());
            return self
                .composite(&[q, k, v], move |t| ops::attention_composite(&t[0], &t[1], &t[2], heads, mask.as_ref()));
        }
        let values = [q, k, v];
        let attention = Attention {
            heads,
            qkv: values.map(|x| x.data.clone()),
            biases: [q, v].map(|x| x.bias.as_ref().map(|bias| bias.data.clone())),
        };
        let (o, lse) = attention.forward()?;
        let (targets, kept) = (values.map(Value::target), o.clone());
        let slot = self.record(values.iter().any(|x| x.wants_gradient()), move |grads, grad| {
            let [dq, dk, dv] = attention.backward(&kept, &lse, &grad)?;
            let [q, mut k, v] = targets;
            if let Some((slot, rows)) = k.bias.take() {
                grads.add(&slot, Tensor::zeros((rows, dk.dim(3)?), DType::F32, dk.device())?)?;
            }
            [(q, dq), (k, dk), (v, dv)].into_iter().try_for_each(|(target, grad)| grads.add_to(&target, grad))
        });
        Ok(Value::picture(o, q.data.dim(3)?, slot))
    }

    fn rotary(&self, x: &Value, by: &Rotary) -> Result<Value> {
        let by = by.clone();
        self.composite(&[x], move |t| ops::rotary_composite(&t[0], &by))
    }

    fn mul(&self, x: &Value, y: &Value) -> Result<Value> {
        self.composite(&[x, y], |t| &t[0] * &t[1])
    }

    fn mul_per_channel(&self, x: &Value, v: &Value) -> Result<Value> {
        self.composite(&[x, v], |t| ops::mul_per_channel(&t[0], &t[1]))
    }

    fn slice(&self, x: &Value, axis: Axis, start: usize, len: usize) -> Result<Value> {
        self.composite(&[x], move |t| t[0].narrow(axis.of_map(), start, len)?.contiguous())
    }

    fn grid(&self, x: &Value, sides: [usize; 2]) -> Result<Value> {
        shapes::grid(&self.dims(x), sides).map_err(Error::Unsupported)?;
        let x = self.settled(x)?;
        let (&[b, h, w, padded], Some(channels)) = (x.data.dims(), x.channels) else {
            return self.composite(&[&x], move |t| ops::grid(&t[0], sides));
        };
        let target = x.target();
        let slot =
            self.record(x.wants_gradient(), move |grads, grad| grads.add_to(&target, grad.reshape((b, h, w, padded))?));
        Ok(Value::picture(x.data.reshape((b, sides[0], sides[1], padded))?, channels, slot))
    }

    fn shuffle(&self, x: &Value, side: usize, patches: Patches) -> Result<Value> {
        self.composite(&[x], move |t| ops::shuffle(&t[0], side, patches))
    }

    fn unshuffle(&self, x: &Value, side: usize, patches: Patches) -> Result<Value> {
        self.composite(&[x], move |t| ops::unshuffle(&t[0], side, patches))
    }

    fn add(&self, x: &Value, y: &Value) -> Result<Value> {
        if !(x.whole_runs() && y.whole_runs() && x.data.dims() == y.data.dims()) {
            return self.composite(&[x, y], |t| ops::add(&t[0], &t[1]));
        }
        let (data, targets) = (nhwc::add(x.biased(), y.biased())?, [x.target(), y.target()]);
        let slot = self.record(x.wants_gradient() || y.wants_gradient(), move |grads, grad| {
            grads.add_to(&targets[0], grad.clone())?;
            grads.add_to(&targets[1], grad)
        });
        Ok(Value::picture(data, x.data.dim(3)?, slot))
    }

    fn add_per_channel(&self, x: &Value, v: &Value) -> Result<Value> {
        let x = self.settled(x)?;
        Ok(Value { bias: Some(Bias { data: v.data.clone(), slot: v.slot.clone() }), ..x })
    }

    fn modulate(&self, x: &Value, scale: &Value, shift: &Value) -> Result<Value> {
        self.composite(&[x, scale, shift], |t| ops::modulate(&t[0], &t[1], &t[2]))
    }

    fn columns(&self, x: &Value, start: usize, len: usize) -> Result<Value> {
        self.composite(&[x], move |t| t[0].narrow(1, start, len)?.contiguous())
    }

    fn affine(&self, x: &Value, mul: &[f64], add: f64) -> Result<Value> {
        let mul = mul.to_vec();
        self.composite(&[x], move |t| ops::affine(&t[0], &mul, add))
    }

    fn join(&self, x: &Value, y: &Value, axis: Axis) -> Result<Value> {
        if !(x.whole_runs() && y.whole_runs() && axis == Axis::Channels) {
            return self.composite(&[x, y], move |t| Tensor::cat(&[&t[0], &t[1]], axis.of_map()));
        }
        let (data, targets) = (nhwc::concat(x.biased(), y.biased())?, [x.target(), y.target()]);
        let (first, channels) = (x.data.dim(3)?, data.dim(3)?);
        let slot = self.record(x.wants_gradient() || y.wants_gradient(), move |grads, grad| {
            let (dx, dy) = nhwc::split(&grad, first)?;
            grads.add_to(&targets[0], dx)?;
            grads.add_to(&targets[1], dy)
        });
        Ok(Value::picture(data, channels, slot))
    }

    fn upsample_2x(&self, x: &Value) -> Result<Value> {
        if !x.whole_runs() {
            return self.composite(&[x], |t| ops::upsample_2x(&t[0]));
        }
        let (data, target) = (nhwc::upsample(x.biased())?, x.target());
        let slot =
            self.record(x.wants_gradient(), move |grads, grad| grads.add_to(&target, nhwc::upsample_backward(&grad)?));
        Ok(Value::picture(data, x.data.dim(3)?, slot))
    }

    fn avg_pool_2x(&self, x: &Value) -> Result<Value> {
        self.composite(&[x], |t| ops::avg_pool_2x(&t[0]))
    }

    fn pad_right_bottom(&self, x: &Value) -> Result<Value> {
        self.composite(&[x], |t| ops::pad_right_bottom(&t[0]))
    }
}

/// What candle's graph keeps of a pass.
struct Recorded {
    nodes: Vec<Option<Backward>>,
    /// The picture, and what the network was told.
    inputs: Vec<Target>,
    outputs: Vec<(Option<Slot>, Shape)>,
    gradients: WeightGradients,
}

impl Recorded {
    /// The gradient of every input as it came in, where candle wants it, from those of all outputs; those of weights go
    /// where they are collected.
    fn back(self, joined: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let mut start = 0;
        let mut seeds = Vec::new();
        for (slot, shape) in self.outputs {
            let grad = joined.narrow(0, start, shape.elem_count())?.reshape(&shape)?;
            start += shape.elem_count();
            seeds.extend(slot.map(|slot| (slot, grad)));
        }
        let mut found = Tape::back(self.nodes, seeds, self.gradients)?;
        let plain = |input: &Target| match (found.take(input.slot.as_ref()), input.channels) {
            // Channels first, without padding.
            (Some(grad), Some(channels)) => Ok(Some(nhwc::from_channels_last(&grad, None, channels)?)),
            (grad, _) => Ok(grad),
        };
        self.inputs.iter().map(plain).collect()
    }
}
