//! Model folders: those that diffusers wrote (`make_fixtures.py`), a round trip through ours, and one test per kind of
//! error, each with its message.

use candle_core::{DType, Device, Tensor};
use dmd_models::folder::{Kind, Scheduler};
use dmd_models::{About, Condition, Eager, ModelFolder, Prediction, Way, Weights, read_metadata};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const CONFIG: &str = "unet/config.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn load(path: &Path) -> ModelFolder {
    ModelFolder::load(path, &Device::Cpu).unwrap()
}

fn tensors(path: &Path) -> Weights {
    Weights::load(path, &Device::Cpu).unwrap()
}

/// Largest difference as a share of the largest expected value.
fn gap(value: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(value.dims(), expected.dims());
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    max(&(value - expected).unwrap()) / max(expected)
}

#[test]
fn a_ddpm_folder_of_diffusers_denoises_as_there() {
    let folder = load(&fixture("ddpm-tiny"));
    let io = tensors(&fixture("ddpm-tiny/io.safetensors"));
    let denoiser = folder.denoiser(&Device::Cpu).unwrap();
    assert_eq!((denoiser.prediction, denoiser.n_classes()), (Prediction::Epsilon, None));
    assert_eq!((folder.about.kind, folder.size().unwrap(), folder.classes()), (Kind::Teacher, [8, 8], vec![]));
    let sigma = denoiser.levels.sigma(440);
    // x_t is variance preserving: x0 + sigma·noise is √(1 + sigma²) times that.
    let x = (io.get("x_t").unwrap() * (1.0 + sigma * sigma).sqrt()).unwrap();
    let x0 = denoiser.denoise(&Eager, &x, &[sigma], &Condition::none()).unwrap();
    assert!(gap(&x0, io.get("pred_x0").unwrap()) < 1e-5);
    // The scheduler of the folder clips; `denoise` leaves that to the sampler.
    let range = denoiser.clip.unwrap();
    assert!(gap(&x0.clamp(-range, range).unwrap(), io.get("pred_x0_clipped").unwrap()) < 1e-4);
}

#[test]
fn an_edm_folder_of_diffusers_denoises_as_there() {
    let mut folder = load(&fixture("edm-tiny"));
    let io = tensors(&fixture("edm-tiny/io.safetensors"));
    let denoiser = folder.denoiser(&Device::Cpu).unwrap();
    assert_eq!((denoiser.clip, denoiser.n_classes(), folder.classes().len()), (None, Some(3), 3));
    let (noise, cond) = (io.get("noise").unwrap(), &Condition::of(Way::Label, io.get("class_labels").cloned()));
    let x0 = denoiser.denoise(&Eager, &(noise * 80.0).unwrap(), &[80.0], cond).unwrap();
    assert!(gap(&x0, io.get("pred_x0").unwrap()) < 1e-5);
    // diffusers' Euler step to 0 subtracts 80·noise from itself in f32.
    assert!(gap(&x0, io.get("prev_sample").unwrap()) < 1e-4);
    // One sigma per sample says the same.
    let each = denoiser.denoise(&Eager, &(noise * 80.0).unwrap(), &[80.0, 80.0 + 1e-9], cond).unwrap();
    assert!(gap(&each, &x0) < 1e-5);
    // A generator held at sigma 80 is this denoiser.
    assert!(folder.generator(&Device::Cpu).unwrap().is_none());
    (folder.about.kind, folder.about.sigma) = (Kind::Generator, Some(80.0));
    let generator = folder.generator(&Device::Cpu).unwrap().unwrap();
    assert!(gap(&generator.generate(&Eager, noise, cond).unwrap(), &x0) < 1e-6);
}

/// edm-tiny with weights that f16 does not hold, and everything of `dmd.json` filled in.
fn a_generator() -> ModelFolder {
    let mut folder = load(&fixture("edm-tiny"));
    folder.weights = folder.weights.map(|t| t.to_dtype(DType::F32)? / 3.0).unwrap();
    folder.about = About {
        kind: Kind::Generator,
        sigma: Some(2.5),
        steps: vec![2.5, 0.8],
        classes: ["cat", "näive \"quote\""].map(String::from).to_vec(),
        null_class: true,
        data: Some("drawn by hand, CC0".into()),
        version: "0.1.0".into(),
        run: Some(json!({ "steps": 3, "learning_rate": 1e-4 })),
    };
    folder
}

fn flat(weights: &Weights) -> BTreeMap<String, Vec<f32>> {
    let values = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    weights.iter().map(|(name, tensor)| (name.to_string(), values(tensor))).collect()
}

fn same_but_weights(a: &ModelFolder, b: &ModelFolder) {
    assert_eq!(a.config, b.config);
    assert_eq!(a.scheduler.json(), b.scheduler.json());
    assert_eq!(a.about, b.about);
    assert_eq!(a.weights.names().collect::<Vec<_>>(), b.weights.names().collect::<Vec<_>>());
}

#[test]
fn a_saved_folder_loads_again_exactly_in_f32() {
    let (temp, folder) = (TempDir::new().unwrap(), a_generator());
    let path = temp.path().join("generator");
    folder.save(&path, DType::F32).unwrap();
    let again = load(&path);
    same_but_weights(&folder, &again);
    assert_eq!(flat(&folder.weights), flat(&again.weights));
    // What a person finds when only the weights are passed on.
    let metadata = read_metadata(&path.join(WEIGHTS)).unwrap();
    assert_eq!(metadata["format"], "pt");
    assert_eq!(serde_json::from_str::<About>(&metadata["dmd"]).unwrap(), folder.about);
}

#[test]
fn a_saved_folder_loads_again_rounded_in_f16() {
    let (temp, folder) = (TempDir::new().unwrap(), a_generator());
    folder.save(&temp.path().join("half"), DType::F16).unwrap();
    let again = load(&temp.path().join("half"));
    same_but_weights(&folder, &again);
    assert!(again.weights.iter().all(|(_, tensor)| tensor.dtype() == DType::F16));
    assert_eq!(flat(&folder.weights.to(DType::F16, &Device::Cpu).unwrap()), flat(&again.weights));
    // Half a unit in the last of 11 bits, or half of the smallest step below 2^-14.
    for (kept, rounded) in flat(&folder.weights).values().flatten().zip(flat(&again.weights).values().flatten()) {
        assert!((kept - rounded).abs() <= (kept.abs() / 2048.0).max(0.5_f32.powi(25)), "{kept} became {rounded}");
    }
}

#[test]
fn a_folder_of_diffusers_keeps_its_files_through_a_round_trip() {
    for name in ["ddpm-tiny", "edm-tiny"] {
        let temp = TempDir::new().unwrap();
        let path = temp.path().join(name);
        load(&fixture(name)).save(&path, DType::F16).unwrap();
        assert_eq!(flat(&tensors(&path.join(WEIGHTS))), flat(&tensors(&fixture(name).join(WEIGHTS))));
        for file in ["model_index.json", CONFIG, SCHEDULER] {
            let (mut ours, mut theirs) = (read_json(&path.join(file)), read_json(&fixture(name).join(file)));
            for json in [&mut ours, &mut theirs] {
                json.as_object_mut().unwrap().remove("_diffusers_version");
            }
            // 1 and 1.0 are one number to diffusers.
            assert!(equal(&ours, &theirs), "{name}/{file}: {ours:#} became of {theirs:#}");
        }
    }
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| equal(a, b)))
        }
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

#[test]
fn saving_replaces_a_folder_and_leaves_nothing_beside_it() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("model");
    load(&fixture("ddpm-tiny")).save(&path, DType::F16).unwrap();
    fs::write(path.join("left over"), "from before").unwrap();
    a_generator().save(&path, DType::F32).unwrap();
    assert_eq!(load(&path).about, a_generator().about);
    assert!(!path.join("left over").exists());
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn a_failed_save_leaves_the_old_folder_whole() {
    let (temp, mut folder) = (TempDir::new().unwrap(), a_generator());
    let path = temp.path().join("model");
    folder.save(&path, DType::F32).unwrap();
    folder.about.data = Some("newer".into());
    // The name of the folder to be written aside is taken by a file.
    fs::write(temp.path().join("model.partial"), "in the way").unwrap();
    let message = folder.save(&path, DType::F32).unwrap_err().to_string();
    assert!(message.contains("model.partial"), "{message}");
    assert_eq!(load(&path).about, a_generator().about);
}

#[test]
fn attention_names_of_old_files_are_understood() {
    let temp = a_copy("ddpm-tiny");
    let modern = tensors(&temp.path().join(WEIGHTS));
    let mut old = Weights::default();
    for (name, tensor) in modern.iter() {
        let names = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
        old.insert(names.iter().fold(name.to_string(), |name, (new, old)| name.replace(new, old)), tensor.clone());
    }
    assert!(old.get("mid_block.attentions.0.query.weight").is_some());
    old.save(&temp.path().join(WEIGHTS), &BTreeMap::new()).unwrap();
    assert_eq!(flat(&load(temp.path()).weights), flat(&modern));
}

// Errors: a copy of a fixture is broken in one place.

fn a_copy(name: &str) -> TempDir {
    let temp = TempDir::new().unwrap();
    for folder in ["unet", "scheduler"] {
        let source =
            if folder == "unet" && name == "sharded" { fixture("unet/sharded") } else { fixture(name).join(folder) };
        let source = if source.is_dir() { source } else { fixture("ddpm-tiny").join(folder) };
        fs::create_dir(temp.path().join(folder)).unwrap();
        for entry in fs::read_dir(source).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), temp.path().join(folder).join(entry.file_name())).unwrap();
        }
    }
    temp
}

/// Loads a broken copy of a fixture; in `expected`, DIR stands for the folder. The whole message is compared.
#[track_caller]
fn check(name: &str, break_it: impl FnOnce(&Path), expected: &str) {
    let temp = a_copy(name);
    break_it(temp.path());
    assert_eq!(error(temp.path()), expected);
}

#[track_caller]
fn error(folder: &Path) -> String {
    let Err(error) = ModelFolder::load(folder, &Device::Cpu) else { panic!("the folder was accepted") };
    error.to_string().replace(folder.to_str().unwrap(), "DIR")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Sets fields of a JSON file.
fn set(file: &'static str, fields: Value) -> impl FnOnce(&Path) {
    move |folder| {
        let mut json = read_json(&folder.join(file));
        for (key, value) in fields.as_object().unwrap() {
            json[key] = value.clone();
        }
        fs::write(folder.join(file), json.to_string()).unwrap();
    }
}

/// Rewrites the weights.
fn rewrite(change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> impl FnOnce(&Path) {
    move |folder| {
        let path = folder.join(WEIGHTS);
        let mut all = tensors(&path).iter().map(|(name, t)| (name.to_string(), t.clone())).collect();
        change(&mut all);
        let mut weights = Weights::default();
        all.into_iter().for_each(|(name, tensor)| weights.insert(name, tensor));
        weights.save(&path, &BTreeMap::new()).unwrap();
    }
}

#[test]
fn a_missing_folder_and_a_file_are_told_apart() {
    let temp = TempDir::new().unwrap();
    assert_eq!(error(&temp.path().join("nowhere")), "DIR: no such folder");
    let file = temp.path().join("model.onnx");
    fs::write(&file, "").unwrap();
    assert_eq!(error(&file), "DIR: is a file, expected a model folder");
}

#[test]
fn a_folder_without_unet_is_refused() {
    let remove = |folder: &Path| fs::remove_dir_all(folder.join("unet")).unwrap();
    check("ddpm-tiny", remove, "DIR: not a diffusers folder: it has no unet/");
    let bare = |folder: &Path| {
        fs::rename(folder.join(CONFIG), folder.join("config.json")).unwrap();
        remove(folder);
    };
    let expected = "DIR: not a diffusers folder: it has no unet/ (a bare UNet: put it into a folder unet/ beside a folder scheduler/)";
    check("ddpm-tiny", bare, expected);
}

#[test]
fn a_missing_file_is_named() {
    for file in [CONFIG, SCHEDULER] {
        let expected = format!("DIR/{file}: No such file or directory (os error 2)");
        check("ddpm-tiny", |folder| fs::remove_file(folder.join(file)).unwrap(), &expected);
    }
}

#[test]
fn a_latent_pipeline_is_refused() {
    let add_vae = |folder: &Path| fs::create_dir(folder.join("vae")).unwrap();
    let expected = "DIR: has a vae/ folder: only pixel-space UNet2DModel pipelines are supported, not latent or text-conditional ones";
    check("ddpm-tiny", add_vae, expected);
}

#[test]
fn truncated_weights_are_refused() {
    let cut = |bytes: usize| {
        move |folder: &Path| {
            let path = folder.join(WEIGHTS);
            let kept = fs::read(&path).unwrap()[..bytes].to_vec();
            fs::write(path, kept).unwrap();
        }
    };
    for (bytes, reason) in [
        (49_000, "35542 bytes of tensors are promised, 35400 are there"),
        (100, "a header of 13592 bytes does not fit"),
        (5, "it has no header"),
        (0, "it has no header"),
    ] {
        let expected = format!("DIR/{WEIGHTS}: not a whole safetensors file ({bytes} bytes): {reason}");
        check("ddpm-tiny", cut(bytes), &expected);
    }
}

#[test]
fn a_wrong_shape_is_named() {
    let grow = |all: &mut BTreeMap<String, Tensor>| {
        all.insert("conv_in.weight".into(), Tensor::zeros((8, 4, 3, 3), DType::F16, &Device::Cpu).unwrap());
    };
    let expected = "DIR/unet/diffusion_pytorch_model.safetensors: the weights do not fit the network: tensor \"conv_in.weight\" has shape [8, 4, 3, 3], expected [8, 3, 3, 3]";
    check("ddpm-tiny", rewrite(grow), expected);
}

#[test]
fn missing_and_extra_tensors_are_all_named_in_one_error() {
    let change = |all: &mut BTreeMap<String, Tensor>| {
        for (old, new) in [("conv_in.bias", "conv_in.offset"), ("mid_block.resnets.0.norm1.weight", "extra")] {
            let tensor = all.remove(old).unwrap();
            all.insert(new.into(), tensor);
        }
    };
    let expected = "DIR/unet/diffusion_pytorch_model.safetensors: the weights do not fit the network: \
        tensor \"mid_block.resnets.0.norm1.weight\" [8] is missing; tensor \"conv_in.bias\" [8] is missing; \
        unexpected tensor \"conv_in.offset\"; unexpected tensor \"extra\"";
    check("ddpm-tiny", rewrite(change), expected);
}

#[test]
fn an_unknown_config_key_is_refused_with_the_nearest_one() {
    let expected = "DIR/unet/config.json: unknown key \"layer_per_blocks\", did you mean \"layers_per_block\"?";
    check("ddpm-tiny", set(CONFIG, json!({ "layer_per_blocks": 2 })), expected);
}

#[test]
fn a_config_value_of_a_wrong_kind_is_named() {
    let expected = "DIR/unet/config.json: act_fn is \"tanh\", which is not supported: ";
    let temp = a_copy("ddpm-tiny");
    set(CONFIG, json!({ "act_fn": "tanh" }))(temp.path());
    let message = error(temp.path());
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn other_networks_are_refused() {
    let expected = "DIR/unet/config.json: _class_name is UNet2DConditionModel, only UNet2DModel is supported";
    check("ddpm-tiny", set(CONFIG, json!({ "_class_name": "UNet2DConditionModel" })), expected);
}

#[test]
fn unsupported_blocks_are_refused_with_the_reason() {
    let down = |name: &str| json!({ "down_block_types": ["DownBlock2D", name] });
    let supported = "supported: DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D";
    for (name, reason) in [
        ("CrossAttnDownBlock2D", "cross-attention needs text, which UNet2DModel does not take"),
        ("AttnSkipDownBlock2D", "the skip-convolution blocks use FIR resampling, which no edge accelerator has"),
        ("SpiralBlock2D", "not a block of the supported kinds"),
    ] {
        let expected = format!("DIR/unet/config.json: down_block_types holds {name}: {reason}; {supported}");
        check("ddpm-tiny", set(CONFIG, down(name)), &expected);
    }
    let expected = "DIR/unet/config.json: up_block_types holds SkipUpBlock2D: the skip-convolution blocks use FIR resampling, which no edge accelerator has; supported: UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D";
    check("ddpm-tiny", set(CONFIG, json!({ "up_block_types": ["AttnUpBlock2D", "SkipUpBlock2D"] })), expected);
    let expected = "DIR/unet/config.json: mid_block_type is UNetMidBlock2DCrossAttn, supported: UNetMidBlock2D or null";
    check("ddpm-tiny", set(CONFIG, json!({ "mid_block_type": "UNetMidBlock2DCrossAttn" })), expected);
}

#[test]
fn a_size_that_cannot_be_halved_is_refused() {
    let expected =
        "DIR/unet/config.json: sample_size 9x8 cannot be halved 1 times (2 levels): both sides must be multiples of 2";
    check("ddpm-tiny", set(CONFIG, json!({ "sample_size": [9, 8] })), expected);
}

#[test]
fn a_model_without_a_size_is_refused() {
    let expected = "DIR: unet/config.json has no sample_size, which tells the size of the pictures";
    check("ddpm-tiny", set(CONFIG, json!({ "sample_size": null })), expected);
}

#[test]
fn learned_variances_are_refused() {
    let expected =
        "DIR/scheduler/scheduler_config.json: variance_type is learned_range: learned variances are not supported";
    check("ddpm-tiny", set(SCHEDULER, json!({ "variance_type": "learned_range" })), expected);
    let expected = "DIR: in_channels 3 and out_channels 6 differ: a denoiser returns what it takes (learned variances are not supported)";
    check("ddpm-tiny", set(CONFIG, json!({ "out_channels": 6 })), expected);
}

#[test]
fn class_embeddings_without_a_list_of_classes_are_refused() {
    let expected = "DIR: class_embed_type timestep and identity have no list of classes to draw from, supported for whole models: null with num_class_embeds";
    check("ddpm-tiny", set(CONFIG, json!({ "class_embed_type": "timestep" })), expected);
}

#[test]
fn unknown_schedulers_are_refused() {
    let supported = "DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler, KDPM2DiscreteScheduler, DEISMultistepScheduler and EDMEulerScheduler, EDMDPMSolverMultistepScheduler";
    let expected = format!(
        "DIR/scheduler/scheduler_config.json: _class_name is \"FlowMatchEulerDiscreteScheduler\", supported: {supported}"
    );
    check("ddpm-tiny", set(SCHEDULER, json!({ "_class_name": "FlowMatchEulerDiscreteScheduler" })), &expected);
}

#[test]
fn unknown_schedules_are_refused() {
    let expected = "DIR/scheduler/scheduler_config.json: beta_schedule is \"sigmoid\", supported: linear, scaled_linear, squaredcos_cap_v2";
    check("ddpm-tiny", set(SCHEDULER, json!({ "beta_schedule": "sigmoid" })), expected);
    let expected = "DIR/scheduler/scheduler_config.json: sigma_schedule is \"flow\", supported: karras, exponential";
    check("edm-tiny", set(SCHEDULER, json!({ "sigma_schedule": "flow" })), expected);
}

#[test]
fn unknown_prediction_types_are_refused() {
    let expected = "DIR/scheduler/scheduler_config.json: prediction_type is \"flow\", supported: epsilon, v_prediction, sample, original_sample";
    check("ddpm-tiny", set(SCHEDULER, json!({ "prediction_type": "flow" })), expected);
    let expected =
        "DIR/scheduler/scheduler_config.json: prediction_type is \"sample\", supported: epsilon, v_prediction";
    check("edm-tiny", set(SCHEDULER, json!({ "prediction_type": "sample" })), expected);
}

#[test]
fn impossible_noise_levels_are_refused() {
    let expected = "DIR/scheduler/scheduler_config.json: betas from 0.0001 to 1.5 over 1000 steps: expected at least two, each in [0, 1)";
    check("ddpm-tiny", set(SCHEDULER, json!({ "beta_end": 1.5 })), expected);
    let expected = "DIR/scheduler/scheduler_config.json: sigma_min 80, sigma_max 0.002, rho 7, 1000 levels: expected 0 < sigma_min < sigma_max, rho > 0, at least 2 levels";
    check("edm-tiny", set(SCHEDULER, json!({ "sigma_min": 80.0, "sigma_max": 0.002 })), expected);
    let expected = "DIR/scheduler/scheduler_config.json: num_train_timesteps is 1000000000000, expected 2 to 1000000";
    check("ddpm-tiny", set(SCHEDULER, json!({ "num_train_timesteps": 1_000_000_000_000_u64 })), expected);
    assert!(Scheduler::edm(0.002, 80.0, 0.0).unwrap_err().to_string().contains("sigma_data is 0"));
}

#[test]
fn a_shard_that_the_index_promises_is_missed_by_name() {
    assert_eq!(load(a_copy("sharded").path()).weights.n_parameters(), 50_163);
    let second = "unet/diffusion_pytorch_model-00002-of-00003.safetensors";
    let expected = format!("DIR/{second}: No such file or directory (os error 2)");
    check("sharded", |folder| fs::remove_file(folder.join(second)).unwrap(), &expected);
}

#[test]
fn a_tensor_that_the_index_promises_is_missed_by_name() {
    let swap = |folder: &Path| {
        let shard = |n: usize| folder.join(format!("unet/diffusion_pytorch_model-0000{n}-of-00003.safetensors"));
        fs::copy(shard(1), shard(2)).unwrap();
    };
    let temp = a_copy("sharded");
    swap(temp.path());
    let message = error(temp.path());
    assert!(message.contains("00002-of-00003.safetensors: lacks tensor \""), "{message}");
}

#[test]
fn pickled_weights_are_refused_with_the_remedy() {
    let pickle = |folder: &Path| {
        fs::rename(folder.join(WEIGHTS), folder.join("unet/diffusion_pytorch_model.bin")).unwrap();
    };
    let expected = "DIR/unet: has no diffusion_pytorch_model.safetensors; there is a pickled .bin, save it again with save_pretrained(…, safe_serialization=True)";
    check("ddpm-tiny", pickle, expected);
    let none = |folder: &Path| fs::remove_file(folder.join(WEIGHTS)).unwrap();
    check("ddpm-tiny", none, "DIR/unet: has no diffusion_pytorch_model.safetensors");
}

#[test]
fn a_dmd_json_that_does_not_fit_is_refused() {
    let about = |text: &'static str| move |folder: &Path| fs::write(folder.join("dmd.json"), text).unwrap();
    let teacher = r#"{ "kind": "teacher", "version": "0.1.0", "classes": ["cat", "dog"] }"#;
    check("edm-tiny", about(teacher), "DIR: dmd.json names 2 classes, num_class_embeds is 3");
    let generator = r#"{ "kind": "generator", "version": "0.1.0" }"#;
    let expected = "DIR: dmd.json says generator with sigma None, expected a positive number";
    check("edm-tiny", about(generator), expected);
    let unknown = r#"{ "kind": "teacher", "version": "0.1.0", "sigmas": 2.5 }"#;
    let expected = "DIR/dmd.json: unknown field `sigmas`, expected one of `kind`, `sigma`, `steps`, `classes`, `null_class`, `data`, `version`, `run` at line 1 column 49";
    check("edm-tiny", about(unknown), expected);
    let no_class = r#"{ "kind": "teacher", "version": "0.1.0", "null_class": true }"#;
    let expected = "DIR: dmd.json says null_class, but the model has no classes to leave out";
    check("ddpm-tiny", about(no_class), expected);
    let steps = r#"{ "kind": "generator", "version": "0.1.0", "sigma": 2.5, "steps": [2.5, 4.0] }"#;
    let expected = "DIR: dmd.json says steps [2.5, 4.0], expected descending from sigma (2.5)";
    check("edm-tiny", about(steps), expected);
}

#[test]
fn files_that_are_not_json_are_named() {
    for file in [CONFIG, SCHEDULER] {
        let expected = format!("DIR/{file}: not JSON: expected value at line 1 column 1");
        check("ddpm-tiny", |folder| fs::write(folder.join(file), "<html>").unwrap(), &expected);
    }
}
