//! A tokenizer, which then reads a prompt.
#![no_main]

use dmd_models::encoders::Tokenizer;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    dmd_fuzz::with_replaced("encoders/tokenizers/pads-with-end", "tokenizer.json", bytes, |folder| {
        let Ok(tokenizer) = Tokenizer::load(folder) else { return };
        drop(tokenizer.encode("A photo of 2 cats' hats!! \u{1f408} caf\u{e9} <|endoftext|>"));
    });
});
