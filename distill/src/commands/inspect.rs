//! `grafter inspect`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use model::config::{MixerKind, ModelConfig};
use model::{Model, Precision};
use runtime::Device;
use serde::Serialize;

use super::{done, output};

const EXAMPLES: &str = "\
Example:
  grafter inspect runs/first/model --json";

/// Bytes of a number in the caches: keys, values and states are kept in f32.
const CACHE_NUMBER: usize = size_of::<f32>();

/// Show what a model is made of, reading and checking every weight
///
/// Layers with their mixers and parameters, memory for weights, and what decoding remembers: attention keeps keys and
/// values of every token, a Mamba mixer a state that does not grow.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Folder of the model
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a model is made of.
#[derive(Debug, Serialize)]
struct Inspection {
    model_type: String,
    hidden_size: usize,
    vocabulary_size: usize,
    max_positions: usize,
    tied_embeddings: bool,
    /// Numbers in all weights.
    parameters: u64,
    /// Bytes of the weights in memory for inference.
    weight_bytes: u64,
    /// Bytes that the caches of one sequence grow by with every token.
    cache_bytes_per_token: usize,
    /// Bytes that the caches of one sequence have whatever its length.
    cache_bytes_per_sequence: usize,
    layers: Vec<LayerInspection>,
}

#[derive(Debug, Serialize)]
struct LayerInspection {
    layer: usize,
    mixer: &'static str,
    parameters: u64,
    mixer_parameters: u64,
    weight_bytes: u64,
    cache_bytes_per_token: usize,
    cache_bytes_per_sequence: usize,
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    // Loading reads every weight and refuses what is missing, misshapen or not finite.
    let model = Model::load(&arguments.model, &Device::cpu(), Precision::AsStored)?;
    let inspection = inspect(&model);
    if arguments.json {
        output::json(&inspection)?;
    } else {
        print(&inspection)?;
    }
    done()
}

fn inspect(model: &Model) -> Inspection {
    let config = &model.config;
    let layers: Vec<LayerInspection> = (0..config.mixers.len()).map(|layer| inspect_layer(model, layer)).collect();
    let (parameters, weight_bytes) = sizes(model, "");
    Inspection {
        model_type: config.source.get("model_type").and_then(|value| value.as_str()).unwrap_or_default().to_owned(),
        hidden_size: config.hidden_size,
        vocabulary_size: config.vocabulary_size,
        max_positions: config.max_positions,
        tied_embeddings: config.tied_embeddings,
        parameters,
        weight_bytes,
        cache_bytes_per_token: layers.iter().map(|layer| layer.cache_bytes_per_token).sum(),
        cache_bytes_per_sequence: layers.iter().map(|layer| layer.cache_bytes_per_sequence).sum(),
        layers,
    }
}

fn inspect_layer(model: &Model, layer: usize) -> LayerInspection {
    let prefix = format!("model.layers.{layer}.");
    let (parameters, weight_bytes) = sizes(model, &prefix);
    let mixer_parameters = sizes(model, &format!("{prefix}self_attn.")).0 + sizes(model, &format!("{prefix}mixer.")).0;
    let (mixer, cache_bytes_per_token, cache_bytes_per_sequence) = cache(&model.config, layer);
    LayerInspection {
        layer,
        mixer,
        parameters,
        mixer_parameters,
        weight_bytes,
        cache_bytes_per_token,
        cache_bytes_per_sequence,
    }
}

/// A layer's kind, and the bytes of its cache per token and per sequence.
fn cache(config: &ModelConfig, layer: usize) -> (&'static str, usize, usize) {
    match (config.mixers[layer], &config.mamba) {
        (MixerKind::Attention, _) => ("attention", 2 * config.key_value_heads * config.head_size * CACHE_NUMBER, 0),
        (MixerKind::Mamba, Some(mamba)) => {
            let conv_channels = if mamba.repeat_before_conv { mamba.d_inner } else { mamba.d_xb };
            ("mamba", 0, (conv_channels * mamba.d_conv + mamba.d_inner * mamba.d_state) * CACHE_NUMBER)
        }
        (MixerKind::Mamba, None) | (MixerKind::Identity, _) => ("identity", 0, 0),
    }
}

/// Numbers and bytes of the parameters whose names begin with `prefix`.
fn sizes(model: &Model, prefix: &str) -> (u64, u64) {
    model.parameters.iter().filter(|(_, parameter)| parameter.name.starts_with(prefix)).fold(
        (0, 0),
        |(numbers, bytes), (_, parameter)| {
            let count = parameter.value.count() as u64;
            (numbers + count, bytes + count * parameter.value.dtype().size() as u64)
        },
    )
}

fn print(inspection: &Inspection) -> Result<()> {
    output::line(&format!(
        "{}  {} layers  hidden {}  vocabulary {}{}  positions {}",
        inspection.model_type,
        inspection.layers.len(),
        inspection.hidden_size,
        inspection.vocabulary_size,
        if inspection.tied_embeddings { " (tied)" } else { "" },
        inspection.max_positions
    ))?;
    output::line("")?;
    output::line(
        "layer  mixer           parameters   of the mixer       weights  cache per token  cache per sequence",
    )?;
    for layer in &inspection.layers {
        output::line(&format!(
            "{:>5}  {:<10} {:>15} {:>14} {:>13} {:>16} {:>19}",
            layer.layer,
            layer.mixer,
            output::thousands(layer.parameters),
            output::thousands(layer.mixer_parameters),
            output::bytes(layer.weight_bytes),
            output::bytes(layer.cache_bytes_per_token as u64),
            output::bytes(layer.cache_bytes_per_sequence as u64)
        ))?;
    }
    output::line("")?;
    output::line(&format!("parameters          {}", output::thousands(inspection.parameters)))?;
    output::line(&format!("weights in memory   {}", output::bytes(inspection.weight_bytes)))?;
    output::line(&format!("cache per token     {}", output::bytes(inspection.cache_bytes_per_token as u64)))?;
    output::line(&format!("cache per sequence  {}", output::bytes(inspection.cache_bytes_per_sequence as u64)))?;
    output::line("every weight was read and is finite")
}

#[cfg(test)]
mod tests {
    use model::TokenBatch;
    use model::initialise::{GraftOptions, Start, graft};
    use serde_json::json;

    use super::*;

    #[test]
    fn the_sizes_are_those_of_the_real_caches_and_weights() {
        let source = json!({
            "model_type": "mistral", "hidden_size": 32, "head_dim": 16, "intermediate_size": 40,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 20,
        });
        let config = ModelConfig::from_json(source.as_object().unwrap()).unwrap();
        let teacher = Model::random(config, 1, &Device::cpu()).unwrap();
        let hybrid = graft(&teacher, &teacher, &[1], &GraftOptions { seed: 0, start: Start::Paper }).unwrap();
        for model in [&teacher, &hybrid] {
            let inspection = inspect(model);
            for tokens in [1, 7] {
                let batch = TokenBatch::new(&Device::cpu(), &[vec![3; tokens]], None).unwrap();
                let (_, cache) = model.prefill(&batch).unwrap();
                let expected = inspection.cache_bytes_per_sequence + tokens * inspection.cache_bytes_per_token;
                assert_eq!(cache.bytes(), expected);
            }
            let numbers: usize = model.parameters.iter().map(|(_, parameter)| parameter.value.count()).sum();
            assert_eq!((inspection.parameters, inspection.weight_bytes), (numbers as u64, 4 * numbers as u64));
            let outside = sizes(model, "model.embed").0 + sizes(model, "model.norm").0 + sizes(model, "lm_head").0;
            assert_eq!(inspection.layers.iter().map(|layer| layer.parameters).sum::<u64>() + outside, numbers as u64);
        }
        let inspection = inspect(&hybrid);
        assert_eq!(inspection.layers[1].mixer, "mamba");
        assert_eq!(inspection.layers[0].mixer_parameters, 2 * 64 * 32 + 2 * 32 * 32);
    }
}
