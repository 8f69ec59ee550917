//! `dmd export`: a generator's folder to a verified ONNX file, or to a folder of them.

mod folder;

use super::{check_free, engine_choice, engine_options, make_parent, model_path};
use crate::classes::label;
use crate::cli::{ExportArgs, OutputKind};
use crate::memory;
use crate::output::{say, warn};
use crate::report::export::{self as report, Reference};
use crate::sample::Model;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use dmd_export::lint::{Target, lint, read};
use dmd_export::{Batch, ExportOptions, ExportReport, ModelInfo, OneStep, Output, Precision, Status, weights_sha256};
use dmd_models::{Generator, ModelFolder};
use serde_json::Value;
use std::path::Path;

/// Exports a generator.
pub fn run(args: &ExportArgs, threads: Option<usize>) -> Result<Value> {
    crate::config::at_least_one("batch", args.batch as u64)?;
    let reports = args.report.then(|| report::paths(&args.onnx));
    for path in [&args.onnx].into_iter().chain(reports.iter().flatten()) {
        check_free(path, args.force)?;
    }
    let generator = model_path(&args.generator)?;
    let folder = ModelFolder::load(&generator, &Device::Cpu)?;
    let output = match args.output {
        OutputKind::F32 => Output::F32,
        OutputKind::U8 => Output::U8,
    };
    let options = ExportOptions {
        dialect: args.target.map_or(args.dialect, Target::dialect),
        precision: args.precision.unwrap_or_else(|| args.target.map_or(Precision::Fp32, Target::precision)),
        min_psnr_db: args.min_psnr,
        max_drop_db: args.max_drop_db,
        external_data: args.external_data,
        max_size: args.max_size,
        engines: engine_choice(args.engine),
        allow_unverified: args.allow_unverified,
        batch: if args.dynamic_batch { Batch::Dynamic } else { Batch::Fixed(args.batch) },
        fixed_label: args
            .fixed_label
            .as_deref()
            .map(|class| label("--fixed-label", class, &folder.classes()))
            .transpose()?,
        output,
        max_memory: memory::available_bytes(&Device::Cpu),
        force: args.force,
        ..ExportOptions::default()
    };
    if folder::is_asked_for(args, &folder) {
        make_parent(&args.onnx)?;
        return folder::run(args, &folder, &generator, options);
    }
    folder::needs_one_file(args, &folder)?;
    let passes = passes(&folder, &generator, Level::of(args))?;
    let [_, height, width] = folder.sample_shape()?;
    let info = info(&folder)?;
    for name in folder.parts.keys() {
        say(&format!("the file makes latents, which {name}/ of the folder decodes: it is not in the file"));
    }
    let weight_bytes = folder.weights.n_parameters() * size_of::<f32>();
    drop(folder);
    make_parent(&args.onnx)?;
    // The report looks at the network once more; else its memory is the file's and the engines'.
    let kept = args.report.then(|| passes.clone());
    let modules = OneStep::passes(&passes, [height, width]);
    drop(passes);
    let prepared = dmd_export::prepare(modules, &info, &options, &args.onnx)?;
    let exported = prepared.verify()?;
    let peak = memory::peak_bytes(&Device::Cpu);
    for verdict in &exported.engines {
        say(&verdict.to_string());
    }
    let (shown, left) = exported.kept_float.split_at(exported.kept_float.len().min(MAX_NAMES));
    if !shown.is_empty() {
        let more = if left.is_empty() { String::new() } else { format!(" and {} more", left.len()) };
        say(&format!("kept in fp32, so that the likeness holds: {}{more}", shown.join(", ")));
    }
    say(&format!("{}: {} nodes, {:.2} MB", args.onnx.display(), exported.nodes, exported.bytes as f64 / 1e6));
    let mut result = match &kept {
        Some(passes) => write_report(args, passes, &options, &exported, threads).with_context(|| {
            format!("{}: is written and whole, but not its report; --force makes both anew", args.onnx.display())
        })?,
        None => {
            let mut result = serde_json::to_value(&exported)?;
            (result["weight_bytes"], result["peak_memory_bytes"]) = (weight_bytes.into(), peak.into());
            result
        }
    };
    if let Some(target) = args.target {
        let linted = lint(&read(&args.onnx)?, target);
        say(&linted.to_string());
        if !linted.is_whole() {
            let (file, taken, nodes) = (args.onnx.display(), linted.taken, linted.nodes);
            warn(&format!(
                "{target} takes {taken} of {nodes} nodes of {file}; `dmd lint {file} --target {target}` tells why"
            ));
        }
        result["lint"] = serde_json::to_value(&linted)?;
    }
    Ok(result)
}

/// The longest list of nodes that a person reads.
const MAX_NAMES: usize = 12;

/// Runs the file beside the network, by the engine that verified it, and writes what was seen.
fn write_report(
    args: &ExportArgs,
    passes: &[Generator],
    options: &ExportOptions,
    report: &ExportReport,
    threads: Option<usize>,
) -> Result<Value> {
    let reference = reference(passes, options.fixed_label)?;
    let passed = report.engines.iter().any(|verdict| verdict.status == Status::Passed);
    let compared = passed.then(|| reference.measure(&args.onnx, engine_options(args.engine, threads))).transpose()?;
    let value = report::write(report, compared.as_ref())?;
    let [_, html] = report::paths(&args.onnx);
    match compared.map(|compared| compared.measured) {
        Some(measured) => say(&format!(
            "{}: PSNR {:.1} dB, largest difference {:.1e}, {:.2} ms a pass (batch {})",
            html.display(),
            measured.psnr_db,
            measured.max_difference,
            measured.latency_ms,
            measured.latency_batch
        )),
        None => say(&format!("{}: no engine is present; likeness and latency were not checked", html.display())),
    }
    Ok(value)
}

/// What goes into a file beside the network.
pub fn info(folder: &ModelFolder) -> Result<ModelInfo> {
    let weights_sha256 = weights_sha256(&folder.weights.to(DType::F32, &Device::Cpu)?)?;
    Ok(ModelInfo { classes: folder.classes(), weights_sha256 })
}

/// Pictures of the network itself.
pub fn reference(passes: &[Generator], fixed_label: Option<usize>) -> Result<Reference> {
    let sigmas: Vec<f64> = passes.iter().map(|pass| pass.sigma).collect();
    let denoiser = &passes.first().context("a generator has one pass at least")?.denoiser;
    let takes = denoiser.network.takes();
    let [height, width] = takes.size.context("a generator that was exported has a size")?;
    let model = Model::of_steps(denoiser.clone(), &sigmas, 0);
    Reference::of(&model, [takes.channels, height, width], fixed_label)
}

/// Where a model that is no generator is held.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// At this noise level.
    Sigma(f64),
    /// At that of this index into its noise levels.
    Timestep(usize),
}

impl Level {
    /// What the arguments say.
    pub fn of(args: &ExportArgs) -> Option<Self> {
        args.sigma.map(Level::Sigma).or(args.timestep.map(Level::Timestep))
    }
}

/// The folder's generator, held at the noise level of each of its passes; or its teacher held at `level`, where that is
/// given.
pub fn passes(folder: &ModelFolder, path: &Path, level: Option<Level>) -> Result<Vec<Generator>> {
    let path = path.display();
    match (folder.generator(&Device::Cpu)?, level) {
        (Some(generator), None) => {
            Ok(folder.about.sigmas().iter().map(|&sigma| Generator { sigma, ..generator.clone() }).collect())
        }
        (Some(generator), Some(_)) => {
            bail!("{path}: is a generator already, held at sigma {}; leave --as-generator out", generator.sigma)
        }
        (None, None) => bail!(
            "{path}: is a teacher, which needs many steps; distil it first (dmd distill) and export RUN/generator, or \
             add --as-generator --sigma S (or --timestep N) to export it undistilled, as one step from that noise level"
        ),
        (None, Some(level)) => {
            let denoiser = folder.denoiser(&Device::Cpu)?;
            let n = denoiser.levels.len();
            let sigma =
                match level {
                    Level::Sigma(sigma) => sigma,
                    Level::Timestep(timestep) => *denoiser.levels.sigmas().get(timestep).with_context(|| {
                        format!("--timestep is {timestep}, expected 0 to {}, what {path} has", n - 1)
                    })?,
                };
            let [min, max] = [denoiser.levels.sigma_min(), denoiser.levels.sigma_max()];
            ensure!(
                sigma >= min && sigma <= max,
                "--sigma is {sigma}, expected {min} to {max}, what {path} was trained on"
            );
            Ok(vec![Generator { denoiser, sigma }])
        }
    }
}
