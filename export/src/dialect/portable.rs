//! The portable dialect: opset 17, every shape of rank 4 at most, nothing that a mobile provider hands back to the CPU.

use crate::Result;
use crate::graph::Node;
use crate::lower::{Lowering, Norm};
use crate::onnx::float;

/// Operators beside the shared ones.
pub(super) const OPERATORS: &[&str] = &["ConvTranspose", "Erf", "InstanceNormalization", "Softplus"];

/// No provider has GroupNormalization on the CPU, and nearly every one has this: a group becomes a channel of instance
/// normalisation, as a picture of its channels one below the other. As a row of numbers, of rank 3, it would do as well,
/// but Hexagon and WebGPU have that slower, and ncnn not at all.
pub(super) fn group_norm(lowering: &mut Lowering, norm: &Norm, x: &str) -> Result<String> {
    let Norm { name, groups, shape: [b, c, h, w], .. } = *norm;
    let epsilon = vec![float("epsilon", norm.eps)];
    if let (Some([scale, shift]), true) = (norm.affine, groups == c) {
        let scale = lowering.file.weight(&format!("{name}.weight"), scale, &[c])?;
        let shift = lowering.file.weight(&format!("{name}.bias"), shift, &[c])?;
        return Ok(lowering.file.island(name, "InstanceNormalization", &[x, &scale, &shift], epsilon, &norm.shape));
    }
    let ones = lowering.file.floats(&format!("ones_{groups}"), &vec![1.0; groups]);
    let zeros = lowering.file.floats(&format!("zeros_{groups}"), &vec![0.0; groups]);
    let grouped = [b, groups, c / groups * h, w];
    let normalized = lowering.reshape(&format!("{name}.groups"), x, &grouped);
    let inputs = [normalized.as_str(), &ones, &zeros];
    let normalized =
        lowering.file.island(&format!("{name}.normalize"), "InstanceNormalization", &inputs, epsilon, &grouped);
    lowering.ungrouped(norm, &normalized)
}

pub(super) fn mish(lowering: &mut Lowering, node: &Node, x: &str) -> String {
    let gate = lowering.step(node, "softplus", "Softplus", &[x]);
    let gate = lowering.step(node, "tanh", "Tanh", &[&gate]);
    lowering.step(node, "", "Mul", &[x, &gate])
}

/// x/2·(1 + erf(x/√2)), step by step as the engines' fusions expect it.
pub(super) fn gelu(lowering: &mut Lowering, node: &Node, x: &str) -> String {
    let [root, one, half] = [std::f32::consts::SQRT_2, 1.0, 0.5].map(|value| lowering.file.scalar(value));
    let erf = lowering.step(node, "div", "Div", &[x, &root]);
    let erf = lowering.step(node, "erf", "Erf", &[&erf]);
    let gate = lowering.step(node, "add", "Add", &[&erf, &one]);
    let gated = lowering.step(node, "gate", "Mul", &[x, &gate]);
    lowering.step(node, "", "Mul", &[&gated, &half])
}
