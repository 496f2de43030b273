//! The `apriel2` format: a declarative decoder, whose blocks name their mixers.
//!
//! Supported are decoders whose blocks differ only in their mixer, which is attention or Mamba.

use serde_json::{Map, Value, json};

use super::hugging_face::{read_geometry, require_silu};
use super::keys::Keys;
use super::rope::{self, number};
use super::{Family, MambaConfig, MixerKind, ModelConfig, tiled};
use crate::Result;

pub(super) fn read(keys: &Keys<'_>, source: &Map<String, Value>) -> Result<ModelConfig> {
    if keys.value("vision_encoder").is_some() {
        return Err(keys.fail("vision_encoder", "models with a vision encoder are not supported: text models only"));
    }
    let hidden_size = keys.required_size("hidden_size")?;
    let max_positions = match keys.child("embeddings")? {
        Some(embeddings) => embeddings.size("max_position_embeddings")?,
        None => keys.size("max_position_embeddings")?,
    }
    .unwrap_or(2048);
    let decoder = keys.required_child("decoder")?;
    let layers = decoder.required_layers("num_blocks")?;
    let (blocks, pattern) = match decoder.text("type")?.unwrap_or("fixed") {
        "fixed" => (vec![decoder.required_child("block")?], vec![0]),
        "pattern" => pattern(&decoder, layers)?,
        other => {
            return Err(
                decoder.fail("type", format!("\"{other}\" is not supported: expected \"fixed\" or \"pattern\""))
            );
        }
    };
    let mut common = Common::default();
    let mut kinds = Vec::with_capacity(blocks.len());
    for block in &blocks {
        kinds.push(common.read_block(block, hidden_size, max_positions)?);
    }
    let missing = |what: &str| decoder.fail("blocks", format!("no block has {what}"));
    let attention = common.attention.ok_or_else(|| missing("attention: decoders without any are not supported"))?;
    let epsilon = common.epsilon.ok_or_else(|| missing("a normalization"))?;
    if let Some(head) = keys.child("head")?
        && let Some(normalization) = head.child("normalization")?
        && normalization.positive("epsilon")?.is_some_and(|other| other as f32 != epsilon)
    {
        return Err(
            normalization.fail("epsilon", format!("differs from the blocks' {epsilon}: one value is supported"))
        );
    }
    Ok(ModelConfig {
        family: Family::AprielHybrid,
        hidden_size,
        intermediate_size: common.intermediate_size.ok_or_else(|| missing("an mlp"))?,
        vocabulary_size: keys.required_size("vocab_size")?,
        attention_heads: attention.heads,
        key_value_heads: attention.key_value_heads,
        head_size: attention.head_size,
        rms_norm_epsilon: epsilon,
        rope_theta: attention.rope_theta,
        rope_scaling: attention.rope_scaling,
        max_positions,
        sliding_window: attention.window,
        tied_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        attention_bias: attention.bias,
        mlp_bias: common.mlp_bias.unwrap_or(false),
        mixers: tiled(&pattern, layers).into_iter().map(|block| kinds[block]).collect(),
        mamba: common.mamba,
        bos_token: keys.token("bos_token_id")?,
        eos_tokens: keys.tokens("eos_token_id")?,
        source: source.clone(),
    })
}

/// The blocks that a pattern uses, and for each of its entries which of them it is.
fn pattern<'a>(decoder: &Keys<'a>, layers: usize) -> Result<(Vec<Keys<'a>>, Vec<usize>)> {
    let blocks = decoder.required_child("blocks")?;
    let names = decoder.texts("pattern")?.unwrap_or_default();
    if names.is_empty() || names.len() > layers {
        return Err(
            decoder.fail("pattern", format!("{} entries for {layers} blocks: expected 1 to {layers}", names.len()))
        );
    }
    let mut used: Vec<&str> = Vec::new();
    let mut read = Vec::new();
    let mut pattern = Vec::with_capacity(names.len());
    for name in names {
        let position = match used.iter().position(|other| *other == name) {
            Some(position) => position,
            None => {
                read.push(blocks.required_child(name)?);
                used.push(name);
                used.len() - 1
            }
        };
        pattern.push(position);
    }
    Ok((read, pattern))
}

/// What all blocks of a decoder must agree on, filled by the first that says it.
#[derive(Default)]
struct Common {
    attention: Option<AttentionBlock>,
    mamba: Option<MambaConfig>,
    intermediate_size: Option<usize>,
    mlp_bias: Option<bool>,
    epsilon: Option<f32>,
}

#[derive(Clone, Copy, PartialEq)]
struct AttentionBlock {
    heads: usize,
    key_value_heads: usize,
    head_size: usize,
    rope_theta: f32,
    rope_scaling: autograd::ops::RotaryScaling,
    window: Option<usize>,
    bias: bool,
}

impl Common {
    fn read_block(&mut self, block: &Keys<'_>, hidden_size: usize, max_positions: usize) -> Result<MixerKind> {
        let mlp = block.required_child("mlp")?;
        require_silu(&mlp, "activation")?;
        if mlp.flag("gated")? == Some(false) {
            return Err(mlp.fail("gated", "only gated MLPs (SwiGLU) are supported"));
        }
        agree(&mut self.intermediate_size, mlp.required_size("intermediate_size")?, &mlp, "intermediate_size")?;
        agree(&mut self.mlp_bias, mlp.flag("add_linear_biases")?.unwrap_or(false), &mlp, "add_linear_biases")?;
        let normalization = block.required_child("normalization")?;
        match normalization.text("type")?.unwrap_or("rms_norm") {
            "rms_norm" => {}
            other => {
                return Err(normalization.fail("type", format!("\"{other}\" is not supported: expected \"rms_norm\"")));
            }
        }
        let epsilon = normalization.positive("epsilon")?.unwrap_or(1e-5) as f32;
        agree(&mut self.epsilon, epsilon, &normalization, "epsilon")?;
        let mixer = block.required_child("mixer")?;
        match mixer.text("type")?.unwrap_or("attention") {
            "attention" | "sliding_window" => {
                let attention = read_attention(&mixer, max_positions)?;
                agree(&mut self.attention, attention, &mixer, "heads")?;
                Ok(MixerKind::Attention)
            }
            "mamba" => {
                if mixer.flag("add_linear_biases")?.unwrap_or(false) {
                    return Err(mixer.fail("add_linear_biases", "projections with biases are not supported"));
                }
                let state_key = if mixer.has("state_size") { "state_size" } else { "d_state" };
                let mamba = read_geometry(&mixer, hidden_size, state_key, 2)?;
                agree(&mut self.mamba, mamba, &mixer, "d_inner")?;
                Ok(MixerKind::Mamba)
            }
            other => Err(mixer
                .fail("type", format!("the mixer \"{other}\" is not supported: expected \"attention\" or \"mamba\""))),
        }
    }
}

/// Keeps the first value and refuses another.
fn agree<T: PartialEq>(slot: &mut Option<T>, value: T, keys: &Keys<'_>, key: &str) -> Result<()> {
    match slot {
        Some(first) if *first != value => {
            Err(keys.fail(key, "differs from another block's: blocks may differ only in the kind of their mixer"))
        }
        _ => {
            *slot = Some(value);
            Ok(())
        }
    }
}

fn read_attention(mixer: &Keys<'_>, max_positions: usize) -> Result<AttentionBlock> {
    let heads = mixer.required_size("heads")?;
    let key_value_heads = mixer.size("head_groups")?.unwrap_or(heads);
    if !heads.is_multiple_of(key_value_heads) {
        return Err(
            mixer.fail("head_groups", format!("{heads} query heads cannot share {key_value_heads} heads evenly"))
        );
    }
    let bias = mixer.flag("add_linear_biases")?.unwrap_or(false);
    for layer in ["query_layer", "key_layer", "value_layer", "dense_layer"] {
        if let Some(projection) = mixer.child(layer)?
            && let Some(settings) = projection.child("bias")?
            && settings.flag("enabled")?.is_some_and(|enabled| enabled != bias)
        {
            return Err(settings.fail("enabled", "biases on some of the four projections only are not supported"));
        }
    }
    let (rope_theta, rope_scaling) = match mixer.child("rotary")? {
        Some(rotary) => {
            (rotary.positive("theta")?.unwrap_or(10_000.0) as f32, rope::read_scaling(&rotary, max_positions)?)
        }
        None => return Err(mixer.fail("rotary", "this key is missing: attention without positions is not supported")),
    };
    let head_size = mixer.required_size("head_size")?;
    mixer.check_size("head_size", heads * head_size)?;
    let window = mixer.size("window_size")?;
    Ok(AttentionBlock {
        heads,
        key_value_heads,
        head_size,
        rope_theta,
        rope_scaling,
        window: if window.is_some() { window } else { mixer.size("sliding_window")? },
        bias,
    })
}

/// Rewrites the decoder as a pattern of the blocks `attention` and `mamba`.
pub(super) fn write(config: &ModelConfig, json: &mut Map<String, Value>) {
    let mlp = json!({
        "type": "mlp", "intermediate_size": config.intermediate_size, "activation": "silu", "gated": true,
        "add_linear_biases": config.mlp_bias,
    });
    let normalization = json!({ "type": "rms_norm", "epsilon": number(config.rms_norm_epsilon) });
    let mut blocks = Map::new();
    let mut rotary = Map::new();
    rope::write(&mut rotary, config.rope_theta, &config.rope_scaling);
    let mut rotary_keys = json!({ "type": "mistral_1d", "theta": number(config.rope_theta) });
    if let (Some(Value::Object(scaling)), Some(keys)) = (rotary.get("rope_scaling"), rotary_keys.as_object_mut()) {
        for (key, value) in scaling {
            keys.insert(if key == "rope_type" { "type".to_owned() } else { key.clone() }, value.clone());
        }
    }
    blocks.insert(
        "attention".to_owned(),
        json!({
            "mixer": {
                "type": "attention", "heads": config.attention_heads, "head_groups": config.key_value_heads,
                "head_size": config.head_size, "add_linear_biases": config.attention_bias,
                "window_size": config.sliding_window, "rotary": rotary_keys,
            },
            "mlp": mlp, "normalization": normalization,
        }),
    );
    if let Some(mamba) = &config.mamba {
        blocks.insert(
            "mamba".to_owned(),
            json!({
                "mixer": {
                    "type": "mamba", "d_inner": mamba.d_inner, "state_size": mamba.d_state, "d_xb": mamba.d_xb,
                    "d_conv": mamba.d_conv, "dt_rank": mamba.dt_rank, "conv_bias": mamba.conv_bias,
                    "dt_proj_bias": mamba.dt_proj_bias, "repeat_kv_before_conv": mamba.repeat_before_conv,
                    "dt_min": mamba.dt_min, "dt_max": mamba.dt_max, "dt_init_floor": mamba.dt_init_floor,
                    "add_linear_biases": false,
                },
                "mlp": mlp, "normalization": normalization,
            }),
        );
    }
    let pattern: Vec<&str> =
        config.mixers.iter().map(|mixer| if *mixer == MixerKind::Mamba { "mamba" } else { "attention" }).collect();
    json.insert(
        "decoder".to_owned(),
        json!({ "type": "pattern", "num_blocks": config.mixers.len(), "pattern": pattern, "blocks": blocks }),
    );
}
