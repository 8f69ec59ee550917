//! The same on NVIDIA GPUs.

use super::super::gpu::cudnn::{self, Pass};
use super::super::gpu::{
    ATTENTION, Arg, Grid, NORM, POINTWISE, address, address_or_null, device_of, launch, suffixed, unwritten,
};
use super::{Attention, Biased, Norm, NormInput, Steps};
use candle_core::{DType, Result, Tensor, bail};

/// Values of a 16-byte access.
fn run_of(dtype: DType) -> usize {
    16 / dtype.size_in_bytes()
}

/// Values counted in 32 bits, as the kernels count them.
fn count(n: usize) -> Result<Arg> {
    match i32::try_from(n) {
        Ok(n) => Ok(Arg::I32(n)),
        Err(_) => bail!("a map of {n} values is too large for the GPU's kernels: lower the batch"),
    }
}

/// Address and stride of a bias.
fn bias_args(bias: Option<&Tensor>) -> Result<[Arg; 2]> {
    let stride = match bias {
        Some(bias) if bias.dim(0)? > 1 => bias.dim(1)?,
        _ => 0,
    };
    Ok([address_or_null(bias)?, Arg::I32(stride as i32)])
}

fn pointwise(x: &Tensor, function: &str, dtype: DType, items: usize, args: &[Arg]) -> Result<()> {
    launch(&device_of(x)?, POINTWISE, &suffixed(function, dtype)?, Grid::over(items), args)
}

/// Refuses maps that the kernels cannot read 16 bytes at a time.
fn vectors(x: &Tensor) -> Result<usize> {
    let (run, channels) = (run_of(x.dtype()), x.dim(x.rank() - 1)?);
    if !channels.is_multiple_of(run) {
        bail!("{channels} channels are no multiple of {run}");
    }
    count(x.elem_count())?;
    Ok(x.elem_count() / run)
}

pub(super) fn to_channels_last(x: &Tensor, padded: usize, dtype: DType) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (b, c, h, w) = x.dims4()?;
    let y = unwritten((b, h, w, padded), dtype, x.device())?;
    let total = y.elem_count();
    let args = [address(&x)?, address(&y)?, count(h * w)?, count(c)?, count(padded)?, count(total)?];
    pointwise(&x, "to_channels_last", dtype, total, &args)?;
    Ok(y)
}

pub(super) fn from_channels_last(x: &Tensor, bias: Option<&Tensor>, c: usize) -> Result<Tensor> {
    let (b, h, w, padded) = x.dims4()?;
    let y = unwritten((b, c, h, w), DType::F32, x.device())?;
    let total = y.elem_count();
    let [bias, stride] = bias_args(bias)?;
    let args = [address(x)?, bias, stride, address(&y)?, count(h * w)?, count(c)?, count(padded)?, count(total)?];
    pointwise(x, "from_channels_last", x.dtype(), total, &args)?;
    Ok(y)
}

pub(super) fn pack(w: &Tensor, [o, c]: [usize; 2], dtype: DType) -> Result<Tensor> {
    let w = w.to_dtype(DType::F32)?.contiguous()?;
    let (own_o, own_c, kh, kw) = w.dims4()?;
    let to = unwritten((o, kh, kw, c), dtype, w.device())?;
    let total = to.elem_count();
    let args = [address(&w)?, address(&to)?, count(own_o)?, count(own_c)?, count(kh * kw)?, count(c)?, count(total)?];
    pointwise(&w, "pack", dtype, total, &args)?;
    Ok(to)
}

pub(super) fn unpack(dw: &Tensor, [o, c]: [usize; 2]) -> Result<Tensor> {
    let (_, kh, kw, padded) = dw.dims4()?;
    let w = unwritten((o, c, kh, kw), DType::F32, dw.device())?;
    let total = w.elem_count();
    let args = [address(dw)?, address(&w)?, count(c)?, count(kh * kw)?, count(padded)?, count(total)?];
    pointwise(dw, "unpack", dw.dtype(), total, &args)?;
    Ok(w)
}

pub(super) fn convolve(x: &Tensor, w: &Tensor, Steps { stride, padding }: Steps) -> Result<Tensor> {
    let ((b, height, width, _), (o, kh, kw, _)) = (x.dims4()?, w.dims4()?);
    let out = |size: usize, kernel: usize| (size + 2 * padding - kernel) / stride + 1;
    let y = unwritten((b, out(height, kh), out(width, kw), o), x.dtype(), x.device())?;
    cudnn::convolve(Pass::Forward, x, w, &y, stride, padding)?;
    Ok(y)
}

pub(super) fn convolve_backward_data(dy: &Tensor, w: &Tensor, x: &[usize], steps: Steps) -> Result<Tensor> {
    let dx = unwritten(x, dy.dtype(), dy.device())?;
    cudnn::convolve(Pass::Data, &dx, w, dy, steps.stride, steps.padding)?;
    Ok(dx)
}

pub(super) fn convolve_backward_filter(x: &Tensor, dy: &Tensor, w: &[usize], steps: Steps) -> Result<Tensor> {
    let dw = unwritten(w, x.dtype(), x.device())?;
    cudnn::convolve(Pass::Filter, x, &dw, dy, steps.stride, steps.padding)?;
    Ok(dw)
}

/// How a norm's blocks share a map.
struct Slabs {
    slab: usize,
    /// Runs of channels across a slab, rounded up to a power of two.
    runs: usize,
    grid: Grid,
}

/// As in `norm.cu`.
const MAX_SLAB: usize = 256;
const MAX_THREADS: usize = 256;
/// Bytes of a slab's row that fill a line of the cache.
const LINE: usize = 128;
/// Values per block that are worth a block.
const WORTH: usize = 8192;
/// Blocks that fill a large GPU twice.
const MANY: usize = 264;

impl Slabs {
    fn new(x: &Tensor, groups: usize) -> Option<Self> {
        let (b, h, w, channels) = x.dims4().ok()?;
        let (run, pixels) = (run_of(x.dtype()), h * w);
        if !channels.is_multiple_of(run) || i32::try_from(x.elem_count()).is_err() || b > 65_535 {
            return None;
        }
        let most = MAX_SLAB.min(32 * run);
        // The least common multiple: whole groups of whole runs.
        let mut slab = (channels / groups..=most).step_by(channels / groups).find(|slab| slab.is_multiple_of(run))?;
        let blocks = |slab: usize| b * channels.div_ceil(slab);
        while 2 * slab <= most.min(channels)
            && (slab * x.dtype().size_in_bytes() < LINE || slab * pixels < WORTH)
            && blocks(2 * slab) >= MANY.min(blocks(slab))
        {
            slab *= 2;
        }
        let runs = (slab / run).next_power_of_two();
        let lanes = pixels.next_power_of_two().clamp((32 / runs).max(1), MAX_THREADS / runs);
        let grid = Grid { blocks: [channels.div_ceil(slab), b, 1], threads: runs * lanes, shared_bytes: 0 };
        Some(Slabs { slab, runs, grid })
    }
}

pub(super) fn norm_fits(x: &Tensor, groups: usize) -> bool {
    Slabs::new(x, groups).is_some()
}

fn slabs(x: &Tensor, groups: usize) -> Result<Slabs> {
    match Slabs::new(x, groups) {
        Some(slabs) => Ok(slabs),
        None => bail!("group norm: no kernel for {:?} in {groups} groups", x.shape()),
    }
}

pub(super) fn group_norm(x: &Tensor, bias: Option<&Tensor>, norm: &Norm) -> Result<(Tensor, Tensor)> {
    let (b, h, w, channels) = x.dims4()?;
    let Slabs { slab, runs, grid } = slabs(x, norm.groups)?;
    let y = unwritten(x.shape(), x.dtype(), x.device())?;
    let stats = unwritten((b, norm.groups, 2), DType::F32, x.device())?;
    let [bias, stride] = bias_args(bias)?;
    let args = [
        address(x)?,
        bias,
        stride,
        address(&norm.weight)?,
        address(&norm.beta)?,
        address(&y)?,
        address(&stats)?,
        count(h * w)?,
        count(channels)?,
        count(channels / norm.groups)?,
        count(slab)?,
        count(runs)?,
        Arg::F32(norm.eps as f32),
        Arg::I32(norm.silu.into()),
    ];
    launch(&device_of(x)?, NORM, &suffixed("group_norm_forward", x.dtype())?, grid, &args)?;
    Ok((y, stats))
}

pub(super) fn group_norm_backward(
    input: &NormInput,
    norm: &Norm,
    dy: &Tensor,
    existing: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let x = input.x;
    let (b, h, w, channels) = x.dims4()?;
    let Slabs { slab, runs, grid } = slabs(x, norm.groups)?;
    let dx = unwritten(x.shape(), x.dtype(), x.device())?;
    let totals = unwritten((3, b, channels), DType::F32, x.device())?;
    let [bias, stride] = bias_args(input.bias)?;
    let args = [
        address(x)?,
        bias,
        stride,
        address(&norm.weight)?,
        address(&norm.beta)?,
        address(input.stats)?,
        address(dy)?,
        address_or_null(existing)?,
        address(&dx)?,
        address(&totals)?,
        count(h * w)?,
        count(channels)?,
        count(channels / norm.groups)?,
        count(slab)?,
        count(runs)?,
        Arg::I32(norm.silu.into()),
    ];
    launch(&device_of(x)?, NORM, &suffixed("group_norm_backward", x.dtype())?, grid, &args)?;
    Ok((dx, totals))
}

pub(super) fn add(x: Biased, y: Option<Biased>) -> Result<Tensor> {
    let (b, _, _, channels) = x.0.dims4()?;
    let z = unwritten(x.0.shape(), x.0.dtype(), x.0.device())?;
    let n = vectors(x.0)?;
    let ([x_bias, x_stride], [y_bias, y_stride]) = (bias_args(x.1)?, bias_args(y.and_then(|y| y.1))?);
    let args = [
        address(x.0)?,
        x_bias,
        x_stride,
        address_or_null(y.map(|y| y.0))?,
        y_bias,
        y_stride,
        address(&z)?,
        count(channels)?,
        count(x.0.elem_count() / b.max(1))?,
        count(n)?,
    ];
    pointwise(x.0, "add", x.0.dtype(), n, &args)?;
    Ok(z)
}

pub(super) fn concat(x: Biased, y: Biased) -> Result<Tensor> {
    let ((b, h, w, c1), c2) = (x.0.dims4()?, y.0.dim(3)?);
    vectors(x.0)?;
    vectors(y.0)?;
    let z = unwritten((b, h, w, c1 + c2), x.0.dtype(), x.0.device())?;
    let n = vectors(&z)?;
    let ([x_bias, x_stride], [y_bias, y_stride]) = (bias_args(x.1)?, bias_args(y.1)?);
    let args = [
        address(x.0)?,
        x_bias,
        x_stride,
        address(y.0)?,
        y_bias,
        y_stride,
        address(&z)?,
        count(c1)?,
        count(c2)?,
        count(h * w)?,
        count(n)?,
    ];
    pointwise(x.0, "concat", x.0.dtype(), n, &args)?;
    Ok(z)
}

pub(super) fn split(z: &Tensor, c: usize) -> Result<(Tensor, Tensor)> {
    let (b, h, w, channels) = z.dims4()?;
    let n = vectors(z)?;
    let part = |c: usize| unwritten((b, h, w, c), z.dtype(), z.device());
    let (x, y) = (part(c)?, part(channels - c)?);
    vectors(&x)?;
    let args = [address(z)?, address(&x)?, address(&y)?, count(c)?, count(channels - c)?, count(n)?];
    pointwise(z, "split", z.dtype(), n, &args)?;
    Ok((x, y))
}

pub(super) fn upsample((x, bias): Biased) -> Result<Tensor> {
    let (b, h, w, channels) = x.dims4()?;
    let y = unwritten((b, 2 * h, 2 * w, channels), x.dtype(), x.device())?;
    let n = vectors(&y)?;
    let [bias, stride] = bias_args(bias)?;
    let args = [address(x)?, bias, stride, address(&y)?, count(h)?, count(w)?, count(channels)?, count(n)?];
    pointwise(x, "upsample", x.dtype(), n, &args)?;
    Ok(y)
}

pub(super) fn upsample_backward(dy: &Tensor) -> Result<Tensor> {
    let (b, h, w, channels) = dy.dims4()?;
    let dx = unwritten((b, h / 2, w / 2, channels), dy.dtype(), dy.device())?;
    let n = vectors(&dx)?;
    let args = [address(dy)?, address(&dx)?, count(h / 2)?, count(w / 2)?, count(channels)?, count(n)?];
    pointwise(dy, "upsample_backward", dy.dtype(), n, &args)?;
    Ok(dx)
}

pub(super) fn row_sums(x: &Tensor) -> Result<Tensor> {
    const THREADS: usize = 256;
    const BLOCKS: usize = 1056;
    let (groups, rows, channels) = x.dims3()?;
    let run = run_of(x.dtype());
    if !channels.is_multiple_of(run) || groups > 65_535 {
        return x.to_dtype(DType::F32)?.sum(1);
    }
    count(x.elem_count())?;
    let (x, device) = (x.contiguous()?, device_of(x)?);
    let runs = (channels / run).next_power_of_two().min(32);
    let tiles = channels.div_ceil(runs * run);
    // Some eight rows for every thread, but no more blocks than fill the GPU.
    let parts = rows.div_ceil(8 * THREADS / runs).min((BLOCKS / (tiles * groups)).max(1));
    let rows_of_part = rows.div_ceil(parts);
    let sums = unwritten((groups, channels), DType::F32, x.device())?;
    let partial = match parts {
        1 => sums.clone(),
        _ => unwritten((groups, parts, channels), DType::F32, x.device())?,
    };
    let args = [address(&x)?, address(&partial)?, count(rows)?, count(channels)?, count(runs)?, count(rows_of_part)?];
    let grid = Grid { blocks: [tiles, parts, groups], threads: THREADS, shared_bytes: 0 };
    launch(&device, POINTWISE, &suffixed("sums_of_parts", x.dtype())?, grid, &args)?;
    if parts > 1 {
        let grid = Grid { blocks: [channels.div_ceil(32), 1, groups], threads: THREADS, shared_bytes: 0 };
        let args = [address(&partial)?, address(&sums)?, count(parts)?, count(channels)?];
        launch(&device, POINTWISE, "sum_of_parts", grid, &args)?;
    }
    Ok(sums)
}

/// Head widths that the attention kernels are compiled for; others are filled up with zeros. f32 has no 128.
const HEAD_WIDTHS: [usize; 4] = [16, 32, 64, 128];
/// Queries or keys of a block, and its threads.
const ATTENTION_TILE: usize = 64;
const ATTENTION_THREADS: usize = 128;

/// Pictures, pixels, channels of a head, and the width that it is filled up to.
fn heads_of(q: &Tensor, heads: usize) -> Option<[usize; 4]> {
    let (b, h, w, channels) = q.dims4().ok()?;
    let width = channels / heads;
    let padded = HEAD_WIDTHS.into_iter().find(|padded| *padded >= width)?;
    let in_registers = q.dtype() == DType::BF16 || padded <= 64;
    let fits = in_registers && width.is_multiple_of(super::RUN) && channels == heads * width;
    (fits && b * heads <= 65_535).then_some([b, h * w, width, padded])
}

pub(super) fn attention_fits(q: &Tensor, heads: usize) -> bool {
    heads_of(q, heads).is_some()
}

fn attention_kernel(name: &str, q: &Tensor, padded: usize) -> String {
    let dtype = if q.dtype() == DType::F32 { "_f32" } else { "" };
    format!("{name}{dtype}_{padded}")
}

/// The sizes that all kernels of attention end with, and the grid.
fn attention_sizes(a: &Attention) -> Result<([usize; 4], [Arg; 4], Grid)> {
    let Some(sizes) = heads_of(&a.qkv[0], a.heads) else { bail!("attention: no kernel for {:?}", a.qkv[0].shape()) };
    let [b, pixels, width, _] = sizes;
    let scale = (width as f64).sqrt().recip();
    let args = [count(a.heads)?, count(pixels)?, count(width)?, Arg::F32(scale as f32)];
    let blocks = [pixels.div_ceil(ATTENTION_TILE), b * a.heads, 1];
    Ok((sizes, args, Grid { blocks, threads: ATTENTION_THREADS, shared_bytes: 0 }))
}

/// Queries, keys, values and their biases. A bias of the keys adds the same number to all scores of a query, which the
/// softmax takes away again: it is left out.
fn attention_inputs(a: &Attention) -> Result<Vec<Arg>> {
    let [q, k, v] = a.qkv.each_ref().map(address);
    let [q_bias, v_bias] = a.biases.each_ref().map(|bias| address_or_null(bias.as_ref()));
    Ok(vec![q?, k?, v?, q_bias?, Arg::Address(0), v_bias?])
}

pub(super) fn attention(a: &Attention) -> Result<(Tensor, Tensor)> {
    let q = &a.qkv[0];
    let ([b, pixels, _, padded], sizes, grid) = attention_sizes(a)?;
    let o = unwritten(q.shape(), q.dtype(), q.device())?;
    let lse = unwritten((b, a.heads, pixels), DType::F32, q.device())?;
    let mut args = attention_inputs(a)?;
    args.extend([address(&o)?, address(&lse)?]);
    args.extend(sizes);
    launch(&device_of(q)?, ATTENTION, &attention_kernel("attention_forward", q, padded), grid, &args)?;
    Ok((o, lse))
}

pub(super) fn attention_backward(a: &Attention, o: &Tensor, lse: &Tensor, dy: &Tensor) -> Result<[Tensor; 3]> {
    let q = &a.qkv[0];
    let ([_, _, _, padded], sizes, grid) = attention_sizes(a)?;
    let device = device_of(q)?;
    let like = || unwritten(q.shape(), q.dtype(), q.device());
    let (dq, dk, dv) = (like()?, like()?, like()?);
    let delta = unwritten(lse.shape(), DType::F32, q.device())?;
    let args = [&[address(o)?, address(dy)?, address(&delta)?], &sizes[..3]].concat();
    let delta_kernel = if q.dtype() == DType::F32 { "attention_delta_f32" } else { "attention_delta" };
    launch(&device, ATTENTION, delta_kernel, grid, &args)?;
    let mut inputs = attention_inputs(a)?;
    inputs.extend([address(dy)?, address(lse)?, address(&delta)?]);
    let args = [&inputs[..], &[address(&dk)?, address(&dv)?], &sizes].concat();
    launch(&device, ATTENTION, &attention_kernel("attention_backward_kv", q, padded), grid, &args)?;
    let args = [&inputs[..], &[address(&dq)?], &sizes].concat();
    launch(&device, ATTENTION, &attention_kernel("attention_backward_q", q, padded), grid, &args)?;
    Ok([dq, dk, dv])
}
