//! Divergences between student and teacher.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail};
use autograd::ops::{self, Divergence, DivergenceOptions};
use autograd::{Tape, Tensor};

use super::{Array, Case, Outcome};

/// `distill_loss`: every divergence and temperature that the case's names speak of, as in
/// `out.reverse_kl.tau2.teacher_only.per_token`.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let losses: BTreeSet<&str> = case.names_after("out.").filter_map(|name| name.strip_suffix(".per_token")).collect();
    if losses.is_empty() {
        bail!("the case has no out.*.per_token");
    }
    for loss in losses {
        run_loss(case, loss, outcome).with_context(|| loss.to_owned())?;
    }
    Ok(())
}

fn run_loss(case: &Case<'_>, loss: &str, outcome: &mut Outcome) -> Result<()> {
    let (rest, teacher_only) = match loss.strip_suffix(".teacher_only") {
        Some(rest) => (rest, true),
        None => (loss, false),
    };
    let Some((name, temperature)) = rest.split_once(".tau") else { bail!("expected DIVERGENCE.tauT") };
    let divergence = match name {
        "reverse_kl" => Divergence::ReverseKl,
        "forward_kl" => Divergence::ForwardKl,
        "js" => Divergence::JensenShannon,
        "soft_ce" => Divergence::SoftCrossEntropy,
        other => bail!("divergence {other:?} is unknown"),
    };
    let temperature: f32 = temperature.parse().context("the number after tau")?;
    let mask_array = case.array("in.mask")?;
    let mask_values: Vec<f32> = mask_array.values.iter().map(|value| *value as f32).collect();
    let mask = Tensor::from_slice(case.device, &mask_array.shape, &mask_values)?;
    let counted: f32 = mask_values.iter().sum();
    let teacher = case.tensor("in.teacher_logits")?;

    let reductions =
        [("masked_mean", counted), ("masked_sum", 1.0), ("sum_over_mask_div_all_tokens", mask_array.count() as f32)];
    for (reduction, denominator) in reductions {
        let tape = Tape::new();
        let student = tape.leaf(&case.tensor("in.student_logits")?);
        let options = DivergenceOptions {
            divergence,
            student_temperature: if teacher_only { 1.0 } else { temperature },
            teacher_temperature: temperature,
            mask: Some(&mask),
            denominator,
        };
        let result = ops::divergence(&tape, &student, &teacher, options)?;
        outcome.give(&format!("out.{loss}.{reduction}"), Array::read(&result.loss)?);
        if reduction == "masked_mean" {
            // The case has it for all positions, the operator for those that count.
            let unmasked = ops::divergence(&tape, &student, &teacher, DivergenceOptions { mask: None, ..options })?;
            outcome.give(&format!("out.{loss}.per_token"), Array::read(&unmasked.per_token)?);
            let gradients = tape.backward(&result.loss)?;
            let name = format!("grad.{loss}.student_logits_of_masked_mean");
            outcome.give_gradient(&name, &gradients, &student, Ok)?;
        }
    }
    Ok(())
}
