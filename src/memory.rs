//! How much memory this process has taken at most, how much a distillation will take, and how much there is.

use anyhow::{Result, ensure};
use candle_core::Device;

/// The most bytes in use at a time: on a GPU the device's, else this process's resident size where the system tells (Linux).
pub fn peak_bytes(device: &Device) -> Option<u64> {
    if device.is_cuda() {
        return dmd_models::cuda::peak_bytes(device);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// For people.
pub fn readable(bytes: Option<u64>) -> String {
    bytes.map_or("not known here".into(), |bytes| format!("{} MiB", bytes >> 20))
}

/// What a distillation needs memory for.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Results that the generator's backward pass needs, values a picture.
    pub activations: usize,
    /// Bytes of each of them.
    pub bytes: usize,
    /// Weights of a network.
    pub n_parameters: usize,
    /// Pictures at a time.
    pub pictures: usize,
    /// Averages of the generator.
    pub n_averages: usize,
}

/// Bytes that a distillation takes at most: three networks, a gradient, two pairs of moments and the averages, and the
/// activations. Of runs of two networks with 8 to 64 pictures on a CPU, none came out more than a tenth above it, nor did
/// one with 256 pictures on a GPU, where gradients are freed on their way and less is in passing.
pub fn of_distillation(needs: Needs, on: &Device) -> u64 {
    const PROGRAM: u64 = 48 << 20;
    // What is in use besides at the worst moment: gradients on their way, and one pass of the other networks.
    let in_passing = if on.is_cuda() { 1.0 } else { 1.25 };
    let activations = (needs.bytes * needs.activations * needs.pictures) as f64 * in_passing;
    PROGRAM + (4 * needs.n_parameters * (8 + needs.n_averages)) as u64 + activations as u64
}

/// Refuses work that cannot fit, before it begins. Where the system does not say what it has, nothing is refused.
pub fn check(needed: u64, pictures: usize, on: &Device) -> Result<()> {
    let Some(available) = available_bytes(on) else { return Ok(()) };
    ensure!(
        needed <= available,
        "{pictures} samples at a time take about {} MiB, and {} MiB are free: {REMEDY}",
        needed >> 20,
        available >> 20
    );
    Ok(())
}

const REMEDY: &str = "lower --batch, raise accumulate, which runs it in parts, or give --grad-checkpoint (on a GPU, --precision bf16 too)";

/// Says what to lower where a GPU ran out of memory after all; `pictures` at a time.
pub fn explained(error: anyhow::Error, pictures: usize) -> anyhow::Error {
    match format!("{error:#}").contains("OUT_OF_MEMORY") {
        true => error.context(format!("the GPU has too little memory for {pictures} samples at a time: {REMEDY}")),
        false => error,
    }
}

/// What the GPU, or else the machine or the control group that this process is in (Linux), has left.
fn available_bytes(on: &Device) -> Option<u64> {
    if on.is_cuda() {
        return dmd_models::cuda::free_bytes(on);
    }
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
    const LARGEST_ACCEPTED: i32 = 32 << 20;
    const NEVER: i32 = -1;
    hand_back(LARGEST_ACCEPTED, NEVER);
}

/// The opposite, for an export: what is large is handed back as soon as it is freed. A network and several engines hold
/// the same weights one after the other, and what the one leaves would be added to the peak of the next. The faults of
/// fresh pages add a sixth to its processor time.
pub fn return_freed() {
    // Most weights of a network that is large at all, and few of the results in between.
    const LARGE: i32 = 1 << 20;
    hand_back(LARGE, 16 << 20);
}

/// Blocks of `mapped` bytes and more go back when they are freed, smaller ones when `trimmed` bytes of them lie at the
/// end. Without this, glibc raises both with what it sees freed.
fn hand_back(mapped: i32, trimmed: i32) {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets numbers within the allocator, and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, mapped);
        libc::mallopt(libc::M_TRIM_THRESHOLD, trimmed);
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let _ = (mapped, trimmed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_out_names_the_batch_and_the_remedy() {
        let ran_out = anyhow::anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        let text = format!("{:#}", explained(ran_out, 4096));
        assert!(text.starts_with("the GPU has too little memory for 4096 samples at a time: lower --batch"), "{text}");
        assert_eq!(explained(anyhow::anyhow!("other"), 1).to_string(), "other");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_cannot_fit_is_refused_with_both_numbers() {
        assert!(check(1 << 20, 4, &Device::Cpu).is_ok());
        let error = check(1 << 60, 4, &Device::Cpu).unwrap_err().to_string();
        assert!(error.starts_with("4 samples at a time take about 1099511627776 MiB, and "), "{error}");
        assert!(error.contains("lower --batch"), "{error}");
    }

    /// `dmd bench train` printed a peak of 204 MiB for unet-16 and 855 MiB for unet-32 with batches of 64.
    #[test]
    fn the_estimate_is_close_to_what_was_measured() {
        for (activations, n_parameters, mib) in [(506_400, 702_499, 204.0), (2_488_736, 1_624_323, 855.0)] {
            let needs = Needs { activations, bytes: 4, n_parameters, pictures: 64, n_averages: 1 };
            let estimate = of_distillation(needs, &Device::Cpu) as f64;
            assert!((0.9..1.2).contains(&(estimate / f64::from(1 << 20) / mib)), "{estimate}");
        }
    }
}
