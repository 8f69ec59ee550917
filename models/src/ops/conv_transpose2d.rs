//! Transposed convolution as a convolution: the pixels moved apart, zeros between them, and the kernel turned round.

use super::{conv2d, fits};
use crate::shapes;
use candle_core::{Result, Tensor};

/// x `(B, C, H, W)`, weight `(C, O, kh, kw)`, bias `(O,)`: every pixel adds a multiple of the kernel, `stride` apart, and
/// `pads` are cut off above, left, below and right.
pub fn conv_transpose2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    pads: [usize; 4],
) -> Result<Tensor> {
    let dims = fits(shapes::conv_transpose2d(x.dims(), weight.dims(), stride, pads))?;
    let ((b, c, h, w), (_, _, kh, kw)) = (x.dims4()?, weight.dims4()?);
    let apart = x.contiguous()?.reshape(vec![b, c, h, 1, w, 1])?;
    let apart = apart.pad_with_zeros(3, 0, stride - 1)?.pad_with_zeros(5, 0, stride - 1)?;
    let apart = apart.reshape((b, c, h * stride, w * stride))?;
    let apart = apart.narrow(2, 0, (h - 1) * stride + 1)?.narrow(3, 0, (w - 1) * stride + 1)?;
    let padded = apart.pad_with_zeros(2, kh - 1, kh - 1)?.pad_with_zeros(3, kw - 1, kw - 1)?;
    let whole = conv2d(&padded, &weight.transpose(0, 1)?.contiguous()?.flip(&[2, 3])?, bias, 1, 0)?;
    whole.narrow(2, pads[0], dims[2])?.narrow(3, pads[1], dims[3])?.contiguous()
}
