//! The example of a user's own network, exported, linted and written in ONNX Runtime's format.

use dmd_export::lint::{Target, lint, read};
use dmd_export::{required_operators_config, to_ort};
use dmd_runtime::{EngineChoice, Generator, Info, Options};
use std::fs;
use std::path::Path;

#[path = "../examples/your_network.rs"]
mod example;

#[test]
fn a_network_of_ones_own_is_exported_and_taken_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.onnx");
    let report = example::write(&path).unwrap();
    assert!(report.engines.iter().any(|verdict| verdict.engine == "tract"), "{report:?}");
    let graph = read(&path).unwrap();
    let names: Vec<&str> = graph.graph.as_ref().unwrap().node.iter().map(|node| node.name.as_str()).collect();
    for layer in ["first", "norm", "inner"] {
        assert!(names.iter().any(|name| name.starts_with(layer)), "{layer} in {names:?}");
    }
    for target in [Target::CoreMl, Target::Qnn, Target::WebGpu, Target::Cpu] {
        assert!(lint(&graph, target).is_whole(), "{target}");
    }
    in_the_format_of_onnx_runtime(folder.path());
}

fn in_the_format_of_onnx_runtime(folder: &Path) {
    let (onnx, ort) = (folder.join("network.onnx"), folder.join("network.ort"));
    let present = dmd_runtime::engines(None)
        .into_iter()
        .any(|e| e.kind == dmd_runtime::EngineKind::OnnxRuntime && e.is_present());
    if !present {
        let error = to_ort(&onnx, &ort, false, None).unwrap_err();
        assert!(error.to_string().contains("no usable ONNX Runtime library"), "{error}");
        return eprintln!("skipped: no ONNX Runtime here");
    }
    let report = to_ort(&onnx, &ort, false, None).unwrap();
    let bytes = fs::read(&ort).unwrap();
    assert_eq!((bytes.len() as u64, &bytes[4..8]), (report.bytes, &b"ORTM"[..]), "the mark of the format");
    assert!(report.max_abs_difference < 1e-4, "{report:?}");
    let onnx_domain = report.required_operators.iter().find(|set| set.domain == "ai.onnx").unwrap();
    assert_eq!(onnx_domain.opset, 17);
    for operator in ["Conv", "InstanceNormalization", "Reshape"] {
        assert!(onnx_domain.operators.iter().any(|o| o == operator), "{operator} in {onnx_domain:?}");
    }
    let text = required_operators_config(&report.required_operators);
    assert!(text.contains("\nai.onnx;17;Add,"), "{text}");

    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["network.onnx", "network.ort"], "something was left behind");
    let refused = |ort: &str, part: &str| {
        let error = to_ort(&onnx, &folder.join(ort), false, None).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused("network.ort", "exists already");
    refused("network.onnx2", "expected a name that ends in .ort");
    refused("nowhere/network.ort", "nowhere");
    to_ort(&onnx, &ort, true, None).unwrap();
    it_describes_itself(&onnx, &ort);
}

/// What is read of the .ort file is what the ONNX file says, but for the optimised graph.
fn it_describes_itself(onnx: &Path, ort: &Path) {
    let [source, found] = [onnx, ort].map(|path| Info::read(path).unwrap());
    assert!(
        found.file.nodes > 0 && found.file.nodes <= source.file.nodes,
        "{} nodes of {}",
        found.file.nodes,
        source.file.nodes
    );
    let [written, weights] = [&source, &found].map(|info| info.file.weight_bytes as f64);
    let weights = weights / written;
    assert!((0.9..1.1).contains(&weights), "{weights} of {written} bytes of weights");
    let described = |info: &Info| {
        let mut described = serde_json::to_value(info).unwrap();
        let keys = described.as_object_mut().unwrap();
        keys.retain(|key, _| !["nodes", "weight_bytes", "bytes", "largest_value"].contains(&key.as_str()));
        described
    };
    assert_eq!(described(&found), described(&source));
    let tract = Options { engine: EngineChoice::Tract, ..Options::default() };
    let Err(error) = Generator::load(ort, tract) else { panic!("tract runs an .ort file") };
    assert!(error.to_string().contains("only ONNX Runtime runs .ort files"), "{error}");
    // Cut off or turned over anywhere, it is an error or still a description, and no panic.
    let bytes = fs::read(ort).unwrap();
    let broken = ort.with_file_name("broken.ort");
    for at in (0..bytes.len()).step_by(bytes.len() / 400) {
        let mut spoilt = bytes.clone();
        spoilt[at] ^= 0xff;
        if at % 2 == 0 {
            spoilt.truncate(at);
        }
        fs::write(&broken, &spoilt).unwrap();
        drop(Info::read(&broken));
    }
    fs::write(&broken, &bytes[..bytes.len() / 2]).unwrap();
    let error = Info::read(&broken).unwrap_err().to_string();
    assert!(error.contains("broken.ort: not a whole ONNX file: expected the format of ONNX Runtime"), "{error}");
}

#[path = "../examples/candle_nn.rs"]
mod of_candle_nn;

#[test]
fn a_model_of_candle_nns_layers_is_exported_in_every_engine() {
    let folder = tempfile::tempdir().unwrap();
    let report = of_candle_nn::write(&folder.path().join("network.onnx")).unwrap();
    assert!(report.engines.iter().any(|verdict| verdict.engine == "tract"), "{report:?}");
}
