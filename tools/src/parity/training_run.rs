//! Ten steps of distillation.

use anyhow::{Result, bail};
use autograd::ops::{self, Divergence, DivergenceLoss, DivergenceOptions};
use autograd::optimizer::{AdamW, AdamWOptions, Decay, Schedule, clip_gradients, gradient_norm};
use autograd::{DType, Gradients, Tape, Tensor};
use model::{Model, Precision, TokenBatch};

use super::{Array, Case, Outcome};
use crate::compare::Bounds;

/// A student's loss against its teacher on one batch, and what comes with it.
struct Step {
    teacher_logits: Array,
    student_logits: Array,
    per_token: Array,
    loss: f64,
    gradients: Gradients,
}

/// `distillation_training_run`: reverse KL, clipping, AdamW with the stored rates; all parameters of the student train.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let teacher = Model::load(&case.folder_beside("teacher")?, case.device, Precision::F32)?;
    let mut student = Model::load(&case.folder_beside("student_init")?, case.device, Precision::F32)?;
    let betas: [f64; 2] = case.scalar("betas")?;
    let options = AdamWOptions {
        beta1: betas[0],
        beta2: betas[1],
        epsilon: case.scalar("eps")?,
        weight_decay: case.scalar("wd")?,
    };
    let clip: f64 = case.scalar("clip")?;
    let rates = &case.array("in.lr")?.values;
    let mut optimizer = AdamW::new(options, &student.parameters);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for (index, rate) in rates.iter().enumerate() {
        let mut step = distil(case, &teacher, &student, index)?;
        losses.push(step.loss);
        let norm = gradient_norm(&student.parameters, &step.gradients)?;
        norms.push(norm);
        if index == 0 {
            give_parameters(case, "step1.grad.", outcome, &student, |value| step.gradients.get(value).cloned())?;
            outcome.give("step1.teacher_logits", step.teacher_logits);
            outcome.give("step1.student_logits", step.student_logits);
            outcome.give("step1.per_token_kl", step.per_token);
        }
        clip_gradients(&mut step.gradients, norm, clip)?;
        optimizer.update(&mut student.parameters, &step.gradients, *rate as f32)?;
        if index == 0 {
            give_parameters(case, "step1.param.", outcome, &student, |value| Some(value.clone()))?;
        }
    }
    give_parameters(case, "final.param.", outcome, &student, |value| Some(value.clone()))?;
    let losses = Array::new(&[losses.len()], losses)?;
    outcome.give("out.loss", losses.clone());
    if case.has("out.loss_fp32_run") {
        let bounds = case.fixture.bounds("out.loss", case.precision)?.unwrap_or_default();
        let way = "against the reference's own f32 run, within the bounds of out.loss";
        outcome.give_within("out.loss_fp32_run", way, losses, bounds);
    }
    outcome.give("out.grad_norm_before_clip", Array::new(&[norms.len()], norms)?);
    if case.has("out.loss_after_step10_on_batch10") {
        let after = distil(case, &teacher, &student, rates.len() - 1)?;
        let stored = case.array("out.loss_after_step10_on_batch10")?;
        outcome.give("out.loss_after_step10_on_batch10", Array::scalar(after.loss).reshaped(&stored.shape)?);
    }
    schedule(case, outcome)
}

fn distil(case: &Case<'_>, teacher: &Model, student: &Model, index: usize) -> Result<Step> {
    let at = |name: &str| {
        let array = case.array(name)?;
        // Batches that are all alike may be stored once.
        if array.shape.len() == 3 { array.at(index) } else { Ok(array.clone()) }
    };
    let tokens = at("in.tokens")?;
    let [_, time] = tokens.shape[..] else { bail!("in.tokens has shape {:?}, expected (steps, B, L)", tokens.shape) };
    let rows: Vec<Vec<u32>> =
        tokens.values.chunks_exact(time).map(|row| row.iter().map(|token| *token as u32).collect()).collect();
    let batch = TokenBatch::new(case.device, &rows, None)?;
    let mask = case.upload_as(DType::F32, &at("in.mask")?)?;
    let counted: f32 = mask.to_f32_vec()?.iter().sum();
    let temperature = case.scalar::<f64>("tau")? as f32;

    let teacher_logits = teacher.logits(&Tape::inference(), &batch)?.tensor().clone();
    let tape = Tape::new();
    let student_logits = student.logits(&tape, &batch)?;
    let options = DivergenceOptions {
        divergence: Divergence::ReverseKl,
        student_temperature: temperature,
        teacher_temperature: temperature,
        mask: Some(&mask),
        denominator: counted,
    };
    let DivergenceLoss { loss, per_token } = ops::divergence(&tape, &student_logits, &teacher_logits, options)?;
    Ok(Step {
        teacher_logits: Array::read(&teacher_logits)?,
        student_logits: Array::read(&student_logits)?,
        per_token: Array::read(&per_token)?,
        loss: f64::from(loss.item()?),
        gradients: tape.backward(&loss)?,
    })
}

/// Gives the stored tensors `{prefix}{parameter}`.
fn give_parameters(
    case: &Case<'_>,
    prefix: &str,
    outcome: &mut Outcome,
    student: &Model,
    value_of: impl Fn(&Tensor) -> Option<Tensor>,
) -> Result<()> {
    for name in case.names_after(prefix) {
        let Some(id) = student.parameters.find(name) else { bail!("the student has no parameter {name}") };
        let Some(value) = value_of(&student.parameters.get(id).value) else { bail!("{name} has no gradient") };
        outcome.give(&format!("{prefix}{name}"), Array::read(&value)?);
    }
    Ok(())
}

/// The stored rates, against the schedule that training uses.
fn schedule(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let stored = case.array("in.lr")?;
    let schedule = Schedule {
        base: case.scalar("base_lr")?,
        minimum: 0.0,
        warmup_steps: case.scalar("warmup")?,
        decay_steps: case.scalar("decay_iterations")?,
        decay: Decay::Linear,
    };
    let rates = (1..).take(stored.count()).map(|step| schedule.rate(step)).collect();
    let bounds = Bounds::new(1e-12, 1e-12);
    outcome.give_within("in.lr", "the schedule, to 1e-12", Array::new(&stored.shape, rates)?, bounds);
    Ok(())
}
