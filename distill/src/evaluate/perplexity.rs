//! How well a model predicts documents.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use autograd::ops::{self, IGNORED_LABEL};
use autograd::{Tape, Tensor};
use model::{Model, TokenBatch};
use runtime::Device;
use serde::Serialize;

use crate::data::{Documents, Encoder};

/// How the documents were predicted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// Documents with at least one token to predict.
    pub documents: u64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Mean negative logarithm of the predicted tokens' probability, in nats.
    pub mean_nll: f64,
    /// `e` to the power of that.
    pub perplexity: f64,
}

/// Predicts each token of the first `tokens_per_document` of every document in a jsonl file from those before it; in
/// chats only what the assistant says counts. `progress` hears how many documents are done.
///
/// # Errors
/// Documents that cannot be read or encoded, named by file and line; nothing to predict; logits that are not finite.
pub fn perplexity(
    model: &Model,
    encoder: &Encoder<'_>,
    data: &Path,
    tokens_per_document: usize,
    device: &Device,
    mut progress: impl FnMut(u64),
) -> Result<Perplexity> {
    ensure!(tokens_per_document >= 2, "at least 2 tokens of a document are needed: the first predicts the second");
    let mut documents = Documents::open(data)?;
    let (mut read, mut counted, mut tokens, mut total) = (0, 0, 0u64, 0.0);
    while let Some(document) = documents.next() {
        let document = document?;
        let place = || documents.place(&document);
        let mut encoded = encoder.encode(&document.content).with_context(place)?;
        encoded.tokens.truncate(tokens_per_document);
        let labels: Vec<u32> = (0..encoded.tokens.len())
            .map(|position| match encoded.tokens.get(position + 1) {
                Some(&next) if encoded.targets[position + 1] => next,
                _ => IGNORED_LABEL,
            })
            .collect();
        read += 1;
        let predicted = labels.iter().filter(|&&label| label != IGNORED_LABEL).count() as u64;
        if predicted > 0 {
            let nll = negative_log_likelihood(model, encoded.tokens, &labels, device).with_context(place)?;
            ensure!(nll.is_finite(), "{}: the model's prediction is not finite", place());
            counted += 1;
            tokens += predicted;
            total += nll;
        }
        progress(read);
    }
    ensure!(tokens > 0, "{}: there is nothing to predict in its {read} documents", data.display());
    let mean_nll = total / tokens as f64;
    Ok(Perplexity { documents: counted, tokens, mean_nll, perplexity: mean_nll.exp() })
}

/// Sum over the labels, in nats.
fn negative_log_likelihood(model: &Model, tokens: Vec<u32>, labels: &[u32], device: &Device) -> Result<f64> {
    let labels = Tensor::from_slice(device, &[1, labels.len()], labels)?;
    let batch = TokenBatch::new(device, &[tokens], None)?;
    let tape = Tape::inference();
    let logits = model.logits(&tape, &batch)?;
    let per_token = ops::cross_entropy(&tape, &logits, &labels, 1.0)?.per_token;
    Ok(per_token.to_f32_vec()?.into_iter().map(f64::from).sum())
}
