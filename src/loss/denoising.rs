//! Denoising losses: how a teacher learns its data and the fake score the generator's samples.

use anyhow::Result;
use candle_core::{Device, Tensor};

/// mean(weight·(denoised − target)²). `denoised` `(B, C, H, W)`, f32 or f64, with gradient; `target` of the same shape
/// and type, a constant; one weight per sample.
pub fn denoising(denoised: &Tensor, target: &Tensor, weights: &[f64]) -> Result<Tensor> {
    let weights = Tensor::new(weights, &Device::Cpu)?.reshape(((), 1, 1, 1))?;
    let weights = weights.to_dtype(denoised.dtype())?.to_device(denoised.device())?;
    let error = (denoised - target.detach())?;
    Ok(error.sqr()?.broadcast_mul(&weights)?.mean_all()?)
}

/// λ(σ) = (σ² + σ_data²)/(σ·σ_data)², which gives every noise level the same weight on F (Karras et al. 2022, table 1).
pub fn edm_weight(sigma: f64, sigma_data: f64) -> f64 {
    (sigma * sigma + sigma_data * sigma_data) / (sigma * sigma_data).powi(2)
}

/// 1/σ² + 1/σ_data², the weight of the fake score's loss (Yin et al. 2024, algorithm 3, "SNR + 1/0.5²"). The same
/// function of σ as [`edm_weight`], under the name and in the form of its source.
pub fn fake_score_weight(sigma: f64, sigma_data: f64) -> f64 {
    1.0 / (sigma * sigma) + 1.0 / (sigma_data * sigma_data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    /// The best denoiser of N(a, b²) leaves b²σ²/T, T = b² + σ²; weighted, b²(σ² + σ_data²)/(σ_data²·T): exactly 1 at
    /// every σ for b = σ_data, and 1.000012, 1.029703, 2.5, 3.999531 for b = 1 (reference 7.4).
    #[test]
    fn the_weight_makes_the_floor_one() {
        for (i, sigma) in [0.002, 0.1, 1.0, 80.0].into_iter().enumerate() {
            let floor = |b: f64| fake_score_weight(sigma, 0.5) * b * b * sigma * sigma / (b * b + sigma * sigma);
            assert!((floor(0.5) - 1.0).abs() < 1e-9, "sigma {sigma}");
            assert!((floor(1.0) - [1.000012, 1.029703, 2.5, 3.999531][i]).abs() < 1e-6);
            assert!((fake_score_weight(sigma, 0.5) / edm_weight(sigma, 0.5) - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_loss_is_a_weighted_mean_of_squares() {
        let t = |v: [f32; 4]| Tensor::new(&v, &Device::Cpu).unwrap().reshape((2, 1, 1, 2)).unwrap();
        let loss = denoising(&t([1.0, 2.0, 3.0, 4.0]), &t([0.0; 4]), &[2.0, 0.5]).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), (2.0 * (1.0 + 4.0) + 0.5 * (9.0 + 16.0)) / 4.0);
    }

    #[test]
    fn no_gradient_reaches_the_target() {
        let var = |v: f32| Var::from_tensor(&Tensor::full(v, (1, 1, 1, 1), &Device::Cpu).unwrap()).unwrap();
        let (denoised, target) = (var(0.2), var(0.7));
        let grads = denoising(&denoised, &target, &[1.0]).unwrap().backward().unwrap();
        assert!(grads.get(&denoised).is_some() && grads.get(&target).is_none());
    }
}
