//! One file per verb. Each does its work, tells people on stderr, and returns the object that `--json` prints.

mod ablate;
mod autoencoder_train;
mod bench_run;
pub mod bench_train;
mod compile;
mod config_show;
mod convert;
mod demo;
pub mod distill;
pub mod export;
mod inspect;
mod lint;
mod ort;
pub mod pairs;
mod sample;
pub mod score;
mod teacher_train;

use crate::cli::{AutoencoderCommand, BenchCommand, Cli, Command, ConfigCommand, Engine, TeacherCommand, WrongUsage};
use crate::{device, output};
use anyhow::{Context, Result, bail, ensure};
use clap::CommandFactory;
use dmd_runtime::EngineChoice;
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Runs one command.
pub fn run(cli: &Cli) -> Result<Value> {
    let threads = cli.threads.map(device::threads).transpose()?;
    device::use_threads(threads)?;
    match &cli.command {
        Command::Teacher(TeacherCommand::Train(args)) => teacher_train::run(args),
        Command::Autoencoder(AutoencoderCommand::Train(args)) => autoencoder_train::run(args),
        Command::Distill(args) => distill::run(args),
        Command::Pairs(args) => pairs::run(args),
        Command::Config(ConfigCommand::Show(args)) => config_show::run(args),
        Command::Export(args) => export::run(args, threads),
        Command::Sample(args) => sample::run(args, threads),
        Command::Score(args) => score::run(args, threads),
        Command::Inspect(args) => inspect::run(args),
        Command::Lint(args) => lint::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Ort(args) => ort::run(args),
        Command::Compile(args) => compile::run(args),
        Command::Bench(BenchCommand::Train(args)) => bench_train::run(args),
        Command::Bench(BenchCommand::Run(args)) => bench_run::run(args, threads),
        Command::Ablate(args) => ablate::run(args),
        Command::Completions { shell } => completions(*shell),
        Command::Demo(args) => demo::run(args, threads),
    }
}

/// The script that a shell completes the command line by.
fn completions(shell: clap_complete::Shell) -> Result<Value> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dmd", &mut script);
    let script = String::from_utf8(script).context("clap writes text")?;
    output::verbatim(&script)?;
    Ok(json!({ "script": script }))
}

/// The runtime's options for what the command line says.
pub fn engine_options(engine: Engine, threads: Option<usize>) -> dmd_runtime::Options {
    // More than these have been warned of.
    let threads = threads.map(|n| n.min(dmd_runtime::max_threads()));
    dmd_runtime::Options { engine: engine_choice(engine), threads, ..Default::default() }
}

fn engine_choice(engine: Engine) -> EngineChoice {
    match engine {
        Engine::Auto => EngineChoice::Auto,
        Engine::Onnxruntime => EngineChoice::OnnxRuntime,
        Engine::Tract => EngineChoice::Tract,
    }
}

/// Whether a path names an exported file rather than a folder, by its name or by how it begins.
fn is_exported(path: &Path) -> bool {
    let is = |name: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(name));
    is("onnx") || is("ort") || path.is_file() && begins_as_exported(path).unwrap_or(false)
}

/// ONNX begins with the first field of its message, the version of the format, and ONNX Runtime's own format has its name
/// behind an offset.
fn begins_as_exported(path: &Path) -> std::io::Result<bool> {
    let mut first = [0; 8];
    std::fs::File::open(path)?.read_exact(&mut first)?;
    Ok(matches!(first, [8, 3..=127, ..] | [_, _, _, _, b'O', b'R', b'T', b'M']))
}

/// Refuses a folder where an exported file is expected, with the way to one.
fn exported_file(path: &Path) -> Result<()> {
    ensure!(
        !path.is_dir(),
        "{0}: is a folder, expected an exported file: dmd export {0} --onnx FILE.onnx makes one",
        path.display()
    );
    Ok(())
}

/// The model that a path names: of a run, its generator; of a teacher's run, the teacher.
pub fn model_path(path: &Path) -> Result<PathBuf> {
    let is_model = |path: &Path| path.join("model_index.json").exists();
    if !path.join("config.toml").exists() || is_model(path) {
        return Ok(path.into());
    }
    let parent = path.parent().unwrap_or(path);
    match [path.join("generator"), parent.to_path_buf()].into_iter().find(|path| is_model(path)) {
        Some(model) => Ok(model),
        None => {
            bail!("{}: is a run without a generator yet: the command that began it goes on with it", path.display())
        }
    }
}

/// An option that would be passed over is refused.
fn without_effect(option: &str, given: bool, why: &str) -> Result<()> {
    if given { Err(WrongUsage(format!("{option} has no effect here: {why}")).into()) } else { Ok(()) }
}

/// Refuses to write over a file unless forced, before any work is done.
pub fn check_free(path: &Path, force: bool) -> Result<()> {
    ensure!(force || !path.exists(), "{}: exists already, and is only replaced with --force", path.display());
    Ok(())
}

/// Makes the folder that a file goes into, once it is known that there will be a file.
pub fn make_parent(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.map_or(Ok(()), |folder| {
        std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))
    })
}
