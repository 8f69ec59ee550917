//! A picture, by the first byte one of the formats that are read.
#![no_main]

use dmd::data::{DataOptions, load};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((format, bytes)) = bytes.split_first() else { return };
    let formats = ["png", "jpg", "webp", "gif", "bmp"];
    let name = format!("picture.{}", formats[usize::from(*format) % formats.len()]);
    let options = DataOptions::of_model([3, 8, 8], false).expect("three channels are read");
    dmd_fuzz::with_file(&name, bytes, |path| {
        drop(load(path.parent().expect("a file lies in a folder"), &options, |_, _| ()));
        // Another format's file must not be read again and again.
        drop(std::fs::remove_file(path));
    });
});
