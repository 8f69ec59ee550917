//! The few operations that training spends its time in, as candle custom operations with their own backward, for f32
//! on the CPU. Each stands beside a plain composite of candle's own operations, which serves every other device and
//! dtype and which the tests compare it with. Results are the same bits run to run for a given number of threads:
//! work is split by shape and thread count alone, and partial sums are added in a fixed order.

mod adamw;
mod attention;
mod channel_norm;
mod concat;
mod conv2d;
mod conv_transpose2d;
mod gated;
#[cfg(feature = "cuda")]
pub(crate) mod gpu;
mod group_norm;
mod movement;
pub mod nhwc;
mod optimizer;
#[cfg(feature = "cuda")]
mod philox;
mod planes;
mod pointwise;
mod resample;
mod rotary;
mod simd;
mod tile;

pub use adamw::{AdamwStep, adamw, adamw_composite, average_into, sum_of_squares};
pub use attention::{Mask, UNSEEN, attention, attention_composite, causal_bias, padding_bias};
pub use channel_norm::{layer_norm, layer_norm_composite, rms_norm, rms_norm_composite};
pub use concat::concat;
pub use conv_transpose2d::conv_transpose2d;
pub use conv2d::{conv2d, conv2d_composite};
pub use gated::{activation, activation_composite, gated, gated_composite};
pub use group_norm::{group_norm, group_norm_composite};
pub use movement::{Patches, TokenAt, embedding, grid, shuffle, states, token_at, tokens, unshuffle};
pub use optimizer::{Parameter, adamw_all, average_all};
#[cfg(feature = "cuda")]
pub use philox::philox_normal;
pub use pointwise::{add, add_per_channel, affine, modulate, mul_per_channel, pad_right_bottom, sinusoid};
pub use resample::{avg_pool_2x, upsample_2x};
pub use rotary::{Pairs, Rotary, rotary, rotary_composite};

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};
use parking_lot::RwLockReadGuard;
use std::mem::MaybeUninit;
use std::ops::Deref;

/// A shape rule's answer as candle's.
fn fits(rule: crate::shapes::Rule) -> Result<Vec<usize>> {
    rule.map_err(candle_core::Error::Msg)
}

/// Whether the fused paths take these tensors: f32 on the CPU.
fn on_cpu_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// The values of a contiguous tensor inside a custom operation's forward.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout, op: &str) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(all), Some((start, end))) => Ok(&all[start..end]),
        (CpuStorage::F32(_), None) => bail!("{op}: needs a contiguous tensor"),
        _ => bail!("{op}: needs f32"),
    }
}

/// The values of a contiguous f32 CPU tensor outside of one; the tensor stays locked for reading meanwhile.
struct Values<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    layout: &'a Layout,
}

impl<'a> Values<'a> {
    fn of(tensor: &'a Tensor, op: &str) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cpu(cpu) => _ = values(cpu, layout, op)?,
            _ => bail!("{op}: needs a tensor on the CPU"),
        }
        Ok(Values { storage, layout })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match (&*self.storage, self.layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) => &all[start..end],
            // `of` let only contiguous f32 CPU tensors in, and the lock keeps it so.
            _ => &[],
        }
    }
}

/// A vector of `len` values that `fill` writes. Zeros first would cost another pass over memory, on one thread.
///
/// # Safety
/// `fill` must write every value.
unsafe fn written(len: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: `len` values fit, and the caller promises that each was written.
    unsafe { values.set_len(len) };
    values
}

/// Row-major or strided matrix product on one thread: dst = beta_dst·dst + alpha·lhs·rhs, shapes (m, k)·(k, n).
struct Gemm<'a> {
    m: usize,
    n: usize,
    k: usize,
    /// Values, row stride, column stride.
    lhs: (&'a [f32], usize, usize),
    rhs: (&'a [f32], usize, usize),
    alpha: f32,
    accumulate: bool,
}

impl Gemm<'_> {
    /// Writes to `dst`, rows contiguous.
    fn run(&self, dst: &mut [f32]) {
        let Gemm { m, n, k, lhs, rhs, alpha, accumulate } = *self;
        let reach = |rows: usize, cols: usize, rs: usize, cs: usize| (rows - 1) * rs + (cols - 1) * cs;
        if m == 0 || n == 0 || k == 0 {
            return;
        }
        assert!(
            reach(m, k, lhs.1, lhs.2) < lhs.0.len() && reach(k, n, rhs.1, rhs.2) < rhs.0.len() && dst.len() >= m * n
        );
        // SAFETY: every element the strides reach lies inside its slice (asserted above), dst is borrowed mutably and
        // so overlaps neither operand.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                dst.as_mut_ptr(),
                1,
                n as isize,
                accumulate,
                lhs.0.as_ptr(),
                lhs.2 as isize,
                lhs.1 as isize,
                rhs.0.as_ptr(),
                rhs.2 as isize,
                rhs.1 as isize,
                1.0,
                alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}
