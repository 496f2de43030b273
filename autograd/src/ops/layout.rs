//! Operators that move values without changing them.

use crate::{Result, Tape, Var};

/// Cuts the innermost dimension into parts of the given sizes: `[…, Σ sizes]` into `[…, sizes[i]]` each.
///
/// # Errors
/// A shape error when the sizes do not add up to the innermost dimension.
pub fn split(tape: &Tape<'_>, input: &Var, sizes: &[usize]) -> Result<Vec<Var>> {
    let _ = (tape, input, sizes);
    unimplemented!()
}

/// Repeats each run of `chunk` innermost elements `repeats` times in place (repeat-interleave of chunks):
/// `y[…, (c · repeats + r) · chunk + j] = x[…, c · chunk + j]`.
///
/// # Errors
/// A shape error when `chunk` does not divide the innermost dimension.
pub fn repeat_chunks(tape: &Tape<'_>, input: &Var, chunk: usize, repeats: usize) -> Result<Var> {
    let _ = (tape, input, chunk, repeats);
    unimplemented!()
}
