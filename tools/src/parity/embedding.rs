//! Token embedding.

use anyhow::Result;
use autograd::{Tape, ops};

use super::{Array, Case, Outcome};

/// `embedding`.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let tape = Tape::new();
    let weight = tape.leaf(&case.tensor("in.weight")?);
    let output = ops::embedding(&tape, &case.integers("in.ids")?, &weight, weight.dtype())?;
    outcome.give("out.y", Array::read(&output)?);
    let gradients = case.backward(tape, &output, case.array("in.g")?)?;
    outcome.give_gradient("grad.weight", &gradients, &weight, Ok)
}
