//! The handle to a device.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use kernels_ptx::Kernel;

use crate::cuda::{self, CudaDevice, Graph, Stream};
use crate::host::HostPool;
use crate::record::{self, Recording};
use crate::sim::{self, GlobalMemory};
use crate::zeroed::{self, Zeroed};
use crate::{Buffer, Error, Function, Result};

/// What kind of device a [`Device`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The host's processor.
    Cpu,
    /// A GPU, by its number.
    Cuda(u32),
    /// The simulator: a GPU in software, which runs the same kernels and checks every access.
    Sim,
}

/// Bytes of device memory that this process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Bytes that buffers hold now.
    pub in_use: usize,
    /// The most bytes that buffers held at one time.
    pub peak: usize,
    /// Bytes taken from the system: in use and waiting in the pool.
    pub reserved: usize,
}

/// A cheap handle to a device; clones name the same device.
#[derive(Clone)]
pub struct Device {
    inner: Inner,
}

#[derive(Clone)]
enum Inner {
    Cpu(Arc<HostPool>),
    Cuda(&'static CudaDevice),
    Sim(Arc<GlobalMemory>),
}

impl Device {
    /// The host's processor. All handles share one memory pool.
    pub fn cpu() -> Self {
        static POOL: OnceLock<Arc<HostPool>> = OnceLock::new();
        Self { inner: Inner::Cpu(Arc::clone(POOL.get_or_init(Arc::default))) }
    }

    /// The GPU of this number. It is opened once per process; all handles share one memory pool and one home stream.
    ///
    /// # Errors
    /// Why there is no such GPU: no driver, no device of this number, or one that is too old or refuses.
    pub fn cuda(ordinal: u32) -> Result<Self> {
        Ok(Self { inner: Inner::Cuda(CudaDevice::open(ordinal)?) })
    }

    /// The handle to a GPU that is open.
    pub(crate) fn of_cuda(device: &'static CudaDevice) -> Self {
        Self { inner: Inner::Cuda(device) }
    }

    /// The simulator. All handles share one memory.
    pub fn sim() -> Self {
        static MEMORY: OnceLock<Arc<GlobalMemory>> = OnceLock::new();
        Self { inner: Inner::Sim(Arc::clone(MEMORY.get_or_init(Arc::default))) }
    }

    /// What kind of device this is.
    pub fn kind(&self) -> DeviceKind {
        match &self.inner {
            Inner::Cpu(_) => DeviceKind::Cpu,
            Inner::Cuda(device) => DeviceKind::Cuda(device.ordinal()),
            Inner::Sim(_) => DeviceKind::Sim,
        }
    }

    /// Whether the host can address this device's buffers.
    pub fn is_cpu(&self) -> bool {
        self.kind() == DeviceKind::Cpu
    }

    /// Whether the device runs kernels: a GPU, or the simulator of one.
    pub fn is_gpu(&self) -> bool {
        !self.is_cpu()
    }

    /// Bytes of shared memory that a block may ask for; none on the CPU.
    pub fn shared_bytes(&self) -> u32 {
        match &self.inner {
            Inner::Cpu(_) => 0,
            Inner::Cuda(device) => device.limits().shared_bytes,
            Inner::Sim(_) => sim::LIMITS.shared_bytes,
        }
    }

    /// A buffer of `bytes` bytes with unspecified contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device has no such block.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        match &self.inner {
            Inner::Cpu(pool) => Ok(Buffer::host(self.clone(), pool.take(bytes)?)),
            Inner::Cuda(device) => Ok(Buffer::cuda(self.clone(), device.allocate(bytes)?)),
            Inner::Sim(memory) => Ok(Buffer::sim(self.clone(), memory.allocate(bytes)?)),
        }
    }

    /// A buffer with a copy of `bytes`, which are free again when this returns. On a GPU the copy is only queued, on a
    /// stream of its own: it overlaps with work that is queued already, and whatever uses the buffer comes after it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; driver errors on a GPU.
    pub fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        match &self.inner {
            Inner::Cuda(device) => Ok(Buffer::cuda(self.clone(), device.upload(bytes)?)),
            _ => {
                let mut buffer = self.allocate(bytes.len())?;
                buffer.copy_from_host(bytes)?;
                Ok(buffer)
            }
        }
    }

    /// At least `bytes` bytes of zeros, for work on the home stream that leaves them zero: see [`Zeroed`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; driver errors on a GPU.
    pub fn zeroed(&self, bytes: usize) -> Result<Zeroed> {
        zeroed::take(self, bytes)
    }

    /// Whether this thread captures what it launches on the device.
    pub(crate) fn captures(&self) -> bool {
        match &self.inner {
            Inner::Cuda(device) => cuda::captures(device),
            Inner::Cpu(_) | Inner::Sim(_) => false,
        }
    }

    /// What this process holds of the device's memory.
    pub fn memory_usage(&self) -> MemoryUsage {
        match &self.inner {
            Inner::Cpu(pool) => pool.usage(),
            Inner::Cuda(device) => device.memory_usage(),
            Inner::Sim(memory) => memory.usage(),
        }
    }

    /// Starts a new measurement of [`MemoryUsage::peak`].
    pub fn reset_peak_memory(&self) {
        match &self.inner {
            Inner::Cpu(pool) => pool.reset_peak(),
            Inner::Cuda(device) => device.reset_peak_memory(),
            Inner::Sim(memory) => memory.reset_peak(),
        }
    }

    /// Gives memory that waits in the pool back to the system. A GPU finishes its queued work first.
    ///
    /// # Errors
    /// Driver errors, a fault of the queued work among them.
    pub fn trim_memory(&self) -> Result<()> {
        zeroed::trim(self);
        match &self.inner {
            Inner::Cpu(pool) => pool.trim(),
            Inner::Cuda(device) => device.trim_memory()?,
            Inner::Sim(memory) => memory.trim(),
        }
        Ok(())
    }

    /// Bytes of the GPU's memory that no process holds, and all its bytes.
    ///
    /// # Errors
    /// [`Error::NotAGpu`] on the CPU; driver errors.
    pub fn free_and_total_memory(&self) -> Result<(usize, usize)> {
        self.gpu("asking for device memory")?.free_and_total_memory()
    }

    /// Waits until all work queued on the device is done. The CPU and the simulator have none.
    ///
    /// # Errors
    /// A fault of that work, or another driver error.
    pub fn synchronize(&self) -> Result<()> {
        match &self.inner {
            Inner::Cpu(_) | Inner::Sim(_) => Ok(()),
            Inner::Cuda(device) => device.synchronize(),
        }
    }

    /// The GPU's home stream, on which everything queues that names no other.
    ///
    /// # Errors
    /// [`Error::NotAGpu`] on the CPU.
    pub fn home_stream(&self) -> Result<Stream> {
        Ok(self.gpu("a stream")?.home().clone())
    }

    /// A new stream on the GPU, for work that may overlap that of the home stream.
    ///
    /// # Errors
    /// [`Error::NotAGpu`] on the CPU; driver errors.
    pub fn new_stream(&self) -> Result<Stream> {
        Stream::new(self.gpu("a stream")?)
    }

    /// Runs `work` and captures what it launches, fills and copies from this thread on the GPU's home stream, instead of
    /// running it: the graph does it as often as it is replayed, with one call and on the same memory. Buffers that `work`
    /// allocates are the graph's; those that it returns hold the results of the last replay.
    ///
    /// # Errors
    /// What `work` returns; [`Error::NotAGpu`] elsewhere than on a GPU, [`Error::Capturing`] within another capture, driver
    /// errors.
    pub fn capture<T, E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(Graph, T), E> {
        cuda::capture(self.gpu("capturing launches")?, work)
    }

    /// Records every launch on the device until the recording is dropped. The CPU launches nothing: its record stays
    /// empty.
    ///
    /// # Errors
    /// [`Error::AlreadyRecording`] while another recording of the device lives; driver errors.
    pub fn record_launches(&self) -> Result<Recording> {
        let source = match &self.inner {
            Inner::Cpu(_) => record::Source::Nobody,
            Inner::Cuda(device) => record::Source::Gpu(device),
            Inner::Sim(_) => record::Source::Simulator,
        };
        Recording::start(source, self)
    }

    /// The kernel, compiled for the GPU by its driver, or decoded by the simulator, the first time it is asked for.
    ///
    /// # Errors
    /// [`Error::NotAGpu`] on the CPU, [`Error::Launch`] when the GPU cannot run such a kernel, [`Error::Module`] with the
    /// compiler's log when the text is wrong, [`Error::Simulator`] for a text that the simulator does not understand;
    /// driver errors.
    pub fn load(&self, kernel: &Kernel) -> Result<Function> {
        match &self.inner {
            Inner::Sim(memory) => Ok(Function::sim(sim::Function::load(memory, kernel)?)),
            _ => Ok(Function::cuda(cuda::Function::load(self.gpu("loading a kernel")?, kernel)?)),
        }
    }

    fn gpu(&self, operation: &'static str) -> Result<&'static CudaDevice> {
        match &self.inner {
            Inner::Cpu(_) | Inner::Sim(_) => Err(Error::NotAGpu { operation, device: self.to_string() }),
            Inner::Cuda(device) => Ok(device),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// `cpu`, `cuda:N` (`cuda` is `cuda:0`), `sim`, or `auto`: the first GPU, or the CPU where none can be used.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Self::cpu()),
            "cuda" => Self::cuda(0),
            "sim" => Ok(Self::sim()),
            "auto" => Ok(Self::cuda(0).unwrap_or_else(|_| Self::cpu())),
            _ => match name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()) {
                Some(ordinal) => Self::cuda(ordinal),
                None => Err(Error::UnknownDevice { name: name.to_owned() }),
            },
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            DeviceKind::Cpu => formatter.write_str("cpu"),
            DeviceKind::Cuda(ordinal) => write!(formatter, "cuda:{ordinal}"),
            DeviceKind::Sim => formatter.write_str("sim"),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Device({self})")
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        self.kind() == other.kind()
    }
}

impl Eq for Device {}
