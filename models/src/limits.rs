//! How large the numbers of a file may be. Whatever is read from others and sizes something passes here before it does:
//! far above every model that there is, far below what no memory holds.

use crate::{Error, Result};
use std::ops::RangeInclusive;

/// Bytes of a JSON file, such as a config.
pub const JSON_BYTES: u64 = 64 << 20;
/// Bytes of the header of a safetensors file; the format's own limit.
pub const HEADER_BYTES: u64 = 100_000_000;
/// Channels, widths, groups and heads of a layer.
pub const CHANNELS: RangeInclusive<usize> = 1..=1 << 17;
/// Levels of a network.
pub const LEVELS: RangeInclusive<usize> = 1..=16;
/// Layers of a level.
pub const LAYERS: RangeInclusive<usize> = 1..=256;
/// Side of a convolution's kernel.
pub const KERNEL: RangeInclusive<usize> = 1..=63;
/// Rows of a table: classes, timesteps.
pub const ROWS: RangeInclusive<usize> = 1..=1 << 24;
/// Height or width of a picture.
pub const SIDE: RangeInclusive<usize> = 1..=1 << 13;
/// Tokens of a sample: 256 patches each way.
pub const TOKENS: RangeInclusive<usize> = 1..=1 << 16;
/// Parameters of a network that is drawn anew.
pub const PARAMETERS: usize = 1 << 30;
/// Noise levels of a schedule; one has no step between its ends.
pub const NOISE_LEVELS: RangeInclusive<usize> = 2..=1_000_000;
/// Tensors that a network asks for and its file lacks, before it is believed to be another network.
pub const MISSING_TENSORS: usize = 10_000;

/// Refuses a number outside of its limits by the name of its field.
pub fn check(name: &str, value: usize, limits: RangeInclusive<usize>) -> Result<()> {
    if limits.contains(&value) {
        return Ok(());
    }
    Err(Error::Config(format!("{name} is {value}, expected {} to {}", limits.start(), limits.end())))
}
