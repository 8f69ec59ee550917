//! How the regression term compares two pictures: pixel by pixel, or by the features of a network.

use crate::config::Distance;
use crate::features::{FEATURE_SIGMA, FeatureNetwork};
use crate::loss::{l2, perceptual, pseudo_huber};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use dmd_models::{Autoencoder, Condition, Denoiser, Training};
use std::path::Path;

/// A distance ready to be measured.
pub enum Comparison {
    /// Mean square.
    L2,
    /// Between square and absolute value.
    PseudoHuber,
    /// Features of the teacher's encoder, and what it runs on.
    Teacher(Box<Denoiser>, Training),
    /// Features of an ONNX network, of the pictures behind samples.
    Onnx(Box<FeatureNetwork>, Option<Box<Autoencoder>>),
}

impl Comparison {
    /// Reads what the distance needs; the teacher runs on `training`, and `pictures` are compared at a time. `decoder` makes
    /// pictures of samples, where that is needed: networks of others look at nothing else.
    pub fn new(
        distance: &Distance,
        teacher: &Denoiser,
        training: &Training,
        pictures: usize,
        decoder: impl FnOnce() -> dmd_models::Result<Option<Autoencoder>>,
    ) -> Result<Self> {
        Ok(match distance {
            Distance::L2 => Comparison::L2,
            Distance::PseudoHuber => Comparison::PseudoHuber,
            Distance::TeacherFeatures => Comparison::Teacher(Box::new(teacher.clone()), training.clone()),
            Distance::Onnx(path) => {
                ensure!(Path::new(path).exists(), "{path}: no such file (loss.regression.distance)");
                let network = FeatureNetwork::load(Path::new(path))?;
                // Black pictures show what it lacks before a run begins.
                let decoder = decoder()?;
                let takes = teacher.network.takes();
                let [h, w] = takes.size.context("a teacher has a size")?;
                let (channels, factor) =
                    decoder.as_ref().map_or((takes.channels, 1), |d| (d.picture_channels(), d.factor()));
                let black = Tensor::zeros((pictures, channels, factor * h, factor * w), DType::F32, &Device::Cpu)?;
                network.distance(&black, &black)?;
                Comparison::Onnx(Box::new(network), decoder.map(Box::new))
            }
        })
    }

    /// Distance of samples f32 `(B, C, H, W)`, a scalar; the gradient reaches `x` only, networks stay as they are.
    pub fn distance(&self, x: &Tensor, target: &Tensor, cond: &Condition<Tensor>) -> Result<Tensor> {
        match self {
            Comparison::L2 => l2(x, target),
            Comparison::PseudoHuber => pseudo_huber(x, target),
            Comparison::Teacher(teacher, training) => {
                let features = |images: &Tensor| teacher.features(training, images, &[FEATURE_SIGMA], cond);
                perceptual(&features(x)?, &features(&target.detach())?)
            }
            Comparison::Onnx(network, decoder) => {
                let pictures = |x: &Tensor| decoder.as_ref().map_or(Ok(x.clone()), |decoder| decoder.decode(x));
                network.distance(&pictures(x)?, &pictures(&target.detach())?)
            }
        }
    }
}
