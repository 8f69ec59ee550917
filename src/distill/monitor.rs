//! Watches the numbers of a run and says in words when they look like one of the known ways to fail, with the remedy.

use super::Health;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};

/// Updates that are looked at together.
const WINDOW: usize = 40;
/// Updates that mean brightness is averaged over, so that the accidents of a small batch are no swing.
const SMOOTH: usize = 5;
/// Mean brightness that swings by more than this within a window, several times over, oscillates; values are in [-1, 1].
const SWING: f64 = 0.12;
/// Turns of direction in a window that make a swing an oscillation.
const TURNS: usize = 3;
/// A discriminator whose probabilities of real and generated pictures are this far apart has little left to teach: over
/// all noise levels, at the highest of which nobody can tell the two, more is hardly seen.
const APART: f64 = 0.8;
/// Factor by which the samples' standard deviation may leave that of the first window.
const DRIFT: f64 = 1.6;
/// Prompts that change less of a picture than this part of what another noise changes are ignored.
const IGNORED: f64 = 0.02;
/// What their mean may leave that of the first window by, of the values' [-1, 1].
const DRIFT_OF_MEAN: f64 = 0.5;

/// A window of numbers, what the first one was like, and what was said already. A checkpoint keeps it: in f32, whose
/// decimals are read back as the same number.
#[derive(Default, Serialize, Deserialize)]
pub struct Monitor {
    means: VecDeque<f32>,
    stds: VecDeque<f32>,
    sure: usize,
    /// Mean and standard deviation.
    first: Option<[f32; 2]>,
    said: BTreeSet<String>,
}

impl Monitor {
    /// Takes in what another prompt changes, in the parts of what another noise changes; returns a warning that was not given
    /// before in this run.
    pub fn prompts(&mut self, effect: f64) -> Option<String> {
        let warning = || {
            format!(
                "another prompt changes the pictures by {effect:.3} of what another noise changes: prompts are ignored; raise real_score.guidance_scale, or see whether the prompts are such as the teacher knows"
            )
        };
        if effect < IGNORED { self.once("prompts", warning) } else { None }
    }

    /// Takes in one update's numbers; returns warnings that were not given before in this run. `guided`: the real score is.
    pub fn observe(&mut self, health: &Health, guided: bool) -> Vec<String> {
        let mut warnings = Vec::new();
        let (Some(mean), Some(std)) = (health.get("sample_mean"), health.get("sample_std")) else { return warnings };
        for (window, value) in [(&mut self.means, mean), (&mut self.stds, std)] {
            window.push_back(value as f32);
            if window.len() > WINDOW {
                window.pop_front();
            }
        }
        self.sure = match (health.get("d_real"), health.get("d_fake")) {
            (Some(real), Some(fake)) if real - fake > APART => self.sure + 1,
            _ => 0,
        };
        if self.means.len() == WINDOW {
            let means: Vec<f64> = self.means.make_contiguous().windows(SMOOTH).map(average).collect();
            let swing = range(&means);
            if swing > SWING && turns(&means, swing / 3.0) >= TURNS {
                warnings.extend(self.once("brightness", || {
                    format!(
                        "the mean brightness of samples swings by {swing:.2}: the fake score does not keep up; raise ratio, or lower generator.rate"
                    )
                }));
            }
            let now = [average(&self.means), average(&self.stds)];
            let [first_mean, first_std] = self.first.get_or_insert(now.map(|value| value as f32)).map(f64::from);
            let [mean, std] = now;
            let drifted = match () {
                () if std > first_std * DRIFT || std < first_std / DRIFT => Some(("contrast", first_std, std)),
                () if (mean - first_mean).abs() > DRIFT_OF_MEAN => Some(("mean brightness", first_mean, mean)),
                () => None,
            };
            if let Some((what, first, now)) = drifted {
                warnings.extend(self.once("drift", || {
                    let burns = match guided && now > first && what == "contrast" {
                        true => "; guidance burns colours: lower real_score.guidance_scale, or raise real_score.rescale",
                        false => "",
                    };
                    format!(
                        "the samples' {what} went from {first:.2} to {now:.2}: they drift away from the data; lower generator.rate, raise ratio, or add loss.regression{burns}"
                    )
                }));
            }
        }
        if self.sure >= WINDOW {
            warnings.extend(self.once("discriminator", || {
                "the discriminator tells real from generated without fail and teaches nothing any more; lower loss.gan.critic_weight, raise loss.gan.r1, or lower loss.gan.weight".into()
            }));
        }
        warnings
    }

    fn once(&mut self, name: &str, warning: impl FnOnce() -> String) -> Option<String> {
        self.said.insert(name.into()).then(warning)
    }
}

fn average<'a>(values: impl IntoIterator<Item = &'a f32, IntoIter: ExactSizeIterator>) -> f64 {
    let values = values.into_iter();
    let n = values.len();
    values.map(|value| f64::from(*value)).sum::<f64>() / n as f64
}

fn range(values: &[f64]) -> f64 {
    let fold = |f: fn(f64, f64) -> f64| values.iter().copied().reduce(f).unwrap_or(0.0);
    fold(f64::max) - fold(f64::min)
}

/// How often the series turns round by at least `step`.
fn turns(values: &[f64], step: f64) -> usize {
    let (mut n, mut up, mut extreme) = (0, None, values[0]);
    for &value in values {
        match up {
            Some(true) if value > extreme => extreme = value,
            Some(false) if value < extreme => extreme = value,
            _ if (value - extreme).abs() >= step => {
                n += usize::from(up.is_some());
                up = Some(value > extreme);
                extreme = value;
            }
            _ => {}
        }
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(numbers: impl Fn(usize) -> Vec<(&'static str, f64)>) -> Vec<String> {
        let mut monitor = Monitor::default();
        (0..3 * WINDOW).flat_map(|i| monitor.observe(&numbers(i).into_iter().collect(), false)).collect()
    }

    fn calm(_: usize) -> Vec<(&'static str, f64)> {
        vec![("sample_mean", 0.6), ("sample_std", 0.5), ("d_real", 0.6), ("d_fake", 0.4)]
    }

    #[test]
    fn a_calm_run_is_left_alone() {
        assert!(warnings(calm).is_empty());
        // A slow move, as at the start of every run, and noise are no oscillation.
        let moving = |i| vec![("sample_mean", 0.6 - 0.003 * i as f64), ("sample_std", 0.5 + 0.01 * (i % 3) as f64)];
        assert!(warnings(moving).is_empty());
        // What a batch of 32 does by accident: up and down by up to 0.08, without a memory.
        let draws = dmd_runtime::noise::Stream::new(1, 0, 0).uniform(3 * WINDOW);
        let accidents = |i: usize| vec![("sample_mean", 0.6 + 0.16 * (draws[i] - 0.5)), ("sample_std", 0.5)];
        assert!(warnings(accidents).is_empty());
    }

    /// A run that goes on from a checkpoint is held against its own beginning, and repeats no warning.
    #[test]
    fn a_run_that_goes_on_remembers() {
        let numbers = |mean: f64| -> Health { [("sample_mean", mean), ("sample_std", 0.5)].into_iter().collect() };
        let mut before = Monitor::default();
        assert!((0..WINDOW).all(|_| before.observe(&numbers(0.6), false).is_empty()));
        let after = |saved: &str| -> (Vec<String>, String) {
            let mut monitor: Monitor = serde_json::from_str(saved).unwrap();
            let warnings = (0..WINDOW).flat_map(|_| monitor.observe(&numbers(0.0), false)).collect();
            (warnings, serde_json::to_string(&monitor).unwrap())
        };
        let (warnings, saved) = after(&serde_json::to_string(&before).unwrap());
        assert!(warnings.len() == 1 && warnings[0].contains("mean brightness went from 0.60"), "{warnings:?}");
        assert!(after(&saved).0.is_empty());
    }

    #[test]
    fn burnt_colours_and_ignored_prompts_are_said_once() {
        let mut monitor = Monitor::default();
        let numbers =
            |i: i32| -> Health { [("sample_mean", 0.0), ("sample_std", 0.5 * 1.01f64.powi(i))].into_iter().collect() };
        let said: Vec<String> = (0..120).flat_map(|i| monitor.observe(&numbers(i), true)).collect();
        assert!(said.len() == 1 && said[0].ends_with("or raise real_score.rescale"), "{said:?}");
        assert_eq!(monitor.prompts(0.3), None);
        assert!(monitor.prompts(0.001).unwrap().contains("by 0.001 of what another noise changes"));
        assert_eq!(monitor.prompts(0.001), None);
    }

    #[test]
    fn each_way_to_fail_is_named_once_with_its_remedy() {
        let with = |name: &'static str, value: fn(usize) -> f64| {
            move |i: usize| {
                let mut numbers = calm(i);
                numbers.retain(|(n, _)| *n != name);
                numbers.push((name, value(i)));
                numbers
            }
        };
        let swinging = warnings(with("sample_mean", |i| 0.6 + 0.1 * (i as f64 * 0.4).sin()));
        assert!(swinging.len() == 1 && swinging[0].contains("raise ratio"), "{swinging:?}");
        let drifting = warnings(with("sample_std", |i| 0.5 * 1.01f64.powi(i as i32)));
        assert!(drifting.len() == 1 && drifting[0].contains("lower generator.rate"), "{drifting:?}");
        let fading = warnings(with("sample_mean", |i| 0.6 - 0.01 * i as f64));
        assert!(fading.len() == 1 && fading[0].contains("mean brightness went from"), "{fading:?}");
        // What a discriminator reaches over noise levels up to 0.3 of the table against a generator that stands still.
        let saturated =
            warnings(|_| vec![("sample_mean", 0.6), ("sample_std", 0.5), ("d_real", 0.99), ("d_fake", 0.08)]);
        assert!(saturated.len() == 1 && saturated[0].contains("loss.gan"), "{saturated:?}");
    }
}
