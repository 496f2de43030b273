//! Configurations with flat keys: Llama, Mistral, and the Apriel-H1 hybrids, which add a layout and `ssm_cfg`.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::rope::{self, number};
use super::{Family, MambaConfig, MixerKind, ModelConfig, tiled};
use crate::Result;

/// Window of a Mistral configuration that does not mention one (the default of its class).
const MISTRAL_WINDOW: usize = 4096;

pub(super) fn read(keys: &Keys<'_>, family: Family, source: &Map<String, Value>) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("hidden_size")?;
    let layers = keys.required_layers("num_hidden_layers")?;
    let attention_heads = keys.required_size("num_attention_heads")?;
    let key_value_heads = match keys.size("num_key_value_heads")? {
        Some(heads) => heads,
        None if family != Family::Llama && !keys.has("num_key_value_heads") => 8,
        None => attention_heads,
    };
    if !attention_heads.is_multiple_of(key_value_heads) {
        return Err(keys.fail(
            "num_key_value_heads",
            format!("{attention_heads} query heads cannot share {key_value_heads} key and value heads evenly"),
        ));
    }
    let head_size = match keys.size("head_dim")? {
        Some(size) => size,
        None if hidden_size.is_multiple_of(attention_heads) => hidden_size / attention_heads,
        None => {
            return Err(keys.fail(
                "head_dim",
                format!("this key is missing, and hidden_size {hidden_size} is no multiple of {attention_heads} heads"),
            ));
        }
    };
    keys.check_size("head_dim", attention_heads * head_size)?;
    if !head_size.is_multiple_of(2) {
        return Err(
            keys.fail("head_dim", format!("heads of {head_size} have no pairs to rotate: expected an even size"))
        );
    }
    keys.positive("initializer_range")?;
    require_silu(keys, "hidden_act")?;
    let max_positions =
        keys.size("max_position_embeddings")?.unwrap_or(if family == Family::Llama { 2048 } else { 131_072 });
    let (rope_theta, rope_scaling) = rope::read(keys, max_positions)?;
    let sliding_window = match family {
        Family::Llama => None,
        _ if keys.has("sliding_window") => keys.size("sliding_window")?,
        _ => Some(MISTRAL_WINDOW),
    };
    let mixers =
        if family == Family::AprielHybrid { layout(keys, layers)? } else { vec![MixerKind::Attention; layers] };
    let mamba = if mixers.contains(&MixerKind::Mamba) { Some(read_mamba(keys, hidden_size)?) } else { None };
    Ok(ModelConfig {
        family,
        hidden_size,
        intermediate_size: keys.required_size("intermediate_size")?,
        vocabulary_size: keys.required_size("vocab_size")?,
        attention_heads,
        key_value_heads,
        head_size,
        rms_norm_epsilon: keys.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope_theta,
        rope_scaling,
        max_positions,
        sliding_window,
        tied_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        // Mistral's class has no such flags and ignores them; a hybrid grafted from a Llama keeps them.
        attention_bias: family != Family::Mistral && keys.flag("attention_bias")?.unwrap_or(false),
        mlp_bias: family != Family::Mistral && keys.flag("mlp_bias")?.unwrap_or(false),
        mixers,
        mamba,
        bos_token: keys.token("bos_token_id")?,
        eos_tokens: keys.tokens("eos_token_id")?,
        source: source.clone(),
    })
}

/// The gate's activation is fixed.
pub(super) fn require_silu(keys: &Keys<'_>, key: &str) -> Result<()> {
    match keys.text(key)?.unwrap_or("silu") {
        "silu" | "swish" => Ok(()),
        other => Err(keys.fail(key, format!("the activation \"{other}\" is not supported: expected \"silu\""))),
    }
}

fn layout(keys: &Keys<'_>, layers: usize) -> Result<Vec<MixerKind>> {
    const KEY: &str = "hybrid_block_layout";
    let Some(names) = keys.texts(KEY)? else {
        return Err(keys.fail(KEY, "this key is missing: expected a list with \"t\", \"m2\" or \"i\" for each layer"));
    };
    if names.is_empty() || names.len() > layers {
        return Err(keys.fail(KEY, format!("{} entries for {layers} layers: expected 1 to {layers}", names.len())));
    }
    let mut pattern = Vec::with_capacity(names.len());
    for (layer, name) in names.iter().enumerate() {
        pattern.push(match *name {
            "t" => MixerKind::Attention,
            "m2" => MixerKind::Mamba,
            "i" => MixerKind::Identity,
            other => {
                return Err(keys.fail(
                    KEY,
                    format!(
                        "entry {layer} is \"{other}\": supported are \"t\" (attention), \"m2\" (the M1-style Mamba \
                         mixer) and \"i\" (identity)"
                    ),
                ));
            }
        });
    }
    Ok(tiled(&pattern, layers))
}

fn read_mamba(keys: &Keys<'_>, hidden_size: usize) -> Result<MambaConfig> {
    let empty = Map::new();
    let ssm = keys.child("ssm_cfg")?;
    let ssm = ssm.unwrap_or_else(|| Keys::new(&empty));
    if ssm.flag("bias")?.unwrap_or(false) {
        return Err(ssm.fail("bias", "projections with biases are not supported: expected false"));
    }
    read_geometry(&ssm, hidden_size, "d_state", 1)
}

/// The keys of a Mamba mixer that `ssm_cfg` and the apriel2 format share.
pub(super) fn read_geometry(
    keys: &Keys<'_>,
    hidden_size: usize,
    state_key: &str,
    default_expansion: usize,
) -> Result<MambaConfig> {
    let d_state = keys.size(state_key)?.unwrap_or(16);
    let expansion = keys.size("expand")?.unwrap_or(default_expansion);
    let d_inner = keys.size("d_inner")?.unwrap_or(hidden_size * expansion);
    let d_xb = keys.size("d_xb")?.unwrap_or(hidden_size);
    for (key, size) in [("d_inner", d_inner), ("d_xb", d_xb)] {
        keys.check_size(key, size)?;
        if !size.is_multiple_of(d_state) {
            return Err(keys.fail(key, format!("{size} is no multiple of the {d_state} states per channel")));
        }
    }
    if !d_inner.is_multiple_of(d_xb) {
        return Err(keys.fail("d_xb", format!("{d_xb} channels cannot be repeated to d_inner = {d_inner} channels")));
    }
    let dt_rank = match keys.value("dt_rank") {
        Some(Value::String(auto)) if auto == "auto" => None,
        _ => keys.size("dt_rank")?,
    };
    Ok(MambaConfig {
        d_inner,
        d_xb,
        d_state,
        d_conv: keys.size("d_conv")?.unwrap_or(4),
        dt_rank: dt_rank.unwrap_or(hidden_size.div_ceil(16)),
        conv_bias: keys.flag("conv_bias")?.unwrap_or(true),
        dt_proj_bias: keys.flag("dt_proj_bias")?.unwrap_or(true),
        repeat_before_conv: keys.flag("repeat_kv_before_conv")?.unwrap_or(true),
        dt_min: keys.positive("dt_min")?.unwrap_or(1e-3),
        dt_max: keys.positive("dt_max")?.unwrap_or(0.1),
        dt_init_floor: keys.positive("dt_init_floor")?.unwrap_or(1e-4),
    })
}

/// Brings `json` up to date with `config`; a model with mixers other than attention becomes a hybrid.
///
/// Every size is written out: the hybrid's class extends Mistral's, whose defaults are not Llama's.
pub(super) fn write(config: &ModelConfig, json: &mut Map<String, Value>) {
    let is_hybrid =
        config.family == Family::AprielHybrid || config.mixers.iter().any(|mixer| *mixer != MixerKind::Attention);
    let was_hybrid = json.contains_key("hybrid_block_layout");
    let mut set = |key: &str, value: Value| {
        json.insert(key.to_owned(), value);
    };
    if is_hybrid && !was_hybrid {
        set("model_type", json!("apriel_hybrid_ssm"));
        set("architectures", json!(["AprielHybridSSMForCausalLM"]));
    } else if !is_hybrid {
        let (model_type, class) = match config.family {
            Family::Llama => ("llama", "LlamaForCausalLM"),
            _ => ("mistral", "MistralForCausalLM"),
        };
        set("model_type", json!(model_type));
        set("architectures", json!([class]));
    }
    set("hidden_size", json!(config.hidden_size));
    set("intermediate_size", json!(config.intermediate_size));
    set("num_hidden_layers", json!(config.mixers.len()));
    set("num_attention_heads", json!(config.attention_heads));
    set("num_key_value_heads", json!(config.key_value_heads));
    set("head_dim", json!(config.head_size));
    set("hidden_act", json!("silu"));
    set("vocab_size", json!(config.vocabulary_size));
    set("max_position_embeddings", json!(config.max_positions));
    set("rms_norm_eps", number(config.rms_norm_epsilon));
    set("tie_word_embeddings", json!(config.tied_embeddings));
    if is_hybrid || config.family == Family::Mistral {
        set("sliding_window", json!(config.sliding_window));
    }
    for (key, flag) in [("attention_bias", config.attention_bias), ("mlp_bias", config.mlp_bias)] {
        if flag {
            set(key, json!(true));
        }
    }
    if let Some(token) = config.bos_token {
        set("bos_token_id", json!(token));
    }
    if is_hybrid {
        write_hybrid(config, json, was_hybrid);
    }
    rope::write(json, config.rope_theta, &config.rope_scaling);
    if !json.contains_key("eos_token_id") {
        json.insert("eos_token_id".to_owned(), tokens(&config.eos_tokens));
    }
}

fn write_hybrid(config: &ModelConfig, json: &mut Map<String, Value>, was_hybrid: bool) {
    let names = |attention: &str, mamba: &str, identity: &str| -> Value {
        config
            .mixers
            .iter()
            .map(|mixer| match mixer {
                MixerKind::Attention => attention,
                MixerKind::Mamba => mamba,
                MixerKind::Identity => identity,
            })
            .collect()
    };
    json.insert("hybrid_block_layout".to_owned(), names("t", "m2", "i"));
    if !was_hybrid || json.contains_key("layer_types") {
        json.insert("layer_types".to_owned(), names("full_attention", "mamba2", "identity"));
    }
    let Some(mamba) = &config.mamba else { return };
    let mut ssm = json.get("ssm_cfg").and_then(Value::as_object).cloned().unwrap_or_default();
    let decided = json!({
        "d_state": mamba.d_state,
        "d_inner": mamba.d_inner,
        "d_xb": mamba.d_xb,
        "d_conv": mamba.d_conv,
        "dt_rank": mamba.dt_rank,
        "conv_bias": mamba.conv_bias,
        "dt_proj_bias": mamba.dt_proj_bias,
        "repeat_kv_before_conv": mamba.repeat_before_conv,
        "dt_min": mamba.dt_min,
        "dt_max": mamba.dt_max,
        "dt_init_floor": mamba.dt_init_floor,
    });
    // Keys that the class wants to see though its Mamba mixer does not read them; its cache divides by n_qk_heads.
    let heads = if mamba.d_inner.is_multiple_of(32) { 32 } else { config.attention_heads };
    let customary = json!({
        "activation": "silu", "bias": false, "expand": 1, "dt_init": "random", "dt_scale": 1.0,
        "n_v_heads": heads, "n_qk_heads": heads, "chunk_size": 128,
    });
    ssm.extend(decided.as_object().cloned().unwrap_or_default());
    for (key, value) in customary.as_object().into_iter().flatten() {
        ssm.entry(key.as_str()).or_insert_with(|| value.clone());
    }
    json.insert("ssm_cfg".to_owned(), Value::Object(ssm));
}

fn tokens(tokens: &[u32]) -> Value {
    match tokens {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    }
}
