//! One-step generators, and what stands around them, as ONNX files that edge accelerators take whole.
//!
//! A network written over [`dmd_models::Backend`] is [traced](trace()) by partial evaluation, the graph is
//! [folded](fold) by exact rewrites, spelled in a dialect, checked, and the file is run by every engine
//! present and compared with candle before it gets its name. This crate knows nothing of training.
//!
//! # A network of your own
//!
//! Nothing here is bound to the networks of `dmd-models`: implement [`Module`] over the operations of `Backend`, and
//! [`export`] does the rest, or take the graph from [`trace`](trace()) alone. `examples/your_network.rs` is a whole
//! program.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use dmd_export::{Input, Module, trace};
//! use dmd_models::{Activation, Backend, Condition, Result, layers::Conv2d};
//!
//! /// One convolution and one activation, and a way up and down again.
//! struct Detour(Conv2d);
//!
//! impl Module for Detour {
//!     fn inputs(&self) -> Vec<Input> {
//!         vec![Input::noise([3, 8, 8])]
//!     }
//!
//!     fn run<B: Backend>(&self, b: &B, x: &[B::Value], _: &Condition<B::Value>) -> Result<Vec<B::Value>> {
//!         let x = b.activation(&b.conv2d(&x[0], &self.0)?, Activation::Silu)?;
//!         Ok(vec![b.avg_pool_2x(&b.upsample_2x(&x)?)?])
//!     }
//! }
//!
//! let weight = Tensor::ones((3, 3, 3, 3), DType::F32, &Device::Cpu)?;
//! let network = Detour(Conv2d { name: "paint".into(), weight, bias: None, stride: 1, padding: 1 });
//! let graph = trace([1, 3, 8, 8], 0, |b, noise, told| Ok(network.run(b, &[noise.clone()], told)?.remove(0)))?;
//! let nodes: Vec<String> = graph.nodes().iter().map(|node| format!("{} {:?}", node.name, node.shape)).collect();
//! assert_eq!(nodes, ["noise [1, 3, 8, 8]", "paint [1, 3, 8, 8]", "silu [1, 3, 8, 8]",
//!     "upsample [1, 3, 16, 16]", "pool [1, 3, 8, 8]"]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(missing_docs)]

mod trace;
pub use trace::{Trace, Value, trace};
mod evaluate;
pub mod fold;
pub mod graph;
mod passes;

mod check;
mod dialect;
mod infer;
mod lower;
mod onnx;
pub use dialect::Dialect;
mod interpret;
#[cfg(test)]
mod parity;
mod precision;
pub use precision::Precision;
pub use precision::activations::LayerSensitivity;

mod file;
mod folder;
mod module;
mod verify;
pub use dmd_runtime::{EngineChoice, Output};
pub use file::{
    Batch, ExportOptions, ExportReport, MAX_DROP_DB, ModelInfo, Prepared, export, export_passes, prepare,
    weights_sha256,
};
pub use folder::{FolderReport, Parts, export_folder};
pub use module::{Decoding, Form, Gives, Input, Like, Module, OneStep, TextEncoding, ToldBy};
pub use verify::{EngineVerdict, Status, missing_operator};

mod limits;
pub mod lint;
mod ort_format;
pub use ort_format::{OperatorSet, OrtReport, required_operators_config, to_ort};

mod error;
pub use error::{Error, Result};
