//! GGUF files of the `llama` architecture (Llama and Mistral models) as Hugging Face configurations and tensors.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{GgufFile, GgufTensor, MetadataValue};
use crate::{Error, Result};

/// A GGUF file read as a Llama.
#[derive(Debug)]
pub(crate) struct LlamaGguf {
    pub(crate) file: GgufFile,
    /// `config.json`.
    pub(crate) config: Map<String, Value>,
    heads: usize,
    key_value_heads: usize,
}

/// Where a parameter comes from.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) tensor: GgufTensor,
    /// Heads whose rows are interleaved, for queries and keys.
    interleaved_heads: Option<usize>,
}

impl LlamaGguf {
    /// Reads the configuration.
    pub(crate) fn new(file: GgufFile) -> Result<Self> {
        let architecture = file.required("general.architecture", file.text("general.architecture")?)?;
        if architecture != "llama" {
            let problem = format!("\"{architecture}\" is not supported: expected \"llama\" (Llama and Mistral models)");
            return Err(file.fail("general.architecture", problem));
        }
        if file.integer("llama.expert_count")?.unwrap_or(0) > 0 {
            return Err(file.fail("llama.expert_count", "mixtures of experts are not supported"));
        }
        let positive = |key: &str| -> Result<Option<u32>> {
            match file.integer(key)? {
                Some(0) => {
                    Err(file.fail(key, "is 0: expected 1 or more; the file is damaged, or of another kind of model"))
                }
                size => Ok(size),
            }
        };
        let size = |key: &str| -> Result<u32> { file.required(key, positive(key)?) };
        let heads = size("llama.attention.head_count")?;
        let key_value_heads = positive("llama.attention.head_count_kv")?.unwrap_or(heads);
        let hidden = size("llama.embedding_length")?;
        let head_size = positive("llama.attention.key_length")?.unwrap_or(hidden / heads);
        if file.integer("llama.rope.dimension_count")?.is_some_and(|rotated| rotated != head_size) {
            let problem = format!("expected the head size {head_size}: rotating a part of the head is not supported");
            return Err(file.fail("llama.rope.dimension_count", problem));
        }
        let vocabulary = match positive("llama.vocab_size")? {
            Some(size) => size,
            None => file
                .required(
                    "tokenizer.ggml.tokens",
                    file.value("tokenizer.ggml.tokens").and_then(MetadataValue::as_list),
                )?
                .len() as u32,
        };
        let positions = size("llama.context_length")?;
        let has = |name: &str| file.tensor(name).is_some();
        let mut config = object(json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": has("blk.0.attn_q.bias"),
            "attention_dropout": 0.0,
            "bos_token_id": file.integer("tokenizer.ggml.bos_token_id")?,
            "eos_token_id": file.integer("tokenizer.ggml.eos_token_id")?,
            "pad_token_id": file.integer("tokenizer.ggml.padding_token_id")?,
            "head_dim": head_size,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": size("llama.feed_forward_length")?,
            "max_position_embeddings": positions,
            "mlp_bias": has("blk.0.ffn_gate.bias"),
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": size("llama.block_count")?,
            "num_key_value_heads": key_value_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": decimal(file.required(
                "llama.attention.layer_norm_rms_epsilon",
                file.number("llama.attention.layer_norm_rms_epsilon")?,
            )?),
            "rope_scaling": rope_scaling(&file, positions)?,
            "rope_theta": decimal(file.number("llama.rope.freq_base")?.unwrap_or(10_000.0)),
            "tie_word_embeddings": !has("output.weight"),
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": vocabulary,
        }));
        if config["pad_token_id"].is_null() {
            config.shift_remove("pad_token_id");
        }
        Ok(Self { config, heads: heads as usize, key_value_heads: key_value_heads as usize, file })
    }

    /// The parameters that the file holds, by canonical name.
    pub(crate) fn sources(&self) -> Result<BTreeMap<String, Source>> {
        let mut sources = BTreeMap::new();
        for tensor in self.file.tensors() {
            let Some(name) = canonical_name(&tensor.name) else {
                if tensor.name == "rope_freqs.weight" {
                    continue;
                }
                let problem = "is no tensor of a Llama: the file belongs to another kind of model";
                return Err(Error::tensor(self.file.path(), &tensor.name, problem));
            };
            let interleaved_heads = if name.contains(".q_proj.") {
                Some(self.heads)
            } else if name.contains(".k_proj.") {
                Some(self.key_value_heads)
            } else {
                None
            };
            sources.insert(name, Source { tensor: tensor.clone(), interleaved_heads });
        }
        Ok(sources)
    }

    /// A parameter's values in the order that Hugging Face stores them.
    pub(crate) fn read(&self, source: &Source) -> Result<Vec<f32>> {
        let values = self.file.read(&source.tensor)?;
        let rows = source.tensor.shape.first().copied().unwrap_or(0);
        match source.interleaved_heads {
            None => Ok(values),
            Some(heads) if rows > 0 && rows.is_multiple_of(2 * heads) => Ok(deinterleaved(&values, rows, heads)),
            Some(heads) => {
                let problem = format!("{rows} rows are no even number for each of {heads} heads");
                Err(Error::tensor(self.file.path(), &source.tensor.name, problem))
            }
        }
    }
}

/// llama.cpp stores the rows of each query and key head as pairs that its rotary embedding turns together; Hugging Face
/// has the first of all pairs, then the second of all.
fn deinterleaved(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    let head_size = rows / heads;
    let mut output = Vec::with_capacity(values.len());
    for head in 0..heads {
        for row in 0..head_size {
            let (part, pair) = (row / (head_size / 2), row % (head_size / 2));
            let source = head * head_size + 2 * pair + part;
            output.extend_from_slice(&values[source * columns..(source + 1) * columns]);
        }
    }
    output
}

fn canonical_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (part, kind) = rest.split_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{part}.{kind}"))
}

fn rope_scaling(file: &GgufFile, positions: u32) -> Result<Value> {
    const KEY: &str = "llama.rope.scaling.type";
    let original = file.integer("llama.rope.scaling.original_context_length")?.unwrap_or(positions);
    match file.text(KEY)?.unwrap_or("none") {
        "none" => match file.tensor("rope_freqs.weight") {
            Some(tensor) => llama3_scaling(file, tensor),
            None => Ok(Value::Null),
        },
        "yarn" => {
            let factor = file.required("llama.rope.scaling.factor", file.number("llama.rope.scaling.factor")?)?;
            Ok(json!({
                "rope_type": "yarn", "factor": decimal(factor), "original_max_position_embeddings": original,
            }))
        }
        other => Err(file.fail(KEY, format!("\"{other}\" is not supported: expected \"none\" or \"yarn\""))),
    }
}

/// Llama 3's scaling is stored as the divisor of each frequency. Its rule has four numbers, of which all released
/// models share three; the fourth is the greatest divisor. Accepted if the rule then gives the stored divisors.
fn llama3_scaling(file: &GgufFile, tensor: &GgufTensor) -> Result<Value> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL: f64 = 8192.0;
    let divisors = file.read(tensor)?;
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let theta = file.number("llama.rope.freq_base")?.unwrap_or(10_000.0);
    for (pair, divisor) in divisors.iter().enumerate() {
        let wavelength = std::f64::consts::TAU * theta.powf(pair as f64 / divisors.len() as f64);
        let expected = if wavelength < ORIGINAL / HIGH {
            1.0
        } else if wavelength > ORIGINAL / LOW {
            factor
        } else {
            let smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        let agrees = (f64::from(*divisor) - expected).abs() <= 1e-3 * expected;
        if !agrees {
            let problem = format!("divisor {pair} is {divisor}, Llama 3's rule gives {expected}: not supported");
            return Err(Error::tensor(file.path(), &tensor.name, problem));
        }
    }
    Ok(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL as u32,
    }))
}

/// A number that was stored as f32 by its shortest decimal: 1e-5 rather than 9.999999747378752e-6.
fn decimal(value: f64) -> Value {
    json!((value as f32).to_string().parse::<f64>().unwrap_or(value))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_are_put_back_into_halves() {
        // Two heads of four rows of one column: stored (0, 2, 1, 3) means pairs (0, 2) and (1, 3).
        let stored = [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0];
        assert_eq!(deinterleaved(&stored, 8, 2), [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]);
        let two_columns: Vec<f32> = stored.iter().flat_map(|value| [*value, value + 0.5]).collect();
        let expected: Vec<f32> =
            [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0].iter().flat_map(|value| [*value, value + 0.5]).collect();
        assert_eq!(deinterleaved(&two_columns, 8, 2), expected);
    }

    #[test]
    fn names_are_translated() {
        assert_eq!(canonical_name("blk.7.ffn_down.weight").unwrap(), "model.layers.7.mlp.down_proj.weight");
        assert_eq!(canonical_name("blk.0.attn_q.bias").unwrap(), "model.layers.0.self_attn.q_proj.bias");
        assert_eq!(canonical_name("output.weight").unwrap(), "lm_head.weight");
        assert_eq!(canonical_name("blk.0.ssm_a"), None);
        assert_eq!(canonical_name("blk.x.attn_q.weight"), None);
    }
}
