//! `grafter merge`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use model::merge::{MergeMethod, MergeSource, merge};
use serde_json::json;

use super::{done, output};

const EXAMPLES: &str = "\
Examples:
  grafter merge runs/sft/model runs/h30/model --out merged
  grafter merge a b c --weights 0.5,0.25,0.25 --out merged
  grafter merge a b --weights 0.3,0.7 --method slerp --out merged";

/// Merge models of one architecture, weight by weight
///
/// Computed in f32 or wider, a tensor at a time; element types, configuration, tokenizer and other files are the first
/// model's.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The models' folders
    #[arg(value_name = "MODEL", required = true, num_args = 2..)]
    models: Vec<PathBuf>,
    /// A weight for each model; they sum to 1 [default: equal ones]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', allow_negative_numbers = true)]
    weights: Vec<f64>,
    /// How weights are put together
    #[arg(long, value_enum, default_value_t = Method::Linear)]
    method: Method,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Method {
    /// The weighted mean
    Linear,
    /// Along the arc between two models' tensors
    Slerp,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let count = arguments.models.len();
    let weights = match arguments.weights.len() {
        0 => vec![1.0 / count as f64; count],
        given if given == count => arguments.weights,
        given => bail!("--weights has {given} number(s) for {count} models: give one for each"),
    };
    let sources: Vec<MergeSource> =
        arguments.models.into_iter().zip(weights).map(|(folder, weight)| MergeSource { folder, weight }).collect();
    let method = match arguments.method {
        Method::Linear => MergeMethod::Linear,
        Method::Slerp => MergeMethod::Slerp,
    };
    // Drawn on standard error, and only where that is a terminal.
    let bar = ProgressBar::new(0);
    let merged = merge(&sources, method, &arguments.out, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let summary = merged?;
    if arguments.json {
        output::json(&json!({
            "model": arguments.out,
            "tensors": summary.tensors,
            "parameters": summary.parameters,
            "bytes": summary.bytes,
        }))?;
        return done();
    }
    for source in &sources {
        output::line(&format!("{:>10.4}  {}", source.weight, source.folder.display()))?;
    }
    output::line(&format!(
        "{} tensors, {} parameters, {}",
        summary.tensors,
        output::thousands(summary.parameters),
        output::bytes(summary.bytes)
    ))?;
    output::line(&format!("the model is in {}", arguments.out.display()))?;
    done()
}
