//! Autoencoders against diffusers: same weights, same input, outputs made by `make_encoder_fixtures.py` with diffusers
//! 0.42.

use candle_core::{DType, Device, Tensor, Var};
use dmd_models::{Activation, Autoencoder, Eager, Training, Weights};
use std::path::{Path, PathBuf};

const NAMES: [&str; 5] = ["kl", "shifted", "old-names", "tiny", "vq"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/autoencoders").join(name)
}

fn open(name: &str) -> Autoencoder {
    Autoencoder::load(&folder(name), &Device::Cpu).unwrap()
}

fn config(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap()
}

fn weights(name: &str) -> Weights {
    let file = folder(name).join("diffusion_pytorch_model.safetensors");
    Weights::load(&file, &Device::Cpu).unwrap().to(DType::F32, &Device::Cpu).unwrap()
}

fn io(name: &str, tensor: &str) -> Tensor {
    let io = Weights::load(&folder(name).join("io.safetensors"), &Device::Cpu).unwrap();
    io.get(tensor).unwrap().clone()
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[track_caller]
fn equal(name: &str, found: &Tensor, expected: &Tensor) {
    let gap = largest(&(found - expected).unwrap()) / largest(expected);
    println!("{name}: {gap:.2e} of the maximum");
    assert!(gap <= 2e-5, "{name}: {gap}");
}

#[test]
fn decoded_latents_equal_those_of_diffusers() {
    for name in NAMES {
        equal(name, &open(name).decode(&io(name, "latents")).unwrap(), &io(name, "decoded"));
    }
}

/// Their downsampling pads on the right and below alone, which these numbers would show.
#[test]
fn encoded_pictures_equal_those_of_diffusers() {
    for name in NAMES {
        let encoded = open(name).encode(&io(name, "pictures")).unwrap();
        equal(name, &encoded.mean, &io(name, "mean"));
        assert_eq!(encoded.std.is_some(), ["kl", "shifted", "old-names"].contains(&name), "{name}");
        if let Some(std) = &encoded.std {
            equal(name, std, &io(name, "std"));
            let noise = (std.ones_like().unwrap() * 2.0).unwrap();
            equal(name, &encoded.sample(&noise).unwrap(), &(io(name, "mean") + io(name, "std") * 2.0).unwrap());
        }
    }
}

#[test]
fn sizes_are_told() {
    for (name, factor, latents, pictures) in
        [("kl", 2, 4, 3), ("shifted", 2, 6, 1), ("old-names", 2, 4, 3), ("tiny", 4, 4, 3), ("vq", 2, 3, 3)]
    {
        let found = open(name);
        let sizes = (found.factor(), found.latent_channels(), found.picture_channels());
        assert_eq!(sizes, (factor, latents, pictures), "{name}");
    }
}

/// TAESD's own files: each a half, layers by bare numbers, those of the decoder behind a clamp.
#[test]
fn a_bare_decoder_of_taesd_decodes_and_says_that_it_cannot_encode() {
    let dir = tempfile::tempdir().unwrap();
    let mut bare = Weights::default();
    for (name, tensor) in weights("tiny").iter() {
        if let Some(rest) = name.strip_prefix("decoder.layers.") {
            let (at, rest) = rest.split_once('.').unwrap();
            bare.insert(format!("{}.{rest}", at.parse::<usize>().unwrap() + 1), tensor.clone());
        }
    }
    let decoder = Autoencoder::new(&config("tiny"), bare).unwrap();
    equal("bare", &decoder.decode(&io("tiny", "latents")).unwrap(), &io("tiny", "decoded"));
    let error = decoder.encode(&io("tiny", "pictures")).unwrap_err().to_string();
    assert!(error.contains("came as a decoder alone"), "{error}");
    // A file by itself is taken for TAESD at its full size.
    let file = dir.path().join("taesd_decoder.safetensors");
    let mut wrong = Weights::default();
    wrong.insert("1.weight", Tensor::zeros((64, 4, 3, 3), DType::F32, &Device::Cpu).unwrap());
    wrong.save(&file, &Default::default()).unwrap();
    let error = Autoencoder::load(&file, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("taesd_decoder.safetensors") && error.contains("\"decoder.layers.0.bias\""), "{error}");
}

#[test]
fn a_bare_encoder_of_taesd_is_refused() {
    let mut bare = Weights::default();
    for (name, tensor) in weights("tiny").iter() {
        if let Some(rest) = name.strip_prefix("encoder.layers.") {
            bare.insert(rest, tensor.clone());
        }
    }
    let error = Autoencoder::new(&config("tiny"), bare).unwrap_err().to_string();
    assert!(error.contains("an encoder alone"), "{error}");
}

/// A gradient reaches latents through a codebook as if it were not there (van den Oord et al. 2017, section 3.2).
#[test]
fn gradients_reach_latents() {
    for name in NAMES {
        let latents = Var::from_tensor(&io(name, "latents")).unwrap();
        let decoded = open(name).decode(&latents).unwrap();
        let grads = Training::default().backward(&decoded.sqr().unwrap().sum_all().unwrap()).unwrap();
        let grad = grads.get(&latents).unwrap_or_else(|| panic!("{name}: no gradient"));
        assert!(largest(grad) > 0.0, "{name}");
    }
}

#[test]
fn the_group_norms_add_1e_6_to_their_variance() {
    // With 1e-5, another network of diffusers' own value, latents this small would come out otherwise.
    let name = "kl";
    let mut quiet = Weights::default();
    for (key, tensor) in weights(name).iter() {
        let scale = if key.starts_with("decoder.conv_in") { 1e-3 } else { 1.0 };
        quiet.insert(key, (tensor * scale).unwrap());
    }
    let decoded = Autoencoder::new(&config(name), quiet).unwrap().decode(&io(name, "latents")).unwrap();
    equal("quiet", &decoded, &io(name, "decoded_quiet"));
}

#[test]
fn a_codebook_is_no_operation_of_a_graph() {
    let error = open("vq").decode_by(&Eager, &io("vq", "latents")).unwrap_err().to_string();
    assert!(error.contains("nearest row of its codebook"), "{error}");
}

#[test]
fn what_is_not_computed_is_refused_by_its_key() {
    let refused = |name: &str, key: &str, value: serde_json::Value, part: &str| {
        let mut config = config(name);
        config[key] = value;
        let error = Autoencoder::new(&config, weights(name)).unwrap_err().to_string();
        assert!(error.contains(part), "expected {part:?} in {error}");
    };
    use serde_json::json;
    refused("kl", "_class_name", json!("AutoencoderDC"), "_class_name is AutoencoderDC, supported: AutoencoderKL");
    refused("kl", "down_block_types", json!(["DownBlock2D", "DownEncoderBlock2D"]), "down_block_types is");
    refused("kl", "up_block_types", json!(["UpDecoderBlock2D"]), "up_block_types has 1 entries");
    refused("kl", "block_out_channels", json!([8, 1u64 << 40]), "block_out_channels is 1099511627776");
    refused("kl", "scaling_factor", json!(0), "scaling_factor is 0");
    refused("kl", "latents_mean", json!([0, 0, 0, 0]), "latents_std is null");
    refused("old-names", "latents_std", json!([1, 1, 0, 1]), "expected positive numbers");
    refused("old-names", "latents_mean", json!([1, 1, 1]), "expected one for each of 4 channels");
    refused("old-names", "shift_factor", json!(0.1), "shift_factor is 0.1 beside latents_mean");
    refused("tiny", "upsample_fn", json!("bilinear"), "upsample_fn is \"bilinear\"");
    refused("tiny", "decoder_block_out_channels", json!([16, 8, 8]), "expected one number throughout");
    refused("vq", "norm_type", json!("spatial"), "norm_type is \"spatial\"");
    refused("vq", "vq_embed_dim", json!(5), "\"quant_conv.weight\" has shape [3, 4, 1, 1], expected [5, 4, 1, 1]");
    refused("kl", "latent_channel", json!(4), "did you mean \"latent_channels\"");
}

#[test]
fn pictures_and_latents_of_another_size_are_refused() {
    let kl = open("kl");
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let error = kl.encode(&zeros(&[1, 3, 9, 8])).unwrap_err().to_string();
    assert!(error.contains("pictures of 9×8, expected sides that are multiples of 2"), "{error}");
    let error = kl.decode(&zeros(&[1, 3, 4, 4])).unwrap_err().to_string();
    assert!(error.contains("latents have 3 channels, this autoencoder takes 4"), "{error}");
}

/// What TAESD bends far latents by.
#[test]
fn tanh_saturates_on_both_sides() {
    let x = Tensor::new(&[-40f32, -1.0, 0.0, 0.5, 40.0], &Device::Cpu).unwrap();
    let y = dmd_models::ops::activation(&x, Activation::Tanh).unwrap().to_vec1::<f32>().unwrap();
    let exact = [-1.0, -0.761_594_2, 0.0, 0.462_117_16, 1.0];
    assert!(y.iter().zip(exact).all(|(y, exact)| (y - exact).abs() < 1e-6), "{y:?}");
}
