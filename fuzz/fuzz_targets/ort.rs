//! A file in ONNX Runtime's own format, a flatbuffer: its description, the list of what may run, and sizes.
#![no_main]

use dmd_runtime::Info;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(Info::from_bytes(bytes)));
