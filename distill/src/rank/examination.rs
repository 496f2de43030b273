//! What a model is asked when a layer is left out.

use anyhow::{Context, Result, ensure};
use autograd::ops::{self, IGNORED_LABEL};
use autograd::{Tape, Tensor};
use model::Model;
use model::generate::{GenerateOptions, Sampling, generate_batch};
use model::tokenizer::Tokenizer;
use runtime::Device;

use super::RankConfig;
use crate::data::{Batch, PositionsThatCount, Sequence, TokenFile};
use crate::evaluate::multiple_choice::{Place, packed};
use crate::evaluate::questions::{MultipleChoice, ToAnswer};
use crate::interruption::Interruption;

/// A metric with its held-out data.
pub(super) enum Examination<'a> {
    /// A metric of next-token predictions on rows of tokens.
    Predictions(Predictions),
    /// A metric of what the model writes.
    Answers(Answers<'a>),
}

/// Rows of tokens, and what is made of their predictions.
pub(super) struct Predictions {
    batches: Vec<Batch>,
    kind: Kind,
}

enum Kind {
    /// Mean negative log-likelihood of that many positions.
    Loss { positions: u64 },
    /// Share of questions whose likeliest choice is the right one.
    Accuracy { places: Vec<Place>, answers: Vec<usize> },
}

/// Prompts and what should follow.
pub(super) struct Answers<'a> {
    questions: Vec<ToAnswer>,
    tokenizer: &'a Tokenizer,
}

impl<'a> Examination<'a> {
    /// The loss on the first `samples` rows of a token file.
    pub fn loss(file: &TokenFile, config: &RankConfig, device: &Device) -> Result<Self> {
        let rows = file.sequences().min(config.samples);
        let sequences: Vec<Sequence> = (0..rows).map(|row| file.sequence(row)).collect::<Result<_>>()?;
        let positions =
            sequences.iter().map(|row| crate::data::positions_that_count(row, PositionsThatCount::Answers)).sum();
        ensure!(positions > 0, "no position of the first {rows} rows of {} counts", config.data.display());
        let batches = batches(&sequences, config, device)?;
        Ok(Self::Predictions(Predictions { batches, kind: Kind::Loss { positions } }))
    }

    /// The accuracy on multiple-choice questions: every choice is a document of its own behind the question, several in
    /// a row.
    pub fn accuracy(questions: &[MultipleChoice], config: &RankConfig, device: &Device) -> Result<Self> {
        let answers = questions.iter().map(|question| question.answer).collect();
        let (rows, places) = packed(questions, config.sequence_length)?;
        let batches = batches(&rows, config, device)?;
        Ok(Self::Predictions(Predictions { batches, kind: Kind::Accuracy { places, answers } }))
    }

    /// The share of questions whose generated answer is exactly the right one.
    pub fn exact_match(questions: Vec<ToAnswer>, tokenizer: &'a Tokenizer) -> Self {
        Self::Answers(Answers { questions, tokenizer })
    }

    /// A layer's score: how much worse the metric is without it.
    pub fn score(&self, whole: f64, without: f64) -> f64 {
        match self {
            Self::Predictions(Predictions { kind: Kind::Loss { .. }, .. }) => without - whole,
            _ => whole - without,
        }
    }
}

fn batches(rows: &[Sequence], config: &RankConfig, device: &Device) -> Result<Vec<Batch>> {
    rows.chunks(config.micro_batch).map(|rows| Batch::new(device, rows, PositionsThatCount::Answers)).collect()
}

impl Predictions {
    /// The rows.
    pub fn batches(&self) -> &[Batch] {
        &self.batches
    }

    /// The metric, from the residual stream after the last layer, batch by batch.
    ///
    /// # Errors
    /// Those of `hidden` and of the operators; predictions that are not finite.
    pub fn value(&self, model: &Model, mut hidden: impl FnMut(usize) -> Result<Tensor>) -> Result<f64> {
        let mut losses: Vec<Vec<f32>> = Vec::new();
        for (index, batch) in self.batches.iter().enumerate() {
            let tape = Tape::inference();
            let logits = model.logits_of(&tape, &autograd::Var::constant(&hidden(index)?))?;
            let per_token = ops::cross_entropy(&tape, &logits, &batch.labels, 1.0)?.per_token.to_f32_vec()?;
            let labels = batch.labels.to_vec::<u32>()?;
            ensure!(
                per_token.iter().zip(&labels).all(|(loss, &label)| label == IGNORED_LABEL || loss.is_finite()),
                "a prediction is not finite"
            );
            let time = batch.tokens.time();
            losses.extend(per_token.chunks(time).map(<[f32]>::to_vec));
        }
        let sum = |values: &[f32]| values.iter().copied().map(f64::from).sum::<f64>();
        Ok(match &self.kind {
            Kind::Loss { positions } => losses.iter().map(|row| sum(row)).sum::<f64>() / *positions as f64,
            Kind::Accuracy { places, answers } => {
                let mut best: Vec<(f64, usize)> = vec![(f64::INFINITY, usize::MAX); answers.len()];
                for place in places {
                    let loss = sum(&losses[place.row][place.positions.clone()]) / place.bytes.max(1) as f64;
                    if loss < best[place.question].0 {
                        best[place.question] = (loss, place.choice);
                    }
                }
                let right = best.iter().zip(answers).filter(|((_, choice), answer)| choice == *answer).count();
                right as f64 / answers.len() as f64
            }
        })
    }
}

impl Answers<'_> {
    /// The metric of a model.
    ///
    /// # Errors
    /// Those of the model; an interruption.
    pub fn value(&self, model: &Model, config: &RankConfig, interruption: &Interruption) -> Result<f64> {
        let options = GenerateOptions {
            max_tokens: config.max_tokens,
            sampling: Sampling::Greedy,
            stop: Vec::new(),
            ignore_eos: false,
        };
        let mut order: Vec<&ToAnswer> = self.questions.iter().collect();
        // Only prompts of one length are answered together.
        order.sort_by_key(|question| question.prompt.len());
        let mut right = 0usize;
        for group in order.chunk_by(|a, b| a.prompt.len() == b.prompt.len()) {
            for questions in group.chunks(config.batch_size) {
                interruption.check()?;
                let prompts: Vec<Vec<u32>> = questions.iter().map(|question| question.prompt.clone()).collect();
                let written = generate_batch(model, &prompts, &options).context("answering")?;
                for (question, (tokens, _)) in questions.iter().zip(written) {
                    right += usize::from(question.is_right(&self.tokenizer.decode(&tokens, true)?));
                }
            }
        }
        Ok(right as f64 / self.questions.len() as f64)
    }
}
