//! Parses the arguments, calls one function, prints its result or its error.

use clap::Parser;
use dmd::{cli, commands, memory, output};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    output::start_logging();
    match &cli.command {
        cli::Command::Export(_) => memory::return_freed(),
        _ => memory::keep_freed(),
    }
    match commands::run(&cli) {
        Ok(result) => {
            if cli.json {
                println!("{result}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            if cli.json {
                println!("{}", serde_json::json!({ "error": format!("{error:#}") }));
            }
            ExitCode::from(if error.is::<cli::WrongUsage>() { 2 } else { 1 })
        }
    }
}
