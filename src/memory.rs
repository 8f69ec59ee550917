//! How much memory this process has taken at most, how much a distillation will take, and how much there is.

use anyhow::{Result, ensure};

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

/// Bytes that a distillation takes at most: three networks, a gradient, two pairs of moments and the averages, and the
/// results that the generator's backward pass needs, `activations` a picture. Of runs of two networks with 8 to 64 pictures, none came out more
/// than a tenth above it.
pub fn of_distillation(activations: usize, n_parameters: usize, pictures: usize, n_averages: usize) -> u64 {
    const PROGRAM: u64 = 48 << 20;
    // What is in use besides at the worst moment: gradients on their way, and one pass of the other networks.
    const IN_PASSING: f64 = 1.25;
    let activations = (4 * activations * pictures) as f64 * IN_PASSING;
    PROGRAM + (4 * n_parameters * (8 + n_averages)) as u64 + activations as u64
}

/// Refuses work that cannot fit, before it begins. Where the system does not say what it has, nothing is refused.
pub fn check(needed: u64, pictures: usize) -> Result<()> {
    let Some(available) = available_bytes() else { return Ok(()) };
    ensure!(
        needed <= available,
        "{pictures} samples at a time take about {} MiB, and {} MiB are free: lower --batch, raise accumulate, which runs it in parts, or give --grad-checkpoint",
        needed >> 20,
        available >> 20
    );
    Ok(())
}

/// What the machine, or the control group that this process is in, has left (Linux).
fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let machine = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    let number = |file: &str| -> Option<u64> {
        std::fs::read_to_string(std::path::Path::new("/sys/fs/cgroup").join(file)).ok()?.trim().parse().ok()
    };
    // "max" where there is no limit, which is no number.
    let group = number("memory.max").zip(number("memory.current")).map(|(max, used)| max.saturating_sub(used));
    Some(group.map_or(machine, |group| group.min(machine)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn what_cannot_fit_is_refused_with_both_numbers() {
        assert!(check(1 << 20, 4).is_ok());
        let error = check(1 << 60, 4).unwrap_err().to_string();
        assert!(error.starts_with("4 samples at a time take about 1099511627776 MiB, and "), "{error}");
        assert!(error.contains("lower --batch"), "{error}");
    }

    /// `dmd bench train` printed a peak of 204 MiB for unet-16 and 855 MiB for unet-32 with batches of 64.
    #[test]
    fn the_estimate_is_close_to_what_was_measured() {
        for (activations, n_parameters, mib) in [(506_400, 702_499, 204.0), (2_488_736, 1_624_323, 855.0)] {
            let estimate = of_distillation(activations, n_parameters, 64, 1) as f64;
            assert!((0.9..1.2).contains(&(estimate / f64::from(1 << 20) / mib)), "{estimate}");
        }
    }
}
