//! Vocabularies of CLIP's kind (Radford et al. 2021): its own, which every text encoder of Stable Diffusion reads, for models
//! that come without one; and smaller ones, learned from captions. The pairs of the first are those of OpenAI's
//! `bpe_simple_vocab_16e6.txt` that CLIP uses, under the MIT licence, copyright (c) 2021 OpenAI.

use super::tokenizer::words;
use crate::{Error, Result, limits};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use tokenizers::Trainer;
use tokenizers::models::bpe::{BPE, BpeTrainer};

const MERGES: &str = include_str!("clip_merges.txt");
const SPECIAL: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];
/// What ends a word, behind its last letter.
const END_OF_WORD: &str = "</w>";

/// CLIP's pairs of tokens that are joined, first ones first.
pub fn clip() -> Vec<String> {
    MERGES.lines().map(String::from).collect()
}

/// Every byte as a letter that can be seen.
fn letters() -> Vec<char> {
    let shown = |b: &u32| (33..127).contains(b) || (161..173).contains(b) || (174..256).contains(b);
    let hidden = (0..256u32).filter(|b| !shown(b)).enumerate().map(|(i, _)| 256 + i as u32);
    (0..256).filter(shown).chain(hidden).filter_map(char::from_u32).collect()
}

/// Tokens in the order of their ids: letters, the same at the end of a word, what pairs make, and what frames a prompt.
pub fn tokens(merges: &[String]) -> Vec<String> {
    let letters = letters();
    let at_end = letters.iter().map(|letter| format!("{letter}{END_OF_WORD}"));
    let joined = merges.iter().map(|pair| pair.replace(' ', ""));
    letters.iter().map(char::to_string).chain(at_end).chain(joined).chain(SPECIAL.map(String::from)).collect()
}

/// The pairs of a vocabulary of at most `size` tokens, learned from captions: the most frequent first, each at least twice
/// (Sennrich et al. 2016, arXiv:1508.07909). The same captions give the same pairs.
pub fn learn<'a>(captions: impl IntoIterator<Item = &'a str>, size: usize) -> Result<Vec<String>> {
    let fewest = tokens(&[]).len();
    limits::check("vocabulary", size, fewest..=*limits::ROWS.end())?;
    let failed = |e: tokenizers::Error| Error::Config(format!("the captions give no vocabulary: {e}"));
    // A letter that ends a word is one of its own, in the place of what the trainer would give numbers in any order.
    let letters = letters();
    let ending: HashMap<char, char> =
        letters.iter().enumerate().filter_map(|(i, c)| Some((*c, char::from_u32(FIRST_ENDING + i as u32)?))).collect();
    let marked = |word: String| {
        let mut word: Vec<char> = word.chars().collect();
        if let Some(last) = word.last_mut() {
            *last = ending.get(last).copied().unwrap_or(*last);
        }
        word.into_iter().collect::<String>()
    };
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .min_frequency(2)
        .vocab_size(size)
        .initial_alphabet(letters.iter().copied().chain(ending.values().copied()).collect())
        .build();
    let captions: Vec<&str> = captions.into_iter().collect();
    trainer.feed(captions.into_iter(), |text| Ok(words(text)?.into_iter().map(marked).collect())).map_err(failed)?;
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(failed)?;
    let model = serde_json::to_value(&model).map_err(|e| Error::Config(e.to_string()))?;
    let plain = |c: char| match (c as u32).checked_sub(FIRST_ENDING).and_then(|i| letters.get(i as usize)) {
        Some(letter) => format!("{letter}{END_OF_WORD}"),
        None => c.to_string(),
    };
    let pair = |merge: &Value| {
        let [left, right] =
            [0, 1].map(|i| merge[i].as_str().unwrap_or_default().chars().map(plain).collect::<String>());
        format!("{left} {right}")
    };
    Ok(model["merges"].as_array().into_iter().flatten().map(pair).take(size - fewest).collect())
}

/// Of the private letters, the first that stands for one that ends a word.
const FIRST_ENDING: u32 = 0xE000;

/// Writes a folder `tokenizer/` as transformers 4 did, for prompts of `length` tokens with their frame, filled up with
/// `pad`: CLIP's with its end token (none given), OpenCLIP's with "!".
pub fn write(folder: &Path, merges: &[String], length: usize, pad: Option<&str>) -> Result<()> {
    let tokens = tokens(merges).into_iter().enumerate();
    let vocabulary: Map<String, Value> = tokens.map(|(i, token)| (token, json!(i))).collect();
    let [begin, end] = SPECIAL.map(
        |text| json!({"content": text, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false}),
    );
    let pad = pad.unwrap_or(SPECIAL[1]);
    let mut settings = json!({"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": end});
    for (name, text) in [
        ("vocab.json", Value::Object(vocabulary).to_string()),
        ("merges.txt", format!("#version: 0.2\n{}\n", merges.join("\n"))),
        ("special_tokens_map.json", format!("{settings:#}\n")),
    ] {
        let path = folder.join(name);
        fs::write(&path, text).map_err(Error::io(&path))?;
    }
    settings["model_max_length"] = json!(length);
    settings["tokenizer_class"] = json!("CLIPTokenizer");
    settings["add_prefix_space"] = json!(false);
    settings["do_lower_case"] = json!(true);
    settings["errors"] = json!("replace");
    let path = folder.join("tokenizer_config.json");
    fs::write(&path, format!("{settings:#}\n")).map_err(Error::io(&path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoders::Tokenizer;

    /// "at" is at the end of six words, "ca" at the start of as many; then "c" stands before "at" four times.
    #[test]
    fn frequent_pairs_are_learned_first_and_the_same_every_time() {
        let captions = ["A cat, a CAT", "cat  hat", "cat can", "bat caf\u{e9}"];
        let merges = learn(captions, 514 + 3).unwrap();
        assert_eq!(merges, ["a t</w>", "c at</w>", "c a"]);
        assert_eq!(learn(captions, 514).unwrap().len(), 0);
        assert!(learn(captions, 513).unwrap_err().to_string().contains("vocabulary is 513"));
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &merges, 8, None).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let token = |text: &str| tokens(&merges).iter().position(|token| token == text).unwrap() as u32;
        let (begin, end) = (token("<|startoftext|>"), token("<|endoftext|>"));
        let ids = [begin, token("cat</w>"), token("h"), token("at</w>"), end, end, end, end];
        assert_eq!(tokenizer.encode("cat HAT").unwrap().ids, ids);
    }
}
