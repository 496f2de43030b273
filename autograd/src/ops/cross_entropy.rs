//! Cross-entropy of logits against labels.

use crate::{Result, Tape, Tensor, Var};

/// The label of a position that does not count.
pub const IGNORED_LABEL: u32 = u32::MAX;

/// A cross-entropy loss and what it was made of.
#[derive(Debug)]
pub struct CrossEntropy {
    /// Scalar f32: `Σ per_token / denominator`.
    pub loss: Var,
    /// f32, shape of the labels: `logsumexp(logits) - logits[label]` in nats; 0 where the label is ignored.
    pub per_token: Tensor,
}

/// Cross-entropy in nats, summed and divided by `denominator`.
///
/// - `logits` `[…, vocabulary]`, `labels` u32 `[…]`, [`IGNORED_LABEL`] where a position does not count. No shift.
/// - `denominator`: usually the number of labels that count in the whole batch, which makes the sum over micro-batches
///   independent of how the batch was cut
///
/// # Errors
/// Shape errors that name the argument; a label outside the vocabulary; a denominator that is not positive.
pub fn cross_entropy(tape: &Tape<'_>, logits: &Var, labels: &Tensor, denominator: f32) -> Result<CrossEntropy> {
    let _ = (tape, logits, labels, denominator);
    unimplemented!()
}
