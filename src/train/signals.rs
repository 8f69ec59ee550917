//! Ctrl-C, SIGTERM and a closed terminal ask a loop to save and stop.

use anyhow::Result;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// When Ctrl-C, SIGTERM or SIGHUP asked to stop; the loops look at it between steps.
static STOP: OnceLock<Instant> = OnceLock::new();

/// A closed terminal sends SIGHUP twice (the kernel and the shell), and systemd SIGTERM with SIGHUP: within this time
/// two signals are one.
const ONE_SIGNAL: Duration = Duration::from_secs(1);

/// From now on Ctrl-C, SIGTERM or a closed terminal asks loops to save and stop; when asked again a second later or more,
/// the process ends at once. A process that `nohup` started goes on without its terminal.
pub fn stop_on_signals() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let handler = || {
        if STOP.get_or_init(Instant::now).elapsed() > ONE_SIGNAL {
            std::process::exit(1);
        }
    };
    let install = || {
        let unhearing = ignores_hangup();
        ctrlc::set_handler(handler).map_err(|e| e.to_string())?;
        if unhearing {
            ignore_hangup();
        }
        Ok(())
    };
    INSTALLED.get_or_init(install).clone().map_err(anyhow::Error::msg)
}

#[cfg(unix)]
fn ignores_hangup() -> bool {
    // SAFETY: without a new action, sigaction only fills in the old one, for which all zeros is a valid value.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGHUP, std::ptr::null(), &mut now) == 0 && now.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(unix)]
fn ignore_hangup() {
    // SAFETY: ignoring a signal installs no code.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
}

#[cfg(not(unix))]
fn ignores_hangup() -> bool {
    false
}

#[cfg(not(unix))]
fn ignore_hangup() {}

/// Whether somebody asked to stop.
pub fn asked_to_stop() -> bool {
    STOP.get().is_some()
}
