//! Copies a model folder with its weights as f16, half the size: how the models that ship were written.
//!
//!     cargo run --release --example to_f16 -- FROM TO

use candle_core::{DType, Device};
use dmd_models::ModelFolder;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(from), Some(to)) = (args.next(), args.next()) else { return Err("usage: to_f16 FROM TO".into()) };
    // Written into the folder, so that a model card and pictures beside the model stay.
    ModelFolder::load(Path::new(&from), &Device::Cpu)?.write_into(Path::new(&to), DType::F16)?;
    Ok(())
}
