//! From documents to tokens, and which of them are to be learned.

use anyhow::{Result, bail, ensure};
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use serde_json::Value;

use super::documents::Content;
use super::packing::EncodedDocument;

/// What turns documents into tokens.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// SHA-256 of the tokenizer's files, chat template included.
    pub tokenizer_hash: &'a str,
    /// The model's chat template, for documents that are chats.
    pub template: Option<&'a ChatTemplate>,
    /// Number of token ids that the model has.
    pub vocabulary_size: usize,
    /// Token put before each text.
    pub begin_token: Option<u32>,
    /// Token put after each text.
    pub end_token: Option<u32>,
}

impl Encoder<'_> {
    /// The tokens of a document. Everything in a text is to be learned; in a chat what the assistant says, up to and
    /// with what the template puts after it.
    ///
    /// # Errors
    /// A chat without a template, or one that the template does not take; a token id outside the vocabulary.
    pub(crate) fn encode(&self, content: &Content) -> Result<EncodedDocument> {
        let document = match content {
            Content::Text(text) => {
                let tokens: Vec<u32> = self
                    .begin_token
                    .into_iter()
                    .chain(self.tokenizer.encode(text, false)?)
                    .chain(self.end_token)
                    .collect();
                EncodedDocument { targets: vec![true; tokens.len()], tokens }
            }
            Content::Messages(messages) => self.encode_chat(messages)?,
        };
        match document.tokens.iter().find(|&&token| token as usize >= self.vocabulary_size) {
            Some(token) => bail!(
                "token id {token} ({:?}) is outside the model's vocabulary of {} tokens: the tokenizer belongs to another \
                 model",
                self.tokenizer.token(*token).unwrap_or_default(),
                self.vocabulary_size
            ),
            None => Ok(document),
        }
    }

    fn encode_chat(&self, messages: &[Value]) -> Result<EncodedDocument> {
        let Some(template) = self.template else {
            bail!("it is a chat, but the model folder has no chat template: add one, or use texts");
        };
        let encoded = template.encode(self.tokenizer, messages)?;
        ensure!(
            encoded.assistant.contains(&true),
            "no message is the assistant's, so there is nothing to learn in this chat"
        );
        Ok(EncodedDocument { tokens: encoded.ids, targets: encoded.assistant })
    }
}
