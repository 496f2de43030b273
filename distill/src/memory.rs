//! How much memory there is, and whether a run can fit into it.
//!
//! What a run takes at least is known from its configuration: weights, gradients and moments from the model's sizes,
//! logits from the micro-batch. A run that cannot fit is refused before anything of that is allocated, with the key to
//! change; without this the system ends it somewhere on the way without a word.

use std::fs;

use anyhow::{Result, ensure};
use autograd::DType;
use model::architecture::{parameter_specs, size_keys};
use model::checkpoint::ParameterSpec;
use model::config::ModelConfig;
use runtime::{Device, DeviceKind};

use crate::config::{PrecisionKind, RunConfig, Trainable};

/// Bytes of the machine's memory, where the system tells (Linux).
pub(crate) fn machine_bytes() -> Option<u64> {
    meminfo("MemTotal:")
}

/// Refuses a run that cannot fit into the memory of its device, whatever else is there. `model` is the student, or the
/// teacher where the student is yet to be made from it.
///
/// # Errors
/// The key at fault, what its value takes, and what there is.
pub(crate) fn check(config: &RunConfig, model: &ModelConfig, device: &Device) -> Result<()> {
    let memory = match device.kind() {
        DeviceKind::Cuda(_) => Some(device.free_and_total_memory()?.1 as u64),
        DeviceKind::Cpu | DeviceKind::Sim => machine_bytes().map(|memory| memory + meminfo("SwapTotal:").unwrap_or(0)),
    };
    match memory {
        Some(memory) => check_against(config, model, device, memory),
        None => Ok(()),
    }
}

fn check_against(config: &RunConfig, model: &ModelConfig, device: &Device, memory: u64) -> Result<()> {
    let fits = |bytes: u128| bytes <= u128::from(memory);
    let there_is = format!("more than the {} of {device}", gibibytes(u128::from(memory)));
    let (matrices, name) = match config.training.precision {
        PrecisionKind::F32 => (DType::F32, "float32"),
        PrecisionKind::Bf16 => (DType::Bf16, "bfloat16"),
    };
    let specs = parameter_specs(model, |_| matrices);
    let parameters: u128 = specs.iter().map(|spec| count(&spec.shape)).sum();
    let largest = specs.iter().max_by_key(|spec| count(&spec.shape));
    let (keys, largest) = largest.map_or(("num_hidden_layers", String::new()), |spec| {
        (size_keys(&spec.name), format!(" (the largest tensor, {}, has the shape {:?})", spec.name, spec.shape))
    });
    let weights: u128 = specs.iter().map(kept).sum();
    ensure!(
        fits(weights),
        "config.json: {keys}: the model has {parameters} parameters{largest}, which take {} in {name}, {there_is}: \
         make the model smaller, or use a larger machine",
        gibibytes(weights)
    );
    // What is trained of a graft's mixers alone is not known here.
    let trained = match config.training.trainable {
        Trainable::All => specs.iter().map(trained).sum(),
        Trainable::Mixers => weights,
    };
    ensure!(
        fits(trained),
        "training.trainable is \"all\": the model's {parameters} parameters take {} with their gradients and what AdamW \
         keeps, {there_is}: train the mixers only (\"mixers\", if it has some), or use a larger machine",
        gibibytes(trained)
    );

    let rows = config.training.micro_batch as u128;
    let length = config.data.sequence_length as u128;
    let models = if config.loss.divergence_weight > 0.0 { 2 } else { 1 };
    let logits = rows * length * model.vocabulary_size as u128 * matrices.size() as u128 * models;
    let key = if rows > 1 { "training.micro_batch" } else { "data.sequence_length" };
    ensure!(
        fits(logits),
        "{key}: the logits of {rows} sequences of {length} tokens, computed at once, take {}, {there_is}: use a smaller \
         training.micro_batch (now {rows}) or a shorter data.sequence_length (now {length})",
        gibibytes(logits)
    );
    Ok(())
}

fn count(shape: &[usize]) -> u128 {
    shape.iter().map(|&size| size as u128).product()
}

/// Bytes of a parameter.
fn kept(spec: &ParameterSpec) -> u128 {
    count(&spec.shape) * spec.dtype.size() as u128
}

/// Bytes of a parameter with its gradient and AdamW's two moments, and its master where it is not kept in f32: all of them in
/// f32.
fn trained(spec: &ParameterSpec) -> u128 {
    let wide = if spec.dtype == DType::F32 { 3 } else { 4 };
    kept(spec) + wide * count(&spec.shape) * DType::F32.size() as u128
}

fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

fn gibibytes(bytes: u128) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use autograd::optimizer::{AdamW, AdamWOptions};
    use autograd::{Tape, Tensor, ops};
    use model::{Model, TokenBatch};
    use serde_json::json;

    use super::*;
    use crate::config::Task;

    const GIB: u64 = 1 << 30;

    fn model(vocabulary: usize, hidden: usize, layers: usize) -> ModelConfig {
        let source = json!({
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": layers, "vocab_size": vocabulary, "tie_word_embeddings": true,
        });
        ModelConfig::from_json(source.as_object().unwrap()).unwrap()
    }

    fn message(config: &RunConfig, model: &ModelConfig, memory: u64) -> String {
        check_against(config, model, &Device::cpu(), memory).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_fit_is_named_with_the_key_to_change() {
        let mut config = RunConfig::defaults(Task::Distill);
        let small = model(1 << 16, 16, 1);
        check_against(&config, &small, &Device::cpu(), GIB).unwrap();

        let said = message(&config, &model(1 << 24, 64, 1), GIB);
        assert!(said.contains("vocab_size and hidden_size: the model has"), "{said}");
        assert!(said.contains("embed_tokens.weight, has the shape [16777216, 64]), which take 4.0 GiB"), "{said}");
        // Fits by itself, but not with gradients and moments.
        let said = message(&config, &model(1 << 24, 8, 1), GIB);
        assert!(said.contains("training.trainable is \"all\"") && said.contains("take 2.0 GiB"), "{said}");
        config.training.trainable = Trainable::Mixers;
        let said = message(&config, &model(1 << 24, 8, 1), GIB);
        assert!(said.starts_with("data.sequence_length: the logits of 1 sequences of 512 tokens"), "{said}");
        // Every size as large as a configuration may say: nothing overflows.
        let said = message(&config, &model(1 << 24, 1 << 24, 10_000), u64::MAX / 4);
        assert!(said.contains("make the model smaller"), "{said}");

        config.training.micro_batch = 8;
        let said = message(&config, &small, GIB);
        assert!(said.starts_with("training.micro_batch: the logits of 8 sequences of 512 tokens"), "{said}");
        assert!(said.contains("take 2.0 GiB, more than the 1.0 GiB of cpu"), "{said}");
        config.training.micro_batch = 2;
        check_against(&config, &small, &Device::cpu(), GIB).unwrap();

        // In bf16, matrices and logits take half.
        config.training.micro_batch = 8;
        config.training.precision = PrecisionKind::Bf16;
        check_against(&config, &small, &Device::cpu(), GIB).unwrap();
        config.training.micro_batch = 9;
        let said = message(&config, &small, GIB);
        assert!(said.contains("the logits of 9 sequences") && said.contains("take 1.1 GiB"), "{said}");
        let said = message(&config, &model(1 << 24, 64, 1), GIB);
        assert!(said.contains("which take 2.0 GiB in bfloat16"), "{said}");
    }

    /// What is counted is what a step of training allocates, to the byte.
    #[test]
    fn what_is_counted_is_what_is_kept() {
        let config = model(50, 16, 2);
        for precision in [DType::F32, DType::Bf16] {
            let mut model = Model::random(config.clone(), 1, &Device::cpu()).unwrap();
            if precision == DType::Bf16 {
                model = model.into_bf16().unwrap();
            }
            let specs = parameter_specs(&config, |_| precision);
            let bytes = |tensor: &Tensor| (tensor.count() * tensor.dtype().size()) as u128;
            let weights: u128 = model.parameters.iter().map(|(_, parameter)| bytes(&parameter.value)).sum();
            assert_eq!(specs.iter().map(kept).sum::<u128>(), weights, "{precision}");

            let batch = TokenBatch::new(&Device::cpu(), &[vec![1, 2, 3]], None).unwrap();
            let gradients = {
                let tape = Tape::new();
                let logits = model.logits(&tape, &batch).unwrap();
                let loss = ops::sum(&tape, &logits).unwrap();
                tape.backward(&loss).unwrap()
            };
            let constants = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
            let mut optimizer = AdamW::new(constants, &model.parameters);
            optimizer.update(&mut model.parameters, &gradients, 1e-3).unwrap();
            let moments = optimizer.moments().iter().flatten().map(|(first, second)| bytes(first) + bytes(second));
            let masters = optimizer.masters().iter().flatten().map(bytes);
            let of_optimizer: u128 = moments.chain(masters).sum();
            let of_gradients: u128 = specs.iter().map(|spec| 4 * count(&spec.shape)).sum();
            assert_eq!(specs.iter().map(trained).sum::<u128>(), weights + of_gradients + of_optimizer, "{precision}");
        }
    }
}
