//! One teacher distilled by every recipe with the same number of updates, scored against its training pictures and its own
//! samples, beside the teacher and the undistilled network.

use crate::plane::figure::stack;
use crate::table;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use dmd::cli::{PairsArgs, SettingsArgs};
use dmd::commands;
use dmd::commands::score::pictures;
use dmd::config::{self, Config, Recipe};
use dmd::distill::distill;
use dmd::eval::{distance, kernel_distance};
use dmd::features::Features;
use dmd::output::{result, say};
use dmd::picture::{columns, grid, labelled_panel, save};
use dmd::random::picture_noise;
use dmd::sample::{Model, Sampler};
use dmd_models::ModelFolder;
use ndarray::{Array2, Array4, s};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// `dmd-lab recipes`.
#[derive(Debug, clap::Args)]
pub struct RecipesArgs {
    /// The teacher.
    pub teacher: PathBuf,
    /// The pictures that it was trained on: a folder or a zip.
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// Where runs, pairs and recipes.png go; the same command again goes on with what is there.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// A recipe's name, and settings for it, as "dmd2 generator.sigma=5"; may be repeated
    /// [default: every recipe].
    #[arg(long = "variant", value_name = "RECIPE KEY=VALUE")]
    pub variants: Vec<String>,
    /// A setting of all variants; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Updates of the generator in each.
    #[arg(long, default_value_t = 300, value_name = "N")]
    pub steps: u64,
    /// Samples per update.
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub batch: usize,
    /// Pairs of the regression term.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub pairs: usize,
    /// Pictures of each model that are scored, at most as many as there are in --data.
    #[arg(short, default_value_t = 2048, value_name = "N")]
    pub n: usize,
    /// A page whose table is to be replaced.
    #[arg(long, value_name = "FILE.md")]
    pub table: Option<PathBuf>,
}

/// What is run where the command line names nothing: every recipe, and plain distribution matching with the noise levels
/// of the papers (0.02 T to 0.98 T).
const VARIANTS: [&str; 8] =
    ["plain generator.t_range=[0.02,0.98]", "plain", "dmd", "dmd2", "f-js", "fast", "sid", "sida"];

/// Distils, draws and scores.
pub fn run(args: &RecipesArgs) -> Result<()> {
    config::at_least_one("-n", args.n as u64)?;
    let teacher = ModelFolder::load(&args.teacher, &Device::Cpu)?;
    let variants = match &args.variants[..] {
        [] => VARIANTS.map(String::from).to_vec(),
        given => given.to_vec(),
    };
    // All settings are read before the first run begins.
    let configs = variants.iter().map(|variant| settings(args, variant)).collect::<Result<Vec<_>>>()?;
    let mut judge = Judge::new(args, &teacher)?;
    let mut rows = Vec::new();
    let mut panels = vec![("training pictures".to_string(), judge.panel(&judge.data))];

    let of_teacher = judge.draw(&judge.teacher_model(&teacher)?, SEED)?;
    let own = judge.row("teacher, 35 passes", &of_teacher, None)?;
    panels.push((own.name.clone(), judge.panel(&of_teacher)));
    rows.push(own);
    let denoiser = teacher.denoiser(&Device::Cpu)?;
    let sigma = match Config::default().generator.sigma {
        config::Sigma::Value(sigma) => sigma,
        config::Sigma::Named(_) => denoiser.levels.sigma_max(),
    };
    let undistilled = Model::of_steps(denoiser, &[sigma], SEED);
    let of_undistilled = judge.draw(&undistilled, SEED)?;
    rows.push(judge.row("undistilled, one pass", &of_undistilled, None)?);
    panels.push(("undistilled, one pass".into(), judge.panel(&of_undistilled)));
    for (variant, config) in variants.iter().zip(&configs) {
        if !config.loss.regression.pairs.is_empty() {
            pairs(args, Path::new(&config.loss.regression.pairs))?;
        }
        let out = args.out.join(variant.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-', "_"));
        distill(config, &args.teacher, &out, &Device::Cpu, false)?;
        let seconds = training_seconds(&out)?;
        let folder = ModelFolder::load(&out.join("generator"), &Device::Cpu)?;
        let model = Model::of_steps(folder.denoiser(&Device::Cpu)?, folder.about.sigmas(), SEED);
        let images = judge.draw(&model, SEED)?;
        rows.push(judge.row(variant, &images, Some(seconds))?);
        panels.push((variant.clone(), judge.panel(&images)));
    }
    if let Some(page) = &args.table {
        let body: String = rows.iter().map(|row| row.line(&rows[0]) + "\n").collect();
        let name = args.teacher.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        table::replace(page, &format!("dmd-lab recipes {name}"), &format!("{HEAD}\n{body}"))?;
    }
    let picture = args.out.join("recipes.png");
    let panels: Vec<(&str, _)> = panels.iter().map(|(name, panel)| (name.as_str(), panel.clone())).collect();
    save(&picture, &stack(&panels.chunks(PER_ROW).map(labelled_panel).collect::<Vec<_>>()))?;
    say(&format!("the picture: {}", picture.display()));
    Ok(())
}

/// Seed of the pictures that are scored; `distill` does not use it.
const SEED: u64 = 2024;
/// Pictures shown of each.
const SHOWN: usize = 16;
/// Pictures per pass.
const BATCH: usize = 64;

/// Models beside each other in the picture.
const PER_ROW: usize = 4;

/// What a run's metrics say that it took, so that a run found finished keeps its time.
fn training_seconds(run: &Path) -> Result<f64> {
    let path = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let last: Value = serde_json::from_str(text.lines().last().context("a run without metrics")?)?;
    last["elapsed_s"].as_f64().with_context(|| format!("{}: no elapsed_s", path.display()))
}

/// `RECIPE KEY=VALUE …` as a configuration, with the data and pairs that the recipe needs.
fn settings(args: &RecipesArgs, variant: &str) -> Result<Config> {
    let mut words = variant.split_whitespace();
    let name = words.next().context("--variant: is empty")?;
    let recipe = Recipe::from_str(name, false).map_err(|_| {
        let known: Vec<_> = Recipe::value_variants().iter().filter_map(|r| r.to_possible_value()).collect();
        let known: Vec<&str> = known.iter().map(|value| value.get_name()).collect();
        anyhow::anyhow!("--variant: no recipe \"{name}\", expected one of {}", known.join(", "))
    })?;
    let sets = args.sets.iter().cloned().chain(words.map(String::from)).collect();
    let (steps, batch) = (Some(args.steps), Some(args.batch));
    let mut config =
        commands::distill::settings(&SettingsArgs { recipe, sets, steps, batch, ..SettingsArgs::default() })?;
    if config.loss.gan.on() {
        config.data = args.data.display().to_string();
    }
    if config.loss.regression.weight > 0.0 {
        config.loss.regression.pairs = args.out.join("pairs").display().to_string();
    }
    config.validate().with_context(|| format!("--variant \"{variant}\""))?;
    Ok(config)
}

fn pairs(args: &RecipesArgs, out: &Path) -> Result<()> {
    commands::pairs::run(&PairsArgs {
        teacher: args.teacher.clone(),
        out: out.into(),
        n: args.pairs,
        steps: 18,
        guidance: 1.0,
        prompts: None,
        negative: None,
        seed: 1,
        batch: BATCH,
        per_shard: 1024,
        device: dmd::device::Choice::Cpu,
        force: false,
    })
    .map(drop)
}

/// What every set of pictures is compared with.
struct Judge {
    /// Training pictures, and their classes as the teacher's labels.
    data: Array4<f32>,
    labels: Vec<i64>,
    /// The teacher's samples for the same labels, from other noise.
    samples: Array4<f32>,
    features: Features,
    shape: [usize; 3],
}

impl Judge {
    fn new(args: &RecipesArgs, teacher: &ModelFolder) -> Result<Self> {
        let shape = teacher.sample_shape()?;
        let (data, labels) = pictures(&args.data, shape, args.n, &teacher.classes())?;
        let features = Features::load("TEACHER", &args.teacher, None)?;
        let mut judge = Judge { samples: Array4::zeros((0, 0, 0, 0)), data, labels, features, shape };
        judge.samples = judge.draw(&judge.teacher_model(teacher)?, SEED + 1)?;
        Ok(judge)
    }

    fn teacher_model(&self, teacher: &ModelFolder) -> Result<Model> {
        Ok(Model::teacher(teacher.denoiser(&Device::Cpu)?, Sampler::Heun, 18, 1.0))
    }

    fn draw(&self, model: &Model, seed: u64) -> Result<Array4<f32>> {
        let noise: Tensor = picture_noise(seed, 0, self.data.dim().0, self.shape, &Device::Cpu)?;
        model.pictures(&noise, &self.labels, BATCH)
    }

    fn row(&mut self, name: &str, images: &Array4<f32>, seconds: Option<f64>) -> Result<Row> {
        let (data, samples) = (&self.data, &self.samples);
        let mut rows = |images: &Array4<f32>| -> Result<Array2<f64>> { self.features.rows(images, |_| {}) };
        let found = rows(images)?;
        let mut score = |reference: &Array4<f32>| -> Result<Score> {
            let kernel = kernel_distance(found.view(), rows(reference)?.view())?;
            Ok(Score { sliced: distance(images, reference)?, kernel })
        };
        let row = Row { name: name.into(), to_data: score(data)?, to_teacher: score(samples)?, seconds };
        result(&format!(
            "{name}: to the data {:.4} and {:.5}, to the teacher {:.4} and {:.5}",
            row.to_data.sliced, row.to_data.kernel, row.to_teacher.sliced, row.to_teacher.kernel
        ))?;
        Ok(row)
    }

    fn panel(&self, images: &Array4<f32>) -> image::RgbImage {
        // Spread over the classes.
        let every = (images.dim().0 / SHOWN).max(1);
        let shown = images.slice(s![..;every, .., .., ..]);
        let shown = shown.slice(s![..shown.dim().0.min(SHOWN), .., .., ..]).to_owned();
        grid(&shown, columns(SHOWN), (64 / self.shape[1].max(1) as u32).max(1))
    }
}

/// Distances to one set of pictures.
struct Score {
    /// Sliced Wasserstein, of pixels.
    sliced: f64,
    /// Kernel distance, of the teacher's features.
    kernel: f64,
}

struct Row {
    name: String,
    to_data: Score,
    to_teacher: Score,
    /// Of training; none where there was none.
    seconds: Option<f64>,
}

const HEAD: &str = "| model | to the data: sliced W. | of the teacher's | kernel | to the teacher: sliced W. | kernel | training, s |\n|---|---|---|---|---|---|---|";

impl Row {
    fn line(&self, teacher: &Row) -> String {
        format!(
            "| {} | {:.4} | {:.2}× | {:.5} | {:.4} | {:.5} | {} |",
            self.name,
            self.to_data.sliced,
            self.to_data.sliced / teacher.to_data.sliced,
            self.to_data.kernel,
            self.to_teacher.sliced,
            self.to_teacher.kernel,
            self.seconds.map_or_else(String::new, |seconds| format!("{seconds:.0}"))
        )
    }
}
