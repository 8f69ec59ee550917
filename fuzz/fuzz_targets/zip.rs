//! A zip of pictures.
#![no_main]

use dmd::data::{DataOptions, load};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let options = DataOptions::of_model([3, 8, 8], true).expect("three channels are read");
    dmd_fuzz::with_file("pictures.zip", bytes, |path| drop(load(path, &options, |_, _| ())));
});
