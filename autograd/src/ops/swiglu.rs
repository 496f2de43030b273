//! The gated activation of the MLP.

use crate::{Result, Tape, Var};

/// `silu(gate) · up`, elementwise (Shazeer 2020). Equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn swiglu(tape: &Tape<'_>, gate: &Var, up: &Var) -> Result<Var> {
    let _ = (tape, gate, up);
    unimplemented!()
}
