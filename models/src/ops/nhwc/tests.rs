//! Kernels against composites: the same functions on a GPU and on the CPU. Skipped where there is no GPU.

use super::*;
use candle_core::Device;

fn gpu() -> Option<Device> {
    let found = candle_core::utils::cuda_is_available().then(|| Device::new_cuda(0).ok()).flatten();
    if found.is_none() {
        println!("skipped: no GPU");
    }
    found
}

/// Numbers around zero that look random, exact in bf16.
fn values(shape: &[usize], seed: f32) -> Tensor {
    let n: usize = shape.iter().product();
    let v: Vec<f32> = (0..n).map(|i| ((i as f32 * 12.9898 + seed).sin() * 43758.547).fract() * 1.5).collect();
    let v = Tensor::from_vec(v, shape, &Device::Cpu).unwrap();
    v.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
}

/// ‖a − b‖/‖b‖, which a NaN makes NaN.
fn error(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let flat = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let (a, b) = (flat(a), flat(b));
    norm(&(&a - &b).unwrap()) / norm(&b).max(1e-6)
}

/// Runs `f` on both devices and dtypes; `tolerance` for f32, and bf16's rounding for bf16.
fn check(name: &str, inputs: &[Tensor], tolerance: f32, f: impl Fn(&[Tensor], DType) -> Result<Vec<Tensor>>) {
    let Some(gpu) = gpu() else { return };
    for (dtype, tolerance) in [(DType::F32, tolerance), (DType::BF16, 1e-2)] {
        let on = |device: &Device| {
            let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_device(device).unwrap()).collect();
            f(&inputs, dtype).unwrap()
        };
        for (i, (found, expected)) in on(&gpu).iter().zip(on(&Device::Cpu)).enumerate() {
            let error = error(found, &expected);
            println!("{name} {dtype:?} result {i}: {error:.1e}");
            assert!(error <= tolerance, "{name} {dtype:?} result {i}: {error} of {tolerance}");
        }
    }
}

fn as_dtype(inputs: &[Tensor], dtype: DType) -> Vec<Tensor> {
    inputs.iter().map(|t| if t.rank() == 4 { t.to_dtype(dtype).unwrap() } else { t.clone() }).collect()
}

#[test]
fn layouts_go_there_and_back() {
    for (b, c, h, w, padded) in [(2, 3, 5, 4, 8), (3, 16, 4, 4, 16)] {
        check("layout", &[values(&[b, c, h, w], 0.1), values(&[b, c], 0.2)], 1e-6, |t, dtype| {
            let there = to_channels_last(&t[0], padded, dtype)?;
            let back = from_channels_last(&there, None, c)?;
            Ok(vec![there.clone(), back, from_channels_last(&there, Some(&t[1]), c)?])
        });
    }
    check("kernel", &[values(&[5, 3, 3, 3], 0.1)], 1e-6, |t, dtype| {
        let packed = pack(&t[0], [8, 8], dtype)?;
        Ok(vec![packed.clone(), unpack(&packed, [5, 3])?])
    });
}

#[test]
fn convolutions_equal_their_composite() {
    // batch, height, width, in, out, kernel, stride, padding
    for [b, h, w, c, o, k, stride, padding] in [
        [2, 8, 8, 8, 16, 3, 1, 1],
        [4, 16, 16, 64, 32, 3, 1, 1],
        [2, 9, 7, 8, 8, 3, 2, 1],
        [2, 8, 8, 16, 16, 3, 2, 1],
        [3, 8, 8, 32, 64, 1, 1, 0],
        [2, 9, 9, 8, 8, 3, 2, 0],
    ] {
        let inputs = [values(&[b, h, w, c], 0.1), values(&[o, k, k, c], 0.2)];
        check(&format!("conv {b}x{h}x{w}x{c} to {o}, {k}/{stride}"), &inputs, 2e-3, |t, dtype| {
            let t = as_dtype(t, dtype);
            let steps = Steps { stride, padding };
            let y = convolve(&t[0], &t[1], steps)?;
            let dy = values(y.dims(), 0.3).to_dtype(dtype)?.to_device(y.device())?;
            Ok(vec![
                y,
                convolve_backward_data(&dy, &t[1], t[0].dims(), steps)?,
                convolve_backward_filter(&t[0], &dy, t[1].dims(), steps)?,
            ])
        });
    }
}

#[test]
fn group_norm_equals_its_composite() {
    // batch, height, width, channels, groups
    for [b, h, w, c, groups] in [
        [2, 4, 4, 32, 4],
        [3, 5, 3, 64, 32],
        [2, 32, 32, 128, 32],
        [2, 16, 16, 384, 32],
        [1, 1, 1, 16, 2],
        [300, 2, 2, 256, 8],
        [2, 3, 3, 24, 1],
        [2, 8, 8, 8, 8],
    ] {
        let inputs = [
            values(&[b, h, w, c], 0.1),
            values(&[c], 0.2),
            values(&[c], 0.3),
            values(&[b, c], 0.4),
            values(&[b, h, w, c], 0.5),
            values(&[b, h, w, c], 0.6),
        ];
        for silu in [false, true] {
            for rows in [0, 1, b] {
                check(&format!("norm {b}x{h}x{w}x{c}/{groups} silu {silu} bias {rows}"), &inputs, 1e-4, |t, dtype| {
                    let t = as_dtype(t, dtype);
                    let bias = if rows == 0 { None } else { Some(t[3].narrow(0, 0, rows)?.contiguous()?) };
                    let norm = Norm { weight: t[1].clone(), beta: t[2].clone(), groups, eps: 1e-5, silu };
                    assert!(norm_fits(&t[0], groups));
                    let (y, stats) = group_norm(&t[0], bias.as_ref(), &norm)?;
                    let input = NormInput { x: &t[0], bias: bias.as_ref(), stats: &stats };
                    let (dx, totals) = group_norm_backward(&input, &norm, &t[4], None)?;
                    let (more, _) = group_norm_backward(&input, &norm, &t[4], Some(&t[5]))?;
                    let totals = if rows == 0 { totals.narrow(0, 0, 2)? } else { totals };
                    Ok(vec![y, stats, dx, totals, more])
                });
            }
        }
    }
}

#[test]
fn what_lies_between_equals_its_composite() {
    let inputs = [
        values(&[3, 4, 6, 16], 0.1),
        values(&[3, 4, 6, 16], 0.2),
        values(&[3, 4, 6, 24], 0.3),
        values(&[3, 16], 0.4),
        values(&[1, 24], 0.5),
    ];
    check("between", &inputs, 1e-6, |t, dtype| {
        let t = as_dtype(t, dtype);
        let (x, y, wide) = (&t[0], &t[1], &t[2]);
        let joined = concat((x, Some(&t[3])), (wide, Some(&t[4])))?;
        let (left, right) = split(&joined, 16)?;
        let up = upsample((x, Some(&t[3])))?;
        Ok(vec![
            add((x, Some(&t[3])), (y, None))?,
            add((x, None), (y, Some(&t[3])))?,
            settle((wide, Some(&t[4])))?,
            joined,
            left,
            right,
            upsample_backward(&up)?,
            up,
        ])
    });
    for [groups, rows, channels] in
        [[1, 1000, 16], [3, 24, 16], [2, 1, 512], [1, 5000, 128], [2, 300, 7], [3, 256, 384]]
    {
        check(
            &format!("sums {groups}x{rows}x{channels}"),
            &[values(&[groups, rows, channels], 0.1)],
            1e-4,
            |t, dtype| Ok(vec![row_sums(&t[0].to_dtype(dtype)?)?]),
        );
    }
}

/// Against candle's composite in f32, forward and back.
#[test]
fn attention_equals_its_composite() {
    let Some(gpu) = gpu() else { return };
    // batch, height, width, heads, width of a head
    for [b, h, w, heads, width] in [
        [2, 4, 4, 2, 8],
        [1, 7, 10, 1, 16],
        [2, 8, 8, 2, 32],
        [3, 16, 16, 4, 64],
        [1, 10, 13, 1, 128],
        [2, 5, 5, 2, 24],
    ] {
        let c = heads * width;
        let picture = |seed: f32| values(&[b, h, w, c], seed);
        let (qkv, dy) = ([0.1, 0.2, 0.3].map(picture), picture(0.4));
        let biases = [0.5, 0.6].map(|seed| values(&[1, c], seed));
        let vars = [0, 1, 2].map(|i| {
            let bias = [Some(&biases[0]), None, Some(&biases[1])][i];
            Var::from_tensor(&with_bias(&qkv[i], bias).unwrap()).unwrap()
        });
        let y = crate::ops::attention_composite(&vars[0], &vars[1], &vars[2], heads, crate::ops::Mask::None).unwrap();
        let grads = (&y * first(&dy).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
        for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F32, 4e-3)] {
            if dtype == DType::F32 && width > 64 {
                continue;
            }
            let there = |t: &Tensor| t.to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
            let a = Attention {
                heads,
                qkv: qkv.each_ref().map(there),
                biases: biases.each_ref().map(|bias| Some(bias.to_device(&gpu).unwrap())),
            };
            assert!(attention_fits(&a.qkv[0], heads));
            let (o, lse) = a.forward().unwrap();
            let found = a.backward(&o, &lse, &there(&dy)).unwrap();
            let what = format!("attention {b}x{h}x{w}, {heads} heads of {width}");
            let check = |part: &str, found: &Tensor, expected: &Tensor| {
                let error = error(found, &last(expected, DType::F32).unwrap());
                println!("{what} {part}: {error:.1e}");
                assert!(error <= tolerance, "{what} {part} {dtype:?}: {error}");
            };
            check("forward", &o, &y);
            for (i, part) in ["dq", "dk", "dv"].into_iter().enumerate() {
                check(part, &found[i], grads.get(&vars[i]).unwrap());
            }
        }
    }
}
