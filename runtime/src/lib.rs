//! Devices, memory, streams, modules and launches.
//!
//! This crate knows bytes and kernels. It does not know tensors, gradients or models.
//!
//! - [`Device`] is a cheap handle: the CPU, a CUDA device reached through the driver, or the simulator of one ([`sim`]).
//! - [`Buffer`] is memory on one device. It comes from the device's pool and returns there when dropped.
//! - [`Zeroed`] is memory that kernels find zero and leave zero.
//! - [`MemoryUsage`] says what a device's pool holds now and held at most.

mod buffer;
pub mod cuda;
mod device;
mod error;
mod function;
mod host;
mod launch;
pub mod matrix;
mod nvtx;
mod prefetch;
mod record;
pub mod sim;
mod table;
mod zeroed;

pub use buffer::Buffer;
pub use device::{Device, DeviceKind, MemoryUsage};
pub use error::{Error, Result};
pub use function::Function;
pub use launch::{Argument, Limits, check_launch};
pub use prefetch::prefetch;
pub use record::{LaunchRecord, RangeGuard, Recording, open_range, range};
pub use table::{Table, Word};
pub use zeroed::Zeroed;
