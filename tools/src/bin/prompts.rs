//! Checks a model against recorded prompts: token ids, next-token logits, greedy continuations, mean negative
//! log-likelihoods.
//!
//! The file is JSON: `prompts`, a list of objects with `text` and `ids`, and any of `top10` (`id`, `logit`), `logsumexp`,
//! `greedy_ids` (with `greedy_stopped_at_eos`) and `passage` (`ids`, `mean_nll`). Numbers were computed in float32 by a
//! reference.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use autograd::{Tape, Tensor, ops};
use clap::Parser;
use model::generate::{GenerateOptions, Sampling, generate_batch};
use model::tokenizer::Tokenizer;
use model::{Model, Precision, TokenBatch};
use runtime::Device;
use serde::Deserialize;

/// Check a model folder against a file of recorded prompts.
#[derive(Parser)]
#[command(after_help = "Exit code: 0 when everything agrees, 1 when something does not or cannot be read.")]
struct Arguments {
    /// Model folder.
    model: PathBuf,
    /// Recorded prompts, JSON.
    prompts: PathBuf,
    /// Greatest absolute difference of a logit (float32 sums in another order differ by about 5e-5).
    #[arg(long, default_value_t = 3e-4)]
    logit_tolerance: f64,
    /// Greatest absolute difference of a mean negative log-likelihood.
    #[arg(long, default_value_t = 1e-4)]
    nll_tolerance: f64,
}

#[derive(Deserialize)]
struct Recorded {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    #[serde(default)]
    name: String,
    text: String,
    ids: Vec<u32>,
    #[serde(default)]
    top10: Vec<Logit>,
    logsumexp: Option<f64>,
    greedy_ids: Option<Vec<u32>>,
    #[serde(default)]
    greedy_stopped_at_eos: bool,
    passage: Option<Passage>,
}

#[derive(Deserialize)]
struct Passage {
    ids: Vec<u32>,
    mean_nll: f64,
}

#[derive(Deserialize)]
struct Logit {
    id: u32,
    logit: f64,
}

fn main() -> ExitCode {
    match check(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failures) => {
            println!("{failures} checks failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check(arguments: &Arguments) -> Result<usize> {
    let recorded = read(&arguments.prompts)?;
    let device = Device::cpu();
    let tokenizer = Tokenizer::load(&arguments.model)?;
    let model = Model::load(&arguments.model, &device, Precision::AsStored)?;
    let mut failures = 0;
    let mut report = |name: &str, what: &str, passed: bool, found: String| {
        println!("{:<6} {name:<24} {what:<22} {found}", if passed { "ok" } else { "FAILED" });
        failures += usize::from(!passed);
    };
    for (index, prompt) in recorded.prompts.iter().enumerate() {
        let name = if prompt.name.is_empty() { format!("prompt {index}") } else { prompt.name.clone() };
        let ids = tokenizer.encode(&prompt.text, false)?;
        report(&name, "token ids", ids == prompt.ids, format!("{} ids", ids.len()));
        if !prompt.top10.is_empty() {
            let batch = TokenBatch::new(&device, std::slice::from_ref(&prompt.ids), None)?;
            let logits = model.prefill(&batch)?.0.to_f32_vec()?;
            let mut worst = 0.0f64;
            for recorded in &prompt.top10 {
                let found = logits.get(recorded.id as usize).map_or(f64::NAN, |logit| f64::from(*logit));
                worst = greater(worst, (found - recorded.logit).abs());
            }
            report(&name, "top 10 logits", worst <= arguments.logit_tolerance, format!("off by at most {worst:.1e}"));
            if let Some(expected) = prompt.logsumexp {
                let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = logits.iter().map(|logit| f64::from(logit - greatest).exp()).sum();
                let difference = (f64::from(greatest) + sum.ln() - expected).abs();
                report(
                    &name,
                    "log-sum-exp",
                    difference <= arguments.logit_tolerance,
                    format!("off by {difference:.1e}"),
                );
            }
        }
        if let Some(expected) = &prompt.greedy_ids {
            let options = GenerateOptions {
                max_tokens: expected.len(),
                sampling: Sampling::Greedy,
                stop: Vec::new(),
                ignore_eos: false,
            };
            let written = generate_batch(&model, std::slice::from_ref(&prompt.ids), &options)?;
            // The record includes the end-of-sequence token, the generation does not.
            let content = expected.len() - usize::from(prompt.greedy_stopped_at_eos);
            let same = written.first().is_some_and(|(tokens, ended)| {
                tokens[..] == expected[..content] && *ended == prompt.greedy_stopped_at_eos
            });
            report(&name, "greedy continuation", same, format!("{} tokens", expected.len()));
        }
        if let Some(passage) = &prompt.passage {
            let difference = (mean_nll(&model, &device, &passage.ids)? - passage.mean_nll).abs();
            report(&name, "mean NLL", difference <= arguments.nll_tolerance, format!("off by {difference:.1e}"));
        }
    }
    Ok(failures)
}

fn read(path: &Path) -> Result<Recorded> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no file of recorded prompts", path.display()))
}

/// Mean negative log-likelihood of every token after the first, in nats.
fn mean_nll(model: &Model, device: &Device, ids: &[u32]) -> Result<f64> {
    let batch = TokenBatch::new(device, &[ids[..ids.len() - 1].to_vec()], None)?;
    let tape = Tape::inference();
    let logits = model.logits(&tape, &batch)?;
    let labels = Tensor::from_slice(device, &[1, ids.len() - 1], &ids[1..])?;
    Ok(f64::from(ops::cross_entropy(&tape, &logits, &labels, (ids.len() - 1) as f32)?.loss.item()?))
}

/// The greater value; NaN if either is.
fn greater(a: f64, b: f64) -> f64 {
    if b.is_nan() || b > a { b } else { a }
}
