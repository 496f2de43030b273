//! `grafter import`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use indicatif::ProgressBar;
use model::import::import;
use serde_json::json;

use super::{done, output};

const EXAMPLES: &str = "\
Examples:
  grafter import SmolLM2-135M-Instruct.Q4_1.gguf smollm2
  grafter import ~/.cache/huggingface/hub/models--x/snapshots/0123 teacher";

/// Turn a GGUF file or a Hugging Face folder into a checked model folder
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The GGUF file or Hugging Face folder
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The folder to make
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    // Drawn on standard error, and only where that is a terminal.
    let bar = ProgressBar::new(0);
    let imported = import(&arguments.source, &arguments.out, |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
    });
    bar.finish_and_clear();
    let summary = imported?;
    if arguments.json {
        output::json(&json!({
            "model": arguments.out,
            "source": summary.source,
            "tensors": summary.tensors,
            "parameters": summary.parameters,
            "bytes": summary.bytes,
            "source_types": summary.source_types,
        }))?;
        return done();
    }
    let types: Vec<String> = summary.source_types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    output::line(&format!(
        "{}: {} tensors ({}), {} parameters, {}",
        summary.source,
        summary.tensors,
        types.join(", "),
        output::thousands(summary.parameters),
        output::bytes(summary.bytes)
    ))?;
    output::line(&format!("the model is in {}", arguments.out.display()))?;
    done()
}
