//! The noise of pictures: numbers by [`dmd_noise`], which `docs/noise.md` defines, in the shapes that a graph takes.

use ndarray::Array4;

pub use dmd_noise::{PICTURE_NOISE, REFINING_NOISE, Stream};

/// The unit normal noise `(batch, C, H, W)` of the pictures `first .. first + batch` of a seed, `shape` being
/// `[C, H, W]`.
pub fn picture_noise(seed: u64, first: u64, batch: usize, shape: [usize; 3]) -> Array4<f32> {
    noise(seed, PICTURE_NOISE, first, batch, shape)
}

/// The unit normal noise `(batch, C, H, W)` that a few-step generator adds before its pass number `pass` (from 1; the
/// first pass, 0, starts from [`picture_noise`]), for the pictures `first .. first + batch` of a seed.
pub fn refining_noise(seed: u64, pass: usize, first: u64, batch: usize, shape: [usize; 3]) -> Array4<f32> {
    noise(seed, REFINING_NOISE + pass as u32, first, batch, shape)
}

/// What pass number `pass` of a few-step file reads for picture `index` of a seed, where the first pass reads
/// [`picture_noise`]: `x/sigma + eps`, the picture so far noised to the pass's level and divided by it. `eps` is
/// [`refining_noise`]. Writes as many values into `input` as both slices have.
///
/// ```
/// use dmd_runtime::noise::{refine, refining_noise};
///
/// let (mut input, eps) = ([0.0; 2], refining_noise(7, 1, 0, 1, [1, 1, 2]));
/// refine(7, 1, 0, &[0.5, -0.5], 2.0, &mut input);
/// assert_eq!(input, [0.25 + eps[[0, 0, 0, 0]], -0.25 + eps[[0, 0, 0, 1]]]);
/// ```
pub fn refine(seed: u64, pass: usize, index: u64, picture: &[f32], sigma: f64, input: &mut [f32]) {
    Stream::new(seed, REFINING_NOISE + pass as u32, index).fill_normal(input);
    input.iter_mut().zip(picture).for_each(|(input, x)| *input += x / sigma as f32);
}

fn noise(seed: u64, purpose: u32, first: u64, batch: usize, [channels, height, width]: [usize; 3]) -> Array4<f32> {
    let mut noise = Array4::zeros((batch, channels, height, width));
    for (i, mut picture) in noise.outer_iter_mut().enumerate() {
        let values = picture.as_slice_mut().expect("a fresh array is contiguous");
        Stream::new(seed, purpose, first.wrapping_add(i as u64)).fill_normal(values);
    }
    noise
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_the_same_noise_in_any_batch() {
        let all = picture_noise(5, 0, 6, [3, 4, 5]);
        let tail = picture_noise(5, 4, 2, [3, 4, 5]);
        assert_eq!(all.slice(ndarray::s![4.., .., .., ..]), tail);
        assert_eq!(picture_noise(5, 0, 0, [3, 4, 5]).len(), 0);
    }
}
