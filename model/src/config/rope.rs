//! The rotary embedding's keys in all their spellings.

use autograd::ops::RotaryScaling;
use serde_json::{Map, Value, json};

use super::keys::Keys;
use crate::Result;

/// Base of the rotary embedding when no key says otherwise.
const DEFAULT_THETA: f64 = 10_000.0;

/// `rope_theta` and `rope_scaling`, or both in one `rope_parameters` (transformers 5).
pub(super) fn read(keys: &Keys<'_>, max_positions: usize) -> Result<(f32, RotaryScaling)> {
    let parameters = keys.child("rope_parameters")?;
    let theta = match (keys.positive("rope_theta")?, &parameters) {
        (Some(theta), _) => theta,
        (None, Some(parameters)) => parameters.positive("rope_theta")?.unwrap_or(DEFAULT_THETA),
        (None, None) => DEFAULT_THETA,
    };
    for keys in [Some(keys), parameters.as_ref()].into_iter().flatten() {
        if keys.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(keys.fail("partial_rotary_factor", "only 1 is supported: the whole head is rotated"));
        }
    }
    let scaling = match keys.child("rope_scaling")?.or(parameters) {
        Some(scaling) => read_scaling(&scaling, max_positions)?,
        None => RotaryScaling::None,
    };
    Ok((theta as f32, scaling))
}

/// The scaling in an object whose `rope_type` (older: `type`) names the rule.
pub(super) fn read_scaling(keys: &Keys<'_>, max_positions: usize) -> Result<RotaryScaling> {
    let key = if keys.value("rope_type").is_some() { "rope_type" } else { "type" };
    let required = |name: &str| {
        keys.positive(name)?.ok_or_else(|| keys.fail(name, "this key is missing, and the scaling needs it"))
    };
    match keys.text(key)?.unwrap_or("default") {
        "default" | "mistral_1d" => Ok(RotaryScaling::None),
        "llama3" => Ok(RotaryScaling::Llama3 {
            factor: required("factor")? as f32,
            low_frequency_factor: required("low_freq_factor")? as f32,
            high_frequency_factor: required("high_freq_factor")? as f32,
            original_length: required("original_max_position_embeddings")? as f32,
        }),
        "yarn" => {
            let factor = required("factor")?;
            if keys.flag("truncate")? == Some(false) {
                return Err(keys.fail("truncate", "only true is supported"));
            }
            Ok(RotaryScaling::Yarn {
                factor: factor as f32,
                attention_factor: yarn_attention_factor(keys, factor)?,
                beta_fast: keys.positive("beta_fast")?.unwrap_or(32.0) as f32,
                beta_slow: keys.positive("beta_slow")?.unwrap_or(1.0) as f32,
                original_length: keys.positive("original_max_position_embeddings")?.unwrap_or(max_positions as f64)
                    as f32,
            })
        }
        other => Err(keys.fail(
            key,
            format!("the scaling \"{other}\" is not supported: expected \"default\", \"llama3\" or \"yarn\""),
        )),
    }
}

/// The explicit factor, or the ratio that `mscale` and `mscale_all_dim` give (DeepSeek's spelling), or none.
fn yarn_attention_factor(keys: &Keys<'_>, factor: f64) -> Result<Option<f32>> {
    if let Some(explicit) = keys.positive("attention_factor")? {
        return Ok(Some(explicit as f32));
    }
    let nonzero = |key: &str| keys.number(key).map(|scale| scale.filter(|scale| *scale != 0.0));
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
        (Some(scale), Some(all)) => Ok(Some((magnitude(scale) / magnitude(all)) as f32)),
        _ => Ok(None),
    }
}

/// Sets `rope_theta` and `rope_scaling`.
pub(super) fn write(json: &mut Map<String, Value>, theta: f32, scaling: &RotaryScaling) {
    json.insert("rope_theta".to_owned(), number(theta));
    let scaling = match *scaling {
        RotaryScaling::None => Value::Null,
        RotaryScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_length } => json!({
            "rope_type": "llama3",
            "factor": number(factor),
            "low_freq_factor": number(low_frequency_factor),
            "high_freq_factor": number(high_frequency_factor),
            "original_max_position_embeddings": original_length as u64,
        }),
        RotaryScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_length } => {
            let mut yarn = json!({
                "rope_type": "yarn",
                "factor": number(factor),
                "beta_fast": number(beta_fast),
                "beta_slow": number(beta_slow),
                "original_max_position_embeddings": original_length as u64,
            });
            if let Some(attention_factor) = attention_factor {
                yarn["attention_factor"] = number(attention_factor);
            }
            yarn
        }
    };
    json.insert("rope_scaling".to_owned(), scaling);
}

/// The shortest decimal that is this f32: 1e-5 rather than 9.999999747378752e-6.
pub(super) fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
