//! Text from a model: reading the prompt once, then one token at a time from the cache.

use crate::Result;
use crate::batch::TokenBatch;
use crate::decoder::Decoder;
use crate::model::Model;
use crate::tokenizer::Tokenizer;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The most likely token; the first of equals.
    Greedy,
    /// At random, in proportion to probability.
    Random {
        /// Divides the logits; above 0.
        temperature: f32,
        /// Only the `top_k` most likely tokens; `None`: all.
        top_k: Option<usize>,
        /// Only the most likely tokens that together reach this probability; 1: all.
        top_p: f32,
        /// Seed of the choice.
        seed: u64,
    },
}

/// When generation ends, and how tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// At most this many tokens.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Generation ends where one of these strings appears; it is not part of the text.
    pub stop: Vec<String>,
    /// Whether the configuration's end-of-sequence tokens do not end generation.
    pub ignore_eos: bool,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// The limit of tokens.
    Length,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The tokens, without an end-of-sequence token that ended generation, with those that completed a stop string.
    pub token_ids: Vec<u32>,
    /// Their text, cut before a stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Continues one prompt. `on_text` sees each piece of text as soon as it is certain to be part of the result.
///
/// # Errors
/// An empty prompt, a token outside the vocabulary, sampling options that make no sense.
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_text: impl FnMut(&str),
) -> Result<Generation> {
    let mut stream = tokenizer.stream(true);
    let mut text = String::new();
    let (mut read, mut shown) = (0, 0);
    let mut stop_position = None;
    let tokens = continue_tokens(model, &[prompt.to_vec()], options, |tokens| {
        if let Some(token) = tokens[0].get(read) {
            text.push_str(&stream.push(*token)?);
            read += 1;
        }
        stop_position = options.stop.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop)).min();
        let certain = stop_position.unwrap_or_else(|| certain_length(&text, &options.stop));
        if certain > shown {
            on_text(&text[shown..certain]);
            shown = certain;
        }
        Ok(stop_position.is_some())
    })?;
    let (token_ids, ended) = tokens.into_iter().next().unwrap_or_default();
    match stop_position {
        Some(position) => text.truncate(position),
        None => text.push_str(&stream.finish()?),
    }
    if text.len() > shown {
        on_text(&text[shown..]);
    }
    let finish_reason = if ended || stop_position.is_some() { FinishReason::Stop } else { FinishReason::Length };
    Ok(Generation { token_ids, text, finish_reason })
}

/// Continues several prompts of equal length at once: the new tokens of each (without the one that ended it), and
/// whether an end-of-sequence token ended it. Row `i` of a random choice draws from its own stream.
///
/// # Errors
/// As [`generate`]; prompts of different lengths.
pub fn generate_batch(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<Vec<(Vec<u32>, bool)>> {
    continue_tokens(model, prompts, options, |_| Ok(false))
}

fn continue_tokens(
    model: &Model,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    mut after_step: impl FnMut(&[Vec<u32>]) -> Result<bool>,
) -> Result<Vec<(Vec<u32>, bool)>> {
    options.sampling.check()?;
    let rows = prompts.len();
    let mut tokens = vec![Vec::new(); rows];
    let mut ended = vec![false; rows];
    if rows > 0 && options.max_tokens > 0 {
        let (logits, cache) = model.prefill(&TokenBatch::new(model.device(), prompts, None)?)?;
        let mut decoder = Decoder::new(model, &logits, cache, options.sampling)?;
        loop {
            for (row, token) in decoder.tokens()?.into_iter().enumerate() {
                ended[row] |= !options.ignore_eos && model.config.eos_tokens.contains(&token);
                if !ended[row] {
                    tokens[row].push(token);
                }
            }
            let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
            if after_step(&tokens)? || ended.iter().all(|ended| *ended) || longest >= options.max_tokens {
                break;
            }
            decoder.step()?;
        }
    }
    Ok(tokens.into_iter().zip(ended).collect())
}

/// How much of `text` no stop string can still reach into: one may have begun at its end.
fn certain_length(text: &str, stop: &[String]) -> usize {
    let mut certain = text.len();
    for stop in stop {
        for (index, _) in text.char_indices().rev().take(stop.len()) {
            if stop.starts_with(&text[index..]) {
                certain = certain.min(index);
            }
        }
    }
    certain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_may_begin_a_stop_string_is_held_back() {
        let stop = vec!["\n\nQ:".to_owned()];
        assert_eq!(certain_length("answer", &stop), 6);
        assert_eq!(certain_length("answer\n", &stop), 6);
        assert_eq!(certain_length("answer\n\nQ", &stop), 6);
        assert_eq!(certain_length("answer\n!", &stop), 8);
        assert_eq!(certain_length("né", &[]), 3);
    }
}
