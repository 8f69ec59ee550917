//! An array of numpy's.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dmd_fuzz::with_file("array.npy", bytes, |path| drop(dmd::npy::read(path, |_| Ok(())))));
