//! A network's pass on a tape against the same pass by `Eager`: results, and the gradients of the picture and of every
//! weight. On the CPU, where the tape's operations are composites; `gpu.rs` compares its kernels.

mod common;
use candle_core::{DType, Device, Tensor, Var};
use common::{ODD, PLAIN};
use dmd_models::{Architecture, Backend, Condition, Precision, Training, UNet, UNetConfig, Weights};
use std::collections::BTreeMap;

/// Numbers around zero that look random.
fn values(shape: &[usize], seed: f32, scale: f32) -> Tensor {
    let n: usize = shape.iter().product();
    let v: Vec<f32> = (0..n).map(|i| ((i as f32 * 12.9898 + seed).sin() * 43758.547).fract() * scale).collect();
    Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
}

/// No weight at zero, so that every gradient is one.
fn weights(config: &UNetConfig) -> Weights {
    let seed = std::cell::Cell::new(0.0);
    let drawn = |w: &Tensor| {
        seed.set(seed.get() + 1.0);
        values(w.dims(), seed.get(), 0.3) + if w.rank() == 1 { 0.5 } else { 0.0 }
    };
    UNet::init(config, &mut |_, n| vec![0.5; n]).unwrap().map(drawn).unwrap()
}

struct Found {
    y: Tensor,
    dx: Tensor,
    of_weights: BTreeMap<String, Tensor>,
}

fn run(training: &Training, config: &UNetConfig, features: bool) -> Found {
    run_on(&Device::Cpu, training, config, features)
}

fn run_on(device: &Device, training: &Training, config: &UNetConfig, features: bool) -> Found {
    let (view, vars) = weights(config).to(DType::F32, device).unwrap().trainable().unwrap();
    let net = UNet::new(config, &view).unwrap();
    let x = values(&[2, config.in_channels, 8, 8], 0.1, 1.0).to_device(device).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let cond = Condition::of_classes(config.num_class_embeds.map_or(vec![], |_| vec![1i64, 0]), device).unwrap();
    let t = [0.7, -0.4];
    let maps = match features {
        false => vec![net.forward(training, &x, &t, &cond).unwrap()],
        true => net.features(training, &x, &t, &cond).unwrap(),
    };
    let parts: Vec<Tensor> = maps.iter().map(|map| map.flatten_all().unwrap()).collect();
    let y = Tensor::cat(&parts, 0).unwrap();
    let loss = (&y * values(y.dims(), 0.3, 1.0).to_device(device).unwrap()).unwrap().sum_all().unwrap();
    let grads = training.backward(&loss).unwrap();
    let of_weights = vars.iter().filter_map(|(name, var)| Some((name.clone(), grads.get(var)?.clone()))).collect();
    let here = |t: &Tensor| t.to_device(&Device::Cpu).unwrap();
    let of_weights: BTreeMap<String, Tensor> = of_weights;
    let of_weights = of_weights.iter().map(|(name, grad)| (name.clone(), here(grad))).collect();
    Found { y: here(&y), dx: here(grads.get(&x).unwrap()), of_weights }
}

fn close(what: &str, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let gap = max(&(a - b).unwrap());
    // The bias of keys has no gradient but rounding.
    assert!(gap <= 1e-4 * max(b).max(1e-2), "{what}: {gap} of {}", max(b));
}

fn check(config: &str, features: bool) {
    let config = UNetConfig::from_json(std::path::Path::new("config.json"), config).unwrap();
    let plain = run(&Training::default(), &config, features);
    for checkpoint in [false, true] {
        let tape = run(&Training::new(Precision::F32, checkpoint).on_tape(), &config, features);
        close("result", &tape.y, &plain.y);
        close("picture", &tape.dx, &plain.dx);
        assert_eq!(tape.of_weights.keys().collect::<Vec<_>>(), plain.of_weights.keys().collect::<Vec<_>>());
        for (name, grad) in &tape.of_weights {
            close(name, grad, &plain.of_weights[name]);
        }
    }
}

#[test]
fn a_tape_gives_the_same_numbers() {
    check(PLAIN, false);
}

#[test]
fn a_tape_gives_the_same_features() {
    check(PLAIN, true);
}

/// Channels in no whole runs, a norm's scale and shift by time, resnets that resample, another activation.
#[test]
fn a_tape_takes_what_no_kernel_takes() {
    check(ODD, false);
}

/// One bias of a norm is trained, and one kernel has an adapter of rank 1 added to it, made by candle; all else is frozen,
/// the first layer too.
#[test]
fn what_is_trained_in_a_frozen_network_gets_its_gradients_everywhere() {
    let config = UNetConfig::from_json(std::path::Path::new("config.json"), PLAIN).unwrap();
    let mut view = weights(&config);
    let beta = Var::from_tensor(view.get("mid_block.resnets.1.norm2.bias").unwrap()).unwrap();
    view.insert("mid_block.resnets.1.norm2.bias", beta.as_tensor().clone());
    let kernel = "down_blocks.1.resnets.0.conv1.weight";
    let [out, rest] = [32, 16 * 9];
    let adapter = [[out, 1], [1, rest]].map(|shape| Var::from_tensor(&values(&shape, 0.7, 0.2)).unwrap());
    let product = adapter[0].matmul(&adapter[1]).unwrap().reshape((32, 16, 3, 3)).unwrap();
    view.insert(kernel, (view.get(kernel).unwrap() + product).unwrap());
    let net = UNet::new(&config, &view).unwrap();
    let (x, cond) = (values(&[2, 3, 8, 8], 0.1, 1.0), Condition::of_classes([1i64, 0], &Device::Cpu).unwrap());
    let gradients = |training: &Training| {
        let y = net.forward(training, &x, &[0.7], &cond).unwrap();
        let grads = training.backward(&(&y * values(y.dims(), 0.3, 1.0)).unwrap().sum_all().unwrap()).unwrap();
        [&beta, &adapter[0], &adapter[1]].map(|var| grads.get(var).unwrap().clone())
    };
    let expected = gradients(&Training::default());
    for training in [true, false].map(|checkpoint| Training::new(Precision::F32, checkpoint)) {
        for training in [training.clone(), training.on_tape()] {
            for (found, expected) in gradients(&training).iter().zip(&expected) {
                close(&format!("{training:?}"), found, expected);
            }
        }
    }
}

#[test]
fn no_gradient_is_kept_where_none_is_wanted() {
    let config = UNetConfig::from_json(std::path::Path::new("config.json"), PLAIN).unwrap();
    let net = UNet::new(&config, &weights(&config)).unwrap();
    let cond = Condition::of_classes([1i64, 0], &Device::Cpu).unwrap();
    let training = Training::default().on_tape();
    let x = values(&[2, 3, 8, 8], 0.1, 1.0);
    let y = net.forward(&training, &x, &[0.7], &cond).unwrap();
    assert!(!y.track_op());
    assert_eq!(training.dims(&y), [2, 3, 8, 8]);
}

/// ‖a − b‖/‖b‖.
fn error(a: &Tensor, b: &Tensor) -> f32 {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    norm(&(a - b).unwrap()) / norm(b).max(1e-6)
}

/// The kernels of a GPU, in both precisions and with checkpoints, against `Eager` on the CPU. Skipped without a GPU.
#[test]
fn a_gpu_gives_the_cpus_numbers() {
    let gpu = candle_core::utils::cuda_is_available().then(|| Device::new_cuda(0).ok()).flatten();
    let Some(gpu) = gpu else { return println!("skipped: no GPU") };
    for (config, features) in [(PLAIN, false), (PLAIN, true), (ODD, false)] {
        let config = UNetConfig::from_json(std::path::Path::new("config.json"), config).unwrap();
        let plain = run(&Training::default(), &config, features);
        let all = |found: &Found| {
            let flat = |t: &Tensor| t.flatten_all().unwrap();
            Tensor::cat(&found.of_weights.values().map(flat).collect::<Vec<_>>(), 0).unwrap()
        };
        // TF32 has 10 bits of fraction, bf16 7, and a network of thirty layers adds up what they lose.
        for (precision, tolerance) in [(Precision::F32, 1e-2), (Precision::Bf16, 6e-2)] {
            for checkpoint in [false, true] {
                let found = run_on(&gpu, &Training::new(precision, checkpoint), &config, features);
                let errors =
                    [error(&found.y, &plain.y), error(&found.dx, &plain.dx), error(&all(&found), &all(&plain))];
                println!("{precision:?}, checkpoint {checkpoint}: {errors:?}");
                assert!(errors.iter().all(|error| *error <= tolerance), "{precision:?}: {errors:?}");
            }
        }
    }
}
