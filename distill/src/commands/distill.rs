//! `grafter distill`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use toml::Value;

use super::run_flags::{self, RunFlags, parse_layers, parse_schedule, path_override};
use crate::config::{Override, Task};

const EXAMPLES: &str = "\
Examples:
  grafter distill --teacher smollm2 --layers 10,15,20 --train train.jsonl --validation valid.jsonl \\
      --steps 200 --run runs/first
  grafter distill --config run.toml --run runs/second --set loss.divergence=forward_kl
  grafter distill --teacher smollm2 --schedule 10,14,18 --rank loo,mmr --rank-steps 20 --train train.jsonl \\
      --validation valid.jsonl --steps 200 --warmup-steps 10 --run runs/staged
  grafter distill --config staged.toml --run runs/staged --from-stage 2 --learning-rate 2e-5
  grafter distill --config staged.toml --run runs/staged --dry-run

A run that was interrupted or killed continues when the same command is given again. Keys of the configuration, as they
are resolved: grafter distill ... --print-config";

/// Replace layers of a teacher by Mamba mixers and distil the hybrid
///
/// The named layers' attention is replaced by Mamba mixers that start from its own weights; the hybrid then learns to
/// predict what the teacher predicts (reverse KL unless said otherwise).
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the model to learn from
    #[arg(long, value_name = "DIR")]
    teacher: Option<PathBuf>,
    /// Layers to replace, counted from 0, as in 1,3,5-8
    #[arg(long, value_name = "LAYERS")]
    layers: Option<String>,
    /// Stages: how many Mamba layers each ends with, picked by ranking, or which in brackets, as in 25,27 or [1],[1,3-5]
    #[arg(long, value_name = "STAGES")]
    schedule: Option<String>,
    /// How layers are ranked before each stage: loo, mmr or mse; the last one holds for the rest [default: loo,mmr]
    #[arg(long, value_name = "METHODS", value_delimiter = ',')]
    rank: Vec<String>,
    /// mmr: updates of each new mixer [default: 100]
    #[arg(long, value_name = "N")]
    rank_steps: Option<i64>,
    /// Data to rank with [default: the validation data for loo and mse, the training data for mmr]
    #[arg(long, value_name = "FILE")]
    rank_data: Option<PathBuf>,
    /// Take the stages before this one (counted from 1) as they are in the run's folder, and do it and later ones anew
    /// where their configuration changed
    #[arg(long, value_name = "N")]
    from_stage: Option<usize>,
    /// A hybrid from an earlier run to go on from
    #[arg(long, value_name = "DIR")]
    student: Option<PathBuf>,
    /// What the teacher says of the training data, by `grafter teach`: it is then not run
    #[arg(long, value_name = "DIR")]
    train_targets: Option<PathBuf>,
    /// What the teacher says of the validation data, by `grafter teach`
    #[arg(long, value_name = "DIR")]
    validation_targets: Option<PathBuf>,
    /// How new mixers start from the attention: paper, aligned, aligned_bias_once, identity_convolution or whole_head;
    /// with paper, mixers have no rate of their own (training.mixer_rate) [default: identity_convolution]
    #[arg(long, value_name = "HOW")]
    init: Option<String>,
    /// What is trained: all or mixers [default: all]
    #[arg(long, value_name = "WHAT")]
    trainable: Option<String>,
    /// reverse_kl, forward_kl, jensen_shannon or soft_cross_entropy [default: reverse_kl]
    #[arg(long, value_name = "WHICH")]
    divergence: Option<String>,
    /// Divides the logits of both models [default: 1]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    #[command(flatten)]
    flags: RunFlags,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let mut own = Vec::new();
    own.extend(path_override("--teacher", "model.teacher", arguments.teacher.as_deref())?);
    own.extend(path_override("--student", "model.student", arguments.student.as_deref())?);
    if let Some(layers) = &arguments.layers {
        own.push(Override::flag("--layers", "model.layers", parse_layers(layers)?));
    }
    own.extend(path_override("--rank-data", "stages.rank_data", arguments.rank_data.as_deref())?);
    for (flag, key, folder) in [
        ("--train-targets", "data.train_targets", &arguments.train_targets),
        ("--validation-targets", "data.validation_targets", &arguments.validation_targets),
    ] {
        own.extend(path_override(flag, key, folder.as_deref())?);
    }
    if let Some(schedule) = &arguments.schedule {
        own.push(Override::flag("--schedule", "stages.schedule", parse_schedule(schedule)?));
    }
    if !arguments.rank.is_empty() {
        own.push(Override::flag("--rank", "stages.rank", arguments.rank));
    }
    let values = [
        ("--rank-steps", "stages.rank_steps", arguments.rank_steps.map(Value::from)),
        ("--init", "model.init", arguments.init.map(Value::from)),
        ("--trainable", "training.trainable", arguments.trainable.map(Value::from)),
        ("--divergence", "loss.divergence", arguments.divergence.map(Value::from)),
        ("--temperature", "loss.temperature", arguments.temperature.map(Value::from)),
    ];
    own.extend(values.into_iter().filter_map(|(flag, key, value)| Some(Override::flag(flag, key, value?))));
    run_flags::run_from(Task::Distill, arguments.flags, own, arguments.from_stage)
}
