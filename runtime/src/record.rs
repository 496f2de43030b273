//! The record of launches: which kernel ran when, on how many blocks, with how much work, and for which part of the model.
//!
//! [`Device::record_launches`](crate::Device::record_launches) starts a [`Recording`]; while it lives, every launch on the
//! device is recorded: on a GPU with the times of events around it, on the simulator with the host's clock. The CPU
//! launches nothing, so its record is empty.
//!
//! [`range`] names what a thread is doing ("layer 3", "backward"). Launches carry the names that are open around them, and
//! NVIDIA's profilers see the same names as NVTX ranges.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kernels_ptx::{Kernel, Work};

use crate::cuda::CudaDevice;
use crate::{Error, Result, nvtx};

/// One launch.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchRecord {
    /// The kernel's name. The replay of a graph is one launch: its name says how many kernels the graph launches.
    pub kernel: Arc<str>,
    /// Blocks in x, y and z; zeros for a graph.
    pub grid: [u32; 3],
    /// Threads per block in x, y and z; zeros for a graph.
    pub block: [u32; 3],
    /// When the kernel began, counted from the start of the recording. On a GPU to about a microsecond for every ten
    /// seconds of that time.
    pub start: Duration,
    /// How long it ran. On a GPU to about half a microsecond, its launch included.
    pub duration: Duration,
    /// Bytes and operations of the problem, if the launch was given its sizes.
    pub work: Option<Work>,
    /// Names of the ranges that were open on the launching thread, the outermost first.
    pub ranges: Vec<Arc<str>>,
}

impl LaunchRecord {
    /// When the kernel ended, counted from the start of the recording.
    pub fn end(&self) -> Duration {
        self.start + self.duration
    }
}

/// Records every launch on one device while it lives.
#[must_use = "launches are recorded until this is dropped"]
pub struct Recording {
    source: Source,
}

/// Who keeps the records.
pub(crate) enum Source {
    /// A device that launches nothing.
    Nobody,
    Gpu(&'static CudaDevice),
    Simulator,
}

impl Recording {
    pub(crate) fn start(source: Source, device: &impl ToString) -> Result<Self> {
        let started = match &source {
            Source::Nobody => true,
            Source::Gpu(gpu) => gpu.recorder().start(gpu)?,
            Source::Simulator => SIMULATOR.start(),
        };
        match started {
            true => Ok(Self { source }),
            false => Err(Error::AlreadyRecording { device: device.to_string() }),
        }
    }

    /// The launches since the start, or since they were last taken, in the order of the program. Waits until they are
    /// done.
    ///
    /// # Errors
    /// A fault of that work, or another driver error.
    pub fn take_records(&self) -> Result<Vec<LaunchRecord>> {
        match &self.source {
            Source::Nobody => Ok(Vec::new()),
            Source::Gpu(gpu) => gpu.recorder().take(),
            Source::Simulator => Ok(SIMULATOR.take()),
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        match &self.source {
            Source::Nobody => {}
            Source::Gpu(gpu) => gpu.recorder().stop(),
            Source::Simulator => SIMULATOR.stop(),
        }
    }
}

thread_local! {
    /// The names of this thread's open ranges.
    static RANGES: RefCell<Vec<Arc<str>>> = const { RefCell::new(Vec::new()) };
}

/// Names what this thread does until the guard is dropped. Ranges nest.
pub fn range(label: &str) -> RangeGuard {
    nvtx::push(label);
    RANGES.with(|ranges| ranges.borrow_mut().push(label.into()));
    RangeGuard { _of_this_thread: PhantomData }
}

/// The name of this thread's innermost open range, for work that belongs to it but is done later.
pub fn open_range() -> Option<Arc<str>> {
    RANGES.with(|ranges| ranges.borrow().last().cloned())
}

/// A range that is open; see [`range`].
#[must_use = "a range ends when its guard is dropped"]
pub struct RangeGuard {
    /// Ranges are a thread's own: their guards stay on it.
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        nvtx::pop();
        RANGES.with(|ranges| ranges.borrow_mut().pop());
    }
}

/// The names of this thread's open ranges, the outermost first.
pub(crate) fn ranges() -> Vec<Arc<str>> {
    RANGES.with(|ranges| ranges.borrow().clone())
}

/// The simulator's record.
pub(crate) static SIMULATOR: HostRecorder = HostRecorder::new();

/// A record by the host's clock, of launches that are done when they return.
pub(crate) struct HostRecorder {
    /// Whether anything is to be recorded, for those who ask before every launch.
    active: AtomicBool,
    records: Mutex<Option<(Instant, Vec<LaunchRecord>)>>,
}

impl HostRecorder {
    pub(crate) const fn new() -> Self {
        Self { active: AtomicBool::new(false), records: Mutex::new(None) }
    }

    /// Runs a launch and records it, if anybody wants it recorded. `sizes` are those of the problem.
    pub(crate) fn launch<T>(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        sizes: Option<&[u64]>,
        run: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if !self.active.load(Ordering::Acquire) {
            return run();
        }
        let begin = Instant::now();
        let result = run()?;
        let duration = begin.elapsed();
        if let Some((origin, records)) = &mut *self.lock() {
            records.push(LaunchRecord {
                kernel: kernel.name.as_str().into(),
                grid,
                block: kernel.block,
                start: begin.saturating_duration_since(*origin),
                duration,
                work: sizes.and_then(|sizes| kernel.work(sizes)),
                ranges: ranges(),
            });
        }
        Ok(result)
    }

    /// Starts recording; `false` when that was done before.
    fn start(&self) -> bool {
        let mut records = self.lock();
        if records.is_some() {
            return false;
        }
        *records = Some((Instant::now(), Vec::new()));
        self.active.store(true, Ordering::Release);
        true
    }

    fn take(&self) -> Vec<LaunchRecord> {
        self.lock().as_mut().map(|(_, records)| std::mem::take(records)).unwrap_or_default()
    }

    fn stop(&self) {
        self.active.store(false, Ordering::Release);
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Instant, Vec<LaunchRecord>)>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use kernels_ptx::KernelSource;
    use kernels_ptx::kernels::fill::Fill;

    use super::*;

    #[test]
    fn ranges_nest_and_belong_to_their_thread() {
        let names = || ranges().iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert!(names().is_empty());
        assert_eq!(open_range(), None);
        let outer = range("layer 3");
        {
            let _inner = range("mixer");
            assert_eq!(names(), ["layer 3", "mixer"]);
            assert_eq!(open_range().as_deref(), Some("mixer"));
            std::thread::spawn(|| assert!(ranges().is_empty())).join().unwrap();
        }
        assert_eq!(names(), ["layer 3"]);
        drop(outer);
        assert!(names().is_empty());
    }

    #[test]
    fn the_hosts_record_has_every_launch_in_order_while_it_is_wanted() {
        let recorder = HostRecorder::new();
        let kernel = Fill.build();
        let launch = |blocks| recorder.launch(&kernel, [blocks, 1, 1], Some(&[7]), || Ok(())).unwrap();
        launch(1);
        assert!(recorder.take().is_empty());
        assert!(recorder.start() && !recorder.start());
        launch(2);
        let failed = recorder.launch(&kernel, [9, 1, 1], None, || -> Result<()> {
            Err(Error::Launch { kernel: String::new(), reason: String::new() })
        });
        assert!(failed.is_err());
        {
            let _range = range("step");
            recorder
                .launch(&kernel, [3, 1, 1], None, || {
                    std::thread::sleep(Duration::from_millis(2));
                    Ok(())
                })
                .unwrap();
        }
        let records = recorder.take();
        assert_eq!(records.len(), 2);
        assert_eq!((records[0].grid, &*records[0].kernel, records[0].block), ([2, 1, 1], "fill_u32", kernel.block));
        assert_eq!(records[0].work, Some(Work { bytes: 28, operations: 0 }));
        assert_eq!((records[1].grid, records[1].work), ([3, 1, 1], None));
        assert_eq!(records[1].ranges, ["step".into()]);
        assert!(records[1].duration >= Duration::from_millis(2) && records[1].start >= records[0].end());
        launch(4);
        assert_eq!(recorder.take().len(), 1);
        recorder.stop();
        launch(5);
        assert!(recorder.start() && recorder.take().is_empty());
    }
}
