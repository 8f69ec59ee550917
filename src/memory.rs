//! How much memory this process has taken at most.

/// Peak resident size in bytes, where the system tells (Linux).
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// For people.
pub fn readable(bytes: Option<u64>) -> String {
    bytes.map_or("not known here".into(), |bytes| format!("{} MiB", bytes >> 20))
}
