//! All experiments of the plane: their pictures, each alone and together, and their numbers.

use super::mixture::Mixture;
use super::ring::{self, Method};
use super::scores::{Scores, scores};
use super::{Point, figure, two_modes, two_time_scales};
use anyhow::{Context, Result};
use candle_core::Device;
use dmd::loss::Divergence;
use dmd::output::say;
use dmd::picture::{labelled_panel, save};
use dmd::random::Random;
use image::RgbImage;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Samples that are measured, and how many of them are drawn.
const MEASURED: usize = 4096;
const DRAWN: usize = 1500;
/// Width of a network too small for the teacher's map from noises to samples.
const NARROW: usize = 4;
/// Weight of the regression, that of DMD's own experiments.
const REGRESSION: f64 = 0.25;
/// Updates of the fake score per update of the generator.
const RATIOS: [u64; 3] = [1, 2, 5];
/// Rates of the generator and of the fake score in the last experiment; at ratio 1 the second is too slow for the first.
const RATES: [f64; 2] = [0.01, 0.005];
/// Pictures side by side.
const COLUMNS: usize = 3;

/// The figures, in the order of the large one.
const FIGURES: [&str; 4] = ["ring", "copies", "divergences", "time-scales"];

/// Every file that [`run`] writes.
pub fn files(out: &Path) -> Vec<PathBuf> {
    let alone = ring_cases().into_iter().chain(copy_cases()).map(|(name, _, _)| format!("panels/{name}.png"));
    let alone = alone.chain(mode_cases().map(|(name, _, _)| format!("panels/{name}.png")));
    let alone = alone.chain(RATIOS.map(|ratio| format!("panels/ratio-{ratio}.png")));
    let together = FIGURES.into_iter().chain(["toy"]).map(|name| format!("{name}.png"));
    together.chain(alone).map(|name| out.join(name)).collect()
}

/// Trains everything for `n_steps` updates, draws and measures it.
pub fn run(seed: u64, n_steps: u64, out: &Path) -> Result<Value> {
    let panels = out.join("panels");
    std::fs::create_dir_all(&panels).with_context(|| panels.display().to_string())?;
    let random = Random { seed, device: Device::Cpu };
    let (mut figures, mut result) = (Vec::new(), Map::new());
    let experiments: [fn(&Random, u64) -> Result<Experiment>; 4] = [on_ring, by_copies, on_two_modes, with_time_scales];
    for (name, experiment) in FIGURES.into_iter().zip(experiments) {
        let Experiment { panels: pictures, numbers, .. } = experiment(&random, n_steps)?;
        for (name, caption, picture) in &pictures {
            save(&panels.join(format!("{name}.png")), &labelled_panel(&[(caption, picture.clone())]))?;
        }
        let rows: Vec<RgbImage> = pictures
            .chunks(COLUMNS)
            .map(|row| labelled_panel(&row.iter().map(|(_, c, p)| (c.as_str(), p.clone())).collect::<Vec<_>>()))
            .collect();
        let figure = figure::stack(&rows);
        save(&out.join(format!("{name}.png")), &figure)?;
        figures.push(figure);
        result.insert(name.replace('-', "_"), Value::Object(numbers));
    }
    let together = out.join("toy.png");
    save(&together, &figure::stack(&figures))?;
    say(&format!("the pictures: {} and beside it", together.display()));
    result.insert("picture".into(), json!(together));
    Ok(Value::Object(result))
}

/// Pictures by name and caption, and numbers by name.
struct Experiment {
    panels: Vec<(&'static str, String, RgbImage)>,
    numbers: Map<String, Value>,
    /// What is shown of the plane.
    extent: [f64; 2],
}

/// Name and caption of a picture, and what is trained for it; nothing for the first.
type Case<T> = (&'static str, &'static str, Option<T>);

fn ring_cases() -> [Case<Method>; 6] {
    let whole = Method::WHOLE;
    [
        ("ring-data", "the data", None),
        ("ring-start", "the start", Some(whole)),
        ("ring-whole", "the whole method", Some(whole)),
        ("ring-no-fake-score", "no fake score", Some(Method { fake_score: false, ..whole })),
        ("ring-no-noise", "no noise injection", Some(Method { noise_injection: false, ..whole })),
        ("ring-regression", "with regression", Some(Method { regression: REGRESSION, ..whole })),
    ]
}

fn copy_cases() -> [Case<Method>; 3] {
    let narrow = |method| Some(Method { width: NARROW, ..method });
    [
        ("copy-wide", "a copy, 64 wide", Some(Method::COPY)),
        ("copy-narrow", "a copy, 4 wide", narrow(Method::COPY)),
        ("copy-matched", "matching, 4 wide", narrow(Method::WHOLE)),
    ]
}

fn on_ring(random: &Random, n_steps: u64) -> Result<Experiment> {
    from_one_mode("six modes; the generator begins on one", &ring_cases(), random, n_steps)
}

fn by_copies(random: &Random, n_steps: u64) -> Result<Experiment> {
    from_one_mode("the regression alone, and networks too small for it", &copy_cases(), random, n_steps)
}

fn from_one_mode(title: &str, cases: &[Case<Method>], random: &Random, n_steps: u64) -> Result<Experiment> {
    let mixture = Mixture::ring();
    let data = mixture.sample(random, 0, MEASURED);
    let mut experiment = Experiment::new(title, [1.3, 1.3]);
    for (name, caption, method) in cases {
        let trained = match method {
            None => ring::Trained { samples: mixture.sample(random, 1, MEASURED), pair_distance: 0.0 },
            Some(method) => {
                let n_steps = if *name == "ring-start" { 0 } else { n_steps };
                ring::train(*method, random, n_steps, MEASURED)?
            }
        };
        experiment.add(&mixture, name, caption, &trained.samples, &data, Some(trained.pair_distance))?;
    }
    Ok(experiment)
}

fn mode_cases() -> [Case<(Divergence, f64)>; 6] {
    [
        ("modes-start", "the start", None),
        ("modes-neyman", "neyman", Some((Divergence::Neyman, 0.0))),
        ("modes-reverse-kl", "reverse-kl", Some((Divergence::ReverseKl, 0.0))),
        ("modes-jensen-shannon", "jensen-shannon", Some((Divergence::JensenShannon, 0.0))),
        ("modes-forward-kl", "forward-kl", Some((Divergence::ForwardKl, 0.0))),
        ("modes-regression", "rev.-kl, regression", Some((Divergence::ReverseKl, REGRESSION))),
    ]
}

fn on_two_modes(random: &Random, n_steps: u64) -> Result<Experiment> {
    let mixture = Mixture::two_modes();
    let data = mixture.sample(random, 0, MEASURED);
    let mut experiment =
        Experiment::new("two modes; the generator is one Gaussian and begins on one of them", [2.1, 0.7]);
    for (name, caption, case) in mode_cases() {
        let (divergence, regression) = case.unwrap_or_default();
        let n_steps = if case.is_none() { 0 } else { n_steps };
        let samples = two_modes::train(divergence, regression, random, n_steps, MEASURED)?;
        experiment.add(&mixture, name, caption, &samples, &data, None)?;
    }
    Ok(experiment)
}

fn with_time_scales(random: &Random, n_steps: u64) -> Result<Experiment> {
    let mut panels = Vec::new();
    let mut numbers = Map::new();
    say("\none Gaussian, x = a + b z: a red, b blue; updates of the fake score for each of the generator");
    say(&format!("{:20} {:>10} {:>24}", "", "highest a", "error in the last 4th"));
    for (ratio, name) in RATIOS.into_iter().zip(["ratio-1", "ratio-2", "ratio-5"]) {
        let turns = two_time_scales::Turns { ratio, rate: RATES[0], fake_rate: RATES[1] };
        let path = two_time_scales::train(turns, random, n_steps)?;
        let highest = path.iter().map(|v| v[0]).fold(f64::NEG_INFINITY, f64::max);
        let error = two_time_scales::largest_error(&path[path.len() * 3 / 4..]);
        say(&format!("{name:20} {highest:10.3} {error:24.3}"));
        numbers.insert(name.into(), json!({ "highest_a": highest, "error": error }));
        let caption = format!("ratio {ratio}\nlate error {error:.3}");
        panels.push((name, caption, figure::paths(&path, two_time_scales::TARGET)?));
    }
    Ok(Experiment { panels, numbers, extent: [0.0; 2] })
}

impl Experiment {
    fn new(title: &str, extent: [f64; 2]) -> Self {
        say(&format!("\n{title}"));
        say(&format!(
            "{:20} {:>6} {:>8} {:>7} {:>9} {:>6}  shares",
            "", "modes", "between", "spread", "distance", "pairs"
        ));
        Experiment { panels: Vec::new(), numbers: Map::new(), extent }
    }

    /// Measures and draws one case.
    fn add(
        &mut self,
        mixture: &Mixture,
        name: &'static str,
        caption: &str,
        samples: &[Point],
        data: &[Point],
        pair_distance: Option<f64>,
    ) -> Result<()> {
        let scores = scores(mixture, samples, data)?;
        say(&line(name, &scores, pair_distance));
        let caption = format!("{caption}\ndistance {:.3}", scores.distance);
        self.panels.push((name, caption, figure::scatter(mixture, &samples[..DRAWN], self.extent)?));
        let mut numbers = json!(scores);
        if let Some(distance) = pair_distance {
            numbers["pair_distance"] = json!(distance);
        }
        self.numbers.insert(name.into(), numbers);
        Ok(())
    }
}

fn line(name: &str, s: &Scores, pair_distance: Option<f64>) -> String {
    let shares: Vec<String> = s.shares.iter().map(|share| format!("{share:.2}")).collect();
    let pairs = pair_distance.map_or(String::new(), |distance| format!("{distance:.3}"));
    format!(
        "{name:20} {:>6} {:8.3} {:7.3} {:9.3} {pairs:>6}  {}",
        format!("{}/{}", s.n_covered, s.shares.len()),
        s.between,
        s.spread,
        s.distance,
        shares.join(" ")
    )
}
