//! The Mamba mixer, as the model computes it: whole sequences with gradients, prefill, and decoding steps.

use anyhow::{Result, anyhow, bail};
use autograd::{Parameter, Parameters, Tape, Tensor};
use model::TokenBatch;
use model::config::MambaConfig;
use model::mixer::{Mamba, MambaCache};

use super::{Array, Case, Outcome};

/// `apriel_h1_mixer`: weights under the names of the Hugging Face class.
pub(super) fn apriel_h1(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let geometry = geometry(case)?;
    let parameters = parameters(case, |name| Ok((name.to_owned(), weight(case, name)?)))?;
    let mamba = Mamba::new(&geometry, &parameters, "")?;
    let gradients = whole_sequence(case, &mamba, &parameters, outcome)?;
    for (parameter, gradient) in gradients {
        outcome.give(&format!("grad.w.{parameter}"), gradient);
    }
    if !case.has("in.decode") {
        return Ok(());
    }
    let decoded = decode(case, &mamba, &parameters)?;
    outcome.give("out.prefill_y", decoded.prefill);
    outcome.give("out.prefill_conv_state", decoded.prefill_conv);
    outcome.give("out.prefill_ssm_state", decoded.prefill_state);
    outcome.give("out.decode_y", decoded.outputs);
    outcome.give("out.decode_conv_states", Array::stacked(&decoded.conv_states)?);
    outcome.give("out.decode_ssm_states", Array::stacked(&decoded.states)?);
    Ok(())
}

/// `m1_mixer`: the rows of dt_in_proj are the last ones of in_proj.
pub(super) fn m1(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let geometry = geometry(case)?;
    let fused = case.array("w.in_proj.weight")?;
    let rows = 2 * (geometry.d_inner + geometry.d_xb);
    let parts =
        [("in_proj.weight", fused.slice(0, 0, rows)?), ("dt_in_proj.weight", fused.slice(0, rows, fused.shape[0])?)];
    let mut parameters = parameters(case, |name| {
        let part = if name == "in_proj.weight" { Some(&parts[0].1) } else { None };
        let value = match part {
            Some(part) => case.upload("w.in_proj.weight", part)?,
            None => weight(case, name)?,
        };
        Ok((name.to_owned(), value))
    })?;
    push(&mut parameters, parts[1].0, case.upload("w.in_proj.weight", &parts[1].1)?);
    let mamba = Mamba::new(&geometry, &parameters, "")?;
    let mut gradients = whole_sequence(case, &mamba, &parameters, outcome)?;
    let mut take = |name: &str| {
        let position = gradients.iter().position(|(parameter, _)| parameter == name);
        position.map(|position| gradients.remove(position).1).ok_or_else(|| anyhow!("no gradient of {name}"))
    };
    let fused = [take(parts[0].0)?, take(parts[1].0)?];
    outcome.give("grad.w.in_proj.weight", Array::concatenated(&fused, 0)?);
    for (parameter, gradient) in gradients {
        outcome.give(&format!("grad.w.{parameter}"), gradient);
    }
    if !case.has("in.decode") {
        return Ok(());
    }
    let decoded = decode(case, &mamba, &parameters)?;
    outcome.give("out.prefill_y", decoded.prefill);
    outcome.give("out.decode_y", decoded.outputs);
    let last = |states: &[Array]| states.last().cloned().ok_or_else(|| anyhow!("in.decode has no step"));
    outcome.give("out.final_conv_state", last(&decoded.conv_states)?);
    outcome.give("out.final_ssm_state", last(&decoded.states)?);
    Ok(())
}

/// The case's weights (`w.*`) as trainable parameters; `convert` gives each one's name and value.
pub(super) fn parameters(case: &Case<'_>, convert: impl Fn(&str) -> Result<(String, Tensor)>) -> Result<Parameters> {
    let mut parameters = Parameters::default();
    for name in case.names_after("w.") {
        let (name, value) = convert(name)?;
        push(&mut parameters, &name, value);
    }
    Ok(parameters)
}

fn push(parameters: &mut Parameters, name: &str, value: Tensor) {
    parameters.push(Parameter { name: name.to_owned(), value, trainable: true, decay: false, rate: 1.0 });
}

/// Matrices in the element type of the run; vectors, convolution and state-space parameters in f32, as the model keeps
/// them.
fn weight(case: &Case<'_>, name: &str) -> Result<Tensor> {
    let full = format!("w.{name}");
    let array = case.array(&full)?;
    let is_matrix = name.ends_with("_proj.weight");
    if is_matrix { case.upload(&full, array) } else { case.tensor_f32(&full, array) }
}

fn geometry(case: &Case<'_>) -> Result<MambaConfig> {
    let config: serde_json::Map<String, serde_json::Value> = case.scalar("config")?;
    let size = |key: &str| {
        let value = config.get(key).and_then(serde_json::Value::as_u64);
        value.map(|value| value as usize).ok_or_else(|| anyhow!("scalars.config.{key} is missing"))
    };
    let flag = |key: &str| config.get(key).and_then(serde_json::Value::as_bool).unwrap_or(true);
    let conv_shape = &case.array("w.conv1d.weight")?.shape;
    let [_, _, d_conv] = conv_shape[..] else {
        bail!("w.conv1d.weight has shape {conv_shape:?}, expected 3 dimensions")
    };
    Ok(MambaConfig {
        d_inner: size("d_inner")?,
        d_xb: size("d_xb")?,
        d_state: size("d_state")?,
        d_conv,
        dt_rank: size("dt_rank")?,
        conv_bias: flag("conv_bias"),
        dt_proj_bias: flag("dt_proj_bias"),
        repeat_before_conv: flag("repeat_kv_before_conv"),
        dt_min: 1e-3,
        dt_max: 0.1,
        dt_init_floor: 1e-4,
    })
}

/// Positions and tokens mean nothing to a mixer without attention; documents do.
fn batch(case: &Case<'_>, shape: &[usize]) -> Result<TokenBatch> {
    let rows = vec![vec![0; shape[1]]; shape[0]];
    let lengths = match case.has("in.doc_lens") {
        true => Some(vec![case.lengths("in.doc_lens")?; shape[0]]),
        false => None,
    };
    Ok(TokenBatch::new(case.device, &rows, lengths.as_deref())?)
}

/// Gives `out.y` and `grad.hidden`; returns the gradients of the parameters.
fn whole_sequence(
    case: &Case<'_>,
    mamba: &Mamba,
    parameters: &Parameters,
    outcome: &mut Outcome,
) -> Result<Vec<(String, Array)>> {
    let batch = batch(case, &case.array("in.hidden")?.shape)?;
    let tape = Tape::new();
    let hidden = tape.leaf(&case.tensor("in.hidden")?);
    let output = mamba.forward(&tape, parameters, &hidden, &batch)?;
    outcome.give("out.y", Array::read(&output)?);
    let gradients = case.backward(tape, &output, case.array("in.g")?)?;
    outcome.give_gradient("grad.hidden", &gradients, &hidden, Ok)?;
    let mut result = Vec::new();
    for (_, parameter) in parameters.iter() {
        let Some(gradient) = gradients.get(&parameter.value) else { bail!("{} has no gradient", parameter.name) };
        result.push((parameter.name.clone(), Array::read(gradient)?));
    }
    Ok(result)
}

/// A prefill over `in.hidden` and the steps of `in.decode` after it.
struct Decoded {
    prefill: Array,
    prefill_conv: Array,
    prefill_state: Array,
    outputs: Array,
    conv_states: Vec<Array>,
    states: Vec<Array>,
}

fn decode(case: &Case<'_>, mamba: &Mamba, parameters: &Parameters) -> Result<Decoded> {
    let sizes = &mamba.geometry;
    // The reference's state has its channels in groups of d_state; they lie in memory as ours do.
    let state = |cache: &MambaCache| {
        let rows = cache.state.shape()[0];
        Array::read(&cache.state)?.reshaped(&[rows, sizes.d_inner / sizes.d_state, sizes.d_state, sizes.d_state])
    };
    let hidden = case.tensor("in.hidden")?;
    let (prefill, mut cache) = mamba.prefill(parameters, &hidden, &batch(case, hidden.shape())?)?;
    let (prefill_conv, prefill_state) = (Array::read(&cache.conv)?, state(&cache)?);
    let steps = case.array("in.decode")?;
    let (mut outputs, mut conv_states, mut states) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..steps.shape[1] {
        let input = case.upload("in.decode", &steps.slice(1, step, step + 1)?)?;
        outputs.push(Array::read(&mamba.step(parameters, &input, None, &mut cache)?)?);
        conv_states.push(Array::read(&cache.conv)?);
        states.push(state(&cache)?);
    }
    Ok(Decoded {
        prefill: Array::read(&prefill)?,
        prefill_conv,
        prefill_state,
        outputs: Array::concatenated(&outputs, 1)?,
        conv_states,
        states,
    })
}
