//! Which operators a file may have, and which attributes of them: what the dialects of `dmd export` write, in every
//! precision, and what ONNX Runtime makes of that in an `.ort` file. An engine would run anything: a loop without end, a
//! constant that is another file's bytes. So whatever is not listed is refused before an engine sees it, whatever the
//! engine's own checks are.

use std::collections::BTreeSet;

use super::graph::{Attribute, Constant, Model, Node, element_type};
use crate::printable;

/// Operators of ONNX that `dmd export` writes, each with the attributes that it may have.
///
/// ```
/// let (_, attributes) = dmd_runtime::OPERATORS.iter().find(|(operator, _)| *operator == "Cast").unwrap();
/// assert_eq!(*attributes, ["to"]);
/// assert!(!dmd_runtime::OPERATORS.iter().any(|(operator, _)| *operator == "Loop"));
/// ```
pub const OPERATORS: &[(&str, &[&str])] = &[
    ("Add", &[]),
    ("AveragePool", &["kernel_shape", "strides"]),
    ("Cast", &["to"]),
    ("Clip", &[]),
    ("Concat", &["axis"]),
    ("Conv", &["group", "kernel_shape", "pads", "strides"]),
    ("ConvTranspose", &["kernel_shape", "pads", "strides"]),
    ("DequantizeLinear", &["axis"]),
    ("Div", &[]),
    ("Erf", &[]),
    ("Gather", &[]),
    ("Gelu", &[]),
    ("GroupNormalization", &["epsilon", "num_groups"]),
    ("InstanceNormalization", &["epsilon"]),
    ("MatMul", &[]),
    ("Mul", &[]),
    ("Pad", &[]),
    ("QuantizeLinear", &[]),
    ("ReduceMean", &["axes", "keepdims"]),
    ("Relu", &[]),
    ("Reshape", &[]),
    ("Resize", &["coordinate_transformation_mode", "mode", "nearest_mode"]),
    ("Sigmoid", &[]),
    ("Slice", &[]),
    ("Softmax", &["axis"]),
    ("Softplus", &[]),
    ("Split", &["axis"]),
    ("Sqrt", &[]),
    ("Sub", &[]),
    ("Tanh", &[]),
    ("Transpose", &["perm"]),
];

/// What ONNX Runtime adds in an `.ort` file, which it optimises: attributes that it fills in, operators of ONNX that it takes
/// others apart into, and operators of its own. Seen in files of 1.31, with what is known of its fusions beside it.
const OF_ONNX_RUNTIME: &[(&str, &str, &[&str])] = &[
    ("", "AveragePool", &["auto_pad", "ceil_mode", "count_include_pad", "dilations", "pads"]),
    ("", "Cast", &["saturate"]),
    ("", "Conv", &["auto_pad"]),
    ("", "ConvTranspose", &["auto_pad", "group"]),
    ("", "DequantizeLinear", &["block_size"]),
    ("", "Exp", &[]),
    ("", "Gather", &["axis"]),
    ("", "Gelu", &["approximate"]),
    ("", "GroupNormalization", &["stash_type"]),
    ("", "Pad", &["mode"]),
    ("", "QLinearConv", &["auto_pad", "group", "kernel_shape", "pads", "strides"]),
    ("", "QLinearMatMul", &[]),
    ("", "QuantizeLinear", &["axis", "block_size", "output_dtype", "saturate"]),
    ("", "ReduceMax", &["axes", "keepdims", "noop_with_empty_axes"]),
    ("", "ReduceMean", &["noop_with_empty_axes"]),
    ("", "ReduceSum", &["axes", "keepdims", "noop_with_empty_axes"]),
    ("", "Reshape", &["allowzero"]),
    (
        "",
        "Resize",
        &["antialias", "cubic_coeff_a", "exclude_outside", "extrapolation_value", "keep_aspect_ratio_policy"],
    ),
    ("", "Shape", &["end", "start"]),
    (MICROSOFT, "BiasGelu", &[]),
    (
        MICROSOFT,
        "FusedConv",
        &["activation", "activation_params", "auto_pad", "group", "kernel_shape", "pads", "strides"],
    ),
    (MICROSOFT, "FusedMatMul", &["alpha", "transA", "transB", "transBatchA", "transBatchB"]),
    (MICROSOFT, "Gelu", &[]),
    (MICROSOFT, "MatMulIntegerToFloat", &[]),
    (MICROSOFT, "QLinearAdd", &[]),
    (MICROSOFT, "QLinearConcat", &["axis"]),
    (MICROSOFT, "QLinearMul", &[]),
    (MICROSOFT, "QLinearSigmoid", &[]),
    (MICROSOFT, "QLinearSoftmax", &["axis", "opset"]),
    (MICROSOFT, "QuickGelu", &["alpha"]),
];

/// The domain of ONNX Runtime's own operators.
const MICROSOFT: &str = "com.microsoft";

/// The versions of ONNX's operators that the dialects are written in, and those between.
const OPSETS: std::ops::RangeInclusive<u64> = 17..=21;

/// Whether everything in a file is on the list; otherwise what is not.
pub(super) fn check(model: &Model) -> Result<(), String> {
    if let Some(foreign) = &model.foreign {
        return Err(format!("it has {foreign}, which no file of dmd export has"));
    }
    let opset = model.opset.unwrap_or(0);
    if !OPSETS.contains(&opset) {
        let (first, last) = (OPSETS.start(), OPSETS.end());
        return Err(format!("its operators are of ai.onnx version {opset}, expected {first} to {last}"));
    }
    model.constants.iter().try_for_each(check_constant)?;
    let held = model.constants.iter().fold(0, |all: u64, constant| all.saturating_add(constant.held));
    if held > model.file_bytes {
        return Err(format!("its constants hold {held} bytes, of {} in the file", model.file_bytes));
    }
    model.nodes.iter().try_for_each(|node| check_node(node, model.is_ort))
}

fn check_node(node: &Node, is_ort: bool) -> Result<(), String> {
    let refuse = |what: String| Err(format!("node {}: {what}", describe(node)));
    let (domain, operator) = (plain_domain(node), node.operator.as_str());
    let of_export = OPERATORS.iter().find(|(name, _)| domain.is_empty() && *name == operator);
    let of_runtime = OF_ONNX_RUNTIME.iter().find(|(of, name, _)| is_ort && *of == domain && *name == operator);
    if of_export.is_none() && of_runtime.is_none() {
        return refuse("dmd export writes no such operator".into());
    }
    let allowed: Vec<&str> = [of_export.map(|found| found.1), of_runtime.map(|found| found.2)]
        .into_iter()
        .flatten()
        .flatten()
        .copied()
        .collect();
    let mut seen = BTreeSet::new();
    for Attribute { name, ints, foreign, .. } in &node.attributes {
        // Engines differ in which of two they take.
        if !seen.insert(name) {
            return refuse(format!("it has the attribute {name:?} twice"));
        }
        if let Some(foreign) = foreign {
            return refuse(format!("its attribute {:?} holds {foreign}", name));
        }
        if !allowed.contains(&name.as_str()) {
            return refuse(format!("dmd export writes no attribute {name:?} of it, only {allowed:?}"));
        }
        // Text and wide numbers take many times the memory that sizes are counted in.
        let is_known = |kind: &i64| u64::try_from(*kind).is_ok_and(|kind| element_type(kind).is_some());
        if name == "to" && !ints.iter().all(is_known) {
            return refuse(format!("it casts to type {ints:?}, which no file of dmd export has"));
        }
    }
    Ok(())
}

/// A constant must hold what its shape asks for, so that no engine takes memory for what the file only claims.
fn check_constant(constant: &Constant) -> Result<(), String> {
    let Constant { name, element, dims, held, outside, .. } = constant;
    let Some((kind, _)) = element_type(*element) else {
        return Err(format!("constant {name:?} is of type {element}, which no file of dmd export has"));
    };
    let Some(bytes) = constant.bytes() else {
        return Err(format!("constant {name:?} has shape {dims:?}, which is more than there can be"));
    };
    let held = match outside {
        None => *held,
        Some(outside) => outside.length.unwrap_or(bytes),
    };
    match held == bytes {
        true => Ok(()),
        false => Err(format!("constant {name:?} is {kind} {dims:?}, {bytes} bytes, and holds {held}")),
    }
}

/// Its domain, empty for ONNX's own, which has two names.
fn plain_domain(node: &Node) -> &str {
    if node.domain == "ai.onnx" { "" } else { &node.domain }
}

/// A node's name and operator, for people.
pub(super) fn describe(node: &Node) -> String {
    let Node { name, domain, operator, outputs, .. } = node;
    let name = if name.is_empty() { outputs.first().map_or("", String::as_str) } else { name };
    let dot = if domain.is_empty() { "" } else { "." };
    format!("\"{}\" ({}{dot}{})", printable(name), printable(domain), printable(operator))
}
