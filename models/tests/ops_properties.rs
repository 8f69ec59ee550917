//! Fused operations over random shapes: values against the composite in f64, gradients against finite differences of
//! the composite in f64. Odd sizes, one channel, groups as many as channels, batches of one, strides, and inputs that
//! are not contiguous all occur.

use candle_core::{DType, Device, Result, Tensor, Var};
use dmd_models::ops;
use proptest::prelude::*;

/// Numbers in (-1, 1) that follow from the seed.
fn values(shape: &[usize], seed: u64) -> Tensor {
    let n: usize = shape.iter().product();
    let value = |i: usize| ((i as f64 + 1.0) * 78.233 + seed as f64 * 12.9898).sin() * 43758.5453;
    let v: Vec<f64> = (0..n).map(|i| 2.0 * (value(i) - value(i).floor()) - 1.0).collect();
    Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
}

/// Like [`values`], as a view whose last two axes are stored the other way round.
fn turned(shape: &[usize; 4], seed: u64) -> Tensor {
    let [b, c, h, w] = *shape;
    values(&[b, c, w, h], seed).transpose(2, 3).unwrap()
}

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Holds the fused operation in f32 against the composite in f64: y, and the gradient of Σ y·weight at a few places of
/// every input, by central differences.
fn check(inputs: &[Tensor], fused: Op, composite: Op) -> std::result::Result<(), TestCaseError> {
    let f32s: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap()).collect();
    // The layout of the inputs, which a variable would lose.
    let as_given: Vec<Tensor> = f32s.iter().zip(inputs).map(|(var, t)| like(var, t)).collect();
    let y = fused(&as_given).unwrap();
    let exact = composite(inputs).unwrap();
    prop_assert_eq!(y.dims(), exact.dims());
    let scale = largest(&exact).max(1.0);
    let gap = largest(&(y.to_dtype(DType::F64).unwrap() - &exact).unwrap());
    prop_assert!(gap <= 1e-5 * scale, "value off by {gap} of {scale}");

    let weight = values(exact.dims(), 99);
    let loss = |inputs: &[Tensor]| -> f64 {
        (composite(inputs).unwrap() * &weight).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    let grads = (&y * weight.to_dtype(DType::F32).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
    for (i, input) in inputs.iter().enumerate() {
        let grad: Vec<f32> = grads.get(&f32s[i]).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let flat: Vec<f64> = input.flatten_all().unwrap().to_vec1().unwrap();
        for place in [0, flat.len() / 2, flat.len() - 1] {
            let at = |delta: f64| {
                let mut moved = flat.clone();
                moved[place] += delta;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(moved, input.dims(), &Device::Cpu).unwrap();
                loss(&inputs)
            };
            let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let found = f64::from(grad[place]);
            let tolerance = 2e-5 * (1.0 + slope.abs() + (flat.len() as f64).sqrt());
            prop_assert!((found - slope).abs() <= tolerance, "input {i} at {place}: {found}, expected {slope}");
        }
    }
    Ok(())
}

const STEP: f64 = 1e-5;

/// `var` through the view that `t` is.
fn like(var: &Var, t: &Tensor) -> Tensor {
    match t.is_contiguous() {
        true => var.as_tensor().clone(),
        false => var.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap(),
    }
}

fn largest(t: &Tensor) -> f64 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn conv2d(
        b in 1usize..6, c in 1usize..10, h in 1usize..19, w in 1usize..19, o in 1usize..15,
        kernel in 1usize..6, stride in 1usize..4, padding in 0usize..4, seed in 0u64..1000, rows in prop::bool::ANY,
    ) {
        prop_assume!(h + 2 * padding >= kernel && w + 2 * padding >= kernel);
        let bias = if rows { values(&[b, o], seed + 3) } else { values(&[o], seed + 3) };
        let inputs = [turned(&[b, c, h, w], seed), values(&[o, c, kernel, kernel], seed + 2), bias];
        check(
            &inputs,
            &|t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
            &|t| ops::conv2d_composite(&t[0].contiguous()?, &t[1], Some(&t[2]), stride, padding),
        )?;
    }

    #[test]
    fn group_norm(
        b in 1usize..4, per_group in 1usize..5, groups in 1usize..6, h in 1usize..12, w in 1usize..12,
        silu in prop::bool::ANY, seed in 0u64..1000,
    ) {
        let c = per_group * groups;
        // A group of very few values has a variance near zero, where the slope is steep and f32 gets it wrong.
        prop_assume!(per_group * h * w >= 8);
        let inputs = [turned(&[b, c, h, w], seed), values(&[c], seed + 1), values(&[c], seed + 2)];
        check(
            &inputs,
            &|t| ops::group_norm(&t[0], &t[1], &t[2], groups, 1e-3, silu),
            &|t| ops::group_norm_composite(&t[0], &t[1], &t[2], groups, 1e-3, silu),
        )?;
    }

    #[test]
    fn attention(
        b in 1usize..4, width in 1usize..9, heads in 1usize..4, h in 1usize..7, w in 1usize..7, seed in 0u64..1000,
    ) {
        let shape = [b, width * heads, h, w];
        let inputs = [turned(&shape, seed), values(&shape, seed + 1), turned(&shape, seed + 2)];
        check(&inputs, &|t| ops::attention(&t[0], &t[1], &t[2], heads), &|t| {
            ops::attention_composite(&t[0], &t[1], &t[2], heads)
        })?;
    }

    #[test]
    fn movements(b in 1usize..4, c in 1usize..5, d in 1usize..5, h in 1usize..9, w in 1usize..9, seed in 0u64..1000) {
        let two = [turned(&[b, c, h, w], seed), values(&[b, d, h, w], seed + 1)];
        check(&two, &|t| ops::concat(&t[0], &t[1]), &|t| Tensor::cat(&[&t[0], &t[1]], 1))?;
        let one = [turned(&[b, c, h, w], seed)];
        check(&one, &|t| ops::upsample_2x(&t[0]), &|t| ops::upsample_2x(&t[0]))?;
        let even = [turned(&[b, c, 2 * h, 2 * w], seed)];
        check(&even, &|t| ops::avg_pool_2x(&t[0]), &|t| t[0].contiguous()?.avg_pool2d(2))?;
    }
}
