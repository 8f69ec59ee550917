//! What a distillation trains, what it begins as, and what trains it.

use super::discriminator::Discriminator;
use super::draw::Reality;
use crate::config::Config;
use crate::loss::RatioBins;
use crate::optim::Optimizer;
use crate::pairs::Pairs;
use crate::prompts::Prompts;
use crate::random::Random;
use crate::regression::Comparison;
use crate::sample::labels_in_turn;
use crate::train::Group;
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use dmd_models::{Condition, Denoiser, Eager, ModelFolder, Precision, Prediction, Training, Weights};
use std::collections::BTreeMap;

/// Generator, real score and fake score with what trains them.
pub struct Networks {
    /// The student, with gradient, and its noise levels, one per pass.
    pub(super) generator: Denoiser,
    /// The same weights outside the autograd graph.
    pub(super) generator_still: Denoiser,
    /// Its noise levels, one per pass, descending.
    pub sigmas: Vec<f64>,
    /// The teacher, frozen.
    pub(super) real_score: Denoiser,
    /// The critic, with gradient.
    pub(super) fake_score: Denoiser,
    /// The same weights outside the autograd graph.
    pub(super) fake_score_still: Denoiser,
    /// What the passes with gradient run on.
    pub(super) training: Training,
    /// Heads on the critic's encoder, for the adversarial term and the density ratio.
    pub discriminator: Option<Discriminator>,
    /// Mean density ratios, for divergences other than reverse KL.
    pub ratio_bins: RatioBins,
    /// The regression term's pairs and its distance.
    pub(super) regression: Option<(Pairs, Comparison)>,
    /// Real pictures in the teacher's classes.
    pub(super) reality: Option<Reality>,
    /// Prompts, for a teacher that is told text.
    pub(super) prompts: Option<Prompts>,
    /// Classifier-free guidance of the real score; 1 for none.
    pub(super) guidance_scale: f64,
    /// The generator's weights.
    pub generator_vars: BTreeMap<String, Var>,
    /// The fake score's weights.
    pub fake_vars: BTreeMap<String, Var>,
    /// Moving averages of the generator's weights, the exported one first.
    pub averages: Vec<Average>,
    /// Moments of the generator.
    pub generator_optimizer: Optimizer,
    /// Moments of the fake score.
    pub fake_optimizer: Optimizer,
    /// The processes whose gradients are added up.
    pub(super) group: Group,
    /// What both rates are multiplied by; below 1 after a run came back from trouble.
    pub rate_factor: f64,
    /// The samples of the generator's last update, for a critic that shares them.
    pub(super) last_samples: Option<Samples>,
    /// `(C, H, W)` of a sample.
    pub(super) shape: [usize; 3],
}

/// A moving average of the generator's weights.
pub struct Average {
    /// What an update leaves of it.
    pub decay: f64,
    /// Its values.
    pub vars: BTreeMap<String, Var>,
    /// A view of them to build a network on.
    pub view: Weights,
}

/// What the networks begin as, and what they learn from besides the teacher: by default, nothing.
#[derive(Default)]
pub struct Beginning {
    /// The generator's weights; none for the teacher's.
    pub generator: Option<Weights>,
    /// The fake score's weights; none for the teacher's.
    pub fake_score: Option<Weights>,
    /// Real pictures in the teacher's classes.
    pub reality: Option<Reality>,
    /// Noise–picture pairs.
    pub pairs: Option<Pairs>,
    /// Prompts, for a teacher that is told text.
    pub prompts: Option<Prompts>,
}

/// Pictures of the generator with what it was told of them.
pub(super) struct Samples {
    pub x: Tensor,
    pub cond: Condition<Tensor>,
}

impl Networks {
    /// All three begin as the teacher, unless `beginning` says otherwise.
    pub fn new(
        teacher: &ModelFolder,
        sigmas: &[f64],
        config: &Config,
        beginning: Beginning,
        random: &Random,
    ) -> Result<Self> {
        let device = &random.device;
        let start = teacher.weights.to(DType::F32, device)?;
        let or_start = |weights: Option<Weights>| weights.map_or(Ok(start.clone()), |w| w.to(DType::F32, device));
        let student = or_start(beginning.generator)?;
        let (generator_view, generator_vars) = student.trainable()?;
        let (fake_view, fake_vars) = or_start(beginning.fake_score)?.trainable()?;
        let average = |&decay: &f64| -> Result<Average> {
            let (view, vars) = student.trainable()?;
            Ok(Average { decay, vars, view })
        };
        let shape = teacher.sample_shape()?;
        let training = Training::new(config.precision, config.grad_checkpoint);
        let denoiser = |weights: &Weights| -> Result<Denoiser> {
            let denoiser = teacher.denoiser_on(weights)?;
            Ok(match &beginning.prompts {
                Some(prompts) => prompts.guide(denoiser),
                None => denoiser,
            })
        };
        // Nothing is lost: every pass rounds the kernels of convolutions, and they alone, which are nearly all weights.
        let frozen = match config.precision {
            Precision::F32 => start.detached(),
            Precision::Bf16 => {
                start.map(|t| if t.rank() == 4 { t.to_dtype(DType::BF16) } else { Ok(t.clone()) })?.detached()
            }
        };
        let real_score = denoiser(&frozen)?;
        let gan = &config.loss.gan;
        let discriminator = match gan.on() {
            true => Some(Discriminator::new(
                &feature_shapes(&real_score, shape)?,
                gan.resolutions,
                config.optimizer,
                random,
            )?),
            false => None,
        };
        let regression = match beginning.pairs {
            Some(pairs) => {
                let distance = &config.loss.regression.distance;
                let at_once = config.batch / config.accumulate;
                let comparison =
                    Comparison::new(distance, &real_score, &training, at_once, || teacher.decoder(device))?;
                Some((pairs, comparison))
            }
            None => None,
        };
        Ok(Networks {
            generator: denoiser(&generator_view)?,
            generator_still: denoiser(&generator_view.detached())?,
            sigmas: sigmas.to_vec(),
            real_score,
            fake_score: denoiser(&fake_view)?,
            fake_score_still: denoiser(&fake_view.detached())?,
            training,
            discriminator,
            ratio_bins: RatioBins::new(RATIO_BINS, config.loss.ratio_memory),
            regression,
            reality: beginning.reality,
            guidance_scale: match &beginning.prompts {
                Some(prompts) => prompts.guidance_scale,
                None => config.real_score.guidance_scale,
            },
            prompts: beginning.prompts,
            generator_optimizer: Optimizer::new(&generator_vars, config.optimizer)?,
            fake_optimizer: Optimizer::new(&fake_vars, config.optimizer)?,
            averages: config.generator.ema.decays().iter().map(average).collect::<Result<_>>()?,
            generator_vars,
            fake_vars,
            group: Group::alone(),
            rate_factor: 1.0,
            last_samples: None,
            shape,
        })
    }

    /// `(C, H, W)` of a sample.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// What the networks are told of `n` samples where nobody chooses: prompts, or classes where there are any, in turn.
    pub fn told_in_turn(&self, n: usize, device: &Device) -> Result<Condition<Tensor>> {
        match &self.prompts {
            Some(prompts) => prompts.told(&(0..n).map(|i| (i % prompts.len()) as u32).collect::<Vec<_>>(), device),
            None => Ok(Condition::of_classes(labels_in_turn(n, self.real_score.n_classes()), device)?),
        }
    }

    /// The teacher, as the student sees it.
    pub fn real_score(&self) -> &Denoiser {
        &self.real_score
    }

    /// Standard deviation of the data: the teacher's own where it states one.
    pub(super) fn sigma_data(&self) -> f64 {
        match self.real_score.prediction {
            Prediction::Edm { sigma_data, .. } => sigma_data,
            _ => 0.5,
        }
    }

    pub(super) fn shape_of(&self, n: usize) -> [usize; 4] {
        let [c, h, w] = self.shape;
        [n, c, h, w]
    }
}

/// Ranges of noise levels that keep a mean density ratio each (10 in f-distill).
const RATIO_BINS: usize = 10;
/// Shapes `(C, H, W)` of the encoder's maps, found by running it once.
fn feature_shapes(denoiser: &Denoiser, [c, h, w]: [usize; 3]) -> Result<Vec<[usize; 3]>> {
    let x = Tensor::zeros((1, c, h, w), DType::F32, denoiser.network.device())?;
    let maps = denoiser.features(&Eager, &x, &[denoiser.levels.sigma_max()], &denoiser.by_default(1)?)?;
    maps.iter()
        .map(|map| {
            let (_, c, h, w) = map.dims4()?;
            Ok([c, h, w])
        })
        .collect()
}
