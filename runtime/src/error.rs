//! What can go wrong below the tensors.

use crate::sim::Fault;

/// Result of a runtime operation.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a device, its memory or its driver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device was named in a way that no device is.
    #[error("unknown device \"{name}\": expected cpu, cuda:N (for example cuda:0), sim or auto")]
    UnknownDevice {
        /// The name as given.
        name: String,
    },
    /// Two byte counts that must agree do not.
    #[error("{operation}: the buffer holds {buffer} bytes but {given} bytes were given")]
    SizeMismatch {
        /// What was attempted.
        operation: &'static str,
        /// Bytes of the buffer.
        buffer: usize,
        /// Bytes of the other side.
        given: usize,
    },
    /// Bytes cannot be read as elements of the requested type.
    #[error("{operation}: {bytes} bytes are no whole number of {element}-byte elements")]
    NotWholeElements {
        /// What was attempted.
        operation: &'static str,
        /// Bytes of the buffer.
        bytes: usize,
        /// Bytes of one element.
        element: usize,
    },
    /// Host access to memory of a device that the host cannot address.
    #[error("{operation} needs host memory, but the buffer lives on {device}: copy it to the host first")]
    NotOnHost {
        /// What was attempted.
        operation: &'static str,
        /// The device that owns the buffer.
        device: String,
    },
    /// More memory was asked for than there is.
    #[error(
        "out of memory on {device}: {requested} bytes were requested while {in_use} bytes are in use (peak {peak}); {advice}"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes requested.
        requested: usize,
        /// Bytes in use by this process on the device.
        in_use: usize,
        /// Highest number of bytes in use so far.
        peak: usize,
        /// What would help.
        advice: String,
    },
    /// The NVIDIA driver is not installed.
    #[error(
        "no GPU: the NVIDIA driver's library {library} cannot be opened ({reason}); install the driver or use --device cpu"
    )]
    NoDriver {
        /// The library's name.
        library: &'static str,
        /// What the dynamic loader said.
        reason: String,
    },
    /// There is no GPU of the number asked for.
    #[error("there is no cuda:{ordinal}: the driver shows {count} GPUs, numbered from 0; `grafter devices` lists them")]
    NoSuchGpu {
        /// The number asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// A GPU that the kernels are not written for.
    #[error(
        "{name} has compute capability {}.{}; the kernels need 8.0 or newer: use --device cpu",
        compute_capability.0, compute_capability.1
    )]
    GpuTooOld {
        /// The product's name.
        name: String,
        /// Its compute capability (major, minor).
        compute_capability: (u32, u32),
    },
    /// A call of the CUDA driver failed. Work that was queued earlier may be the cause.
    #[error("CUDA driver call {call} failed with {name} ({code}): {advice}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The code that it returned.
        code: u32,
        /// The code's name.
        name: String,
        /// What the user can do.
        advice: &'static str,
    },
    /// A GPU's context is lost: nothing on it works until the process is started again. Every operation after the loss
    /// says so, and names the first cause.
    #[error("{device} is lost: {cause}{unfinished}")]
    DeviceLost {
        /// The device.
        device: String,
        /// The first failure, with its call, its code and, where it is known, the kernel.
        cause: String,
        /// Kernels that may have caused it; empty when there are none.
        unfinished: String,
    },
    /// Something that a graph cannot hold, asked for by a thread that captures launches.
    #[error("{operation} cannot be part of a graph: do it before the launches are captured, or after")]
    Capturing {
        /// What was attempted.
        operation: &'static str,
    },
    /// Launches on a device are being recorded already.
    #[error("launches on {device} are being recorded already: that recording must end first")]
    AlreadyRecording {
        /// The device.
        device: String,
    },
    /// A kernel's text does not load.
    #[error("kernel {kernel} cannot be loaded: {cause}{}{log}", if log.is_empty() { "" } else { "\n" })]
    Module {
        /// The kernel's name.
        kernel: String,
        /// What went wrong.
        cause: String,
        /// What the driver's compiler said; empty when it said nothing.
        log: String,
    },
    /// A launch that does not fit the kernel's description or the GPU. Nothing was queued.
    #[error("kernel {kernel} was not launched: {reason}")]
    Launch {
        /// The kernel's name.
        kernel: String,
        /// What was expected and what was given.
        reason: String,
    },
    /// The simulator does not understand a kernel's text, or found a fault while running it.
    #[error("{0}")]
    Simulator(Box<Fault>),
    /// Something that only a GPU does was asked of another device.
    #[error("{operation} needs a GPU, but the device is {device}: `grafter devices` lists the GPUs")]
    NotAGpu {
        /// What was attempted.
        operation: &'static str,
        /// The device.
        device: String,
    },
}
