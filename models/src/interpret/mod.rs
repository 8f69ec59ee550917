//! The interpreters of a network, each a [`Backend`](crate::Backend): at once on candle tensors, the same for training, on
//! a GPU, and on shapes alone. What they compute in and on is theirs to know; a network knows nothing of it.

mod checkpoint;
pub mod cost;
mod eager;
mod node;
mod tape;
mod training;

pub use eager::Eager;
pub use tape::{Precision, Tape, Value};
pub use training::Training;
