//! The noise of a seed, for programs that make their own of it.

use dmd_runtime::noise::Stream;

use crate::memory;
use crate::status::{Status, border};

/// The purpose of the noise that becomes pictures.
pub const NOISE_PICTURE: u32 = 0;

/// The purpose of the noise between the passes of a file of several, plus the number of the pass, from 1.
pub const NOISE_REFINING: u32 = 0x100;

// Written out for the header.
const _: () = assert!(NOISE_PICTURE == dmd_runtime::noise::PICTURE_NOISE);
const _: () = assert!(NOISE_REFINING == dmd_runtime::noise::REFINING_NOISE);

/// Writes the first `n` unit normals of the stream (seed, purpose, index), which docs/noise.md defines: with the purpose
/// `DMD_NOISE_PICTURE`, the noise of picture number `index` of a seed.
///
/// # Safety
///
/// `values` is null or room for `n` values that nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_noise(seed: u64, purpose: u32, index: u64, values: *mut f32, n: usize) -> Status {
    border(|| {
        // SAFETY: as the caller's.
        let values = unsafe { memory::slice_mut(values, n, "values")? };
        Stream::new(seed, purpose, index).fill_normal(values);
        Ok(())
    })
}
