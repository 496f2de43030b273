//! Grouped-query attention: the core with its rotary embedding, and the whole layer.

use anyhow::{Result, bail};
use autograd::ops::{self, AttentionOptions, RotaryTable};
use autograd::{Tape, Tensor};
use model::TokenBatch;
use model::config::ModelConfig;
use model::mixer::Attention;
use serde_json::{Map, Value, json};

use super::{Array, Case, Outcome};

/// `gqa_attention`: queries and keys before rotation, `(B, L, heads, D)`; queries are the last positions.
pub(super) fn core(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let (heads, head_size): (usize, usize) = (case.scalar("heads")?, case.scalar("head_dim")?);
    let config = config(case, heads * head_size)?;
    let table = RotaryTable::new(config.head_size, config.rope_theta, config.rope_scaling)?;
    let positions = case.integers("in.positions")?;
    let stored = case.array("in.positions")?;
    let [_, time] = stored.shape[..] else { bail!("in.positions has shape {:?}, expected (B, L)", stored.shape) };
    let query_time = case.array("in.q")?.shape[1];
    let query_positions = last_positions(case, &positions, query_time)?;

    let tape = Tape::new();
    let query = tape.leaf(&case.tensor("in.q")?);
    let key = tape.leaf(&case.tensor("in.k")?);
    let value = tape.leaf(&case.tensor("in.v")?);
    let rotated_query = ops::rope(&tape, &query, &query_positions, &table)?;
    let rotated_key = ops::rope(&tape, &key, &positions, &table)?;
    let document_start = case.document_start("in.doc_ids")?;
    let options = AttentionOptions {
        scale: case.scalar::<f64>("softmax_scale")? as f32,
        document_start: Some(&document_start),
        window: case.optional_scalar("sliding_window")?,
    };
    let output = ops::attention(&tape, &rotated_query, &rotated_key, &value, options)?;
    outcome.give("out.o", Array::read(&output)?);
    let gradients = case.backward(tape, &output, case.array("in.g")?)?;
    outcome.give_gradient("grad.q", &gradients, &query, Ok)?;
    outcome.give_gradient("grad.k", &gradients, &key, Ok)?;
    outcome.give_gradient("grad.v", &gradients, &value, Ok)?;

    let mut intermediate = |name: &str, array: Array| {
        if case.has(name) {
            outcome.give(name, array);
        }
    };
    intermediate("mid.q_rot", Array::read(&rotated_query)?);
    intermediate("mid.k_rot", Array::read(&rotated_key)?);
    let frequencies: Vec<f64> = table.inverse_frequencies.iter().map(|frequency| f64::from(*frequency)).collect();
    intermediate("mid.inv_freq", Array::new(&[frequencies.len()], frequencies)?);
    let (cosine, sine) = table.cosine_sine(&positions.to_vec::<u32>()?);
    for (name, half) in [("mid.cos", cosine), ("mid.sin", sine)] {
        let half: Vec<f64> = half.into_iter().map(f64::from).collect();
        let half = Array::new(&[stored.shape[0], time, head_size / 2], half)?;
        // The reference stores both halves of a head, which are equal.
        intermediate(name, Array::concatenated(&[half.clone(), half], 2)?);
    }
    Ok(())
}

/// `attention_layer`: projections, rotation and attention, as the model computes them.
pub(super) fn layer(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let config = config(case, case.scalar("hidden")?)?;
    let parameters = super::mixer::parameters(case, |name| Ok((name.to_owned(), case.tensor(&format!("w.{name}"))?)))?;
    let attention = Attention::new(&config, &parameters, "")?;
    let positions = case.integers("in.positions")?;
    let batch =
        TokenBatch { tokens: positions.clone(), positions, document_start: Some(case.document_start("in.doc_ids")?) };
    let tape = Tape::new();
    let hidden = tape.leaf(&case.tensor("in.hidden")?);
    let output = attention.forward(&tape, &parameters, &hidden, &batch)?;
    outcome.give("out.y", Array::read(&output)?);
    let gradients = case.backward(tape, &output, case.array("in.g")?)?;
    outcome.give_gradient("grad.hidden", &gradients, &hidden, Ok)?;
    for (_, parameter) in parameters.iter() {
        outcome.give_gradient(&format!("grad.w.{}", parameter.name), &gradients, &parameter.value, Ok)?;
    }
    Ok(())
}

/// The case's geometry as a model configuration, read by the model's own reader.
fn config(case: &Case<'_>, hidden: usize) -> Result<ModelConfig> {
    let scalars = &case.fixture.scalars;
    let mut source: Map<String, Value> = Map::new();
    for (key, value) in [
        ("model_type", json!("llama")),
        ("hidden_size", json!(hidden)),
        ("num_hidden_layers", json!(1)),
        ("intermediate_size", json!(1)),
        ("vocab_size", json!(1)),
    ] {
        source.insert(key.to_owned(), value);
    }
    for (key, scalar) in [
        ("num_attention_heads", "heads"),
        ("num_key_value_heads", "kv_heads"),
        ("head_dim", "head_dim"),
        ("rope_theta", "rope_theta"),
        ("rope_scaling", "rope_scaling"),
        ("max_position_embeddings", "max_position_embeddings"),
    ] {
        if let Some(value) = scalars.get(scalar) {
            source.insert(key.to_owned(), value.clone());
        }
    }
    let mut config = ModelConfig::from_json(&source)?;
    config.sliding_window = case.optional_scalar("sliding_window")?;
    Ok(config)
}

/// The positions of each row's last `count` tokens.
fn last_positions(case: &Case<'_>, positions: &Tensor, count: usize) -> Result<Tensor> {
    let (batch, time) = (positions.shape()[0], positions.shape()[1]);
    if count > time {
        bail!("{count} queries for {time} positions");
    }
    let values = positions.to_vec::<u32>()?;
    let last: Vec<u32> = values.chunks_exact(time.max(1)).flat_map(|row| row[time - count..].iter().copied()).collect();
    Ok(Tensor::from_slice(case.device, &[batch, count], &last)?)
}
