//! A network plus its preconditioning, answering one question: `D(x, sigma, cond) -> x0`, with x = x0 + sigma·noise.
//! EDM, epsilon, v and x0 models differ only in four coefficients; nothing outside sees a timestep, an alpha or an
//! epsilon.

use crate::condition::{Condition, Way};
use crate::{Backend, Error, Network, NoiseLevels, Result, Told};
use candle_core::{DType, Tensor};

/// What the network's output means.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prediction {
    /// Karras' F with its preconditioning (Karras et al. 2022, table 1). diffusers calls `+c_out` "epsilon" and
    /// `−c_out` "v_prediction" here.
    Edm {
        /// Standard deviation of the data.
        sigma_data: f64,
        /// Whether F enters with a minus.
        negative: bool,
    },
    /// The noise, from the variance-preserving input.
    Epsilon,
    /// √ᾱ·noise − √(1−ᾱ)·x0 (Salimans and Ho 2022).
    V,
    /// x0 itself.
    Sample,
}

impl std::fmt::Display for Prediction {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Prediction::Edm { sigma_data, negative } => {
                write!(f, "{}F of EDM, sigma_data {sigma_data}", if *negative { "minus " } else { "" })
            }
            Prediction::Epsilon => f.write_str("noise (epsilon)"),
            Prediction::V => f.write_str("velocity (v)"),
            Prediction::Sample => f.write_str("picture (x0)"),
        }
    }
}

/// x0 = c_skip·x + c_out·F(c_in·x, c_noise).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients {
    /// Weight of the input.
    pub c_skip: f64,
    /// Weight of the network's output.
    pub c_out: f64,
    /// Weight of the input on its way into the network.
    pub c_in: f64,
    /// What the network gets as its timestep.
    pub c_noise: f64,
}

impl Prediction {
    /// The coefficients at one noise level. `levels` turns sigma into a timestep for all but EDM.
    pub fn coefficients(&self, sigma: f64, levels: &NoiseLevels) -> Coefficients {
        let total = 1.0 + sigma * sigma;
        let c_in = 1.0 / total.sqrt();
        let discrete = |c_skip, c_out| Coefficients { c_skip, c_out, c_in, c_noise: levels.index_of(sigma) };
        match *self {
            Prediction::Edm { sigma_data, negative } => {
                let total = sigma * sigma + sigma_data * sigma_data;
                let c_out = sigma * sigma_data / total.sqrt();
                Coefficients {
                    c_skip: sigma_data * sigma_data / total,
                    c_out: if negative { -c_out } else { c_out },
                    c_in: 1.0 / total.sqrt(),
                    c_noise: 0.25 * sigma.ln(),
                }
            }
            Prediction::Epsilon => discrete(1.0, -sigma),
            Prediction::V => discrete(1.0 / total, -sigma / total.sqrt()),
            Prediction::Sample => discrete(0.0, 1.0),
        }
    }
}

/// A diffusion model as everything else here sees it.
#[derive(Clone, Debug)]
pub struct Denoiser {
    /// The network.
    pub network: Network,
    /// What its output means.
    pub prediction: Prediction,
    /// The noise levels it was trained on.
    pub levels: NoiseLevels,
    /// Samplers clamp x0 to ± this after every step (diffusers' `clip_sample`); training never does.
    pub clip: Option<f64>,
    /// What the network is told where it is to answer without a condition (the row of the class table that label dropout
    /// trained, the empty prompt), one row of each way; none where it never learned to.
    pub unconditional: Option<Condition<Tensor>>,
}

impl Denoiser {
    /// The clean picture behind x `(B, C, H, W)` = x0 + sigma·noise; `sigma`: one for all or one per sample.
    /// Of each way in `cond` one row per sample. Returns `(B, C, H, W)`, around [-1, 1], unclamped.
    pub fn denoise<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        sigma: &[f64],
        cond: &Condition<B::Value>,
    ) -> Result<B::Value> {
        let all = self.coefficients(sigma)?;
        let each = |f: fn(&Coefficients) -> f64| all.iter().map(f).collect::<Vec<f64>>();
        let f = self.network.forward(b, &b.affine(x, &each(|c| c.c_in), 0.0)?, &each(|c| c.c_noise), cond)?;
        let scaled = b.affine(&f, &each(|c| c.c_out), 0.0)?;
        let c_skip = each(|c| c.c_skip);
        if c_skip.iter().all(|c| *c == 0.0) { Ok(scaled) } else { b.add(&b.affine(x, &c_skip, 0.0)?, &scaled) }
    }

    /// The clean picture under classifier-free guidance (Ho and Salimans 2022): uncond + scale·(cond − uncond), in x0
    /// space, where it equals their equation 6 in epsilon's. Scale 1 is the condition's own answer, 0 the answer without;
    /// their paper's w, and the "extra" scale of some tools, is scale − 1. Shapes as in [`Denoiser::denoise`].
    /// Fails where the model was not trained without conditions too.
    pub fn denoise_guided<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        sigma: &[f64],
        cond: &Condition<B::Value>,
        scale: f64,
    ) -> Result<B::Value> {
        if scale == 1.0 {
            return self.denoise(b, x, sigma, cond);
        }
        let [cond, uncond] = self.denoise_both(b, x, sigma, cond)?;
        b.add(&b.affine(&cond, &[scale], 0.0)?, &b.affine(&uncond, &[1.0 - scale], 0.0)?)
    }

    /// The clean picture under the condition, and without one. Arguments as in [`Denoiser::denoise`].
    pub fn denoise_both<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        sigma: &[f64],
        cond: &Condition<B::Value>,
    ) -> Result<[B::Value; 2]> {
        let Some(unconditional) = &self.unconditional else {
            return Err(Error::Config(match self.network.takes().told.is_empty() {
                true => "guidance needs a teacher with classes, and this one has none".into(),
                false => {
                    "guidance needs a teacher that also knows pictures without a class: train it with label dropout, or say \"null_class\": true in its dmd.json where the last row of its class table stands for no class"
                        .into()
                }
            }));
        };
        let without = unconditional.repeated(b.dims(x)[0])?.try_map(|told| b.constant(told))?;
        Ok([self.denoise(b, x, sigma, cond)?, self.denoise(b, x, sigma, &without)?])
    }

    /// What the network's encoder sees in x: one map per resolution, finest first, the last from the bottleneck
    /// ([`Want::Maps`](crate::networks::Want)). Arguments as in [`Denoiser::denoise`].
    pub fn features<B: Backend>(
        &self,
        b: &B,
        x: &B::Value,
        sigma: &[f64],
        cond: &Condition<B::Value>,
    ) -> Result<Vec<B::Value>> {
        let all = self.coefficients(sigma)?;
        let each = |f: fn(&Coefficients) -> f64| all.iter().map(f).collect::<Vec<f64>>();
        self.network.features(b, &b.affine(x, &each(|c| c.c_in), 0.0)?, &each(|c| c.c_noise), cond)
    }

    /// The coefficients of every sample, or of one where all have the same level: one coefficient and one time
    /// embedding then serve the whole batch.
    fn coefficients(&self, sigma: &[f64]) -> Result<Vec<Coefficients>> {
        if sigma.is_empty() || sigma.iter().any(|s| !(*s > 0.0 && s.is_finite())) {
            return Err(Error::Config(format!("sigma {sigma:?}: expected positive numbers, one or one per sample")));
        }
        let sigma = if sigma.windows(2).all(|pair| pair[0] == pair[1]) { &sigma[..1] } else { sigma };
        Ok(sigma.iter().map(|&s| self.prediction.coefficients(s, &self.levels)).collect())
    }

    /// What `n` samples are told where nobody says anything: that there is no condition, if the model knows that, else its
    /// first class.
    pub fn by_default(&self, n: usize) -> Result<Condition<Tensor>> {
        let device = self.network.device();
        match &self.unconditional {
            Some(unconditional) => unconditional.repeated(n),
            None => self.network.takes().told.try_map(|told| {
                let dtype = if matches!(told, Told::Id(_)) { DType::I64 } else { DType::F32 };
                Ok(Tensor::zeros(told.batch(n), dtype, device)?)
            }),
        }
    }

    /// Number of classes, "no class" aside; none for a model without classes.
    pub fn n_classes(&self) -> Option<usize> {
        let null = self.unconditional.as_ref().and_then(|row| row.get(Way::Label));
        self.network.takes().n_classes().map(|n| n - usize::from(null.is_some()))
    }
}

/// A denoiser held at one noise level: noise to picture in one pass, `G(noise) = D(sigma·noise, sigma)`.
#[derive(Clone, Debug)]
pub struct Generator {
    /// The network and its preconditioning.
    pub denoiser: Denoiser,
    /// The noise level it is held at.
    pub sigma: f64,
}

impl Generator {
    /// noise `(B, C, H, W)`, unit normal, to pictures of the same shape around [-1, 1].
    pub fn generate<B: Backend>(&self, b: &B, noise: &B::Value, cond: &Condition<B::Value>) -> Result<B::Value> {
        self.denoiser.denoise(b, &b.affine(noise, &[self.sigma], 0.0)?, &[self.sigma], cond)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise_levels::Betas;

    /// reference/7.3: ᾱ 0.5 is sigma 1; x_t(VP) −0.5656854249, ε −0.88 give x0 0.08, whichever way the network speaks.
    #[test]
    fn every_prediction_gives_the_same_x0() {
        let levels = NoiseLevels::variance_preserving(&Betas::Linear, 1000, [1e-4, 0.02], false).unwrap();
        let (sigma, x, eps, x0) = (1.0f64, -0.5656854249 * 2f64.sqrt(), -0.88, 0.08);
        let alpha = 1.0 / (1.0 + sigma * sigma);
        let v = alpha.sqrt() * eps - (1.0 - alpha).sqrt() * x0;
        for (prediction, output) in [(Prediction::Epsilon, eps), (Prediction::V, v), (Prediction::Sample, x0)] {
            let c = prediction.coefficients(sigma, &levels);
            assert!((c.c_skip * x + c.c_out * output - x0).abs() < 1e-9, "{prediction:?}");
            assert!((c.c_in * x + 0.5656854249).abs() < 1e-9);
        }
    }

    /// Round trips x0 → ε → v → x0 in f64 at every level of a schedule.
    #[test]
    fn round_trips_are_exact_in_f64() {
        let levels = NoiseLevels::variance_preserving(&Betas::Linear, 1000, [1e-4, 0.02], false).unwrap();
        for (t, &sigma) in levels.sigmas().iter().enumerate() {
            let (x0, eps) = (0.3, -1.1);
            let x = x0 + sigma * eps;
            let alpha = 1.0 / (1.0 + sigma * sigma);
            let v = alpha.sqrt() * eps - (1.0 - alpha).sqrt() * x0;
            for (prediction, output) in [(Prediction::Epsilon, eps), (Prediction::V, v)] {
                let c = prediction.coefficients(sigma, &levels);
                assert!((c.c_skip * x + c.c_out * output - x0).abs() < 1e-12, "t {t} {prediction:?}");
                assert!((c.c_noise - t as f64).abs() < 1e-9);
            }
        }
    }

    /// With F = 0, EDM's D is the exact denoiser of N(0, σ_data²): σ_data²·x/(σ² + σ_data²).
    #[test]
    fn edm_with_a_silent_network_is_the_gaussian_denoiser() {
        let levels = NoiseLevels::karras(1000, 0.002, 80.0, 7.0).unwrap();
        for sigma in [0.002, 0.5, 2.5, 80.0] {
            let c = Prediction::Edm { sigma_data: 0.5, negative: false }.coefficients(sigma, &levels);
            assert!((c.c_skip - 0.25 / (sigma * sigma + 0.25)).abs() < 1e-15);
            assert!((c.c_noise - sigma.ln() / 4.0).abs() < 1e-15);
            // c_out² + σ²·... : the training target of F has unit variance (Karras et al. 2022, equation 144)
            assert!((c.c_in * c.c_in * (sigma * sigma + 0.25) - 1.0).abs() < 1e-12);
        }
    }
}
