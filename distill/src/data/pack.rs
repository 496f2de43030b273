//! From a jsonl file to a token file.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::documents::{Document, Documents};
use super::encode::Encoder;
use super::packing::{EncodedDocument, Packer, Row, TARGET};
use super::token_file::{self, Identity, Summary, TokenFile};
use crate::files::hash_file;
use crate::interruption::Interruption;

/// Documents that are encoded at a time, on all processors.
const ENCODED_TOGETHER: usize = 256;

/// What to do with a document that is longer than a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LongDocuments {
    /// Stop, naming the document.
    Refuse,
    /// Cut it into pieces, each a document of its own.
    Split,
    /// Leave it out, and count it.
    Drop,
}

impl PackOptions {
    /// Lengths that a row may have.
    pub const SEQUENCE_LENGTHS: std::ops::RangeInclusive<usize> = 2..=1 << 24;
}

impl LongDocuments {
    fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Split => "split",
            Self::Drop => "drop",
        }
    }
}

/// How documents are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackOptions {
    /// Tokens of a row.
    pub sequence_length: usize,
    /// What to do with a document that is longer.
    pub long_documents: LongDocuments,
}

/// Packs the documents of `source` into a token file.
///
/// # Errors
/// A document that cannot be read, encoded or packed, named by file and line; a file without documents; a target that
/// cannot be written; an interruption. Nothing appears under the target's name then.
pub fn pack(
    source: &Path,
    target: &Path,
    encoder: &Encoder<'_>,
    options: PackOptions,
    interruption: &Interruption,
) -> Result<TokenFile> {
    token_file::write(target, |add_row| pack_documents(source, encoder, options, interruption, add_row))?;
    TokenFile::open(target)
}

/// The token file of `source`: `source` itself when it is one, `cache` when that was packed from the same documents in
/// the same way, and otherwise a new one at `cache`. `will_pack` is called before the latter.
///
/// # Errors
/// As [`pack`]; a given token file that was packed for another model or row length.
pub fn prepare(
    source: &Path,
    cache: &Path,
    encoder: &Encoder<'_>,
    options: PackOptions,
    interruption: &Interruption,
    will_pack: impl FnOnce(),
) -> Result<TokenFile> {
    if TokenFile::is_one(source) {
        let file = TokenFile::open(source)?;
        let wanted = Identity { source: file.identity().source.clone(), ..identity(String::new(), encoder, options) };
        // How a ready-made file treated long documents and ends is its maker's choice.
        let found = file.identity();
        let wanted = Identity {
            long_documents: found.long_documents.clone(),
            begin_token: found.begin_token,
            end_token: found.end_token,
            ..wanted
        };
        let differences = differences(found, &wanted);
        ensure!(
            differences.is_empty(),
            "the token file {} does not fit this run: {}; pack the documents again",
            source.display(),
            differences.join("; ")
        );
        return Ok(file);
    }
    if cache.exists() {
        let wanted = identity(hash_file(source, interruption)?, encoder, options);
        // A cache that cannot be used is made again, whatever is wrong with it.
        if let Ok(file) = TokenFile::open(cache)
            && file.identity() == &wanted
        {
            return Ok(file);
        }
    }
    will_pack();
    pack(source, cache, encoder, options, interruption)
}

/// What a token file of these documents would be made from.
///
/// # Errors
/// When the documents cannot be read.
pub(crate) fn wanted_identity(
    source: &Path,
    encoder: &Encoder<'_>,
    options: PackOptions,
    interruption: &Interruption,
) -> Result<Identity> {
    if TokenFile::is_one(source) {
        return Ok(TokenFile::open(source)?.identity().clone());
    }
    Ok(identity(hash_file(source, interruption)?, encoder, options))
}

/// In what two token files' origins differ, in words.
pub(crate) fn differences(found: &Identity, wanted: &Identity) -> Vec<String> {
    let mut differences = Vec::new();
    let mut compare = |what: &str, equal: bool, found: String, wanted: String| {
        if !equal {
            differences.push(format!("{what} was {found}, is now {wanted}"));
        }
    };
    let short = |hash: &str| hash.get(..12).unwrap_or("none").to_owned();
    let Identity { source, tokenizer, vocabulary, .. } = found;
    compare("the documents' SHA-256", *source == wanted.source, short(source), short(&wanted.source));
    compare(
        "the SHA-256 of the tokenizer's files",
        *tokenizer == wanted.tokenizer,
        short(tokenizer),
        short(&wanted.tokenizer),
    );
    compare("the vocabulary's SHA-256", *vocabulary == wanted.vocabulary, short(vocabulary), short(&wanted.vocabulary));
    let numbers = [
        ("the vocabulary size", found.vocabulary_size, wanted.vocabulary_size),
        ("the sequence length", found.sequence_length, wanted.sequence_length),
    ];
    for (what, found, wanted) in numbers {
        compare(what, found == wanted, found.to_string(), wanted.to_string());
    }
    let same = found.long_documents == wanted.long_documents;
    compare("the treatment of long documents", same, found.long_documents.clone(), wanted.long_documents.clone());
    let token = |token: Option<u32>| token.map_or("none".to_owned(), |token| token.to_string());
    for (what, found, wanted) in [
        ("the begin token", found.begin_token, wanted.begin_token),
        ("the end token", found.end_token, wanted.end_token),
    ] {
        compare(what, found == wanted, token(found), token(wanted));
    }
    differences
}

fn identity(source: String, encoder: &Encoder<'_>, options: PackOptions) -> Identity {
    Identity {
        source,
        tokenizer: encoder.tokenizer_hash.to_owned(),
        vocabulary: encoder.tokenizer.fingerprint(),
        vocabulary_size: encoder.vocabulary_size,
        sequence_length: options.sequence_length,
        long_documents: options.long_documents.name().to_owned(),
        begin_token: encoder.begin_token,
        end_token: encoder.end_token,
    }
}

fn pack_documents(
    source: &Path,
    encoder: &Encoder<'_>,
    options: PackOptions,
    interruption: &Interruption,
    add_row: &mut dyn FnMut(&Row) -> Result<()>,
) -> Result<(Identity, Summary)> {
    let mut documents = Documents::open(source)?;
    let mut packer = Packer::new(options.sequence_length);
    let mut summary = Summary::default();
    let mut add = |row: Row, summary: &mut Summary| -> Result<()> {
        summary.sequences += 1;
        summary.targets += row.flags.iter().filter(|&&flags| flags & TARGET != 0).count() as u64;
        add_row(&row)
    };
    loop {
        interruption.check()?;
        let group: Vec<Document> = documents.by_ref().take(ENCODED_TOGETHER).collect::<Result<_>>()?;
        if group.is_empty() {
            break;
        }
        let encoded: Vec<Result<EncodedDocument>> =
            group.par_iter().map(|document| encoder.encode(&document.content)).collect();
        for (document, encoded) in group.iter().zip(encoded) {
            let encoded = encoded.with_context(|| documents.place(document))?;
            let pieces = pieces(encoded, options, &mut summary).with_context(|| documents.place(document))?;
            for piece in pieces {
                summary.documents += 1;
                summary.tokens += piece.tokens.len() as u64;
                if let Some(row) = packer.add(&piece) {
                    add(row, &mut summary)?;
                }
            }
        }
    }
    for row in packer.finish() {
        add(row, &mut summary)?;
    }
    ensure!(
        summary.targets > 0,
        "{}: there is nothing to learn in it ({} documents kept, {} empty, {} dropped as too long)",
        source.display(),
        summary.documents,
        summary.empty_documents,
        summary.dropped_documents
    );
    Ok((identity(documents.hash(), encoder, options), summary))
}

/// What of a document goes into rows.
fn pieces(document: EncodedDocument, options: PackOptions, summary: &mut Summary) -> Result<Vec<EncodedDocument>> {
    let (length, limit) = (document.tokens.len(), options.sequence_length);
    if length < 2 {
        summary.empty_documents += 1;
        return Ok(Vec::new());
    }
    if length <= limit {
        return Ok(vec![document]);
    }
    match options.long_documents {
        LongDocuments::Refuse => bail!(
            "the document has {length} tokens, more than a sequence of {limit}: use longer sequences \
             (data.sequence_length), or let long documents be cut or left out (data.long_documents = \"split\" or \"drop\")"
        ),
        LongDocuments::Drop => {
            summary.dropped_documents += 1;
            Ok(Vec::new())
        }
        LongDocuments::Split => {
            summary.split_documents += 1;
            let cut = document.tokens.chunks(limit).zip(document.targets.chunks(limit));
            // A last piece of one token has nothing to predict.
            Ok(cut
                .filter(|(tokens, _)| tokens.len() > 1)
                .map(|(tokens, targets)| EncodedDocument { tokens: tokens.to_vec(), targets: targets.to_vec() })
                .collect())
        }
    }
}
