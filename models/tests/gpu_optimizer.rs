//! AdamW, norms, averages and random numbers on an NVIDIA GPU against the CPU's. Skipped where there is none.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Tensor, Var};
use dmd_models::ops::{self, AdamwStep, Parameter};

fn gpu() -> Option<Device> {
    let device = Device::new_cuda(0).ok();
    if device.is_none() {
        eprintln!("skipped: there is no GPU");
    }
    device
}

/// Deterministic values around zero.
fn values(shape: &[usize], seed: f32, device: &Device) -> Tensor {
    let n: usize = shape.iter().product();
    let v: Vec<f32> = (0..n).map(|i| ((i as f32 * 12.9898 + seed).sin() * 43758.547).fract() * 1.5).collect();
    Tensor::from_vec(v, shape, device).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn number(scalar: &Tensor) -> f64 {
    scalar.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

fn close(what: &str, found: &Tensor, expected: &Tensor) {
    let (found, expected) = (flat(found), flat(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    let far = |(a, b): &(&f32, &f32)| (**a - **b).abs() > 1e-5 * (1.0 + b.abs()) || a.is_nan();
    if let Some((a, b)) = found.iter().zip(&expected).find(far) {
        panic!("{what}: {a}, expected {b}");
    }
}

/// Shapes of a network's variables: smaller than a run of four, odd, of a chunk to the value, and of several chunks.
const SHAPES: [&[usize]; 7] = [&[1], &[3], &[130], &[8192], &[64, 131], &[20, 3, 3, 5], &[300, 301]];

/// A network of these shapes with all that an update needs.
struct Network {
    vars: Vec<Var>,
    moments: Vec<Var>,
    averages: Vec<Var>,
    grads: Vec<Tensor>,
    guard: Tensor,
}

impl Network {
    fn new(device: &Device) -> Self {
        let all = |seed: f32, shape: &dyn Fn(&[usize]) -> Vec<usize>| -> Vec<Tensor> {
            let tensor = |(i, s): (usize, &&[usize])| values(&shape(s), seed + i as f32, device);
            SHAPES.iter().enumerate().map(tensor).collect()
        };
        let vars = |tensors: Vec<Tensor>| tensors.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        let same = |shape: &[usize]| shape.to_vec();
        let moments = all(0.2, &|shape| vec![2, shape.iter().product()]);
        let moments = moments.into_iter().map(|t| t.abs().unwrap()).collect();
        // A row of a larger tensor, which begins where runs of four values do not.
        let grads = all(0.3, &|shape| vec![2, shape.iter().product()]);
        let grads = grads.iter().zip(SHAPES).map(|(t, shape)| t.get(1).unwrap().reshape(shape).unwrap()).collect();
        Network {
            vars: vars(all(0.1, &same)),
            moments: vars(moments),
            averages: vars(all(0.4, &same)),
            grads,
            guard: Tensor::new(2f32, device).unwrap(),
        }
    }

    /// One update and its average; returns the norm.
    fn update(&self, clip: f64) -> Tensor {
        let step =
            AdamwStep { grad_scale: 1.0, betas: [0.9, 0.99], rate: 0.01, root_scale: 1.5, keep: 0.999, eps: 1e-6 };
        let parameter = |i: usize| Parameter { var: &self.vars[i], moments: &self.moments[i], grad: &self.grads[i] };
        let parameters: Vec<Parameter> = (0..SHAPES.len()).map(parameter).collect();
        let norm = ops::adamw_all(&parameters, &self.guard, clip, step).unwrap();
        let pairs: Vec<(&Var, &Tensor)> = self.averages.iter().zip(self.vars.iter().map(|v| v.as_tensor())).collect();
        ops::average_all(&pairs, 0.9, &norm).unwrap();
        norm
    }

    fn state(&self) -> impl Iterator<Item = &Var> {
        self.vars.iter().chain(&self.moments).chain(&self.averages)
    }
}

#[test]
fn updates_of_a_network_equal_those_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for clip in [f64::INFINITY, 1.0] {
        let (on_gpu, on_cpu) = (Network::new(&device), Network::new(&Device::Cpu));
        for update in 0..3 {
            let (found, expected) = (number(&on_gpu.update(clip)), number(&on_cpu.update(clip)));
            assert!((found - expected).abs() < 1e-5 * expected, "update {update}: norm {found}, expected {expected}");
        }
        for (i, (found, expected)) in on_gpu.state().zip(on_cpu.state()).enumerate() {
            close(&format!("clip {clip}, tensor {i}"), found, expected);
        }
    }
}

#[test]
fn the_norm_is_the_same_bits_every_time() {
    let Some(device) = gpu() else { return };
    let norms: Vec<u64> = (0..4).map(|_| number(&Network::new(&device).update(1.0)).to_bits()).collect();
    assert!(norms.windows(2).all(|pair| pair[0] == pair[1]), "{norms:?}");
}

#[test]
fn a_guard_or_gradient_that_is_not_finite_leaves_everything_as_it_was() {
    let Some(device) = gpu() else { return };
    for (guard, in_gradient) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, f32::NAN), (1.0, f32::NEG_INFINITY)] {
        let mut network = Network::new(&device);
        network.guard = Tensor::new(guard, &device).unwrap();
        network.grads[0] = Tensor::new(&[in_gradient], &device).unwrap();
        let before: Vec<Vec<f32>> = network.state().map(|var| flat(var)).collect();
        let norm = number(&network.update(1.0));
        assert!(!norm.is_finite(), "{guard} {in_gradient}: {norm}");
        assert_eq!(network.state().map(|var| flat(var)).collect::<Vec<_>>(), before, "{guard} {in_gradient}");
    }
}

/// What `dmd_runtime::noise::Stream::new(seed, purpose, index)` gives: its first eight normals, and numbers 100,000 to
/// 100,002.
#[test]
fn normals_are_those_of_the_runtime() {
    let Some(device) = gpu() else { return };
    let cases = [
        (
            (7, 16, 3),
            [0.701_173, -1.861_006, -1.483_295, -0.936_233, -0.244_831, -1.930_652, -0.343_028, -0.353_895],
            [0.364_779, -0.143_300, 0.590_295],
        ),
        (
            (0x1234_5678_9abc_def0, 21, 0x5_0000_0004),
            [0.446_554, 0.565_397, 0.560_939, -0.610_007, 0.758_791, -0.558_414, -1.073_773, -0.849_986],
            [1.248_286, -0.674_589, -1.161_408],
        ),
    ];
    for ((seed, purpose, index), first, last) in cases {
        let normals = |n: usize| flat(&ops::philox_normal(seed, purpose, index, n, &device).unwrap());
        let all = normals(100_003);
        let expected = first.iter().chain(&last);
        for (found, expected) in all[..8].iter().chain(&all[100_000..]).zip(expected) {
            assert!((found - expected).abs() < 1e-6, "seed {seed}: {found}, expected {expected}");
        }
        assert_eq!(normals(7), all[..7]);
    }
    let shaped = ops::philox_normal(1, 2, 3, (2, 3, 4, 5), &device).unwrap();
    assert_eq!((shaped.dims(), shaped.dtype()), (&[2, 3, 4, 5][..], DType::F32));
}
