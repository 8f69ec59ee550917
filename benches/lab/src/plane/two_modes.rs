//! Which divergence to choose: a generator that can only make Gaussians, before data of two modes, beginning on one of
//! them. It cannot match the data, so that what it does instead is the divergence's choice. Everything but the generator
//! is exact: the real score, the fake score, and the density ratio between the noised data and its noised samples.

use super::gaussian::Gaussian;
use super::mixture::Mixture;
use super::ring::{Pairs, denoise_all};
use super::{Point, T_RANGE, descend, noise_levels, noised, to_points, to_tensor};
use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use dmd::loss::{Divergence, RatioBins, density_ratio, distribution_matching, l2};
use dmd::optim::{AdamW, Decay, Optimizer, rate_at};
use dmd::random::{Purpose, Random};
use std::collections::BTreeMap;

const BATCH: usize = 256;
const RATE: f64 = 1e-2;
const OPTIMIZER: AdamW = AdamW { betas: [0.9, 0.99], weight_decay: 0.0, eps: 1e-8, clip: 10.0 };
/// Ranges of noise levels with a mean ratio of their own, as in the trainer.
const BINS: usize = 10;
const PAIRS: usize = 1024;

/// Trains for `n_steps` updates and samples `n` points. `regression`: weight of the term on noise–image pairs.
pub fn train(divergence: Divergence, regression: f64, random: &Random, n_steps: u64, n: usize) -> Result<Vec<Point>> {
    let teacher = Mixture::two_modes();
    let levels = noise_levels()?;
    let range = levels.index_range(T_RANGE[0], T_RANGE[1]);
    let generator = Generator::on_mode(&teacher, 0)?;
    let mut optimizer = Optimizer::new(&generator.vars(), OPTIMIZER)?;
    let mut bins = RatioBins::new(BINS, 0.0);
    let pairs = if regression > 0.0 { Some(Pairs::new(&teacher, random, PAIRS)?) } else { None };
    for step in 0..n_steps {
        let x = generator.generate(&random.normal(Purpose::GeneratorNoise, step, &[BATCH, 2, 1, 1])?)?;
        let indices = random.indices(Purpose::GeneratorLevel, step, BATCH, range);
        let sigma: Vec<f64> = indices.iter().map(|&i| levels.sigma(i)).collect();
        let x_t = noised(&x.detach(), &sigma, &random.normal(Purpose::GeneratorEps, step, &[BATCH, 2, 1, 1])?)?;

        let fake = generator.distribution()?;
        let points = to_points(&x_t)?;
        let each = || points.iter().copied().zip(sigma.iter().copied());
        let x0_fake = to_tensor(&each().map(|(x, s)| fake.denoise(x, s)).collect::<Vec<_>>())?;
        let logit = |(x, s)| teacher.log_density(x, s) - fake.log_density(x, s);
        let ratios: Vec<f64> = each().map(logit).map(density_ratio).collect();
        let place = |&i: &usize| (i - range[0]) as f64 / (range[1] - range[0]) as f64;
        let h = bins.weights(divergence, &ratios, &indices.iter().map(place).collect::<Vec<_>>());

        let x0_real = denoise_all(&teacher, &x_t, &sigma)?;
        let mut loss = distribution_matching(&x, &x0_real, &x0_fake, Some(&h), 0.0)?.loss;
        if let Some(pairs) = &pairs {
            let [noise, images] = pairs.batch(random, step)?;
            loss = (loss + (l2(&generator.generate(&noise)?, &images)? * regression)?)?;
        }
        descend(&mut optimizer, "loss", &loss, rate_at(RATE, Decay::Cosine, 0, step, n_steps))?;
    }
    to_points(&generator.generate(&random.normal(Purpose::AblationNoise, 0, &[n, 2, 1, 1])?)?)
}

/// x = mean + z·factor, the factor `(2, 2)`, the mean `(1, 2)`.
struct Generator {
    mean: Var,
    factor: Var,
}

impl Generator {
    /// One that makes a mode of the teacher.
    fn on_mode(teacher: &Mixture, mode: usize) -> Result<Self> {
        let s = teacher.spread as f32;
        let mean = teacher.means[mode].map(|v| v as f32);
        Ok(Generator {
            mean: Var::from_tensor(&Tensor::new(&[mean], &Device::Cpu)?)?,
            factor: Var::from_tensor(&Tensor::new(&[[s, 0.0], [0.0, s]], &Device::Cpu)?)?,
        })
    }

    fn generate(&self, noise: &Tensor) -> Result<Tensor> {
        let x = noise.flatten_from(1)?.matmul(&self.factor)?.broadcast_add(&self.mean)?;
        Ok(x.reshape(noise.shape())?)
    }

    fn distribution(&self) -> Result<Gaussian> {
        let mean: Vec<Vec<f32>> = self.mean.to_vec2()?;
        let factor: Vec<Vec<f32>> = self.factor.to_vec2()?;
        // A row of noise is multiplied from the left: the map is the transpose.
        let map = [0, 1].map(|i| [0, 1].map(|j| f64::from(factor[j][i])));
        Ok(Gaussian::of_map([0, 1].map(|i| f64::from(mean[0][i])), map))
    }

    fn vars(&self) -> BTreeMap<String, Var> {
        BTreeMap::from([("mean".into(), self.mean.clone()), ("factor".into(), self.factor.clone())])
    }
}
