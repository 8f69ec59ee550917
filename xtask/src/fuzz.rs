//! `cargo xtask fuzz`: bytes changed at random into every reader of bytes from outside, for a while each, by cargo-fuzz.
//!
//! fuzz/ is a workspace of its own, built by the stable compiler with the flags that sanitizers need (RUSTC_BOOTSTRAP), which
//! fuzz/rustc.sh gives to the crates that read bytes alone.
//! What a run finds interesting is kept in target/fuzz/corpus, what it finds wrong in target/fuzz/artifacts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{chores, setup};

/// Its arguments and the layout of its folder are relied on here.
const CARGO_FUZZ: &str = "0.13.2";

/// The targets, each with the folder of the project's own fixtures that it starts from beside fuzz/seeds.
const TARGETS: [(&str, Option<&str>); 14] = [
    ("onnx", Some("runtime/tests/fixtures")),
    ("dmd_calls", None),
    ("ort", None),
    ("metadata", None),
    ("safetensors", None),
    ("unet_config", Some("models/tests/fixtures/edm-tiny/unet")),
    ("tokenizer", Some("models/tests/fixtures/encoders/tokenizers/pads-with-mark")),
    ("text_encoder", Some("models/tests/fixtures/encoders/pipelines/sd/text_encoder")),
    ("autoencoder", Some("models/tests/fixtures/encoders/autoencoders/kl")),
    ("dmd_json", None),
    ("scheduler", Some("models/tests/fixtures/schedulers")),
    ("npy", None),
    ("zip", None),
    ("picture", None),
];

/// Held to by libFuzzer: seconds for one input, memory in MiB, and the longest input that it makes.
const LIMITS: [&str; 3] = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=65536"];

/// The targets whose readers are the trainer's own.
const OF_THE_TRAINER: [&str; 3] = ["npy", "zip", "picture"];

/// Fetches cargo-fuzz, and the sources of what the targets are built with.
pub fn fetch() -> Result<ExitCode> {
    cargo_fuzz("list")?;
    let manifest = setup::root().join("fuzz/Cargo.toml");
    let mut fetch = chores::cargo(&setup::protoc_only()?);
    let status = fetch.args(["fetch", "--locked", "--manifest-path"]).arg(manifest).status();
    ensure!(status.context("cargo cannot be started")?.success(), "what the fuzz targets need cannot be fetched");
    Ok(ExitCode::SUCCESS)
}

/// Runs each target for so many seconds, `quick` those that are built soon; the first finding ends it, with the input that
/// shows it.
pub fn run(quick: bool, seconds: u32, only: &[String]) -> Result<ExitCode> {
    let known = |name: &String| TARGETS.iter().any(|(target, _)| target == name);
    let names = || TARGETS.map(|(target, _)| target).join(", ");
    if let Some(name) = only.iter().find(|name| !known(name)) {
        anyhow::bail!("there is no fuzz target {name:?}, expected one of {}", names());
    }
    let wanted = |target: &str| match only {
        [] => !(quick && OF_THE_TRAINER.contains(&target)),
        only => only.iter().any(|name| name == target),
    };
    let features: &[&str] = if quick { &["--no-default-features", "--features", "models"] } else { &[] };
    let built = cargo_fuzz("build")?.args(features).status().context("cargo cannot be started")?;
    ensure!(built.success(), "the fuzz targets cannot be built");
    for (target, fixtures) in TARGETS.into_iter().filter(|(target, _)| wanted(target)) {
        eprintln!("fuzz: {target}, {seconds} s");
        let kept = output_folder(&format!("corpus/{target}"))?;
        let artifacts = output_folder(&format!("artifacts/{target}"))?;
        let seeds =
            [Some(setup::root().join("fuzz/seeds").join(target)), fixtures.map(|path| setup::root().join(path))];
        let mut command = cargo_fuzz("run")?;
        command
            .args(features)
            .arg(target)
            .arg(kept)
            .args(seeds.into_iter().flatten().filter(|path| path.is_dir()))
            .arg("--")
            .args(LIMITS);
        command.arg(format!("-max_total_time={seconds}")).arg(format!("-artifact_prefix={}/", artifacts.display()));
        let status = command.arg("-print_final_stats=1").status().context("cargo cannot be started")?;
        ensure!(status.success(), "fuzz: {target} found something; the input is in {}", artifacts.display());
    }
    eprintln!("fuzz: nothing found");
    Ok(ExitCode::SUCCESS)
}

/// A folder under target/fuzz.
fn output_folder(name: &str) -> Result<PathBuf> {
    let folder = target().join(name);
    fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    Ok(folder)
}

fn target() -> PathBuf {
    setup::root().join("target/fuzz")
}

/// `cargo fuzz TASK`, by the cargo-fuzz of the project's cache.
fn cargo_fuzz(task: &str) -> Result<Command> {
    let tools = setup::root().join(".cache/cargo-fuzz");
    let environment = setup::protoc_only()?;
    if !tools.join("bin").join(format!("cargo-fuzz{}", std::env::consts::EXE_SUFFIX)).is_file() {
        install(&tools, &mut chores::cargo(&environment))?;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(tools.join("bin")).chain(std::env::split_paths(&path)))?;
    let mut command = chores::cargo(&environment);
    command.current_dir(setup::root()).env("PATH", path).env("RUSTC_BOOTSTRAP", "1");
    command.env("RUSTC_WRAPPER", setup::root().join("fuzz/rustc.sh"));
    command.args(["fuzz", task, "--target-dir"]).arg(target());
    Ok(command)
}

fn install(tools: &Path, cargo: &mut Command) -> Result<()> {
    eprintln!("fuzz: fetching and building cargo-fuzz {CARGO_FUZZ}");
    let status =
        cargo.args(["install", "cargo-fuzz", "--locked", "--quiet", "--version", CARGO_FUZZ, "--root"]).arg(tools);
    let status = status.stdin(Stdio::null()).status().context("cargo cannot be started")?;
    ensure!(status.success(), "cargo-fuzz cannot be installed");
    Ok(())
}
