//! One file per verb. Each does its work, tells people on stderr, and returns the object that `--json` prints.

mod ablate;
mod bench_export;
mod bench_gpu_ops;
mod bench_ops;
mod bench_recipes;
mod bench_run;
mod bench_scaling;
mod bench_train;
mod config_show;
mod demo;
mod distill;
mod export;
mod inspect;
mod lint;
mod ort;
mod pairs;
mod sample;
mod score;
mod teacher_train;

use crate::cli::{BenchCommand, Cli, Command, ConfigCommand, Engine, TeacherCommand};
use crate::device;
use anyhow::{Context, Result, ensure};
use dmd_runtime::EngineChoice;
use serde_json::Value;
use std::io::Read;
use std::path::Path;

/// Runs one command.
pub fn run(cli: &Cli) -> Result<Value> {
    device::use_threads(cli.threads)?;
    match &cli.command {
        Command::Teacher(TeacherCommand::Train(args)) => teacher_train::run(args),
        Command::Distill(args) => distill::run(args),
        Command::Pairs(args) => pairs::run(args),
        Command::Config(ConfigCommand::Show(args)) => config_show::run(args),
        Command::Export(args) => export::run(args, cli.threads),
        Command::Sample(args) => sample::run(args, cli.threads),
        Command::Score(args) => score::run(args, cli.threads),
        Command::Inspect(args) => inspect::run(args),
        Command::Lint(args) => lint::run(args),
        Command::Ort(args) => ort::run(args),
        Command::Bench(BenchCommand::Train(args)) => bench_train::run(args),
        Command::Bench(BenchCommand::Export(args)) => bench_export::run(args, cli.threads),
        Command::Bench(BenchCommand::Scaling(args)) => bench_scaling::run(args),
        Command::Bench(BenchCommand::Ops(args)) => bench_ops::run(args),
        Command::Bench(BenchCommand::Recipes(args)) => bench_recipes::run(args),
        Command::Bench(BenchCommand::Run(args)) => bench_run::run(args, cli.threads),
        Command::Ablate(args) => ablate::run(args),
        Command::Demo(args) => demo::run(args, cli.threads),
    }
}

/// The runtime's options for what the command line says.
fn engine_options(engine: Engine, threads: Option<usize>) -> dmd_runtime::Options {
    // More than these have been warned of.
    let threads = threads.map(|n| n.min(dmd_runtime::max_threads()));
    dmd_runtime::Options { engine: engine_choice(engine), library: None, threads }
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

/// Refuses to write over a file unless forced, before any work is done.
fn check_free(path: &Path, force: bool) -> Result<()> {
    ensure!(force || !path.exists(), "{}: exists already, and is only replaced with --force", path.display());
    Ok(())
}

/// Makes the folder that a file goes into, once it is known that there will be a file.
fn make_parent(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.map_or(Ok(()), |folder| {
        std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))
    })
}
