//! Rows of a table by index.

use crate::{Result, Tape, Tensor, Var};

/// `y[…, :] = weight[ids[…], :]`.
///
/// - `ids` u32 `[…]`, `weight` `[vocabulary, width]`, result `[…, width]` of element type `output`: the type that the
///   forward pass computes in, which need not be the one that weights are kept in
///
/// # Errors
/// [`crate::Error::IndexOutOfRange`] for an id outside the vocabulary.
pub fn embedding(tape: &Tape<'_>, ids: &Tensor, weight: &Var, output: crate::DType) -> Result<Var> {
    let _ = (tape, ids, weight, output);
    unimplemented!()
}
