//! `grafter eval`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use model::Model;
use model::chat::ChatTemplate;
use model::tokenizer::Tokenizer;
use runtime::Device;

use super::precision::PrecisionArguments;
use super::{done, output};
use crate::perplexity::perplexity;
use crate::train::models::{encoder, tokenizer_hash};

const EXAMPLES: &str = "\
Examples:
  grafter eval smollm2 --task perplexity --data valid.jsonl
  grafter eval runs/first/model --task perplexity --data valid.jsonl --tokens-per-document 256 --json";

/// Measure a model
///
/// `perplexity`: the mean negative log-likelihood of each token of the first tokens of every document, given those
/// before it and no begin-of-sequence token, and `e` to the power of it.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// What to measure
    #[arg(long, value_enum)]
    task: EvalTask,
    /// The documents: jsonl with `text` or `messages`
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens looked at of each document
    #[arg(long, value_name = "N", default_value_t = 1024)]
    tokens_per_document: usize,
    /// Where to compute: cpu, cuda:N or auto
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    #[command(flatten)]
    precision: PrecisionArguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum EvalTask {
    /// How well documents are predicted
    Perplexity,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let device: Device = arguments.device.parse()?;
    let tokenizer = Tokenizer::load(&arguments.model)?;
    let hash = tokenizer_hash(&arguments.model)?;
    let template = ChatTemplate::load(&arguments.model)?;
    let model = Model::load(&arguments.model, &device, arguments.precision.resolve(&arguments.model, &device)?)?;
    let encoder = encoder(&model.config, &tokenizer, &hash, template.as_ref(), false, false)?;
    match arguments.task {
        EvalTask::Perplexity => {
            // Drawn on standard error, and only where that is a terminal.
            let spinner = ProgressBar::new_spinner();
            let count = |documents| {
                spinner.set_message(format!("{documents} documents"));
                spinner.tick();
            };
            let result = perplexity(&model, &encoder, &arguments.data, arguments.tokens_per_document, &device, count);
            spinner.finish_and_clear();
            let result = result?;
            if arguments.json {
                output::json(&result)?;
            } else {
                output::line(&format!(
                    "perplexity {:.3}  mean NLL {:.5}  ({} tokens of {} documents)",
                    result.perplexity,
                    result.mean_nll,
                    output::thousands(result.tokens),
                    result.documents
                ))?;
            }
        }
    }
    done()
}
