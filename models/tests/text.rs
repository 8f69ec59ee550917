//! Tokenizers and text encoders against transformers: outputs made by `make_encoder_fixtures.py` with transformers 5.24.

use candle_core::{DType, Device, Tensor};
use dmd_models::encoders::clip::{ClipConfig, ClipText};
use dmd_models::encoders::{Layer, TextEncoder, TextEncoders, Tokenizer, clip_vocabulary};
use dmd_models::layers::Loader;
use dmd_models::{Eager, Training, Way, Weights};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders")
}

fn read(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn write(path: PathBuf, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// Pairs of CLIP's own vocabulary file, and its tokens in the order of their ids.
fn clip_vocabulary() -> (Vec<String>, Vec<String>) {
    let merges = clip_vocabulary::clip();
    let tokens = clip_vocabulary::tokens(&merges);
    (merges, tokens)
}

/// A folder as transformers 4 wrote it.
fn old_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (merges, tokens) = clip_vocabulary();
    let vocab: serde_json::Map<String, Value> =
        tokens.into_iter().enumerate().map(|(i, token)| (token, json!(i))).collect();
    write(dir.path().join("vocab.json"), &Value::Object(vocab));
    std::fs::write(dir.path().join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).unwrap();
    let token = |text: &str| json!({"__type": "AddedToken", "content": text, "normalized": true});
    let config = json!({"bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"),
        "pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"});
    write(dir.path().join("tokenizer_config.json"), &config);
    dir
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text).unwrap().ids
}

const CAT: [u32; 7] = [49406, 320, 1125, 539, 320, 2368, 49407];

/// Ids of transformers 5.24 with the same vocabulary.
#[test]
fn clips_vocabulary_gives_the_ids_of_transformers() {
    let tokenizer = Tokenizer::load(old_folder().path()).unwrap();
    assert_eq!((tokenizer.length(), tokenizer.largest_id()), (77, 49407));
    assert_eq!(ids(&tokenizer, "a photo of a cat")[..7], CAT);
    let long = [
        49406, 3306, 267, 1002, 256, 585, 568, 273, 271, 273, 277, 2005, 1097, 35689, 563, 15304, 163, 234, 360, 7334,
        49407,
    ];
    let text = "Hello,   WORLD! it's 2026 — naïve café 猫 😀";
    assert_eq!(ids(&tokenizer, text)[..21], long);
    assert_eq!(ids(&tokenizer, text)[21..], [49407; 56]);
    assert_eq!(ids(&tokenizer, "")[..3], [49406, 49407, 49407]);
    assert_eq!(ids(&tokenizer, "a\0b")[..5], [49406, 320, 444, 321, 49407]);
}

/// Stable Diffusion 2 and the second tokenizer of SDXL pad with "!", which their `special_tokens_map.json` says over the
/// other file; and every exclamation mark of a prompt is the padding then. Ids of transformers 5.24.
#[test]
fn the_older_map_of_special_tokens_wins_and_its_padding_is_found_in_prompts() {
    let dir = old_folder();
    write(dir.path().join("special_tokens_map.json"), &json!({"pad_token": "!"}));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(ids(&tokenizer, "wow!! great!")[..8], [49406, 2781, 0, 0, 830, 0, 49407, 0]);
    // The newer key means that the older file is not read.
    let path = dir.path().join("tokenizer_config.json");
    let mut config = read(path.clone());
    config["added_tokens_decoder"] = json!({"49406": {"content": "<|startoftext|>", "special": true}});
    write(path, &config);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(ids(&tokenizer, "wow!! great!")[..7], [49406, 2781, 748, 830, 256, 49407, 49407]);
}

#[test]
fn folders_of_transformers_5_give_its_ids() {
    for name in ["pads-with-end", "pads-with-mark"] {
        let folder = fixtures().join("tokenizers").join(name);
        let tokenizer = Tokenizer::load(&folder).unwrap();
        for row in read(folder.join("expected.json")).as_array().unwrap() {
            let expected: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            assert_eq!(ids(&tokenizer, row["text"].as_str().unwrap()), expected, "{name}: {}", row["text"]);
        }
    }
}

#[test]
fn what_does_not_fit_is_told_in_the_words_of_the_prompt() {
    let tokenizer = Tokenizer::load(&fixtures().join("tokenizers/pads-with-end")).unwrap();
    assert_eq!(tokenizer.length(), 24);
    let fits = "a ".repeat(22);
    assert_eq!(tokenizer.encode(&fits).unwrap().cut, None);
    let tokens = tokenizer.encode(&format!("{fits}CAT of 猫")).unwrap();
    assert_eq!(tokens.cut.as_deref(), Some("CAT of 猫"));
    assert_eq!(tokens.ids[23], 528);
}

/// Tokens that were learned later stand in `added_tokens.json`.
#[test]
fn added_tokens_have_their_ids() {
    let dir = old_folder();
    write(dir.path().join("added_tokens.json"), &json!({"<my-cat>": 49408}));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(ids(&tokenizer, "a photo of <my-cat>")[..6], [49406, 320, 1125, 539, 49408, 49407]);
    assert_eq!(tokenizer.largest_id(), 49408);
}

#[test]
fn broken_tokenizers_are_refused() {
    let refused = |change: &dyn Fn(&Path), part: &str| {
        let dir = tempfile::tempdir().unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(fixtures().join("tokenizers/pads-with-end").join(name), dir.path().join(name)).unwrap();
        }
        change(dir.path());
        let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(part), "expected {part:?} in {error}");
    };
    let set = |file: &'static str, pointer: &'static str, value: Value| {
        move |dir: &Path| {
            let mut whole = read(dir.join(file));
            *whole.pointer_mut(pointer).unwrap() = value.clone();
            write(dir.join(file), &whole);
        }
    };
    // The tokenizers crate would panic.
    let merges = "/model/merges";
    refused(&set("tokenizer.json", merges, json!([["photo</w>", "photo</w>"]])), "makes no token of the vocabulary");
    refused(&set("tokenizer.json", merges, json!(["h"])), "the merge \"h\" makes no token");
    refused(&set("tokenizer.json", "/model/type", json!("Unigram")), "only BPE is supported");
    refused(&set("tokenizer.json", "/model/vocab", json!(3)), "no vocabulary and merges");
    refused(&set("tokenizer.json", "/pre_tokenizer", json!({"type": "x"})), "not a tokenizer");
    refused(&set("tokenizer_config.json", "/eos_token", json!("<end>")), "eos_token is \"<end>\", which is not");
    refused(&set("tokenizer_config.json", "/model_max_length", json!(2)), "model_max_length is 2");
    refused(&set("tokenizer_config.json", "/tokenizer_class", json!("T5Tokenizer")), "tokenizer_class is T5Tokenizer");
    refused(&|dir| std::fs::remove_file(dir.join("tokenizer.json")).unwrap(), "neither tokenizer.json nor vocab.json");
    let vocabulary_alone = |dir: &Path| {
        std::fs::rename(dir.join("tokenizer.json"), dir.join("vocab.json")).unwrap();
    };
    refused(&vocabulary_alone, "merges.txt");
}

struct Clip {
    model: ClipText,
    ids: Tensor,
    io: Weights,
}

fn clip_folder(name: &str) -> PathBuf {
    fixtures().join("clip").join(name)
}

/// Built on the file's weights with names that a change makes, and on a config that another changes.
fn clip(name: &str, config: impl Fn(&mut Value)) -> Clip {
    let mut fields = read(clip_folder(name).join("config.json"));
    config(&mut fields);
    let config: ClipConfig = dmd_models::networks::config::from_value(&fields).unwrap();
    let weights = Weights::load(&clip_folder(name).join("model.safetensors"), &Device::Cpu).unwrap();
    let mut plain = Weights::default();
    for (name, tensor) in weights.iter() {
        let name = name.strip_prefix("text_model.").unwrap_or(name);
        plain.insert(name, tensor.to_dtype(DType::F32).unwrap());
    }
    let mut loader = Loader::new(&plain);
    let model = ClipText::build(&config, &mut loader, plain.get("text_projection.weight").is_some()).unwrap();
    loader.finish().unwrap();
    let io = Weights::load(&clip_folder(name).join("io.safetensors"), &Device::Cpu).unwrap();
    Clip { model, ids: io.get("ids").unwrap().clone(), io }
}

impl Clip {
    fn pooled(&self) -> Tensor {
        let last = self.model.run(&Eager, &self.ids).unwrap().last;
        self.model.pooled(&Eager, &last, &self.ids, self.model.end()).unwrap()
    }

    fn expected(&self, name: &str) -> Tensor {
        self.io.get(name).unwrap().clone()
    }
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn gap(found: &Tensor, expected: &Tensor) -> f32 {
    largest(&(found - expected).unwrap()) / largest(expected)
}

/// `(B, C, 1, N)` to transformers' `(B, N, C)`.
fn rows(map: &Tensor) -> Tensor {
    map.squeeze(2).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
}

#[test]
fn states_and_pooled_outputs_equal_those_of_transformers() {
    for name in ["quick", "projected"] {
        let clip = clip(name, |_| {});
        let states = clip.model.run(&Eager, &clip.ids).unwrap();
        for (what, found) in
            [("last", rows(&states.last)), ("penultimate", rows(&states.penultimate)), ("pooled", clip.pooled())]
        {
            let gap = gap(&found, &clip.expected(what));
            println!("{name}, {what}: {gap:.2e} of the maximum");
            assert!(gap <= 2e-5, "{name}, {what}: {gap}");
        }
        let on_tape = clip.model.run(&Training::default(), &clip.ids).unwrap().last;
        assert!(gap(&on_tape, &states.last) < 1e-6);
    }
}

/// Both gelus differ, as do the two rules of where the end is.
#[test]
fn what_distinguishes_the_two_kinds_shows() {
    let other = clip("quick", |config| config["hidden_act"] = json!("gelu"));
    assert!(gap(&rows(&other.model.run(&Eager, &other.ids).unwrap().last), &other.expected("last")) > 1e-3);
    let other = clip("projected", |config| config["eos_token_id"] = json!(2));
    assert!(gap(&other.pooled(), &other.expected("pooled")) > 1e-3);
    let other = clip("quick", |config| config["eos_token_id"] = json!(39));
    assert!(gap(&other.pooled(), &other.expected("pooled")) < 2e-5);
}

#[test]
fn a_token_sees_those_before_it_alone() {
    let clip = clip("quick", |_| {});
    let early = rows(&clip.model.run(&Eager, &clip.ids).unwrap().last);
    let cut = clip.ids.narrow(1, 0, 4).unwrap().contiguous().unwrap();
    let cut = rows(&clip.model.run(&Eager, &cut).unwrap().last);
    assert!(gap(&cut, &early.narrow(1, 0, 4).unwrap()) < 1e-6);
    let error = clip.model.run(&Eager, &Tensor::zeros((1, 10), DType::I64, &Device::Cpu).unwrap()).unwrap_err();
    assert!(error.to_string().contains("10 tokens, this text encoder takes 1 to 9"), "{error}");
}

#[test]
fn configs_that_are_not_computed_are_refused_by_their_key() {
    let refused = |key: &str, value: Value, part: &str| {
        let mut fields = read(clip_folder("quick").join("config.json"));
        fields[key] = value;
        let found = dmd_models::networks::config::from_value::<ClipConfig>(&fields);
        let error = found.unwrap_err().to_string();
        assert!(error.contains(part), "expected {part:?} in {error}");
    };
    refused("architectures", json!(["T5EncoderModel"]), "architectures is [\"T5EncoderModel\"]");
    refused("model_type", json!("t5"), "model_type is \"t5\"");
    refused("hidden_act", json!("linear"), "hidden_act is \"linear\"");
    refused("num_attention_heads", json!(3), "hidden_size 16 does not divide");
    refused("hidden_size", json!(1u64 << 40), "hidden_size is 1099511627776");
    refused("eos_token_id", json!([1, 2]), "eos_token_id is [1,2]");
    refused("quantization_config", json!({"bits": 4}), "quantization_config");
}

/// A folder `text_encoder/` of this config and these weights, and the small tokenizer.
fn encoder(dir: &Path, rows: usize, name: impl Fn(&str) -> String) -> dmd_models::Result<TextEncoder> {
    let mut fields = read(clip_folder("projected").join("config.json"));
    fields["vocab_size"] = json!(rows);
    fields["max_position_embeddings"] = json!(20);
    fields["eos_token_id"] = json!(528);
    write(dir.join("config.json"), &fields);
    let mut weights = Weights::default();
    let file = Weights::load(&clip_folder("projected").join("model.safetensors"), &Device::Cpu).unwrap();
    let ramp = |rows: usize| {
        let values = (0..rows * 16).map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) * 0.3);
        Tensor::from_iter(values, &Device::Cpu).unwrap().reshape((rows, 16)).unwrap()
    };
    for (tensor, value) in file.iter() {
        let value = match tensor {
            "text_model.embeddings.token_embedding.weight" => ramp(rows),
            "text_model.embeddings.position_embedding.weight" => ramp(20),
            _ => value.clone(),
        };
        weights.insert(name(tensor), value);
    }
    weights.insert("text_model.embeddings.position_ids", Tensor::arange(0i64, 20, &Device::Cpu).unwrap());
    weights.save(&dir.join("model.safetensors"), &Default::default()).unwrap();
    TextEncoder::load(dir, &fixtures().join("tokenizers/pads-with-end"), &Device::Cpu)
}

/// Of both generations of transformers, and with the buffer of positions that old files have.
#[test]
fn names_with_and_without_their_prefix_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let texts =
        |encoder| TextEncoders { encoders: vec![encoder], layer: Layer::Last, size: None, guidance: None, zeros: true };
    let old = texts(encoder(dir.path(), 529, str::to_string).unwrap()).encode(&["a photo of a cat"]).unwrap();
    let strip = |name: &str| name.strip_prefix("text_model.").unwrap_or(name).to_string();
    let new = texts(encoder(dir.path(), 529, strip).unwrap()).encode(&["a photo of a cat"]).unwrap();
    let [old, new] = [old, new].map(|told| told.get(Way::Text).unwrap().clone());
    assert_eq!(largest(&(old - new).unwrap()), 0.0);
}

#[test]
fn a_table_with_fewer_rows_than_the_tokenizer_has_ids_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = encoder(dir.path(), 528, str::to_string).unwrap_err().to_string();
    assert!(error.contains("ids up to 528, the text encoder has a table of 528 (vocab_size)"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let error = encoder(dir.path(), 529, |name| name.replace("layers.1", "layers.7")).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("\"encoder.layers.1."), "{error}");
}

/// SDXL's: states before the last block of all encoders, the pooled text of the last and the sizes behind it; zeros but for
/// the sizes where nothing is said.
#[test]
fn several_encoders_stand_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let one = encoder(dir.path(), 529, str::to_string).unwrap();
    let single = TextEncoders {
        encoders: vec![one.clone()],
        layer: Layer::Penultimate,
        size: None,
        guidance: None,
        zeros: true,
    };
    let both = TextEncoders {
        encoders: vec![one.clone(), one],
        layer: Layer::Penultimate,
        size: Some([64, 48]),
        guidance: None,
        zeros: true,
    };
    assert_eq!((single.text_shape(), both.text_shape()), ([20, 16], [20, 32]));
    let prompts = ["a photo of a cat", "hello"];
    let (narrow, wide) = (single.encode(&prompts).unwrap(), both.encode(&prompts).unwrap());
    assert!(narrow.get(Way::Vector).is_none());
    let (narrow, text) = (narrow.get(Way::Text).unwrap(), wide.get(Way::Text).unwrap());
    assert_eq!(text.dims(), [2, 20, 32]);
    for half in text.chunk(2, 2).unwrap() {
        assert_eq!(largest(&(half - narrow).unwrap()), 0.0);
    }
    let vector = wide.get(Way::Vector).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!((vector[0].len(), &vector[1][12..]), (18, &[64.0, 48.0, 0.0, 0.0, 64.0, 48.0][..]));
    assert!(vector[0][..12] != vector[1][..12]);
    let nothing = both.unsaid().unwrap();
    assert_eq!(nothing.get(Way::Text).unwrap().dims(), [1, 20, 32]);
    assert_eq!(largest(nothing.get(Way::Text).unwrap()), 0.0);
    let vector = nothing.get(Way::Vector).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!((&vector[0][..12], &vector[0][12..]), (&[0.0; 12][..], &[64.0, 48.0, 0.0, 0.0, 64.0, 48.0][..]));
}
