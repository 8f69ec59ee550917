//! What stands around the network of a latent model: autoencoders, which make pictures of latents and latents of pictures,
//! and what reads a prompt. Each is a file of its own, written once over [`Backend`](crate::Backend).

mod autoencoder;
pub mod autoencoder_kl;
pub mod autoencoder_tiny;
pub mod clip;
pub mod clip_vocabulary;
mod coder;
mod scaling;
mod text;
mod tokenizer;
pub mod vq_model;

pub use autoencoder::{Autoencoder, Encoded};
pub(crate) use text::WEIGHTS as TEXT_WEIGHTS;
pub use text::{Layer, TextEncoder, TextEncoders};
pub use tokenizer::{Tokenizer, Tokens};
