//! Filling rows of one length with whole documents.
//!
//! First fit in the documents' order: a document goes into the first open row that has room for it, and into a new row
//! when none has. A limited number of rows is open at a time, so that memory does not grow with the data; the oldest is
//! closed to make way. No document is cut, and rows are padded at the end.

use std::collections::VecDeque;

/// This token counts in the loss as one to be predicted.
pub(super) const TARGET: u8 = 1;
/// This token is the first of its document (or of the padding).
pub(super) const DOCUMENT_START: u8 = 2;
/// This token is padding.
pub(super) const PADDING: u8 = 4;

const OPEN_ROWS: usize = 64;

/// Tokens of one document and, for each, whether it is one to be learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EncodedDocument {
    pub tokens: Vec<u32>,
    pub targets: Vec<bool>,
}

/// A row of tokens with their flags; of full length once it leaves the packer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    pub tokens: Vec<u32>,
    pub flags: Vec<u8>,
}

/// Rows being filled.
#[derive(Debug)]
pub(super) struct Packer {
    length: usize,
    open: VecDeque<Row>,
}

impl Packer {
    /// A packer of rows of `length` tokens.
    pub fn new(length: usize) -> Self {
        Self { length, open: VecDeque::new() }
    }

    /// Takes a document of at most a row's length. Returns a row that is finished by it, if one is.
    pub fn add(&mut self, document: &EncodedDocument) -> Option<Row> {
        debug_assert!(document.tokens.len() <= self.length);
        let room = |row: &Row| self.length - row.tokens.len() >= document.tokens.len();
        let index = match self.open.iter().position(room) {
            Some(index) => index,
            None => {
                self.open.push_back(Row::default());
                self.open.len() - 1
            }
        };
        let row = &mut self.open[index];
        for (position, (&token, &target)) in document.tokens.iter().zip(&document.targets).enumerate() {
            row.tokens.push(token);
            // Nothing comes before a document's first token that could predict it.
            row.flags.push(if position == 0 { DOCUMENT_START } else { u8::from(target) * TARGET });
        }
        if row.tokens.len() == self.length {
            return self.open.remove(index);
        }
        if self.open.len() > OPEN_ROWS { self.open.pop_front().map(|row| padded(row, self.length)) } else { None }
    }

    /// The rows still open, oldest first.
    pub fn finish(self) -> impl Iterator<Item = Row> {
        self.open.into_iter().map(move |row| padded(row, self.length))
    }
}

fn padded(mut row: Row, length: usize) -> Row {
    let documents_end = row.tokens.len();
    row.tokens.resize(length, 0);
    row.flags.resize(length, PADDING);
    if let Some(first) = row.flags.get_mut(documents_end) {
        *first |= DOCUMENT_START;
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(first: u32, length: usize) -> EncodedDocument {
        EncodedDocument {
            tokens: (0..length as u32).map(|offset| first + offset).collect(),
            targets: (0..length).map(|position| position >= length / 2).collect(),
        }
    }

    #[test]
    fn documents_stay_whole_and_go_where_they_first_fit() {
        let mut packer = Packer::new(8);
        assert_eq!(packer.add(&document(10, 5)), None);
        assert_eq!(packer.add(&document(20, 4)), None);
        let full = packer.add(&document(30, 3)).unwrap();
        assert_eq!(full.tokens, [10, 11, 12, 13, 14, 30, 31, 32]);
        assert_eq!(
            full.flags,
            [DOCUMENT_START, 0, TARGET, TARGET, TARGET, DOCUMENT_START, TARGET, TARGET],
            "a document's first token is never a target"
        );
        let rest: Vec<Row> = packer.finish().collect();
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].tokens, [20, 21, 22, 23, 0, 0, 0, 0]);
        assert_eq!(rest[0].flags[4..], [DOCUMENT_START | PADDING, PADDING, PADDING, PADDING]);
    }

    #[test]
    fn no_token_is_lost_and_memory_is_bounded() {
        let mut packer = Packer::new(16);
        let mut rows = Vec::new();
        let lengths: Vec<usize> = (0..5000).map(|index| 2 + index * 7919 % 15).collect();
        for (index, &length) in lengths.iter().enumerate() {
            rows.extend(packer.add(&document(index as u32 * 100 + 1, length)));
            assert!(packer.open.len() <= OPEN_ROWS);
        }
        rows.extend(packer.finish());
        assert!(rows.iter().all(|row| row.tokens.len() == 16 && row.flags.len() == 16));
        let starts = |row: &Row| row.flags.iter().filter(|&&flag| flag == DOCUMENT_START).count();
        assert_eq!(rows.iter().map(starts).sum::<usize>(), lengths.len());
        let mut tokens: Vec<u32> =
            rows.iter().flat_map(|row| &row.tokens).copied().filter(|&token| token != 0).collect();
        tokens.sort_unstable();
        let mut expected: Vec<u32> = lengths
            .iter()
            .enumerate()
            .flat_map(|(index, &length)| document(index as u32 * 100 + 1, length).tokens)
            .collect();
        expected.sort_unstable();
        assert_eq!(tokens, expected);
        let filled = expected.len() as f64 / (rows.len() * 16) as f64;
        assert!(filled > 0.95, "only {filled} of the rows is filled");
    }
}
