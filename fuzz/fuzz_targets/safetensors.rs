//! Weights: the header of a safetensors file and what it says of its tensors.
#![no_main]

use candle_core::Device;
use dmd_models::{Weights, read_metadata};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    dmd_fuzz::with_file("weights.safetensors", bytes, |path| {
        drop(read_metadata(path));
        drop(Weights::load(path, &Device::Cpu));
    });
});
