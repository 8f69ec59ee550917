//! The lint against ONNX Runtime's own usability checker, whose answers are stored beside the models, and against what
//! is known of single rules.

use candle_onnx::onnx::ModelProto;
use dmd_export::lint::{Kind, Report, Target, lint, read};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lint")
}

fn model(name: &str) -> ModelProto {
    read(&folder().join(name).with_extension("onnx")).unwrap()
}

fn report(name: &str, target: Target) -> Report {
    lint(&model(name), target)
}

/// The checker's answer, as it would stand in a report.
#[derive(Debug, PartialEq)]
struct Answer {
    nodes: usize,
    taken: usize,
    operators_missing: usize,
    /// `None` where a caveat that the checker does not check changes the pieces.
    partitions: Option<Vec<usize>>,
}

impl Answer {
    fn of_checker(answer: &Value, with_partitions: bool) -> Self {
        let number = |key: &str| answer[key].as_u64().unwrap() as usize;
        let partitions = || serde_json::from_value(answer["partitions"].clone()).unwrap();
        Answer {
            nodes: number("nodes"),
            taken: number("taken"),
            operators_missing: number("operators_missing"),
            partitions: with_partitions.then(partitions),
        }
    }

    /// Without the conditions, which the checker lists and leaves to the reader.
    fn of_report(report: &Report) -> Self {
        let count = |kind| report.refused.iter().filter(|refusal| refusal.kind == kind).count();
        Answer {
            nodes: report.nodes,
            taken: report.taken + count(Kind::Form),
            operators_missing: count(Kind::Operator),
            partitions: (count(Kind::Form) == 0).then(|| report.partitions.clone()),
        }
    }
}

#[test]
fn nnapi_and_coreml_answers_are_those_of_the_usability_checker() {
    let stored: Value =
        serde_json::from_str(&std::fs::read_to_string(folder().join("usability.json")).unwrap()).unwrap();
    let stored = stored.as_object().unwrap();
    for target in [Target::Nnapi, Target::CoreMl] {
        let (mut with_partitions, mut unchanged) = (0, 0);
        for (name, answers) in stored {
            let report = report(name, target);
            let ours = Answer::of_report(&report);
            let as_it_is = &answers["as_it_is"][target.name()];
            // A dynamic shape and a missing operator may meet in one node; then the checker counts it twice.
            let checker = Answer::of_checker(as_it_is, ours.partitions.is_some());
            assert_eq!(ours, checker, "{name} for {target}: {report}");
            with_partitions += usize::from(ours.partitions.is_some());
            // The tool as a user runs it optimises first. Where that changes nothing, ours is its printed answer.
            unchanged += usize::from(as_it_is == &answers["optimised"][target.name()] && ours.partitions.is_some());
        }
        assert_eq!(stored.len(), 17);
        assert!(with_partitions >= 12 && unchanged >= 9, "{target}: {with_partitions} and {unchanged}");
    }
}

/// Each model, the target, the node that is refused, and words of the reason.
#[test]
fn conditions_that_the_checker_leaves_open_are_checked() {
    let cases = [
        ("label_int64", Target::Nnapi, "Gather", "input 1 is int64 and not constant, expected int32 or a constant"),
        ("bytes_tail", Target::Nnapi, "Cast", "to is 2, expected 1 or 6"),
        ("bytes_tail", Target::CoreMl, "Cast", "to is 2, expected 1 or 6 or 7 or 9 or 10"),
        ("variable_weight", Target::Nnapi, "Conv", "input 1 must be constant"),
        ("variable_weight", Target::Xnnpack, "Conv", "input 1 must be constant"),
        ("resize_with_roi", Target::Xnnpack, "Resize", "mode is nearest, expected linear"),
        ("attention", Target::Xnnpack, "MatMul", "input 1 has rank 3, expected 1 or 2"),
        ("dynamic_batch", Target::Qnn, "Conv", "input 0 has a dynamic shape"),
        ("shape_arithmetic", Target::Nnapi, "Reshape", "has a dynamic shape"),
        ("shape_arithmetic", Target::Nnapi, "Softmax", "input 0 has a dynamic shape"),
        ("resize_without_roi", Target::Nnapi, "Resize", "input 1 is left out, which counts as a dynamic shape"),
        ("rank_six", Target::Qnn, "Transpose", "it reads a value of rank 6, expected 5 at most"),
        ("norm_native", Target::WebGpu, "GroupNormalization", "webgpu has no operator GroupNormalization"),
    ];
    for (name, target, operator, reason) in cases {
        let report = report(name, target);
        let refused =
            |refusal: &&dmd_export::lint::Refusal| refusal.operator == operator && refusal.reason.contains(reason);
        let refusal = report.refused.iter().find(refused).unwrap_or_else(|| panic!("{name}: {report}"));
        assert!(refusal.node.starts_with(&operator.to_lowercase()) && !refusal.source.is_empty(), "{refusal:?}");
    }
    assert!(report("label_int32", Target::Nnapi).is_whole());
    assert!(report("variable_weight", Target::TensorRt).is_whole());
}

#[test]
fn each_spelling_of_group_norm_is_whole_where_it_belongs() {
    use Target::*;
    let whole = |name: &str| Target::ALL.into_iter().filter(|t| report(name, *t).is_whole()).collect::<Vec<_>>();
    assert_eq!(whole("norm_by_instance"), [CoreMl, Qnn, DirectMl, WebGpu, TensorRt, Cpu]);
    assert_eq!(whole("norm_by_reduction"), [CoreMl, Nnapi, Qnn, DirectMl, WebGpu, TensorRt, Cpu]);
    assert_eq!(whole("norm_native"), [CoreMl, Qnn, TensorRt]);
}

#[test]
fn float16_is_refused_where_the_provider_computes_in_float32_alone() {
    let mut half = model("norm_by_reduction");
    let graph = half.graph.as_mut().unwrap();
    let types = graph.input.iter_mut().chain(&mut graph.value_info).filter_map(|info| info.r#type.as_mut());
    for kind in types {
        let Some(candle_onnx::onnx::type_proto::Value::TensorType(tensor)) = &mut kind.value else { continue };
        tensor.elem_type = candle_onnx::onnx::tensor_proto::DataType::Float16 as i32;
    }
    let report = lint(&half, Target::Nnapi);
    assert!(report.refused[0].reason.contains("not for float16"), "{report}");
    assert!(lint(&half, Target::CoreMl).is_whole());
}

#[test]
fn a_person_reads_a_table_and_a_program_json() {
    let report = report("norm_by_instance", Target::Nnapi);
    let text = report.to_string();
    for part in [
        "takes 16 of 18 nodes (88.9 %) in 3 partitions of [2, 7, 7] nodes",
        "   2 × InstanceNormalization  nnapi has no operator InstanceNormalization (instancenormalization_2, ",
        "remedy: write the norm with ReduceMean",
        "suited by: dialect nnapi, fp32",
        "note: Android 15 deprecates NNAPI",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        (&json["target"], &json["taken"], &json["refused"][0]["kind"]),
        (&"nnapi".into(), &16.into(), &"operator".into())
    );
}

/// Whatever is cut off or turned over, there is an answer or an error, and no panic.
#[test]
fn broken_files_are_errors_or_harmless() {
    let folder_of_test = tempfile::tempdir().unwrap();
    let path = folder_of_test.path().join("broken.onnx");
    for name in ["shape_arithmetic", "gelu_and_pad", "choice"] {
        let bytes = std::fs::read(folder().join(name).with_extension("onnx")).unwrap();
        for at in (0..bytes.len()).step_by(29) {
            let mut broken = bytes.clone();
            broken[at] ^= 0xff;
            if at % 2 == 0 {
                broken.truncate(at);
            }
            std::fs::write(&path, &broken).unwrap();
            if let Ok(model) = read(&path) {
                Target::ALL.into_iter().for_each(|target| drop(lint(&model, target).to_string()));
            }
        }
    }
    for (bytes, reason) in [("", "there is no graph"), ("<!doctype html>", "not an ONNX file"), (":\0", "has no nodes")]
    {
        std::fs::write(&path, bytes).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("broken.onnx: not an ONNX file") && error.contains(reason), "{error}");
    }
    let missing = read(&folder_of_test.path().join("missing.onnx")).unwrap_err().to_string();
    assert!(missing.contains("missing.onnx: cannot read: "), "{missing}");
}
