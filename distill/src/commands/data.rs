//! `grafter data`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use model::chat::ChatTemplate;
use model::config::ModelConfig;
use model::tokenizer::Tokenizer;
use serde_json::json;

use super::{done, output};
use crate::data::{LongDocuments, PackOptions, pack};
use crate::interruption::Interruption;
use crate::train::models::{encoder, tokenizer_hash};

const EXAMPLES: &str = "\
Example:
  grafter data pack --model smollm2 --input train.jsonl --output train.tokens --sequence-length 512";

/// Prepare training data
///
/// Runs pack their documents themselves; packing beforehand lets several runs share one token file.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pack documents into a token file
    #[command(after_help = EXAMPLES)]
    Pack(PackArguments),
}

#[derive(Args)]
struct PackArguments {
    /// Folder of the model whose tokenizer is used
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The documents: jsonl with `text` or `messages`
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// The token file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 512)]
    sequence_length: usize,
    /// What to do with documents longer than a sequence
    #[arg(long, value_enum, default_value_t = LongDocumentsFlag::Refuse)]
    long_documents: LongDocumentsFlag,
    /// Put the begin-of-sequence token before each text
    #[arg(long)]
    begin_token: bool,
    /// Put no end-of-sequence token after each text
    #[arg(long)]
    no_end_token: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum LongDocumentsFlag {
    /// Stop, naming the document
    Refuse,
    /// Cut them into pieces
    Split,
    /// Leave them out
    Drop,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::Pack(arguments) => run_pack(&arguments),
    }
}

fn run_pack(arguments: &PackArguments) -> Result<ExitCode> {
    anyhow::ensure!(
        PackOptions::SEQUENCE_LENGTHS.contains(&arguments.sequence_length),
        "--sequence-length {}: it must be from {} to {}",
        arguments.sequence_length,
        PackOptions::SEQUENCE_LENGTHS.start(),
        PackOptions::SEQUENCE_LENGTHS.end()
    );
    let config = ModelConfig::read(&arguments.model)?;
    let tokenizer = Tokenizer::load(&arguments.model)?;
    let hash = tokenizer_hash(&arguments.model)?;
    let template = ChatTemplate::load(&arguments.model)?;
    let (begin, end) = (arguments.begin_token, !arguments.no_end_token);
    let encoder = encoder(&config, &tokenizer, &hash, template.as_ref(), begin, end)?;
    let options = PackOptions {
        sequence_length: arguments.sequence_length,
        long_documents: match arguments.long_documents {
            LongDocumentsFlag::Refuse => LongDocuments::Refuse,
            LongDocumentsFlag::Split => LongDocuments::Split,
            LongDocumentsFlag::Drop => LongDocuments::Drop,
        },
    };
    let file = pack(&arguments.input, &arguments.output, &encoder, options, &Interruption::new())?;
    let summary = file.summary();
    if arguments.json {
        output::json(&json!({ "file": file.path(), "summary": summary, "identity": file.identity() }))?;
    } else {
        output::line(&format!(
            "{}: {} sequences of {} tokens, {} documents, {} tokens ({} to be learned), {} empty, {} split, {} dropped",
            file.path().display(),
            output::thousands(summary.sequences),
            arguments.sequence_length,
            output::thousands(summary.documents),
            output::thousands(summary.tokens),
            output::thousands(summary.targets),
            summary.empty_documents,
            summary.split_documents,
            summary.dropped_documents
        ))?;
    }
    done()
}
