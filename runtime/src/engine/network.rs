//! Any ONNX network of pictures, run by ONNX Runtime: the features of somebody else's file, such as an Inception's. Not for
//! generators, whose files are checked before they run ([`crate::Generator`]).

use std::path::{Path, PathBuf};

use ort::session::{Session, SessionInputValue};
use ort::value::{TensorElementType, TensorRef};

use super::EngineKind;
use super::onnxruntime::{runtime, session};
use crate::contract::Source;
use crate::printable::printable_lines;
use crate::{Error, Options, Result};

/// A network with one input, loaded.
pub struct Network {
    path: PathBuf,
    session: Session,
    /// The input's axes; none where the file leaves one free.
    pub axes: Vec<Option<usize>>,
    /// Whether it takes bytes; floats otherwise.
    pub takes_bytes: bool,
}

/// An output: its name, its shape and its values in C order.
pub type Named = (String, Vec<usize>, Vec<f32>);

impl Network {
    /// Hands a file to ONNX Runtime; `bytes`, where given, stand in the place of what the file holds.
    pub fn load(path: &Path, bytes: Option<&[u8]>, options: &Options) -> Result<Self> {
        let failed = |reason: String| Error::Load { path: path.into(), engine: EngineKind::OnnxRuntime, reason };
        let runtime = runtime(options.library.as_deref())?;
        let source = bytes.map_or(Source::File(path), Source::Bytes);
        let session = session(&runtime.environment, source, options);
        let session = session.map_err(|error| failed(printable_lines(&error.to_string())))?;
        let [input] = session.inputs() else {
            return Err(failed(format!("it has {} inputs, expected one, the pictures", session.inputs().len())));
        };
        let takes_bytes = match input.dtype().tensor_type() {
            Some(TensorElementType::Float32) => false,
            Some(TensorElementType::Uint8) => true,
            other => return Err(failed(format!("its input is of {other:?}, expected Float32 or Uint8"))),
        };
        let shape = input.dtype().tensor_shape();
        let axes = shape.iter().flat_map(|shape| shape.iter()).map(|n| usize::try_from(*n).ok().filter(|n| *n > 0));
        let axes = axes.collect();
        Ok(Network { path: path.into(), session, axes, takes_bytes })
    }

    /// All outputs of f32 for an input of this shape, whose values are rounded where the network takes bytes.
    pub fn run(&mut self, shape: &[usize], values: &[f32]) -> Result<Vec<Named>> {
        self.outputs(shape, values).map_err(|error| Error::Load {
            path: self.path.clone(),
            engine: EngineKind::OnnxRuntime,
            reason: format!("on pictures {shape:?}: {}", printable_lines(&error.to_string())),
        })
    }

    fn outputs(&mut self, shape: &[usize], values: &[f32]) -> ort::Result<Vec<Named>> {
        let bytes: Vec<u8>;
        let input = match self.takes_bytes {
            true => {
                bytes = values.iter().map(|value| value.round() as u8).collect();
                SessionInputValue::from(TensorRef::from_array_view((shape, bytes.as_slice()))?)
            }
            false => SessionInputValue::from(TensorRef::from_array_view((shape, values))?),
        };
        let outputs = self.session.run([input])?;
        let floats = outputs.iter().filter_map(|(name, value)| {
            let (shape, values) = value.try_extract_tensor::<f32>().ok()?;
            let shape = shape.iter().map(|n| usize::try_from(*n).unwrap_or(0)).collect();
            Some((name.to_owned(), shape, values.to_vec()))
        });
        Ok(floats.collect())
    }
}
