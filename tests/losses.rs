//! The losses and the optimiser together, on Gaussian data with an affine student, whose scores are known
//! (reference/distillation.md, 7.8; the losses alone are in `gaussian.rs`). And who may learn from whom.

use candle_core::{DType, Device, Tensor, Var};
use dmd::config::Config;
use dmd::distill::{Beginning, Networks};
use dmd::loss::{denoising, distribution_matching, fake_score_weight};
use dmd::optim::{AdamW, Decay, Optimizer, rate_at};
use dmd::random::{Purpose, Random};
use dmd_models::denoiser::Coefficients;
use dmd_models::{ModelFolder, NoiseLevels, Prediction};
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

/// Draws z and eps, `(rows, 1, 8, 8)`, whose means in every row are 0, squares 1 and product 0, exactly: the best fit to a
/// row is the best there is.
fn exact_draws(random: &Random, [z, eps]: [Purpose; 2], step: u64, rows: usize) -> [Tensor; 2] {
    let mirrored = |purpose, signs: [f32; 4]| {
        let values = random.stream(purpose, step).normal(rows * 16);
        let row = |row: &[f32]| {
            let rms = (row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32).sqrt();
            signs.iter().flat_map(|sign| row.iter().map(move |v| sign * v / rms)).collect::<Vec<f32>>()
        };
        Tensor::from_vec(values.chunks_exact(16).flat_map(row).collect(), (rows, 1, 8, 8), &CPU).unwrap()
    };
    [mirrored(z, [1.0, -1.0, 1.0, -1.0]), mirrored(eps, [1.0, 1.0, -1.0, -1.0])]
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
        let matching = distribution_matching(&x, &of(&scalar(0.3), &scalar(0.5)), &x0_fake, None, 0.0).unwrap();
        let grads = optimizer.gradients(&matching.loss.backward().unwrap());
        optimizer.descend(&matching.loss, &grads, 0.01).unwrap();
    }
    let (a, b) = (number(&student.a), number(&student.b));
    assert!((a - 0.3).abs() < 1e-4 && (b - 0.5).abs() < 1e-4, "({a}, {b})");
}

/// A critic with all that a Gaussian's denoiser is made of: F = intercept + slope·(c_in·x) at every noise level, in
/// Karras' preconditioning; it begins at zero.
struct Critic {
    intercept: Var,
    slope: Var,
    coefficients: Vec<Coefficients>,
}

impl Critic {
    fn new(levels: &NoiseLevels) -> Self {
        let zeros = || Var::zeros((levels.len(), 1, 1, 1), DType::F32, &CPU).unwrap();
        let prediction = Prediction::Edm { sigma_data: 0.5, negative: false };
        let coefficients = levels.sigmas().iter().map(|&sigma| prediction.coefficients(sigma, levels)).collect();
        Critic { intercept: zeros(), slope: zeros(), coefficients }
    }

    /// x: one row a noise level.
    fn denoise(&self, x: &Tensor) -> Tensor {
        let times = |x: &Tensor, c: fn(&Coefficients) -> f64| {
            x.broadcast_mul(&column(self.coefficients.iter().map(c))).unwrap()
        };
        let f = times(x, |c| c.c_in).broadcast_mul(&self.slope).unwrap().broadcast_add(&self.intercept).unwrap();
        (times(x, |c| c.c_skip) + times(&f, |c| c.c_out)).unwrap()
    }

    fn vars(&self) -> BTreeMap<String, Var> {
        BTreeMap::from([("intercept".into(), self.intercept.clone()), ("slope".into(), self.slope.clone())])
    }
}

fn column(values: impl Iterator<Item = f64>) -> Tensor {
    Tensor::from_iter(values.map(|v| v as f32), &CPU).unwrap().reshape(((), 1, 1, 1)).unwrap()
}

/// 7.8 with a learned critic, five updates for each of the student's, both rates going down to zero: at the target to
/// 1e-5, and it stays there. Every update sees new draws, one sample a noise level; their moments are exact, so that
/// the critic's lag is what is left to fail, not luck.
#[test]
fn an_affine_student_whose_critic_learns_finds_the_target() {
    const STEPS: u64 = 800;
    const RATIO: u64 = 5;
    let levels = NoiseLevels::karras(20, 0.002, 80.0, 7.0).unwrap();
    let random = Random { seed: 0, device: CPU };
    let (student, critic) = (Student::new(-0.8, 0.2), Critic::new(&levels));
    let settings = AdamW { betas: [0.0, 0.999], weight_decay: 0.0, eps: 1e-8, clip: f64::INFINITY };
    let [mut of_student, mut of_critic] =
        [student.vars(), critic.vars()].map(|vars| Optimizer::new(&vars, settings).unwrap());
    let sigma = column(levels.sigmas().iter().copied());
    let weights: Vec<f64> = levels.sigmas().iter().map(|&sigma| fake_score_weight(sigma, 0.5)).collect();
    let noised = |x: &Tensor, eps: Tensor| (x + eps.broadcast_mul(&sigma).unwrap()).unwrap();
    let descend = |optimizer: &mut Optimizer, loss: &Tensor, rate: f64| {
        let grads = optimizer.gradients(&loss.backward().unwrap());
        optimizer.descend(loss, &grads, rate).unwrap();
    };
    let mut late = 0f64;
    for step in 0..STEPS {
        let purposes = [Purpose::GeneratorNoise, Purpose::GeneratorEps];
        let [z, eps] = exact_draws(&random, purposes, step, levels.len());
        let x = student.generate(&z);
        let x_t = noised(&x.detach(), eps);
        let x0_real = denoise(&x_t, &scalar(0.3), &scalar(0.5), &sigma.sqr().unwrap());
        let matching = distribution_matching(&x, &x0_real, &critic.denoise(&x_t), None, 0.0).unwrap();
        descend(&mut of_student, &matching.loss, rate_at(0.01, Decay::Cosine, 0, step, STEPS));
        for turn in step * RATIO..(step + 1) * RATIO {
            let purposes = [Purpose::CriticNoise, Purpose::CriticEps];
            let [z, eps] = exact_draws(&random, purposes, turn, levels.len());
            let x = student.generate(&z).detach();
            let loss = denoising(&critic.denoise(&noised(&x, eps)), &x, &weights).unwrap();
            descend(&mut of_critic, &loss, rate_at(0.005, Decay::Cosine, 0, turn, STEPS * RATIO));
        }
        if step >= STEPS * 9 / 10 {
            let error = (number(&student.a) - 0.3).abs().max((number(&student.b) - 0.5).abs());
            late = late.max(error);
        }
    }
    assert!(late < 1e-5, "{late}: ({}, {})", number(&student.a), number(&student.b));
    // And so has the critic found its floor.
    let purposes = [Purpose::CriticNoise, Purpose::CriticEps];
    let [z, eps] = exact_draws(&random, purposes, STEPS * RATIO, levels.len());
    let x = student.generate(&z).detach();
    let floor = number(&denoising(&critic.denoise(&noised(&x, eps)), &x, &weights).unwrap());
    assert!((floor - 1.0).abs() < 1e-3, "{floor}");
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

/// ARCHITECTURE.md: a loss takes tensors and gives a scalar. Its file can reach nothing else.
#[test]
fn a_loss_reaches_no_network_no_noise_and_no_settings() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/loss");
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() > 5, "{files:?}");
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for reached in ["dmd_models", "dmd_runtime", "crate::"] {
            assert!(!code.contains(reached), "{}: reaches {reached}", path.display());
        }
    }
}
