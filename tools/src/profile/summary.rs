//! Launches added up by kernel.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use runtime::LaunchRecord;
use serde::{Deserialize, Serialize};

use super::Ceilings;

/// All launches of a measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// What was measured.
    pub title: String,
    /// The device.
    pub device: String,
    /// How often it was repeated.
    pub repeats: usize,
    /// How often a repeat ran it, one call after the other; older files do not say. All other figures are those of a call.
    #[serde(default)]
    pub calls: Option<usize>,
    /// Median seconds, without recording.
    pub seconds: f64,
    /// The same with every kernel launched by itself, where `seconds` is of a graph that is replayed.
    pub launched_seconds: Option<f64>,
    /// Tokens, where it has any.
    pub tokens: Option<usize>,
    /// Seconds between the events around launches, all together.
    pub busy_seconds: f64,
    /// The most seconds of `seconds` in which no kernel runs: what the events cost at most is taken off each launch
    /// ([`Ceilings::event_seconds`]).
    pub gap_seconds: f64,
    /// What the device reaches.
    pub ceilings: Option<Ceilings>,
    /// Every kernel, the one that takes most time first.
    pub kernels: Vec<KernelSummary>,
}

/// All launches of one kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelSummary {
    /// Its name.
    pub name: String,
    /// Launches per call.
    pub calls: f64,
    /// Median seconds of a launch.
    pub median_seconds: f64,
    /// Seconds of all its launches in one call.
    pub total_seconds: f64,
    /// Its share of the time in which kernels ran.
    pub share: f64,
    /// Bytes per second, counting what an ideal device would move.
    pub bytes_per_second: Option<f64>,
    /// Operations per second.
    pub operations_per_second: Option<f64>,
}

/// Adds up the launches of `calls` calls: by kernel, and the seconds of all in a call.
pub fn summarise(launches: &[LaunchRecord], calls: usize) -> (Vec<KernelSummary>, f64) {
    let mut by_name: BTreeMap<&str, Vec<&LaunchRecord>> = BTreeMap::new();
    for launch in launches {
        by_name.entry(&launch.kernel).or_default().push(launch);
    }
    let busy: f64 = launches.iter().map(|launch| launch.duration.as_secs_f64()).sum();
    let per_call = calls.max(1) as f64;
    let mut kernels: Vec<KernelSummary> = by_name
        .into_iter()
        .map(|(name, launches)| {
            let total: f64 = launches.iter().map(|launch| launch.duration.as_secs_f64()).sum();
            let speed = |amount: fn(&kernels_ptx::Work) -> u64| {
                let amounts: Option<Vec<u64>> =
                    launches.iter().map(|launch| launch.work.as_ref().map(amount)).collect();
                Some(amounts?.iter().sum::<u64>() as f64 / total)
            };
            KernelSummary {
                name: name.to_owned(),
                calls: launches.len() as f64 / per_call,
                median_seconds: median(
                    &mut launches.iter().map(|launch| launch.duration.as_secs_f64()).collect::<Vec<_>>(),
                ),
                total_seconds: total / per_call,
                share: total / busy,
                bytes_per_second: speed(|work| work.bytes),
                operations_per_second: speed(|work| work.operations),
            }
        })
        .collect();
    kernels.sort_by(|a, b| b.total_seconds.total_cmp(&a.total_seconds));
    (kernels, busy / per_call)
}

/// The most seconds of a call, which takes `seconds`, in which no kernel runs, when the events around a launch cost at most
/// `overhead`. The launches are those of `calls` calls. Where launches overlap, a call hides each one's way to
/// the entry at which it waits; recorded times hold it, and so does an `overhead` that was measured around a launch.
pub fn gap_seconds(launches: &[LaunchRecord], calls: usize, seconds: f64, overhead: f64) -> f64 {
    let running = launches.iter().map(|launch| (launch.duration.as_secs_f64() - overhead).max(0.0)).sum::<f64>();
    (seconds - running / calls.max(1) as f64).max(0.0)
}

/// The middle value; of an even number the upper one of the two in the middle, of none NaN.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Summary {
    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = format!("{} on {}, {} repeats", self.title, self.device, self.repeats);
        if let Some(calls) = self.calls.filter(|&calls| calls > 1) {
            let _ = write!(text, " of {calls} calls");
        }
        text.push('\n');
        let _ = write!(text, "{:.3} ms each", self.seconds * 1e3);
        if let Some(tokens) = self.tokens {
            let _ = write!(text, ", {:.0} tokens/s", tokens as f64 / self.seconds);
        }
        if let Some(launched) = self.launched_seconds {
            let _ = write!(text, " as a graph, {:.3} ms launch by launch", launched * 1e3);
        }
        let _ = writeln!(
            text,
            "; gaps between kernels at most {:.3} ms ({:.1} %); launches with the events around them {:.3} ms",
            self.gap_seconds * 1e3,
            100.0 * self.gap_seconds / self.seconds,
            self.busy_seconds * 1e3,
        );
        if let Some(ceilings) = self.ceilings {
            let _ = writeln!(
                text,
                "this device: copy {:.0} GB/s, bf16 matrix product {:.0} TFLOP/s, events at most {:.1} us a launch",
                ceilings.copy_bytes_per_second / 1e9,
                ceilings.matrix_operations_per_second / 1e12,
                ceilings.event_seconds * 1e6
            );
        }
        let _ = writeln!(
            text,
            "{:<64} {:>7} {:>10} {:>10} {:>7} {:>8} {:>7} {:>8} {:>7}",
            "kernel", "calls", "median", "total", "share", "GB/s", "of copy", "TFLOP/s", "of max"
        );
        for kernel in &self.kernels {
            let _ = writeln!(text, "{}", self.line(kernel));
        }
        text
    }

    fn line(&self, kernel: &KernelSummary) -> String {
        let speed = |value: Option<f64>, unit: f64, digits: usize| {
            value.map_or("-".to_owned(), |value| format!("{:.digits$}", value / unit))
        };
        let fraction = |value: Option<f64>, ceiling: Option<f64>| match (value, ceiling) {
            (Some(value), Some(ceiling)) => format!("{:.0} %", 100.0 * value / ceiling),
            _ => "-".to_owned(),
        };
        format!(
            "{:<64} {:>7.1} {:>7.1} us {:>7.3} ms {:>5.1} % {:>8} {:>7} {:>8} {:>7}",
            kernel.name,
            kernel.calls,
            kernel.median_seconds * 1e6,
            kernel.total_seconds * 1e3,
            100.0 * kernel.share,
            speed(kernel.bytes_per_second, 1e9, 0),
            fraction(kernel.bytes_per_second, self.ceilings.map(|ceilings| ceilings.copy_bytes_per_second)),
            speed(kernel.operations_per_second, 1e12, 2),
            fraction(kernel.operations_per_second, self.ceilings.map(|ceilings| ceilings.matrix_operations_per_second)),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kernels_ptx::Work;

    use super::*;

    fn launch(kernel: &str, start: u64, micros: u64, work: Option<Work>) -> LaunchRecord {
        LaunchRecord {
            kernel: kernel.into(),
            grid: [1, 1, 1],
            block: [32, 1, 1],
            start: Duration::from_micros(start),
            duration: Duration::from_micros(micros),
            work,
            ranges: Vec::new(),
        }
    }

    #[test]
    fn launches_add_up_by_kernel_with_gaps_and_speeds() {
        let work = Some(Work { bytes: 3_000_000, operations: 30_000_000 });
        let launches = [
            launch("a", 0, 10, work),
            launch("b", 15, 60, None),
            launch("a", 75, 20, work),
            launch("b", 105, 10, work),
        ];
        let (kernels, busy) = summarise(&launches, 2);
        assert_eq!(kernels.iter().map(|kernel| kernel.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
        assert!((busy - 50e-6).abs() < 1e-12);
        // Of 55 us, (5 + 55 + 15 + 5) / 2 us are surely those of kernels.
        assert!((gap_seconds(&launches, 2, 55e-6, 5e-6) - 15e-6).abs() < 1e-12);
        assert_eq!(gap_seconds(&launches, 2, 30e-6, 5e-6), 0.0);
        let a = &kernels[1];
        assert_eq!((a.calls, a.median_seconds), (1.0, 20e-6));
        assert!((a.share - 0.3).abs() < 1e-12 && (a.bytes_per_second.unwrap() - 2e11).abs() < 1.0);
        // One launch of b did not say how much it did: the sum would be wrong.
        assert_eq!(kernels[0].bytes_per_second, None);
    }
}
