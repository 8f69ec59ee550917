//! A class-conditional transformer as a file, in every dialect, run by every engine present.

use candle_core::{DType, Device};
use dmd_export::{Dialect, ExportOptions, ModelInfo, OneStep, Status, export};
use dmd_models::networks::dit::{DiT, DiTConfig};
use dmd_models::noise_levels::Betas;
use dmd_models::{Architecture, Denoiser, Generator, Network, NoiseLevels, Prediction, Weights};
use std::path::Path;

#[test]
fn a_transformer_is_exported_in_every_dialect() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures/dit/plain");
    let path = folder.join("config.json");
    let config = DiTConfig::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
    let weights = Weights::load(&folder.join("diffusion_pytorch_model.safetensors"), &Device::Cpu).unwrap();
    let network = Network::DiT(DiT::new(&config, &weights.to(DType::F32, &Device::Cpu).unwrap()).unwrap());
    let levels = NoiseLevels::variance_preserving(&Betas::Linear, 1000, [1e-4, 0.02], false).unwrap();
    let denoiser = Denoiser { network, prediction: Prediction::Epsilon, levels, clip: None, unconditional: None };
    let generator = OneStep::new(Generator { denoiser, sigma: 2.5 }, [8, 8]);
    let classes = ["a", "b", "c"].map(String::from).to_vec();
    let info = ModelInfo { classes, weights_sha256: "0".repeat(64) };
    for dialect in Dialect::ALL {
        let written = tempfile::tempdir().unwrap();
        let options = ExportOptions { dialect, ..ExportOptions::default() };
        let report = export(&generator, &info, &options, &written.path().join("dit.onnx")).unwrap();
        println!("{dialect}: {} nodes", report.nodes);
        assert!(report.engines.iter().any(|v| v.engine == "tract" && v.status == Status::Passed), "{report:?}");
    }
}
