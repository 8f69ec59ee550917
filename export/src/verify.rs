//! The proof of an exported file: fixed noises and every label go through each engine that is present, and the
//! pictures are compared with candle's.

use crate::{Error, ExportOptions, Network, Precision, Result};
use candle_core::Tensor;
use candle_onnx::onnx::ModelProto;
use dmd_models::{Condition, Eager};
use dmd_runtime::noise::refine;
use dmd_runtime::{EngineChoice, EngineKind, Options, Output, engines, picture_noise, quantize};
use ndarray::{Array4, ArrayView4, Axis, s};
use serde::Serialize;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Seeds of the noises.
const SEEDS: [u64; 3] = [0, 1, 2];

/// Pictures, at the least.
pub(crate) const MIN_PICTURES: usize = 6;

/// Up to so many labels, each meets every seed; of more labels, each has one picture, and they take the seeds in turn.
const MAX_CROSSED: usize = 32;

/// A u8 picture may differ by one step where candle's value lies on the edge between two.
const MAX_LEVELS: f64 = 1.0;

/// What one engine made of the file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineVerdict {
    /// Its name.
    pub engine: String,
    /// Its version, if it is present.
    pub version: Option<String>,
    /// Whether its pictures are candle's.
    pub status: Status,
    /// Largest difference from candle: in values of [-1, 1], or in steps of u8.
    pub max_abs_difference: Option<f64>,
    /// Peak signal to noise ratio against candle, in dB; infinite where nothing differs.
    pub psnr_db: Option<f64>,
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "result", content = "reason")]
pub enum Status {
    /// Within the tolerance.
    Passed,
    /// Not checked, and why.
    Skipped(String),
    /// Beyond the tolerance, or the engine could not run the file.
    Failed(String),
}

impl std::fmt::Display for EngineVerdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let version = self.version.as_deref().map(|version| format!(" {version}")).unwrap_or_default();
        write!(f, "{}{version}: ", self.engine)?;
        match &self.status {
            Status::Passed => f.write_str("passed")?,
            // The runtime's reason goes on with a list of every place it looked at; the report keeps that.
            Status::Skipped(reason) => {
                let first = reason.lines().next().unwrap_or_default();
                write!(f, "skipped, {}", first.trim_end_matches("; tried"))?;
            }
            Status::Failed(reason) => write!(f, "failed, {reason}")?,
        }
        if let (Some(difference), Some(psnr)) = (self.max_abs_difference, self.psnr_db) {
            write!(f, " (max difference {difference:.2e}, PSNR {psnr:.1} dB)")?;
        }
        Ok(())
    }
}

/// What is exported, as calibration and checks run it.
pub(crate) struct Subject<'a, N> {
    /// The network at the noise level of each pass.
    pub passes: &'a [N],
    /// `[C, H, W]` of a picture.
    pub shape: [usize; 3],
    /// Pictures per run.
    pub batch: usize,
    /// Labels that the file takes; 0 for none.
    pub labels: usize,
    /// The class that every picture is of, where the file takes no label for that reason.
    pub fixed: Option<usize>,
}

/// Pictures that precisions are calibrated on, or more where there are more labels; their noise is none of the
/// verification's.
const CALIBRATION: usize = 32;
const CALIBRATION_SEED: u64 = 1 << 32;

/// Of them, how many each layer is measured on, or one of each label: that runs the network once per layer.
const MEASURED: usize = 12;

impl<N: Network> Subject<'_, N> {
    /// What every pass reads for some pictures of every label, pass by pass for one picture after the other.
    pub fn calibration(&self) -> Result<Inputs> {
        let first = self.first_pass(&[CALIBRATION_SEED], CALIBRATION, 1);
        if self.passes.len() == 1 {
            return Ok(first);
        }
        let (mut inputs, mut rows) = (Vec::new(), Vec::new());
        for i in 0..first.noise.dim().0 {
            self.picture(&first, i, |_, input| inputs.push(input.clone()))?;
            rows.extend((0..self.passes.len()).flat_map(|pass| first.rows(pass, i..i + 1, self.labels)));
        }
        let inputs = inputs.iter().map(array).collect::<Result<Vec<_>>>()?;
        Ok(Inputs { noise: stack(&inputs), labels: rows, n_measured: first.n_measured * self.passes.len(), ..first })
    }

    /// Fixed noises and the pictures that candle makes of them. Every label occurs, where there are few with every seed.
    pub fn samples(&self) -> Result<Samples> {
        let per_label = if self.labels <= MAX_CROSSED { SEEDS.len() } else { 1 };
        let inputs = self.first_pass(&SEEDS, MIN_PICTURES, per_label);
        let picture = |i: usize| array(&self.picture(&inputs, i, |_, _| {})?);
        let pictures = (0..inputs.noise.dim().0).map(picture).collect::<Result<Vec<_>>>()?;
        if pictures.iter().flatten().any(|value| !value.is_finite()) {
            let message = "the network itself makes pictures that are not finite; there is nothing to compare with";
            return Err(Error::Setting(message.into()));
        }
        let sigmas = self.passes.iter().map(Network::sigma).collect();
        Ok(Samples { sigmas, n_labels: self.labels, pictures: stack(&pictures), inputs })
    }

    /// `n` noises, or as many more as it takes to be a multiple of the batch and to meet each label `per_label` times in
    /// a row; `seeds` in turn.
    fn first_pass(&self, seeds: &[u64], n: usize, per_label: usize) -> Inputs {
        let whole = |n: usize| n.max(per_label * self.labels).next_multiple_of(self.batch);
        let n = whole(n);
        let one = |i: usize| picture_noise(seeds[i % seeds.len()], (i / seeds.len()) as u64, 1, self.shape);
        let noises: Vec<Array4<f32>> = (0..n).map(one).collect();
        let labels = (0..n).filter(|_| self.labels > 0).map(|i| (i / per_label % self.labels) as i64).collect();
        Inputs { batch: self.batch, noise: stack(&noises), labels, n_measured: whole(MEASURED) }
    }

    /// Picture `i` by every pass in turn, in candle; `see` is shown what each pass reads.
    fn picture(&self, inputs: &Inputs, i: usize, mut see: impl FnMut(usize, &Tensor)) -> Result<Tensor> {
        let device = self.passes[0].device();
        let noise = tensor(inputs.noise.slice(s![i..=i, .., .., ..]))?.to_device(&device)?;
        let label = self.fixed.map(|label| label as i64).or_else(|| inputs.labels.get(i).copied());
        let cond = Condition::of_classes(label, &device)?;
        let sigmas: Vec<f64> = self.passes.iter().map(Network::sigma).collect();
        through_passes(&sigmas, i, &noise, |pass, input| {
            see(pass, input);
            Ok::<_, Error>(self.passes[pass].generate(&Eager, input, &cond)?)
        })
    }
}

/// The pictures of noise `(B, C, H, W)` by every pass in turn, as [`dmd_runtime::Generator::run`] makes them: they are
/// the pictures `first ..` of a call.
fn through_passes<E: From<candle_core::Error>>(
    sigmas: &[f64],
    first: usize,
    noise: &Tensor,
    mut pass: impl FnMut(usize, &Tensor) -> std::result::Result<Tensor, E>,
) -> std::result::Result<Tensor, E> {
    let mut x = pass(0, noise)?;
    for (number, sigma) in sigmas.iter().enumerate().skip(1) {
        let mut values = Vec::with_capacity(x.elem_count());
        for (i, picture) in x.flatten_from(1)?.to_vec2::<f32>()?.iter().enumerate() {
            let at = values.len();
            values.resize(at + picture.len(), 0.0);
            refine(0, number, (first + i) as u64, picture, *sigma, &mut values[at..]);
        }
        x = pass(number, &Tensor::from_vec(values, x.shape(), x.device())?)?;
    }
    Ok(x)
}

/// What a graph is fed: noise and, where it takes them, labels or rows.
pub(crate) struct Inputs {
    batch: usize,
    noise: Array4<f32>,
    labels: Vec<i64>,
    /// How many of them, from the first on, are enough where the network runs once per layer.
    n_measured: usize,
}

impl Inputs {
    /// The first of [`runs`](Self::runs) that are enough to measure one layer after the other on.
    pub fn n_measured_runs(&self) -> usize {
        self.n_measured / self.batch
    }

    /// What one run after the other takes.
    pub fn runs(&self) -> candle_core::Result<Vec<(Tensor, Option<Tensor>)>> {
        let run = |(i, noise): (usize, ArrayView4<f32>)| {
            let labels = self.labels.get(i * self.batch..(i + 1) * self.batch);
            Ok((tensor(noise)?, labels.map(|labels| Tensor::new(labels, &CPU)).transpose()?))
        };
        self.noise.axis_chunks_iter(Axis(0), self.batch).enumerate().map(run).collect()
    }

    /// The rows of a pass for some pictures, where the file takes `n_labels`.
    fn rows(&self, pass: usize, pictures: Range<usize>, n_labels: usize) -> Vec<i64> {
        let label = |i: usize| self.labels.get(i).copied().unwrap_or(0);
        pictures.map(|i| (pass * n_labels.max(1)) as i64 + label(i)).collect()
    }
}

/// Inputs of the first pass, and the pictures that candle makes of them by all.
pub(crate) struct Samples {
    sigmas: Vec<f64>,
    n_labels: usize,
    inputs: Inputs,
    pictures: Array4<f32>,
}

impl Samples {
    /// How far `found` is from candle's pictures, in the unit of the output.
    fn compare(&self, found: &Found) -> Comparison {
        match found {
            Found::F32(found) => {
                let pairs = self.pictures.iter().zip(found);
                Comparison::of(pairs.map(|(a, b)| (f64::from(*a), f64::from(*b))), Output::F32)
            }
            Found::U8(found) => {
                let pairs = self.pictures.view().permuted_axes([0, 2, 3, 1]).into_iter().zip(found);
                Comparison::of(pairs.map(|(a, b)| (f64::from(quantize(*a)), f64::from(*b))), Output::U8)
            }
        }
    }
}

/// What pictures must be like.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Demand {
    /// Within this part of the largest value expected; one step for u8.
    Difference(f64),
    /// At least as like as this, in dB.
    Psnr(f64),
}

impl Demand {
    /// What a precision is held to.
    pub fn of(precision: Precision, tolerance: f64, min_psnr_db: Option<f64>) -> Self {
        match precision {
            Precision::Fp32 => Demand::Difference(tolerance),
            _ => Demand::Psnr(min_psnr_db.unwrap_or(precision.min_psnr_db())),
        }
    }

    /// What it means for an output, given the largest magnitude of the values expected.
    pub fn limit(self, output: Output, largest: f64) -> Limit {
        match (self, output) {
            (Demand::Difference(tolerance), Output::F32) => Limit::Difference(tolerance * largest),
            (Demand::Difference(_), Output::U8) => Limit::Difference(MAX_LEVELS),
            (Demand::Psnr(psnr), Output::F32) => Limit::Psnr(psnr),
            (Demand::Psnr(psnr), Output::U8) => Limit::Psnr(psnr.min(ONE_LEVEL_DB)),
        }
    }
}

/// [`Demand`] in numbers.
pub(crate) enum Limit {
    Difference(f64),
    Psnr(f64),
}

impl Limit {
    /// Why pictures are not like enough, if they are not.
    pub fn refusal(&self, Comparison { max, psnr_db }: &Comparison) -> Option<String> {
        match self {
            Limit::Difference(most) if max <= most => None,
            Limit::Difference(most) => Some(format!("differs by {max:.3e}, at most {most:.3e} is allowed")),
            Limit::Psnr(least) if psnr_db >= least => None,
            Limit::Psnr(least) => Some(format!("is at {psnr_db:.1} dB PSNR, expected {least:.1} at least")),
        }
    }
}

/// PSNR of bytes that are all off by one: rounding alone takes u8 pictures into that region.
pub(crate) const ONE_LEVEL_DB: f64 = 48.13;

/// How far values are from those expected: of [-1, 1], or steps of u8.
pub(crate) struct Comparison {
    pub max: f64,
    pub psnr_db: f64,
}

impl Comparison {
    /// Compares what was expected with what was found.
    pub fn of(pairs: impl Iterator<Item = (f64, f64)>, output: Output) -> Self {
        let (mut max, mut sum, mut n) = (0f64, 0f64, 0usize);
        for (expected, found) in pairs {
            // A NaN is as far away as can be; `max` alone would pass over it.
            let difference = if (expected - found).is_nan() { f64::INFINITY } else { (expected - found).abs() };
            (max, sum, n) = (max.max(difference), sum + difference.powi(2), n + 1);
        }
        Comparison { max, psnr_db: psnr_db(sum / n as f64, peak(output)) }
    }
}

/// The span of an output's values.
pub(crate) fn peak(output: Output) -> f64 {
    match output {
        Output::F32 => 2.0,
        Output::U8 => 255.0,
    }
}

/// Peak signal to noise ratio, in dB; infinite where nothing differs.
pub(crate) fn psnr_db(mean_square: f64, peak: f64) -> f64 {
    10.0 * (peak * peak / mean_square).log10()
}

/// Pictures as an engine gives them: `(N, C, H, W)` or `(N, H, W, C)`, in that order.
enum Found {
    F32(Vec<f32>),
    U8(Vec<u8>),
}

/// Runs the file through every engine that is asked for, one after the other. The model is the file's; it is given up
/// before an engine loads the weights once more.
pub(crate) fn verify(path: &Path, model: ModelProto, samples: &Samples, options: &ExportOptions) -> Vec<EngineVerdict> {
    let (output, library) = (options.output, &options.library);
    let demand = Demand::of(options.precision, options.tolerance, options.min_psnr_db);
    let largest = samples.pictures.iter().fold(0f64, |max, x| max.max(f64::from(x.abs())));
    let limit = &demand.limit(output, largest);
    let is_asked_for = |kind: EngineKind| match options.engines {
        EngineChoice::Auto => true,
        EngineChoice::OnnxRuntime => kind == EngineKind::OnnxRuntime,
        EngineChoice::Tract => kind == EngineKind::Tract,
    };
    let by_candle = (options.engines == EngineChoice::Auto)
        .then(|| verdict("candle-onnx", None, run_candle_onnx(&model, samples, output), samples, limit));
    drop(model);
    let verdicts = engines(library.as_deref()).into_iter().filter(|report| is_asked_for(report.kind)).map(|report| {
        let found = match report.reason {
            Some(reason) => Err(Status::Skipped(reason)),
            None => run_engine(path, samples, report.kind, library.clone()).map_err(Status::Failed),
        };
        verdict(&report.kind.to_string(), report.version, found, samples, limit)
    });
    verdicts.chain(by_candle).collect()
}

fn verdict(
    engine: &str,
    version: Option<String>,
    found: std::result::Result<Found, Status>,
    samples: &Samples,
    limit: &Limit,
) -> EngineVerdict {
    let compared = found.map(|found| samples.compare(&found));
    let status = match &compared {
        Err(status) => status.clone(),
        Ok(comparison) => match (limit.refusal(comparison), limit) {
            (None, _) => Status::Passed,
            (Some(refusal), Limit::Difference(_)) => Status::Failed(refusal),
            (Some(refusal), Limit::Psnr(_)) => {
                Status::Failed(format!("{refusal}; allow less with --min-psnr, or take a higher --precision"))
            }
        },
    };
    let compared = compared.ok();
    EngineVerdict {
        engine: engine.into(),
        version,
        status,
        max_abs_difference: compared.as_ref().map(|comparison| comparison.max),
        psnr_db: compared.as_ref().map(|comparison| comparison.psnr_db),
    }
}

fn run_engine(
    path: &Path,
    samples: &Samples,
    kind: EngineKind,
    library: Option<PathBuf>,
) -> std::result::Result<Found, String> {
    let engine = match kind {
        EngineKind::OnnxRuntime => EngineChoice::OnnxRuntime,
        EngineKind::Tract => EngineChoice::Tract,
    };
    let run = || {
        let generator = dmd_runtime::Generator::load(path, Options { engine, library, ..Options::default() })?;
        generator.run(samples.inputs.noise.view(), &samples.inputs.labels)
    };
    let images = run().map_err(|error| error.to_string())?;
    Ok(match images.output() {
        Output::F32 => Found::F32(images.to_f32().iter().copied().collect()),
        Output::U8 => Found::U8(images.to_u8().iter().copied().collect()),
    })
}

/// candle's own evaluator knows few operators; what it cannot run is no fault of the file.
fn run_candle_onnx(model: &ModelProto, samples: &Samples, output: Output) -> std::result::Result<Found, Status> {
    candle_onnx_pictures(model, samples, output).map_err(|error| {
        let text = error.to_string();
        Status::Skipped(match missing_operator(&text) {
            Some(operator) => format!("it lacks the operator {operator}"),
            None => text.lines().next().unwrap_or_default().to_string(),
        })
    })
}

/// The operator that candle's own evaluator of ONNX says it lacks, in the text of its error.
pub fn missing_operator(error: &str) -> Option<&str> {
    error.split("unsupported op_type ").nth(1)?.split(' ').next()
}

fn candle_onnx_pictures(model: &ModelProto, samples: &Samples, output: Output) -> candle_core::Result<Found> {
    let mut found = match output {
        Output::F32 => Found::F32(vec![]),
        Output::U8 => Found::U8(vec![]),
    };
    let Samples { sigmas, n_labels, inputs, .. } = samples;
    for (run, (noise, label)) in inputs.runs()?.into_iter().enumerate() {
        let pictures = run * inputs.batch..(run + 1) * inputs.batch;
        let image = through_passes(sigmas, pictures.start, &noise, |pass, noise| {
            let index = match sigmas.len() {
                1 => label.clone().map(|label| ("label", label)),
                _ => Some(("row", Tensor::new(inputs.rows(pass, pictures.clone(), *n_labels), &CPU)?)),
            };
            let given = [("noise", noise.clone())].into_iter().chain(index);
            let mut outputs = candle_onnx::simple_eval(model, given.map(|(name, x)| (name.into(), x)).collect())?;
            outputs.remove("image").ok_or_else(|| candle_core::Error::Msg("it gave no image".into()))
        })?;
        match &mut found {
            Found::F32(all) => all.extend(image.flatten_all()?.to_vec1::<f32>()?),
            Found::U8(all) => all.extend(image.flatten_all()?.to_vec1::<u8>()?),
        }
    }
    Ok(found)
}

const CPU: candle_core::Device = candle_core::Device::Cpu;

fn tensor(pictures: ArrayView4<f32>) -> candle_core::Result<Tensor> {
    Tensor::from_vec(pictures.iter().copied().collect::<Vec<f32>>(), pictures.shape(), &CPU)
}

fn array(pictures: &Tensor) -> Result<Array4<f32>> {
    let values = pictures.flatten_all()?.to_vec1::<f32>()?;
    Array4::from_shape_vec(pictures.dims4()?, values).map_err(|error| Error::Setting(error.to_string()))
}

fn stack(pictures: &[Array4<f32>]) -> Array4<f32> {
    let views: Vec<_> = pictures.iter().map(|picture| picture.view()).collect();
    ndarray::concatenate(Axis(0), &views).expect("all pictures have one shape, and there are some")
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmd_models::Backend;
    use std::collections::BTreeSet;

    /// A picture that is the noise.
    struct Same(f64);

    impl Network for Same {
        fn channels(&self) -> usize {
            1
        }

        fn sigma(&self) -> f64 {
            self.0
        }

        fn generate<B: Backend>(&self, b: &B, x: &B::Value, _: &Condition<B::Value>) -> dmd_models::Result<B::Value> {
            b.affine(x, &[1.0], 0.0)
        }
    }

    fn subject(passes: &[Same], batch: usize, labels: usize) -> Subject<'_, Same> {
        Subject { passes, shape: [1, 1, 1], batch, labels, fixed: None }
    }

    #[test]
    fn few_labels_meet_every_seed_and_many_take_them_in_turn() {
        let seed_of = |noise: f32| {
            let is_of = |seed: &u64| picture_noise(*seed, 0, 96, [1, 1, 1]).iter().any(|value| *value == noise);
            SEEDS.into_iter().find(is_of).unwrap()
        };
        for (labels, batch, pictures) in [(1, 1, 6), (7, 1, 21), (7, 4, 24), (32, 1, 96), (33, 1, 33), (100, 1, 100)] {
            let Inputs { noise, labels: found, .. } = subject(&[Same(1.0)], batch, labels).samples().unwrap().inputs;
            assert_eq!((noise.len(), found.len()), (pictures, pictures));
            let pairs: BTreeSet<(i64, u64)> = found.iter().zip(&noise).map(|(l, x)| (*l, seed_of(*x))).collect();
            let seeds = if labels <= MAX_CROSSED { SEEDS.len() } else { 1 };
            assert_eq!(pairs.len(), labels * seeds, "{labels} labels");
            assert_eq!(pairs.iter().map(|pair| pair.1).collect::<BTreeSet<_>>().len(), SEEDS.len());
        }
        assert_eq!(subject(&[Same(1.0)], 1, 0).samples().unwrap().inputs.noise.len(), MIN_PICTURES);
    }

    #[test]
    fn calibration_sees_many_pictures_and_measures_layers_on_few() {
        for (labels, batch, pictures, measured) in [(0, 1, 32, 12), (7, 5, 35, 3), (40, 1, 40, 40)] {
            let inputs = subject(&[Same(1.0)], batch, labels).calibration().unwrap();
            assert_eq!((inputs.noise.len(), inputs.n_measured_runs()), (pictures, measured));
        }
        // All passes of a picture, then those of the next one, each with its own row.
        let passes = [Same(3.0), Same(1.0)];
        let inputs = subject(&passes, 1, 3).calibration().unwrap();
        assert_eq!((inputs.noise.len(), inputs.n_measured_runs()), (64, 24));
        assert_eq!(inputs.labels[..6], [0, 3, 1, 4, 2, 5]);
    }

    #[test]
    fn values_that_are_no_numbers_are_as_far_away_as_can_be() {
        let compare = |found: f64| Comparison::of([(0.5, 0.5), (0.0, found)].into_iter(), Output::F32);
        assert_eq!(compare(0.0).psnr_db, f64::INFINITY);
        // 20 log₁₀ 2/√(0.02²/2) is 43.01 dB.
        assert!((compare(0.02).psnr_db - 43.0103).abs() < 1e-3);
        let psnr = Demand::Psnr(40.0).limit(Output::F32, 1.0);
        let difference = Demand::Difference(0.1).limit(Output::F32, 0.25);
        assert!(psnr.refusal(&compare(0.02)).is_none() && difference.refusal(&compare(0.02)).is_none());
        for found in [0.2, f64::NAN, f64::INFINITY] {
            assert!(psnr.refusal(&compare(found)).is_some() && difference.refusal(&compare(found)).is_some());
        }
    }
}
