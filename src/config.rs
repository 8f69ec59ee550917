//! Settings: TOML files with every key checked, and the whole resolved configuration of a distillation.

use crate::optim::{AdamW, Decay};
use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// A distillation, whole: what `--config` may hold and what `config.toml` in the run records.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Updates of the generator.
    pub steps: u64,
    /// Samples per update.
    pub batch: usize,
    /// Everything random follows from it.
    pub seed: u64,
    /// Updates of the fake score per update of the generator (two-time-scale rule, DMD2 section 4.2).
    pub ratio: u64,
    /// Steps between lines of metrics.jsonl.
    pub log_every: u64,
    /// Steps between sample grids.
    pub sample_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// The student.
    pub generator: GeneratorSettings,
    /// The critic that learns the generator's distribution.
    pub fake_score: FakeScoreSettings,
    /// Both networks' optimiser.
    pub optimizer: AdamW,
}

/// Settings of the generator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GeneratorSettings {
    /// The noise level it is held at: a number, or "max" for the teacher's last, T − 1.
    pub sigma: Sigma,
    /// Learning rate.
    pub rate: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// How the rate goes on.
    pub decay: Decay,
    /// Decay of the average of its weights that is exported.
    pub ema: f64,
    /// Range of noise levels of the distribution-matching loss, as fractions of T.
    pub t_range: [f64; 2],
}

/// Settings of the fake score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FakeScoreSettings {
    /// Learning rate.
    pub rate: f64,
    /// Updates of linear warm-up.
    pub warmup: u64,
    /// Range of noise levels it is trained at, as fractions of T.
    pub t_range: [f64; 2],
}

/// A noise level by number or by name.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Sigma {
    /// This sigma.
    Value(f64),
    /// A name.
    Named(SigmaName),
}

/// Names of noise levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SigmaName {
    /// The teacher's highest, T − 1.
    Max,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            steps: 1000,
            batch: 32,
            seed: 0,
            ratio: 5,
            log_every: 10,
            sample_every: 50,
            checkpoint_every: 50,
            generator: GeneratorSettings::default(),
            fake_score: FakeScoreSettings::default(),
            // The first beta of 0 is what SiD, Diff-Instruct and Self-Forcing use for this two-player game.
            optimizer: AdamW { betas: [0.0, 0.999], ..AdamW::default() },
        }
    }
}

impl Default for GeneratorSettings {
    fn default() -> Self {
        GeneratorSettings {
            sigma: Sigma::Value(2.5),
            rate: 1e-4,
            warmup: 10,
            decay: Decay::Constant,
            ema: 0.99,
            t_range: [0.02, 0.98],
        }
    }
}

impl Default for FakeScoreSettings {
    fn default() -> Self {
        FakeScoreSettings { rate: 1e-4, warmup: 10, t_range: [0.0, 1.0] }
    }
}

impl Config {
    /// Checks every field; the error names it, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        at_least_one("steps", self.steps)?;
        at_least_one("batch", self.batch as u64)?;
        at_least_one("ratio", self.ratio)?;
        at_least_one("log_every", self.log_every)?;
        at_least_one("sample_every", self.sample_every)?;
        at_least_one("checkpoint_every", self.checkpoint_every)?;
        positive("generator.rate", self.generator.rate)?;
        positive("fake_score.rate", self.fake_score.rate)?;
        fraction("generator.ema", self.generator.ema)?;
        t_range("generator.t_range", self.generator.t_range)?;
        t_range("fake_score.t_range", self.fake_score.t_range)?;
        if let Sigma::Value(sigma) = self.generator.sigma {
            positive("generator.sigma", sigma)?;
        }
        optimizer(&self.optimizer)
    }
}

/// Checks an optimiser's settings.
pub fn optimizer(settings: &AdamW) -> Result<()> {
    for beta in settings.betas {
        fraction("optimizer.betas", beta)?;
    }
    positive("optimizer.eps", settings.eps)?;
    positive("optimizer.clip", settings.clip)?;
    ensure!(
        settings.weight_decay >= 0.0 && settings.weight_decay.is_finite(),
        "optimizer.weight_decay is {}, expected 0 or more",
        settings.weight_decay
    );
    Ok(())
}

/// A count that must not be zero.
pub fn at_least_one(field: &str, value: u64) -> Result<()> {
    ensure!(value > 0, "{field} is 0, expected at least 1");
    Ok(())
}

/// A positive, finite number.
pub fn positive(field: &str, value: f64) -> Result<()> {
    ensure!(value > 0.0 && value.is_finite(), "{field} is {value}, expected a positive number");
    Ok(())
}

/// A number from 0 up to, but not including, 1.
pub fn fraction(field: &str, value: f64) -> Result<()> {
    ensure!((0.0..1.0).contains(&value), "{field} is {value}, expected 0 or more and below 1");
    Ok(())
}

fn t_range(field: &str, [low, high]: [f64; 2]) -> Result<()> {
    ensure!(0.0 <= low && low < high && high <= 1.0, "{field} is [{low}, {high}], expected 0 <= low < high <= 1");
    Ok(())
}

/// Reads a TOML file on top of the defaults. An unknown key is refused with the nearest known one.
pub fn read<T: Default + Serialize + DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    parse(&text).with_context(|| path.display().to_string())
}

/// The same from a text.
pub fn parse<T: Default + Serialize + DeserializeOwned>(text: &str) -> Result<T> {
    let table: toml::Table =
        toml::from_str(text).map_err(|e| anyhow::anyhow!("not TOML: {}", e.to_string().trim_end()))?;
    let known = serde_json::to_value(T::default())?;
    check_keys(&serde_json::to_value(&table)?, &known, "")?;
    toml::Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| anyhow::anyhow!("{}", e.to_string().trim_end().replace('\n', "; ")))
}

/// The settings as TOML.
pub fn to_toml<T: Serialize>(settings: &T) -> Result<String> {
    Ok(toml::to_string_pretty(settings)?)
}

fn check_keys(found: &Value, known: &Value, prefix: &str) -> Result<()> {
    let (Some(found), Some(known)) = (found.as_object(), known.as_object()) else { return Ok(()) };
    for (key, value) in found {
        let Some(inner) = known.get(key) else {
            let likeness = |name: &&String| (strsim::jaro_winkler(key, name) * 1e6) as u64;
            match known.keys().max_by_key(likeness) {
                Some(nearest) => bail!("unknown key \"{prefix}{key}\", did you mean \"{prefix}{nearest}\"?"),
                None => bail!("unknown key \"{prefix}{key}\""),
            }
        };
        check_keys(value, inner, &format!("{prefix}{key}."))?;
    }
    Ok(())
}

/// The fields in which two settings differ, as `name is A, was B`.
pub fn differences<T: Serialize>(now: &T, before: &T) -> Result<Vec<String>> {
    let mut found = Vec::new();
    collect_differences(&serde_json::to_value(now)?, &serde_json::to_value(before)?, "", &mut found);
    Ok(found)
}

fn collect_differences(now: &Value, before: &Value, name: &str, found: &mut Vec<String>) {
    match (now.as_object(), before.as_object()) {
        (Some(now), Some(before)) => {
            for (key, value) in now {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                collect_differences(value, before.get(key).unwrap_or(&Value::Null), &name, found);
            }
        }
        _ if now != before => found.push(format!("{name} is {now}, was {before}")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_refused_with_the_nearest_one() {
        let error = parse::<Config>("[generator]\nsigmma = 2.5\n").unwrap_err();
        assert_eq!(error.to_string(), "unknown key \"generator.sigmma\", did you mean \"generator.sigma\"?");
    }

    #[test]
    fn every_setting_survives_the_file() {
        let mut config = Config { batch: 7, ..Config::default() };
        config.generator.sigma = Sigma::Named(SigmaName::Max);
        let text = to_toml(&config).unwrap();
        assert!(text.contains("sigma = \"max\""));
        assert_eq!(parse::<Config>(&text).unwrap(), config);
    }

    #[test]
    fn bad_values_are_named() {
        let check = |change: fn(&mut Config), expected: &str| {
            let mut config = Config::default();
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().to_string(), expected);
        };
        check(|c| c.batch = 0, "batch is 0, expected at least 1");
        check(|c| c.generator.ema = 1.0, "generator.ema is 1, expected 0 or more and below 1");
        check(|c| c.generator.t_range = [0.9, 0.1], "generator.t_range is [0.9, 0.1], expected 0 <= low < high <= 1");
        check(|c| c.generator.sigma = Sigma::Value(-1.0), "generator.sigma is -1, expected a positive number");
        assert!(Config::default().validate().is_ok());
    }

    #[test]
    fn differences_name_the_fields() {
        let other = Config { seed: 3, ..Config::default() };
        assert_eq!(differences(&other, &Config::default()).unwrap(), ["seed is 3, was 0"]);
    }
}
