//! What runs a file, and why: `cargo run --release --example placement -- MODEL.onnx ACCELERATOR... [--require] [--tabs]`.
//!
//! Accelerators in the order of preference, as `dmd_runtime::Accelerator` is read from words: `cpu`, `openvino:CPU`,
//! `qnn=/opt/qnn/libonnxruntime_providers_qnn.so,soc_model=57`.

use std::time::{Duration, Instant};

use dmd_runtime::{Generator, Options, Placement, Request};

/// Pictures whose median time is told, and how long they may take.
const TIMED: usize = 15;
const MOST: Duration = Duration::from_secs(2);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (flags, words): (Vec<_>, Vec<_>) = arguments.into_iter().partition(|word| word.starts_with("--"));
    let [model, accelerators @ ..] = words.as_slice() else {
        return Err("usage: placement MODEL.onnx ACCELERATOR... [--require] [--tabs]".into());
    };
    let options = Options {
        accelerators: accelerators.iter().map(|word| word.parse()).collect::<Result<_, _>>()?,
        require_accelerator: flags.iter().any(|flag| flag == "--require"),
        threads: Some(1),
        ..Options::default()
    };
    let started = Instant::now();
    let generator = Generator::load(model, options)?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;
    let median_ms = median_ms(&generator)?;
    let placement = generator.placement();
    if flags.iter().any(|flag| flag == "--tabs") {
        println!("{}", tabs(&placement, load_ms, median_ms));
        return Ok(());
    }
    println!("{placement}");
    println!("loaded in {load_ms:.0} ms, {median_ms:.2} ms for {}", generator.info().batch);
    for node in placement.nodes.iter().filter(|node| node.provider != placement.provider) {
        println!("{}: {} {}", node.provider, node.operator, node.name);
    }
    Ok(())
}

fn median_ms(generator: &Generator) -> dmd_runtime::Result<f64> {
    let (begun, mut times_ms) = (Instant::now(), Vec::new());
    while times_ms.is_empty() || times_ms.len() < TIMED && begun.elapsed() < MOST {
        let (started, seed) = (Instant::now(), times_ms.len() as u64);
        generator.generate(&Request { seed, batch: generator.info().batch, ..Request::default() })?;
        times_ms.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times_ms.sort_by(f64::total_cmp);
    Ok(times_ms[times_ms.len() / 2])
}

/// One line for programs: what runs the file, nodes taken and all, difference, dB, times; or what was passed over first, the
/// step and the reason.
fn tabs(placement: &Placement, load_ms: f64, median_ms: f64) -> String {
    let (taken, all) = placement.taken();
    match (placement.passed_over.first(), placement.probe) {
        (Some(passed), None) => format!("passed over\t{:?}\t{}", passed.step, passed.reason),
        (_, probe) => {
            let (difference, psnr_db) =
                probe.map_or((0.0, f64::INFINITY), |probe| (probe.max_difference, probe.psnr_db));
            format!("taken\t{taken}\t{all}\t{difference:.1e}\t{psnr_db:.1}\t{load_ms:.0}\t{median_ms:.2}")
        }
    }
}
