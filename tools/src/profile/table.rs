//! The table of operators: each line's time beside what the device allows, what is asked and what others reach.
//!
//! A line's time is the median of CUDA events around the operator, all its kernels and the gaps between them included.
//! Before each repeat a buffer of [`SCRUBBED`] bytes is overwritten: nothing that the operator reads is left in the L2
//! cache, and the host has time to queue the operator while the GPU is still busy, so that launches are not what is timed. Short
//! operators run several times in a row ([`Prepared::calls`](super::Prepared::calls)). A GPU rests before each line.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use autograd::DType;
use runtime::cuda::{Event, Stream};
use runtime::{Buffer, Device, DeviceKind, LaunchRecord, Recording};
use serde::{Deserialize, Serialize};

use super::Ceilings;
use super::lines::{Inputs, Line};
use super::summary::median;

/// Bytes that are overwritten before each repeat; an H100's L2 cache holds 50 MB.
const SCRUBBED: usize = 512 << 20;
/// Repeats before any is timed: kernels are compiled, memory is reserved.
const WARM_UP: usize = 3;
/// How long a GPU rests before a line: what the line before drew would lower the clock of a short one.
const REST: Duration = Duration::from_millis(300);

/// What a line is asked to reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Goal {
    /// At most so many milliseconds.
    Milliseconds(f64),
    /// At least this part of the copy bandwidth of the same run.
    OfCopy(f64),
    /// At most this multiple of the time that another line took in the same run.
    TimesOf(String, f64),
    /// At most so many bytes at a time beyond inputs and results.
    ExtraMemory(u64),
}

/// Someone else's time for the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Whose.
    pub name: String,
    /// Milliseconds, on an H100 80GB HBM3 (`docs/performance.md` says how they were measured).
    pub milliseconds: f64,
}

/// One measured line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The line's name.
    pub name: String,
    /// Its sizes, for people.
    pub sizes: String,
    /// How often it was called in a row in each repeat; older files do not say.
    #[serde(default)]
    pub calls: Option<usize>,
    /// Median seconds of a call.
    pub seconds: f64,
    /// Bytes that a call must move at least.
    pub bytes: u64,
    /// Operations of a call on tensor cores; 0 where there are none.
    pub operations: u64,
    /// The most bytes that the calls in a row held at a time beyond their inputs and results.
    pub extra_memory: u64,
    /// What is asked, all of it.
    pub goals: Vec<Goal>,
    /// What others reach.
    pub peer: Option<Peer>,
}

/// A run of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// The device's name, and its driver's.
    pub device: String,
    /// The day, in UTC.
    pub date: String,
    /// The command that measured.
    pub command: String,
    /// Element type of activations.
    pub precision: String,
    /// Repeats of each line.
    pub repeats: usize,
    /// What the device reaches; none on devices whose times say nothing.
    pub ceilings: Option<Ceilings>,
    /// The lines in order.
    pub lines: Vec<Measured>,
}

impl Table {
    /// A table without lines, for a device whose ceilings were measured.
    ///
    /// # Errors
    /// Driver errors.
    pub fn new(
        device: &Device,
        dtype: DType,
        command: String,
        repeats: usize,
        ceilings: Option<Ceilings>,
    ) -> Result<Self> {
        Ok(Self {
            device: describe(device)?,
            date: today(),
            command,
            precision: dtype.to_string(),
            repeats,
            ceilings,
            lines: Vec::new(),
        })
    }

    /// Reads what `profile operator --json` wrote.
    ///
    /// # Errors
    /// A file that cannot be read or that holds something else.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not what `profile operator --json` writes", path.display()))
    }

    /// Measures a line and adds it.
    ///
    /// # Errors
    /// Those of the operator; out of memory.
    pub fn measure(&mut self, line: &Line, inputs: &Inputs<'_>) -> Result<()> {
        self.lines.push(measure(line, inputs, self.repeats).with_context(|| format!("measuring {}", line.name))?);
        Ok(())
    }

    /// The part of the binding ceiling that a line reaches: of the copy bandwidth, or of the matrix product where that
    /// would take longer.
    pub fn of_ceiling(&self, line: &Measured) -> Option<(f64, &'static str)> {
        let ceilings = self.ceilings?;
        let copied = line.bytes as f64 / ceilings.copy_bytes_per_second;
        let multiplied = line.operations as f64 / ceilings.matrix_operations_per_second;
        Some(if multiplied > copied { (multiplied / line.seconds, "product") } else { (copied / line.seconds, "copy") })
    }

    /// Whether a line reaches all that is asked; `None` if nothing is, where the run does not hold what it is measured
    /// against, and on devices whose times say nothing.
    pub fn reached(&self, line: &Measured) -> Option<bool> {
        let ceilings = self.ceilings?;
        let reached = |goal: &Goal| match goal {
            Goal::Milliseconds(most) => Some(line.seconds * 1e3 <= *most),
            Goal::OfCopy(least) => {
                let copied = line.bytes as f64 / ceilings.copy_bytes_per_second;
                Some(copied / line.seconds >= *least)
            }
            Goal::TimesOf(other, most) => Some(line.seconds <= most * self.find(other)?.seconds),
            Goal::ExtraMemory(most) => Some(line.extra_memory <= *most),
        };
        let verdicts = line.goals.iter().map(reached).collect::<Option<Vec<bool>>>()?;
        (!verdicts.is_empty()).then(|| verdicts.into_iter().all(|reached| reached))
    }

    fn find(&self, name: &str) -> Option<&Measured> {
        self.lines.iter().find(|line| line.name == name)
    }

    /// The lines as columns of text.
    fn cells(&self) -> Vec<[String; COLUMNS]> {
        let cells = |line: &Measured| {
            let ceiling = self.of_ceiling(line).map(|(part, what)| format!("{:.0} % of {what}", 100.0 * part));
            let multiples = line.goals.iter().filter_map(|goal| match goal {
                Goal::TimesOf(other, _) => Some(format!("{:.3} × {other}", line.seconds / self.find(other)?.seconds)),
                _ => None,
            });
            let reaches: Vec<String> = ceiling.into_iter().chain(multiples).collect();
            let goals = line.goals.iter().map(|goal| match goal {
                Goal::Milliseconds(most) => format!("≤ {most} ms"),
                Goal::OfCopy(least) => format!("≥ {:.0} % of copy", 100.0 * least),
                Goal::TimesOf(other, most) => format!("≤ {most} × {other}"),
                Goal::ExtraMemory(most) => format!("≤ {} MiB extra", most >> 20),
            });
            let goals = Some(goals.collect::<Vec<_>>().join(", ")).filter(|goals| !goals.is_empty());
            let reached = self.reached(line).map(|reached| if reached { "yes" } else { "NO" }.to_owned());
            let peer = line.peer.as_ref().map(|peer| format!("{} {} ms", peer.name, peer.milliseconds));
            let ratio = line
                .peer
                .as_ref()
                .filter(|_| self.ceilings.is_some())
                .map(|peer| format!("{:.2}", peer.milliseconds / (line.seconds * 1e3)));
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            [
                line.name.clone(),
                line.sizes.clone(),
                or_dash(line.calls.map(|calls| calls.to_string())),
                milliseconds(line.seconds),
                format!("{:.3}", line.bytes as f64 / 1e9),
                or_dash(Some(reaches.join(", ")).filter(|reaches| !reaches.is_empty())),
                (line.extra_memory >> 20).to_string(),
                or_dash(goals),
                or_dash(reached),
                or_dash(peer),
                or_dash(ratio),
            ]
        };
        self.lines.iter().map(cells).collect()
    }

    fn heading(&self) -> String {
        let ceilings = self.ceilings.map_or("ceilings not measured".to_owned(), |ceilings| {
            format!(
                "copy {:.0} GB/s, our bf16 matrix product {:.0} TFLOP/s",
                ceilings.copy_bytes_per_second / 1e9,
                ceilings.matrix_operations_per_second / 1e12
            )
        });
        format!("{}, {}, {}, median of {}; {ceilings}", self.device, self.date, self.precision, self.repeats)
    }

    /// How many goals are reached, of how many.
    fn score(&self) -> String {
        let verdicts: Vec<bool> = self.lines.iter().filter_map(|line| self.reached(line)).collect();
        format!("{} of {} goals reached", verdicts.iter().filter(|&&reached| reached).count(), verdicts.len())
    }

    /// The table for a terminal.
    pub fn text(&self) -> String {
        let rows: Vec<[String; COLUMNS]> = std::iter::once(TITLES.map(str::to_owned)).chain(self.cells()).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..TITLES.len()).map(width).collect();
        let mut text = format!("{}\n", self.heading());
        for row in &rows {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
        text + &self.score() + "\n"
    }

    /// The table as Markdown, under its command.
    pub fn markdown(&self) -> String {
        let mut text = format!("    {}\n\n{}. {}.\n\n", self.command, self.heading(), self.score());
        let _ = writeln!(text, "| {} |", TITLES.join(" | "));
        let _ = writeln!(text, "|{}", "---|".repeat(TITLES.len()));
        for row in self.cells() {
            let _ = writeln!(text, "| {} |", row.join(" | "));
        }
        text
    }

    /// What became slower or faster than in `before` by more than `tolerance`, what is timed in another way, and lines that are
    /// gone if `whole`: one line of text each, and whether any is a loss.
    pub fn compare(&self, before: &Self, tolerance: f64, whole: bool) -> (Vec<String>, bool) {
        let (mut texts, mut lost) = (Vec::new(), false);
        for old in &before.lines {
            let Some(now) = self.find(&old.name) else {
                if whole {
                    lost = true;
                    texts.push(format!("{} is missing", old.name));
                }
                continue;
            };
            if now.calls != old.calls {
                let calls =
                    |line: &Measured| line.calls.map_or("an unknown number of".to_owned(), |calls| calls.to_string());
                texts.push(format!("{}: timed as {} calls in a row, before as {}", now.name, calls(now), calls(old)));
            }
            let ratio = now.seconds / old.seconds;
            // A time that is not a number is a loss as well.
            let slower = ratio.is_nan() || ratio > 1.0 + tolerance;
            lost |= slower;
            if slower || ratio < 1.0 - tolerance {
                texts.push(format!(
                    "{} is {} by {:.1} %: {} ms, was {} ms",
                    now.name,
                    if slower { "slower" } else { "faster" },
                    100.0 * (ratio - 1.0).abs(),
                    milliseconds(now.seconds),
                    milliseconds(old.seconds)
                ));
            }
        }
        (texts, lost)
    }
}

const COLUMNS: usize = 11;
const TITLES: [&str; COLUMNS] =
    ["operator", "sizes", "calls", "ms", "GB", "reaches", "extra MiB", "asked", "reached", "peer", "peer / ours"];

/// Four significant digits, as times are not known better.
fn milliseconds(seconds: f64) -> String {
    let value = seconds * 1e3;
    let digits = if value >= 100.0 {
        1
    } else if value >= 10.0 {
        2
    } else if value >= 1.0 {
        3
    } else {
        4
    };
    format!("{value:.digits$}")
}

/// Times parts of a run; see the file's head.
pub struct Stopwatch {
    clock: Clock,
    device: Device,
    extra_memory: usize,
}

enum Clock {
    Events {
        stream: Stream,
        scrubbed: Buffer,
        times: Vec<(Event, Event)>,
    },
    Host(Vec<f64>),
    /// No times, but the launches of each timed part.
    Launches(Recording, Vec<Vec<LaunchRecord>>),
}

impl Stopwatch {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let clock = match device.kind() {
            DeviceKind::Cuda(_) => {
                Clock::Events { stream: device.home_stream()?, scrubbed: device.allocate(SCRUBBED)?, times: Vec::new() }
            }
            _ => Clock::Host(Vec::new()),
        };
        Ok(Self { clock, device: device.clone(), extra_memory: 0 })
    }

    /// Times one repeat of an operator. What `part` gives back counts as its result, what it frees as extra memory.
    ///
    /// # Errors
    /// Those of the part; driver errors.
    pub fn time<T>(&mut self, part: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.device.memory_usage().in_use;
        self.device.reset_peak_memory();
        let result = match &mut self.clock {
            Clock::Events { stream, scrubbed, times } => {
                scrubbed.set_zero()?;
                let start = stream.record()?;
                let result = part()?;
                times.push((start, stream.record()?));
                result
            }
            Clock::Host(times) => {
                let start = Instant::now();
                let result = part()?;
                times.push(start.elapsed().as_secs_f64());
                result
            }
            Clock::Launches(recording, launches) => {
                // What ran before is no part of it.
                recording.take_records()?;
                let result = part()?;
                launches.push(recording.take_records()?);
                result
            }
        };
        let usage = self.device.memory_usage();
        self.extra_memory = self.extra_memory.max(usage.peak.saturating_sub(usage.in_use.max(before)));
        Ok(result)
    }

    /// Lets a GPU finish and rest.
    fn rest(&self) -> Result<()> {
        if let Clock::Events { stream, .. } = &self.clock {
            stream.synchronize()?;
            thread::sleep(REST);
        }
        Ok(())
    }

    /// Whether short operators are to be captured in graphs: where launches cost time and are not what is looked at.
    pub fn takes_graphs(&self) -> bool {
        matches!(self.clock, Clock::Events { .. })
    }

    /// Seconds of every repeat since the last call. Waits for them.
    fn take(&mut self) -> Result<Vec<f64>> {
        match &mut self.clock {
            Clock::Events { times, .. } => {
                let times = std::mem::take(times);
                times.iter().map(|(start, end)| Ok(end.elapsed_since(start)?.as_secs_f64())).collect()
            }
            Clock::Host(times) => Ok(std::mem::take(times)),
            Clock::Launches(..) => Ok(Vec::new()),
        }
    }
}

fn measure(line: &Line, inputs: &Inputs<'_>, repeats: usize) -> Result<Measured> {
    let mut prepared = (line.prepare)(inputs)?;
    let mut stopwatch = Stopwatch::new(inputs.device())?;
    stopwatch.rest()?;
    for _ in 0..WARM_UP {
        (prepared.run)(&mut stopwatch)?;
    }
    stopwatch.take()?;
    for _ in 0..repeats.max(1) {
        (prepared.run)(&mut stopwatch)?;
    }
    Ok(Measured {
        name: line.name.to_owned(),
        sizes: line.sizes.to_owned(),
        calls: Some(prepared.calls),
        seconds: median(&mut stopwatch.take()?) / prepared.calls as f64,
        bytes: prepared.bytes,
        operations: prepared.operations,
        extra_memory: stopwatch.extra_memory as u64,
        goals: line.goals.clone(),
        peer: line.peer.clone(),
    })
}

/// The launches of the timed part of a line.
pub struct Launches {
    /// Repeat by repeat.
    pub of_repeats: Vec<Vec<LaunchRecord>>,
    /// How often a repeat runs the operator.
    pub calls: usize,
}

/// Records the launches of the timed part of a line.
///
/// # Errors
/// Those of the operator; out of memory.
pub fn launches_of(line: &Line, inputs: &Inputs<'_>, repeats: usize) -> Result<Launches> {
    let mut prepared = (line.prepare)(inputs)?;
    let recording = inputs.device().record_launches()?;
    let mut stopwatch =
        Stopwatch { clock: Clock::Launches(recording, Vec::new()), device: inputs.device().clone(), extra_memory: 0 };
    for _ in 0..WARM_UP + repeats.max(1) {
        (prepared.run)(&mut stopwatch)?;
    }
    let of_repeats = match stopwatch.clock {
        Clock::Launches(_, mut launches) => launches.split_off(WARM_UP.min(launches.len())),
        _ => Vec::new(),
    };
    Ok(Launches { of_repeats, calls: prepared.calls })
}

/// The product's name and the driver's version of a GPU.
fn describe(device: &Device) -> Result<String> {
    let DeviceKind::Cuda(ordinal) = device.kind() else { return Ok(device.to_string()) };
    let devices = runtime::cuda::devices()?;
    Ok(devices.into_iter().find(|known| known.ordinal == ordinal).map_or(device.to_string(), |known| {
        format!("{}, driver {}", known.name, known.driver_version.as_deref().unwrap_or("unknown"))
    }))
}

/// The day in UTC, as 2026-11-23.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (year, month, day) = model::chat::civil_date(seconds / 86_400);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{lines, summarise};

    fn measured(name: &str, seconds: f64, goals: &[Goal]) -> Measured {
        Measured {
            name: name.to_owned(),
            sizes: "2 x 3".to_owned(),
            calls: Some(1),
            seconds,
            bytes: 3_000_000_000,
            operations: 0,
            extra_memory: 5 << 20,
            goals: goals.to_vec(),
            peer: Some(Peer { name: "someone".to_owned(), milliseconds: 3.0 }),
        }
    }

    fn table(lines: Vec<Measured>) -> Table {
        let ceilings = Ceilings { copy_bytes_per_second: 3e12, matrix_operations_per_second: 4e14, event_seconds: 0.0 };
        Table {
            device: "a GPU".to_owned(),
            date: "2026-11-23".to_owned(),
            command: "profile operator".to_owned(),
            precision: "bf16".to_owned(),
            repeats: 20,
            ceilings: Some(ceilings),
            lines,
        }
    }

    #[test]
    fn goals_are_judged_against_ceilings_other_lines_and_memory() {
        let of_copy = |part| measured("a", 1.25e-3, &[Goal::OfCopy(part)]);
        let times = |most| measured("b", 1.3e-3, &[Goal::TimesOf("a".to_owned(), most), Goal::ExtraMemory(5 << 20)]);
        let judge = |lines: Vec<Measured>| {
            let table = table(lines);
            table.lines.iter().map(|line| table.reached(line)).collect::<Vec<_>>()
        };
        // 3 GB at 3 TB/s take 1 ms: 80 % of copy.
        assert_eq!(judge(vec![of_copy(0.79), of_copy(0.81)]), [Some(true), Some(false)]);
        assert_eq!(judge(vec![of_copy(0.5), times(1.05), times(1.03)])[1..], [Some(true), Some(false)]);
        // Nothing to measure against, and nothing asked.
        assert_eq!(judge(vec![times(1.05), measured("c", 1.0, &[])]), [None, None]);
        let line = measured("a", 2e-3, &[Goal::Milliseconds(2.0), Goal::ExtraMemory(4 << 20)]);
        assert_eq!(judge(vec![line, measured("a", 2e-3, &[Goal::Milliseconds(2.0)])]), [Some(false), Some(true)]);
        assert_eq!(judge(vec![measured("a", f64::NAN, &[Goal::Milliseconds(2.0)])]), [Some(false)]);
    }

    #[test]
    fn a_line_that_lost_more_than_the_tolerance_or_is_gone_is_a_loss() {
        let before = table(vec![measured("a", 1e-3, &[]), measured("b", 1e-3, &[])]);
        let compare = |a: f64, whole| {
            let now = table(vec![measured("a", a, &[]), measured("new", 1.0, &[]), measured("b", 1e-3, &[])]);
            now.compare(&before, 0.05, whole)
        };
        assert_eq!(compare(1.04e-3, true), (vec![], false));
        let (texts, lost) = compare(1.06e-3, true);
        assert!(lost && texts == ["a is slower by 6.0 %: 1.060 ms, was 1.000 ms"], "{texts:?}");
        let (texts, lost) = compare(0.5e-3, true);
        assert!(!lost && texts == ["a is faster by 50.0 %: 0.5000 ms, was 1.000 ms"], "{texts:?}");
        assert!(compare(f64::NAN, true).1);
        let mut in_a_row = measured("a", 1e-3, &[]);
        in_a_row.calls = Some(5);
        let (texts, lost) = table(vec![in_a_row, measured("b", 1e-3, &[])]).compare(&before, 0.05, true);
        assert!(!lost && texts == ["a: timed as 5 calls in a row, before as 1"], "{texts:?}");
        let without_b = table(vec![measured("a", 1e-3, &[])]);
        assert_eq!(without_b.compare(&before, 0.05, true), (vec!["b is missing".to_owned()], true));
        assert_eq!(without_b.compare(&before, 0.05, false), (vec![], false));
    }

    #[test]
    fn markdown_has_a_row_per_line_and_the_score() {
        let markdown = table(vec![measured("a", 2e-3, &[Goal::OfCopy(0.88)]), measured("b", 1e-3, &[])]).markdown();
        assert!(markdown.starts_with("    profile operator\n\na GPU, 2026-11-23, bf16"), "{markdown}");
        assert!(markdown.contains("0 of 1 goals reached"), "{markdown}");
        let row = "| a | 2 x 3 | 1 | 2.000 | 3.000 | 50 % of copy | 5 | ≥ 88 % of copy | NO | someone 3 ms | 1.50 |\n";
        assert!(markdown.contains(row), "{markdown}");
    }

    #[test]
    fn launches_of_calls_in_a_row_are_counted_by_call() -> Result<()> {
        let device = Device::sim();
        let all = lines();
        let line = all.iter().find(|line| line.name == "rms_norm_forward").context("no such line")?;
        let launches = launches_of(line, &Inputs::new(&device, DType::Bf16, 16), 3)?;
        assert_eq!((launches.of_repeats.len(), launches.calls), (3, 2));
        assert!(launches.of_repeats.iter().all(|launches| launches.len() == 2));
        let (kernels, _) = summarise(&launches.of_repeats.concat(), 3 * launches.calls);
        assert_eq!(kernels.iter().map(|kernel| kernel.calls).collect::<Vec<_>>(), [1.0]);
        Ok(())
    }

    #[test]
    fn every_line_runs_on_the_simulator_and_names_differ() -> Result<()> {
        let device = Device::sim();
        let mut table = Table::new(&device, DType::Bf16, "test".to_owned(), 1, None)?;
        let all = lines();
        for line in &all {
            table.measure(line, &Inputs::new(&device, DType::Bf16, 16))?;
        }
        let names: std::collections::BTreeSet<&str> = all.iter().map(|line| line.name).collect();
        assert_eq!(names.len(), all.len());
        for line in &table.lines {
            assert!(line.seconds > 0.0 && line.bytes > 0, "{}", line.name);
            for goal in &line.goals {
                assert!(!matches!(goal, Goal::TimesOf(other, _) if !names.contains(other.as_str())), "{}", line.name);
            }
        }
        Ok(())
    }
}
