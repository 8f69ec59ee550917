//! Several passes in one graph. Each pass is traced by itself, held at its own noise level; the graphs then differ in
//! numbers alone, and each number that differs becomes a table with a row per pass and label. Weights are there once,
//! shapes stay static, and one whole number tells the graph which row it is to be: `pass · labels + label`.

use crate::graph::{Conv, Graph, Node, NodeId, Op};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// One graph of the graphs of all passes, in order. Fails where they differ in more than the noise level accounts for.
pub(crate) fn merge(passes: &[Graph]) -> Result<Graph> {
    let first = &passes[0];
    let mut merged = first.of_inputs();
    merged.passes = passes.len();
    let mut places: Vec<NodeId> = merged.inputs().collect();
    for id in first.ids().skip(places.len()) {
        let alike: Option<Vec<&Node>> = passes.iter().map(|pass| pass.nodes().get(id.index())).collect();
        let nodes = alike.ok_or_else(|| unequal(&first.node(id).name, "is not in all of them"))?;
        if let Some(other) = nodes.iter().find(|node| node.inputs != nodes[0].inputs) {
            return Err(unequal(&other.name, "reads other values"));
        }
        let inputs = nodes[0].inputs.iter().map(|input| places[input.index()]).collect();
        places.push(merged.push_merged(&nodes, inputs)?);
    }
    merged.finish(first.outputs().iter().map(|output| places[output.index()]).collect());
    Ok(merged)
}

impl Graph {
    /// Appends what stands at the same place in every pass.
    fn push_merged(&mut self, nodes: &[&Node], mut inputs: Vec<NodeId>) -> Result<NodeId> {
        let first = nodes[0];
        let mut equal = true;
        for node in &nodes[1..] {
            equal &= same(&first.op, &node.op)?;
        }
        let op = match &first.op {
            op if equal && !matches!(op, Op::Lookup(_)) => op.clone(),
            Op::Constant(_) | Op::Lookup(_) => Op::Lookup(self.rows_of(nodes)?),
            Op::Affine { .. } => {
                inputs.push(self.push("", Op::Lookup(self.factors(nodes)?), vec![])?);
                Op::ScalePerPicture
            }
            _ => return Err(unequal(&first.name, "has other parameters")),
        };
        self.push(&first.layer, op, inputs)
    }

    /// Constants `(1, …)` or tables `(labels, …)` of all passes, as one table `(passes · labels, …)`.
    fn rows_of(&self, nodes: &[&Node]) -> Result<Tensor> {
        let labels = self.classes.max(1);
        let rows = |node: &&Node| match &node.op {
            Op::Lookup(table) => Ok(table.clone()),
            Op::Constant(row) if row.dims().first() == Some(&1) => {
                Ok(row.broadcast_as([&[labels], &row.dims()[1..]].concat())?.contiguous()?)
            }
            _ => Err(unequal(&node.name, "is a constant of more than one picture")),
        };
        Ok(Tensor::cat(&nodes.iter().map(rows).collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// The factors of all passes, `(passes · labels, 1)`.
    fn factors(&self, nodes: &[&Node]) -> Result<Tensor> {
        let labels = self.classes.max(1);
        let factor = |node: &&Node| match node.op {
            Op::Affine { mul, add: 0.0 } => Ok(vec![mul as f32; labels]),
            _ => Err(unequal(&node.name, "adds another number")),
        };
        let factors = nodes.iter().map(factor).collect::<Result<Vec<_>>>()?.concat();
        let rows = factors.len();
        Ok(Tensor::from_vec(factors, (rows, 1), &Device::Cpu)?)
    }
}

/// Whether two operations are one, parameters included. An error where they are not even of one kind.
fn same(a: &Op, b: &Op) -> Result<bool> {
    Ok(match (a, b) {
        (Op::Constant(a), Op::Constant(b)) | (Op::Lookup(a), Op::Lookup(b)) => equal(a, b)?,
        (Op::Conv2d(a), Op::Conv2d(b)) | (Op::ConvTranspose2d(a), Op::ConvTranspose2d(b)) => {
            let Conv { weight, bias, stride, pads } = a;
            *stride == b.stride && *pads == b.pads && equal(weight, &b.weight)? && all_equal(bias, &b.bias)?
        }
        (
            Op::GroupNorm { groups, eps, affine },
            Op::GroupNorm { groups: other_groups, eps: other_eps, affine: other_affine },
        ) => {
            (groups, eps) == (other_groups, other_eps)
                && all_equal(affine.iter().flatten(), other_affine.iter().flatten())?
        }
        (Op::Affine { mul, add }, Op::Affine { mul: other_mul, add: other_add }) => {
            (mul, add) == (other_mul, other_add)
        }
        (
            Op::ChannelNorm { width, centred, eps, affine },
            Op::ChannelNorm { width: other_width, centred: other_centred, eps: other_eps, affine: other_affine },
        ) => {
            (width, centred, eps) == (other_width, other_centred, other_eps)
                && all_equal(affine.iter().flatten(), other_affine.iter().flatten())?
        }
        (Op::Attention { heads, scale, mask }, Op::Attention { heads: heads_2, scale: scale_2, mask: mask_2 }) => {
            (heads, scale, mask) == (heads_2, scale_2, mask_2)
        }
        (Op::Embedding(a), Op::Embedding(b)) => equal(a, b)?,
        (Op::Linear { weight, bias }, Op::Linear { weight: other, bias: other_bias }) => {
            equal(weight, other)? && all_equal(bias, other_bias)?
        }
        (Op::TokenAt(id), Op::TokenAt(other)) => id == other,
        (Op::Columns { start, len }, Op::Columns { start: start_2, len: len_2 }) => (start, len) == (start_2, len_2),
        (Op::Rotary(by), Op::Rotary(other)) => {
            by.pairs == other.pairs && all_equal([&by.cos, &by.sin], [&other.cos, &other.sin])?
        }
        (Op::Gated(act), Op::Gated(other)) => act == other,
        (Op::Concat(axis), Op::Concat(other)) => axis == other,
        (Op::Slice { axis, start, len }, Op::Slice { axis: axis_2, start: start_2, len: len_2 }) => {
            (axis, start, len) == (axis_2, start_2, len_2)
        }
        (Op::Grid(sides), Op::Grid(other)) => sides == other,
        (Op::Shuffle { side, patches }, Op::Shuffle { side: side_2, patches: patches_2 })
        | (Op::Unshuffle { side, patches }, Op::Unshuffle { side: side_2, patches: patches_2 }) => {
            (side, patches) == (side_2, patches_2)
        }
        _ if a.kind() == b.kind() => true,
        _ => return Err(unequal(a.kind(), &format!("is {} in another pass", b.kind()))),
    })
}

fn all_equal<'a>(a: impl IntoIterator<Item = &'a Tensor>, b: impl IntoIterator<Item = &'a Tensor>) -> Result<bool> {
    let (a, b): (Vec<_>, Vec<_>) = (a.into_iter().collect(), b.into_iter().collect());
    let pairs = a.iter().zip(&b).map(|(a, b)| equal(a, b)).collect::<Result<Vec<_>>>()?;
    Ok(a.len() == b.len() && pairs.into_iter().all(|equal| equal))
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    Ok(a.dims() == b.dims() && values(a)? == values(b)?)
}

fn unequal(node: &str, how: &str) -> Error {
    Error::Setting(format!("the passes are not one network at several noise levels: \"{node}\" {how}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace;
    use dmd_models::layers::{Conv2d, Embedding};
    use dmd_models::{Activation, Backend, Way};

    fn rows<const N: usize>(values: &[[f32; 2]; N]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    /// The embedding of a pass's time, added to that of the label.
    fn conditioned(time: [f32; 2]) -> Graph {
        let table = Embedding { name: "class_embedding".into(), weight: rows(&[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) };
        trace([2, 2, 1, 1], 3, |b, noise, cond| {
            let label = b.embedding(cond.get(Way::Label).unwrap(), &table)?;
            b.add_per_channel(noise, &b.add(&label, &b.constant(&rows(&[time]))?)?)
        })
        .unwrap()
    }

    #[test]
    fn a_row_is_the_pass_times_the_labels_plus_the_label() {
        let graph = merge(&[conditioned([10.0, 20.0]), conditioned([0.0, 0.5])]).unwrap();
        let Op::Lookup(table) = &graph.nodes()[1].op else { panic!("a lookup") };
        let expected = [[11f32, 22.0], [13.0, 24.0], [15.0, 26.0], [1.0, 2.5], [3.0, 4.5], [5.0, 6.5]];
        assert_eq!(table.to_vec2::<f32>().unwrap(), expected);
        assert_eq!(
            (graph.passes, graph.classes, graph.rows(), graph.nodes()[1].shape.as_slice()),
            (2, 3, 6, &[2, 2][..])
        );
    }

    #[test]
    fn what_does_not_differ_stays_as_it_is_and_needs_no_row() {
        let pass = |level: f32| {
            trace([1, 2, 1, 1], 0, |b, noise, _| {
                let x = b.add_per_channel(noise, &b.constant(&rows(&[[level, 1.0]]))?)?;
                b.add_per_channel(&b.affine(&x, &[2.0], 1.0)?, &b.constant(&rows(&[[3.0, 4.0]]))?)
            })
            .unwrap()
        };
        let graph = merge(&[pass(1.0), pass(2.0)]).unwrap();
        let kinds: Vec<&str> = graph.nodes().iter().map(|node| node.op.kind()).collect();
        assert_eq!(kinds, ["input", "lookup", "shift", "affine", "constant", "shift"]);
    }

    #[test]
    fn passes_of_different_networks_are_refused_by_the_node() {
        let conv = |weight: f32| {
            let weight = Tensor::full(weight, (2, 2, 1, 1), &Device::Cpu).unwrap();
            let conv = Conv2d { name: "paint".into(), weight, bias: None, stride: 1, padding: 0 };
            trace([1, 2, 4, 4], 0, |b, noise, _| b.conv2d(noise, &conv)).unwrap()
        };
        let shifted = |add: f64| trace([1, 2, 4, 4], 0, |b, noise, _| b.affine(noise, &[1.0], add)).unwrap();
        let act = |act| trace([1, 2, 4, 4], 0, |b, noise, _| b.activation(noise, act)).unwrap();
        let (silu, relu) = (act(Activation::Silu), act(Activation::Relu));
        for (passes, expected) in [
            ([conv(1.0), conv(2.0)], "\"paint\" has other parameters"),
            ([shifted(1.0), shifted(2.0)], "\"affine\" adds another number"),
            ([silu.clone(), relu], "\"silu\" is relu in another pass"),
            ([silu.clone(), silu.of_inputs()], "\"silu\" is not in all of them"),
        ] {
            let error = merge(&passes).unwrap_err().to_string();
            assert!(error.contains(expected), "expected {expected:?} in {error}");
        }
    }
}
