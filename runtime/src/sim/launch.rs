//! Kernels on the simulated device.

use std::sync::Arc;

use kernels_ptx::Kernel;

use super::{Fault, GlobalMemory};
use crate::launch::{check_kernel, check_launch};
use crate::{Argument, Error, Limits, Result};

/// What the simulated device can launch: as much as a GPU of compute capability 8.0.
const LIMITS: Limits = Limits {
    compute_capability: (8, 0),
    threads_per_block: 1024,
    block: [1024, 1024, 64],
    grid: [i32::MAX as u32, 65_535, 65_535],
    shared_bytes: 163 << 10,
};

/// A kernel that is loaded in the simulator. Clones are the same function.
#[derive(Clone)]
pub(crate) struct Function {
    kernel: Arc<Kernel>,
}

impl Function {
    /// The kernel in the simulator.
    ///
    /// # Errors
    /// [`Error::Launch`] for a kernel that no such device runs.
    pub(crate) fn load(_: &Arc<GlobalMemory>, kernel: &Kernel) -> Result<Self> {
        check_kernel(kernel, &LIMITS)?;
        Ok(Self { kernel: Arc::new(kernel.clone()) })
    }

    /// What the function was loaded from.
    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Runs the function.
    ///
    /// # Errors
    /// [`Error::Launch`] when arguments or grid do not fit the kernel's description.
    pub(crate) fn launch(&self, grid: [u32; 3], arguments: &[Argument<'_>]) -> Result<()> {
        check_launch(&self.kernel, grid, arguments, &LIMITS)?;
        Err(Error::Simulator(Box::new(Fault {
            kernel: self.kernel.name.clone(),
            line: 0,
            source: String::new(),
            place: None,
            problem: "the simulator does not run kernels yet".to_owned(),
        })))
    }
}
