//! The adversarial term (Yin et al. 2024, "Improved Distribution Matching Distillation", section 4.3): the
//! non-saturating logistic game (Goodfellow et al. 2014) between the generator and a head on the fake score.

use anyhow::Result;
use candle_core::Tensor;

/// What the generator loses: mean softplus(−logit). `logit`: f32 `(B,)`, of the generator's noised samples; positive
/// means "real". The gradient reaches whatever the logits came from.
pub fn generator_adversarial(logit: &Tensor) -> Result<Tensor> {
    Ok(softplus(&logit.neg()?)?.mean_all()?)
}

/// What the discriminator loses: mean softplus(logit_fake) + mean softplus(−logit_real). Both f32 `(B,)`.
pub fn discriminator(logit_fake: &Tensor, logit_real: &Tensor) -> Result<Tensor> {
    Ok((softplus(logit_fake)?.mean_all()? + softplus(&logit_real.neg()?)?.mean_all()?)?)
}

/// The approximate R1 penalty: the mean square of what a little noise on a real picture does to its logit (Lin et al.
/// 2025, "Diffusion Adversarial Post-Training", section 3.4), which needs no second derivative. Both f32 `(B,)`.
pub fn approximate_r1(logit_real: &Tensor, logit_perturbed: &Tensor) -> Result<Tensor> {
    Ok((logit_real - logit_perturbed)?.sqr()?.mean_all()?)
}

/// log(1 + eˣ) as max(x, 0) + log(1 + e^−|x|), which neither overflows nor loses its tail.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok((x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn t(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn number(x: Tensor) -> f32 {
        x.to_scalar().unwrap()
    }

    /// Zero logits: 2·ln 2, ln 2, and −½ for the generator's logit (reference 7.6).
    #[test]
    fn an_undecided_discriminator_has_the_known_losses() {
        let ln2 = std::f32::consts::LN_2;
        assert!((number(discriminator(&t(&[0.0; 3]), &t(&[0.0; 3])).unwrap()) - 2.0 * ln2).abs() < 1e-6);
        let logit = Var::from_tensor(&t(&[0.0])).unwrap();
        let loss = generator_adversarial(&logit).unwrap();
        assert!((number(loss.clone()) - ln2).abs() < 1e-6);
        let slope: Vec<f32> = loss.backward().unwrap().get(&logit).unwrap().to_vec1().unwrap();
        assert!((slope[0] + 0.5).abs() < 1e-6);
    }

    #[test]
    fn softplus_holds_at_both_ends() {
        let values: Vec<f32> = softplus(&t(&[-100.0, -10.0, 10.0, 100.0])).unwrap().to_vec1().unwrap();
        assert!(values[0] == 0.0 || values[0] < 1e-40, "{values:?}");
        assert!((values[1] - 4.539_889e-5).abs() < 2e-7 && (values[2] - 10.000_045).abs() < 1e-5);
        assert_eq!(values[3], 100.0);
        for x in [-100.0, 100.0] {
            let var = Var::from_tensor(&t(&[x])).unwrap();
            let grads = softplus(&var).unwrap().sum_all().unwrap().backward().unwrap();
            let slope: Vec<f32> = grads.get(&var).unwrap().to_vec1().unwrap();
            assert!((slope[0] - f32::from(u8::from(x > 0.0))).abs() < 1e-6, "at {x}: {slope:?}");
        }
    }

    /// With the exact logit log(p/q) of N(0, 1) against N(1, 1), the loss is 2·ln 2 − 2·JSD (Goodfellow et al. 2014,
    /// theorem 1); JSD = 0.110997 by quadrature.
    #[test]
    fn the_best_discriminator_measures_the_jensen_shannon_divergence() {
        let n = 4001;
        let x: Vec<f64> = (0..n).map(|i| -9.5 + 20.0 * i as f64 / (n - 1) as f64).collect();
        let density = |x: f64, m: f64| (-0.5 * (x - m) * (x - m)).exp() / std::f64::consts::TAU.sqrt();
        let logit: Vec<f32> = x.iter().map(|x| (0.5 - x) as f32).collect();
        let on = |sign: f32| -> Vec<f32> {
            let signed: Vec<f32> = logit.iter().map(|l| sign * l).collect();
            softplus(&t(&signed)).unwrap().to_vec1().unwrap()
        };
        let step = x[1] - x[0];
        let integral = |values: &[f32], m: f64| -> f64 {
            x.iter().zip(values).map(|(x, v)| density(*x, m) * f64::from(*v) * step).sum()
        };
        let loss = integral(&on(1.0), 1.0) + integral(&on(-1.0), 0.0);
        let mixture = |x: f64| 0.5 * (density(x, 0.0) + density(x, 1.0));
        let kl = |m: f64| x.iter().map(|&x| density(x, m) * (density(x, m) / mixture(x)).ln() * step).sum::<f64>();
        let jsd = 0.5 * (kl(0.0) + kl(1.0));
        assert!((loss - (2.0 * std::f64::consts::LN_2 - 2.0 * jsd)).abs() < 1e-6, "{loss} {jsd}");
    }

    #[test]
    fn the_penalty_is_a_mean_square() {
        assert_eq!(number(approximate_r1(&t(&[1.0, -2.0]), &t(&[0.0, 1.0])).unwrap()), 5.0);
    }
}
