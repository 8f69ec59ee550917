//! The whole of an app: `cargo run -p dmd-runtime --release --example embed -- MODEL.onnx OUT.png [SEED]`.

use dmd_runtime::{Generator, Options, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model, out, rest @ ..] = arguments.as_slice() else {
        return Err("usage: embed MODEL.onnx OUT.png [SEED]".into());
    };
    let seed = rest.first().map_or(Ok(0), |seed| seed.parse())?;

    let generator = Generator::load(model, Options::default())?;
    if let Some(warning) = &generator.engine().warning {
        eprintln!("{warning}");
    }
    let images = generator.generate(&Request { seed, ..Request::default() })?;
    images.to_images()[0].save(out)?;
    Ok(())
}
