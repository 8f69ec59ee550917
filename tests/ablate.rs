//! What the method's parts are for, on the plane: short runs with the numbers that the pictures show, and the command.

mod common;
use candle_core::Device;
use common::Workplace;
use dmd::ablate::mixture::Mixture;
use dmd::ablate::ring::{self, Method};
use dmd::ablate::scores::{Scores, scores};
use dmd::ablate::two_modes;
use dmd::loss::Divergence;
use dmd::random::Random;
use std::sync::LazyLock;

const N: usize = 2048;

/// The whole method, which two tests look at.
static WHOLE: LazyLock<(Scores, f64)> = LazyLock::new(|| on_ring(Method::WHOLE, 200));

fn random() -> Random {
    Random { seed: 0, device: Device::Cpu }
}

fn on_ring(method: Method, n_steps: u64) -> (Scores, f64) {
    let trained = ring::train(method, &random(), n_steps, N).unwrap();
    let mixture = Mixture::ring();
    (scores(&mixture, &trained.samples, &mixture.sample(&random(), 0, N)).unwrap(), trained.pair_distance)
}

fn on_two_modes(divergence: Divergence, regression: f64) -> Scores {
    let samples = two_modes::train(divergence, regression, &random(), 400, N).unwrap();
    let mixture = Mixture::two_modes();
    scores(&mixture, &samples, &mixture.sample(&random(), 0, N)).unwrap()
}

#[test]
fn the_whole_method_reaches_all_modes_from_one() {
    let (start, _) = on_ring(Method::WHOLE, 0);
    assert!(start.n_covered == 1 && start.distance > 0.65, "{start:?}");
    let (end, _) = &*WHOLE;
    assert!(end.n_covered == 6 && end.distance < 0.15, "{end:?}");
    assert!(end.spread > 0.7, "{end:?}");
}

#[test]
fn without_a_fake_score_every_sample_falls_into_one_point() {
    let (end, _) = on_ring(Method { fake_score: false, ..Method::WHOLE }, 200);
    assert!(end.n_covered == 1 && end.spread < 0.2, "{end:?}");
}

#[test]
fn without_noise_the_far_modes_are_never_found() {
    let (end, _) = on_ring(Method { noise_injection: false, ..Method::WHOLE }, 100);
    assert!(end.n_covered <= 2 && end.distance > 0.4, "{end:?}");
}

#[test]
fn regression_ties_every_noise_to_the_teachers_sample_of_it() {
    let (end, pairs) = on_ring(Method { regression: 0.25, ..Method::WHOLE }, 200);
    assert!(end.n_covered == 6 && end.distance < 0.12, "{end:?}");
    let pairs_without = WHOLE.1;
    assert!(pairs < 0.4 && pairs_without > 0.6, "{pairs} with, {pairs_without} without");
}

/// Copying is averaging: what a network cannot tell apart, it puts in the middle. Distribution matching at the same
/// width leaves fewer samples there, and modes out.
#[test]
fn a_copy_by_a_small_network_falls_between_the_modes() {
    let (wide, pairs) = on_ring(Method::COPY, 300);
    assert!(wide.n_covered == 6 && wide.between < 0.3 && pairs < 0.2, "{wide:?}, {pairs}");
    let (copied, _) = on_ring(Method { width: 4, ..Method::COPY }, 300);
    let (matched, _) = on_ring(Method { width: 4, ..Method::WHOLE }, 300);
    assert!(copied.between > 0.4 && matched.between < 0.75 * copied.between, "{copied:?}, {matched:?}");
}

/// A Gaussian before two modes, from one of them: what seeks modes stays, what covers them spreads over both, and pairs
/// bring reverse KL over too (Yin et al. 2024, DMD, figure 3).
#[test]
fn divergences_that_seek_modes_stay_and_those_that_cover_them_spread() {
    for divergence in [Divergence::ReverseKl, Divergence::SoftenedReverseKl, Divergence::Neyman] {
        let end = on_two_modes(divergence, 0.0);
        assert!(end.n_covered == 1 && end.shares[0] > 0.85, "{divergence:?}: {end:?}");
    }
    for divergence in [Divergence::JensenShannon, Divergence::ForwardKl, Divergence::Jeffreys] {
        let end = on_two_modes(divergence, 0.0);
        assert!(end.n_covered == 2 && end.distance < 0.25, "{divergence:?}: {end:?}");
    }
    let end = on_two_modes(Divergence::ReverseKl, 0.25);
    assert!(end.n_covered == 2 && end.distance < 0.25, "{end:?}");
}

#[test]
fn the_toy_draws_every_picture_and_replaces_none() {
    let w = Workplace::new();
    let result = w.ok("ablate --toy --out toy --steps 2");
    for name in ["ring-whole", "ring-no-fake-score", "ring-no-noise", "ring-regression"] {
        assert_eq!(result["ring"][name]["shares"].as_array().unwrap().len(), 6, "{result}");
    }
    assert!(result["divergences"]["modes-forward-kl"]["distance"].as_f64().unwrap() > 0.0, "{result}");
    assert!(result["time_scales"]["ratio-5"]["error"].as_f64().unwrap() > 0.0, "{result}");
    let pictures = w.snapshot("toy").into_keys().filter(|path| path.extension().is_some_and(|e| e == "png"));
    assert_eq!(pictures.count(), 5 + 6 + 3 + 6 + 3);
    let figure = image::open(w.path("toy/toy.png")).unwrap();
    assert!(figure.width() > 900 && figure.height() > 1000);
    w.refuses("ablate --toy --out toy --steps 2", 1, &["ring.png", "exists already", "--force"]);
    w.refuses("ablate --out other", 2, &["--toy"]);
    w.refuses("ablate --toy --teacher x --out other", 2, &["--teacher"]);
    w.refuses("ablate --toy --out other --steps 0", 2, &["--steps is 0"]);
}

#[test]
fn a_step_of_a_picture_model_is_drawn_level_by_level() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let alone = w.ok("ablate --teacher teacher --out alone");
    let levels = alone["levels"].as_array().unwrap();
    assert!(levels.len() >= 5, "{alone}");
    // The fake score of a run that has not begun is the teacher: nothing to follow.
    assert!(levels.iter().all(|l| l["gradient"] == 0.0 && l["real_error"].as_f64().unwrap() > 0.0), "{alone}");
    w.write("distill.toml", "ratio = 2\n[generator]\nwarmup = 1\n");
    w.ok("distill --teacher teacher --out run --config distill.toml --steps 3 --batch 2 --device cpu");
    let with_run = w.ok("ablate --teacher teacher --run run --out with-run");
    assert!(with_run["levels"].as_array().unwrap().iter().all(|l| l["gradient"].as_f64().unwrap() > 0.0), "{with_run}");
    assert!(image::open(w.path("with-run/levels.png")).unwrap().width() > 600);
    w.refuses("ablate --teacher teacher --run nowhere --out other", 1, &["the generator", "nowhere"]);
    w.refuses("ablate --teacher teacher --generator teacher --out other", 1, &["holds no generator"]);
}
