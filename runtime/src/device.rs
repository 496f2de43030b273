//! The handle to a device.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use crate::host::HostPool;
use crate::{Buffer, Error, Result};

/// What kind of device a [`Device`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The host's processor.
    Cpu,
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
}

impl Device {
    /// The host's processor. All handles share one memory pool.
    pub fn cpu() -> Self {
        static POOL: OnceLock<Arc<HostPool>> = OnceLock::new();
        Self { inner: Inner::Cpu(Arc::clone(POOL.get_or_init(Arc::default))) }
    }

    /// What kind of device this is.
    pub fn kind(&self) -> DeviceKind {
        match self.inner {
            Inner::Cpu(_) => DeviceKind::Cpu,
        }
    }

    /// Whether the host can address this device's buffers.
    pub fn is_cpu(&self) -> bool {
        self.kind() == DeviceKind::Cpu
    }

    /// A buffer of `bytes` bytes with unspecified contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device has no such block.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        match &self.inner {
            Inner::Cpu(pool) => Ok(Buffer::host(self.clone(), pool.take(bytes)?)),
        }
    }

    /// What this process holds of the device's memory.
    pub fn memory_usage(&self) -> MemoryUsage {
        match &self.inner {
            Inner::Cpu(pool) => pool.usage(),
        }
    }

    /// Starts a new measurement of [`MemoryUsage::peak`].
    pub fn reset_peak_memory(&self) {
        match &self.inner {
            Inner::Cpu(pool) => pool.reset_peak(),
        }
    }

    /// Gives memory that waits in the pool back to the system.
    pub fn trim_memory(&self) {
        match &self.inner {
            Inner::Cpu(pool) => pool.trim(),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// `cpu`, or `auto` for the best device there is.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "cpu" | "auto" => Ok(Self::cpu()),
            _ => Err(Error::UnknownDevice { name: name.to_owned() }),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            DeviceKind::Cpu => formatter.write_str("cpu"),
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
