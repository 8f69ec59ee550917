//! The proof of an exported file: fixed noises and every label go through each engine that is present, and the
//! pictures are compared with candle's.

use crate::{Error, ExportOptions, Network, Precision, Result};
use candle_core::Tensor;
use candle_onnx::onnx::ModelProto;
use dmd_models::Eager;
use dmd_runtime::noise::refine;
use dmd_runtime::{EngineChoice, EngineKind, Options, Output, engines, picture_noise, quantize};
use ndarray::{Array4, ArrayView4, Axis, s};
use serde::Serialize;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Seeds of the noises, in turn.
const SEEDS: [u64; 3] = [0, 1, 2];

/// Pictures, at the least; with more labels than this, one for each.
const MIN_PICTURES: usize = 6;

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
const CALIBRATION: usize = 12;
const CALIBRATION_SEED: u64 = 1 << 32;

impl<N: Network> Subject<'_, N> {
    /// What every pass reads for some pictures of every label.
    pub fn calibration(&self) -> Result<Inputs> {
        let first = self.first_pass(&[CALIBRATION_SEED], CALIBRATION);
        if self.passes.len() == 1 {
            return Ok(first);
        }
        let n = first.noise.dim().0;
        let mut read: Vec<Vec<Tensor>> = vec![Vec::new(); self.passes.len()];
        for i in 0..n {
            self.picture(&first, i, |pass, input| read[pass].push(input.clone()))?;
        }
        let inputs = read.concat().iter().map(array).collect::<Result<Vec<_>>>()?;
        let rows = (0..self.passes.len()).flat_map(|pass| first.rows(pass, 0..n, self.labels)).collect();
        Ok(Inputs { batch: self.batch, noise: stack(&inputs), labels: rows })
    }

    /// Fixed noises and the pictures that candle makes of them. Every label occurs.
    pub fn samples(&self) -> Result<Samples> {
        let inputs = self.first_pass(&SEEDS, MIN_PICTURES);
        let picture = |i: usize| array(&self.picture(&inputs, i, |_, _| {})?);
        let pictures = (0..inputs.noise.dim().0).map(picture).collect::<Result<Vec<_>>>()?;
        if pictures.iter().flatten().any(|value| !value.is_finite()) {
            let message = "the network itself makes pictures that are not finite; there is nothing to compare with";
            return Err(Error::Setting(message.into()));
        }
        let sigmas = self.passes.iter().map(Network::sigma).collect();
        Ok(Samples { sigmas, n_labels: self.labels, pictures: stack(&pictures), inputs })
    }

    /// `n` noises, or as many more as it takes to be a multiple of the batch and to meet all labels; `seeds` in turn.
    fn first_pass(&self, seeds: &[u64], n: usize) -> Inputs {
        let n = n.max(self.labels).next_multiple_of(self.batch);
        let one = |i: usize| picture_noise(seeds[i % seeds.len()], (i / seeds.len()) as u64, 1, self.shape);
        let noises: Vec<Array4<f32>> = (0..n).map(one).collect();
        let labels = (0..n).filter(|_| self.labels > 0).map(|i| (i % self.labels) as i64).collect();
        Inputs { batch: self.batch, noise: stack(&noises), labels }
    }

    /// Picture `i` by every pass in turn, in candle; `see` is shown what each pass reads.
    fn picture(&self, inputs: &Inputs, i: usize, mut see: impl FnMut(usize, &Tensor)) -> Result<Tensor> {
        let device = self.passes[0].device();
        let noise = tensor(inputs.noise.slice(s![i..=i, .., .., ..]))?.to_device(&device)?;
        let label = self.fixed.map(|label| label as i64).or_else(|| inputs.labels.get(i).copied());
        let label = label.map(|label| Tensor::new(&[label], &device)).transpose()?;
        let sigmas: Vec<f64> = self.passes.iter().map(Network::sigma).collect();
        through_passes(&sigmas, i, &noise, |pass, input| {
            see(pass, input);
            Ok::<_, Error>(self.passes[pass].generate(&Eager, input, label.as_ref())?)
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
}

impl Inputs {
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
        let (pairs, peak): (Vec<(f64, f64)>, f64) = match found {
            Found::F32(found) => (self.pictures.iter().zip(found).map(|(a, b)| (*a as f64, *b as f64)).collect(), 2.0),
            Found::U8(found) => {
                let pictures = self.pictures.view().permuted_axes([0, 2, 3, 1]);
                (pictures.iter().zip(found).map(|(a, b)| (quantize(*a) as f64, *b as f64)).collect(), 255.0)
            }
        };
        // A NaN is as far away as can be; `max` alone would pass over it.
        let difference = |(a, b): &(f64, f64)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() };
        let max = pairs.iter().map(difference).fold(0.0, f64::max);
        let mse = pairs.iter().map(|pair| difference(pair).powi(2)).sum::<f64>() / pairs.len() as f64;
        Comparison { max, psnr_db: 10.0 * (peak * peak / mse).log10() }
    }

    /// What `demand` means for these pictures and this output.
    fn limit(&self, output: Output, demand: Demand) -> Limit {
        match (demand, output) {
            (Demand::Difference(tolerance), Output::F32) => {
                Limit::Difference(tolerance * self.pictures.iter().fold(0f64, |max, x| max.max(x.abs() as f64)))
            }
            (Demand::Difference(_), Output::U8) => Limit::Difference(MAX_LEVELS),
            (Demand::Psnr(psnr), Output::F32) => Limit::Psnr(psnr),
            (Demand::Psnr(psnr), Output::U8) => Limit::Psnr(psnr.min(ONE_LEVEL_DB)),
        }
    }
}

/// What pictures must be like.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Demand {
    /// Within this part of candle's largest value; one step for u8.
    Difference(f64),
    /// At least as like as this, in dB.
    Psnr(f64),
}

/// [`Demand`] in numbers.
enum Limit {
    Difference(f64),
    Psnr(f64),
}

/// PSNR of bytes that are all off by one: rounding alone takes u8 pictures into that region.
const ONE_LEVEL_DB: f64 = 48.13;

struct Comparison {
    max: f64,
    psnr_db: f64,
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
    let demand = match options.precision {
        Precision::Fp32 => Demand::Difference(options.tolerance),
        precision => Demand::Psnr(options.min_psnr_db.unwrap_or(precision.min_psnr_db())),
    };
    let limit = &samples.limit(output, demand);
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
        Ok(Comparison { max, psnr_db }) => match limit {
            Limit::Difference(most) if max <= most => Status::Passed,
            Limit::Difference(most) => Status::Failed(format!("differs by {max:.3e}, at most {most:.3e} is allowed")),
            Limit::Psnr(least) if psnr_db >= least => Status::Passed,
            Limit::Psnr(least) => Status::Failed(format!(
                "is at {psnr_db:.1} dB PSNR, expected {least:.1} at least; allow less with --min-psnr, or take a higher \
                 --precision"
            )),
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
        let mut generator = dmd_runtime::Generator::load(path, Options { engine, library, ..Options::default() })?;
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
