//! Distribution matching (Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation", equations 7
//! and 8, in the form of its algorithm 2: without α_t, which is 1 for variance-exploding models anyway).

use super::Matching;
use anyhow::Result;
use candle_core::Tensor;

/// Floor of the teacher's mean error: zero when the generator already matches the teacher.
const EPS: f64 = 1e-6;

/// Distribution-matching loss in x0 space. All inputs f32 `(B, C, H, W)` around [-1, 1]: the generator's sample x and
/// what the two scores make of its noised version. `h`: a weight per sample, for divergences other than reverse KL
/// (Xu et al. 2025, theorem 1); none means 1. `floor`: what the teacher's mean error counts for at least. The loss is ½·mean(grad²), whose gradient reaches `x` only and is grad over
/// the number of elements.
pub fn distribution_matching(
    x: &Tensor,
    x0_real: &Tensor,
    x0_fake: &Tensor,
    h: Option<&[f64]>,
    floor: f64,
) -> Result<Matching> {
    // The target is a constant: the KL gradient has been taken by hand and enters through it.
    let (still, x0_real, x0_fake) = (x.detach(), x0_real.detach(), x0_fake.detach());
    // Mean error of the teacher per sample, so that every noise level pulls equally hard.
    let error = (&still - &x0_real)?.abs()?.mean_keepdim((1, 2, 3))?;
    let gap = (&x0_fake - &x0_real)?;
    let mut grad = gap.broadcast_div(&(error.maximum(floor)? + EPS)?)?;
    if let Some(h) = h {
        let h: Vec<f32> = h.iter().map(|&h| h as f32).collect();
        grad = grad.broadcast_mul(&Tensor::from_vec(h, (x.dim(0)?, 1, 1, 1), x.device())?)?;
    }
    let target = (&still - &grad)?;
    Ok(Matching {
        loss: ((x - target)?.sqr()?.mean_all()? * 0.5)?,
        real_error: error.mean_all()?,
        score_gap: gap.abs()?.mean_all()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn gradient(x: &[f32], real: &[f32], fake: &[f32], shape: (usize, usize, usize, usize)) -> (f32, Vec<f32>) {
        let var = Var::from_tensor(&Tensor::from_slice(x, shape, &Device::Cpu).unwrap()).unwrap();
        let still = |v: &[f32]| Tensor::from_slice(v, shape, &Device::Cpu).unwrap();
        let loss = distribution_matching(&var, &still(real), &still(fake), None, 0.0).unwrap().loss;
        let grads = loss.backward().unwrap();
        (loss.to_scalar().unwrap(), grads.get(&var).unwrap().flatten_all().unwrap().to_vec1().unwrap())
    }

    /// Gaussian scores at one point (reference: m 0.3, s 0.5, a −0.2, b 0.8, σ 1, z 0.5, ε −1): x 0.2, μ_r 0.08,
    /// μ_f −0.4341463415, |x − μ_r| 0.12, g −4.2845528455 for one element.
    #[test]
    fn one_gaussian_point_has_the_closed_form_gradient() {
        let (loss, grad) = gradient(&[0.2], &[0.08], &[-0.434_146_34], (1, 1, 1, 1));
        assert!((grad[0] + 4.284_552_8).abs() < 1e-4, "{grad:?}");
        assert!((loss - 0.5 * 4.284_552_8f32.powi(2)).abs() < 1e-3);
    }

    #[test]
    fn the_gradient_ignores_scale_and_other_samples() {
        let (x, real, fake) = ([0.1, -0.4, 0.3, 0.9], [0.3, -0.1, 0.2, 0.5], [0.2, 0.1, -0.3, 0.4]);
        let (_, grad) = gradient(&x, &real, &fake, (2, 1, 1, 2));
        let scaled = |v: [f32; 4]| v.map(|v| 7.0 * v);
        let (_, same) = gradient(&scaled(x), &scaled(real), &scaled(fake), (2, 1, 1, 2));
        assert!(grad.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-5));
        let (_, other) = gradient(&[0.1, -0.4, 5.0, 9.0], &real, &fake, (2, 1, 1, 2));
        assert_eq!(grad[..2], other[..2]);
    }

    /// Weights scale each sample's own gradient; weights of 1 are the plain loss, bit for bit.
    #[test]
    fn weights_scale_the_gradient_per_sample() {
        let still = |v: &[f32]| Tensor::from_slice(v, (2, 1, 1, 2), &Device::Cpu).unwrap();
        let (x, real, fake) = ([0.1, -0.4, 0.3, 0.9], [0.3, -0.1, 0.2, 0.5], [0.2, 0.1, -0.3, 0.4]);
        let gradient = |h: Option<&[f64]>| -> Vec<f32> {
            let var = Var::from_tensor(&still(&x)).unwrap();
            let loss = distribution_matching(&var, &still(&real), &still(&fake), h, 0.0).unwrap().loss;
            loss.backward().unwrap().get(&var).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let plain = gradient(None);
        assert_eq!(plain, gradient(Some(&[1.0, 1.0])));
        let weighted = gradient(Some(&[0.5, 3.0]));
        let close = |i: usize, h: f32| (weighted[i] - h * plain[i]).abs() < 1e-6;
        assert!(close(0, 0.5) && close(1, 0.5) && close(2, 3.0) && close(3, 3.0), "{plain:?} {weighted:?}");
    }

    /// The point above with a floor of 0.24 under its error of 0.12 is pulled half as hard; one of 0.1 changes nothing.
    #[test]
    fn a_floor_bounds_the_pull_where_the_teacher_is_nearly_right() {
        let gradient = |floor: f64| {
            let x = Var::from_tensor(&Tensor::full(0.2f32, (1, 1, 1, 1), &Device::Cpu).unwrap()).unwrap();
            let [real, fake] = [0.08f32, -0.434_146_34].map(|v| Tensor::full(v, (1, 1, 1, 1), &Device::Cpu).unwrap());
            let grads = distribution_matching(&x, &real, &fake, None, floor).unwrap().loss.backward().unwrap();
            grads.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
        };
        assert!((gradient(0.24) + 4.284_552_8 / 2.0).abs() < 1e-4 && (gradient(0.1) + 4.284_552_8).abs() < 1e-4);
    }

    #[test]
    fn a_perfect_match_gives_zero_and_no_nan() {
        let (loss, grad) = gradient(&[0.3, 0.4], &[0.3, 0.4], &[0.3, 0.4], (1, 1, 1, 2));
        assert_eq!(loss, 0.0);
        assert!(grad.iter().all(|g| *g == 0.0));
    }

    /// Descending moves x towards x0_real when the fake score returns x itself.
    #[test]
    fn descent_moves_towards_the_teacher() {
        let (_, grad) = gradient(&[0.2, -0.3], &[0.5, -0.9], &[0.2, -0.3], (1, 1, 1, 2));
        assert!(grad[0] < 0.0 && grad[1] > 0.0);
    }

    #[test]
    fn no_gradient_reaches_the_scores() {
        let var = |v: f32| Var::from_tensor(&Tensor::full(v, (1, 1, 1, 1), &Device::Cpu).unwrap()).unwrap();
        let (x, real, fake) = (var(0.1), var(0.2), var(0.3));
        let grads = distribution_matching(&x, &real, &fake, None, 0.0).unwrap().loss.backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&real).is_none() && grads.get(&fake).is_none());
    }
}
