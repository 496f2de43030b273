//! What can go wrong below the tensors.

/// Result of a runtime operation.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a device, its memory or its driver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device was named in a way that no device is.
    #[error("unknown device \"{name}\": expected cpu, cuda:N (for example cuda:0) or auto")]
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
}
