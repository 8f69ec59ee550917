//! Layers of candle-nn as layers of ours, so that a model that is built of them runs on every backend and becomes a file.
//! Tensors are shared, variables stay variables. Layers of candle-nn have no names: give one with
//! `Conv2d { name: "first".into(), ..conv.into() }` to find the layer in the graph.
//!
//! Tokens are maps `(B, C, 1, N)` here and `(B, N, C)` there. A `candle_nn::Linear` of tokens becomes a [`Conv2d`], one of
//! vectors a [`Linear`].

use crate::layers::{Conv2d, ConvTranspose2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;

impl From<candle_nn::Linear> for Linear {
    fn from(layer: candle_nn::Linear) -> Self {
        Linear { name: String::new(), weight: layer.weight().clone(), bias: layer.bias().cloned() }
    }
}

/// Of tokens or pixels: a 1×1 convolution.
impl From<candle_nn::Linear> for Conv2d {
    fn from(layer: candle_nn::Linear) -> Self {
        let (weight, bias) = (layer.weight().clone(), layer.bias().cloned());
        Conv2d { name: String::new(), weight, bias, stride: 1, padding: 0 }
    }
}

/// Groups and dilation become zeros of a dense kernel, which costs what it says.
impl From<candle_nn::Conv2d> for Conv2d {
    fn from(layer: candle_nn::Conv2d) -> Self {
        let candle_nn::Conv2dConfig { padding, stride, dilation, groups, .. } = *layer.config();
        let weight = grouped(layer.weight(), groups).and_then(|weight| dilated(&weight, dilation));
        let weight = weight.expect("zeros beside a kernel need its own shape alone");
        Conv2d { name: String::new(), weight, bias: layer.bias().cloned(), stride, padding }
    }
}

/// Dilation becomes zeros of a larger kernel.
impl From<candle_nn::ConvTranspose2d> for ConvTranspose2d {
    fn from(layer: candle_nn::ConvTranspose2d) -> Self {
        let candle_nn::ConvTranspose2dConfig { padding, output_padding, stride, dilation } = *layer.config();
        let weight = dilated(layer.weight(), dilation).expect("zeros within a kernel need its own shape alone");
        ConvTranspose2d { name: String::new(), weight, bias: layer.bias().cloned(), stride, padding, output_padding }
    }
}

/// candle-nn shows nothing of a group norm. Its sizes are in its `Debug` text, its bias is what it makes of zeros, and its
/// weight what it adds to that of ones beside minus ones; so the parameters are copies, to the last bit of a result.
impl From<candle_nn::GroupNorm> for GroupNorm {
    fn from(layer: candle_nn::GroupNorm) -> Self {
        let text = format!("{layer:?}");
        let number = |field: &str| {
            let after = text.rsplit_once(&format!("{field}: ")).map_or("", |(_, after)| after);
            let end = after.find([',', ' ', '}']).unwrap_or(after.len());
            after[..end].parse::<f64>().expect("candle-nn 0.11 shows a group norm with its numbers")
        };
        let (channels, groups, eps) = (number("num_channels") as usize, number("num_groups") as usize, number("eps"));
        let [weight, bias] = parameters(&layer, channels).expect("a group norm takes a map of its own channels");
        GroupNorm { name: String::new(), weight, bias, groups, eps }
    }
}

fn parameters(layer: &candle_nn::GroupNorm, channels: usize) -> Result<[Tensor; 2]> {
    // So large that eps is nothing beside its square.
    let large = 1048576f32;
    let zeros = Tensor::zeros((1, channels, 2), DType::F32, &Device::Cpu)?;
    let signs = Tensor::new(&[large, -large], &Device::Cpu)?.broadcast_as((1, channels, 2))?.contiguous()?;
    let bias = layer.forward(&zeros)?.narrow(2, 0, 1)?.flatten_all()?;
    let both = layer.forward(&signs)?;
    let weight = ((both.narrow(2, 0, 1)? - both.narrow(2, 1, 1)?)? * 0.5)?.flatten_all()?;
    Ok([weight, bias])
}

/// Over the channels of each pixel, candle-nn's last axis.
///
/// # Panics
/// Where the layer leaves the mean in (`candle_nn::LayerNorm::rms_norm`): that is an [`RmsNorm`].
impl From<candle_nn::LayerNorm> for LayerNorm {
    fn from(layer: candle_nn::LayerNorm) -> Self {
        assert!(
            layer.remove_mean(),
            "a LayerNorm that leaves the mean in is an RmsNorm: wrap it in candle_nn::RmsNorm"
        );
        let weight = layer.weight().clone();
        let bias = layer.bias().cloned().map_or_else(|| weight.zeros_like(), Ok).expect("zeros like a weight");
        LayerNorm { name: String::new(), affine: Some([weight, bias]), eps: layer.eps() }
    }
}

impl From<candle_nn::RmsNorm> for RmsNorm {
    fn from(layer: candle_nn::RmsNorm) -> Self {
        RmsNorm { name: String::new(), weight: layer.weight().clone(), eps: layer.eps() }
    }
}

impl From<candle_nn::Embedding> for Embedding {
    fn from(layer: candle_nn::Embedding) -> Self {
        Embedding { name: String::new(), weight: layer.embeddings().clone() }
    }
}

/// A kernel `(O, C/groups, kh, kw)` as `(O, C, kh, kw)`, zeros between the groups.
fn grouped(weight: &Tensor, groups: usize) -> Result<Tensor> {
    if groups == 1 {
        return Ok(weight.clone());
    }
    let (outputs, inputs) = (weight.dim(0)? / groups, weight.dim(1)?);
    let part = |i: usize| {
        let own = weight.narrow(0, i * outputs, outputs)?;
        own.pad_with_zeros(1, i * inputs, (groups - 1 - i) * inputs)
    };
    Tensor::cat(&(0..groups).map(part).collect::<Result<Vec<_>>>()?, 0)
}

/// A kernel with `dilation − 1` zeros between its values.
fn dilated(weight: &Tensor, dilation: usize) -> Result<Tensor> {
    if dilation == 1 {
        return Ok(weight.clone());
    }
    let (o, c, h, w) = weight.dims4()?;
    let apart = weight.contiguous()?.reshape(vec![o, c, h, 1, w, 1])?;
    let apart = apart.pad_with_zeros(3, 0, dilation - 1)?.pad_with_zeros(5, 0, dilation - 1)?;
    let apart = apart.reshape((o, c, h * dilation, w * dilation))?;
    apart.narrow(2, 0, (h - 1) * dilation + 1)?.narrow(3, 0, (w - 1) * dilation + 1)?.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, Eager};

    fn values(shape: &[usize], seed: f32) -> Tensor {
        let n: usize = shape.iter().product();
        let v: Vec<f32> = (0..n).map(|i| ((i as f32 * 12.9898 + seed).sin() * 43758.547).fract()).collect();
        Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
    }

    fn close(found: crate::Result<Tensor>, expected: Tensor) {
        let found = found.unwrap();
        assert_eq!(found.dims(), expected.dims());
        let gap = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(gap.to_scalar::<f32>().unwrap() < 2e-5, "{gap}");
    }

    #[test]
    fn convolutions_keep_groups_and_dilation() {
        let x = values(&[2, 6, 9, 8], 0.1);
        for (groups, dilation, stride, padding) in [(1, 1, 1, 1), (2, 1, 2, 0), (6, 2, 1, 2), (3, 3, 2, 3)] {
            let config = candle_nn::Conv2dConfig { groups, dilation, stride, padding, ..Default::default() };
            let layer = candle_nn::Conv2d::new(values(&[6, 6 / groups, 3, 3], 0.2), Some(values(&[6], 0.3)), config);
            close(Eager.conv2d(&x, &layer.clone().into()), layer.forward(&x).unwrap());
        }
    }

    #[test]
    fn transposed_convolutions_keep_their_paddings() {
        let x = values(&[2, 4, 5, 3], 0.1);
        for (stride, padding, output_padding, dilation) in [(1, 0, 0, 1), (2, 1, 1, 1), (3, 2, 1, 1), (2, 1, 0, 2)] {
            let config = candle_nn::ConvTranspose2dConfig { stride, padding, output_padding, dilation };
            let layer = candle_nn::ConvTranspose2d::new(values(&[4, 3, 4, 4], 0.2), Some(values(&[3], 0.3)), config);
            close(Eager.conv_transpose2d(&x, &layer.clone().into()), layer.forward(&x).unwrap());
        }
    }

    #[test]
    fn norms_keep_their_numbers() {
        let x = values(&[2, 6, 4, 3], 0.1);
        let group = candle_nn::GroupNorm::new(values(&[6], 0.2), values(&[6], 0.3), 6, 3, 1e-3).unwrap();
        close(Eager.group_norm(&x, &group.clone().into(), None), group.forward(&x).unwrap());
        let tokens = x.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
        let back = |t: Tensor| t.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        let layer = candle_nn::LayerNorm::new(values(&[6], 0.2), values(&[6], 0.3), 1e-3);
        close(Eager.layer_norm(&x, &layer.clone().into()), back(layer.forward(&tokens).unwrap()));
        let rms = candle_nn::RmsNorm::new(values(&[6], 0.2), 1e-3);
        close(Eager.rms_norm(&x, &rms.clone().into()), back(rms.forward(&tokens).unwrap()));
    }

    #[test]
    fn tables_and_linear_maps_are_the_same() {
        let rows = values(&[3, 6], 0.1);
        let linear = candle_nn::Linear::new(values(&[4, 6], 0.2), Some(values(&[4], 0.3)));
        close(Eager.linear(&rows, &linear.clone().into()), linear.forward(&rows).unwrap());
        let tokens = rows.t().unwrap().contiguous().unwrap().reshape((1, 6, 1, 3)).unwrap();
        let expected = linear.forward(&rows).unwrap().t().unwrap().contiguous().unwrap().reshape((1, 4, 1, 3)).unwrap();
        close(Eager.conv2d(&tokens, &linear.into()), expected);
        let ids = Tensor::new(&[2u32, 0], &Device::Cpu).unwrap();
        let table = candle_nn::Embedding::new(rows, 6);
        close(Eager.embedding(&ids, &table.clone().into()), table.forward(&ids).unwrap());
    }

    #[test]
    #[should_panic(expected = "is an RmsNorm")]
    fn a_layer_norm_that_leaves_the_mean_in_is_refused() {
        _ = LayerNorm::from(candle_nn::LayerNorm::rms_norm(values(&[3], 0.1), 1e-5));
    }
}
