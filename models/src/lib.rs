//! Networks, noise levels and preconditioning of diffusion models, each defined once; diffusers folders in and out.
//! This crate knows nothing of training loops, ONNX or command lines.
#![deny(missing_docs)]

mod error;
#[cfg(feature = "candle-nn")]
mod from_candle_nn;
mod limits;
mod weights;

pub mod backend;
pub mod blocks;
pub mod condition;
pub mod cuda;
pub mod denoiser;
pub mod encoders;
pub mod folder;
pub mod interpret;
pub mod layers;
pub mod networks;
pub mod noise_levels;
pub mod ops;
pub mod peak;
pub mod pipeline;
pub mod shapes;
pub mod single_file;

pub use backend::{Activation, Axis, Backend, Block};
pub use condition::{Condition, Way};
pub use denoiser::{Denoiser, Generator, Prediction};
pub use encoders::Autoencoder;
pub use error::{Error, Result};
pub use folder::{About, ModelFolder};
pub use interpret::{Eager, Precision, Training, cost};
pub use networks::unet2d::{UNet, UNetConfig};
pub use networks::{Architecture, Network, NetworkConfig, Takes, Told, Want};
pub use noise_levels::NoiseLevels;
pub use pipeline::Pipeline;
pub use weights::{Weights, read_metadata, read_row, write_whole};
