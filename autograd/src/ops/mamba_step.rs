//! One decoding step of the M1-style Mamba mixer, between its projections.

use kernels_ptx::Element;
use kernels_ptx::kernels::mamba_step::MambaStep;
use runtime::Argument;

use super::{Activation, ScanStepInputs, causal_conv1d_step, repeat_chunks, selective_scan_step, split};
use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "mamba_step";

/// What a step reads. Channels are x's elements repeated: `channels = repeats · xb`, in chunks of `states` elements.
#[derive(Clone, Copy, Debug)]
pub struct MambaStepInputs<'a> {
    /// z, x, B and C side by side: `[batch, 2 channels + 2 xb]`.
    pub projected: &'a Tensor,
    /// Step sizes before bias and softplus, `[batch, channels]`.
    pub delta: &'a Tensor,
    /// Taps of the convolution `[convolved channels, taps]`: as many channels as there are, or only `xb`, whose result is then
    /// repeated.
    pub conv_weight: &'a Tensor,
    /// `[convolved channels]`.
    pub conv_bias: Option<&'a Tensor>,
    /// Logarithm of −A, f32 `[channels, states]`.
    pub a_log: &'a Tensor,
    /// f32 `[channels]`.
    pub d: &'a Tensor,
    /// `[channels]`, added to `delta`.
    pub delta_bias: Option<&'a Tensor>,
}

/// Convolution with SiLU, softplus, scan step and gate. Updates `window` (f32 `[batch, convolved channels, taps]`: the
/// convolution's last inputs) and `state` (f32 `[batch, channels, states]`) in place and returns `[batch, channels]`.
///
/// One launch on GPUs where there is a kernel for so many states and taps; elsewhere, one operator after the other.
///
/// # Errors
/// Shape errors that name the argument.
pub fn mamba_step(window: &mut Tensor, state: &mut Tensor, inputs: MambaStepInputs<'_>) -> Result<Tensor> {
    let sizes = Sizes::new(window, state, &inputs)?;
    match inputs.projected.device().is_gpu() && MambaStep::takes(sizes.states as u32, sizes.taps as u32) {
        true => in_one_launch(window, state, inputs, &sizes),
        false => mamba_step_by_operators(window, state, inputs),
    }
}

/// As [`mamba_step`], one operator after the other: its check.
///
/// # Errors
/// As [`mamba_step`].
pub fn mamba_step_by_operators(window: &mut Tensor, state: &mut Tensor, inputs: MambaStepInputs<'_>) -> Result<Tensor> {
    let Sizes { batch, xb, channels, states, repeated, .. } = Sizes::new(window, state, &inputs)?;
    let tape = Tape::inference();
    let parts = split(&tape, &Var::constant(inputs.projected), &[channels, xb, xb, channels])?;
    let [gate, x, b, c] = <[Var; 4]>::try_from(parts).unwrap_or_else(|_| unreachable!("split into four sizes"));
    let repeat = |x: &Var| repeat_chunks(&tape, x, states, channels / xb);
    let mut convolve =
        |x: &Tensor| causal_conv1d_step(window, x, inputs.conv_weight, inputs.conv_bias, Activation::Silu);
    let x = match repeated {
        true => convolve(repeat(&x)?.tensor())?,
        false => repeat(&Var::constant(&convolve(&x)?))?.tensor().clone(),
    };
    let a = super::negative_exp(&tape, &Var::constant(inputs.a_log))?;
    selective_scan_step(
        state,
        ScanStepInputs {
            input: &x,
            delta: inputs.delta,
            a: &a,
            b: &b.tensor().reshape(&[batch, xb / states, states])?,
            c: &c.tensor().reshape(&[batch, channels / states, states])?,
            d: Some(inputs.d),
            gate: Some(&gate),
            delta_bias: inputs.delta_bias,
            delta_softplus: true,
        },
    )
}

struct Sizes {
    batch: usize,
    xb: usize,
    channels: usize,
    states: usize,
    taps: usize,
    /// x is repeated before the convolution.
    repeated: bool,
}

impl Sizes {
    fn new(window: &Tensor, state: &Tensor, inputs: &MambaStepInputs<'_>) -> Result<Self> {
        let MambaStepInputs { projected, delta, conv_weight, conv_bias, a_log, d, delta_bias } = *inputs;
        for (name, tensor) in [("projected", projected), ("delta", delta), ("conv_weight", conv_weight)] {
            check::is_float(OPERATOR, name, tensor)?;
            check::rank(OPERATOR, name, tensor, 2, "[rows, columns]")?;
        }
        for (name, tensor) in [("window", window), ("state", state), ("a_log", a_log), ("d", d)] {
            check::is_f32(OPERATOR, name, tensor)?;
        }
        check::rank(OPERATOR, "a_log", a_log, 2, "[channels, states]")?;
        let ([batch, channels], [convolved, taps]) = (two(delta), two(conv_weight));
        let [_, states] = two(a_log);
        let xb = (projected.shape()[1] / 2).saturating_sub(channels);
        if states == 0 || xb == 0 || !xb.is_multiple_of(states) || !channels.is_multiple_of(xb) {
            let message = format!(
                "{channels} channels and rows of {} in `projected` leave {xb} elements for x: expected a whole number of \
                 chunks of {states} that divides the channels",
                projected.shape()[1]
            );
            return Err(Error::Invalid { operator: OPERATOR, message });
        }
        if taps == 0 || (convolved != channels && convolved != xb) {
            let expected = format!("[{channels} or {xb}, at least 1]");
            let found = conv_weight.shape().to_vec();
            return Err(Error::Shape { operator: OPERATOR, argument: "conv_weight", expected, found });
        }
        for (name, tensor, shape) in [
            ("projected", projected, vec![batch, 2 * (channels + xb)]),
            ("a_log", a_log, vec![channels, states]),
            ("d", d, vec![channels]),
            ("window", window, vec![batch, convolved, taps]),
            ("state", state, vec![batch, channels, states]),
        ] {
            check::shape(OPERATOR, name, tensor, &shape)?;
        }
        for (name, vector, count) in [("conv_bias", conv_bias, convolved), ("delta_bias", delta_bias, channels)] {
            if let Some(vector) = vector {
                check::shape(OPERATOR, name, vector, &[count])?;
            }
        }
        Ok(Self { batch, xb, channels, states, taps, repeated: convolved == channels })
    }
}

/// The dimensions of a matrix.
fn two(matrix: &Tensor) -> [usize; 2] {
    [matrix.shape()[0], matrix.shape()[1]]
}

fn in_one_launch(
    window: &mut Tensor,
    state: &mut Tensor,
    inputs: MambaStepInputs<'_>,
    sizes: &Sizes,
) -> Result<Tensor> {
    let size = |what, size| gpu::size(OPERATOR, what, size);
    let (device, dtype) = (inputs.projected.device(), inputs.projected.dtype());
    size("the number of channels of all rows", sizes.batch * sizes.channels)?;
    let [batch, xb, repeats] =
        [size("the batch", sizes.batch)?, size("x", sizes.xb)?, size("the repeats", sizes.channels / sizes.xb)?];
    let kernel = MambaStep {
        element: gpu::element(dtype),
        states: sizes.states as u32,
        taps: sizes.taps as u32,
        taps_bias: inputs.conv_bias.is_some(),
        delta_bias: inputs.delta_bias.is_some(),
        repeated: sizes.repeated,
    };
    let wide = |tensor: Option<&Tensor>| tensor.map(|tensor| tensor.cast(DType::F32)).transpose();
    let delta = inputs.delta.cast(dtype)?;
    let (taps, taps_bias) = (inputs.conv_weight.cast(DType::F32)?, wide(inputs.conv_bias)?);
    let delta_bias = wide(inputs.delta_bias)?;
    let mut output = Output::new(device, &[sizes.batch, sizes.channels], dtype)?;
    let mut arguments = vec![
        output.write(),
        Argument::Write(window.make_unique()?, Element::F32),
        Argument::Write(state.make_unique()?, Element::F32),
    ];
    arguments.extend([inputs.projected, &delta, &taps].map(gpu::read));
    arguments.extend(taps_bias.as_ref().map(gpu::read));
    arguments.extend([inputs.a_log, inputs.d].map(gpu::read));
    arguments.extend(delta_bias.as_ref().map(gpu::read));
    arguments.extend([xb, repeats].map(Argument::U32));
    let work = [sizes.batch, sizes.channels, sizes.xb].map(|size| size as u64);
    gpu::launch(OPERATOR, device, &kernel, kernel.grid(batch, xb, repeats), &work, &arguments)?;
    drop(arguments);
    Ok(output.tensor())
}
