//! What is not worth a kernel of its own: short composites of candle's operations, on any device, with candle's gradients.

use super::fits;
use crate::shapes;
use candle_core::{DType, Result, Tensor};

/// Numbers `(B,)` to `(B, 2·F)`, or `(B, n)` to `(B, n·2·F)`, f32: sines and cosines of `number · frequencies`, cosines
/// first when `flip`.
pub fn sinusoid(ids: &Tensor, frequencies: &Tensor, flip: bool) -> Result<Tensor> {
    let shape = fits(shapes::sinusoid(ids.dims(), frequencies.elem_count()))?;
    let ids = ids.to_dtype(DType::F32)?.flatten_all()?.unsqueeze(1)?;
    let angles = ids.broadcast_mul(&frequencies.to_device(ids.device())?.unsqueeze(0)?)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    if flip { Tensor::cat(&[cos, sin], 1) } else { Tensor::cat(&[sin, cos], 1) }?.reshape(shape)
}

/// A sum where axes of length 1 are repeated.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.dims() == y.dims() { x + y } else { x.broadcast_add(y) }
}

/// x `(B, C, H, W)` plus v `(B or 1, C)` at every pixel.
pub fn add_per_channel(x: &Tensor, v: &Tensor) -> Result<Tensor> {
    x.broadcast_add(&at_every_pixel(v)?)
}

/// x·(1 + scale) + shift, x `(B, C, H, W)`, scale and shift `(B or 1, C)`.
pub fn modulate(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&(at_every_pixel(scale)? + 1.0)?)?.broadcast_add(&at_every_pixel(shift)?)
}

/// x `(B, C, H, W)` times v `(B or 1, C)` at every pixel.
pub fn mul_per_channel(x: &Tensor, v: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&at_every_pixel(v)?)
}

fn at_every_pixel(v: &Tensor) -> Result<Tensor> {
    v.unsqueeze(2)?.unsqueeze(3)
}

/// x·mul + add, with one factor for the whole batch or one per sample.
pub fn affine(x: &Tensor, mul: &[f64], add: f64) -> Result<Tensor> {
    if mul.windows(2).all(|pair| pair[0] == pair[1]) {
        return x.affine(mul[0], add);
    }
    let mut shape = vec![1; x.rank()];
    shape[0] = mul.len();
    let mul: Vec<f32> = mul.iter().map(|&m| m as f32).collect();
    let scaled = x.broadcast_mul(&Tensor::from_vec(mul, shape, x.device())?.to_dtype(x.dtype())?)?;
    if add == 0.0 { Ok(scaled) } else { scaled + add }
}

/// `(B, C, H, W)` with a row of zeros below and a column on the right.
pub fn pad_right_bottom(x: &Tensor) -> Result<Tensor> {
    x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)
}
