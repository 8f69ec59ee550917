//! The dialect for Android's NNAPI: it has no normalisation, no error function, no softplus, and cuts into equal parts
//! only. So norms are means and differences, mish is written with a sigmoid, and the class table is cut by slices.

use crate::Result;
use crate::graph::Node;
use crate::lower::{Lowering, Norm};

/// Operators beside the shared ones.
pub(super) const OPERATORS: &[&str] = &[];

/// (x − mean)/√(mean of (x − mean)² + ε) over each group.
pub(super) fn group_norm(lowering: &mut Lowering, norm: &Norm, x: &str) -> Result<String> {
    let Norm { name, groups, shape: [b, c, h, w], .. } = *norm;
    let (grouped, means) = ([b, groups, c / groups * h * w], [b, groups, 1]);
    let part = |part: &str| format!("{name}.{part}");
    let x = lowering.reshape(&part("groups"), x, &grouped);
    let center = lowering.mean(&part("mean"), &x, 2, &means);
    let file = &mut lowering.file;
    let centered = file.island(&part("centered"), "Sub", &[&x, &center], vec![], &grouped);
    let squares = file.island(&part("squares"), "Mul", &[&centered, &centered], vec![], &grouped);
    let variance = lowering.mean(&part("variance"), &squares, 2, &means);
    let file = &mut lowering.file;
    let eps = file.scalar(norm.eps as f32);
    let guarded = file.island(&part("guarded"), "Add", &[&variance, &eps], vec![], &means);
    let deviation = file.island(&part("deviation"), "Sqrt", &[&guarded], vec![], &means);
    let normalized = file.island(&part("normalize"), "Div", &[&centered, &deviation], vec![], &grouped);
    lowering.ungrouped(norm, &normalized)
}

/// tanh(softplus(x)) = (1 − t²)/(1 + t²) with t = sigmoid(−x): no logarithm, no overflow.
pub(super) fn mish(lowering: &mut Lowering, node: &Node, x: &str) -> String {
    let [minus, one] = [-1.0, 1.0].map(|value| lowering.file.scalar(value));
    let negative = lowering.step(node, "negative", "Mul", &[x, &minus]);
    let t = lowering.step(node, "sigmoid", "Sigmoid", &[&negative]);
    let square = lowering.step(node, "square", "Mul", &[&t, &t]);
    let above = lowering.step(node, "above", "Sub", &[&one, &square]);
    let below = lowering.step(node, "below", "Add", &[&square, &one]);
    let gate = lowering.step(node, "gate", "Div", &[&above, &below]);
    lowering.step(node, "", "Mul", &[x, &gate])
}

/// A slice for each part.
pub(super) fn slices(lowering: &mut Lowering, x: &str, parts: &[(String, Vec<usize>)]) {
    let axis = lowering.file.integers(&[1]);
    let mut start = 0;
    for (name, shape) in parts {
        let end = start + shape[1] as i64;
        let [first, last] = [start, end].map(|at| lowering.file.integers(&[at]));
        lowering.file.node(name, "Slice", &[x, &first, &last, &axis], vec![], shape);
        start = end;
    }
}
