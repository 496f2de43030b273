//! Matrix product with a weight.

use crate::{Result, Tape, Var};

/// `y = x Wᵀ + bias`.
///
/// - `input` `[…, in]`, `weight` `[out, in]` (f32 or bf16, whatever the input's type), `bias` `[out]`
/// - result `[…, out]` of the input's element type
///
/// # Errors
/// Shape errors that name the argument.
pub fn linear(tape: &Tape<'_>, input: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    let _ = (tape, input, weight, bias);
    unimplemented!()
}
