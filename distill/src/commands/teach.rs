//! `grafter teach`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::{INTERRUPTED, done, interrupted, output};
use crate::config::PrecisionKind;
use crate::data::LongDocuments;
use crate::files;
use crate::interruption::Interruption;
use crate::teach::{self, TeachConfig};
use crate::train::Progress;

const EXAMPLES: &str = "\
Examples:
  grafter teach smollm2 --data train.jsonl --top 64 --out taught
  grafter distill --teacher smollm2 --layers 10,15,20 --train train.jsonl --train-targets taught --steps 200 --run runs/h3

The run must pack its documents in the same way and learn at the same temperature. A call that was interrupted or killed goes
on when the same command is given again.";

/// Precompute what a teacher says of training data
///
/// Writes the teacher's likeliest tokens at every position, their log-probabilities and the mass of the rest: 8 bytes for every
/// token listed and 4 for the rest. Runs that learn from them do not run the teacher.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the teacher
    #[arg(value_name = "TEACHER")]
    teacher: PathBuf,
    /// Documents: jsonl with `text` or `messages`, or a packed token file
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Folder for the targets
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Tokens listed of every position
    #[arg(long, value_name = "K", default_value_t = 64)]
    top: usize,
    /// Divides the teacher's logits: loss.temperature of the runs that learn from it
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f64,
    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 512)]
    sequence_length: usize,
    /// What to do with documents longer than a row
    #[arg(long, value_enum, default_value = "refuse")]
    long_documents: LongDocuments,
    /// Put the model's begin-of-sequence token before each text
    #[arg(long)]
    begin_token: bool,
    /// Put no end-of-sequence token after each text
    #[arg(long)]
    no_end_token: bool,
    /// Rows computed at once: changes memory and speed
    #[arg(long, value_name = "N", default_value_t = 1)]
    micro_batch: usize,
    /// Element type of matrices and activations
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionKind,
    /// Where to compute: cpu, cuda:N, sim (the simulator) or auto
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    files::check_folder(&arguments.out).context("--out")?;
    let config = TeachConfig {
        teacher: arguments.teacher,
        data: arguments.data,
        sequence_length: arguments.sequence_length,
        long_documents: arguments.long_documents,
        begin_token: arguments.begin_token,
        end_token: !arguments.no_end_token,
        top: arguments.top,
        temperature: arguments.temperature,
        micro_batch: arguments.micro_batch,
        precision: arguments.precision,
        device: arguments.device,
    };
    let interruption = Interruption::on_signals(i32::from(INTERRUPTED))?;
    let mut progress = Progress::on_stderr();
    let description = match teach::run(&config, &arguments.out, &interruption, &mut progress) {
        Ok(description) => description,
        Err(error) => return interrupted(error, &mut progress, "the same command goes on where it was"),
    };
    if arguments.json {
        output::json(&json!({ "folder": arguments.out, "targets": description }))?;
    } else {
        output::line(&format!(
            "{}: {} rows of {} tokens, {} tokens listed of each; the rest has {:.3} % of the probability on average",
            arguments.out.display(),
            output::thousands(description.sequences),
            description.sequence_length,
            description.top,
            100.0 * description.mean_tail
        ))?;
    }
    done()
}
