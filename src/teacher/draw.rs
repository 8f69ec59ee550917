//! What one update draws: a whole batch at once, so that running it in parts changes nothing but the memory it takes.

use anyhow::Result;
use candle_core::Tensor;

/// Pictures and the noise to show them in.
pub struct Draw {
    /// Indices of the pictures.
    pub picks: Vec<usize>,
    /// Which are mirrored.
    pub flips: Vec<bool>,
    /// Which are shown without their class.
    pub dropped: Vec<bool>,
    /// Noise levels.
    pub sigma: Vec<f64>,
    /// Unit normal `(B, C, H, W)`.
    pub noise: Tensor,
}

impl Draw {
    /// Pictures as they are.
    pub fn plain(picks: Vec<usize>, sigma: Vec<f64>, noise: Tensor) -> Self {
        let never = vec![false; picks.len()];
        Draw { picks, flips: never.clone(), dropped: never, sigma, noise }
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
            dropped: self.dropped[part.clone()].to_vec(),
            sigma: self.sigma[part].to_vec(),
            noise: self.noise.narrow(0, first, len)?,
        })
    }
}
