//! Fused operations against their composites, values and gradients, over a range of shapes.

use candle_core::{DType, Device, Result, Tensor, Var};
use dmd_models::Activation;
use dmd_models::ops::{self, AdamwStep, Mask, Parameter};

/// Deterministic values around zero.
fn values(shape: &[usize], seed: f32) -> Var {
    let n: usize = shape.iter().product();
    let v: Vec<f32> = (0..n).map(|i| ((i as f32 * 12.9898 + seed).sin() * 43758.547).fract() * 1.5).collect();
    Var::from_tensor(&Tensor::from_vec(v, shape, &Device::Cpu).unwrap()).unwrap()
}

/// Compares two spellings of one operation: outputs, and the gradients of Σ y·w for a fixed w.
fn check(
    name: &str,
    inputs: &[Var],
    fused: impl Fn(&[Tensor]) -> Result<Tensor>,
    plain: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let (a, b) = (fused(&tensors).unwrap(), plain(&tensors).unwrap());
    close(&format!("{name}: value"), &a, &b);
    let weight = values(a.dims(), 0.7).as_tensor().detach();
    let grads = |y: Tensor| (y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
    let (ga, gb) = (grads(a), grads(b));
    for (i, var) in inputs.iter().enumerate() {
        close(&format!("{name}: gradient of input {i}"), ga.get(var).unwrap(), gb.get(var).unwrap());
    }
}

fn close(what: &str, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let max = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let gap = max(&(a - b).unwrap());
    assert!(gap <= 2e-5 * max(b).max(1.0), "{what}: {gap} of {}", max(b));
}

#[test]
fn conv2d_equals_its_composite() {
    // batch, channels, height, width, out, kernel, stride, padding
    let cases = [
        [1, 1, 1, 1, 1, 1, 1, 0],
        [2, 3, 8, 8, 5, 3, 1, 1],
        [5, 4, 7, 9, 6, 3, 1, 1],
        [3, 4, 8, 6, 6, 3, 2, 1],
        [2, 4, 9, 7, 3, 3, 2, 0],
        [4, 8, 16, 16, 16, 1, 1, 0],
        [7, 8, 4, 4, 8, 3, 1, 1],
        [1, 2, 5, 5, 3, 5, 1, 2],
        [2, 2, 3, 3, 2, 3, 1, 2],
        [33, 3, 4, 4, 4, 1, 1, 0],
        // Kernels that reach further than the picture.
        [2, 3, 1, 1, 2, 3, 1, 1],
        [1, 2, 1, 7, 3, 3, 1, 1],
        [2, 2, 2, 3, 2, 5, 1, 2],
        [1, 2, 6, 1, 2, 7, 1, 3],
    ];
    for [b, c, h, w, o, k, stride, padding] in cases {
        let inputs = [values(&[b, c, h, w], 0.1), values(&[o, c, k, k], 0.2), values(&[o], 0.3)];
        check(
            &format!("conv2d {:?}", [b, c, h, w, o, k, stride, padding]),
            &inputs,
            |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
            |t| ops::conv2d_composite(&t[0], &t[1], Some(&t[2]), stride, padding),
        );
    }
}

#[test]
fn conv2d_takes_a_bias_per_sample() {
    let inputs = [values(&[3, 4, 5, 6], 0.1), values(&[7, 4, 3, 3], 0.2), values(&[3, 7], 0.3)];
    check(
        "bias per sample",
        &inputs,
        |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, 1),
        |t| ops::conv2d_composite(&t[0], &t[1], Some(&t[2]), 1, 1),
    );
}

#[test]
fn conv2d_takes_views_that_are_not_contiguous() {
    let inputs = [values(&[4, 6, 8, 2], 0.1), values(&[3, 2, 5, 3, 3], 0.2)];
    let run = |f: fn(&Tensor, &Tensor) -> Result<Tensor>| {
        move |t: &[Tensor]| {
            f(&t[0].transpose(1, 3)?.narrow(1, 0, 2)?, &t[1].get_on_dim(0, 1)?.transpose(0, 1)?.contiguous()?)
        }
    };
    check(
        "views",
        &inputs,
        run(|x, w| ops::conv2d(x, &w.transpose(0, 1)?.transpose(0, 1)?.narrow(1, 0, 2)?, None, 1, 1)),
        run(|x, w| ops::conv2d_composite(&x.contiguous()?, &w.narrow(1, 0, 2)?.contiguous()?, None, 1, 1)),
    );
}

#[test]
fn group_norm_equals_its_composite() {
    for [b, c, h, w, groups] in [[1, 4, 1, 2, 2], [2, 8, 5, 7, 4], [3, 6, 4, 4, 6], [2, 6, 3, 3, 1], [4, 32, 16, 16, 8]]
    {
        for silu in [false, true] {
            let inputs = [values(&[b, c, h, w], 0.4), values(&[c], 0.5), values(&[c], 0.6)];
            check(
                &format!("group_norm {:?} {silu}", [b, c, h, w, groups]),
                &inputs,
                |t| ops::group_norm(&t[0], &t[1], &t[2], groups, 1e-3, silu),
                |t| ops::group_norm_composite(&t[0], &t[1], &t[2], groups, 1e-3, silu),
            );
        }
    }
}

#[test]
fn attention_equals_its_composite() {
    for [b, c, h, w, heads] in [[1, 1, 1, 1, 1], [2, 8, 3, 5, 2], [1, 16, 8, 8, 4], [3, 6, 4, 4, 1]] {
        let inputs = [values(&[b, c, h, w], 0.1), values(&[b, c, h, w], 0.2), values(&[b, c, h, w], 0.3)];
        check(
            &format!("attention {:?}", [b, c, h, w, heads]),
            &inputs,
            |t| ops::attention(&t[0], &t[1], &t[2], heads, Mask::None),
            |t| ops::attention_composite(&t[0], &t[1], &t[2], heads, Mask::None),
        );
    }
}

/// So many scores that no block holds them all: several blocks of queries, for few heads and for many.
#[test]
fn attention_in_blocks_equals_its_composite() {
    let seen: Vec<f32> = (0..1800).map(|i| if i % 900 < 700 { 1.0 } else { 0.0 }).collect();
    let seen = Tensor::from_vec(seen, (2, 900), &Device::Cpu).unwrap();
    for (mask, keys) in [(Mask::None, 900), (Mask::Padding(&seen), 900), (Mask::Causal, 1000)] {
        for threads in [1, 3] {
            let inputs = [values(&[2, 6, 40, 25], 0.1), values(&[2, 6, 1, keys], 0.2), values(&[2, 6, 1, keys], 0.3)];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                check(
                    &format!("{mask:?} on {threads} threads"),
                    &inputs,
                    |t| ops::attention(&t[0], &t[1], &t[2], 1, mask),
                    |t| ops::attention_composite(&t[0], &t[1], &t[2], 1, mask),
                );
            });
        }
    }
}

#[test]
fn what_attention_cannot_take_is_refused_by_name() {
    let of = |dims: [usize; 4]| Tensor::zeros(&dims, DType::F32, &Device::Cpu).unwrap();
    let (q, short) = (of([1, 8, 2, 2]), of([1, 8, 1, 3]));
    let refused = |k: &Tensor, heads, mask: Mask<&Tensor>, part: &str| {
        let error = ops::attention(&q, k, k, heads, mask).unwrap_err().to_string();
        assert!(error.contains(part), "expected {part:?} in {error}");
    };
    refused(&of([1, 4, 1, 3]), 4, Mask::None, "2 heads of keys for 4 of queries: grouped-query attention");
    refused(&of([2, 8, 1, 3]), 4, Mask::None, "do not fit together");
    refused(&short, 3, Mask::None, "with 3 heads");
    refused(&short, 2, Mask::Causal, "a causal mask of 4 queries and 3 keys");
    let seen = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
    refused(&short, 2, Mask::Padding(&seen), "a mask of shape [2, 3]");
}

#[test]
fn small_operations_equal_their_composites() {
    let x = [values(&[2, 3, 4, 6], 0.3)];
    let two = [values(&[2, 3, 4, 5], 0.1), values(&[2, 2, 4, 5], 0.2)];
    check("concat", &two, |t| ops::concat(&t[0], &t[1], 1), |t| Tensor::cat(&[&t[0], &t[1]], 1));
    check("upsample", &x, |t| ops::upsample_2x(&t[0]), |t| t[0].upsample_nearest2d(8, 12));
    check("avg_pool", &x, |t| ops::avg_pool_2x(&t[0]), |t| t[0].avg_pool2d(2));
}

type Op = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Sync>;

/// Every fused operation with inputs of shapes that no number of threads divides: pictures alone, odd batches, odd maps.
fn operations() -> Vec<(String, Vec<Vec<usize>>, Op)> {
    let mut operations: Vec<(String, Vec<Vec<usize>>, Op)> = Vec::new();
    for [b, c, side, o, kernel, stride, padding] in [
        [13, 8, 9, 16, 3, 1, 1],
        [1, 19, 16, 31, 3, 1, 1],
        [3, 16, 16, 16, 1, 1, 0],
        [13, 8, 9, 16, 3, 2, 1],
        [1, 19, 16, 31, 3, 2, 1],
        [2, 3, 17, 13, 3, 2, 0],
        [3, 5, 11, 12, 2, 3, 0],
    ] {
        operations.push((
            format!("conv2d {kernel}x{kernel}, batch {b}, stride {stride}, padding {padding}"),
            vec![vec![b, c, side, side], vec![o, c, kernel, kernel], vec![o]],
            Box::new(move |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding)),
        ));
    }
    let maps = vec![5, 12, 9, 7];
    operations.push((
        "group norm".into(),
        vec![maps.clone(), vec![12], vec![12]],
        Box::new(|t| ops::group_norm(&t[0], &t[1], &t[2], 3, 1e-5, true)),
    ));
    let three = vec![maps.clone(), maps.clone(), maps.clone()];
    operations.push(("attention".into(), three, Box::new(|t| ops::attention(&t[0], &t[1], &t[2], 3, Mask::None))));
    let two = vec![maps.clone(), vec![5, 7, 9, 7]];
    operations.push(("concat".into(), two, Box::new(|t| ops::concat(&t[0], &t[1], 1))));
    let many = vec![vec![1, 3, 30, 30], vec![1, 3, 1, 700], vec![1, 3, 1, 700]];
    operations.push((
        "attention in blocks".into(),
        many,
        Box::new(|t| ops::attention(&t[0], &t[1], &t[2], 1, Mask::None)),
    ));
    operations.push((
        "layer norm".into(),
        vec![maps.clone(), vec![12], vec![12]],
        Box::new(|t| ops::layer_norm(&t[0], Some([&t[1], &t[2]]), 1e-5)),
    ));
    operations.push(("RMS norm".into(), vec![maps.clone(), vec![4]], Box::new(|t| ops::rms_norm(&t[0], &t[1], 1e-5))));
    operations.push(("gated".into(), vec![maps.clone()], Box::new(|t| ops::gated(&t[0], Activation::Gelu))));
    operations.push(("upsample".into(), vec![maps], Box::new(|t| ops::upsample_2x(&t[0]))));
    operations.push(("avg_pool".into(), vec![vec![5, 7, 10, 6]], Box::new(|t| ops::avg_pool_2x(&t[0]))));
    operations
}

fn bits(t: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// The same work some times over, on several numbers of threads: always the same bits for a number.
fn check_bits(name: &str, work: impl Fn() -> Vec<Vec<u32>> + Sync) {
    for threads in [1, 2, 3, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let first = pool.install(&work);
        assert!((0..6).all(|_| pool.install(&work) == first), "{name}, {threads} threads");
    }
}

#[test]
fn results_are_the_same_bits_run_to_run() {
    for (name, shapes, op) in operations() {
        let inputs: Vec<Var> = shapes.iter().enumerate().map(|(i, shape)| values(shape, 0.1 * i as f32)).collect();
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        check_bits(&name, || {
            let y = op(&tensors).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let gradient = |var: &Var| bits(grads.get(var).unwrap());
            std::iter::once(bits(&y)).chain(inputs.iter().map(gradient)).collect()
        });
    }
}

/// Weights, moments and average after some updates, of tensors small and large.
#[test]
fn updates_are_the_same_bits_run_to_run() {
    let shapes: [&[usize]; 4] = [&[1], &[37, 3, 3, 3], &[129], &[300, 301]];
    check_bits("AdamW", || {
        let vars = shapes.map(|shape| values(shape, 0.1));
        let averages = shapes.map(|shape| values(shape, 0.2));
        let moments = shapes.map(|shape| Var::zeros((2, shape.iter().product()), DType::F32, &Device::Cpu).unwrap());
        let guard = Tensor::new(1f32, &Device::Cpu).unwrap();
        let mut found = Vec::new();
        for step in 0..3 {
            let grads = shapes.map(|shape| values(shape, 0.3 + step as f32).as_detached_tensor());
            let parameters: Vec<Parameter> =
                (0..shapes.len()).map(|i| Parameter { var: &vars[i], moments: &moments[i], grad: &grads[i] }).collect();
            let norm = ops::adamw_all(&parameters, &guard, 1.0, STEP).unwrap();
            let pairs: Vec<(&Var, &Tensor)> = averages.iter().zip(vars.iter().map(Var::as_tensor)).collect();
            ops::average_all(&pairs, 0.9, &norm).unwrap();
            found.push(bits(&norm.to_dtype(DType::F32).unwrap()));
        }
        found.extend(vars.iter().chain(&moments).chain(&averages).map(|var| bits(var)));
        found
    });
}

const STEP: AdamwStep =
    AdamwStep { grad_scale: 1.0, betas: [0.9, 0.99], rate: 0.1, root_scale: 1.0, keep: 0.99, eps: 1e-8 };

#[test]
fn an_empty_batch_has_no_pixels_and_moves_no_weight() {
    for stride in [1, 2] {
        let inputs = [values(&[0, 3, 6, 6], 0.1), values(&[7, 3, 3, 3], 0.2), values(&[7], 0.3)];
        let y = ops::conv2d(&inputs[0], &inputs[1], Some(&inputs[2]), stride, 1).unwrap();
        assert_eq!(y.dims(), [0, 7, 6 / stride, 6 / stride]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&inputs[0]).unwrap().dims(), [0, 3, 6, 6]);
        assert!(bits(grads.get(&inputs[1]).unwrap()).iter().all(|bits| *bits == 0));
    }
}

#[test]
fn mismatched_shapes_are_refused() {
    let x = Tensor::zeros((1, 3, 4, 4), DType::F32, &Device::Cpu).unwrap();
    let w = Tensor::zeros((2, 4, 3, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(ops::conv2d(&x, &w, None, 1, 1).unwrap_err().to_string().contains("do not go together"));
    assert!(
        ops::group_norm(
            &x,
            &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(),
            &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(),
            2,
            1e-5,
            true
        )
        .is_err()
    );
}
