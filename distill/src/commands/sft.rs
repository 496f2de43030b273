//! `grafter sft`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use toml::Value;

use super::run_flags::{self, RunFlags, path_override};
use crate::config::{Override, Task};

const EXAMPLES: &str = "\
Examples:
  grafter sft runs/h30/model --train chats.jsonl --steps 500 --learning-rate 1e-5 --run runs/sft
  grafter sft hybrid --train chats.jsonl --validation held-out.jsonl --sequence-length 2048 --run runs/sft

Of chats (`messages`) only the assistant's words count; the prompt is read and masked out of the loss. A run that was
interrupted or killed continues when the same command is given again.";

/// Fine-tune a model on chats with cross-entropy
///
/// Training from the model's weights (as `grafter train --init weights` does), on the tokens that the assistant says.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The model's folder
    #[arg(value_name = "MODEL", required_unless_present = "config")]
    model: Option<PathBuf>,
    #[command(flatten)]
    flags: RunFlags,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let mut own = Vec::new();
    own.extend(path_override("MODEL", "model.source", arguments.model.as_deref())?);
    own.push(Override::flag("sft", "model.init", Value::from("weights")));
    run_flags::run(Task::Train, arguments.flags, own)
}
