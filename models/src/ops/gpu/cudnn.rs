//! Convolutions by cuDNN's graph interface, pictures channels last. The first time that a shape is met, the plans that
//! cuDNN thinks best are timed on the very tensors, and the fastest is kept; all share one workspace.

use super::{Arg, address, device_of};
use candle_core::cuda_backend::cudarc::cudnn::{CudnnError, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, sys::CUevent_flags};
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{DType, Error, Result, Tensor, bail};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use sys::cudnnBackendAttributeName_t as Name;
use sys::cudnnBackendAttributeType_t as Type;
use sys::cudnnBackendDescriptorType_t as Kind;

/// What is computed from the other two of x `(B, H, W, C)`, w `(O, kh, kw, C)` and y `(B, H', W', O)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Pass {
    /// y.
    Forward,
    /// The gradient of x.
    Data,
    /// The gradient of w.
    Filter,
}

/// Runs one pass: reads two of the tensors and writes the third, all contiguous and of one dtype, f32 (in TF32 where the
/// GPU has it) or bf16; sums are f32.
pub(crate) fn convolve(pass: Pass, x: &Tensor, w: &Tensor, y: &Tensor, stride: usize, padding: usize) -> Result<()> {
    let device = device_of(x)?;
    let key = Key {
        pass,
        x: dims(x)?,
        w: dims(w)?,
        y: dims(y)?,
        stride: stride as i64,
        padding: padding as i64,
        dtype: match x.dtype() {
            DType::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            DType::BF16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            other => bail!("cuDNN: no convolution of {other:?} here"),
        },
    };
    let addresses = [pointer(x)?, pointer(w)?, pointer(y)?];
    LIBRARIES.with_borrow_mut(|libraries| {
        let library = match libraries.entry(device.id()) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Library::new(&device)?),
        };
        library.run(key, addresses)
    })
}

/// Dimensions as cuDNN counts them: batch or outputs, channels, height, width.
fn dims(t: &Tensor) -> Result<[i64; 4]> {
    let (n, h, w, c) = t.dims4()?;
    Ok([n as i64, c as i64, h as i64, w as i64])
}

fn pointer(t: &Tensor) -> Result<*mut c_void> {
    match address(t)? {
        Arg::Address(address) => Ok(address as *mut c_void),
        other => bail!("cuDNN: {other:?} is no address"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    pass: Pass,
    x: [i64; 4],
    w: [i64; 4],
    y: [i64; 4],
    stride: i64,
    padding: i64,
    dtype: sys::cudnnDataType_t,
}

thread_local! {
    // A handle belongs to one thread.
    static LIBRARIES: RefCell<HashMap<DeviceId, Library>> = RefCell::new(HashMap::new());
}

/// A handle of cuDNN on one device, with the plans found so far.
struct Library {
    handle: sys::cudnnHandle_t,
    stream: Arc<CudaStream>,
    plans: HashMap<Key, Plan>,
    workspace: Option<CudaSlice<u8>>,
}

struct Plan {
    plan: Descriptor,
    workspace_bytes: usize,
}

/// Plans that are timed per shape, repetitions of each, and the largest workspace that one may ask for.
const CANDIDATES: i64 = 10;
const REPETITIONS: usize = 3;
const MOST_WORKSPACE: i64 = 1 << 30;

impl Library {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread()?;
        let mut handle = null_mut();
        // SAFETY: both calls take a place for, or the value of, a handle; the stream lives as long as `self`.
        unsafe {
            check("cudnnCreate", sys::cudnnCreate(&mut handle))?;
            check("cudnnSetStream", sys::cudnnSetStream(handle, stream.cu_stream() as *mut _))?;
        }
        Ok(Library { handle, stream, plans: HashMap::new(), workspace: None })
    }

    fn run(&mut self, key: Key, addresses: [*mut c_void; 3]) -> Result<()> {
        if !self.plans.contains_key(&key) {
            let plan = self.fastest(key, addresses)?;
            self.plans.insert(key, plan);
        }
        let bytes = self.plans[&key].workspace_bytes;
        let workspace = self.workspace(bytes)?;
        self.plans[&key].execute(self.handle, addresses, workspace)
    }

    /// The address of at least so many bytes; they are reused from one convolution to the next, which the stream orders.
    fn workspace(&mut self, bytes: usize) -> Result<*mut c_void> {
        if bytes == 0 {
            return Ok(null_mut());
        }
        if self.workspace.as_ref().is_none_or(|workspace| workspace.len() < bytes) {
            self.workspace = None;
            // SAFETY: a workspace is written before it is read.
            self.workspace = Some(unsafe { self.stream.alloc::<u8>(bytes) }?);
        }
        let workspace = self.workspace.as_ref().expect("allocated just above");
        Ok(workspace.device_ptr(&self.stream).0 as *mut c_void)
    }

    /// Times the plans that cuDNN proposes on these tensors.
    fn fastest(&mut self, key: Key, addresses: [*mut c_void; 3]) -> Result<Plan> {
        let graph = key.graph(self.handle)?;
        let mut best: Option<(f32, Plan)> = None;
        let mut out_of_memory = None;
        for mode in
            [sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A, sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_FALLBACK]
        {
            for config in proposals(&graph, mode)? {
                // A proposal may turn out not to fit this GPU or library: then it is none.
                let Ok(plan) = Plan::new(self.handle, &config) else { continue };
                let ms = match self.time(&plan, addresses) {
                    Ok(ms) => ms,
                    Err(error) => {
                        // A fault of the batch, not of the shape: to be told if no other plan does with less.
                        out_of_memory = Some(error).filter(is_out_of_memory).or(out_of_memory);
                        continue;
                    }
                };
                if best.as_ref().is_none_or(|(fastest, _)| ms < *fastest) {
                    best = Some((ms, plan));
                }
            }
            if best.is_some() {
                break;
            }
        }
        match (best, out_of_memory) {
            (Some((_, plan)), _) => Ok(plan),
            (None, Some(error)) => Err(error),
            (None, None) => bail!("cuDNN has no plan for {key:?}"),
        }
    }

    fn time(&mut self, plan: &Plan, addresses: [*mut c_void; 3]) -> Result<f32> {
        let workspace = self.workspace(plan.workspace_bytes)?;
        plan.execute(self.handle, addresses, workspace)?;
        let now = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let start = now()?;
        for _ in 0..REPETITIONS {
            plan.execute(self.handle, addresses, workspace)?;
        }
        Ok(start.elapsed_ms(&now()?)?)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle was made by `new` and nothing uses it any more. At the end of a process the library may be
        // gone before; its complaint is of no use to anybody.
        let _ = unsafe { sys::cudnnDestroy(self.handle) };
    }
}

/// The numbers by which a plan knows its tensors.
const X: i64 = 1;
const W: i64 = 2;
const Y: i64 = 3;

impl Key {
    /// The graph of this one operation.
    fn graph(&self, handle: sys::cudnnHandle_t) -> Result<Descriptor> {
        let tensor = |id: i64, dims: [i64; 4]| -> Result<Descriptor> {
            let [_, c, h, w] = dims;
            let mut t = Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?;
            t.set(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[self.dtype])?;
            t.set(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, Type::CUDNN_TYPE_INT64, &dims)?;
            // Channels last.
            t.set(Name::CUDNN_ATTR_TENSOR_STRIDES, Type::CUDNN_TYPE_INT64, &[h * w * c, 1, w * c, c])?;
            t.set(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, Type::CUDNN_TYPE_INT64, &[id])?;
            t.set(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Type::CUDNN_TYPE_INT64, &[16i64])?;
            t.finalize()
        };
        let (x, w, y) = (tensor(X, self.x)?, tensor(W, self.w)?, tensor(Y, self.y)?);

        let float = sys::cudnnDataType_t::CUDNN_DATA_FLOAT;
        let correlation = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let mut conv = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?;
        conv.set(Name::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[float])?;
        conv.set(Name::CUDNN_ATTR_CONVOLUTION_CONV_MODE, Type::CUDNN_TYPE_CONVOLUTION_MODE, &[correlation])?;
        conv.set(Name::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, Type::CUDNN_TYPE_INT64, &[2i64])?;
        conv.set(Name::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, Type::CUDNN_TYPE_INT64, &[self.padding; 2])?;
        conv.set(Name::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, Type::CUDNN_TYPE_INT64, &[self.padding; 2])?;
        conv.set(Name::CUDNN_ATTR_CONVOLUTION_DILATIONS, Type::CUDNN_TYPE_INT64, &[1i64; 2])?;
        conv.set(Name::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, Type::CUDNN_TYPE_INT64, &[self.stride; 2])?;
        let conv = conv.finalize()?;

        let names = self.pass.names();
        let mut operation = Descriptor::new(names.kind)?;
        for (name, part) in [(names.conv, &conv), (names.x, &x), (names.w, &w), (names.y, &y)] {
            operation.set(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[part.0])?;
        }
        operation.set(names.alpha, Type::CUDNN_TYPE_FLOAT, &[1f32])?;
        operation.set(names.beta, Type::CUDNN_TYPE_FLOAT, &[0f32])?;
        let operation = operation.finalize()?;

        let mut graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
        graph.set(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, Type::CUDNN_TYPE_HANDLE, &[handle])?;
        graph.set(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[operation.0])?;
        graph.finalize()
    }
}

/// What an operation and its attributes are called.
struct Names {
    kind: Kind,
    conv: Name,
    x: Name,
    w: Name,
    y: Name,
    alpha: Name,
    beta: Name,
}

impl Pass {
    fn names(self) -> Names {
        match self {
            Pass::Forward => Names {
                kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
                conv: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
                x: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                w: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                y: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
                alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
                beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
            },
            Pass::Data => Names {
                kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
                conv: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
                x: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                w: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                y: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
                alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
            },
            Pass::Filter => Names {
                kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
                conv: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
                x: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                w: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                y: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
                alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
            },
        }
    }
}

/// Engine configurations that cuDNN proposes for a graph, the likeliest first.
fn proposals(graph: &Descriptor, mode: sys::cudnnBackendHeurMode_t) -> Result<Vec<Descriptor>> {
    let mut heuristic = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?;
    heuristic.set(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[graph.0])?;
    heuristic.set(Name::CUDNN_ATTR_ENGINEHEUR_MODE, Type::CUDNN_TYPE_HEUR_MODE, &[mode])?;
    let heuristic = heuristic.finalize()?;
    let mut configs = (0..CANDIDATES)
        .map(|_| Descriptor::new(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR))
        .collect::<Result<Vec<Descriptor>>>()?;
    let mut raw: Vec<sys::cudnnBackendDescriptor_t> = configs.iter().map(|config| config.0).collect();
    let name = Name::CUDNN_ATTR_ENGINEHEUR_RESULTS;
    let found = heuristic.get(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &mut raw)?;
    configs.truncate(found);
    Ok(configs)
}

impl Plan {
    fn new(handle: sys::cudnnHandle_t, config: &Descriptor) -> Result<Self> {
        let mut plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?;
        plan.set(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, Type::CUDNN_TYPE_HANDLE, &[handle])?;
        let name = Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG;
        plan.set(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[config.0])?;
        let plan = plan.finalize()?;
        let mut bytes = [0i64];
        plan.get(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, Type::CUDNN_TYPE_INT64, &mut bytes)?;
        if bytes[0] > MOST_WORKSPACE {
            bail!("cuDNN: a plan wants {} bytes", bytes[0]);
        }
        Ok(Plan { plan, workspace_bytes: bytes[0] as usize })
    }

    fn execute(&self, handle: sys::cudnnHandle_t, addresses: [*mut c_void; 3], workspace: *mut c_void) -> Result<()> {
        let mut pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?;
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Type::CUDNN_TYPE_VOID_PTR, &addresses)?;
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Type::CUDNN_TYPE_INT64, &[X, W, Y])?;
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, Type::CUDNN_TYPE_VOID_PTR, &[workspace])?;
        let pack = pack.finalize()?;
        // SAFETY: the plan was made for tensors of these sizes, the workspace is as large as it asked for, and the
        // stream keeps the order in which all of them are used and freed.
        check("cudnnBackendExecute", unsafe { sys::cudnnBackendExecute(handle, self.plan.0, pack.0) })
    }
}

/// One of cuDNN's descriptors.
struct Descriptor(sys::cudnnBackendDescriptor_t);

impl Descriptor {
    fn new(kind: Kind) -> Result<Self> {
        let mut raw = null_mut();
        // SAFETY: the call writes a descriptor to the place given.
        check("cudnnBackendCreateDescriptor", unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut raw) })?;
        Ok(Descriptor(raw))
    }

    fn set<T>(&mut self, name: Name, kind: Type, values: &[T]) -> Result<()> {
        // SAFETY: `values` are of the type that `kind` names (the callers here pair them), and are copied.
        let status = unsafe {
            sys::cudnnBackendSetAttribute(self.0, name, kind, values.len() as i64, values.as_ptr().cast::<c_void>())
        };
        check(&format!("{name:?}"), status)
    }

    /// Fills `values` as far as there are any; returns how many.
    fn get<T>(&self, name: Name, kind: Type, values: &mut [T]) -> Result<usize> {
        let mut count = 0i64;
        // SAFETY: there is room for as many values as are asked for, of the type that `kind` names.
        let status = unsafe {
            let to = values.as_mut_ptr().cast::<c_void>();
            sys::cudnnBackendGetAttribute(self.0, name, kind, values.len() as i64, &mut count, to)
        };
        check(&format!("{name:?}"), status)?;
        Ok((count.max(0) as usize).min(values.len()))
    }

    fn finalize(self) -> Result<Self> {
        // SAFETY: the descriptor is one of cuDNN's; whether its attributes go together is for this call to say.
        check("cudnnBackendFinalize", unsafe { sys::cudnnBackendFinalize(self.0) })?;
        Ok(self)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and destroyed once.
        let _ = unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

/// Whether the driver or cuDNN had no memory left.
fn is_out_of_memory(error: &Error) -> bool {
    let text = error.to_string();
    ["OUT_OF_MEMORY", "DEVICE_ALLOCATION_FAILED"].iter().any(|name| text.contains(name))
}

fn check(what: &str, status: sys::cudnnStatus_t) -> Result<()> {
    status.result().map_err(|error: CudnnError| Error::Msg(format!("cuDNN: {what}: {error:?}")))
}
