//! `grafter train`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use toml::Value;

use super::run_flags::{self, RunFlags, path_override};
use crate::config::{Override, Task};

const EXAMPLES: &str = "\
Examples:
  grafter train --source tiny --train train.jsonl --steps 1000 --run runs/tiny
  grafter train --source smollm2 --init weights --train train.jsonl --steps 100 --learning-rate 2e-5 --run runs/tuned

A run that was interrupted or killed continues when the same command is given again. Keys of the configuration, as they
are resolved: grafter train ... --print-config";

/// Train a model on documents with cross-entropy
///
/// From random weights for a configuration, or from the weights of a model.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder with config.json and tokenizer.json, and with weights for `--init weights`
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    /// How the model begins: random or weights [default: random]
    #[arg(long, value_name = "HOW")]
    init: Option<String>,
    #[command(flatten)]
    flags: RunFlags,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let mut own = Vec::new();
    own.extend(path_override("--source", "model.source", arguments.source.as_deref())?);
    own.extend(arguments.init.map(|init| Override::flag("--init", "model.init", Value::from(init))));
    run_flags::run(Task::Train, arguments.flags, own)
}
