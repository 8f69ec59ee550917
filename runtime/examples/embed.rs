//! The whole of an app: `cargo run -p dmd-runtime --release --example embed -- MODEL.onnx OUT.png SEED`.

use dmd_runtime::{Generator, Options, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().ok_or("usage: embed MODEL.onnx OUT.png SEED");
    let (model, out, seed) = (next()?, next()?, next()?.parse()?);
    let generator = Generator::load(model, Options::default())?;
    generator.generate(&Request { seed, ..Request::default() })?.to_images()[0].save(out)?;
    Ok(())
}
