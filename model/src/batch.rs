//! Token sequences on their way into a model.

use autograd::Tensor;
use runtime::Device;

use crate::{Error, Result};

/// Rows of tokens with their positions and document boundaries.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// u32 `[batch, time]`: token ids.
    pub tokens: Tensor,
    /// u32 `[batch, time]`: position of each token in its document.
    pub positions: Tensor,
    /// u32 `[batch, time]`: index in its row of each document's first token; `None`: one document per row.
    pub document_start: Option<Tensor>,
}

impl TokenBatch {
    /// Rows of equal length. `document_lengths` cuts each row into documents, which then do not see each other and
    /// whose positions start at 0; lengths must add up to the row's.
    ///
    /// # Errors
    /// [`Error::Batch`] for rows of different lengths or document lengths that do not add up.
    pub fn new(device: &Device, rows: &[Vec<u32>], document_lengths: Option<&[Vec<usize>]>) -> Result<Self> {
        let host = HostBatch::new(rows, document_lengths)?;
        Ok(Self {
            tokens: Tensor::from_slice(device, &host.shape, &host.tokens)?,
            positions: Tensor::from_slice(device, &host.shape, &host.positions)?,
            document_start: match document_lengths {
                Some(_) => Some(Tensor::from_slice(device, &host.shape, &host.starts)?),
                None => None,
            },
        })
    }

    /// Puts other rows into the place of these, in the same memory: as many rows of the same length, cut into documents if
    /// these are.
    ///
    /// # Errors
    /// As [`TokenBatch::new`]; [`Error::Batch`] for rows of another number or length, or documents where there were none.
    pub fn overwrite(&mut self, rows: &[Vec<u32>], document_lengths: Option<&[Vec<usize>]>) -> Result<()> {
        let host = HostBatch::new(rows, document_lengths)?;
        if host.shape != self.tokens.shape() || document_lengths.is_some() != self.document_start.is_some() {
            let message = format!("rows {:?} in the place of {:?}", host.shape, self.tokens.shape());
            return Err(Error::Batch { message });
        }
        self.tokens.overwrite(&host.tokens)?;
        self.positions.overwrite(&host.positions)?;
        if let Some(starts) = &mut self.document_start {
            starts.overwrite(&host.starts)?;
        }
        Ok(())
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.tokens.shape()[0]
    }

    /// Tokens of a row.
    pub fn time(&self) -> usize {
        self.tokens.shape()[1]
    }
}

/// A batch before it goes to its device.
struct HostBatch {
    shape: [usize; 2],
    tokens: Vec<u32>,
    positions: Vec<u32>,
    starts: Vec<u32>,
}

impl HostBatch {
    fn new(rows: &[Vec<u32>], document_lengths: Option<&[Vec<usize>]>) -> Result<Self> {
        let batch = rows.len();
        let time = rows.first().map_or(0, Vec::len);
        if let Some(other) = rows.iter().find(|row| row.len() != time) {
            return Err(Error::Batch { message: format!("rows of {time} and {} tokens in one batch", other.len()) });
        }
        let starts = match document_lengths {
            Some(lengths) => document_starts(lengths, batch, time)?,
            None => vec![0; batch * time],
        };
        let positions = starts.iter().enumerate().map(|(index, start)| (index % time.max(1)) as u32 - start).collect();
        Ok(Self { shape: [batch, time], tokens: rows.concat(), positions, starts })
    }
}

fn document_starts(lengths: &[Vec<usize>], batch: usize, time: usize) -> Result<Vec<u32>> {
    if lengths.len() != batch {
        return Err(Error::Batch { message: format!("document lengths of {} rows for {batch} rows", lengths.len()) });
    }
    let mut starts = Vec::with_capacity(batch * time);
    for row in lengths {
        let total: usize = row.iter().sum();
        if total != time {
            return Err(Error::Batch { message: format!("documents of {total} tokens in a row of {time}") });
        }
        let mut start = 0;
        for &length in row {
            starts.extend(std::iter::repeat_n(start as u32, length));
            start += length;
        }
    }
    Ok(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_begin_anew_in_each_document() {
        let rows = vec![vec![5, 6, 7, 8, 9], vec![1, 2, 3, 4, 5]];
        let batch = TokenBatch::new(&Device::cpu(), &rows, Some(&[vec![2, 3], vec![5]])).unwrap();
        assert_eq!(batch.positions.to_vec::<u32>().unwrap(), [0, 1, 0, 1, 2, 0, 1, 2, 3, 4]);
        assert_eq!(batch.document_start.unwrap().to_vec::<u32>().unwrap(), [0, 0, 2, 2, 2, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn lengths_that_do_not_add_up_are_refused() {
        let rows = vec![vec![1, 2, 3]];
        let message = TokenBatch::new(&Device::cpu(), &rows, Some(&[vec![2]])).unwrap_err().to_string();
        assert!(message.contains("documents of 2 tokens in a row of 3"), "{message}");
        assert!(TokenBatch::new(&Device::cpu(), &[vec![1], vec![1, 2]], None).is_err());
    }
}
