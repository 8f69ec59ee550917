//! What makes the documents: experiments on the plane, and the tables and plots of docs/. Users of dmd do not need it.

use anyhow::Result;
use clap::{Parser, Subcommand};
use dmd::{commands, device, memory, output};
use dmd_lab::{export, plane::toy, recipes, scaling};
use std::path::PathBuf;
use std::process::ExitCode;

/// Makes the documents' tables and pictures.
#[derive(Parser)]
#[command(name = "dmd-lab", version, arg_required_else_help = true)]
struct Cli {
    /// CPU threads, at most four for each core (default: all cores).
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Train on points of the plane, where the teacher is exact, with parts of the method left out or changed.
    Plane(PlaneArgs),
    /// One teacher distilled by every recipe, scored against its training pictures and its own samples.
    Recipes(recipes::RecipesArgs),
    /// A model in every dialect and precision: size, likeness to fp32, latency.
    Export(export::ExportTableArgs),
    /// How an update's time grows with batch and area, as a plot.
    Scaling(scaling::ScalingArgs),
}

#[derive(clap::Args)]
struct PlaneArgs {
    /// Where the pictures go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Updates of each generator.
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Replace existing pictures.
    #[arg(long)]
    force: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    output::start(false, false);
    memory::keep_freed();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<output::Closed>() => ExitCode::SUCCESS,
        Err(error) => {
            output::tell(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let threads = cli.threads.map(device::threads).transpose()?;
    device::use_threads(threads)?;
    match &cli.task {
        Task::Plane(args) => {
            toy::files(&args.out).iter().try_for_each(|path| commands::check_free(path, args.force))?;
            toy::run(args.seed, args.steps, &args.out).map(drop)
        }
        Task::Recipes(args) => recipes::run(args),
        Task::Export(args) => export::run(args, threads),
        Task::Scaling(args) => scaling::run(args),
    }
}
