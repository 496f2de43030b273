//! The loss log once more, in the format of TensorBoard: `tensorboard --logdir RUN` shows it.
//!
//! The file follows from `metrics.jsonl` and `timing.jsonl` alone. A run that continues writes it anew from what those two
//! keep, so that it never says anything else than they do. Its clock is the time that the run has computed for: it
//! stands still between a kill and the resumption.
//!
//! A file is a sequence of TFRecords (length, its checksum, data, its checksum), each an `Event` of TensorBoard's
//! protocol buffers; only the few fields that scalars need are written.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::metrics::{Record, TimingRecord};
use crate::files;

/// TensorBoard reads the files that have `tfevents` in their names.
pub(crate) const EVENTS: &str = "events.out.tfevents.0.grafter";

/// A run's event file.
#[derive(Debug)]
pub(super) struct Events {
    path: PathBuf,
    file: File,
    /// Seconds computed so far.
    seconds: f64,
}

impl Events {
    /// Writes the file anew from what the run's logs hold, and leaves it open for what follows.
    ///
    /// # Errors
    /// A folder that cannot be written, a full disk.
    pub fn open(path: &Path, records: &[Record], timing: &[TimingRecord]) -> Result<Self> {
        let mut seconds = 0.0;
        let mut clock = HashMap::new();
        for line in timing {
            seconds += line.seconds;
            clock.insert((line.step, line.what.as_str()), (seconds, line.tokens_per_second));
        }
        files::write_file(path, |writer| {
            writer.write_all(&framed(&version()))?;
            let mut now = 0.0;
            for record in records {
                let key = match record {
                    Record::Step(step) => (step.step, "step"),
                    Record::Validation(validation) => (validation.step, "validation"),
                };
                let known = clock.get(&key).copied();
                let tokens_per_second = known.and_then(|(_, tokens_per_second)| tokens_per_second);
                now = known.map_or(now, |(then, _)| then);
                writer.write_all(&framed(&event(record, now, tokens_per_second)))?;
            }
            Ok(())
        })?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file, seconds })
    }

    /// Adds a record that took the time of `timing`.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&mut self, record: &Record, timing: &TimingRecord) -> Result<()> {
        self.pass(timing);
        let bytes = framed(&event(record, self.seconds, timing.tokens_per_second));
        self.file.write_all(&bytes).with_context(|| format!("writing {}", self.path.display()))
    }

    /// Moves the clock on.
    pub fn pass(&mut self, timing: &TimingRecord) {
        self.seconds += timing.seconds;
    }
}

/// The whole lines of a timing log; lines that cannot be read end it.
pub(super) fn read_timing(path: &Path) -> Vec<TimingRecord> {
    let Ok(text) = fs::read_to_string(path) else { return Vec::new() };
    text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
}

/// An event with all scalars of a record.
fn event(record: &Record, seconds: f64, tokens_per_second: Option<f64>) -> Vec<u8> {
    let (step, scalars) = match record {
        Record::Step(step) => (
            step.step,
            vec![
                ("train/loss", Some(step.loss)),
                ("train/divergence", step.divergence),
                ("train/cross_entropy", step.cross_entropy),
                ("train/gradient_norm", Some(step.gradient_norm)),
                ("train/learning_rate", Some(step.learning_rate)),
                ("train/tokens_per_second", tokens_per_second),
            ],
        ),
        Record::Validation(validation) => (
            validation.step,
            vec![
                ("validation/loss", Some(validation.validation_loss)),
                ("validation/divergence", validation.validation_divergence),
                ("validation/cross_entropy", Some(validation.validation_cross_entropy)),
            ],
        ),
    };
    let mut summary = Vec::new();
    for (tag, value) in scalars {
        let Some(value) = value else { continue };
        let mut scalar = Vec::new();
        put_bytes(&mut scalar, 1, tag.as_bytes());
        put_key(&mut scalar, 2, WireType::Fixed32);
        scalar.extend((value as f32).to_le_bytes());
        put_bytes(&mut summary, 1, &scalar);
    }
    let mut event = wall_time(seconds);
    put_key(&mut event, 2, WireType::Varint);
    put_varint(&mut event, step);
    put_bytes(&mut event, 5, &summary);
    event
}

/// The event that begins every file.
fn version() -> Vec<u8> {
    let mut event = wall_time(0.0);
    put_bytes(&mut event, 3, b"brain.Event:2");
    event
}

fn wall_time(seconds: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put_key(&mut event, 1, WireType::Fixed64);
    event.extend(seconds.to_le_bytes());
    event
}

/// How a field of a protocol buffer is written.
#[derive(Clone, Copy)]
enum WireType {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn put_key(message: &mut Vec<u8>, field: u64, wire_type: WireType) {
    put_varint(message, field << 3 | wire_type as u64);
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(message, field, WireType::Bytes);
    put_varint(message, bytes.len() as u64);
    message.extend(bytes);
}

fn put_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// Data as a TFRecord.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(data);
    record.extend(masked(crc32c(data)).to_le_bytes());
    record
}

/// TFRecord's guard against checksums of data that hold checksums.
fn masked(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: events are small.
fn crc32c(data: &[u8]) -> u32 {
    let mut remainder = u32::MAX;
    for &byte in data {
        remainder ^= u32::from(byte);
        for _ in 0..8 {
            remainder = remainder >> 1 ^ if remainder & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !remainder
}

#[cfg(test)]
mod tests {
    use super::super::{StepRecord, ValidationRecord};
    use super::*;

    #[test]
    fn the_checksum_is_the_published_one() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn an_event_has_the_bytes_of_the_protocol() {
        let validation = ValidationRecord {
            step: 300,
            validation_loss: 1.5,
            validation_divergence: None,
            validation_cross_entropy: 2.0,
            validation_tokens: 9,
        };
        let expected = [
            // wall_time, a double; step, 300; summary, of two values: tag and simple_value, a float.
            &b"\x09\0\0\0\0\0\0\xf8\x3f"[..],
            b"\x10\xac\x02",
            b"\x2a\x39",
            b"\x0a\x16\x0a\x0fvalidation/loss\x15\0\0\xc0\x3f",
            b"\x0a\x1f\x0a\x18validation/cross_entropy\x15\0\0\0\x40",
        ];
        // Two values with key and length each: 2 + 22 and 2 + 31 bytes.
        assert_eq!(event(&Record::Validation(validation), 1.5, None), expected.concat());
    }

    #[test]
    fn a_file_made_anew_is_the_one_that_grew() {
        let folder = tempfile::tempdir().unwrap();
        let record = |step: u64| {
            Record::Step(StepRecord {
                step,
                loss: 0.5,
                divergence: Some(0.5),
                cross_entropy: None,
                gradient_norm: 2.0,
                learning_rate: 1e-3,
                tokens: 7,
                passed_over: None,
            })
        };
        let timing = |step: u64, what: &str| TimingRecord {
            step,
            what: what.to_owned(),
            seconds: 0.1 * step as f64,
            tokens_per_second: (what == "step").then_some(100.0),
            peak_memory_bytes: 1,
        };
        let (grown, anew) = (folder.path().join("grown"), folder.path().join("anew"));
        let mut events = Events::open(&grown, &[], &[]).unwrap();
        let log = [timing(1, "step"), timing(1, "checkpoint"), timing(2, "step")];
        events.write(&record(1), &log[0]).unwrap();
        events.pass(&log[1]);
        events.write(&record(2), &log[2]).unwrap();
        Events::open(&anew, &[record(1), record(2)], &log).unwrap();
        assert_eq!(fs::read(&grown).unwrap(), fs::read(&anew).unwrap());
        assert!(fs::read(&grown).unwrap().len() > 200);
    }
}
