//! What a model is made of: the normal form of every configuration that we read.

use autograd::ops::RotaryScaling;

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
    pub source: serde_json::Map<String, serde_json::Value>,
}
