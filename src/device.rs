//! Where tensors live: `--device auto|cpu|cuda[:N]`, and how many threads the CPU gets.

use crate::cli::WrongUsage;
use crate::output;
use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use dmd_models::Precision;
use std::str::FromStr;
use std::sync::Once;

/// What `--device` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Choice {
    /// The first GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// This GPU.
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("device \"{text}\", expected auto, cpu, cuda or cuda:N");
        match text.split_once(':') {
            None if text == "auto" => Ok(Choice::Auto),
            None if text == "cpu" => Ok(Choice::Cpu),
            None if text == "cuda" => Ok(Choice::Cuda(0)),
            Some(("cuda", ordinal)) => ordinal.parse().map(Choice::Cuda).map_err(|_| refuse()),
            _ => Err(refuse()),
        }
    }
}

impl Choice {
    /// Opens the device.
    pub fn open(self) -> Result<Device> {
        match self {
            Choice::Cpu => Ok(Device::Cpu),
            Choice::Auto if !candle_core::utils::cuda_is_available() => Ok(Device::Cpu),
            Choice::Auto => Ok(or_cpu(Device::new_cuda(0).map_err(Into::into).and_then(prepared))),
            Choice::Cuda(_) if !candle_core::utils::cuda_is_available() => {
                bail!(
                    "--device cuda: this dmd was built for the CPU; build it with `--features cuda`, or use --device cpu"
                )
            }
            Choice::Cuda(ordinal) => Device::new_cuda(ordinal)
                .with_context(|| format!("--device cuda:{ordinal}: no such GPU, or its driver is missing or too old"))
                .and_then(prepared),
        }
    }
}

fn prepared(device: Device) -> Result<Device> {
    dmd_models::cuda::prepare(&device)?;
    Ok(device)
}

/// The GPU, or else the CPU, which is said once: whoever built for GPUs expects one.
fn or_cpu(gpu: Result<Device>) -> Device {
    static SAID: Once = Once::new();
    gpu.unwrap_or_else(|error| {
        SAID.call_once(|| output::warn(&format!("no GPU is used: {error:#}; going on with the CPU")));
        Device::Cpu
    })
}

/// Refuses a precision that the device has no kernels for.
pub fn check_precision(precision: Precision, device: &Device) -> Result<()> {
    let text = "precision is bf16, which needs a GPU (--device cuda); on the CPU leave it at f32";
    ensure!(precision == Precision::F32 || device.is_cuda(), WrongUsage(text.into()));
    Ok(())
}

/// The number of CPU threads that `--threads` comes to: held to a few for each core, aloud.
pub fn threads(asked: usize) -> Result<usize> {
    if asked == 0 {
        return Err(WrongUsage("--threads is 0, expected at least 1".into()).into());
    }
    let most = dmd_runtime::max_threads();
    if asked > most {
        output::warn(&format!("--threads {asked} are too many for this machine: {most} are used"));
    }
    Ok(asked.min(most))
}

/// Sets the number of CPU threads of this process (all cores where none is given); call once, before the first tensor,
/// from the thread that will do the work: it becomes one of them, so that a parallel operation need not wake another
/// thread to begin.
pub fn use_threads(n: Option<usize>) -> Result<()> {
    let n = n.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    // Some operations of candle ask num_cpus, which reads the first. candle's elementwise operations have threads of
    // their own: the second counts them, and as they wait for the next operation in a busy loop and so take the cores
    // from ours, the third has them sleep.
    // SAFETY: called at the start of main, before any other thread exists.
    unsafe {
        std::env::set_var("RAYON_NUM_THREADS", n.to_string());
        std::env::set_var("CANDLE_NUM_THREADS", n.to_string());
        std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", "1");
    }
    rayon::ThreadPoolBuilder::new().num_threads(n).use_current_thread().build_global().context("--threads")
}

/// What the device is called in results.
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_parsed_or_refused() {
        assert_eq!("cuda:1".parse(), Ok(Choice::Cuda(1)));
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert!("cuda:x".parse::<Choice>().is_err() && "tpu".parse::<Choice>().is_err());
    }

    #[test]
    fn more_threads_than_a_few_for_each_core_are_not_used() {
        assert_eq!(threads(1).unwrap(), 1);
        assert_eq!(threads(20_000).unwrap(), dmd_runtime::max_threads());
        assert!(threads(0).unwrap_err().is::<WrongUsage>());
    }

    #[test]
    fn without_its_gpu_the_cpu_is_taken() {
        assert!(or_cpu(Err(anyhow::anyhow!("no such GPU"))).is_cpu());
        assert!(or_cpu(Ok(Device::Cpu)).is_cpu());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn cuda_in_a_cpu_build_is_a_clear_error() {
        assert!(Choice::Cuda(0).open().unwrap_err().to_string().contains("--features cuda"));
    }
}
