//! What people read, on stderr; stdout is for `--json` alone.

use std::io::IsTerminal;

/// A line for people.
pub fn say(text: &str) {
    eprintln!("{text}");
}

/// Something that a person should look at, while the work goes on.
pub fn warn(text: &str) {
    eprintln!("warning: {text}");
}

/// A line for a log file; a terminal has the progress bar instead.
pub fn line_without_terminal(text: &str) {
    if !std::io::stderr().is_terminal() {
        eprintln!("{text}");
    }
}

/// Sends the libraries' warnings to stderr.
pub fn start_logging() {
    struct Warnings;
    impl log::Log for Warnings {
        fn enabled(&self, metadata: &log::Metadata) -> bool {
            metadata.level() <= log::Level::Warn && metadata.target().starts_with("dmd")
        }
        fn log(&self, record: &log::Record) {
            if self.enabled(record.metadata()) {
                eprintln!("warning: {}", record.args());
            }
        }
        fn flush(&self) {}
    }
    static WARNINGS: Warnings = Warnings;
    if log::set_logger(&WARNINGS).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}
