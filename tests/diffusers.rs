//! Teachers that diffusers wrote distil, export and sample here, whatever their network speaks: noise, v, x0, or EDM's F.

mod common;
use common::{Workplace, max_difference};
use serde_json::json;

/// Distils two steps at diffusers' highest noise level and at an inner one, exports, and compares the pictures.
fn check(fixture: &str, prediction: &str) {
    let w = Workplace::new().with_fixture(fixture);
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

#[test]
fn a_pipeline_of_another_kind_is_refused_by_its_part() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.write("teacher/vae/config.json", "{}");
    w.refuses(
        "distill --teacher teacher --out run",
        1,
        &["teacher: has a vae/ folder", "only pixel-space UNet2DModel"],
    );
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
        &["_class_name is \"FlowMatchEulerDiscreteScheduler\", supported: DDPMScheduler"],
    );
}
