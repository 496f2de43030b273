//! Grouped-query attention with rotary positions, and its cache of keys and values.

use autograd::ops::{self, AttentionOptions, CacheStep, RotaryTable};
use autograd::{DType, ParameterId, Parameters, Tape, Tensor, Var};

use super::find;
use crate::Result;
use crate::batch::TokenBatch;
use crate::config::ModelConfig;

/// The attention of one layer: four projections, rotary embedding, causal grouped-query attention.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `[query heads · head size, hidden]`.
    pub query: Projection,
    /// `[key heads · head size, hidden]`.
    pub key: Projection,
    /// `[key heads · head size, hidden]`.
    pub value: Projection,
    /// `[hidden, query heads · head size]`.
    pub output: Projection,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Dimensions of a head.
    pub head_size: usize,
    /// Rotation frequencies.
    pub rotary: RotaryTable,
    /// Keys that a query sees, itself included.
    pub window: Option<usize>,
}

/// A linear layer's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Projection {
    /// `[out, in]`.
    pub weight: ParameterId,
    /// `[out]`.
    pub bias: Option<ParameterId>,
}

/// Keys (rotated) and values of the positions so far. Room grows by doubling.
#[derive(Clone, Debug)]
pub struct AttentionCache {
    /// `[batch, room, key heads, head size]`.
    keys: Tensor,
    /// `[batch, room, key heads, head size]`.
    values: Tensor,
}

impl Projection {
    /// The projection whose parameters are `{prefix}{name}.weight` and, if there is one, `{prefix}{name}.bias`.
    ///
    /// # Errors
    /// A weight that is not in the table.
    pub fn new(parameters: &Parameters, prefix: &str, name: &str) -> Result<Self> {
        Ok(Self {
            weight: find(parameters, prefix, &format!("{name}.weight"))?,
            bias: parameters.find(&format!("{prefix}{name}.bias")),
        })
    }

    /// `x Wᵀ + bias`.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn apply(&self, tape: &Tape<'_>, parameters: &Parameters, input: &Var) -> Result<Var> {
        let weight = parameters.var(tape, self.weight);
        let bias = self.bias.map(|bias| parameters.var(tape, bias));
        Ok(ops::linear(tape, input, &weight, bias.as_ref())?)
    }

    /// `residual + x Wᵀ + bias`.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn apply_onto(&self, tape: &Tape<'_>, parameters: &Parameters, residual: &Var, input: &Var) -> Result<Var> {
        let weight = parameters.var(tape, self.weight);
        let bias = self.bias.map(|bias| parameters.var(tape, bias));
        Ok(ops::linear_residual(tape, residual, input, &weight, bias.as_ref())?)
    }

    /// [`Projection::apply_onto`] where there is a residual, [`Projection::apply`] elsewhere.
    pub(super) fn apply_after(
        &self,
        tape: &Tape<'_>,
        parameters: &Parameters,
        residual: Option<&Var>,
        input: &Var,
    ) -> Result<Var> {
        match residual {
            Some(residual) => self.apply_onto(tape, parameters, residual, input),
            None => self.apply(tape, parameters, input),
        }
    }
}

impl Attention {
    /// The attention whose parameters are named `{prefix}q_proj.weight` and so on.
    ///
    /// # Errors
    /// A parameter that is not in the table; a rotary scaling that makes no sense.
    pub fn new(config: &ModelConfig, parameters: &Parameters, prefix: &str) -> Result<Self> {
        Ok(Self {
            query: Projection::new(parameters, prefix, "q_proj")?,
            key: Projection::new(parameters, prefix, "k_proj")?,
            value: Projection::new(parameters, prefix, "v_proj")?,
            output: Projection::new(parameters, prefix, "o_proj")?,
            heads: config.attention_heads,
            key_value_heads: config.key_value_heads,
            head_size: config.head_size,
            rotary: RotaryTable::new(config.head_size, config.rope_theta, config.rope_scaling)?,
            window: config.sliding_window,
        })
    }

    /// Whole sequences, `[batch, time, hidden]` to the same.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn forward(&self, tape: &Tape<'_>, parameters: &Parameters, input: &Var, batch: &TokenBatch) -> Result<Var> {
        let (query, key, value) = self.project(tape, parameters, input, &batch.positions)?;
        self.attend(tape, parameters, &query, &key, &value, batch)
    }

    /// As [`Attention::forward`], without a tape, and with the keys and values.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn prefill(
        &self,
        parameters: &Parameters,
        input: &Tensor,
        batch: &TokenBatch,
    ) -> Result<(Tensor, AttentionCache)> {
        let tape = Tape::inference();
        let (query, key, value) = self.project(&tape, parameters, &Var::constant(input), &batch.positions)?;
        let output = self.attend(&tape, parameters, &query, &key, &value, batch)?;
        // The CPU's way reads caches in place, in f32.
        let dtype = if input.device().is_cpu() { DType::F32 } else { key.dtype() };
        let cache = AttentionCache { keys: key.cast(dtype)?, values: value.cast(dtype)? };
        Ok((output.tensor().clone(), cache))
    }

    /// One token per row: `[batch, 1, hidden]` to the same, added to `residual` where there is one; `positions` u32 `[batch, 1]`,
    /// for which the cache has room.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn step(
        &self,
        parameters: &Parameters,
        input: &Tensor,
        residual: Option<&Var>,
        positions: &Tensor,
        cache: &mut AttentionCache,
    ) -> Result<Tensor> {
        let tape = Tape::inference();
        let (input, batch) = (Var::constant(input), input.shape()[0]);
        let heads = |projection: &Projection, heads: usize| -> Result<Tensor> {
            Ok(projection.apply(&tape, parameters, &input)?.tensor().reshape(&[batch, 1, heads, self.head_size])?)
        };
        let step = CacheStep {
            query: &heads(&self.query, self.heads)?,
            key: &heads(&self.key, self.key_value_heads)?,
            value: &heads(&self.value, self.key_value_heads)?,
            positions,
            rotary: &self.rotary,
        };
        let query = ops::extend_cache(&mut cache.keys, &mut cache.values, step)?;
        let mixed = ops::attention_step(&query, &cache.keys, &cache.values, positions, self.scale(), self.window)?;
        let merged = Var::constant(&mixed.reshape(&[batch, 1, self.heads * self.head_size])?);
        Ok(self.output.apply_after(&tape, parameters, residual, &merged)?.tensor().clone())
    }

    /// Rotated queries and keys, and values: `[batch, time, heads, head size]` each.
    fn project(
        &self,
        tape: &Tape<'_>,
        parameters: &Parameters,
        input: &Var,
        positions: &Tensor,
    ) -> Result<(Var, Var, Var)> {
        let (batch, time) = (input.shape()[0], input.shape()[1]);
        let heads = |projection: &Projection, heads: usize| -> Result<Var> {
            let flat = projection.apply(tape, parameters, input)?;
            Ok(flat.reshape(tape, &[batch, time, heads, self.head_size])?)
        };
        let query = ops::rope(tape, &heads(&self.query, self.heads)?, positions, &self.rotary)?;
        let key = ops::rope(tape, &heads(&self.key, self.key_value_heads)?, positions, &self.rotary)?;
        Ok((query, key, heads(&self.value, self.key_value_heads)?))
    }

    fn attend(
        &self,
        tape: &Tape<'_>,
        parameters: &Parameters,
        query: &Var,
        key: &Var,
        value: &Var,
        batch: &TokenBatch,
    ) -> Result<Var> {
        let options = AttentionOptions {
            scale: self.scale(),
            document_start: batch.document_start.as_ref(),
            window: self.window,
        };
        let mixed = ops::attention(tape, query, key, value, options)?;
        let merged = mixed.reshape(tape, &[batch.batch(), batch.time(), self.heads * self.head_size])?;
        self.output.apply(tape, parameters, &merged)
    }

    fn scale(&self) -> f32 {
        (self.head_size as f32).powf(-0.5)
    }
}

impl AttentionCache {
    /// Bytes of the keys and values of `length` positions (room to grow not counted).
    pub fn bytes(&self, length: usize) -> usize {
        let shape = self.keys.shape();
        2 * shape[0] * length * shape[2] * shape[3] * self.keys.dtype().size()
    }

    /// The tensors, for tests that watch whether they stay in place.
    #[cfg(test)]
    pub(super) fn tensors(&self) -> [&Tensor; 2] {
        [&self.keys, &self.values]
    }

    /// Makes room for `length` positions; whether that moved the cache.
    pub(super) fn reserve(&mut self, length: usize) -> Result<bool> {
        /// The least room to grow to.
        const LEAST: usize = 64;
        let room = self.keys.shape()[1];
        if length <= room {
            return Ok(false);
        }
        let room = length.max(2 * room).max(LEAST);
        self.keys = ops::with_room(&self.keys, room)?;
        self.values = ops::with_room(&self.values, room)?;
        Ok(true)
    }
}
