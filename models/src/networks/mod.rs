//! The networks, each in a file of its own, and the one type that the rest of the program knows. A new one is its file, a
//! variant of [`Network`] and an arm of `with!`.

mod architecture;
pub mod config;
pub mod dit;
pub mod unet2d;

pub use architecture::{Architecture, Takes, Told, Want};

use crate::Result;
use crate::backend::Backend;
use crate::condition::Condition;
use candle_core::Device;
use dit::DiT;
use unet2d::UNet;

/// A network of any kind.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a program holds three or four of them, and moves them once")]
pub enum Network {
    /// `UNet2DModel`.
    UNet2D(UNet),
    /// `DiTTransformer2DModel`.
    DiT(DiT),
}

/// The same for every kind.
macro_rules! with {
    ($network:expr, $net:ident => $work:expr) => {
        match $network {
            Network::UNet2D($net) => $work,
            Network::DiT($net) => $work,
        }
    };
}

impl Network {
    /// What it takes.
    pub fn takes(&self) -> Takes {
        with!(self, net => net.takes())
    }

    /// Where its weights lie.
    pub fn device(&self) -> &Device {
        with!(self, net => net.device())
    }

    /// Its output. Arguments as in [`Architecture::run`].
    pub fn forward<B: Backend>(&self, b: &B, x: &B::Value, t: &[f64], cond: &Condition<B::Value>) -> Result<B::Value> {
        with!(self, net => net.forward(b, x, t, cond))
    }

    /// What its encoder sees ([`Want::Maps`]). Arguments as in [`Architecture::run`].
    pub fn features<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        cond: &Condition<B::Value>,
    ) -> Result<Vec<B::Value>> {
        with!(self, net => net.features(b, x, t, cond))
    }
}
