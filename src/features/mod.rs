//! Features of pictures, to score or compare them by: a model folder's encoder, or any ONNX network.

mod feeding;
mod network;
pub use feeding::{Feeding, Layout, Resize};
pub use network::FeatureNetwork;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dmd_models::{Eager, ModelFolder, Pipeline};
use dmd_runtime::network::Network;
use dmd_runtime::{Error, Options};
use feeding::with_outputs;
use ndarray::{Array2, Array4};
use std::path::{Path, PathBuf};

/// The noise level at which a model's encoder looks at clean pictures: low enough to see them whole.
pub const FEATURE_SIGMA: f64 = 0.1;

/// Pictures at a time.
const BATCH: usize = 64;

/// What pictures are looked at with.
pub enum Features {
    /// A model folder's encoder, seeing pictures without a class or a prompt where the model knows that, else as its
    /// first class.
    Model(Box<Pipeline>),
    /// An ONNX network in ONNX Runtime.
    OnnxRuntime {
        /// The file.
        path: PathBuf,
        /// It, loaded.
        network: Box<Network>,
        /// What it is fed.
        feeding: Feeding,
    },
    /// An ONNX network on candle, where ONNX Runtime's library is not found.
    Candle(Box<FeatureNetwork>),
}

impl Features {
    /// Reads a model folder or an .onnx file; `option` is where the path was given.
    pub fn load(option: &str, path: &Path, threads: Option<usize>) -> Result<Self> {
        ensure!(path.exists(), "{option} {}: no such file or folder", path.display());
        if path.is_dir() {
            let folder = ModelFolder::load(path, &Device::Cpu)?;
            return Ok(Features::Model(Box::new(folder.pipeline(&Device::Cpu)?)));
        }
        let feeding = Feeding::beside(path)?;
        // A file whose weights lie outside it is found by its path alone.
        let bytes = match feeding.output.is_empty() {
            true => None,
            false => Some(std::fs::read(path).with_context(|| path.display().to_string())?),
        };
        let bytes = bytes.map(|bytes| with_outputs(bytes, &feeding.output));
        let options = Options { threads, ..Options::default() };
        match Network::load(path, bytes.as_deref(), &options) {
            Ok(network) => Ok(Features::OnnxRuntime { path: path.into(), network: Box::new(network), feeding }),
            Err(Error::NoLibrary { .. } | Error::EngineDisabled { .. }) => {
                Ok(Features::Candle(Box::new(FeatureNetwork::load(path)?)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What they are, for people and in results.
    pub fn text(&self) -> String {
        match self {
            Features::Model(_) => "the encoder of a model folder".into(),
            Features::OnnxRuntime { feeding, .. } => format!("an ONNX network in ONNX Runtime, fed {}", feeding.text()),
            Features::Candle(network) => format!("an ONNX network on candle, fed {}", network.feeding().text()),
        }
    }

    /// One row per picture `(N, C, H, W)`: every map's mean over positions, side by side. `done` hears how many are through.
    pub fn rows(&mut self, images: &Array4<f32>, done: impl Fn(usize)) -> Result<Array2<f64>> {
        let (n, c, h, w) = images.dim();
        let mut rows: Vec<f64> = Vec::new();
        for first in (0..n).step_by(BATCH) {
            let len = BATCH.min(n - first);
            let part = images.slice(ndarray::s![first..first + len, .., .., ..]);
            let values: Vec<f32> = part.iter().map(|v| v.clamp(-1.0, 1.0)).collect();
            rows.extend(self.part(&Tensor::from_vec(values, (len, c, h, w), &Device::Cpu)?)?);
            done(first + len);
        }
        ensure!(rows.iter().all(|value| value.is_finite()), "the features hold values that are not finite");
        Ok(Array2::from_shape_vec((n, rows.len() / n), rows)?)
    }

    /// The rows of pictures `(B, C, H, W)` in [-1, 1], one after the other.
    fn part(&mut self, images: &Tensor) -> Result<Vec<f64>> {
        let n = images.dim(0)?;
        let (maps, channels_last) = match self {
            Features::Model(pipeline) => {
                let (denoiser, samples) = (&pipeline.denoiser, pipeline.samples(images)?);
                (denoiser.features(&Eager, &samples, &[FEATURE_SIGMA], &denoiser.by_default(n)?)?, false)
            }
            Features::Candle(network) => (network.features(images)?, network.channels_last()),
            Features::OnnxRuntime { path, network, feeding } => run(path, network, feeding, images)?,
        };
        let means = maps.into_iter().map(|map| {
            let map = if channels_last && map.rank() == 4 { map.permute((0, 3, 1, 2))? } else { map };
            Ok(if map.rank() > 2 { map.flatten_from(2)?.mean(2)? } else { map })
        });
        let means = means.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&means, 1)?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    }
}

/// The maps of pictures in ONNX Runtime, and whether their channels come last. A last part that is too small for the file
/// is filled up.
fn run(path: &Path, network: &mut Network, feeding: &Feeding, images: &Tensor) -> Result<(Vec<Tensor>, bool)> {
    let (path, n, layout) = (path.display(), images.dim(0)?, Layout::of(&network.axes));
    let at_a_time = layout.batch.unwrap_or(n);
    let mut parts: Vec<Vec<Tensor>> = Vec::new();
    for first in (0..n).step_by(at_a_time) {
        let len = at_a_time.min(n - first);
        let part = images.narrow(0, first, len)?;
        let part = match at_a_time - len {
            0 => part,
            missing => Tensor::cat(&[&part, &part.narrow(0, 0, 1)?.repeat((missing, 1, 1, 1))?], 0)?,
        };
        let fed = feeding.fed(&part, &layout)?;
        let named = network.run(fed.dims(), &fed.flatten_all()?.to_vec1::<f32>()?)?;
        let wanted = named.into_iter().filter(|(name, ..)| feeding.output.is_empty() || feeding.output.contains(name));
        let maps = wanted.map(|(name, shape, values)| {
            ensure!(
                shape.len() >= 2 && shape[0] == at_a_time,
                "{path}: output \"{name}\" is {shape:?}, expected a row of channels or more per picture"
            );
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.narrow(0, 0, len)?)
        });
        parts.push(maps.collect::<Result<_>>()?);
    }
    ensure!(parts.iter().all(|maps| !maps.is_empty()), "{path}: has no output of floats");
    let whole = (0..parts[0].len()).map(|map| Tensor::cat(&parts.iter().map(|maps| &maps[map]).collect::<Vec<_>>(), 0));
    Ok((whole.collect::<candle_core::Result<_>>()?, layout.channels_last))
}
