//! The lint against ONNX Runtime's own usability checker, whose answers are stored beside the models, and against what
//! is known of single rules.

use candle_onnx::onnx::tensor_shape_proto::{Dimension, dimension};
use candle_onnx::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorShapeProto, TypeProto, ValueInfoProto,
    type_proto,
};
use dmd_export::lint::{Kind, Report, Target, lint, read};
use dmd_export::{Dialect, ExportOptions, ModelInfo, Output, Precision, export};
use serde_json::Value;
use std::path::{Path, PathBuf};

#[path = "../examples/your_network.rs"]
mod example;

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
            // The checker looks into no function and counts constants; ONNX Runtime does away with both before it asks.
            let looked_at =
                if ["constants", "folded", "functions"].contains(&name.as_str()) { "optimised" } else { "as_it_is" };
            let as_it_is = &answers[looked_at][target.name()];
            // A dynamic shape and a missing operator may meet in one node; then the checker counts it twice.
            let checker = Answer::of_checker(as_it_is, ours.partitions.is_some());
            assert_eq!(ours, checker, "{name} for {target}: {report}");
            with_partitions += usize::from(ours.partitions.is_some());
            // The tool as a user runs it optimises first. Where that changes nothing, ours is its printed answer.
            unchanged += usize::from(as_it_is == &answers["optimised"][target.name()] && ours.partitions.is_some());
        }
        assert_eq!(stored.len(), 27);
        assert!(with_partitions >= 12 && unchanged >= 9, "{target}: {with_partitions} and {unchanged}");
    }
}

/// Each model, the target, the node that is refused, and words of the reason.
#[test]
fn conditions_that_the_checker_leaves_open_are_checked() {
    let cases = [
        ("label_int64", Target::Nnapi, "Gather", "input 1 is int64 and not constant, expected int32 or a constant"),
        ("bytes_tail", Target::Nnapi, "Cast", "to is 2, expected 1 or 6"),
        ("bytes_tail", Target::CoreMl, "Cast", "to is 2, expected 1 or 6 or 7 or 10"),
        ("bytes_tail", Target::WebGpu, "Cast", "to is 2, expected 1 or 6 or 9 or 10 or 12"),
        ("unsigned", Target::Xnnpack, "Conv", "in integers: inputs 0 and 1 are uint8 and int8, expected one type"),
        ("unsigned", Target::TensorRt, "QuantizeLinear", "input 2 is uint8, expected int8"),
        ("unsigned", Target::TensorRt, "DequantizeLinear", "input 0 is int32, expected int8"),
        ("variable_weight", Target::Nnapi, "Conv", "input 1 must be constant"),
        ("variable_weight", Target::Xnnpack, "Conv", "input 1 must be constant"),
        ("resize_with_roi", Target::Xnnpack, "Resize", "mode is nearest, expected linear"),
        ("transposed", Target::CoreMl, "ConvTranspose", "input 1 must be constant, and comes from Relu"),
        ("transposed", Target::Nnapi, "ConvTranspose", "nnapi has no operator ConvTranspose"),
        ("shapes", Target::CoreMl, "ConvTranspose", "auto_pad is SAME_UPPER, expected NOTSET or VALID"),
        ("shapes", Target::CoreMl, "ConvTranspose", "output_shape is [10, 12], expected none"),
        ("shapes", Target::CoreMl, "ConvTranspose", "output_padding is [2, 1], expected none"),
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
    // QNN was seen to take bytes at the end; NNAPI's own convolution in integers is of unsigned activations.
    assert!(report("bytes_tail", Target::Qnn).is_whole());
    assert!(report("unsigned", Target::Nnapi).is_whole() && report("unsigned", Target::Qnn).is_whole());
}

#[test]
fn an_opset_or_a_value_of_an_attribute_may_be_what_is_refused() {
    let mut later = model("unsigned");
    assert!(lint(&later, Target::DirectMl).is_whole());
    later.opset_import[0].version = 21;
    let report = lint(&later, Target::DirectMl);
    assert!(report.refused[0].reason.contains("input 0 is int32") && report.refused.len() == 1, "{report}");

    let mut one_group = model("norm_native");
    let attributes = one_group.graph.iter_mut().flat_map(|graph| &mut graph.node).flat_map(|node| &mut node.attribute);
    attributes.filter(|attribute| attribute.name == "num_groups").for_each(|attribute| attribute.i = 1);
    let report = lint(&one_group, Target::TensorRt);
    assert_eq!(report.refused[0].reason, "num_groups is 1, expected another", "{report}");
}

/// The network of the example as a file.
fn exported(dialect: Dialect, precision: Precision, output: Output) -> ModelProto {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.onnx");
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    // Weights are random: whatever the pictures lose, the layers are to be in integers.
    let min_psnr_db = (precision != Precision::Fp32).then_some(5.0);
    let max_drop_db = (precision == Precision::W8a8).then_some(100.0);
    let options = ExportOptions { dialect, precision, output, min_psnr_db, max_drop_db, ..Default::default() };
    export(&example::Small::random(3, 16).unwrap(), &info, &options, &path).unwrap();
    read(&path).unwrap()
}

#[test]
fn exported_files_are_whole_where_the_rules_of_their_precision_allow_it() {
    use Target::*;
    for dialect in Dialect::ALL {
        for precision in Precision::ALL {
            let file = exported(dialect, precision, Output::F32);
            let by_precision = |target: &Target| match precision {
                Precision::Fp32 => *target != Xnnpack,
                Precision::Fp16 => !matches!(target, Nnapi | Xnnpack),
                // Weights of a scale per channel, which meet floats.
                Precision::W8 => matches!(target, DirectMl | WebGpu | TensorRt | Cpu),
                // Signed activations with zero points, and biases of int32.
                Precision::W8a8 => matches!(target, Qnn | DirectMl | Cpu),
            };
            let by_dialect = |target: &Target| match dialect {
                Dialect::Portable => *target != Nnapi,
                Dialect::Nnapi => true,
                Dialect::Native => matches!(target, CoreMl | Qnn | TensorRt),
            };
            let expected = Target::ALL.into_iter().filter(by_precision).filter(by_dialect);
            let whole = Target::ALL.into_iter().filter(|target| lint(&file, *target).is_whole());
            assert_eq!(whole.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{dialect} {precision}");
        }
    }
}

/// In half precision what reads the noise is not: a Cast of the graph's own input would go to the CPU.
#[test]
fn a_cast_of_the_noise_itself_is_what_coreml_leaves_to_the_cpu() {
    let mut file = exported(Dialect::Portable, Precision::Fp16, Output::F32);
    assert!(lint(&file, Target::CoreMl).is_whole());
    let mut nodes = file.graph.iter_mut().flat_map(|graph| &mut graph.node);
    nodes.find(|node| node.op_type == "Cast").unwrap().input = vec!["noise".into()];
    let report = lint(&file, Target::CoreMl);
    assert_eq!(report.refused[0].reason, "input 0 is the graph's own, expected the output of a node", "{report}");
}

/// Each precision of the NNAPI dialect, the target, the operator that is refused, and words of the reason.
#[test]
fn what_is_refused_of_a_precision_says_why() {
    let cases = [
        (Precision::Fp16, Target::Nnapi, "Conv", "not for float16"),
        (Precision::W8, Target::Nnapi, "DequantizeLinear", "input 1 holds 16 numbers, expected one"),
        (Precision::W8, Target::Nnapi, "Conv", "input 1 must be constant, and comes from DequantizeLinear"),
        (Precision::W8, Target::Xnnpack, "Conv", "input 1 must be constant, and comes from DequantizeLinear"),
        (Precision::W8, Target::Qnn, "DequantizeLinear", "input 1 holds 16 numbers, expected one"),
        (Precision::W8a8, Target::Nnapi, "Conv", "in integers: input 0 is int8, expected uint8"),
        (Precision::W8a8, Target::Nnapi, "DequantizeLinear", "it goes with Conv in integers: input 0 is int8"),
        (Precision::W8a8, Target::Nnapi, "QuantizeLinear", "input 2 is int8, expected uint8"),
        (Precision::W8a8, Target::TensorRt, "QuantizeLinear", "input 2 must be 0 throughout"),
        (Precision::W8a8, Target::TensorRt, "DequantizeLinear", "input 2 must be 0 throughout"),
        (Precision::W8a8, Target::WebGpu, "QuantizeLinear", "webgpu has no operator QuantizeLinear"),
    ];
    for precision in [Precision::Fp16, Precision::W8, Precision::W8a8] {
        let file = exported(Dialect::Nnapi, precision, Output::F32);
        for (_, target, operator, reason) in cases.into_iter().filter(|case| case.0 == precision) {
            let report = lint(&file, target);
            let found = report.refused.iter().find(|r| r.operator == operator && r.reason.contains(reason));
            assert!(found.is_some_and(|refusal| !refusal.source.is_empty()), "{reason}: {report}");
        }
    }
    // XNNPACK takes the convolution in integers, with what stands around it; what turns its result back is not.
    let report = lint(&exported(Dialect::Portable, Precision::W8a8, Output::F32), Target::Xnnpack);
    let refused = |operator: &str| report.refused.iter().filter(|refusal| refusal.operator == operator).count();
    assert_eq!(["Conv", "QuantizeLinear", "DequantizeLinear"].map(refused), [0, 1, 1], "{report}");
}

#[test]
fn bytes_at_the_end_are_one_node_for_the_cpu_where_there_is_no_such_cast() {
    for dialect in Dialect::ALL {
        let file = exported(dialect, Precision::Fp32, Output::U8);
        for target in Target::ALL {
            let report = lint(&file, target);
            let takes_floats = lint(&exported(dialect, Precision::Fp32, Output::F32), target).is_whole();
            let expected = takes_floats && !matches!(target, Target::CoreMl | Target::Nnapi | Target::WebGpu);
            assert_eq!(report.is_whole(), expected, "{dialect}: {report}");
            if takes_floats && !expected {
                assert_eq!(report.partitions, [report.nodes - 1], "{dialect}: {report}");
                assert_eq!(report.refused[0].operator, "Cast");
            }
        }
    }
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
        "source: onnxruntime 1.31.1 (PyPI), onnxruntime/tools/mobile_helpers",
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

fn node(operator: &str, inputs: &[&str], output: &str) -> NodeProto {
    let input = inputs.iter().map(|name| name.to_string()).collect();
    NodeProto {
        name: output.into(),
        op_type: operator.into(),
        input,
        output: vec![output.into()],
        ..Default::default()
    }
}

fn model_of(nodes: Vec<NodeProto>, functions: Vec<FunctionProto>) -> ModelProto {
    let dims = [2, 2].map(|n| Dimension { value: Some(dimension::Value::DimValue(n)), ..Default::default() });
    let tensor = type_proto::Tensor { elem_type: 7, shape: Some(TensorShapeProto { dim: dims.to_vec() }) };
    let kind = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    let input = vec![ValueInfoProto { name: "x0".into(), r#type: Some(kind), ..Default::default() }];
    ModelProto { graph: Some(GraphProto { node: nodes, input, ..Default::default() }), functions, ..Default::default() }
}

fn function(name: &str, nodes: Vec<NodeProto>) -> FunctionProto {
    let node = nodes.into_iter().map(|node| NodeProto { name: String::new(), ..node }).collect();
    let (input, output) = (vec!["x".into()], vec!["y".into()]);
    FunctionProto { domain: "my.lib".into(), name: name.into(), input, output, node, ..Default::default() }
}

fn call(name: &str, input: &str, output: &str) -> NodeProto {
    NodeProto { domain: "my.lib".into(), ..node(name, &[input], output) }
}

#[test]
fn a_rank_that_doubles_at_every_node_is_not_followed() {
    let gather = |i: usize| node("Gather", &[&format!("x{i}"), &format!("x{i}")], &format!("x{}", i + 1));
    let nodes = (0..40).map(gather).collect();
    let report = lint(&model_of(nodes, vec![]), Target::Qnn);
    // Ranks 2, 3, 5, 9, 17 and 33 are known, 65 is no rank of a real value; QNN stops at 5.
    let count = |part: &str| report.refused.iter().filter(|refusal| refusal.reason.contains(part)).count();
    assert_eq!((count("of rank"), count("is not known")), (3, 34), "{report}");
}

#[test]
fn axes_by_the_million_are_not_followed() {
    let ints: Vec<i64> = (0..1 << 20).collect();
    let axes = AttributeProto { name: "axes".into(), ints, ..Default::default() };
    let unsqueeze = NodeProto { attribute: vec![axes], ..node("Unsqueeze", &["x0"], "y") };
    let nodes = vec![unsqueeze, node("Relu", &["y"], "z")];
    assert!(lint(&model_of(nodes, vec![]), Target::Qnn).refused[0].reason.contains("input 0 is not known"));
}

/// Bodies that call the next function twice: 2^60 nodes in 60 functions. 2^12 of them are written out.
#[test]
fn functions_that_double_at_every_level_are_counted_before_they_are_written_out() {
    let doubling = |levels: usize| -> Vec<FunctionProto> {
        let body = |i: usize| match i + 1 == levels {
            true => vec![node("Relu", &["x"], "y")],
            false => vec![call(&format!("f{}", i + 1), "x", "a"), call(&format!("f{}", i + 1), "a", "y")],
        };
        (0..levels).map(|i| function(&format!("f{i}"), body(i))).collect()
    };
    for levels in [30, 60] {
        let report = lint(&model_of(vec![call("f0", "x0", "y")], doubling(levels)), Target::Cpu);
        assert_eq!((report.nodes, report.taken), (1, 0), "{report}");
        assert!(report.refused[0].reason.contains("comes to more nodes than are looked at"), "{report}");
    }
    let report = lint(&model_of(vec![call("f0", "x0", "y")], doubling(13)), Target::Cpu);
    assert_eq!((report.nodes, report.is_whole()), (1 << 12, true), "{report}");
    // Each call for itself is small enough, all together are not.
    let calls = (0..100).map(|i| call("f0", "x0", &format!("y{i}"))).collect();
    let report = lint(&model_of(calls, doubling(13)), Target::Cpu);
    assert!((1 << 14..=1 << 17).contains(&report.taken) && !report.refused.is_empty(), "{}", report.taken);
}

#[test]
fn a_function_that_calls_itself_is_refused_and_the_others_are_judged_by_their_bodies() {
    let functions = vec![
        function("Endless", vec![call("Endless", "x", "y")]),
        function("Twice", vec![node("Add", &["x", "x"], "a"), node("Bad", &["a"], "y")]),
    ];
    let nodes = vec![call("Twice", "x0", "a"), call("Endless", "a", "b")];
    let report = lint(&model_of(nodes, functions), Target::Cpu);
    let refused: Vec<(&str, &str)> = report.refused.iter().map(|r| (r.node.as_str(), r.operator.as_str())).collect();
    assert_eq!((report.nodes, refused.as_slice()), (3, &[("a/#1", "Bad"), ("b", "my.lib:Endless")][..]), "{report}");
    assert!(report.refused[1].reason.contains("calls itself"), "{report}");
}

/// Each body is looked at once, not once for its shape and once for itself, which would double at every level.
#[test]
fn branches_in_branches_are_judged_once() {
    let mut inner = vec![node("Relu", &["x0"], "y0")];
    for level in 1..=40 {
        let output = vec![ValueInfoProto { name: format!("y{}", level - 1), ..Default::default() }];
        let graph = GraphProto { node: inner, output, ..Default::default() };
        let branch = |name: &str| AttributeProto { name: name.into(), g: Some(graph.clone()), ..Default::default() };
        let attribute = vec![branch("then_branch")];
        inner = vec![NodeProto { attribute, ..node("If", &["x0"], &format!("y{level}")) }];
    }
    let report = lint(&model_of(inner, vec![]), Target::Cpu);
    assert_eq!((report.nodes, report.taken), (41, 41), "{report}");
}

#[test]
fn names_from_a_file_command_no_terminal() {
    let evil = "a\x1b]0;title\x07\u{9b}2J\u{202e}";
    let mut bad = node("Bad\x1b[31mOp", &["x0"], evil);
    bad.domain = "lib\u{7f}".into();
    let report = lint(&model_of(vec![bad], vec![]), Target::Cpu);
    let text = format!("{report}{}", serde_json::to_string(&report).unwrap());
    assert!(!text.contains(|c: char| c.is_control() && c != '\n' || c == '\u{202e}'), "{text:?}");
    assert!(text.contains("Bad\\u{1b}[31mOp"), "{text}");
}

#[test]
fn classical_models_and_recurrent_ones_in_integers_run_on_the_cpu() {
    assert!(report("learned", Target::Cpu).is_whole());
    let missing = |target| report("learned", target).refused.iter().map(|r| r.operator.clone()).collect::<Vec<_>>();
    let others = ["ai.onnx.ml:Scaler", "ai.onnx.ml:TreeEnsembleRegressor", "com.microsoft:DynamicQuantizeLSTM"];
    assert_eq!(missing(Target::WebGpu), others);
}

/// Whatever is cut off or turned over, there is an answer or an error, and no panic.
#[test]
fn broken_files_are_errors_or_harmless() {
    let folder_of_test = tempfile::tempdir().unwrap();
    let path = folder_of_test.path().join("broken.onnx");
    for name in ["shape_arithmetic", "gelu_and_pad", "choice", "unsigned"] {
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
