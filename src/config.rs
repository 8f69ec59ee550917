//! Settings: TOML files with every key checked, and the whole resolved configuration of a distillation.

mod meanings;
pub use meanings::explained;

use crate::loss::{Divergence, fake_score_weight};
use crate::optim::{AdamW, Decay};
use crate::train::Settings;
use anyhow::{Context, Result, bail, ensure};
use dmd_models::{Precision, Takes, Way};
use documented::DocumentedFieldsOpt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt::{self, Display};
use std::path::Path;

/// A distillation, whole: what `--config` may hold and what `config.toml` in the run records. The defaults are plain
/// distribution matching, which needs nothing but a teacher.
#[derive(Clone, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Updates of the generator: 1 or more.
    pub steps: u64,
    /// Samples per update: 1 or more, a multiple of accumulate.
    pub batch: usize,
    /// Parts that an update's batch is run in, to save memory; their gradients add up to the batch's. A divisor of
    /// batch.
    pub accumulate: usize,
    /// Whether the networks' blocks are computed again for their gradient instead of being kept, to save memory: true
    /// or false (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    pub grad_checkpoint: bool,
    /// What the networks compute in on a GPU: "f32" (products in TF32) or "bf16". Weights, norms' statistics, losses
    /// and the optimiser are f32 always.
    pub precision: Precision,
    /// Everything random follows from it: 0 or more.
    pub seed: u64,
    /// Updates of the fake score per update of the generator: 1 or more (two-time-scale rule, DMD2, section 4.2, which
    /// names 5; SiD makes 1).
    pub ratio: u64,
    /// Where the fake score's samples come from: "fresh", new ones for every update; "shared", its first update takes
    /// those of the generator's update, as in DMD2's code.
    pub samples: Samples,
    /// Pictures for the adversarial term: a folder or a zip, those that the teacher was trained on, for a teacher of text
    /// with captions (captions.jsonl, metadata.jsonl, metadata.csv, or a .txt beside each); "" for none.
    pub data: String,
    /// Prompts for a teacher of text: a file in UTF-8, one a line, drawn with equal chances; "" for none, or for the captions
    /// of data.
    pub prompts: String,
    /// Steps between lines of metrics.jsonl: 1 or more.
    pub log_every: u64,
    /// Steps between sample grids: 1 or more.
    pub sample_every: u64,
    /// Steps between checkpoints: 1 or more.
    pub checkpoint_every: u64,
    /// The student, which makes a picture in one step or a few.
    pub generator: GeneratorSettings,
    /// The teacher, which stays as it is.
    pub real_score: RealScoreSettings,
    /// The critic, which learns the generator's distribution while it changes.
    pub fake_score: FakeScoreSettings,
    /// What the generator learns from.
    pub loss: LossSettings,
    /// What happens when a run goes astray.
    pub guards: GuardSettings,
    /// AdamW, for all networks (Loshchilov and Hutter 2019, algorithm 2).
    pub optimizer: AdamW,
}

/// Settings of the generator.
#[derive(Clone, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GeneratorSettings {
    /// The noise level it is held at: a number within the teacher's levels, or "max" for the last of them, T − 1. 2.5
    /// in SiD, the last in DMD.
    pub sigma: Sigma,
    /// Noise levels of a generator of a few steps, descending, in the place of sigma; [] for one step. Trained by
    /// backward simulation (DMD2, section 4.5).
    pub steps: Vec<f64>,
    /// The same by their places in the teacher's table, in the place of both: one, or several, descending; [] for none.
    /// 999 in DMD2 for Stable Diffusion 1.5, 399 for SDXL in one step, [999, 749, 499, 249] in four; 625 in SiD-LSG.
    pub timestep: Timestep,
    /// Another run, or its generator's folder, to go on from, as in a second stage; "" for the teacher. It should be
    /// held at the same sigma.
    pub start: String,
    /// Learning rate: above 0.
    pub rate: f64,
    /// Updates of linear warm-up: 0 or more.
    pub warmup: u64,
    /// How the rate goes on: "constant", or down to 0 at the last update by a half "cosine" (Loshchilov and Hutter
    /// 2017, SGDR, equation 5) or "linear".
    pub decay: Decay,
    /// Decay of the moving average of its weights, which is what is exported: 0 or more and below 1; 0 is no average.
    /// Of a list, such as [0.99, 0.999], the first is exported and the others are kept beside it.
    pub ema: Ema,
    /// Range of noise levels of the scores' loss, as fractions of T: 0 <= low < high <= 1. [0.02, 0.98] in DMD and
    /// DMD2, [0, 0.8] in SiD.
    pub t_range: [f64; 2],
}

/// Settings of the real score.
#[derive(Clone, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RealScoreSettings {
    /// Classifier-free guidance, uncond + scale·(cond − uncond): 0 or more; 1 is none (Ho and Salimans 2022, equation
    /// 6, with scale = 1 + w). Pairs must be made with the same. Of text 1.75 in DMD2 for Stable Diffusion 1.5, 8 for SDXL.
    pub guidance_scale: f64,
    /// The prompt that a teacher of text is guided away from; "" for nothing, which is the empty prompt, or zeros where the
    /// teacher's pipeline says so (SDXL).
    pub negative: String,
    /// How much of the condition's own norm a guided answer is given back, against colours that burn: 0 (none, as in the
    /// papers of DMD) to 1 (all of it, as in the trainers of Qwen-Image and FLUX) (Lin et al. 2024, section 3.4).
    pub rescale: f64,
}

/// Settings of the fake score.
#[derive(Clone, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FakeScoreSettings {
    /// Learning rate, of the discriminator too: above 0.
    pub rate: f64,
    /// Its own updates of linear warm-up, ratio of them a step: 0 or more.
    pub warmup: u64,
    /// How the rate goes on: "constant", "cosine" or "linear", as the generator's.
    pub decay: Decay,
    /// Weight of a noise level in its loss on x0: "edm", 1/σ² + 1/σ_data² (DMD, algorithm 3, for EDM); "snr", 1/σ² (the
    /// same for Stable Diffusion: the plain loss on epsilon); "uniform", 1 (FastGen).
    pub weight: CriticWeight,
    /// Range of noise levels that it learns, as fractions of T: 0 <= low < high <= 1. All of them in DMD and DMD2.
    pub t_range: [f64; 2],
    /// Guidance of its own answers, as it learns and as it is asked: 0 or more; 1 is none. Of the real score's scale, with
    /// dropout, it is long and short guidance (Zhou et al. 2024, SiD-LSG).
    pub guidance_scale: f64,
    /// Share of samples that it learns without their condition: 0 or more and below 1. 0.1 in SiD-LSG.
    pub dropout: f64,
    /// How far its weights are drawn to the generator's after each of the generator's updates: 0 or more and below 1. 0.03 in
    /// SenseFlow (Ge et al. 2025), which so makes do with a lower ratio.
    pub pull: f64,
}

/// What the generator learns from.
#[derive(Clone, Debug, Default, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossSettings {
    /// What is made of the two scores: "distribution-matching" (DMD, equations 7 and 8, in the form of algorithm 2), or
    /// { score-identity = { alpha = 1.2 } }, which is a table of its own in a file (SiD, equations 22 and 23).
    pub scores: ScoreLoss,
    /// The divergence that distribution matching brings down, by the weight h of a sample whose density is r times
    /// higher in the data: "reverse-kl" (h = 1), "softened-reverse-kl" (1/(r + 1)), "jensen-shannon" (r/(r + 1)),
    /// "squared-hellinger" (√r/4), "forward-kl" (r), "jeffreys" (r + 1) or "neyman" (1/r). All but the first need
    /// loss.gan and distribution matching (f-distill, theorem 1 and table 1).
    pub divergence: Divergence,
    /// What a batch leaves of the mean r of its range of noise levels, for those divergences: 0 or more and below 1. In
    /// f-distill 0 for CIFAR-10 and 0.5 for ImageNet-64.
    pub ratio_memory: f64,
    /// What the teacher's mean error, by which a sample's pull is divided, counts for at least: 0 or more. 0 in DMD; 0.1 is
    /// offered by LightX2V's trainer, against the strong pull where the generator is nearly right.
    pub floor: f64,
    /// The regression term, towards the teacher's picture of the same noise (DMD, equation 9).
    pub regression: RegressionSettings,
    /// The adversarial term: heads on the fake score's encoder tell real pictures from the generator's (DMD2, section
    /// 4.3; with score identity, SiDA).
    pub gan: GanSettings,
}

/// Settings of the regression term.
#[derive(Clone, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegressionSettings {
    /// Its weight: 0 or more; 0 leaves it out. 0.25 in DMD.
    pub weight: f64,
    /// How far two pictures are apart: "l2"; "pseudo-huber" (Song and Dhariwal 2024, section 3.3); "teacher-features",
    /// by the teacher's own encoder (Zhang et al. 2018, LPIPS, equation 1); or { onnx = "FILE" }, by the outputs of any
    /// ONNX network.
    pub distance: Distance,
    /// The folder that `dmd pairs` wrote; "" for none.
    pub pairs: String,
}

/// Settings of the adversarial term.
#[derive(Clone, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GanSettings {
    /// Its weight in the generator's loss: 0 or more. 3e-3 in DMD2 for ImageNet-64.
    pub weight: f64,
    /// Weight of the discriminator's loss beside the fake score's, which share an encoder: 0 or more; 0 leaves the
    /// whole term out. 1e-2 in DMD2.
    pub critic_weight: f64,
    /// Weight of the approximate R1 penalty within the discriminator's loss: 0 or more (Lin et al. 2025, APT, section
    /// 3.4).
    pub r1: f64,
    /// Updates of the generator before the term joins: 0 or more.
    pub start_step: u64,
    /// Resolutions of the encoder that get a head, from the bottleneck upwards: 1, as in DMD2, up to as many as it has.
    pub resolutions: usize,
    /// Range of noise levels of the discriminator's inputs, as fractions of T: 0 <= low < high <= 1. All of them in
    /// DMD2.
    pub t_range: [f64; 2],
}

/// What happens when a run goes astray.
#[derive(Clone, Debug, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardSettings {
    /// Updates in a row that may be skipped because a loss or a gradient is not finite: 0 or more.
    pub skip: u64,
    /// Times that a run with more of them goes back to its last checkpoint and on at half the rates, before it stops: 0
    /// or more.
    pub returns: u64,
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

/// Decay of a moving average, or of several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Ema {
    /// One average.
    One(f64),
    /// Several, the first of which is exported.
    Several(Vec<f64>),
}

/// Places in the teacher's table of noise levels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Timestep {
    /// Of a generator of one step.
    One(usize),
    /// Of each step, or none.
    Several(Vec<usize>),
}

impl Timestep {
    /// All of them.
    pub fn all(&self) -> &[usize] {
        match self {
            Timestep::One(timestep) => std::slice::from_ref(timestep),
            Timestep::Several(timesteps) => timesteps,
        }
    }
}

impl Ema {
    /// All decays.
    pub fn decays(&self) -> &[f64] {
        match self {
            Ema::One(decay) => std::slice::from_ref(decay),
            Ema::Several(decays) => decays,
        }
    }
}

/// Where the fake score's samples come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Samples {
    /// New ones for every update.
    Fresh,
    /// Its first update takes those of the generator's update, as DMD2's loop does; saves one pass of the generator.
    Shared,
}

/// Weight of a noise level in the fake score's loss, on x0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CriticWeight {
    /// 1/σ² + 1/σ_data² (DMD, algorithm 3, for EDM).
    Edm,
    /// 1, as in FastGen.
    Uniform,
    /// 1/σ² (DMD, algorithm 3, for Stable Diffusion): the plain loss on epsilon.
    Snr,
}

impl CriticWeight {
    /// The weight at this noise level.
    pub fn at(self, sigma: f64, sigma_data: f64) -> f64 {
        match self {
            CriticWeight::Edm => fake_score_weight(sigma, sigma_data),
            CriticWeight::Uniform => 1.0,
            CriticWeight::Snr => 1.0 / (sigma * sigma),
        }
    }
}

/// What the generator's loss makes of the two scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ScoreLoss {
    /// Distribution matching (DMD).
    #[default]
    DistributionMatching,
    /// The score-identity loss (SiD, equations 22 and 23). alpha is how much of the squared gap between the scores is
    /// taken away: above 0. 1.2 in SiD for one step at low resolution, 1 elsewhere.
    ScoreIdentity {
        /// As above.
        alpha: f64,
    },
}

/// How far two pictures are apart.
#[derive(Clone, Debug, Default, PartialEq, DocumentedFieldsOpt, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Distance {
    /// Mean square.
    L2,
    /// Between square and absolute value.
    PseudoHuber,
    /// Features of the teacher's own encoder at a low noise level: perceptual, with nothing to download.
    #[default]
    TeacherFeatures,
    /// The network: one picture input (B, C, H, W) in [-1, 1], feature maps as outputs.
    Onnx(String),
}

impl Settings for Config {
    const OF_NO_WEIGHT: &'static [&'static str] = &[
        "data",
        "prompts",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "loss.regression.pairs",
        "loss.regression.distance.onnx",
    ];
    const ON_THE_WAY: &'static [&'static str] = &[
        "steps",
        "accumulate",
        "grad_checkpoint",
        "generator.rate",
        "generator.decay",
        "fake_score.rate",
        "fake_score.decay",
        "guards.skip",
        "guards.returns",
    ];
}

impl Default for Config {
    fn default() -> Self {
        Config {
            steps: 1000,
            batch: 32,
            accumulate: 1,
            grad_checkpoint: false,
            precision: Precision::F32,
            seed: 0,
            ratio: 5,
            samples: Samples::Fresh,
            data: String::new(),
            prompts: String::new(),
            log_every: 10,
            sample_every: 50,
            checkpoint_every: 50,
            generator: GeneratorSettings::default(),
            real_score: RealScoreSettings::default(),
            fake_score: FakeScoreSettings::default(),
            loss: LossSettings::default(),
            guards: GuardSettings::default(),
            // The first beta of 0 is what SiD, Diff-Instruct and Self-Forcing use for this two-player game.
            optimizer: AdamW { betas: [0.0, 0.999], ..AdamW::default() },
        }
    }
}

impl Default for GeneratorSettings {
    fn default() -> Self {
        GeneratorSettings {
            sigma: Sigma::Value(2.5),
            steps: Vec::new(),
            timestep: Timestep::Several(Vec::new()),
            start: String::new(),
            rate: 1e-4,
            warmup: 10,
            decay: Decay::Constant,
            ema: Ema::One(0.99),
            t_range: [0.2, 0.98],
        }
    }
}

impl Default for RealScoreSettings {
    fn default() -> Self {
        RealScoreSettings { guidance_scale: 1.0, negative: String::new(), rescale: 0.0 }
    }
}

impl Default for FakeScoreSettings {
    fn default() -> Self {
        FakeScoreSettings {
            rate: 1e-4,
            warmup: 10,
            decay: Decay::Constant,
            weight: CriticWeight::Edm,
            t_range: [0.0, 1.0],
            guidance_scale: 1.0,
            dropout: 0.0,
            pull: 0.0,
        }
    }
}

impl Default for RegressionSettings {
    fn default() -> Self {
        RegressionSettings { weight: 0.0, distance: Distance::default(), pairs: String::new() }
    }
}

impl Default for GanSettings {
    fn default() -> Self {
        GanSettings { weight: 0.0, critic_weight: 0.0, r1: 0.0, start_step: 0, resolutions: 1, t_range: [0.0, 1.0] }
    }
}

impl GanSettings {
    /// Whether there is a discriminator.
    pub fn on(&self) -> bool {
        self.critic_weight > 0.0
    }
}

impl Default for GuardSettings {
    fn default() -> Self {
        GuardSettings { skip: 5, returns: 0 }
    }
}

impl Config {
    /// Checks every field that can be checked without the teacher; the error names it, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(WrongUsage::of)
    }

    fn check(&self) -> Result<()> {
        count("steps", self.steps)?;
        count("batch", self.batch as u64)?;
        parts_of_batch(self.accumulate, self.batch)?;
        count("ratio", self.ratio)?;
        at_least_one("log_every", self.log_every)?;
        at_least_one("sample_every", self.sample_every)?;
        at_least_one("checkpoint_every", self.checkpoint_every)?;
        self.generator.validate()?;
        positive("fake_score.rate", self.fake_score.rate)?;
        not_negative("fake_score.guidance_scale", self.fake_score.guidance_scale)?;
        fraction("fake_score.dropout", self.fake_score.dropout)?;
        fraction("fake_score.pull", self.fake_score.pull)?;
        not_negative("loss.floor", self.loss.floor)?;
        let rescale = self.real_score.rescale;
        require((0.0..=1.0).contains(&rescale), || format!("real_score.rescale is {rescale}, expected 0 to 1"))?;
        ensure!(
            rescale == 0.0 || self.real_score.guidance_scale != 1.0,
            "real_score.rescale is {rescale} and real_score.guidance_scale is 1: there is no guidance to rescale"
        );
        t_range("fake_score.t_range", self.fake_score.t_range)?;
        not_negative("real_score.guidance_scale", self.real_score.guidance_scale)?;
        ensure!(
            self.real_score.negative.is_empty() || self.real_score.guidance_scale != 1.0,
            "real_score.negative is {:?} and real_score.guidance_scale is 1, which guides away from nothing: give a scale, or no negative prompt",
            self.real_score.negative
        );
        self.loss.validate(&self.data)?;
        let gan = &self.loss.gan;
        ensure!(
            !gan.on() || gan.start_step < self.steps,
            "loss.gan.start_step is {}, expected below steps ({}): the term would never join",
            gan.start_step,
            self.steps
        );
        optimizer(&self.optimizer)
    }
}

impl GeneratorSettings {
    fn validate(&self) -> Result<()> {
        positive("generator.rate", self.rate)?;
        ensure!(!self.ema.decays().is_empty(), "generator.ema is [], expected at least one decay");
        for decay in self.ema.decays() {
            fraction("generator.ema", *decay)?;
        }
        t_range("generator.t_range", self.t_range)?;
        if let Sigma::Value(sigma) = self.sigma {
            positive("generator.sigma", sigma)?;
        }
        let descending = self.steps.windows(2).all(|pair| pair[0] > pair[1]);
        ensure!(descending, "generator.steps is {:?}, expected descending noise levels", self.steps);
        self.steps.iter().try_for_each(|sigma| positive("generator.steps", *sigma))?;
        let timesteps = self.timestep.all();
        let descending = timesteps.windows(2).all(|pair| pair[0] > pair[1]);
        ensure!(descending, "generator.timestep is {timesteps:?}, expected descending");
        ensure!(
            timesteps.is_empty() || (self.steps.is_empty() && self.sigma == GeneratorSettings::default().sigma),
            "generator.timestep is {timesteps:?} and generator.{} is given too: one of them says where the generator is held; \
             --set generator.timestep=[] takes the other",
            if self.steps.is_empty() { "sigma" } else { "steps" }
        );
        Ok(())
    }
}

impl LossSettings {
    fn validate(&self, data: &str) -> Result<()> {
        fraction("loss.ratio_memory", self.ratio_memory)?;
        if let ScoreLoss::ScoreIdentity { alpha } = self.scores {
            positive("loss.scores.score-identity.alpha", alpha)?;
            ensure!(
                self.divergence == Divergence::ReverseKl,
                "loss.divergence weighs distribution matching, not the score-identity loss: give --recipe plain, dmd2 or f-js, or leave it out"
            );
        }
        not_negative("loss.regression.weight", self.regression.weight)?;
        ensure!(
            self.regression.weight == 0.0 || !self.regression.pairs.is_empty(),
            "loss.regression.weight is {} and there are no pairs: make them with `dmd pairs TEACHER --out PAIRS` and give --pairs PAIRS",
            self.regression.weight
        );
        let gan = &self.gan;
        not_negative("loss.gan.weight", gan.weight)?;
        not_negative("loss.gan.critic_weight", gan.critic_weight)?;
        not_negative("loss.gan.r1", gan.r1)?;
        at_least_one("loss.gan.resolutions", gan.resolutions as u64)?;
        t_range("loss.gan.t_range", gan.t_range)?;
        ensure!(
            gan.on() || (gan.weight == 0.0 && gan.r1 == 0.0),
            "loss.gan.weight is {} without a discriminator: loss.gan.critic_weight must be above 0 (0.01 in DMD2)",
            gan.weight
        );
        ensure!(
            gan.on() || !self.divergence.needs_discriminator(),
            "loss.divergence needs a discriminator, which tells the density ratio: set loss.gan.critic_weight (0.01 in DMD2) and --data"
        );
        ensure!(
            !gan.on() || !data.is_empty(),
            "loss.gan needs real pictures: give --data PATH, the folder or zip that the teacher was trained on"
        );
        Ok(())
    }
}

/// Refuses to guide a teacher that cannot be; `setting` is where `scale` was given.
pub fn check_guidance(setting: &str, scale: f64, takes: &Takes, null_class: bool) -> Result<()> {
    if takes.told.get(Way::Text).is_some() {
        return Ok(());
    }
    ensure!(
        scale == 1.0 || takes.n_classes().is_some(),
        "{setting} is {scale}, but the teacher has no classes to be guided by: leave it at 1"
    );
    ensure!(
        scale == 1.0 || null_class,
        "{setting} is {scale}, but the teacher knows no pictures without a class: train it with --label-dropout, or leave guidance at 1; where the last row of its class table stands for no class, say \"null_class\": true in its dmd.json"
    );
    Ok(())
}

/// Refuses a fake score that is guided, or shown samples without a condition, where the teacher knows none such.
pub fn check_critic(config: &Config, takes: &Takes, null_class: bool) -> Result<()> {
    let FakeScoreSettings { guidance_scale, dropout, .. } = config.fake_score;
    check_guidance("fake_score.guidance_scale", guidance_scale, takes, null_class)?;
    // Dropout asks of the teacher what guidance does.
    check_guidance("fake_score.dropout", if dropout > 0.0 { dropout } else { 1.0 }, takes, null_class)
}

/// Refuses prompts for a teacher that is told no text, and a teacher of text without prompts.
pub fn check_prompts(config: &Config, takes: &Takes) -> Result<()> {
    let (given, negative) = (!config.prompts.is_empty(), &config.real_score.negative);
    match takes.told.get(Way::Text) {
        Some(_) => require(given || config.loss.gan.on(), || {
            "the teacher is told text: give --prompts FILE, prompts for it to draw by, one a line".into()
        }),
        None => {
            require(!given, || format!("--prompts {}: the teacher is told no text", config.prompts))?;
            require(negative.is_empty(), || format!("real_score.negative is {negative:?}: the teacher is told no text"))
        }
    }
}

/// Settings that belong together, as committed files under `src/recipes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Recipe {
    /// Score identity (Zhou et al. 2024, SiD): the best for the time here, and nothing but the teacher is needed.
    #[default]
    Sid,
    /// The same with one update of the fake score per update: the least time.
    Fast,
    /// Score identity with the adversarial term (Zhou et al. 2024, SiDA): the best on emoji-16, and it needs pictures.
    Sida,
    /// Plain distribution matching (Yin et al. 2024, DMD, without its regression term).
    Plain,
    /// Distribution matching with the regression term (Yin et al. 2024, DMD).
    Dmd,
    /// Distribution matching with the adversarial term (Yin et al. 2024, DMD2).
    Dmd2,
    /// The same for the Jensen-Shannon divergence (Xu et al. 2025, f-distill).
    FJs,
    /// Distribution matching for Stable Diffusion 1.5: the first stage of DMD2 there, without pictures. Needs --prompts.
    Sd15,
    /// Score identity with long and short guidance for Stable Diffusion 1.5 (Zhou et al. 2024, SiD-LSG). Needs --prompts.
    Sd15Lsg,
    /// Distribution matching with the adversarial term for SDXL in four steps, as in DMD2. Needs --data with captions.
    #[value(name = "sdxl-4step")]
    Sdxl4Step,
    /// Distribution matching for a small teacher of text. Needs --prompts.
    TextSmall,
}

impl Recipe {
    /// The file.
    pub fn text(self) -> &'static str {
        match self {
            Recipe::Sid => include_str!("recipes/sid.toml"),
            Recipe::Fast => include_str!("recipes/fast.toml"),
            Recipe::Sida => include_str!("recipes/sida.toml"),
            Recipe::Plain => include_str!("recipes/plain.toml"),
            Recipe::Dmd => include_str!("recipes/dmd.toml"),
            Recipe::Dmd2 => include_str!("recipes/dmd2.toml"),
            Recipe::FJs => include_str!("recipes/f-js.toml"),
            Recipe::Sd15 => include_str!("recipes/sd15.toml"),
            Recipe::Sd15Lsg => include_str!("recipes/sd15-lsg.toml"),
            Recipe::Sdxl4Step => include_str!("recipes/sdxl-4step.toml"),
            Recipe::TextSmall => include_str!("recipes/text-small.toml"),
        }
    }
}

/// Checks an optimiser's settings.
pub fn optimizer(settings: &AdamW) -> Result<()> {
    for beta in settings.betas {
        fraction("optimizer.betas", beta)?;
    }
    positive("optimizer.eps", settings.eps)?;
    positive("optimizer.clip", settings.clip)?;
    not_negative("optimizer.weight_decay", settings.weight_decay)
}

/// A setting, or an option that is looked at after parsing, that cannot be: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUsage(pub String);

impl WrongUsage {
    /// This error, as the caller's.
    pub fn of(error: anyhow::Error) -> anyhow::Error {
        WrongUsage(format!("{error:#}")).into()
    }
}

fn require(condition: bool, message: impl FnOnce() -> String) -> Result<()> {
    ensure!(condition, WrongUsage(message()));
    Ok(())
}

/// A count that must not be zero.
pub fn at_least_one(field: &str, value: u64) -> Result<()> {
    require(value > 0, || format!("{field} is 0, expected at least 1"))
}

/// A count from one up to what can be counted with: products of two of them are no overflow.
pub fn count(field: &str, value: u64) -> Result<()> {
    at_least_one(field, value)?;
    require(value <= MOST, || format!("{field} is {value}, expected at most {MOST}"))
}

const MOST: u64 = 1_000_000_000;

/// `accumulate`: as many parts as a batch can be divided into.
pub fn parts_of_batch(accumulate: usize, batch: usize) -> Result<()> {
    at_least_one("accumulate", accumulate as u64)?;
    require(batch.is_multiple_of(accumulate), || {
        format!("accumulate is {accumulate}, expected a divisor of batch ({batch})")
    })
}

/// A positive, finite number.
pub fn positive(field: &str, value: f64) -> Result<()> {
    require(value > 0.0 && value.is_finite(), || format!("{field} is {value}, expected a positive number"))
}

/// Zero or a positive, finite number.
pub fn not_negative(field: &str, value: f64) -> Result<()> {
    require(value >= 0.0 && value.is_finite(), || format!("{field} is {value}, expected 0 or more"))
}

/// A number from 0 up to, but not including, 1.
pub fn fraction(field: &str, value: f64) -> Result<()> {
    require((0.0..1.0).contains(&value), || format!("{field} is {value}, expected 0 or more and below 1"))
}

fn t_range(field: &str, [low, high]: [f64; 2]) -> Result<()> {
    ensure!(0.0 <= low && low < high && high <= 1.0, "{field} is [{low}, {high}], expected 0 <= low < high <= 1");
    Ok(())
}

/// Reads a TOML file on top of the defaults. An unknown key is refused with the nearest known one.
pub fn read<T: Default + Serialize + DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    parse(&text).with_context(|| path.display().to_string()).map_err(WrongUsage::of)
}

/// The same from a text.
pub fn parse<T: Default + Serialize + DeserializeOwned>(text: &str) -> Result<T> {
    from_table(table::<T>(text)?)
}

/// Texts on top of the defaults, each on top of the one before.
pub fn layered<T: Default + Serialize + DeserializeOwned>(texts: &[(String, String)]) -> Result<T> {
    let mut whole = toml::Table::new();
    for (name, text) in texts {
        let mut lay = || -> Result<()> {
            overlay(&mut whole, table::<T>(text)?);
            from_table::<T>(whole.clone()).map(drop)
        };
        lay().with_context(|| name.clone()).map_err(WrongUsage::of)?;
    }
    from_table(whole)
}

fn table<T: Default + Serialize>(text: &str) -> Result<toml::Table> {
    let table: toml::Table =
        toml::from_str(text).map_err(|e| anyhow::anyhow!("not TOML: {}", e.to_string().trim_end()))?;
    check_keys(&serde_json::to_value(&table)?, &serde_json::to_value(T::default())?, "")?;
    Ok(table)
}

fn from_table<T: DeserializeOwned>(table: toml::Table) -> Result<T> {
    toml::Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| anyhow::anyhow!("{}", e.to_string().trim_end().replace('\n', "; ")))
}

fn overlay(below: &mut toml::Table, above: toml::Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => overlay(below, above),
            (_, value) => _ = below.insert(key, value),
        }
    }
}

/// `loss.gan.weight=1e-3`, as `--set` takes it, as a line of TOML. What is no TOML value is taken as a string.
pub fn assignment(text: &str) -> Result<String> {
    let (key, value) = text.split_once('=').ok_or_else(|| WrongUsage(format!("--set {text}: expected KEY=VALUE")))?;
    let line = format!("{} = {}", key.trim(), value.trim());
    Ok(match toml::from_str::<toml::Table>(&line) {
        Ok(_) => line,
        Err(_) => format!("{} = {}", key.trim(), toml::Value::from(value.trim())),
    })
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

/// A field in which two settings differ.
pub struct Difference {
    /// Its name, with those of its tables.
    pub name: String,
    /// What it is.
    pub now: Value,
    /// What it was.
    pub before: Value,
}

impl Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} is {}, was {}", self.name, self.now, self.before)
    }
}

/// The fields in which two settings differ.
pub fn differences<T: Serialize>(now: &T, before: &T) -> Result<Vec<Difference>> {
    let mut found = Vec::new();
    collect_differences(&serde_json::to_value(now)?, &serde_json::to_value(before)?, "", &mut found);
    Ok(found)
}

fn collect_differences(now: &Value, before: &Value, name: &str, found: &mut Vec<Difference>) {
    match (now.as_object(), before.as_object()) {
        (Some(now), Some(before)) => {
            for (key, value) in now {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                collect_differences(value, before.get(key).unwrap_or(&Value::Null), &name, found);
            }
        }
        _ if now != before => {
            found.push(Difference { name: name.into(), now: now.clone(), before: before.clone() });
        }
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
        check(|c| c.generator.ema = Ema::One(1.0), "generator.ema is 1, expected 0 or more and below 1");
        check(|c| c.generator.t_range = [0.9, 0.1], "generator.t_range is [0.9, 0.1], expected 0 <= low < high <= 1");
        check(|c| c.generator.sigma = Sigma::Value(-1.0), "generator.sigma is -1, expected a positive number");
        assert!(Config::default().validate().is_ok());
    }

    #[test]
    fn differences_name_the_fields() {
        let other = Config { seed: 3, ..Config::default() };
        let found: Vec<String> =
            differences(&other, &Config::default()).unwrap().iter().map(Difference::to_string).collect();
        assert_eq!(found, ["seed is 3, was 0"]);
    }
}
