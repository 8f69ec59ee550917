//! A scheduler's configuration, in a model folder that is whole otherwise.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dmd_fuzz::load_folder("scheduler/scheduler_config.json", bytes));
