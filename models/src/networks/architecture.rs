//! What a kind of network has to tell of itself; and what it gets for that.

use crate::backend::Backend;
use crate::condition::{Condition, Way};
use crate::layers::{Draws, Loader, Random, Source};
use crate::{Error, Result, Weights};
use candle_core::Device;

/// A kind of network, of which a `config.json` and weights make one.
pub trait Architecture: Sized {
    /// What `config.json` holds.
    type Config;

    /// Takes the parameters from `source`. Gradients reach whatever among them are variables.
    fn build(config: &Self::Config, source: &mut dyn Source) -> Result<Self>;

    /// What it takes.
    fn takes(&self) -> Takes;

    /// Where its weights lie.
    fn device(&self) -> &Device;

    /// Runs it, operation by operation. x `(B, C, H, W)`; `t`: one timestep for all or one per sample; of each way in
    /// `cond` one row per sample.
    fn run<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        cond: &Condition<B::Value>,
        want: Want,
    ) -> Result<Vec<B::Value>>;

    /// The network on these weights (diffusers' names). Fails naming every tensor that is missing, left over or of a wrong
    /// shape.
    fn new(config: &Self::Config, weights: &Weights) -> Result<Self> {
        let mut loader = Loader::new(weights);
        let net = Self::build(config, &mut loader)?;
        loader.finish()?;
        Ok(net)
    }

    /// Fresh weights (CPU, f32): PyTorch's defaults, with the last layer of every residual branch and of the whole network
    /// at zero, so that training starts from the identity. `draw` gives uniform numbers in [0, 1) by name.
    fn init(config: &Self::Config, draw: &mut Draws) -> Result<Weights> {
        let mut random = Random::new(draw);
        Self::build(config, &mut random)?;
        Ok(random.weights)
    }

    /// Its output `(B, C', H, W)`. Arguments as in [`Architecture::run`].
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, t: &[f64], cond: &Condition<B::Value>) -> Result<B::Value> {
        let mut outputs = b.network(self, x, t, cond, Want::Output)?;
        outputs.pop().ok_or_else(|| Error::Config("the network has no output".into()))
    }

    /// What its encoder sees ([`Want::Maps`]). Arguments as in [`Architecture::run`].
    fn features<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        t: &[f64],
        cond: &Condition<B::Value>,
    ) -> Result<Vec<B::Value>> {
        b.network(self, x, t, cond, Want::Maps)
    }
}

/// What a run is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The network's output, alone.
    Output,
    /// The maps that a critic looks at: the encoder's last of every resolution, finest first, the bottleneck last.
    Maps,
}

/// What a network takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Takes {
    /// Channels of a sample.
    pub channels: usize,
    /// Height and width of a sample, where the configuration states them.
    pub size: Option<[usize; 2]>,
    /// What it can be told, and must be.
    pub told: Condition<Told>,
}

/// What stands for one sample in a way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// A whole number, below this one if there is one.
    Id(Option<usize>),
    /// f32 values of this shape.
    Values(Vec<usize>),
    /// f32 features `(N, C)` of a prompt's tokens, C of them for each; any number of tokens.
    Tokens(usize),
}

/// Tokens of a prompt where nobody says how many: as many as CLIP has places.
const CLIP_TOKENS: usize = 77;

impl Told {
    /// The shape of a batch; of as many tokens as CLIP has places.
    pub fn batch(&self, n: usize) -> Vec<usize> {
        match self {
            Told::Id(_) => vec![n],
            Told::Values(shape) => [&[n], &shape[..]].concat(),
            Told::Tokens(width) => vec![n, CLIP_TOKENS, *width],
        }
    }
}

impl Takes {
    /// Number of classes, "no class" among them; none where there are none, or any number will do.
    pub fn n_classes(&self) -> Option<usize> {
        match self.told.get(Way::Label) {
            Some(Told::Id(n)) => *n,
            _ => None,
        }
    }

    /// Refuses a condition that leaves out what the network must be told, or says what it cannot hear.
    pub fn check<V>(&self, cond: &Condition<V>) -> Result<()> {
        let missing = self.told.iter().find(|(way, _)| cond.get(*way).is_none());
        let unheard = cond.iter().find(|(way, _)| self.told.get(*way).is_none());
        match (missing, unheard) {
            (Some((way, _)), _) => Err(Error::Config(format!("this network needs a {}", name(way)))),
            (None, Some((way, _))) => Err(Error::Config(format!("this network takes no {}", name(way)))),
            (None, None) => Ok(()),
        }
    }

    /// Refuses values of other widths than the network takes; `shapes` of whole batches.
    pub fn check_shapes(&self, shapes: &Condition<Vec<usize>>) -> Result<()> {
        for (way, found) in shapes.iter() {
            let expected = match self.told.get(way) {
                Some(Told::Values(shape)) if found.get(1..) != Some(&shape[..]) => format!("{shape:?}"),
                Some(Told::Tokens(width)) if found.len() != 3 || found[2] != *width => format!("[tokens, {width}]"),
                _ => continue,
            };
            return Err(Error::Config(format!(
                "a {} of shape {:?} a sample, and this network takes {expected}",
                name(way),
                found.get(1..).unwrap_or(&[])
            )));
        }
        Ok(())
    }
}

fn name(way: Way) -> &'static str {
    match way {
        Way::Label => "class label",
        Way::Text => "text",
        Way::Vector => "vector",
        Way::Map => "map",
    }
}
