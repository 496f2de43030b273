//! Memory that is zero whenever nobody uses it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::sim::Fault;
use crate::{Buffer, Device, DeviceKind, Error, Result};

/// What is kept is a multiple of this, and so is not grown again soon.
const STEP_BYTES: usize = 1 << 20;

/// Memory that kernels find zero and leave zero, so that no launch has to set it first: flags, and what says by not being
/// zero that it is there. [`Zeroed::keep`] keeps it for the next who asks; what is dropped instead, because a launch failed,
/// is ordinary memory again.
///
/// The next user's work comes after that of this one: both queue on the device's home stream. Elsewhere than on a GPU nothing is
/// kept: there the memory has the length that was asked for, so that the simulator sees what lies beyond, and is looked at.
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
    ///
    /// # Errors
    /// [`Error::Simulator`] elsewhere than on a GPU, when it is not zero.
    pub fn keep(self) -> Result<()> {
        if !matches!(self.buffer.device().kind(), DeviceKind::Cuda(_)) {
            return self.check();
        }
        if self.lasting {
            let device = self.buffer.device().clone();
            let mut kept = kept();
            match kept.iter_mut().find(|buffer| *buffer.device() == device) {
                Some(buffer) if buffer.len() < self.buffer.len() => *buffer = self.buffer,
                Some(_) => (),
                None => kept.push(self.buffer),
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let mut bytes = vec![0; self.buffer.len()];
        self.buffer.copy_to_host(&mut bytes)?;
        match bytes.iter().position(|&byte| byte != 0) {
            None => Ok(()),
            Some(place) => Err(Error::Simulator(Box::new(Fault {
                kernel: String::new(),
                line: 0,
                source: String::new(),
                place: None,
                problem: format!("byte {place} of memory that launches leave zero is {}", bytes[place]),
            }))),
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
    let lasting = matches!(device.kind(), DeviceKind::Cuda(_)) && !device.captures();
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

#[cfg(test)]
mod tests {
    use super::take;
    use crate::{Device, Result};

    #[test]
    fn the_simulator_looks_at_what_is_left() -> Result<()> {
        let device = Device::sim();
        let mut memory = take(&device, 12)?;
        assert_eq!(memory.buffer().len(), 12);
        memory.keep()?;
        let mut memory = take(&device, 12)?;
        memory.buffer().copy_from_host(&[0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0])?;
        let message = memory.keep().err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains("byte 5") && message.contains("is 7"), "{message}");
        Ok(())
    }
}
