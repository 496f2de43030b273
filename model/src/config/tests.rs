use serde_json::json;

use super::*;

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn llama() -> Map<String, Value> {
    object(json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 151,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 512, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": [2, 5], "something_else": {"kept": [1, 2]},
    }))
}

fn hybrid() -> Map<String, Value> {
    object(json!({
        "model_type": "apriel_ssm_thinker_hybrid", "architectures": ["AprielThinkerSSMHybridForCausalLM"],
        "hidden_size": 80, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 4, "vocab_size": 131, "sliding_window": null,
        "hybrid_block_layout": ["t", "m2", "t", "m2"],
        "ssm_cfg": {"d_state": 16, "d_xb": 32, "d_inner": 64, "expand": 1, "dt_rank": "auto"},
    }))
}

fn apriel2() -> Map<String, Value> {
    let mlp = json!({"type": "mlp", "intermediate_size": 112, "activation": "silu", "gated": true});
    let normalization = json!({"type": "rms_norm", "epsilon": 1e-5});
    object(json!({
        "model_type": "apriel2_text", "architectures": ["Apriel2ForCausalLM"], "hidden_size": 80, "vocab_size": 131,
        "tie_word_embeddings": false, "embeddings": {"max_position_embeddings": 2048},
        "decoder": {
            "type": "pattern", "num_blocks": 4, "pattern": ["attn", "mamba"],
            "blocks": {
                "attn": {
                    "mixer": {"type": "attention", "heads": 4, "head_groups": 2, "head_size": 16,
                              "rotary": {"type": "mistral_1d", "theta": 1e6}},
                    "mlp": mlp, "normalization": normalization,
                },
                "mamba": {
                    "mixer": {"type": "mamba", "d_inner": 64, "state_size": 16, "d_xb": 32, "dt_rank": 5,
                              "conv_bias": true, "dt_proj_bias": true},
                    "mlp": mlp, "normalization": normalization,
                },
                "unused": {"mixer": {"type": "gdn"}},
            },
        },
    }))
}

fn refusal(mut base: Map<String, Value>, key: &str, value: Value) -> String {
    if value == json!("absent") {
        base.remove(key);
    } else {
        base.insert(key.to_owned(), value);
    }
    ModelConfig::from_json(&base).unwrap_err().to_string()
}

#[test]
fn a_llama_is_read_and_written_back_unchanged() {
    let config = ModelConfig::from_json(&llama()).unwrap();
    assert_eq!(config.head_size, 16);
    assert_eq!((config.attention_heads, config.key_value_heads), (4, 2));
    assert_eq!(config.eos_tokens, [2, 5]);
    assert_eq!(config.sliding_window, None);
    assert!(config.tied_embeddings && config.mamba.is_none());
    assert_eq!(config.mixers, [MixerKind::Attention; 4]);
    assert_eq!(config.to_json(), llama());
}

#[test]
fn mistral_defaults_are_those_of_its_class() {
    let mut json = llama();
    json.insert("model_type".to_owned(), json!("mistral"));
    json.remove("num_key_value_heads");
    json.insert("num_attention_heads".to_owned(), json!(16));
    let config = ModelConfig::from_json(&json).unwrap();
    assert_eq!((config.key_value_heads, config.sliding_window), (8, Some(4096)));
    json.insert("num_key_value_heads".to_owned(), Value::Null);
    json.insert("sliding_window".to_owned(), Value::Null);
    let config = ModelConfig::from_json(&json).unwrap();
    assert_eq!((config.key_value_heads, config.sliding_window), (16, None));
}

#[test]
fn rotary_scalings_in_every_spelling() {
    let scaling = |key: &str, value: Value| {
        let mut json = llama();
        json.insert(key.to_owned(), value);
        let config = ModelConfig::from_json(&json).unwrap();
        (config.rope_theta, config.rope_scaling)
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64});
    let expected = RotaryScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_length: 64.0,
    };
    assert_eq!(scaling("rope_scaling", llama3), (500000.0, expected));
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    let expected = RotaryScaling::Yarn {
        factor: 4.0,
        attention_factor: None,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_length: 128.0,
    };
    assert_eq!(scaling("rope_scaling", yarn), (500000.0, expected));
    assert_eq!(scaling("rope_scaling", json!({"rope_type": "default"})), (500000.0, RotaryScaling::None));
    let mut version5 = llama();
    version5.remove("rope_theta");
    version5.insert("rope_parameters".to_owned(), json!({"rope_type": "yarn", "rope_theta": 7.0, "factor": 2.0}));
    let config = ModelConfig::from_json(&version5).unwrap();
    assert_eq!(config.rope_theta, 7.0);
    assert!(matches!(config.rope_scaling, RotaryScaling::Yarn { factor: 2.0, original_length: 512.0, .. }));
    let message = refusal(llama(), "rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0}));
    assert!(message.contains("rope_scaling.rope_type: the scaling \"dynamic\" is not supported"), "{message}");
    let message = refusal(llama(), "rope_scaling", json!({"rope_type": "llama3", "factor": 2.0}));
    assert!(message.contains("rope_scaling.low_freq_factor: this key is missing"), "{message}");
}

#[test]
fn hybrid_layouts_are_listed_broadcast_or_tiled() {
    let mixers = |layout: Value| {
        let mut json = hybrid();
        json.insert("hybrid_block_layout".to_owned(), layout);
        ModelConfig::from_json(&json).unwrap().mixers
    };
    use MixerKind::{Attention, Identity, Mamba};
    assert_eq!(mixers(json!(["t", "m2", "i", "m2"])), [Attention, Mamba, Identity, Mamba]);
    assert_eq!(mixers(json!(["m2"])), [Mamba; 4]);
    assert_eq!(mixers(json!(["t", "m2", "m2"])), [Attention, Mamba, Mamba, Attention]);
}

#[test]
fn mamba_geometry_has_the_formats_defaults() {
    let config = ModelConfig::from_json(&hybrid()).unwrap();
    let mamba = config.mamba.unwrap();
    assert_eq!((mamba.d_inner, mamba.d_xb, mamba.d_state, mamba.d_conv, mamba.dt_rank), (64, 32, 16, 4, 5));
    assert!(mamba.conv_bias && mamba.dt_proj_bias && mamba.repeat_before_conv);
    let mut json = hybrid();
    json.remove("ssm_cfg");
    let mamba = ModelConfig::from_json(&json).unwrap().mamba.unwrap();
    assert_eq!((mamba.d_inner, mamba.d_xb, mamba.dt_rank), (80, 80, 5));
}

#[test]
fn a_grafted_llama_becomes_a_hybrid_that_reads_back_equal() {
    let mut config = ModelConfig::from_json(&llama()).unwrap();
    config.mixers[1] = MixerKind::Mamba;
    config.mamba = Some(MambaConfig {
        d_inner: 64,
        d_xb: 32,
        d_state: 16,
        d_conv: 4,
        dt_rank: 4,
        conv_bias: true,
        dt_proj_bias: true,
        repeat_before_conv: true,
        dt_min: 1e-3,
        dt_max: 0.1,
        dt_init_floor: 1e-4,
    });
    let json = config.to_json();
    assert_eq!(json["model_type"], "apriel_hybrid_ssm");
    assert_eq!(json["architectures"], json!(["AprielHybridSSMForCausalLM"]));
    assert_eq!(json["hybrid_block_layout"], json!(["t", "m2", "t", "t"]));
    assert_eq!(json["layer_types"], json!(["full_attention", "mamba2", "full_attention", "full_attention"]));
    assert_eq!(json["sliding_window"], Value::Null);
    assert_eq!(json["something_else"], json!({"kept": [1, 2]}));
    assert_eq!(json["rms_norm_eps"], json!(1e-5));
    let again = ModelConfig::from_json(&json).unwrap();
    assert_eq!(again.to_json(), json);
    let expected = ModelConfig { family: Family::AprielHybrid, source: json, ..config };
    assert_eq!(again, expected);
}

#[test]
fn a_hybrid_keeps_its_model_type_and_gets_the_rank_of_its_weights() {
    let mut config = ModelConfig::from_json(&hybrid()).unwrap();
    assert_eq!(config.to_json(), hybrid());
    config.mamba.as_mut().unwrap().dt_rank = 16;
    config.mixers[0] = MixerKind::Mamba;
    let json = config.to_json();
    assert_eq!(json["model_type"], "apriel_ssm_thinker_hybrid");
    assert_eq!(json["hybrid_block_layout"], json!(["m2", "m2", "t", "m2"]));
    assert_eq!(json["ssm_cfg"]["dt_rank"], 16);
    assert!(!json.contains_key("layer_types") && !json.contains_key("auto_map"));
}

#[test]
fn a_declarative_decoder_is_read_and_rewritten() {
    let mut config = ModelConfig::from_json(&apriel2()).unwrap();
    use MixerKind::{Attention, Mamba};
    assert_eq!(config.mixers, [Attention, Mamba, Attention, Mamba]);
    assert_eq!((config.attention_heads, config.key_value_heads, config.head_size), (4, 2, 16));
    assert_eq!((config.max_positions, config.rope_theta, config.rms_norm_epsilon), (2048, 1e6, 1e-5));
    assert_eq!(config.mamba.as_ref().unwrap().dt_rank, 5);
    assert_eq!(config.to_json(), apriel2());
    config.mixers[2] = Mamba;
    let json = config.to_json();
    assert_eq!(json["decoder"]["pattern"], json!(["attention", "mamba", "mamba", "mamba"]));
    let again = ModelConfig::from_json(&json).unwrap();
    assert_eq!(again, ModelConfig { source: json, ..config });
}

#[test]
fn what_is_not_supported_is_named() {
    let cases = [
        (
            refusal(llama(), "model_type", json!("qwen2")),
            "config.json: model_type: \"qwen2\" is not supported; supported are \"llama\"",
        ),
        (refusal(llama(), "model_type", json!("absent")), "model_type: this key is missing"),
        (refusal(llama(), "hidden_size", json!("absent")), "hidden_size: this key is missing"),
        (
            refusal(llama(), "hidden_size", json!("64")),
            "hidden_size: expected a whole number from 1 to 16777216, found \"64\"",
        ),
        (refusal(llama(), "hidden_size", json!(-64)), "found -64"),
        (refusal(llama(), "num_hidden_layers", json!(1_000_000)), "1000000 layers: expected at most 10000"),
        (refusal(llama(), "head_dim", json!(16_000_000)), "head_dim: gives a width of 64000000"),
        (refusal(llama(), "head_dim", json!(15)), "head_dim: heads of 15 have no pairs to rotate"),
        (refusal(llama(), "rope_theta", json!(1e-300)), "rope_theta: expected a number above 0, found 1e-300"),
        (refusal(llama(), "initializer_range", json!(-1)), "initializer_range: expected a number above 0, found -1"),
        (refusal(llama(), "initializer_range", json!(1e40)), "initializer_range: expected a number above 0"),
        (refusal(llama(), "num_key_value_heads", json!(3)), "4 query heads cannot share 3 key and value heads"),
        (refusal(llama(), "num_attention_heads", json!(6)), "head_dim: this key is missing"),
        (refusal(llama(), "hidden_act", json!("gelu")), "the activation \"gelu\" is not supported"),
        (refusal(llama(), "rms_norm_eps", json!(0)), "rms_norm_eps: expected a number above 0"),
        (refusal(llama(), "bos_token_id", json!(1 << 20)), "bos_token_id: 1048576 is outside the vocabulary of"),
        (refusal(llama(), "eos_token_id", json!([2, 1 << 20])), "eos_token_id: 1048576 is outside the vocabulary of"),
        (refusal(llama(), "eos_token_id", json!("</s>")), "eos_token_id: expected a token id or a list"),
        (refusal(llama(), "quantization_config", json!({"bits": 4})), "quantised weights are not supported"),
        (refusal(llama(), "partial_rotary_factor", json!(0.5)), "only 1 is supported"),
        (refusal(hybrid(), "hybrid_block_layout", json!("absent")), "hybrid_block_layout: this key is missing"),
        (refusal(hybrid(), "hybrid_block_layout", json!(["t", "gdn"])), "entry 1 is \"gdn\": supported are"),
        (refusal(hybrid(), "hybrid_block_layout", json!([])), "0 entries for 4 layers"),
        (refusal(hybrid(), "ssm_cfg", json!({"d_inner": 64, "d_xb": 48})), "48 channels cannot be repeated"),
        (refusal(hybrid(), "ssm_cfg", json!({"d_inner": 40})), "40 is no multiple of the 16 states"),
        (refusal(hybrid(), "ssm_cfg", json!({"bias": true})), "ssm_cfg.bias"),
        (refusal(hybrid(), "ssm_cfg", json!(7)), "ssm_cfg: expected an object"),
        (refusal(apriel2(), "vision_encoder", json!({})), "vision encoder"),
        (refusal(apriel2(), "decoder", json!("absent")), "decoder: this key is missing"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "expected «{expected}» in «{message}»");
    }
    let mut stochastic = apriel2();
    stochastic["decoder"]["blocks"]["attn"]["mixer"] = json!({"type": "stochastic", "mixers": {}});
    let message = ModelConfig::from_json(&stochastic).unwrap_err().to_string();
    assert!(message.contains("decoder.blocks.attn.mixer.type: the mixer \"stochastic\" is not supported"), "{message}");
    let mut unequal = apriel2();
    unequal["decoder"]["blocks"]["mamba"]["mlp"]["intermediate_size"] = json!(96);
    let message = ModelConfig::from_json(&unequal).unwrap_err().to_string();
    assert!(message.contains("decoder.blocks.mamba.mlp.intermediate_size: differs"), "{message}");
}
