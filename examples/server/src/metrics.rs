//! What happened, in numbers that only grow (but for the length of the row), as Prometheus reads them.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the counted times, in milliseconds.
const BOUNDS_MS: [u64; 8] = [5, 10, 25, 50, 100, 250, 1000, 5000];

/// Counters.
#[derive(Default)]
pub struct Metrics {
    answered: AtomicU64,
    refused: AtomicU64,
    cancelled: AtomicU64,
    calls: AtomicU64,
    pictures: AtomicU64,
    waiting: AtomicU64,
    within: [AtomicU64; BOUNDS_MS.len()],
    micros: AtomicU64,
}

impl Metrics {
    /// A picture was handed over, so long after it was asked for.
    pub fn answered(&self, after: Duration) {
        self.answered.fetch_add(1, Relaxed);
        self.micros.fetch_add(after.as_micros() as u64, Relaxed);
        let slower = BOUNDS_MS.iter().position(|bound| after <= Duration::from_millis(*bound));
        self.within[slower.unwrap_or(BOUNDS_MS.len())..].iter().for_each(|count| _ = count.fetch_add(1, Relaxed));
    }

    /// Too many waited, or it took too long.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// A call of so many pictures, for which so many requests were left out that nobody waited for.
    pub fn called(&self, pictures: usize, cancelled: usize, waiting: usize) {
        self.calls.fetch_add(u64::from(pictures > 0), Relaxed);
        self.pictures.fetch_add(pictures as u64, Relaxed);
        self.cancelled.fetch_add(cancelled as u64, Relaxed);
        self.waiting.store(waiting as u64, Relaxed);
    }

    /// In Prometheus's text format, version 0.0.4.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (name, kind, value) in [
            ("dmd_requests_answered_total", "counter", &self.answered),
            ("dmd_requests_refused_total", "counter", &self.refused),
            ("dmd_requests_cancelled_total", "counter", &self.cancelled),
            ("dmd_calls_total", "counter", &self.calls),
            ("dmd_pictures_total", "counter", &self.pictures),
            ("dmd_requests_waiting", "gauge", &self.waiting),
        ] {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# TYPE {name} {kind}\n{name} {}", value.load(Relaxed));
        }
        text += "# TYPE dmd_request_seconds histogram\n";
        for (bound, count) in BOUNDS_MS.iter().zip(&self.within) {
            let seconds = *bound as f64 / 1e3;
            let _ = writeln!(text, "dmd_request_seconds_bucket{{le=\"{seconds}\"}} {}", count.load(Relaxed));
        }
        let (all, seconds) = (self.answered.load(Relaxed), self.micros.load(Relaxed) as f64 / 1e6);
        let _ = writeln!(text, "dmd_request_seconds_bucket{{le=\"+Inf\"}} {all}");
        let _ = writeln!(text, "dmd_request_seconds_sum {seconds}\ndmd_request_seconds_count {all}");
        text
    }
}
