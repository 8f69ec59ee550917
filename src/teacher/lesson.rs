//! What a teacher learns: pictures or their latents, and what it is told of them, which may be learned too.

use super::{TeacherSettings, name_key};
use crate::data::Pictures;
use crate::memory;
use crate::output::say;
use crate::random::{Purpose, Random};
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use dmd_models::encoders::clip::{ClipConfig, ClipText};
use dmd_models::encoders::{TextEncoder, Tokenizer, clip_vocabulary};
use dmd_models::folder::Part;
use dmd_models::layers::Loader;
use dmd_models::networks::config::from_json;
use dmd_models::{Autoencoder, Backend, Condition, Way, Weights};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Pictures, with what stands around the network.
pub struct Lesson<'a> {
    /// As they are.
    pub pictures: &'a Pictures,
    latents: Option<Latents>,
    /// What reads captions.
    pub text: Option<Text>,
}

/// Latents of all pictures, on the CPU.
struct Latents {
    decoder: Autoencoder,
    /// Where it lies.
    path: PathBuf,
    class: String,
    mean: Tensor,
    std: Option<Tensor>,
}

/// Captions as tokens.
pub struct Text {
    tokenizer: Tokenizer,
    /// Of each picture, of each of its captions.
    ids: Vec<Vec<Vec<u32>>>,
    /// Of no caption.
    unsaid: Vec<u32>,
    /// The text encoder's `config.json`.
    pub config: ClipConfig,
    /// Where it stays as it is.
    still: Option<TextEncoder>,
    /// Parts that are kept as they lie.
    parts: BTreeMap<String, Part>,
    /// The pairs of a vocabulary that was learned.
    merges: Option<Vec<String>>,
}

/// Before the names of a text encoder's weights, beside the network's.
pub const TEXT: &str = "text_encoder.";
/// Pictures that are encoded at a time.
const BATCH: usize = 32;
/// Tokens of a caption at most, for the text encoder that is learned along where none is given.
const LENGTH: usize = 32;

impl<'a> Lesson<'a> {
    /// Reads what the settings name, encodes the pictures and counts the captions' words.
    pub fn new(settings: &TeacherSettings, pictures: &'a Pictures, device: &Device) -> Result<Self> {
        let latents = match settings.decoder.as_str() {
            "" => None,
            path => Some(Latents::of(pictures, Path::new(path), device)?),
        };
        let text = if settings.text { Some(Text::of(settings, pictures, device)?) } else { None };
        Ok(Lesson { pictures, latents, text })
    }

    /// `[C, H, W]` of a sample.
    pub fn shape(&self) -> Result<[usize; 3]> {
        match &self.latents {
            Some(latents) => {
                let (_, c, h, w) = latents.mean.dims4()?;
                Ok([c, h, w])
            }
            None => Ok([self.pictures.channels, self.pictures.height, self.pictures.width]),
        }
    }

    /// Whether samples are drawn from latents, with noise of their own.
    pub fn is_drawn(&self) -> bool {
        self.latents.as_ref().is_some_and(|latents| latents.std.is_some())
    }

    /// Clean samples of these pictures, some mirrored; `noise`, unit normal, decides where latents are distributions.
    pub fn samples(&self, picks: &[usize], flips: &[bool], noise: Option<&Tensor>, device: &Device) -> Result<Tensor> {
        let [c, h, w] = self.shape()?;
        let Some(Latents { mean, std, .. }) = &self.latents else {
            let (pixels, _) = self.pictures.batch(picks, flips);
            return Ok(Tensor::from_vec(pixels, (picks.len(), c, h, w), device)?);
        };
        let rows = Tensor::from_vec(picks.iter().map(|i| *i as u32).collect(), picks.len(), mean.device())?;
        let of = |all: &Tensor| -> Result<Tensor> { Ok(all.index_select(&rows, 0)?.to_device(device)?) };
        match (std, noise) {
            (Some(std), Some(noise)) => Ok((of(mean)? + (of(std)? * noise)?)?),
            _ => of(mean),
        }
    }

    /// What makes pictures of samples.
    pub fn decoder(&self) -> Option<&Autoencoder> {
        self.latents.as_ref().map(|latents| &latents.decoder)
    }

    /// Parts of the model folder beside the network; those that are learned are written to `out` first.
    pub fn parts(&self, learned: &Weights, out: &Path) -> Result<BTreeMap<String, Part>> {
        let mut parts = BTreeMap::new();
        if let Some(latents) = &self.latents {
            let part = Part { library: "diffusers".into(), class: latents.class.clone(), path: latents.path.clone() };
            parts.insert("vae".to_string(), part);
        }
        if let Some(text) = &self.text {
            parts.extend(text.parts.clone());
            if let Some(merges) = &text.merges {
                parts.extend(text.write(merges, learned, out)?);
            }
        }
        Ok(parts)
    }

    /// By what it is known again, beside pictures and network.
    pub fn known(&self) -> Result<Value> {
        let mut known = serde_json::Map::new();
        if let Some(latents) = &self.latents {
            let values = |x: &Tensor| -> Result<Vec<f32>> { Ok(x.flatten_all()?.to_vec1()?) };
            let std = latents.std.as_ref().map(values).transpose()?.unwrap_or_default();
            known.insert("latents".into(), json!(crate::fingerprint::numbers(&[&values(&latents.mean)?, &std], &[])));
        }
        if let Some(text) = &self.text {
            let captions: Vec<String> = self.pictures.captions.iter().map(|of| of.join("\n")).collect();
            known.insert("captions".into(), json!(crate::fingerprint::prompts(&captions)));
            known.insert("text_encoder".into(), serde_json::to_value(&text.config)?);
        }
        Ok(Value::Object(known))
    }
}

impl Latents {
    fn of(pictures: &Pictures, path: &Path, device: &Device) -> Result<Self> {
        let decoder = Autoencoder::load(path, device)?;
        let factor = decoder.factor();
        let sides = [pictures.height, pictures.width];
        ensure!(
            decoder.picture_channels() == pictures.channels && sides.iter().all(|side| side.is_multiple_of(factor)),
            "{}: makes pictures of {} channels with sides that are multiples of {factor}, those of the data are {:?}",
            path.display(),
            decoder.picture_channels(),
            [pictures.channels, pictures.height, pictures.width]
        );
        let (n, size) = (pictures.len(), (pictures.height / factor) * (pictures.width / factor));
        memory::room("the latents of all pictures", &[2, n, decoder.latent_channels(), size])?;
        let class = std::fs::read_to_string(path.join("config.json")).ok();
        let class =
            class.and_then(|text| serde_json::from_str::<Value>(&text).ok()?["_class_name"].as_str().map(String::from));
        let bar = crate::output::progress(n as u64, 0)?;
        let (mut means, mut stds) = (Vec::new(), Vec::new());
        for picks in (0..n).collect::<Vec<_>>().chunks(BATCH) {
            let (pixels, _) = pictures.batch(picks, &vec![false; picks.len()]);
            let shape = (picks.len(), pictures.channels, pictures.height, pictures.width);
            let encoded = decoder.encode(&Tensor::from_vec(pixels, shape, device)?)?;
            means.push(encoded.mean.to_device(&Device::Cpu)?);
            stds.extend(encoded.std.map(|std| std.to_device(&Device::Cpu)).transpose()?);
            bar.inc(picks.len() as u64);
        }
        bar.finish_and_clear();
        let mean = Tensor::cat(&means, 0)?;
        let std = if stds.is_empty() { None } else { Some(Tensor::cat(&stds, 0)?) };
        let spread = mean.flatten_all()?.to_dtype(DType::F64)?.var(0)?.to_scalar::<f64>()?.sqrt();
        ensure!(spread.is_finite(), "{}: makes latents that are not finite", path.display());
        say(&format!("latents {:?}, spread {spread:.2}", &mean.dims()[1..]));
        Ok(Latents { decoder, path: path.into(), class: class.unwrap_or("AutoencoderTiny".into()), mean, std })
    }
}

impl Text {
    fn of(settings: &TeacherSettings, pictures: &Pictures, device: &Device) -> Result<Self> {
        let path = Path::new(&settings.text_encoder);
        let captions = || pictures.captions.iter().flatten().map(String::as_str);
        let mut text = match path.is_dir() {
            true => Self::still(path, device)?,
            false => Self::learned(settings, captions())?,
        };
        let mut cut = 0;
        let mut ids = |caption: &str| -> Result<Vec<u32>> {
            let tokens = text.tokenizer.encode(caption)?;
            cut += usize::from(tokens.cut.is_some());
            Ok(tokens.ids)
        };
        let all = pictures.captions.iter().map(|of| of.iter().map(|caption| ids(caption)).collect());
        text.ids = all.collect::<Result<_>>()?;
        let n = captions().count();
        let most = text.tokenizer.length();
        say(&format!("{n} captions, {most} tokens each, {cut} of them cut"));
        text.unsaid = text.tokenizer.encode("")?.ids;
        Ok(text)
    }

    /// A model folder's text encoder, which stays as it is.
    fn still(path: &Path, device: &Device) -> Result<Self> {
        let part = |name: &str, class: &str| {
            let path = path.join(name);
            ensure!(path.is_dir(), "{}: no such folder (text_encoder)", path.display());
            Ok((name.to_string(), Part { library: "transformers".into(), class: class.into(), path }))
        };
        ensure!(
            !path.join("text_encoder_2").exists(),
            "{}: has two text encoders, teachers are trained with one here",
            path.display()
        );
        let parts = BTreeMap::from([part("text_encoder", "CLIPTextModel")?, part("tokenizer", "CLIPTokenizer")?]);
        let encoder = TextEncoder::load(&path.join("text_encoder"), &path.join("tokenizer"), device)?;
        Ok(Text {
            tokenizer: encoder.tokenizer().clone(),
            config: encoder.model().config().clone(),
            still: Some(encoder),
            parts,
            merges: None,
            ids: Vec::new(),
            unsaid: Vec::new(),
        })
    }

    /// One that is learned along, with a vocabulary of the captions.
    fn learned<'c>(settings: &TeacherSettings, captions: impl Iterator<Item = &'c str>) -> Result<Self> {
        let merges = clip_vocabulary::learn(captions, settings.vocabulary)?;
        let mut config = match settings.text_encoder.as_str() {
            "" => ClipConfig {
                hidden_size: 128,
                intermediate_size: 512,
                projection_dim: 128,
                num_hidden_layers: 4,
                num_attention_heads: 4,
                max_position_embeddings: LENGTH,
                ..ClipConfig::default()
            },
            path => {
                let text = std::fs::read_to_string(path).with_context(|| path.to_string())?;
                from_json::<ClipConfig>(Path::new(path), &text)?
            }
        };
        let tokens = clip_vocabulary::tokens(&merges);
        config.vocab_size = tokens.len();
        config.eos_token_id = (tokens.len() - 1) as u32;
        config.architectures = None;
        say(&format!("a vocabulary of {} tokens, learned from the captions", tokens.len()));
        Ok(Text {
            tokenizer: Tokenizer::of_merges(&merges, config.max_position_embeddings)?,
            config,
            still: None,
            parts: BTreeMap::new(),
            merges: Some(merges),
            ids: Vec::new(),
            unsaid: Vec::new(),
        })
    }

    /// Fresh weights, their names behind [`TEXT`]; none where it stays as it is.
    pub fn init(&self, random: &Random) -> Result<Weights> {
        let mut weights = Weights::default();
        if self.still.is_none() {
            let mut draw =
                |name: &str, n: usize| random.stream(Purpose::Init, name_key(&format!("{TEXT}{name}"))).uniform(n);
            weights.extend(TEXT, ClipText::init(&self.config, &mut draw)?);
        }
        Ok(weights)
    }

    /// The text encoder on these weights, or itself where it stays as it is.
    pub fn encoder(&self, learned: &Weights) -> Result<TextEncoder> {
        if let Some(still) = &self.still {
            return Ok(still.clone());
        }
        let mut loader = Loader::new(learned);
        let model = ClipText::build(&self.config, &mut loader, false)?;
        loader.finish()?;
        Ok(TextEncoder::new(self.tokenizer.clone(), model)?)
    }

    /// What is told of these pictures: of each the caption that a number in [0, 1) chooses, or nothing. Gradients reach the
    /// text encoder where it is learned along.
    pub fn told<B: Backend<Value = Tensor>>(
        &self,
        b: &B,
        encoder: &TextEncoder,
        picks: &[usize],
        chosen: &[f64],
        dropped: &[bool],
    ) -> Result<Condition<Tensor>> {
        let mut ids: Vec<i64> = Vec::new();
        for ((pick, chosen), dropped) in picks.iter().zip(chosen).zip(dropped) {
            let of_picture = &self.ids[*pick];
            let caption = &of_picture[((chosen * of_picture.len() as f64) as usize).min(of_picture.len() - 1)];
            let row = if *dropped { &self.unsaid } else { caption };
            ids.extend(row.iter().map(|id| i64::from(*id)));
        }
        let model = encoder.model();
        let ids = Tensor::from_vec(ids, (picks.len(), self.tokenizer.length()), model.device())?;
        let states = model.run(b, &ids)?.last.squeeze(2)?.transpose(1, 2)?.contiguous()?;
        Ok(Condition::of(Way::Text, if self.still.is_some() { states.detach() } else { states }))
    }

    /// What is told of no picture.
    pub fn unsaid<B: Backend<Value = Tensor>>(&self, b: &B, encoder: &TextEncoder) -> Result<Condition<Tensor>> {
        Ok(self.told(b, encoder, &[0], &[0.0], &[true])?.try_map(|rows| Ok::<_, candle_core::Error>(rows.detach()))?)
    }

    /// Writes what was learned.
    fn write(&self, merges: &[String], learned: &Weights, out: &Path) -> Result<BTreeMap<String, Part>> {
        let part = |name: &str, class: &str| -> Result<(String, Part)> {
            let path = out.join(name);
            std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
            Ok((name.to_string(), Part { library: "transformers".into(), class: class.into(), path }))
        };
        let (name, encoder) = part("text_encoder", "CLIPTextModel")?;
        let mut config = serde_json::to_value(&self.config)?;
        config["architectures"] = json!(["CLIPTextModel"]);
        config["model_type"] = json!("clip_text_model");
        let begin = self.config.vocab_size - 2;
        config["bos_token_id"] = json!(begin);
        config["pad_token_id"] = json!(begin + 1);
        dmd_models::write_whole(&encoder.path.join("config.json"), format!("{config:#}\n").as_bytes())?;
        let mut weights = Weights::default();
        weights.extend("text_model.", learned.to(DType::F32, &Device::Cpu)?);
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        weights.save(&encoder.path.join("model.safetensors"), &metadata)?;
        let (tokens, tokenizer) = part("tokenizer", "CLIPTokenizer")?;
        clip_vocabulary::write(&tokenizer.path, merges, self.tokenizer.length(), None)?;
        Ok(BTreeMap::from([(name, encoder), (tokens, tokenizer)]))
    }
}

/// Refuses data that cannot teach what the settings ask for.
pub fn check(settings: &TeacherSettings, pictures: &Pictures) -> Result<()> {
    if settings.text {
        ensure!(!pictures.captions.is_empty(), "the pictures have no captions, and text is to be learned");
    } else if settings.label_dropout > 0.0 && pictures.classes.is_empty() {
        bail!("label_dropout is {}, but the pictures have no classes to drop", settings.label_dropout);
    }
    Ok(())
}

/// A model folder's pipeline needs the names of what it has.
pub fn settings_of_pipeline(text: bool) -> serde_json::Map<String, Value> {
    let mut settings = serde_json::Map::new();
    if text {
        settings.insert("safety_checker".into(), json!([null, null]));
        settings.insert("feature_extractor".into(), json!([null, null]));
        settings.insert("requires_safety_checker".into(), json!(false));
    }
    settings
}
