//! The initialisation of a Mamba mixer from attention ("Mamba in the Llama").

use anyhow::{Result, bail};
use autograd::{DType, Parameter, Parameters, Tensor};
use model::Model;
use model::config::{MambaConfig, ModelConfig};
use model::initialise::{GraftOptions, graft};
use serde_json::{Map, Value, json};

use super::{Array, Case, Outcome, exact};

/// Results that the reference draws at random.
const RANDOM: &[&str] = &["dt_in_proj.weight", "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "conv1d.bias"];

/// `mil_conversion`: one decoder layer of a Mistral, grafted; everything deterministic must be equal to the last bit.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let teacher = teacher(case)?;
    let hybrid = graft(&teacher, &teacher, &[0], &GraftOptions { seed: 1, align: false })?;
    for name in case.names_after("out.") {
        let full = format!("model.layers.0.{name}");
        let Some(id) = hybrid.parameters.find(&full) else { bail!("the graft has no {full}") };
        let got = Array::read(&hybrid.parameters.get(id).value)?;
        let stored = case.array(&format!("out.{name}"))?;
        let tensor = format!("out.{name}");
        match name.strip_prefix("mixer.") {
            Some("in_proj.weight") => in_proj(case, got, stored, outcome)?,
            Some(part) if RANDOM.contains(&part) => {
                if got.shape != stored.shape || got.values.iter().any(|value| !value.is_finite()) {
                    bail!("{name} has shape {:?}, expected {:?} and finite values", got.shape, stored.shape);
                }
                outcome.omit(&tensor, "drawn at random: shape compared and values finite");
            }
            _ => outcome.give_within(&tensor, "bit-exact", got, exact()),
        }
    }
    rows_used(case, outcome)
}

/// The rows that are copies; the others are random.
fn in_proj(case: &Case<'_>, got: Array, stored: &Array, outcome: &mut Outcome) -> Result<()> {
    let flags = case.array("det.in_proj_row_is_deterministic")?;
    let copied = |array: &Array| {
        let width = array.shape[1];
        let rows = array.values.chunks_exact(width).zip(&flags.values).filter(|(_, flag)| **flag != 0.0);
        let values: Vec<f64> = rows.flat_map(|(row, _)| row.iter().copied()).collect();
        Array::new(&[values.len() / width, width], values)
    };
    if got.shape != stored.shape || flags.count() != stored.shape[0] {
        bail!("in_proj.weight has shape {:?}, expected {:?}", got.shape, stored.shape);
    }
    let (got, expected) = (copied(&got)?, copied(stored)?);
    let way = "bit-exact: rows that are copies";
    outcome.give_part_within("out.mixer.in_proj.weight", way, got, expected, exact());
    Ok(())
}

/// Which row of in_proj each scan channel reads, from the mixer's own repeat of row numbers.
fn rows_used(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let (d_inner, d_xb): (usize, usize) = (case.scalar("d_inner")?, case.scalar("d_xb")?);
    let d_state: usize = case.scalar("d_state")?;
    let numbers = |start: usize, count: usize| -> Vec<f32> { (start..start + count).map(|row| row as f32).collect() };
    let repeated = |start: usize| -> Result<Array> {
        let rows = Tensor::from_slice(case.device, &[1, d_xb], &numbers(start, d_xb))?;
        let tape = autograd::Tape::inference();
        let rows = autograd::Var::constant(&rows);
        let rows = autograd::ops::repeat_chunks(&tape, &rows, d_state, d_inner / d_xb)?;
        Array::read(&rows)
    };
    let plain = |start: usize| Array::new(&[d_inner], numbers(start, d_inner).into_iter().map(f64::from).collect());
    let groups = [d_inner / d_state, d_state];
    for (name, rows) in [
        ("map.z_in_proj_row", plain(0)?),
        ("map.x_in_proj_row", repeated(d_inner)?.reshaped(&[d_inner])?),
        ("map.B_in_proj_row", repeated(d_inner + d_xb)?.reshaped(&groups)?),
        ("map.C_in_proj_row", plain(d_inner + 2 * d_xb)?.reshaped(&groups)?),
        ("map.x_v_proj_row", repeated(0)?.reshaped(&[d_inner])?),
        ("map.B_k_proj_row", repeated(0)?.reshaped(&groups)?),
        ("map.C_q_proj_row", plain(0)?.reshaped(&groups)?),
    ] {
        if case.has(name) {
            outcome.give_within(name, "exact", rows, exact());
        }
    }
    Ok(())
}

/// A model of the case's one layer.
fn teacher(case: &Case<'_>) -> Result<Model> {
    let intermediate = case.array("teacher.mlp.gate_proj.weight")?.shape[0];
    let hidden: usize = case.scalar("hidden")?;
    let mut source: Map<String, Value> = Map::new();
    for (key, value) in [
        ("model_type", json!("mistral")),
        ("hidden_size", json!(hidden)),
        ("num_hidden_layers", json!(1)),
        ("intermediate_size", json!(intermediate)),
        ("vocab_size", json!(1)),
        ("num_attention_heads", json!(case.scalar::<usize>("heads")?)),
        ("num_key_value_heads", json!(case.scalar::<usize>("kv_heads")?)),
        ("head_dim", json!(case.scalar::<usize>("head_dim")?)),
        ("tie_word_embeddings", json!(true)),
    ] {
        source.insert(key.to_owned(), value);
    }
    let mut config = ModelConfig::from_json(&source)?;
    config.mamba = Some(MambaConfig {
        d_inner: case.scalar("d_inner")?,
        d_xb: case.scalar("d_xb")?,
        d_state: case.scalar("d_state")?,
        d_conv: 4,
        dt_rank: case.scalar("dt_rank")?,
        conv_bias: true,
        dt_proj_bias: true,
        repeat_before_conv: true,
        dt_min: 1e-3,
        dt_max: 0.1,
        dt_init_floor: 1e-4,
    });
    let mut parameters = Parameters::default();
    let mut push = |name: String, value: Tensor| {
        parameters.push(Parameter { name, value, trainable: true, decay: false });
    };
    push("model.embed_tokens.weight".to_owned(), Tensor::zeros(case.device, &[1, hidden], DType::F32)?);
    for name in case.names_after("teacher.") {
        push(format!("model.layers.0.{name}"), case.tensor(&format!("teacher.{name}"))?);
    }
    push("model.norm.weight".to_owned(), Tensor::filled(case.device, &[hidden], DType::F32, 1.0)?);
    Ok(Model::new(config, parameters)?)
}
