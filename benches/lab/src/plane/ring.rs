//! The whole method on six modes in a ring, the same with one part taken away, and a copy in its place: a small network
//! as generator, and a small network as fake score, which learns while the generator moves. The real score is exact.
//! The generator begins on one mode, as if it had lost the others.

use super::mixture::Mixture;
use super::mlp::{Mlp, WIDTH};
use super::{Point, T_RANGE, descend, noise_levels, noised, to_points, to_tensor};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use dmd::loss::{denoising, distribution_matching, fake_score_weight, l2};
use dmd::optim::{AdamW, Decay, Optimizer, rate_at};
use dmd::random::{Purpose, Random};
use dmd_models::{NoiseLevels, Prediction};

/// What is left of the method.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Method {
    /// Whether the two scores are compared at all. Without, the regression is left: the generator copies the teacher's
    /// sample of each noise.
    pub matching: bool,
    /// Whether there is a fake score. Without one the sample itself takes its place: the gradient is the real score's
    /// alone, as in score distillation (Poole et al. 2022, DreamFusion, equation 3).
    pub fake_score: bool,
    /// Whether noise of all levels is injected, or only that of the lowest, a tenth of a mode's spread.
    pub noise_injection: bool,
    /// Weight of the regression on noise–image pairs.
    pub regression: f64,
    /// Width of the generator's hidden layers.
    pub width: usize,
}

impl Method {
    /// All of distribution matching.
    pub const WHOLE: Method =
        Method { matching: true, fake_score: true, noise_injection: true, regression: 0.0, width: WIDTH };
    /// The regression alone.
    pub const COPY: Method = Method { matching: false, fake_score: false, regression: 1.0, ..Method::WHOLE };
}

/// What a trained generator does.
pub struct Trained {
    /// Its samples.
    pub samples: Vec<Point>,
    /// Root mean square distance between its sample of a noise and the teacher's of the same noise.
    pub pair_distance: f64,
}

const BATCH: usize = 256;
/// Updates of the fake score per update of the generator.
const RATIO: u64 = 5;
/// Updates of the fake score before the first of the generator: an exact teacher has no weights to begin from.
const HEAD_START: u64 = 200;
const GENERATOR_RATE: f64 = 2e-3;
const FAKE_RATE: f64 = 4e-3;
const OPTIMIZER: AdamW = AdamW { betas: [0.0, 0.99], weight_decay: 0.0, eps: 1e-8, clip: 10.0 };
/// Noise–image pairs of the regression, and Heun steps that make them.
const PAIRS: usize = 2048;
const ODE_STEPS: usize = 32;

/// Trains for `n_steps` updates of the generator, and samples `n` points.
pub fn train(method: Method, random: &Random, n_steps: u64, n: usize) -> Result<Trained> {
    let teacher = Mixture::ring();
    let generator = Generator::on_mode(&teacher, method.width, random)?;
    let fake_score = FakeScore::new(&teacher, random)?;
    let levels = noise_levels()?;
    let range = |[low, high]: [f64; 2]| if method.noise_injection { levels.index_range(low, high) } else { [0, 0] };
    let draw = |purpose, step, range| -> Vec<f64> {
        random.indices(purpose, step, BATCH, range).into_iter().map(|i| levels.sigma(i)).collect()
    };
    let normal = |purpose, step| random.normal(purpose, step, &[BATCH, 2, 1, 1]);

    let mut generator_optimizer = Optimizer::new(&generator.network.vars(), OPTIMIZER)?;
    let mut fake_optimizer = Optimizer::new(&fake_score.network.vars(), OPTIMIZER)?;
    let mut update_fake_score = |turn: u64| -> Result<()> {
        let x = generator.still(&normal(Purpose::CriticNoise, turn)?)?;
        let sigma = draw(Purpose::CriticLevel, turn, range([0.0, 1.0]));
        let denoised = fake_score.denoise(&noised(&x, &sigma, &normal(Purpose::CriticEps, turn)?)?, &sigma, true)?;
        let weights: Vec<f64> = sigma.iter().map(|&s| fake_score_weight(s, teacher.sigma_data())).collect();
        let loss = denoising(&denoised, &x, &weights)?;
        descend(&mut fake_optimizer, "loss_fake", &loss, FAKE_RATE)
    };
    let pairs = if method.regression > 0.0 { Some(Pairs::new(&teacher, random, PAIRS)?) } else { None };

    if method.fake_score {
        (0..HEAD_START).try_for_each(&mut update_fake_score)?;
    }
    for step in 0..n_steps {
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        if method.matching {
            let x = generator.generate(&normal(Purpose::GeneratorNoise, step)?)?;
            let sigma = draw(Purpose::GeneratorLevel, step, range(T_RANGE));
            // Stop: the scores judge the sample, no gradient passes through them.
            let x_t = noised(&x.detach(), &sigma, &normal(Purpose::GeneratorEps, step)?)?;
            let x0_real = denoise_all(&teacher, &x_t, &sigma)?;
            let x0_fake = if method.fake_score { fake_score.denoise(&x_t, &sigma, false)? } else { x.detach() };
            loss = distribution_matching(&x, &x0_real, &x0_fake, None, 0.0)?.loss;
        }
        if let Some(pairs) = &pairs {
            let [noise, images] = pairs.batch(random, step)?;
            loss = (loss + (l2(&generator.generate(&noise)?, &images)? * method.regression)?)?;
        }
        let rate = rate_at(GENERATOR_RATE, Decay::Cosine, 0, step, n_steps);
        descend(&mut generator_optimizer, "loss", &loss, rate)?;
        if method.fake_score {
            let first = HEAD_START + step * RATIO;
            (first..first + RATIO).try_for_each(&mut update_fake_score)?;
        }
    }

    let samples = generator.still(&random.normal(Purpose::AblationNoise, 0, &[n, 2, 1, 1])?)?;
    let unseen = Pairs::new(&teacher, &Random { seed: random.seed ^ UNSEEN, device: Device::Cpu }, 512)?;
    let error = l2(&generator.still(&unseen.noise)?, &unseen.images)?.to_scalar::<f32>()?;
    // The mean is over both coordinates.
    Ok(Trained { samples: to_points(&samples)?, pair_distance: f64::from(2.0 * error).sqrt() })
}

/// Pairs that the distance is measured on come from another seed than those that are learnt.
const UNSEEN: u64 = 1 << 40;

/// G(z) = middle + spread·z + F(z), with F = 0 to begin with.
struct Generator {
    network: Mlp,
    middle: Tensor,
    spread: f64,
}

impl Generator {
    /// One that makes the first mode of the teacher, as if the others had been lost.
    fn on_mode(teacher: &Mixture, width: usize, random: &Random) -> Result<Self> {
        let middle = to_tensor(&teacher.means[..1])?;
        Ok(Generator { network: Mlp::new(2, width, 2, random, 0)?, middle, spread: teacher.spread })
    }

    fn generate(&self, noise: &Tensor) -> Result<Tensor> {
        self.with(noise, self.network.forward(&noise.flatten_from(1)?)?)
    }

    fn still(&self, noise: &Tensor) -> Result<Tensor> {
        self.with(noise, self.network.still(&noise.flatten_from(1)?)?)
    }

    fn with(&self, noise: &Tensor, f: Tensor) -> Result<Tensor> {
        Ok(((noise * self.spread)?.broadcast_add(&self.middle)? + f.reshape(noise.shape())?)?)
    }
}

/// A network in Karras' preconditioning.
struct FakeScore {
    network: Mlp,
    prediction: Prediction,
    levels: NoiseLevels,
}

impl FakeScore {
    fn new(teacher: &Mixture, random: &Random) -> Result<Self> {
        let prediction = Prediction::Edm { sigma_data: teacher.sigma_data(), negative: false };
        Ok(FakeScore { network: Mlp::new(2 + TIME, WIDTH, 2, random, 1)?, prediction, levels: noise_levels()? })
    }

    /// x `(n, 2, 1, 1)` to x0 of the same shape, with the network's gradient where it is asked for.
    fn denoise(&self, x: &Tensor, sigma: &[f64], gradient: bool) -> Result<Tensor> {
        let n = sigma.len();
        let all: Vec<_> = sigma.iter().map(|&s| self.prediction.coefficients(s, &self.levels)).collect();
        let column = |values: Vec<f32>| Tensor::from_vec(values, (n, 1), &Device::Cpu);
        let c_in = column(all.iter().map(|c| c.c_in as f32).collect())?;
        let c_out = column(all.iter().map(|c| c.c_out as f32).collect())?;
        let c_skip = column(all.iter().map(|c| c.c_skip as f32).collect())?;
        let time: Vec<f32> = all.iter().flat_map(|c| time_features(c.c_noise)).collect();
        let time = Tensor::from_vec(time, (n, TIME), &Device::Cpu)?;
        let flat = x.flatten_from(1)?;
        let input = Tensor::cat(&[flat.broadcast_mul(&c_in)?, time], 1)?;
        let f = if gradient { self.network.forward(&input)? } else { self.network.still(&input)? };
        Ok((flat.broadcast_mul(&c_skip)? + f.broadcast_mul(&c_out)?)?.reshape(x.shape())?)
    }
}

/// Numbers that tell the network the noise level.
const TIME: usize = 5;

fn time_features(c: f64) -> [f32; TIME] {
    [c, (2.0 * c).sin(), (2.0 * c).cos(), (4.0 * c).sin(), (4.0 * c).cos()].map(|v| v as f32)
}

/// The teacher's x0 of every sample.
pub(super) fn denoise_all(teacher: &Mixture, x_t: &Tensor, sigma: &[f64]) -> Result<Tensor> {
    let points = to_points(x_t)?;
    to_tensor(&points.iter().zip(sigma).map(|(&x, &s)| teacher.denoise(x, s)).collect::<Vec<_>>())
}

/// Noises, and what the teacher's ODE makes of them, both `(n, 2, 1, 1)`.
pub(super) struct Pairs {
    noise: Tensor,
    images: Tensor,
}

impl Pairs {
    pub(super) fn new(teacher: &Mixture, random: &Random, n: usize) -> Result<Self> {
        let noise = random.normal(Purpose::AblationPairs, 0, &[n, 2, 1, 1])?;
        let images: Vec<Point> =
            to_points(&noise)?.into_iter().map(|z| teacher.follow_ode(z, ODE_STEPS)).collect::<Result<_>>()?;
        Ok(Pairs { noise, images: to_tensor(&images)? })
    }

    /// A batch of them.
    pub(super) fn batch(&self, random: &Random, step: u64) -> Result<[Tensor; 2]> {
        let rows = random.stream(Purpose::Batch, step).below(BATCH, self.noise.dim(0)? as u32);
        let rows = Tensor::from_vec(rows, BATCH, &Device::Cpu)?;
        Ok([self.noise.index_select(&rows, 0)?, self.images.index_select(&rows, 0)?])
    }
}
