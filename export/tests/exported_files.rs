//! Exported files stay what they are: nodes, names, attributes, types and constants, all but the numbers in the weights,
//! which depend on the order in which a machine sums, and what a file says of itself.
//!
//! A change that is meant changes fixtures/golden.json: the failing test prints it as it would be.

use candle_core::Device;
use dmd_export::{Dialect, EngineChoice, ExportOptions, ModelInfo, OneStep, Precision, export};
use dmd_models::{Generator, ModelFolder};
use prost::Message;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// A hash of the file without its weights and its metadata.
fn structure(path: &Path) -> String {
    let mut model = dmd_export::lint::read(path).unwrap();
    (model.metadata_props, model.producer_version) = (vec![], String::new());
    let constants = model.graph.iter_mut().flat_map(|graph| &mut graph.initializer);
    constants.for_each(|constant| constant.raw_data = (constant.raw_data.len() as u64).to_le_bytes().to_vec());
    Sha256::digest(model.encode_to_vec()).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn exported_files_are_what_they_were() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let target = tempfile::tempdir().unwrap();
    let mut found = BTreeMap::new();
    for name in ["tests/fixtures/edm-tiny", "tests/fixtures/ddpm-tiny", "pretrained/emoji-16"] {
        let folder = ModelFolder::load(&models.join(name), &Device::Cpu).unwrap();
        let generator = Generator { denoiser: folder.denoiser(&Device::Cpu).unwrap(), sigma: 2.5 };
        let [_, height, width] = folder.sample_shape().unwrap();
        let generator = OneStep::new(generator, [height, width]);
        let info = ModelInfo { classes: folder.classes(), weights_sha256: String::new() };
        for dialect in Dialect::ALL {
            for precision in Precision::ALL {
                let path = target.path().join("a.onnx");
                // No engine runs them: other tests do. Which layers w8a8 keeps is a matter of sums, so it keeps none.
                let options = ExportOptions {
                    dialect,
                    precision,
                    max_drop_db: (precision == Precision::W8a8).then_some(1000.0),
                    engines: EngineChoice::OnnxRuntime,
                    library: Some("/nowhere/libonnxruntime.so".into()),
                    allow_unverified: true,
                    force: true,
                    ..Default::default()
                };
                export(&generator, &info, &options, &path).unwrap();
                found.insert(format!("{name} {dialect} {precision}"), structure(&path));
            }
        }
    }
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden.json");
    let expected: BTreeMap<String, String> =
        serde_json::from_str(&std::fs::read_to_string(&stored).unwrap_or_else(|_| "{}".into())).unwrap();
    assert!(found == expected, "{}", serde_json::to_string_pretty(&found).unwrap());
}
