//! Whole distillation steps on the device under test (`TEST_DEVICE`): the losses of the CPU, the same bits every time, and
//! memory that does not grow.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use autograd::ops::{self, Divergence, DivergenceOptions};
use autograd::optimizer::{AdamW, AdamWOptions, clip_factor, gradient_norm};
use autograd::{DType, Tape, Tensor};
use grafter_tests::random::Random;
use model::config::ModelConfig;
use model::initialise::{GraftOptions, Start, graft};
use model::{Model, TokenBatch};
use runtime::Device;

const VOCABULARY: usize = 203;
/// Sizes that no tile and no chunk divides.
const TIME: usize = 37;
const BATCH: usize = 3;

fn config(head_size: usize) -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "head_dim": head_size,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "initializer_range": 0.1,
    });
    ModelConfig::from_json(json.as_object().unwrap()).unwrap()
}

/// A teacher, its hybrid with the middle layer replaced, and the optimizer between them.
struct Training {
    device: Device,
    teacher: Model,
    student: Model,
    optimizer: AdamW,
}

impl Training {
    fn new(device: &Device, activations: DType) -> Self {
        Self::that_starts(Start::Paper, 32, device, activations)
    }

    fn that_starts(start: Start, head_size: usize, device: &Device, activations: DType) -> Self {
        let teacher = Model::random(config(head_size), 5, device).unwrap();
        let student = graft(&teacher, &teacher, &[1], &GraftOptions { seed: 3, start }).unwrap();
        let (teacher, student) = match activations {
            DType::Bf16 => (teacher.into_bf16().unwrap(), student.into_bf16().unwrap()),
            _ => (teacher, student),
        };
        let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.01 };
        let optimizer = AdamW::new(options, &student.parameters);
        Self { device: device.clone(), teacher, student, optimizer }
    }

    /// One update; returns its loss.
    fn step(&mut self, index: u64) -> f64 {
        let mut random = Random::new(100 + index % 7);
        let rows: Vec<Vec<u32>> =
            (0..BATCH).map(|_| (0..TIME).map(|_| random.below(VOCABULARY) as u32).collect()).collect();
        let documents = vec![vec![TIME], vec![11, TIME - 11], vec![1, 1, TIME - 2]];
        let batch = TokenBatch::new(&self.device, &rows, Some(&documents)).unwrap();
        let mask: Vec<f32> = (0..BATCH * TIME).map(|position| f32::from(position % 5 != 0)).collect();
        let mask = Tensor::from_slice(&self.device, &[BATCH, TIME], &mask).unwrap();
        let target = self.teacher.logits(&Tape::inference(), &batch).unwrap();
        let tape = Tape::new();
        let logits = self.student.logits(&tape, &batch).unwrap();
        let options = DivergenceOptions {
            divergence: Divergence::ReverseKl,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            mask: Some(&mask),
            denominator: (BATCH * TIME) as f32,
        };
        let loss = ops::divergence(&tape, &logits, target.tensor(), options).unwrap().loss;
        let value = f64::from(loss.item().unwrap());
        let gradients = tape.backward(&loss).unwrap();
        let norm = gradient_norm(&self.student.parameters, &gradients).unwrap();
        let scale = clip_factor(norm, 1.0);
        self.optimizer.update_scaled(&mut self.student.parameters, &gradients, 3e-3, scale).unwrap();
        value
    }

    /// The bits of all weights.
    fn bits(&self) -> Vec<Vec<u32>> {
        let values = |tensor: &Tensor| tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect();
        self.student.parameters.iter().map(|(_, parameter)| values(&parameter.value)).collect()
    }
}

/// One test at a time: one of them measures the device's memory.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Steps that the device under test can take in a few seconds. `TEST_STEPS` limits them where a tool makes everything slow.
fn steps(fast: u64, simulated: u64) -> u64 {
    let limit = std::env::var("TEST_STEPS").ok().and_then(|limit| limit.parse().ok()).unwrap_or(u64::MAX);
    if grafter_tests::device().to_string() == "sim" { simulated.min(limit) } else { fast.min(limit) }
}

#[test]
fn losses_are_those_of_the_cpu_in_f32() {
    let _alone = alone();
    let device = grafter_tests::device();
    let (mut reference, mut tested) = (Training::new(&Device::cpu(), DType::F32), Training::new(&device, DType::F32));
    let mut first = None;
    let mut last = 0.0;
    for index in 0..steps(50, 8) {
        let (expected, got) = (reference.step(index), tested.step(index));
        // Rounding differs by 1e-7 a step, and AdamW makes an update of full size of every sign.
        assert!((got / expected - 1.0).abs() < 2e-4, "step {index}: {got}, on the CPU {expected}");
        first.get_or_insert(got);
        last = got;
    }
    assert!(last < first.unwrap(), "the loss did not fall: {first:?} to {last}");
}

#[test]
fn losses_in_bf16_stay_near_those_in_f32() {
    let _alone = alone();
    let device = grafter_tests::device();
    let (mut reference, mut tested) = (Training::new(&Device::cpu(), DType::F32), Training::new(&device, DType::Bf16));
    for index in 0..steps(50, 6) {
        let (expected, got) = (reference.step(index), tested.step(index));
        assert!((got / expected - 1.0).abs() < 0.05, "step {index}: {got}, in f32 {expected}");
    }
}

#[test]
fn a_mixer_of_whole_heads_learns_as_on_the_cpu() {
    let _alone = alone();
    let device = grafter_tests::device();
    // 64 states, as SmolLM2's heads give: the most that GPUs scan.
    let training = |device: &Device, activations| Training::that_starts(Start::WholeHead, 64, device, activations);
    let mut reference = training(&Device::cpu(), DType::F32);
    let (mut tested, mut narrow) = (training(&device, DType::F32), training(&device, DType::Bf16));
    assert_eq!(reference.student.config.mamba.as_ref().unwrap().d_state, 64);
    for index in 0..steps(20, 3) {
        let (expected, got, rounded) = (reference.step(index), tested.step(index), narrow.step(index));
        assert!((got / expected - 1.0).abs() < 2e-4, "step {index}: {got}, on the CPU {expected}");
        assert!((rounded / expected - 1.0).abs() < 0.05, "step {index}: {rounded} in bf16, {expected} in f32");
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let _alone = alone();
    for dtype in [DType::F32, DType::Bf16] {
        let run = || {
            let mut training = Training::new(&grafter_tests::device(), dtype);
            let losses: Vec<u64> = (0..steps(20, 3)).map(|index| training.step(index).to_bits()).collect();
            (losses, training.bits())
        };
        let first = run();
        assert!(first.1.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
        assert!(first == run(), "{dtype}: two runs differ");
    }
}

#[test]
fn a_thousand_steps_leave_memory_flat() {
    let _alone = alone();
    let device = grafter_tests::device();
    let mut training = Training::new(&device, DType::Bf16);
    // Uploads and tables keep a few blocks: how many shows in the first steps, so these are not cut short by TEST_STEPS.
    let warm_up = if device.to_string() == "sim" { 2 } else { 20 };
    let rest = steps(980, 3);
    for index in 0..warm_up {
        training.step(index);
    }
    device.synchronize().unwrap();
    let before = device.memory_usage();
    device.reset_peak_memory();
    for index in 0..rest {
        training.step(index);
    }
    device.synchronize().unwrap();
    let after = device.memory_usage();
    assert_eq!(after.in_use, before.in_use);
    assert!(after.peak <= before.peak, "{before:?} {after:?}");
}
