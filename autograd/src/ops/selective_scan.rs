//! The selective scan of Mamba (Gu and Dao 2023), with grouped B and C.

use crate::{Result, Tape, Tensor, Var};

/// What a scan reads. Channels `d`, groups `g`, states `n`.
#[derive(Clone, Copy, Debug)]
pub struct ScanInputs<'a> {
    /// u `[batch, time, channels]`.
    pub input: &'a Var,
    /// Step sizes before bias and softplus, `[batch, time, channels]`.
    pub delta: &'a Var,
    /// A, f32 `[channels, states]`, negative for a decaying state.
    pub a: &'a Var,
    /// B `[batch, time, groups of B, states]`; channel `d` uses group `d / (channels / groups)`.
    pub b: &'a Var,
    /// C `[batch, time, groups of C, states]`; its number of groups may differ from B's.
    pub c: &'a Var,
    /// D, f32 `[channels]`: the skip connection.
    pub d: Option<&'a Var>,
    /// z `[batch, time, channels]`: the gate.
    pub gate: Option<&'a Var>,
    /// f32 `[channels]`, added to `delta`.
    pub delta_bias: Option<&'a Var>,
    /// Whether softplus is applied to `delta + delta_bias`.
    pub delta_softplus: bool,
    /// f32 `[batch, channels, states]`: the state before the first step. `None`: zeros.
    pub initial_state: Option<&'a Var>,
    /// u32 `[batch, time]`: start of each token's document; the state is dropped there. `None`: one document per row.
    pub document_start: Option<&'a Tensor>,
}

/// What a scan gives.
#[derive(Debug)]
pub struct ScanOutput {
    /// `[batch, time, channels]`.
    pub output: Var,
    /// f32 `[batch, channels, states]`: the state after the last step.
    pub last_state: Var,
}

/// Per channel, with `Δ = softplus(delta + delta_bias)`:
/// `h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t · h_t + D u_t`, `output_t = y_t · silu(z_t)`.
///
/// Softplus passes values above 20 through. A state taken over at the start of a document counts as zero, except
/// that `initial_state` enters a row's first step when `document_start[0] == 0` marks no earlier document: it is used
/// unless `document_start` is given.
///
/// # Errors
/// Shape errors that name the argument; groups that do not divide the channels; an initial state together with
/// document starts.
pub fn selective_scan(tape: &Tape<'_>, inputs: ScanInputs<'_>) -> Result<ScanOutput> {
    let _ = (tape, inputs);
    unimplemented!()
}

/// What one decoding step reads; shapes as in [`ScanInputs`] without time.
#[derive(Clone, Copy, Debug)]
pub struct ScanStepInputs<'a> {
    /// u `[batch, channels]`.
    pub input: &'a Tensor,
    /// Step sizes before bias and softplus, `[batch, channels]`.
    pub delta: &'a Tensor,
    /// A, f32 `[channels, states]`.
    pub a: &'a Tensor,
    /// B `[batch, groups of B, states]`.
    pub b: &'a Tensor,
    /// C `[batch, groups of C, states]`.
    pub c: &'a Tensor,
    /// D, f32 `[channels]`.
    pub d: Option<&'a Tensor>,
    /// z `[batch, channels]`.
    pub gate: Option<&'a Tensor>,
    /// f32 `[channels]`, added to `delta`.
    pub delta_bias: Option<&'a Tensor>,
    /// Whether softplus is applied to `delta + delta_bias`.
    pub delta_softplus: bool,
}

/// One step of [`selective_scan`]: updates `state` (f32 `[batch, channels, states]`) in place and returns the output,
/// `[batch, channels]`.
///
/// # Errors
/// Shape errors that name the argument.
pub fn selective_scan_step(state: &mut Tensor, inputs: ScanStepInputs<'_>) -> Result<Tensor> {
    let _ = (state, inputs);
    unimplemented!()
}
