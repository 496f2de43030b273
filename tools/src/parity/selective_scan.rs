//! Selective scan and its step. The cases have time innermost, `(B, D, L)` and `(B, G, N, L)`; grafter has it second.

use anyhow::{Result, bail};
use autograd::ops::{self, ScanInputs, ScanStepInputs};
use autograd::{DType, Tape, Tensor, Var};

use super::{Array, Case, Outcome};

/// `(B, D, L)` to `(B, L, D)` and back.
const SWAP_TIME: [usize; 3] = [0, 2, 1];
/// `(B, G, N, L)` to `(B, L, G, N)`, and back.
const TIME_SECOND: [usize; 4] = [0, 3, 1, 2];
const TIME_LAST: [usize; 4] = [0, 2, 3, 1];

/// A case's inputs in grafter's layout.
struct Inputs {
    input: Array,
    delta: Array,
    b: Array,
    c: Array,
    gate: Option<Array>,
    a: Array,
    d: Option<Array>,
    delta_bias: Option<Array>,
    softplus: bool,
}

/// The same on the device, as values of a forward pass.
struct Variables {
    input: Var,
    delta: Var,
    b: Var,
    c: Var,
    gate: Option<Var>,
    a: Var,
    d: Option<Var>,
    delta_bias: Option<Var>,
    softplus: bool,
}

impl Inputs {
    fn read(case: &Case<'_>) -> Result<Self> {
        let swapped = |name: &str| case.array(name)?.permuted(&SWAP_TIME);
        let grouped = |name: &str| {
            let array = case.array(name)?;
            match array.shape[..] {
                [_, _, _, _] => array.permuted(&TIME_SECOND),
                [batch, states, time] => array.reshaped(&[batch, 1, states, time])?.permuted(&TIME_SECOND),
                _ => bail!("{name} has shape {:?}, expected (B, G, N, L) or (B, N, L)", array.shape),
            }
        };
        let optional = |name: &str| case.has(name).then(|| case.array(name).cloned()).transpose();
        Ok(Self {
            input: swapped("in.u")?,
            delta: swapped("in.delta")?,
            b: grouped("in.B")?,
            c: grouped("in.C")?,
            gate: case.has("in.z").then(|| swapped("in.z")).transpose()?,
            a: case.array("in.A")?.clone(),
            d: optional("in.D")?,
            delta_bias: optional("in.delta_bias")?,
            softplus: case.scalar("delta_softplus")?,
        })
    }

    /// Steps `start..end` of time.
    fn steps(&self, start: usize, end: usize) -> Result<Self> {
        let cut = |array: &Array| array.slice(1, start, end);
        Ok(Self {
            input: cut(&self.input)?,
            delta: cut(&self.delta)?,
            b: cut(&self.b)?,
            c: cut(&self.c)?,
            gate: self.gate.as_ref().map(cut).transpose()?,
            a: self.a.clone(),
            d: self.d.clone(),
            delta_bias: self.delta_bias.clone(),
            softplus: self.softplus,
        })
    }

    fn upload(&self, case: &Case<'_>, tape: &Tape<'_>) -> Result<Variables> {
        let leaf = |name: &str, array: &Array| Ok::<Var, anyhow::Error>(tape.leaf(&case.upload(name, array)?));
        let wide = |name: &str, array: &Array| Ok::<Var, anyhow::Error>(tape.leaf(&case.tensor_f32(name, array)?));
        Ok(Variables {
            input: leaf("in.u", &self.input)?,
            delta: leaf("in.delta", &self.delta)?,
            b: leaf("in.B", &self.b)?,
            c: leaf("in.C", &self.c)?,
            gate: self.gate.as_ref().map(|array| leaf("in.z", array)).transpose()?,
            a: wide("in.A", &self.a)?,
            d: self.d.as_ref().map(|array| wide("in.D", array)).transpose()?,
            delta_bias: self.delta_bias.as_ref().map(|array| wide("in.delta_bias", array)).transpose()?,
            softplus: self.softplus,
        })
    }

    fn time(&self) -> usize {
        self.input.shape[1]
    }
}

impl Variables {
    fn scan(
        &self,
        tape: &Tape<'_>,
        initial_state: Option<&Var>,
        document_start: Option<&Tensor>,
    ) -> Result<ops::ScanOutput> {
        Ok(ops::selective_scan(
            tape,
            ScanInputs {
                input: &self.input,
                delta: &self.delta,
                a: &self.a,
                b: &self.b,
                c: &self.c,
                d: self.d.as_ref(),
                gate: self.gate.as_ref(),
                delta_bias: self.delta_bias.as_ref(),
                delta_softplus: self.softplus,
                initial_state,
                document_start,
            },
        )?)
    }
}

/// `selective_scan`: outputs, last states, gradients; the whole sequence, cut in two, document by document, step by step.
pub(super) fn scan(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let inputs = Inputs::read(case)?;
    let documents = if case.has("in.doc_lens") { Some(case.lengths("in.doc_lens")?) } else { None };
    let document_start = match &documents {
        Some(lengths) => Some(document_start(case, &inputs, lengths)?),
        None => None,
    };
    let tape = Tape::new();
    let variables = inputs.upload(case, &tape)?;
    let result = variables.scan(&tape, None, document_start.as_ref())?;
    outcome.give("out.y", Array::read(&result.output)?.permuted(&SWAP_TIME)?);
    if case.has("out.last_state") {
        outcome.give("out.last_state", Array::read(&result.last_state)?);
    }
    let gradients = case.backward(tape, &result.output, &case.array("in.g")?.permuted(&SWAP_TIME)?)?;
    let channels_last = |gradient: Array| gradient.permuted(&SWAP_TIME);
    outcome.give_gradient("grad.u", &gradients, &variables.input, channels_last)?;
    outcome.give_gradient("grad.delta", &gradients, &variables.delta, channels_last)?;
    for (name, variable) in [("grad.B", &variables.b), ("grad.C", &variables.c)] {
        let shape = &case.array(name)?.shape;
        outcome.give_gradient(name, &gradients, variable, |gradient| gradient.permuted(&TIME_LAST)?.reshaped(shape))?;
    }
    if let Some(gate) = &variables.gate {
        outcome.give_gradient("grad.z", &gradients, gate, channels_last)?;
    }
    outcome.give_gradient("grad.A", &gradients, &variables.a, Ok)?;
    for (name, variable) in [("grad.D", &variables.d), ("grad.delta_bias", &variables.delta_bias)] {
        if let Some(variable) = variable {
            outcome.give_gradient(name, &gradients, variable, Ok)?;
        }
    }

    if let Some(lengths) = &documents {
        return document_by_document(case, &inputs, lengths, outcome);
    }
    if let Some(prefix) = case.optional_scalar::<usize>("prefix_len")? {
        resumed(case, &inputs, prefix, outcome)?;
    }
    step_by_step(case, &inputs, outcome)
}

fn document_start(case: &Case<'_>, inputs: &Inputs, lengths: &[usize]) -> Result<Tensor> {
    let (batch, time) = (inputs.input.shape[0], inputs.time());
    let mut starts = Vec::with_capacity(time);
    for &length in lengths {
        starts.extend(std::iter::repeat_n(starts.len() as u32, length));
    }
    Ok(Tensor::from_slice(case.device, &[batch, time], &starts.repeat(batch))?)
}

/// The last state of every document, each run alone.
fn document_by_document(case: &Case<'_>, inputs: &Inputs, lengths: &[usize], outcome: &mut Outcome) -> Result<()> {
    let tape = Tape::inference();
    let (mut states, mut outputs, mut start) = (Vec::new(), Vec::new(), 0);
    for &length in lengths {
        let document = inputs.steps(start, start + length)?.upload(case, &tape)?.scan(&tape, None, None)?;
        outputs.push(Array::read(&document.output)?.permuted(&SWAP_TIME)?);
        states.push(Array::read(&document.last_state)?);
        start += length;
    }
    // Documents come second, after the batch.
    outcome.give("out.doc_last_states", Array::stacked(&states)?.permuted(&[1, 0, 2, 3])?);
    outcome.give_also("out.y", "each document alone", Array::concatenated(&outputs, 2)?);
    Ok(())
}

/// The sequence cut in two, the second part continuing from the state after the first.
fn resumed(case: &Case<'_>, inputs: &Inputs, prefix: usize, outcome: &mut Outcome) -> Result<()> {
    let tape = Tape::inference();
    let first = inputs.steps(0, prefix)?.upload(case, &tape)?.scan(&tape, None, None)?;
    let rest = inputs.steps(prefix, inputs.time())?.upload(case, &tape)?.scan(&tape, Some(&first.last_state), None)?;
    outcome.give("out.prefix_last_state", Array::read(&first.last_state)?);
    let halves = [Array::read(&first.output)?, Array::read(&rest.output)?];
    outcome.give_also("out.y", "resumed", Array::concatenated(&halves, 1)?.permuted(&SWAP_TIME)?);
    outcome.give_also("out.last_state", "resumed", Array::read(&rest.last_state)?);
    Ok(())
}

/// The recurrence as decoding runs it.
fn step_by_step(case: &Case<'_>, inputs: &Inputs, outcome: &mut Outcome) -> Result<()> {
    let tape = Tape::inference();
    let (batch, channels, states) = (inputs.input.shape[0], inputs.a.shape[0], inputs.a.shape[1]);
    let mut state = Tensor::zeros(case.device, &[batch, channels, states], DType::F32)?;
    let mut outputs = Vec::new();
    for step in 0..inputs.time() {
        let variables = inputs.steps(step, step + 1)?.upload(case, &tape)?;
        let groups = |variable: &Var| variable.tensor().reshape(&[batch, variable.shape()[2], states]);
        let row = |variable: &Var| variable.tensor().reshape(&[batch, channels]);
        let output = ops::selective_scan_step(
            &mut state,
            ScanStepInputs {
                input: &row(&variables.input)?,
                delta: &row(&variables.delta)?,
                a: &variables.a,
                b: &groups(&variables.b)?,
                c: &groups(&variables.c)?,
                d: variables.d.as_deref(),
                gate: variables.gate.as_ref().map(row).transpose()?.as_ref(),
                delta_bias: variables.delta_bias.as_deref(),
                delta_softplus: variables.softplus,
            },
        )?;
        outputs.push(Array::read(&output)?);
    }
    outcome.give_also("out.y", "step by step", Array::stacked(&outputs)?.permuted(&[1, 2, 0])?);
    outcome.give_also("out.last_state", "step by step", Array::read(&state)?);
    Ok(())
}

/// `selective_state_update`: one step at a time from a given state. The cases may split channels into heads `(H, P)`,
/// which lie side by side in memory as grafter's channels do.
pub(super) fn steps(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let initial = case.array("in.state0")?;
    let Some((&states, rows)) = initial.shape.split_last() else { bail!("in.state0 is a scalar") };
    let Some((&batch, heads)) = rows.split_first() else { bail!("in.state0 has one dimension") };
    let channels: usize = heads.iter().product();
    let mut state = case.upload_as(DType::F32, &initial.reshaped(&[batch, channels, states])?)?;
    let vector = |name: &str, shape: &[usize]| case.tensor_f32(name, &case.array(name)?.reshaped(shape)?);
    let optional = |name: &str| case.has(name).then(|| vector(name, &[channels])).transpose();
    let (a, d) = (vector("in.A", &[channels, states])?, optional("in.D")?);
    let delta_bias = optional("in.dt_bias")?;
    let softplus = case.scalar("dt_softplus")?;

    let (mut outputs, mut all_states) = (Vec::new(), Vec::new());
    for step in 0..case.array("in.x")?.shape[0] {
        let row = |name: &str| case.upload(name, &case.array(name)?.at(step)?.reshaped(&[batch, channels])?);
        let groups = |name: &str| {
            let array = case.array(name)?.at(step)?;
            let groups = array.count() / (batch * states);
            case.upload(name, &array.reshaped(&[batch, groups, states])?)
        };
        let gate = case.has("in.z").then(|| row("in.z")).transpose()?;
        let output = ops::selective_scan_step(
            &mut state,
            ScanStepInputs {
                input: &row("in.x")?,
                delta: &row("in.dt")?,
                a: &a,
                b: &groups("in.B")?,
                c: &groups("in.C")?,
                d: d.as_ref(),
                gate: gate.as_ref(),
                delta_bias: delta_bias.as_ref(),
                delta_softplus: softplus,
            },
        )?;
        outputs.push(Array::read(&output)?.reshaped(rows)?);
        all_states.push(Array::read(&state)?.reshaped(&initial.shape)?);
    }
    outcome.give("out.y", Array::stacked(&outputs)?);
    outcome.give("out.states", Array::stacked(&all_states)?);
    Ok(())
}
