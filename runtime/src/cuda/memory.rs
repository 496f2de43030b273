//! Memory of a GPU, and copies to and from it.

use std::sync::{Arc, Mutex};

use super::CudaDevice;
use super::device::lock;
use super::driver::call;
use super::stream::Queue;
use crate::Result;

/// A block of the device's pool. It returns there when dropped.
pub(crate) struct Block {
    device: &'static CudaDevice,
    address: u64,
    bytes: usize,
    /// Streams other than the home stream with queued work that uses the block.
    users: Mutex<Vec<Arc<Queue>>>,
}

impl Block {
    pub(super) fn new(device: &'static CudaDevice, address: u64, bytes: usize) -> Self {
        Self { device, address, bytes, users: Mutex::default() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn device(&self) -> &'static CudaDevice {
        self.device
    }

    /// The address on the device, aligned to 512 bytes.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Orders work that is about to be queued on `queue` behind all work that used the block on other streams.
    pub(super) fn use_on(&self, queue: &Arc<Queue>) -> Result<()> {
        let mut users = lock(&self.users);
        for user in users.iter().filter(|user| !user.is(queue)) {
            queue.after(user)?;
        }
        if queue.is_home() {
            users.clear();
        } else if !users.iter().any(|user| user.is(queue)) {
            users.push(Arc::clone(queue));
        }
        Ok(())
    }

    /// The same for the home stream.
    fn use_at_home(&self) -> Result<()> {
        self.device.activate()?;
        if lock(&self.users).is_empty() {
            return Ok(());
        }
        self.use_on(self.device.home().queue())
    }

    /// Copies `source`, as long as the block, to the device. Returns when `source` is free again.
    pub(crate) fn copy_from_host(&mut self, source: &[u8]) -> Result<()> {
        debug_assert_eq!(source.len(), self.bytes);
        self.use_at_home()?;
        if source.is_empty() {
            return Ok(());
        }
        let stream = self.device.home().queue().raw();
        // SAFETY: both sides have `source.len()` bytes (the caller checked), and `source` is borrowed until the copy is done,
        // which the next call waits for.
        unsafe {
            call!(on self.device, cuMemcpyHtoDAsync_v2(self.address, source.as_ptr().cast(), source.len(), stream))
        }?;
        self.device.home().synchronize()
    }

    /// Copies the block to `target`, which is as long. Waits for the work that writes the block.
    pub(crate) fn copy_to_host(&self, target: &mut [u8]) -> Result<()> {
        debug_assert_eq!(target.len(), self.bytes);
        self.use_at_home()?;
        if target.is_empty() {
            return Ok(());
        }
        let stream = self.device.home().queue().raw();
        // SAFETY: both sides have `target.len()` bytes (the caller checked), and `target` is borrowed until the copy is done,
        // which the next call waits for.
        let queued = unsafe {
            call!(on self.device, cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), self.address, target.len(), stream))
        };
        let done = self.device.home().synchronize();
        queued.and(done)
    }

    /// Overwrites the block with another one, as long and on the same device, in the order of the home stream.
    pub(crate) fn copy_from(&mut self, source: &Self) -> Result<()> {
        self.use_at_home()?;
        source.use_at_home()?;
        if self.bytes == 0 {
            return Ok(());
        }
        let stream = self.device.home().queue().raw();
        // SAFETY: both blocks have `bytes` bytes (the caller compared them) and live until the home stream is done with
        // them: they return to the pool, whose next owner queues behind this.
        unsafe { call!(on self.device, cuMemcpyDtoDAsync_v2(self.address, source.address, self.bytes, stream)) }
    }

    /// Sets every byte to zero, in the order of the home stream.
    pub(crate) fn set_zero(&mut self) -> Result<()> {
        self.use_at_home()?;
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the block has `bytes` bytes.
        unsafe { call!(on self.device, cuMemsetD8Async(self.address, 0, self.bytes, self.device.home().queue().raw())) }
    }
}

impl Block {
    /// Makes sure that the home stream's later work comes after all work that uses the block.
    fn settle(&self) -> Result<()> {
        if lock(&self.users).is_empty() || self.use_at_home().is_ok() {
            return Ok(());
        }
        // The streams cannot be put in order: then the host waits for them.
        lock(&self.users).iter().try_for_each(|user| user.synchronize())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // The next owner's work may start once the work of every stream is ordered before the home stream's. Of a lost
        // context no work runs any more. Where neither is certain, nobody gets the block again.
        if self.settle().is_ok() || self.device.health().is_lost() {
            self.device.put_back(self.address);
        }
    }
}
