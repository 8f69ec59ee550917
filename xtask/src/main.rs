//! `cargo xtask`: set-up and chores, so that a fresh machine needs rustup, a C compiler and Python's pip, no more.
//!
//! Parses the arguments and runs one task. It knows nothing of the project's crates: it only starts cargo and the
//! built `dmd` in the environment that they need. The idea is matklad's cargo-xtask.

mod args;
mod bench;
mod bench_export;
mod bindings_test;
mod chores;
mod cuda;
mod edge_test;
mod export_test;
mod fuzz;
mod onnxruntime;
mod server_test;
mod setup;
mod venv;
mod web;

use std::process::ExitCode;

use args::{HELP, Task};

fn main() -> ExitCode {
    let task = match args::parse(std::env::args_os().skip(1)) {
        Ok(task) => task,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(2);
        }
    };
    run(task).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(task: Task) -> anyhow::Result<ExitCode> {
    match task {
        Task::Help => {
            print!("{HELP}");
            Ok(ExitCode::SUCCESS)
        }
        Task::Setup { onnxruntime: true } => setup::everything().map(|_| ExitCode::SUCCESS),
        Task::Setup { onnxruntime: false } => setup::protoc_only().map(|_| ExitCode::SUCCESS),
        Task::Demo(args) => chores::demo(&args),
        Task::Test(args) => chores::test(&args),
        Task::Bench(args) => bench::run(&args),
        Task::CudaCheck { fetch_only: true } => cuda::fetch(),
        Task::CudaCheck { fetch_only: false } => cuda::check(),
        Task::WebTest { fetch_only: true } => web::fetch(),
        Task::WebTest { fetch_only: false } => web::test(),
        Task::ExportTest { fetch_only: true } => export_test::fetch(),
        Task::ExportTest { fetch_only: false } => export_test::run(),
        Task::BindingsTest { fetch_only: true } => bindings_test::fetch(),
        Task::BindingsTest { fetch_only: false } => bindings_test::run(),
        Task::ServerTest { fetch_only: true } => server_test::fetch(),
        Task::ServerTest { fetch_only: false } => server_test::run(),
        Task::EdgeTest { fetch_only: true, .. } => edge_test::fetch(),
        Task::EdgeTest { fetch_only: false, quick } => edge_test::run(quick),
        Task::Fuzz { fetch_only: true, .. } => fuzz::fetch(),
        Task::Fuzz { fetch_only: false, quick, seconds, targets } => fuzz::run(quick, seconds, &targets),
        Task::BenchExport => bench_export::run(),
        Task::Check => chores::check(),
        Task::Ci => chores::ci(),
        Task::Dmd(args) => chores::dmd(&args),
        Task::Lab(args) => chores::lab(&args),
        Task::Env => chores::print_environment(),
    }
}
