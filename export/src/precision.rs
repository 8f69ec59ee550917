//! Precisions: how the numbers of a file are stored and computed. Each is a rewrite of a lowered graph, whatever its
//! dialect, in a file of its own; fp32 is the graph as it is.

use crate::{Error, Result, onnx};
use candle_onnx::onnx::GraphProto;
use candle_onnx::onnx::tensor_proto::DataType;
use std::collections::{HashMap, HashSet};

pub(crate) mod activations;
pub(crate) mod half;
pub(crate) mod weights;

/// How numbers are stored and computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    Fp32,
    /// Half precision, with islands of single precision around the statistics of norms, where the noise is read, and
    /// from the last convolution on. Inputs and output keep their types.
    Fp16,
    /// Weights in 8 bits, symmetric, a scale per output channel; computed in single precision.
    W8,
    /// Weights and what convolutions and matrix products read in 8 bits, so that they are computed in integers.
    W8a8,
}

impl Precision {
    /// Every precision.
    pub const ALL: [Precision; 4] = [Precision::Fp32, Precision::Fp16, Precision::W8, Precision::W8a8];

    /// Its name on the command line and in `dmd.precision`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Fp16 => "fp16",
            Precision::W8 => "w8",
            Precision::W8a8 => "w8a8",
        }
    }

    /// The least likeness to fp32, PSNR in dB, that an exported file must have unless another is asked for. fp32 is
    /// held to a largest difference instead.
    pub fn min_psnr_db(self) -> f64 {
        match self {
            Precision::Fp32 => f64::INFINITY,
            Precision::Fp16 => 60.0,
            Precision::W8 => 40.0,
            Precision::W8a8 => 30.0,
        }
    }

    /// Operators that it adds to a dialect's.
    pub(crate) fn operators(self) -> &'static [&'static str] {
        match self {
            Precision::Fp32 | Precision::Fp16 => &[],
            Precision::W8 => &["DequantizeLinear"],
            Precision::W8a8 => &["DequantizeLinear", "QuantizeLinear"],
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Precision::ALL.into_iter().find(|precision| precision.name() == text);
        found.ok_or_else(|| Error::Setting(format!("precision \"{text}\", expected fp32, fp16, w8 or w8a8")))
    }
}

/// Where each constant is among the graph's, by name.
fn places(graph: &GraphProto) -> HashMap<&str, usize> {
    graph.initializer.iter().enumerate().map(|(place, tensor)| (tensor.name.as_str(), place)).collect()
}

/// The graph without its nodes and constants.
fn frame(graph: &GraphProto) -> GraphProto {
    let (input, output) = (graph.input.clone(), graph.output.clone());
    GraphProto { name: graph.name.clone(), input, output, value_info: graph.value_info.clone(), ..Default::default() }
}

/// The names of all that some node reads.
fn read_names(graph: &GraphProto) -> HashSet<&str> {
    graph.node.iter().flat_map(|node| &node.input).map(String::as_str).collect()
}

/// Drops the constants that no node reads any more.
fn sweep_constants(graph: &mut GraphProto) {
    let read = read_names(graph);
    let kept: Vec<bool> = graph.initializer.iter().map(|tensor| read.contains(tensor.name.as_str())).collect();
    let mut kept = kept.into_iter();
    graph.initializer.retain(|_| kept.next().unwrap_or(true));
}

/// The names of what the graph is given that is no index.
fn float_inputs(graph: &GraphProto) -> HashSet<&str> {
    let floats = graph.input.iter().filter(|input| onnx::element_type(input) == Some(DataType::Float as i32));
    floats.map(|input| input.name.as_str()).collect()
}

/// The convolutions behind which no other follows on the way to the picture, and the first ones: kept in single
/// precision, because their errors are seen at once, or by everything.
fn outermost_convs(graph: &GraphProto) -> Vec<&str> {
    let convs = || graph.node.iter().filter(|node| node.op_type == "Conv");
    let mut from_inputs = float_inputs(graph);
    let mut first = Vec::new();
    for node in &graph.node {
        let reads_inputs = node.input.iter().any(|input| from_inputs.contains(input.as_str()));
        match node.op_type.as_str() {
            "Conv" if reads_inputs => first.push(node.name.as_str()),
            "Add" | "Mul" | "Cast" | "Pad" if reads_inputs => {
                from_inputs.extend(node.output.iter().map(String::as_str))
            }
            _ => {}
        }
    }
    let tail = half::tail(graph);
    first.extend(convs().map(|node| node.name.as_str()).filter(|name| tail.contains(name)));
    first
}
