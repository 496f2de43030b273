//! What a model is made of: the normal form of every configuration that we read.
//!
//! [`ModelConfig::read`] accepts the Hugging Face configurations of Llama, Mistral and the Apriel hybrids; every other
//! key of the file is kept in [`ModelConfig::source`], and [`ModelConfig::to_json`] gives it back.

mod apriel2;
mod hugging_face;
mod keys;
mod rope;

use std::path::{Path, PathBuf};

use autograd::ops::RotaryScaling;
use keys::Keys;
use serde_json::{Map, Value};

use crate::json;
use crate::{Error, Result};

/// Which Hugging Face class a checkpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`, model type `llama`.
    Llama,
    /// `MistralForCausalLM`, model type `mistral`.
    Mistral,
    /// The Apriel-H1 hybrid under any of its names (`apriel_ssm_thinker_hybrid`, `apriel_hybrid_ssm`,
    /// `apriel_ssm_hybrid`, `apriel2`, `apriel2_text`).
    AprielHybrid,
}

/// What mixes tokens in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MixerKind {
    /// Grouped-query attention (`t`).
    Attention,
    /// The M1-style Mamba mixer (`m2`).
    Mamba,
    /// The whole layer is the identity (`i`).
    Identity,
}

/// Geometry of the Mamba mixer.
#[derive(Clone, Debug, PartialEq)]
pub struct MambaConfig {
    /// Channels of the scan.
    pub d_inner: usize,
    /// Channels of x and of B before they are repeated.
    pub d_xb: usize,
    /// States per channel, and the width of a repeated chunk.
    pub d_state: usize,
    /// Taps of the convolution.
    pub d_conv: usize,
    /// Rank of the step-size projection.
    pub dt_rank: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether dt_proj has a bias (it then enters twice).
    pub dt_proj_bias: bool,
    /// Whether x is repeated before the convolution (the Apriel-H1 layout) or after.
    pub repeat_before_conv: bool,
    /// Least step size at initialisation.
    pub dt_min: f64,
    /// Greatest step size at initialisation.
    pub dt_max: f64,
    /// Floor of the step size at initialisation.
    pub dt_init_floor: f64,
}

/// A model's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The class.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of token ids.
    pub vocabulary_size: usize,
    /// Query heads.
    pub attention_heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Dimensions of a head.
    pub head_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_epsilon: f32,
    /// Base of the rotary embedding.
    pub rope_theta: f32,
    /// Scaling of the rotary embedding.
    pub rope_scaling: RotaryScaling,
    /// Positions that the model was made for.
    pub max_positions: usize,
    /// Keys that a query sees, itself included; `None`: all.
    pub sliding_window: Option<usize>,
    /// Whether the head is the embedding.
    pub tied_embeddings: bool,
    /// Whether q, k, v (and o) projections have biases.
    pub attention_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// The mixer of each layer.
    pub mixers: Vec<MixerKind>,
    /// Geometry of the Mamba mixers; present when a layer has one.
    pub mamba: Option<MambaConfig>,
    /// Token that begins a sequence.
    pub bos_token: Option<u32>,
    /// Tokens that end generation.
    pub eos_tokens: Vec<u32>,
    /// The configuration file as it was read, unknown keys included: what is written back when a model is saved.
    pub source: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder, and the tokens that end generation from `generation_config.json` too
    /// where there is one.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] for files that cannot be read, and for a file in the folder's place;
    /// [`Error::Configuration`] for a key that is missing, of the wrong kind, or not supported.
    pub fn read(folder: &Path) -> Result<Self> {
        json::expect_folder(folder)?;
        let path = folder.join("config.json");
        let mut config = Self::from_json(&json::read_object(&path)?).map_err(in_file(&path))?;
        let path = folder.join("generation_config.json");
        if path.exists() {
            let generation = json::read_object(&path)?;
            let keys = Keys::new(&generation);
            let tokens = keys.tokens("eos_token_id").map_err(in_file(&path))?;
            config.check_tokens(&keys, "eos_token_id", &tokens).map_err(in_file(&path))?;
            for token in tokens {
                if !config.eos_tokens.contains(&token) {
                    config.eos_tokens.push(token);
                }
            }
        }
        Ok(config)
    }

    /// The configuration that a `config.json` describes.
    ///
    /// Where a key is absent the default of the Hugging Face class applies. `mamba.dt_rank` is what the file says (or
    /// the customary `hidden / 16`, rounded up); [`WeightFiles::resolve`](crate::checkpoint::WeightFiles::resolve)
    /// replaces it by what the weights say.
    ///
    /// # Errors
    /// [`Error::Configuration`] for a key that is missing, of the wrong kind, or not supported.
    pub fn from_json(source: &Map<String, Value>) -> Result<Self> {
        let keys = Keys::new(source);
        const SUPPORTED: &str = "supported are \"llama\", \"mistral\", \"apriel_ssm_thinker_hybrid\", \
                                 \"apriel_hybrid_ssm\", \"apriel_ssm_hybrid\", \"apriel2\" and \"apriel2_text\"";
        let Some(model_type) = keys.text("model_type")? else {
            return Err(keys.fail("model_type", format!("this key is missing; {SUPPORTED}")));
        };
        if keys.value("quantization_config").is_some() {
            return Err(keys.fail(
                "quantization_config",
                "quantised weights are not supported: use a checkpoint in float32, bfloat16 or float16",
            ));
        }
        let config = match model_type {
            "llama" => hugging_face::read(&keys, Family::Llama, source),
            "mistral" => hugging_face::read(&keys, Family::Mistral, source),
            "apriel_ssm_thinker_hybrid" | "apriel_hybrid_ssm" | "apriel_ssm_hybrid" => {
                hugging_face::read(&keys, Family::AprielHybrid, source)
            }
            "apriel2" | "apriel2_text" => apriel2::read(&keys, source),
            other => Err(keys.fail("model_type", format!("\"{other}\" is not supported; {SUPPORTED}"))),
        }?;
        config.check_tokens(&keys, "bos_token_id", config.bos_token.as_slice())?;
        config.check_tokens(&keys, "eos_token_id", &config.eos_tokens)?;
        Ok(config)
    }

    /// Refuses token ids that the model has no embedding for.
    fn check_tokens(&self, keys: &Keys<'_>, key: &str, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&token| token as usize >= self.vocabulary_size) {
            Some(token) => {
                let problem =
                    format!("{token} is outside the vocabulary of {} tokens (vocab_size)", self.vocabulary_size);
                Err(keys.fail(key, problem))
            }
            None => Ok(()),
        }
    }

    /// The `config.json` to save: [`ModelConfig::source`] with those keys changed that no longer hold.
    ///
    /// A configuration that was not changed comes back as it was read. A Llama or Mistral model that has got Mamba
    /// layers becomes an `apriel_hybrid_ssm`; hybrids keep their model type.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut json = self.source.clone();
        if let Ok(original) = Self::from_json(&self.source) {
            // The tokens that end generation may come from generation_config.json.
            if (Self { eos_tokens: self.eos_tokens.clone(), ..original }) == *self {
                return json;
            }
        }
        if is_apriel2(&self.source) {
            apriel2::write(self, &mut json);
        } else {
            hugging_face::write(self, &mut json);
        }
        json
    }

    /// Whether tensors are stored under the names of the `apriel2` format.
    pub(crate) fn has_apriel2_names(&self) -> bool {
        is_apriel2(&self.source)
    }

    /// Number of layers with a mixer of that kind.
    pub fn count_mixers(&self, kind: MixerKind) -> usize {
        self.mixers.iter().filter(|mixer| **mixer == kind).count()
    }
}

fn is_apriel2(source: &Map<String, Value>) -> bool {
    source.get("model_type").and_then(Value::as_str).is_some_and(|name| name.starts_with("apriel2"))
}

/// Puts the real path into an error of [`ModelConfig::from_json`].
fn in_file(file: &Path) -> impl FnOnce(Error) -> Error {
    let file: PathBuf = file.to_owned();
    move |error| match error {
        Error::Configuration { key, problem, .. } => Error::Configuration { path: file, key, problem },
        other => other,
    }
}

/// One entry per layer from a layout that may be a pattern: a single entry is for all layers, a shorter list is tiled.
fn tiled<T: Copy>(pattern: &[T], layers: usize) -> Vec<T> {
    pattern.iter().copied().cycle().take(layers).collect()
}

#[cfg(test)]
mod tests;
