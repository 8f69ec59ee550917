//! Parses the arguments, calls one function, prints its result or its error.

use clap::Parser;
use dmd::{cli, commands, memory, output};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    output::start(cli.json, cli.quiet);
    match &cli.command {
        cli::Command::Export(_) => memory::return_freed(),
        _ => memory::keep_freed(),
    }
    match commands::run(&cli).and_then(|result| output::object(&result)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<output::Closed>() => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("{error:#}");
            output::tell(&format!("error: {text}"));
            // Where stdout is what cannot be written to, stderr has said so.
            _ = output::object(&serde_json::json!({ "error": text }));
            ExitCode::from(if error.is::<cli::WrongUsage>() { 2 } else { 1 })
        }
    }
}
