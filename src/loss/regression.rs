//! Distances of the regression term (Yin et al. 2024, DMD, equation 9): how far the generator's picture of a noise is
//! from the teacher's picture of the same noise.

use anyhow::{Result, ensure};
use candle_core::Tensor;

/// mean (x − target)². f32 `(B, C, H, W)`; the gradient reaches `x` only.
pub fn l2(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    Ok((x - target.detach())?.sqr()?.mean_all()?)
}

/// mean over the batch of √(‖x − target‖² + c²) − c with c = 0.00054·√P, P values a picture (Song and Dhariwal 2024,
/// "Improved Techniques for Training Consistency Models", section 3.3), divided by √P so that the size of a picture does
/// not change its weight. f32 `(B, C, H, W)`; the gradient reaches `x` only.
pub fn pseudo_huber(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    const C: f64 = 0.00054;
    let square = (x - target.detach())?.sqr()?.mean_keepdim((1, 2, 3))?;
    Ok(((square + C * C)?.sqrt()? - C)?.mean_all()?)
}

/// Perceptual distance between two lists of feature maps (Zhang et al. 2018, LPIPS, equation 1, without learned
/// weights): at every position the channels are brought to unit length, squared differences are summed over channels,
/// averaged over positions and batch, then over maps. Maps are f32 `(B, C, …)`; the gradient reaches those of `x` only.
pub fn perceptual(x: &[Tensor], target: &[Tensor]) -> Result<Tensor> {
    ensure!(!x.is_empty() && x.len() == target.len(), "{} and {} feature maps to compare", x.len(), target.len());
    let mut sum: Option<Tensor> = None;
    for (x, target) in x.iter().zip(target) {
        let distance = (unit(x)? - unit(&target.detach())?)?.sqr()?.sum(1)?.mean_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + distance)?,
            None => distance,
        });
    }
    let sum = sum.expect("the list is not empty, as was checked above");
    Ok((sum / x.len() as f64)?)
}

/// Channels at unit length; a map without channels to speak of stays near zero.
fn unit(map: &Tensor) -> Result<Tensor> {
    let length = (map.sqr()?.sum_keepdim(1)? + 1e-10)?.sqrt()?;
    Ok(map.broadcast_div(&length)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn t(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    fn number(x: Tensor) -> f64 {
        f64::from(x.to_scalar::<f32>().unwrap())
    }

    #[test]
    fn distances_are_what_their_formulas_say() {
        let (x, y) = (t(&[1.0, 2.0, 3.0, 4.0], &[2, 1, 1, 2]), t(&[0.0, 2.0, 3.0, 1.0], &[2, 1, 1, 2]));
        assert_eq!(number(l2(&x, &y).unwrap()), 2.5);
        let c = 0.00054f64;
        let expected = 0.5 * ((0.5 + c * c).sqrt() + (4.5 + c * c).sqrt()) - c;
        assert!((number(pseudo_huber(&x, &y).unwrap()) - expected).abs() < 1e-6);
        assert!(number(pseudo_huber(&x, &x).unwrap()).abs() < 1e-9);
    }

    /// Orthogonal unit vectors are √2 apart, whatever their length; equal directions are not.
    #[test]
    fn the_perceptual_distance_compares_directions() {
        let a = t(&[3.0, 0.0], &[1, 2, 1, 1]);
        let b = t(&[0.0, 0.1], &[1, 2, 1, 1]);
        assert!((number(perceptual(std::slice::from_ref(&a), &[b]).unwrap()) - 2.0).abs() < 1e-5);
        assert!(number(perceptual(std::slice::from_ref(&a), &[(&a * 7.0).unwrap()]).unwrap()).abs() < 1e-9);
        assert!(perceptual(&[a], &[]).is_err());
    }

    #[test]
    fn no_gradient_reaches_the_target() {
        let var = |v: f32| Var::from_tensor(&t(&[v, 1.0], &[1, 2, 1, 1])).unwrap();
        let (x, y) = (var(0.2), var(0.7));
        let of = |v: &Var| vec![v.as_tensor().clone()];
        for loss in [l2(&x, &y), pseudo_huber(&x, &y), perceptual(&of(&x), &of(&y))] {
            let grads = loss.unwrap().backward().unwrap();
            assert!(grads.get(&x).is_some() && grads.get(&y).is_none());
        }
    }
}
