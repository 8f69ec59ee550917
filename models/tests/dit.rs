//! The class-conditional transformer against diffusers: same weights, same input, outputs made by `make_fixtures.py` with
//! diffusers 0.42.

use candle_core::{DType, Device, Tensor, Var};
use dmd_models::cost::cost;
use dmd_models::networks::dit::{DiT, DiTConfig};
use dmd_models::networks::{Network, Want};
use dmd_models::{Architecture, Backend, Condition, Eager, Training, Way, Weights};
use std::path::{Path, PathBuf};

const NAMES: [&str; 3] = ["plain", "gated", "older-class"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dit").join(name)
}

fn config(name: &str) -> DiTConfig {
    let path = folder(name).join("config.json");
    DiTConfig::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap()
}

fn weights(name: &str) -> Weights {
    let file = folder(name).join("diffusion_pytorch_model.safetensors");
    Weights::load(&file, &Device::Cpu).unwrap().to(DType::F32, &Device::Cpu).unwrap()
}

struct Io {
    x: Tensor,
    t: Vec<f64>,
    cond: Condition<Tensor>,
    /// Of the channels that a denoiser takes: the variance left out.
    output: Tensor,
}

fn io(name: &str) -> Io {
    let io = Weights::load(&folder(name).join("io.safetensors"), &Device::Cpu).unwrap();
    let x = io.get("sample").unwrap().clone();
    Io {
        t: io.get("timestep").unwrap().to_vec1().unwrap(),
        cond: Condition::of(Way::Label, io.get("class_labels").unwrap().clone()),
        output: io.get("output").unwrap().narrow(1, 0, x.dim(1).unwrap()).unwrap().contiguous().unwrap(),
        x,
    }
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn outputs_equal_those_of_diffusers() {
    for name in NAMES {
        let (net, io) = (DiT::new(&config(name), &weights(name)).unwrap(), io(name));
        let output = net.forward(&Eager, &io.x, &io.t, &io.cond).unwrap();
        let gap = largest(&(&output - &io.output).unwrap()) / largest(&io.output);
        println!("{name}: {gap:.2e} of the output's maximum");
        assert!(gap <= 1e-5, "{name}: {gap}");
    }
}

#[test]
fn every_way_of_training_gives_the_same_gradients() {
    for name in NAMES {
        let (config, io) = (config(name), io(name));
        let run = |training: &Training| {
            let (view, vars) = weights(name).trainable().unwrap();
            let x = Var::from_tensor(&io.x).unwrap();
            let y = DiT::new(&config, &view).unwrap().forward(training, &x, &io.t, &io.cond).unwrap();
            let grads = training.backward(&(y * &io.output).unwrap().sum_all().unwrap()).unwrap();
            let all = vars.values().chain([&x]);
            all.map(|var| grads.get(var).expect("a gradient reaches every weight").clone()).collect::<Vec<Tensor>>()
        };
        let plain = run(&Training::default());
        for (checkpoint, tape) in [(true, false), (false, true), (true, true)] {
            let training = Training::new(Default::default(), checkpoint);
            let found = run(&if tape { training.on_tape() } else { training });
            for (found, plain) in found.iter().zip(&plain) {
                let gap = largest(&(found - plain).unwrap());
                // The bias of keys has no gradient but rounding.
                assert!(gap <= 1e-4 * largest(plain).max(1.0), "{name}: {gap} of {}", largest(plain));
            }
        }
    }
}

#[test]
fn a_fresh_network_starts_with_every_gate_shut() {
    let config = config("plain");
    let weights = DiT::init(&config, &mut |_, n| (0..n).map(|i| (i % 7) as f64 / 7.0).collect()).unwrap();
    let net = DiT::new(&config, &weights).unwrap();
    let Io { x, t, cond, .. } = io("plain");
    assert_eq!(largest(&net.forward(&Eager, &x, &t, &cond).unwrap()), 0.0);
    let maps = Eager.network(&net, &x, &t, &cond, Want::Maps).unwrap();
    assert_eq!(largest(&(&maps[0] - &maps[1]).unwrap()), 0.0);
}

/// Two blocks of 16 tokens and 16 channels, counted by hand.
#[test]
fn the_cost_is_that_of_its_products() {
    let net = Network::DiT(DiT::new(&config("plain"), &weights("plain")).unwrap());
    let (tokens, width) = (16.0, 16.0);
    let embedding = 256.0 * width + width * width;
    let block =
        embedding + 6.0 * width * width + tokens * (4.0 * width * width + 2.0 * tokens * width + 8.0 * width * width);
    let patches = tokens * width * (16.0 + 32.0);
    let products = 2.0 * block + patches + 2.0 * width * width;
    assert_eq!(cost(&net, [4, 8, 8]).unwrap().flops, 2.0 * products);
}

#[test]
fn what_is_not_computed_is_refused_by_its_key() {
    let refused = |fields: &str, part: &str| {
        let error = DiTConfig::from_json(Path::new("config.json"), fields).unwrap_err().to_string();
        assert!(error.contains(part), "expected {part:?} in {error}");
    };
    refused(r#"{"norm_type": "ada_norm_single"}"#, "norm_type is \"ada_norm_single\"");
    refused(r#"{"cross_attention_dim": 768}"#, "cross_attention_dim is 768");
    refused(r#"{"activation_fn": "linear-silu"}"#, "activation_fn is \"linear-silu\"");
    refused(r#"{"patch_sise": 2}"#, "did you mean \"patch_size\"");
    refused(r#"{"sample_size": 31}"#, "sample_size 31 is not made of patches");
    refused(r#"{"out_channels": 5}"#, "out_channels is 5, expected in_channels (4) or twice as many");
    refused(r#"{"_class_name": "PixArtTransformer2DModel"}"#, "_class_name is PixArtTransformer2DModel");
}
