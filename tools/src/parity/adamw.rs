//! AdamW with clipping, and the learning-rate schedules.

use anyhow::{Result, bail};
use autograd::optimizer::{AdamW, AdamWOptions, Decay, Schedule, clip_gradients, gradient_norm};
use autograd::{DType, Gradients, Parameter, Parameters};

use super::{Array, Case, Outcome};
use crate::compare::Bounds;

/// `adamw_trajectory`: parameters after every step, norms, moments after the last, and the schedule.
pub(super) fn run(case: &Case<'_>, outcome: &mut Outcome) -> Result<()> {
    let no_decay: Vec<String> = case.scalar("no_decay")?;
    let names: Vec<&str> = case.names_after("p0.").collect();
    let mut parameters = Parameters::default();
    for name in &names {
        outcome.is_input(&format!("grad.{name}"));
        parameters.push(Parameter {
            name: (*name).to_owned(),
            value: case.upload_as(DType::F32, case.array(&format!("p0.{name}"))?)?,
            trainable: true,
            decay: !no_decay.iter().any(|other| other == name),
            rate: 1.0,
        });
    }
    let betas: [f64; 2] = case.scalar("betas")?;
    let options = AdamWOptions {
        beta1: betas[0],
        beta2: betas[1],
        epsilon: case.scalar("eps")?,
        weight_decay: case.scalar("weight_decay")?,
    };
    let rates: Vec<f64> = case.scalar("lr")?;
    let limit: f64 = case.scalar("clip")?;
    let mut optimizer = AdamW::new(options, &parameters);
    let mut norms = Vec::new();
    let mut trajectories: Vec<Vec<Array>> = vec![Vec::new(); names.len()];
    for (step, rate) in rates.iter().enumerate() {
        let mut gradients = Gradients::default();
        for (_, parameter) in parameters.iter() {
            let gradient = case.array(&format!("grad.{}", parameter.name))?.at(step)?;
            gradients.add(&parameter.value, case.upload_as(DType::F32, &gradient)?)?;
        }
        let norm = gradient_norm(&parameters, &gradients)?;
        clip_gradients(&mut gradients, norm, limit)?;
        optimizer.update(&mut parameters, &gradients, *rate as f32)?;
        norms.push(norm);
        for ((_, parameter), trajectory) in parameters.iter().zip(&mut trajectories) {
            trajectory.push(Array::read(&parameter.value)?);
        }
    }
    outcome.give("out.grad_norm_before_clip", Array::new(&[norms.len()], norms)?);
    for ((name, trajectory), moments) in names.iter().zip(&trajectories).zip(optimizer.moments()) {
        outcome.give(&format!("out.{name}"), Array::stacked(trajectory)?);
        if let Some((first, second)) = moments {
            let way = "after the last step";
            outcome.give_also(&format!("state.exp_avg.{name}"), way, Array::read(first)?);
            outcome.give_also(&format!("state.exp_avg_sq.{name}"), way, Array::read(second)?);
        }
    }
    schedule(case, &rates, outcome)
}

/// The stored rates, against the schedule that training uses. Both are sums of a few f64 products.
fn schedule(case: &Case<'_>, rates: &[f64], outcome: &mut Outcome) -> Result<()> {
    let schedule = Schedule {
        base: case.scalar("base_lr")?,
        minimum: case.scalar("minimum")?,
        warmup_steps: case.scalar("warmup")?,
        decay_steps: case.scalar("total")?,
        decay: Decay::Linear,
    };
    // Hugging Face counts steps from 0, Fast-LLM from 1.
    let first = match case.scalar::<String>("sched")?.as_str() {
        "fast_llm" => 1,
        "hf" => 0,
        other => bail!("schedule {other:?} is unknown"),
    };
    let ours: Vec<f64> = (first..).take(rates.len()).map(|step| schedule.rate(step)).collect();
    let bounds = Bounds::new(1e-12, 1e-12);
    outcome.give_within("in.lr", "the schedule, to 1e-12", Array::new(&[rates.len()], ours)?, bounds);
    Ok(())
}
