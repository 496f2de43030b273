//! Cross-entropy of logits against labels.

use anyhow::{Result, bail};
use autograd::ops::{self, IGNORED_LABEL};
use autograd::{Tape, Tensor};

use super::{Array, Case, Outcome};

/// `linear_cross_entropy`: logits `(N, V)`, labels, one of which says that a position does not count.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let ignored: f64 = case.scalar("ignore_index")?;
    let stored = case.array("in.labels")?;
    let labels: Vec<u32> =
        stored.values.iter().map(|&label| if label == ignored { IGNORED_LABEL } else { label as u32 }).collect();
    let counted = labels.iter().filter(|label| **label != IGNORED_LABEL).count();
    let labels = Tensor::from_slice(case.device, &stored.shape, &labels)?;
    for (reduction, denominator) in [("mean", counted as f32), ("sum", 1.0)] {
        let tape = Tape::new();
        let logits = tape.leaf(&case.tensor("in.logits")?);
        let result = ops::cross_entropy(&tape, &logits, &labels, denominator)?;
        if reduction == "sum" {
            outcome.give("out.per_token", Array::read(&result.per_token)?);
        }
        outcome.give(&format!("out.{reduction}"), Array::read(&result.loss)?);
        let gradients = tape.backward(&result.loss)?;
        outcome.give_gradient(&format!("grad.logits_of_{reduction}"), &gradients, &logits, Ok)?;
    }
    log_sum_exp(case, outcome)
}

/// The loss of the greatest logit, plus that logit.
fn log_sum_exp(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let tape = Tape::inference();
    let logits = tape.leaf(&case.tensor("in.logits")?);
    let values = Array::read(&logits)?;
    let [rows, vocabulary] = values.shape[..] else { bail!("in.logits has shape {:?}, expected (N, V)", values.shape) };
    let greatest: Vec<(usize, f64)> = values
        .values
        .chunks_exact(vocabulary)
        .map(|row| row.iter().copied().enumerate().fold((0, f64::NEG_INFINITY), |a, b| if b.1 > a.1 { b } else { a }))
        .collect();
    let labels: Vec<u32> = greatest.iter().map(|(label, _)| *label as u32).collect();
    let labels = Tensor::from_slice(case.device, &[rows], &labels)?;
    let losses = Array::read(&ops::cross_entropy(&tape, &logits, &labels, 1.0)?.per_token)?;
    let sums = losses.values.iter().zip(&greatest).map(|(loss, (_, logit))| loss + logit).collect();
    outcome.give_also("out.logsumexp", "loss of the greatest logit, plus that logit", Array::new(&[rows], sums)?);
    Ok(())
}
