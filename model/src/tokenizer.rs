//! Text to token ids and back, as a model folder's `tokenizer.json` says.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::{Error, Result, json};

/// A tokenizer with its special tokens.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    vocabulary_size: usize,
}

/// The tokens that a chat template can refer to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a sequence.
    pub bos: Option<String>,
    /// Ends a sequence.
    pub eos: Option<String>,
    /// Fills up a batch.
    pub pad: Option<String>,
    /// Stands for what has no token.
    pub unknown: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and the special tokens from `tokenizer_config.json` where there is one.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] for files that are missing or malformed.
    pub fn load(folder: &Path) -> Result<Self> {
        json::expect_folder(folder)?;
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            let advice = if folder.join("tokenizer.model").exists() {
                "; there is a tokenizer.model: load and save it once with transformers to get this file"
            } else {
                ": a model folder needs it to turn text into tokens"
            };
            return Err(Error::format(&path, format!("this file is missing{advice}")));
        }
        let config = folder.join("tokenizer_config.json");
        let special =
            if config.exists() { SpecialTokens::read(&json::read_object(&config)?) } else { Default::default() };
        Self::from_json(&json::read_text(&path)?, special).map_err(|error| Error::format(&path, error.to_string()))
    }

    /// A tokenizer from the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text describes none.
    pub fn from_json(text: &str, special: SpecialTokens) -> Result<Self> {
        let fail = |message: String| Error::Tokenizer { message };
        let mut inner = tokenizers::Tokenizer::from_bytes(text.as_bytes())
            .map_err(|error| fail(format!("not a tokenizer that is understood: {error}")))?;
        inner.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        inner.with_padding(None);
        let vocabulary_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if vocabulary_size == 0 {
            return Err(fail("its vocabulary is empty".to_owned()));
        }
        Ok(Self { inner, special, vocabulary_size })
    }

    /// The token ids of a text. Special tokens in the text are recognised. `add_special` adds those that the tokenizer
    /// puts around a text (a BOS, for some models).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer gives up on the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        Ok(self.inner.encode_fast(text, add_special).map_err(failed)?.get_ids().to_vec())
    }

    /// The token ids of a text, none added, each with the bytes of the text that it covers.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_ranges(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        Ok(encoding
            .get_ids()
            .iter()
            .zip(encoding.get_offsets())
            .map(|(id, (begin, end))| (*id, *begin..*end))
            .collect())
    }

    /// The text of token ids; ids without a token are left out, special tokens too if `skip_special`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer gives up.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(failed)
    }

    /// Decodes tokens one by one.
    pub fn stream(&self, skip_special: bool) -> TokenStream<'_> {
        TokenStream { tokenizer: self, skip_special, ids: Vec::new(), shown: 0 }
    }

    /// The id of a token given by its text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, in the tokenizer's own alphabet.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the greatest id.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// The special tokens.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// SHA-256 of which id means which token, in hexadecimal: equal for teacher and student whose logits can be
    /// compared.
    pub fn fingerprint(&self) -> String {
        let mut vocabulary: Vec<(u32, String)> =
            self.inner.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        vocabulary.sort_unstable();
        let mut hash = Sha256::new();
        for (id, token) in &vocabulary {
            hash.update(id.to_le_bytes());
            hash.update((token.len() as u64).to_le_bytes());
            hash.update(token.as_bytes());
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Tokenizer({} tokens)", self.vocabulary_size)
    }
}

impl SpecialTokens {
    /// From a `tokenizer_config.json`, where each is a string or an object with `content`.
    pub fn read(config: &Map<String, Value>) -> Self {
        let token = |key: &str| {
            let value = config.get(key)?;
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
        };
        Self { bos: token("bos_token"), eos: token("eos_token"), pad: token("pad_token"), unknown: token("unk_token") }
    }
}

/// Turns tokens into text as they come, holding a character back until all its tokens are there.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Tokens not shown yet, after those shown last. The latter keep what decoders do at the beginning of a text
    /// (dropping a space) out of the pieces.
    ids: Vec<u32>,
    /// How many of `ids` have been shown.
    shown: usize,
}

impl TokenStream<'_> {
    /// The text that became certain with this token; empty while a character is incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let piece = self.pending()?;
        if piece.is_empty() || piece.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(piece)
    }

    /// What was held back when no more tokens come: an incomplete character, as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let shown = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(all.get(shown.len()..).unwrap_or_default().to_owned())
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer { message: error.to_string() }
}
