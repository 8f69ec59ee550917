//! The example of a user's own network, exported, linted and written in ONNX Runtime's format.

use dmd_export::lint::{Target, lint, read};
use dmd_export::{required_operators_config, to_ort};
use std::fs;

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

fn in_the_format_of_onnx_runtime(folder: &std::path::Path) {
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
}
