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

/// Has the allocator keep freed memory instead of handing it back, where it can be told (glibc). An update frees and
/// takes the same few megabytes hundreds of times, and each page that comes fresh from the system costs a fault.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const LARGEST_ACCEPTED: i32 = 32 << 20;
        const NEVER: i32 = -1;
        // SAFETY: mallopt only sets numbers within the allocator, and may be called at any time.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_ACCEPTED);
            libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
        }
    }
}
