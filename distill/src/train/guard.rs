//! The guard against batches whose loss leaps: an update from them can undo many others.

use std::collections::VecDeque;

use anyhow::{Result, ensure};

use super::metrics::Record;
use crate::config::{LEAST_SPIKE_WINDOW, TrainingSection};

/// So many batches in a row are not chance: something is wrong with the run, and it stops.
const MOST_IN_A_ROW: u64 = 20;
/// Losses that hardly differ would make every ripple a leap: the standard deviation counts as at least this share of
/// the mean.
const LEAST_DEVIATION: f64 = 0.01;

/// Knows the losses of the last batches that were learned from. What it knows follows from the loss log alone, so that a
/// run which continues judges as one that was never ended.
#[derive(Debug)]
pub(super) struct SpikeGuard {
    threshold: f64,
    window: usize,
    losses: VecDeque<f64>,
    passed_over: u64,
    in_a_row: u64,
}

impl SpikeGuard {
    /// A guard that has seen the batches in a loss log.
    pub fn new(section: &TrainingSection, records: &[Record]) -> Self {
        let mut guard = Self {
            threshold: section.spike_threshold,
            window: section.spike_window,
            losses: VecDeque::new(),
            passed_over: 0,
            in_a_row: 0,
        };
        for record in records {
            if let Record::Step(step) = record {
                match step.passed_over {
                    Some(_) => guard.pass_over(),
                    None => guard.learn(step.loss),
                }
            }
        }
        guard
    }

    /// Judges a batch by its loss, and remembers it: the number of standard deviations above the mean for one that must
    /// not be learned from.
    ///
    /// # Errors
    /// Too many of them in a row.
    pub fn judge(&mut self, loss: f64) -> Result<Option<f64>> {
        let score = self.score(loss).filter(|&score| self.threshold > 0.0 && score > self.threshold);
        match score {
            Some(score) => {
                self.pass_over();
                ensure!(
                    self.in_a_row < MOST_IN_A_ROW,
                    "{MOST_IN_A_ROW} batches in a row have a loss more than {} standard deviations above that of the {} \
                     before them (now {loss:.4}, {score:.1} deviations): use a smaller training.learning_rate, look at \
                     the data, or set training.spike_threshold = 0; earlier checkpoints are as they were",
                    self.threshold,
                    self.losses.len()
                );
            }
            None => self.learn(loss),
        }
        Ok(score)
    }

    /// How many batches were passed over so far.
    pub fn passed_over(&self) -> u64 {
        self.passed_over
    }

    fn score(&self, loss: f64) -> Option<f64> {
        if self.losses.len() < LEAST_SPIKE_WINDOW {
            return None;
        }
        let count = self.losses.len() as f64;
        let mean = self.losses.iter().sum::<f64>() / count;
        let variance = self.losses.iter().map(|loss| (loss - mean) * (loss - mean)).sum::<f64>() / count;
        Some((loss - mean) / variance.sqrt().max(LEAST_DEVIATION * mean.abs()).max(f64::MIN_POSITIVE))
    }

    fn learn(&mut self, loss: f64) {
        self.in_a_row = 0;
        self.losses.push_back(loss);
        if self.losses.len() > self.window {
            self.losses.pop_front();
        }
    }

    fn pass_over(&mut self) {
        self.passed_over += 1;
        self.in_a_row += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RunConfig, Task};
    use crate::train::StepRecord;

    fn section() -> TrainingSection {
        let mut section = RunConfig::defaults(Task::Distill).training;
        section.spike_threshold = 6.0;
        section.spike_window = 32;
        section
    }

    fn usual(step: u64) -> f64 {
        1.0 + 0.1 * (step as f64 * 2.4).sin()
    }

    #[test]
    fn a_leap_is_passed_over_and_a_rerun_judges_alike() {
        let losses: Vec<f64> = (1..=60).map(|step| if step == 40 { 3.0 } else { usual(step) }).collect();
        let mut whole = SpikeGuard::new(&section(), &[]);
        let mut records = Vec::new();
        let mut judged = Vec::new();
        for (index, &loss) in losses.iter().enumerate() {
            let passed_over = whole.judge(loss).unwrap();
            judged.push(passed_over);
            records.push(Record::Step(StepRecord {
                step: index as u64 + 1,
                loss,
                divergence: None,
                cross_entropy: None,
                gradient_norm: 1.0,
                learning_rate: 1.0,
                tokens: 1,
                passed_over,
            }));
        }
        let score = judged[39].unwrap();
        // The deviation of a sine of height 0.1 is 0.1 / √2.
        assert!((score - 2.0 / 0.0707).abs() < 2.0, "{score}");
        assert_eq!(judged.iter().flatten().count(), 1);
        // A run that continues from the log at any step judges as the whole one.
        for begin in [1, 30, 39, 40, 55] {
            let mut resumed = SpikeGuard::new(&section(), &records[..begin]);
            let again: Vec<Option<f64>> = losses[begin..].iter().map(|&loss| resumed.judge(loss).unwrap()).collect();
            assert_eq!(again, judged[begin..], "from {begin}");
            assert_eq!(resumed.passed_over(), 1);
        }
        let mut off = SpikeGuard::new(&TrainingSection { spike_threshold: 0.0, ..section() }, &records[..30]);
        assert_eq!(off.judge(1e9).unwrap(), None);
    }

    #[test]
    fn losses_that_stay_high_end_the_run() {
        let mut guard = SpikeGuard::new(&section(), &[]);
        for step in 1..=32 {
            assert_eq!(guard.judge(usual(step)).unwrap(), None);
        }
        let error = (1..=MOST_IN_A_ROW).find_map(|_| guard.judge(9.0).err()).unwrap().to_string();
        assert!(error.contains("20 batches in a row") && error.contains("smaller training.learning_rate"), "{error}");
        assert_eq!(guard.passed_over(), MOST_IN_A_ROW);
    }
}
