//! The gated MLP: three linear operators around SwiGLU.

use anyhow::Result;
use autograd::{Tape, ops};

use super::{Array, Case, Outcome};

/// `swiglu_mlp`.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let tape = Tape::new();
    let x = tape.leaf(&case.tensor("in.x")?);
    let weight = |name: &str| Ok::<_, anyhow::Error>(tape.leaf(&case.tensor(&format!("w.{name}_proj.weight"))?));
    let (gate, up, down) = (weight("gate")?, weight("up")?, weight("down")?);
    let gated = ops::linear(&tape, &x, &gate, None)?;
    let raised = ops::linear(&tape, &x, &up, None)?;
    let activated = ops::swiglu(&tape, &gated, &raised)?;
    let output = ops::linear(&tape, &activated, &down, None)?;
    outcome.give("out.y", Array::read(&output)?);
    let gradients = case.backward(tape, &output, case.array("in.g")?)?;
    outcome.give_gradient("grad.x", &gradients, &x, Ok)?;
    for (name, weight) in [("gate", &gate), ("up", &up), ("down", &down)] {
        outcome.give_gradient(&format!("grad.w.{name}_proj.weight"), &gradients, weight, Ok)?;
    }
    Ok(())
}
