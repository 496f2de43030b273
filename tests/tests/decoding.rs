//! Whole decoding on the device under test (`TEST_DEVICE`): the tokens of step after step with the choice made by the host, and
//! the same tokens every time.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::DType;
use model::config::ModelConfig;
use model::generate::{GenerateOptions, Sampling, generate_batch};
use model::initialise::{GraftOptions, Start, graft};
use model::{Decoder, Model, TokenBatch};
use runtime::DeviceKind;

const VOCABULARY: usize = 203;

/// Steps to decode: on a GPU so many that caches grow while steps are replayed.
fn steps() -> usize {
    if matches!(grafter_tests::device().kind(), DeviceKind::Cuda(_)) { 150 } else { 24 }
}

/// A hybrid: attention, Mamba, attention.
fn hybrid(activations: DType) -> Model {
    hybrid_that_starts(Start::Paper, activations)
}

fn hybrid_that_starts(start: Start, activations: DType) -> Model {
    let json = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "head_dim": 32,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "initializer_range": 0.2,
    });
    let config = ModelConfig::from_json(json.as_object().unwrap()).unwrap();
    let teacher = Model::random(config, 5, &grafter_tests::device()).unwrap();
    let hybrid = graft(&teacher, &teacher, &[1], &GraftOptions { seed: 3, start }).unwrap();
    if activations == DType::Bf16 { hybrid.into_bf16().unwrap() } else { hybrid }
}

fn prompts(rows: usize) -> Vec<Vec<u32>> {
    (0..rows as u32).map(|row| (0..5).map(|step| (row * 31 + step * 17 + 3) % VOCABULARY as u32).collect()).collect()
}

/// The first of the greatest.
fn greatest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

#[test]
fn greedy_tokens_are_those_that_the_host_chooses_from_the_logits() {
    // The second one's mixer has 32 states.
    for (start, activations) in
        [(Start::Paper, DType::F32), (Start::Paper, DType::Bf16), (Start::WholeHead, DType::Bf16)]
    {
        let model = hybrid_that_starts(start, activations);
        let batch = TokenBatch::new(model.device(), &prompts(3), None).unwrap();
        let (logits, cache) = model.prefill(&batch).unwrap();
        let mut host_cache = cache.clone();
        let mut decoder = Decoder::new(&model, &logits, cache, Sampling::Greedy).unwrap();
        let mut expected = logits;
        for step in 0..steps() {
            let values = expected.to_f32_vec().unwrap();
            let chosen: Vec<u32> = values.chunks_exact(VOCABULARY).map(greatest).collect();
            assert_eq!(decoder.tokens().unwrap(), chosen, "{start:?}, {activations}, step {step}");
            expected = model.step(&chosen, &mut host_cache).unwrap();
            decoder.step().unwrap();
            assert_eq!(decoder.length(), host_cache.length());
        }
    }
}

#[test]
fn step_after_step_gives_the_logits_of_the_whole_whatever_the_mixer_starts_as() {
    for start in [Start::Paper, Start::Aligned, Start::AlignedBiasOnce, Start::IdentityConvolution, Start::WholeHead] {
        let model = hybrid_that_starts(start, DType::F32);
        let whole: Vec<Vec<u32>> =
            (0..2).map(|row| (0..12).map(|step| (row * 31 + step * 17 + 3) % VOCABULARY as u32).collect()).collect();
        let until = |length: usize| -> Vec<Vec<u32>> { whole.iter().map(|row| row[..length].to_vec()).collect() };
        let prefill = |rows: &[Vec<u32>]| model.prefill(&TokenBatch::new(model.device(), rows, None).unwrap()).unwrap();
        let (mut logits, mut cache) = prefill(&until(7));
        for at in 7..12 {
            logits = model.step(&whole.iter().map(|row| row[at]).collect::<Vec<_>>(), &mut cache).unwrap();
        }
        let (got, expected) = (logits.to_f32_vec().unwrap(), prefill(&whole).0.to_f32_vec().unwrap());
        let scale = expected.iter().fold(0f32, |most, logit| most.max(logit.abs()));
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-5 * scale, "{start:?}: {got}, as a whole {expected}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_tokens_every_time_and_rows_have_streams_of_their_own() {
    let model = hybrid(DType::Bf16);
    let written = |seed| {
        let sampling = Sampling::Random { temperature: 1.5, top_k: Some(50), top_p: 0.95, seed };
        let options = GenerateOptions { max_tokens: steps(), sampling, stop: Vec::new(), ignore_eos: true };
        // The same prompt in every row.
        let prompts = vec![prompts(1)[0].clone(); 3];
        let written = generate_batch(&model, &prompts, &options).unwrap();
        written.into_iter().map(|(tokens, _)| tokens).collect::<Vec<_>>()
    };
    let first = written(7);
    assert!(first.iter().all(|tokens| tokens.len() == steps()));
    assert_eq!(first, written(7));
    assert_ne!(first, written(8));
    assert_ne!(first[0], first[1]);
}

#[test]
fn a_logit_that_is_not_a_number_is_named() {
    let model = hybrid(DType::F32);
    let batch = TokenBatch::new(model.device(), &prompts(2), None).unwrap();
    let (logits, cache) = model.prefill(&batch).unwrap();
    let mut values = logits.to_f32_vec().unwrap();
    values[VOCABULARY + 4] = f32::NAN;
    let logits = autograd::Tensor::from_slice(model.device(), &[2, VOCABULARY], &values).unwrap();
    let decoder = Decoder::new(&model, &logits, cache.clone(), Sampling::Greedy).unwrap();
    assert!(decoder.tokens().unwrap_err().to_string().contains("row 1"));
    let wild = Sampling::Random { temperature: 0.0, top_k: None, top_p: 1.0, seed: 1 };
    let refusal = Decoder::new(&model, &logits, cache, wild).err().unwrap().to_string();
    assert!(refusal.contains("temperature 0 must be above 0"), "{refusal}");
}
