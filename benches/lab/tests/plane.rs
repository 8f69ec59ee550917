//! What the method's parts are for, on the plane: short runs with the numbers that the pictures show, and the pictures.

use candle_core::Device;
use dmd::loss::Divergence;
use dmd::random::Random;
use dmd_lab::plane::mixture::Mixture;
use dmd_lab::plane::ring::{self, Method};
use dmd_lab::plane::scores::{Scores, scores};
use dmd_lab::plane::{toy, two_modes, two_time_scales};
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

/// 7.8 with a learned critic: affine at every noise level, five updates for each of the student's. At one update for
/// each it lags behind, and the student swings past the target and back (Yin et al. 2024, DMD2, section 4.2).
#[test]
fn a_learned_critic_must_be_faster_than_the_student() {
    let random = random();
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

#[test]
fn every_picture_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let result = toy::run(0, 2, folder.path()).unwrap();
    for name in ["ring-whole", "ring-no-fake-score", "ring-no-noise", "ring-regression"] {
        assert_eq!(result["ring"][name]["shares"].as_array().unwrap().len(), 6, "{result}");
    }
    assert!(result["divergences"]["modes-forward-kl"]["distance"].as_f64().unwrap() > 0.0, "{result}");
    assert!(result["time_scales"]["ratio-5"]["error"].as_f64().unwrap() > 0.0, "{result}");
    let files = toy::files(folder.path());
    assert!(files.len() == 5 + 6 + 3 + 6 + 3 && files.iter().all(|path| path.is_file()), "{files:?}");
    let figure = image::open(folder.path().join("toy.png")).unwrap();
    assert!(figure.width() > 900 && figure.height() > 1000);
}
