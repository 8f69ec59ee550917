//! The losses and the optimiser against closed forms: Gaussian data and an affine student, where every score is known
//! (reference/distillation.md, 7.1 to 7.8). And who may learn from whom.

use candle_core::{DType, Device, Tensor, Var};
use dmd::ablate::two_time_scales;
use dmd::config::Config;
use dmd::distill::{Beginning, Networks};
use dmd::loss::{denoising, distribution_matching, fake_score_weight};
use dmd::optim::{AdamW, Optimizer};
use dmd::random::{Purpose, Random};
use dmd_models::{ModelFolder, NoiseLevels};
use std::collections::BTreeMap;
use std::path::Path;

/// What a step's update of the generator draws: Karras indices 20 to 980.
const INDICES: [usize; 2] = [20, 980];
const CPU: Device = Device::Cpu;

/// The exact denoiser of N(mean, spread²) at sigma, (spread²·x_t + sigma²·mean)/(spread² + sigma²); `variance` is sigma².
fn denoise(x_t: &Tensor, mean: &Tensor, spread: &Tensor, variance: &Tensor) -> Tensor {
    let square = spread.sqr().unwrap();
    let top = (x_t.broadcast_mul(&square).unwrap()).broadcast_add(&variance.broadcast_mul(mean).unwrap()).unwrap();
    top.broadcast_div(&square.broadcast_add(variance).unwrap()).unwrap()
}

fn scalar(value: f64) -> Tensor {
    Tensor::full(value as f32, (1, 1, 1, 1), &CPU).unwrap()
}

fn number(tensor: &Tensor) -> f64 {
    f64::from(tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0])
}

/// Draws z and eps whose means are 0, squares 1 and product 0, exactly: expectations of quadratics are then no estimates.
fn draws(n: usize) -> [Tensor; 2] {
    let random = Random { seed: 5, device: CPU };
    let quarter = |purpose| random.stream(purpose, 0).normal(n / 4);
    let (z, eps) = (quarter(Purpose::GeneratorNoise), quarter(Purpose::GeneratorEps));
    let mirrored = |values: &[f32], signs: [f32; 4]| {
        let rms = (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        let values: Vec<f32> =
            signs.iter().flat_map(|s| values.iter().map(move |v| (f64::from(s * v) / rms) as f32)).collect();
        Tensor::from_vec(values, (1, 1, 1, n), &CPU).unwrap()
    };
    [mirrored(&z, [1.0, -1.0, 1.0, -1.0]), mirrored(&eps, [1.0, 1.0, -1.0, -1.0])]
}

struct Student {
    a: Var,
    b: Var,
}

impl Student {
    fn new(a: f64, b: f64) -> Self {
        Student { a: Var::from_tensor(&scalar(a)).unwrap(), b: Var::from_tensor(&scalar(b)).unwrap() }
    }

    /// x = a + b·z.
    fn generate(&self, z: &Tensor) -> Tensor {
        z.broadcast_mul(&self.b).unwrap().broadcast_add(&self.a).unwrap()
    }

    fn vars(&self) -> BTreeMap<String, Var> {
        BTreeMap::from([("a".into(), self.a.clone()), ("b".into(), self.b.clone())])
    }
}

/// 7.1, 7.2: m 0.3, s 0.5, a −0.2, b 0.8, sigma 1: gradients −0.4 and 0.152195122 before the normaliser, which is
/// 0.6274691445.
#[test]
fn the_gradient_is_that_of_the_divergence_between_gaussians() {
    let (m, s, sigma) = (0.3f64, 0.5f64, 1.0f64);
    let student = Student::new(-0.2, 0.8);
    let [z, eps] = draws(400_000);
    let x = student.generate(&z);
    let x_t = (x.detach() + (eps * sigma).unwrap()).unwrap();
    let x0_real = denoise(&x_t, &scalar(m), &scalar(s), &scalar(sigma * sigma));
    let x0_fake = denoise(&x_t, &student.a.detach(), &student.b.detach(), &scalar(sigma * sigma));
    let matching = distribution_matching(&x, &x0_real, &x0_fake, None).unwrap();
    let normaliser = number(&matching.real_error);
    assert!((normaliser - 0.6274691445).abs() < 2e-3, "{normaliser}");
    let grads = matching.loss.backward().unwrap();
    let gradient = |var: &Var| number(grads.get(var).unwrap()) * normaliser;
    assert!((gradient(&student.a) + 0.4).abs() < 1e-4, "{}", gradient(&student.a));
    assert!((gradient(&student.b) - 0.152195122).abs() < 1e-4, "{}", gradient(&student.b));
}

/// 7.1, 7.2: at a = m, b = ±s every single sample's gradient is zero, and the normaliser is √(2/π)·sσ/√(s² + σ²).
#[test]
fn the_gradient_vanishes_at_the_optimum_for_every_sample() {
    for (b, sigma) in [(0.5, 0.1), (-0.5, 1.0), (0.5, 20.0)] {
        let student = Student::new(0.3, b);
        let [z, eps] = draws(40_000);
        let x = student.generate(&z);
        let x_t = (x.detach() + (eps * sigma).unwrap()).unwrap();
        let of = |mean: &Tensor, spread: &Tensor| denoise(&x_t, mean, spread, &scalar(sigma * sigma));
        let matching =
            distribution_matching(&x, &of(&scalar(0.3), &scalar(0.5)), &of(&student.a, &student.b), None).unwrap();
        assert_eq!(number(&matching.score_gap), 0.0);
        assert_eq!(number(&matching.loss), 0.0);
        let expected = (2.0 / std::f64::consts::PI).sqrt() * 0.5 * sigma / (0.25 + sigma * sigma).sqrt();
        assert!((number(&matching.real_error) / expected - 1.0).abs() < 0.01, "sigma {sigma}");
    }
}

/// 7.4: the best affine denoiser of N(a, b²) has slope b²/T and intercept σ²a/T; there the gradient is zero and the
/// weighted loss b²(σ² + σ_data²)/(σ_data²·T).
#[test]
fn the_critic_is_best_where_the_closed_form_says() {
    let (a, sigma_data) = (-0.2f64, 0.5f64);
    for (b, sigma) in [(0.5f64, 0.1f64), (0.5, 1.0), (0.5, 80.0), (1.0, 0.1), (1.0, 1.0), (1.0, 80.0)] {
        let [z, eps] = draws(40_000);
        let x = Student::new(a, b).generate(&z).detach();
        let x_t = (&x + (eps * sigma).unwrap()).unwrap();
        let total = b * b + sigma * sigma;
        let critic = Student::new(sigma * sigma * a / total, b * b / total);
        let loss = denoising(&critic.generate(&x_t), &x, &[fake_score_weight(sigma, sigma_data)]).unwrap();
        let expected = b * b * (sigma * sigma + sigma_data * sigma_data) / (sigma_data * sigma_data * total);
        assert!(
            (number(&loss) / expected - 1.0).abs() < 1e-4,
            "b {b}, sigma {sigma}: {} for {expected}",
            number(&loss)
        );
        let grads = loss.backward().unwrap();
        let weight = fake_score_weight(sigma, sigma_data);
        assert!(number(grads.get(&critic.a).unwrap()).abs() / weight < 1e-4, "b {b}, sigma {sigma}");
        // The slope's gradient goes with the square of what it multiplies.
        assert!(number(grads.get(&critic.b).unwrap()).abs() / (weight * (1.0 + total)) < 1e-4, "b {b}, sigma {sigma}");
    }
}

/// 7.8: affine student from (−0.8, 0.2), analytic critic, 64 values a sample, batch 32, Adam 0.01: after 500 updates at
/// the target (0.3, 0.5) to 1e-4.
#[test]
fn an_affine_student_finds_the_target() {
    let levels = NoiseLevels::karras(1000, 0.002, 80.0, 7.0).unwrap();
    let random = Random { seed: 0, device: CPU };
    let student = Student::new(-0.8, 0.2);
    let settings = AdamW { betas: [0.9, 0.999], weight_decay: 0.0, eps: 1e-8, clip: f64::INFINITY };
    let mut optimizer = Optimizer::new(&student.vars(), settings).unwrap();
    for step in 0..500 {
        let normal = |purpose| random.normal(purpose, step, &[32, 1, 8, 8]).unwrap();
        let x = student.generate(&normal(Purpose::GeneratorNoise));
        let sigma =
            random.indices(Purpose::GeneratorLevel, step, 32, INDICES).into_iter().map(|i| levels.sigma(i) as f32);
        let sigma = Tensor::from_iter(sigma, &CPU).unwrap().reshape((32, 1, 1, 1)).unwrap();
        let x_t = (x.detach() + normal(Purpose::GeneratorEps).broadcast_mul(&sigma).unwrap()).unwrap();
        let of = |mean: &Tensor, spread: &Tensor| denoise(&x_t, mean, spread, &sigma.sqr().unwrap());
        let x0_fake = of(&student.a.detach(), &student.b.detach());
        let matching = distribution_matching(&x, &of(&scalar(0.3), &scalar(0.5)), &x0_fake, None).unwrap();
        let grads = optimizer.gradients(&matching.loss.backward().unwrap());
        optimizer.descend(&matching.loss, &grads, 0.01).unwrap();
    }
    let (a, b) = (number(&student.a), number(&student.b));
    assert!((a - 0.3).abs() < 1e-4 && (b - 0.5).abs() < 1e-4, "({a}, {b})");
}

fn networks(teacher: &ModelFolder, config: &Config) -> Networks {
    let random = Random { seed: config.seed, device: CPU };
    Networks::new(teacher, &[2.5], config, Beginning::default(), &random).unwrap()
}

type Bits = BTreeMap<String, Vec<u32>>;

fn bits<'a>(tensors: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Bits {
    let values = |tensor: &Tensor| -> Vec<f32> {
        // The fixtures' own weights are f16.
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    tensors.map(|(name, tensor)| (name.to_string(), values(tensor).into_iter().map(f32::to_bits).collect())).collect()
}

fn bits_of(vars: &BTreeMap<String, Var>) -> Bits {
    bits(vars.iter().map(|(name, var)| (name.as_str(), var.as_tensor())))
}

/// 7.4: the student's turn moves the student alone, the critic's turn the critic alone; the teacher never moves.
#[test]
fn each_update_moves_its_own_network_and_no_other() {
    for fixture in ["ddpm-tiny", "edm-tiny"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures").join(fixture);
        let teacher = ModelFolder::load(&path, &CPU).unwrap();
        let config = Config { batch: 2, ..Config::default() };
        let random = Random { seed: 1, device: CPU };
        let mut n = networks(&teacher, &config);
        let start = bits(teacher.weights.iter());
        let now = |n: &Networks| [bits_of(&n.generator_vars), bits_of(&n.fake_vars), bits_of(&n.averages[0].vars)];
        assert_eq!(now(&n), [start.clone(), start.clone(), start.clone()], "all begin as the teacher");

        // The critic first: the same scores would give the student nothing to learn.
        n.update_fake_score(&config, &random, 0, 0).unwrap();
        let [generator, critic, average] = now(&n);
        assert!(generator == start && average == start && critic != start, "{fixture}: the critic's turn");
        assert_eq!(n.generator_optimizer.n_updates(), 0);

        let health = n.update_generator(&config, &random, 1).unwrap();
        assert!(health.get("grad_norm") > Some(0.0) && health.get("score_gap") > Some(0.0));
        let [generator, same_critic, average] = now(&n);
        assert!(generator != start && same_critic == critic, "{fixture}: the student's turn");
        assert!(average != start && average != generator, "{fixture}: the average follows");
        let moved = generator.iter().filter(|(name, values)| start[*name] != **values).count();
        assert!(moved > start.len() / 2, "{fixture}: {moved} of {} tensors moved", start.len());
        assert_eq!(bits(teacher.weights.iter()), start, "{fixture}: the teacher's own weights");

        // The critic learns from the student as it is now, not as it was.
        let moved_samples = n.sample(&config, &random, 0).unwrap();
        let fresh = networks(&teacher, &config);
        let first_samples = fresh.sample(&config, &random, 0).unwrap();
        assert!(bits([("x", &moved_samples)].into_iter()) != bits([("x", &first_samples)].into_iter()));
    }
}

/// The first update of a student whose critic is the teacher itself has nothing to follow.
#[test]
fn a_critic_that_is_the_teacher_gives_no_gradient() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/edm-tiny");
    let teacher = ModelFolder::load(&path, &CPU).unwrap();
    let config = Config { batch: 2, ..Config::default() };
    let mut n = networks(&teacher, &config);
    let health = n.update_generator(&config, &Random { seed: 1, device: CPU }, 0).unwrap();
    for name in ["loss_dm", "score_gap", "grad_norm"] {
        assert_eq!(health.get(name), Some(0.0), "{name}");
    }
    assert!(health.get("real_error") > Some(0.0) && health.get("sample_std") > Some(0.0));
}

/// 7.8 with a learned critic: affine at every noise level, five updates for each of the student's. At one update for
/// each it lags behind, and the student swings past the target and back (Yin et al. 2024, DMD2, section 4.2).
#[test]
fn a_learned_critic_must_be_faster_than_the_student() {
    let random = Random { seed: 0, device: CPU };
    let path = |ratio| {
        let turns = two_time_scales::Turns { ratio, rate: 0.01, fake_rate: 0.005 };
        two_time_scales::train(turns, &random, 500).unwrap()
    };
    let late = |path: &[[f64; 2]]| two_time_scales::largest_error(&path[375..]);
    let highest = |path: &[[f64; 2]]| path.iter().map(|v| v[0]).fold(f64::NEG_INFINITY, f64::max);
    let (five, one) = (path(5), path(1));
    assert!(late(&five) < 0.04 && (five[499][0] - 0.3).abs() < 0.01, "{:?}", five[499]);
    assert!(highest(&five) < 0.5, "{}", highest(&five));
    assert!(late(&one) > 0.15 && highest(&one) > 0.7, "{} {}", late(&one), highest(&one));
    // It comes back past the target.
    let top = one.iter().position(|v| v[0] == highest(&one)).unwrap();
    assert!(one[top..].iter().any(|v| v[0] < 0.25));
}
