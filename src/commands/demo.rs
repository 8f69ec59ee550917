//! `dmd demo`: the whole path on the small teacher that comes with the project, ending in one picture: the teacher, the
//! generator before and after, and the exported file in the runtime.

use super::engine_options;
use crate::cli::{DemoArgs, DistillArgs, Engine, ExportArgs, SettingsArgs};
use crate::device::Choice;
use crate::eval::distance;
use crate::output::say;
use crate::picture::{columns, grid, labelled_panel, save};
use crate::random::picture_noise;
use crate::sample::{Model, Sampler, labels_in_turn};
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dmd_models::ModelFolder;
use ndarray::{Array4, s};
use serde_json::{Value, json};
use std::time::Instant;

/// Pictures shown of each model.
const SHOWN: usize = 16;
/// Pictures that the distances are measured on.
const MEASURED: usize = 512;
/// Seed of the demo's pictures, which training does not use.
const SEED: u64 = 2024;

/// Distils, exports, runs, compares.
pub fn run(args: &DemoArgs, threads: Option<usize>) -> Result<Value> {
    let teacher = ModelFolder::load(&args.teacher, &Device::Cpu)
        .context("the demo's teacher (run it from the project's folder)")?;
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let run = args.out.join("run");
    say("1/4  distilling the teacher into a one-step generator");
    let started = Instant::now();
    let config = args.out.join("demo.toml");
    std::fs::write(&config, "log_every = 5\nsample_every = 20\ncheckpoint_every = 20\n")
        .with_context(|| config.display().to_string())?;
    let distill = DistillArgs {
        teacher: args.teacher.clone(),
        out: run.clone(),
        settings: SettingsArgs { config: Some(config), steps: Some(args.steps), ..SettingsArgs::default() },
        device: Choice::Cpu,
        force: run.exists(),
    };
    super::distill::run(&distill)?;
    let distill_s = started.elapsed().as_secs_f64();

    say("2/4  exporting it as ONNX, and checking the file with every engine here");
    let onnx = args.out.join("generator.onnx");
    let export = ExportArgs { force: true, ..ExportArgs::plain(run.join("generator"), onnx.clone()) };
    let export = super::export::run(&export, threads)?;

    say("3/4  making pictures");
    let after_folder = ModelFolder::load(&run.join("generator"), &Device::Cpu)?;
    let after = after_folder.generator(&Device::Cpu)?.context("the run left no generator")?;
    let before = Model::of_steps(teacher.denoiser(&Device::Cpu)?, &[after.sigma], 0);
    let teacher_model = Model::teacher(teacher.denoiser(&Device::Cpu)?, Sampler::Heun, 18, 1.0);
    let n_passes = Sampler::Heun.n_passes(18);
    let stage = Stage::new(&teacher)?;
    let (of_teacher, teacher_ms) = stage.pictures(&teacher_model)?;
    let (of_before, before_ms) = stage.pictures(&before)?;
    let (of_after, after_ms) = stage.pictures(&Model::of_steps(after.denoiser, &[after.sigma], 0))?;
    let file = dmd_runtime::Generator::load(&onnx, engine_options(Engine::Auto, threads))?;
    let noise = stage.noise_array()?;
    let labels = &stage.labels[..stage.labels.len().min(SHOWN)];
    file.run(noise.slice(s![..1, .., .., ..]), &labels[..labels.len().min(1)])?;
    let started = Instant::now();
    let of_file = file.run(noise.slice(s![..SHOWN, .., .., ..]), labels)?.to_f32();
    let file_ms = started.elapsed().as_secs_f64() * 1e3 / SHOWN as f64;

    say("4/4  comparing");
    let start = distance(&of_before, &of_teacher)?;
    let end = distance(&of_after, &of_teacher)?;
    let shown = |images: &Array4<f32>| images.slice(s![..SHOWN, .., .., ..]).to_owned();
    let gap = max_abs_difference(&shown(&of_after), &of_file);
    ensure!(gap <= 1e-3, "the file's pictures differ from the generator's by {gap:.2e}, expected at most 1e-3");
    let engine = format!("{} {}", file.engine().kind, file.engine().version);
    let panel = |images: &Array4<f32>| grid(images, columns(SHOWN), (64 / images.dim().2.max(1) as u32).max(1));
    let captions = [
        format!("teacher, {n_passes} passes\n{teacher_ms:.1} ms a picture"),
        format!("before, 1 pass\n{before_ms:.1} ms a picture"),
        format!("after, 1 pass\n{after_ms:.1} ms a picture"),
        format!("ONNX file, 1 pass\n{file_ms:.1} ms a picture"),
    ];
    let images = [panel(&shown(&of_teacher)), panel(&shown(&of_before)), panel(&shown(&of_after)), panel(&of_file)];
    let panels: Vec<(&str, _)> = captions.iter().map(String::as_str).zip(images).collect();
    let picture = args.out.join("demo.png");
    save(&picture, &labelled_panel(&panels))?;
    say(&format!(
        "distance to the teacher's pictures (sliced Wasserstein, {MEASURED} pictures): {start:.4} before, {end:.4} after, {:.0} % of it",
        100.0 * end / start
    ));
    say(&format!(
        "per picture: teacher {teacher_ms:.1} ms, generator {after_ms:.1} ms, ONNX file {file_ms:.1} ms by {engine}"
    ));
    say(&format!("the picture: {}", picture.display()));
    Ok(json!({
        "picture": picture,
        "onnx": onnx,
        "distill_seconds": distill_s,
        "export": export,
        "distance_before": start,
        "distance_after": end,
        "max_abs_difference_of_file": gap,
        "teacher_ms": teacher_ms,
        "generator_ms": after_ms,
        "onnx_ms": file_ms,
        "engine": engine,
    }))
}

/// The noise and labels that every model gets.
struct Stage {
    noise: Tensor,
    labels: Vec<i64>,
}

impl Stage {
    fn new(teacher: &ModelFolder) -> Result<Self> {
        let noise = picture_noise(SEED, 0, MEASURED, teacher.sample_shape()?, &Device::Cpu)?;
        Ok(Stage { noise, labels: labels_in_turn(MEASURED, teacher.n_classes()) })
    }

    /// The pictures, and milliseconds for each.
    fn pictures(&self, model: &Model) -> Result<(Array4<f32>, f64)> {
        let started = Instant::now();
        let images = model.pictures(&self.noise, &self.labels, BATCH)?;
        Ok((images, started.elapsed().as_secs_f64() * 1e3 / MEASURED as f64))
    }

    fn noise_array(&self) -> Result<Array4<f32>> {
        Ok(Array4::from_shape_vec(self.noise.dims4()?, self.noise.flatten_all()?.to_vec1()?)?)
    }
}

/// Pictures per pass.
const BATCH: usize = 64;

fn max_abs_difference(a: &Array4<f32>, b: &Array4<f32>) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}
