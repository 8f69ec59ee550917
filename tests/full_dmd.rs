//! The whole family of losses in the trainer itself: who may learn from whom, term by term; what parts of a batch come
//! to; what the terms are at the start.

use candle_core::{DType, Device, Tensor, Var};
use dmd::config::{Config, layered};
use dmd::data::Pictures;
use dmd::distill::{Beginning, Health, Networks, Reality};
use dmd::loss::distribution_matching;
use dmd::optim::Optimizer;
use dmd::pairs::{Maker, Manifest, Pairs, make};
use dmd::random::{Purpose, Random};
use dmd_models::{Condition, Denoiser, Eager, ModelFolder, Weights};
use std::collections::BTreeMap;
use std::path::Path;

const CPU: Device = Device::Cpu;

/// edm-tiny, its third class taken for "no class", so that it can be guided.
fn teacher() -> ModelFolder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/edm-tiny");
    let mut teacher = ModelFolder::load(&path, &CPU).unwrap();
    teacher.about.null_class = true;
    teacher.about.classes = ["blue", "red"].map(String::from).to_vec();
    teacher
}

/// Eight noisy pictures of two classes, as the loader would give them, the classes in another order than the teacher's.
fn pictures() -> Pictures {
    let random = Random { seed: 9, device: CPU };
    Pictures {
        pixels: random.stream(Purpose::Batch, 0).below(8 * 3 * 64, 256).into_iter().map(|v| v as u8).collect(),
        labels: vec![0, 0, 0, 0, 1, 1, 1, 1],
        names: (0..8).map(|i| i.to_string()).collect(),
        classes: ["red", "blue"].map(String::from).to_vec(),
        channels: 3,
        height: 8,
        width: 8,
        ..Pictures::default()
    }
}

fn pairs(teacher: &ModelFolder, guidance_scale: f64) -> Pairs {
    let folder = tempfile::tempdir().unwrap();
    let manifest = Manifest {
        teacher_sha256: dmd::fingerprint::teacher(teacher).unwrap().now,
        shape: [3, 8, 8],
        guidance_scale,
        sampler_steps: 2,
        seed: 3,
        per_shard: 4,
        n: 6,
        text: None,
    };
    let out = folder.path().join("pairs");
    let maker = Maker { teacher, prompts: None, batch: 3, device: &CPU };
    assert_eq!(make(&maker, manifest.clone(), &out, false, |_| ()).unwrap(), 0);
    assert_eq!(make(&maker, manifest.clone(), &out, false, |_| ()).unwrap(), 6, "all are found the second time");
    Pairs::load(&out, teacher, None, guidance_scale).unwrap()
}

fn config(text: &str) -> Config {
    let base = "batch = 4\ndata = \"pictures\"\n[loss.regression]\npairs = \"pairs\"\n".to_string();
    let config: Config = layered(&[("base".into(), base), ("test".into(), text.into())]).unwrap();
    config.validate().unwrap();
    config
}

fn networks(config: &Config) -> Networks {
    networks_of(&teacher(), config, None)
}

fn networks_of(teacher: &ModelFolder, config: &Config, fake_score: Option<Weights>) -> Networks {
    let guidance = config.real_score.guidance_scale;
    let beginning = Beginning {
        reality: config.loss.gan.on().then(|| Reality::new(pictures(), Path::new("pictures"), teacher).unwrap()),
        pairs: (config.loss.regression.weight > 0.0).then(|| pairs(teacher, guidance)),
        fake_score,
        ..Beginning::default()
    };
    let sigmas = if config.generator.steps.is_empty() { vec![2.5] } else { config.generator.steps.clone() };
    Networks::new(teacher, &sigmas, config, beginning, &random()).unwrap()
}

fn random() -> Random {
    Random { seed: 1, device: CPU }
}

const TERMS: [(&str, &str); 9] = [
    ("plain", ""),
    ("regression", "[loss.regression]\nweight = 0.25\n"),
    ("pixels", "[loss.regression]\nweight = 0.25\ndistance = \"pseudo-huber\"\n"),
    ("gan", "[loss.gan]\nweight = 3e-3\ncritic_weight = 1e-2\nr1 = 1.0\nresolutions = 2\n"),
    ("js", "[loss]\ndivergence = \"jensen-shannon\"\n[loss.gan]\ncritic_weight = 1e-2\n"),
    ("sid", "[loss.scores.score-identity]\nalpha = 1.2\n"),
    ("guided", "[real_score]\nguidance_scale = 2.0\n"),
    ("few steps", "[generator]\nsteps = [10.0, 2.5, 0.5]\n"),
    ("shared", "samples = \"shared\"\n[fake_score]\nweight = \"snr\"\n"),
];

type Bits = BTreeMap<String, Vec<u32>>;

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(vars: &BTreeMap<String, Var>) -> Bits {
    vars.iter().map(|(k, v)| (k.clone(), values(v).into_iter().map(f32::to_bits).collect())).collect()
}

/// Generator, its average, fake score and heads, bit for bit.
fn state(n: &Networks) -> [Bits; 4] {
    let heads = n.discriminator.as_ref().map_or_else(Bits::new, |d| bits(&d.vars));
    [bits(&n.generator_vars), bits(&n.averages[0].vars), bits(&n.fake_vars), heads]
}

/// 7.4: in every term's presence the student's turn moves the student (and its average) alone, the critic's turn the
/// critic and its heads alone; the teacher never moves.
#[test]
fn no_term_reaches_a_network_that_is_not_its_own() {
    for (name, text) in TERMS {
        let config = config(text);
        let mut n = networks(&config);
        let x = Tensor::full(0.3f32, (2, 3, 8, 8), &CPU).unwrap();
        let cond = Condition::of_classes([0i64, 1], &CPU).unwrap();
        let real = teacher().denoiser(&CPU).unwrap();
        let teacher_says = |d: &dmd_models::Denoiser| -> Vec<f32> {
            d.denoise(&Eager, &x, &[1.0], &cond).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let before = teacher_says(n.real_score());
        assert_eq!(before, teacher_says(&real));

        let [g0, a0, f0, h0] = state(&n);
        n.update_fake_score(&config, &random(), 0, 0).unwrap();
        let [g1, a1, f1, h1] = state(&n);
        assert!(g1 == g0 && a1 == a0 && f1 != f0, "{name}: the critic's turn");
        assert_eq!(h1 != h0, config.loss.gan.on(), "{name}: the heads learn in the critic's turn");
        let moved = h1.iter().filter(|(key, values)| h0[*key] != **values).count();
        assert_eq!(moved, h0.len(), "{name}: all of them");

        let health = n.update_generator(&config, &random(), 1).unwrap();
        let [g2, a2, f2, h2] = state(&n);
        assert!(g2 != g1 && a2 != a1 && f2 == f1 && h2 == h1, "{name}: the student's turn");
        assert_eq!(teacher_says(n.real_score()), before, "{name}: the teacher");
        assert!(health.get("grad_norm") > Some(0.0), "{name}: {health:?}");
        n.update_fake_score(&config, &random(), 1, 0).unwrap();
        assert!(state(&n)[0] == g2, "{name}: the critic's turn after the student's");
    }
}

/// 7.4, on the gradients themselves: an update is given an optimiser of everybody's weights, which moves those alone that
/// the loss has a gradient for, be it zero, since they decay. Those are all of its own network's and nobody else's; the
/// teacher's are variables here.
#[test]
fn no_gradient_reaches_a_network_that_is_not_the_losss_own() {
    let teacher = teacher();
    let (weights, teacher_vars) = teacher.weights.trainable().unwrap();
    let teacher = ModelFolder { weights, ..teacher };
    // What would be seen if a loss ran the teacher on these.
    let x = Tensor::zeros((1, 3, 8, 8), DType::F32, &CPU).unwrap();
    let cond = Condition::of_classes([0i64], &CPU).unwrap();
    let leaky = teacher.denoiser_on(&teacher.weights).unwrap();
    let leak = leaky.denoise(&Eager, &x, &[1.0], &cond).unwrap().sqr().unwrap().mean_all().unwrap();
    let leak = leak.backward().unwrap();
    assert!(teacher_vars.values().all(|var| leak.get(var).is_some()));

    for ((name, text), grad_checkpoint) in TERMS.iter().flat_map(|term| [false, true].map(|on| (term, on))) {
        let mut config = config(text);
        config.grad_checkpoint = grad_checkpoint;
        for (rate, warmup) in [
            (&mut config.generator.rate, &mut config.generator.warmup),
            (&mut config.fake_score.rate, &mut config.fake_score.warmup),
        ] {
            (*rate, *warmup) = (1e-3, 0);
        }
        config.optimizer.weight_decay = 0.1;
        let mut n = networks_of(&teacher, &config, None);
        let named = |owner: &str, vars: &BTreeMap<String, Var>| -> BTreeMap<String, Var> {
            vars.iter().map(|(name, var)| (format!("{owner}/{name}"), var.clone())).collect()
        };
        let heads = n.discriminator.as_ref().map(|d| named("heads", &d.vars)).unwrap_or_default();
        let mut everybody = named("teacher", &teacher_vars);
        everybody.extend(named("generator", &n.generator_vars));
        everybody.extend(named("fake_score", &n.fake_vars));
        let check = |own: &str, before: &Bits, after: &Bits| {
            for (weight, bits) in before {
                let moved = after[weight] != *bits;
                assert_eq!(moved, weight.starts_with(own), "{name}, checkpoint {grad_checkpoint}, {own}: {weight}");
            }
        };

        // The heads have their own share of the critic's loss.
        n.fake_optimizer = Optimizer::new(&everybody, config.optimizer).unwrap();
        let before = bits(&everybody);
        n.update_fake_score(&config, &random(), 0, 0).unwrap();
        check("fake_score/", &before, &bits(&everybody));

        everybody.extend(heads);
        n.generator_optimizer = Optimizer::new(&everybody, config.optimizer).unwrap();
        let before = bits(&everybody);
        n.update_generator(&config, &random(), 1).unwrap();
        check("generator/", &before, &bits(&everybody));
    }
}

/// 7.8: a few-step generator's pass gets what the passes before it made of the noise, noised to its level, for the critic
/// and for itself; and it learns at that pass alone. By hand, with the run's own draws.
#[test]
fn few_steps_are_simulated_backwards_without_a_gradient() {
    let mut config = config("[generator]\nsteps = [10.0, 2.5, 0.5]\n");
    config.optimizer.clip = 1e9;
    let (teacher, sigmas, random) = (teacher(), config.generator.steps.clone(), random());
    let frozen = teacher.denoiser(&CPU).unwrap();
    // A critic with something to say.
    let fake_weights = teacher.weights.to(DType::F32, &CPU).unwrap().map(|weight| weight * 0.9).unwrap();
    let fake_score = teacher.denoiser_on(&fake_weights).unwrap();
    let shape = [4, 3, 8, 8];
    // The noise levels up to the pass that is drawn, and its input; `generate` makes the passes before it.
    let by_hand = |generate: &Denoiser, noise: Purpose, update: u64, key: u64, cond: &Condition<Tensor>| {
        let pass = random.indices(Purpose::Pass, key, 1, [0, 2])[0];
        let mut input = (random.normal(noise, update, &shape).unwrap() * sigmas[0]).unwrap();
        for i in 1..=pass {
            let x = generate.denoise(&Eager, &input, &[sigmas[i - 1]], cond).unwrap();
            let eps = random.normal(Purpose::PassEps, 3 * key + i as u64, &shape).unwrap();
            input = (x + (eps * sigmas[i]).unwrap()).unwrap();
        }
        (pass, input)
    };
    let told = |purpose, key| random.condition(purpose, key, 4, Some(2)).unwrap();
    let mut seen = [0, 0];
    for step in 0..12 {
        let mut n = networks_of(&teacher, &config, Some(fake_weights.clone()));
        let (update, key) = (step * config.ratio, step * (config.ratio + 1));
        let cond = told(Purpose::CriticLabel, update);
        let (pass, input) = by_hand(&frozen, Purpose::CriticNoise, update, key + 1, &cond);
        let expected = frozen.denoise(&Eager, &input, &[sigmas[pass]], &cond).unwrap();
        let sample = n.sample(&config, &random, step).unwrap();
        assert_eq!(values(&sample), values(&expected), "step {step}, pass {pass}");
        seen[0] |= 1 << pass;

        n.update_generator(&config, &random, step).unwrap();
        // With a first beta of 0, what the optimiser keeps is the gradient.
        let found = n.generator_optimizer.state().unwrap();
        let cond = told(Purpose::GeneratorLabel, step);
        let gradient = |through: bool| {
            let (weights, vars) = teacher.weights.trainable().unwrap();
            let generator = teacher.denoiser_on(&weights).unwrap();
            let before = if through { &generator } else { &frozen };
            let (pass, input) = by_hand(before, Purpose::GeneratorNoise, step, key, &cond);
            let x = generator.denoise(&Eager, &input, &[sigmas[pass]], &cond).unwrap();
            let [low, high] = config.generator.t_range;
            let levels = random.indices(Purpose::GeneratorLevel, step, 4, frozen.levels.index_range(low, high));
            let sigma: Vec<f64> = levels.into_iter().map(|i| frozen.levels.sigma(i)).collect();
            let scale = Tensor::from_iter(sigma.iter().map(|&sigma| sigma as f32), &CPU).unwrap();
            let eps = random.normal(Purpose::GeneratorEps, step, &shape).unwrap();
            let x_t = (x.detach() + eps.broadcast_mul(&scale.reshape((4, 1, 1, 1)).unwrap()).unwrap()).unwrap();
            let score = |d: &Denoiser| d.denoise(&Eager, &x_t, &sigma, &cond).unwrap();
            let loss = distribution_matching(&x, &score(&frozen), &score(&fake_score), None, 0.0).unwrap().loss;
            let grads = loss.backward().unwrap();
            let (mut error, mut largest) = (0f32, 0f32);
            for (name, var) in &vars {
                let found = values(found.get(&format!("mean.{name}")).unwrap());
                for (a, b) in found.iter().zip(values(grads.get(var).unwrap())) {
                    (error, largest) = (error.max((a - b).abs()), largest.max(b.abs()));
                }
            }
            (pass, error / largest)
        };
        let (pass, error) = gradient(false);
        assert!(error < 1e-6, "step {step}, pass {pass}: {error}");
        // The gradient that must not be there would be seen.
        let (_, leaking) = gradient(true);
        assert!(pass == 0 || leaking > 1e-2, "step {step}, pass {pass}: {leaking}");
        seen[1] |= 1 << pass;
    }
    assert_eq!(seen, [7, 7], "every pass is drawn");
}

/// A batch in parts has the loss and the gradient of the whole batch, to rounding.
#[test]
fn parts_of_a_batch_come_to_the_whole() {
    for (name, text) in TERMS {
        let [whole, parts] = [1, 4].map(|parts| numbers_of_an_update(text, |config| config.accumulate = parts));
        assert_alike(name, &parts, &whole);
    }
}

/// Gradient checkpointing changes the memory that an update takes, and no loss or gradient beyond rounding: the scores'
/// passes, which the gradient goes back through in some terms, are computed again like the generator's own.
#[test]
fn blocks_computed_again_give_the_same_losses_and_gradients() {
    for (name, text) in TERMS {
        let [kept, again] = [false, true].map(|on| numbers_of_an_update(text, |config| config.grad_checkpoint = on));
        assert_alike(name, &again, &kept);
    }
}

/// To rounding: at a run's beginning both scores nearly agree, and a gradient is a small difference of large numbers.
fn assert_alike(name: &str, found: &Health, expected: &Health) {
    for (number, value) in expected.values() {
        let found = found.get(number).unwrap();
        assert!((found - value).abs() <= 2e-4 * value.abs().max(1e-3), "{name}: {number} {found} for {value}");
    }
}

/// Losses, monitors and gradient's norm of one update of each network.
fn numbers_of_an_update(text: &str, change: impl Fn(&mut Config)) -> Health {
    let mut config = config(text);
    change(&mut config);
    let mut n = networks(&config);
    let mut health = n.update_fake_score(&config, &random(), 0, 0).unwrap();
    health.add(&n.update_generator(&config, &random(), 1).unwrap(), 1.0);
    health
}

/// Reverse KL with a discriminator beside it, and any divergence before the discriminator joins, are plain distribution
/// matching, bit for bit.
#[test]
fn divergences_begin_as_distribution_matching() {
    let after = |text: &str| {
        let config = config(text);
        let mut n = networks(&config);
        n.update_generator(&config, &random(), 0).unwrap();
        let [generator, ..] = state(&n);
        generator
    };
    let plain = after("");
    assert!(after("[loss.gan]\ncritic_weight = 1e-2\n") == plain);
    assert!(
        after("[loss]\ndivergence = \"forward-kl\"\n[loss.gan]\ncritic_weight = 1e-2\nstart_step = 1\nweight = 1.0\n")
            == plain
    );
}

/// A generator that is the teacher, on pairs of one step: the distance is nothing, whatever measures it.
#[test]
fn a_student_that_is_the_teacher_has_nothing_to_regress() {
    let teacher = teacher();
    let denoiser = teacher.denoiser(&CPU).unwrap();
    let noise = random().normal(Purpose::GeneratorNoise, 0, &[2, 3, 8, 8]).unwrap();
    let cond = Condition::of_classes([0i64, 1], &CPU).unwrap();
    let x = denoiser.denoise(&Eager, &(noise * 2.5).unwrap(), &[2.5], &cond).unwrap();
    for distance in ["\"l2\"", "\"pseudo-huber\"", "\"teacher-features\""] {
        let config = config(&format!("[loss.regression]\nweight = 1.0\ndistance = {distance}\n"));
        let comparison = dmd::regression::Comparison::new(
            &config.loss.regression.distance,
            &denoiser,
            &Default::default(),
            2,
            || Ok(None),
        )
        .unwrap();
        let number = |a: &Tensor, b: &Tensor| -> f32 { comparison.distance(a, b, &cond).unwrap().to_scalar().unwrap() };
        assert!(number(&x, &x).abs() < 1e-9, "{distance}");
        assert!(number(&x, &x.flip(&[3]).unwrap()) > 1e-6, "{distance}");
    }
}

/// Guidance: scale 1 is the class's own answer, 0 the answer without a class, and in between a straight line, the same
/// in epsilon space (7.7).
#[test]
fn guidance_is_a_straight_line_through_both_answers() {
    let d = teacher().denoiser(&CPU).unwrap();
    let x = random().normal(Purpose::GeneratorNoise, 0, &[2, 3, 8, 8]).unwrap();
    let [told, null] = [[0i64, 1], [2, 2]].map(|ids| Condition::of_classes(ids, &CPU).unwrap());
    let values = |x: Tensor| -> Vec<f32> { x.flatten_all().unwrap().to_vec1().unwrap() };
    let guided = |scale| values(d.denoise_guided(&Eager, &x, &[1.5], &told, scale).unwrap());
    let cond = values(d.denoise(&Eager, &x, &[1.5], &told).unwrap());
    let uncond = values(d.denoise(&Eager, &x, &[1.5], &null).unwrap());
    assert_eq!(guided(1.0), cond);
    assert_eq!(guided(0.0), uncond);
    let x = values(x.clone());
    for (i, g) in guided(3.0).into_iter().enumerate() {
        let eps = |x0: f32| (x[i] - x0) / 1.5;
        let in_eps = x[i] - 1.5 * (eps(uncond[i]) + 3.0 * (eps(cond[i]) - eps(uncond[i])));
        assert!((g - (uncond[i] + 3.0 * (cond[i] - uncond[i]))).abs() < 1e-5 && (g - in_eps).abs() < 1e-4);
    }
    let mut plain = teacher();
    plain.about.null_class = false;
    let error = plain.denoiser(&CPU).unwrap().denoise_guided(
        &Eager,
        &Tensor::zeros((1, 3, 8, 8), DType::F32, &CPU).unwrap(),
        &[1.0],
        &Condition::none(),
        2.0,
    );
    assert!(error.unwrap_err().to_string().contains("label dropout"));
}

/// After one update the critic is 0.97 of the teacher and 0.03 of the generator.
#[test]
fn the_critic_is_drawn_to_the_generator() {
    let config = config("[fake_score]\npull = 0.03\n");
    let mut networks = networks(&config);
    // Where both scores agree there is nothing to follow.
    networks.update_fake_score(&config, &random(), 0, 0).unwrap();
    let before = values_of(&networks.fake_vars);
    networks.update_generator(&config, &random(), 0).unwrap();
    let (after, generator) = (values_of(&networks.fake_vars), values_of(&networks.generator_vars));
    assert!(before != after);
    for ((before, after), generator) in before.iter().zip(after).zip(generator) {
        assert!((after - (0.97 * before + 0.03 * generator)).abs() < 1e-6, "{before} {after} {generator}");
    }
}

fn values_of(vars: &std::collections::BTreeMap<String, candle_core::Var>) -> Vec<f32> {
    let values = |var: &candle_core::Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    vars.values().flat_map(values).collect()
}

/// Real pictures get the teacher's numbers for their classes, whatever order they came in.
#[test]
fn real_pictures_speak_the_teachers_labels() {
    let teacher = teacher();
    let reality = Reality::new(pictures(), Path::new("pictures"), &teacher).unwrap();
    assert_eq!(reality.pictures.labels, [1, 1, 1, 1, 0, 0, 0, 0]);
    let mut other = pictures();
    other.classes[0] = "green".into();
    let error = Reality::new(other, Path::new("pictures"), &teacher).err().unwrap().to_string();
    assert!(error.contains("class \"green\" is none of the model's (blue, red)"), "{error}");
}
