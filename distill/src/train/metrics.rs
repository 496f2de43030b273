//! The loss log, and beside it the clock.
//!
//! `metrics.jsonl` holds what the run computed, a JSON object a line; a run that was interrupted and continued writes the
//! same bytes as one that was not. `timing.jsonl` holds what depends on the clock.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// One update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of the update, counted from 1.
    pub step: u64,
    /// What was minimised, in nats per position that counts.
    pub loss: f64,
    /// The divergence from the teacher; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    /// The cross-entropy against the data; absent where it has no weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cross_entropy: Option<f64>,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// Positions that have counted so far, over all updates.
    pub tokens: u64,
    /// Where the loss leapt and the batch changed nothing: by how many standard deviations it lay above those before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed_over: Option<f64>,
}

/// One look at the validation data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// Updates made before.
    pub step: u64,
    /// What is minimised, in nats per position that counts.
    pub validation_loss: f64,
    /// The divergence from the teacher; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_divergence: Option<f64>,
    /// The cross-entropy against the data.
    pub validation_cross_entropy: f64,
    /// Positions that counted.
    pub validation_tokens: u64,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// A look at the validation data.
    Validation(ValidationRecord),
    /// An update.
    Step(StepRecord),
}

/// A line of `timing.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimingRecord {
    /// The update after which this was written.
    pub step: u64,
    /// What took the time: `step`, `validation` or `checkpoint`.
    pub what: String,
    /// How long it took.
    pub seconds: f64,
    /// Tokens computed (padding included) per second; absent for checkpoints.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// The most bytes of device memory held so far.
    pub peak_memory_bytes: u64,
}

/// A file of JSON lines that only grows.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Log {
    /// Opens a log that continues after its first `bytes` bytes; what follows them is dropped.
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        let open = || -> Result<File> {
            let file = OpenOptions::new().append(true).create(true).open(path)?;
            let length = file.metadata()?.len();
            ensure!(
                length >= bytes,
                "it has {length} bytes, but the checkpoint was made when it had {bytes}: put the file back, or start a \
                 new run"
            );
            file.set_len(bytes)?;
            Ok(file)
        };
        let file = open().with_context(|| format!("continuing {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Adds a line.
    pub fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(|| format!("writing {}", self.path.display()))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Makes everything written so far durable and returns how many bytes that is.
    pub fn sync(&mut self) -> Result<u64> {
        self.file.sync_data().with_context(|| format!("writing {}", self.path.display()))?;
        Ok(self.bytes)
    }
}

/// How many bytes of a timing log belong to the updates up to `step`; lines that cannot be read end it.
pub(super) fn timing_bytes(path: &Path, step: u64) -> u64 {
    let mut text = Vec::new();
    if File::open(path).and_then(|mut file| file.read_to_end(&mut text)).is_err() {
        return 0;
    }
    let belongs = |line: &&[u8]| {
        line.ends_with(b"\n") && serde_json::from_slice::<TimingRecord>(line).is_ok_and(|record| record.step <= step)
    };
    text.split_inclusive(|&byte| byte == b'\n').take_while(belongs).map(|line| line.len() as u64).sum()
}

/// Reads a loss log.
///
/// # Errors
/// When it cannot be read, or a line is no record.
pub fn read_metrics(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    text.lines()
        .enumerate()
        .map(|(index, line)| {
            serde_json::from_str(line).with_context(|| format!("{} line {}", path.display(), index + 1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: 0.1 + step as f64,
            divergence: Some(1.0 / 3.0),
            cross_entropy: None,
            gradient_norm: 1e-30,
            learning_rate: 5e-5,
            tokens: 12,
            passed_over: None,
        }
    }

    #[test]
    fn a_log_continues_where_the_checkpoint_was_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        log.write(&step(1)).unwrap();
        let bytes = log.sync().unwrap();
        log.write(&step(2)).unwrap();
        drop(log);
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 3, \"lo").unwrap();
        let mut log = Log::open(&path, bytes).unwrap();
        let validation = ValidationRecord {
            step: 1,
            validation_loss: 2.0,
            validation_divergence: None,
            validation_cross_entropy: 2.0,
            validation_tokens: 9,
        };
        log.write(&validation).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [Record::Step(step(1)), Record::Validation(validation)]);
        let message = format!("{:#}", Log::open(&path, 10_000).unwrap_err());
        assert!(message.contains("metrics.jsonl") && message.contains("had 10000"), "{message}");
        assert_eq!(read_metrics(&path).unwrap().len(), 2, "a refused log is left alone");
    }

    #[test]
    fn timing_ends_at_the_step_or_at_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("timing.jsonl");
        assert_eq!(timing_bytes(&path, 9), 0);
        let line = |step: u64| {
            let record = TimingRecord {
                step,
                what: "step".to_owned(),
                seconds: 0.5,
                tokens_per_second: Some(8.0),
                peak_memory_bytes: 1,
            };
            serde_json::to_string(&record).unwrap() + "\n"
        };
        fs::write(&path, line(1) + &line(2) + &line(3) + "{\"step\":4").unwrap();
        assert_eq!(timing_bytes(&path, 2), (line(1) + &line(2)).len() as u64);
        assert_eq!(timing_bytes(&path, 9), (line(1) + &line(2) + &line(3)).len() as u64);
    }
}
