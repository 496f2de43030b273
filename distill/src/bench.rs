//! Times whole steps of a model: reading a prompt, decoding, and a training step.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use autograd::optimizer::{self, AdamW, AdamWOptions};
use autograd::{Tape, Tensor, ops};
use model::generate::Sampling;
use model::{Decoder, Model, Precision, TokenBatch};
use runtime::Device;
use serde::Serialize;

/// What to time.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded after it, one at a time; 0: none.
    pub decode_tokens: usize,
    /// Sequences decoded side by side.
    pub batch: usize,
    /// Tokens of the training sequence; 0: no training step.
    pub train_tokens: usize,
    /// How often each is repeated; the median counts.
    pub repeats: usize,
    /// Element types of prefill and decoding.
    pub precision: Precision,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// What was timed.
    pub name: String,
    /// Tokens of one repeat.
    pub tokens: usize,
    /// Median of the repeats, in seconds.
    pub seconds: f64,
    /// Fastest repeat, in seconds.
    pub fastest: f64,
    /// Slowest repeat, in seconds.
    pub slowest: f64,
    /// `tokens / seconds`.
    pub tokens_per_second: f64,
    /// Peak memory during the phase in bytes: on the CPU the process's resident memory (`None` where the system does not tell),
    /// elsewhere what buffers on the device held.
    pub peak_bytes: Option<u64>,
}

/// Times the model in `folder` on random tokens.
///
/// # Errors
/// A folder that does not load; options without anything to time.
pub fn bench(
    folder: &Path,
    device: &Device,
    options: &BenchOptions,
    mut progress: impl FnMut(&str),
) -> Result<Vec<Measurement>> {
    ensure!(options.repeats > 0, "--repeats must be at least 1");
    ensure!(options.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    ensure!(options.batch > 0, "--batch must be at least 1");
    let mut measurements = Vec::new();
    {
        let model = Model::load(folder, device, options.precision).context("loading the model for inference")?;
        let prompt = random_tokens(options.prompt_tokens, model.config.vocabulary_size);
        let batch = TokenBatch::new(device, &[prompt], None)?;
        progress("prefill, last logits");
        measurements.push(measure("prefill, last logits", options.prompt_tokens, options.repeats, device, || {
            model.prefill(&batch).map(drop).map_err(Into::into)
        })?);
        progress("prefill, all logits");
        measurements.push(measure("prefill, all logits", options.prompt_tokens, options.repeats, device, || {
            model.logits(&Tape::inference(), &batch).map(drop).map_err(Into::into)
        })?);
        if options.decode_tokens > 0 {
            let name = format!("decode, batch {}", options.batch);
            progress(&name);
            let prompts = vec![random_tokens(options.prompt_tokens, model.config.vocabulary_size); options.batch];
            let (logits, cache) = model.prefill(&TokenBatch::new(device, &prompts, None)?)?;
            let tokens = options.decode_tokens * options.batch;
            measurements.push(measure(&name, tokens, options.repeats, device, || {
                let mut decoder = Decoder::new(&model, &logits, cache.clone(), Sampling::Greedy)?;
                for _ in 0..options.decode_tokens {
                    decoder.step()?;
                    decoder.tokens()?;
                }
                Ok(())
            })?);
        }
    }
    if options.train_tokens > 0 {
        progress("training step");
        device.trim_memory()?;
        let mut model = Model::load(folder, device, Precision::F32).context("loading the model for training")?;
        let constants = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let mut optimizer = AdamW::new(constants, &model.parameters);
        let tokens = random_tokens(options.train_tokens + 1, model.config.vocabulary_size);
        let batch = TokenBatch::new(device, &[tokens[..options.train_tokens].to_vec()], None)?;
        let labels = Tensor::from_slice(device, &[1, options.train_tokens], &tokens[1..])?;
        // One step more than is timed: the first one fills the pool and makes the optimizer's state.
        let mut step = || -> Result<()> {
            let mut gradients = {
                let tape = Tape::new();
                let logits = model.logits(&tape, &batch)?;
                let loss = ops::cross_entropy(&tape, &logits, &labels, options.train_tokens as f32)?.loss;
                drop(logits);
                tape.backward(&loss)?
            };
            let norm = optimizer::gradient_norm(&model.parameters, &gradients)?;
            optimizer::clip_gradients(&mut gradients, norm, 1.0)?;
            optimizer.update(&mut model.parameters, &gradients, 1e-6)?;
            Ok(())
        };
        step()?;
        let name = "training step, all parameters, AdamW";
        measurements.push(measure(name, options.train_tokens, options.repeats, device, step)?);
    }
    Ok(measurements)
}

fn measure(
    name: &str,
    tokens: usize,
    repeats: usize,
    device: &Device,
    mut run: impl FnMut() -> Result<()>,
) -> Result<Measurement> {
    reset_peak_resident();
    device.synchronize()?;
    device.reset_peak_memory();
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        let start = Instant::now();
        run()?;
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    Ok(Measurement {
        name: name.to_owned(),
        tokens,
        seconds,
        fastest: times[0],
        slowest: times[times.len() - 1],
        tokens_per_second: tokens as f64 / seconds,
        peak_bytes: if device.is_cpu() { peak_resident() } else { Some(device.memory_usage().peak as u64) },
    })
}

/// Tokens that are the same every time but look like nothing in particular (a multiplicative congruential sequence).
fn random_tokens(count: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = 0x2545_f491u64;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocabulary.max(1) as u64) as u32
        })
        .collect()
}

/// Linux: forgets the peak so far, so that the next reading is of one phase. Elsewhere nothing happens, and the peak
/// is the process's.
fn reset_peak_resident() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}
