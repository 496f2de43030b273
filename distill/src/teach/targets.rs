//! What a teacher said of rows of tokens, in a file that is mapped, not read.
//!
//! `targets.bin` holds for each row `sequence_length · top` token ids (u32), as many log-probabilities (f32) and
//! `sequence_length` logarithms of the rest's mass (f32), all little-endian: `sequence_length · (8 · top + 4)` bytes. It counts once
//! `targets.json` says what it is and has its SHA-256.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use autograd::Tensor;
use autograd::ops::TopLogProbabilities;
use model::checkpoint::MappedFile;
use runtime::Device;
use serde::{Deserialize, Serialize};

use crate::data::TokenFile;
use crate::files;
use crate::interruption::Interruption;

pub(super) const TARGETS: &str = "targets.bin";
pub(super) const DESCRIPTION: &str = "targets.json";

/// What targets are of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// SHA-256 of the teacher's configuration and weights.
    pub teacher: String,
    /// SHA-256 of the rows of the token file.
    pub rows: String,
    /// Rows.
    pub sequences: u64,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// Tokens listed of every position.
    pub top: usize,
    /// Divided the teacher's logits.
    pub temperature: f64,
    /// Mean probability of all tokens that are not listed, over all positions.
    pub mean_tail: f64,
    /// SHA-256 of `targets.bin`.
    pub sha256: String,
}

/// An open folder of targets.
pub struct Targets {
    description: Description,
    map: MappedFile,
}

impl Targets {
    /// Opens and checks the targets in a folder.
    ///
    /// # Errors
    /// A folder without finished targets; a file that was cut off or changed; an interruption.
    pub fn open(folder: &Path, interruption: &Interruption) -> Result<Self> {
        let description: Description = files::read_json(&folder.join(DESCRIPTION))?.with_context(|| {
            format!(
                "{} holds no finished targets: it has no {DESCRIPTION} (grafter teach makes them)",
                folder.display()
            )
        })?;
        let path: PathBuf = folder.join(TARGETS);
        let map = MappedFile::open(&path)?;
        let (bytes, expected) =
            (map.bytes()?.len(), description.row_bytes().checked_mul(description.sequences as usize));
        ensure!(
            Some(bytes) == expected,
            "{} has {bytes} bytes where {} rows of {} are announced: was it cut off?",
            path.display(),
            description.sequences,
            description.row_bytes()
        );
        ensure!(
            files::hash_file(&path, interruption)? == description.sha256,
            "{} was changed (checksum differs): make it again",
            path.display()
        );
        Ok(Self { description, map })
    }

    /// What they are of.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// That they are what a teacher said of these rows at this temperature. `key` and `folder` are named in errors.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, key: &str, teacher: &str, rows: &TokenFile, temperature: f64) -> Result<()> {
        let Description { teacher: of_teacher, rows: of_rows, temperature: at, .. } = &self.description;
        ensure!(
            of_teacher == teacher,
            "{key}: these are another teacher's targets than model.teacher's: make them with that model (grafter teach)"
        );
        ensure!(
            of_rows == rows.rows_hash(),
            "{key}: these are targets of other rows than those of {}: pack the data in the same way (--sequence-length, \
             --long-documents, begin and end token), or make the targets again (grafter teach)",
            rows.path().display()
        );
        ensure!(
            *at == temperature,
            "{key}: these targets were made at temperature {at}, but loss.temperature is {temperature}: give the same"
        );
        Ok(())
    }

    /// Those of some rows, `[rows, sequence_length, top]`.
    ///
    /// # Errors
    /// When the file became shorter since it was opened; out of memory.
    pub fn rows(&self, device: &Device, rows: &[u64]) -> Result<TopLogProbabilities> {
        let Description { sequence_length, top, .. } = self.description;
        let (listed, row_bytes) = (4 * sequence_length * top, self.description.row_bytes());
        let bytes = self.map.bytes()?;
        let words = |range: std::ops::Range<usize>| -> Vec<[u8; 4]> {
            let of_row = |row: &u64| {
                let start = *row as usize * row_bytes;
                bytes[start + range.start..start + range.end]
                    .chunks_exact(4)
                    .map(|word| [word[0], word[1], word[2], word[3]])
            };
            rows.iter().flat_map(of_row).collect()
        };
        let floats = |range| -> Vec<f32> { words(range).into_iter().map(f32::from_le_bytes).collect() };
        let tokens: Vec<u32> = words(0..listed).into_iter().map(u32::from_le_bytes).collect();
        let shape = [rows.len(), sequence_length, top];
        Ok(TopLogProbabilities {
            tokens: Tensor::from_slice(device, &shape, &tokens)?,
            log_probabilities: Tensor::from_slice(device, &shape, &floats(listed..2 * listed))?,
            tail: Tensor::from_slice(device, &shape[..2], &floats(2 * listed..row_bytes))?,
        })
    }
}

impl Description {
    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        self.sequence_length * (8 * self.top + 4)
    }
}

/// Rows of one batch as they are stored, one after the other.
pub(super) fn bytes_of(top: &TopLogProbabilities, rows: usize) -> Result<Vec<u8>> {
    let (tokens, log_probabilities) = (top.tokens.to_vec::<u32>()?, top.log_probabilities.to_vec::<f32>()?);
    let tail = top.tail.to_vec::<f32>()?;
    let (listed, length) = (tokens.len() / rows, tail.len() / rows);
    let mut bytes = Vec::with_capacity(8 * tokens.len() + 4 * tail.len());
    for row in 0..rows {
        bytes.extend(tokens[row * listed..][..listed].iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend(log_probabilities[row * listed..][..listed].iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend(tail[row * length..][..length].iter().flat_map(|number| number.to_le_bytes()));
    }
    Ok(bytes)
}
