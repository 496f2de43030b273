//! A kernel that is loaded on a device.

use kernels_ptx::Kernel;

use crate::cuda::{self, Stream};
use crate::{Argument, Error, Result};
use crate::{record, sim};

/// A kernel that is loaded on a device. Clones are the same function.
#[derive(Clone)]
pub struct Function {
    inner: Inner,
}

#[derive(Clone)]
enum Inner {
    Cuda(cuda::Function),
    Sim(sim::Function),
}

impl Function {
    pub(crate) fn cuda(function: cuda::Function) -> Self {
        Self { inner: Inner::Cuda(function) }
    }

    pub(crate) fn sim(function: sim::Function) -> Self {
        Self { inner: Inner::Sim(function) }
    }

    /// What the function was loaded from.
    pub fn kernel(&self) -> &Kernel {
        match &self.inner {
            Inner::Cuda(function) => function.kernel(),
            Inner::Sim(function) => function.kernel(),
        }
    }

    /// Queues the function with `grid` blocks in x, y and z, behind all work of the device's home stream. A grid with a
    /// zero in it is no work: the arguments are checked and nothing is queued. The simulator has run it when this returns.
    ///
    /// # Errors
    /// [`Error::Launch`](crate::Error::Launch) when arguments or grid do not fit the kernel's description (nothing is
    /// queued then); driver errors; [`Error::Simulator`](crate::Error::Simulator) with the first fault found there.
    pub fn launch(&self, grid: [u32; 3], arguments: &[Argument<'_>]) -> Result<()> {
        self.queue(grid, arguments, None)
    }

    /// As [`Function::launch`]; `sizes` are the problem's, as the kernel's description names them, for the profiler.
    ///
    /// # Errors
    /// As [`Function::launch`].
    pub fn launch_sized(&self, grid: [u32; 3], arguments: &[Argument<'_>], sizes: &[u64]) -> Result<()> {
        self.queue(grid, arguments, Some(sizes))
    }

    /// Queues the function on another stream of its GPU. Buffers are safe there: the work waits for everything queued
    /// on the home stream, and later work elsewhere that uses one of the buffers waits for this.
    ///
    /// # Errors
    /// As [`Function::launch`]; [`Error::Launch`](crate::Error::Launch) for a stream of another device, as every stream is
    /// for the simulator.
    pub fn launch_on(&self, stream: &Stream, grid: [u32; 3], arguments: &[Argument<'_>]) -> Result<()> {
        match &self.inner {
            Inner::Cuda(function) => function.launch_on(stream, grid, arguments),
            Inner::Sim(function) => Err(Error::Launch {
                kernel: function.kernel().name.clone(),
                reason: "it is loaded on sim, but the stream is of a GPU".to_owned(),
            }),
        }
    }

    fn queue(&self, grid: [u32; 3], arguments: &[Argument<'_>], sizes: Option<&[u64]>) -> Result<()> {
        match &self.inner {
            Inner::Cuda(function) => function.launch(grid, arguments, sizes),
            Inner::Sim(function) => {
                record::SIMULATOR.launch(function.kernel(), grid, sizes, || function.launch(grid, arguments))
            }
        }
    }
}
