//! Watches the numbers of a run and says in words when they look like one of the known ways to fail, with the remedy.

use super::Health;
use std::collections::{BTreeSet, VecDeque};

/// Updates that are looked at together.
const WINDOW: usize = 40;
/// Updates that mean brightness is averaged over, so that the accidents of a small batch are no swing.
const SMOOTH: usize = 5;
/// Mean brightness that swings by more than this within a window, several times over, oscillates; values are in [-1, 1].
const SWING: f64 = 0.12;
/// Turns of direction in a window that make a swing an oscillation.
const TURNS: usize = 3;
/// A discriminator this sure of both sides has nothing left to teach.
const SURE: f64 = 0.97;
/// Factor by which the samples' standard deviation may leave that of the first window.
const DRIFT: f64 = 1.6;

/// A window of numbers, and what was said already.
#[derive(Default)]
pub struct Monitor {
    means: VecDeque<f64>,
    stds: VecDeque<f64>,
    sure: usize,
    first_std: Option<f64>,
    said: BTreeSet<&'static str>,
}

impl Monitor {
    /// Takes in one update's numbers; returns warnings that were not given before in this run.
    pub fn observe(&mut self, health: &Health) -> Vec<String> {
        let mut warnings = Vec::new();
        let (Some(mean), Some(std)) = (health.get("sample_mean"), health.get("sample_std")) else { return warnings };
        for (window, value) in [(&mut self.means, mean), (&mut self.stds, std)] {
            window.push_back(value);
            if window.len() > WINDOW {
                window.pop_front();
            }
        }
        self.sure = match (health.get("d_real"), health.get("d_fake")) {
            (Some(real), Some(fake)) if real > SURE && fake < 1.0 - SURE => self.sure + 1,
            _ => 0,
        };
        if self.means.len() == WINDOW {
            let means: Vec<f64> =
                self.means.make_contiguous().windows(SMOOTH).map(|w| w.iter().sum::<f64>() / SMOOTH as f64).collect();
            let swing = range(&means);
            if swing > SWING && turns(&means, swing / 3.0) >= TURNS {
                warnings.extend(self.once("brightness", || {
                    format!(
                        "the mean brightness of samples swings by {swing:.2}: the fake score does not keep up; raise ratio, or lower generator.rate"
                    )
                }));
            }
            let now = self.stds.iter().sum::<f64>() / WINDOW as f64;
            let first = *self.first_std.get_or_insert(now);
            if now > first * DRIFT || now < first / DRIFT {
                warnings.extend(self.once("drift", || {
                    format!(
                        "the samples' contrast went from {first:.2} to {now:.2}: they drift away from the data; lower generator.rate, raise ratio, or add loss.regression"
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

    fn once(&mut self, name: &'static str, warning: impl FnOnce() -> String) -> Option<String> {
        self.said.insert(name).then(warning)
    }
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
        (0..3 * WINDOW).flat_map(|i| monitor.observe(&numbers(i).into_iter().collect())).collect()
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
        let saturated =
            warnings(|_| vec![("sample_mean", 0.6), ("sample_std", 0.5), ("d_real", 0.99), ("d_fake", 0.01)]);
        assert!(saturated.len() == 1 && saturated[0].contains("loss.gan"), "{saturated:?}");
    }
}
