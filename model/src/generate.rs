//! Text from a model: reading the prompt once, then one token at a time from the cache.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use runtime::Device;

use crate::batch::TokenBatch;
use crate::model::Model;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

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
    check_options(options)?;
    let device = model.parameters.iter().next().map_or_else(Device::cpu, |(_, first)| first.value.device().clone());
    let rows = prompts.len();
    let mut samplers: Vec<Sampler> = (0..rows).map(|row| Sampler::new(options.sampling, row as u64)).collect();
    let mut tokens = vec![Vec::new(); rows];
    let mut ended = vec![false; rows];
    if rows > 0 && options.max_tokens > 0 {
        let (mut logits, mut cache) = model.prefill(&TokenBatch::new(&device, prompts, None)?)?;
        loop {
            let values = logits.to_f32_vec()?;
            let mut next = Vec::with_capacity(rows);
            for (row, logits) in values.chunks_exact(model.config.vocabulary_size).enumerate() {
                let token = samplers[row].choose(logits)?;
                ended[row] |= !options.ignore_eos && model.config.eos_tokens.contains(&token);
                if !ended[row] {
                    tokens[row].push(token);
                }
                next.push(token);
            }
            let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
            if after_step(&tokens)? || ended.iter().all(|ended| *ended) || longest >= options.max_tokens {
                break;
            }
            logits = model.step(&next, &mut cache)?;
        }
    }
    Ok(tokens.into_iter().zip(ended).collect())
}

fn check_options(options: &GenerateOptions) -> Result<()> {
    if let Sampling::Random { temperature, top_k, top_p, .. } = options.sampling {
        let message = if !(temperature > 0.0 && temperature.is_finite()) {
            format!("temperature {temperature} must be above 0; for the most likely token use greedy")
        } else if top_k == Some(0) {
            "top-k 0 leaves no token; leave it out to allow all".to_owned()
        } else if !(top_p > 0.0 && top_p <= 1.0) {
            format!("top-p {top_p} must be above 0 and at most 1")
        } else {
            return Ok(());
        };
        return Err(Error::Sampling { message });
    }
    Ok(())
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

/// Chooses tokens for one row.
struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    fn new(sampling: Sampling, row: u64) -> Self {
        let seed = match sampling {
            Sampling::Greedy => 0,
            Sampling::Random { seed, .. } => seed,
        };
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(row);
        Self { sampling, random }
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(position) = logits.iter().position(|logit| logit.is_nan()) {
            return Err(Error::Sampling { message: format!("the logit of token {position} is not a number") });
        }
        match self.sampling {
            Sampling::Greedy => Ok(greatest(logits) as u32),
            Sampling::Random { temperature, top_k, top_p, .. } => {
                Ok(self.draw(logits, temperature, top_k.unwrap_or(logits.len()), top_p))
            }
        }
    }

    fn draw(&mut self, logits: &[f32], temperature: f32, top_k: usize, top_p: f32) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Ties keep the order of token ids, so that a seed always gives the same choice.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order.truncate(top_k.max(1));
        let highest = logits[order[0]];
        let weights: Vec<f64> =
            order.iter().map(|&token| f64::from((logits[token] - highest) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0;
        let mut mass = 0.0;
        while kept < weights.len() && (kept == 0 || mass < f64::from(top_p) * total) {
            mass += weights[kept];
            kept += 1;
        }
        let mut left = (self.random.next_u64() >> 11) as f64 * (0.5f64).powi(53) * mass;
        for (token, weight) in order.iter().zip(&weights).take(kept) {
            left -= weight;
            if left < 0.0 {
                return *token as u32;
            }
        }
        order[kept - 1] as u32
    }
}

fn greatest(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: Option<usize>, top_p: f32) -> Sampler {
        Sampler::new(Sampling::Random { temperature, top_k, top_p, seed: 5 }, 0)
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, 3f32.ln(), f32::NEG_INFINITY];
        let mut sampler = sampler(1.0, None, 1.0);
        let ones = (0..4000).filter(|_| sampler.choose(&logits).unwrap() == 1).count();
        assert!((2850..3150).contains(&ones), "{ones} of 4000, expected 3000");
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [1.0, 0.9, 0.8, 5.0];
        let mut one = sampler(1.0, Some(1), 1.0);
        let mut half = sampler(1.0, None, 0.5);
        let mut two = sampler(10.0, Some(2), 1.0);
        for _ in 0..200 {
            assert_eq!(one.choose(&logits).unwrap(), 3);
            assert_eq!(half.choose(&logits).unwrap(), 3);
            assert!([0, 3].contains(&two.choose(&logits).unwrap()));
        }
    }

    #[test]
    fn a_nan_logit_is_an_error_and_greedy_takes_the_first_of_equals() {
        let mut greedy = Sampler::new(Sampling::Greedy, 0);
        assert_eq!(greedy.choose(&[1.0, 2.0, 2.0]).unwrap(), 1);
        assert!(greedy.choose(&[1.0, f32::NAN]).unwrap_err().to_string().contains("token 1"));
    }

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
