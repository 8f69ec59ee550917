//! The distance by an ONNX network's features (`loss.regression.distance = { onnx = "FILE" }`): its numbers against
//! PyTorch's, its gradient against PyTorch's and differences, and what is refused.
//!
//! `fixtures/features.onnx`, two maps of a small network as VGG's are made (convolutions, ReLU, a maximum in between),
//! and the numbers below come from this program (torch 2.15.0, onnx 1.23.2, onnxruntime 1.32.0), run with
//! `python features.py tests/fixtures/features.onnx`:
//!
//! ```python
//! import sys, numpy as np, onnx, torch, torch.nn.functional as F
//! from onnx import TensorProto as T, helper as h, numpy_helper as nh
//!
//! rng = np.random.default_rng(0)
//! w1, b1 = rng.normal(size=(4, 3, 3, 3)) * 0.3, rng.normal(size=4) * 0.1
//! w2, b2 = rng.normal(size=(6, 4, 3, 3)) * 0.3, rng.normal(size=6) * 0.1
//! weights = {k: np.float32(v) for k, v in dict(w1=w1, b1=b1, w2=w2, b2=b2).items()}
//! conv = lambda x, i, out, s: h.make_node("Conv", [x, f"w{i}", f"b{i}"], [out], kernel_shape=[3, 3], pads=[1] * 4, strides=[s, s])
//! nodes = [conv("picture", 1, "c1", 1), h.make_node("Relu", ["c1"], ["fine"]),
//!          h.make_node("MaxPool", ["fine"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
//!          conv("pooled", 2, "c2", 1), h.make_node("Relu", ["c2"], ["coarse"])]
//! shape = lambda name, c, n: h.make_tensor_value_info(name, T.FLOAT, ["batch", c, n, n])
//! graph = h.make_graph(nodes, "features", [shape("picture", 3, 8)], [shape("fine", 4, 8), shape("coarse", 6, 4)],
//!                      [nh.from_array(v, k) for k, v in weights.items()])
//! model = h.make_model(graph, ir_version=8, opset_imports=[h.make_opsetid("", 17)])
//! onnx.checker.check_model(model, full_check=True)
//! onnx.save(model, sys.argv[1])
//!
//! t = {k: torch.tensor(v) for k, v in weights.items()}
//! def maps(x):
//!     fine = F.relu(F.conv2d(x, t["w1"], t["b1"], padding=1))
//!     return [fine, F.relu(F.conv2d(F.max_pool2d(fine, 2), t["w2"], t["b2"], padding=1))]
//! unit = lambda m: m / (m.square().sum(1, keepdim=True) + 1e-10).sqrt()
//! i = torch.arange(2 * 3 * 8 * 8, dtype=torch.float64)
//! x = torch.sin(0.37 * i).float().reshape(2, 3, 8, 8).requires_grad_()
//! y = torch.cos(0.11 * i).float().reshape(2, 3, 8, 8)
//! distance = sum((unit(a) - unit(b)).square().sum(1).mean() for a, b in zip(maps(x), maps(y))) / 2
//! distance.backward()
//! print(distance.item(), x.grad.flatten()[[0, 100, 383]].tolist(), x.grad.abs().sum().item())
//! import onnxruntime as ort
//! s = ort.InferenceSession(sys.argv[1])
//! o = [torch.tensor(v) for v in s.run(None, {"picture": x.detach().numpy()})]
//! p = [torch.tensor(v) for v in s.run(None, {"picture": y.numpy()})]
//! print(sum((unit(a) - unit(b)).square().sum(1).mean() for a, b in zip(o, p)).item()/2)
//! ```

use candle_core::{Device, Tensor, Var};
use dmd::config::Distance;
use dmd::features::FeatureNetwork;
use dmd::regression::Comparison;
use dmd_models::{Condition, ModelFolder, Training};
use std::fs;
use std::path::{Path, PathBuf};

const FEATURES: &str = "tests/fixtures/features.onnx";

/// `wave(step · i)` for the i-th value of two pictures, 3 × 8 × 8.
fn pictures(step: f64, wave: fn(f64) -> f64) -> Vec<f32> {
    (0..2 * 3 * 8 * 8).map(|i| wave(step * f64::from(i)) as f32).collect()
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, (2, 3, 8, 8), &Device::Cpu).unwrap()
}

fn comparison(path: &Path) -> anyhow::Result<Comparison> {
    let teacher = ModelFolder::load(Path::new("models/tests/fixtures/edm-tiny"), &Device::Cpu)?;
    Comparison::new(
        &Distance::Onnx(path.display().to_string()),
        &teacher.denoiser(&Device::Cpu)?,
        &Training::default(),
        1,
        || Ok(None),
    )
}

#[test]
fn the_distance_and_its_gradient_are_pytorchs() {
    let comparison = comparison(Path::new(FEATURES)).unwrap();
    let (values, target) = (pictures(0.37, f64::sin), tensor(&pictures(0.11, f64::cos)));
    let distance = |values: &[f32]| -> f64 {
        let distance = comparison.distance(&tensor(values), &target, &Condition::none()).unwrap();
        f64::from(distance.to_scalar::<f32>().unwrap())
    };
    // onnxruntime's maps give the same number.
    assert!((distance(&values) - 1.049_811_6).abs() < 2e-6, "{}", distance(&values));

    let x = Var::from_tensor(&tensor(&values)).unwrap();
    let gradients = comparison.distance(x.as_tensor(), &target, &Condition::none()).unwrap().backward().unwrap();
    let gradient = gradients.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (at, expected) in [(0, 0.004_060_409), (100, 0.016_345_533), (383, 0.012_800_54)] {
        assert!((gradient[at] - expected).abs() < 1e-6, "{at}: {}, expected {expected}", gradient[at]);
        // A step of 1e-2 crosses no corner of ReLU here; f32 leaves some 1e-5 of noise in the quotient.
        let moved = |by: f32| {
            let mut values = values.clone();
            values[at] += by;
            distance(&values)
        };
        let quotient = (moved(1e-2) - moved(-1e-2)) / 2e-2;
        assert!((quotient - f64::from(expected)).abs() < 1e-4, "{at}: {quotient}, expected {expected}");
    }
    let sum: f64 = gradient.iter().map(|g| f64::from(g.abs())).sum();
    assert!((sum - 3.439_074_5).abs() < 1e-4, "{sum}");
}

#[test]
fn equal_pictures_are_not_apart_and_no_gradient_reaches_the_target() {
    let network = FeatureNetwork::load(Path::new(FEATURES)).unwrap();
    let x = Var::from_tensor(&tensor(&pictures(0.37, f64::sin))).unwrap();
    let maps = network.features(x.as_tensor()).unwrap();
    assert_eq!(maps.iter().map(|map| map.dims().to_vec()).collect::<Vec<_>>(), [[2, 4, 8, 8], [2, 6, 4, 4]]);
    let comparison = Comparison::Onnx(Box::new(network), None);
    let same = comparison.distance(x.as_tensor(), x.as_tensor(), &Condition::none()).unwrap();
    assert_eq!(same.to_scalar::<f32>().unwrap(), 0.0);
    let target = Var::from_tensor(&tensor(&pictures(0.11, f64::cos))).unwrap();
    let gradients =
        comparison.distance(x.as_tensor(), target.as_tensor(), &Condition::none()).unwrap().backward().unwrap();
    assert!(gradients.get(&x).is_some() && gradients.get(&target).is_none());
}

/// The file with some bytes replaced by as many others, and what is said of it before a run begins.
fn refusal(name: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join(name);
    fs::write(&path, change(fs::read(FEATURES).unwrap())).unwrap();
    let error = format!("{:#}", comparison(&path).err().expect("an error was expected"));
    assert!(error.contains(name) && error.lines().count() == 1, "{error}");
    error
}

fn replaced(bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

#[test]
fn what_cannot_be_run_is_refused_before_a_run_begins() {
    let hardmax = refusal("a.onnx", |bytes| replaced(bytes, b"MaxPool", b"Hardmax"));
    assert!(hardmax.contains("candle has no operator Hardmax"), "{hardmax}");
    // The teacher's pictures have three channels of 8 × 8.
    let grey = refusal("b.onnx", |bytes| {
        replaced(bytes, b"\x08\x04\x08\x03\x08\x03\x08\x03", b"\x08\x0c\x08\x01\x08\x03\x08\x03")
    });
    assert!(grey.contains("pictures [1, 3, 8, 8]"), "{grey}");
    assert!(refusal("c.onnx", |_| b"\x89PNG\r\n".to_vec()).contains("is no ONNX file"));
    assert!(refusal("d.onnx", |_| Vec::new()).contains("holds no graph"));
    let cut = refusal("e.onnx", |bytes| bytes[..bytes.len() / 2].to_vec());
    assert!(cut.contains("is no ONNX file"), "{cut}");
    let missing = comparison(Path::new("nowhere.onnx")).err().unwrap().to_string();
    assert!(missing.contains("nowhere.onnx: no such file"), "{missing}");
}
