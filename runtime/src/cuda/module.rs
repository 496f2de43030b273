//! PTX text made into functions that a GPU runs.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::Arc;

use cust::sys::{self, CUfunction_attribute, CUjit_option};
use kernels_ptx::Kernel;

use super::driver::call;
use super::launch;
use super::{CudaDevice, Handle, Stream};
use crate::launch::{Argument, check_kernel};
use crate::{Error, Result};

/// Bytes for what the driver's compiler has to say about a text.
const LOG_BYTES: usize = 16 << 10;

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
    raw: Handle<sys::CUfunc_st>,
}

impl Loaded {
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
    /// The kernel on the device: compiled by the driver the first time, remembered after that.
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
        device.activate()?;
        let loaded = Arc::new(Loaded { kernel: kernel.clone(), raw: load(kernel)? });
        functions.entry(kernel.text.clone()).or_default().push(Arc::clone(&loaded));
        Ok(Self { device, loaded })
    }

    /// What the function was loaded from.
    pub fn kernel(&self) -> &Kernel {
        &self.loaded.kernel
    }

    /// Queues the function on the device's home stream, with `grid` blocks in x, y and z. A grid with a zero in it is no
    /// work: the arguments are checked and nothing is queued.
    ///
    /// # Errors
    /// [`Error::Launch`] when arguments or grid do not fit the kernel's description (nothing reaches the driver then), or a
    /// driver error.
    pub fn launch(&self, grid: [u32; 3], arguments: &[Argument<'_>]) -> Result<()> {
        launch::launch(&self.loaded.kernel, self.loaded.raw.0, self.device.home(), grid, arguments)
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
        launch::launch(&self.loaded.kernel, self.loaded.raw.0, stream, grid, arguments)
    }
}

/// Compiles a kernel's text for the current context.
fn load(kernel: &Kernel) -> Result<Handle<sys::CUfunc_st>> {
    let invalid = |cause: String, log: String| Error::Module { kernel: kernel.name.clone(), cause, log };
    let nul = |_| invalid("its text or name contains a nul character".to_owned(), String::new());
    let text = CString::new(kernel.text.as_str()).map_err(nul)?;
    let name = CString::new(kernel.name.as_str()).map_err(nul)?;

    let mut log = vec![0_u8; LOG_BYTES];
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The driver takes a number that fits into a pointer as the pointer itself.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = ptr::null_mut();
    // SAFETY: the text ends in a nul; both option arrays have two entries of the kinds that the options ask for; the log
    // has as many bytes as it is said to have and outlives the call.
    unsafe {
        call!(cuModuleLoadDataEx(
            &mut module,
            text.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr()
        ))
    }
    .map_err(|error| {
        let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().trim().to_owned());
        invalid(error.to_string(), log.unwrap_or_default())
    })?;

    let mut function = ptr::null_mut();
    // SAFETY: the module was loaded just now; the name ends in a nul.
    unsafe { call!(cuModuleGetFunction(&mut function, module, name.as_ptr())) }
        .map_err(|error| invalid(format!("its text has no entry of this name: {error}"), String::new()))?;
    let mut threads = 0;
    // SAFETY: the function is of the module above; `threads` is a valid place for one number.
    unsafe {
        call!(cuFuncGetAttribute(&mut threads, CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function))
    }?;
    if kernel.threads_per_block() > threads as u64 {
        return Err(invalid(
            format!(
                "it asks for blocks of {} threads, but its registers allow {threads} on this GPU",
                kernel.threads_per_block()
            ),
            String::new(),
        ));
    }
    if kernel.shared_bytes > UNASKED_SHARED_BYTES {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of the module above.
        unsafe { call!(cuFuncSetAttribute(function, attribute, kernel.shared_bytes as i32)) }?;
    }
    Ok(Handle(function))
}
