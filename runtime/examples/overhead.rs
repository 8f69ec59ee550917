//! What `generate` costs over the bare engine call: noise, checks and copies, measured by
//! `cargo run -p dmd-runtime --release --example overhead -- MODEL.onnx [THREADS]`.
//!
//! Both calls run in turn in one process, so that a busy machine slows both; medians are compared.

use std::time::Instant;

use dmd_runtime::{Generator, Options, Request, Result};

const ROUNDS: u64 = 300;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: overhead MODEL.onnx [THREADS]")?;
    let threads: usize = arguments.next().map_or(Ok(1), |n| n.parse())?;

    let generator = Generator::load(&path, Options { threads: Some(threads), ..Options::default() })?;
    let (shape, batch) = (generator.info().shape(), generator.info().batch);
    let (mut bare_us, mut generate_us) = (Vec::new(), Vec::new());
    for seed in 0..ROUNDS {
        bare_us.push(microseconds(|| generator.warm_up())?);
        let request = Request { seed, batch, ..Request::default() };
        generate_us.push(microseconds(|| generator.generate(&request))?);
    }
    let (bare_us, generate_us) = (median(bare_us), median(generate_us));
    let overhead_us = generate_us - bare_us;
    println!("{} {}, {threads} threads, {shape:?}, batch {batch}", generator.engine().kind, generator.engine().version);
    println!("bare {bare_us:.0} us, generate {generate_us:.0} us: {:.1} % over", 100.0 * overhead_us / bare_us);
    Ok(())
}

fn microseconds<T>(call: impl FnOnce() -> Result<T>) -> Result<f64> {
    let start = Instant::now();
    call()?;
    Ok(start.elapsed().as_secs_f64() * 1e6)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
