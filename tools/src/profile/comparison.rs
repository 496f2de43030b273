//! Two measurements of the same thing: what became slower.

use super::Summary;

/// A kernel, or the whole, that takes another time than before.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The kernel; the measurement's title for the whole.
    pub what: String,
    /// Seconds before.
    pub before: f64,
    /// Seconds now.
    pub now: f64,
}

impl Change {
    /// Time now over time before.
    pub fn ratio(&self) -> f64 {
        self.now / self.before
    }
}

/// Kernels with less than this share of the time are not compared: their few microseconds change by more than any tolerance.
const LEAST_SHARE: f64 = 0.005;

/// The whole and every kernel that both have and that takes a part of the time worth naming, by the median of a launch, the
/// most slowed down first.
pub fn compare(before: &Summary, now: &Summary) -> Vec<Change> {
    let whole = Change { what: now.title.clone(), before: before.seconds, now: now.seconds };
    let worth = now.kernels.iter().filter(|kernel| kernel.share >= LEAST_SHARE);
    let kernels = worth.filter_map(|kernel| {
        let old = before.kernels.iter().find(|old| old.name == kernel.name)?;
        Some(Change { what: kernel.name.clone(), before: old.median_seconds, now: kernel.median_seconds })
    });
    let mut changes: Vec<Change> = std::iter::once(whole).chain(kernels).collect();
    changes.sort_by(|a, b| b.ratio().total_cmp(&a.ratio()));
    changes
}
