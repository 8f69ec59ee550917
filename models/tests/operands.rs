//! Operands that do not go together are refused before a kernel reads beyond one of them: every public operation with a
//! second operand of another shape, type or layout.

use candle_core::{DType, Device, Result, Tensor, Var};
use dmd_models::ops::nhwc::{self, Attention, Norm, NormInput, Steps};
use dmd_models::ops::{self, AdamwStep, Mask, Parameter};

fn f32s(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

fn var(shape: &[usize]) -> Var {
    Var::from_tensor(&f32s(shape)).unwrap()
}

fn bf16(shape: &[usize]) -> Tensor {
    f32s(shape).to_dtype(DType::BF16).unwrap()
}

/// Of this shape, but its last two axes lie the other way round.
fn askew(shape: &[usize]) -> Tensor {
    let (mut turned, n) = (shape.to_vec(), shape.len());
    turned.swap(n - 2, n - 1);
    f32s(&turned).transpose(n - 2, n - 1).unwrap()
}

/// `f` takes what fits, and none of the others.
fn check<T>(what: &str, fits: Tensor, others: &[Tensor], f: impl Fn(&Tensor) -> Result<T>) {
    f(&fits).unwrap_or_else(|error| panic!("{what}: {:?}: {error}", fits.dims()));
    for other in others {
        assert!(f(other).is_err(), "{what}: took {:?} {:?} {:?}", other.dims(), other.dtype(), other.layout().stride());
    }
}

/// What does not go with a picture `(2, 4, 6, 8)`, besides in another type.
fn other_pictures() -> Vec<Tensor> {
    let mut others: Vec<Tensor> = [[1, 4, 6, 8], [2, 3, 6, 8], [2, 4, 5, 8]].map(|shape| f32s(&shape)).into();
    others.extend([f32s(&[2, 24, 8]), f32s(&[384]), bf16(&[2, 4, 6, 8]), askew(&[2, 4, 6, 8])]);
    others
}

/// What is no bias of a picture of two, of 8 channels.
fn other_biases() -> Vec<Tensor> {
    vec![f32s(&[3, 8]), f32s(&[1, 7]), f32s(&[2, 16]), f32s(&[8]), bf16(&[1, 8]), askew(&[2, 8])]
}

#[test]
fn pictures_with_channels_last_take_only_operands_that_fit() {
    let x = f32s(&[2, 4, 6, 8]);
    let (others, mut with_channels) = (other_pictures(), other_pictures());
    with_channels.push(f32s(&[2, 4, 6, 16]));
    check("add", x.clone(), &with_channels, |y| nhwc::add((&x, None), (y, None)));
    check("concat", f32s(&[2, 4, 6, 16]), &others, |y| nhwc::concat((&x, None), (y, None)));
    check("bias of settle", f32s(&[2, 8]), &other_biases(), |bias| nhwc::settle((&x, Some(bias))));
    check("bias of add", f32s(&[1, 8]), &other_biases(), |bias| nhwc::add((&x, None), (&x, Some(bias))));
    check("bias of concat", f32s(&[1, 8]), &other_biases(), |bias| nhwc::concat((&x, Some(bias)), (&x, None)));
    check("bias of upsample", f32s(&[1, 8]), &other_biases(), |bias| nhwc::upsample((&x, Some(bias))));
    check("bias taken out", f32s(&[1, 8]), &other_biases(), |bias| nhwc::from_channels_last(&x, Some(bias), 8));
    check("taken out", x.clone(), &[f32s(&[2, 4, 6, 7]), f32s(&[8, 8])], |x| nhwc::from_channels_last(x, None, 8));
    check("split", x.clone(), &[f32s(&[2, 4, 6, 2]), f32s(&[8, 8])], |x| nhwc::split(x, 3));
    check(
        "upsample backward",
        x.clone(),
        &[f32s(&[2, 3, 6, 8]), f32s(&[2, 4, 5, 8]), f32s(&[8])],
        nhwc::upsample_backward,
    );
    check("row sums", f32s(&[2, 4, 8]), &[f32s(&[4, 8])], nhwc::row_sums);
    let planes = [f32s(&[2, 9, 4, 6]), f32s(&[2, 8]), bf16(&[2, 8, 4, 6])];
    check("brought in", f32s(&[2, 3, 4, 6]), &planes, |x| nhwc::to_channels_last(x, 8, DType::F32));
    let kernels = [f32s(&[9, 3, 3, 3]), f32s(&[5, 9, 3, 3]), f32s(&[5, 3])];
    check("pack", f32s(&[5, 3, 3, 3]), &kernels, |w| nhwc::pack(w, [8, 8], DType::F32));
    check("unpack", f32s(&[8, 3, 3, 8]), &[f32s(&[4, 3, 3, 8]), f32s(&[8, 3, 3, 2]), f32s(&[8])], |w| {
        nhwc::unpack(w, [5, 3])
    });
}

#[test]
fn convolutions_take_only_kernels_and_gradients_that_fit() {
    let (x, w, y) = (f32s(&[2, 4, 6, 8]), f32s(&[16, 3, 3, 8]), f32s(&[2, 4, 6, 16]));
    let steps = Steps { stride: 1, padding: 1 };
    let kernels =
        [f32s(&[16, 3, 3, 4]), f32s(&[16, 9, 3, 8]), f32s(&[16, 8]), bf16(&[16, 3, 3, 8]), askew(&[16, 3, 3, 8])];
    let grads = [f32s(&[2, 4, 6, 8]), f32s(&[2, 4, 5, 16]), f32s(&[1, 4, 6, 16]), f32s(&[768]), askew(&[2, 4, 6, 16])];
    check("convolve", w.clone(), &kernels, |w| nhwc::convolve(&x, w, steps));
    check("data, kernel", w.clone(), &kernels, |w| nhwc::convolve_backward_data(&y, w, x.dims(), steps));
    check("data, gradient", y.clone(), &grads, |y| nhwc::convolve_backward_data(y, &w, x.dims(), steps));
    check("filter, gradient", y.clone(), &grads, |y| nhwc::convolve_backward_filter(&x, y, w.dims(), steps));
    for dims in [&[2, 4, 6][..], &[2, 4, 6, 9], &[2, 5, 6, 8]] {
        assert!(nhwc::convolve_backward_data(&y, &w, dims, steps).is_err(), "{dims:?}");
    }
    assert!(nhwc::convolve(&x, &w, Steps { stride: 0, padding: 1 }).is_err());
    assert!(nhwc::convolve_backward_filter(&x, &y, &[16, 3, 3], steps).is_err());

    let (x, w) = (f32s(&[2, 8, 4, 6]), f32s(&[16, 8, 3, 3]));
    check("conv2d", w.clone(), &[f32s(&[16, 4, 3, 3]), f32s(&[16, 8, 9, 3]), f32s(&[16, 8]), bf16(w.dims())], |w| {
        ops::conv2d(&x, w, None, 1, 1)
    });
    let biases = [f32s(&[15]), f32s(&[3, 16]), f32s(&[17]), bf16(&[16])];
    check("conv2d, bias", f32s(&[2, 16]), &biases, |bias| ops::conv2d(&x, &w, Some(bias), 1, 1));
    assert!(ops::conv2d(&x, &w, None, 0, 1).is_err());
}

#[test]
fn norms_take_only_parameters_and_statistics_that_fit() {
    let x = f32s(&[2, 4, 6, 8]);
    let norm = |weight: &Tensor, beta: &Tensor, groups: usize| {
        let (weight, beta) = (weight.clone(), beta.clone());
        Norm { weight, beta, groups, eps: 1e-5, silu: true }
    };
    let whole = norm(&f32s(&[8]), &f32s(&[8]), 4);
    let vectors = [f32s(&[7]), f32s(&[16]), f32s(&[1, 8]), bf16(&[8])];
    check("weight", f32s(&[8]), &vectors, |v| nhwc::group_norm(&x, None, &norm(v, &whole.beta, 4)));
    check("beta", f32s(&[8]), &vectors, |v| nhwc::group_norm(&x, None, &norm(&whole.weight, v, 4)));
    check("bias", f32s(&[2, 8]), &other_biases(), |bias| nhwc::group_norm(&x, Some(bias), &whole));
    let (_, stats) = nhwc::group_norm(&x, None, &whole).unwrap();
    let back = |dy: &Tensor, stats: &Tensor, existing: Option<&Tensor>| {
        nhwc::group_norm_backward(&NormInput { x: &x, bias: None, stats }, &whole, dy, existing)
    };
    check("gradient", x.clone(), &other_pictures(), |dy| back(dy, &stats, None));
    check("existing", x.clone(), &other_pictures(), |existing| back(&x, &stats, Some(existing)));
    check("statistics", stats.clone(), &[f32s(&[2, 3, 2]), f32s(&[1, 4, 2]), bf16(&[2, 4, 2])], |s| back(&x, s, None));
    let first = f32s(&[2, 8, 4, 6]);
    check("group_norm", f32s(&[8]), &[f32s(&[7]), f32s(&[16]), bf16(&[8])], |v| {
        ops::group_norm(&first, v, &whole.beta, 4, 1e-5, true)
    });
    for groups in [0, 3, 16] {
        assert!(!nhwc::norm_fits(&x, groups));
        assert!(nhwc::group_norm(&x, None, &norm(&whole.weight, &whole.beta, groups)).is_err());
        assert!(ops::group_norm(&first, &whole.weight, &whole.beta, groups, 1e-5, true).is_err());
        assert!(ops::group_norm_composite(&first, &whole.weight, &whole.beta, groups, 1e-5, true).is_err());
    }
}

/// The kernels of channels last are a GPU's; what is refused before them is refused everywhere, in other words.
#[test]
fn attention_takes_only_keys_and_values_that_fit() {
    let x = f32s(&[2, 4, 6, 8]);
    let attention = |k: &Tensor, v: &Tensor, bias: Option<Tensor>, heads: usize| {
        let a = Attention { heads, qkv: [x.clone(), k.clone(), v.clone()], biases: [bias, None] };
        match a.forward().map_err(|error| error.to_string()) {
            Err(message) if message.contains("only on a GPU") => Ok(()),
            other => other.map(drop).map_err(candle_core::Error::Msg),
        }
    };
    let mut others = other_pictures();
    others.push(f32s(&[2, 4, 6, 16]));
    check("keys", x.clone(), &others, |k| attention(k, &x, None, 2));
    check("values", x.clone(), &others, |v| attention(&x, v, None, 2));
    check("bias", f32s(&[1, 8]), &[f32s(&[2, 8]), f32s(&[1, 7]), f32s(&[8])], |b| {
        attention(&x, &x, Some(b.clone()), 2)
    });
    let a = Attention { heads: 2, qkv: [x.clone(), x.clone(), x.clone()], biases: [None, None] };
    let back = |o: &Tensor, lse: &Tensor, dy: &Tensor| match a.backward(o, lse, dy).map_err(|error| error.to_string()) {
        Err(message) if message.contains("only on a GPU") => Ok(()),
        other => other.map(drop).map_err(candle_core::Error::Msg),
    };
    let lse = f32s(&[2, 2, 24]);
    check("result", x.clone(), &others, |o| back(o, &lse, &x));
    check("gradient", x.clone(), &others, |dy| back(&x, &lse, dy));
    check("sums", lse.clone(), &[f32s(&[2, 2, 23]), f32s(&[2, 1, 24]), bf16(&[2, 2, 24])], |lse| back(&x, lse, &x));
    let first = f32s(&[2, 8, 4, 6]);
    let others =
        [f32s(&[2, 8, 4, 5]), f32s(&[1, 8, 4, 6]), f32s(&[2, 16, 4, 6]), f32s(&[2, 8, 24]), bf16(first.dims())];
    check("attention, keys", first.clone(), &others, |k| ops::attention(&first, k, &first, 2, Mask::None));
    check("attention, values", first.clone(), &others, |v| ops::attention(&first, &first, v, 2, Mask::None));
    for heads in [0, 3, 16] {
        assert!(!nhwc::attention_fits(&x, heads));
        assert!(attention(&x, &x, None, heads).is_err());
        assert!(ops::attention(&first, &first, &first, heads, Mask::None).is_err());
        assert!(ops::attention_composite(&first, &first, &first, heads, Mask::None).is_err());
    }
}

#[test]
fn maps_and_optimisers_take_only_what_fits() {
    let x = f32s(&[2, 8, 4, 6]);
    let others = [f32s(&[1, 8, 4, 6]), f32s(&[2, 8, 4, 5]), f32s(&[2, 8, 24]), bf16(x.dims())];
    check("concat", f32s(&[2, 3, 4, 6]), &others, |y| ops::concat(&x, y, 1));
    check("upsample", x.clone(), &[f32s(&[8, 4, 6])], ops::upsample_2x);
    check("pool", x.clone(), &[f32s(&[8, 4, 6])], ops::avg_pool_2x);
    check("per channel", f32s(&[2, 8]), &[f32s(&[2, 7]), f32s(&[3, 8])], |v| ops::add_per_channel(&x, v));

    let step = AdamwStep { grad_scale: 1.0, betas: [0.9, 0.99], rate: 0.1, root_scale: 1.0, keep: 1.0, eps: 1e-8 };
    let vectors = [f32s(&[5]), f32s(&[7]), f32s(&[2, 3]), bf16(&[6])];
    check("adamw, gradient", f32s(&[6]), &vectors[..3], |grad| ops::adamw(&var(&[6]), &var(&[2, 6]), grad, step));
    check("adamw, moments", f32s(&[2, 6]), &[f32s(&[2, 5]), f32s(&[2, 7]), f32s(&[12]), f32s(&[1, 6])], |moments| {
        ops::adamw(&var(&[6]), &Var::from_tensor(moments)?, &f32s(&[6]), step)
    });
    check("adamw of all", f32s(&[6]), &vectors[..3], |grad| {
        let (var, moments) = (var(&[6]), var(&[2, 6]));
        ops::adamw_all(&[Parameter { var: &var, moments: &moments, grad }], &f32s(&[]), 1.0, step)
    });
    check("average", f32s(&[6]), &vectors[..3], |value| ops::average_into(&var(&[6]), value, 0.9));
}
