//! The proof of an exported file: fixed noises and every label go through each engine that is present, and the
//! pictures are compared with candle's.

use crate::{Error, Network, Result};
use candle_core::Tensor;
use candle_onnx::onnx::ModelProto;
use dmd_models::Eager;
use dmd_runtime::{EngineChoice, EngineKind, Options, Output, engines, picture_noise, quantize};
use ndarray::{Array4, Axis};
use serde::Serialize;
use std::collections::HashMap;
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

/// Fixed noises, their labels, and the pictures that candle makes of them.
pub(crate) struct Samples {
    batch: usize,
    noise: Array4<f32>,
    labels: Vec<i64>,
    pictures: Array4<f32>,
}

impl Samples {
    /// `shape` is `[C, H, W]`. The number of pictures is a multiple of `batch`; every label occurs.
    /// With a `fixed` label all are of that class, and the file is given none.
    pub fn draw<N: Network>(
        network: &N,
        shape: [usize; 3],
        batch: usize,
        classes: usize,
        fixed: Option<usize>,
    ) -> Result<Self> {
        let n = MIN_PICTURES.max(classes).next_multiple_of(batch);
        let one = |i: usize| picture_noise(SEEDS[i % SEEDS.len()], (i / SEEDS.len()) as u64, 1, shape);
        let noises: Vec<Array4<f32>> = (0..n).map(one).collect();
        let label = |i: usize| fixed.unwrap_or(i % classes.max(1)) as i64;
        let mut labels: Vec<i64> = (0..n).filter(|_| classes > 0).map(label).collect();
        let mut pictures = Vec::with_capacity(n);
        for (i, noise) in noises.iter().enumerate() {
            pictures.push(candle_picture(network, noise, labels.get(i))?);
        }
        if fixed.is_some() {
            labels.clear();
        }
        Ok(Samples { batch, noise: stack(&noises), labels, pictures: stack(&pictures) })
    }

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

    /// The largest difference that passes: relative to the largest value of all pictures.
    fn limit(&self, output: Output, tolerance: f64) -> f64 {
        match output {
            Output::F32 => tolerance * self.pictures.iter().fold(0f64, |max, x| max.max(x.abs() as f64)),
            Output::U8 => MAX_LEVELS,
        }
    }
}

struct Comparison {
    max: f64,
    psnr_db: f64,
}

/// Pictures as an engine gives them: `(N, C, H, W)` or `(N, H, W, C)`, in that order.
enum Found {
    F32(Vec<f32>),
    U8(Vec<u8>),
}

/// Runs the file through every engine. `tolerance` is relative to candle's largest value.
pub(crate) fn verify(
    path: &Path,
    model: &ModelProto,
    samples: &Samples,
    output: Output,
    tolerance: f64,
    library: Option<PathBuf>,
) -> Vec<EngineVerdict> {
    let limit = samples.limit(output, tolerance);
    let mut verdicts: Vec<EngineVerdict> = engines(library.as_deref())
        .into_iter()
        .map(|report| {
            let found = match report.reason {
                Some(reason) => Err(Status::Skipped(reason)),
                None => run_engine(path, samples, report.kind, library.clone()).map_err(Status::Failed),
            };
            verdict(&report.kind.to_string(), report.version, found, samples, limit)
        })
        .collect();
    verdicts.push(verdict("candle-onnx", None, run_candle_onnx(model, samples, output), samples, limit));
    verdicts
}

fn verdict(
    engine: &str,
    version: Option<String>,
    found: std::result::Result<Found, Status>,
    samples: &Samples,
    limit: f64,
) -> EngineVerdict {
    let compared = found.map(|found| samples.compare(&found));
    let status = match &compared {
        Err(status) => status.clone(),
        Ok(comparison) if comparison.max <= limit => Status::Passed,
        Ok(comparison) => Status::Failed(format!("differs by {:.3e}, at most {limit:.3e} is allowed", comparison.max)),
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
        generator.run(samples.noise.view(), &samples.labels)
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
        let missing = text.split("unsupported op_type ").nth(1).and_then(|rest| rest.split(' ').next());
        Status::Skipped(match missing {
            Some(operator) => format!("it lacks the operator {operator}"),
            None => text.lines().next().unwrap_or_default().to_string(),
        })
    })
}

fn candle_onnx_pictures(model: &ModelProto, samples: &Samples, output: Output) -> candle_core::Result<Found> {
    let batch = samples.batch;
    let mut found = match output {
        Output::F32 => Found::F32(vec![]),
        Output::U8 => Found::U8(vec![]),
    };
    for (i, noise) in samples.noise.axis_chunks_iter(Axis(0), batch).enumerate() {
        let values: Vec<f32> = noise.iter().copied().collect();
        let mut inputs = HashMap::from([("noise".into(), Tensor::from_vec(values, noise.shape(), &CPU)?)]);
        if !samples.labels.is_empty() {
            inputs.insert("label".into(), Tensor::new(&samples.labels[i * batch..(i + 1) * batch], &CPU)?);
        }
        let mut outputs = candle_onnx::simple_eval(model, inputs)?;
        let image = outputs.remove("image").ok_or_else(|| candle_core::Error::Msg("it gave no image".into()))?;
        match &mut found {
            Found::F32(all) => all.extend(image.flatten_all()?.to_vec1::<f32>()?),
            Found::U8(all) => all.extend(image.flatten_all()?.to_vec1::<u8>()?),
        }
    }
    Ok(found)
}

const CPU: candle_core::Device = candle_core::Device::Cpu;

fn candle_picture<N: Network>(network: &N, noise: &Array4<f32>, label: Option<&i64>) -> Result<Array4<f32>> {
    let device = network.device();
    let values: Vec<f32> = noise.iter().copied().collect();
    let tensor = Tensor::from_vec(values, noise.shape(), &device)?;
    let label = label.map(|label| Tensor::new(&[*label], &device)).transpose()?;
    let picture = network.generate(&Eager, &tensor, label.as_ref())?.to_device(&CPU)?;
    let shape = picture.dims4()?;
    let values = picture.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| !value.is_finite()) {
        let message = "the network itself makes pictures that are not finite; there is nothing to compare with";
        return Err(Error::Setting(message.into()));
    }
    Array4::from_shape_vec(shape, values).map_err(|error| Error::Setting(error.to_string()))
}

fn stack(pictures: &[Array4<f32>]) -> Array4<f32> {
    let views: Vec<_> = pictures.iter().map(|picture| picture.view()).collect();
    ndarray::concatenate(Axis(0), &views).expect("all pictures have one shape, and there are some")
}
