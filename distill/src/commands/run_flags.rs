//! What `grafter distill` and `grafter train` share: flags, and running.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;
use toml::Value;

use super::{INTERRUPTED, done, output};
use crate::config::{self, Override, RunConfig, Task};
use crate::interruption::Interrupted;
use crate::rank::Method;
use crate::stages;
use crate::train::{self, Interruption, Outcome, Progress};

/// Flags of both commands.
#[derive(Args)]
pub(super) struct RunFlags {
    /// Folder of the run: configuration, logs, checkpoints, and at the end the model
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// TOML file that describes the run; flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Training documents: jsonl with `text` or `messages`, or a packed token file
    #[arg(long, value_name = "FILE")]
    train: Option<PathBuf>,
    /// Validation documents
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// Tokens of a sequence [default: 512]
    #[arg(long, value_name = "N")]
    sequence_length: Option<i64>,
    /// What to do with documents longer than a sequence: refuse, split or drop [default: refuse]
    #[arg(long, value_name = "WHAT")]
    long_documents: Option<String>,
    /// Updates to make
    #[arg(long, value_name = "N")]
    steps: Option<i64>,
    /// Sequences of one update [default: 8]
    #[arg(long, value_name = "N")]
    batch_size: Option<i64>,
    /// Sequences computed at once: changes memory, and the gradients only by rounding [default: 1]
    #[arg(long, value_name = "N")]
    micro_batch: Option<i64>,
    /// Element type of matrices and activations: f32 or bf16 (with f32 weights in the optimizer) [default: f32]
    #[arg(long, value_name = "TYPE")]
    precision: Option<String>,
    /// Learning rate after warm-up; mixers of a distillation have a multiple of it (training.mixer_rate)
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Steps of linear warm-up [default: 0]
    #[arg(long, value_name = "N")]
    warmup_steps: Option<i64>,
    /// Seed of new weights and of the data's order [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<i64>,
    /// Steps between checkpoints; 0: only at the end and when interrupted [default: 100]
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<i64>,
    /// Steps between looks at the validation data [default: 100]
    #[arg(long, value_name = "N")]
    evaluation_every: Option<i64>,
    /// Where to compute: cpu, cuda:N, sim (the simulator) or auto [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Any other key of the configuration, as in `training.weight_decay=0.1`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the resolved configuration and do nothing
    #[arg(long)]
    print_config: bool,
    /// Measure a few updates, print the plan (stages, updates, tokens, memory, time), and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// Resolves and runs. `own` are the command's own flags.
pub(super) fn run(task: Task, flags: RunFlags, own: Vec<Override>) -> Result<ExitCode> {
    run_from(task, flags, own, None)
}

/// As [`run`], beginning with a stage.
pub(super) fn run_from(task: Task, flags: RunFlags, own: Vec<Override>, from_stage: Option<usize>) -> Result<ExitCode> {
    let mut overrides = own;
    for (flag, key, path) in
        [("--train", "data.train", &flags.train), ("--validation", "data.validation", &flags.validation)]
    {
        overrides.extend(path_override(flag, key, path.as_deref())?);
    }
    let values = [
        ("--sequence-length", "data.sequence_length", flags.sequence_length.map(Value::from)),
        ("--long-documents", "data.long_documents", flags.long_documents.map(Value::from)),
        ("--steps", "training.steps", flags.steps.map(Value::from)),
        ("--batch-size", "training.batch_size", flags.batch_size.map(Value::from)),
        ("--micro-batch", "training.micro_batch", flags.micro_batch.map(Value::from)),
        ("--precision", "training.precision", flags.precision.map(Value::from)),
        ("--learning-rate", "training.learning_rate", flags.learning_rate.map(Value::from)),
        ("--warmup-steps", "training.warmup_steps", flags.warmup_steps.map(Value::from)),
        ("--seed", "training.seed", flags.seed.map(Value::from)),
        ("--checkpoint-every", "checkpoint.every", flags.checkpoint_every.map(Value::from)),
        ("--evaluation-every", "evaluation.every", flags.evaluation_every.map(Value::from)),
        ("--device", "device", flags.device.map(Value::from)),
    ];
    // Flags override a file's lists with an entry per stage, too.
    let listed = [
        ("--steps", "stages.steps", flags.steps.is_some()),
        ("--learning-rate", "stages.learning_rates", flags.learning_rate.is_some()),
    ];
    for (flag, key, _) in listed.into_iter().filter(|(.., given)| *given && task == Task::Distill) {
        overrides.push(Override::flag(flag, key, Vec::<Value>::new()));
    }
    overrides.extend(values.into_iter().filter_map(|(flag, key, value)| Some(Override::flag(flag, key, value?))));
    for assignment in &flags.set {
        overrides.push(Override::parse(assignment)?);
    }
    let config = config::resolve(task, flags.config.as_deref(), &overrides)?;
    if flags.print_config {
        output::text(&config::to_toml(&config)?)?;
        return done();
    }
    let interruption = Interruption::on_signals(i32::from(INTERRUPTED))?;
    if flags.dry_run {
        return dry_run(&config, &interruption, flags.json);
    }
    let mut progress = Progress::on_stderr();
    let staged = !config.stages.schedule.is_empty();
    ensure!(staged || from_stage.is_none(), "--from-stage is for runs in stages (--schedule)");
    let outcome = if staged {
        stages::run(&config, &flags.run, from_stage, &interruption, &mut progress)?
    } else {
        train::run(&config, &flags.run, &interruption, &mut progress)?
    };
    match outcome {
        Outcome::Finished { model } => {
            if flags.json {
                let records = stages::read(&flags.run)?.filter(|_| staged);
                let own = config.training.steps;
                let steps = records.map_or(own, |stages| stages.iter().map(|stage| stage.steps).sum());
                output::json(&json!({ "outcome": "finished", "steps": steps, "model": model }))?;
            } else {
                output::line(&format!("the model is in {}", model.display()))?;
            }
            done()
        }
        Outcome::Interrupted { signal, step } => {
            progress.say(&match step {
                0 => format!("interrupted by {signal} before the first step; the same command begins it"),
                _ => format!("interrupted by {signal} after step {step}; the same command continues from there"),
            });
            if flags.json {
                output::json(&json!({ "outcome": "interrupted", "signal": signal, "steps": step }))?;
            }
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

/// Prints what the run would do.
fn dry_run(config: &RunConfig, interruption: &Interruption, json: bool) -> Result<ExitCode> {
    let plan = match stages::plan(config, interruption) {
        Err(error) if error.is::<Interrupted>() => return Ok(ExitCode::from(INTERRUPTED)),
        plan => plan?,
    };
    if json {
        output::json(&plan)?;
        return done();
    }
    output::line("stage  Mamba layers  ranked by   updates         tokens  ranking (s)  updates (s)")?;
    for stage in &plan.stages {
        let named = stage.layers.as_ref().map(|layers| format!("  layers {layers:?}")).unwrap_or_default();
        let method = stage.ranked_by.map_or("-", Method::name);
        output::line(&format!(
            "{:>5}  {:>12}  {method:<9}  {:>8}  {:>13}  {:>11.1}  {:>11.1}{named}",
            stage.stage,
            stage.mamba_layers,
            output::thousands(stage.steps),
            output::thousands(stage.tokens),
            stage.ranking_seconds,
            stage.seconds
        ))?;
    }
    output::line(&format!(
        "in all {} tokens; about {:.1} s ({:.3} s an update, measured); {} of device memory; {} a checkpoint",
        output::thousands(plan.tokens),
        plan.seconds,
        plan.seconds_per_update,
        output::bytes(plan.memory_bytes),
        output::bytes(plan.checkpoint_bytes)
    ))?;
    done()
}

/// A path given by a flag.
///
/// # Errors
/// For paths that are not UTF-8: the resolved configuration could not hold them.
pub(super) fn path_override(flag: &str, key: &str, path: Option<&Path>) -> Result<Option<Override>> {
    let Some(path) = path else { return Ok(None) };
    let text = path.to_str().with_context(|| format!("{flag}: {} is not UTF-8", path.display()))?;
    Ok(Some(Override::flag(flag, key, text)))
}

/// Layers as in `1,3,5-8`.
///
/// # Errors
/// Anything else.
pub(super) fn parse_layers(text: &str) -> Result<Vec<i64>> {
    let mut layers = Vec::new();
    for part in text.split(',').map(str::trim) {
        let number = |text: &str| -> Result<i64> {
            let layer: u32 = text.trim().parse().with_context(|| {
                format!("--layers {text}: write numbers and ranges with commas between, as in 1,3,5-8")
            })?;
            Ok(i64::from(layer))
        };
        match part.split_once('-') {
            None => layers.push(number(part)?),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                ensure!(first <= last && last - first < 10_000, "--layers {part}: not a range of layers");
                layers.extend(first..=last);
            }
        }
    }
    Ok(layers)
}

/// Stages as in `25,27,[1,3,5-8]`: how many Mamba layers each ends with, or which.
///
/// # Errors
/// Anything else.
pub(super) fn parse_schedule(text: &str) -> Result<Vec<Value>> {
    let mut stages = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (stage, after) = match rest.strip_prefix('[') {
            Some(inner) => {
                let (layers, after) =
                    inner.split_once(']').with_context(|| format!("--schedule {text}: a [ has no ]"))?;
                (Value::from(parse_layers(layers)?), after)
            }
            None => {
                let (count, after) = rest.split_at(rest.find(',').unwrap_or(rest.len()));
                let count: u32 = count.trim().parse().with_context(|| {
                    format!(
                        "--schedule {text}: write how many Mamba layers each stage ends with, or which in brackets, as \
                         in 2,3 or [1],[1,3-5]"
                    )
                })?;
                (Value::from(i64::from(count)), after)
            }
        };
        stages.push(stage);
        let after = after.trim();
        rest = match after.strip_prefix(',') {
            Some(next) => next.trim(),
            None => {
                ensure!(after.is_empty(), "--schedule {text}: a comma is missing before {after:?}");
                after
            }
        };
        ensure!(!rest.is_empty() || after.is_empty(), "--schedule {text}: nothing follows the last comma");
    }
    ensure!(!stages.is_empty(), "--schedule is empty: write how many Mamba layers each stage ends with, as in 2,3");
    Ok(stages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_counts_or_names() {
        let schedule = |text: &str| Value::from(parse_schedule(text).unwrap()).to_string();
        assert_eq!(schedule("25, 27,30"), "[25, 27, 30]");
        assert_eq!(schedule("[3],[1,3-5], 7"), "[[3], [1, 3, 4, 5], 7]");
        for wrong in ["", "2,", "a", "[1", "[1]2", "-3", "[]", "2,,3"] {
            assert!(parse_schedule(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn layers_are_numbers_and_ranges() {
        assert_eq!(parse_layers("1, 3,5-8").unwrap(), [1, 3, 5, 6, 7, 8]);
        for wrong in ["", "1,", "a", "-1", "5-3", "1-"] {
            assert!(parse_layers(wrong).is_err(), "{wrong}");
        }
    }
}
