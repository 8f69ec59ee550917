//! The score-identity loss (Zhou et al. 2024, "Score identity Distillation", equations 22 and 23).

use super::Matching;
use anyhow::Result;
use candle_core::Tensor;

/// Floor of the teacher's mean error, as in the paper's code.
const EPS: f64 = 1e-5;

/// mean of (x0_real − x0_fake)·[(x0_real − x) − alpha·(x0_real − x0_fake)] / mean|x − x0_real|, the divisor per sample
/// and a constant. All f32 `(B, C, H, W)`. Unlike distribution matching, the gradient also flows through both scores
/// (whose weights are frozen) to the noised sample. The paper's alpha is 1.2 for one step at low resolution, 1 elsewhere. `floor`:
/// what the divisor is at least.
pub fn score_identity(x: &Tensor, x0_real: &Tensor, x0_fake: &Tensor, alpha: f64, floor: f64) -> Result<Matching> {
    let error = (x.detach() - x0_real.detach())?.abs()?.mean_keepdim((1, 2, 3))?;
    let gap = (x0_real - x0_fake)?;
    let identity = ((x0_real - x)? - (&gap * alpha)?)?;
    Ok(Matching {
        real_error: error.mean_all()?,
        score_gap: gap.detach().abs()?.mean_all()?,
        loss: (gap * identity)?.broadcast_div(&error.maximum(EPS.max(floor))?)?.mean_all()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// One point of 7.1 (x 0.2, μ_r 0.08, μ_f −0.4341463415): 0.5141463415·(−0.12 − 1.2·0.5141463415)/0.12 =
    /// −3.157610; and the gradient with x_t = x + σε, μ_r = 0.2·x_t + 0.24, μ_f = (0.64·x_t − 0.2)/1.64 by differences.
    #[test]
    fn one_gaussian_point_has_the_closed_form_value_and_slope() {
        let value = |x: f64, error: f64| {
            let x_t = x - 1.0;
            let (real, fake) = (0.2 * x_t + 0.24, (0.64 * x_t - 0.2) / 1.64);
            let gap = real - fake;
            gap * ((real - x) - 1.2 * gap) / error
        };
        let x = Var::from_tensor(&Tensor::full(0.2f32, (1, 1, 1, 1), &Device::Cpu).unwrap()).unwrap();
        let x_t = (x.as_tensor() - 1.0).unwrap();
        let real = x_t.affine(0.2, 0.24).unwrap();
        let fake = x_t.affine(0.64 / 1.64, -0.2 / 1.64).unwrap();
        let Matching { loss, real_error, score_gap } = score_identity(&x, &real, &fake, 1.2, 0.0).unwrap();
        assert!((real_error.to_scalar::<f32>().unwrap() - 0.12).abs() < 1e-6);
        assert!((score_gap.to_scalar::<f32>().unwrap() - 0.514_146_3).abs() < 1e-6);
        let found = f64::from(loss.to_scalar::<f32>().unwrap());
        assert!((found + 3.157_610).abs() < 1e-4 && (found - value(0.2, 0.12)).abs() < 1e-4, "{found}");
        let grads = loss.backward().unwrap();
        let slope = f64::from(grads.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]);
        let expected = (value(0.2 + 1e-5, 0.12) - value(0.2 - 1e-5, 0.12)) / 2e-5;
        assert!((slope - expected).abs() < 1e-3, "{slope} for {expected}");
    }

    #[test]
    fn equal_scores_lose_nothing() {
        let x = Tensor::full(0.3f32, (2, 1, 1, 2), &Device::Cpu).unwrap();
        let score = Tensor::full(0.1f32, (2, 1, 1, 2), &Device::Cpu).unwrap();
        assert_eq!(score_identity(&x, &score, &score, 1.2, 0.0).unwrap().loss.to_scalar::<f32>().unwrap(), 0.0);
        assert_eq!(score_identity(&x, &x, &x, 1.2, 0.0).unwrap().loss.to_scalar::<f32>().unwrap(), 0.0);
    }
}
