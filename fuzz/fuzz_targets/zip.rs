//! A zip of pictures.
#![no_main]

use dmd::data::{DataOptions, load};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let options = DataOptions { size: [8, 8], grey: false, unconditional: false, strict: false };
    dmd_fuzz::with_file("pictures.zip", bytes, |path| drop(load(path, &options, |_, _| ())));
});
