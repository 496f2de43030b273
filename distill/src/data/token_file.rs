//! Packed rows of tokens in a file that is mapped, not read.
//!
//! ```text
//! 0     magic "GRAFTTOK", version (u32), length of the header (u32)
//! 16    header: JSON, padded with spaces
//! 4064  SHA-256 of all bytes before
//! 4096  rows: each `sequence_length` tokens (u32), then as many flags (u8); all numbers little-endian
//! ```
//!
//! The header holds the rows' own SHA-256. Opening a file checks both and every length, so a file that was cut off,
//! changed or made by something else is an error that says so.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use model::checkpoint::MappedFile;
use serde::{Deserialize, Serialize};

use super::packing::{DOCUMENT_START, PADDING, Row, TARGET};
use crate::files::{self, HashingWriter, hash_bytes};

const MAGIC: &[u8; 8] = b"GRAFTTOK";
const VERSION: u32 = 1;
const HEADER_SPACE: usize = 4096;
const PREAMBLE: usize = 16;
const HASH: usize = 32;
const BYTES_PER_TOKEN: usize = 5;

/// What a token file was made from: when all of it is equal, the rows are equal too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// SHA-256 of the jsonl file.
    pub source: String,
    /// SHA-256 of the tokenizer's files, chat template included.
    pub tokenizer: String,
    /// SHA-256 of which id means which token.
    pub vocabulary: String,
    /// Number of token ids of the model; every token is below it.
    pub vocabulary_size: usize,
    /// Tokens of a row.
    pub sequence_length: usize,
    /// What was done with documents longer than a row: `refuse`, `split` or `drop`.
    pub long_documents: String,
    /// Token put before each text, if any.
    pub begin_token: Option<u32>,
    /// Token put after each text, if any.
    pub end_token: Option<u32>,
}

/// What is in a token file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Documents in the rows; the pieces of a split document count one each.
    pub documents: u64,
    /// Tokens in the rows, without padding.
    pub tokens: u64,
    /// Tokens that count in the loss when only answers do.
    pub targets: u64,
    /// Rows.
    pub sequences: u64,
    /// Documents that were longer than a row and were split.
    pub split_documents: u64,
    /// Documents that were longer than a row and were dropped.
    pub dropped_documents: u64,
    /// Documents without a token to predict (empty or of one token), which were left out.
    pub empty_documents: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    identity: Identity,
    summary: Summary,
    rows_sha256: String,
}

/// An open token file.
pub struct TokenFile {
    path: PathBuf,
    header: Header,
    map: MappedFile,
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids, padding included.
    pub tokens: Vec<u32>,
    /// Whether a token counts in the loss when only answers do. Never set on a document's first token.
    pub answers: Vec<bool>,
    /// Whether a token is padding.
    pub padding: Vec<bool>,
    /// Lengths of the documents in order; they add up to the row's. Padding is a document of its own.
    pub document_lengths: Vec<usize>,
}

impl TokenFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// No such file; one that is not a token file, is of another version, was cut off or changed.
    pub fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let header = read_header(map.bytes()?).with_context(|| {
            format!("{} cannot be used as a token file: pack the data again (grafter data pack)", path.display())
        })?;
        Ok(Self { path: path.to_owned(), header, map })
    }

    /// Whether the file at `path` begins as a token file does.
    pub fn is_one(path: &Path) -> bool {
        use std::io::Read;
        let mut magic = [0; MAGIC.len()];
        File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && &magic == MAGIC
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file was made from.
    pub fn identity(&self) -> &Identity {
        &self.header.identity
    }

    /// What is in the file.
    pub fn summary(&self) -> &Summary {
        &self.header.summary
    }

    /// SHA-256 of the rows.
    pub fn rows_hash(&self) -> &str {
        &self.header.rows_sha256
    }

    /// Number of rows; at least one.
    pub fn sequences(&self) -> u64 {
        self.header.summary.sequences
    }

    /// The row at `index`, which must be below [`TokenFile::sequences`].
    ///
    /// # Errors
    /// When the file became shorter since it was opened.
    pub fn sequence(&self, index: u64) -> Result<Sequence> {
        let length = self.header.identity.sequence_length;
        let start = HEADER_SPACE + index as usize * length * BYTES_PER_TOKEN;
        let (tokens, flags) = self.map.bytes()?[start..start + length * BYTES_PER_TOKEN].split_at(length * 4);
        let has = |bit: u8| flags.iter().map(move |flag| flag & bit != 0);
        let mut document_lengths: Vec<usize> = Vec::new();
        for starts in has(DOCUMENT_START) {
            match document_lengths.last_mut() {
                Some(length) if !starts => *length += 1,
                _ => document_lengths.push(1),
            }
        }
        Ok(Sequence {
            tokens: tokens
                .chunks_exact(4)
                .map(|token| u32::from_le_bytes([token[0], token[1], token[2], token[3]]))
                .collect(),
            answers: has(TARGET).collect(),
            padding: has(PADDING).collect(),
            document_lengths,
        })
    }
}

/// Writes a token file. `rows` hands each finished row to its argument and returns what was made from what.
///
/// # Errors
/// Those of `rows` and of the file system; nothing appears under the file's name then.
pub(super) fn write(
    path: &Path,
    rows: impl FnOnce(&mut dyn FnMut(&Row) -> Result<()>) -> Result<(Identity, Summary)>,
) -> Result<()> {
    files::write_file(path, |writer| {
        writer.write_all(&[0; HEADER_SPACE])?;
        let mut hashing = HashingWriter::new(&mut *writer);
        let (identity, summary) = rows(&mut |row| {
            for token in &row.tokens {
                hashing.write_all(&token.to_le_bytes())?;
            }
            hashing.write_all(&row.flags)?;
            Ok(())
        })?;
        let header = Header { identity, summary, rows_sha256: hashing.finish() };
        writer.seek(SeekFrom::Start(0))?;
        writer.write_all(&header_bytes(&header)?)?;
        Ok(())
    })
}

fn header_bytes(header: &Header) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(header)?;
    ensure!(PREAMBLE + json.len() + HASH <= HEADER_SPACE, "the token file's header is too long");
    let mut bytes = Vec::with_capacity(HEADER_SPACE);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&json);
    bytes.resize(HEADER_SPACE - HASH, b' ');
    let hash: [u8; HASH] = sha2::Digest::finalize(<sha2::Sha256 as sha2::Digest>::new_with_prefix(&bytes)).into();
    bytes.extend_from_slice(&hash);
    Ok(bytes)
}

fn read_header(bytes: &[u8]) -> Result<Header> {
    ensure!(bytes.starts_with(MAGIC), "it does not begin with {:?}", String::from_utf8_lossy(MAGIC));
    ensure!(bytes.len() >= HEADER_SPACE, "it ends within its header, after {} bytes", bytes.len());
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    ensure!(number(8) == VERSION, "it has version {}, this grafter reads version {VERSION}", number(8));
    let (hashed, rest) = bytes.split_at(HEADER_SPACE - HASH);
    ensure!(hash_bytes(hashed) == files::hexadecimal(&rest[..HASH]), "its header was changed (checksum differs)");
    let Some(json) = hashed[PREAMBLE..].get(..number(12) as usize) else {
        bail!("its header has an impossible length")
    };
    let header: Header = serde_json::from_slice(json).context("its header is not what this version writes")?;
    let rows = &bytes[HEADER_SPACE..];
    let expected = (header.summary.sequences as usize)
        .checked_mul(header.identity.sequence_length)
        .and_then(|tokens| tokens.checked_mul(BYTES_PER_TOKEN));
    ensure!(
        expected == Some(rows.len()),
        "it has {} bytes of rows where {} sequences of {} tokens are announced: was it cut off?",
        rows.len(),
        header.summary.sequences,
        header.identity.sequence_length
    );
    ensure!(header.summary.sequences > 0, "it holds no sequence");
    ensure!(hash_bytes(rows) == header.rows_sha256, "its tokens were changed (checksum differs)");
    Ok(header)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn identity(sequence_length: usize) -> Identity {
        Identity {
            source: "s".repeat(64),
            tokenizer: "t".repeat(64),
            vocabulary: "v".repeat(64),
            vocabulary_size: 100,
            sequence_length,
            long_documents: "refuse".to_owned(),
            begin_token: None,
            end_token: Some(2),
        }
    }

    fn row(first: u32) -> Row {
        Row {
            tokens: vec![first, first + 1, first + 2, 7, 0],
            flags: vec![DOCUMENT_START, TARGET, 0, DOCUMENT_START, DOCUMENT_START | PADDING],
        }
    }

    pub(crate) fn written(path: &Path) {
        write(path, |add| {
            for first in [10, 20, 30] {
                add(&row(first))?;
            }
            Ok((identity(5), Summary { sequences: 3, documents: 6, tokens: 12, targets: 3, ..Summary::default() }))
        })
        .unwrap();
    }

    #[test]
    fn rows_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tokens");
        written(&path);
        assert!(TokenFile::is_one(&path));
        let file = TokenFile::open(&path).unwrap();
        assert_eq!((file.sequences(), file.identity()), (3, &identity(5)));
        let sequence = file.sequence(1).unwrap();
        assert_eq!(sequence.tokens, [20, 21, 22, 7, 0]);
        assert_eq!(sequence.answers, [false, true, false, false, false]);
        assert_eq!(sequence.padding, [false, false, false, false, true]);
        assert_eq!(sequence.document_lengths, [3, 1, 1]);
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tokens");
        written(&path);
        let whole = std::fs::read(&path).unwrap();
        for position in (0..whole.len()).step_by(13).chain(HEADER_SPACE - HASH..whole.len()) {
            let mut changed = whole.clone();
            changed[position] ^= 4;
            std::fs::write(&path, &changed).unwrap();
            assert!(TokenFile::open(&path).is_err(), "byte {position}");
        }
        for length in [0, 7, 15, 500, HEADER_SPACE - 1, HEADER_SPACE, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            let message = format!("{:#}", TokenFile::open(&path).err().unwrap());
            assert!(message.contains("x.tokens"), "{message}");
        }
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tokens");
        let message = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            format!("{:#}", TokenFile::open(&path).err().unwrap())
        };
        assert!(message(b"{\"text\": \"hello\"}\n").contains("does not begin with \"GRAFTTOK\""));
        written(&path);
        let mut newer = std::fs::read(&path).unwrap();
        newer[8] = 9;
        assert!(message(&newer).contains("version 9"));
    }
}
