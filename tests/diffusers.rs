//! Teachers that diffusers wrote distil, export and sample here, whatever their network speaks: noise, v, x0, or EDM's F.

mod common;
use candle_core::{Device, Tensor};
use common::{Workplace, max_difference, stderr};
use dmd::sample::{Model, Sampler};
use dmd_models::{ModelFolder, Weights};
use serde_json::json;
use std::path::Path;
use std::process::Command;

/// Distils two steps at diffusers' highest noise level and at an inner one, exports, and compares the pictures.
fn check(fixture: &str, prediction: &str) {
    let w = Workplace::new().with_fixture(fixture);
    // A file holds the network alone, and gives latents where the folder has a decoder for them.
    _ = std::fs::remove_dir_all(w.path("teacher/vae"));
    w.edit_json("teacher/scheduler/scheduler_config.json", |s| s["prediction_type"] = json!(prediction));
    w.ok("sample teacher --npy teacher.npy -n 3 --steps 2");
    assert!(w.npy("teacher.npy").iter().all(|v| v.is_finite()));
    let sigma_max = w.ok("inspect teacher")["sigma_range"][1].as_f64().unwrap();
    for (name, sigma, expected) in [("max", "\"max\"", sigma_max), ("inner", "2.5", 2.5)] {
        w.write(&format!("{name}.toml"), format!("ratio = 1\n[generator]\nsigma = {sigma}\nwarmup = 1\n"));
        let run = w.ok(&format!(
            "distill --teacher teacher --out {name} --config {name}.toml --steps 2 --batch 2 --device cpu"
        ));
        assert_eq!(run["sigma"], expected, "{fixture} {prediction}");
        w.ok(&format!("export {name}/generator --onnx {name}.onnx"));
        assert_eq!(w.ok(&format!("inspect {name}.onnx"))["sigmas"], serde_json::json!([expected]));
        w.ok(&format!("sample {name}/generator --npy candle.npy -n 3 --force"));
        w.ok(&format!("sample {name}.onnx --npy file.npy -n 3 --force"));
        let (candle, file) = (w.npy("candle.npy"), w.npy("file.npy"));
        assert!(candle.iter().all(|v| v.is_finite()), "{fixture} {prediction} {sigma}");
        // A random network at sigma 157 does not stay in [-1, 1]; the tolerance goes with what it makes.
        let scale = candle.iter().fold(1f32, |max, v| max.max(v.abs()));
        let difference = max_difference(&candle, &file);
        assert!(difference <= 1e-3 * scale, "{fixture} {prediction} {sigma}: {difference} of {scale}");
    }
    // What diffusers wrote of the schedule stays as it is in the generator's folder.
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&w.text("max/generator/scheduler/scheduler_config.json")).unwrap(),
        serde_json::from_str::<serde_json::Value>(&w.text("teacher/scheduler/scheduler_config.json")).unwrap()
    );
}

#[test]
fn a_noise_predicting_teacher_distils() {
    check("ddpm-tiny", "epsilon");
}

#[test]
fn a_v_predicting_teacher_distils() {
    check("ddpm-tiny", "v_prediction");
}

#[test]
fn an_x0_predicting_teacher_distils() {
    check("ddpm-tiny", "sample");
}

#[test]
fn an_edm_teacher_distils() {
    check("edm-tiny", "epsilon");
}

#[test]
fn an_edm_teacher_with_v_prediction_distils() {
    check("edm-tiny", "v_prediction");
}

/// Its latents are halved pictures.
#[test]
fn a_transformer_that_learned_its_variance_distils() {
    check("dit-tiny", "epsilon");
    let w = Workplace::new().with_fixture("dit-tiny");
    let found = w.ok("inspect teacher");
    assert_eq!((&found["channels"], &found["size"]), (&json!(4), &json!([8, 8])));
    assert_eq!(found["network"]["class"], "DiTTransformer2DModel");
    assert_eq!(found["classes"][3], "bald eagle, American eagle");
    w.ok("distill --teacher teacher --out run --steps 2 --batch 2 --device cpu");
    let grid = image::open(w.path("run/samples/step-00000002.png")).unwrap();
    // Sixteen pictures of 16 pixels, shown eight times as large.
    assert_eq!((grid.width(), grid.height()), (4 * (16 * 8 + 2) + 2, 4 * (16 * 8 + 2) + 2));
    // By any of the names that a class has, and guided, for the last row of the table is none.
    w.ok("sample teacher --npy a.npy -n 2 --steps 2 --class tench --guidance 3");
    assert_eq!(w.npy("a.npy").dim(), (2, 3, 16, 16));
    let said = stderr(&w.run("export run/generator --onnx a.onnx"));
    assert!(said.contains("the file makes latents, which vae/ of the folder decodes"), "{said}");
    w.ok("score teacher --against run/generator -n 4");
    std::fs::remove_dir_all(w.path("teacher/vae")).unwrap();
    assert!(stderr(&w.run("inspect teacher")).contains("teacher: has no vae/: what the model makes are latents"));
    w.ok("sample teacher --npy a.npy -n 2 --steps 2 --force");
    assert_eq!(w.npy("a.npy").dim(), (2, 4, 8, 8));
}

/// Latents of `make_fixtures.py`: four Euler steps of diffusers' scheduler on the Karras sigmas, and guided by 3.
#[test]
fn a_dit_pipeline_samples_as_in_diffusers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/dit-tiny");
    let io = Weights::load(&path.join("io.safetensors"), &Device::Cpu).unwrap();
    let folder = ModelFolder::load(&path, &Device::Cpu).unwrap();
    let labels: Vec<i64> = io.get("class_labels").unwrap().to_vec1().unwrap();
    for (expected, guidance_scale) in [("latents", 1.0), ("guided", 3.0)] {
        let denoiser = folder.denoiser(&Device::Cpu).unwrap();
        let model = Model::teacher(denoiser, Sampler::Euler, 4, guidance_scale);
        let found = model.pictures(io.get("noise").unwrap(), &labels, 2).unwrap();
        let expected: Vec<f32> = io.get(expected).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let largest = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
        let gap = found.iter().zip(&expected).fold(0f32, |gap, (a, b)| gap.max((a - b).abs()));
        assert!(gap <= 1e-4 * largest, "{guidance_scale}: {gap} of {largest}");
    }
    let pipeline = folder.pipeline(&Device::Cpu).unwrap();
    let found = pipeline.pictures(io.get("latents").unwrap()).unwrap();
    let expected = io.get("pictures").unwrap();
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let (gap, largest) = (max(&(found - expected).unwrap()), max(expected));
    assert!(gap <= 1e-4 * largest, "pictures: {gap} of {largest}");
}

#[test]
fn a_pipeline_of_another_kind_is_refused_by_its_part() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.write("teacher/vae/config.json", "{}");
    w.refuses("distill --teacher teacher --out run", 1, &["teacher: has a vae/ folder", "supported are UNet2DModel"]);
    std::fs::remove_dir_all(w.path("teacher/vae")).unwrap();
    w.edit_json("teacher/scheduler/scheduler_config.json", |s| s["prediction_type"] = json!("flow"));
    w.refuses(
        "distill --teacher teacher --out run",
        1,
        &["scheduler_config.json: prediction_type is \"flow\", supported: epsilon"],
    );
    w.edit_json("teacher/scheduler/scheduler_config.json", |s| {
        s["_class_name"] = json!("FlowMatchEulerDiscreteScheduler")
    });
    w.refuses(
        "distill --teacher teacher --out run",
        1,
        &["_class_name is \"FlowMatchEulerDiscreteScheduler\", which is not supported: flow matching"],
    );
}

#[test]
fn a_teacher_of_few_timesteps_is_told_the_way_out() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.edit_json("teacher/scheduler/scheduler_config.json", |s| s["num_train_timesteps"] = json!(100));
    w.refuses(
        "distill --teacher teacher --out run --steps 1 --batch 2",
        1,
        &["generator.sigma is 2.5, expected within", "--set generator.sigma=max takes the highest"],
    );
    let run = w.ok("distill --teacher teacher --out run --steps 1 --batch 2 --set generator.sigma=max");
    assert!((run["sigma"].as_f64().unwrap() - 1.323).abs() < 1e-3, "{run}");
}

#[test]
fn a_foreign_teacher_is_said_to_be_one_and_told_how_to_name_its_null_row() {
    let w = Workplace::new().with_fixture("edm-tiny");
    assert_eq!(w.ok("inspect teacher")["made_by"], "diffusers 0.42.1");
    w.refuses("sample teacher --npy a.npy -n 1 --guidance 2", 1, &["\"null_class\": true in its dmd.json"]);
    w.write("teacher/dmd.json", r#"{ "classes": ["cat", "dog"], "null_class": true }"#);
    w.ok("sample teacher --npy a.npy -n 1 --steps 2 --guidance 2 --class dog");
    assert_eq!(w.ok("inspect teacher")["classes"], json!(["cat", "dog"]));
}

#[test]
fn pictures_that_no_memory_holds_are_refused_with_the_number() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.edit_json("teacher/unet/config.json", |c| c["sample_size"] = json!(100_000));
    w.refuses("sample teacher --npy a.npy -n 1", 1, &["sample_size is 100000, expected 1 to 8192"]);
    w.edit_json("teacher/unet/config.json", |c| c["sample_size"] = json!(8192));
    w.refuses("sample teacher --npy a.npy -n 100000", 2, &["-n is 100000", "too many pictures of [3, 8192, 8192]"]);
    w.refuses("sample teacher --npy a.npy -n 20", 1, &["take at least", "MiB are free"]);
}

#[test]
fn what_was_done_to_a_folder_to_read_it_is_said() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.edit_json("teacher/scheduler/scheduler_config.json", |s| {
        *s = json!({ "_class_name": "HeunDiscreteScheduler" });
    });
    let unet = "teacher/unet/diffusion_pytorch_model";
    std::fs::rename(w.path(&format!("{unet}.safetensors")), w.path(&format!("{unet}.ema.safetensors"))).unwrap();
    let said = stderr(&w.run("inspect teacher"));
    assert!(said.contains("warning: teacher: model_index.json names DDPMScheduler as the scheduler"), "{said}");
    assert!(said.contains("warning: teacher/unet: the weights are those of the variant \"ema\""), "{said}");
}

/// A Python with diffusers: `DMD_PYTHON`, or else `python3`. Without one there is nothing to compare with.
fn python() -> Option<String> {
    let python = std::env::var("DMD_PYTHON").unwrap_or("python3".into());
    let found = Command::new(&python).args(["-c", "import torch, diffusers, PIL"]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        dmd::output::say(&format!("left out: {python} has no diffusers"));
    }
    found.then_some(python)
}

/// Pictures of one noise by `dmd sample` and by `examples/python/pictures.py`.
fn both(w: &Workplace, python: &str, folder: &str, more: &str, tolerance: f32) {
    let found = w.ok(&format!("inspect {folder}"));
    let [channels, size] = [&found["channels"], &found["size"][0]].map(|n| n.as_u64().unwrap() as usize);
    dmd::npy::write(&w.path("noise.npy"), &dmd_runtime::picture_noise(3, 0, 3, [channels, size, size])).unwrap();
    w.ok(&format!("sample {folder} --noise noise.npy --npy ours.npy --force {more}"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python/pictures.py");
    let mut command = Command::new(python);
    command.arg(script).arg(w.path(folder)).args(["--noise", "noise.npy", "--npy", "theirs.npy", "--steps", "4"]);
    let output = command.current_dir(w.path("")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let (ours, theirs) = (w.npy("ours.npy"), w.npy("theirs.npy"));
    // A pipeline's pictures are clamped; a generator's are not.
    let ours = if more.is_empty() { ours } else { ours.mapv(|v| v.clamp(-1.0, 1.0)) };
    let scale = ours.iter().fold(1f32, |max, v| max.max(v.abs()));
    let difference = max_difference(&ours, &theirs);
    assert!(difference <= tolerance * scale, "{folder}: {difference} of {scale}");
}

#[test]
fn diffusers_makes_the_same_pictures_of_our_folders() {
    let Some(python) = python() else { return };
    let w = Workplace::new();
    // 2e-3: the Karras table in f32 there, over four steps from sigma 80.
    let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pretrained/emoji-16");
    both(&w, &python, teacher.to_str().unwrap(), "--sampler euler --steps 4", 2e-3);
    for fixture in ["edm-tiny", "ddpm-tiny", "dit-tiny"] {
        let w = Workplace::new().with_fixture(fixture);
        w.ok("distill --teacher teacher --out run --steps 1 --batch 2");
        both(&w, &python, "run/generator", "", 1e-4);
    }
}
