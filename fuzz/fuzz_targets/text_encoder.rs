//! A text encoder's configuration, beside weights and a tokenizer that are whole.
#![no_main]

use candle_core::Device;
use dmd_models::encoders::TextEncoder;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    dmd_fuzz::with_replaced("encoders/pipelines/sd", "text_encoder/config.json", bytes, |folder| {
        drop(TextEncoder::load(&folder.join("text_encoder"), &folder.join("tokenizer"), &Device::Cpu));
    });
});
