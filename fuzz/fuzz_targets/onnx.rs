//! An ONNX file: its description, the list of what may run, sizes, and tract.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dmd_fuzz::load_and_run(bytes));
