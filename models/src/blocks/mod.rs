//! Parts that networks share. Each has its parameters in place and knows nothing of a network's configuration.

mod attention;
mod levels;
mod resnet;
mod time;
mod transformer;

pub use attention::{AttentionBlock, AttentionShape};
pub use levels::{Attention, Beside, Encoded, Ends, Layers, Levels, Place, Plan, Resampling};
pub use resnet::{Resample, Resampler, ResnetBlock, ResnetShape};
pub use time::{TimeProjection, TimestepEmbedding};
pub use transformer::{Transformer, TransformerBlock, TransformerShape};

use crate::Result;
use crate::backend::Backend;

/// (x + h) / scale.
fn add_scaled<B: Backend>(b: &B, x: &B::Value, h: &B::Value, scale: f64) -> Result<B::Value> {
    let sum = b.add(x, h)?;
    if scale == 1.0 { Ok(sum) } else { b.affine(&sum, &[1.0 / scale], 0.0) }
}
