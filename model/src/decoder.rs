//! Decoding one token after the other, chosen where the logits are.
//!
//! On a GPU, tokens and positions stay there: a step's launches depend on no value that the host knows, so they are captured in
//! a graph, which is replayed as long as the caches have room. Of every step only the chosen tokens come back, 4 bytes a row.

use autograd::ops::{self, SamplingOptions};
use autograd::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use runtime::DeviceKind;
use runtime::cuda::Graph;

use crate::generate::Sampling;
use crate::{Cache, Error, Model, Result};

/// Decoding from a cache. Every row's random choices draw from a stream of their own.
pub struct Decoder<'a> {
    model: &'a Model,
    cache: Cache,
    state: State,
    random: Vec<ChaCha8Rng>,
    /// One step, once it was captured; for the caches as they lie now.
    graph: Option<Graph>,
    /// Steps that were made since the caches moved.
    steps: usize,
}

/// What a step reads and overwrites on the device.
struct State {
    /// u32 `[batch, 1]`: the tokens that were chosen last.
    tokens: Tensor,
    /// u32 `[batch, 1]`: where they stand.
    positions: Tensor,
    choice: Choice,
}

enum Choice {
    Greedy,
    Random {
        options: SamplingOptions,
        /// f32 `[batch]`, from 0 to below 1.
        uniforms: Tensor,
    },
}

impl<'a> Decoder<'a> {
    /// Chooses the first tokens, from the logits (`[batch, vocabulary]`) that [`Model::prefill`] gave with the cache.
    ///
    /// # Errors
    /// [`Error::Sampling`] for options that make no sense; those of the operators.
    pub fn new(model: &'a Model, logits: &Tensor, cache: Cache, sampling: Sampling) -> Result<Self> {
        sampling.check()?;
        let (device, rows) = (model.device(), logits.shape()[0]);
        let zeros = |shape: &[usize], dtype| Tensor::zeros(device, shape, dtype);
        let choice = match sampling {
            Sampling::Greedy => Choice::Greedy,
            Sampling::Random { temperature, top_k, top_p, .. } => Choice::Random {
                options: SamplingOptions { temperature, top_k, top_p },
                uniforms: zeros(&[rows], DType::F32)?,
            },
        };
        let positions = Tensor::from_slice(device, &[rows, 1], &vec![cache.length() as u32; rows])?;
        let state = State { tokens: zeros(&[rows, 1], DType::U32)?, positions, choice };
        let random = (0..rows as u64).map(|row| sampling.random(row)).collect();
        let mut decoder = Self { model, cache, state, random, graph: None, steps: 0 };
        decoder.draw()?;
        decoder.state.choose(logits)?;
        Ok(decoder)
    }

    /// The tokens that were chosen last. Waits for them.
    ///
    /// # Errors
    /// [`Error::Sampling`] for a logit that is not a number; driver errors.
    pub fn tokens(&self) -> Result<Vec<u32>> {
        let tokens = self.state.tokens.to_vec::<u32>()?;
        match tokens.iter().position(|&token| token == ops::NO_TOKEN) {
            Some(row) => Err(Error::Sampling { message: format!("row {row}: a logit is not a number") }),
            None => Ok(tokens),
        }
    }

    /// Reads the tokens that were chosen last and chooses the next.
    ///
    /// # Errors
    /// Those of the operators; out of memory.
    pub fn step(&mut self) -> Result<()> {
        if self.cache.reserve(self.cache.length() + 1)? {
            self.graph = None;
            self.steps = 0;
        }
        self.draw()?;
        match &self.graph {
            Some(graph) => graph.replay()?,
            // The first step loads kernels and gives shared caches memory of their own: it is not one to capture.
            None if self.steps == 0 || !matches!(self.model.device().kind(), DeviceKind::Cuda(_)) => self.run()?,
            None => {
                let device = self.model.device().clone();
                let (graph, ()) = device.capture(|| self.run())?;
                graph.replay()?;
                self.graph = Some(graph);
            }
        }
        self.steps += 1;
        self.cache.advance();
        Ok(())
    }

    /// Tokens that the cache holds.
    pub fn length(&self) -> usize {
        self.cache.length()
    }

    /// What a graph holds.
    fn run(&mut self) -> Result<()> {
        let State { tokens, positions, .. } = &self.state;
        let logits = self.model.step_on_device(tokens, positions, &mut self.cache)?;
        ops::advance(&mut self.state.positions)?;
        self.state.choose(&logits)
    }

    /// Gives the next random choice its numbers.
    fn draw(&mut self) -> Result<()> {
        if let Choice::Random { uniforms, .. } = &mut self.state.choice {
            let numbers: Vec<f32> = self.random.iter_mut().map(uniform).collect();
            uniforms.overwrite(&numbers)?;
        }
        Ok(())
    }
}

impl State {
    fn choose(&mut self, logits: &Tensor) -> Result<()> {
        match &self.choice {
            Choice::Greedy => ops::argmax_into(&mut self.tokens, logits)?,
            Choice::Random { options, uniforms } => ops::sample_into(&mut self.tokens, logits, uniforms, *options)?,
        }
        Ok(())
    }
}

impl Sampling {
    /// That its numbers make sense.
    ///
    /// # Errors
    /// [`Error::Sampling`] for options that make no sense.
    pub fn check(self) -> Result<()> {
        let Self::Random { temperature, top_k, top_p, .. } = self else { return Ok(()) };
        let message = if !(temperature > 0.0 && temperature.is_finite()) {
            format!("temperature {temperature} must be above 0; for the most likely token use greedy")
        } else if top_k == Some(0) {
            "top-k 0 leaves no token; leave it out to allow all".to_owned()
        } else if !(top_p > 0.0 && top_p <= 1.0) {
            format!("top-p {top_p} must be above 0 and at most 1")
        } else {
            return Ok(());
        };
        Err(Error::Sampling { message })
    }

    /// The stream of a row.
    fn random(self, row: u64) -> ChaCha8Rng {
        let seed = match self {
            Self::Greedy => 0,
            Self::Random { seed, .. } => seed,
        };
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(row);
        random
    }
}

/// From 0 to below 1, in steps that f32 holds.
fn uniform(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() >> 8) as f32 * (0.5f32).powi(24)
}

#[cfg(test)]
mod tests {
    use autograd::TensorId;
    use runtime::Device;
    use serde_json::json;

    use super::*;
    use crate::TokenBatch;
    use crate::config::ModelConfig;
    use crate::initialise::{GraftOptions, Start, graft};

    /// What a graph would be replayed on: the memory that steps write must be the same in each of them.
    #[test]
    fn steps_write_in_place_until_caches_grow() {
        let source = json!({
            "model_type": "llama", "hidden_size": 32, "head_dim": 16, "intermediate_size": 16, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 40, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(source.as_object().unwrap()).unwrap();
        for device in [Device::cpu(), Device::sim()] {
            let teacher = Model::random(config.clone(), 1, &device).unwrap();
            let hybrid = graft(&teacher, &teacher, &[1], &GraftOptions { seed: 3, start: Start::Paper }).unwrap();
            let model = if device.is_cpu() { hybrid } else { hybrid.into_bf16().unwrap() };
            let batch = TokenBatch::new(&device, &[vec![1, 2, 3], vec![4, 5, 6]], None).unwrap();
            let (logits, cache) = model.prefill(&batch).unwrap();
            // Another holder of the cache, as a benchmark's repeats have it.
            let shared = cache.clone();
            let sampling = Sampling::Random { temperature: 1.0, top_k: None, top_p: 1.0, seed: 1 };
            let mut decoder = Decoder::new(&model, &logits, cache, sampling).unwrap();
            let ids = |decoder: &Decoder<'_>| -> Vec<TensorId> {
                let State { tokens, positions, choice } = &decoder.state;
                let Choice::Random { uniforms, .. } = choice else { unreachable!("the choice is random") };
                [tokens, positions, uniforms].into_iter().chain(decoder.cache.tensors()).map(Tensor::id).collect()
            };
            decoder.step().unwrap();
            let after_first = ids(&decoder);
            for _ in 0..3 {
                decoder.step().unwrap();
                assert_eq!(ids(&decoder), after_first, "{device}");
            }
            assert_eq!(decoder.state.positions.to_vec::<u32>().unwrap(), [7, 7], "{device}");
            assert_eq!(shared.length(), 3);
        }
    }
}
