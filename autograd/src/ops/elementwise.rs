//! Operators that treat every element alike, and the sum.

use crate::{Result, Tape, Tensor, Var};

/// `a + b`, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn add(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let _ = (tape, a, b);
    unimplemented!()
}

/// `a - b`, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn sub(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let _ = (tape, a, b);
    unimplemented!()
}

/// `a · b` elementwise, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn mul(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let _ = (tape, a, b);
    unimplemented!()
}

/// `factor · x`.
///
/// # Errors
/// Element-type errors.
pub fn scale(tape: &Tape<'_>, x: &Var, factor: f32) -> Result<Var> {
    let _ = (tape, x, factor);
    unimplemented!()
}

/// `-e^x`: from a Mamba mixer's `A_log` to its A.
///
/// # Errors
/// Element-type errors.
pub fn negative_exp(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    let _ = (tape, x);
    unimplemented!()
}

/// `x · sigmoid(x)`.
///
/// # Errors
/// Element-type errors.
pub fn silu(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    let _ = (tape, x);
    unimplemented!()
}

/// `ln(1 + e^x)`; values above 20 pass through.
///
/// # Errors
/// Element-type errors.
pub fn softplus(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    let _ = (tape, x);
    unimplemented!()
}

/// The sum of all elements, a scalar f32.
///
/// # Errors
/// Element-type errors.
pub fn sum(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    let _ = (tape, x);
    unimplemented!()
}

/// `sum += addend`, outside any tape.
///
/// # Errors
/// A shape error when they differ.
pub fn add_in_place(sum: &mut Tensor, addend: &Tensor) -> Result<()> {
    let _ = (sum, addend);
    unimplemented!()
}

/// `x *= factor`, outside any tape.
///
/// # Errors
/// Element-type errors.
pub fn scale_in_place(x: &mut Tensor, factor: f32) -> Result<()> {
    let _ = (x, factor);
    unimplemented!()
}
