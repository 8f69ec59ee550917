//! Classifier-free guidance that keeps the size of what it guides, against colours that burn.

use anyhow::Result;
use candle_core::Tensor;

/// Guided is cond·scale + uncond·(1 − scale). Of its answer, `share` has the norm of the condition's own answer given back,
/// sample by sample (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4, which
/// takes standard deviations and a share of 0.7; norms and all of it in the trainers of Qwen-Image and FLUX). In x0 space;
/// f32 `(B, C, H, W)` each; gradients reach both.
pub fn rescaled_guidance(cond: &Tensor, uncond: &Tensor, scale: f64, share: f64) -> Result<Tensor> {
    let guided = ((cond * scale)? + (uncond * (1.0 - scale))?)?;
    let norm = |x: &Tensor| x.sqr()?.sum_keepdim((1, 2, 3))?.sqrt();
    // TINY: an answer of zeros everywhere has no norm to give back.
    let factor = (norm(cond)? / (norm(&guided)? + TINY)?)?;
    Ok(guided.broadcast_mul(&factor.affine(share, 1.0 - share)?)?)
}

const TINY: f64 = 1e-12;

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// (3, 4) guided by 2 away from (0, 8) is (6, 0): norms 5 and 6, so a factor of 5/6, or half way to it, 11/12. The
    /// second sample is twice the first and has the same factor.
    #[test]
    fn the_norm_is_given_back_sample_by_sample() {
        let t = |v: [f32; 4]| Tensor::new(&v, &Device::Cpu).unwrap().reshape((2, 1, 1, 2)).unwrap();
        let of = |share: f64| -> Vec<f32> {
            let x = rescaled_guidance(&t([3.0, 4.0, 6.0, 8.0]), &t([0.0, 8.0, 0.0, 16.0]), 2.0, share).unwrap();
            x.flatten_all().unwrap().to_vec1().unwrap()
        };
        for (share, expected) in
            [(0.0, [6.0, 0.0, 12.0, 0.0]), (0.5, [5.5, 0.0, 11.0, 0.0]), (1.0, [5.0, 0.0, 10.0, 0.0])]
        {
            let found = of(share);
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{share}: {found:?}");
        }
        let zeros = t([0.0; 4]);
        let found: Vec<f32> =
            rescaled_guidance(&zeros, &zeros, 3.0, 1.0).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(found, [0.0; 4]);
    }
}
