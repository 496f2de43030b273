//! The record of a GPU's launches: an event before and behind each.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kernels_ptx::Work;

use super::device::lock;
use super::stream::{Event, Queue};
use super::{CudaDevice, Stream};
use crate::Result;
use crate::record::{self, LaunchRecord};

/// One device's recorder. It is idle until something wants a record.
#[derive(Default)]
pub(crate) struct Recorder {
    /// Whether anything is to be recorded, for those who ask before every launch.
    active: AtomicBool,
    recording: Mutex<Option<Recording>>,
}

struct Recording {
    /// From where times are counted: the home stream's state when the recording began.
    origin: Event,
    launches: Vec<Launch>,
}

struct Launch {
    description: Description,
    ranges: Vec<Arc<str>>,
    start: Event,
    end: Event,
}

/// What is known of a launch beside its times.
pub(super) struct Description {
    pub(super) kernel: Arc<str>,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) work: Option<Work>,
}

impl Recorder {
    /// Starts recording; `false` when that was done before.
    ///
    /// # Errors
    /// Driver errors.
    pub(crate) fn start(&self, device: &'static CudaDevice) -> Result<bool> {
        let mut recording = lock(&self.recording);
        if recording.is_some() {
            return Ok(false);
        }
        *recording = Some(Recording { origin: device.home().record()?, launches: Vec::new() });
        self.active.store(true, Ordering::Release);
        Ok(true)
    }

    /// What was launched since the start or the last call. Waits until it is done.
    ///
    /// # Errors
    /// A fault of that work, or another driver error.
    pub(crate) fn take(&self) -> Result<Vec<LaunchRecord>> {
        let mut recording = lock(&self.recording);
        let Some(recording) = &mut *recording else { return Ok(Vec::new()) };
        let launches = std::mem::take(&mut recording.launches);
        let record = |launch: Launch| {
            Ok(LaunchRecord {
                kernel: launch.description.kernel,
                grid: launch.description.grid,
                block: launch.description.block,
                start: launch.start.elapsed_since(&recording.origin)?,
                duration: launch.end.elapsed_since(&launch.start)?,
                work: launch.description.work,
                ranges: launch.ranges,
            })
        };
        launches.into_iter().map(record).collect()
    }

    /// Stops recording.
    pub(crate) fn stop(&self) {
        self.active.store(false, Ordering::Release);
        *lock(&self.recording) = None;
    }

    /// Queues something on a stream with an event before and one behind it, if a record is wanted.
    ///
    /// # Errors
    /// Those of `launch`; driver errors.
    pub(super) fn around(
        &self,
        queue: &Arc<Queue>,
        describe: impl FnOnce() -> Description,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.active.load(Ordering::Acquire) {
            return launch();
        }
        let stream = Stream::of(queue);
        let start = stream.record()?;
        launch()?;
        let end = stream.record()?;
        if let Some(recording) = &mut *lock(&self.recording) {
            recording.launches.push(Launch { description: describe(), ranges: record::ranges(), start, end });
        }
        Ok(())
    }
}
