//! Whether a GPU's context still works, and what it died of.
//!
//! After a fault of a kernel (CUDA calls such errors *sticky*) every later call fails too, mostly with another code and far
//! from the cause. So the first such failure is kept, and it is what every later operation reports.
//!
//! Launches are asynchronous: the call that reports a fault is seldom the launch that caused it. What can be said is which
//! kernels were launched and not known to be finished at that moment; their names are kept until something waited for
//! them.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, OnceLock};

use super::device::lock;
use super::driver;
use crate::{Error, Result};

/// How many kernels an error names, and how many are kept in mind: of streams that nobody ever waits for, the oldest are
/// forgotten.
const NAMED: usize = 8;
const KEPT: usize = 64;

/// The state of one device's context.
#[derive(Default)]
pub(super) struct Health {
    lost: OnceLock<Loss>,
    unfinished: Mutex<Unfinished>,
}

struct Loss {
    cause: String,
    unfinished: String,
}

/// Kernels that were launched and not waited for, the one launched last at the end.
#[derive(Default)]
struct Unfinished {
    launches: u64,
    kernels: Vec<Launched>,
}

struct Launched {
    name: Arc<str>,
    /// The stream, by its handle.
    stream: usize,
    /// How often, and the number of the last launch among all of the device.
    count: u64,
    last: u64,
}

/// A moment in the sequence of a device's launches.
#[derive(Clone, Copy)]
pub(super) struct Moment(u64);

impl Health {
    pub(super) fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    /// Says that the context is lost, and of what, if it is.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub(super) fn check(&self, device: &impl ToString) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some(loss) => Err(Error::DeviceLost {
                device: device.to_string(),
                cause: loss.cause.clone(),
                unfinished: loss.unfinished.clone(),
            }),
        }
    }

    /// The result of a call on the device's context. `launching` is the kernel, if the call was its launch. The first
    /// failure that loses the context is remembered; once there is one, it stands for every other.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], or the call's own error.
    pub(super) fn judge(&self, device: &impl ToString, result: Result<()>, launching: Option<&str>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        if let Error::Driver { code, .. } = &error
            && driver::loses_context(*code)
        {
            self.lost.get_or_init(|| Loss {
                cause: match launching {
                    None => error.to_string(),
                    Some(kernel) => format!("launching kernel {kernel}: {error}"),
                },
                unfinished: lock(&self.unfinished).describe(),
            });
        }
        self.check(device)?;
        Err(error)
    }

    /// Notes that a kernel was launched on a stream.
    pub(super) fn launched(&self, kernel: &Arc<str>, stream: usize) {
        let mut unfinished = lock(&self.unfinished);
        unfinished.launches += 1;
        let last = unfinished.launches;
        let same = |launched: &Launched| launched.stream == stream && Arc::ptr_eq(&launched.name, kernel);
        match unfinished.kernels.iter_mut().find(|launched| same(launched)) {
            Some(launched) => {
                launched.count += 1;
                launched.last = last;
            }
            None => {
                if unfinished.kernels.len() == KEPT {
                    let oldest = (0..KEPT).min_by_key(|&index| unfinished.kernels[index].last);
                    oldest.map(|index| unfinished.kernels.swap_remove(index));
                }
                unfinished.kernels.push(Launched { name: Arc::clone(kernel), stream, count: 1, last });
            }
        }
    }

    /// The moment before a wait.
    pub(super) fn now(&self) -> Moment {
        Moment(lock(&self.unfinished).launches)
    }

    /// Notes that a stream, or every stream, was waited for since this moment.
    pub(super) fn finished(&self, stream: Option<usize>, since: Moment) {
        let waited_for =
            |launched: &Launched| stream.is_none_or(|stream| launched.stream == stream) && launched.last <= since.0;
        lock(&self.unfinished).kernels.retain(|launched| !waited_for(launched));
    }
}

impl Unfinished {
    /// The end of an error's sentence: empty, or the kernels with those launched last first.
    fn describe(&mut self) -> String {
        if self.kernels.is_empty() {
            return String::new();
        }
        self.kernels.sort_by_key(|launched| std::cmp::Reverse(launched.last));
        let mut text = String::from("; kernels launched and not known to be finished, the last one first: ");
        for (position, launched) in self.kernels.iter().take(NAMED).enumerate() {
            let comma = if position == 0 { "" } else { ", " };
            let _ = write!(text, "{comma}{}", launched.name);
            if launched.count > 1 {
                let _ = write!(text, " ({} times)", launched.count);
            }
        }
        if self.kernels.len() > NAMED {
            let _ = write!(text, " and {} more", self.kernels.len() - NAMED);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(call: &'static str, code: u32) -> Result<()> {
        Err(Error::Driver { call, code, name: "NAME".to_owned(), advice: "advice" })
    }

    #[test]
    fn the_first_cause_stands_for_every_later_failure() {
        let health = Health::default();
        health.judge(&"cuda:7", Ok(()), None).unwrap();
        let own = health.judge(&"cuda:7", failure("cuMemAlloc_v2", 2), None).unwrap_err();
        assert!(matches!(own, Error::Driver { code: 2, .. }), "{own}");
        health.check(&"cuda:7").unwrap();
        let first = health.judge(&"cuda:7", failure("cuCtxSynchronize", 700), None).unwrap_err().to_string();
        assert!(first.contains("cuda:7 is lost") && first.contains("cuCtxSynchronize"), "{first}");
        for later in [failure("cuMemAlloc_v2", 719), failure("cuLaunchKernel", 1)] {
            assert_eq!(health.judge(&"cuda:7", later, Some("late")).unwrap_err().to_string(), first);
        }
        assert_eq!(health.check(&"cuda:7").unwrap_err().to_string(), first);
        assert!(health.is_lost());
    }

    #[test]
    fn unfinished_kernels_are_named_and_finished_ones_are_not() {
        let health = Health::default();
        let names: Vec<Arc<str>> = (0..12).map(|number| Arc::from(format!("kernel_{number}"))).collect();
        health.launched(&names[0], 1);
        let moment = health.now();
        health.launched(&names[1], 1);
        health.launched(&names[2], 2);
        health.launched(&names[2], 2);
        health.finished(Some(1), moment);
        let text = health.judge(&"d", failure("c", 719), None).unwrap_err().to_string();
        assert!(text.ends_with("the last one first: kernel_2 (2 times), kernel_1"), "{text}");

        let health = Health::default();
        names.iter().for_each(|name| health.launched(name, 1));
        let text = health.judge(&"d", failure("c", 719), None).unwrap_err().to_string();
        assert!(text.contains("first: kernel_11, kernel_10") && text.ends_with("kernel_4 and 4 more"), "{text}");

        // Ever new streams that nobody waits for are no leak.
        let health = Health::default();
        (0..1000).for_each(|stream| health.launched(&names[0], stream));
        health.launched(&names[1], 0);
        assert_eq!(lock(&health.unfinished).kernels.len(), KEPT);
        let text = health.judge(&"d", failure("c", 719), None).unwrap_err().to_string();
        assert!(text.contains("first: kernel_1, kernel_0"), "{text}");

        let health = Health::default();
        names.iter().for_each(|name| health.launched(name, 1));
        health.finished(None, health.now());
        let text = health.judge(&"d", failure("c", 719), Some("guilty")).unwrap_err().to_string();
        assert!(text.contains("launching kernel guilty") && !text.contains("kernel_"), "{text}");
    }
}
