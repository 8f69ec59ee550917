//! Kernels of our own on NVIDIA GPUs: where they come from, and how they are launched. The kernels are in `kernels/`,
//! compiled by `build.rs`; each has a composite of candle's operations beside it that the tests compare it with.

use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg, sys};
use candle_core::{CudaDevice, DType, Device, Result, Storage, Tensor, bail};

pub(crate) mod cudnn;

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    name: &'static str,
    ptx: &'static str,
}

/// Attention over pixels, `attention.cu`.
pub(crate) const ATTENTION: Module = Module { name: "dmd_attention", ptx: ptx::ATTENTION };
/// Group norm, `norm.cu`.
pub(crate) const NORM: Module = Module { name: "dmd_norm", ptx: ptx::NORM };
/// AdamW, averages and norms of gradients, `optimizer.cu`.
pub(crate) const OPTIMIZER: Module = Module { name: "dmd_optimizer", ptx: ptx::OPTIMIZER };
/// Philox, `philox.cu`.
pub(crate) const PHILOX: Module = Module { name: "dmd_philox", ptx: ptx::PHILOX };
/// Layouts, sums, joining, resampling, `pointwise.cu`.
pub(crate) const POINTWISE: Module = Module { name: "dmd_pointwise", ptx: ptx::POINTWISE };

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// A device address; 0 where a kernel may go without.
    Address(u64),
    I32(i32),
    U32(u32),
    U64(u64),
    F32(f32),
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub blocks: [usize; 3],
    pub threads: usize,
    pub shared_bytes: usize,
}

impl Grid {
    /// One thread per item, in blocks of 256.
    pub fn over(items: usize) -> Self {
        Grid { blocks: [items.div_ceil(256), 1, 1], threads: 256, shared_bytes: 0 }
    }
}

/// Launches `function` of `module` on the device's own stream, which orders it after everything launched before. Does
/// not wait.
pub(crate) fn launch(device: &CudaDevice, module: Module, function: &str, grid: Grid, args: &[Arg]) -> Result<()> {
    if grid.blocks.contains(&0) {
        return Ok(());
    }
    let kernel = device.get_or_load_custom_func(function, module.name, module.ptx)?;
    if grid.shared_bytes > 48 << 10 {
        let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        kernel.set_attribute(most, grid.shared_bytes as i32)?;
    }
    let [x, y, z] = grid.blocks.map(|n| n as u32);
    let mut builder = kernel.builder();
    for arg in args {
        match arg {
            Arg::Address(value) | Arg::U64(value) => builder.arg(value),
            Arg::I32(value) => builder.arg(value),
            Arg::U32(value) => builder.arg(value),
            Arg::F32(value) => builder.arg(value),
        };
    }
    let config = LaunchConfig {
        grid_dim: (x, y, z),
        block_dim: (grid.threads as u32, 1, 1),
        shared_mem_bytes: grid.shared_bytes as u32,
    };
    // SAFETY: the callers here pass what the kernel's signature says, and addresses of tensors that hold as many values
    // as the kernel reads or writes. Their memory is freed in the order of the same stream, so after the kernel ran.
    unsafe { builder.launch(config) }?;
    Ok(())
}

/// The GPU that a tensor lies on.
pub(crate) fn device_of(tensor: &Tensor) -> Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        _ => bail!("expected a tensor on a GPU"),
    }
}

/// Where the first value of a contiguous tensor lies, f32, bf16 or i64.
pub(crate) fn address(tensor: &Tensor) -> Result<Arg> {
    let (storage, layout) = tensor.storage_and_layout();
    if !layout.is_contiguous() {
        bail!("a kernel needs a contiguous tensor, not {:?}", layout);
    }
    let Storage::Cuda(storage) = &*storage else { bail!("expected a tensor on a GPU") };
    let stream = storage.device.cuda_stream();
    let start = match tensor.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<half::bf16>()?.device_ptr(&stream).0,
        DType::I64 => storage.as_cuda_slice::<i64>()?.device_ptr(&stream).0,
        other => bail!("no kernel takes {other:?}"),
    };
    Ok(Arg::Address(start + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64))
}

/// The same for what may be absent.
pub(crate) fn address_or_null(tensor: Option<&Tensor>) -> Result<Arg> {
    tensor.map_or(Ok(Arg::Address(0)), address)
}

/// `_f32` or `_bf16`, as kernels of both are named.
pub(crate) fn suffixed(function: &str, dtype: DType) -> Result<String> {
    match dtype {
        DType::F32 => Ok(format!("{function}_f32")),
        DType::BF16 => Ok(format!("{function}_bf16")),
        other => bail!("{function}: no kernel takes {other:?}"),
    }
}

/// A tensor whose values a kernel is about to write.
pub(crate) fn unwritten(shape: impl Into<candle_core::Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: the callers here hand it to a kernel that writes every value before anything reads one.
    unsafe { Tensor::empty(shape, dtype, device) }
}
