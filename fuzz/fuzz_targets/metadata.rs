//! The metadata of an exported file that is whole otherwise: `key=value`, a line each, over its own.
#![no_main]

use dmd_fuzz::tiny::Tiny;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let entries = text.lines().filter_map(|line| line.split_once('='));
    let metadata = entries.map(|(key, value)| (format!("dmd.{key}"), value.to_string())).collect();
    dmd_fuzz::load_and_run(&Tiny { metadata, ..Tiny::default() }.bytes());
});
