//! Graphs: launches that are recorded once and replayed with one call.
//!
//! While a thread captures, what it would queue on the home stream goes to a stream of the capture instead, where the
//! driver records it and runs nothing. Other threads go on as before. A replay queues the whole on the home stream.
//!
//! A replay uses the memory that was used when it was recorded, so that memory must stay what it was:
//!
//! - Blocks that existed before are held by the graph. They return to their pool when both their owner and the graph are
//!   gone.
//! - Blocks that are allocated during the capture are cut from segments of the graph's own. A block that is dropped
//!   during the capture serves later blocks of the same capture, as in the pool; none goes back to the device's pool
//!   before the graph and all its blocks are gone.
//!
//! What a graph cannot hold (copies from and to the host, waiting, launches on other streams) is refused during a capture.
//! The tables of launches ([`crate::Table`]) are copied at once, beside the capture: they only say where memory is, which a
//! graph does not change, and the graph keeps its copies.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ptr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, Weak};

use cust::sys::{self, CUstreamCaptureMode};

use super::device::lock;
use super::driver::call;
use super::memory::Memory;
use super::pool::{Pool, Source};
use super::recorder::Description;
use super::stream::Queue;
use super::{Block, CudaDevice, Handle, Stream};
use crate::{Error, Result};

/// Launches that were captured, ready to be replayed.
pub struct Graph {
    device: &'static CudaDevice,
    /// A graph may not be launched from two threads at a time.
    executable: Mutex<Executable>,
    /// Blocks from before the capture.
    held: Vec<Arc<Memory>>,
    /// Blocks of the capture that somebody may still hold.
    own: Vec<Weak<Memory>>,
    _memory: Arc<GraphMemory>,
    /// What the device's notes of unfinished work call it.
    name: Arc<str>,
    launches: usize,
}

impl Graph {
    /// Queues everything that was captured on the home stream of its device.
    ///
    /// # Errors
    /// [`Error::Capturing`] while this thread captures; driver errors.
    pub fn replay(&self) -> Result<()> {
        refuse("replaying a graph")?;
        self.device.activate()?;
        // Other streams may have used the blocks since the last replay.
        for memory in self.held.iter().cloned().chain(self.own.iter().filter_map(Weak::upgrade)) {
            memory.use_at_home()?;
        }
        let home = self.device.home().queue().raw();
        let executable = lock(&self.executable);
        let describe = || Description { kernel: Arc::clone(&self.name), grid: [0; 3], block: [0; 3], work: None };
        self.device.recorder().around(self.device.home().queue(), describe, || {
            // SAFETY: graph and stream are alive; all memory that the graph uses is kept for it.
            let launched = unsafe { call!(cuGraphLaunch(executable.raw.0, home)) };
            self.device.health().judge(self.device, launched, Some(&self.name))
        })?;
        self.device.health().launched(&self.name, home.addr());
        Ok(())
    }

    /// How many kernels were launched during the capture.
    pub fn launches(&self) -> usize {
        self.launches
    }
}

/// Runs `work` and records, instead of running it, what it queues from this thread on the device's home stream.
pub(crate) fn capture<T, E: From<Error>>(
    device: &'static CudaDevice,
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(Graph, T), E> {
    refuse("another capture")?;
    // Nobody may wait for the whole context meanwhile.
    let _alone = device.whole();
    let capture = Rc::new(Capture::begin(device)?);
    let ending = Ending::of(&capture);
    // An error or a panic of `work` drops `ending`, which ends the capture.
    let value = work()?;
    drop(ending);
    let recorded = capture.end()?;
    let executable = Executable::of(&recorded)?;
    let (mut held, mut own) = (Vec::new(), Vec::new());
    for used in std::mem::take(&mut *capture.used.borrow_mut()).into_values() {
        match used {
            Used::Before(memory) => held.push(memory),
            Used::During(memory) => own.push(memory),
        }
    }
    let launches = capture.launches.get();
    let graph = Graph {
        device,
        executable: Mutex::new(executable),
        held,
        own,
        _memory: Arc::clone(&capture.memory),
        name: format!("a graph (launches: {launches})").into(),
        launches,
    };
    Ok((graph, value))
}

thread_local! {
    /// What this thread captures.
    static CURRENT: RefCell<Option<Rc<Capture>>> = const { RefCell::new(None) };
}

/// What this thread captures on the device.
pub(super) fn current(device: &CudaDevice) -> Option<Rc<Capture>> {
    CURRENT.with(|current| current.borrow().clone()).filter(|capture| ptr::eq(capture.device, device))
}

/// Whether this thread captures on the device.
pub(crate) fn captures(device: &CudaDevice) -> bool {
    current(device).is_some()
}

/// Refuses something that cannot be done while the thread captures.
///
/// # Errors
/// [`Error::Capturing`].
pub(super) fn refuse(operation: &'static str) -> Result<()> {
    match CURRENT.with(|current| current.borrow().is_some()) {
        true => Err(Error::Capturing { operation }),
        false => Ok(()),
    }
}

/// A capture that is going on.
pub(super) struct Capture {
    device: &'static CudaDevice,
    stream: Stream,
    memory: Arc<GraphMemory>,
    /// Every block that was used, by its address.
    used: RefCell<BTreeMap<u64, Used>>,
    launches: Cell<usize>,
    ended: Cell<bool>,
}

enum Used {
    /// A block from before: the graph holds it.
    Before(Arc<Memory>),
    /// A block of the capture: the graph's segments hold its memory.
    During(Weak<Memory>),
}

impl Capture {
    fn begin(device: &'static CudaDevice) -> Result<Self> {
        let stream = Stream::for_capture(device)?;
        // Relaxed: the pool and the loader of modules may call the driver meanwhile; neither touches this stream.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream was made just now.
        unsafe { call!(on device, cuStreamBeginCapture_v2(stream.queue().raw(), mode)) }?;
        let memory = Arc::new(GraphMemory { device, pool: Mutex::default() });
        Ok(Self { device, stream, memory, used: RefCell::default(), launches: Cell::new(0), ended: Cell::new(false) })
    }

    /// Ends the capture: what was recorded.
    fn end(&self) -> Result<Recorded> {
        // Whatever fails, the stream must not go on capturing.
        let active = self.device.activate();
        let mut raw = ptr::null_mut();
        // SAFETY: the stream captures since `begin`; `raw` is a valid place for a handle.
        unsafe { call!(on self.device, cuStreamEndCapture(self.stream.queue().raw(), &mut raw)) }?;
        self.ended.set(true);
        let recorded = Recorded { device: self.device, raw };
        active.map(|()| recorded)
    }

    /// Where work is queued meanwhile.
    pub(super) fn queue(&self) -> &Arc<Queue> {
        self.stream.queue()
    }

    /// Memory of the graph's own.
    pub(super) fn allocate(&self, bytes: usize) -> Result<Option<Block>> {
        let address = lock(&self.memory.pool).take(bytes, &mut FromPool { device: self.device })?;
        Ok(address.map(|address| Block::of_graph(self.device, address, bytes, Arc::clone(&self.memory))))
    }

    /// Notes that the graph uses a block.
    pub(super) fn uses(&self, memory: &Arc<Memory>) {
        let used = match memory.is_of(&self.memory) {
            true => Used::During(Arc::downgrade(memory)),
            false => Used::Before(Arc::clone(memory)),
        };
        self.used.borrow_mut().insert(memory.address(), used);
    }

    /// Notes that a kernel was launched.
    pub(super) fn launched(&self) {
        self.launches.set(self.launches.get() + 1);
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.ended.get() {
            // What was recorded is dropped; the error that led here is the one to report.
            let _ = self.end();
        }
    }
}

/// Makes a capture that of this thread, until it is dropped.
struct Ending;

impl Ending {
    fn of(capture: &Rc<Capture>) -> Self {
        CURRENT.with(|current| *current.borrow_mut() = Some(Rc::clone(capture)));
        Self
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let capture = CURRENT.with(|current| current.borrow_mut().take());
        drop(capture);
    }
}

/// The driver's record of a capture.
struct Recorded {
    device: &'static CudaDevice,
    raw: sys::CUgraph,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.raw.is_null() && self.device.activate_to_drop() {
            // Nobody is there to hear of a failure.
            // SAFETY: the graph is destroyed once; what was made of it is its own.
            let _ = unsafe { call!(on self.device, cuGraphDestroy(self.raw)) };
        }
    }
}

/// A record made ready to run.
struct Executable {
    device: &'static CudaDevice,
    raw: Handle<sys::CUgraphExec_st>,
}

impl Executable {
    fn of(recorded: &Recorded) -> Result<Self> {
        let device = recorded.device;
        device.activate()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the record is alive; `raw` is a valid place for a handle.
        unsafe { call!(on device, cuGraphInstantiateWithFlags(&mut raw, recorded.raw, 0)) }?;
        Ok(Self { device, raw: Handle(raw) })
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        if self.device.activate_to_drop() {
            // The last replay may still run. Nobody is there to hear of failures.
            let _ = self.device.home().synchronize();
            // SAFETY: the graph is destroyed once.
            let _ = unsafe { call!(on self.device, cuGraphExecDestroy(self.raw.0)) };
        }
    }
}

/// Memory that was allocated during a capture: segments that are blocks of the device's pool. They go back when the graph
/// and the last block are gone.
pub(super) struct GraphMemory {
    device: &'static CudaDevice,
    pool: Mutex<Pool>,
}

impl GraphMemory {
    /// Takes a block back, for the rest of the capture.
    pub(super) fn put_back(&self, address: u64) {
        lock(&self.pool).put_back(address);
    }
}

impl Drop for GraphMemory {
    fn drop(&mut self) {
        // Cannot fail: the source below gives back without the driver.
        let _ = lock(&self.pool).trim(&mut FromPool { device: self.device });
    }
}

/// The source of a graph's memory: the device's pool, to which it goes back in the order of the home stream.
struct FromPool {
    device: &'static CudaDevice,
}

impl Source for FromPool {
    fn reserve(&mut self, bytes: usize) -> Result<Option<u64>> {
        self.device.take_if_there(bytes)
    }

    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(&mut self, address: u64) -> Result<()> {
        self.device.put_back(address);
        Ok(())
    }
}
