//! The C ABI of `dmd-runtime`: about twenty functions over handles and the caller's memory, for C, C++ and every language
//! that calls C. `include/dmd.h` is its description, made from this source by cbindgen and compared by a test.
//!
//! Each function runs within `border`, which turns errors into a status with a message of the calling thread, and stops
//! panics. What is unsafe is in `memory`: everything else is checked.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod generator;
mod noise;
mod png;

mod handles;
mod memory;
mod status;

use std::ffi::c_char;

pub use generator::*;
pub use noise::*;
pub use png::dmd_png;
pub use status::{Status, dmd_last_error};

/// The version of this header: of functions, structs and numbers. A library with the same number takes a program that was
/// compiled with this header; it is raised when something is taken away or changed, not when something is added.
pub const ABI_VERSION: u32 = 1;

/// The version of the ABI that the library has, to compare with `DMD_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_abi_version() -> u32 {
    ABI_VERSION
}

/// The version of dmd-runtime. The text is the library's, and stays for as long as it is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
