//! How much memory this process has taken at most, how much training will take, and how much there is.

use anyhow::{Result, ensure};
use candle_core::Device;
use dmd_models::Precision;
use dmd_models::cost::Cost;

/// The most bytes in use at a time: on a GPU the device's, else this process's resident size where the system tells (Linux).
pub fn peak_bytes(device: &Device) -> Option<u64> {
    if device.is_cuda() {
        return dmd_models::cuda::peak_bytes(device);
    }
    status_bytes("VmHWM:")
}

/// The bytes that this process holds, where the system tells (Linux): its own, and those of files that are mapped, which the
/// system may drop and shares between processes.
pub fn resident_bytes() -> Option<[u64; 2]> {
    Some([status_bytes("RssAnon:")?, status_bytes("RssFile:")?])
}

fn status_bytes(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// For people.
pub fn readable(bytes: Option<u64>) -> String {
    bytes.map_or("not known here".into(), |bytes| format!("{} MiB", bytes >> 20))
}

/// What training needs memory for.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// One pass of the network for one picture.
    pub cost: Cost,
    /// Whether blocks are computed again for their gradient.
    pub grad_checkpoint: bool,
    /// What the passes compute in.
    pub precision: Precision,
    /// Passes that are gone back through at once.
    pub passes: f64,
    /// More of them, whose blocks are kept all the same.
    pub whole_passes: f64,
    /// Pictures at a time.
    pub pictures: usize,
    /// Weights of a network.
    pub n_parameters: usize,
    /// Numbers that are held for each weight: one a network, a gradient and an average, two for moments.
    pub copies: usize,
}

impl Needs {
    /// Bytes that training takes at most: what is held for the weights, and the results that the way back needs. The tests
    /// have what was measured.
    pub fn bytes(&self, on: &Device) -> u64 {
        const PROGRAM: f64 = (48 << 20) as f64;
        let Cost { activations, between, largest_block, .. } = self.cost;
        let (kept, again) = if self.grad_checkpoint { (between, largest_block) } else { (activations, 0) };
        // Gradients on their way at the worst moment. A GPU's pass frees as much of what it kept before.
        let in_passing = if on.is_cuda() { 0.0 } else { 0.25 * activations as f64 };
        let values = kept as f64 * self.passes + activations as f64 * self.whole_passes + again as f64 + in_passing;
        let held = (size_of::<f32>() * self.n_parameters * self.copies) as f64;
        (PROGRAM + held + values * (self.precision.bytes() * self.pictures) as f64) as u64
    }
}

/// Refuses training that cannot fit, before it begins. Where the system does not say what it has, nothing is refused.
pub fn check(needs: &Needs, on: &Device) -> Result<()> {
    let Some(available) = available_bytes(on) else { return Ok(()) };
    let needed = needs.bytes(on);
    ensure!(
        needed <= available,
        "{} samples at a time take about {} MiB, and {} MiB are free: {REMEDY}",
        needs.pictures,
        needed >> 20,
        available >> 20
    );
    Ok(())
}

/// Refuses pictures that cannot fit, before their noise is drawn: `n` of them, each of so many values, `batch` at a time.
pub fn check_pictures(cost: Cost, values: usize, n: usize, batch: usize, on: &Device) -> Result<()> {
    let Some(available) = available_bytes(&Device::Cpu) else { return Ok(()) };
    // Noise and pictures, once as arrays and once as tensors.
    let held = 4.0 * values as f64 * n as f64;
    // What a pass holds at its widest: at least half of what lies between its blocks.
    let at_once = if on.is_cpu() { 0.5 * cost.between as f64 * batch.min(n) as f64 } else { 0.0 };
    let needed = (held + at_once) * size_of::<f32>() as f64;
    ensure!(
        needed <= available as f64,
        "{n} pictures of {values} values, {} at a time, take at least {:.0} MiB, and {} MiB are free: ask for fewer, or lower --batch",
        batch.min(n),
        needed / f64::from(1 << 20),
        available >> 20
    );
    Ok(())
}

const REMEDY: &str = "lower --batch, give --grad-checkpoint (on a GPU, --precision bf16 too), or raise a run's accumulate, which goes through a batch in parts";

/// Refuses, before any memory is taken, numbers of f32 that the machine has no room for: `what` an option or a file asks
/// for, whose sizes multiply.
pub fn room(what: &str, sizes: &[usize]) -> Result<()> {
    let bytes = sizes.iter().try_fold(size_of::<f32>() as u64, |product, size| product.checked_mul(*size as u64));
    let available = available_bytes(&Device::Cpu).unwrap_or(isize::MAX as u64);
    ensure!(
        bytes.is_some_and(|bytes| bytes <= available),
        "{what} take {}, and {} MiB are free",
        bytes.map_or("more than can be counted".into(), |bytes| format!("{} MiB", bytes >> 20)),
        available >> 20
    );
    Ok(())
}

/// What a GPU may have too little memory for.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Training, so many samples at a time.
    Training(usize),
    /// So many pictures at a time, without a gradient.
    Pictures(usize),
    /// The networks alone.
    Networks,
}

/// Says what to do where a GPU ran out of memory after all.
pub fn explained(error: anyhow::Error, work: Work) -> anyhow::Error {
    // As the driver, cuBLAS and cuDNN call it.
    const NAMES: [&str; 3] = ["OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED"];
    let text = format!("{error:#}");
    if !NAMES.iter().any(|name| text.contains(name)) {
        return error;
    }
    const ELSEWHERE: &str = "end what else runs on the GPU, or give --device cpu";
    error.context(match work {
        Work::Training(n) => format!("the GPU has too little memory for {n} samples at a time: {REMEDY}"),
        Work::Pictures(n) => {
            format!("the GPU has too little memory for {n} pictures at a time: lower --batch where there is one, {ELSEWHERE}")
        }
        Work::Networks => format!("the GPU has too little memory for the networks: {ELSEWHERE}"),
    })
}

/// What the GPU, or else the machine or the control group that this process is in (Linux), has left.
pub fn available_bytes(on: &Device) -> Option<u64> {
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
    fn running_out_names_the_work_and_the_remedy() {
        let ran_out = |what: &str, work: Work| format!("{:#}", explained(anyhow::anyhow!("{what}"), work));
        let text = ran_out("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", Work::Training(4096));
        assert!(text.starts_with("the GPU has too little memory for 4096 samples at a time: lower --batch"), "{text}");
        let text = ran_out("CublasError(CUBLAS_STATUS_ALLOC_FAILED)", Work::Pictures(64));
        assert!(text.starts_with("the GPU has too little memory for 64 pictures at a time: lower --batch"), "{text}");
        let text = ran_out("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", Work::Networks);
        assert!(text.starts_with("the GPU has too little memory for the networks: end what else"), "{text}");
        assert_eq!(ran_out("other", Work::Training(1)), "other");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_cannot_fit_is_refused_with_both_numbers() {
        let cost = Cost { activations: 1 << 20, ..Cost::default() };
        let check = |pictures: usize| {
            let (grad_checkpoint, precision) = (false, Precision::F32);
            let (passes, whole_passes, n_parameters, copies) = (1.0, 0.0, 1, 1);
            let needs =
                Needs { cost, grad_checkpoint, precision, passes, whole_passes, pictures, n_parameters, copies };
            super::check(&needs, &Device::Cpu)
        };
        assert!(check(1).is_ok());
        let error = check(1 << 40).unwrap_err().to_string();
        assert!(error.starts_with("1099511627776 samples at a time take about 5497558138928 MiB, and "), "{error}");
        assert!(error.contains("lower --batch"), "{error}");
    }

    #[test]
    fn what_no_machine_has_room_for_is_refused_however_large() {
        assert!(room("16 pictures", &[16, 3, 8, 8]).is_ok());
        assert!(room("no pictures", &[0, usize::MAX, usize::MAX]).is_ok());
        for sizes in [&[1 << 40, 3, 1024, 1024][..], &[usize::MAX; 4]] {
            let error = room("-n pictures", sizes).unwrap_err().to_string();
            assert!(error.starts_with("-n pictures take ") && error.ends_with(" MiB are free"), "{error}");
        }
    }

    /// Peaks of two updates with batches of 64 on a CPU, in MiB: `dmd bench train` with unet-32 and unet-16, `dmd distill`
    /// with emoji-32 and emoji-16 by the recipes named, `dmd teacher train` with emoji-32's network.
    #[test]
    fn the_estimate_is_close_to_what_was_measured() {
        let cost = |activations: usize, between: usize, largest_block: usize| Cost {
            activations,
            between,
            largest_block,
            ..Cost::default()
        };
        let unet_32 = (cost(2_488_736, 888_192, 262_304), 1_624_323);
        let unet_16 = (cost(506_400, 169_088, 65_696), 702_499);
        let emoji_32 = (cost(1_575_176, 599_520, 196_728), 1_966_683);
        let emoji_16 = (cost(380_184, 127_200, 49_272), 397_179);
        for (what, (cost, n_parameters), copies, passes, grad_checkpoint, mib) in [
            ("plain", unet_32, 9, [1.0, 0.0], false, 855.0),
            ("plain", unet_32, 9, [1.0, 0.0], true, 566.0),
            ("plain", unet_16, 9, [1.0, 0.0], false, 204.0),
            ("plain", emoji_32, 9, [1.0, 0.0], false, 604.0),
            ("plain", emoji_32, 9, [1.0, 0.0], true, 436.0),
            ("sid", emoji_32, 9, [3.0, 0.0], false, 1399.0),
            ("sid", emoji_32, 9, [3.0, 0.0], true, 764.0),
            ("sida", emoji_32, 9, [3.4, 0.0], true, 806.0),
            ("dmd2", emoji_32, 9, [1.8, 0.0], false, 830.0),
            ("dmd", emoji_32, 9, [2.0, 0.4], false, 1174.0),
            ("dmd", emoji_32, 9, [2.0, 0.4], true, 774.0),
            ("plain", emoji_16, 9, [1.0, 0.0], false, 159.0),
            ("plain", emoji_16, 9, [1.0, 0.0], true, 117.0),
            ("sid", emoji_16, 9, [3.0, 0.0], false, 352.0),
            ("sid", emoji_16, 9, [3.0, 0.0], true, 190.0),
            ("teacher", emoji_32, 5, [1.0, 0.0], false, 571.0),
            ("teacher", emoji_32, 5, [1.0, 0.0], true, 404.0),
        ] {
            let [passes, whole_passes] = passes;
            let (precision, pictures) = (Precision::F32, 64);
            let needs =
                Needs { cost, grad_checkpoint, precision, passes, whole_passes, pictures, n_parameters, copies };
            let estimate = needs.bytes(&Device::Cpu) as f64 / f64::from(1 << 20);
            assert!((0.9..1.15).contains(&(estimate / mib)), "{what}: {estimate} MiB, measured {mib}");
        }
    }
}
