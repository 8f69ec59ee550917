//! What runs a file, and why: `cargo run --release --example placement -- MODEL.onnx ACCELERATOR... [--require] [--tabs]`.
//!
//! Accelerators in the order of preference: `cpu`, `openvino:DEVICE`, `xnnpack`, `coreml`, `nnapi`, `directml:N`, `cuda:N`,
//! `tensorrt:N`, and plug-ins `webgpu=LIBRARY`, `qnn=LIBRARY`, `openvino=LIBRARY`, `custom=LIBRARY`, followed by their
//! options: `qnn=/opt/qnn/libonnxruntime_providers_qnn.so,soc_model=57`.

use std::time::{Duration, Instant};

use dmd_runtime::{Accelerator, CoreMl, Generator, Options, Placement, PlugIn, Qnn, Request};

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
        accelerators: accelerators.iter().map(|word| accelerator(word)).collect::<Result<_, _>>()?,
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

fn accelerator(word: &str) -> Result<Accelerator, String> {
    let (plug_in, options) = word.split_once(',').unwrap_or((word, ""));
    if let Some((name, library)) = plug_in.split_once('=') {
        let option = |option: &str| option.split_once('=').map(|(key, value)| (key.into(), value.into()));
        let options = options.split(',').filter(|option| !option.is_empty());
        let options: Option<Vec<(String, String)>> = options.map(option).collect();
        let options = options.ok_or(format!("{word}: options are NAME=VALUE"))?;
        let plug_in = PlugIn { options, ..PlugIn::new(library) };
        return match name {
            "webgpu" => Ok(Accelerator::WebGpu(plug_in)),
            "openvino" => Ok(Accelerator::OpenVinoPlugIn(plug_in)),
            "custom" => Ok(Accelerator::Custom { name: "Custom".into(), plug_in, fp16: false }),
            "qnn" => {
                let number = |name: &str| {
                    let of = |(key, value): &(String, String)| (key == name).then(|| value.parse().ok()).flatten();
                    plug_in.options.iter().find_map(of)
                };
                let (soc_model, htp_arch) = (number("soc_model"), number("htp_arch"));
                let backend = plug_in.options.iter().find(|(key, _)| key == "backend_type");
                let backend = backend.map_or("htp".into(), |(_, value)| value.clone());
                Ok(Accelerator::Qnn(Qnn { backend, soc_model, htp_arch, ..Qnn::new(library) }))
            }
            _ => Err(format!("{name} is no plug-in that is known here")),
        };
    }
    let (name, device) = word.split_once(':').unwrap_or((word, "0"));
    let number = device.parse().map_err(|_| format!("{word}: expected the number of a device"));
    match name {
        "cpu" => Ok(Accelerator::Cpu),
        "openvino" => {
            let device = if device == "0" { "CPU" } else { device };
            Ok(Accelerator::OpenVino { device: device.into(), cache: None })
        }
        "xnnpack" => Ok(Accelerator::Xnnpack),
        "coreml" => Ok(Accelerator::CoreMl(CoreMl::default())),
        "nnapi" => Ok(Accelerator::Nnapi { fp16: false }),
        "directml" => Ok(Accelerator::DirectMl { device: number? }),
        "cuda" => Ok(Accelerator::Cuda { device: number? }),
        "tensorrt" => Ok(Accelerator::TensorRt { device: number?, fp16: false, cache: None }),
        _ => Err(format!("{name} is no accelerator that is known here")),
    }
}
