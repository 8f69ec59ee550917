//! Model folders: those that diffusers wrote (`make_fixtures.py`), a round trip through ours, and one test per kind of
//! error, each with its message.

use candle_core::{DType, Device, Tensor};
use dmd_models::folder::{Kind, Scheduler};
use dmd_models::networks::dit::DiTConfig;
use dmd_models::{About, Condition, Eager, ModelFolder, NetworkConfig, Prediction, Way, Weights, read_metadata};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const CONFIG: &str = "unet/config.json";
const TRANSFORMER: &str = "transformer/config.json";
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
    assert_eq!(
        (folder.about.kind, folder.sample_shape().unwrap(), folder.classes()),
        (Kind::Teacher, [3, 8, 8], vec![])
    );
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
            if (name, file) == ("edm-tiny", "model_index.json") {
                // diffusers wrote a pipeline that would not scale its noise, nor hand on a class.
                assert_eq!(ours["_class_name"], "ConsistencyModelPipeline");
                theirs["_class_name"] = ours["_class_name"].clone();
            }
            // 1 and 1.0 are one number to diffusers.
            assert!(equal(&ours, &theirs), "{name}/{file}: {ours:#} became of {theirs:#}");
        }
    }
}

#[test]
fn a_folder_of_a_transformer_keeps_its_files_through_a_round_trip() {
    let temp = TempDir::new().unwrap();
    let (theirs, ours) = (fixture("dit-tiny"), temp.path().join("ours"));
    let folder = load(&theirs);
    assert_eq!((folder.n_classes(), folder.sample_shape().unwrap()), (Some(5), [4, 8, 8]));
    assert_eq!(folder.classes()[0], "tench, Tinca tinca");
    let null = folder.denoiser(&Device::Cpu).unwrap().unconditional.unwrap();
    assert_eq!(null.get(Way::Label).unwrap().to_vec1::<i64>().unwrap(), [5]);
    folder.save(&ours, DType::F16).unwrap();
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    assert_eq!(flat(&tensors(&ours.join(weights))), flat(&tensors(&theirs.join(weights))));
    for file in ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"] {
        assert!(fs::read(ours.join(file)).unwrap() == fs::read(theirs.join(file)).unwrap(), "{file}");
    }
    for file in ["model_index.json", TRANSFORMER, SCHEDULER] {
        let (ours, theirs) = (read_json(&ours.join(file)), read_json(&theirs.join(file)));
        // What has one value here, and what has no effect, is left out: diffusers' defaults are meant.
        let left_out = ["_diffusers_version", "dropout", "norm_num_groups", "norm_type", "upcast_attention"];
        for (key, value) in theirs.as_object().unwrap().iter().filter(|(key, _)| !left_out.contains(&key.as_str())) {
            assert!(equal(&ours[key], value), "{file}: {key} {value} became {}", ours[key]);
        }
        assert!(ours.as_object().unwrap().keys().all(|key| theirs.get(key).is_some()), "{file}: {ours}");
    }
    // Saved over itself, from its own parts.
    load(&ours).save(&ours, DType::F16).unwrap();
    same_but_weights(&load(&ours), &folder);
    fs::remove_dir_all(ours.join("vae")).unwrap();
    load(&ours);
}

#[test]
fn positions_of_the_older_class_stay_as_close_as_they_were() {
    let temp = a_copy("dit-tiny");
    let read = |fields: Value| {
        set(TRANSFORMER, fields)(temp.path());
        let config = load(temp.path()).config;
        let again = DiTConfig::from_json(temp.path(), &config.to_json().unwrap()).unwrap();
        assert_eq!(NetworkConfig::from(again.clone()), config);
        (config.class(), again.interpolation_scale)
    };
    assert_eq!(read(json!({ "sample_size": 128 })), ("DiTTransformer2DModel", Some(1.0)));
    assert_eq!(read(json!({ "_class_name": "Transformer2DModel" })), ("Transformer2DModel", Some(2.0)));
    assert_eq!(read(json!({ "sample_size": 8 })), ("DiTTransformer2DModel", Some(1.0)));
    assert_eq!(read(json!({ "interpolation_scale": 0.5 })), ("Transformer2DModel", Some(0.5)));
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
    let parts = match fixture(name).join("transformer").is_dir() {
        true => vec!["transformer", "scheduler", "vae"],
        false => vec!["unet", "scheduler"],
    };
    for folder in parts {
        // The whole folder of that name, or its network alone beside another scheduler.
        let candidates = [fixture(name).join(folder), fixture(folder).join(name), fixture("ddpm-tiny").join(folder)];
        let source = candidates.into_iter().find(|source| source.is_dir()).unwrap();
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
    check("ddpm-tiny", remove, "DIR: not a diffusers folder: it has no unet/ or transformer/");
    let bare = |folder: &Path| {
        fs::rename(folder.join(CONFIG), folder.join("config.json")).unwrap();
        remove(folder);
        fs::remove_dir_all(folder.join("scheduler")).unwrap();
    };
    let expected = "DIR: not a diffusers folder: it has no unet/ or transformer/ (a bare UNet: put it into a folder unet/ beside a folder scheduler/)";
    check("ddpm-tiny", bare, expected);
}

#[test]
fn a_missing_file_is_named() {
    for file in [CONFIG, SCHEDULER] {
        let expected = format!("DIR/{file}: No such file or directory (os error 2)");
        check("ddpm-tiny", |folder| fs::remove_file(folder.join(file)).unwrap(), &expected);
    }
}

const SUPPORTED: &str = "supported are UNet2DModel, UNet2DConditionModel and DiTTransformer2DModel with decoders AutoencoderKL, AutoencoderTiny and VQModel in vae/ or vqvae/, and CLIP's text encoders";

#[test]
fn a_decoder_that_says_no_class_is_refused() {
    let add_vae = |folder: &Path| fs::create_dir(folder.join("vae")).unwrap();
    let expected = format!("DIR: has a vae/ folder, which decodes latents: {SUPPORTED}");
    check("ddpm-tiny", add_vae, &expected);
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
    let expected = "DIR/unet/config.json: _class_name is UNet3DConditionModel, which is not supported (only UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)";
    check("ddpm-tiny", set(CONFIG, json!({ "_class_name": "UNet3DConditionModel" })), expected);
    let of_text = |folder: &Path| {
        let network = fixture("unet2d_condition/bk-sdm");
        for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
            fs::copy(network.join(file), folder.join("unet").join(file)).unwrap();
        }
    };
    let expected = "DIR: has no text_encoder/, and its network is told text";
    check("ddpm-tiny", of_text, expected);
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
    for (class, reason) in [
        ("FlowMatchEulerDiscreteScheduler", "not supported: flow matching, whose networks predict the velocity"),
        ("FlowMatchHeunDiscreteScheduler", "not supported: flow matching"),
        ("SCMScheduler", "not supported: TrigFlow"),
        ("VQDiffusionScheduler", "not supported: its model predicts tokens"),
        ("IPNDMScheduler", "not supported: its networks are told a continuous time"),
        ("ScoreSdeVeScheduler", "not supported: its networks are told a continuous time"),
        ("KarrasVeScheduler", "not supported: its networks are told a continuous time"),
        ("CMStochasticIterativeScheduler", "not supported: a consistency model"),
        ("CogVideoXDDIMScheduler", "not supported: its signal-to-noise ratios are shifted"),
        ("DDPMSheduler", "not known here, did you mean \"DDPMScheduler\"?; supported: DDIMInverseScheduler, "),
    ] {
        let temp = a_copy("ddpm-tiny");
        set(SCHEDULER, json!({ "_class_name": class }))(temp.path());
        let message = error(temp.path());
        let expected = format!("DIR/{SCHEDULER}: _class_name is \"{class}\", which is {reason}");
        assert!(message.starts_with(&expected), "{message}");
    }
    let nameless = |folder: &Path| fs::write(folder.join(SCHEDULER), "{}").unwrap();
    check("ddpm-tiny", nameless, &format!("DIR/{SCHEDULER}: has no _class_name, which names the scheduler"));
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
    check("edm-tiny", about(teacher), "DIR: dmd.json names 2 classes, the network knows 3");
    let generator = r#"{ "kind": "generator", "version": "0.1.0" }"#;
    let expected = "DIR: dmd.json says generator with sigma None, expected a positive number";
    check("edm-tiny", about(generator), expected);
    let unknown = r#"{ "kind": "teacher", "version": "0.1.0", "sigmas": 2.5 }"#;
    let expected = "DIR/dmd.json: unknown field `sigmas`, expected one of `kind`, `sigma`, `steps`, `classes`, `null_class`, `data`, `version`, `run`";
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
        check("ddpm-tiny", |folder| fs::write(folder.join(file), "unet").unwrap(), &expected);
        let expected =
            format!("DIR/{file}: not JSON, but a web page, as a download that failed leaves it: download it again");
        check("ddpm-tiny", |folder| fs::write(folder.join(file), "\n<!DOCTYPE html><html>").unwrap(), &expected);
    }
}

#[test]
fn a_decoder_of_any_name_makes_a_model_latent() {
    let part = |name: &'static str, config: Value| {
        move |folder: &Path| {
            fs::create_dir_all(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("config.json"), config.to_string()).unwrap();
        }
    };
    let decodes = format!("which decodes latents: {SUPPORTED}");
    for (name, config, class) in [
        ("movq", json!({}), ""),
        ("vqgan", json!({ "_class_name": "PaellaVQModel" }), " (PaellaVQModel)"),
        ("first_stage_model", json!({}), ""),
        ("pixels", json!({ "_class_name": "AutoencoderTiny" }), " (AutoencoderTiny)"),
        ("out", json!({ "_class_name": "ConsistencyDecoderVAE" }), " (ConsistencyDecoderVAE)"),
        ("mine", json!({ "latent_channels": 4 }), ""),
    ] {
        check("ddpm-tiny", part(name, config), &format!("DIR: has a {name}/ folder{class}, {decodes}"));
    }
    // The weights of the part may be elsewhere: the index tells all the same.
    let index =
        |parts: Value| move |folder: &Path| fs::write(folder.join("model_index.json"), parts.to_string()).unwrap();
    let latent = index(json!({ "_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"], "eta": 0.1 }));
    check("ddpm-tiny", latent, "DIR: model_index.json names a part vqvae (VQModel), which is not there");
    let text = part("prompts", json!({ "architectures": ["T5EncoderModel"] }));
    let expected =
        format!("DIR: has a prompts/ folder (T5EncoderModel), {}", decodes.replace("decodes latents", "reads text"));
    check("ddpm-tiny", text, &expected);
    let other = index(json!({ "transformer": ["diffusers", "DiTTransformer2DModel"] }));
    let expected = "DIR: model_index.json names a part transformer (DiTTransformer2DModel), another network than a UNet2DModel: supported are ";
    let temp = a_copy("ddpm-tiny");
    other(temp.path());
    assert!(error(temp.path()).starts_with(expected), "{}", error(temp.path()));
    // What changes nothing that the network makes is no reason to refuse.
    let temp = a_copy("ddpm-tiny");
    for name in ["logs", "textures", "unet_ema", "samples", "feature_extractor"] {
        part(name, json!({ "_class_name": "CLIPFeatureExtractor" }))(temp.path());
    }
    let parts = json!({ "_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "safety_checker": [null, null],
        "scheduler": ["diffusers", "DDPMScheduler"], "image_encoder": [null, null], "requires_safety_checker": false });
    for name in ["logs", "textures"] {
        fs::remove_file(temp.path().join(name).join("config.json")).unwrap();
    }
    index(parts)(temp.path());
    load(temp.path());
}

#[test]
fn a_model_whose_files_lie_in_the_root_is_taken() {
    let temp = a_copy("ddpm-tiny");
    for file in [CONFIG, SCHEDULER, WEIGHTS] {
        fs::rename(temp.path().join(file), temp.path().join(Path::new(file).file_name().unwrap())).unwrap();
    }
    for folder in ["unet", "scheduler"] {
        fs::remove_dir(temp.path().join(folder)).unwrap();
    }
    assert_eq!(flat(&load(temp.path()).weights), flat(&tensors(&fixture("ddpm-tiny").join(WEIGHTS))));
    fs::copy(fixture("ddpm-tiny/model_index.json"), temp.path().join("model_index.json")).unwrap();
    assert_eq!(load(temp.path()).config, load(&fixture("ddpm-tiny")).config);
}

#[test]
fn averages_of_a_training_script_are_taken_with_their_keys() {
    let temp = a_copy("ddpm-tiny");
    let ema = json!({ "decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 4000, "power": 0.75,
        "update_after_step": 0, "use_ema_warmup": true });
    set(CONFIG, ema)(temp.path());
    assert_eq!(load(temp.path()).config, load(&fixture("ddpm-tiny")).config);
    fs::rename(temp.path().join("unet"), temp.path().join("unet_ema")).unwrap();
    assert_eq!(load(temp.path()).config, load(&fixture("ddpm-tiny")).config);
}

#[test]
fn a_checkpoint_of_a_training_script_says_where_the_whole_model_is() {
    let temp = a_copy("ddpm-tiny");
    let checkpoint = temp.path().join("checkpoint-500");
    fs::create_dir_all(checkpoint.join("unet")).unwrap();
    for file in [CONFIG, WEIGHTS] {
        fs::copy(temp.path().join(file), checkpoint.join(file)).unwrap();
    }
    fs::write(checkpoint.join("optimizer.bin"), "").unwrap();
    let whole = temp.path().canonicalize().unwrap();
    let expected = format!(
        "DIR: has no scheduler/scheduler_config.json, which says what noise levels the network knows (a checkpoint of a training script): the whole model is in {}",
        whole.display()
    );
    assert_eq!(error(&checkpoint), expected.replace(checkpoint.to_str().unwrap(), "DIR"));
    // The network alone, too.
    let message = error(&temp.path().join("unet"));
    assert!(
        message.ends_with(&format!("it has no unet/ or transformer/: the whole model is in {}", whole.display())),
        "{message}"
    );
    fs::remove_dir_all(temp.path().join("scheduler")).unwrap();
    let message = error(&checkpoint);
    assert!(
        message.ends_with(
            "give the folder that the script saved its pipeline to, or put that one's scheduler/ beside unet/"
        ),
        "{message}"
    );
}

#[test]
fn weights_of_any_variant_are_found() {
    let named = |name: &str| format!("unet/diffusion_pytorch_model.{name}");
    for variant in ["fp16", "bf16", "ema", "non_ema", "step-10"] {
        let temp = a_copy("ddpm-tiny");
        fs::rename(temp.path().join(WEIGHTS), temp.path().join(named(&format!("{variant}.safetensors")))).unwrap();
        assert_eq!(flat(&load(temp.path()).weights), flat(&load(&fixture("ddpm-tiny")).weights), "{variant}");
    }
    // Less precision is the same model; averages are another.
    let temp = a_copy("ddpm-tiny");
    fs::copy(temp.path().join(WEIGHTS), temp.path().join(named("fp16.safetensors"))).unwrap();
    fs::rename(temp.path().join(WEIGHTS), temp.path().join(named("bf16.safetensors"))).unwrap();
    load(temp.path());
    fs::rename(temp.path().join(named("bf16.safetensors")), temp.path().join(named("ema.safetensors"))).unwrap();
    let expected = "DIR/unet: has several variants and no diffusion_pytorch_model.safetensors: give that name to the one that is meant, of diffusion_pytorch_model.ema.safetensors, diffusion_pytorch_model.fp16.safetensors";
    assert_eq!(error(temp.path()), expected);
    // Shards, by both names that diffusers has given them.
    for (index, shard) in [
        ("safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-0000N-of-00003.safetensors"),
        ("fp16.safetensors.index.json", "diffusion_pytorch_model-0000N-of-00003.fp16.safetensors"),
    ] {
        let temp = a_copy("sharded");
        let mut text = fs::read_to_string(temp.path().join(named("safetensors.index.json"))).unwrap();
        for n in 1..=3 {
            let (old, new) =
                (format!("diffusion_pytorch_model-0000{n}-of-00003.safetensors"), shard.replace('N', &n.to_string()));
            fs::rename(temp.path().join("unet").join(&old), temp.path().join("unet").join(&new)).unwrap();
            text = text.replace(&old, &new);
        }
        fs::remove_file(temp.path().join(named("safetensors.index.json"))).unwrap();
        fs::write(temp.path().join(named(index)), text).unwrap();
        assert_eq!(load(temp.path()).weights.n_parameters(), 50_163, "{index}");
        fs::remove_file(temp.path().join(named(index))).unwrap();
        assert!(error(temp.path()).contains("a shard without its index"), "{}", error(temp.path()));
    }
    let other = |folder: &Path| fs::rename(folder.join(WEIGHTS), folder.join("unet/model.safetensors")).unwrap();
    let expected = "DIR/unet: has no diffusion_pytorch_model.safetensors; there is model.safetensors: give it that name if these are the network's weights";
    check("ddpm-tiny", other, expected);
}

/// Gives every tensor another name.
fn rename(new: impl Fn(&str) -> String) -> impl FnOnce(&Path) {
    rewrite(move |all| *all = std::mem::take(all).into_iter().map(|(name, tensor)| (new(&name), tensor)).collect())
}

#[test]
fn what_wrappers_put_into_names_is_taken_off() {
    let plain = flat(&load(&fixture("ddpm-tiny")).weights);
    for prefix in
        ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "unet.", "model.", "_fsdp_wrapped_module."]
    {
        let temp = a_copy("ddpm-tiny");
        rename(|name| format!("{prefix}{name}"))(temp.path());
        assert_eq!(flat(&load(temp.path()).weights), plain, "{prefix}");
    }
    let temp = a_copy("ddpm-tiny");
    rename(|name| name.replace("down_blocks.1.", "down_blocks.1._orig_mod."))(temp.path());
    assert_eq!(flat(&load(temp.path()).weights), plain);
    // Two networks in one file are none of them.
    let temp = a_copy("ddpm-tiny");
    let both = |all: &mut BTreeMap<String, Tensor>| {
        let each = std::mem::take(all).into_iter();
        *all = each.flat_map(|(name, t)| [(format!("unet.{name}"), t.clone()), (format!("ema.{name}"), t)]).collect();
    };
    rewrite(both)(temp.path());
    assert!(
        error(temp.path()).contains("tensor \"time_embedding.linear_1.weight\" [24, 8] is missing"),
        "{}",
        error(temp.path())
    );
    // Nor may one name hide another.
    let twice = |all: &mut BTreeMap<String, Tensor>| {
        let tensor = all["mid_block.attentions.0.to_q.weight"].clone();
        all.insert("mid_block.attentions.0.query.weight".into(), tensor);
    };
    let expected = format!(
        "DIR/{WEIGHTS}: tensor \"mid_block.attentions.0.to_q.weight\" is there twice, under an old or wrapped name too"
    );
    check("ddpm-tiny", rewrite(twice), &expected);
}

#[test]
fn files_in_the_place_of_weights_are_named_as_what_they_are() {
    let mut tar = vec![0u8; 512];
    tar[..5].copy_from_slice(b"unet/");
    tar[257..262].copy_from_slice(b"ustar");
    let pickle = "load them in Python and save them with save_pretrained(…, safe_serialization=True)";
    for (bytes, what) in [
        (&b""[..], "an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 49142\n",
            "a pointer of Git LFS in the file's place: run `git lfs pull` in its repository",
        ),
        (
            b"/annex/objects/SHA256E-s49142--ab.safetensors\n",
            "a pointer of git-annex in the file's place: run `git annex get` in its repository",
        ),
        (b"\xef\xbb\xbf <HTML><head>", "a web page, as a download that failed leaves it: download it again"),
        (b"<?xml version=\"1.0\"?><Error>", "a web page, as a download that failed leaves it: download it again"),
        (b"PK\x03\x04\x00\x00archive/data.pkl", pickle),
        (b"\x80\x02}q\x00X\x07\x00\x00\x00conv_in", pickle),
        (b"\x80\x04\x95\x0b\x00\x00\x00\x00", pickle),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00", "an archive: unpack it"),
        (&tar, "an archive: unpack it"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "a file of another format"),
        (b"Entry not found\x1b[2J", "text: \"Entry not found\\u{1b}[2J\""),
        (b"Invalid username or password.", "text: \"Invalid username or password.\""),
    ] {
        let temp = a_copy("ddpm-tiny");
        fs::write(temp.path().join(WEIGHTS), bytes).unwrap();
        let message = error(temp.path());
        assert!(message.starts_with(&format!("DIR/{WEIGHTS}: not a")) && message.contains(what), "{what}: {message}");
    }
    // A header of 640 bytes begins as a pickle does.
    let cut = |folder: &Path| fs::write(folder.join(WEIGHTS), b"\x80\x02\0\0\0\0\0\0{").unwrap();
    check(
        "ddpm-tiny",
        cut,
        &format!("DIR/{WEIGHTS}: not a whole safetensors file (9 bytes): a header of 640 bytes does not fit"),
    );
    for length in [u64::MAX, 1 << 63, 1 << 40] {
        let long =
            |folder: &Path| fs::write(folder.join(WEIGHTS), [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        check(
            "ddpm-tiny",
            long,
            &format!("DIR/{WEIGHTS}: not a whole safetensors file (10 bytes): a header of {length} bytes does not fit"),
        );
    }
}

#[cfg(unix)]
#[test]
fn a_link_that_leads_nowhere_says_where_it_led() {
    for (target, remedy) in
        [("../../blobs/ab12", ""), ("../.git/annex/objects/x/y", ": run `git annex get` in its repository")]
    {
        let link = |folder: &Path| {
            fs::remove_file(folder.join(WEIGHTS)).unwrap();
            std::os::unix::fs::symlink(target, folder.join(WEIGHTS)).unwrap();
        };
        check("ddpm-tiny", link, &format!("DIR/{WEIGHTS}: a link to {target}, which is not there{remedy}"));
    }
}

#[test]
fn shards_outside_of_the_folder_are_refused() {
    const INDEX: &str = "unet/diffusion_pytorch_model.safetensors.index.json";
    for shard in ["..", ".", "../a.safetensors", "/etc/passwd", "a/b.safetensors", ""] {
        let expected = format!("DIR/{INDEX}: shard \"{shard}\" is not a plain file name");
        check("sharded", set(INDEX, json!({ "weight_map": { "conv_in.weight": shard } })), &expected);
    }
    let expected = format!("DIR/{INDEX}: not a weight index: ");
    let temp = a_copy("sharded");
    set(INDEX, json!({ "weight_map": [1] }))(temp.path());
    assert!(error(temp.path()).starts_with(&expected), "{}", error(temp.path()));
}

#[test]
fn quantised_weights_are_refused() {
    let to_bytes = |all: &mut BTreeMap<String, Tensor>| {
        let tensor = all["conv_in.weight"].to_dtype(DType::U8).unwrap();
        all.insert("conv_in.weight".into(), tensor);
    };
    let expected =
        "DIR: tensor \"conv_in.weight\" is U8: quantised weights are not supported, expected F32, F16, BF16 or F64";
    check("ddpm-tiny", rewrite(to_bytes), expected);
}

#[test]
fn a_learned_table_of_timesteps_is_refused() {
    let expected = "DIR: time_embedding_type is learned, a table of whole timesteps: the noise levels of sampling and distillation lie between them, supported for whole models: positional, fourier";
    check("learned-time-grey", |_| {}, expected);
}

#[test]
fn a_size_is_a_number_or_two() {
    for size in ["[8]", "[8,8,8]", "\"8\"", "8.5", "-8", "1e40", "true"] {
        let field: Value = serde_json::from_str(size).unwrap();
        let expected = format!(
            "DIR/{CONFIG}: sample_size is {field}, which is not supported: expected a whole number, or two: [height, width] (default: null)"
        );
        check("ddpm-tiny", set(CONFIG, json!({ "sample_size": field })), &expected);
    }
}

#[test]
fn pythons_infinities_in_a_config_are_named() {
    let infinite = |folder: &Path| {
        let text = fs::read_to_string(folder.join(CONFIG)).unwrap();
        fs::write(
            folder.join(CONFIG),
            text.replacen('{', "{\"mid_block_scale_factor\": NaN,", 1).replace("\"mid_block_scale_factor\": 1,", ""),
        )
        .unwrap();
    };
    let expected = format!(
        "DIR/{CONFIG}: mid_block_scale_factor is NaN, which is not supported: invalid type: string \"NaN\", expected f64 (default: 1.0)"
    );
    check("ddpm-tiny", infinite, &expected);
}

#[test]
fn names_of_the_first_releases_are_understood() {
    let temp = a_copy("ddpm-tiny");
    let mut json = read_json(&temp.path().join(CONFIG));
    let fields = json.as_object_mut().unwrap();
    for (old, new) in [
        ("resolution", "sample_size"),
        ("num_res_blocks", "layers_per_block"),
        ("block_channels", "block_out_channels"),
        ("down_blocks", "down_block_types"),
        ("up_blocks", "up_block_types"),
        ("downscale_freq_shift", "freq_shift"),
        ("resnet_num_groups", "norm_num_groups"),
        ("resnet_act_fn", "act_fn"),
        ("resnet_eps", "norm_eps"),
        ("num_head_channels", "attention_head_dim"),
    ] {
        let value = fields.remove(new).unwrap();
        fields.insert(old.into(), value);
    }
    fs::write(temp.path().join(CONFIG), json.to_string()).unwrap();
    assert_eq!(load(temp.path()).config, load(&fixture("ddpm-tiny")).config);
    let both = set(CONFIG, json!({ "num_head_channels": 4 }));
    check(
        "ddpm-tiny",
        both,
        &format!(
            "DIR/{CONFIG}: attention_head_dim and num_head_channels say two different things: take one of them out"
        ),
    );
}

/// Every number of a config at values that no file should have: an error that names the file, in no time and no memory.
#[test]
fn no_number_of_a_config_brings_the_program_down() {
    let numbers = [
        json!(0),
        json!(-1),
        json!(1_000_000),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e300),
        json!(-1e-300),
        json!(0.5),
        json!([]),
        json!([1]),
        json!(null),
        json!(true),
        json!("8"),
        json!({}),
    ];
    for (file, name) in [
        (CONFIG, "ddpm-tiny"),
        (CONFIG, "edm-tiny"),
        (TRANSFORMER, "dit-tiny"),
        (SCHEDULER, "ddpm-tiny"),
        (SCHEDULER, "edm-tiny"),
    ] {
        let temp = a_copy(name);
        let whole = read_json(&temp.path().join(file));
        for (key, value) in whole.as_object().unwrap().iter().filter(|(key, _)| !key.starts_with('_')) {
            let lists = value.as_array().map_or(0, Vec::len);
            for number in &numbers {
                for place in 0..=lists {
                    let mut json = whole.clone();
                    if place < lists {
                        json[key][place] = number.clone()
                    } else {
                        json[key] = number.clone()
                    }
                    fs::write(temp.path().join(file), json.to_string()).unwrap();
                    if let Err(error) = ModelFolder::load(temp.path(), &Device::Cpu) {
                        assert!(
                            error.to_string().starts_with(temp.path().to_str().unwrap()),
                            "{key} {number}: {error}"
                        );
                    }
                }
            }
        }
        fs::write(temp.path().join(file), whole.to_string()).unwrap();
    }
    // Larger than their tensors in the file: found before anything is built.
    for (field, value) in [
        ("block_out_channels", json!([8, 48_000])),
        ("layers_per_block", json!(256)),
        ("time_embedding_dim", json!(131_072)),
        ("num_class_embeds", json!(16_000_000)),
    ] {
        let temp = a_copy("edm-tiny");
        set(CONFIG, json!({ field: value }))(temp.path());
        assert!(error(temp.path()).contains("the weights do not fit the network"), "{field}: {}", error(temp.path()));
    }
    for (field, value) in [("num_layers", 256), ("num_embeds_ada_norm", 1 << 24), ("attention_head_dim", 1 << 14)] {
        let temp = a_copy("dit-tiny");
        set(TRANSFORMER, json!({ field: value }))(temp.path());
        assert!(error(temp.path()).contains("the weights do not fit the network"), "{field}: {}", error(temp.path()));
    }
    for (field, value) in [
        ("block_out_channels", json!([8, 1 << 20])),
        ("layers_per_block", json!(1_000_000)),
        ("sample_size", json!(1_u64 << 32)),
    ] {
        let temp = a_copy("ddpm-tiny");
        set(CONFIG, json!({ field: value }))(temp.path());
        assert!(error(temp.path()).contains(&format!("{field} is ")), "{}", error(temp.path()));
    }
}

#[test]
fn a_person_may_name_the_classes_of_a_foreign_teacher() {
    let temp = a_copy("edm-tiny");
    fs::write(temp.path().join("dmd.json"), r#"{ "classes": ["cat", "dog"], "null_class": true }"#).unwrap();
    let folder = load(temp.path());
    assert_eq!(
        (folder.about.kind, folder.n_classes(), folder.classes()),
        (Kind::Teacher, Some(2), vec!["cat".into(), "dog".into()])
    );
    assert!(folder.denoiser(&Device::Cpu).unwrap().unconditional.is_some());
    fs::write(temp.path().join("dmd.json"), "{}").unwrap();
    assert_eq!(load(temp.path()).classes(), ["0", "1", "2"]);
    let half = |folder: &Path| fs::write(folder.join("dmd.json"), r#"{ "sigma": 2.5 }"#).unwrap();
    check("edm-tiny", half, "DIR: dmd.json has sigma or steps, which a generator has: it says no kind, or teacher");
}

#[test]
fn names_from_files_command_no_terminal() {
    let change = |all: &mut BTreeMap<String, Tensor>| {
        let tensor = all.remove("conv_in.bias").unwrap();
        all.insert("\x1b]0;title\x07".into(), tensor);
    };
    let temp = a_copy("ddpm-tiny");
    rewrite(change)(temp.path());
    let message = error(temp.path());
    assert!(message.contains("unexpected tensor \"\\u{1b}]0;title\\u{7}\""), "{message:?}");
    assert!(!message.contains('\x1b'), "{message:?}");
}

/// It is said on a log, which the binary prints.
#[test]
fn the_schedulers_own_file_counts_where_the_index_names_another_class() {
    let temp = a_copy("ddpm-tiny");
    let index = json!({ "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"] });
    fs::write(temp.path().join("model_index.json"), index.to_string()).unwrap();
    fs::write(temp.path().join(SCHEDULER), r#"{ "_class_name": "HeunDiscreteScheduler" }"#).unwrap();
    let folder = load(temp.path());
    assert_eq!(folder.scheduler.class_name(), "HeunDiscreteScheduler");
    assert!((folder.scheduler.levels().unwrap().sigma_max() - 25.146).abs() < 0.01);
}
