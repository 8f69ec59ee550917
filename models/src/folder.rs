//! A model folder is a diffusers folder: `model_index.json`, `unet/`, `scheduler/`. What diffusers has no field for
//! (the generator's sigma, class names, where the data came from) lies beside it in `dmd.json`.

mod scheduler;
pub use scheduler::Scheduler;

use crate::{Architecture, Condition, Denoiser, Error, Generator, Network, Result, UNet, UNetConfig, Way, Weights};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A diffusion model as it lies on the disk.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// `unet/config.json`.
    pub config: UNetConfig,
    /// `scheduler/scheduler_config.json`.
    pub scheduler: Scheduler,
    /// `unet/diffusion_pytorch_model.safetensors`, in the file's own dtype.
    pub weights: Weights,
    /// `dmd.json`; made up from the rest where diffusers wrote the folder.
    pub about: About,
}

/// What a folder of ours says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Teacher or generator.
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
    /// Version of dmd that wrote the folder.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A many-step diffusion model.
    Teacher,
    /// A one-step generator.
    Generator,
}

const WEIGHTS: &str = "diffusion_pytorch_model";

impl ModelFolder {
    /// Reads a folder. Errors name the file, and say what is missing for it to be a model.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        if !path.is_dir() {
            let what = if path.exists() { "is a file, expected a model folder" } else { "no such folder" };
            return Err(Error::file(path, what));
        }
        refuse_other_pipelines(path)?;
        let config_path = path.join("unet/config.json");
        let config = UNetConfig::from_json(&config_path, &read_text(&config_path)?)?;
        let scheduler_path = path.join("scheduler/scheduler_config.json");
        let scheduler = Scheduler::from_json(&scheduler_path, &read_text(&scheduler_path)?)?;
        let weights_path = weights_file(&path.join("unet"))?;
        let weights = modern_names(Weights::load(&weights_path, device)?);
        let about_path = path.join("dmd.json");
        let about = match about_path.exists() {
            true => serde_json::from_str(&read_text(&about_path)?).map_err(|e| Error::file(&about_path, e))?,
            false => About {
                kind: Kind::Teacher,
                sigma: None,
                steps: Vec::new(),
                classes: Vec::new(),
                null_class: false,
                data: None,
                version: String::new(),
                run: None,
            },
        };
        let folder = ModelFolder { config, scheduler, weights, about };
        folder.check().map_err(|e| Error::file(path, e))?;
        // Only here is it known which file a missing or mis-shaped tensor belongs to.
        UNet::new(&folder.config, &folder.weights).map_err(|e| Error::file(&weights_path, e))?;
        Ok(folder)
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
        for folder in ["unet", "scheduler"] {
            fs::create_dir_all(path.join(folder)).map_err(Error::io(path))?;
        }
        let text = |name: &str, text: String| crate::write_whole(&path.join(name), (text + "\n").as_bytes());
        let json = |value: &serde_json::Value| format!("{value:#}");
        let weights = self.weights.to(dtype, &Device::Cpu)?;
        weights.save(&path.join(format!("unet/{WEIGHTS}.safetensors")), &self.metadata())?;
        text("unet/config.json", self.config.to_json()?)?;
        text("scheduler/scheduler_config.json", json(self.scheduler.json()))?;
        text("dmd.json", json(&serde_json::to_value(&self.about).map_err(|e| Error::Config(e.to_string()))?))?;
        text("model_index.json", json(&self.model_index()))
    }

    /// The model, with f32 weights on this device, outside the autograd graph.
    pub fn denoiser(&self, device: &Device) -> Result<Denoiser> {
        self.denoiser_on(&self.weights.to(DType::F32, device)?.detached())
    }

    /// The model on other weights than the folder's, such as trainable ones.
    pub fn denoiser_on(&self, weights: &Weights) -> Result<Denoiser> {
        let network = UNet::new(&self.config, weights)?;
        let null = match self.n_classes() {
            Some(n) if self.about.null_class => Some(Tensor::new(&[n as i64], network.device())?),
            _ => None,
        };
        Ok(Denoiser {
            network: Network::UNet2D(network),
            prediction: self.scheduler.prediction(),
            levels: self.scheduler.levels()?,
            clip: self.scheduler.clip(),
            unconditional: null.map(|null| Condition::of(Way::Label, null)),
        })
    }

    /// The generator held at its first noise level, its only one if it makes a picture in one pass; none where the
    /// folder holds no generator.
    pub fn generator(&self, device: &Device) -> Result<Option<Generator>> {
        match (self.about.kind, self.about.sigma) {
            (Kind::Generator, Some(sigma)) => Ok(Some(Generator { denoiser: self.denoiser(device)?, sigma })),
            _ => Ok(None),
        }
    }

    /// Height and width of its pictures.
    pub fn size(&self) -> Result<[usize; 2]> {
        self.config.size().ok_or_else(|| Error::Config("unet/config.json has no sample_size".into()))
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
        self.config.num_class_embeds.map(|n| n.saturating_sub(usize::from(self.about.null_class)))
    }

    fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Config(message));
        if self.config.in_channels != self.config.out_channels {
            return refuse(format!(
                "in_channels {} and out_channels {} differ: a denoiser returns what it takes (learned variances are not supported)",
                self.config.in_channels, self.config.out_channels
            ));
        }
        if self.config.class_embed_type.is_some() {
            return refuse("class_embed_type timestep and identity have no list of classes to draw from, supported for whole models: null with num_class_embeds".into());
        }
        if self.config.sample_size.is_none() {
            return refuse("unet/config.json has no sample_size, which tells the size of the pictures".into());
        }
        if let Some(n) = self.n_classes()
            && !self.about.classes.is_empty()
            && self.about.classes.len() != n
        {
            return refuse(format!("dmd.json names {} classes, num_class_embeds is {n}", self.about.classes.len()));
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
            (Kind::Teacher, _) => Ok(()),
        }
    }

    fn model_index(&self) -> serde_json::Value {
        serde_json::json!({
            "_class_name": "DDPMPipeline",
            "_diffusers_version": "0.42.0",
            "scheduler": ["diffusers", self.scheduler.class_name()],
            "unet": ["diffusers", "UNet2DModel"],
        })
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

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::io(path))
}

/// Latent and text-conditional pipelines look alike from outside; say which part is not taken here.
fn refuse_other_pipelines(path: &Path) -> Result<()> {
    for part in ["vae", "text_encoder", "transformer"] {
        if path.join(part).is_dir() {
            return Err(Error::file(
                path,
                format!(
                    "has a {part}/ folder: only pixel-space UNet2DModel pipelines are supported, not latent or text-conditional ones"
                ),
            ));
        }
    }
    if !path.join("unet").is_dir() {
        let found = if path.join("config.json").exists() {
            " (a bare UNet: put it into a folder unet/ beside a folder scheduler/)"
        } else {
            ""
        };
        return Err(Error::file(path, format!("not a diffusers folder: it has no unet/{found}")));
    }
    Ok(())
}

fn weights_file(unet: &Path) -> Result<PathBuf> {
    let candidates = [".safetensors", ".safetensors.index.json", ".fp16.safetensors"]
        .map(|end| unet.join(format!("{WEIGHTS}{end}")));
    if let Some(found) = candidates.iter().find(|path| path.exists()) {
        return Ok(found.clone());
    }
    let pickle = unet.join(format!("{WEIGHTS}.bin"));
    let remedy = if pickle.exists() {
        "; there is a pickled .bin, save it again with save_pretrained(…, safe_serialization=True)"
    } else {
        ""
    };
    Err(Error::file(unet, format!("has no {WEIGHTS}.safetensors{remedy}")))
}

/// Attention layers of old files go by other names; diffusers renames them on loading too.
fn modern_names(weights: Weights) -> Weights {
    let legacy = [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
    let mut renamed = Weights::default();
    for (name, tensor) in weights.iter() {
        let old = legacy.iter().find(|(old, _)| name.contains(".attentions.") && name.contains(old));
        renamed.insert(old.map_or(name.to_string(), |(old, new)| name.replace(old, new)), tensor.clone());
    }
    renamed
}
