//! `grafter bench`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use runtime::Device;

use super::precision::PrecisionArguments;
use super::{done, output};
use crate::bench::{BenchOptions, bench};

const EXAMPLES: &str = "\
Example:
  grafter bench smollm2 --prompt-tokens 512 --decode-tokens 64 --json";

/// Time whole steps of a model: reading a prompt, decoding, a training step
///
/// Medians of several repeats on tokens that mean nothing, and the peak memory of each phase: the process's on the CPU, the
/// device's elsewhere. Decoding takes the most likely tokens and hands each of them to the host. The training step is forward,
/// backward and AdamW over all parameters in f32.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Where to compute
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens decoded one at a time after the prompt; 0: none
    #[arg(long, default_value_t = 64)]
    decode_tokens: usize,
    /// Sequences decoded side by side
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens of the training sequence; 0: no training step
    #[arg(long, default_value_t = 512)]
    train_tokens: usize,
    /// Repeats of each; the median counts
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    #[command(flatten)]
    precision: PrecisionArguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let device: Device = arguments.device.parse()?;
    let options = BenchOptions {
        prompt_tokens: arguments.prompt_tokens,
        decode_tokens: arguments.decode_tokens,
        batch: arguments.batch,
        train_tokens: arguments.train_tokens,
        repeats: arguments.repeats,
        precision: arguments.precision.resolve(&arguments.model, &device)?,
    };
    let measurements = bench(&arguments.model, &device, &options, |phase| eprintln!("timing: {phase}"))?;
    if arguments.json {
        output::json(&measurements)?;
        return done();
    }
    output::line(
        "what                                   tokens     median    fastest    slowest   tokens/s   peak memory",
    )?;
    for measured in &measurements {
        output::line(&format!(
            "{:<38} {:>6} {:>8.3} s {:>8.3} s {:>8.3} s {:>10.1}   {}",
            measured.name,
            measured.tokens,
            measured.seconds,
            measured.fastest,
            measured.slowest,
            measured.tokens_per_second,
            measured.peak_bytes.map_or_else(|| "not known".to_owned(), output::bytes)
        ))?;
    }
    done()
}
