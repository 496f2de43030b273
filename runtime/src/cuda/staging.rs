//! Copies between host and device by way of page-locked memory.
//!
//! The GPU reads and writes page-locked memory by itself, at the bus's full speed and while it computes. Memory of the
//! program is not page-locked, so copies go through a [`Ring`]: a copy to the device is done with its source as soon as
//! the ring holds it, and large copies move in chunks, one being copied by the host while the GPU moves the one before.
//! It also means that the driver never holds a pointer to memory that Rust may free.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use super::driver::call;
use super::stream::{Event, Queue};
use super::{CudaDevice, Handle};
use crate::Result;

/// Bytes of a ring, and of the largest piece that goes through it at once.
const RING: usize = 4 << 20;
const CHUNK: usize = RING / 4;

/// Pieces, and with them events, that are pending at most. The host runs ahead of the GPU by no more copies than this.
const PENDING: usize = 64;

/// Bytes at whose multiples pieces begin: a cache line.
const LINE: usize = 64;

/// Page-locked memory in which pieces are put one behind the other, around and around. It is allocated when first used.
#[derive(Default)]
pub(super) struct Ring {
    memory: Option<PageLocked>,
    /// Where the next piece begins.
    head: usize,
    /// Pieces that the GPU may not be done with, oldest first.
    pending: VecDeque<Piece>,
}

struct Piece {
    range: Range<usize>,
    done: Done,
}

/// What to wait for until a piece is free.
enum Done {
    Event(Event),
    /// Everything on a stream: the event is not recorded yet, or could not be.
    Queue(Arc<Queue>),
}

impl Ring {
    /// Queues copies of `source` to the device's memory at `target`. `source` is free when this returns.
    ///
    /// # Errors
    /// Driver errors, a fault of earlier work among them.
    pub(super) fn upload(&mut self, source: &[u8], target: u64, queue: &Arc<Queue>) -> Result<()> {
        let mut target = target;
        for chunk in source.chunks(CHUNK) {
            let range = self.reserve(chunk.len(), queue.device())?;
            let place = self.place(&range, queue.device())?;
            // SAFETY: the piece has `chunk.len()` bytes, and the GPU is done with whatever was in it.
            unsafe { ptr::copy_nonoverlapping(chunk.as_ptr(), place, chunk.len()) };
            self.queue(range, queue, |stream| {
                // SAFETY: the caller's block has as many bytes as `source` from `target` on; the piece stays as it is until
                // `pending` says that the GPU is done with it.
                unsafe {
                    call!(on queue.device(), cuMemcpyHtoDAsync_v2(target, place.cast::<c_void>().cast_const(), chunk.len(), stream))
                }
            })?;
            target += chunk.len() as u64;
        }
        Ok(())
    }

    /// Copies the device's memory at `source` to `target`. Waits for the work of `queue` so far.
    ///
    /// # Errors
    /// Driver errors, a fault of earlier work among them. Part of `target` may be written then.
    pub(super) fn download(&mut self, source: u64, target: &mut [u8], queue: &Arc<Queue>) -> Result<()> {
        // What a download that failed has left. From here on every piece is a whole chunk, but for the last.
        self.settle()?;
        self.head = 0;
        let before = queue.device().health().now();
        let mut source = source;
        let mut targets: VecDeque<&mut [u8]> = VecDeque::new();
        for chunk in target.chunks_mut(CHUNK) {
            if targets.len() == RING / CHUNK {
                self.fetch(targets.pop_front())?;
            }
            let range = self.reserve(chunk.len(), queue.device())?;
            let place = self.place(&range, queue.device())?;
            self.queue(range, queue, |stream| {
                // SAFETY: the caller's block has as many bytes as all chunks from `source` on; nobody reads the piece until
                // the GPU has written it.
                unsafe { call!(on queue.device(), cuMemcpyDtoHAsync_v2(place.cast(), source, chunk.len(), stream)) }
            })?;
            source += chunk.len() as u64;
            targets.push_back(chunk);
        }
        while let Some(chunk) = targets.pop_front() {
            self.fetch(Some(chunk))?;
        }
        queue.device().health().finished(Some(queue.raw().addr()), before);
        Ok(())
    }

    /// Waits until the GPU is done with every piece.
    ///
    /// # Errors
    /// Driver errors, a fault of earlier work among them.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.wait_for(|_| true)
    }

    /// Waits for the oldest piece and copies it to where it belongs.
    fn fetch(&mut self, target: Option<&mut [u8]>) -> Result<()> {
        let (Some(target), Some(piece), Some(memory)) = (target, self.pending.front(), &self.memory) else {
            return Ok(());
        };
        piece.wait()?;
        debug_assert_eq!(target.len(), piece.range.len());
        // SAFETY: the piece has `target.len()` bytes, lies in the ring, and the GPU is done with it.
        unsafe { ptr::copy_nonoverlapping(memory.at(&piece.range), target.as_mut_ptr(), target.len()) };
        self.pending.pop_front();
        Ok(())
    }

    /// Queues one copy and remembers when its piece is free again.
    fn queue(
        &mut self,
        range: Range<usize>,
        queue: &Arc<Queue>,
        copy: impl FnOnce(cust::sys::CUstream) -> Result<()>,
    ) -> Result<()> {
        // First the piece is taken: whatever fails below, it is not used again before the stream was waited for.
        self.pending.push_back(Piece { range, done: Done::Queue(Arc::clone(queue)) });
        copy(queue.raw())?;
        let event = queue.mark()?;
        if let Some(piece) = self.pending.back_mut() {
            piece.done = Done::Event(event);
        }
        Ok(())
    }

    /// A piece of `bytes` bytes, at most a chunk, that the GPU is done with.
    fn reserve(&mut self, bytes: usize, device: &'static CudaDevice) -> Result<Range<usize>> {
        device.activate()?;
        let start = if self.head + bytes <= RING { self.head } else { 0 };
        let range = start..start + bytes;
        if self.pending.len() >= PENDING {
            self.wait_for_oldest()?;
        }
        self.wait_for(|piece| piece.range.start < range.end && range.start < piece.range.end)?;
        self.head = range.end.next_multiple_of(LINE);
        Ok(range)
    }

    /// Waits for every piece of which `needed` is true, and for those before them.
    fn wait_for(&mut self, needed: impl Fn(&Piece) -> bool) -> Result<()> {
        while self.pending.iter().any(&needed) {
            self.wait_for_oldest()?;
        }
        Ok(())
    }

    fn wait_for_oldest(&mut self) -> Result<()> {
        if let Some(oldest) = self.pending.front() {
            oldest.wait()?;
        }
        self.pending.pop_front();
        Ok(())
    }

    /// The address of a piece.
    fn place(&mut self, range: &Range<usize>, device: &'static CudaDevice) -> Result<*mut u8> {
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => PageLocked::new(device)?,
        };
        Ok(self.memory.insert(memory).at(range))
    }
}

impl Piece {
    fn wait(&self) -> Result<()> {
        match &self.done {
            Done::Event(event) => event.synchronize(),
            Done::Queue(queue) => queue.synchronize(),
        }
    }
}

/// [`RING`] bytes of page-locked memory. Like the device whose ring they are in, they stay as long as the process.
struct PageLocked(Handle<u8>);

impl PageLocked {
    /// The device's context must be current.
    fn new(device: &'static CudaDevice) -> Result<Self> {
        let mut place = ptr::null_mut();
        // SAFETY: `place` is a valid place for one address; a context is current.
        unsafe { call!(on device, cuMemHostAlloc(&mut place, RING, 0)) }?;
        Ok(Self(Handle(place.cast())))
    }

    fn at(&self, range: &Range<usize>) -> *mut u8 {
        debug_assert!(range.end <= RING);
        // SAFETY: every range that a ring makes lies within its bytes.
        unsafe { self.0.0.add(range.start) }
    }
}
