//! Noise levels and preconditioning against diffusers' schedulers, on the configurations in `fixtures/schedulers`
//! (made by `make_fixtures.py` with diffusers 0.42).
//!
//! Tolerances. Tables, f64 against f64: relative 1e-10. The same tables against diffusers' own, which are f32: relative
//! 1e-4 in ᾱ (its products drift by up to 4e-5) and 5e-4 in sigma, where 1 − ᾱ cancels at t = 0. x0 against diffusers'
//! f32: 1e-4 of the largest value. EDM's coefficients, f64 against f64: relative 1e-12.

use dmd_models::denoiser::Coefficients;
use dmd_models::folder::Scheduler;
use dmd_models::{NoiseLevels, Prediction};
use serde_json::{Value, json};
use std::path::Path;

struct Case {
    name: String,
    scheduler: Scheduler,
    levels: NoiseLevels,
    expected: Value,
}

/// The cases for which there are levels by timestep, or those of EDM.
fn cases(edm: bool) -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schedulers");
    let mut names: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let load = |name: String| {
        let path = folder.join(&name).join("scheduler_config.json");
        let scheduler = Scheduler::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
        let levels = scheduler.levels().unwrap();
        let expected = std::fs::read_to_string(folder.join(&name).join("expected.json")).unwrap();
        Case { name, scheduler, levels, expected: serde_json::from_str(&expected).unwrap() }
    };
    names.into_iter().filter(|name| name.starts_with("edm") == edm).map(load).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn index(row: &Value) -> usize {
    row["t"].as_u64().unwrap() as usize
}

fn alpha_of(sigma: f64) -> f64 {
    1.0 / (1.0 + sigma * sigma)
}

/// Relative difference; absolute where `expected` is 0.
fn gap(value: f64, expected: f64) -> f64 {
    (value - expected).abs() / if expected == 0.0 { 1.0 } else { expected.abs() }
}

fn close(what: &str, value: f64, expected: f64, tolerance: f64) {
    assert!(gap(value, expected) <= tolerance, "{what}: {value}, expected {expected}");
}

/// Differences up to this share of the largest expected value.
fn all_close(what: &str, values: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(values.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    let worst = values.iter().zip(expected).fold(0.0_f64, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst <= tolerance * largest, "{what}: off by {worst} of {largest}: {values:?}, expected {expected:?}");
}

fn predict(c: &Coefficients, x: &[f64], output: &[f64]) -> Vec<f64> {
    x.iter().zip(output).map(|(x, f)| c.c_skip * x + c.c_out * f).collect()
}

/// Where the schedule ends at ᾱ = 0, ours ends a little above (at 2^-24 or less); checked apart.
fn ends_at_zero(case: &Case, t: usize) -> bool {
    case.scheduler.json()["rescale_betas_zero_snr"] == true && t + 1 == case.levels.len()
}

#[test]
fn tables_equal_those_of_diffusers() {
    let cases = cases(false);
    assert_eq!(cases.len(), 16);
    for Case { name, levels, scheduler, .. } in &cases {
        assert_eq!(Some(levels.len() as u64), scheduler.json()["num_train_timesteps"].as_u64(), "{name}");
        assert!(levels.sigmas().windows(2).all(|pair| pair[0] < pair[1]), "{name}");
    }
    for case in &cases {
        for (kind, tolerances) in [("levels_f64", [1e-10, 1e-10]), ("levels", [1e-4, 5e-4])] {
            for row in case.expected[kind].as_array().unwrap() {
                let (t, what) = (index(row), format!("{} {kind} t {}", case.name, row["t"]));
                if !ends_at_zero(case, t) {
                    close(&what, alpha_of(case.levels.sigma(t)), row["alpha"].as_f64().unwrap(), tolerances[0]);
                    close(&what, case.levels.sigma(t), row["sigma"].as_f64().unwrap(), tolerances[1]);
                }
            }
        }
    }
}

#[test]
fn zero_terminal_snr_ends_at_a_finite_sigma_above_all_others() {
    let mut ends = Vec::new();
    for case in cases(false).iter().filter(|case| case.scheduler.json()["rescale_betas_zero_snr"] == true) {
        let sigma = case.levels.sigma_max();
        let before = case.levels.sigma(case.levels.len() - 2);
        assert!(sigma.is_finite() && sigma >= 4095.9 && sigma > 1.4 * before, "{}: {before}, {sigma}", case.name);
        ends.push((case.name.clone(), sigma));
    }
    // diffusers' Euler scheduler ends there too.
    let (name, sigma) = &ends[2];
    assert_eq!(name, "euler-zero-snr-v");
    close(name, *sigma, 4095.9998779296857, 1e-10);
}

#[test]
fn predictions_of_x0_equal_those_of_diffusers() {
    for case in &cases(false) {
        let (x_t, output) =
            (numbers(&case.expected["inputs"]["x_t"]), numbers(&case.expected["inputs"]["model_output"]));
        for row in case.expected["predictions"].as_array().unwrap() {
            let (t, what) = (index(row), format!("{} t {}", case.name, row["t"]));
            let sigma = case.levels.sigma(t);
            let c = case.scheduler.prediction().coefficients(sigma, &case.levels);
            close(&what, c.c_noise, t as f64, 1e-9);
            // Euler's samples are variance exploding as ours; the others' are x_t = c_in·x.
            let x: Vec<f64> = match row.get("sample") {
                Some(sample) => {
                    let network_input: Vec<f64> = numbers(sample).iter().map(|x| c.c_in * x).collect();
                    all_close(&what, &network_input, &numbers(&row["network_input"]), 1e-4);
                    assert_eq!(row["network_time"].as_f64(), Some(t as f64), "{what}");
                    numbers(sample)
                }
                None => x_t.iter().map(|x| x / c.c_in).collect(),
            };
            // At ᾱ = 0 diffusers' v has no part of x_t left, ours 1/sigma of it.
            let tolerance = if ends_at_zero(case, t) { 1e-4 + 2.5 / sigma } else { 1e-4 };
            all_close(&what, &predict(&c, &x, &output), &numbers(&row["x0"]), tolerance);
        }
    }
}

#[test]
fn edm_preconditioning_equals_that_of_diffusers() {
    let cases = cases(true);
    assert_eq!(cases.len(), 2);
    for Case { name, scheduler, levels, expected } in &cases {
        let [x, output] = ["sample", "model_output"].map(|key| numbers(&expected["inputs"][key]));
        assert_eq!(scheduler.prediction(), Prediction::Edm { sigma_data: 0.5, negative: name == "edm-v" });
        for row in expected["precondition"].as_array().unwrap() {
            let what = format!("{name} sigma {}", row["sigma"]);
            let c = scheduler.prediction().coefficients(row["sigma"].as_f64().unwrap(), levels);
            for (key, value) in [("c_in", c.c_in), ("c_skip", c.c_skip), ("c_out", c.c_out), ("c_noise", c.c_noise)] {
                close(&format!("{what} {key}"), value, row[key].as_f64().unwrap(), 1e-12);
            }
            all_close(&what, &predict(&c, &x, &output), &numbers(&row["x0"]), 1e-12);
        }
    }
}

/// diffusers computes its sigmas in f32, with a seventh power: relative 5e-6.
#[test]
fn edm_tables_and_steps_equal_those_of_diffusers() {
    for Case { name, scheduler, levels, expected } in &cases(true) {
        let mut table = levels.sigmas().to_vec();
        table.reverse();
        table.push(0.0);
        let steps = |n: usize| levels.sampling_steps(n).unwrap();
        for (n, sigmas) in [("1000", table), ("18", steps(18)), ("1", steps(1))] {
            let (wanted, times) = (numbers(&expected["sigmas"][n]), numbers(&expected["timesteps"][n]));
            assert_eq!((sigmas.len(), sigmas.len()), (wanted.len(), times.len() + 1), "{name} {n}");
            for (sigma, wanted) in sigmas.iter().zip(&wanted) {
                close(&format!("{name} {n} steps"), *sigma, *wanted, 5e-6);
            }
            for (sigma, time) in sigmas.iter().zip(&times) {
                let c_noise = scheduler.prediction().coefficients(*sigma, levels).c_noise;
                assert!((c_noise - time).abs() <= 2e-6, "{name}: c_noise {c_noise}, expected {time}");
            }
        }
    }
}

/// x ← x + (x − D(x, sigma))/sigma·(sigma' − sigma) with a network that answers 0: D is c_skip·x.
#[test]
fn eighteen_euler_steps_end_where_those_of_diffusers_end() {
    for Case { name, scheduler, levels, expected } in &cases(true) {
        let run = &expected["euler_18_zero_network"];
        let noise = numbers(&expected["inputs"]["sample"]);
        let mut x: Vec<f64> = noise.iter().map(|noise| noise * levels.sigma_max()).collect();
        all_close(name, &x, &numbers(&run["start"]), 1e-6);
        for step in levels.sampling_steps(18).unwrap().windows(2) {
            let (sigma, next) = (step[0], step[1]);
            let c = scheduler.prediction().coefficients(sigma, levels);
            let x0 = predict(&c, &x, &vec![0.0; x.len()]);
            x = x.iter().zip(&x0).map(|(x, x0)| x + (x - x0) / sigma * (next - sigma)).collect();
        }
        all_close(name, &x, &numbers(&run["end_f64"]), 1e-11);
        all_close(name, &x, &numbers(&run["end"]), 5e-6);
    }
}

fn read(json: Value) -> Result<Scheduler, String> {
    Scheduler::from_json(Path::new("s.json"), &json.to_string()).map_err(|error| error.to_string())
}

/// A class with nothing in its file, and with a few settings: what diffusers' class of that name makes of them. The
/// fixture's sigmas are the first, the last and the middle one, from its f32 tables: relative 1e-3.
#[test]
fn every_class_has_the_defaults_and_levels_of_diffusers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/scheduler_classes.json");
    let fixture: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let classes = fixture["classes"].as_object().unwrap();
    assert_eq!(classes.len(), 25);
    for (class, expected) in classes {
        for (name, sigmas) in expected["sigmas"].as_object().unwrap() {
            let mut json = fixture["configs"][name].clone();
            json["_class_name"] = class.as_str().into();
            let scheduler = read(json).unwrap();
            let table = scheduler.levels().unwrap();
            let table = table.sigmas();
            for (ours, theirs) in [table[0], table[table.len() - 1], table[table.len() / 2]].iter().zip(numbers(sigmas))
            {
                close(&format!("{class} {name}"), *ours, theirs, 1e-3);
            }
            assert_eq!(Some(scheduler.clip().is_some()), expected["clip"].as_bool(), "{class}");
        }
    }
}

#[test]
fn spellings_of_old_releases_mean_what_they_meant() {
    let old = json!({ "_class_name": "DDPMScheduler", "_diffusers_version": "0.9.0", "predict_epsilon": false, "timesteps": 100,
        "clip_predicted_image": false, "tensor_format": "pt", "timestep_values": null, "clip_alpha_at_one": true });
    let scheduler = read(old).unwrap();
    assert_eq!((scheduler.prediction(), scheduler.clip()), (Prediction::Sample, None));
    assert_eq!(scheduler.levels().unwrap().len(), 100);
    let with = |key: &str, value: Value| {
        read(json!({ "_class_name": "DDIMScheduler", key: value, "prediction_type": "epsilon" }))
    };
    assert_eq!(with("predict_epsilon", json!(true)).unwrap().prediction(), Prediction::Epsilon);
    assert_eq!(with("num_timesteps", json!(50)).unwrap().levels().unwrap().len(), 50);
    let message = with("predict_epsilon", json!(false)).unwrap_err();
    assert_eq!(message, "s.json: predict_epsilon and prediction_type say two different things: take one of them out");
    let message = with("predict_epsilon", json!("no")).unwrap_err();
    assert_eq!(message, "s.json: predict_epsilon is \"no\", expected true or false");
}

/// diffusers keeps the keys of the scheduler before when a pipeline changes to another. Those of a sampler change
/// nothing; those that say what the model is would be passed over there.
#[test]
fn keys_of_another_class_are_passed_over_only_where_they_say_nothing() {
    let with = |class: &str, key: &str, value: Value| read(json!({ "_class_name": class, key: value }));
    for (class, key, value) in [
        ("EulerDiscreteScheduler", "clip_sample", json!(true)),
        ("DPMSolverMultistepScheduler", "skip_prk_steps", json!(true)),
        ("PNDMScheduler", "rescale_betas_zero_snr", json!(false)),
        ("PNDMScheduler", "variance_type", json!("fixed_small")),
        ("RePaintScheduler", "prediction_type", json!("epsilon")),
        ("DDIMScheduler", "use_karras_sigmas", json!(true)),
        ("UniPCMultistepScheduler", "predict_x0", json!(true)),
    ] {
        let scheduler = with(class, key, value).unwrap();
        assert_eq!(scheduler.levels().unwrap(), read(json!({ "_class_name": class })).unwrap().levels().unwrap());
        assert!(scheduler.clip().is_none() || ["DDIMScheduler", "RePaintScheduler"].contains(&class), "{class}");
    }
    for (class, key, value) in [
        ("PNDMScheduler", "rescale_betas_zero_snr", json!(true)),
        ("RePaintScheduler", "prediction_type", json!("v_prediction")),
        ("DDPMScheduler", "sigma_data", json!(0.5)),
        ("EDMEulerScheduler", "beta_start", json!(0.1)),
        ("DDPMScheduler", "use_flow_sigmas", json!(true)),
        ("DDPMScheduler", "timestep_type", json!("continuous")),
        ("UnCLIPScheduler", "trained_betas", json!([0.1, 0.2])),
    ] {
        let message = with(class, key, value.clone()).unwrap_err();
        let expected = format!("s.json: {key} is {value}, which {class} does not have and diffusers passes over: ");
        assert!(message.starts_with(&expected), "{message}");
    }
    let message = with("DDPMScheduler", "beta_strat", json!(0.1)).unwrap_err();
    assert_eq!(message, "s.json: unknown key \"beta_strat\", did you mean \"beta_start\"?");
}

#[test]
fn keys_that_make_another_model_are_refused_by_name() {
    for (class, fields, expected) in [
        (
            "DPMSolverMultistepScheduler",
            json!({ "use_flow_sigmas": true }),
            "use_flow_sigmas is true and prediction_type \"epsilon\": flow matching, ",
        ),
        (
            "UniPCMultistepScheduler",
            json!({ "prediction_type": "flow_prediction" }),
            "use_flow_sigmas is false and prediction_type \"flow_prediction\": flow matching, ",
        ),
        (
            "EulerDiscreteScheduler",
            json!({ "timestep_type": "continuous", "prediction_type": "v_prediction" }),
            "timestep_type is continuous with v_prediction: ",
        ),
        (
            "EulerDiscreteScheduler",
            json!({ "timestep_type": 3 }),
            "timestep_type is \"\", expected discrete or continuous",
        ),
        (
            "UnCLIPScheduler",
            json!({ "beta_schedule": "linear" }),
            "beta_schedule is \"linear\", UnCLIPScheduler has squaredcos_cap_v2 alone",
        ),
        ("DPMSolverSinglestepScheduler", json!({ "variance_type": "learned" }), "variance_type is learned: "),
        (
            "DDPMScheduler",
            json!({ "trained_betas": [0.1, 0.2] }),
            "trained_betas has 2 entries, num_train_timesteps is 1000: ",
        ),
        ("DDPMScheduler", json!({ "beta_end": "0.02" }), "beta_end is \"0.02\": invalid type: string"),
        (
            "DDPMScheduler",
            json!({ "num_train_timesteps": 1000.5 }),
            "num_train_timesteps is 1000.5: invalid type: floating point",
        ),
        ("DDPMScheduler", json!({ "clip_sample_range": 0.0 }), "clip_sample_range is 0, expected a positive number"),
    ] {
        let mut json = fields.clone();
        json["_class_name"] = class.into();
        let message = read(json).unwrap_err();
        assert!(message.starts_with(&format!("s.json: {expected}")), "{message}");
    }
}

#[test]
fn a_file_with_pythons_infinity_is_carried_through() {
    let text = r#"{ "_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity }"#;
    let scheduler = Scheduler::from_json(Path::new("s.json"), text).unwrap();
    assert_eq!(
        scheduler.to_json(),
        "{\n  \"_class_name\": \"DPMSolverMultistepScheduler\",\n  \"lambda_min_clipped\": -Infinity\n}"
    );
    let message =
        Scheduler::from_json(Path::new("s.json"), r#"{ "_class_name": "DDPMScheduler", "beta_end": Infinity }"#);
    assert_eq!(
        message.unwrap_err().to_string(),
        "s.json: beta_end is Infinity: invalid type: string \"Infinity\", expected f64"
    );
}
