//! `grafter rank`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use super::run_flags::parse_layers;
use super::{INTERRUPTED, done, interrupted, output};
use crate::config::{Init, PrecisionKind, RunConfig, Task};
use crate::data::LongDocuments;
use crate::files;
use crate::interruption::Interruption;
use crate::rank::{self, Method, Metric, RankConfig, Ranking};
use crate::train::Progress;

const EXAMPLES: &str = "\
Examples:
  grafter rank smollm2 --method loo --data valid.jsonl --out ranks/loo
  grafter rank smollm2 --method loo --metric accuracy --data mmlu.jsonl --samples 200 --out ranks/mmlu
  grafter rank runs/h25/model --teacher smollm2 --method mmr --steps 20 --data train.jsonl --out ranks/mmr
  grafter rank smollm2 --method mse --data valid.jsonl --out ranks/mse --json

The folder then has ranking.json (scores, settings, hashes), importance.svg and, for mmr, change-of-rank.svg. A ranking
that was interrupted or killed goes on when the same command is given again.";

/// Rank layers by how much the model needs their attention
///
/// loo: each layer in turn becomes the identity; its score is how much worse a metric gets. mmr: each layer's attention
/// alone becomes a Mamba mixer that learns for some steps; its score is the divergence from the teacher that is left.
/// mse: the error of such a mixer's output before it learns. Layers with low scores are the ones to replace first.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the model: a transformer, or a hybrid between two stages
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// How importance is estimated
    #[arg(long, value_enum)]
    method: Method,
    /// loo: what gets worse without a layer
    #[arg(long, value_enum, default_value = "loss")]
    metric: Metric,
    /// Documents (jsonl with `text` or `messages`, or a packed token file); for --metric accuracy jsonl with `question`,
    /// `choices`, `answer`; for exact-match with `question` and `answer`, or chats whose last message is the answer
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Folder for the ranking
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of the original teacher, where MODEL is a hybrid of it
    #[arg(long, value_name = "DIR")]
    teacher: Option<PathBuf>,
    /// Layers to rank, as in 1,3,5-8 [default: all with attention]
    #[arg(long, value_name = "LAYERS")]
    layers: Option<String>,
    /// loo, mse: rows of documents, or questions, to look at: the first of the data
    #[arg(long, value_name = "N", default_value_t = 16)]
    samples: u64,
    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 512)]
    sequence_length: usize,
    /// What to do with documents longer than a row
    #[arg(long, value_enum, default_value = "refuse")]
    long_documents: LongDocuments,
    /// Put the model's begin-of-sequence token before each text
    #[arg(long)]
    begin_token: bool,
    /// mmr: updates of each new mixer
    #[arg(long, value_name = "N", default_value_t = 100)]
    steps: u64,
    /// mmr: the score is the mean of this many last updates' losses [default: 10, or all if there are fewer]
    #[arg(long, value_name = "N")]
    average_last: Option<u64>,
    /// mmr: rows of one update; exact-match: questions answered at once
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch_size: usize,
    /// Rows computed at once: changes memory and speed
    #[arg(long, value_name = "N", default_value_t = 1)]
    micro_batch: usize,
    /// mmr: learning rate of the new mixers, after a warm-up of a tenth of the steps
    #[arg(long, value_name = "RATE", default_value_t = 5e-4)]
    learning_rate: f64,
    /// mmr: layers that learn side by side on one trunk: more is faster and takes more memory
    #[arg(long, value_name = "N", default_value_t = 4)]
    together: usize,
    /// exact-match: longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// mmr, mse: how new mixers start, as in `grafter distill --init` [default: identity_convolution]
    #[arg(long, value_name = "HOW")]
    init: Option<Init>,
    /// Seed of new mixers and of the data's order
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Element type of matrices and activations
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionKind,
    /// Where to compute: cpu, cuda:N, sim (the simulator) or auto
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Print the ranking as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    files::check_folder(&arguments.out).context("--out")?;
    let layers = match &arguments.layers {
        Some(layers) => parse_layers(layers)?.into_iter().map(|layer| layer as usize).collect(),
        None => Vec::new(),
    };
    let config = RankConfig {
        model: arguments.model,
        teacher: arguments.teacher,
        method: arguments.method,
        metric: arguments.metric,
        data: arguments.data,
        layers,
        samples: arguments.samples,
        sequence_length: arguments.sequence_length,
        long_documents: arguments.long_documents,
        begin_token: arguments.begin_token,
        steps: arguments.steps,
        average_last: arguments.average_last.unwrap_or(arguments.steps.clamp(1, 10)),
        batch_size: arguments.batch_size,
        micro_batch: arguments.micro_batch,
        learning_rate: arguments.learning_rate,
        together: arguments.together,
        max_tokens: arguments.max_tokens,
        init: arguments.init.unwrap_or(RunConfig::defaults(Task::Distill).model.init),
        seed: arguments.seed,
        precision: arguments.precision,
        device: arguments.device,
    };
    let interruption = Interruption::on_signals(i32::from(INTERRUPTED))?;
    let mut progress = Progress::on_stderr();
    let start = Instant::now();
    match rank::run(&config, &arguments.out, &interruption, &mut progress) {
        Ok(ranking) if arguments.json => output::json(&ranking)?,
        Ok(ranking) => print(&ranking, start.elapsed().as_secs_f64())?,
        Err(error) => return interrupted(error, &mut progress, "the same command continues after the layers done"),
    }
    done()
}

fn print(ranking: &Ranking, seconds: f64) -> Result<()> {
    if let Some(baseline) = ranking.baseline {
        output::line(&format!("whole model {baseline:.6}"))?;
    }
    output::line("layer  score       rank")?;
    for score in &ranking.scores {
        let rank = ranking.least_important_first.iter().position(|&layer| layer == score.layer).unwrap_or_default();
        let start = score.score_at_start.map_or(String::new(), |start| format!("  ({start:.6} at the start)"));
        output::line(&format!("{:>5}  {:<10.6}  {:>4}{start}", score.layer, score.score, rank + 1))?;
    }
    let order: Vec<String> = ranking.least_important_first.iter().map(usize::to_string).collect();
    output::line(&format!("least important first: {}", order.join(" ")))?;
    output::line(&format!(
        "{} passes of a layer instead of {}: {:.2} times fewer; {seconds:.1} s",
        output::thousands(ranking.cost.layer_passes),
        output::thousands(ranking.cost.naive_layer_passes),
        ranking.cost.speed_up()
    ))
}
