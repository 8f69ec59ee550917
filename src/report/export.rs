//! How an exported file compares with the network that it was made of: 256 fixed noises through both, as numbers and as
//! pictures. `FILE.report.json` and `FILE.report.html`.

use super::page;
use crate::aside::Aside;
use crate::eval::distance;
use crate::picture;
use crate::sample::Model;
use anyhow::Result;
use candle_core::{Device, Tensor};
use dmd_export::{ExportReport, Output};
use ndarray::{Array4, s};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Noises that every file is measured on.
const PICTURES: usize = 256;
/// Of those, how many are shown.
const SHOWN: usize = 16;
/// Passes before the clock starts, and timed ones.
const WARM_UP: usize = 3;
const RUNS: usize = 100;

/// Fixed noises with their labels, and the network's own pictures in fp32.
pub struct Reference {
    noise: Array4<f32>,
    labels: Vec<i64>,
    pictures: Array4<f32>,
}

/// A file beside the reference: figures, and both sets of pictures.
pub struct Compared {
    /// How far they are from each other.
    pub measured: Measured,
    /// The network's pictures; in the bytes that they become where the file gives bytes.
    pub expected: Array4<f32>,
    /// The file's.
    pub found: Array4<f32>,
}

/// A file against the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// What ran the file.
    pub engine: String,
    /// Pictures compared.
    pub pictures: usize,
    /// Peak signal to noise ratio, dB.
    pub psnr_db: f64,
    /// Largest difference of a value in [-1, 1].
    pub max_difference: f64,
    /// Sliced Wasserstein distance between both sets of pictures.
    pub distance: f64,
    /// The fastest pass of the bare engine, milliseconds: what else runs on a machine only ever adds to it.
    pub latency_ms: f64,
    /// Pictures of that pass: the file's batch, one where that is free.
    pub latency_batch: usize,
}

impl Reference {
    /// Runs the network, a generator of one pass or of several (those with seed 0 between them, as the runtime has it).
    /// All pictures are of the class `fixed`, or of every class in turn.
    pub fn of(generator: &Model, shape: [usize; 3], fixed: Option<usize>) -> Result<Self> {
        let noise = dmd_runtime::picture_noise(0, 0, PICTURES, shape);
        let classes = generator.pipeline.denoiser.n_classes().unwrap_or(0);
        let label = |i: usize| fixed.unwrap_or(i % classes.max(1)) as i64;
        let labels: Vec<i64> = (0..PICTURES).filter(|_| classes > 0).map(label).collect();
        let tensor = Tensor::from_vec(noise.iter().copied().collect(), noise.dim(), &Device::Cpu)?;
        let pictures = generator.pictures(&tensor, &labels, 32)?;
        Ok(Reference { noise, labels, pictures })
    }

    /// Runs a file beside the network.
    pub fn measure(&self, path: &Path, options: dmd_runtime::Options) -> Result<Compared> {
        let generator = dmd_runtime::Generator::load(path, options)?;
        let labels = if generator.info().labelled() { self.labels.as_slice() } else { &[] };
        let images = generator.run(self.noise.view(), labels)?;
        let expected = match images.output() {
            Output::F32 => self.pictures.clone(),
            Output::U8 => self.pictures.mapv(|x| f32::from(dmd_runtime::quantize(x)) / 127.5 - 1.0),
        };
        let found = images.to_f32();
        let (latency_ms, latency_batch) = self.latency(&generator, labels)?;
        let (mut max, mut sum) = (0f64, 0f64);
        for (a, b) in expected.iter().zip(&found) {
            let difference = f64::from((a - b).abs());
            (max, sum) = (max.max(difference), sum + difference * difference);
        }
        let measured = Measured {
            engine: format!("{} {}", generator.engine().kind, generator.engine().version),
            pictures: PICTURES,
            psnr_db: 10.0 * (4.0 / (sum / found.len() as f64)).log10(),
            max_difference: max,
            distance: distance(&expected, &found)?,
            latency_ms,
            latency_batch,
        };
        Ok(Compared { measured, expected, found })
    }

    /// The fastest pass, and how many pictures it makes: the engine repeats its last call, which is set to that here.
    fn latency(&self, generator: &dmd_runtime::Generator, labels: &[i64]) -> Result<(f64, usize)> {
        let batch = if generator.info().dynamic_batch { 1 } else { generator.info().batch };
        let n = batch.min(PICTURES);
        generator.run(self.noise.slice(s![..n, .., .., ..]), &labels[..n.min(labels.len())])?;
        let mut fastest_ms = f64::INFINITY;
        for run in 0..WARM_UP + RUNS {
            let started = Instant::now();
            generator.warm_up()?;
            if run >= WARM_UP {
                fastest_ms = fastest_ms.min(started.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok((fastest_ms, batch))
    }
}

/// `FILE.report.json` and `FILE.report.html`.
pub fn paths(onnx: &Path) -> [PathBuf; 2] {
    ["report.json", "report.html"].map(|suffix| {
        let mut path = onnx.as_os_str().to_owned();
        path.push(format!(".{suffix}"));
        path.into()
    })
}

/// Writes both, or neither. `compared` is missing where no engine is present; the report then says what was not checked.
pub fn write(report: &ExportReport, compared: Option<&Compared>) -> Result<Value> {
    let value = json!({ "export": report, "measured": compared.map(|compared| &compared.measured) });
    let page = page(report, compared)?;
    let [json, html] = paths(&report.path);
    let json = Aside::write(&json, |file| Ok(writeln!(file, "{value:#}")?))?;
    let html = Aside::write(&html, |file| Ok(file.write_all(page.as_bytes())?))?;
    [json, html].into_iter().try_for_each(Aside::rename)?;
    Ok(value)
}

fn page(report: &ExportReport, compared: Option<&Compared>) -> Result<String> {
    let name = report.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let row = |key: &str, value: String| vec![key.to_string(), value];
    let mut facts = vec![
        row("dialect", report.dialect.to_string()),
        row("precision", report.precision.to_string()),
        row("size", format!("{} bytes", report.bytes)),
        row("nodes", report.nodes.to_string()),
    ];
    let mut body = String::new();
    match compared {
        None => {
            body += "<p class=\"failed\">Not checked: no engine is present, so that the file has not been run. Likeness, \
                     distance and latency are not known.</p>\n"
        }
        Some(Compared { measured, expected, found }) => {
            let pictures = if measured.latency_batch == 1 { "picture" } else { "pictures" };
            facts.extend([
                row("engine", measured.engine.clone()),
                row("PSNR against fp32", format!("{:.1} dB over {} noises", measured.psnr_db, measured.pictures)),
                row("largest difference", format!("{:.2e} of values in [-1, 1]", measured.max_difference)),
                row("sliced Wasserstein distance", format!("{:.5}", measured.distance)),
                row(
                    "latency",
                    format!("{:.3} ms a pass of {} {pictures}", measured.latency_ms, measured.latency_batch),
                ),
            ]);
            let shown = |images: &Array4<f32>| {
                let images = images.slice(s![..SHOWN.min(images.dim().0), .., .., ..]).to_owned();
                let scale = (64 / images.dim().2.max(1) as u32).max(1);
                picture::grid(&images, picture::columns(images.dim().0), scale)
            };
            body += &page::figure("fp32", &shown(expected))?;
            body += &page::figure(report.precision.name(), &shown(found))?;
            body += &page::figure("difference ×10", &shown(&((found - expected) * 10.0)))?;
        }
    }
    body += &page::table(&["", ""], &facts);
    let engines: Vec<Vec<String>> = report.engines.iter().map(|verdict| vec![verdict.to_string()]).collect();
    body += &page::table(&["what ran the file"], &engines);
    if !report.layers.is_empty() {
        let kept = |kept: bool| if kept { "fp32" } else { "8 bits" }.to_string();
        let layer = |layer: &dmd_export::LayerSensitivity| {
            vec![layer.node.clone(), format!("{:.1}", layer.psnr_db), kept(layer.kept_float)]
        };
        let layers: Vec<Vec<String>> = report.layers.iter().map(layer).collect();
        body += &page::table(&["layer", "PSNR with it alone in 8 bits, dB", "stays"], &layers);
    }
    Ok(page::page(&name, &body))
}
