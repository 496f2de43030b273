//! Memory on one device.

use bytemuck::Pod;

use crate::cuda;
use crate::host::HostBlock;
use crate::sim;
use crate::{Device, Error, Result};

/// A block of memory on one device. It returns to the device's pool when dropped.
pub struct Buffer {
    device: Device,
    storage: Storage,
}

enum Storage {
    Host(HostBlock),
    Cuda(cuda::Block),
    Sim(sim::Block),
}

impl Buffer {
    pub(crate) fn host(device: Device, block: HostBlock) -> Self {
        Self { device, storage: Storage::Host(block) }
    }

    pub(crate) fn cuda(device: Device, block: cuda::Block) -> Self {
        Self { device, storage: Storage::Cuda(block) }
    }

    pub(crate) fn sim(device: Device, block: sim::Block) -> Self {
        Self { device, storage: Storage::Sim(block) }
    }

    /// The block on a GPU, if it is there that the buffer lives.
    pub(crate) fn cuda_block(&self) -> Option<&cuda::Block> {
        match &self.storage {
            Storage::Cuda(block) => Some(block),
            Storage::Host(_) | Storage::Sim(_) => None,
        }
    }

    /// The block of the simulator, if it is there that the buffer lives.
    pub(crate) fn sim_block(&self) -> Option<&sim::Block> {
        match &self.storage {
            Storage::Sim(block) => Some(block),
            Storage::Host(_) | Storage::Cuda(_) => None,
        }
    }

    /// The device that owns the memory.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        match &self.storage {
            Storage::Host(block) => block.bytes().len(),
            Storage::Cuda(block) => block.bytes(),
            Storage::Sim(block) => block.bytes(),
        }
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The contents as elements of type `T`; host memory only.
    ///
    /// # Errors
    /// [`Error::NotOnHost`] on another device, [`Error::NotWholeElements`] when the length does not divide.
    pub fn as_slice<T: Pod>(&self) -> Result<&[T]> {
        match &self.storage {
            Storage::Host(block) => bytemuck::try_cast_slice(block.bytes())
                .map_err(|_| not_whole::<T>("reading a buffer", block.bytes().len())),
            Storage::Cuda(_) | Storage::Sim(_) => Err(not_on_host("reading a buffer in place", &self.device)),
        }
    }

    /// The contents as mutable elements of type `T`; host memory only.
    ///
    /// # Errors
    /// As [`Buffer::as_slice`].
    pub fn as_mut_slice<T: Pod>(&mut self) -> Result<&mut [T]> {
        match &mut self.storage {
            Storage::Host(block) => {
                let bytes = block.bytes().len();
                bytemuck::try_cast_slice_mut(block.bytes_mut()).map_err(|_| not_whole::<T>("writing a buffer", bytes))
            }
            Storage::Cuda(_) | Storage::Sim(_) => Err(not_on_host("writing a buffer in place", &self.device)),
        }
    }

    /// Overwrites the whole buffer with `bytes` from the host.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when the lengths differ; driver errors on a GPU.
    pub fn copy_from_host(&mut self, bytes: &[u8]) -> Result<()> {
        let buffer = self.len();
        if buffer != bytes.len() {
            return Err(Error::SizeMismatch { operation: "copying to a buffer", buffer, given: bytes.len() });
        }
        match &mut self.storage {
            Storage::Host(block) => block.bytes_mut().copy_from_slice(bytes),
            Storage::Cuda(block) => block.copy_from_host(bytes)?,
            Storage::Sim(block) => block.copy_from_host(bytes),
        }
        Ok(())
    }

    /// Copies the whole buffer into `bytes` on the host.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when the lengths differ; driver errors on a GPU.
    pub fn copy_to_host(&self, bytes: &mut [u8]) -> Result<()> {
        if self.len() != bytes.len() {
            return Err(Error::SizeMismatch {
                operation: "copying from a buffer",
                buffer: self.len(),
                given: bytes.len(),
            });
        }
        match &self.storage {
            Storage::Host(block) => bytes.copy_from_slice(block.bytes()),
            Storage::Cuda(block) => block.copy_to_host(bytes)?,
            Storage::Sim(block) => block.copy_to_host(bytes),
        }
        Ok(())
    }

    /// Overwrites the whole buffer with another one of the same device.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when the lengths differ, [`Error::NotOnHost`] when the devices do; driver errors.
    pub fn copy_from(&mut self, source: &Self) -> Result<()> {
        const OPERATION: &str = "copying between buffers";
        if self.len() != source.len() {
            return Err(Error::SizeMismatch { operation: OPERATION, buffer: self.len(), given: source.len() });
        }
        match (&mut self.storage, &source.storage) {
            (Storage::Host(block), Storage::Host(source)) => block.bytes_mut().copy_from_slice(source.bytes()),
            (Storage::Cuda(block), Storage::Cuda(source)) => block.copy_from(source)?,
            (Storage::Sim(block), Storage::Sim(source)) => block.copy_from(source),
            _ => return Err(not_on_host(OPERATION, &source.device)),
        }
        Ok(())
    }

    /// Sets every byte to zero.
    ///
    /// # Errors
    /// Driver errors on a GPU.
    pub fn set_zero(&mut self) -> Result<()> {
        match &mut self.storage {
            Storage::Host(block) => block.bytes_mut().fill(0),
            Storage::Cuda(block) => block.set_zero()?,
            Storage::Sim(block) => block.set_zero(),
        }
        Ok(())
    }
}

fn not_on_host(operation: &'static str, device: &Device) -> Error {
    Error::NotOnHost { operation, device: device.to_string() }
}

fn not_whole<T>(operation: &'static str, bytes: usize) -> Error {
    Error::NotWholeElements { operation, bytes, element: size_of::<T>() }
}
