//! `grafter eval`: what a model predicts, knows and writes, with everything that a person needs to check it.

pub mod extract;
pub(crate) mod multiple_choice;
pub mod perplexity;
pub(crate) mod questions;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use model::Model;
use model::chat::ChatTemplate;
use model::generate::{GenerateOptions, Sampling, generate_batch};
use model::tokenizer::Tokenizer;
use serde::Serialize;
use serde_json::{Value, json};

use crate::interruption::Interruption;
use crate::train::Progress;
use extract::{Extract, number, same};
use questions::ToAnswer;

/// Results, as `--json` prints and `--out` writes them.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// What was measured: `perplexity`, `multiple-choice` or `generation`.
    pub task: &'static str,
    /// The model's folder.
    pub model: PathBuf,
    /// The data's file.
    pub data: PathBuf,
    /// SHA-256 of the data.
    pub data_sha256: String,
    /// Everything else that results depend on.
    pub settings: Value,
    /// The figures.
    pub metrics: BTreeMap<String, f64>,
    /// The figures by what questions belong to, where the data say.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub by_task: BTreeMap<String, BTreeMap<String, f64>>,
    /// Every question with what was made of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<Value>,
}

/// What was measured: figures, figures by task, and items, as [`Results`] has them.
pub type Measured = (BTreeMap<String, f64>, BTreeMap<String, BTreeMap<String, f64>>, Vec<Value>);

/// How multiple choice is asked.
#[derive(Clone, Debug, Serialize)]
pub struct MultipleChoiceOptions {
    /// How many questions, the first of the data.
    pub limit: u64,
    /// What stands before a choice, `{question}` in it.
    pub prompt: String,
    /// Tokens of a row, which holds several choices.
    pub sequence_length: usize,
    /// Rows computed at once.
    pub batch_size: usize,
}

/// Which choice is likeliest, by the sum of its tokens' log-likelihoods, by their mean, and by the sum over the choice's bytes.
///
/// # Errors
/// Lines that are no questions, named; those of the model; an interruption.
pub fn multiple_choice(
    model: &Model,
    tokenizer: &Tokenizer,
    data: &Path,
    options: &MultipleChoiceOptions,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Measured> {
    let questions = questions::multiple_choice(data, options.limit, &options.prompt, tokenizer)?;
    let scores = multiple_choice::score(
        model,
        &questions,
        options.sequence_length,
        options.batch_size,
        interruption,
        |done, total| progress.count("row", done, total),
    )?;
    progress.end();
    let mut tally = Tally::default();
    let mut items = Vec::new();
    for (question, choices) in questions.iter().zip(scores) {
        let chosen = [
            ("accuracy", multiple_choice::best(choices.iter().map(|choice| choice.log_likelihood))),
            ("accuracy_per_token", {
                multiple_choice::best(choices.iter().map(|choice| choice.log_likelihood / choice.tokens.max(1) as f64))
            }),
            ("accuracy_per_byte", {
                multiple_choice::best(choices.iter().map(|choice| choice.log_likelihood / choice.bytes.max(1) as f64))
            }),
        ];
        let figures = chosen.map(|(name, choice)| (name.to_owned(), f64::from(choice == question.answer)));
        tally.add(question.task.as_deref(), &figures);
        items.push(json!({
            "id": question.id, "task": question.task, "prompt": question.prompt, "choices": choices,
            "answer": question.answer, "chosen": chosen[0].1, "chosen_per_token": chosen[1].1,
            "chosen_per_byte": chosen[2].1,
        }));
    }
    let (metrics, by_task) = tally.finish();
    Ok((metrics, by_task, items))
}

/// How questions are answered in words.
#[derive(Clone, Debug)]
pub struct GenerationOptions {
    /// How many questions, the first of the data.
    pub limit: u64,
    /// How a question is put to a model without a chat template.
    pub prompt: String,
    /// Whether the chat template is used where there is one.
    pub chat: bool,
    /// Longest answer, in tokens.
    pub max_tokens: usize,
    /// How tokens are chosen; answer `n` of a question takes the seed plus `n`.
    pub sampling: Sampling,
    /// Answers to each question.
    pub samples: usize,
    /// What ends an answer.
    pub stop: Vec<String>,
    /// Where the answer is.
    pub extract: Extract,
    /// Questions answered at once.
    pub batch_size: usize,
}

/// Which questions are answered rightly; with several samples also `pass@k`, the chance that of `k` answers one is right.
///
/// # Errors
/// Lines that are no questions, named; those of the model; an interruption.
pub fn generation(
    model: &Model,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    data: &Path,
    options: &GenerationOptions,
    interruption: &Interruption,
    progress: &mut Progress,
) -> Result<Measured> {
    let template = template.filter(|_| options.chat);
    let questions = questions::to_answer(data, options.limit, &options.prompt, tokenizer, template)?;
    let total = questions.len() as u64 * options.samples as u64;
    let mut order: Vec<usize> = (0..questions.len()).collect();
    // Only prompts of one length are answered together.
    order.sort_by_key(|&index| questions[index].prompt.len());
    let mut written: Vec<Vec<Written>> = questions.iter().map(|_| Vec::new()).collect();
    let mut done = 0;
    progress.begin(0, total);
    for sample in 0..options.samples {
        for group in order.chunk_by(|&a, &b| questions[a].prompt.len() == questions[b].prompt.len()) {
            for indices in group.chunks(options.batch_size) {
                interruption.check()?;
                let prompts: Vec<Vec<u32>> = indices.iter().map(|&index| questions[index].prompt.clone()).collect();
                let answers =
                    generate_batch(model, &prompts, &options.generate(sample, indices[0])).context("answering")?;
                for (&index, (tokens, _)) in indices.iter().zip(answers) {
                    let text = until_stop(&tokenizer.decode(&tokens, true)?, &options.stop).to_owned();
                    written[index].push(Written::new(text, &questions[index], &options.extract));
                }
                done += indices.len() as u64;
                progress.count("answer", done, total);
            }
        }
    }
    progress.end();
    let mut tally = Tally::default();
    let mut items = Vec::new();
    for (question, answers) in questions.iter().zip(written) {
        let right = answers.iter().filter(|answer| answer.right).count();
        let figures: Vec<(String, f64)> = if options.samples == 1 {
            vec![("exact_match".to_owned(), right as f64)]
        } else {
            ks(options.samples).map(|k| (format!("pass@{k}"), pass_at(options.samples, right, k))).collect()
        };
        tally.add(question.task.as_deref(), &figures);
        items.push(json!({
            "id": question.id, "task": question.task, "prompt": question.text, "right": question.right,
            "answers": answers,
        }));
    }
    let (metrics, by_task) = tally.finish();
    Ok((metrics, by_task, items))
}

/// One answer.
#[derive(Debug, Serialize)]
struct Written {
    text: String,
    extracted: Option<String>,
    right: bool,
}

impl Written {
    fn new(text: String, question: &ToAnswer, extract: &Extract) -> Self {
        let numeric = question.right.iter().any(|right| number(right).is_some());
        let extracted = extract.answer(&text, numeric);
        let right = extracted.as_ref().is_some_and(|answer| question.right.iter().any(|right| same(answer, right)));
        Self { text, extracted, right }
    }
}

impl GenerationOptions {
    /// Those of a batch whose first question is `first`: every batch and sample draws from its own stream.
    fn generate(&self, sample: usize, first: usize) -> GenerateOptions {
        let sampling = match self.sampling {
            Sampling::Random { temperature, top_k, top_p, seed } => {
                let seed = seed.wrapping_add(sample as u64).wrapping_add((first as u64) << 32);
                Sampling::Random { temperature, top_k, top_p, seed }
            }
            Sampling::Greedy => Sampling::Greedy,
        };
        GenerateOptions { max_tokens: self.max_tokens, sampling, stop: Vec::new(), ignore_eos: false }
    }
}

/// A text up to the first of the stop strings in it.
fn until_stop<'a>(text: &'a str, stop: &[String]) -> &'a str {
    let end = stop.iter().filter_map(|stop| text.find(stop.as_str())).min();
    &text[..end.unwrap_or(text.len())]
}

/// For which numbers of answers a chance is reported: powers of two, and all.
fn ks(samples: usize) -> impl Iterator<Item = usize> {
    let powers = std::iter::successors(Some(1usize), |k| k.checked_mul(2)).take_while(move |k| *k < samples);
    powers.chain([samples])
}

/// The chance that of `k` answers, drawn from `samples` of which `right` are right, at least one is:
/// `1 − C(samples − right, k) / C(samples, k)` (Chen et al. 2021).
fn pass_at(samples: usize, right: usize, k: usize) -> f64 {
    let wrong = samples - right;
    if wrong < k {
        return 1.0;
    }
    let all_wrong: f64 = (0..k).map(|drawn| (wrong - drawn) as f64 / (samples - drawn) as f64).product();
    1.0 - all_wrong
}

/// Figures of questions, added up.
#[derive(Default)]
struct Tally {
    all: Sums,
    by_task: BTreeMap<String, Sums>,
}

/// By figure: its sum and the sum of its squares.
#[derive(Default)]
struct Sums {
    count: usize,
    of: BTreeMap<String, (f64, f64)>,
}

impl Tally {
    fn add(&mut self, task: Option<&str>, figures: &[(String, f64)]) {
        let of_task = task.map(|task| self.by_task.entry(task.to_owned()).or_default());
        for sums in [Some(&mut self.all), of_task].into_iter().flatten() {
            sums.count += 1;
            for (name, value) in figures {
                let sum = sums.of.entry(name.clone()).or_default();
                *sum = (sum.0 + value, sum.1 + value * value);
            }
        }
    }

    fn finish(self) -> (BTreeMap<String, f64>, BTreeMap<String, BTreeMap<String, f64>>) {
        (self.all.figures(), self.by_task.iter().map(|(task, sums)| (task.clone(), sums.figures())).collect())
    }
}

impl Sums {
    /// Means with their standard errors, and how many questions.
    fn figures(&self) -> BTreeMap<String, f64> {
        let count = self.count as f64;
        let mut figures = BTreeMap::from([("questions".to_owned(), count)]);
        for (name, (sum, squares)) in &self.of {
            let mean = sum / count;
            figures.insert(name.clone(), mean);
            if self.count > 1 {
                let variance = (squares / count - mean * mean).max(0.0) * count / (count - 1.0);
                figures.insert(format!("{name}_standard_error"), (variance / count).sqrt());
            }
        }
        figures
    }
}

/// That a prompt's form has the question in it.
///
/// # Errors
/// When it has not.
pub fn check_prompt(prompt: &str) -> Result<()> {
    ensure!(
        prompt.contains("{question}"),
        "--prompt is {prompt:?}: it must say where the question goes, as in \"Question: {{question}}\\nAnswer:\""
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chance_of_one_right_answer_is_counted_over_all_draws() {
        // Of 4 answers 1 is right: 2 of them hold it in 3 of 6 draws.
        for (samples, right, k, expected) in
            [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 1, 4, 1.0), (4, 0, 4, 0.0), (5, 2, 3, 0.9), (3, 3, 1, 1.0)]
        {
            assert!((pass_at(samples, right, k) - expected).abs() < 1e-12, "{samples} {right} {k}");
        }
        assert_eq!(ks(1).collect::<Vec<_>>(), [1]);
        assert_eq!(ks(8).collect::<Vec<_>>(), [1, 2, 4, 8]);
        assert_eq!(ks(6).collect::<Vec<_>>(), [1, 2, 4, 6]);
    }

    #[test]
    fn figures_have_their_standard_errors() {
        let mut tally = Tally::default();
        for (task, value) in [("a", 1.0), ("a", 0.0), ("b", 1.0), ("b", 1.0)] {
            tally.add(Some(task), &[("accuracy".to_owned(), value)]);
        }
        let (all, by_task) = tally.finish();
        assert_eq!((all["questions"], all["accuracy"]), (4.0, 0.75));
        // Deviations 1/4 thrice and 3/4 once: variance 1/4, of the mean 1/16.
        assert!((all["accuracy_standard_error"] - 0.25).abs() < 1e-12);
        assert_eq!((by_task["a"]["accuracy"], by_task["b"]["accuracy_standard_error"]), (0.5, 0.0));
    }

    #[test]
    fn a_text_ends_where_the_first_stop_string_begins() {
        let stop = ["\n\n".to_owned(), "Question:".to_owned()];
        assert_eq!(until_stop("four\nQuestion: five\n\n", &stop), "four\n");
        assert_eq!(until_stop("four", &stop), "four");
    }
}
