//! What can be exported: a network from noise to pictures. Ours is [`Generator`]; a user's own is one impl away.

use candle_core::Device;
use dmd_models::{Backend, Condition, Generator, Told, Way};

/// A one-step network. It is traced once, and run eagerly for the comparison, so both see the same code.
///
/// ```
/// use dmd_export::Network;
/// use dmd_models::{Activation, Backend, Condition, Result};
///
/// /// A picture that is the noise, squashed.
/// struct Squash;
///
/// impl Network for Squash {
///     fn channels(&self) -> usize {
///         3
///     }
///
///     fn generate<B: Backend>(&self, b: &B, noise: &B::Value, _: &Condition<B::Value>) -> Result<B::Value> {
///         b.activation(noise, Activation::Silu)
///     }
/// }
///
/// let folder = tempfile::tempdir()?;
/// let info = dmd_export::ModelInfo { size: [8, 8], classes: vec![], weights_sha256: String::new() };
/// let report = dmd_export::export(&Squash, &info, &Default::default(), &folder.path().join("squash.onnx"))?;
/// assert_eq!(report.nodes, 2); // Sigmoid and Mul
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Network {
    /// Channels of the noise and of the picture.
    fn channels(&self) -> usize;

    /// The most labels it can tell apart: 0 for an unconditional network, `usize::MAX` where any number will do.
    fn max_classes(&self) -> usize {
        0
    }

    /// The noise level that the network is held at, for the record.
    fn sigma(&self) -> f64 {
        1.0
    }

    /// Where its weights lie.
    fn device(&self) -> Device {
        Device::Cpu
    }

    /// Unit normal noise `(B, C, H, W)` to pictures `(B, C, H, W)` around [-1, 1]; of each way in `cond` one row per
    /// picture.
    fn generate<B: Backend>(&self, b: &B, noise: &B::Value, cond: &Condition<B::Value>)
    -> dmd_models::Result<B::Value>;
}

impl Network for Generator {
    fn channels(&self) -> usize {
        self.denoiser.network.takes().channels
    }

    fn max_classes(&self) -> usize {
        match self.denoiser.network.takes().told.get(Way::Label) {
            Some(Told::Id(n)) => n.unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    fn sigma(&self) -> f64 {
        self.sigma
    }

    fn device(&self) -> Device {
        self.denoiser.network.device().clone()
    }

    fn generate<B: Backend>(
        &self,
        b: &B,
        noise: &B::Value,
        cond: &Condition<B::Value>,
    ) -> dmd_models::Result<B::Value> {
        Generator::generate(self, b, noise, cond)
    }
}
