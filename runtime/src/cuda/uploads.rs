//! Uploads that overlap with work: a second stream, and memory that it may write at once.
//!
//! A block fresh from the pool may still be in use by work that is queued on the home stream, so an upload to it would have
//! to wait for all of that work. Blocks of earlier uploads therefore do not go back to the pool at once. They are kept with
//! an event that says when the home stream is done with them, and the next upload of the same size waits for that alone:
//! batches that are uploaded ahead are copied while the step before is computed.

use std::collections::VecDeque;

use super::stream::Event;
use super::{CudaDevice, Stream};
use crate::Result;

/// The largest block that is kept, and the bytes that all kept blocks have at most. Batches are far smaller; weights
/// are larger, and uploaded once.
const LARGEST: usize = 64 << 20;
const KEPT: usize = 256 << 20;

/// The upload stream of a device, once there is one, and blocks that wait for their next upload, oldest first.
#[derive(Default)]
pub(super) struct Uploads {
    stream: Option<Stream>,
    kept: VecDeque<Kept>,
    bytes: usize,
}

struct Kept {
    address: u64,
    /// Bytes as they were asked for, and as the pool counts them.
    asked: usize,
    counted: usize,
    /// What the block's next owner has to wait for.
    unused: Event,
}

impl Uploads {
    /// The stream on which uploads queue.
    pub(super) fn stream(&mut self, device: &'static CudaDevice) -> Result<Stream> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => Stream::new(device)?,
        };
        Ok(self.stream.insert(stream).clone())
    }

    /// The oldest kept block of this size. The upload stream waits until it is unused.
    pub(super) fn take(&mut self, bytes: usize, stream: &Stream) -> Result<Option<u64>> {
        let Some(position) = self.kept.iter().position(|kept| kept.asked == bytes) else { return Ok(None) };
        if !self.kept[position].unused.is_done()? {
            stream.wait(&self.kept[position].unused)?;
        }
        Ok(self.kept.remove(position).map(|kept| {
            self.bytes -= kept.counted;
            kept.address
        }))
    }

    /// Keeps a block whose work is in order on the home stream. Returns the addresses of blocks to give back to the pool:
    /// the oldest ones, or this one, when there are too many.
    pub(super) fn keep(&mut self, device: &'static CudaDevice, address: u64, asked: usize, counted: usize) -> Vec<u64> {
        if counted > LARGEST {
            return vec![address];
        }
        let Ok(unused) = device.home().queue().mark() else { return vec![address] };
        self.kept.push_back(Kept { address, asked, counted, unused });
        self.bytes += counted;
        let mut given_up = Vec::new();
        while self.bytes > KEPT
            && let Some(kept) = self.kept.pop_front()
        {
            self.bytes -= kept.counted;
            given_up.push(kept.address);
        }
        given_up
    }

    /// Gives up every kept block.
    pub(super) fn give_up(&mut self) -> Vec<u64> {
        self.bytes = 0;
        self.kept.drain(..).map(|kept| kept.address).collect()
    }

    /// Bytes of kept blocks, as the pool counts them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
