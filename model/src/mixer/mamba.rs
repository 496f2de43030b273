//! The M1-style Mamba mixer of Apriel-H1 (M1: Wang et al. 2025; Mamba in the Llama: Wang et al. 2024).
//!
//! The mathematics is Mamba-1 with B and C in groups of `d_state` channels. Two things surprise:
//! - dt_proj's bias enters twice, once in the projection and once as the scan's bias on the step size.
//! - x and B are repeated in chunks of `d_state` channels, not in attention heads.

use autograd::ops::{self, Activation, ConvolutionOptions, MambaStepInputs, ScanInputs};
use autograd::{ParameterId, Parameters, Tape, Tensor, Var};

use super::attention::Projection;
use super::find;
use crate::Result;
use crate::batch::TokenBatch;
use crate::config::MambaConfig;

/// The Mamba mixer of one layer.
#[derive(Clone, Debug)]
pub struct Mamba {
    /// `[2 · d_inner + 2 · d_xb, hidden]`, rows z, x, B, C.
    pub in_proj: Projection,
    /// `[dt_rank, hidden]`.
    pub dt_in_proj: Projection,
    /// `[d_inner, dt_rank]`, and the bias `[d_inner]` that enters twice.
    pub dt_proj: Projection,
    /// `[conv channels, 1, d_conv]`.
    pub conv_weight: ParameterId,
    /// `[conv channels]`.
    pub conv_bias: Option<ParameterId>,
    /// f32 `[d_inner, d_state]`.
    pub a_log: ParameterId,
    /// f32 `[d_inner]`.
    pub d: ParameterId,
    /// `[hidden, d_inner]`.
    pub out_proj: Projection,
    /// Sizes.
    pub geometry: MambaConfig,
}

/// What decoding continues from.
#[derive(Clone, Debug)]
pub struct MambaCache {
    /// f32 `[batch, conv channels, d_conv]`: the last inputs of the convolution, oldest first.
    pub conv: Tensor,
    /// f32 `[batch, d_inner, d_state]`.
    pub state: Tensor,
}

/// What a whole-sequence pass computes on its way.
struct Pass {
    output: Var,
    /// Input of the convolution, `[batch, time, conv channels]`.
    conv_input: Var,
    last_state: Var,
}

impl Mamba {
    /// The mixer whose parameters are named `{prefix}in_proj.weight` and so on.
    ///
    /// # Errors
    /// A parameter that is not in the table.
    pub fn new(geometry: &MambaConfig, parameters: &Parameters, prefix: &str) -> Result<Self> {
        Ok(Self {
            in_proj: Projection::new(parameters, prefix, "in_proj")?,
            dt_in_proj: Projection::new(parameters, prefix, "dt_in_proj")?,
            dt_proj: Projection::new(parameters, prefix, "dt_proj")?,
            conv_weight: find(parameters, prefix, "conv1d.weight")?,
            conv_bias: parameters.find(&format!("{prefix}conv1d.bias")),
            a_log: find(parameters, prefix, "A_log")?,
            d: find(parameters, prefix, "D")?,
            out_proj: Projection::new(parameters, prefix, "out_proj")?,
            geometry: geometry.clone(),
        })
    }

    /// Whole sequences, `[batch, time, hidden]` to the same.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn forward(&self, tape: &Tape<'_>, parameters: &Parameters, input: &Var, batch: &TokenBatch) -> Result<Var> {
        Ok(self.pass(tape, parameters, input, batch.document_start.as_ref())?.output)
    }

    /// As [`Mamba::forward`], without a tape, and with the state to decode from. Rows hold one document each.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn prefill(&self, parameters: &Parameters, input: &Tensor, batch: &TokenBatch) -> Result<(Tensor, MambaCache)> {
        let tape = Tape::inference();
        let pass = self.pass(&tape, parameters, &Var::constant(input), batch.document_start.as_ref())?;
        let conv = ops::convolution_state(&pass.conv_input, self.geometry.d_conv)?;
        Ok((pass.output.tensor().clone(), MambaCache { conv, state: pass.last_state.tensor().clone() }))
    }

    /// One token per row: `[batch, 1, hidden]` to the same, added to `residual` where there is one.
    ///
    /// # Errors
    /// Those of the operators.
    pub fn step(
        &self,
        parameters: &Parameters,
        input: &Tensor,
        residual: Option<&Var>,
        cache: &mut MambaCache,
    ) -> Result<Tensor> {
        let tape = Tape::inference();
        let [batch, time, _] = *input.shape() else { unreachable!("layers pass [batch, time, hidden] on") };
        let (projected, delta) = self.project_whole(&tape, parameters, &Var::constant(input))?;
        let flat = |tensor: &Tensor| tensor.reshape(&[batch, tensor.last_dimension()]);
        let value = |id: ParameterId| &parameters.get(id).value;
        let scanned = ops::mamba_step(
            &mut cache.conv,
            &mut cache.state,
            MambaStepInputs {
                projected: &flat(&projected)?,
                delta: &flat(&delta)?,
                conv_weight: self.conv_matrix(&tape, parameters)?.tensor(),
                conv_bias: self.conv_bias.map(value),
                a_log: value(self.a_log),
                d: value(self.d),
                delta_bias: self.dt_proj.bias.map(value),
            },
        )?;
        let scanned = Var::constant(&scanned.reshape(&[batch, time, self.geometry.d_inner])?);
        Ok(self.out_proj.apply_after(&tape, parameters, residual, &scanned)?.tensor().clone())
    }

    fn pass(
        &self,
        tape: &Tape<'_>,
        parameters: &Parameters,
        input: &Var,
        document_start: Option<&Tensor>,
    ) -> Result<Pass> {
        let sizes = &self.geometry;
        let (batch, time) = (input.shape()[0], input.shape()[1]);
        let [gate, x, b, c, delta] = self.project(tape, parameters, input)?;
        let conv_weight = self.conv_matrix(tape, parameters)?;
        let conv_bias = self.conv_bias.map(|bias| parameters.var(tape, bias));
        let convolve = |x: &Var| {
            let options = ConvolutionOptions { activation: Activation::Silu, document_start, initial_state: None };
            ops::causal_conv1d(tape, x, &conv_weight, conv_bias.as_ref(), options)
        };
        let (conv_input, x) = if sizes.repeat_before_conv {
            let repeated = ops::repeat_chunks(tape, &x, sizes.d_state, self.repeats())?;
            let convolved = convolve(&repeated)?;
            (repeated, convolved)
        } else {
            let convolved = convolve(&x)?;
            (x, ops::repeat_chunks(tape, &convolved, sizes.d_state, self.repeats())?)
        };
        let a = ops::negative_exp(tape, &parameters.var(tape, self.a_log))?;
        let delta_bias = self.dt_proj.bias.map(|bias| parameters.var(tape, bias));
        let scanned = ops::selective_scan(
            tape,
            ScanInputs {
                input: &x,
                delta: &delta,
                a: &a,
                b: &b.reshape(tape, &[batch, time, sizes.d_xb / sizes.d_state, sizes.d_state])?,
                c: &c.reshape(tape, &[batch, time, sizes.d_inner / sizes.d_state, sizes.d_state])?,
                d: Some(&parameters.var(tape, self.d)),
                gate: Some(&gate),
                delta_bias: delta_bias.as_ref(),
                delta_softplus: true,
                initial_state: None,
                document_start,
            },
        )?;
        let output = self.out_proj.apply(tape, parameters, &scanned.output)?;
        Ok(Pass { output, conv_input, last_state: scanned.last_state })
    }

    /// z, x, B, C and the step size with its bias once.
    fn project(&self, tape: &Tape<'_>, parameters: &Parameters, input: &Var) -> Result<[Var; 5]> {
        let sizes = &self.geometry;
        let (projected, delta) = self.project_whole(tape, parameters, input)?;
        let parts = ops::split(tape, &projected, &[sizes.d_inner, sizes.d_xb, sizes.d_xb, sizes.d_inner])?;
        let [gate, x, b, c] = <[Var; 4]>::try_from(parts).unwrap_or_else(|_| unreachable!("split into four sizes"));
        Ok([gate, x, b, c, delta])
    }

    /// z, x, B and C side by side, and the step size with its bias once.
    fn project_whole(&self, tape: &Tape<'_>, parameters: &Parameters, input: &Var) -> Result<(Var, Var)> {
        let projected = self.in_proj.apply(tape, parameters, input)?;
        let low_rank = self.dt_in_proj.apply(tape, parameters, input)?;
        Ok((projected, self.dt_proj.apply(tape, parameters, &low_rank)?))
    }

    /// The convolution's weight without its middle dimension: `[conv channels, d_conv]`.
    fn conv_matrix(&self, tape: &Tape<'_>, parameters: &Parameters) -> autograd::Result<Var> {
        let weight = parameters.var(tape, self.conv_weight);
        let channels = weight.shape()[0];
        weight.reshape(tape, &[channels, self.geometry.d_conv])
    }

    fn repeats(&self) -> usize {
        self.geometry.d_inner / self.geometry.d_xb
    }
}

impl MambaCache {
    /// Bytes of both states.
    pub fn bytes(&self) -> usize {
        (self.conv.count() + self.state.count()) * 4
    }
}
