//! `grafter eval`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use model::Model;
use model::chat::ChatTemplate;
use model::generate::Sampling;
use model::tokenizer::Tokenizer;
use runtime::Device;
use serde_json::{Value, json};

use super::precision::PrecisionArguments;
use super::{INTERRUPTED, done, interrupted, output};
use crate::evaluate::extract::Extract;
use crate::evaluate::perplexity::perplexity;
use crate::evaluate::{self, GenerationOptions, Measured, MultipleChoiceOptions, Results};
use crate::files;
use crate::interruption::Interruption;
use crate::train::Progress;
use crate::train::models::{encoder, tokenizer_hash};

const EXAMPLES: &str = "\
Examples:
  grafter eval smollm2 --task perplexity --data valid.jsonl
  grafter eval runs/first/model --task perplexity --data valid.jsonl --tokens-per-document 256 --json
  grafter eval smollm2 --task multiple-choice --data mmlu.jsonl --limit 300 --out mmlu.json
  grafter eval smollm2 --task generation --data gsm8k.jsonl --max-tokens 256 --extract last-number
  grafter eval hybrid --task generation --data gsm8k.jsonl --samples 8 --temperature 0.7 --out runs/h3/evaluations/gsm8k.json

What --out writes has every question with the choices' scores or the answers, to be checked by a person; in a run's folder
`evaluations` it becomes part of `grafter report`.";

/// Measure a model
///
/// `perplexity`: the mean negative log-likelihood of each token of the first tokens of every document, given those
/// before it and no begin-of-sequence token, and `e` to the power of it. `multiple-choice`: how often the right choice is the
/// likeliest, by summed log-likelihood, per token and per byte. `generation`: how often a written answer is the right one.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// What to measure
    #[arg(long, value_enum)]
    task: EvalTask,
    /// jsonl; perplexity: `text` or `messages`; multiple-choice: `question`, `choices`, `answer` (index from 0, letter or text);
    /// generation: `question`, `answer` and perhaps `aliases`, or chats whose last message is the answer; `id` and `task` are kept
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Write figures and every item as JSON into this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// perplexity: tokens looked at of each document
    #[arg(long, value_name = "N", default_value_t = 1024)]
    tokens_per_document: usize,
    /// Questions: the first of the data [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// What stands before a choice, and before an answer where no chat template does
    #[arg(long, value_name = "TEXT", default_value = evaluate::questions::PROMPT)]
    prompt: String,
    /// multiple-choice: tokens of a row, which holds several choices
    #[arg(long, value_name = "N", default_value_t = 1024)]
    sequence_length: usize,
    /// Rows computed, or questions answered, at once: changes memory and speed
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch_size: usize,
    /// generation: put questions without the model's chat template
    #[arg(long)]
    no_chat: bool,
    /// generation: longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// generation: where the answer is: auto (the last number where the right answer is one, else everything), whole, last-number,
    /// ####, boxed, or regex:PATTERN
    #[arg(long, value_name = "WAY", default_value = "auto")]
    extract: Extract,
    /// generation: an answer ends where this text appears; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// generation: answers to each question; more than one needs a --temperature
    #[arg(long, value_name = "N", default_value_t = 1)]
    samples: usize,
    /// generation: choose tokens at random, their logits divided by this [default: the likeliest token]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// generation: choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, requires = "temperature")]
    top_p: f32,
    /// generation: seed of the first answer's choice; the others count on from it
    #[arg(long, value_name = "N", default_value_t = 0, requires = "temperature")]
    seed: u64,
    /// Where to compute: cpu, cuda:N, sim (the simulator) or auto
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    #[command(flatten)]
    precision: PrecisionArguments,
    /// Print JSON: for perplexity the figures, otherwise what --out writes
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum EvalTask {
    /// How well documents are predicted
    Perplexity,
    /// Which choice is the likeliest
    MultipleChoice,
    /// What the model answers
    Generation,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    arguments.check()?;
    if let Some(out) = &arguments.out {
        files::check_file(out).context("--out")?;
    }
    let device: Device = arguments.device.parse()?;
    let tokenizer = Tokenizer::load(&arguments.model)?;
    let template = ChatTemplate::load(&arguments.model)?;
    let interruption = Interruption::on_signals(i32::from(INTERRUPTED))?;
    let data_sha256 = files::hash_file(&arguments.data, &interruption)?;
    let model = Model::load(&arguments.model, &device, arguments.precision.resolve(&arguments.model, &device)?)?;
    let measured = match arguments.task {
        EvalTask::Perplexity => arguments.perplexity(&model, &tokenizer, template.as_ref(), &device),
        EvalTask::MultipleChoice => arguments.multiple_choice(&model, &tokenizer, &interruption),
        EvalTask::Generation => arguments.generation(&model, &tokenizer, template.as_ref(), &interruption),
    };
    let (task, settings, (metrics, by_task, items)) = match measured {
        Ok(measured) => measured,
        Err(error) => return interrupted(error, &mut Progress::on_stderr(), "nothing was written"),
    };
    let Arguments { model, data, .. } = &arguments;
    let (model, data) = (model.clone(), data.clone());
    let results = Results { task, model, data, data_sha256, settings, metrics, by_task, items };
    if let Some(path) = &arguments.out {
        files::create_parent(path)?;
        files::write_json(path, &results)?;
    }
    match arguments.task {
        EvalTask::Perplexity if arguments.json => output::json(&perplexity_json(&results.metrics))?,
        _ if arguments.json => output::json(&results)?,
        EvalTask::Perplexity => output::line(&format!(
            "perplexity {:.3}  mean NLL {:.5}  ({} tokens of {} documents)",
            results.metrics["perplexity"],
            results.metrics["mean_nll"],
            output::thousands(results.metrics["tokens"] as u64),
            results.metrics["documents"]
        ))?,
        _ => {
            for (task, metrics) in &results.by_task {
                output::line(&format!("{task}: {}", figures(metrics)))?;
            }
            output::line(&figures(&results.metrics))?;
        }
    }
    done()
}

/// `accuracy 0.2000 ± 0.0200  …  (400 questions)`.
fn figures(metrics: &BTreeMap<String, f64>) -> String {
    let own = metrics.iter().filter(|(name, _)| *name != "questions" && !name.ends_with("_standard_error"));
    let mut text: String = own
        .map(|(name, value)| match metrics.get(&format!("{name}_standard_error")) {
            Some(error) => format!("{name} {value:.4} ± {error:.4}  "),
            None => format!("{name} {value:.4}  "),
        })
        .collect();
    text += &format!("({} questions)", metrics["questions"]);
    text
}

/// Counts as whole numbers.
fn perplexity_json(metrics: &BTreeMap<String, f64>) -> Value {
    json!({
        "documents": metrics["documents"] as u64, "tokens": metrics["tokens"] as u64,
        "mean_nll": metrics["mean_nll"], "perplexity": metrics["perplexity"],
    })
}

/// What was measured, with its name and settings.
type Named = (&'static str, Value, Measured);

impl Arguments {
    fn check(&self) -> Result<()> {
        evaluate::check_prompt(&self.prompt)?;
        for (flag, value) in [
            ("--sequence-length", self.sequence_length),
            ("--batch-size", self.batch_size),
            ("--max-tokens", self.max_tokens),
            ("--samples", self.samples),
        ] {
            ensure!(value >= 1, "{flag} is 0: it must be at least 1");
        }
        ensure!(
            self.samples == 1 || self.temperature.is_some(),
            "--samples is {}, but every answer would be the same: give a --temperature",
            self.samples
        );
        self.sampling().check()?;
        Ok(())
    }

    fn sampling(&self) -> Sampling {
        match self.temperature {
            Some(temperature) => Sampling::Random { temperature, top_k: None, top_p: self.top_p, seed: self.seed },
            None => Sampling::Greedy,
        }
    }

    /// What of the computation results depend on.
    fn settings(&self, model: &Model, more: Value) -> Value {
        let precision = model.activations.to_string();
        let mut settings = json!({ "device": self.device, "precision": precision, "limit": self.limit });
        if let (Some(settings), Value::Object(more)) = (settings.as_object_mut(), more) {
            settings.extend(more);
        }
        settings
    }

    fn perplexity(
        &self,
        model: &Model,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        device: &Device,
    ) -> Result<Named> {
        let hash = tokenizer_hash(&self.model)?;
        let encoder = encoder(&model.config, tokenizer, &hash, template, false, false)?;
        // Drawn on standard error, and only where that is a terminal.
        let spinner = ProgressBar::new_spinner();
        let count = |documents| {
            spinner.set_message(format!("{documents} documents"));
            spinner.tick();
        };
        let result = perplexity(model, &encoder, &self.data, self.tokens_per_document, device, count);
        spinner.finish_and_clear();
        let result = result?;
        let metrics = [
            ("documents", result.documents as f64),
            ("tokens", result.tokens as f64),
            ("mean_nll", result.mean_nll),
            ("perplexity", result.perplexity),
        ];
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
        let settings = self.settings(model, json!({ "tokens_per_document": self.tokens_per_document }));
        Ok(("perplexity", settings, (metrics, BTreeMap::new(), Vec::new())))
    }

    fn multiple_choice(&self, model: &Model, tokenizer: &Tokenizer, interruption: &Interruption) -> Result<Named> {
        let options = MultipleChoiceOptions {
            limit: self.limit.unwrap_or(u64::MAX),
            prompt: self.prompt.clone(),
            sequence_length: self.sequence_length,
            batch_size: self.batch_size,
        };
        let progress = &mut Progress::on_stderr();
        let measured = evaluate::multiple_choice(model, tokenizer, &self.data, &options, interruption, progress)?;
        Ok((
            "multiple-choice",
            self.settings(
                model,
                json!({
                    "prompt": self.prompt, "sequence_length": self.sequence_length, "batch_size": self.batch_size,
                }),
            ),
            measured,
        ))
    }

    fn generation(
        &self,
        model: &Model,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        interruption: &Interruption,
    ) -> Result<Named> {
        let options = GenerationOptions {
            limit: self.limit.unwrap_or(u64::MAX),
            prompt: self.prompt.clone(),
            chat: !self.no_chat,
            max_tokens: self.max_tokens,
            sampling: self.sampling(),
            samples: self.samples,
            stop: self.stop.clone(),
            extract: self.extract.clone(),
            batch_size: self.batch_size,
        };
        let progress = &mut Progress::on_stderr();
        let measured = evaluate::generation(model, tokenizer, template, &self.data, &options, interruption, progress)?;
        let settings = self.settings(
            model,
            json!({
                "prompt": self.prompt, "chat": template.is_some() && !self.no_chat, "max_tokens": self.max_tokens,
                "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "samples": self.samples,
                "stop": self.stop, "extract": format!("{:?}", self.extract), "batch_size": self.batch_size,
            }),
        );
        Ok(("generation", settings, measured))
    }
}
