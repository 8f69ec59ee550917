//! The discriminator of the adversarial term: small heads on the maps that the fake score's encoder makes of a noised
//! picture (Yin et al. 2024, DMD2, section 4.3 and appendix: convolutions of stride 2 with group norm and SiLU down to
//! one logit). The encoder is the fake score's own and is trained by both.

use crate::optim::{AdamW, Optimizer};
use crate::random::{Purpose, Random};
use crate::teacher::name_key;
use anyhow::{Result, ensure};
use candle_core::{DType, Tensor, Var};
use dmd_models::backend::Activation;
use dmd_models::layers::{self, Conv2d, GroupNorm, Loader, Scope, Source};
use dmd_models::{Backend, Eager, Weights};
use std::collections::BTreeMap;

/// The heads, with what trains them.
pub struct Discriminator {
    /// With gradient, for its own turn.
    pub heads: Heads,
    /// The same weights outside the autograd graph, for the generator's turn.
    pub heads_still: Heads,
    /// Their weights.
    pub vars: BTreeMap<String, Var>,
    /// Their moments.
    pub optimizer: Optimizer,
}

impl Discriminator {
    /// Fresh heads for maps of these shapes `(C, H, W)`, finest first; the last `n` of them get one each.
    pub fn new(maps: &[[usize; 3]], n: usize, settings: AdamW, random: &Random) -> Result<Self> {
        ensure!(
            n <= maps.len(),
            "loss.gan.resolutions is {n}, the teacher's encoder has {} (its block_out_channels)",
            maps.len()
        );
        let maps = &maps[maps.len() - n..];
        let mut draw = |name: &str, n: usize| random.stream(Purpose::Init, name_key(name)).uniform(n);
        let mut source = layers::Random::new(&mut draw);
        Heads::build(maps, &mut source)?;
        let (view, vars) = source.weights.to(DType::F32, &random.device)?.trainable()?;
        let heads = |weights: &Weights| -> Result<Heads> {
            let mut loader = Loader::new(weights);
            let heads = Heads::build(maps, &mut loader)?;
            loader.finish()?;
            Ok(heads)
        };
        Ok(Discriminator {
            heads: heads(&view)?,
            heads_still: heads(&view.detached())?,
            optimizer: Optimizer::new(&vars, settings)?,
            vars,
        })
    }
}

/// One head per map.
pub struct Heads(Vec<Head>);

struct Head {
    stages: Vec<(Conv2d, GroupNorm)>,
    logit: Conv2d,
}

impl Heads {
    /// Logits `(B,)` of maps `(B, C, H, W)`, finest first: the mean over heads and what is left of positions.
    pub fn logit(&self, maps: &[Tensor]) -> Result<Tensor> {
        let maps = &maps[maps.len() - self.0.len()..];
        let mut sum: Option<Tensor> = None;
        for (head, map) in self.0.iter().zip(maps) {
            let mut h = map.clone();
            for (conv, norm) in &head.stages {
                h = Eager.group_norm(&Eager.conv2d(&h, conv)?, norm, Some(Activation::Silu))?;
            }
            let logit = Eager.conv2d(&h, &head.logit)?.mean((1, 2, 3))?;
            sum = Some(match sum {
                Some(sum) => (sum + logit)?,
                None => logit,
            });
        }
        let sum = sum.expect("there is at least one head: loss.gan.resolutions was checked");
        Ok((sum / self.0.len() as f64)?)
    }

    fn build(maps: &[[usize; 3]], source: &mut dyn Source) -> Result<Self> {
        let mut root = Scope::root(source);
        let mut heads = Vec::new();
        for (i, &[channels, mut height, mut width]) in maps.iter().enumerate() {
            let mut scope = root.at(format!("gan_heads.{i}"));
            let mut stages = Vec::new();
            while height.max(width) > 2 && height.min(width) > 1 {
                let stage = stages.len();
                let mut conv = scope.conv2d(&format!("conv.{stage}"), [channels, channels], 4, 2, false)?;
                conv.padding = 1;
                stages.push((conv, scope.group_norm(&format!("norm.{stage}"), channels, groups(channels), 1e-5)?));
                (height, width) = (height / 2, width / 2);
            }
            heads.push(Head { stages, logit: scope.conv2d("logit", [channels, 1], 1, 1, false)? });
        }
        Ok(Heads(heads))
    }
}

/// The largest number of groups up to 32 that divides the channels.
fn groups(channels: usize) -> usize {
    (1..=channels.min(32)).rev().find(|g| channels.is_multiple_of(*g)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn heads_give_one_logit_a_picture_and_learn() {
        let random = Random { seed: 1, device: Device::Cpu };
        let maps = [[6, 16, 12], [8, 8, 6]];
        let normal = |shape: [usize; 3], step| {
            let [c, h, w] = shape;
            random.normal(Purpose::GeneratorEps, step, &[2, c, h, w]).unwrap()
        };
        let inputs = [normal(maps[0], 0), normal(maps[1], 1)];
        for n in [1, 2] {
            let d = Discriminator::new(&maps, n, AdamW::default(), &random).unwrap();
            let logit = d.heads.logit(&inputs).unwrap();
            assert_eq!(logit.dims(), [2]);
            let grads = logit.sum_all().unwrap().backward().unwrap();
            assert!(d.vars.values().all(|var| grads.get(var).is_some()));
            assert_eq!(
                logit.to_vec1::<f32>().unwrap(),
                d.heads_still.logit(&inputs).unwrap().to_vec1::<f32>().unwrap()
            );
        }
        let error = Discriminator::new(&maps, 3, AdamW::default(), &random).err().unwrap().to_string();
        assert!(error.contains("loss.gan.resolutions is 3, the teacher's encoder has 2"), "{error}");
    }
}
