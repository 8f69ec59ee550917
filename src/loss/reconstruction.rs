//! What an autoencoder learns by: how far a picture is from what is left of it, and how far its latents are from noise.

use anyhow::Result;
use candle_core::Tensor;

/// mean |x − target|. f32 `(B, C, H, W)`; the gradient reaches `x` only.
pub fn l1(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    Ok((x - target.detach())?.abs()?.mean_all()?)
}

/// KL divergence of Gaussians from the unit normal, `½·Σ(mean² + std² − 1 − 2·ln std)` over the values of a picture's
/// latents, mean over the batch (Kingma and Welling 2014, "Auto-Encoding Variational Bayes", appendix B). `mean` and `std`
/// f32 `(B, C, h, w)`; without `std`, that of Gaussians of one width: `½·Σ mean²`.
pub fn kl_to_noise(mean: &Tensor, std: Option<&Tensor>) -> Result<Tensor> {
    let square = mean.sqr()?;
    let each = match std {
        Some(std) => ((square + std.sqr()?)? - (std.log()? * 2.0)?)? - 1.0,
        None => Ok(square),
    };
    Ok((each?.sum_all()? * (0.5 / mean.dim(0)? as f64))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn number(x: &Tensor) -> f64 {
        f64::from(x.to_scalar::<f32>().unwrap())
    }

    /// By integration (scipy 1.17.1): `quad(lambda x: norm.pdf(x, m, s)*(norm.logpdf(x, m, s) - norm.logpdf(x)), -40, 40)`
    /// is 0.9318528194400548 at m = 0.5, s = 2, and 1.4431471805599454 at m = -1.5, s = 0.5.
    #[test]
    fn the_divergence_is_the_integral() {
        let mean = Var::from_tensor(&Tensor::new(&[[[[0.5f32]], [[-1.5]]]], &Device::Cpu).unwrap()).unwrap();
        let std = Var::from_tensor(&Tensor::new(&[[[[2.0f32]], [[0.5]]]], &Device::Cpu).unwrap()).unwrap();
        let kl = kl_to_noise(&mean, Some(&std)).unwrap();
        assert!((number(&kl) - 0.9318528194400548 - 1.4431471805599454).abs() < 1e-6, "{}", number(&kl));
        // d/dm = m, d/ds = s − 1/s.
        let grads = kl.backward().unwrap();
        let of = |var: &Var| grads.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((of(&mean), of(&std)), (vec![0.5, -1.5], vec![1.5, -1.5]));
        let batch = Tensor::cat(&[mean.as_tensor(), mean.as_tensor()], 0).unwrap();
        assert_eq!(number(&kl_to_noise(&batch, None).unwrap()), 0.5 * (0.25 + 2.25));
    }

    #[test]
    fn l1_is_the_mean_difference() {
        let (x, y) =
            (Tensor::new(&[1.0f32, 2.0], &Device::Cpu).unwrap(), Tensor::new(&[0.0f32, 4.0], &Device::Cpu).unwrap());
        assert_eq!(number(&l1(&x, &y).unwrap()), 1.5);
    }
}
