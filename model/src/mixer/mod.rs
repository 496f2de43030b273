//! What mixes tokens in a layer: attention, Mamba, or nothing.
//!
//! A mixer is built from a configuration and the parameter table, computes whole sequences for training, and owns the
//! form of its cache for decoding.

mod attention;
mod mamba;

pub use attention::{Attention, AttentionCache, Projection};
use autograd::{Parameters, Tape, Tensor, Var};
pub use mamba::{Mamba, MambaCache};

use crate::batch::TokenBatch;
use crate::config::{MixerKind, ModelConfig};
use crate::{Error, Result};

/// The mixer of one layer.
#[derive(Clone, Debug)]
pub enum Mixer {
    /// Grouped-query attention.
    Attention(Attention),
    /// The M1-style Mamba mixer.
    Mamba(Mamba),
}

/// What a mixer remembers between decoding steps.
#[derive(Clone, Debug)]
pub enum MixerCache {
    /// Keys and values of all positions.
    Attention(AttentionCache),
    /// Convolution and state-space state.
    Mamba(MambaCache),
}

impl Mixer {
    /// The mixer of layer `layer`; `None` where the whole layer is the identity.
    ///
    /// # Errors
    /// A parameter that is not in the table.
    pub fn new(config: &ModelConfig, parameters: &Parameters, layer: usize) -> Result<Option<Self>> {
        Ok(match config.mixers[layer] {
            MixerKind::Attention => {
                let prefix = format!("model.layers.{layer}.self_attn.");
                Some(Self::Attention(Attention::new(config, parameters, &prefix)?))
            }
            MixerKind::Mamba => {
                let geometry = config.mamba.as_ref().ok_or_else(|| Error::Batch {
                    message: format!("layer {layer} is a Mamba layer but the configuration has no Mamba geometry"),
                })?;
                let prefix = format!("model.layers.{layer}.mixer.");
                Some(Self::Mamba(Mamba::new(geometry, parameters, &prefix)?))
            }
            MixerKind::Identity => None,
        })
    }

    /// Whole sequences, `[batch, time, hidden]` to the same.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn forward(&self, tape: &Tape<'_>, parameters: &Parameters, input: &Var, batch: &TokenBatch) -> Result<Var> {
        match self {
            Self::Attention(attention) => attention.forward(tape, parameters, input, batch),
            Self::Mamba(mamba) => mamba.forward(tape, parameters, input, batch),
        }
    }

    /// As [`Mixer::forward`], without a tape, and with the cache to decode from.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn prefill(&self, parameters: &Parameters, input: &Tensor, batch: &TokenBatch) -> Result<(Tensor, MixerCache)> {
        Ok(match self {
            Self::Attention(attention) => {
                let (output, cache) = attention.prefill(parameters, input, batch)?;
                (output, MixerCache::Attention(cache))
            }
            Self::Mamba(mamba) => {
                let (output, cache) = mamba.prefill(parameters, input, batch)?;
                (output, MixerCache::Mamba(cache))
            }
        })
    }

    /// One token per row: `[batch, 1, hidden]` to the same, added to `residual` where there is one; `positions` u32 `[batch, 1]`,
    /// for which the cache has room.
    ///
    /// # Errors
    /// Those of the operators; [`Error::Batch`] when the cache belongs to another kind of mixer.
    pub fn step(
        &self,
        parameters: &Parameters,
        input: &Tensor,
        residual: Option<&Var>,
        positions: &Tensor,
        cache: &mut MixerCache,
    ) -> Result<Tensor> {
        match (self, cache) {
            (Self::Attention(attention), MixerCache::Attention(cache)) => {
                attention.step(parameters, input, residual, positions, cache)
            }
            (Self::Mamba(mamba), MixerCache::Mamba(cache)) => mamba.step(parameters, input, residual, cache),
            _ => Err(Error::Batch { message: "the cache was made by another kind of mixer".to_owned() }),
        }
    }
}

impl MixerCache {
    /// Bytes of the cache's contents after `length` tokens.
    pub fn bytes(&self, length: usize) -> usize {
        match self {
            Self::Attention(cache) => cache.bytes(length),
            Self::Mamba(cache) => cache.bytes(),
        }
    }

    /// The tensors, for tests that watch whether they stay in place.
    #[cfg(test)]
    pub(crate) fn tensors(&self) -> [&Tensor; 2] {
        match self {
            Self::Attention(cache) => cache.tensors(),
            Self::Mamba(cache) => [&cache.conv, &cache.state],
        }
    }

    /// Makes room for `length` tokens; whether that moved the cache.
    ///
    /// # Errors
    /// Out of memory.
    pub fn reserve(&mut self, length: usize) -> Result<bool> {
        match self {
            Self::Attention(cache) => cache.reserve(length),
            Self::Mamba(_) => Ok(false),
        }
    }
}

/// The parameter of that name.
fn find(parameters: &Parameters, prefix: &str, name: &str) -> Result<autograd::ParameterId> {
    let full = format!("{prefix}{name}");
    parameters.find(&full).ok_or(Error::NoSuchParameter { name: full })
}
