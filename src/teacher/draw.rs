//! What one update draws: a whole batch at once, so that running it in parts changes nothing but the memory it takes.

use anyhow::Result;
use candle_core::Tensor;

/// Pictures and the noise to show them in.
pub struct Draw {
    /// Indices of the pictures.
    pub picks: Vec<usize>,
    /// Which are mirrored.
    pub flips: Vec<bool>,
    /// Which of their captions is told, as a part of all, in [0, 1).
    pub chosen: Vec<f64>,
    /// Which are shown without their class or caption.
    pub dropped: Vec<bool>,
    /// What decides where latents are distributions, unit normal `(B, C, H, W)`.
    pub latents: Option<Tensor>,
    /// Noise levels.
    pub sigma: Vec<f64>,
    /// Unit normal `(B, C, H, W)`.
    pub noise: Tensor,
}

impl Draw {
    /// Pictures as they are.
    pub fn plain(picks: Vec<usize>, sigma: Vec<f64>, noise: Tensor) -> Self {
        let (never, first) = (vec![false; picks.len()], vec![0.0; picks.len()]);
        Draw { picks, flips: never.clone(), chosen: first, dropped: never, latents: None, sigma, noise }
    }

    /// The batch in `n` parts, or fewer; the last may be smaller than the others.
    pub fn parts(&self, n: usize) -> Result<Vec<Draw>> {
        let all = self.picks.len();
        let len = all.div_ceil(n);
        (0..all).step_by(len).map(|first| self.part(first, len.min(all - first))).collect()
    }

    fn part(&self, first: usize, len: usize) -> Result<Draw> {
        let part = first..first + len;
        Ok(Draw {
            picks: self.picks[part.clone()].to_vec(),
            flips: self.flips[part.clone()].to_vec(),
            chosen: self.chosen[part.clone()].to_vec(),
            dropped: self.dropped[part.clone()].to_vec(),
            latents: self.latents.as_ref().map(|noise| noise.narrow(0, first, len)).transpose()?,
            sigma: self.sigma[part].to_vec(),
            noise: self.noise.narrow(0, first, len)?,
        })
    }
}
