//! Causal grouped-query attention.

use crate::{Result, Tape, Tensor, Var};

/// How scores are formed and which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOptions<'a> {
    /// Factor on the scores before softmax; usually `head_size^-0.5`.
    pub scale: f32,
    /// u32 `[batch, key time]`: start of each token's document. `None`: one document per row.
    pub document_start: Option<&'a Tensor>,
    /// Sliding window: a query sees itself and the `window - 1` keys before it. `None`: all keys before it.
    pub window: Option<usize>,
}

/// `softmax(scale · q kᵀ + mask) v` per head (Vaswani et al. 2017; grouped heads: Ainslie et al. 2023).
///
/// - `query` `[batch, query time, query heads, head size]`: the last `query time` positions of the keys' time
/// - `key`, `value` `[batch, key time, key heads, head size]`; query head `h` uses key head
///   `h / (query heads / key heads)`
/// - result like `query`
///
/// # Errors
/// Shape errors that name the argument; query heads that the key heads do not divide; more queries than keys.
pub fn attention(tape: &Tape<'_>, query: &Var, key: &Var, value: &Var, options: AttentionOptions<'_>) -> Result<Var> {
    let _ = (tape, query, key, value, options);
    unimplemented!()
}
