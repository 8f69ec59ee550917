//! NVIDIA GPUs as a whole: how they are set up for training, and their memory. Without the feature `cuda`, and for other
//! devices, there is nothing to set up and nothing known.

use crate::Result;
use candle_core::Device;

/// Sets a device up for the way that this program works: products of f32 in TF32; freed memory is kept for the next
/// update instead of being handed back whenever the GPU is waited for; one stream, so that nothing has to be watched for
/// use by another. To be called before anything lies on the device.
pub fn prepare(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        candle_core::cuda_backend::set_gemm_reduced_precision_f32(true);
        // SAFETY: everything here runs on the device's own stream, in the order in which it was called.
        unsafe { device.disable_event_tracking() };
        memory::keep_freed(device)?;
    }
    let _ = device;
    Ok(())
}

/// The most bytes that were in use on the device at a time; none where the system does not say.
pub fn peak_bytes(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return memory::peak_bytes(device).ok();
    }
    let _ = device;
    None
}

/// Bytes that are free on the device; none where the system does not say.
pub fn free_bytes(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return memory::free_bytes(device).ok();
    }
    let _ = device;
    None
}

#[cfg(feature = "cuda")]
mod memory {
    use candle_core::CudaDevice;
    use candle_core::cuda_backend::cudarc::driver::result::{DriverError, mem_get_info};
    use candle_core::cuda_backend::cudarc::driver::sys;
    use sys::CUmemPool_attribute as Attribute;

    /// The pool that the device's memory comes from.
    fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool, DriverError> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread()?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: the call writes the device's pool, which is there as long as the device, to the place given.
        unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device()) }.result()?;
        Ok(pool)
    }

    pub fn keep_freed(device: &CudaDevice) -> Result<(), candle_core::Error> {
        let mut everything = u64::MAX;
        let attribute = Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a 64-bit number.
        unsafe { sys::cuMemPoolSetAttribute(pool(device)?, attribute, (&raw mut everything).cast()) }.result()?;
        Ok(())
    }

    pub fn peak_bytes(device: &CudaDevice) -> Result<u64, DriverError> {
        let mut bytes = 0u64;
        let attribute = Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: this attribute is a 64-bit number.
        unsafe { sys::cuMemPoolGetAttribute(pool(device)?, attribute, (&raw mut bytes).cast()) }.result()?;
        Ok(bytes)
    }

    pub fn free_bytes(device: &CudaDevice) -> Result<u64, DriverError> {
        device.cuda_stream().context().bind_to_thread()?;
        let (free, _) = mem_get_info()?;
        Ok(free as u64)
    }
}
