//! Multiple choice by log-likelihood: every choice is a document of its own behind the question, several in a row.

use anyhow::{Result, ensure};
use autograd::Tape;
use autograd::ops;
use model::Model;
use serde::Serialize;

use super::questions::MultipleChoice;
use crate::data::{Batch, PositionsThatCount, Sequence};
use crate::interruption::Interruption;

/// Where a question's choice is written.
pub(crate) struct Place {
    pub question: usize,
    pub choice: usize,
    /// Row over all batches.
    pub row: usize,
    pub positions: std::ops::Range<usize>,
    /// Bytes of the choice.
    pub bytes: usize,
}

/// Questions with their choices, in rows of `length` tokens.
///
/// # Errors
/// A question that is longer than a row, named.
pub(crate) fn packed(questions: &[MultipleChoice], length: usize) -> Result<(Vec<Sequence>, Vec<Place>)> {
    let mut rows: Vec<Sequence> = Vec::new();
    let mut places = Vec::new();
    for (question, asked) in questions.iter().enumerate() {
        for (choice, written) in asked.choices.iter().enumerate() {
            let tokens = written.tokens.len();
            ensure!(
                tokens <= length,
                "{}: choice {} takes {tokens} tokens with its question, more than a row of {length}: use a greater \
                 --sequence-length",
                asked.place,
                choice + 1
            );
            if rows.last().is_none_or(|row| row.tokens.len() + tokens > length) {
                rows.push(Sequence {
                    tokens: Vec::new(),
                    answers: Vec::new(),
                    padding: Vec::new(),
                    document_lengths: Vec::new(),
                });
            }
            let at = rows.len() - 1;
            let row = &mut rows[at];
            let start = row.tokens.len();
            row.tokens.extend(&written.tokens);
            row.answers.extend((0..tokens).map(|at| at >= written.prompt));
            row.padding.extend(std::iter::repeat_n(false, tokens));
            row.document_lengths.push(tokens);
            places.push(Place {
                question,
                choice,
                row: at,
                positions: start..start + tokens,
                bytes: written.text.len(),
            });
        }
    }
    for row in &mut rows {
        let padding = length - row.tokens.len();
        if padding > 0 {
            row.document_lengths.push(padding);
        }
        row.tokens.resize(length, 0);
        row.answers.resize(length, false);
        row.padding.resize(length, true);
    }
    Ok((rows, places))
}

/// A choice's score.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Scored {
    pub text: String,
    /// Sum over the choice's tokens, in nats.
    pub log_likelihood: f64,
    pub tokens: usize,
    pub bytes: usize,
}

/// The score of every choice of every question. `progress` hears how many rows are done, and of how many.
///
/// # Errors
/// Those of [`packed`] and of the model; a prediction that is not finite; an interruption.
pub(crate) fn score(
    model: &Model,
    questions: &[MultipleChoice],
    length: usize,
    rows_at_once: usize,
    interruption: &Interruption,
    mut progress: impl FnMut(u64, u64),
) -> Result<Vec<Vec<Scored>>> {
    let (rows, places) = packed(questions, length)?;
    let mut losses: Vec<Vec<f32>> = Vec::with_capacity(rows.len());
    for rows_of_batch in rows.chunks(rows_at_once) {
        interruption.check()?;
        let batch = Batch::new(model.device(), rows_of_batch, PositionsThatCount::Answers)?;
        let tape = Tape::inference();
        let logits = model.logits(&tape, &batch.tokens)?;
        let per_token = ops::cross_entropy(&tape, &logits, &batch.labels, 1.0)?.per_token.to_f32_vec()?;
        losses.extend(per_token.chunks(length).map(<[f32]>::to_vec));
        progress(losses.len() as u64, rows.len() as u64);
    }
    let mut scores: Vec<Vec<Scored>> = questions.iter().map(|_| Vec::new()).collect();
    for Place { question, choice, row, positions, bytes } in places {
        let asked = &questions[question];
        let written = &asked.choices[choice];
        let loss: f64 = losses[row][positions].iter().copied().map(f64::from).sum();
        ensure!(loss.is_finite(), "{}: the prediction of choice {} is not finite", asked.place, choice + 1);
        scores[question].push(Scored {
            text: written.text.clone(),
            log_likelihood: -loss,
            tokens: written.tokens.len() - written.prompt,
            bytes,
        });
    }
    Ok(scores)
}

/// The index of the greatest; of equal ones the first.
pub(crate) fn best(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (f64::NEG_INFINITY, 0);
    for (index, value) in values.enumerate() {
        if value > best.0 {
            best = (value, index);
        }
    }
    best.1
}
