//! CUDA devices, through the driver.
//!
//! Everything below is asynchronous and ordered: each device has one *home stream* on which copies, fills and launches
//! queue, and more [`Stream`]s on request. Whatever stream a buffer is used on, it sees the work in the order in which
//! the program asked for it; memory that returns to the pool is not handed on before that work is done with it.
//!
//! - [`Stream`] and [`Event`]: the order of work and its times.
//! - [`Graph`]: launches that are captured once and replayed with one call.
//! - Copies go through page-locked memory; uploads may overlap with work ([`crate::Device::upload`]).
//! - Machine code is kept on disk, one file per kernel text, GPU model and driver.
//! - Once a fault has lost the context, every operation says so and names the first cause
//!   ([`crate::Error::DeviceLost`]).
//! - Nothing panics when it is dropped, whatever the driver answers.
//!
//! The driver's functions come from `cust`'s bindings (`cust::sys`), called by `driver::call!`. `cust`'s own wrappers are not
//! used for them: they fold codes that are newer than CUDA 11.4 into one, drop the name of the call that failed, and
//! leave some return codes unread.

mod cache;
mod compile;
mod device;
mod driver;
#[cfg(test)]
mod fake;
mod graph;
mod health;
mod information;
mod launch;
mod memory;
mod module;
mod pool;
mod recorder;
mod staging;
mod stream;
mod symbols;
#[cfg(test)]
mod tests;
mod uploads;

pub use graph::Graph;
pub(crate) use graph::{capture, captures};
pub use information::{CudaDeviceInformation, devices};
pub use stream::{Event, Stream};

pub(crate) use device::CudaDevice;
pub(crate) use memory::Block;
pub(crate) use module::Function;

/// A handle that the driver gave out.
struct Handle<T>(*mut T);

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Handle<T> {}

// SAFETY: the driver's functions may be called from any thread with any handle; the pointer is never read here.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}
