//! Streams and events: the order of work on a GPU, and the time it takes.

use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cust::sys::{self, CUevent_flags};

use super::driver::{NOT_READY, call};
use super::{CudaDevice, Handle};
use crate::{Error, Result};

/// A queue of work on one GPU. Work of one stream runs in order; work of different streams may overlap unless they use
/// the same buffers. Clones name the same stream.
#[derive(Clone)]
pub struct Stream {
    queue: Arc<Queue>,
}

pub(super) struct Queue {
    device: &'static CudaDevice,
    raw: Handle<sys::CUstream_st>,
    role: Role,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Home,
    Side,
    Capture,
}

impl Stream {
    /// The device's home stream, which is never destroyed.
    pub(super) fn home(device: &'static CudaDevice, raw: Handle<sys::CUstream_st>) -> Self {
        Self { queue: Arc::new(Queue { device, raw, role: Role::Home }) }
    }

    /// The stream of a queue.
    pub(super) fn of(queue: &Arc<Queue>) -> Self {
        Self { queue: Arc::clone(queue) }
    }

    /// A new stream beside the home stream.
    pub(crate) fn new(device: &'static CudaDevice) -> Result<Self> {
        Self::with(device, Role::Side)
    }

    /// A new stream whose work is captured in place of the home stream's.
    pub(super) fn for_capture(device: &'static CudaDevice) -> Result<Self> {
        Self::with(device, Role::Capture)
    }

    fn with(device: &'static CudaDevice, role: Role) -> Result<Self> {
        device.activate()?;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a valid place for a handle; a context is current.
        unsafe { call!(on device, cuStreamCreate(&mut raw, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32)) }?;
        Ok(Self { queue: Arc::new(Queue { device, raw: Handle(raw), role }) })
    }

    /// An event behind everything that is queued so far. It tells when that work is done, and at what time.
    ///
    /// # Errors
    /// Driver errors.
    pub fn record(&self) -> Result<Event> {
        let event = Event::new(self.queue.device, CUevent_flags::CU_EVENT_DEFAULT)?;
        self.queue.record(&event)?;
        Ok(event)
    }

    /// Makes all work that is queued from now on wait for the event.
    ///
    /// # Errors
    /// Driver errors.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.queue.wait(event)
    }

    /// Waits on the host until everything queued so far is done.
    ///
    /// # Errors
    /// A fault of that work, or another driver error.
    pub fn synchronize(&self) -> Result<()> {
        self.queue.synchronize()
    }

    pub(super) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }
}

impl Queue {
    pub(super) fn device(&self) -> &'static CudaDevice {
        self.device
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw.0
    }

    /// Whether this is the device's home stream.
    pub(super) fn is_home(&self) -> bool {
        self.role == Role::Home
    }

    /// Whether work that is queued here must be put behind that of the home stream.
    pub(super) fn is_beside_home(&self) -> bool {
        self.role == Role::Side
    }

    /// Whether the two are one stream.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.raw.0 == other.raw.0
    }

    /// Makes all work queued here from now on wait for all work queued on `other` so far.
    pub(super) fn after(&self, other: &Self) -> Result<()> {
        self.wait(&other.mark()?)
    }

    /// An event behind everything that is queued so far, to wait for. It tells no time.
    pub(super) fn mark(&self) -> Result<Event> {
        let event = Event::new(self.device, CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        self.record(&event)?;
        Ok(event)
    }

    fn record(&self, event: &Event) -> Result<()> {
        self.device.activate()?;
        // SAFETY: event and stream are alive and of the current context.
        unsafe { call!(on self.device, cuEventRecord(event.raw.0, self.raw.0)) }
    }

    /// Makes all work queued here from now on wait for the event.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        self.device.activate()?;
        // SAFETY: event and stream are alive; the driver keeps what it needs of the event should it be destroyed.
        unsafe { call!(on self.device, cuStreamWaitEvent(self.raw.0, event.raw.0, 0)) }
    }

    /// Waits on the host until everything queued so far is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.device.activate()?;
        let before = self.device.health().now();
        // SAFETY: the stream is alive.
        unsafe { call!(on self.device, cuStreamSynchronize(self.raw.0)) }?;
        self.device.health().finished(Some(self.raw.0.addr()), before);
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if !self.is_home() && self.device.activate_to_drop() {
            // Nobody is there to hear of a failure; a lost context shows at the next operation.
            // SAFETY: nothing else holds the stream; the driver finishes its work before it frees it.
            let _ = unsafe { call!(on self.device, cuStreamDestroy_v2(self.raw.0)) };
        }
    }
}

/// A point in a stream's work.
pub struct Event {
    device: &'static CudaDevice,
    raw: Handle<sys::CUevent_st>,
}

impl Event {
    fn new(device: &'static CudaDevice, flags: CUevent_flags) -> Result<Self> {
        device.activate()?;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a valid place for a handle; a context is current.
        unsafe { call!(on device, cuEventCreate(&mut raw, flags as u32)) }?;
        Ok(Self { device, raw: Handle(raw) })
    }

    /// Waits on the host until the work before the event is done.
    ///
    /// # Errors
    /// A fault of that work, or another driver error.
    pub fn synchronize(&self) -> Result<()> {
        self.device.activate()?;
        // SAFETY: the event is alive.
        unsafe { call!(on self.device, cuEventSynchronize(self.raw.0)) }
    }

    /// Whether the work before the event is done.
    ///
    /// # Errors
    /// A fault of that work, or another driver error.
    pub fn is_done(&self) -> Result<bool> {
        self.device.activate()?;
        // SAFETY: the event is alive.
        match unsafe { call!(on self.device, cuEventQuery(self.raw.0)) } {
            Ok(()) => Ok(true),
            Err(Error::Driver { code: NOT_READY, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Time on the GPU between an earlier event and this one, to about half a microsecond. Waits for this one.
    ///
    /// # Errors
    /// A fault of the work before the event, an `earlier` event of another device, or another driver error.
    pub fn elapsed_since(&self, earlier: &Self) -> Result<Duration> {
        self.synchronize()?;
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive; `milliseconds` is a valid place for the result.
        unsafe { call!(on self.device, cuEventElapsedTime(&mut milliseconds, earlier.raw.0, self.raw.0)) }?;
        // Events that were recorded in the other order give a negative time.
        Ok(Duration::try_from_secs_f32(milliseconds / 1e3).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.activate_to_drop() {
            // Nobody is there to hear of a failure; a lost context shows at the next operation.
            // SAFETY: nothing else holds the event; the driver keeps it until work that waits for it is done.
            let _ = unsafe { call!(on self.device, cuEventDestroy_v2(self.raw.0)) };
        }
    }
}
