//! The losses and guidance against closed forms, in f64: Gaussian pictures and a student x = a + b·z, whose scores are
//! known whatever the noise (reference/distillation.md, 6.2 and 7.1 to 7.7).

use candle_core::cpu::erf::{erf_f64, erf_inv};
use candle_core::{DType, Device, Tensor, Var};
use dmd::config::CriticWeight;
use dmd::loss::{Divergence, Matching, denoising, density_ratio, distribution_matching};
use dmd::random::{Purpose, Random};
use dmd_models::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use dmd_models::noise_levels::Betas;
use dmd_models::ops::{Mask, Patches, Rotary, TokenAt};
use dmd_models::{
    Activation, Architecture, Axis, Backend, Condition, Denoiser, ModelFolder, NoiseLevels, Prediction, Result, Want,
    Way,
};
use std::f64::consts::{FRAC_1_SQRT_2, PI, SQRT_2, TAU};
use std::path::Path;

const CPU: Device = Device::Cpu;
/// What the loss adds to its normaliser.
const EPS: f64 = 1e-6;

/// N(mean, spread²), and as a student what x = mean + spread·z makes.
#[derive(Clone, Copy, Debug)]
struct Gaussian {
    mean: f64,
    spread: f64,
}

/// The example of the reference: m 0.3, s 0.5; a −0.2, b 0.8.
const REAL: Gaussian = Gaussian { mean: 0.3, spread: 0.5 };
const STUDENT: Gaussian = Gaussian { mean: -0.2, spread: 0.8 };

impl Gaussian {
    /// s² + sigma².
    fn total(self, sigma: f64) -> f64 {
        self.spread * self.spread + sigma * sigma
    }

    /// (s²·x + sigma²·m)/(s² + sigma²).
    fn denoise(self, x: f64, sigma: f64) -> f64 {
        (self.spread * self.spread * x + sigma * sigma * self.mean) / self.total(sigma)
    }

    fn log_density(self, x: f64, sigma: f64) -> f64 {
        -0.5 * (x - self.mean).powi(2) / self.total(sigma) - 0.5 * (TAU * self.total(sigma)).ln()
    }
}

/// z and eps whose means are 0, squares 1 and product 0, exactly: expectations of quadratics are then no estimates.
fn draws(n: usize) -> [Vec<f64>; 2] {
    let random = Random { seed: 5, device: CPU };
    let mirrored = |purpose, signs: [f64; 4]| -> Vec<f64> {
        let values: Vec<f64> = random.stream(purpose, 0).normal(n / 4).into_iter().map(f64::from).collect();
        let rms = (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt();
        signs.iter().flat_map(|sign| values.iter().map(move |v| sign * v / rms)).collect()
    };
    [mirrored(Purpose::GeneratorNoise, [1.0, -1.0, 1.0, -1.0]), mirrored(Purpose::GeneratorEps, [1.0, 1.0, -1.0, -1.0])]
}

/// A unit normal in n cells of equal probability, each by its mean: sums over them are integrals, without an error
/// wherever a function is straight within the cell.
fn cells(n: usize) -> Vec<f64> {
    let edge = |i: usize| SQRT_2 * erf_inv(2.0 * i as f64 / n as f64 - 1.0);
    let density = |u: f64| (-0.5 * u * u).exp() / TAU.sqrt();
    (0..n).map(|i| n as f64 * (density(edge(i)) - density(edge(i + 1)))).collect()
}

/// The cells along one direction of the plane of (z, eps).
fn along([z, eps]: [f64; 2], n: usize) -> [Vec<f64>; 2] {
    let length = z.hypot(eps);
    [z, eps].map(|part| cells(n).into_iter().map(|u| u * part / length).collect())
}

fn map(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

/// One row a sample.
fn tensor(values: &[f64], rows: usize) -> Tensor {
    Tensor::from_slice(values, (rows, 1, 1, values.len() / rows), &CPU).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn number(tensor: &Tensor) -> f64 {
    numbers(tensor)[0]
}

/// The loss, and its gradient for x.
fn matching(x: &Tensor, real: &Tensor, fake: &Tensor, h: Option<&[f64]>) -> (Matching, Vec<f64>) {
    let x = Var::from_tensor(x).unwrap();
    let matching = distribution_matching(&x, real, fake, h, 0.0).unwrap();
    let grads = matching.loss.backward().unwrap();
    let gradient = numbers(grads.get(&x).unwrap());
    (matching, gradient)
}

/// The same for one sample of the student at one noise level.
fn of_student(student: Gaussian, sigma: f64, [z, eps]: &[Vec<f64>; 2]) -> (Matching, Vec<f64>) {
    let x: Vec<f64> = z.iter().map(|z| student.mean + student.spread * z).collect();
    let x_t = map(&x, eps, |x, eps| x + sigma * eps);
    let of = |gaussian: Gaussian| tensor(&x_t.iter().map(|x| gaussian.denoise(*x, sigma)).collect::<Vec<_>>(), 1);
    matching(&tensor(&x, 1), &of(REAL), &of(student), None)
}

/// 7.1: gradients −0.4 and 0.152195122 before the normaliser, σ² times those of KL(N(a, T) ‖ N(m, S)).
#[test]
fn the_gradient_is_that_of_the_divergence_between_gaussians() {
    let noises = draws(4096);
    let (matching, gradient) = of_student(STUDENT, 1.0, &noises);
    let normaliser = number(&matching.real_error) + EPS;
    let to_a = gradient.iter().sum::<f64>() * normaliser;
    let to_b = map(&gradient, &noises[0], |g, z| g * z).iter().sum::<f64>() * normaliser;
    assert!((to_a + 0.4).abs() < 1e-12, "{to_a}");
    assert!((to_b - 0.152_195_122).abs() < 1e-9, "{to_b}");
    let [s, t] = [REAL, STUDENT].map(|gaussian| gaussian.total(1.0));
    assert!((to_b - 0.8 * (1.0 / s - 1.0 / t)).abs() < 1e-12, "{to_b}");
}

/// 7.2: |x − x0_real| is a folded normal, whose mean is 0.6274691445 here, and the gradient is over it.
#[test]
fn the_normaliser_is_the_mean_of_a_folded_normal() {
    let (s, t) = (REAL.spread, REAL.total(1.0));
    // x − x0_real = (σ²(x − m) − s²σ·eps)/S: the direction of the plane that it goes along.
    let (matching, gradient) = of_student(STUDENT, 1.0, &along([STUDENT.spread, -s * s], 20_000));
    let (shift, variance) = ((STUDENT.mean - REAL.mean) / t, (STUDENT.spread.powi(2) + s.powi(4)) / (t * t));
    let expected = (2.0 * variance / PI).sqrt() * (-shift * shift / (2.0 * variance)).exp()
        + shift * erf_f64(shift / (2.0 * variance).sqrt());
    let found = number(&matching.real_error);
    assert!((expected - 0.627_469_144_5).abs() < 1e-10, "{expected}");
    assert!((found - expected).abs() < 1e-9, "{found} for {expected}");
    let to_a = gradient.iter().sum::<f64>();
    assert!((to_a + 0.4 / (expected + EPS)).abs() < 1e-9, "{to_a}");
}

/// 7.1: descent ends at a = m, b = ±s, where no sample has a gradient; 7.2: the normaliser there is √(2/π)·sσ/√S.
#[test]
fn descent_ends_where_no_sample_has_a_gradient() {
    for (sigma, spread, end) in [(1.0, 0.8, 0.5), (1.0, -0.8, -0.5), (0.3, 0.8, 0.5)] {
        let (noises, mut student) = (draws(256), Gaussian { spread, ..STUDENT });
        for _ in 0..400 {
            let (_, gradient) = of_student(student, sigma, &noises);
            student.mean -= 0.3 * gradient.iter().sum::<f64>();
            student.spread -= 0.3 * map(&gradient, &noises[0], |g, z| g * z).iter().sum::<f64>();
        }
        assert!((student.mean - 0.3).abs() < 1e-14 && (student.spread - end).abs() < 1e-14, "{student:?}");
        let (matching, gradient) = of_student(student, sigma, &noises);
        // Of one value of the sample: the loss's mean divides by their number.
        let largest = gradient.iter().fold(0.0, |largest: f64, g| largest.max((g * 256.0).abs()));
        assert!(largest < 1e-14 && number(&matching.score_gap) < 1e-14, "{largest}");
    }
    for (spread, sigma) in [(0.5, 0.1), (-0.5, 1.0), (0.5, 20.0)] {
        let noises = along([sigma * spread, -REAL.spread.powi(2)], 2000);
        let (matching, _) = of_student(Gaussian { spread, ..REAL }, sigma, &noises);
        let expected = (2.0 / PI).sqrt() * REAL.spread * sigma / REAL.total(sigma).sqrt();
        assert!((number(&matching.real_error) / expected - 1.0).abs() < 1e-9, "sigma {sigma}");
        assert_eq!((number(&matching.score_gap), number(&matching.loss)), (0.0, 0.0), "sigma {sigma}");
    }
}

/// One noise level of a linear schedule: ᾱ and the sigma that it is.
struct Level {
    alpha: f64,
    sigma: f64,
}

fn linear() -> NoiseLevels {
    NoiseLevels::variance_preserving(&Betas::Linear, 1000, [1e-4, 0.02], false).unwrap()
}

/// ᾱ 0.5, and four levels of the schedule.
fn some_levels() -> Vec<Level> {
    let sigmas = [20, 399, 440, 999].map(|t| linear().sigma(t));
    let level = |sigma: f64| Level { alpha: 1.0 / (1.0 + sigma * sigma), sigma };
    std::iter::once(1.0).chain(sigmas).map(level).collect()
}

/// A batch of one sample a level: x, and one draw of noise for all.
fn batch(levels: &[Level]) -> [Vec<f64>; 2] {
    let [z, eps] = draws(16);
    let x: Vec<f64> = z.iter().map(|z| STUDENT.mean + STUDENT.spread * z).collect();
    [x, eps].map(|values| values.repeat(levels.len()))
}

/// What `f` makes of every level's x and eps.
fn per_level(levels: &[Level], [x, eps]: &[Vec<f64>; 2], f: impl Fn(&Level, f64, f64) -> f64) -> Tensor {
    let n = x.len() / levels.len();
    let value = |i: usize| f(&levels[i / n], x[i], eps[i]);
    tensor(&(0..x.len()).map(value).collect::<Vec<_>>(), levels.len())
}

/// 7.2: w_t·α_t·(s_fake − s_real) with the weight (σ_t²/α_t)·P/‖x − x0_real‖₁ (Yin et al. 2024, DMD, equations 7 and 8)
/// is α_t times the gradient here, in the form of their algorithm 2.
#[test]
fn the_papers_equations_are_alpha_times_the_gradient() {
    let levels = some_levels();
    let data = batch(&levels);
    let of = |gaussian: Gaussian| {
        per_level(&levels, &data, move |level, x, eps| gaussian.denoise(x + level.sigma * eps, level.sigma))
    };
    let [real, fake] = [of(REAL), of(STUDENT)];
    let x = tensor(&data[0], levels.len());
    let (matching, gradient) = matching(&x, &real, &fake, None);
    let (n, [real, fake]) = (data[0].len() / levels.len(), [real, fake].map(|x0| numbers(&x0)));
    let mut squares = 0.0;
    for (row, level) in levels.iter().enumerate() {
        let row = row * n..(row + 1) * n;
        let norm: f64 = map(&data[0][row.clone()], &real[row.clone()], |x, real| (x - real).abs()).iter().sum();
        let (alpha, variance) = (level.alpha.sqrt(), 1.0 - level.alpha);
        for i in row {
            let x_t = alpha * data[0][i] + variance.sqrt() * data[1][i];
            let score = |x0: f64| -(x_t - alpha * x0) / variance;
            let weight = variance / alpha * n as f64 / norm;
            let paper = weight * alpha * (score(fake[i]) - score(real[i]));
            let own = gradient[i] * gradient.len() as f64;
            squares += own * own / gradient.len() as f64;
            let ratio = alpha * (1.0 + EPS * n as f64 / norm);
            assert!((paper - ratio * own).abs() < 1e-11 * own.abs().max(1.0), "{paper} for {own} times {ratio}");
        }
    }
    assert!((number(&matching.loss) / (0.5 * squares) - 1.0).abs() < 1e-12);
}

/// 7.3: teachers that speak of epsilon or v at √ᾱ·x + √(1 − ᾱ)·eps, through the preconditioning of this crate, and one
/// that denoises x + sigma·eps pull alike, from the same draw.
#[test]
fn variance_preserving_and_exploding_scores_pull_alike() {
    let (levels, schedule) = (some_levels(), linear());
    let data = batch(&levels);
    let x = tensor(&data[0], levels.len());
    let of = |f: &dyn Fn(Gaussian, &Level, f64, f64) -> f64| {
        let [real, fake] =
            [REAL, STUDENT].map(|gaussian| per_level(&levels, &data, |level, x, eps| f(gaussian, level, x, eps)));
        matching(&x, &real, &fake, None).1
    };
    let exploding = of(&|gaussian, level, x, eps| gaussian.denoise(x + level.sigma * eps, level.sigma));
    for prediction in [Prediction::Epsilon, Prediction::V] {
        let preserving = of(&|gaussian, level, x, eps| {
            let c = prediction.coefficients(level.sigma, &schedule);
            let (signal, noise) = (level.alpha.sqrt(), (1.0 - level.alpha).sqrt());
            let x_t = signal * x + noise * eps;
            assert!((c.c_in * (x + level.sigma * eps) - x_t).abs() < 1e-12);
            let total = level.alpha * gaussian.spread.powi(2) + 1.0 - level.alpha;
            let epsilon = noise * (x_t - signal * gaussian.mean) / total;
            let x0 = (signal * gaussian.spread.powi(2) * x_t + (1.0 - level.alpha) * gaussian.mean) / total;
            let output = if prediction == Prediction::V { signal * epsilon - noise * x0 } else { epsilon };
            c.c_skip * x_t / c.c_in + c.c_out * output
        });
        for (a, b) in exploding.iter().zip(&preserving) {
            assert!((a - b).abs() < 1e-11 * a.abs().max(1e-3), "{prediction:?}: {a} {b}");
        }
    }
}

/// The critic's loss on one sample, in f32 as its weights are.
fn critic_loss(denoised: &[f64], x: &[f64], weight: f64) -> f64 {
    let single = |values: &[f64]| tensor(values, 1).to_dtype(DType::F32).unwrap();
    number(&denoising(&single(denoised), &single(x), &[weight]).unwrap())
}

/// x, eps and the best that can be made of x + sigma·eps.
fn best(student: Gaussian, sigma: f64) -> [Vec<f64>; 3] {
    let [z, eps] = draws(4096);
    let x: Vec<f64> = z.iter().map(|z| student.mean + student.spread * z).collect();
    let denoised = map(&x, &eps, |x, eps| student.denoise(x + sigma * eps, sigma));
    [x, eps, denoised]
}

/// 7.4: the weight 1/σ² makes the loss the plain one on epsilon, for every denoiser: ᾱ/(1 − ᾱ) times that on x0; its
/// minimum is ᾱb²/(ᾱb² + 1 − ᾱ).
#[test]
fn the_snr_weight_is_the_loss_on_epsilon() {
    for Level { alpha, sigma } in some_levels() {
        let [x, eps, denoised] = best(STUDENT, sigma);
        let weight = CriticWeight::Snr.at(sigma, 0.5);
        assert!((weight * (1.0 - alpha) / alpha - 1.0).abs() < 1e-12);
        for shift in [0.0, 0.1] {
            let denoised: Vec<f64> = denoised.iter().map(|x0| x0 + shift).collect();
            let errors = (0..x.len()).map(|i| (x[i] + sigma * eps[i] - denoised[i]) / sigma - eps[i]);
            let on_epsilon = mean(errors.map(|error| error * error));
            let found = critic_loss(&denoised, &x, weight);
            assert!((found / on_epsilon - 1.0).abs() < 1e-6, "sigma {sigma}: {found} for {on_epsilon}");
        }
        let signal = alpha * STUDENT.spread.powi(2);
        let (found, expected) = (critic_loss(&denoised, &x, weight), signal / (signal + 1.0 - alpha));
        assert!((found / expected - 1.0).abs() < 1e-6, "sigma {sigma}: {found} for {expected}");
    }
}

/// 7.4: weighted 1/σ² + 1/σ_data², the best denoiser's loss is b²(σ² + σ_data²)/(σ_data²·T): exactly 1 at every level for
/// b = σ_data, and 1.000012, 1.029703, 2.5, 3.999531 for b = 1; nothing near it is better.
#[test]
fn the_critics_floor_is_one_where_the_data_are_as_assumed() {
    for (i, sigma) in [0.002, 0.1, 1.0, 80.0].into_iter().enumerate() {
        for (spread, floor) in [(0.5, 1.0), (1.0, [1.000_012, 1.029_703, 2.5, 3.999_531][i])] {
            let student = Gaussian { mean: -0.2, spread };
            let [x, eps, denoised] = best(student, sigma);
            let weight = CriticWeight::Edm.at(sigma, 0.5);
            let found = critic_loss(&denoised, &x, weight);
            assert!((found / floor - 1.0).abs() < 1e-6, "b {spread}, sigma {sigma}: {found} for {floor}");
            let error = spread * sigma / student.total(sigma).sqrt();
            for (slope, intercept) in [(1e-2, 0.0), (-1e-2, 0.0), (0.0, 1e-2), (0.0, -1e-2)] {
                let worse = (0..x.len()).map(|i| {
                    let off = (x[i] + sigma * eps[i] - student.mean) / student.total(sigma).sqrt();
                    denoised[i] + error * (slope * off + intercept)
                });
                let worse = critic_loss(&worse.collect::<Vec<_>>(), &x, weight);
                assert!((worse / found - 1.0 - 1e-4).abs() < 2e-6, "b {spread}, sigma {sigma}: {worse} after {found}");
            }
        }
    }
}

#[test]
fn critic_weights_have_their_values() {
    use CriticWeight::{Edm, Snr, Uniform};
    for (sigma, edm, snr) in
        [(0.002, 250_004.0, 250_000.0), (0.1, 104.0, 100.0), (1.0, 5.0, 1.0), (80.0, 4.000_156_25, 1.562_5e-4)]
    {
        for (weight, expected) in [(Edm, edm), (Snr, snr), (Uniform, 1.0)] {
            assert!((weight.at(sigma, 0.5) / expected - 1.0).abs() < 1e-12, "{weight:?} at {sigma}");
        }
        assert!((Edm.at(sigma, 1.0) - snr - 1.0).abs() < 1e-9 * snr.max(1.0), "{sigma}");
    }
}

/// 7.6: the perfect logit ½·log(T/S) − (x_t − m)²/2S + (x_t − a)²/2T is the ratio of the densities, and with h(r) of it
/// the loss has the gradient of each divergence for the student's mean.
#[test]
fn the_perfect_logit_gives_every_divergence_its_gradient() {
    // So much noise that no ratio that counts is clipped.
    let sigma = 3.0;
    let [s, t] = [REAL, STUDENT].map(|gaussian| gaussian.total(sigma));
    let logit =
        |x: f64| 0.5 * (t / s).ln() - (x - REAL.mean).powi(2) / (2.0 * s) + (x - STUDENT.mean).powi(2) / (2.0 * t);
    for x in [-9.0, -2.0, 0.1, 0.3, 4.0, 9.0] {
        let ratio = (REAL.log_density(x, sigma) - STUDENT.log_density(x, sigma)).exp();
        assert!((density_ratio(logit(x)) / ratio - 1.0).abs() < 1e-12, "at {x}");
    }
    // x_t = a + b·z + sigma·eps goes along this direction.
    let [z, eps] = along([STUDENT.spread, sigma], 20_000);
    let x: Vec<f64> = z.iter().map(|z| STUDENT.mean + STUDENT.spread * z).collect();
    let x_t = map(&x, &eps, |x, eps| x + sigma * eps);
    let single = |values: &[f64]| tensor(values, values.len()).to_dtype(DType::F32).unwrap();
    let of = |gaussian: Gaussian| x_t.iter().map(|x| gaussian.denoise(*x, sigma)).collect::<Vec<_>>();
    let [x, real, fake] = [x.clone(), of(REAL), of(STUDENT)].map(|values| single(&values));
    let normaliser = map(&numbers(&x), &numbers(&real), |x, real| (x - real).abs() + EPS);
    let slope = |divergence: Divergence| {
        let h: Vec<f64> = x_t.iter().map(|x| divergence.h(density_ratio(logit(*x)))).collect();
        let (_, gradient) = matching(&x, &real, &fake, Some(&h));
        map(&gradient, &normaliser, |g, n| g * n).iter().sum::<f64>() / (sigma * sigma)
    };
    let gap = STUDENT.mean - REAL.mean;
    let affinity = (2.0 * (s * t).sqrt() / (s + t)).sqrt() * (-gap * gap / (4.0 * (s + t))).exp();
    let chi = s / (t * (2.0 * s - t)).sqrt() * (gap * gap / (2.0 * s - t)).exp();
    for (divergence, expected) in [
        (Divergence::ReverseKl, gap / s),
        (Divergence::ForwardKl, gap / t),
        (Divergence::Jeffreys, gap / s + gap / t),
        (Divergence::SquaredHellinger, affinity * gap / (2.0 * (s + t))),
        (Divergence::Neyman, chi * gap / (2.0 * s - t)),
    ] {
        let found = slope(divergence);
        assert!((found / expected - 1.0).abs() < 1e-5, "{divergence:?}: {found} for {expected}");
    }
    let sum = slope(Divergence::JensenShannon) + slope(Divergence::SoftenedReverseKl);
    assert!((sum / (gap / s) - 1.0).abs() < 1e-5, "{sum}");
}

/// 6.2, to more digits: Python's `decimal` at 40 digits, `(lo**(1/7) + i/999*(hi**(1/7) - lo**(1/7)))**7` for 0.002 and 80,
/// and √((1 − ᾱ)/ᾱ) of the running products of 1 − β.
#[test]
fn noise_levels_have_the_published_values() {
    let karras = NoiseLevels::karras(1000, 0.002, 80.0, 7.0).unwrap();
    let scaled = NoiseLevels::variance_preserving(&Betas::ScaledLinear, 1000, [0.00085, 0.012], false).unwrap();
    for (table, i, expected) in [
        (&karras, 0, 0.002),
        (&karras, 20, 0.003_231_590_769_82),
        (&karras, 100, 0.016_751_434_645),
        (&karras, 250, 0.170_312_324_876),
        (&karras, 500, 2.526_506_848_44),
        (&karras, 750, 17.617_269_41),
        (&karras, 900, 45.556_014_722_2),
        (&karras, 980, 72.053_898_686_3),
        (&karras, 999, 80.0),
        (&linear(), 399, 2.030_851_235),
        (&linear(), 440, 2.502_325_839),
        (&linear(), 980, 130.143_700_1),
        (&linear(), 999, 157.407_280_8),
        (&scaled, 399, 1.160_578_322),
        (&scaled, 625, 2.501_704_451),
        (&scaled, 980, 13.043_083_19),
        (&scaled, 999, 14.614_641_23),
    ] {
        assert!((table.sigma(i) / expected - 1.0).abs() < 1e-9, "{i}: {} for {expected}", table.sigma(i));
    }
    // 961 indices, both ends among them.
    let random = Random { seed: 2, device: CPU };
    let range = karras.index_range(0.02, 0.98);
    let mut drawn = random.indices(Purpose::GeneratorLevel, 0, 30_000, range);
    drawn.sort_unstable();
    drawn.dedup();
    assert_eq!((range, drawn[0], drawn[drawn.len() - 1], drawn.len()), ([20, 980], 20, 980, 961));
}

/// A backend that takes the network whole: the exact one of Gaussian pictures, each class with its own, in f64.
struct Exact {
    sigma: f64,
    /// By label.
    pictures: [Gaussian; 3],
}

macro_rules! absent {
    ($($name:ident($($argument:ty),*)),* $(,)?) => {
        $(fn $name(&self, $(_: $argument),*) -> Result<Tensor> {
            unreachable!("the network is taken whole")
        })*
    };
}

impl Backend for Exact {
    type Value = Tensor;

    /// F with c_skip·x + c_out·F the best denoiser; x comes in as c_in·x.
    fn network(
        &self,
        _: &impl Architecture,
        x: &Tensor,
        _: &[f64],
        cond: &Condition<Tensor>,
        _: Want,
    ) -> Result<Vec<Tensor>> {
        let labels: Vec<i64> = cond.get(Way::Label).unwrap().to_vec1()?;
        let c = PRECONDITIONING.coefficients(self.sigma, &linear());
        let n = x.elem_count() / labels.len();
        let f = |(i, x): (usize, f64)| {
            let picture = self.pictures[labels[i / n] as usize];
            (picture.denoise(x / c.c_in, self.sigma) - c.c_skip * x / c.c_in) / c.c_out
        };
        let values = numbers(x).into_iter().enumerate().map(f).collect::<Vec<f64>>();
        Ok(vec![tensor(&values, labels.len())])
    }

    fn constant(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }

    fn dims(&self, x: &Tensor) -> Vec<usize> {
        x.dims().to_vec()
    }

    fn affine(&self, x: &Tensor, mul: &[f64], add: f64) -> Result<Tensor> {
        assert_eq!(mul.len(), 1, "one noise level for all");
        Ok(x.affine(mul[0], add)?)
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok((x + y)?)
    }

    absent! {
        conv2d(&Tensor, &Conv2d),
        linear(&Tensor, &Linear),
        group_norm(&Tensor, &GroupNorm, Option<Activation>),
        activation(&Tensor, Activation),
        embedding(&Tensor, &Embedding),
        tokens(&Tensor),
        states(&Tensor),
        token_at(&Tensor, &Tensor, TokenAt),
        sinusoid(&Tensor, &Tensor, bool),
        conv_transpose2d(&Tensor, &ConvTranspose2d),
        layer_norm(&Tensor, &LayerNorm),
        rms_norm(&Tensor, &RmsNorm),
        gated(&Tensor, Activation),
        masked_attention(&Tensor, &Tensor, &Tensor, usize, Mask<&Tensor>),
        rotary(&Tensor, &Rotary),
        mul(&Tensor, &Tensor),
        mul_per_channel(&Tensor, &Tensor),
        add_per_channel(&Tensor, &Tensor),
        modulate(&Tensor, &Tensor, &Tensor),
        columns(&Tensor, usize, usize),
        join(&Tensor, &Tensor, Axis),
        slice(&Tensor, Axis, usize, usize),
        grid(&Tensor, [usize; 2]),
        shuffle(&Tensor, usize, Patches),
        unshuffle(&Tensor, usize, Patches),
        upsample_2x(&Tensor),
        avg_pool_2x(&Tensor),
        pad_right_bottom(&Tensor),
    }
}

/// That of the fixture.
const PRECONDITIONING: Prediction = Prediction::Edm { sigma_data: 0.5, negative: false };

/// A teacher of two classes whose third row is "no class"; `Exact` takes the place of its network.
fn teacher() -> Denoiser {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/edm-tiny");
    let mut teacher = ModelFolder::load(&path, &CPU).unwrap();
    teacher.about.null_class = true;
    let denoiser = teacher.denoiser(&CPU).unwrap();
    assert_eq!(denoiser.prediction, PRECONDITIONING);
    denoiser
}

/// The guided teacher's answer to x, all of the first class.
fn guided(teacher: &Denoiser, exact: &Exact, x: &[f64], scale: f64) -> Vec<f64> {
    let cond = Condition::of_classes([0i64], &CPU).unwrap();
    numbers(&teacher.denoise_guided(exact, &tensor(x, 1), &[exact.sigma], &cond, scale).unwrap())
}

/// Two classes and "no class", as wide as each other.
fn even() -> [Gaussian; 3] {
    [0.4, -0.9, -0.1].map(|mean| Gaussian { mean, spread: 0.5 })
}

/// 7.7: between Gaussians of one width the guided score is that of N(m_u + scale·(m_c − m_u), s²): the class alone at 1,
/// none at 0.
#[test]
fn guidance_shifts_the_mean_between_gaussians_of_one_width() {
    let (teacher, x) = (teacher(), [-3.0, -0.2, 0.0, 0.7, 5.0]);
    for sigma in [0.002, 0.5, 2.5, 80.0] {
        let exact = Exact { sigma, pictures: even() };
        for (scale, mean) in [(0.0, -0.1), (1.0, 0.4), (1.75, 0.775), (3.0, 1.4)] {
            let shifted = Gaussian { mean, spread: 0.5 };
            for (x, found) in x.iter().zip(guided(&teacher, &exact, &x, scale)) {
                assert!((found - shifted.denoise(*x, sigma)).abs() < 1e-12, "sigma {sigma}, scale {scale}: {found}");
            }
        }
    }
}

/// 7.7: so that is where a guided student ends: at the shifted mean, not the class's own.
#[test]
fn a_guided_student_ends_at_the_shifted_mean() {
    let (teacher, [z, eps]) = (teacher(), draws(256));
    for (scale, mean) in [(1.0, 0.4), (1.75, 0.775), (3.0, 1.4)] {
        let mut student = STUDENT;
        for step in 0..600 {
            let sigma = [0.5, 1.0, 3.0][step % 3];
            let x: Vec<f64> = z.iter().map(|z| student.mean + student.spread * z).collect();
            let x_t = map(&x, &eps, |x, eps| x + sigma * eps);
            let real = guided(&teacher, &Exact { sigma, pictures: even() }, &x_t, scale);
            let fake: Vec<f64> = x_t.iter().map(|x| student.denoise(*x, sigma)).collect();
            let (_, gradient) = matching(&tensor(&x, 1), &tensor(&real, 1), &tensor(&fake, 1), None);
            student.mean -= 0.3 * gradient.iter().sum::<f64>();
            student.spread -= 0.3 * map(&gradient, &z, |g, z| g * z).iter().sum::<f64>();
        }
        assert!((student.mean - mean).abs() < 1e-12 && (student.spread - 0.5).abs() < 1e-12, "{scale}: {student:?}");
    }
}

/// 7.7: between Gaussians of different widths the guided score is straight with the slope −[(1 − scale)/S_u + scale/S_c].
#[test]
fn guidance_mixes_precisions_between_gaussians_of_different_widths() {
    let teacher = teacher();
    let mut pictures = even();
    pictures[2].spread = 0.8;
    for sigma in [0.1, 1.0, 20.0] {
        let exact = Exact { sigma, pictures };
        let [of_class, of_none] = [0, 2].map(|i| 1.0 / pictures[i].total(sigma));
        for scale in [0.5, 1.75, 3.0] {
            let x = [-1.0, 0.0, 1.0];
            let x0 = guided(&teacher, &exact, &x, scale);
            let score: Vec<f64> = map(&x, &x0, |x, x0| (x0 - x) / (sigma * sigma));
            let precision = (1.0 - scale) * of_none + scale * of_class;
            for pair in score.windows(2) {
                assert!((pair[0] - pair[1] - precision).abs() < 1e-10 * precision.abs().max(1.0), "{sigma}, {scale}");
            }
            // Its zero is the weighted mean of both.
            let zero = ((1.0 - scale) * of_none * pictures[2].mean + scale * of_class * pictures[0].mean) / precision;
            let at_zero = guided(&teacher, &exact, &[zero], scale)[0];
            assert!((at_zero - zero).abs() < 1e-9 * (sigma * sigma).max(1.0), "{sigma}, {scale}: {at_zero} at {zero}");
        }
    }
}

/// 7.7: before the normaliser, the guided gradient is (x0_fake − x0_cond) − (scale − 1)·(x0_cond − x0_uncond)
/// ("Decoupled DMD", arXiv 2511.22677); scale − 1 is the "extra" scale of other tools.
#[test]
fn the_guided_gradient_falls_apart_into_matching_and_guidance() {
    let (teacher, sigma, scale) = (teacher(), 1.0, 3.5);
    let [z, eps] = draws(64);
    let x: Vec<f64> = z.iter().map(|z| STUDENT.mean + STUDENT.spread * z).collect();
    let x_t = map(&x, &eps, |x, eps| x + sigma * eps);
    let exact = Exact { sigma, pictures: even() };
    let [real, cond, uncond] = [scale, 1.0, 0.0].map(|scale| guided(&teacher, &exact, &x_t, scale));
    let fake: Vec<f64> = x_t.iter().map(|x| STUDENT.denoise(*x, sigma)).collect();
    let (matching, gradient) = matching(&tensor(&x, 1), &tensor(&real, 1), &tensor(&fake, 1), None);
    let normaliser = number(&matching.real_error) + EPS;
    for i in 0..x.len() {
        let found = gradient[i] * x.len() as f64 * normaliser;
        let expected = (fake[i] - cond[i]) - (scale - 1.0) * (cond[i] - uncond[i]);
        assert!((found - expected).abs() < 1e-12, "{found} for {expected}");
    }
}

/// The cells are a unit normal.
#[test]
fn cells_integrate_the_normal() {
    let cells = cells(1000);
    assert!(mean(cells.iter().copied()).abs() < 1e-12);
    // E|u|, with the corner on an edge between cells; and P(u < 1) to a cell.
    assert!((mean(cells.iter().map(|u| u.abs())) - (2.0 / PI).sqrt()).abs() < 1e-12);
    let below = cells.iter().filter(|u| **u < 1.0).count() as f64 / 1000.0;
    assert!((below - 0.5 * (1.0 + erf_f64(FRAC_1_SQRT_2))).abs() < 1.1e-3);
}
