//! Why the fake score gets several updates for each of the generator's (Yin et al. 2024, DMD2, section 4.2): Gaussian
//! data, an affine generator x = a + b·z, and a fake score that is learned, affine at each of a few noise levels, which
//! is all that it takes to be right. Only its lag behind the generator is left to see.

use super::{descend, noised};
use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use dmd::loss::{denoising, distribution_matching, fake_score_weight};
use dmd::optim::{AdamW, Optimizer};
use dmd::random::{Purpose, Random};
use dmd_models::{NoiseLevels, Prediction};
use std::collections::BTreeMap;

/// Mean and standard deviation of the data.
pub const TARGET: [f64; 2] = [0.3, 0.5];
/// a and b to begin with.
pub const START: [f64; 2] = [-0.8, 0.2];
const SHAPE: [usize; 4] = [32, 1, 8, 8];
const LEVELS: usize = 20;

/// How the two networks take turns.
#[derive(Clone, Copy, Debug)]
pub struct Turns {
    /// Updates of the fake score per update of the generator.
    pub ratio: u64,
    /// The generator's rate.
    pub rate: f64,
    /// The fake score's rate.
    pub fake_rate: f64,
}

/// The generator's (a, b) after every one of `n_steps` updates.
pub fn train(turns: Turns, random: &Random, n_steps: u64) -> Result<Vec<[f64; 2]>> {
    let levels = NoiseLevels::karras(LEVELS, 0.002, 80.0, 7.0)?;
    let one = |value: f64| Var::from_tensor(&Tensor::full(value as f32, (1, 1, 1, 1), &Device::Cpu)?);
    let (a, b) = (one(START[0])?, one(START[1])?);
    let generate = |z: &Tensor| -> Result<Tensor> { Ok(z.broadcast_mul(&b)?.broadcast_add(&a)?) };
    let critic = Critic::new(&levels)?;
    let settings = AdamW { betas: [0.0, 0.999], weight_decay: 0.0, eps: 1e-8, clip: f64::INFINITY };
    let vars = BTreeMap::from([("a".to_string(), a.clone()), ("b".to_string(), b.clone())]);
    let mut optimizer = Optimizer::new(&vars, settings)?;
    let mut critic_optimizer = Optimizer::new(&critic.vars(), settings)?;
    let draw = |purpose, step| random.indices(purpose, step, SHAPE[0], [0, LEVELS - 1]);
    let sigma = |indices: &[usize]| -> Vec<f64> { indices.iter().map(|&i| levels.sigma(i)).collect() };

    let mut path = Vec::new();
    for step in 0..n_steps {
        let x = generate(&random.normal(Purpose::GeneratorNoise, step, &SHAPE)?)?;
        let at = draw(Purpose::GeneratorLevel, step);
        let x_t = noised(&x.detach(), &sigma(&at), &random.normal(Purpose::GeneratorEps, step, &SHAPE)?)?;
        let x0_real = gaussian_denoiser(&x_t, &sigma(&at))?;
        let matching = distribution_matching(&x, &x0_real, &critic.denoise(&x_t, &at)?, None, 0.0)?;
        descend(&mut optimizer, "loss_dm", &matching.loss, turns.rate)?;
        for turn in step * turns.ratio..(step + 1) * turns.ratio {
            let x = generate(&random.normal(Purpose::CriticNoise, turn, &SHAPE)?)?.detach();
            let at = draw(Purpose::CriticLevel, turn);
            let x_t = noised(&x, &sigma(&at), &random.normal(Purpose::CriticEps, turn, &SHAPE)?)?;
            let weights: Vec<f64> = sigma(&at).into_iter().map(|s| fake_score_weight(s, TARGET[1])).collect();
            let loss = denoising(&critic.denoise(&x_t, &at)?, &x, &weights)?;
            descend(&mut critic_optimizer, "loss_fake", &loss, turns.fake_rate)?;
        }
        let number = |var: &Var| -> Result<f64> { Ok(f64::from(var.flatten_all()?.to_vec1::<f32>()?[0])) };
        path.push([number(&a)?, number(&b)?]);
    }
    Ok(path)
}

/// The largest distance of a or b from where they should be.
pub fn largest_error(path: &[[f64; 2]]) -> f64 {
    path.iter().flat_map(|v| [0, 1].map(|i| (v[i] - TARGET[i]).abs())).fold(0.0, f64::max)
}

/// (s²·x + sigma²·m)/(s² + sigma²).
fn gaussian_denoiser(x: &Tensor, sigma: &[f64]) -> Result<Tensor> {
    let [m, s] = TARGET;
    let total = |sigma: f64| s * s + sigma * sigma;
    let slope = per_sample(sigma.iter().map(|&v| s * s / total(v)))?;
    let intercept = per_sample(sigma.iter().map(|&v| v * v * m / total(v)))?;
    Ok(x.broadcast_mul(&slope)?.broadcast_add(&intercept)?)
}

fn per_sample(values: impl Iterator<Item = f64>) -> Result<Tensor> {
    Ok(Tensor::from_iter(values.map(|v| v as f32), &Device::Cpu)?.reshape(((), 1, 1, 1))?)
}

/// F = intercept + slope·(c_in·x), two numbers a noise level, in Karras' preconditioning; it begins at zero.
struct Critic {
    intercepts: Var,
    slopes: Var,
    levels: NoiseLevels,
}

impl Critic {
    fn new(levels: &NoiseLevels) -> Result<Self> {
        let zeros = || Var::zeros(levels.len(), candle_core::DType::F32, &Device::Cpu);
        Ok(Critic { intercepts: zeros()?, slopes: zeros()?, levels: levels.clone() })
    }

    /// `at`: each sample's noise level, by index.
    fn denoise(&self, x: &Tensor, at: &[usize]) -> Result<Tensor> {
        let prediction = Prediction::Edm { sigma_data: TARGET[1], negative: false };
        let all: Vec<_> = at.iter().map(|&i| prediction.coefficients(self.levels.sigma(i), &self.levels)).collect();
        let indices = Tensor::from_iter(at.iter().map(|&i| i as u32), &Device::Cpu)?;
        let of = |var: &Var| var.index_select(&indices, 0)?.reshape((at.len(), 1, 1, 1));
        let scaled = x.broadcast_mul(&per_sample(all.iter().map(|c| c.c_in))?)?;
        let f = scaled.broadcast_mul(&of(&self.slopes)?)?.broadcast_add(&of(&self.intercepts)?)?;
        let skip = x.broadcast_mul(&per_sample(all.iter().map(|c| c.c_skip))?)?;
        Ok((skip + f.broadcast_mul(&per_sample(all.iter().map(|c| c.c_out))?)?)?)
    }

    fn vars(&self) -> BTreeMap<String, Var> {
        BTreeMap::from([("intercepts".into(), self.intercepts.clone()), ("slopes".into(), self.slopes.clone())])
    }
}
