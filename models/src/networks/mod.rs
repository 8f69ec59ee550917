//! The networks, each in a file of its own, and the two types that the rest of the program knows: any network, and what
//! any `config.json` says. A new one is its file and a line of `networks!`.

mod architecture;
pub mod config;
pub mod dit;
pub mod unet2d;
pub mod unet2d_condition;

pub use architecture::{Architecture, Takes, Told, Want};

use crate::backend::Backend;
use crate::condition::Condition;
use crate::layers::Draws;
use crate::{Error, Result, Weights};
use candle_core::Device;
use config::{Fields, NetworkFields};
use dit::DiT;
use serde_json::Value;
use unet2d::UNet;
use unet2d_condition::UNet2DCondition;

macro_rules! networks {
    ($($(#[$doc:meta])* $kind:ident($net:ty),)*) => {
        /// A network of any kind.
        #[derive(Clone, Debug)]
        #[expect(clippy::large_enum_variant, reason = "a program holds three or four of them, and moves them once")]
        pub enum Network {
            $($(#[$doc])* $kind($net),)*
        }

        /// What the `config.json` of a network of any kind holds.
        #[derive(Clone, Debug, PartialEq)]
        #[expect(clippy::large_enum_variant, reason = "a program holds one or two of them")]
        pub enum NetworkConfig {
            $($(#[$doc])* $kind(<$net as Architecture>::Config),)*
        }

        $(impl From<<$net as Architecture>::Config> for NetworkConfig {
            fn from(config: <$net as Architecture>::Config) -> Self {
                NetworkConfig::$kind(config)
            }
        })*

        impl NetworkConfig {
            /// Reads what `config.json` holds; `class` is meant where it names none.
            pub(crate) fn from_value(value: &Value, class: Option<&str>) -> Result<Self> {
                let refuse = |message: String| Err(Error::Config(message));
                let Some(fields) = value.as_object() else { return refuse("not a JSON object".into()) };
                let Some(class) = config::class_of(fields)?.or(class) else {
                    return refuse("has no _class_name, which names the network".into());
                };
                let mut known = Vec::new();
                $(
                    if <$net as Architecture>::Config::CLASSES.contains(&class) {
                        return config::from_value(value).map(NetworkConfig::$kind);
                    }
                    known.push(<$net as Architecture>::Config::CLASSES[0]);
                )*
                refuse(format!("_class_name is {class}, which is not supported (only {})", known.join(", ")))
            }

            /// The network on these weights, by diffusers' names; no memory is taken for what they do not hold. Fails naming
            /// every tensor that is missing, left over or of a wrong shape.
            pub fn network(&self, weights: &Weights) -> Result<Network> {
                Ok(match self {
                    $(NetworkConfig::$kind(config) => Network::$kind(<$net>::new(config, weights)?),)*
                })
            }

            /// Fresh weights, as [`Architecture::init`] draws them.
            pub fn init(&self, draw: &mut Draws) -> Result<Weights> {
                match self {
                    $(NetworkConfig::$kind(config) => <$net>::init(config, draw),)*
                }
            }
        }

        /// The same for every kind of either type.
        macro_rules! with {
            ($of:ident, $value:expr, $inner:ident => $work:expr) => {
                match $value {
                    $($of::$kind($inner) => $work,)*
                }
            };
        }
    };
}

networks! {
    /// `UNet2DModel`.
    UNet2D(UNet),
    /// `UNet2DConditionModel`.
    UNet2DCondition(UNet2DCondition),
    /// `DiTTransformer2DModel`.
    DiT(DiT),
}

impl Network {
    /// What it takes.
    pub fn takes(&self) -> Takes {
        with!(Network, self, net => net.takes())
    }

    /// Where its weights lie.
    pub fn device(&self) -> &Device {
        with!(Network, self, net => net.device())
    }

    /// Its output. Arguments as in [`Architecture::run`].
    pub fn forward<B: Backend>(&self, b: &B, x: &B::Value, t: &[f64], cond: &Condition<B::Value>) -> Result<B::Value> {
        with!(Network, self, net => net.forward(b, x, t, cond))
    }

    /// What its encoder sees ([`Want::Maps`]). Arguments as in [`Architecture::run`].
    pub fn features<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        cond: &Condition<B::Value>,
    ) -> Result<Vec<B::Value>> {
        with!(Network, self, net => net.features(b, x, t, cond))
    }
}

impl NetworkConfig {
    /// The text of `config.json`, as diffusers reads it.
    pub fn to_json(&self) -> Result<String> {
        with!(NetworkConfig, self, config => config::to_json(config))
    }

    /// The fields that differ from diffusers' defaults, by which a network is known again and described.
    pub fn described(&self) -> Result<Value> {
        with!(NetworkConfig, self, config => config::without_defaults(config))
    }

    /// diffusers' `_class_name`.
    pub fn class(&self) -> &'static str {
        with!(NetworkConfig, self, config => config.class())
    }

    /// What the network takes.
    pub fn takes(&self) -> Takes {
        with!(NetworkConfig, self, config => config.takes())
    }

    /// The name of the network's folder in a pipeline's.
    pub fn part(&self) -> &'static str {
        with!(NetworkConfig, self, config => part_of(config))
    }

    /// A tensor that every such network has ([`NetworkFields::LANDMARK`]).
    pub(crate) fn landmark(&self) -> &'static str {
        with!(NetworkConfig, self, config => landmark_of(config))
    }

    /// Why the network is no denoiser of a whole model, if it is none.
    pub(crate) fn why_no_model(&self) -> Option<String> {
        with!(NetworkConfig, self, config => config.why_no_model())
    }

    /// Whether the last row of its class table stands for no class, whatever the model.
    pub(crate) fn has_null_class(&self) -> bool {
        with!(NetworkConfig, self, config => config.has_null_class())
    }

    /// diffusers' pipeline for it and a scheduler of this class.
    pub(crate) fn pipeline(&self, scheduler: &str) -> &'static str {
        with!(NetworkConfig, self, config => config.pipeline(scheduler))
    }
}

fn part_of<C: NetworkFields>(_: &C) -> &'static str {
    C::PART
}

fn landmark_of<C: NetworkFields>(_: &C) -> &'static str {
    C::LANDMARK
}
