//! `grafter generate`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use model::Model;
use model::chat::ChatTemplate;
use model::generate::{FinishReason, GenerateOptions, Sampling, generate};
use model::tokenizer::Tokenizer;
use runtime::Device;
use serde_json::json;

use super::precision::PrecisionArguments;
use super::{done, output};

const EXAMPLES: &str = "\
Examples:
  grafter generate smollm2 --prompt \"The capital of France is\" --max-tokens 20 --greedy
  grafter generate runs/first/model --prompt \"Name three rivers.\" --chat --max-tokens 100 --temperature 0.7 --top-p 0.9
  grafter generate smollm2 --prompt \"1, 2, 3,\" --max-tokens 8 --greedy --json";

/// Continue a prompt
///
/// Writes the continuation to standard output as it comes, or as JSON with `text`, `token_ids` and `finish_reason`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// The text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Always take the most likely token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    greedy: bool,
    /// Divides the logits: below 1 is bolder, above 1 is wilder
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f32,
    /// Choose among this many of the most likely tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the choice
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Stop where this text appears; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Let the end-of-sequence token not end the text
    #[arg(long)]
    ignore_eos: bool,
    /// The prompt is a user's message; the model's chat template is put around it
    #[arg(long)]
    chat: bool,
    /// Where to compute: cpu, cuda:N, sim (the simulator) or auto
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    #[command(flatten)]
    precision: PrecisionArguments,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let device: Device = arguments.device.parse()?;
    let folder = &arguments.model;
    let tokenizer = Tokenizer::load(folder)?;
    let prompt = if arguments.chat {
        let Some(template) = ChatTemplate::load(folder)? else {
            bail!("--chat: {} has no chat template", folder.display());
        };
        let message = json!({ "role": "user", "content": arguments.prompt });
        tokenizer.encode(&template.render(&[message], true)?, false)?
    } else {
        tokenizer.encode(&arguments.prompt, true)?
    };
    let model = Model::load(folder, &device, arguments.precision.resolve(folder, &device)?)?;
    let options = GenerateOptions {
        max_tokens: arguments.max_tokens,
        sampling: if arguments.greedy {
            Sampling::Greedy
        } else {
            Sampling::Random {
                temperature: arguments.temperature,
                top_k: arguments.top_k,
                top_p: arguments.top_p,
                seed: arguments.seed,
            }
        },
        stop: arguments.stop,
        ignore_eos: arguments.ignore_eos,
    };
    let mut written = Ok(());
    let generation = generate(&model, &tokenizer, &prompt, &options, |piece| {
        if !arguments.json && written.is_ok() {
            written = output::text(piece);
        }
    })
    .context("generating")?;
    written?;
    if arguments.json {
        output::json(&json!({
            "text": generation.text,
            "token_ids": generation.token_ids,
            "finish_reason": match generation.finish_reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
            },
            "prompt_token_ids": prompt,
        }))?;
    } else {
        output::line("")?;
    }
    done()
}
