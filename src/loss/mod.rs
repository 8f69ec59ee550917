//! Losses: functions from tensors to a scalar, one file each. They call no network, draw no noise and log nothing.

mod denoising;
mod distribution_matching;

pub use denoising::{denoising, edm_weight, fake_score_weight};
pub use distribution_matching::{DistributionMatching, distribution_matching};
