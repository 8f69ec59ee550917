//! What a network of somebody else's is fed: `FILE.toml` beside `FILE.onnx` says how pictures become its input, and which
//! values are its features.

use crate::memory;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How pictures go in. Without a file: as they are, in [-1, 1].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Feeding {
    /// What black and white become: [-1, 1], [0, 1] or [0, 255].
    pub range: [f64; 2],
    /// What is subtracted after that, once or for each channel.
    pub mean: Vec<f64>,
    /// What is divided by after that, once or for each channel.
    pub std: Vec<f64>,
    /// Height and width that pictures get, where the input leaves them free.
    pub size: Option<[usize; 2]>,
    /// How they get another size.
    pub resize: Resize,
    /// The values that are the features, by name, outputs or not; all outputs where none is named.
    pub output: Vec<String>,
}

/// How a picture gets another size; each is a weighted mean of neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resize {
    /// Between the centres of pixels, as PyTorch's `interpolate(mode="bilinear")`.
    #[default]
    Linear,
    /// The same over a wider neighbourhood where the picture shrinks, as PIL and PyTorch's `antialias=True`.
    Antialias,
    /// Between the upper left corners of pixels, as TensorFlow 1, which the first Inception scores were made with.
    Corner,
}

impl Default for Feeding {
    fn default() -> Self {
        Feeding { range: [-1.0, 1.0], mean: vec![], std: vec![], size: None, resize: Resize::Linear, output: vec![] }
    }
}

/// More than any network of pictures asks for.
const MAX_SIDE: usize = 4096;

impl Feeding {
    /// What lies beside a network's file, or else the default.
    pub fn beside(onnx: &Path) -> Result<Self> {
        let path = onnx.with_extension("toml");
        let feeding: Feeding = match path.exists() {
            true => crate::config::read(&path)?,
            false => Feeding::default(),
        };
        feeding.check().with_context(|| path.display().to_string())?;
        Ok(feeding)
    }

    fn check(&self) -> Result<()> {
        let [black, white] = self.range;
        let all = [&self.mean[..], &self.std, &self.range].concat();
        ensure!(all.iter().all(|v| v.is_finite()), "range, mean and std must be finite numbers");
        ensure!(black != white, "range is [{black}, {white}], expected two different numbers");
        ensure!(self.std.iter().all(|std| *std > 0.0), "std is {:?}, expected numbers above 0", self.std);
        let sides = self.size.iter().flatten();
        ensure!(sides.clone().all(|n| (1..=MAX_SIDE).contains(n)), "size is {:?}, expected 1 to {MAX_SIDE}", self.size);
        Ok(())
    }

    /// For people: `[0, 1], mean …, 299x299 (linear)`.
    pub fn text(&self) -> String {
        let [black, white] = self.range;
        let mut text = format!("[{black}, {white}]");
        for (name, values) in [("mean", &self.mean), ("std", &self.std)] {
            if !values.is_empty() {
                text += &format!(", {name} {values:?}");
            }
        }
        if let Some([h, w]) = self.size {
            text += &format!(", {h}x{w}");
        }
        text + &format!(", resized {:?}", self.resize).to_lowercase()
    }

    /// Pictures `(B, C, H, W)` in [-1, 1] as an input of this layout takes them. Gradients flow.
    pub fn fed(&self, images: &Tensor, layout: &Layout) -> candle_core::Result<Tensor> {
        let [h, w] = [0, 1].map(|axis| layout.size[axis].or(self.size.map(|size| size[axis])));
        if let Some(n) = [h, w].into_iter().flatten().find(|n| *n > MAX_SIDE) {
            candle_core::bail!("the input has a side of {n}, expected at most {MAX_SIDE}");
        }
        let x = resized(images, [h, w], self.resize)?;
        // A grey picture is one of equal channels.
        let x = match (x.dim(1)?, layout.channels) {
            (1, Some(3)) => x.repeat((1, 3, 1, 1))?,
            _ => x,
        };
        let [black, white] = self.range;
        let mut x = match [black, white] == [-1.0, 1.0] {
            true => x,
            false => x.affine(0.5 * (white - black), 0.5 * (white + black))?,
        };
        if !self.mean.is_empty() {
            x = x.broadcast_sub(&per_channel(&self.mean)?)?;
        }
        if !self.std.is_empty() {
            x = x.broadcast_div(&per_channel(&self.std)?)?;
        }
        if layout.channels_last { x.permute((0, 2, 3, 1))?.contiguous() } else { Ok(x) }
    }
}

fn per_channel(values: &[f64]) -> candle_core::Result<Tensor> {
    Tensor::new(values, &Device::Cpu)?.to_dtype(DType::F32)?.reshape((1, values.len(), 1, 1))
}

/// What an input's declaration fixes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Pictures at a time.
    pub batch: Option<usize>,
    /// 1 or 3.
    pub channels: Option<usize>,
    /// Height and width.
    pub size: [Option<usize>; 2],
    /// `(B, H, W, C)`, as TensorFlow has them, in the place of `(B, C, H, W)`.
    pub channels_last: bool,
}

impl Layout {
    /// By the axes of a shape; none where one is free.
    pub fn of(axes: &[Option<usize>]) -> Self {
        let axis = |i: usize| axes.get(i).copied().flatten();
        let is_colour = |n: Option<usize>| matches!(n, Some(1 | 3));
        let channels_last = is_colour(axis(3)) && !is_colour(axis(1));
        let [channels, h, w] = if channels_last { [3, 1, 2] } else { [1, 2, 3] };
        Layout { batch: axis(0), channels: axis(channels), size: [axis(h), axis(w)], channels_last }
    }
}

/// The bytes of an ONNX file with more outputs. A message of protobuf goes on where another begins, so that a graph with
/// nothing but outputs, written behind the file, adds them to its graph.
pub fn with_outputs(mut bytes: Vec<u8>, names: &[String]) -> Vec<u8> {
    const GRAPH_OF_MODEL: u8 = 7 << 3 | 2;
    const OUTPUT_OF_GRAPH: u8 = 12 << 3 | 2;
    const NAME_OF_VALUE: u8 = 1 << 3 | 2;
    let field = |tag: u8, content: &[u8]| {
        let mut field = vec![tag];
        let mut len = content.len();
        while len > 0x7f {
            field.push(len as u8 | 0x80);
            len >>= 7;
        }
        field.push(len as u8);
        [field, content.to_vec()].concat()
    };
    for name in names {
        bytes.extend(field(GRAPH_OF_MODEL, &field(OUTPUT_OF_GRAPH, &field(NAME_OF_VALUE, name.as_bytes()))));
    }
    bytes
}

/// Pictures `(B, C, H, W)` in another size. Two matrix products, so that gradients flow.
fn resized(x: &Tensor, to: [Option<usize>; 2], resize: Resize) -> candle_core::Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let [rows, columns] = [to[0].unwrap_or(h), to[1].unwrap_or(w)];
    if [rows, columns] == [h, w] {
        return Ok(x.clone());
    }
    memory::room("pictures in the size that the file declares", &[b, c, rows.max(h), columns.max(w)])
        .map_err(|error| candle_core::Error::Msg(error.to_string()))?;
    let wide = x.reshape((b * c * h, w))?.matmul(&weights(w, columns, resize)?)?.reshape((b * c, h, columns))?;
    let high = wide.transpose(1, 2)?.contiguous()?.reshape((b * c * columns, h))?.matmul(&weights(h, rows, resize)?)?;
    high.reshape((b * c, columns, rows))?.transpose(1, 2)?.contiguous()?.reshape((b, c, rows, columns))
}

/// The matrix `(from, to)` whose columns are the weights of `from` pixels in each of `to`.
fn weights(from: usize, to: usize, resize: Resize) -> candle_core::Result<Tensor> {
    let scale = from as f64 / to as f64;
    let mut weights = vec![0f32; from * to];
    for column in 0..to {
        let place = match resize {
            Resize::Corner => column as f64 * scale,
            _ => (column as f64 + 0.5) * scale - 0.5,
        };
        // A triangle around the place, one pixel wide to each side, or as wide as what it stands for.
        let width = if resize == Resize::Antialias { scale.max(1.0) } else { 1.0 };
        let place = if resize == Resize::Antialias { place } else { place.clamp(0.0, (from - 1) as f64) };
        let (first, last) =
            ((place - width).ceil().max(0.0) as usize, (place + width).floor().min((from - 1) as f64) as usize);
        let triangle = |pixel: usize| (1.0 - (pixel as f64 - place).abs() / width).max(0.0);
        let sum: f64 = (first..=last).map(triangle).sum();
        (first..=last).for_each(|pixel| weights[pixel * to + column] = (triangle(pixel) / sum) as f32);
    }
    Tensor::from_vec(weights, (from, to), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=…)` (torch 2.15); TensorFlow's by
    /// its rule, pixel i at i·from/to.
    #[test]
    fn pictures_get_other_sizes_as_others_give_them() {
        let check = |resize: Resize, rows: &[&[f32]], size: [usize; 2], expected: &[f32]| {
            let x =
                Tensor::new(rows.concat(), &Device::Cpu).unwrap().reshape((1, 1, rows.len(), rows[0].len())).unwrap();
            let found = resized(&x, size.map(Some), resize).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{resize:?}: {found:?}");
            assert_eq!(found.len(), expected.len());
        };
        let square: [&[f32]; 2] = [&[0.0, 4.0], &[8.0, 12.0]];
        let large = [0.0, 2.0, 4.0, 2.0, 4.0, 6.0, 6.0, 8.0, 10.0, 8.0, 10.0, 12.0];
        check(Resize::Linear, &square, [4, 3], &large);
        check(Resize::Antialias, &square, [4, 3], &large);
        let row: [&[f32]; 1] = [&[0.0, 1.0, 4.0, 9.0, 16.0, 25.0]];
        check(Resize::Linear, &row, [1, 2], &[1.0, 16.0]);
        check(Resize::Antialias, &row, [1, 2], &[2.5, 15.0]);
        check(Resize::Corner, &row, [1, 4], &[0.0, 2.5, 9.0, 20.5]);
    }

    #[test]
    fn a_file_beside_the_network_says_what_it_is_fed() {
        let folder = tempfile::tempdir().unwrap();
        let onnx = folder.path().join("net.onnx");
        let read = |text: &str| {
            std::fs::write(onnx.with_extension("toml"), text).unwrap();
            Feeding::beside(&onnx)
        };
        assert_eq!(Feeding::beside(&onnx).unwrap(), Feeding::default());
        let feeding = read("range = [0, 1]\nmean = [0.5, 0.25, 0.75]\nstd = [0.5]\n").unwrap();
        assert_eq!(feeding.text(), "[0, 1], mean [0.5, 0.25, 0.75], std [0.5], resized linear");
        // Black and white of three channels, in TensorFlow's layout.
        let x = Tensor::new(&[-1f32, -1.0, -1.0, 1.0, 1.0, 1.0], &Device::Cpu).unwrap().reshape((2, 3, 1, 1)).unwrap();
        let layout = Layout { channels: Some(3), channels_last: true, ..Layout::default() };
        let fed = feeding.fed(&x, &layout).unwrap();
        assert_eq!(fed.dims(), [2, 1, 1, 3]);
        assert_eq!(fed.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [-1.0, -0.5, -1.5, 1.0, 1.5, 0.5]);
        for (text, expected) in [
            ("range = [1, 1]", "two different numbers"),
            ("std = [0]", "above 0"),
            ("size = [0, 9]", "expected 1 to 4096"),
            ("rang = [0, 1]", "rang"),
            ("resize = \"cubic\"", "cubic"),
        ] {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains("net.toml") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn layouts_are_told_by_their_axes() {
        let tensorflow = Layout::of(&[None, Some(299), Some(299), Some(3)]);
        assert_eq!(tensorflow, Layout { batch: None, channels: Some(3), size: [Some(299); 2], channels_last: true });
        let pytorch = Layout::of(&[Some(8), Some(3), None, None]);
        assert_eq!(pytorch, Layout { batch: Some(8), channels: Some(3), size: [None; 2], channels_last: false });
        // Pictures three pixels wide are no reason.
        assert!(!Layout::of(&[None, Some(3), Some(3), Some(3)]).channels_last);
    }
}
