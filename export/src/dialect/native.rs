//! The native dialect: opset 21, where group norm and gelu are operators of their own. Smallest graph; engines without
//! kernels for them inline functions of many nodes instead (ONNX Runtime's CPU provider is one).

use crate::Result;
use crate::lower::{Lowering, Norm};
use crate::onnx::{float, int};

/// Operators beside the shared ones.
pub(super) const OPERATORS: &[&str] = &["ConvTranspose", "Gelu", "GroupNormalization", "Softplus"];

pub(super) fn group_norm(lowering: &mut Lowering, norm: &Norm, x: &str) -> Result<String> {
    let Norm { name, groups, shape: [_, c, _, _], .. } = *norm;
    let [scale, shift] = match norm.affine {
        Some([scale, shift]) => [
            lowering.file.weight(&format!("{name}.weight"), scale, &[c])?,
            lowering.file.weight(&format!("{name}.bias"), shift, &[c])?,
        ],
        None => [
            lowering.file.floats(&format!("ones_{c}"), &vec![1.0; c]),
            lowering.file.floats(&format!("zeros_{c}"), &vec![0.0; c]),
        ],
    };
    let attributes = vec![float("epsilon", norm.eps), int("num_groups", groups as i64)];
    Ok(lowering.file.node(name, "GroupNormalization", &[x, &scale, &shift], attributes, &norm.shape))
}
