//! PTX text made into functions that a GPU runs.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;
use std::sync::Arc;

use cust::sys::{self, CUfunction_attribute};
use kernels_ptx::Kernel;

use super::compile::Module;
use super::driver::call;
use super::launch;
use super::{CudaDevice, Handle, Stream};
use crate::launch::{Argument, check_kernel};
use crate::{Error, Result};

/// Dynamic shared memory that a function may use without asking for more.
const UNASKED_SHARED_BYTES: u32 = 48 << 10;

/// A kernel that is loaded on a GPU. Clones are the same function.
#[derive(Clone)]
pub(crate) struct Function {
    device: &'static CudaDevice,
    loaded: Arc<Loaded>,
}

/// The functions of a device by their text: one per description that was loaded from it. They stay loaded as long as the
/// process lives: there are no more of them than kernels.
pub(super) type LoadedFunctions = HashMap<String, Vec<Arc<Loaded>>>;

pub(super) struct Loaded {
    kernel: Kernel,
    /// The kernel's name, as the device's notes of unfinished work share it.
    name: Arc<str>,
    raw: Handle<sys::CUfunc_st>,
    /// Its launches may begin while those before them still run: its text waits for them.
    overlaps: bool,
    /// What the function is part of.
    _module: Module,
}

impl Loaded {
    pub(super) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn raw(&self) -> sys::CUfunction {
        self.raw.0
    }

    pub(super) fn overlaps(&self) -> bool {
        self.overlaps
    }

    /// Whether a launch of `kernel`, whose text is the same, is a launch of this.
    fn is(&self, kernel: &Kernel) -> bool {
        let own = &self.kernel;
        own.name == kernel.name
            && own.parameters == kernel.parameters
            && own.block == kernel.block
            && own.shared_bytes == kernel.shared_bytes
            && own.target == kernel.target
    }
}

impl Function {
    /// The kernel on the device: compiled by the driver or read from the cache the first time, remembered after that.
    ///
    /// # Errors
    /// [`Error::Module`] with the compiler's log, or a driver error.
    pub(crate) fn load(device: &'static CudaDevice, kernel: &Kernel) -> Result<Self> {
        let mut functions = device.functions();
        let mut known = functions.get(&kernel.text).into_iter().flatten();
        if let Some(loaded) = known.find(|loaded| loaded.is(kernel)) {
            return Ok(Self { device, loaded: Arc::clone(loaded) });
        }
        check_kernel(kernel, device.limits())?;
        let overlapping = if device.overlaps_launches() { kernel.overlapping_text() } else { None };
        let (module, raw) = load(device, kernel, overlapping.as_ref().unwrap_or(&kernel.text))?;
        let name = Arc::from(kernel.name.as_str());
        let overlaps = overlapping.is_some();
        let loaded = Arc::new(Loaded { kernel: kernel.clone(), name, raw, overlaps, _module: module });
        functions.entry(kernel.text.clone()).or_default().push(Arc::clone(&loaded));
        Ok(Self { device, loaded })
    }

    /// What the function was loaded from.
    pub fn kernel(&self) -> &Kernel {
        &self.loaded.kernel
    }

    /// Queues the function on the device's home stream, with `grid` blocks in x, y and z. A grid with a zero in it is no
    /// work: the arguments are checked and nothing is queued. `sizes` are those of the problem, for the record.
    ///
    /// # Errors
    /// [`Error::Launch`] when arguments or grid do not fit the kernel's description (nothing reaches the driver then), or a
    /// driver error.
    pub fn launch(&self, grid: [u32; 3], arguments: &[Argument<'_>], sizes: Option<&[u64]>) -> Result<()> {
        launch::launch(&self.loaded, &self.device.queue_here(), grid, arguments, sizes)
    }

    /// Queues the function on another stream of its device. Buffers are safe there: the work waits for everything queued
    /// on the home stream, and later work elsewhere that uses one of the buffers waits for this.
    ///
    /// # Errors
    /// As [`Function::launch`]; [`Error::Launch`] for a stream of another device.
    pub fn launch_on(&self, stream: &Stream, grid: [u32; 3], arguments: &[Argument<'_>]) -> Result<()> {
        if !ptr::eq(stream.queue().device(), self.device) {
            let reason = format!("it is loaded on {}, but the stream is of {}", self.device, stream.queue().device());
            return Err(Error::Launch { kernel: self.loaded.kernel.name.clone(), reason });
        }
        launch::launch(&self.loaded, stream.queue(), grid, arguments, None)
    }
}

/// A kernel's function from this text of it, with what it needs to be launched as it is described.
fn load(device: &'static CudaDevice, kernel: &Kernel, text: &str) -> Result<(Module, Handle<sys::CUfunc_st>)> {
    let invalid = |cause: String| Error::Module { kernel: kernel.name.clone(), cause, log: String::new() };
    let name =
        CString::new(kernel.name.as_str()).map_err(|_| invalid("its name contains a nul character".to_owned()))?;
    let module = Module::of(device, kernel, text)?;
    let function = module.function(&name).map_err(|error| match error {
        Error::DeviceLost { .. } => error,
        error => invalid(format!("its text has no entry of this name: {error}")),
    })?;
    let mut threads = 0;
    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
    // SAFETY: the function is of the module above; `threads` is a valid place for one number.
    unsafe { call!(on device, cuFuncGetAttribute(&mut threads, attribute, function.0)) }?;
    if kernel.threads_per_block() > threads as u64 {
        return Err(invalid(format!(
            "it asks for blocks of {} threads, but its registers allow {threads} on this GPU",
            kernel.threads_per_block()
        )));
    }
    if kernel.shared_bytes > UNASKED_SHARED_BYTES {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of the module above.
        unsafe { call!(on device, cuFuncSetAttribute(function.0, attribute, kernel.shared_bytes as i32)) }?;
    }
    Ok((module, function))
}
