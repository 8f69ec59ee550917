//! A model folder is a diffusers folder: `model_index.json` and parts by name, of which the network (`unet/`,
//! `transformer/`) and `scheduler/` are read, and others kept. What diffusers has no field for (the generator's sigma,
//! class names, where the data came from) lies beside them in `dmd.json`.

pub(crate) mod json;
mod layout;
mod scheduler;
pub use scheduler::Scheduler;

use crate::encoders::{Autoencoder, Layer, TextEncoder, TextEncoders};
use crate::error::printable;
use crate::networks::Told;
use crate::{Condition, Denoiser, Error, Generator, NetworkConfig, Pipeline, Result, Way, Weights};
use candle_core::{DType, Device, Tensor};
use layout::Layout;
pub use layout::Part;
pub(crate) use layout::{WEIGHTS, copy_folder, weights_file};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A diffusion model as it lies on the disk.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// The network's `config.json`.
    pub config: NetworkConfig,
    /// `scheduler/scheduler_config.json`.
    pub scheduler: Scheduler,
    /// The network's `diffusion_pytorch_model.safetensors`, in the file's own dtype.
    pub weights: Weights,
    /// `dmd.json`; made up from the rest where diffusers wrote the folder.
    pub about: About,
    /// The other parts of the pipeline by name, as they lie: a folder that is written of this one gets them too.
    pub parts: BTreeMap<String, Part>,
    /// Settings of the pipeline in `model_index.json`.
    pub settings: serde_json::Map<String, serde_json::Value>,
}

/// What a folder of ours says of itself. A person may write the same of a teacher from elsewhere: every field may be left
/// out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Teacher or generator.
    #[serde(default)]
    pub kind: Kind,
    /// The noise level a generator is held at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f64>,
    /// All noise levels of a generator of several steps, descending; empty for one step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<f64>,
    /// Names of the classes in the order of their labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// The last row of the class table stands for "no class": the model can be guided.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub null_class: bool,
    /// Where the pictures came from and under which licence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Version of dmd that wrote the folder; empty where none did.
    #[serde(default)]
    pub version: String,
    /// The configuration of the run that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<serde_json::Value>,
}

impl About {
    /// The noise level of each of a generator's passes, descending; empty for a teacher.
    pub fn sigmas(&self) -> &[f64] {
        if self.steps.is_empty() { self.sigma.as_slice() } else { &self.steps }
    }
}

/// What a folder holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A many-step diffusion model.
    #[default]
    Teacher,
    /// A one-step generator.
    Generator,
}

impl ModelFolder {
    /// Reads a folder. Errors name the file, and say what is missing for it to be a model.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let layout = Layout::of(path)?;
        layout.said.iter().for_each(|said| log::warn!("{}: {said}", path.display()));
        let (config, about) = described(&layout, path)?;
        let scheduler =
            Scheduler::from_value(json::read(&layout.scheduler)?).map_err(|e| Error::file(&layout.scheduler, e))?;
        if let Some(class) = layout.scheduler_class.filter(|class| !scheduler.same_as(class)) {
            log::warn!(
                "{}: model_index.json names {} as the scheduler, which knows other noise levels than {} in its own file; the file is taken",
                path.display(),
                printable(&class),
                scheduler.class_name()
            );
        }
        let weights_path = weights_file(&layout.network, WEIGHTS)?;
        let weights = Weights::load(&weights_path, device)?;
        let weights =
            plain_names(weights, config.landmark(), &weights_path).map_err(|e| Error::file(&weights_path, e))?;
        let folder = ModelFolder { config, scheduler, weights, about, parts: layout.parts, settings: layout.settings };
        folder.check().map_err(|e| Error::file(path, e))?;
        // Only here is it known which file a missing or mis-shaped tensor belongs to.
        folder.config.network(&folder.weights).map_err(|e| Error::file(&weights_path, e))?;
        Ok(folder)
    }

    /// What the small files of a folder tell of its network and of itself, without weights and scheduler.
    pub fn glance(path: &Path) -> Result<(NetworkConfig, About)> {
        described(&Layout::of(path)?, path)
    }

    /// Whether a path looks like a model folder, whole or not.
    pub fn is_at(path: &Path) -> bool {
        let parts = ["model_index.json", "unet", "transformer", "scheduler_config.json"];
        parts.iter().any(|part| path.join(part).exists())
    }

    /// Writes the folder aside and renames it into place, replacing what was there.
    pub fn save(&self, path: &Path, dtype: DType) -> Result<()> {
        let aside = with_suffix(path, ".partial");
        _ = fs::remove_dir_all(&aside);
        let write = || {
            self.write_into(&aside, dtype)?;
            replace_dir(&aside, path)
        };
        write().inspect_err(|_| _ = fs::remove_dir_all(&aside))
    }

    /// Writes the files of the model into a folder that may hold others, each file whole.
    pub fn write_into(&self, path: &Path, dtype: DType) -> Result<()> {
        let network = self.config.part();
        for folder in [network, "scheduler"] {
            fs::create_dir_all(path.join(folder)).map_err(Error::io(path))?;
        }
        let text = |name: &str, text: String| crate::write_whole(&path.join(name), (text + "\n").as_bytes());
        let pretty = |value: &serde_json::Value| format!("{value:#}");
        let weights = self.weights.to(dtype, &Device::Cpu)?;
        weights.save(&path.join(format!("{network}/{WEIGHTS}.safetensors")), &self.metadata())?;
        text(&format!("{network}/config.json"), self.config.to_json()?)?;
        text("scheduler/scheduler_config.json", self.scheduler.to_json())?;
        self.parts.iter().try_for_each(|(name, part)| part.copy_to(&path.join(name)))?;
        text("dmd.json", pretty(&serde_json::to_value(&self.about).map_err(|e| Error::Config(e.to_string()))?))?;
        text("model_index.json", pretty(&self.model_index()))
    }

    /// The model, with f32 weights on this device, outside the autograd graph.
    pub fn denoiser(&self, device: &Device) -> Result<Denoiser> {
        self.denoiser_on(&self.weights.to(DType::F32, device)?.detached())
    }

    /// The model on other weights than the folder's, such as trainable ones.
    pub fn denoiser_on(&self, weights: &Weights) -> Result<Denoiser> {
        let network = self.config.network(weights)?;
        let null = match self.n_classes() {
            Some(n) if self.about.null_class => Some(Tensor::new(&[n as i64], network.device())?),
            _ => None,
        };
        Ok(Denoiser {
            network,
            prediction: self.scheduler.prediction(),
            levels: self.scheduler.levels()?,
            clip: self.scheduler.clip(),
            unconditional: null.map(|null| Condition::of(Way::Label, null)),
        })
    }

    /// The model with what reads prompts and what makes pictures of its samples, on this device, f32.
    pub fn pipeline(&self, device: &Device) -> Result<Pipeline> {
        let mut denoiser = self.denoiser(device)?;
        let decoder = self.decoder(device)?;
        let text = self.text(device, decoder.as_ref().map_or(1, Autoencoder::factor))?;
        if let Some(text) = &text {
            denoiser.unconditional = Some(text.unsaid()?);
        }
        Ok(Pipeline { text, denoiser, decoder })
    }

    /// What makes pictures of its samples, with f32 weights on this device; none where they are pictures.
    pub fn decoder(&self, device: &Device) -> Result<Option<Autoencoder>> {
        let Some(part) = layout::DECODERS.iter().find_map(|name| self.parts.get(*name)) else { return Ok(None) };
        let broken = |error| Error::Config(format!("the decoder of the latents that the model makes: {error}"));
        let decoder = Autoencoder::load(&part.path, device).map_err(broken)?;
        let (made, channels) = (self.config.takes().channels, decoder.latent_channels());
        match made == channels {
            true => Ok(Some(decoder)),
            false => Err(Error::file(
                &part.path,
                format!("the decoder takes latents of {channels} channels, the network makes {made}"),
            )),
        }
    }

    /// What reads prompts, if the network is told text; `factor` is that of the decoder.
    pub fn text(&self, device: &Device, factor: usize) -> Result<Option<TextEncoders>> {
        let takes = self.config.takes();
        let Some(Told::Tokens(expected)) = takes.told.get(Way::Text) else { return Ok(None) };
        let refuse = |message: String| Err(Error::Config(message));
        let mut encoders = Vec::new();
        for [model, tokenizer] in layout::TEXT_ENCODERS {
            match (self.parts.get(model), self.parts.get(tokenizer)) {
                (Some(model), Some(tokenizer)) => {
                    encoders.push(TextEncoder::load(&model.path, &tokenizer.path, device)?)
                }
                (None, None) => {}
                (None, Some(_)) => return refuse(format!("has a {tokenizer}/ and no {model}/")),
                (Some(_), None) => return refuse(format!("has a {model}/ and no {tokenizer}/")),
            }
        }
        let Some(last) = encoders.last() else {
            return refuse("has no text_encoder/, and its network is told text".into());
        };
        // SDXL's network is told the pooled text and the sizes of the picture too.
        let is_xl =
            matches!(&self.config, NetworkConfig::UNet2DCondition(config) if config.addition_embed_type.is_some());
        let [_, height, width] = self.sample_shape()?;
        let zeros = self.settings.get("force_zeros_for_empty_prompt").and_then(serde_json::Value::as_bool);
        let pooled = last.model().pooled_width();
        let mut text = TextEncoders {
            layer: if is_xl { Layer::Penultimate } else { Layer::Last },
            size: is_xl.then_some([height * factor, width * factor]),
            guidance: None,
            zeros: zeros.unwrap_or(is_xl),
            encoders,
        };
        let [_, found] = text.text_shape();
        if found != *expected {
            return refuse(format!(
                "its text encoders tell {found} channels of a token, the network expects {expected}: they are not of one model"
            ));
        }
        let said = if is_xl { pooled + 6 } else { 0 };
        match takes.told.get(Way::Vector) {
            None => Ok(Some(text)),
            Some(Told::Values(shape)) if shape[..] == [said] => Ok(Some(text)),
            // The scale that a latent consistency model is told, in diffusers' pipeline where none is given.
            Some(Told::Values(shape)) if shape[..] == [said + 1] => {
                text.guidance = Some(8.5);
                Ok(Some(text))
            }
            Some(told) => refuse(format!(
                "its last text encoder has a pooled output of {pooled} numbers, which is not what the network is told ({told:?})"
            )),
        }
    }

    /// The generator held at its first noise level, its only one if it makes a picture in one pass; none where the
    /// folder holds no generator.
    pub fn generator(&self, device: &Device) -> Result<Option<Generator>> {
        match (self.about.kind, self.about.sigma) {
            (Kind::Generator, Some(sigma)) => Ok(Some(Generator { denoiser: self.denoiser(device)?, sigma })),
            _ => Ok(None),
        }
    }

    /// `[C, H, W]` of a sample: what the network takes and makes.
    pub fn sample_shape(&self) -> Result<[usize; 3]> {
        let takes = self.config.takes();
        let [height, width] = takes.size.ok_or_else(|| {
            Error::Config(format!(
                "{}/config.json has no sample_size, which tells the size of the pictures",
                self.config.part()
            ))
        })?;
        Ok([takes.channels, height, width])
    }

    /// Class names; their numbers where the folder names none; empty for an unconditional model.
    pub fn classes(&self) -> Vec<String> {
        match self.n_classes() {
            Some(n) if self.about.classes.is_empty() => (0..n).map(|i| i.to_string()).collect(),
            Some(_) => self.about.classes.clone(),
            None => Vec::new(),
        }
    }

    /// Number of classes, "no class" aside; none for an unconditional model.
    pub fn n_classes(&self) -> Option<usize> {
        self.config.takes().n_classes().map(|n| n.saturating_sub(usize::from(self.about.null_class)))
    }

    fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Config(message));
        if let Some(reason) = self.config.why_no_model() {
            return refuse(reason);
        }
        if let Some((name, tensor)) = self.weights.iter().find(|(_, tensor)| !tensor.dtype().is_float()) {
            return refuse(format!(
                "tensor \"{name}\" is {:?}: quantised weights are not supported, expected F32, F16, BF16 or F64",
                tensor.dtype()
            ));
        }
        self.sample_shape()?;
        let told = self.config.takes().told.get(Way::Text).is_some();
        let told_by = ["text_encoder", "text_encoder_2"].into_iter().find(|name| self.parts.contains_key(*name));
        match told_by {
            None if told => return refuse("has no text_encoder/, and its network is told text".into()),
            Some(name) if !told => return refuse(format!("has a {name}/, and its network is told no text")),
            _ => {}
        }
        if let Some(n) = self.n_classes()
            && !self.about.classes.is_empty()
            && self.about.classes.len() != n
        {
            return refuse(format!("dmd.json names {} classes, the network knows {n}", self.about.classes.len()));
        }
        if self.about.null_class && self.n_classes().is_none_or(|n| n == 0) {
            return refuse("dmd.json says null_class, but the model has no classes to leave out".into());
        }
        match (self.about.kind, self.about.sigma) {
            (Kind::Generator, Some(sigma)) if sigma > 0.0 && sigma.is_finite() => {
                let steps = &self.about.steps;
                let whole = steps.windows(2).all(|pair| pair[0] > pair[1]) && steps.iter().all(|s| *s > 0.0);
                if !steps.is_empty() && (steps[0] != sigma || !whole) {
                    return refuse(format!("dmd.json says steps {steps:?}, expected descending from sigma ({sigma})"));
                }
                Ok(())
            }
            (Kind::Generator, sigma) => {
                refuse(format!("dmd.json says generator with sigma {sigma:?}, expected a positive number"))
            }
            (Kind::Teacher, None) if self.about.steps.is_empty() => Ok(()),
            (Kind::Teacher, _) => {
                refuse("dmd.json has sigma or steps, which a generator has: it says no kind, or teacher".into())
            }
        }
    }

    fn model_index(&self) -> serde_json::Value {
        let scheduler = self.scheduler.class_name();
        let mut index = serde_json::json!({
            "_class_name": self.config.pipeline(scheduler),
            "_diffusers_version": "0.42.0",
            "scheduler": ["diffusers", scheduler],
            self.config.part(): ["diffusers", self.config.class()],
        });
        for (name, value) in &self.settings {
            index[name] = value.clone();
        }
        for (name, part) in &self.parts {
            index[name] = serde_json::json!([part.library, part.class]);
        }
        // No network says itself that its samples are latents.
        if self.parts.contains_key("vqvae") {
            index["_class_name"] = serde_json::json!("LDMPipeline");
        }
        if index["_class_name"] == layout::NAMES_CLASSES && !self.about.classes.is_empty() {
            let names = self.about.classes.iter().enumerate();
            index["id2label"] = names.map(|(id, name)| (id.to_string(), serde_json::json!(name))).collect();
        }
        index
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        let about = serde_json::to_string(&self.about).unwrap_or_default();
        BTreeMap::from([("format".to_string(), "pt".to_string()), ("dmd".to_string(), about)])
    }
}

/// Moves a finished folder into place; the old one is removed only after the new one stands there.
pub fn replace_dir(aside: &Path, path: &Path) -> Result<()> {
    let old = with_suffix(path, ".old");
    _ = fs::remove_dir_all(&old);
    if path.exists() {
        fs::rename(path, &old).map_err(Error::io(path))?;
    }
    fs::rename(aside, path).map_err(Error::io(path))?;
    _ = fs::remove_dir_all(&old);
    Ok(())
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// What the small files tell.
fn described(layout: &Layout, path: &Path) -> Result<(NetworkConfig, About)> {
    let config_path = layout.network.join("config.json");
    let class = layout.network_class.as_deref();
    let config =
        NetworkConfig::from_value(&json::read(&config_path)?, class).map_err(|e| Error::file(&config_path, e))?;
    let about_path = path.join("dmd.json");
    let mut about: About = match about_path.exists() {
        true => serde_json::from_value(json::read(&about_path)?).map_err(|e| Error::file(&about_path, e))?,
        false => About::default(),
    };
    about.null_class |= config.has_null_class();
    if about.classes.is_empty() && !layout.classes.is_empty() {
        let n = config.takes().n_classes().map_or(0, |n| n.saturating_sub(usize::from(about.null_class)));
        let name = |id: usize| layout.classes.get(&id).cloned().unwrap_or_else(|| id.to_string());
        about.classes = (0..n).map(name).collect();
    }
    Ok((config, about))
}

/// Names as the network has them. What a wrapper put before or into them comes off, and is said; attention layers of old
/// files go by their new names, as in diffusers.
pub(crate) fn plain_names(weights: Weights, landmark: &str, path: &Path) -> Result<Weights> {
    const WRAPPERS: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];
    const LEGACY: [(&str, &str); 4] =
        [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
    let unwrapped = |name: &str| WRAPPERS.iter().fold(name.to_string(), |name, wrapper| name.replace(wrapper, ""));
    // One prefix of all, such as that of a module within another.
    let first = weights.names().map(unwrapped).find(|name| name.ends_with(&format!(".{landmark}"))).unwrap_or_default();
    let prefix = first.strip_suffix(landmark).unwrap_or_default();
    let prefix = if weights.names().all(|name| unwrapped(name).starts_with(prefix)) { prefix } else { "" };
    let mut plain = Weights::default();
    let mut wrapped = None;
    for (name, tensor) in weights.iter() {
        let unwrapped = unwrapped(name);
        let mut inner = unwrapped[prefix.len()..].to_string();
        if inner.len() < name.len() {
            wrapped = Some(name);
        }
        if let Some((old, new)) = LEGACY.iter().find(|(old, _)| inner.contains(".attentions.") && inner.contains(old)) {
            inner = inner.replace(old, new);
        }
        if plain.get(&inner).is_some() {
            return Err(Error::Config(format!("tensor \"{inner}\" is there twice, under an old or wrapped name too")));
        }
        plain.insert(inner, tensor.clone());
    }
    if let Some(name) = wrapped {
        log::warn!(
            "{}: what a wrapper put into the names of its tensors is taken off (\"{}\")",
            path.display(),
            printable(name)
        );
    }
    Ok(plain)
}
