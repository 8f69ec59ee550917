//! One-step generators as ONNX files that edge accelerators take whole.
//!
//! A network written over [`dmd_models::Backend`] is [traced](trace()) by partial evaluation, the graph is
//! [folded](fold) by exact rewrites, spelled in a dialect, checked, and the file is run by every engine
//! present and compared with candle before it gets its name. This crate knows nothing of training.
#![deny(missing_docs)]

mod trace;
pub use trace::{Trace, Value, trace};
mod evaluate;
pub mod fold;
pub mod graph;

mod check;
mod dialect;
mod infer;
mod lower;
mod onnx;
pub use dialect::Dialect;
mod interpret;
mod precision;
pub use precision::Precision;
pub use precision::activations::LayerSensitivity;

mod file;
mod network;
mod verify;
pub use dmd_runtime::{EngineChoice, Output};
pub use file::{Batch, ExportOptions, ExportReport, MAX_DROP_DB, ModelInfo, export, weights_sha256};
pub use network::Network;
pub use verify::{EngineVerdict, Status};

pub mod lint;

mod error;
pub use error::{Error, Result};
