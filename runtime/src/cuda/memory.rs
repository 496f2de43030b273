//! Memory of a GPU, and copies to and from it.

use std::sync::{Arc, Mutex};

use super::CudaDevice;
use super::device::lock;
use super::driver::call;
use super::graph::{self, GraphMemory};
use super::stream::{Event, Queue};
use crate::Result;

/// A block of a GPU's memory. It returns to where it came from when dropped.
pub(crate) struct Block {
    memory: Arc<Memory>,
}

impl Block {
    /// A block of the device's pool.
    pub(super) fn of_pool(device: &'static CudaDevice, address: u64, bytes: usize) -> Self {
        Self::new(device, address, bytes, Origin::Pool)
    }

    /// A block that the upload stream, `queue`, is about to write.
    pub(super) fn of_upload(device: &'static CudaDevice, address: u64, bytes: usize, queue: &Arc<Queue>) -> Self {
        let block = Self::new(device, address, bytes, Origin::Uploads);
        lock(&block.memory.users).push(User { queue: Arc::clone(queue), until: None });
        block
    }

    /// A block of a graph's own memory.
    pub(super) fn of_graph(device: &'static CudaDevice, address: u64, bytes: usize, memory: Arc<GraphMemory>) -> Self {
        Self::new(device, address, bytes, Origin::Graph(memory))
    }

    fn new(device: &'static CudaDevice, address: u64, bytes: usize, origin: Origin) -> Self {
        Self { memory: Arc::new(Memory { device, address, bytes, origin, users: Mutex::default() }) }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes
    }

    pub(crate) fn device(&self) -> &'static CudaDevice {
        self.memory.device
    }

    /// The address on the device, aligned to 512 bytes.
    pub(super) fn address(&self) -> u64 {
        self.memory.address
    }

    /// Orders work that is about to be queued on `queue` behind all work that used the block on other streams.
    pub(super) fn use_on(&self, queue: &Arc<Queue>) -> Result<()> {
        self.memory.use_on(queue)
    }

    /// Says that the upload is the work before this event, and nothing else of its stream.
    pub(super) fn uploaded(&self, event: Event) {
        if let Some(user) = lock(&self.memory.users).last_mut() {
            user.until = Some(event);
        }
    }

    /// Copies `source`, as long as the block, to the device, in the order of the home stream. Returns when `source` is free
    /// again.
    pub(crate) fn copy_from_host(&mut self, source: &[u8]) -> Result<()> {
        debug_assert_eq!(source.len(), self.bytes());
        graph::refuse("a copy from the host")?;
        self.memory.use_at_home()?;
        lock(self.device().to_device()).upload(source, self.address(), self.device().home().queue())
    }

    /// Copies the block to `target`, which is as long. Waits for the work that writes the block.
    pub(crate) fn copy_to_host(&self, target: &mut [u8]) -> Result<()> {
        debug_assert_eq!(target.len(), self.bytes());
        graph::refuse("a copy to the host")?;
        self.memory.use_at_home()?;
        lock(self.device().to_host()).download(self.address(), target, self.device().home().queue())
    }

    /// Overwrites the block with another one, as long and on the same device, in the order of the home stream.
    pub(crate) fn copy_from(&mut self, source: &Self) -> Result<()> {
        let queue = self.memory.use_here()?;
        source.memory.use_here()?;
        if self.bytes() == 0 {
            return Ok(());
        }
        let (target, source) = (self.address(), source.address());
        // SAFETY: both blocks have `bytes` bytes (the caller compared them) and live until the stream is done with them:
        // they return to the pool, whose next owner queues behind this, or belong to a graph.
        unsafe { call!(on self.device(), cuMemcpyDtoDAsync_v2(target, source, self.bytes(), queue.raw())) }
    }

    /// Sets every byte to zero, in the order of the home stream.
    pub(crate) fn set_zero(&mut self) -> Result<()> {
        let queue = self.memory.use_here()?;
        if self.bytes() == 0 {
            return Ok(());
        }
        // SAFETY: the block has `bytes` bytes.
        unsafe { call!(on self.device(), cuMemsetD8Async(self.address(), 0, self.bytes(), queue.raw())) }
    }
}

/// Where memory comes from.
enum Origin {
    Pool,
    Uploads,
    Graph(Arc<GraphMemory>),
}

/// What a block holds, alone or together with graphs that use it.
pub(super) struct Memory {
    device: &'static CudaDevice,
    address: u64,
    bytes: usize,
    origin: Origin,
    /// Streams other than the home stream with queued work that uses the memory.
    users: Mutex<Vec<User>>,
}

struct User {
    queue: Arc<Queue>,
    /// The last of its work that uses the memory; without it, whatever is queued.
    until: Option<Event>,
}

impl Memory {
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Whether this is memory of this graph's own.
    pub(super) fn is_of(&self, graph: &Arc<GraphMemory>) -> bool {
        matches!(&self.origin, Origin::Graph(memory) if Arc::ptr_eq(memory, graph))
    }

    /// Orders work that is about to be queued on `queue` behind all work that used the memory on other streams.
    fn use_on(self: &Arc<Self>, queue: &Arc<Queue>) -> Result<()> {
        match graph::current(self.device).filter(|capture| queue.is(capture.queue())) {
            None => self.order(queue),
            // The graph runs on the home stream, later than whatever is queued there now.
            Some(capture) => {
                self.use_at_home()?;
                capture.uses(self);
                Ok(())
            }
        }
    }

    /// The same for the stream on which this thread's work queues, the home stream or that of a capture.
    fn use_here(self: &Arc<Self>) -> Result<Arc<Queue>> {
        self.device.activate()?;
        let queue = self.device.queue_here();
        self.use_on(&queue)?;
        Ok(queue)
    }

    /// The same for the home stream itself.
    pub(super) fn use_at_home(&self) -> Result<()> {
        self.device.activate()?;
        if lock(&self.users).is_empty() {
            return Ok(());
        }
        self.order(self.device.home().queue())
    }

    fn order(&self, queue: &Arc<Queue>) -> Result<()> {
        let mut users = lock(&self.users);
        for user in users.iter().filter(|user| !user.queue.is(queue)) {
            match &user.until {
                Some(event) => queue.wait(event)?,
                None => queue.after(&user.queue)?,
            }
        }
        if queue.is_home() {
            users.clear();
            return Ok(());
        }
        match users.iter_mut().find(|user| user.queue.is(queue)) {
            Some(user) => user.until = None,
            None => users.push(User { queue: Arc::clone(queue), until: None }),
        }
        Ok(())
    }

    /// Makes sure that the home stream's later work comes after all work that uses the memory.
    fn settle(&self) -> Result<()> {
        if lock(&self.users).is_empty() || self.use_at_home().is_ok() {
            return Ok(());
        }
        // The streams cannot be put in order: then the host waits for them.
        lock(&self.users).iter().try_for_each(|user| user.queue.synchronize())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The next owner's work may start once the work of every stream is ordered before the home stream's. Of a lost
        // context no work runs any more. Where neither is certain, nobody gets the memory again.
        if self.settle().is_err() && !self.device.health().is_lost() {
            return;
        }
        match &self.origin {
            Origin::Graph(memory) => memory.put_back(self.address),
            Origin::Pool => self.device.put_back(self.address),
            Origin::Uploads => self.device.put_back_uploaded(self.address, self.bytes),
        }
    }
}
