//! PTX text to machine code to a module: the driver's linker, and the cache before it.

use std::ffi::{CStr, CString, c_void};
use std::ptr;

use cust::sys::{self, CUjit_option, CUjitInputType};
use kernels_ptx::{Kernel, Target};

use super::driver::call;
use super::{CudaDevice, Handle};
use crate::{Error, Result};

/// Bytes for what the driver's compiler has to say about a text.
const LOG_BYTES: usize = 16 << 10;

/// The driver's number for compute capability 9.0 with its own instructions (`CU_TARGET_COMPUTE_90A`, CUDA 12.0), which
/// the bindings lack.
const COMPUTE_90A: usize = 0x10000 + 90;

/// Machine code that is loaded on a GPU. It is unloaded when dropped.
pub(super) struct Module {
    device: &'static CudaDevice,
    raw: Handle<sys::CUmod_st>,
}

impl Module {
    /// This text of a kernel on the device: from the cache, or else compiled and put there.
    ///
    /// # Errors
    /// [`Error::Module`] with the compiler's log, or [`Error::DeviceLost`].
    pub(super) fn of(device: &'static CudaDevice, kernel: &Kernel, text: &str) -> Result<Self> {
        device.activate()?;
        if let Some(code) = device.cache().get(text) {
            match Self::load(device, &code) {
                Ok(module) => return Ok(module),
                Err(lost @ Error::DeviceLost { .. }) => return Err(lost),
                // Whatever it is, this driver does not take it.
                Err(_) => device.cache().discard(text),
            }
        }
        let code = compile(device, kernel, text)?;
        let module = Self::load(device, &code).map_err(|error| refused(kernel, error, String::new()))?;
        device.cache().put(text, &code);
        Ok(module)
    }

    /// The module's function of this name.
    ///
    /// # Errors
    /// Driver errors, when it has none among them.
    pub(super) fn function(&self, name: &CStr) -> Result<Handle<sys::CUfunc_st>> {
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded; the name ends in a nul.
        unsafe { call!(on self.device, cuModuleGetFunction(&mut function, self.raw.0, name.as_ptr())) }?;
        Ok(Handle(function))
    }

    /// Loads machine code: a whole ELF file that the driver's linker wrote.
    fn load(device: &'static CudaDevice, code: &[u8]) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: the code is a whole file as the linker wrote it (the cache has checked it), whose header says how long
        // it is; the driver copies it.
        unsafe { call!(on device, cuModuleLoadData(&mut raw, code.as_ptr().cast())) }?;
        Ok(Self { device, raw: Handle(raw) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.activate_to_drop() {
            // Nobody is there to hear of a failure.
            // SAFETY: the module is loaded, and none of its functions was handed on.
            let _ = unsafe { call!(on self.device, cuModuleUnload(self.raw.0)) };
        }
    }
}

/// The error of a kernel whose text does not become a module; a lost device stays what it is.
pub(super) fn refused(kernel: &Kernel, error: Error, log: String) -> Error {
    match error {
        Error::DeviceLost { .. } => error,
        error => Error::Module { kernel: kernel.name.clone(), cause: error.to_string(), log },
    }
}

/// Machine code of this text for the device, whose context is current.
fn compile(device: &'static CudaDevice, kernel: &Kernel, text: &str) -> Result<Vec<u8>> {
    let nul = |_| Error::Module {
        kernel: kernel.name.clone(),
        cause: "its text contains a nul character".to_owned(),
        log: String::new(),
    };
    let text = CString::new(text).map_err(nul)?;
    let mut log = vec![0_u8; LOG_BYTES];
    let linked = link(device, &text, kernel.target, &mut log);
    linked.map_err(|error| {
        let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().trim().to_owned());
        refused(kernel, error, log.unwrap_or_default())
    })
}

/// Runs the driver's linker on one text. What it complains of is in `log` afterwards.
fn link(device: &'static CudaDevice, text: &CStr, target: Target, log: &mut [u8]) -> Result<Vec<u8>> {
    let mut options = vec![CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The driver takes a number that fits into a pointer as the pointer itself.
    let mut values = vec![log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(log.len())];
    // Without this the linker takes the context's compute capability, which is that of sm_90 alone.
    if target == Target::Sm90a {
        options.push(CUjit_option::CU_JIT_TARGET);
        values.push(ptr::without_provenance_mut(COMPUTE_90A));
    }
    let mut raw = ptr::null_mut();
    // SAFETY: both arrays have as many entries as is said, of the kinds that the options ask for; they, and the log with
    // as many bytes as is said, outlive the link, which ends with this function.
    unsafe {
        call!(on device, cuLinkCreate_v2(options.len() as u32, options.as_mut_ptr(), values.as_mut_ptr(), &mut raw))
    }?;
    let link = Link { device, raw };
    let bytes = text.to_bytes_with_nul();
    // SAFETY: the text has as many bytes as is said, ends in a nul and is only read; there are no further options.
    unsafe {
        call!(on device, cuLinkAddData_v2(
            link.raw,
            CUjitInputType::CU_JIT_INPUT_PTX,
            bytes.as_ptr().cast::<c_void>().cast_mut(),
            bytes.len(),
            c"kernel".as_ptr(),
            0,
            ptr::null_mut(),
            ptr::null_mut()
        ))
    }?;
    let (mut code, mut size) = (ptr::null_mut::<c_void>(), 0);
    // SAFETY: both places are valid.
    unsafe { call!(on device, cuLinkComplete(link.raw, &mut code, &mut size)) }?;
    // SAFETY: the linker owns `size` bytes at `code` until the link ends, below.
    Ok(unsafe { std::slice::from_raw_parts(code.cast::<u8>(), size) }.to_vec())
}

/// A run of the driver's linker.
struct Link {
    device: &'static CudaDevice,
    raw: sys::CUlinkState,
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.device.activate_to_drop() {
            // Nobody is there to hear of a failure.
            // SAFETY: the link was made once and ends once.
            let _ = unsafe { call!(on self.device, cuLinkDestroy(self.raw)) };
        }
    }
}
