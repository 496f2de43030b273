//! Causal convolution and its step. The cases have time innermost, `(B, D, L)`; grafter has it second.

use anyhow::{Result, bail};
use autograd::ops::{self, Activation, ConvolutionOptions};
use autograd::{DType, Tape, Tensor};

use super::{Array, Case, Outcome};

/// `(B, D, L)` to `(B, L, D)` and back.
const SWAP_TIME: [usize; 3] = [0, 2, 1];

/// `causal_conv1d`: outputs, final states, gradients; the whole sequence and step by step.
pub(super) fn convolution(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let activation = activation(case)?;
    let x = case.array("in.x")?.permuted(&SWAP_TIME)?;
    let cotangent = case.array("in.g")?.permuted(&SWAP_TIME)?;
    let initial = match case.has("in.initial_states") {
        true => Some(case.array("in.initial_states")?.permuted(&SWAP_TIME)?),
        false => None,
    };
    let document_start = if case.has("in.seq_idx") { Some(case.document_start("in.seq_idx")?) } else { None };

    let tape = Tape::new();
    let input = tape.leaf(&case.upload("in.x", &x)?);
    let weight = tape.leaf(&case.tensor("in.weight")?);
    let bias = case.has("in.bias").then(|| case.tensor("in.bias")).transpose()?.map(|bias| tape.leaf(&bias));
    let initial_state = initial.as_ref().map(|initial| case.upload("in.initial_states", initial)).transpose()?;
    let initial_state = initial_state.map(|state| tape.leaf(&state));
    let options = ConvolutionOptions {
        activation,
        document_start: document_start.as_ref(),
        initial_state: initial_state.as_ref(),
    };
    let output = ops::causal_conv1d(&tape, &input, &weight, bias.as_ref(), options)?;
    outcome.give("out.y", Array::read(&output)?.permuted(&SWAP_TIME)?);
    let gradients = case.backward(tape, &output, &cotangent)?;
    outcome.give_gradient("grad.x", &gradients, &input, |gradient| gradient.permuted(&SWAP_TIME))?;
    outcome.give_gradient("grad.weight", &gradients, &weight, Ok)?;
    if let Some(bias) = &bias {
        outcome.give_gradient("grad.bias", &gradients, bias, Ok)?;
    }
    if let Some(state) = &initial_state {
        let rearrange = |gradient: Array| gradient.permuted(&SWAP_TIME);
        outcome.give_gradient("grad.initial_states", &gradients, state, rearrange)?;
    }

    // What the convolution has seen: the initial state and then the input.
    let seen = match &initial {
        Some(initial) => Array::concatenated(&[initial.clone(), x.clone()], 1)?,
        None => x.clone(),
    };
    if case.has("out.final_states") {
        let width = weight.shape()[1];
        outcome
            .give("out.final_states", Array::read(&ops::convolution_state(&case.upload("in.x", &seen)?, width - 1)?)?);
    }
    if document_start.is_none() {
        step_by_step(case, &x, initial.as_ref(), outcome)?;
    }
    Ok(())
}

fn step_by_step(case: &Case<'_>, x: &Array, initial: Option<&Array>, outcome: &mut Outcome) -> Result<()> {
    let (weight, activation) = (case.tensor("in.weight")?, activation(case)?);
    let bias = case.has("in.bias").then(|| case.tensor("in.bias")).transpose()?;
    let (batch, channels, width) = (x.shape[0], x.shape[2], weight.shape()[1]);
    let mut state = match initial {
        Some(initial) => case.tensor_f32("in.initial_states", &initial.permuted(&SWAP_TIME)?)?,
        None => Tensor::zeros(case.device, &[batch, channels, width - 1], DType::F32)?,
    };
    let mut outputs = Vec::new();
    for step in 0..x.shape[1] {
        let input = case.upload("in.x", &x.slice(1, step, step + 1)?.reshaped(&[batch, channels])?)?;
        let output = ops::causal_conv1d_step(&mut state, &input, &weight, bias.as_ref(), activation)?;
        outputs.push(Array::read(&output)?);
    }
    outcome.give_also("out.y", "step by step", Array::stacked(&outputs)?.permuted(&[1, 2, 0])?);
    outcome.give_also("out.final_states", "step by step", Array::read(&state)?);
    Ok(())
}

/// `causal_conv1d_update`: one step at a time from a given state, which may be wider than the convolution needs.
pub(super) fn steps(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let (weight, activation) = (case.tensor("in.weight")?, activation(case)?);
    let bias = case.has("in.bias").then(|| case.tensor("in.bias")).transpose()?;
    let mut state = case.tensor_f32("in.conv_state0", case.array("in.conv_state0")?)?;
    let x = case.array("in.x")?;
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for step in 0..x.shape[0] {
        let input = case.upload("in.x", &x.at(step)?)?;
        let output = ops::causal_conv1d_step(&mut state, &input, &weight, bias.as_ref(), activation)?;
        outputs.push(Array::read(&output)?);
        states.push(Array::read(&state)?);
    }
    outcome.give("out.y", Array::stacked(&outputs)?);
    outcome.give("out.states", Array::stacked(&states)?);
    Ok(())
}

fn activation(case: &Case<'_>) -> Result<Activation> {
    match case.optional_scalar::<String>("activation")?.as_deref() {
        None => Ok(Activation::Identity),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => bail!("activation {other:?} is unknown"),
    }
}
