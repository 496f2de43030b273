//! Whole models from Hugging Face folders.

use anyhow::{Context as _, Result, bail};
use autograd::ops::{self, IGNORED_LABEL};
use autograd::{Tape, Tensor};
use model::{Model, Precision, TokenBatch};

use super::{Array, Case, Outcome, exact};
use crate::compare::Bounds;

/// `full_model`: logits, loss, gradients of every parameter, residual streams, packed documents, cached decoding and
/// greedy tokens.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let model = Model::load(&case.model_folder()?, case.device, Precision::F32)?;
    let rows = case.integer_rows("in.input_ids")?;
    let batch = TokenBatch::new(case.device, &rows, None)?;

    let tape = Tape::new();
    let mut streams = Vec::new();
    let hidden = model.hidden_observed(&tape, &batch, |_, stream| streams.push(stream.tensor().clone()))?;
    for (layer, stream) in streams.iter().enumerate() {
        let name = format!("mid.layer_out.{layer}");
        if case.has(&name) {
            outcome.give(&name, Array::read(stream)?);
        }
    }
    let logits = model.head(&tape, &hidden)?;
    outcome.give("out.logits", Array::read(&logits)?);
    let (labels, counted) = shifted_labels(case)?;
    let loss = ops::cross_entropy(&tape, &logits, &labels, counted)?.loss;
    outcome.give("out.loss", Array::read(&loss)?);
    let gradients = tape.backward(&loss)?;
    for (_, parameter) in model.parameters.iter() {
        outcome.give_gradient(&format!("grad.{}", parameter.name), &gradients, &parameter.value, Ok)?;
    }

    if case.has("in.packed_ids") {
        let rows = case.integer_rows("in.packed_ids")?;
        let lengths = vec![case.lengths("in.packed_doc_lens")?; rows.len()];
        let batch = TokenBatch::new(case.device, &rows, Some(&lengths))?;
        outcome.give("out.packed_logits", Array::read(model.logits(&Tape::inference(), &batch)?.tensor())?);
    }
    cached(case, &model, &rows, outcome)?;
    if case.has("gen.prompt") {
        outcome.give_within("gen.tokens", "greedy, with caches", greedy(case, &model)?, exact());
        outcome.omit("gen.top1_minus_top2", "it only says how safe the greedy tokens are");
    }
    Ok(())
}

/// The logits of the same tokens again, a third of them read at once and the others one by one through the caches.
fn cached(case: &Case<'_>, model: &Model, rows: &[Vec<u32>], outcome: &mut Outcome) -> Result<()> {
    let time = rows.first().map_or(0, Vec::len);
    let prompt = (time / 3).max(1);
    let prompts: Vec<Vec<u32>> = rows.iter().map(|row| row[..prompt].to_vec()).collect();
    let (logits, mut cache) = model.prefill(&TokenBatch::new(case.device, &prompts, None)?)?;
    let mut steps = vec![Array::read(&logits)?];
    for position in prompt..time {
        let tokens: Vec<u32> = rows.iter().map(|row| row[position]).collect();
        steps.push(Array::read(&model.step(&tokens, &mut cache)?)?);
    }
    let expected = case.array("out.logits")?.slice(1, prompt - 1, time)?;
    outcome.give_part("out.logits", "prefill and steps", Array::stacked(&steps)?.permuted(&[1, 0, 2])?, expected);
    Ok(())
}

fn greedy(case: &Case<'_>, model: &Model) -> Result<Array> {
    let count = case.array("gen.tokens")?.shape[1];
    let rows = case.integer_rows("gen.prompt")?;
    let (mut logits, mut cache) = model.prefill(&TokenBatch::new(case.device, &rows, None)?)?;
    let mut columns = Vec::new();
    while columns.len() < count {
        let tokens = greatest(&logits)?;
        columns.push(Array::new(&[rows.len()], tokens.iter().map(|token| f64::from(*token)).collect())?);
        logits = model.step(&tokens, &mut cache)?;
    }
    Array::stacked(&columns)?.permuted(&[1, 0])
}

/// The index of each row's greatest logit.
fn greatest(logits: &Tensor) -> Result<Vec<u32>> {
    let values = logits.to_f32_vec()?;
    let rows = values.chunks_exact(logits.last_dimension());
    rows.map(|row| match row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)) {
        Some((token, logit)) if !logit.is_nan() => Ok(token as u32),
        _ => bail!("a logit is not a number"),
    })
    .collect()
}

/// `full_model_bf16_checkpoint`: a checkpoint in bf16, computed in f32 from weights widened at loading and from weights
/// kept as they are.
pub(super) fn bf16_checkpoint(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let rows = case.integer_rows("in.input_ids")?;
    let batch = TokenBatch::new(case.device, &rows, None)?;
    let (labels, counted) = shifted_labels(case)?;
    for (precision, way) in [(Precision::F32, None), (Precision::AsStored, Some("weights kept in bf16"))] {
        let model = Model::load(&case.model_folder()?, case.device, precision)?;
        let tape = Tape::inference();
        let logits = model.logits(&tape, &batch)?;
        let array = Array::read(&logits)?;
        let loss = Array::read(ops::cross_entropy(&tape, &logits, &labels, counted)?.loss.tensor())?;
        match way {
            None => outcome.give("out.logits", array.clone()),
            Some(way) => outcome.give_also("out.logits", way, array.clone()),
        }
        // The manifest has bounds for the logits only. Its conventions give the floor of a model's bounds, and the
        // losses of the other models are held to it.
        let suffix = way.map_or(String::new(), |way| format!("; {way}"));
        let floor = Bounds::new(2e-6, 4e-6);
        outcome.give_within("out.loss", &format!("the conventions' floor for models{suffix}"), loss, floor);
        if way.is_none() && case.has("out.logits_all_bf16_run") {
            let bounds = case.fixture.bounds("out.logits", super::Precision::Bf16)?;
            let bounds = bounds.context("the manifest has no bf16 bounds for out.logits")?;
            let way = "f32 against the reference's bf16, within the bf16 bounds of out.logits";
            outcome.give_within("out.logits_all_bf16_run", way, array, bounds);
        }
    }
    Ok(())
}

/// `in.labels` one position earlier, as the Hugging Face loss shifts them, and how many of them count.
fn shifted_labels(case: &Case<'_>) -> Result<(Tensor, f32)> {
    let stored = case.array("in.labels")?;
    let [_, time] = stored.shape[..] else { bail!("in.labels has shape {:?}, expected (B, L)", stored.shape) };
    let mut labels = Vec::with_capacity(stored.count());
    for row in stored.values.chunks_exact(time.max(1)) {
        let following = row.iter().skip(1).map(|&label| if label < 0.0 { IGNORED_LABEL } else { label as u32 });
        labels.extend(following.chain([IGNORED_LABEL]));
    }
    let counted = labels.iter().filter(|label| **label != IGNORED_LABEL).count();
    Ok((Tensor::from_slice(case.device, &stored.shape, &labels)?, counted as f32))
}
