//! An autoencoder's configuration, beside weights that are whole.
#![no_main]

use candle_core::Device;
use dmd_models::Autoencoder;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    dmd_fuzz::with_replaced("encoders/autoencoders/kl", "config.json", bytes, |folder| {
        drop(Autoencoder::load(folder, &Device::Cpu));
    });
});
