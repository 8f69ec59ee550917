//! w8: the weights of convolutions as int8, symmetric, one scale per output channel, and tables of tokens, one scale per
//! channel, which DequantizeLinear turns back where they are read. Engines keep them as bytes; the file is a quarter of its
//! size.

use super::{outermost_convs, places, sweep_constants};
use crate::Result;
use crate::onnx::{
    dims, element_type, initializer, int, little_endian, maps_channels, value_info, value_info_like, values_f32,
};
use candle_onnx::onnx::tensor_proto::DataType;
use candle_onnx::onnx::{GraphProto, NodeProto, TensorProto, ValueInfoProto};
use std::collections::HashSet;

/// Rewrites a graph of f32. The outermost convolutions, small as they are, stay in single precision. Each weight goes as
/// its bytes come, so that no two spellings of all are in memory.
pub(crate) fn rewrite(mut graph: GraphProto) -> Result<GraphProto> {
    let (rounded, tables) = (rounded_weights(&graph), tables(&graph));
    let mut read_as_it_is = HashSet::new();
    for ((node, rounded), table) in graph.node.iter().zip(&rounded).zip(&tables) {
        let is_rounded = |at: usize| rounded.is_some() && at == 1 || table.is_some() && at == 0;
        let inputs = node.input.iter().enumerate().filter(|(at, _)| !is_rounded(*at));
        read_as_it_is.extend(inputs.map(|(_, name)| name.clone()));
    }
    let mut done = HashSet::new();
    for ((mut node, rounded), table) in std::mem::take(&mut graph.node).into_iter().zip(rounded).zip(tables) {
        if let Some(place) = table {
            let name = node.input[0].clone();
            let back = round_table(&mut graph, place, &mut node)?;
            graph.node.extend([node, back]);
            if !read_as_it_is.contains(&name) {
                graph.initializer[place].raw_data = vec![];
            }
            continue;
        }
        if let Some(place) = rounded {
            let name = std::mem::take(&mut node.input[1]);
            node.input[1] = format!("{name}.float");
            if done.insert(place) {
                round_weight(&mut graph, place)?;
                if !read_as_it_is.contains(&name) {
                    graph.initializer[place].raw_data = vec![];
                }
            }
        }
        graph.node.push(node);
    }
    sweep_constants(&mut graph);
    Ok(graph)
}

/// For each node the place of its weight, where that is to be rounded.
fn rounded_weights(graph: &GraphProto) -> Vec<Option<usize>> {
    let (places, kept) = (places(graph), outermost_convs(graph));
    let weight = |node: &NodeProto| {
        let rounds = node.op_type == "Conv" && !maps_channels(node) && !kept.contains(&node.name.as_str());
        let place = *places.get(node.input.get(1).filter(|_| rounds)?.as_str())?;
        (graph.initializer[place].data_type == DataType::Float as i32).then_some(place)
    };
    graph.node.iter().map(weight).collect()
}

/// For each node the place of the table of tokens that it looks up.
fn tables(graph: &GraphProto) -> Vec<Option<usize>> {
    let is_ids = |input: &&ValueInfoProto| element_type(input) == Some(DataType::Int32 as i32);
    let ids: HashSet<&str> = graph.input.iter().filter(is_ids).map(|input| input.name.as_str()).collect();
    let places = places(graph);
    let table = |node: &NodeProto| match node.input.as_slice() {
        [table, index] if node.op_type == "Gather" && ids.contains(index.as_str()) => {
            places.get(table.as_str()).copied()
        }
        _ => None,
    };
    graph.node.iter().map(table).collect()
}

/// Makes a node look up a table `(entries, C)` of int8, and gives the node that turns what it finds, `(B, N, C)`, back.
fn round_table(graph: &mut GraphProto, place: usize, node: &mut NodeProto) -> Result<NodeProto> {
    let table = &graph.initializer[place];
    let (name, dims, values) = (&table.name, dims(table), values_f32(table)?);
    let [int8, scale, value] = ["int8", "scale", "float"].map(|part| format!("{name}.{part}"));
    let channel = |at: usize| values.iter().skip(at).step_by(dims[1]).copied().collect::<Vec<f32>>();
    let scales: Vec<f32> = (0..dims[1]).map(|at| best_scale(&channel(at))).collect();
    let bytes = values.iter().zip(scales.iter().cycle()).map(|(value, scale)| rounded(*value, *scale) as i8 as u8);
    let bytes = bytes.collect();
    let output = node.output[0].clone();
    node.output[0] = format!("{output}.int8");
    let info = graph.value_info.iter().find(|info| info.name == output);
    let info = info.map(|info| value_info_like(info, &node.output[0], DataType::Int8));
    if !graph.initializer.iter().any(|constant| constant.name == int8) {
        graph.initializer.push(initializer(&int8, DataType::Int8, &dims, bytes));
        graph.initializer.push(initializer(&scale, DataType::Float, &[scales.len()], little_endian(&scales)));
    }
    graph.value_info.extend(info);
    node.input[0] = int8;
    Ok(NodeProto {
        name: format!("{}.{value}", node.name),
        op_type: "DequantizeLinear".into(),
        input: vec![node.output[0].clone(), scale],
        output: vec![output],
        attribute: vec![int("axis", 2)],
        ..Default::default()
    })
}

/// Adds a weight as int8, and the node that turns it back into `NAME.float`.
fn round_weight(graph: &mut GraphProto, place: usize) -> Result<()> {
    let weight = &graph.initializer[place];
    let (name, dims) = (&weight.name, dims(weight));
    let Quantized { values, scales } = quantized(weight)?;
    let [int8, scale, value] = ["int8", "scale", "float"].map(|part| format!("{name}.{part}"));
    let bytes = values.iter().map(|value| *value as u8).collect();
    graph.initializer.push(initializer(&int8, DataType::Int8, &dims, bytes));
    graph.initializer.push(initializer(&scale, DataType::Float, &[scales.len()], little_endian(&scales)));
    graph.node.push(NodeProto {
        name: value.clone(),
        op_type: "DequantizeLinear".into(),
        input: vec![int8, scale],
        output: vec![value.clone()],
        attribute: vec![int("axis", 0)],
        ..Default::default()
    });
    let dims: Vec<_> = dims.into_iter().map(crate::onnx::Dim::Fixed).collect();
    graph.value_info.push(value_info(&value, DataType::Float, &dims));
    Ok(())
}

/// A weight in 8 bits: `values · scales`, per output channel.
pub(super) struct Quantized {
    pub values: Vec<i8>,
    pub scales: Vec<f32>,
}

pub(super) fn quantized(weight: &TensorProto) -> Result<Quantized> {
    let values = values_f32(weight)?;
    let per_channel = values.len() / weight.dims[0].max(1) as usize;
    let mut result = Quantized { values: Vec::with_capacity(values.len()), scales: vec![] };
    for channel in values.chunks(per_channel.max(1)) {
        let scale = best_scale(channel);
        result.values.extend(channel.iter().map(|value| rounded(*value, scale) as i8));
        result.scales.push(scale);
    }
    Ok(result)
}

/// The scale with the least squared error: clipping the few largest values a little often pays for the others.
fn best_scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0f32, |max, value| max.max(value.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let scales = (0..=20).map(|step| largest / 127.0 * (1.0 - 0.02 * step as f32));
    let error = |scale: f32| -> f64 {
        values.iter().map(|value| f64::from(rounded(*value, scale) * scale - value).powi(2)).sum()
    };
    scales.min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap_or(1.0)
}

/// A whole number in −127..=127.
fn rounded(value: f32, scale: f32) -> f32 {
    (value / scale).round_ties_even().clamp(-127.0, 127.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every value is within half a step of its own channel's scale, and the extremes of a channel that has a plain
    /// spread use the whole range.
    #[test]
    fn each_channel_has_its_own_step() {
        let values: Vec<f32> = (0..8).map(|i| i as f32 - 3.5).chain((0..8).map(|i| (i as f32 - 3.5) * 100.0)).collect();
        let weight = initializer("w", DataType::Float, &[2, 8, 1, 1], little_endian(&values));
        let Quantized { values: found, scales } = quantized(&weight).unwrap();
        assert!((scales[1] / scales[0] - 100.0).abs() < 1e-3, "{scales:?}");
        for (i, (found, value)) in found.iter().zip(&values).enumerate() {
            let scale = scales[i / 8];
            assert!((f32::from(*found) * scale - value).abs() <= 0.5 * scale * 1.001, "{found} · {scale} for {value}");
        }
        assert!(found.contains(&127));
    }

    #[test]
    fn a_channel_of_zeros_is_zeros() {
        let weight = initializer("w", DataType::Float, &[1, 3, 1, 1], little_endian(&[0.0; 3]));
        assert_eq!(quantized(&weight).unwrap().values, [0, 0, 0]);
    }
}
