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
use crate::{ModuleInfo, Port};

/// The most inputs of a graph, its most outputs, and the most axes of any.
const MOST: usize = 4;

/// A session, and the names of the graph's inputs and outputs.
pub(super) struct Runner {
    session: Arc<Session>,
    /// Describes memory of the processor's.
    memory: MemoryInfo<'static>,
    inputs: Vec<CString>,
    outputs: Vec<Given>,
}

/// An output of the graph.
struct Given {
    name: CString,
    kind: ONNXTensorElementDataType,
    /// The shape of one sample.
    of_each: Vec<usize>,
}

impl Runner {
    /// Takes a session whose graph was checked against `info`.
    pub fn new(session: Arc<Session>, info: &ModuleInfo) -> Result<Self, String> {
        if session.outputs().len() != info.outputs.len() || info.outputs.len().max(info.inputs.len()) > MOST {
            return Err(format!("it has {} outputs, expected {}", session.outputs().len(), info.outputs.len()));
        }
        let name = |name: &str| CString::new(name).map_err(|error| error.to_string());
        let given = |port: &Port| {
            let found = session.outputs().iter().find(|output| output.name() == port.name);
            let output = found.ok_or_else(|| format!("it has no output {:?}", port.name))?;
            let (expected, kind) = match port.kind.as_str() {
                "u8" => (TensorElementType::Uint8, u8::KIND),
                _ => (TensorElementType::Float32, f32::KIND),
            };
            // The library writes as many bytes as its own type has.
            if output.dtype().tensor_type() != Some(expected) {
                return Err(format!("its output is {}, expected {expected}", output.dtype()));
            }
            let of_each = port.shape.iter().skip(1).map(|n| n.unwrap_or(1)).collect();
            Ok(Given { name: name(&port.name)?, kind, of_each })
        };
        let outputs = info.outputs.iter().map(given).collect::<Result<_, String>>()?;
        let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default);
        Ok(Self {
            memory: memory.map_err(|error| error.to_string())?,
            inputs: info.inputs.iter().map(|port| name(&port.name)).collect::<Result<_, _>>()?,
            outputs,
            session,
        })
    }

    /// Runs the graph on one feed for each of its inputs, and writes its outputs whole.
    ///
    /// ONNX Runtime lets many threads run one session ("Multiple threads are allowed to run this function; hence its
    /// thread-safe", inference_session.h), and takes a lock of its own around providers that cannot (ConcurrentRunSupported).
    /// `ort` asks for `&mut Session` all the same, because providers of others have broken that promise.
    pub fn run(&self, feeds: &[Feed<'_>], outs: &mut [Out<'_>]) -> ort::Result<()> {
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
                Values::I32(values) => self.lend(values.as_ptr().cast_mut(), values.len(), feed.shape)?,
                Values::I64(values) => self.lend(values.as_ptr().cast_mut(), values.len(), feed.shape)?,
            };
            inputs[at] = value.0.as_ptr();
            lent[at] = Some(value);
        }
        let samples = feeds.first().and_then(|feed| feed.shape.first()).copied().unwrap_or(0);
        let (mut given_names, mut given) = ([ptr::null::<c_char>(); MOST], [const { None::<Value> }; MOST]);
        let mut written = [ptr::null_mut::<OrtValue>(); MOST];
        if outs.len() != self.outputs.len() {
            return Err(ort::Error::new("the graph has other outputs than there is room for"));
        }
        for (at, (out, Given { name, kind, of_each })) in outs.iter_mut().zip(&self.outputs).enumerate() {
            let mut shape = [samples, 1, 1, 1];
            let rank = of_each.len() + 1;
            shape
                .get_mut(1..rank)
                .ok_or_else(|| ort::Error::new("an output has too many axes"))?
                .copy_from_slice(of_each);
            let value = match out {
                Out::F32(out) if *kind == f32::KIND => self.lend(out.as_mut_ptr(), out.len(), &shape[..rank])?,
                Out::U8(out) if *kind == u8::KIND => self.lend(out.as_mut_ptr(), out.len(), &shape[..rank])?,
                _ => return Err(ort::Error::new("an output is of another type than the file says")),
            };
            (given_names[at], written[at]) = (name.as_ptr(), value.0.as_ptr());
            given[at] = Some(value);
        }
        // SAFETY: the session lives as long as self; `feeds.len()` and `outs.len()` names and values are alive and valid
        // until the end of this function. A given output is written to, not replaced.
        let status = unsafe {
            (ort::api().Run)(
                self.session.ptr().cast_mut(),
                ptr::null(),
                names.as_ptr(),
                inputs.as_ptr(),
                feeds.len(),
                given_names.as_ptr(),
                outs.len(),
                written.as_mut_ptr(),
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

impl Element for i32 {
    const KIND: ONNXTensorElementDataType = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
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
