//! Numbers that follow from a shape. ONNX Runtime computes them once, when it loads the file and before it asks a
//! provider, so that no accelerator ever sees the nodes.

use super::facts::Facts;
use super::shapes::{int, ints};
use candle_onnx::onnx::NodeProto;

/// The whole numbers that a node gives, if it is the shape of a value whose shape is known, or arithmetic on such.
pub(super) fn folded(node: &NodeProto, facts: &Facts) -> Option<Vec<i64>> {
    if !matches!(node.domain.as_str(), "" | "ai.onnx") {
        return None;
    }
    if node.op_type == "Shape" {
        let dims = facts.shape(node.input.first()?)?;
        let dims: Vec<i64> = dims.iter().map(|n| i64::try_from((*n)?).ok()).collect::<Option<_>>()?;
        let at = |name: &str, open: usize| match int(node, name) {
            Some(place) if place < 0 => dims.len().saturating_sub(place.unsigned_abs() as usize),
            Some(place) => dims.len().min(place as usize),
            None => open,
        };
        return Some(dims.get(at("start", 0)..at("end", dims.len())).unwrap_or_default().to_vec());
    }
    if !node.input.iter().any(|name| facts.is_folded(name)) {
        return None;
    }
    let input = |i: usize| node.input.get(i).filter(|name| !name.is_empty()).map(|name| facts.integers(name));
    let one = |i: usize| match input(i)?.as_deref() {
        Some([n]) => Some(*n),
        _ => None,
    };
    let x = input(0)??;
    let place = |i: i64, n: usize| usize::try_from(if i < 0 { i.checked_add(n as i64)? } else { i }).ok();
    match node.op_type.as_str() {
        "Cast" | "Identity" | "Reshape" | "Squeeze" | "Unsqueeze"
            if node.op_type != "Cast" || int(node, "to") == Some(7) =>
        {
            Some(x)
        }
        "Gather" if int(node, "axis").unwrap_or(0) == 0 => {
            input(1)??.into_iter().map(|i| x.get(place(i, x.len())?).copied()).collect()
        }
        "Concat" => {
            let all: Option<Vec<Vec<i64>>> = (0..node.input.len()).map(|i| input(i)?).collect();
            Some(all?.concat())
        }
        "Slice" if input(4).is_none() || one(4) == Some(1) => {
            let end = |i: i64| if i < 0 { place(i, x.len()) } else { Some(x.len().min(usize::try_from(i).ok()?)) };
            let (from, to) = (end(one(1).or_else(|| ints(node, "starts")?.first().copied())?)?, end(one(2)?)?);
            Some(x.get(from..to.max(from))?.to_vec())
        }
        "Add" | "Sub" | "Mul" | "Div" => {
            let y = input(1)??;
            let n = x.len().max(y.len());
            let at =
                |values: &[i64], i: usize| if values.len() == 1 { Some(values[0]) } else { values.get(i).copied() };
            let apply = |(a, b): (i64, i64)| match node.op_type.as_str() {
                "Add" => a.checked_add(b),
                "Sub" => a.checked_sub(b),
                "Mul" => a.checked_mul(b),
                _ => a.checked_div(b),
            };
            (0..n).map(|i| apply((at(&x, i)?, at(&y, i)?))).collect()
        }
        _ => None,
    }
}
