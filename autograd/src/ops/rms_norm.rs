//! Root-mean-square normalisation.

use crate::{Result, Tape, Var};

/// `y = weight · x / sqrt(mean(x²) + epsilon)` over the innermost dimension (Zhang and Sennrich 2019). In bf16 the
/// normalised value is rounded to bf16 before the product with the weight, as Hugging Face's Llama and Mistral do.
///
/// - `input` `[…, width]`, `weight` `[width]`, result like `input`
///
/// # Errors
/// Shape errors that name the argument.
pub fn rms_norm(tape: &Tape<'_>, input: &Var, weight: &Var, epsilon: f32) -> Result<Var> {
    let _ = (tape, input, weight, epsilon);
    unimplemented!()
}
