//! RMSNorm.

use anyhow::Result;
use autograd::{Tape, ops};

use super::{Array, Case, Outcome};

/// `rmsnorm`.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let tape = Tape::new();
    let (x, weight) = (tape.leaf(&case.tensor("in.x")?), tape.leaf(&case.tensor("in.weight")?));
    let output = ops::rms_norm(&tape, &x, &weight, case.scalar::<f64>("eps")? as f32)?;
    outcome.give("out.y", Array::read(&output)?);
    let gradients = case.backward(tape, &output, case.array("in.g")?)?;
    outcome.give_gradient("grad.x", &gradients, &x, Ok)?;
    outcome.give_gradient("grad.weight", &gradients, &weight, Ok)
}
