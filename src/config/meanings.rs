//! What every setting means: the comments that `dmd config show` prints. `docs/method.md` tells the same at length.

use super::Config;
use anyhow::Result;

/// Every key, in the order of [`Config`]: its meaning, the values it takes, and the paper it is from.
const MEANINGS: &[(&str, &str)] = &[
    ("steps", "Updates of the generator: 1 or more."),
    ("batch", "Samples per update: 1 or more, a multiple of accumulate."),
    (
        "accumulate",
        "Parts that an update's batch is run in, to save memory; their gradients add up to the batch's. A divisor of \
         batch.",
    ),
    (
        "grad_checkpoint",
        "Whether the networks' blocks are computed again for their gradient instead of being kept, to save memory: \
         true or false (Chen et al. 2016, \"Training Deep Nets with Sublinear Memory Cost\").",
    ),
    (
        "precision",
        "What the networks compute in on a GPU: \"f32\" (products in TF32) or \"bf16\". Weights, norms' statistics, \
         losses and the optimiser are f32 always.",
    ),
    ("seed", "Everything random follows from it: 0 or more."),
    (
        "ratio",
        "Updates of the fake score per update of the generator: 1 or more (two-time-scale rule, DMD2, section 4.2, \
         which names 5; SiD makes 1).",
    ),
    (
        "samples",
        "Where the fake score's samples come from: \"fresh\", new ones for every update; \"shared\", its first update \
         takes those of the generator's update, as in DMD2's code.",
    ),
    (
        "data",
        "Pictures for the adversarial term: a folder or a zip, those that the teacher was trained on; \"\" for none.",
    ),
    ("log_every", "Steps between lines of metrics.jsonl: 1 or more."),
    ("sample_every", "Steps between sample grids: 1 or more."),
    ("checkpoint_every", "Steps between checkpoints: 1 or more."),
    ("generator", "The student, which makes a picture in one step or a few."),
    (
        "generator.sigma",
        "The noise level it is held at: a number within the teacher's levels, or \"max\" for the last of them, T − 1. \
         2.5 in SiD, the last in DMD.",
    ),
    (
        "generator.steps",
        "Noise levels of a generator of a few steps, descending, in the place of sigma; [] for one step. Trained by \
         backward simulation (DMD2, section 4.5).",
    ),
    (
        "generator.start",
        "Another run, or its generator's folder, to go on from, as in a second stage; \"\" for the teacher. It should \
         be held at the same sigma.",
    ),
    ("generator.rate", "Learning rate: above 0."),
    ("generator.warmup", "Updates of linear warm-up: 0 or more."),
    (
        "generator.decay",
        "How the rate goes on: \"constant\", or down to 0 at the last update by a half \"cosine\" (Loshchilov and \
         Hutter 2017, SGDR, equation 5) or \"linear\".",
    ),
    (
        "generator.ema",
        "Decay of the moving average of its weights, which is what is exported: 0 or more and below 1; 0 is no \
         average. Of a list, such as [0.99, 0.999], the first is exported and the others are kept beside it.",
    ),
    (
        "generator.t_range",
        "Range of noise levels of the scores' loss, as fractions of T: 0 <= low < high <= 1. [0.02, 0.98] in DMD and \
         DMD2, [0, 0.8] in SiD.",
    ),
    ("real_score", "The teacher, which stays as it is."),
    (
        "real_score.guidance_scale",
        "Classifier-free guidance, uncond + scale·(cond − uncond): 0 or more; 1 is none (Ho and Salimans 2022, \
         equation 6, with scale = 1 + w). Pairs must be made with the same.",
    ),
    ("fake_score", "The critic, which learns the generator's distribution while it changes."),
    ("fake_score.rate", "Learning rate, of the discriminator too: above 0."),
    ("fake_score.warmup", "Its own updates of linear warm-up, ratio of them a step: 0 or more."),
    ("fake_score.decay", "How the rate goes on: \"constant\", \"cosine\" or \"linear\", as the generator's."),
    (
        "fake_score.weight",
        "Weight of a noise level in its loss on x0: \"edm\", 1/σ² + 1/σ_data² (DMD, algorithm 3, for EDM); \"snr\", \
         1/σ² (the same for Stable Diffusion: the plain loss on epsilon); \"uniform\", 1 (FastGen).",
    ),
    (
        "fake_score.t_range",
        "Range of noise levels that it learns, as fractions of T: 0 <= low < high <= 1. All of them in DMD and DMD2.",
    ),
    ("loss", "What the generator learns from."),
    (
        "loss.scores",
        "What is made of the two scores: \"distribution-matching\" (DMD, equations 7 and 8, in the form of algorithm \
         2), or { score-identity = { alpha = 1.2 } }, which is a table of its own in a file (SiD, equations 22 and 23).",
    ),
    (
        "loss.scores.score-identity.alpha",
        "How much of the squared gap between the scores is taken away: above 0. 1.2 in SiD for one step at low \
         resolution, 1 elsewhere.",
    ),
    (
        "loss.divergence",
        "The divergence that distribution matching brings down, by the weight h of a sample whose density is r times \
         higher in the data: \"reverse-kl\" (h = 1), \"softened-reverse-kl\" (1/(r + 1)), \"jensen-shannon\" (r/(r + \
         1)), \"squared-hellinger\" (√r/4), \"forward-kl\" (r), \"jeffreys\" (r + 1) or \"neyman\" (1/r). All but the \
         first need loss.gan and distribution matching (f-distill, theorem 1 and table 1).",
    ),
    (
        "loss.ratio_memory",
        "What a batch leaves of the mean r of its range of noise levels, for those divergences: 0 or more and below \
         1. In f-distill 0 for CIFAR-10 and 0.5 for ImageNet-64.",
    ),
    ("loss.regression", "The regression term, towards the teacher's picture of the same noise (DMD, equation 9)."),
    ("loss.regression.weight", "Its weight: 0 or more; 0 leaves it out. 0.25 in DMD."),
    (
        "loss.regression.distance",
        "How far two pictures are apart: \"l2\"; \"pseudo-huber\" (Song and Dhariwal 2024, section 3.3); \
         \"teacher-features\", by the teacher's own encoder (Zhang et al. 2018, LPIPS, equation 1); or { onnx = \
         \"FILE\" }, by the outputs of any ONNX network.",
    ),
    (
        "loss.regression.distance.onnx",
        "The network: one picture input (B, C, H, W) in [-1, 1], feature maps as outputs.",
    ),
    ("loss.regression.pairs", "The folder that `dmd pairs` wrote; \"\" for none."),
    (
        "loss.gan",
        "The adversarial term: heads on the fake score's encoder tell real pictures from the generator's (DMD2, \
         section 4.3; with score identity, SiDA).",
    ),
    ("loss.gan.weight", "Its weight in the generator's loss: 0 or more. 3e-3 in DMD2 for ImageNet-64."),
    (
        "loss.gan.critic_weight",
        "Weight of the discriminator's loss beside the fake score's, which share an encoder: 0 or more; 0 leaves the \
         whole term out. 1e-2 in DMD2.",
    ),
    (
        "loss.gan.r1",
        "Weight of the approximate R1 penalty within the discriminator's loss: 0 or more (Lin et al. 2025, APT, \
         section 3.4).",
    ),
    ("loss.gan.start_step", "Updates of the generator before the term joins: 0 or more."),
    (
        "loss.gan.resolutions",
        "Resolutions of the encoder that get a head, from the bottleneck upwards: 1, as in DMD2, up to as many as it \
         has.",
    ),
    (
        "loss.gan.t_range",
        "Range of noise levels of the discriminator's inputs, as fractions of T: 0 <= low < high <= 1. All of them in \
         DMD2.",
    ),
    ("guards", "What happens when a run goes astray."),
    ("guards.skip", "Updates in a row that may be skipped because a loss or a gradient is not finite: 0 or more."),
    (
        "guards.returns",
        "Times that a run with more of them goes back to its last checkpoint and on at half the rates, before it \
         stops: 0 or more.",
    ),
    ("optimizer", "AdamW, for all networks (Loshchilov and Hutter 2019, algorithm 2)."),
    (
        "optimizer.betas",
        "Decay of the mean and of the mean square of gradients: each 0 or more and below 1. The first is 0 in SiD, \
         0.9 in DMD and DMD2.",
    ),
    ("optimizer.weight_decay", "Decoupled weight decay: 0 or more. 0.01 in DMD and DMD2."),
    ("optimizer.eps", "Added to the root of the mean square: above 0."),
    (
        "optimizer.clip",
        "Largest L2 norm of a network's gradient; longer ones are scaled down to it: above 0. 10 in DMD and DMD2.",
    ),
];

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

fn meaning(key: &str) -> Option<&'static str> {
    MEANINGS.iter().find(|(name, _)| *name == key).map(|(_, meaning)| *meaning)
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

    #[test]
    fn every_meaning_is_that_of_one_key() {
        let texts: Vec<String> = configs().iter().map(|config| explained(config).unwrap()).collect();
        for (i, (key, meaning)) in MEANINGS.iter().enumerate() {
            assert!(texts.iter().any(|text| text.contains(&comment(meaning))), "{key} is no setting");
            assert!(MEANINGS[..i].iter().all(|(other, _)| other != key), "{key} is told twice");
        }
    }
}
