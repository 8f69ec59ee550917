//! Operations on pictures with channels last, `(B, H, W, C)` contiguous, forward and backward apart, for a
//! [`Tape`](crate::interpret::Tape): kernels of our own and cuDNN on NVIDIA GPUs, and everywhere else composites of candle's
//! operations, which the tests compare them with. Pictures are f32 or bf16; everything else is f32.
//!
//! Each checks what it is given before a kernel reads it: all operands lie on one device, contiguous, in the shapes and
//! types stated.
//!
//! A convolution leaves its bias to whoever reads its result next, since adding it alone would be another pass over
//! memory: a `bias` here is `(1 or B, C)`, and is added on the way in.

use super::{conv2d, upsample_2x};
use crate::shapes;
use candle_core::{D, DType, Result, Tensor, Var, bail};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(all(test, feature = "cuda"))]
mod tests;

/// Runs the kernel where the tensor is on a GPU.
macro_rules! on_gpu {
    ($tensor:expr, $call:expr) => {
        #[cfg(feature = "cuda")]
        if $tensor.device().is_cuda() {
            return $call;
        }
    };
}

/// Channels come in runs of so many, so that a kernel can read 16 bytes at once.
pub const RUN: usize = 8;

/// f32 `(B, c, H, W)` to `(B, H, W, padded)`, zeros beyond c.
pub fn to_channels_last(x: &Tensor, padded: usize, dtype: DType) -> Result<Tensor> {
    let more = match (x.dims(), x.dtype()) {
        (&[_, c, _, _], DType::F32) if padded >= c => padded - c,
        _ => bail!("to_channels_last: {:?} {:?} to {padded} channels", x.dims(), x.dtype()),
    };
    on_gpu!(x, cuda::to_channels_last(x, padded, dtype));
    last(&x.pad_with_zeros(1, 0, more)?, dtype)
}

/// `(B, H, W, padded)` plus bias to f32 `(B, c, H, W)`.
pub fn from_channels_last(x: &Tensor, bias: Option<&Tensor>, c: usize) -> Result<Tensor> {
    if picture(x)?[3] < c {
        bail!("from_channels_last: {:?} has no {c} channels", x.dims());
    }
    check_bias((x, bias), c)?;
    on_gpu!(x, cuda::from_channels_last(x, bias, c));
    let y = first(x)?.narrow(1, 0, c)?.contiguous()?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.narrow(1, 0, c)?.unsqueeze(2)?.unsqueeze(3)?),
        None => Ok(y),
    }
}

/// A kernel f32 `(o, c, kh, kw)` as `(O, kh, kw, C)`, zeros beyond o and c.
pub fn pack(w: &Tensor, [o, c]: [usize; 2], dtype: DType) -> Result<Tensor> {
    if !matches!(*w.dims(), [own_o, own_c, _, _] if own_o <= o && own_c <= c) {
        bail!("pack: {:?} to {o} outputs and {c} inputs", w.dims());
    }
    on_gpu!(w, cuda::pack(w, [o, c], dtype));
    last(&w.pad_with_zeros(0, 0, o - w.dim(0)?)?.pad_with_zeros(1, 0, c - w.dim(1)?)?, dtype)
}

/// And its gradient back, f32 `(o, c, kh, kw)`.
pub fn unpack(dw: &Tensor, [o, c]: [usize; 2]) -> Result<Tensor> {
    if !matches!(*dw.dims(), [padded_o, _, _, padded_c] if o <= padded_o && c <= padded_c) {
        bail!("unpack: {:?} to {o} outputs and {c} inputs", dw.dims());
    }
    on_gpu!(dw, cuda::unpack(dw, [o, c]));
    first(dw)?.narrow(0, 0, o)?.narrow(1, 0, c)?.contiguous()
}

/// The sizes of a convolution that its tensors do not tell.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// Step between two outputs, the same in both directions.
    pub stride: usize,
    /// Zeros on each side.
    pub padding: usize,
}

impl Steps {
    /// `(B, H', W', O)` of a picture `(B, H, W, C)` and a kernel `(O, kh, kw, C)`.
    fn result(self, x: &[usize], w: &[usize]) -> Result<[usize; 4]> {
        let (&[b, h, w_, c], &[o, kh, kw, wc]) = (x, w) else { bail!("convolve: picture {x:?} and kernel {w:?}") };
        let rule = shapes::conv2d(&[b, c, h, w_], &[o, wc, kh, kw], self.stride, [self.padding; 4]);
        match rule.as_deref() {
            Ok(&[b, o, h, w]) => Ok([b, h, w, o]),
            _ => bail!("convolve: picture {x:?}, kernel {w:?} and {self:?} do not go together"),
        }
    }
}

/// x `(B, H, W, C)` and w `(O, kh, kw, C)` to `(B, H', W', O)`.
pub fn convolve(x: &Tensor, w: &Tensor, steps: Steps) -> Result<Tensor> {
    steps.result(x.dims(), w.dims())?;
    check(w, w.dims(), x.dtype(), x)?;
    on_gpu!(x, cuda::convolve(x, w, steps));
    last(&conv2d(&first(x)?, &first(w)?, None, steps.stride, steps.padding)?, x.dtype())
}

/// The gradient of x, of its shape.
pub fn convolve_backward_data(dy: &Tensor, w: &Tensor, x: &[usize], steps: Steps) -> Result<Tensor> {
    check(dy, &steps.result(x, w.dims())?, dy.dtype(), dy)?;
    check(w, w.dims(), dy.dtype(), dy)?;
    on_gpu!(dy, cuda::convolve_backward_data(dy, w, x, steps));
    let var = Var::zeros((x[0], x[3], x[1], x[2]), DType::F32, dy.device())?;
    let y = conv2d(&var, &first(w)?, None, steps.stride, steps.padding)?;
    last(&gradient(&y, &first(dy)?, &var)?, dy.dtype())
}

/// The gradient of w, of its shape.
pub fn convolve_backward_filter(x: &Tensor, dy: &Tensor, w: &[usize], steps: Steps) -> Result<Tensor> {
    check(dy, &steps.result(x.dims(), w)?, x.dtype(), x)?;
    on_gpu!(x, cuda::convolve_backward_filter(x, dy, w, steps));
    let var = Var::zeros((w[0], w[3], w[1], w[2]), DType::F32, x.device())?;
    let y = conv2d(&first(x)?, &var, None, steps.stride, steps.padding)?;
    last(&gradient(&y, &first(dy)?, &var)?, x.dtype())
}

/// A group norm, its parameters f32 `(C,)`.
#[derive(Clone, Debug)]
pub struct Norm {
    /// What the normalised channels are multiplied by.
    pub weight: Tensor,
    /// What is added to them.
    pub beta: Tensor,
    /// Number of groups; divides C.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// Whether [`group_norm`] takes maps of this shape.
pub fn norm_fits(x: &Tensor, groups: usize) -> bool {
    if !matches!(*x.dims(), [_, _, _, c] if groups > 0 && c.is_multiple_of(groups)) {
        return false;
    }
    on_gpu!(x, cuda::norm_fits(x, groups));
    true
}

/// The normalised picture, and per picture and group `(B, groups, 2)` the mean and 1/√(variance + eps).
pub fn group_norm(x: &Tensor, bias: Option<&Tensor>, norm: &Norm) -> Result<(Tensor, Tensor)> {
    norm.check(x, bias)?;
    on_gpu!(x, cuda::group_norm(x, bias, norm));
    let v = with_bias(x, bias)?;
    let grouped = norm.grouped(&v)?;
    let mean = grouped.mean_keepdim(D::Minus1)?;
    let variance = grouped.broadcast_sub(&mean)?.sqr()?.mean_keepdim(D::Minus1)?;
    let stats = Tensor::cat(&[mean, (variance + norm.eps)?.sqrt()?.recip()?], 2)?;
    let z = norm.affine(&norm.normal(&v, &stats)?)?;
    Ok((last(&if norm.silu { z.silu()? } else { z }, x.dtype())?, stats))
}

/// What [`group_norm_backward`] reads besides the gradient.
pub struct NormInput<'a> {
    /// What was normalised.
    pub x: &'a Tensor,
    /// And its bias.
    pub bias: Option<&'a Tensor>,
    /// What [`group_norm`] returned beside the picture.
    pub stats: &'a Tensor,
}

/// The gradient of x plus what it has already (`existing`); and `(3, B, C)`, sums over the pixels of a picture: of weight,
/// of beta, and of the bias (only where there is one).
pub fn group_norm_backward(
    input: &NormInput,
    norm: &Norm,
    dy: &Tensor,
    existing: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    norm.check(input.x, input.bias)?;
    check(input.stats, &[input.x.dim(0)?, norm.groups, 2], DType::F32, input.x)?;
    for grad in std::iter::once(dy).chain(existing) {
        check(grad, input.x.dims(), input.x.dtype(), input.x)?;
    }
    on_gpu!(dy, cuda::group_norm_backward(input, norm, dy, existing));
    let v = with_bias(input.x, input.bias)?;
    let normal = norm.normal(&v, input.stats)?;
    let mut dz = first(dy)?;
    if norm.silu {
        // silu′(z) = s·(1 + z·(1 − s)), s = sigmoid(z).
        let z = norm.affine(&normal)?;
        let s = ((z.neg()?.exp()? + 1.0)?).recip()?;
        dz = (dz * (&s * ((z * (1.0 - &s)?)? + 1.0)?)?)?;
    }
    let over_pixels = |t: &Tensor| t.sum((2, 3));
    let along = dz.mul(&normal)?;
    let (of_weight, of_beta) = (over_pixels(&along)?, over_pixels(&dz)?);
    let scaled = dz.broadcast_mul(&per_channel(&norm.weight)?)?;
    let mean = |t: &Tensor| norm.grouped(t)?.mean_keepdim(D::Minus1);
    let rest = norm.grouped(&normal)?.broadcast_mul(&mean(&(&scaled * &normal)?)?)?;
    let dx = norm.grouped(&scaled)?.broadcast_sub(&mean(&scaled)?)?.sub(&rest)?;
    let dx = dx.broadcast_mul(&input.stats.narrow(2, 1, 1)?)?.reshape(v.dims())?;
    let totals = Tensor::stack(&[&of_weight, &of_beta, &over_pixels(&dx)?], 0)?;
    let dx = last(&dx, dy.dtype())?;
    Ok((existing.map_or(Ok(dx.clone()), |existing| dx.clone() + existing)?, totals))
}

impl Norm {
    fn check(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        let [_, _, _, c] = picture(x)?;
        if self.groups == 0 || !c.is_multiple_of(self.groups) {
            bail!("group norm: {c} channels in {} groups", self.groups);
        }
        check(&self.weight, &[c], DType::F32, x)?;
        check(&self.beta, &[c], DType::F32, x)?;
        check_bias((x, bias), c)
    }

    /// `(B, C, H, W)` to `(B, groups, values)`.
    fn grouped(&self, x: &Tensor) -> Result<Tensor> {
        x.reshape((x.dim(0)?, self.groups, x.elem_count() / x.dim(0)?.max(1) / self.groups))
    }

    fn normal(&self, x: &Tensor, stats: &Tensor) -> Result<Tensor> {
        let centred = self.grouped(x)?.broadcast_sub(&stats.narrow(2, 0, 1)?)?;
        centred.broadcast_mul(&stats.narrow(2, 1, 1)?)?.reshape(x.dims())
    }

    fn affine(&self, normal: &Tensor) -> Result<Tensor> {
        normal.broadcast_mul(&per_channel(&self.weight)?)?.broadcast_add(&per_channel(&self.beta)?)
    }
}

/// A picture with the bias that it still lacks.
pub type Biased<'a> = (&'a Tensor, Option<&'a Tensor>);

/// The sum of two pictures.
pub fn add(x: Biased, y: Biased) -> Result<Tensor> {
    check(y.0, x.0.dims(), x.0.dtype(), x.0)?;
    whole(x)?;
    whole(y)?;
    on_gpu!(x.0, cuda::add(x, Some(y)));
    last(&(with_bias(x.0, x.1)? + with_bias(y.0, y.1)?)?, x.0.dtype())
}

/// The picture with its bias.
pub fn settle(x: Biased) -> Result<Tensor> {
    whole(x)?;
    on_gpu!(x.0, cuda::add(x, None));
    last(&with_bias(x.0, x.1)?, x.0.dtype())
}

/// Joins `(B, H, W, C₁)` and `(B, H, W, C₂)` along channels.
pub fn concat(x: Biased, y: Biased) -> Result<Tensor> {
    let [b, h, w, _] = picture(x.0)?;
    check(y.0, &[b, h, w, picture(y.0)?[3]], x.0.dtype(), x.0)?;
    whole(x)?;
    whole(y)?;
    on_gpu!(x.0, cuda::concat(x, y));
    last(&Tensor::cat(&[with_bias(x.0, x.1)?, with_bias(y.0, y.1)?], 1)?, x.0.dtype())
}

/// Takes `(B, H, W, C)` apart: the first `c` channels, and the others.
pub fn split(z: &Tensor, c: usize) -> Result<(Tensor, Tensor)> {
    if picture(z)?[3] < c {
        bail!("split: {:?} has no {c} channels", z.dims());
    }
    on_gpu!(z, cuda::split(z, c));
    Ok((z.narrow(3, 0, c)?.contiguous()?, z.narrow(3, c, z.dim(3)? - c)?.contiguous()?))
}

/// Nearest neighbour, height and width doubled.
pub fn upsample(x: Biased) -> Result<Tensor> {
    whole(x)?;
    on_gpu!(x.0, cuda::upsample(x));
    last(&upsample_2x(&with_bias(x.0, x.1)?)?, x.0.dtype())
}

/// The sums of blocks of 2×2.
pub fn upsample_backward(dy: &Tensor) -> Result<Tensor> {
    let [b, h, w, c] = picture(dy)?;
    if h % 2 != 0 || w % 2 != 0 {
        bail!("upsample_backward: {h}x{w} is not even");
    }
    on_gpu!(dy, cuda::upsample_backward(dy));
    dy.reshape(vec![b, h / 2, 2, w / 2, 2, c])?.sum(4)?.sum(2)
}

/// Sums over the rows of each part, `(G, rows, C)` to f32 `(G, C)`.
pub fn row_sums(x: &Tensor) -> Result<Tensor> {
    x.dims3()?;
    on_gpu!(x, cuda::row_sums(x));
    x.to_dtype(DType::F32)?.sum(1)
}

/// Attention over pixels, with heads as runs of channels.
pub struct Attention {
    /// Number of heads; divides C.
    pub heads: usize,
    /// Queries, keys and values, `(B, H, W, C)`.
    pub qkv: [Tensor; 3],
    /// Biases `(1, C)` of queries and values. One of the keys would change nothing.
    pub biases: [Option<Tensor>; 2],
}

/// Whether [`Attention::forward`] takes maps of this shape; there is no composite of it here.
pub fn attention_fits(q: &Tensor, heads: usize) -> bool {
    if heads == 0 {
        return false;
    }
    on_gpu!(q, cuda::attention_fits(q, heads));
    let _ = q;
    false
}

impl Attention {
    /// The picture, and what the gradient needs: `(B, heads, pixels)`, for each query the logarithm of the sum of
    /// exponentials.
    pub fn forward(&self) -> Result<(Tensor, Tensor)> {
        self.check()?;
        on_gpu!(self.qkv[0], cuda::attention(self));
        bail!("attention of channels last: only on a GPU")
    }

    /// The gradients of queries, keys and values.
    pub fn backward(&self, o: &Tensor, lse: &Tensor, dy: &Tensor) -> Result<[Tensor; 3]> {
        let [b, h, w, _] = self.check()?;
        let q = &self.qkv[0];
        for picture in [o, dy] {
            check(picture, q.dims(), q.dtype(), q)?;
        }
        check(lse, &[b, self.heads, h * w], DType::F32, q)?;
        on_gpu!(dy, cuda::attention_backward(self, o, lse, dy));
        bail!("attention of channels last: only on a GPU")
    }

    fn check(&self) -> Result<[usize; 4]> {
        let [q, k, v] = &self.qkv;
        let dims = picture(q)?;
        if self.heads == 0 || !dims[3].is_multiple_of(self.heads) {
            bail!("attention: {} channels in {} heads", dims[3], self.heads);
        }
        for other in [k, v] {
            check(other, &dims, q.dtype(), q)?;
        }
        for bias in self.biases.iter().flatten() {
            check(bias, &[1, dims[3]], DType::F32, q)?;
        }
        Ok(dims)
    }
}

/// The sizes of a picture, f32 or bf16.
fn picture(x: &Tensor) -> Result<[usize; 4]> {
    match (x.dims(), x.dtype()) {
        (&[b, h, w, c], DType::F32 | DType::BF16) => Ok([b, h, w, c]),
        (dims, dtype) => bail!("{dims:?} {dtype:?} is no picture with channels last"),
    }
}

/// A picture whose bias has a value for each channel.
fn whole((x, bias): Biased) -> Result<()> {
    check_bias((x, bias), picture(x)?[3])
}

/// Refuses a bias that is not `(1 or B, c)`.
fn check_bias((x, bias): Biased, c: usize) -> Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    let rows = if bias.dims().first() == Some(&1) { 1 } else { x.dim(0)? };
    check(bias, &[rows, c], DType::F32, x)
}

/// Refuses an operand that a kernel would read wrongly, or beyond its end.
fn check(t: &Tensor, dims: &[usize], dtype: DType, beside: &Tensor) -> Result<()> {
    if t.dims() != dims || t.dtype() != dtype {
        bail!("{:?} {:?} beside {:?}, expected {dims:?} {dtype:?}", t.dims(), t.dtype(), beside.dims());
    }
    if !t.is_contiguous() || !t.device().same_device(beside.device()) {
        bail!("{dims:?} beside {:?} must lie contiguous, and on the same device", beside.dims());
    }
    Ok(())
}

/// f32 `(B, C, H, W)` of a picture or kernel with channels last.
fn first(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 3, 1, 2))?.to_dtype(DType::F32)?.contiguous()
}

fn last(x: &Tensor, dtype: DType) -> Result<Tensor> {
    x.permute((0, 2, 3, 1))?.to_dtype(dtype)?.contiguous()
}

/// f32 `(B, C, H, W)`.
fn with_bias(x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => first(x)?.broadcast_add(&bias.unsqueeze(2)?.unsqueeze(3)?),
        None => first(x),
    }
}

fn per_channel(v: &Tensor) -> Result<Tensor> {
    v.reshape((1, v.elem_count(), 1, 1))
}

/// What `dy` means for the variable.
fn gradient(y: &Tensor, dy: &Tensor, var: &Var) -> Result<Tensor> {
    let mut grads = (y * dy.detach())?.sum_all()?.backward()?;
    grads.remove(var).ok_or_else(|| candle_core::Error::Msg("no gradient reached the variable".into()))
}
