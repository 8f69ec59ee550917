//! Dialects: named ways of spelling one graph, each for a family of engines. What they share is in `lower`; a file
//! per dialect holds what is its own. Precision is another axis, see [`Precision`](crate::Precision).

use crate::check::Rules;
use crate::graph::Node;
use crate::lower::{Lowering, Norm, refuse};
use crate::{Error, Precision, Result};

mod native;
mod nnapi;
mod portable;

/// Which operators a file is spelled in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// Opset 17 alone, group norm by way of InstanceNormalization: what the CPU, CoreML, QNN, DirectML, CUDA and
    /// WebGPU providers of ONNX Runtime take without falling back, and what tract takes.
    #[default]
    Portable,
    /// Opset 17, norms as means and differences: Android's NNAPI, which has no normalisation at all.
    Nnapi,
    /// Opset 21, GroupNormalization as one operator, for engines that have kernels for it.
    Native,
}

impl Dialect {
    /// Every dialect.
    pub const ALL: [Dialect; 3] = [Dialect::Portable, Dialect::Nnapi, Dialect::Native];

    /// Its name on the command line and in `dmd.dialect`.
    pub fn name(self) -> &'static str {
        match self {
            Dialect::Portable => "portable",
            Dialect::Nnapi => "nnapi",
            Dialect::Native => "native",
        }
    }

    /// Version of ai.onnx.
    pub fn opset(self) -> i64 {
        match self {
            // The first with everything used here; 18 moves arguments into inputs, which some engines refuse.
            Dialect::Portable | Dialect::Nnapi => 17,
            // The first whose GroupNormalization scales per channel.
            Dialect::Native => 21,
        }
    }

    /// Version of the file format's container that goes with the opset.
    pub(crate) fn ir_version(self) -> i64 {
        match self {
            Dialect::Portable | Dialect::Nnapi => 8,
            Dialect::Native => 10,
        }
    }

    /// What a file in this dialect is held to.
    pub(crate) fn rules(self, precision: Precision, dynamic_batch: bool) -> Rules {
        let own = match self {
            Dialect::Portable => portable::OPERATORS,
            Dialect::Nnapi => nnapi::OPERATORS,
            Dialect::Native => native::OPERATORS,
        };
        let (opset, ir_version, operators) = (self.opset(), self.ir_version(), [SHARED, own, precision.operators()]);
        Rules { opset, ir_version, operators, max_rank: 4, dynamic_batch }
    }

    /// Whether nearest-neighbour upsampling and the convolution behind it are one transposed convolution: less than
    /// half the products in a larger weight. For fp32, which CPUs compute, where it was measured. Half precision is for
    /// GPUs and their like, where it was not; what is in 8 bits is small, or has integer kernels, which ConvTranspose
    /// lacks.
    pub(crate) fn transposes_convs(self, precision: Precision) -> bool {
        self == Dialect::Portable && precision == Precision::Fp32
    }

    pub(crate) fn group_norm(self, lowering: &mut Lowering, norm: &Norm, x: &str) -> Result<String> {
        match self {
            Dialect::Portable => portable::group_norm(lowering, norm, x),
            Dialect::Nnapi => nnapi::group_norm(lowering, norm, x),
            Dialect::Native => native::group_norm(lowering, norm, x),
        }
    }

    /// Cuts x along its second axis into parts of these names and shapes.
    pub(crate) fn split(self, lowering: &mut Lowering, name: &str, x: &str, parts: &[(String, Vec<usize>)]) {
        let is_even = parts.iter().all(|(_, shape)| shape[1] == parts[0].1[1]);
        match self {
            Dialect::Nnapi if !is_even => nnapi::slices(lowering, x, parts),
            _ => lowering.split(name, x, parts),
        }
    }

    /// x·tanh(softplus(x)).
    pub(crate) fn mish(self, lowering: &mut Lowering, node: &Node, x: &str) -> String {
        match self {
            Dialect::Portable | Dialect::Native => portable::mish(lowering, node, x),
            Dialect::Nnapi => nnapi::mish(lowering, node, x),
        }
    }

    /// x·Φ(x).
    pub(crate) fn gelu(self, lowering: &mut Lowering, node: &Node, x: &str) -> Result<String> {
        match self {
            Dialect::Portable => Ok(portable::gelu(lowering, node, x)),
            Dialect::Nnapi => {
                Err(refuse(node, "the nnapi dialect has no error function for gelu; export with --dialect portable"))
            }
            Dialect::Native => Ok(lowering.step(node, "", "Gelu", &[x])),
        }
    }
}

/// Operators that every dialect uses.
const SHARED: &[&str] = &[
    "Add",
    "AveragePool",
    "Cast",
    "Clip",
    "Concat",
    "Conv",
    "Div",
    "Gather",
    "MatMul",
    "Mul",
    "Pad",
    "ReduceMean",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Sub",
    "Tanh",
    "Transpose",
];

impl std::fmt::Display for Dialect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Dialect {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Dialect::ALL.into_iter().find(|dialect| dialect.name() == text);
        found.ok_or_else(|| Error::Setting(format!("dialect \"{text}\", expected portable, nnapi or native")))
    }
}
