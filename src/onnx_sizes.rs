//! What a node of a foreign ONNX file would make, where numbers of the file say how large that is: refused before any
//! memory is taken.

use crate::memory;
use candle_core::{DType, Result, Tensor, bail};
use candle_onnx::onnx::NodeProto;
use std::collections::HashMap;

/// Operators whose operands are stretched towards each other.
const STRETCHED: [&str; 20] = [
    "Add",
    "And",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
];

/// Refuses a node whose values the machine has no room for. `values` holds what it is given.
pub fn check_room(node: &NodeProto, values: &HashMap<String, Tensor>) -> Result<()> {
    let input = |i: usize| node.input.get(i).and_then(|name| values.get(name));
    let elements = |i: usize| input(i).map_or(1.0, |x| x.elem_count() as f64);
    let numbers = |i: usize| -> Result<Vec<f64>> {
        input(i).map_or(Ok(Vec::new()), |x| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1())
    };
    let product = |numbers: Vec<f64>| numbers.iter().product::<f64>();
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
    let pads_of = |pads: &[f64]| -> f64 {
        let dims = input(0).map_or(&[][..], Tensor::dims);
        let pad = |i: usize, half: usize| pads.get(half * pads.len() / 2 + i).copied().unwrap_or(0.0).max(0.0);
        // Where only the last axes are padded, theirs are the pads.
        let first = dims.len().saturating_sub(pads.len() / 2);
        let axis = |(i, dim): (usize, &usize)| match i.checked_sub(first) {
            Some(i) => *dim as f64 + pad(i, 0) + pad(i, 1),
            None => *dim as f64,
        };
        dims.iter().enumerate().map(axis).product()
    };
    let size = match node.op_type.as_str() {
        "ConstantOfShape" => product(numbers(0)?),
        "Expand" | "Tile" => elements(0) * product(numbers(1)?.into_iter().map(|n| n.max(1.0)).collect()),
        "Range" => match (&numbers(0)?[..], &numbers(1)?[..], &numbers(2)?[..]) {
            ([start], [limit], [step]) => (limit - start) / step,
            _ => 0.0,
        },
        "OneHot" => elements(0) * product(numbers(1)?),
        "Resize" | "Upsample" => match (numbers(3)?, numbers(if node.op_type == "Resize" { 2 } else { 1 })?) {
            (sizes, _) if !sizes.is_empty() => product(sizes),
            (_, scales) => elements(0) * product(scales),
        },
        "Pad" => pads_of(&numbers(1)?),
        "Conv" | "MaxPool" | "AveragePool" => {
            pads_of(&attribute("pads").map_or(Vec::new(), |pads| pads.ints.iter().map(|n| *n as f64).collect()))
        }
        "RandomNormal" | "RandomUniform" => {
            attribute("shape").map_or(1.0, |shape| shape.ints.iter().map(|n| *n as f64).product())
        }
        "Concat" => (0..node.input.len()).map(elements).sum(),
        "MatMul" | "Gemm" => elements(0) * input(1).and_then(|x| x.dims().last().copied()).unwrap_or(1) as f64,
        name if STRETCHED.contains(&name) => {
            let all: Vec<&[usize]> = (0..node.input.len()).filter_map(input).map(Tensor::dims).collect();
            let rank = all.iter().map(|dims| dims.len()).max().unwrap_or(0);
            let along = |axis: usize| all.iter().filter_map(|dims| dims.iter().rev().nth(axis)).max().copied();
            (0..rank).map(|axis| along(axis).unwrap_or(1) as f64).product()
        }
        _ => 0.0,
    };
    if size.is_nan() || size < 0.0 {
        bail!("{} \"{}\" asks for {size} values", node.op_type, node.name)
    }
    memory::room(&format!("the values of {} \"{}\"", node.op_type, node.name), &[size as usize])
        .map_err(|error| candle_core::Error::Msg(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_onnx::onnx::AttributeProto;

    fn check(operator: &str, inputs: &[Tensor], ints: (&str, &[i64])) -> Result<()> {
        let names: Vec<String> = (0..inputs.len()).map(|i| format!("x{i}")).collect();
        let values = names.iter().cloned().zip(inputs.iter().cloned()).collect();
        let attribute = vec![AttributeProto { name: ints.0.into(), ints: ints.1.into(), ..Default::default() }];
        let (op_type, name) = (operator.to_string(), "n".to_string());
        check_room(&NodeProto { op_type, name, input: names, attribute, ..Default::default() }, &values)
    }

    /// Each takes a few bytes of the file and would make 2⁴⁰ values or more.
    #[test]
    fn no_node_makes_more_than_there_is_room_for() {
        let ints = |values: &[i64]| Tensor::new(values, &Device::Cpu).unwrap();
        let x = Tensor::zeros((1, 1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        let [row, column] =
            [(1, 1 << 20), (1 << 20, 1)].map(|dims| Tensor::zeros(dims, DType::U8, &Device::Cpu).unwrap());
        let large = 1i64 << 40;
        let none = ("", &[][..]);
        for (operator, inputs, attribute) in [
            ("ConstantOfShape", vec![ints(&[large])], none),
            ("Expand", vec![x.clone(), ints(&[large, 1, 1, 1])], none),
            ("Tile", vec![x.clone(), ints(&[1, 1, 1 << 20, 1 << 20])], none),
            ("Range", vec![ints(&[0]), ints(&[large]), ints(&[1])], none),
            ("OneHot", vec![ints(&[1]), ints(&[large])], none),
            ("Resize", vec![x.clone(), ints(&[]), ints(&[]), ints(&[1, 1, 1 << 20, 1 << 20])], none),
            ("Pad", vec![x.clone(), ints(&[0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20])], none),
            ("MaxPool", vec![x.clone()], ("pads", &[0, 0, 1 << 20, 1 << 20][..])),
            ("RandomNormal", vec![], ("shape", &[large][..])),
            ("Mul", vec![row.clone(), column.clone()], none),
            ("MatMul", vec![column.clone(), row.clone()], none),
        ] {
            let error = check(operator, &inputs, attribute).unwrap_err().to_string();
            assert!(error.contains(&format!("the values of {operator} \"n\" take ")), "{error}");
        }
        assert!(check("ConstantOfShape", &[ints(&[-5])], none).is_err());
        for (operator, inputs) in [
            ("ConstantOfShape", vec![ints(&[2, 3])]),
            ("Mul", vec![x.clone(), x.clone()]),
            ("Expand", vec![x.clone(), ints(&[2, 1, 4, 4])]),
            ("Pad", vec![x.clone(), ints(&[0, 0, 1, 1, 0, 0, 1, 1])]),
            ("Relu", vec![x.clone()]),
        ] {
            check(operator, &inputs, none).unwrap();
        }
    }
}
