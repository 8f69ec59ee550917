//! The whole family of losses in the trainer itself: who may learn from whom, term by term; what parts of a batch come
//! to; what the terms are at the start.

use candle_core::{DType, Device, Tensor};
use dmd::config::{Config, layered};
use dmd::data::Pictures;
use dmd::distill::{Beginning, Health, Networks, Reality};
use dmd::pairs::{Manifest, Pairs, make};
use dmd::random::{Purpose, Random};
use dmd_models::{Eager, ModelFolder};
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
        skipped: Vec::new(),
    }
}

fn pairs(teacher: &ModelFolder, guidance_scale: f64) -> Pairs {
    let folder = tempfile::tempdir().unwrap();
    let manifest = Manifest {
        teacher_sha256: dmd::distill::fingerprint(teacher).unwrap(),
        shape: [3, 8, 8],
        guidance_scale,
        sampler_steps: 2,
        seed: 3,
        per_shard: 4,
        n: 6,
    };
    let out = folder.path().join("pairs");
    assert_eq!(make(teacher, &manifest, &out, 3, &CPU, |_| ()).unwrap(), 0);
    assert_eq!(make(teacher, &manifest, &out, 3, &CPU, |_| ()).unwrap(), 6, "all are found the second time");
    Pairs::load(&out, teacher, guidance_scale).unwrap()
}

fn config(text: &str) -> Config {
    let base = "batch = 4\ndata = \"pictures\"\n[loss.regression]\npairs = \"pairs\"\n".to_string();
    let config: Config = layered(&[("base".into(), base), ("test".into(), text.into())]).unwrap();
    config.validate().unwrap();
    config
}

fn networks(config: &Config) -> Networks {
    let teacher = teacher();
    let guidance = config.real_score.guidance_scale;
    let beginning = Beginning {
        reality: config.loss.gan.on().then(|| Reality::new(pictures(), &teacher).unwrap()),
        pairs: (config.loss.regression.weight > 0.0).then(|| pairs(&teacher, guidance)),
        ..Beginning::default()
    };
    let sigmas = if config.generator.steps.is_empty() { vec![2.5] } else { config.generator.steps.clone() };
    Networks::new(&teacher, &sigmas, config, beginning, &random()).unwrap()
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

/// Generator, its average, fake score and heads, bit for bit.
fn state(n: &Networks) -> [Bits; 4] {
    let bits = |vars: &BTreeMap<String, candle_core::Var>| -> Bits {
        let values = |v: &Tensor| v.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        vars.iter().map(|(k, v)| (k.clone(), values(v).into_iter().map(f32::to_bits).collect())).collect()
    };
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
        let label = Tensor::new(&[0i64, 1], &CPU).unwrap();
        let real = teacher().denoiser(&CPU).unwrap();
        let teacher_says = |d: &dmd_models::Denoiser| -> Vec<f32> {
            d.denoise(&Eager, &x, &[1.0], Some(&label)).unwrap().flatten_all().unwrap().to_vec1().unwrap()
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

/// A batch in parts has the loss and the gradient of the whole batch, to rounding.
#[test]
fn parts_of_a_batch_come_to_the_whole() {
    for (name, text) in TERMS.iter().filter(|(name, _)| *name != "js") {
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
    let label = Tensor::new(&[0i64, 1], &CPU).unwrap();
    let x = denoiser.denoise(&Eager, &(noise * 2.5).unwrap(), &[2.5], Some(&label)).unwrap();
    for distance in ["\"l2\"", "\"pseudo-huber\"", "\"teacher-features\""] {
        let config = config(&format!("[loss.regression]\nweight = 1.0\ndistance = {distance}\n"));
        let comparison = dmd::regression::Comparison::new(&config.loss.regression.distance, &denoiser).unwrap();
        let number =
            |a: &Tensor, b: &Tensor| -> f32 { comparison.distance(a, b, Some(&label)).unwrap().to_scalar().unwrap() };
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
    let (label, null) = (Tensor::new(&[0i64, 1], &CPU).unwrap(), Tensor::new(&[2i64, 2], &CPU).unwrap());
    let values = |x: Tensor| -> Vec<f32> { x.flatten_all().unwrap().to_vec1().unwrap() };
    let guided = |scale| values(d.denoise_guided(&Eager, &x, &[1.5], Some(&label), scale).unwrap());
    let cond = values(d.denoise(&Eager, &x, &[1.5], Some(&label)).unwrap());
    let uncond = values(d.denoise(&Eager, &x, &[1.5], Some(&null)).unwrap());
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
        None,
        2.0,
    );
    assert!(error.unwrap_err().to_string().contains("label dropout"));
}

/// Real pictures get the teacher's numbers for their classes, whatever order they came in.
#[test]
fn real_pictures_speak_the_teachers_labels() {
    let teacher = teacher();
    let reality = Reality::new(pictures(), &teacher).unwrap();
    assert_eq!(reality.pictures.labels, [1, 1, 1, 1, 0, 0, 0, 0]);
    let mut other = pictures();
    other.classes[0] = "green".into();
    let error = Reality::new(other, &teacher).err().unwrap().to_string();
    assert!(error.contains("class \"green\" is none of the teacher's (blue, red)"), "{error}");
}
