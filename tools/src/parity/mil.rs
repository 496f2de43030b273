//! The initialisation of a Mamba mixer from attention ("Mamba in the Llama").

use std::ops::Range;

use anyhow::{Result, bail};
use autograd::{DType, Parameter, Parameters, Tape, Tensor};
use model::config::{MambaConfig, ModelConfig};
use model::initialise::{GraftOptions, Start, graft};
use model::mixer::Mamba;
use model::{Model, TokenBatch};
use serde_json::{Map, Value, json};

use super::{Array, Case, Outcome, exact};

/// Results that the reference draws at random.
const RANDOM: &[&str] = &["dt_in_proj.weight", "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "conv1d.bias"];

/// `mil_conversion`: one decoder layer of a Mistral, grafted; everything deterministic must be equal to the last bit.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let teacher = teacher(case)?;
    let hybrid = graft(&teacher, &teacher, &[0], &GraftOptions { seed: 1, start: Start::Paper })?;
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

/// Which row of in_proj each scan channel and state reads, asked of the mixer itself.
///
/// With the identity for in_proj, gradients with respect to the mixer's input say which rows count. Of two tokens the
/// second has no x: its output is what one state `n` has kept of the first, since the other states forget at once. The
/// output of channel `d` then depends on one row each of x and B in the first token, and of z and C in the second.
fn rows_used(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let geometry = geometry(case)?;
    let MambaConfig { d_inner, d_xb, d_state, .. } = geometry;
    let (x, b, c) = (d_inner, d_inner + d_xb, d_inner + 2 * d_xb);
    let rows = c + d_inner;
    let input = Array::new(
        &[1, 2, rows],
        (0..2 * rows).map(|index| if (rows + x..rows + b).contains(&index) { 0.0 } else { 1.0 }).collect(),
    )?;
    let batch = TokenBatch::new(case.device, &[vec![0, 0]], None)?;
    // Of output `channel` of the second token: the rows of z, x, B and C that it depends on through state `state`.
    let depends_on = |channel: usize, state: usize| -> Result<[usize; 4]> {
        let parameters = transparent(case, &geometry, rows, state)?;
        let tape = Tape::new();
        let leaf = tape.leaf(&case.upload_as(DType::F32, &input)?);
        let output = Mamba::new(&geometry, &parameters, "")?.forward(&tape, &parameters, &leaf, &batch)?;
        let mut cotangent = Array::new(&[1, 2, rows], vec![0.0; 2 * rows])?;
        cotangent.values[rows + channel] = 1.0;
        let gradients = case.backward(tape, &output, &cotangent)?;
        let Some(gradient) = gradients.get(&leaf) else { bail!("the mixer's input has no gradient") };
        let gradient = gradient.to_f32_vec()?;
        let only = |token: usize, range: Range<usize>| {
            let mut nonzero = range.filter(|row| gradient[token * rows + row] != 0.0);
            match (nonzero.next(), nonzero.next()) {
                (Some(row), None) => Ok(row),
                _ => bail!("channel {channel} does not depend on exactly one row of a part of in_proj"),
            }
        };
        Ok([only(1, 0..x)?, only(0, x..b)?, only(0, b..c)?, only(1, c..rows)?])
    };
    let (mut z_rows, mut x_rows, mut b_rows, mut c_rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for channel in 0..d_inner {
        let [z_row, x_row, ..] = depends_on(channel, 0)?;
        z_rows.push(z_row);
        x_rows.push(x_row);
        // The channel's group of scan states, and the state that has the channel's place in it.
        let [_, _, b_row, c_row] = depends_on(channel / d_state * d_state, channel % d_state)?;
        b_rows.push(b_row);
        c_rows.push(c_row);
    }
    let (channels, groups) = ([d_inner], [d_inner / d_state, d_state]);
    for (name, rows, start, shape) in [
        ("map.z_in_proj_row", &z_rows, 0, &channels[..]),
        ("map.x_in_proj_row", &x_rows, 0, &channels),
        ("map.B_in_proj_row", &b_rows, 0, &groups),
        ("map.C_in_proj_row", &c_rows, 0, &groups),
        // The rows of the teacher's projections that the graft has put there.
        ("map.x_v_proj_row", &x_rows, x, &channels),
        ("map.B_k_proj_row", &b_rows, b, &groups),
        ("map.C_q_proj_row", &c_rows, c, &groups),
    ] {
        if case.has(name) {
            let values = rows.iter().map(|row| (row - start) as f64).collect();
            outcome.give_within(name, "exact", Array::new(shape, values)?, exact());
        }
    }
    Ok(())
}

/// A mixer that hides nothing: in_proj is the identity, the convolution looks at its own step only, step sizes are
/// constant, out_proj passes every channel on, and only state `kept` of each channel remembers anything.
fn transparent(case: &Case<'_>, geometry: &MambaConfig, rows: usize, kept: usize) -> Result<Parameters> {
    let MambaConfig { d_inner, d_state, d_conv, dt_rank, .. } = *geometry;
    let mut parameters = Parameters::default();
    let mut push = |name: &str, shape: &[usize], value: &dyn Fn(usize) -> f64| {
        let values = Array::new(shape, (0..shape.iter().product()).map(value).collect())?;
        let value = case.upload_as(DType::F32, &values)?;
        parameters.push(Parameter { name: name.to_owned(), value, trainable: false, decay: false, rate: 1.0 });
        Ok::<(), anyhow::Error>(())
    };
    let unless = |zero: bool| if zero { 0.0 } else { 1.0 };
    push("in_proj.weight", &[rows, rows], &|index| unless(index / rows != index % rows))?;
    push("dt_in_proj.weight", &[dt_rank, rows], &|_| 0.0)?;
    push("dt_proj.weight", &[d_inner, dt_rank], &|_| 0.0)?;
    push("dt_proj.bias", &[d_inner], &|_| 0.0)?;
    push("conv1d.weight", &[d_inner, 1, d_conv], &|index| unless(index % d_conv + 1 != d_conv))?;
    push("conv1d.bias", &[d_inner], &|_| 0.0)?;
    // A is -e^-200, which keeps everything, or -e^60, which forgets everything.
    push("A_log", &[d_inner, d_state], &|index| if index % d_state == kept { -200.0 } else { 60.0 })?;
    push("D", &[d_inner], &|_| 0.0)?;
    push("out_proj.weight", &[rows, d_inner], &|index| unless(index / d_inner != index % d_inner))?;
    Ok(parameters)
}

fn geometry(case: &Case<'_>) -> Result<MambaConfig> {
    Ok(MambaConfig {
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
    })
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
    config.mamba = Some(geometry(case)?);
    let mut parameters = Parameters::default();
    let mut push = |name: String, value: Tensor| {
        parameters.push(Parameter { name, value, trainable: true, decay: false, rate: 1.0 });
    };
    push("model.embed_tokens.weight".to_owned(), Tensor::zeros(case.device, &[1, hidden], DType::F32)?);
    for name in case.names_after("teacher.") {
        push(format!("model.layers.0.{name}"), case.tensor(&format!("teacher.{name}"))?);
    }
    push("model.norm.weight".to_owned(), Tensor::filled(case.device, &[hidden], DType::F32, 1.0)?);
    Ok(Model::new(config, parameters)?)
}
