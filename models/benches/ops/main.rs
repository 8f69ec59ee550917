//! Every fused operation beside its composite of candle's operations, and beside what this machine can do at most.
#![allow(clippy::print_stdout)]

mod cpu;
mod gpu;

use anyhow::{Result, ensure};
use candle_core::{DType, Device};
use clap::Parser;
use dmd_models::Precision;

/// Times every fused operation.
#[derive(Parser)]
#[command(name = "ops")]
struct Args {
    /// Samples per operation.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Timed repetitions; each figure is their median.
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Threads of the CPU [default: all cores].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// A GPU in the place of the CPU, by its number.
    #[arg(long, value_name = "N")]
    cuda: Option<usize>,
    /// What the operations compute in on a GPU.
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    precision: Precision,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0)).use_current_thread().build_global()?;
    let (batch, steps) = (args.batch as usize, args.steps as usize);
    match args.cuda {
        Some(gpu) => {
            let dtype = if args.precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
            gpu::run(&Device::new_cuda(gpu)?, dtype, batch, steps)
        }
        None => {
            ensure!(args.precision == Precision::F32, "the CPU computes in f32: give --cuda N for bf16");
            cpu::run(batch, steps)
        }
    }
}

/// The middle time; sorts them.
fn median(laps: &mut [f64]) -> f64 {
    laps.sort_by(f64::total_cmp);
    laps.get(laps.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What to divide operations or bytes by for 10⁹ of them a second.
fn per_1e9(ms: f64) -> f64 {
    ms * 1e6
}
