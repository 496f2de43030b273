//! Rows of a token file as tensors for a training step.

use anyhow::Result;
use autograd::Tensor;
use autograd::ops::{IGNORED_LABEL, TopLogProbabilities};
use model::TokenBatch;
use runtime::Device;
use serde::{Deserialize, Serialize};

use super::token_file::Sequence;

/// Which positions count in the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionsThatCount {
    /// Those whose next token is part of an answer: everything in a text, what the assistant says in a chat.
    Answers,
    /// All whose next token belongs to the same document: prompts too.
    All,
}

/// Rows for one forward pass, with what each position is to predict.
#[derive(Debug)]
pub struct Batch {
    /// The rows.
    pub tokens: TokenBatch,
    /// u32 `[batch, time]`: the next token, or [`IGNORED_LABEL`] where the position does not count.
    pub labels: Tensor,
    /// f32 `[batch, time]`: 1 where the position counts, 0 elsewhere.
    pub mask: Tensor,
    /// u32 `[batch, time]`: the same, to look rows up by.
    pub counts: Tensor,
    /// What the teacher said of the positions, where it is known beforehand.
    pub targets: Option<TopLogProbabilities>,
}

impl Batch {
    /// A batch of rows of equal length.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Device, sequences: &[Sequence], positions: PositionsThatCount) -> Result<Self> {
        let host = HostBatch::new(sequences, positions);
        let shape = [sequences.len(), host.rows.first().map_or(0, Vec::len)];
        Ok(Self {
            tokens: TokenBatch::new(device, &host.rows, Some(&host.lengths))?,
            labels: Tensor::from_slice(device, &shape, &host.labels)?,
            mask: Tensor::from_slice(device, &shape, &host.mask())?,
            counts: Tensor::from_slice(device, &shape, &host.counts())?,
            targets: None,
        })
    }

    /// Puts other rows into the place of these, in the same memory. What a teacher said of these goes.
    ///
    /// # Errors
    /// Rows of another number or length; out of memory.
    pub fn overwrite(&mut self, sequences: &[Sequence], positions: PositionsThatCount) -> Result<()> {
        let host = HostBatch::new(sequences, positions);
        self.tokens.overwrite(&host.rows, Some(&host.lengths))?;
        self.labels.overwrite(&host.labels)?;
        self.mask.overwrite(&host.mask())?;
        self.counts.overwrite(&host.counts())?;
        self.targets = None;
        Ok(())
    }
}

/// A batch before it goes to its device.
struct HostBatch {
    rows: Vec<Vec<u32>>,
    lengths: Vec<Vec<usize>>,
    labels: Vec<u32>,
}

impl HostBatch {
    fn new(sequences: &[Sequence], positions: PositionsThatCount) -> Self {
        Self {
            rows: sequences.iter().map(|sequence| sequence.tokens.clone()).collect(),
            lengths: sequences.iter().map(|sequence| sequence.document_lengths.clone()).collect(),
            labels: sequences.iter().flat_map(|sequence| labels(sequence, positions)).collect(),
        }
    }

    fn mask(&self) -> Vec<f32> {
        self.labels.iter().map(|&label| f32::from(label != IGNORED_LABEL)).collect()
    }

    fn counts(&self) -> Vec<u32> {
        self.labels.iter().map(|&label| u32::from(label != IGNORED_LABEL)).collect()
    }
}

/// How many positions of a row count.
pub(crate) fn positions_that_count(sequence: &Sequence, positions: PositionsThatCount) -> u64 {
    labels(sequence, positions).filter(|&label| label != IGNORED_LABEL).count() as u64
}

fn labels(sequence: &Sequence, positions: PositionsThatCount) -> impl Iterator<Item = u32> {
    let time = sequence.tokens.len();
    let mut counts = match positions {
        PositionsThatCount::Answers => sequence.answers.clone(),
        PositionsThatCount::All => sequence.padding.iter().map(|padding| !padding).collect(),
    };
    // A document's first token follows another document: nothing that a position sees predicts it.
    let mut start = 0;
    for length in &sequence.document_lengths {
        counts[start] = false;
        start += length;
    }
    (0..time).map(move |position| {
        let next = position + 1;
        if next < time && counts[next] { sequence.tokens[next] } else { IGNORED_LABEL }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_predicts_the_next_token_of_its_document() {
        let sequence = Sequence {
            tokens: vec![5, 6, 7, 8, 9, 0, 0],
            answers: vec![false, false, true, false, true, false, false],
            padding: vec![false, false, false, false, false, true, true],
            document_lengths: vec![3, 2, 2],
        };
        const NONE: u32 = IGNORED_LABEL;
        let sequences = [sequence];
        let batch = Batch::new(&Device::cpu(), &sequences, PositionsThatCount::Answers).unwrap();
        assert_eq!(batch.labels.to_vec::<u32>().unwrap(), [NONE, 7, NONE, 9, NONE, NONE, NONE]);
        assert_eq!(batch.mask.to_vec::<f32>().unwrap(), [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!(batch.tokens.document_start.as_ref().unwrap().to_vec::<u32>().unwrap(), [0, 0, 0, 3, 3, 5, 5]);
        let all = Batch::new(&Device::cpu(), &sequences, PositionsThatCount::All).unwrap();
        assert_eq!(all.labels.to_vec::<u32>().unwrap(), [6, 7, NONE, 9, NONE, NONE, NONE]);
        assert_eq!(positions_that_count(&sequences[0], PositionsThatCount::Answers), 2);
        assert_eq!(positions_that_count(&sequences[0], PositionsThatCount::All), 3);

        let other = Sequence {
            tokens: vec![9, 8, 7, 6, 5, 4, 3],
            answers: vec![true; 7],
            padding: vec![false; 7],
            document_lengths: vec![1, 6],
        };
        let (mut batch, expected) = (batch, std::slice::from_ref(&other));
        batch.overwrite(expected, PositionsThatCount::All).unwrap();
        let expected = Batch::new(&Device::cpu(), expected, PositionsThatCount::All).unwrap();
        let u32s = |batch: &Batch| {
            let tokens = &batch.tokens;
            let starts = tokens.document_start.as_ref().unwrap();
            [&tokens.tokens, &tokens.positions, starts, &batch.labels, &batch.counts]
                .map(|tensor| tensor.to_vec::<u32>().unwrap())
        };
        assert_eq!(u32s(&batch), u32s(&expected));
        assert_eq!(batch.mask.to_vec::<f32>().unwrap(), expected.mask.to_vec::<f32>().unwrap());
        let short = Sequence { tokens: vec![1], answers: vec![true], padding: vec![false], document_lengths: vec![1] };
        assert!(batch.overwrite(&[short], PositionsThatCount::All).is_err());
    }
}
