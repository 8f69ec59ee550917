//! Losses: functions from tensors to a scalar, one file each. They call no network, draw no noise and log nothing.

mod adversarial;
mod denoising;
mod distribution_matching;
mod f_divergence;
mod guidance;
mod reconstruction;
mod regression;
mod score_identity;

pub use adversarial::{approximate_r1, discriminator, generator_adversarial, softplus};
pub use denoising::{denoising, edm_weight, fake_score_weight};
pub use distribution_matching::distribution_matching;
pub use f_divergence::{Divergence, RatioBins, density_ratio};
pub use guidance::rescaled_guidance;
pub use reconstruction::{kl_to_noise, l1};
pub use regression::{l2, perceptual, pseudo_huber};
pub use score_identity::score_identity;

/// What a loss makes of the two scores of a sample x, and the two means that tell whether training is healthy.
pub struct Matching {
    /// The loss.
    pub loss: candle_core::Tensor,
    /// mean|x − x0_real|, a scalar.
    pub real_error: candle_core::Tensor,
    /// mean|x0_fake − x0_real|, a scalar.
    pub score_gap: candle_core::Tensor,
}
