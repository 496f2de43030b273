//! How well, how fast and in how much memory a model does the demo's task.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use autograd::ops::{self, IGNORED_LABEL};
use autograd::{Tape, Tensor};
use model::chat::ChatTemplate;
use model::generate::{GenerateOptions, Sampling, generate_batch};
use model::tokenizer::Tokenizer;
use model::{Model, TokenBatch};
use runtime::Device;
use serde::Serialize;
use serde_json::{Value, json};

use super::task::{Problem, answer_of};
use crate::interruption::Interruption;

/// Longest solution that is waited for, in tokens; a right one has at most 28.
const MOST_TOKENS: usize = 40;
/// A context long enough for caches to matter.
pub const LONG_CONTEXT: usize = 2048;
/// Tokens decoded after the long context to time decoding.
const TIMED_TOKENS: usize = 64;

/// What a model did with a set of problems.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Fraction of problems whose final answer is exactly right.
    pub accuracy: f64,
    /// Mean cross-entropy of the solutions' tokens, end token included, in nats.
    pub loss: f64,
    /// Bytes of cache of one sequence of [`LONG_CONTEXT`] tokens, as this device keeps it.
    pub cache_bytes: usize,
    /// Tokens written per second while solving, all problems of one prompt length at once.
    pub tokens_per_second: f64,
    /// Tokens written per second by one sequence after [`LONG_CONTEXT`] tokens.
    pub tokens_per_second_long: f64,
    /// The solution that the model wrote for each problem, in the problems' order.
    pub solutions: Vec<String>,
}

/// A problem as tokens.
struct Encoded {
    prompt: Vec<u32>,
    /// Prompt, solution and end token.
    whole: Vec<u32>,
}

/// Lets the model solve every problem greedily, and measures it.
///
/// # Errors
/// Those of the model; a tokenizer or template that does not fit the task; an interruption.
pub fn evaluate(
    model: &Model,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    problems: &[Problem],
    device: &Device,
    interruption: &Interruption,
) -> Result<Evaluation> {
    let mut by_length: BTreeMap<(usize, usize), Vec<(usize, Encoded)>> = BTreeMap::new();
    for (index, problem) in problems.iter().enumerate() {
        let encoded = encode(tokenizer, template, problem)?;
        by_length.entry((encoded.prompt.len(), encoded.whole.len())).or_default().push((index, encoded));
    }
    let options =
        GenerateOptions { max_tokens: MOST_TOKENS, sampling: Sampling::Greedy, stop: Vec::new(), ignore_eos: false };
    let mut solutions = vec![String::new(); problems.len()];
    let (mut written_tokens, mut seconds) = (0, 0.0);
    let (mut loss, mut loss_tokens) = (0.0, 0);
    for group in by_length.into_values() {
        interruption.check()?;
        let (indices, encoded): (Vec<usize>, Vec<Encoded>) = group.into_iter().unzip();
        let prompts: Vec<Vec<u32>> = encoded.iter().map(|encoded| encoded.prompt.clone()).collect();
        let start = Instant::now();
        let written = generate_batch(model, &prompts, &options)?;
        seconds += start.elapsed().as_secs_f64();
        for (index, (tokens, _)) in indices.into_iter().zip(written) {
            written_tokens += tokens.len();
            solutions[index] = tokenizer.decode(&tokens, true)?;
        }
        let (sum, count) = solution_loss(model, device, &encoded)?;
        loss += sum;
        loss_tokens += count;
    }
    let right =
        problems.iter().zip(&solutions).filter(|(problem, solution)| answer_of(solution) == Some(problem.answer));
    let (cache_bytes, tokens_per_second_long) = long_context(model, device)?;
    Ok(Evaluation {
        accuracy: right.count() as f64 / problems.len().max(1) as f64,
        loss: loss / loss_tokens.max(1) as f64,
        cache_bytes,
        tokens_per_second: f64::from(written_tokens as u32) / seconds,
        tokens_per_second_long,
        solutions,
    })
}

fn encode(tokenizer: &Tokenizer, template: &ChatTemplate, problem: &Problem) -> Result<Encoded> {
    let question = json!({ "role": "user", "content": problem.question });
    let solution = json!({ "role": "assistant", "content": problem.solution });
    let tokens = |messages: &[Value]| -> Result<Vec<u32>> {
        let text = template.render(messages, true).context("rendering a problem")?;
        Ok(tokenizer.encode(&text, false)?)
    };
    Ok(Encoded { prompt: tokens(std::slice::from_ref(&question))?, whole: tokens(&[question, solution])? })
}

/// Sum of the cross-entropies of the solutions' tokens and their number; all of one length.
fn solution_loss(model: &Model, device: &Device, encoded: &[Encoded]) -> Result<(f64, usize)> {
    let time = encoded[0].whole.len() - 1;
    let first_answer = encoded[0].prompt.len() - 1;
    let rows: Vec<Vec<u32>> = encoded.iter().map(|encoded| encoded.whole[..time].to_vec()).collect();
    let labels: Vec<u32> = encoded
        .iter()
        .flat_map(|encoded| {
            let next = encoded.whole[1..].iter().enumerate();
            next.map(|(step, token)| if step < first_answer { IGNORED_LABEL } else { *token })
        })
        .collect();
    let batch = TokenBatch::new(device, &rows, None)?;
    let labels = Tensor::from_slice(device, &[rows.len(), time], &labels)?;
    let tape = Tape::inference();
    let logits = model.logits(&tape, &batch)?;
    let losses = ops::cross_entropy(&tape, &logits, &labels, 1.0)?.loss.item()?;
    Ok((f64::from(losses), rows.len() * (time - first_answer)))
}

/// Cache bytes after [`LONG_CONTEXT`] tokens and the speed of decoding from there.
fn long_context(model: &Model, device: &Device) -> Result<(usize, f64)> {
    // What the tokens are does not matter to either.
    let tokens: Vec<u32> = (0..LONG_CONTEXT).map(|step| (4 + step * 7 % 16) as u32).collect();
    let (_, mut cache) = model.prefill(&TokenBatch::new(device, &[tokens], None)?)?;
    let bytes = cache.bytes();
    let start = Instant::now();
    for step in 0..TIMED_TOKENS {
        model.step(&[(4 + step % 16) as u32], &mut cache)?;
    }
    Ok((bytes, TIMED_TOKENS as f64 / start.elapsed().as_secs_f64()))
}
