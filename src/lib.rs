//! dmd turns a many-step diffusion model into a one-step generator (Distribution Matching Distillation) and exports it
//! for edge devices. This crate holds what only the trainer knows: losses, optimisers, data sets, run folders, the
//! command line. Networks are in `dmd-models`, ONNX files in `dmd-export`, running them in `dmd-runtime`.

pub mod cli;
pub mod commands;

pub mod autoencoder;
pub mod config;
pub mod distill;
pub mod features;
pub mod fingerprint;
pub mod levels;
pub mod lock;
pub mod loss;
pub mod optim;
pub mod pairs;
pub mod random;
pub mod regression;
pub mod rows;
pub mod sample;
pub mod teacher;
pub mod train;

pub mod aside;
pub mod classes;
pub mod data;
pub mod device;
pub mod eval;
pub mod limits;
pub mod memory;
pub mod npy;
pub mod onnx_sizes;
pub mod output;
pub mod picture;
pub mod plot;
pub mod prompts;
pub mod report;

/// Version of this program, as it is written into models and files.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
