//! Which parameters a configuration has: names, shapes, and what training does to them.

use autograd::DType;

use crate::checkpoint::ParameterSpec;
use crate::config::{MambaConfig, MixerKind, ModelConfig};

/// Every parameter of the model in the order of its table: embedding, layers, final norm, head.
///
/// `matrix_dtype` says in which type a matrix of that name is kept in memory. Vectors, convolutions and the
/// state-space parameters are always f32: they are small, and the scan wants them exact. Weight decay applies to
/// matrices and convolutions, not to norms, biases, `A_log` and `D` (Fast-LLM's groups).
pub fn parameter_specs(config: &ModelConfig, matrix_dtype: impl Fn(&str) -> DType) -> Vec<ParameterSpec> {
    let mut specs = Specs { specs: Vec::new(), matrix_dtype };
    let hidden = config.hidden_size;
    specs.matrix("model.embed_tokens.weight".to_owned(), config.vocabulary_size, hidden);
    for (layer, mixer) in config.mixers.iter().enumerate() {
        let prefix = format!("model.layers.{layer}.");
        match mixer {
            MixerKind::Identity => continue,
            MixerKind::Attention => specs.attention(config, &format!("{prefix}self_attn.")),
            MixerKind::Mamba => {
                if let Some(mamba) = &config.mamba {
                    specs.mamba(mamba, hidden, &format!("{prefix}mixer."));
                }
            }
        }
        for (name, rows, columns) in [
            ("gate_proj", config.intermediate_size, hidden),
            ("up_proj", config.intermediate_size, hidden),
            ("down_proj", hidden, config.intermediate_size),
        ] {
            specs.linear(&format!("{prefix}mlp.{name}"), rows, columns, config.mlp_bias);
        }
        specs.vector(format!("{prefix}input_layernorm.weight"), &[hidden]);
        specs.vector(format!("{prefix}post_attention_layernorm.weight"), &[hidden]);
    }
    specs.vector("model.norm.weight".to_owned(), &[hidden]);
    if !config.tied_embeddings {
        specs.matrix("lm_head.weight".to_owned(), config.vocabulary_size, hidden);
    }
    specs.specs
}

/// The keys of `config.json` that the shape of a parameter follows from, for messages.
pub fn size_keys(name: &str) -> &'static str {
    if name.contains(".mixer.") {
        "ssm_cfg and hidden_size"
    } else if name.contains(".self_attn.") {
        "num_attention_heads, num_key_value_heads, head_dim and hidden_size"
    } else if name.contains(".mlp.") {
        "intermediate_size and hidden_size"
    } else if name.contains("embed_tokens") || name.starts_with("lm_head") {
        "vocab_size and hidden_size"
    } else {
        "hidden_size"
    }
}

struct Specs<F> {
    specs: Vec<ParameterSpec>,
    matrix_dtype: F,
}

impl<F: Fn(&str) -> DType> Specs<F> {
    fn attention(&mut self, config: &ModelConfig, prefix: &str) {
        let queries = config.attention_heads * config.head_size;
        let keys = config.key_value_heads * config.head_size;
        for (name, rows, columns) in [
            ("q_proj", queries, config.hidden_size),
            ("k_proj", keys, config.hidden_size),
            ("v_proj", keys, config.hidden_size),
            ("o_proj", config.hidden_size, queries),
        ] {
            self.linear(&format!("{prefix}{name}"), rows, columns, config.attention_bias);
        }
    }

    fn mamba(&mut self, mamba: &MambaConfig, hidden: usize, prefix: &str) {
        let conv_channels = if mamba.repeat_before_conv { mamba.d_inner } else { mamba.d_xb };
        self.linear(&format!("{prefix}in_proj"), 2 * (mamba.d_inner + mamba.d_xb), hidden, false);
        self.linear(&format!("{prefix}dt_in_proj"), mamba.dt_rank, hidden, false);
        self.linear(&format!("{prefix}dt_proj"), mamba.d_inner, mamba.dt_rank, mamba.dt_proj_bias);
        self.push(format!("{prefix}conv1d.weight"), &[conv_channels, 1, mamba.d_conv], DType::F32, true);
        if mamba.conv_bias {
            self.vector(format!("{prefix}conv1d.bias"), &[conv_channels]);
        }
        self.vector(format!("{prefix}A_log"), &[mamba.d_inner, mamba.d_state]);
        self.vector(format!("{prefix}D"), &[mamba.d_inner]);
        self.linear(&format!("{prefix}out_proj"), hidden, mamba.d_inner, false);
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize, bias: bool) {
        self.matrix(format!("{name}.weight"), rows, columns);
        if bias {
            self.vector(format!("{name}.bias"), &[rows]);
        }
    }

    fn matrix(&mut self, name: String, rows: usize, columns: usize) {
        let dtype = (self.matrix_dtype)(&name);
        self.push(name, &[rows, columns], dtype, true);
    }

    /// A parameter kept in f32 and never decayed.
    fn vector(&mut self, name: String, shape: &[usize]) {
        self.push(name, shape, DType::F32, false);
    }

    fn push(&mut self, name: String, shape: &[usize], dtype: DType, decay: bool) {
        self.specs.push(ParameterSpec { name, shape: shape.to_vec(), dtype, trainable: true, decay });
    }
}
