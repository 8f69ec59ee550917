//! The UNet against diffusers: same weights, same input, outputs made by `make_fixtures.py` with diffusers 0.42.

use candle_core::{DType, Device, Tensor};
use dmd_models::{Architecture, Condition, Eager, Told, UNet, UNetConfig, Way, Weights};
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/unet")
}

fn load(name: &str) -> (UNet, Weights) {
    let folder = fixtures().join(name);
    let path = folder.join("config.json");
    let config = UNetConfig::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
    let single = folder.join("diffusion_pytorch_model.safetensors");
    let file = if single.exists() { single } else { folder.join("diffusion_pytorch_model.safetensors.index.json") };
    let weights = Weights::load(&file, &Device::Cpu).unwrap().to(DType::F32, &Device::Cpu).unwrap();
    let net = UNet::new(&config, &weights).unwrap();
    (net, Weights::load(&folder.join("io.safetensors"), &Device::Cpu).unwrap())
}

#[test]
fn outputs_equal_those_of_diffusers() {
    let mut names: Vec<_> =
        std::fs::read_dir(fixtures()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 6);
    for name in names {
        let (net, io) = load(&name);
        let timestep: Vec<f64> = io.get("timestep").unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap();
        let output = net.forward(&Eager, io.get("sample").unwrap(), &timestep, &told(&net, &io)).unwrap();
        let expected = io.get("output").unwrap();
        let gap = max_abs(&(&output - expected).unwrap()) / max_abs(expected);
        println!("{name}: {gap:.2e} of the output's maximum");
        assert!(gap <= 1e-5, "{name}: {gap}");
    }
}

/// The class, in the way in which the network takes it.
fn told(net: &UNet, io: &Weights) -> Condition<Tensor> {
    net.takes().told.iter().map(|(way, _)| (way, io.get("class_labels").unwrap().clone())).collect()
}

fn max_abs(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn gradients_reach_every_parameter_and_match_finite_differences() {
    let (net, io) = load("edm-style");
    let path = fixtures().join("edm-style/diffusion_pytorch_model.safetensors");
    let weights = Weights::load(&path, &Device::Cpu).unwrap();
    let (view, vars) = weights.trainable().unwrap();
    let net = UNet::new(net.config(), &view).unwrap();
    let timestep: Vec<f64> = io.get("timestep").unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap();
    let loss = |net: &UNet| {
        let y = net.forward(&Eager, io.get("sample").unwrap(), &timestep, &told(net, &io)).unwrap();
        y.sqr().unwrap().sum_all().unwrap()
    };
    let grads = loss(&net).backward().unwrap();
    for (name, var) in &vars {
        let grad = grads.get(var).unwrap_or_else(|| panic!("no gradient for {name}"));
        assert_eq!(grad.dims(), var.dims(), "{name}");
        // Directional derivative along the gradient's sign, by central difference.
        let direction = grad.sign().unwrap();
        let slope: f32 = (grad * &direction).unwrap().sum_all().unwrap().to_scalar().unwrap();
        let kept = var.as_tensor().copy().unwrap();
        let step = 1e-3 / (var.elem_count() as f64).sqrt();
        let at = |sign: f64| -> f64 {
            var.set(&(&kept + (&direction * (sign * step)).unwrap()).unwrap()).unwrap();
            let value = loss(&net).to_scalar::<f32>().unwrap();
            var.set(&kept).unwrap();
            f64::from(value)
        };
        let measured = (at(1.0) - at(-1.0)) / (2.0 * step);
        let gap = (measured - f64::from(slope)).abs();
        assert!(gap <= 0.03 * measured.abs() + 0.5, "{name}: {slope} by backward, {measured} by difference");
    }
}

/// The fixtures hold each way of being told a class: none, a row of a table, a timestep, a vector.
#[test]
fn a_network_that_is_told_too_little_or_too_much_says_what() {
    let (net, io) = load("edm-style");
    let x = io.get("sample").unwrap();
    let refusal = |net: &UNet, cond: &Condition<Tensor>| net.forward(&Eager, x, &[1.0], cond).unwrap_err().to_string();
    let classes = io.get("class_labels").unwrap().clone();
    assert_eq!(refusal(&net, &Condition::none()), "this network needs a class label");
    let both = [(Way::Label, classes.clone()), (Way::Text, classes.clone())].into_iter().collect();
    assert_eq!(refusal(&net, &both), "this network takes no text");
    let config = UNetConfig { class_embed_type: Some("identity".into()), ..net.config().clone() };
    let mut weights =
        Weights::load(&fixtures().join("edm-style/diffusion_pytorch_model.safetensors"), &Device::Cpu).unwrap();
    weights = without(&weights, "class_embedding.weight");
    let told_itself = UNet::new(&config, &weights).unwrap();
    assert_eq!(told_itself.takes().told.get(Way::Vector), Some(&Told::Values(vec![config.time_dim()])));
    assert_eq!(refusal(&told_itself, &Condition::of(Way::Label, classes)), "this network needs a vector");
}

fn without(weights: &Weights, left_out: &str) -> Weights {
    let mut rest = Weights::default();
    weights.iter().filter(|(name, _)| *name != left_out).for_each(|(name, tensor)| rest.insert(name, tensor.clone()));
    rest
}

#[test]
fn detached_networks_see_updates_and_record_nothing() {
    let config = UNetConfig {
        sample_size: Some(dmd_models::networks::unet2d::SampleSize::Square(8)),
        block_out_channels: vec![8],
        down_block_types: vec!["DownBlock2D".into()],
        up_block_types: vec!["UpBlock2D".into()],
        norm_num_groups: 4,
        ..UNetConfig::default()
    };
    let mut count = 0u64;
    let weights = UNet::init(&config, &mut |_, n| {
        (0..n)
            .map(|_| {
                count += 1;
                (count as f64 * 0.618).fract()
            })
            .collect()
    })
    .unwrap();
    let (view, vars) = weights.trainable().unwrap();
    let frozen = UNet::new(&config, &view.detached()).unwrap();
    let x = Tensor::ones((1, 3, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let before = frozen.forward(&Eager, &x, &[1.0], &Condition::none()).unwrap();
    assert!(!before.track_op());
    let bias = &vars["conv_out.bias"];
    bias.set(&(bias.as_tensor() + 1.0).unwrap()).unwrap();
    let after = frozen.forward(&Eager, &x, &[1.0], &Condition::none()).unwrap();
    assert!((max_abs(&(after - before).unwrap()) - 1.0).abs() < 1e-6);
}

/// Checkpointed blocks give the same output and, by their second forward pass, the same gradients.
#[test]
fn recomputed_blocks_have_the_gradients_of_kept_ones() {
    use dmd_models::{Precision, Training};
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/peers/unet-16.json");
    let config = UNetConfig::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
    let mut seed = 0;
    let weights = UNet::init(&config, &mut |_, n| {
        seed += 1;
        (0..n).map(|i| (((i * 37 + seed * 11) % 101) as f64 + 0.5) / 101.0).collect()
    })
    .unwrap();
    // Layers that begin at zero would hide what comes before them.
    let mut filled = Weights::default();
    for name in weights.names() {
        let w = weights.get(name).unwrap();
        filled.insert(name, (w + 0.03).unwrap());
    }
    let (view, vars) = filled.trainable().unwrap();
    let unet = UNet::new(&config, &view).unwrap();
    let x = Tensor::arange(0f32, 2.0 * 3.0 * 256.0, &Device::Cpu).unwrap();
    let x = (x.reshape((2, 3, 16, 16)).unwrap() * 0.01).unwrap().sin().unwrap();
    let run = |b: &Training| {
        let y = unet.forward(b, &x, &[0.3, 1.2], &Condition::none()).unwrap();
        let grads = b.backward(&y.sqr().unwrap().sum_all().unwrap()).unwrap();
        (y, vars.values().map(|var| grads.get(var).unwrap().clone()).collect::<Vec<_>>())
    };
    let (kept, recomputed) = (run(&Training::default()), run(&Training::new(Precision::F32, true)));
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(max(&(&recomputed.0 - &kept.0).unwrap()), 0.0);
    let largest = kept.1.iter().map(max).fold(0.0, f32::max);
    for (name, (a, b)) in vars.keys().zip(recomputed.1.iter().zip(&kept.1)) {
        let gap = max(&(a - b).unwrap());
        assert!(gap <= 1e-6 * largest, "{name}: {gap} of {largest}");
    }
}
