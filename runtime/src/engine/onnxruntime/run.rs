//! One call of a session by ONNX Runtime's C interface: from the caller's memory into the caller's memory, from many threads
//! at once, and without an allocation of ours. `ort` has none of the three.

use std::ffi::{CString, c_char, c_void};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use ort::AsPointer;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::sys::{ONNXTensorElementDataType, OrtStatusPtr, OrtValue};
use ort::value::TensorElementType;

use super::super::{Feed, Out, Values};
use crate::{Info, Output};

/// The most inputs of a graph, and the most axes of an input.
const MOST: usize = 4;

/// A session, and the names of the graph's inputs and of its output.
pub(super) struct Runner {
    session: Arc<Session>,
    /// Describes memory of the processor's.
    memory: MemoryInfo<'static>,
    inputs: Vec<CString>,
    output: CString,
    info: Shape,
}

/// What the output is.
#[derive(Clone, Copy)]
struct Shape {
    output: Output,
    of_each: [usize; 3],
}

impl Runner {
    /// Takes a session whose graph was checked against `info`.
    pub fn new(session: Arc<Session>, info: &Info) -> Result<Self, String> {
        let [output] = session.outputs() else {
            return Err(format!("it has {} outputs, expected one", session.outputs().len()));
        };
        let expected = match info.output {
            Output::F32 => TensorElementType::Float32,
            Output::U8 => TensorElementType::Uint8,
        };
        // The library writes as many bytes as its own type has.
        if output.dtype().tensor_type() != Some(expected) {
            return Err(format!("its output is {}, expected {expected}", output.dtype()));
        }
        let name = |name: &str| CString::new(name).map_err(|error| error.to_string());
        let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default);
        let [channels, height, width] = info.shape();
        let of_each = match info.output {
            Output::F32 => [channels, height, width],
            Output::U8 => [height, width, channels],
        };
        Ok(Self {
            memory: memory.map_err(|error| error.to_string())?,
            inputs: info.inputs().iter().map(|port| name(&port.name)).collect::<Result<_, _>>()?,
            output: name(output.name())?,
            info: Shape { output: info.output, of_each },
            session,
        })
    }

    /// Runs the graph on one feed for each of its inputs, and writes its whole output.
    ///
    /// ONNX Runtime lets many threads run one session ("Multiple threads are allowed to run this function; hence its
    /// thread-safe", inference_session.h), and takes a lock of its own around providers that cannot (ConcurrentRunSupported).
    /// `ort` asks for `&mut Session` all the same, because providers of others have broken that promise.
    pub fn run(&self, feeds: &[Feed<'_>], out: Out<'_>) -> ort::Result<()> {
        let Shape { output, of_each: [a, b, c] } = self.info;
        let (mut names, mut lent) = ([ptr::null::<c_char>(); MOST], [const { None::<Value> }; MOST]);
        let mut inputs = [ptr::null::<OrtValue>(); MOST];
        if feeds.len() != self.inputs.len() || feeds.len() > MOST {
            return Err(ort::Error::new("the graph has other inputs than it is given"));
        }
        for (at, feed) in feeds.iter().enumerate() {
            let name = self.inputs.iter().find(|name| name.to_bytes() == feed.name.as_bytes());
            names[at] =
                name.map(|name| name.as_ptr()).ok_or_else(|| ort::Error::new("nothing is given for an input"))?;
            let value = match feed.values {
                // The library reads inputs; that it asks for memory it could write to is C's way.
                Values::F32(values) => self.lend(values.as_ptr().cast_mut(), values.len(), feed.shape)?,
                Values::I64(values) => self.lend(values.as_ptr().cast_mut(), values.len(), feed.shape)?,
            };
            inputs[at] = value.0.as_ptr();
            lent[at] = Some(value);
        }
        let pictures = feeds.first().and_then(|feed| feed.shape.first()).copied().unwrap_or(0);
        let shape = [pictures, a, b, c];
        let image = match (out, output) {
            (Out::F32(out), Output::F32) => self.lend(out.as_mut_ptr(), out.len(), &shape)?,
            (Out::U8(out), Output::U8) => self.lend(out.as_mut_ptr(), out.len(), &shape)?,
            _ => return Err(ort::Error::new("the output is of another type than the file says")),
        };
        let mut written = image.0.as_ptr();
        // SAFETY: the session lives as long as self; `feeds.len()` names and values, and one of the output, are alive and
        // valid until the end of this function. A given output is written to, not replaced.
        let status = unsafe {
            (ort::api().Run)(
                self.session.ptr().cast_mut(),
                ptr::null(),
                names.as_ptr(),
                inputs.as_ptr(),
                feeds.len(),
                &self.output.as_ptr(),
                1,
                &mut written,
            )
        };
        checked(status)
    }

    /// A value of the library's over memory of ours.
    fn lend<T: Element>(&self, values: *mut T, n: usize, shape: &[usize]) -> ort::Result<Value> {
        let mut axes = [0i64; MOST];
        if shape.len() > MOST || shape.iter().product::<usize>() != n {
            return Err(ort::Error::new("the values are not of the shape that is said"));
        }
        axes.iter_mut().zip(shape).for_each(|(axis, n)| *axis = *n as i64);
        let mut value = ptr::null_mut();
        // SAFETY: `n` values of T lie at the pointer, as many as the shape says, for as long as the value is used; the
        // library keeps neither the shape nor the description of the memory.
        let status = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                self.memory.ptr(),
                values.cast::<c_void>(),
                n * size_of::<T>(),
                axes.as_ptr(),
                shape.len(),
                T::KIND,
                &mut value,
            )
        };
        checked(status)?;
        NonNull::new(value).map(Value).ok_or_else(|| ort::Error::new("the library made no value"))
    }
}

/// A value of the library's, given back at the end of its scope.
struct Value(NonNull<OrtValue>);

impl Drop for Value {
    fn drop(&mut self) {
        // SAFETY: the library made it, and nobody else gives it back.
        unsafe { (ort::api().ReleaseValue)(self.0.as_ptr()) }
    }
}

trait Element {
    const KIND: ONNXTensorElementDataType;
}

impl Element for f32 {
    const KIND: ONNXTensorElementDataType = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

impl Element for i64 {
    const KIND: ONNXTensorElementDataType = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

impl Element for u8 {
    const KIND: ONNXTensorElementDataType = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

/// What the library says of a call.
fn checked(status: OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: a status of the library's, or null; it is given back once.
    unsafe { ort::Error::result_from_status(status) }
}
