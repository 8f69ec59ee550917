//! The proof of an exported file: fixed feeds and every label go through each engine that is present, and what comes out
//! is compared with candle's.

use crate::module::{Form, Input, Like, Module};
use crate::{Error, ExportOptions, Precision, Result};
use candle_core::{DType, Tensor};
use candle_onnx::onnx::ModelProto;
use dmd_models::{Condition, Eager};
use dmd_runtime::noise::refine;
use dmd_runtime::{
    EngineChoice, EngineKind, EngineReport, Feed, Given, Info, Options, Output, Values, engines, picture_noise,
    quantize,
};
use serde::Serialize;
use std::ops::Range;
use std::path::Path;

/// Seeds of the noises.
const SEEDS: [u64; 3] = [0, 1, 2];

/// Samples, at the least.
pub(crate) const MIN_SAMPLES: usize = 6;

/// Up to so many labels, each meets every seed; of more labels, each has one picture, and they take the seeds in turn.
const MAX_CROSSED: usize = 32;

/// Up to so many prompts meet every seed.
const MAX_ROWS: usize = 3;

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
pub(crate) struct Subject<'a, M> {
    /// The module at the noise level of each pass.
    pub passes: &'a [M],
    /// Samples per run.
    pub batch: usize,
    /// Labels that the file takes; 0 for none.
    pub labels: usize,
    /// The row that every sample is of, where the file takes no label for that reason.
    pub fixed: Option<usize>,
}

/// Samples that precisions are calibrated on, or more where there are more labels; their noise is none of the
/// verification's.
const CALIBRATION: usize = 32;
const CALIBRATION_SEED: u64 = 1 << 32;

/// Of them, how many each layer is measured on, or one of each label: that runs the network once per layer.
const MEASURED: usize = 12;

impl<M: Module> Subject<'_, M> {
    /// What every pass reads for some samples of every label, pass by pass for one sample after the other.
    pub fn calibration(&self) -> Result<Inputs> {
        let first = self.first_pass(&[CALIBRATION_SEED], CALIBRATION, 1)?;
        if self.passes.len() == 1 {
            return Ok(first);
        }
        let (mut noises, mut rows, mut samples) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..first.n_samples() {
            self.sample(&first, i, |_, input| noises.push(input.clone()))?;
            rows.extend((0..self.passes.len()).flat_map(|pass| first.rows(pass, i..i + 1, self.labels)));
            samples.extend(vec![i as u32; self.passes.len()]);
        }
        let samples = Tensor::new(samples, &CPU)?;
        let again = |(name, feed): &(String, Tensor)| Ok((name.clone(), feed.index_select(&samples, 0)?));
        let mut feeds = first.feeds.iter().map(again).collect::<Result<Vec<_>>>()?;
        feeds[0].1 = Tensor::cat(&noises, 0)?.to_device(&CPU)?;
        Ok(Inputs { feeds, labels: rows, n_measured: first.n_measured * self.passes.len(), ..first })
    }

    /// Fixed feeds and what candle makes of them. Every label occurs, where there are few with every seed.
    pub fn samples(&self) -> Result<Samples> {
        let per_label = if self.labels <= MAX_CROSSED { SEEDS.len() } else { 1 };
        let inputs = self.first_pass(&SEEDS, MIN_SAMPLES, per_label)?;
        let of_each =
            (0..inputs.n_samples()).map(|i| self.sample(&inputs, i, |_, _| {})).collect::<Result<Vec<_>>>()?;
        let mut expected = Vec::new();
        for (at, gives) in self.passes[0].outputs().into_iter().enumerate() {
            let values =
                of_each.iter().map(|outputs| outputs[at].to_device(&CPU)).collect::<candle_core::Result<Vec<_>>>()?;
            let values = Tensor::cat(&values, 0)?;
            if values.flatten_all()?.to_vec1::<f32>()?.iter().any(|value| !value.is_finite()) {
                let message = "the network itself makes values that are not finite; there is nothing to compare with";
                return Err(Error::Setting(message.into()));
            }
            expected.push(Expected { form: gives.form, values });
        }
        Ok(Samples { sigmas: self.sigmas(), n_labels: self.labels, expected, inputs })
    }

    fn sigmas(&self) -> Vec<f64> {
        self.passes.iter().filter_map(Module::sigma).collect()
    }

    /// Feeds of `n` samples, or of as many more as it takes to be a multiple of the batch and to meet each label
    /// `per_label` times in a row; `seeds` in turn.
    fn first_pass(&self, seeds: &[u64], n: usize, per_label: usize) -> Result<Inputs> {
        let rows = self.passes[0]
            .inputs()
            .iter()
            .map(|input| match &input.like {
                Like::Normal => 0,
                Like::Features(rows) | Like::Ids(rows) => rows.dims()[0],
            })
            .max()
            .unwrap_or(0);
        let least = (per_label * self.labels).max(seeds.len() * rows.min(MAX_ROWS));
        let whole = |n: usize| n.max(least).next_multiple_of(self.batch);
        let n = whole(n);
        let feed = |input: &Input| -> Result<(String, Tensor)> {
            let values = match &input.like {
                Like::Normal => {
                    let all = [input.shape.iter().product(), 1, 1];
                    let draw = |i: usize| picture_noise(seeds[i % seeds.len()], (i / seeds.len()) as u64, 1, all);
                    Tensor::from_iter((0..n).flat_map(draw), &CPU)?.reshape([&[n], &input.shape[..]].concat())?
                }
                Like::Features(rows) | Like::Ids(rows) => {
                    // Each meets every seed, as labels do.
                    let turns = (0..n).map(|i| (i / seeds.len() % rows.dims()[0]) as u32);
                    rows.to_device(&CPU)?.index_select(&Tensor::from_iter(turns, &CPU)?, 0)?
                }
            };
            Ok((input.name.clone(), values))
        };
        let feeds = self.passes[0].inputs().iter().map(feed).collect::<Result<_>>()?;
        let labels = (0..n).filter(|_| self.labels > 0).map(|i| (i / per_label % self.labels) as i64).collect();
        let index = if self.passes.len() > 1 { "row" } else { "label" };
        Ok(Inputs { batch: self.batch, feeds, index, labels, n_measured: whole(MEASURED) })
    }

    /// Sample `i` by every pass in turn, in candle; `see` is shown the noise that each pass reads.
    fn sample(&self, inputs: &Inputs, i: usize, mut see: impl FnMut(usize, &Tensor)) -> Result<Vec<Tensor>> {
        let device = self.passes[0].device();
        let one = |(_, feed): &(String, Tensor)| feed.narrow(0, i, 1)?.to_device(&device);
        let mut feeds = inputs.feeds.iter().map(one).collect::<candle_core::Result<Vec<_>>>()?;
        let told = match self.fixed.or_else(|| inputs.labels.get(i).map(|label| *label as usize)) {
            Some(row) => {
                let rows = self.passes[0].told(row + 1)?;
                rows.try_map(|rows| Ok::<_, Error>(rows.narrow(0, row, 1)?.to_device(&device)?))?
            }
            None => Condition::none(),
        };
        through_passes(&self.sigmas(), i, &feeds[0].clone(), |pass, noise| {
            see(pass, noise);
            feeds[0] = noise.clone();
            Ok::<_, Error>(self.passes[pass].run(&Eager, &feeds, &told)?)
        })
    }
}

/// What every pass in turn makes of noise `(B, C, H, W)`, as [`dmd_runtime::Generator::run`] does it: samples `first ..` of
/// a call.
fn through_passes<E: From<candle_core::Error>>(
    sigmas: &[f64],
    first: usize,
    noise: &Tensor,
    mut pass: impl FnMut(usize, &Tensor) -> std::result::Result<Vec<Tensor>, E>,
) -> std::result::Result<Vec<Tensor>, E> {
    let mut outputs = pass(0, noise)?;
    for (number, sigma) in sigmas.iter().enumerate().skip(1) {
        let x = &outputs[0];
        let mut values = Vec::with_capacity(x.elem_count());
        for (i, sample) in x.flatten_from(1)?.to_vec2::<f32>()?.iter().enumerate() {
            let at = values.len();
            values.resize(at + sample.len(), 0.0);
            refine(0, number, (first + i) as u64, sample, *sigma, &mut values[at..]);
        }
        outputs = pass(number, &Tensor::from_vec(values, x.shape(), x.device())?)?;
    }
    Ok(outputs)
}

/// What a graph is fed: each input by its name and, where it takes them, labels or rows. f32, and whole numbers as i64.
pub(crate) struct Inputs {
    batch: usize,
    /// `(n, …)`.
    feeds: Vec<(String, Tensor)>,
    /// The name of the input that takes the labels.
    index: &'static str,
    labels: Vec<i64>,
    /// How many samples, from the first on, are enough where the network runs once per layer.
    n_measured: usize,
}

/// What one run takes.
pub(crate) type Feeds = Vec<(String, Tensor)>;

impl Inputs {
    fn n_samples(&self) -> usize {
        self.feeds.first().map_or(0, |(_, feed)| feed.dims()[0])
    }

    /// The first of [`runs`](Self::runs) that are enough to measure one layer after the other on.
    pub fn n_measured_runs(&self) -> usize {
        self.n_measured / self.batch
    }

    /// What one run after the other takes.
    pub fn runs(&self) -> candle_core::Result<Vec<Feeds>> {
        self.runs_of(self.batch)
    }

    fn runs_of(&self, batch: usize) -> candle_core::Result<Vec<Feeds>> {
        let run = |first: usize| {
            let n = batch.min(self.n_samples() - first);
            let one = |(name, feed): &(String, Tensor)| Ok((name.clone(), feed.narrow(0, first, n)?.contiguous()?));
            let mut feeds = self.feeds.iter().map(one).collect::<candle_core::Result<Feeds>>()?;
            if let Some(labels) = self.labels.get(first..first + n) {
                feeds.push((self.index.into(), Tensor::new(labels, &CPU)?));
            }
            Ok(feeds)
        };
        (0..self.n_samples()).step_by(batch).map(run).collect()
    }

    /// The rows of a pass for some samples, where the file takes `n_labels`.
    fn rows(&self, pass: usize, samples: Range<usize>, n_labels: usize) -> Vec<i64> {
        let label = |i: usize| self.labels.get(i).copied().unwrap_or(0);
        samples.map(|i| (pass * n_labels.max(1)) as i64 + label(i)).collect()
    }
}

/// Inputs of the first pass, and what candle makes of them by all.
pub(crate) struct Samples {
    sigmas: Vec<f64>,
    n_labels: usize,
    inputs: Inputs,
    expected: Vec<Expected>,
}

/// An output of all samples, by candle.
struct Expected {
    form: Form,
    values: Tensor,
}

impl Samples {
    /// Puts in the place of what is expected what `f` makes of its first output, sample by sample.
    pub fn map_expected(&mut self, form: Form, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let values = &self.expected[0].values;
        let each = (0..values.dims()[0]).map(|i| f(&values.narrow(0, i, 1)?)).collect::<Result<Vec<_>>>()?;
        self.expected = vec![Expected { form, values: Tensor::cat(&each, 0)? }];
        Ok(())
    }

    /// What `run` makes of the samples, `batch` at a time, output by output.
    pub fn through<E: From<candle_core::Error>>(
        &self,
        batch: usize,
        mut run: impl FnMut(&Feeds) -> std::result::Result<Vec<Tensor>, E>,
    ) -> std::result::Result<Vec<Tensor>, E> {
        let mut found: Vec<Vec<Tensor>> = self.expected.iter().map(|_| vec![]).collect();
        let mut first = 0;
        for mut feeds in self.inputs.runs_of(batch)? {
            let noise = feeds[0].1.clone();
            let samples = first..first + noise.dims()[0];
            first = samples.end;
            let outputs = through_passes(&self.sigmas, samples.start, &noise, |pass, noise| {
                feeds[0].1 = noise.clone();
                if self.sigmas.len() > 1 {
                    feeds.retain(|(name, _)| name != self.inputs.index);
                    let rows = self.inputs.rows(pass, samples.clone(), self.n_labels);
                    feeds.push((self.inputs.index.into(), Tensor::new(rows, &CPU)?));
                }
                run(&feeds)
            })?;
            found.iter_mut().zip(outputs).for_each(|(all, output)| all.push(output));
        }
        Ok(found.iter().map(|all| Tensor::cat(all, 0)).collect::<candle_core::Result<_>>()?)
    }

    /// How far what was found is from candle's, output by output, and what is allowed.
    fn compare(&self, found: &[Tensor], demand: Demand) -> candle_core::Result<Vec<(Comparison, Limit)>> {
        let one = |(Expected { form, values }, found): (&Expected, &Tensor)| {
            let is_u8 = found.dtype() == DType::U8;
            let expected = values.flatten_all()?.to_vec1::<f32>()?;
            let [low, high] = expected.iter().fold([f32::MAX, f32::MIN], |[low, high], x| [low.min(*x), high.max(*x)]);
            let output = if is_u8 { Output::U8 } else { Output::F32 };
            let largest = f64::from(low.abs().max(high.abs()));
            let span = if *form == Form::Picture { peak(output) } else { f64::from(high - low) };
            let expected = match is_u8 {
                true => values
                    .permute((0, 2, 3, 1))?
                    .flatten_all()?
                    .to_vec1::<f32>()?
                    .into_iter()
                    .map(|x| f32::from(quantize(x)))
                    .collect(),
                false => expected,
            };
            let found = found.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            // Values that are not there are as far away as can be.
            let missing = expected.len().saturating_sub(found.len());
            let found = found.into_iter().chain(std::iter::repeat_n(f32::NAN, missing));
            let pairs = expected.into_iter().zip(found).map(|(a, b)| (f64::from(a), f64::from(b)));
            Ok((Comparison::of(pairs, span), demand.limit(output, largest)))
        };
        self.expected.iter().zip(found).map(one).collect()
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
    /// Compares what was expected with what was found, of values that span so much.
    pub fn of(pairs: impl Iterator<Item = (f64, f64)>, span: f64) -> Self {
        let (mut max, mut sum, mut n) = (0f64, 0f64, 0usize);
        for (expected, found) in pairs {
            // A NaN is as far away as can be; `max` alone would pass over it.
            let difference = if (expected - found).is_nan() { f64::INFINITY } else { (expected - found).abs() };
            (max, sum, n) = (max.max(difference), sum + difference.powi(2), n + 1);
        }
        Comparison { max, psnr_db: psnr_db(sum / n as f64, span) }
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

/// Runs the file through every engine that is asked for, one after the other. The model is the file's; it is given up
/// before an engine loads the weights once more.
pub(crate) fn verify(path: &Path, model: ModelProto, samples: &Samples, options: &ExportOptions) -> Vec<EngineVerdict> {
    let demand = Demand::of(options.precision, options.tolerance, options.min_psnr_db);
    let by_candle = (options.engines == EngineChoice::Auto)
        .then(|| verdict("candle-onnx", None, run_candle_onnx(&model, samples), samples, demand));
    drop(model);
    let mut verdicts = judge(options, demand, samples, |kind| run_engine(path, samples, kind, options));
    verdicts.extend(by_candle);
    verdicts
}

/// What each engine that is asked for makes of the samples by `run`, one after the other.
pub(crate) fn judge(
    options: &ExportOptions,
    demand: Demand,
    samples: &Samples,
    run: impl Fn(EngineKind) -> Result<Vec<Tensor>>,
) -> Vec<EngineVerdict> {
    let is_asked_for = |kind: EngineKind| match options.engines {
        EngineChoice::Auto => true,
        EngineChoice::OnnxRuntime => kind == EngineKind::OnnxRuntime,
        EngineChoice::Tract => kind == EngineKind::Tract,
    };
    let reports = engines(options.library.as_deref()).into_iter().filter(|report| is_asked_for(report.kind));
    let one = |report: EngineReport| {
        let found = match report.reason {
            Some(reason) => Err(Status::Skipped(reason)),
            None => run(report.kind).map_err(|error| Status::Failed(error.to_string())),
        };
        verdict(&report.kind.to_string(), report.version, found, samples, demand)
    };
    reports.map(one).collect()
}

fn verdict(
    engine: &str,
    version: Option<String>,
    found: std::result::Result<Vec<Tensor>, Status>,
    samples: &Samples,
    demand: Demand,
) -> EngineVerdict {
    let failed = |error: candle_core::Error| Status::Failed(error.to_string());
    let compared = found.and_then(|found| samples.compare(&found, demand).map_err(failed));
    let status = match &compared {
        Err(status) => status.clone(),
        Ok(outputs) => match outputs.iter().find_map(|(found, limit)| Some((limit.refusal(found)?, limit))) {
            None => Status::Passed,
            Some((refusal, Limit::Difference(_))) => Status::Failed(refusal),
            Some((refusal, Limit::Psnr(_))) => {
                Status::Failed(format!("{refusal}; allow less with --min-psnr, or take a higher --precision"))
            }
        },
    };
    let outputs = compared.unwrap_or_default();
    let worst = |of: fn(&Comparison) -> f64, worse: fn(f64, f64) -> f64| {
        outputs.iter().map(|(comparison, _)| of(comparison)).reduce(worse)
    };
    EngineVerdict {
        engine: engine.into(),
        version,
        status,
        max_abs_difference: worst(|found| found.max, f64::max),
        psnr_db: worst(|found| found.psnr_db, f64::min),
    }
}

fn run_engine(path: &Path, samples: &Samples, kind: EngineKind, options: &ExportOptions) -> Result<Vec<Tensor>> {
    let opened = Opened::load(path, kind, options)?;
    if !samples.sigmas.is_empty() && samples.expected[0].form == Form::Picture {
        // What apps open.
        Info::read(path)?;
    }
    // Where their number is free, several at a time, within reason.
    let info = opened.0.info();
    let most = MAX_FREE_VALUES / info.file.largest_value.max(1);
    let batch = info.batch().unwrap_or(most.clamp(1, MIN_SAMPLES));
    samples.through(batch, |feeds| Ok(opened.run(feeds)?.into_iter().map(|(_, value)| value).collect()))
}

/// A file in an engine.
pub(crate) struct Opened(dmd_runtime::Module);

impl Opened {
    pub fn load(path: &Path, kind: EngineKind, options: &ExportOptions) -> Result<Self> {
        let engine = match kind {
            EngineKind::OnnxRuntime => EngineChoice::OnnxRuntime,
            EngineKind::Tract => EngineChoice::Tract,
        };
        let options = Options { engine, library: options.library.clone(), ..Options::default() };
        Ok(Opened(dmd_runtime::Module::load(path, options)?))
    }

    /// The outputs by name.
    pub fn run(&self, feeds: &Feeds) -> Result<Feeds> {
        let info = self.0.info();
        let lent = feeds.iter().map(|(name, value)| Lent::of(name, value, info)).collect::<Result<Vec<_>>>()?;
        let given = self.0.run(&lent.iter().map(Lent::feed).collect::<Vec<_>>())?;
        let n = feeds[0].1.dims()[0];
        let named = |(given, port): (Given, &dmd_runtime::Port)| {
            let shape: Vec<usize> = port.shape.iter().map(|side| side.unwrap_or(n)).collect();
            let value = match given {
                Given::F32(values) => Tensor::from_vec(values, shape, &CPU)?,
                Given::U8(values) => Tensor::from_vec(values, shape, &CPU)?,
            };
            Ok((port.name.clone(), value))
        };
        given.into_iter().zip(&info.outputs).map(named).collect()
    }
}

/// The most values that anything has in a run of more than one sample where their number is free.
const MAX_FREE_VALUES: usize = 1 << 28;

/// A feed of an engine, in the file's own type.
struct Lent<'a> {
    name: &'a str,
    shape: &'a [usize],
    floats: Vec<f32>,
    ids: Vec<i32>,
    index: Vec<i64>,
}

impl<'a> Lent<'a> {
    fn of(name: &'a str, value: &'a Tensor, info: &dmd_runtime::ModuleInfo) -> Result<Self> {
        let kind = info.inputs.iter().find(|port| port.name == name).map_or("f32", |port| port.kind.as_str());
        let mut lent = Lent { name, shape: value.dims(), floats: vec![], ids: vec![], index: vec![] };
        let flat = value.flatten_all()?;
        match kind {
            "f32" => lent.floats = flat.to_vec1()?,
            "i32" => lent.ids = flat.to_vec1::<i64>()?.into_iter().map(|id| id as i32).collect(),
            _ => lent.index = flat.to_vec1()?,
        }
        Ok(lent)
    }

    fn feed(&self) -> Feed<'_> {
        let values = match (self.ids.is_empty(), self.index.is_empty()) {
            (false, _) => Values::I32(&self.ids),
            (_, false) => Values::I64(&self.index),
            _ => Values::F32(&self.floats),
        };
        Feed { name: self.name, shape: self.shape, values }
    }
}

/// candle's own evaluator knows few operators; what it cannot run is no fault of the file.
fn run_candle_onnx(model: &ModelProto, samples: &Samples) -> std::result::Result<Vec<Tensor>, Status> {
    let names: Vec<&str> =
        model.graph.iter().flat_map(|graph| &graph.output).map(|output| output.name.as_str()).collect();
    let run = |feeds: &Feeds| -> candle_core::Result<Vec<Tensor>> {
        let mut outputs = candle_onnx::simple_eval(model, feeds.iter().cloned().collect())?;
        let missing = || candle_core::Error::Msg("it gave no output".into());
        names.iter().map(|name| outputs.remove(*name).ok_or_else(missing)).collect()
    };
    samples.through(samples.inputs.batch, run).map_err(|error| {
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

const CPU: candle_core::Device = candle_core::Device::Cpu;

#[cfg(test)]
mod tests {
    use super::*;
    use dmd_models::Backend;
    use std::collections::BTreeSet;

    /// A picture that is the noise.
    struct Same(f64);

    impl Module for Same {
        fn inputs(&self) -> Vec<Input> {
            vec![Input::noise([1, 1, 1])]
        }

        fn sigma(&self) -> Option<f64> {
            Some(self.0)
        }

        fn run<B: Backend>(&self, b: &B, x: &[B::Value], _: &Condition<B::Value>) -> dmd_models::Result<Vec<B::Value>> {
            Ok(vec![b.affine(&x[0], &[1.0], 0.0)?])
        }
    }

    fn subject(passes: &[Same], batch: usize, labels: usize) -> Subject<'_, Same> {
        Subject { passes, batch, labels, fixed: None }
    }

    fn noise(inputs: &Inputs) -> Vec<f32> {
        inputs.feeds[0].1.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn few_labels_meet_every_seed_and_many_take_them_in_turn() {
        let seed_of = |noise: f32| {
            let is_of = |seed: &u64| picture_noise(*seed, 0, 96, [1, 1, 1]).iter().any(|value| *value == noise);
            SEEDS.into_iter().find(is_of).unwrap()
        };
        for (labels, batch, pictures) in [(1, 1, 6), (7, 1, 21), (7, 4, 24), (32, 1, 96), (33, 1, 33), (100, 1, 100)] {
            let inputs = subject(&[Same(1.0)], batch, labels).samples().unwrap().inputs;
            let (noise, found) = (noise(&inputs), inputs.labels);
            assert_eq!((noise.len(), found.len()), (pictures, pictures));
            let pairs: BTreeSet<(i64, u64)> = found.iter().zip(&noise).map(|(l, x)| (*l, seed_of(*x))).collect();
            let seeds = if labels <= MAX_CROSSED { SEEDS.len() } else { 1 };
            assert_eq!(pairs.len(), labels * seeds, "{labels} labels");
            assert_eq!(pairs.iter().map(|pair| pair.1).collect::<BTreeSet<_>>().len(), SEEDS.len());
        }
        assert_eq!(noise(&subject(&[Same(1.0)], 1, 0).samples().unwrap().inputs).len(), MIN_SAMPLES);
    }

    #[test]
    fn calibration_sees_many_pictures_and_measures_layers_on_few() {
        for (labels, batch, pictures, measured) in [(0, 1, 32, 12), (7, 5, 35, 3), (40, 1, 40, 40)] {
            let inputs = subject(&[Same(1.0)], batch, labels).calibration().unwrap();
            assert_eq!((noise(&inputs).len(), inputs.n_measured_runs()), (pictures, measured));
        }
        // All passes of a picture, then those of the next one, each with its own row.
        let passes = [Same(3.0), Same(1.0)];
        let inputs = subject(&passes, 1, 3).calibration().unwrap();
        assert_eq!((noise(&inputs).len(), inputs.n_measured_runs()), (64, 24));
        assert_eq!(inputs.labels[..6], [0, 3, 1, 4, 2, 5]);
    }

    #[test]
    fn values_that_are_no_numbers_are_as_far_away_as_can_be() {
        let compare = |found: f64| Comparison::of([(0.5, 0.5), (0.0, found)].into_iter(), peak(Output::F32));
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
