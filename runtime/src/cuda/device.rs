//! One GPU: its context, home stream, memory and modules.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cust::sys::{self, CUdevice_attribute as Attribute};
use kernels_ptx::Target;

use super::cache::{self, Cache};
use super::driver::{self, OUT_OF_MEMORY, call};
use super::health::Health;
use super::module::LoadedFunctions;
use super::pool::{Pool, Source};
use super::recorder::Recorder;
use super::staging::Ring;
use super::stream::Queue;
use super::uploads::Uploads;
use super::{Block, Handle, Stream, graph, information};
use crate::{Device, Error, Limits, MemoryUsage, Result, zeroed};

/// The first CUDA whose graphs hold launches that overlap.
const OVERLAPS_IN_GRAPHS: (u32, u32) = (12, 3);

/// An opened GPU. There is one per ordinal and process, and it lives as long as the process: so does everything that its
/// context holds.
pub(crate) struct CudaDevice {
    ordinal: u32,
    context: Context,
    health: Health,
    limits: Limits,
    overlaps_launches: bool,
    /// The stream on which everything queues that names no other.
    home: Handle<sys::CUstream_st>,
    home_stream: OnceLock<Stream>,
    pool: Mutex<Pool>,
    /// Page-locked memory for copies on the home stream, for copies to the host, and for uploads.
    to_device: Mutex<Ring>,
    to_host: Mutex<Ring>,
    ahead: Mutex<Ring>,
    uploads: Mutex<Uploads>,
    whole: Mutex<()>,
    recorder: Recorder,
    functions: Mutex<LoadedFunctions>,
    cache: Cache,
}

impl CudaDevice {
    /// The GPU of this number; the first call retains its primary context.
    ///
    /// # Errors
    /// Why there is no such GPU, or why it cannot be used.
    pub(crate) fn open(ordinal: u32) -> Result<&'static Self> {
        Self::open_with(ordinal, cache::folder)
    }

    /// The same, with a function that names the folder for machine code.
    pub(super) fn open_with(ordinal: u32, cache: impl FnOnce() -> Option<PathBuf>) -> Result<&'static Self> {
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
        let device: &'static Self = Box::leak(Box::new(Self::new(ordinal, cache())?));
        opened.insert(ordinal, device);
        Ok(device)
    }

    fn new(ordinal: u32, cache: Option<PathBuf>) -> Result<Self> {
        let device = information::handle(ordinal)?;
        let limits = limits(device)?;
        let name = information::name(device)?;
        if !Target::Sm80.runs_on(limits.compute_capability) {
            return Err(Error::GpuTooOld { name, compute_capability: limits.compute_capability });
        }
        let (cuda, driver) = (information::cuda_version()?, information::driver_version().unwrap_or_default());
        let capability = limits.compute_capability;
        let compiler = format!("{name}, compute capability {capability:?}, CUDA {cuda:?}, driver {driver}");
        let context = Context::retain(device)?;
        // SAFETY: the context was retained just now.
        unsafe { call!(cuCtxSetCurrent(context.raw.0)) }?;
        let mut home = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `home` is a valid place for a handle; a context is current.
        unsafe { call!(cuStreamCreate(&mut home, flags)) }?;
        Ok(Self {
            ordinal,
            context,
            health: Health::default(),
            limits,
            overlaps_launches: capability >= (9, 0) && cuda >= OVERLAPS_IN_GRAPHS,
            home: Handle(home),
            home_stream: OnceLock::new(),
            pool: Mutex::default(),
            to_device: Mutex::default(),
            to_host: Mutex::default(),
            ahead: Mutex::default(),
            uploads: Mutex::default(),
            whole: Mutex::default(),
            recorder: Recorder::default(),
            functions: Mutex::new(HashMap::new()),
            cache: Cache::new(cache, compiler),
        })
    }

    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether a launch may begin while the one before it still runs ([`kernels_ptx::Kernel::overlapping_text`]).
    pub(super) fn overlaps_launches(&self) -> bool {
        self.overlaps_launches
    }

    /// Makes the device's context the calling thread's, as every driver call below needs it.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] with the first cause once the context is lost, or a driver error.
    pub(super) fn activate(&self) -> Result<()> {
        self.health.check(self)?;
        // SAFETY: the context stays retained as long as the device is there.
        unsafe { call!(on self, cuCtxSetCurrent(self.context.raw.0)) }
    }

    /// Makes the context current for giving something back; whether there is anything to give back. Of a lost context all
    /// is gone. Where the context cannot be made current, the call itself may still find it.
    pub(super) fn activate_to_drop(&self) -> bool {
        let _ = self.activate();
        !self.health.is_lost()
    }

    /// The result of a driver call on the device's context, as [`Health::judge`] sees it.
    pub(super) fn checked(&self, result: Result<()>) -> Result<()> {
        self.health.judge(self, result, None)
    }

    pub(crate) fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// Compiled kernels on disk.
    pub(super) fn cache(&self) -> &Cache {
        &self.cache
    }

    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    /// The home stream.
    pub(crate) fn home(&'static self) -> &'static Stream {
        self.home_stream.get_or_init(|| Stream::home(self, self.home))
    }

    /// The stream on which this thread's work queues: the home stream, or that of its capture.
    pub(super) fn queue_here(&'static self) -> Arc<Queue> {
        match graph::current(self) {
            Some(capture) => Arc::clone(capture.queue()),
            None => Arc::clone(self.home().queue()),
        }
    }

    /// Keeps captures and waits for the whole context apart: the driver refuses the one during the other.
    pub(super) fn whole(&self) -> MutexGuard<'_, ()> {
        lock(&self.whole)
    }

    pub(super) fn functions(&self) -> MutexGuard<'_, LoadedFunctions> {
        lock(&self.functions)
    }

    /// Waits for all work on all streams of the device.
    ///
    /// # Errors
    /// A fault of that work.
    pub(crate) fn synchronize(&self) -> Result<()> {
        graph::refuse("waiting for the device")?;
        self.activate()?;
        let _no_capture = self.whole();
        let before = self.health.now();
        // SAFETY: waits for the current context; no arguments.
        unsafe { call!(on self, cuCtxSynchronize()) }?;
        self.health.finished(None, before);
        Ok(())
    }

    /// Memory of `bytes` bytes with unspecified contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or a driver error.
    pub(crate) fn allocate(&'static self, bytes: usize) -> Result<Block> {
        self.activate()?;
        if let Some(capture) = graph::current(self) {
            return capture.allocate(bytes)?.ok_or_else(|| self.out_of_memory(bytes));
        }
        Ok(Block::of_pool(self, self.take(bytes)?, bytes))
    }

    /// A copy of `source` in memory of its own. It is queued on a stream beside the home stream, so that it overlaps with
    /// work that is queued already; whatever uses the memory comes after it. Returns when `source` is free again.
    ///
    /// # Errors
    /// As [`CudaDevice::allocate`].
    pub(crate) fn upload(&'static self, source: &[u8]) -> Result<Block> {
        graph::refuse("an upload")?;
        self.upload_now(source)
    }

    /// The same, and during a capture, too: the copy is queued now, and is no part of the graph, for what the graph finds
    /// there in every replay.
    ///
    /// # Errors
    /// As [`CudaDevice::allocate`].
    pub(super) fn upload_now(&'static self, source: &[u8]) -> Result<Block> {
        self.activate()?;
        let stream = self.uploads().stream(self)?;
        let queue = stream.queue();
        let kept = self.uploads().take(source.len(), &stream)?;
        let block = match kept {
            Some(address) => Block::of_upload(self, address, source.len(), queue),
            None => {
                let block = Block::of_upload(self, self.take(source.len())?, source.len(), queue);
                // The pool's blocks are in order on the home stream alone.
                queue.after(self.home().queue())?;
                block
            }
        };
        lock(&self.ahead).upload(source, block.address(), queue)?;
        block.uploaded(queue.mark()?);
        Ok(block)
    }

    /// The upload stream and its memory.
    pub(super) fn uploads(&self) -> MutexGuard<'_, Uploads> {
        lock(&self.uploads)
    }

    /// Page-locked memory for copies to the device on the home stream.
    pub(super) fn to_device(&self) -> &Mutex<Ring> {
        &self.to_device
    }

    /// Page-locked memory for copies to the host.
    pub(super) fn to_host(&self) -> &Mutex<Ring> {
        &self.to_host
    }

    /// The address of a block of the pool.
    fn take(&'static self, bytes: usize) -> Result<u64> {
        self.take_if_there(bytes)?.ok_or_else(|| self.out_of_memory(bytes))
    }

    /// The same; `None` when there is no such block, whatever is given up for it.
    pub(super) fn take_if_there(&'static self, bytes: usize) -> Result<Option<u64>> {
        self.activate()?;
        let take = || lock(&self.pool).take(bytes, &mut DriverMemory { device: self });
        let mut taken = take()?;
        if taken.is_none() && self.give_up_uploads() {
            taken = take()?;
        }
        if taken.is_none() && zeroed::trim(&Device::of_cuda(self)) {
            taken = take()?;
        }
        Ok(taken)
    }

    /// Takes memory back. All work that uses it is on the home stream or was waited for there.
    pub(super) fn put_back(&self, address: u64) {
        lock(&self.pool).put_back(address);
    }

    /// Takes memory of an upload back, under the same condition, for the next upload.
    pub(super) fn put_back_uploaded(&'static self, address: u64, bytes: usize) {
        let counted = lock(&self.pool).bytes_of(address);
        let given_up = self.uploads().keep(self, address, bytes, counted);
        given_up.into_iter().for_each(|address| self.put_back(address));
    }

    /// Gives memory that is kept for uploads back to the pool; whether there was any.
    fn give_up_uploads(&self) -> bool {
        let given_up = self.uploads().give_up();
        let any = !given_up.is_empty();
        given_up.into_iter().for_each(|address| self.put_back(address));
        any
    }

    pub(crate) fn memory_usage(&self) -> MemoryUsage {
        let kept = self.uploads().bytes();
        let usage = lock(&self.pool).usage();
        MemoryUsage { in_use: usage.in_use.saturating_sub(kept), ..usage }
    }

    pub(crate) fn reset_peak_memory(&self) {
        lock(&self.pool).reset_peak();
    }

    /// Gives unused memory back to the driver, after all queued work is done.
    pub(crate) fn trim_memory(&'static self) -> Result<()> {
        self.activate()?;
        for ring in [&self.to_device, &self.to_host, &self.ahead] {
            lock(ring).settle()?;
        }
        self.give_up_uploads();
        lock(&self.pool).trim(&mut DriverMemory { device: self })
    }

    /// Bytes of the device that nobody holds, and all its bytes.
    pub(crate) fn free_and_total_memory(&self) -> Result<(usize, usize)> {
        self.activate()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both places are valid and a context is current.
        unsafe { call!(on self, cuMemGetInfo_v2(&mut free, &mut total)) }?;
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

/// A GPU's primary context, held until this is dropped.
struct Context {
    raw: Handle<sys::CUctx_st>,
    device: sys::CUdevice,
}

impl Context {
    fn retain(device: sys::CUdevice) -> Result<Self> {
        let mut context = ptr::null_mut();
        // SAFETY: `context` is a valid place for a handle.
        unsafe { call!(cuDevicePrimaryCtxRetain(&mut context, device)) }?;
        Ok(Self { raw: Handle(context), device })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // The device could not be opened, and that is the error to report.
        // SAFETY: the context was retained once, and nothing is left that uses it.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }
}

/// The pool's source: the driver. The caller has made the device's context current.
struct DriverMemory {
    device: &'static CudaDevice,
}

impl Source for DriverMemory {
    fn reserve(&mut self, bytes: usize) -> Result<Option<u64>> {
        let mut address = 0;
        // SAFETY: `address` is a valid place for one address; a context is current.
        match unsafe { call!(on self.device, cuMemAlloc_v2(&mut address, bytes)) } {
            Ok(()) => Ok(Some(address)),
            Err(Error::Driver { code: OUT_OF_MEMORY, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn settle(&mut self) -> Result<()> {
        // Blocks come back once their work is in order on the home stream.
        self.device.home().synchronize()
    }

    fn release(&mut self, address: u64) -> Result<()> {
        // SAFETY: the address came from cuMemAlloc, the pool gives it back once, and the work that used it is done.
        unsafe { call!(on self.device, cuMemFree_v2(address)) }
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
