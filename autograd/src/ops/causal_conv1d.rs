//! Causal depthwise convolution along time.

use crate::{Result, Tape, Tensor, Var};

/// What follows the convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `x · sigmoid(x)`.
    Silu,
}

/// Everything that is optional in a convolution.
#[derive(Clone, Copy, Debug)]
pub struct ConvolutionOptions<'a> {
    /// What follows.
    pub activation: Activation,
    /// u32 `[batch, time]`: start of each token's document; taps before it are zero. `None`: one document per row.
    pub document_start: Option<&'a Tensor>,
    /// `[batch, width - 1, channels]`: the inputs before the first, oldest first. `None`: zeros. No gradient flows here.
    pub initial_state: Option<&'a Tensor>,
}

/// `y[b, t, d] = activation(bias[d] + Σ_w weight[d, w] · x[b, t - (width - 1) + w, d])`.
///
/// - `input` `[batch, time, channels]`, `weight` `[channels, width]` (width at least 1), `bias` `[channels]`
/// - result like `input`
///
/// # Errors
/// Shape errors that name the argument.
pub fn causal_conv1d(
    tape: &Tape<'_>,
    input: &Var,
    weight: &Var,
    bias: Option<&Var>,
    options: ConvolutionOptions<'_>,
) -> Result<Var> {
    let _ = (tape, input, weight, bias, options);
    unimplemented!()
}

/// One time step, for decoding: shifts `state` left, appends `input`, convolves the newest `width` columns.
///
/// - `state` f32 `[batch, channels, state length]`, oldest first, state length at least `width - 1`; updated in place
/// - `input` `[batch, channels]`, `weight` `[channels, width]`, `bias` `[channels]`; result like `input`
///
/// # Errors
/// Shape errors that name the argument.
pub fn causal_conv1d_step(
    state: &mut Tensor,
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let _ = (state, input, weight, bias, activation);
    unimplemented!()
}
