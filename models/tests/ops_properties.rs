//! Fused operations over random shapes: values against the composite in f64, gradients against finite differences of
//! the composite in f64. Odd sizes, one channel, groups as many as channels, batches of one, strides, and inputs that
//! are not contiguous all occur. AdamW is held against the published update in f64.

use candle_core::{DType, Device, Result, Tensor, Var};
use dmd_models::Activation;
use dmd_models::ops::{self, AdamwStep, Mask, Pairs, Parameter, Patches, Rotary};
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

type Op<'a> = &'a (dyn Fn(&[Tensor]) -> Result<Tensor> + Sync);

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

/// One variable of a network with what its updates change, in f64.
struct Published {
    theta: Tensor,
    m: Tensor,
    v: Tensor,
    average: Tensor,
}

/// What an update takes beside gradients.
struct Settings {
    betas: [f64; 2],
    rate: f64,
    weight_decay: f64,
    eps: f64,
    clip: f64,
    decay: f64,
}

impl Settings {
    /// The scalars of update `t`, from 1.
    fn step(&self, t: i32) -> AdamwStep {
        let corrections = self.betas.map(|beta| 1.0 - beta.powi(t));
        AdamwStep {
            grad_scale: 1.0,
            betas: self.betas,
            rate: self.rate / corrections[0],
            root_scale: corrections[1].sqrt().recip(),
            keep: 1.0 - self.rate * self.weight_decay,
            eps: self.eps,
        }
    }

    /// Clipping by the norm of all gradients (Pascanu et al. 2013, algorithm 1), AdamW (Loshchilov and Hutter 2019,
    /// algorithm 2, the decay times the rate), and the moving average, line by line. Returns the norm.
    fn publish(&self, variables: &mut [Published], grads: &[Tensor], t: i32) -> Result<f64> {
        let [b1, b2] = self.betas;
        let squares = |g: &Tensor| g.sqr()?.sum_all()?.to_scalar::<f64>();
        let norm = grads.iter().map(squares).sum::<Result<f64>>()?.sqrt();
        for (p, g) in variables.iter_mut().zip(grads) {
            let g = if norm >= self.clip { (g * (self.clip / norm))? } else { g.clone() };
            p.m = ((&p.m * b1)? + (&g * (1.0 - b1))?)?;
            p.v = ((&p.v * b2)? + (g.sqr()? * (1.0 - b2))?)?;
            let (m_hat, v_hat) = ((&p.m / (1.0 - b1.powi(t)))?, (&p.v / (1.0 - b2.powi(t)))?);
            let change = (m_hat.div(&(v_hat.sqrt()? + self.eps)?)? * self.rate)?;
            p.theta = ((&p.theta - change)? - (&p.theta * (self.rate * self.weight_decay))?)?;
            p.average = ((&p.average * self.decay)? + (&p.theta * (1.0 - self.decay))?)?;
        }
        Ok(norm)
    }
}

/// Three updates of variables of these shapes with gradients of this scale.
fn check_adamw(
    shapes: &[[usize; 4]],
    scale: f64,
    settings: &Settings,
    seed: u64,
) -> std::result::Result<(), TestCaseError> {
    let f32s = |t: &Tensor| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap();
    let zeros = |shape: &[usize; 4]| Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
    let mut published: Vec<Published> = std::iter::zip(shapes, seed..)
        .map(|(shape, seed)| {
            let [theta, average] = [0, 10].map(|more| values(shape, seed + more));
            Published { theta, average, m: zeros(shape), v: zeros(shape) }
        })
        .collect();
    let vars: Vec<Var> = published.iter().map(|p| f32s(&p.theta)).collect();
    let averages: Vec<Var> = published.iter().map(|p| f32s(&p.average)).collect();
    let moments: Vec<Var> =
        vars.iter().map(|var| Var::zeros((2, var.elem_count()), DType::F32, &Device::Cpu).unwrap()).collect();
    for t in 1..=3 {
        // Views, as a backward pass may give them.
        let grads: Vec<Tensor> = std::iter::zip(shapes, seed..)
            .map(|(shape, seed)| (turned(shape, seed + 100 * t as u64) * scale).unwrap())
            .map(|grad| grad.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap())
            .collect();
        let norm = settings.publish(&mut published, &grads, t).unwrap();
        let grads: Vec<Tensor> = grads.iter().map(|grad| grad.to_dtype(DType::F32).unwrap()).collect();
        let parameters: Vec<Parameter> =
            (0..shapes.len()).map(|i| Parameter { var: &vars[i], moments: &moments[i], grad: &grads[i] }).collect();
        let guard = Tensor::new(1f32, &Device::Cpu).unwrap();
        let found = ops::adamw_all(&parameters, &guard, settings.clip, settings.step(t)).unwrap();
        let pairs: Vec<(&Var, &Tensor)> = averages.iter().zip(vars.iter().map(Var::as_tensor)).collect();
        ops::average_all(&pairs, settings.decay, &found).unwrap();
        let found: f64 = found.to_dtype(DType::F64).unwrap().to_scalar().unwrap();
        prop_assert!((found - norm).abs() <= 1e-6 * norm, "norm {found}, expected {norm}");
    }
    for (i, p) in published.iter().enumerate() {
        let moment = |row: usize| moments[i].get(row).unwrap().reshape(&shapes[i]).unwrap();
        let found = [vars[i].as_tensor().clone(), averages[i].as_tensor().clone(), moment(0), moment(1)];
        for (found, exact) in found.iter().zip([&p.theta, &p.average, &p.m, &p.v]) {
            let (size, gap) = (largest(exact), largest(&(found.to_dtype(DType::F64).unwrap() - exact).unwrap()));
            prop_assert!(gap <= 3e-6 * size, "variable {i}: off by {gap} of {size}");
        }
    }
    Ok(())
}

#[test]
fn an_update_of_nothing_has_the_norm_of_nothing() {
    let settings = Settings { betas: [0.9, 0.99], rate: 0.1, weight_decay: 0.0, eps: 1e-8, clip: 1.0, decay: 0.5 };
    check_adamw(&[], 1.0, &settings, 0).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn conv2d(
        b in 1usize..6, c in 1usize..10, h in 1usize..19, w in 1usize..19, o in 1usize..25,
        kernel in 1usize..6, stride in 1usize..4, padding in 0usize..4, seed in 0u64..1000, rows in prop::bool::ANY,
        threads in 1usize..6,
    ) {
        prop_assume!(h + 2 * padding >= kernel && w + 2 * padding >= kernel);
        let bias = if rows { values(&[b, o], seed + 3) } else { values(&[o], seed + 3) };
        let inputs = [turned(&[b, c, h, w], seed), values(&[o, c, kernel, kernel], seed + 2), bias];
        // How the work is cut depends on the threads.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            check(
                &inputs,
                &|t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
                &|t| ops::conv2d_composite(&t[0].contiguous()?, &t[1], Some(&t[2]), stride, padding),
            )
        })?;
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
        check(&inputs, &|t| ops::attention(&t[0], &t[1], &t[2], heads, Mask::None), &|t| {
            ops::attention_composite(&t[0], &t[1], &t[2], heads, Mask::None)
        })?;
    }

    /// Keys of their own number, causal and padded masks.
    #[test]
    fn attention_to_other_tokens(
        b in 1usize..4, width in 1usize..9, heads in 1usize..4, h in 1usize..6, w in 1usize..6, keys in 1usize..20,
        mask in 0usize..3, seed in 0u64..1000,
    ) {
        let keys = if mask == 1 { h * w } else { keys };
        let (queries, tokens) = ([b, width * heads, h, w], [b, width * heads, 1, keys]);
        let inputs = [turned(&queries, seed), values(&tokens, seed + 1), turned(&tokens, seed + 2)];
        let seen: Vec<f32> = (0..b * keys).map(|i| !(i * 7 + seed as usize).is_multiple_of(3) as u8 as f32).collect();
        let seen = Tensor::from_vec(seen, (b, keys), &Device::Cpu).unwrap();
        let mask = [Mask::None, Mask::Causal, Mask::Padding(&seen)][mask];
        check(&inputs, &|t| ops::attention(&t[0], &t[1], &t[2], heads, mask), &|t| {
            ops::attention_composite(&t[0], &t[1], &t[2], heads, mask)
        })?;
    }

    #[test]
    fn norms_over_channels(
        b in 1usize..4, width in 4usize..40, runs in 1usize..4, h in 1usize..12, w in 1usize..12, seed in 0u64..1000,
    ) {
        let map = turned(&[b, width * runs, h, w], seed);
        let inputs = [map.clone(), values(&[width], seed + 1)];
        check(&inputs, &|t| ops::rms_norm(&t[0], &t[1], 1e-2), &|t| ops::rms_norm_composite(&t[0], &t[1], 1e-2))?;
        let inputs = [map.clone(), values(&[width * runs], seed + 1), values(&[width * runs], seed + 2)];
        check(&inputs, &|t| ops::layer_norm(&t[0], Some([&t[1], &t[2]]), 1e-2), &|t| {
            ops::layer_norm_composite(&t[0], Some([&t[1], &t[2]]), 1e-2)
        })?;
        check(&[map], &|t| ops::layer_norm(&t[0], None, 1e-2), &|t| ops::layer_norm_composite(&t[0], None, 1e-2))?;
    }

    #[test]
    fn activations_and_gates(
        b in 1usize..4, c in 1usize..5, h in 1usize..40, w in 1usize..9, act in 0usize..6, scale in 0.1f64..8.0,
        seed in 0u64..1000,
    ) {
        let act = [
            Activation::Silu, Activation::Mish, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu,
            Activation::Tanh,
        ][act];
        let map = (turned(&[b, 2 * c, h, w], seed) * scale).unwrap();
        check(std::slice::from_ref(&map), &|t| ops::activation(&t[0], act), &|t| ops::activation_composite(&t[0], act))?;
        check(&[map], &|t| ops::gated(&t[0], act), &|t| ops::gated_composite(&t[0], act))?;
    }

    #[test]
    fn rotary(
        b in 1usize..4, pairs in 1usize..7, heads in 1usize..4, h in 1usize..6, w in 1usize..6,
        neighbours in prop::bool::ANY, seed in 0u64..1000,
    ) {
        let angles = (values(&[pairs, h * w], seed + 1) * 3.0).unwrap();
        let pairs_are = if neighbours { Pairs::Neighbours } else { Pairs::Halves };
        let wide = Rotary { cos: angles.cos().unwrap(), sin: angles.sin().unwrap(), pairs: pairs_are };
        let [cos, sin] = [&wide.cos, &wide.sin].map(|angle| angle.to_dtype(DType::F32).unwrap());
        let narrow = Rotary { cos, sin, pairs: pairs_are };
        let inputs = [turned(&[b, 2 * pairs * heads, h, w], seed)];
        check(&inputs, &|t| ops::rotary(&t[0], &narrow), &|t| ops::rotary_composite(&t[0], &wide))?;
    }

    #[test]
    fn patches(
        b in 1usize..4, c in 1usize..5, side in 1usize..4, h in 1usize..6, w in 1usize..6, seed in 0u64..1000,
    ) {
        for patches in [Patches::ChannelFirst, Patches::ChannelLast] {
            let map = turned(&[b, c, side * h, side * w], seed);
            let there = |t: &[Tensor]| ops::unshuffle(&t[0], side, patches);
            check(std::slice::from_ref(&map), &there, &there)?;
            let back = ops::shuffle(&there(std::slice::from_ref(&map)).unwrap(), side, patches).unwrap();
            prop_assert_eq!(largest(&(back - &map).unwrap()), 0.0);
        }
    }

    #[test]
    fn movements(b in 1usize..4, c in 1usize..5, d in 1usize..5, h in 1usize..9, w in 1usize..9, seed in 0u64..1000) {
        let two = [turned(&[b, c, h, w], seed), values(&[b, d, h, w], seed + 1)];
        check(&two, &|t| ops::concat(&t[0], &t[1], 1), &|t| Tensor::cat(&[&t[0], &t[1]], 1))?;
        let beside = [turned(&[b, c, h, w], seed), values(&[b, c, h, d], seed + 1)];
        check(&beside, &|t| ops::concat(&t[0], &t[1], 3), &|t| Tensor::cat(&[&t[0], &t[1]], 3))?;
        let one = [turned(&[b, c, h, w], seed)];
        check(&one, &|t| ops::upsample_2x(&t[0]), &|t| ops::upsample_2x(&t[0]))?;
        let even = [turned(&[b, c, 2 * h, 2 * w], seed)];
        check(&even, &|t| ops::avg_pool_2x(&t[0]), &|t| t[0].contiguous()?.avg_pool2d(2))?;
    }

    #[test]
    fn adamw(
        shapes in prop::collection::vec([1usize..20, 1usize..4, 1usize..4, 1usize..9], 0..6),
        log_scale in -3f64..3.0, clip in prop_oneof![Just(1e-2), Just(1.0), Just(30.0), Just(f64::INFINITY)],
        betas in [0f64..0.99, 0.5f64..0.9999], rate in 1e-5f64..0.3, weight_decay in 0f64..0.5, decay in 0f64..1.0,
        seed in 0u64..1000,
    ) {
        let settings = Settings { betas, rate, weight_decay, eps: 1e-8, clip, decay };
        check_adamw(&shapes, 10f64.powf(log_scale), &settings, seed)?;
    }
}
