//! Networks, noise levels and preconditioning of diffusion models, each defined once; diffusers folders in and out.
//! This crate knows nothing of training loops, ONNX or command lines.
#![deny(missing_docs)]

mod error;
mod weights;

pub mod backend;
pub mod cuda;
pub mod denoiser;
pub mod folder;
pub mod interpret;
pub mod layers;
pub mod noise_levels;
pub mod ops;
pub mod shapes;
pub mod unet;

pub use backend::{Activation, Backend, Block, Network};
pub use denoiser::{Denoiser, Generator, Prediction};
pub use error::{Error, Result};
pub use folder::{About, ModelFolder};
pub use interpret::{Eager, Precision, Training, cost};
pub use noise_levels::NoiseLevels;
pub use unet::{UNet, UNetConfig};
pub use weights::{Weights, read_metadata, write_whole};
