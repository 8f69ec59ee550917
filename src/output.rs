//! All that the program prints: lines for people and the progress bar on stderr, what a command was asked for on stdout.
//! Nothing here panics. A line for people that cannot be written is dropped, since a closed terminal or a full disk
//! under a log must not end a training; a result that cannot be written is an error.

use anyhow::{Context, Result};
use dmd_runtime::printable;
use indicatif::{ProgressBar, ProgressStyle, WeakProgressBar};
use serde_json::Value;
use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A line for people; none with `--quiet`.
pub fn say(text: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        tell(text);
    }
}

/// Something that a person should look at, while the work goes on; also with `--quiet`.
pub fn warn(text: &str) {
    tell(&format!("warning: {text}"));
}

/// A line for people, whatever the options.
pub fn tell(text: &str) {
    let text = harmless(text);
    let write = || _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match bar.and_then(|bar| bar.upgrade()).filter(|bar| !bar.is_finished()) {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// A line for a log file; a terminal has the progress bar instead.
pub fn line_without_terminal(text: &str) {
    if !std::io::stderr().is_terminal() {
        say(text);
    }
}

/// What a command was asked for, on stdout; with `--json`, whose object is then all that stdout gets, a line for people.
/// Whoever closes stdout has read enough: that is [`Closed`], which ends the command without a word.
pub fn result(text: &str) -> Result<()> {
    match JSON.load(Ordering::Relaxed) {
        true => say(text),
        false => print(harmless(text))?,
    }
    Ok(())
}

/// The same of a text of our own, tabs and all.
pub fn verbatim(text: &str) -> Result<()> {
    if JSON.load(Ordering::Relaxed) { Ok(()) } else { print(text) }
}

/// The object of `--json`, the last that a command prints; nothing without that option.
pub fn object(object: &Value) -> Result<()> {
    if JSON.load(Ordering::Relaxed) { print(object) } else { Ok(()) }
}

/// Nobody reads stdout any more.
#[derive(Debug, thiserror::Error)]
#[error("stdout is closed")]
pub struct Closed;

fn print(text: impl Display) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Closed.into()),
        written => written.context("stdout cannot be written to"),
    }
}

/// A progress bar with rate and time left, for a terminal; lines for people are written above it.
pub fn progress(n_steps: u64, done: u64) -> Result<ProgressBar> {
    if QUIET.load(Ordering::Relaxed) {
        return Ok(ProgressBar::hidden());
    }
    let bar = ProgressBar::new(n_steps).with_position(done);
    bar.set_style(ProgressStyle::with_template("{bar:24} {pos}/{len} {per_sec} {eta} left  {msg}")?);
    bar.reset_eta();
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.downgrade());
    Ok(bar)
}

/// A text whose lines command no terminal, whatever names from files are in it.
fn harmless(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

static QUIET: AtomicBool = AtomicBool::new(false);
static JSON: AtomicBool = AtomicBool::new(false);
static BAR: Mutex<Option<WeakProgressBar>> = Mutex::new(None);

/// Called once, first: whether stdout is for one object (`--json`), and whether people's lines are left out (`--quiet`); sends
/// the libraries' warnings to stderr.
pub fn start(json: bool, quiet: bool) {
    struct Warnings;
    impl log::Log for Warnings {
        fn enabled(&self, metadata: &log::Metadata) -> bool {
            metadata.level() <= log::Level::Warn && metadata.target().starts_with("dmd")
        }
        fn log(&self, record: &log::Record) {
            if self.enabled(record.metadata()) {
                warn(&record.args().to_string());
            }
        }
        fn flush(&self) {}
    }
    static WARNINGS: Warnings = Warnings;
    JSON.store(json, Ordering::Relaxed);
    QUIET.store(quiet, Ordering::Relaxed);
    if log::set_logger(&WARNINGS).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}
