//! Prompts to ids of tokens, by the tokenizers crate: a folder `tokenizer/` of either generation.

use super::clip_vocabulary;
use crate::folder::json;
use crate::{Error, Result, limits};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// CLIP's tokenizer with the numbers that prompts are framed by.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    begin: u32,
    end: u32,
    pad: u32,
    length: usize,
    largest: u32,
}

/// A prompt as a text encoder takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// As many as the tokenizer's length: begin, the prompt, end, padding.
    pub ids: Vec<u32>,
    /// What did not fit, as it stood in the prompt.
    pub cut: Option<String>,
}

const BEGIN: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

impl Tokenizer {
    /// Reads `tokenizer.json`, or `vocab.json` and `merges.txt` where there is none; and what `tokenizer_config.json` says
    /// of special tokens and of the length.
    pub fn load(folder: &Path) -> Result<Self> {
        let settings = settings(folder)?;
        let in_folder = |error: Error| Error::file(folder, error);
        let class = settings["tokenizer_class"].as_str().unwrap_or("CLIPTokenizer");
        if !["CLIPTokenizer", "CLIPTokenizerFast"].contains(&class) {
            return Err(in_folder(Error::Config(format!(
                "tokenizer_class is {class}, only CLIPTokenizer is supported"
            ))));
        }
        let whole = folder.join("tokenizer.json");
        let (file, description) = match whole.exists() {
            true => (whole.clone(), json::read(&whole)?),
            false => (folder.join("vocab.json"), from_vocabulary(folder, &settings)?),
        };
        Self::new(description, &settings).map_err(|e| Error::file(file, e))
    }

    /// Of CLIP's kind with these pairs, for prompts of `length` tokens with their frame.
    pub fn of_merges(merges: &[String], length: usize) -> Result<Self> {
        let tokens = clip_vocabulary::tokens(merges);
        let id = |token: &str| tokens.iter().position(|other| other == token);
        let added = [BEGIN, END].map(|token| {
            json!({"id": id(token), "content": token, "special": true, "normalized": true,
                "single_word": false, "lstrip": false, "rstrip": false})
        });
        let vocab = tokens.iter().enumerate().map(|(i, token)| (token.clone(), json!(i))).collect();
        let description = description(added.into(), Value::Object(vocab), json!(merges), END);
        Self::new(description, &json!({ "model_max_length": length }))
    }

    /// From what `tokenizer.json` holds, and from the settings.
    fn new(mut description: Value, settings: &Value) -> Result<Self> {
        let refuse = |message: String| Error::Config(message);
        check_merges(&description["model"])?;
        // Prompts are framed and cut here, and ids are never made text again.
        for key in ["truncation", "padding", "post_processor", "decoder"] {
            description[key] = Value::Null;
        }
        let bytes = serde_json::to_vec(&description).map_err(|e| refuse(e.to_string()))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| refuse(format!("not a tokenizer: {e}")))?;
        let id = |key: &str, default: &str| {
            let token = text(&settings[key]).unwrap_or(default);
            inner
                .token_to_id(token)
                .ok_or_else(|| refuse(format!("{key} is \"{token}\", which is not in the vocabulary")))
        };
        let length = settings["model_max_length"].as_f64().unwrap_or(f64::INFINITY);
        if length < 3.0 {
            return Err(refuse(format!("model_max_length is {length}, expected at least 3")));
        }
        Ok(Tokenizer {
            begin: id("bos_token", BEGIN)?,
            end: id("eos_token", END)?,
            pad: id("pad_token", END)?,
            length: length.min(*limits::TOKENS.end() as f64) as usize,
            largest: inner.get_vocab(true).into_values().max().unwrap_or(0),
            inner,
        })
    }

    /// Tokens of an encoded prompt.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The same with at most `length` tokens.
    pub fn at_most(self, length: usize) -> Self {
        Tokenizer { length: self.length.min(length), ..self }
    }

    /// The largest id that a prompt can have.
    pub fn largest_id(&self) -> u32 {
        self.largest
    }

    /// What a `tokenizer.json` of it holds. Prompts are framed and cut by whoever reads it.
    pub fn description(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|error| Error::Config(format!("the tokenizer cannot be written: {error}")))
    }

    /// The id before a prompt.
    pub fn begin(&self) -> u32 {
        self.begin
    }

    /// The id that fills the rest.
    pub fn padding(&self) -> u32 {
        self.pad
    }

    /// The end token's id.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Ids of a prompt, framed, cut and padded.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let failed = |e: tokenizers::Error| Error::Config(format!("the prompt \"{prompt}\" has no tokens: {e}"));
        let encoded = self.inner.encode(prompt, false).map_err(failed)?;
        let room = self.length - 2;
        let cut = encoded.get_offsets().get(room).and_then(|(start, _)| prompt.get(*start..)).map(str::to_string);
        let mut ids = vec![self.begin];
        ids.extend(encoded.get_ids().iter().take(room));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Ok(Tokens { ids, cut })
    }
}

/// `tokenizer_config.json`, and what the older `special_tokens_map.json` says over it, where the newer key
/// `added_tokens_decoder` is not there: as transformers reads them.
fn settings(folder: &Path) -> Result<Value> {
    let optional = |name: &str| match folder.join(name) {
        path if path.exists() => json::read(&path),
        _ => Ok(json!({})),
    };
    let mut settings = optional("tokenizer_config.json")?;
    if !settings.is_object() {
        return Err(Error::file(folder.join("tokenizer_config.json"), "not a JSON object"));
    }
    if settings.get("added_tokens_decoder").is_none()
        && let Value::Object(map) = optional("special_tokens_map.json")?
    {
        for (key, value) in map {
            settings[key] = value;
        }
    }
    Ok(settings)
}

/// A token, written as it is or as an object.
fn text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// What a `tokenizer.json` made of `vocab.json` and `merges.txt` holds.
fn from_vocabulary(folder: &Path, settings: &Value) -> Result<Value> {
    let path = folder.join("vocab.json");
    if !path.exists() {
        return Err(Error::file(folder, "has neither tokenizer.json nor vocab.json and merges.txt"));
    }
    let vocab = json::read(&path)?;
    let merges = merges(&folder.join("merges.txt"))?;
    let id = |token: &str| vocab[token].as_u64();
    // Special tokens are found in a prompt before it is cut into words. The padding is one of them: where it is "!", every
    // exclamation mark of a prompt becomes it, in transformers too.
    let mut added = BTreeMap::new();
    for (key, default) in [("bos_token", BEGIN), ("eos_token", END), ("unk_token", END), ("pad_token", END)] {
        let token = text(&settings[key]).unwrap_or(default);
        if let Some(id) = id(token) {
            let normalized = settings[key]["normalized"].as_bool().unwrap_or(false);
            added.insert(id, json!({"content": token, "special": true, "normalized": normalized}));
        }
    }
    // Tokens that were learned later, such as those of a textual inversion.
    let older = folder.join("added_tokens.json");
    if older.exists()
        && let Value::Object(tokens) = json::read(&older)?
    {
        for (token, id) in tokens {
            let id = id.as_u64().ok_or_else(|| Error::file(&older, format!("\"{token}\" has the id {id}")))?;
            added.entry(id).or_insert_with(|| json!({"content": token, "special": false, "normalized": true}));
        }
    }
    if let Some(tokens) = settings["added_tokens_decoder"].as_object() {
        for (id, token) in tokens {
            let number =
                id.parse().map_err(|_| Error::file(folder, format!("added_tokens_decoder has the id \"{id}\"")))?;
            added.insert(number, token.clone());
        }
    }
    let added: Vec<Value> = added
        .into_iter()
        .map(|(id, mut token)| {
            token["id"] = json!(id);
            for flag in ["single_word", "lstrip", "rstrip", "normalized", "special"] {
                if token.get(flag).is_none() {
                    token[flag] = json!(false);
                }
            }
            token
        })
        .collect();
    let unknown = text(&settings["unk_token"]).unwrap_or(END);
    Ok(description(added, vocab, json!(merges), unknown))
}

/// What a `tokenizer.json` of CLIP's kind holds.
fn description(added: Vec<Value>, vocab: Value, merges: Value, unknown: &str) -> Value {
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        },
    })
}

/// The words of a text as pairs of bytes are counted in: without spaces, in lower case, each byte as a letter that can be
/// seen.
pub(super) fn words(text: &str) -> tokenizers::Result<Vec<String>> {
    static CUT: std::sync::LazyLock<std::result::Result<tokenizers::Tokenizer, String>> =
        std::sync::LazyLock::new(|| {
            let empty = description(Vec::new(), json!({ END: 0 }), json!([]), END);
            tokenizers::Tokenizer::from_bytes(empty.to_string()).map_err(|e| e.to_string())
        });
    let cut = CUT.as_ref().map_err(|e| e.clone())?;
    let mut normal = tokenizers::NormalizedString::from(text);
    if let Some(normalizer) = cut.get_normalizer() {
        tokenizers::Normalizer::normalize(normalizer, &mut normal)?;
    }
    let mut words = tokenizers::PreTokenizedString::from(normal);
    if let Some(cutter) = cut.get_pre_tokenizer() {
        tokenizers::PreTokenizer::pre_tokenize(cutter, &mut words)?;
    }
    let splits = words.get_splits(tokenizers::OffsetReferential::Normalized, tokenizers::OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, ..)| word.to_string()).collect())
}

/// What CLIP takes for a word (its `simple_tokenizer.py`).
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A pair a line, behind a line of the version.
fn merges(path: &Path) -> Result<Vec<[String; 2]>> {
    let bytes = fs::metadata(path).map_err(Error::io(path))?.len();
    if bytes > limits::JSON_BYTES {
        return Err(Error::file(path, format!("has {bytes} bytes, expected at most {}", limits::JSON_BYTES)));
    }
    let lines = fs::read_to_string(path).map_err(Error::io(path))?;
    let pair = |(at, line): (usize, &str)| match line.split_once(' ') {
        Some((left, right)) if !right.contains(' ') => Ok([left.to_string(), right.to_string()]),
        _ => Err(Error::file(path, format!("line {} is \"{line}\", expected two tokens", at + 1))),
    };
    let lines = lines.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
    lines.map(pair).collect()
}

/// What the tokenizers crate takes for granted of byte pairs, and would panic without: what two tokens make is a token.
fn check_merges(model: &Value) -> Result<()> {
    let refuse = |message: String| Err(Error::Config(message));
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") {
        return refuse(format!("its model is {}, only BPE is supported", model["type"]));
    }
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
        return refuse("has no vocabulary and merges of byte pairs".into());
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    for merge in merges {
        let pair = match merge {
            Value::String(line) => line.split_once(' '),
            other => other[0].as_str().zip(other[1].as_str()),
        };
        let whole = pair.and_then(|(left, right)| Some(format!("{left}{}", right.strip_prefix(prefix)?)));
        if !whole.is_some_and(|whole| vocab.contains_key(&whole)) {
            return refuse(format!("the merge {merge} makes no token of the vocabulary"));
        }
    }
    Ok(())
}
