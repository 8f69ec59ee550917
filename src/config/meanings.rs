//! The settings as TOML, every key below what it means: the comment of its field in [`Config`], which is the only telling.
//! `docs/method.md` explains at length.

use super::{
    Config, Distance, FakeScoreSettings, GanSettings, GeneratorSettings, GuardSettings, LossSettings,
    RealScoreSettings, RegressionSettings, ScoreLoss,
};
use crate::optim::AdamW;
use anyhow::Result;
use documented::DocumentedFieldsOpt;

/// What the meanings call the papers.
const PAPERS: &str = "DMD, DMD2: Yin et al. 2024 (CVPR, NeurIPS). SiD, SiDA: Zhou et al. 2024 (ICML; arXiv \
                      2410.14919). f-distill: Xu et al. 2025. APT: Lin et al. 2025. docs/method.md explains them to \
                      someone who has read none.";

/// Columns of a comment.
const WIDTH: usize = 100;

/// The settings as TOML, every key and every table below its meaning. [`super::parse`] reads it back.
pub fn explained(config: &Config) -> Result<String> {
    let mut text = format!("{}\n", comment(PAPERS));
    let mut table = String::new();
    for line in toml::to_string(config)?.lines() {
        let meaning = match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(name) => {
                table = format!("{name}.");
                // A choice with a value of its own is a table below its key.
                meaning(name).or_else(|| meaning(name.rsplit_once('.')?.0))
            }
            None => line.split_once(" = ").and_then(|(key, _)| meaning(&format!("{table}{key}"))),
        };
        text += &meaning.map(comment).unwrap_or_default();
        text += line;
        text.push('\n');
    }
    Ok(text)
}

/// The comment of a key's field.
fn meaning(key: &str) -> Option<&'static str> {
    let (table, field) = key.rsplit_once('.').unwrap_or(("", key));
    let comment = match table {
        "" => Config::get_field_docs(field),
        "generator" => GeneratorSettings::get_field_docs(field),
        "real_score" => RealScoreSettings::get_field_docs(field),
        "fake_score" => FakeScoreSettings::get_field_docs(field),
        "loss" => LossSettings::get_field_docs(field),
        "loss.scores.score-identity" => ScoreLoss::get_field_docs("ScoreIdentity"),
        "loss.regression" => RegressionSettings::get_field_docs(field),
        "loss.regression.distance" => Distance::get_field_docs("Onnx"),
        "loss.gan" => GanSettings::get_field_docs(field),
        "guards" => GuardSettings::get_field_docs(field),
        "optimizer" => AdamW::get_field_docs(field),
        _ => return None,
    };
    comment.ok()
}

/// A text as lines of comment.
fn comment(text: &str) -> String {
    let (mut lines, mut line) = (String::new(), String::from("#"));
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines += &format!("{line}\n");
            line = String::from("#");
        }
        line += &format!(" {word}");
    }
    lines + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Distance, Recipe, parse};
    use clap::ValueEnum;

    /// The defaults, every recipe, and the choices that no recipe makes.
    fn configs() -> Vec<Config> {
        let mut configs = vec![Config::default()];
        configs.extend(Recipe::value_variants().iter().map(|recipe| parse::<Config>(recipe.text()).unwrap()));
        let mut other = Config { data: "my \"pictures\" [all] = 7".into(), ..Config::default() };
        other.generator.steps = vec![80.0, 5.0];
        other.loss.regression.distance = Distance::Onnx("features.onnx".into());
        configs.push(other);
        configs
    }

    #[test]
    fn every_key_is_printed_below_its_meaning_and_read_back() {
        for config in configs() {
            let text = explained(&config).unwrap();
            assert_eq!(parse::<Config>(&text).unwrap(), config);
            let mut before = "";
            for line in text.lines() {
                assert!(line.is_empty() || line.starts_with('#') || before.starts_with('#'), "{line}");
                assert!(!line.starts_with('#') || line.chars().count() <= WIDTH, "{line}");
                before = line;
            }
        }
    }
}
