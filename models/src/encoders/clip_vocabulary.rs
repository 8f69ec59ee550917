//! The vocabulary of CLIP (Radford et al. 2021), which every text encoder of Stable Diffusion reads: for models that come
//! without one. The pairs are those of OpenAI's `bpe_simple_vocab_16e6.txt` that CLIP uses, under the MIT licence,
//! copyright (c) 2021 OpenAI.

use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

const MERGES: &str = include_str!("clip_merges.txt");
const SPECIAL: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];
/// Tokens of a prompt, framed.
const LENGTH: usize = 77;

/// Pairs of tokens that are joined, first ones first.
pub fn merges() -> impl Iterator<Item = &'static str> {
    MERGES.lines()
}

/// Tokens in the order of their ids: every byte as a letter that can be seen, the same at the end of a word, the pairs, and
/// what frames a prompt.
pub fn tokens() -> Vec<String> {
    let shown = |b: &u32| (33..127).contains(b) || (161..173).contains(b) || (174..256).contains(b);
    let hidden = (0..256u32).filter(|b| !shown(b)).enumerate().map(|(i, _)| 256 + i as u32);
    let letters: Vec<String> =
        (0..256).filter(shown).chain(hidden).filter_map(char::from_u32).map(String::from).collect();
    let at_end = letters.iter().map(|letter| format!("{letter}</w>")).collect::<Vec<_>>();
    let joined = merges().map(|pair| pair.replace(' ', ""));
    letters.into_iter().chain(at_end).chain(joined).chain(SPECIAL.map(String::from)).collect()
}

/// Writes a folder `tokenizer/` as transformers 4 did; OpenCLIP fills prompts up with "!", CLIP with the end token.
pub fn write(folder: &Path, open_clip: bool) -> Result<()> {
    let vocabulary: Map<String, Value> = tokens().into_iter().enumerate().map(|(i, token)| (token, json!(i))).collect();
    let pad = if open_clip { "!" } else { SPECIAL[1] };
    let [begin, end] = SPECIAL.map(
        |text| json!({"content": text, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false}),
    );
    let mut settings = json!({"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": end});
    for (name, text) in [
        ("vocab.json", Value::Object(vocabulary).to_string()),
        ("merges.txt", format!("#version: 0.2\n{MERGES}")),
        ("special_tokens_map.json", format!("{settings:#}\n")),
    ] {
        let path = folder.join(name);
        fs::write(&path, text).map_err(Error::io(&path))?;
    }
    settings["model_max_length"] = json!(LENGTH);
    settings["tokenizer_class"] = json!("CLIPTokenizer");
    settings["add_prefix_space"] = json!(false);
    settings["do_lower_case"] = json!(true);
    settings["errors"] = json!("replace");
    let path = folder.join("tokenizer_config.json");
    fs::write(&path, format!("{settings:#}\n")).map_err(Error::io(&path))
}
