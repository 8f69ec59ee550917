//! A model of candle-nn's layers as an ONNX file: they become layers of `dmd-models`, and the network says once, over a
//! backend, how data passes through them.
//!
//!     cargo run --release -p dmd-export --example candle_nn -- network.onnx

use candle_core::{DType, Device};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap, conv2d, layer_norm};
use dmd_export::{ExportOptions, ExportReport, Input, ModelInfo, Module, export};
use dmd_models::layers::{Conv2d, LayerNorm};
use dmd_models::{Activation, Backend, Condition, Result};
use std::path::Path;

struct Painter {
    first: Conv2d,
    norm: LayerNorm,
    last: Conv2d,
}

impl Module for Painter {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([3, 16, 16])]
    }

    fn run<B: Backend>(&self, b: &B, inputs: &[B::Value], _: &Condition<B::Value>) -> Result<Vec<B::Value>> {
        let h = b.layer_norm(&b.conv2d(&inputs[0], &self.first)?, &self.norm)?;
        Ok(vec![b.conv2d(&b.activation(&h, Activation::GeluTanh)?, &self.last)?])
    }
}

/// Builds the model with candle-nn, here with fresh weights, and writes it.
pub fn write(path: &Path) -> std::result::Result<ExportReport, Box<dyn std::error::Error>> {
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let config = Conv2dConfig { padding: 1, ..Default::default() };
    let painter = Painter {
        first: conv2d(3, 32, 3, config, vb.pp("first"))?.into(),
        norm: layer_norm(32, 1e-5, vb.pp("norm"))?.into(),
        last: conv2d(32, 3, 3, config, vb.pp("last"))?.into(),
    };
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    Ok(export(&painter, &info, &ExportOptions::default(), path)?)
}

#[allow(dead_code)]
fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: candle_nn FILE.onnx")?;
    let report = write(Path::new(&path))?;
    println!("{path}: {} nodes", report.nodes);
    Ok(())
}
