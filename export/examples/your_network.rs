//! A candle network of your own as an ONNX file: written once over `Backend`, it runs in candle and it exports.
//!
//! `cargo run --release --example your_network -- network.onnx`

use candle_core::{DType, Device, Tensor};
use dmd_export::lint::{Target, lint, read};
use dmd_export::{ExportOptions, ExportReport, Input, ModelInfo, Module, export};
use dmd_models::layers::{Conv2d, GroupNorm};
use dmd_models::{Activation, Backend, Condition, Result};
use std::path::Path;

/// Noise to a picture by one residual block between two convolutions.
pub struct Small {
    first: Conv2d,
    norm: GroupNorm,
    inner: Conv2d,
    last: Conv2d,
}

impl Small {
    /// Random weights; yours come from a file.
    pub fn random(channels: usize, width: usize) -> Result<Self> {
        let conv = |name: &str, from: usize, to: usize| -> Result<Conv2d> {
            let weight = Tensor::randn(0f32, (9.0 * from as f32).sqrt().recip(), (to, from, 3, 3), &Device::Cpu)?;
            Ok(Conv2d { name: name.into(), weight, bias: None, stride: 1, padding: 1 })
        };
        let weight = Tensor::ones(width, DType::F32, &Device::Cpu)?;
        let norm = GroupNorm { name: "norm".into(), bias: weight.zeros_like()?, weight, groups: 4, eps: 1e-5 };
        let (first, last) = (conv("first", channels, width)?, conv("last", width, channels)?);
        Ok(Small { first, norm, inner: conv("inner", width, width)?, last })
    }
}

impl Module for Small {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([self.last.weight.dims()[0], 32, 32])]
    }

    fn run<B: Backend>(&self, b: &B, inputs: &[B::Value], _: &Condition<B::Value>) -> Result<Vec<B::Value>> {
        let x = b.conv2d(&inputs[0], &self.first)?;
        let h = b.conv2d(&b.group_norm(&x, &self.norm, Some(Activation::Silu))?, &self.inner)?;
        Ok(vec![b.conv2d(&b.add(&x, &h)?, &self.last)?])
    }
}

/// Runs the file in every engine present, and leaves it only where all of them agree with candle.
pub fn write(path: &Path) -> std::result::Result<ExportReport, Box<dyn std::error::Error>> {
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    Ok(export(&Small::random(3, 16)?, &info, &ExportOptions::default(), path)?)
}

#[allow(dead_code)] // A test takes the rest of this file.
fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: your_network FILE.onnx")?;
    let report = write(path.as_ref())?;
    report.engines.iter().for_each(|verdict| println!("{verdict}"));
    println!("{path}: {} nodes, {} bytes\n", report.nodes, report.bytes);
    println!("{}", lint(&read(path.as_ref())?, Target::CoreMl));
    Ok(())
}
