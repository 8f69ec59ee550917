//! Every random number of a run, drawn from the counter-based generator by (seed, purpose, step): any step can be
//! replayed alone, and a resumed run draws what an uninterrupted one would have.

use anyhow::Result;
use candle_core::{Device, Tensor};
use dmd_models::Condition;
#[cfg(feature = "cuda")]
use dmd_models::ops;
use dmd_runtime::noise::Stream;

/// What a stream of random numbers is for; no two uses share one. 0 is `dmd_runtime::noise::PICTURE_NOISE`.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Purpose {
    /// Fresh weights.
    Init = 1,
    /// Which pictures make a batch.
    Batch = 2,
    /// Which of them are mirrored.
    Flip = 3,
    /// Noise levels of the teacher's training.
    TeacherSigma = 4,
    /// Noise of the teacher's training.
    TeacherNoise = 5,
    /// Noise levels and noise of the validation loss.
    Validation = 6,
    /// Which pictures lose their class in the teacher's training.
    LabelDropout = 7,
    /// The generator's input in its own update.
    GeneratorNoise = 16,
    /// Conditions in the generator's update.
    GeneratorLabel = 17,
    /// Noise level of the distribution-matching loss.
    GeneratorLevel = 18,
    /// Noise injected before the scores are asked.
    GeneratorEps = 19,
    /// The generator's input in an update of the fake score.
    CriticNoise = 20,
    /// Conditions in an update of the fake score.
    CriticLabel = 21,
    /// Noise level of the fake score's loss.
    CriticLevel = 22,
    /// Noise of the fake score's loss.
    CriticEps = 23,
    /// How many passes of a few-step generator an update simulates.
    Pass = 24,
    /// Noise between the passes of a few-step generator; the pass is part of the step.
    PassEps = 25,
    /// Noise levels of the discriminator's inputs: the generator's turn.
    AdversaryLevel = 26,
    /// Noise of the discriminator's inputs: the generator's turn.
    AdversaryEps = 27,
    /// Which real pictures the discriminator sees.
    RealBatch = 28,
    /// Noise levels of the discriminator's inputs: its own turn.
    DiscriminatorLevel = 29,
    /// Noise of the discriminator's inputs: its own turn.
    DiscriminatorEps = 30,
    /// Which noise–picture pairs the regression term sees.
    PairBatch = 31,
    /// Directions of the sliced Wasserstein distance.
    Directions = 32,
    /// Noise levels of the discriminator's view of generated pictures: its own turn.
    FakeLevel = 34,
    /// Noise of the discriminator's view of generated pictures: its own turn.
    FakeEps = 35,
    /// Conditions of noise–picture pairs.
    PairLabel = 33,
    /// Noise of a model's pictures that are scored.
    Scored = 36,
    /// Noise of a reference's, where that is a model: neither `sample`, `pairs` nor training draws these pictures.
    Reference = 37,
    /// Samples drawn anew from scored pictures, for a score's error.
    Bootstrap = 38,
    /// Halves of a reference.
    Halves = 39,
    /// Which of a real picture's captions is told.
    Caption = 40,
    /// What is drawn of the latents of a real picture.
    Latents = 41,
    /// Which samples the critic is shown without their condition.
    CriticDropout = 42,
    /// Noise that tells what another prompt changes.
    PromptEffect = 43,
    /// Points of the plane's data (benches/lab).
    AblationData = 48,
    /// Which mode each of them belongs to.
    AblationMode = 49,
    /// Noise that the plane's generators are measured on.
    AblationNoise = 50,
    /// Noise of its noise–image pairs.
    AblationPairs = 51,
}

/// A source of random tensors for one run on one device.
#[derive(Clone, Debug)]
pub struct Random {
    /// The run's seed.
    pub seed: u64,
    /// Where tensors are made.
    pub device: Device,
}

impl Random {
    /// The numbers of one purpose and step.
    pub fn stream(&self, purpose: Purpose, step: u64) -> Stream {
        Stream::new(self.seed, purpose as u32, step)
    }

    /// Unit normal, f32. A GPU makes the same numbers itself.
    pub fn normal(&self, purpose: Purpose, step: u64, shape: &[usize]) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return Ok(ops::philox_normal(self.seed, purpose as u32, step, shape, &self.device)?);
        }
        let values = self.stream(purpose, step).normal(shape.iter().product());
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    /// Uniform classes, `(n,)`; nothing for a model without classes.
    pub fn condition(
        &self,
        purpose: Purpose,
        step: u64,
        n: usize,
        classes: Option<usize>,
    ) -> Result<Condition<Tensor>> {
        let Some(classes) = classes else { return Ok(Condition::none()) };
        Ok(Condition::of_classes(self.stream(purpose, step).below(n, u32::try_from(classes)?), &self.device)?)
    }

    /// `n` table indices, uniform over an inclusive range.
    pub fn indices(&self, purpose: Purpose, step: u64, n: usize, [low, high]: [usize; 2]) -> Vec<usize> {
        self.stream(purpose, step).below(n, (high - low + 1) as u32).into_iter().map(|i| low + i as usize).collect()
    }
}

/// Unit normal noise of pictures `first..first + n` of a seed, as the runtime draws it: `(n, C, H, W)`, f32.
pub fn picture_noise(seed: u64, first: u64, n: usize, shape: [usize; 3], device: &Device) -> Result<Tensor> {
    let noise = dmd_runtime::picture_noise(seed, first, n, shape);
    let [c, h, w] = shape;
    Ok(Tensor::from_vec(noise.into_raw_vec_and_offset().0, (n, c, h, w), device)?)
}
