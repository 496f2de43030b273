//! Memory that is zero whenever nobody uses it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Buffer, Device, Result};

/// What is kept is a multiple of this, and so is not grown again soon.
const STEP_BYTES: usize = 1 << 20;

/// Memory that kernels find zero and leave zero, so that no launch has to set it first: flags, and what says by not being
/// zero that it is there. [`Zeroed::keep`] keeps it for the next who asks; what is dropped instead, because a launch failed,
/// is ordinary memory again.
///
/// The next user's work comes after that of this one: both queue on the device's home stream.
pub struct Zeroed {
    buffer: Buffer,
    /// It may be kept. What a capture allocates is the graph's, and is zero only once the graph runs.
    lasting: bool,
}

impl Zeroed {
    /// The memory, for a launch; at least as long as asked for.
    pub fn buffer(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    /// Keeps the memory for the next who asks. The work that was queued on it leaves it zero.
    pub fn keep(self) {
        if self.lasting {
            let device = self.buffer.device().clone();
            let mut kept = kept();
            match kept.iter_mut().find(|buffer| *buffer.device() == device) {
                Some(buffer) if buffer.len() < self.buffer.len() => *buffer = self.buffer,
                Some(_) => (),
                None => kept.push(self.buffer),
            }
        }
    }
}

/// At least `bytes` bytes of zeros.
pub(crate) fn take(device: &Device, bytes: usize) -> Result<Zeroed> {
    let there = {
        let mut kept = kept();
        let place = kept.iter().position(|buffer| buffer.device() == device && buffer.len() >= bytes);
        place.map(|place| kept.swap_remove(place))
    };
    if let Some(buffer) = there {
        return Ok(Zeroed { buffer, lasting: true });
    }
    let lasting = !device.captures();
    let mut buffer = device.allocate(if lasting { bytes.max(1).next_multiple_of(STEP_BYTES) } else { bytes })?;
    buffer.set_zero()?;
    Ok(Zeroed { buffer, lasting })
}

/// Gives what is kept of the device back to its pool; whether there was any.
pub(crate) fn trim(device: &Device) -> bool {
    let given_up = {
        let mut kept = kept();
        let place = kept.iter().position(|buffer| buffer.device() == device);
        place.map(|place| kept.swap_remove(place))
    };
    given_up.is_some()
}

/// At most one buffer of each device.
fn kept() -> MutexGuard<'static, Vec<Buffer>> {
    static KEPT: Mutex<Vec<Buffer>> = Mutex::new(Vec::new());
    // Buffers are put in and taken out whole: a panic elsewhere leaves none halfway.
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}
