//! One GPU: its context, home stream, memory and modules.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cust::sys::{self, CUdevice_attribute as Attribute};
use kernels_ptx::Target;

use super::driver::{self, OUT_OF_MEMORY, call};
use super::module::LoadedFunctions;
use super::pool::{Pool, Source};
use super::{Block, Handle, Limits, Stream, information};
use crate::{Error, MemoryUsage, Result};

/// An opened GPU. There is one per ordinal and process, and it lives as long as the process: so does everything that its
/// context holds.
pub(crate) struct CudaDevice {
    ordinal: u32,
    context: Handle<sys::CUctx_st>,
    limits: Limits,
    /// The stream on which everything queues that names no other.
    home: Handle<sys::CUstream_st>,
    home_stream: OnceLock<Stream>,
    pool: Mutex<Pool>,
    functions: Mutex<LoadedFunctions>,
}

impl CudaDevice {
    /// The GPU of this number; the first call retains its primary context.
    ///
    /// # Errors
    /// Why there is no such GPU, or why it cannot be used.
    pub(crate) fn open(ordinal: u32) -> Result<&'static Self> {
        static OPENED: Mutex<BTreeMap<u32, &'static CudaDevice>> = Mutex::new(BTreeMap::new());
        let mut opened = lock(&OPENED);
        if let Some(device) = opened.get(&ordinal) {
            return Ok(device);
        }
        driver::load()?;
        let count = information::count()?;
        if ordinal >= count {
            return Err(Error::NoSuchGpu { ordinal, count });
        }
        let device: &'static Self = Box::leak(Box::new(Self::new(ordinal)?));
        opened.insert(ordinal, device);
        Ok(device)
    }

    fn new(ordinal: u32) -> Result<Self> {
        let device = information::handle(ordinal)?;
        let limits = limits(device)?;
        if !Target::Sm80.runs_on(limits.compute_capability) {
            return Err(Error::GpuTooOld {
                name: information::name(device)?,
                compute_capability: limits.compute_capability,
            });
        }
        let mut context = ptr::null_mut();
        // SAFETY: `context` is a valid place for a handle; it stays retained as long as the process lives.
        unsafe { call!(cuDevicePrimaryCtxRetain(&mut context, device)) }?;
        // SAFETY: the context was retained just now.
        unsafe { call!(cuCtxSetCurrent(context)) }?;
        let mut home = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `home` is a valid place for a handle; a context is current.
        unsafe { call!(cuStreamCreate(&mut home, flags)) }?;
        Ok(Self {
            ordinal,
            context: Handle(context),
            limits,
            home: Handle(home),
            home_stream: OnceLock::new(),
            pool: Mutex::default(),
            functions: Mutex::new(HashMap::new()),
        })
    }

    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Makes the device's context the calling thread's, as every driver call below needs it.
    pub(super) fn activate(&self) -> Result<()> {
        // SAFETY: the context stays retained as long as the process lives.
        unsafe { call!(cuCtxSetCurrent(self.context.0)) }
    }

    /// The home stream.
    pub(crate) fn home(&'static self) -> &'static Stream {
        self.home_stream.get_or_init(|| Stream::home(self, self.home))
    }

    pub(super) fn functions(&self) -> MutexGuard<'_, LoadedFunctions> {
        lock(&self.functions)
    }

    /// Waits for all work on all streams of the device.
    ///
    /// # Errors
    /// A fault of that work.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.activate()?;
        // SAFETY: waits for the current context; no arguments.
        unsafe { call!(cuCtxSynchronize()) }
    }

    /// Memory of `bytes` bytes with unspecified contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or a driver error.
    pub(crate) fn allocate(&'static self, bytes: usize) -> Result<Block> {
        self.activate()?;
        let taken = lock(&self.pool).take(bytes, &mut DriverMemory)?;
        match taken {
            Some(address) => Ok(Block::new(self, address, bytes)),
            None => Err(self.out_of_memory(bytes)),
        }
    }

    /// Takes memory back. All work that uses it is on the home stream or was waited for there.
    pub(super) fn put_back(&self, address: u64) {
        lock(&self.pool).put_back(address);
    }

    pub(crate) fn memory_usage(&self) -> MemoryUsage {
        lock(&self.pool).usage()
    }

    pub(crate) fn reset_peak_memory(&self) {
        lock(&self.pool).reset_peak();
    }

    /// Gives unused memory back to the driver, after all queued work is done.
    pub(crate) fn trim_memory(&self) -> Result<()> {
        self.activate()?;
        lock(&self.pool).trim(&mut DriverMemory)
    }

    /// Bytes of the device that nobody holds, and all its bytes.
    pub(crate) fn free_and_total_memory(&self) -> Result<(usize, usize)> {
        self.activate()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both places are valid and a context is current.
        unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok((free, total))
    }

    fn out_of_memory(&self, requested: usize) -> Error {
        let usage = self.memory_usage();
        let (free, total) = match self.free_and_total_memory() {
            Ok(sizes) => sizes,
            Err(error) => return error,
        };
        let others = total.saturating_sub(free).saturating_sub(usage.reserved);
        Error::OutOfMemory {
            device: self.to_string(),
            requested,
            in_use: usage.in_use,
            peak: usage.peak,
            advice: format!(
                "the pool has reserved {} bytes, and {free} of the GPU's {total} bytes are free ({others} belong to the \
                 driver and to other processes); a smaller batch or sequence, checkpointing of activations or ending \
                 other processes on the GPU (see nvidia-smi) would help",
                usage.reserved
            ),
        }
    }
}

impl fmt::Display for CudaDevice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "cuda:{}", self.ordinal)
    }
}

/// The pool's source: the driver. The caller has made a context current.
struct DriverMemory;

impl Source for DriverMemory {
    fn reserve(&mut self, bytes: usize) -> Result<Option<u64>> {
        let mut address = 0;
        // SAFETY: `address` is a valid place for one address; a context is current.
        match unsafe { call!(cuMemAlloc_v2(&mut address, bytes)) } {
            Ok(()) => Ok(Some(address)),
            Err(Error::Driver { code: OUT_OF_MEMORY, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn release(&mut self, addresses: &[u64]) -> Result<()> {
        // SAFETY: waits for all work of the current context; no arguments.
        unsafe { call!(cuCtxSynchronize()) }?;
        for &address in addresses {
            // SAFETY: the address came from cuMemAlloc, the pool gives it back once, and the work that used it is done.
            unsafe { call!(cuMemFree_v2(address)) }?;
        }
        Ok(())
    }
}

fn limits(device: sys::CUdevice) -> Result<Limits> {
    let attribute = |attribute| information::attribute(device, attribute);
    Ok(Limits {
        compute_capability: information::compute_capability(device)?,
        threads_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        block: [
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z)?,
        ],
        grid: [
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z)?,
        ],
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// Locks what only plain bookkeeping is done under: a panic elsewhere leaves it whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
