//! Runs a generator of one or a few steps, exported by `dmd export --onnx`, inside an app: a seed in, pictures out.
//!
//! This crate knows nothing of training. It reads the file's own description ([`Info`]), refuses whatever `dmd export`
//! does not write ([`OPERATORS`]), finds an engine, draws the noise ([`noise`]) and hands back pictures ([`Images`]). Two
//! engines are built in, each a cargo feature:
//!
//! - `onnxruntime`: ONNX Runtime 1.24 or newer, loaded when the first file is opened ([`library`] says from where);
//! - `tract`: pure Rust, nothing to install, slower; used, with one warning, where no library is found.
//!
//! ```no_run
//! use dmd_runtime::{Generator, Options, Request};
//!
//! let generator = Generator::load("emoji-32.onnx", Options::default())?;
//! let images = generator.generate(&Request { seed: 7, batch: 4, ..Request::default() })?;
//! for (i, image) in images.iter().enumerate() {
//!     std::fs::write(format!("{i}.png"), image.to_png()?)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(missing_docs)]

mod accelerator;
mod contract;
mod generator;
mod images;
mod module;
pub mod noise;
mod pipeline;
mod request;

mod engine;
pub mod library;
mod placement;

mod error;
mod limits;
mod printable;

pub use accelerator::{Accelerator, ComputeUnits, CoreMl, PlugIn, Qnn};
pub use contract::{
    FORMAT, FileInfo, FolderInfo, Info, MODEL_JSON, ModuleInfo, OPERATORS, Output, Part, Port, PromptLimits,
};
#[cfg(feature = "onnxruntime")]
pub use engine::network;
pub use engine::{
    EngineChoice, EngineInfo, EngineKind, EngineReport, Feed, Rewrite, Values, engines, max_threads, rewrite,
};
pub use error::{Error, Result};
pub use generator::{Generator, Options};
pub use images::{Buffer, Image, Images, quantize};
pub use library::Tried;
pub use module::{Given, Module};
pub use noise::picture_noise;
pub use pipeline::Pipeline;
pub use placement::{PassedOver, PlacedNode, Placement, Probe, Step};
pub use printable::printable;
pub use request::{Label, Progress, Request, Watch};
