//! Which GPUs there are.

use std::ffi::{CStr, c_int};
use std::fmt;

use cust::sys::{self, CUdevice_attribute};

use super::driver::{self, call};
use crate::Result;

/// What is known of one GPU.
#[derive(Clone, Debug)]
pub struct CudaDeviceInformation {
    /// Its number, as in `cuda:0`.
    pub ordinal: u32,
    /// The product's name.
    pub name: String,
    /// Compute capability (major, minor).
    pub compute_capability: (u32, u32),
    /// Bytes of device memory.
    pub total_memory: usize,
    /// Bytes that nobody holds at the moment; `None` when the GPU lets no process in to ask (exclusive or prohibited
    /// compute mode).
    pub free_memory: Option<usize>,
    /// The version of CUDA that the driver brings (major, minor).
    pub cuda_version: (u32, u32),
    /// The driver's own version, where the operating system tells it.
    pub driver_version: Option<String>,
}

impl fmt::Display for CudaDeviceInformation {
    /// One line, such as `cuda:0  NVIDIA H100 80GB HBM3  compute capability 9.0  78.5 of 79.2 GiB free  driver 580.1
    /// (CUDA 13.0)`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gibibytes = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let (major, minor) = self.compute_capability;
        write!(formatter, "cuda:{}  {}  compute capability {major}.{minor}  ", self.ordinal, self.name)?;
        match self.free_memory {
            Some(free) => write!(formatter, "{:.1} of ", gibibytes(free))?,
            None => write!(formatter, "unknown of ")?,
        }
        write!(formatter, "{:.1} GiB free  ", gibibytes(self.total_memory))?;
        let (major, minor) = self.cuda_version;
        match &self.driver_version {
            Some(version) => write!(formatter, "driver {version} (CUDA {major}.{minor})"),
            None => write!(formatter, "driver of CUDA {major}.{minor}"),
        }
    }
}

/// Every GPU that the driver shows, in its order.
///
/// # Errors
/// One line that says why there is none: the driver is not installed, it shows no device, or a call failed.
pub fn devices() -> Result<Vec<CudaDeviceInformation>> {
    driver::load()?;
    (0..count()?).map(information).collect()
}

/// How many GPUs the driver shows. The driver must be loaded.
pub(super) fn count() -> Result<u32> {
    let mut count = 0;
    // SAFETY: `count` is a valid place for one number.
    unsafe { call!(cuDeviceGetCount(&mut count)) }?;
    Ok(count.max(0) as u32)
}

/// The driver's handle of a GPU. The driver must be loaded.
pub(super) fn handle(ordinal: u32) -> Result<sys::CUdevice> {
    let mut device = 0;
    // SAFETY: `device` is a valid place for a handle.
    unsafe { call!(cuDeviceGet(&mut device, ordinal as c_int)) }?;
    Ok(device)
}

/// One number that describes a GPU.
pub(super) fn attribute(device: sys::CUdevice, attribute: CUdevice_attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: `value` is a valid place for one number.
    unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, device)) }?;
    Ok(value.max(0) as u32)
}

/// Compute capability (major, minor) of a GPU.
pub(super) fn compute_capability(device: sys::CUdevice) -> Result<(u32, u32)> {
    Ok((
        attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// The product's name of a GPU.
pub(super) fn name(device: sys::CUdevice) -> Result<String> {
    let mut name = [0_u8; 256];
    // SAFETY: the driver writes at most 256 bytes, the last of them a nul.
    unsafe { call!(cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device)) }?;
    let name = CStr::from_bytes_until_nul(&name).unwrap_or(c"unnamed");
    Ok(name.to_string_lossy().into_owned())
}

fn information(ordinal: u32) -> Result<CudaDeviceInformation> {
    let device = handle(ordinal)?;
    let mut total_memory = 0;
    // SAFETY: `total_memory` is a valid place for one number.
    unsafe { call!(cuDeviceTotalMem_v2(&mut total_memory, device)) }?;
    Ok(CudaDeviceInformation {
        ordinal,
        name: name(device)?,
        compute_capability: compute_capability(device)?,
        total_memory,
        free_memory: free_memory(device).ok(),
        cuda_version: cuda_version()?,
        driver_version: driver_version(),
    })
}

/// Free bytes of a GPU. Only a context can ask for them: the primary one is held for the moment of the question.
fn free_memory(device: sys::CUdevice) -> Result<usize> {
    let mut context = std::ptr::null_mut();
    // SAFETY: `context` is a valid place for a handle.
    unsafe { call!(cuDevicePrimaryCtxRetain(&mut context, device)) }?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: the context was retained just now.
    let asked = unsafe { call!(cuCtxPushCurrent_v2(context)) }.and_then(|()| {
        // SAFETY: both places are valid and the context is current.
        let asked = unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total)) };
        // SAFETY: takes off what was pushed above.
        let popped = unsafe { call!(cuCtxPopCurrent_v2(&mut context)) };
        asked.and(popped)
    });
    // SAFETY: releases what was retained above.
    unsafe { call!(cuDevicePrimaryCtxRelease_v2(device)) }?;
    asked.map(|()| free)
}

/// The version of CUDA that the driver brings (major, minor).
pub(super) fn cuda_version() -> Result<(u32, u32)> {
    let mut version = 0;
    // SAFETY: `version` is a valid place for one number.
    unsafe { call!(cuDriverGetVersion(&mut version)) }?;
    let version = version.max(0) as u32;
    Ok((version / 1000, version % 1000 / 10))
}

/// The kernel module's version on Linux.
pub(super) fn driver_version() -> Option<String> {
    let version = std::fs::read_to_string("/sys/module/nvidia/version").ok()?;
    Some(version.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::fake::Fake;
    use super::*;

    #[test]
    fn a_gpu_is_described_and_its_context_let_go_whatever_fails() {
        let fake = Fake::attach();
        let known = information(fake.ordinal()).unwrap();
        assert_eq!(
            (known.name.as_str(), known.compute_capability, known.cuda_version),
            ("Made-up GPU", (9, 0), (12, 4))
        );
        assert_eq!((known.total_memory, known.free_memory), (1 << 30, Some(1 << 30)));
        for (number, call) in fake.calls().into_iter().enumerate() {
            let fake = Fake::attach();
            fake.fail(number, 999);
            match information(fake.ordinal()) {
                Ok(known) => assert_eq!(known.free_memory, None, "{call}"),
                Err(error) => assert!(error.to_string().contains(call), "{call}: {error}"),
            }
            assert!(call.contains("Release") || fake.census().is_empty(), "{call}: {:?}", fake.census());
            assert!(fake.violations().is_empty());
        }
    }

    #[test]
    fn information_prints_as_one_line() {
        let mut information = CudaDeviceInformation {
            ordinal: 1,
            name: "NVIDIA H100".to_owned(),
            compute_capability: (9, 0),
            total_memory: 80 << 30,
            free_memory: Some(79 << 30),
            cuda_version: (13, 0),
            driver_version: Some("580.1".to_owned()),
        };
        assert_eq!(
            information.to_string(),
            "cuda:1  NVIDIA H100  compute capability 9.0  79.0 of 80.0 GiB free  driver 580.1 (CUDA 13.0)"
        );
        information.free_memory = None;
        information.driver_version = None;
        assert_eq!(
            information.to_string(),
            "cuda:1  NVIDIA H100  compute capability 9.0  unknown of 80.0 GiB free  driver of CUDA 13.0"
        );
    }
}
