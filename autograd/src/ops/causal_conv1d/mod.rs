//! Causal depthwise convolution along time.

mod cpu;
mod gpu;

use crate::{Error, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "causal_conv1d";

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
    /// `[batch, width - 1, channels]`: the inputs before the first, oldest first. `None`: zeros. Not together with
    /// `document_start`.
    pub initial_state: Option<&'a Var>,
}

/// `y[b, t, d] = activation(bias[d] + Σ_w weight[d, w] · x[b, t - (width - 1) + w, d])`.
///
/// - `input` `[batch, time, channels]`, `weight` `[channels, width]` (width at least 1), `bias` `[channels]`
/// - result like `input`
///
/// # Errors
/// Shape errors that name the argument; an initial state together with document starts.
pub fn causal_conv1d(
    tape: &Tape<'_>,
    input: &Var,
    weight: &Var,
    bias: Option<&Var>,
    options: ConvolutionOptions<'_>,
) -> Result<Var> {
    let convolution = Convolution::new(input, weight, bias, options)?;
    let on_cpu = input.device().is_cpu();
    let output = if on_cpu { cpu::forward(&convolution)? } else { gpu::forward(&convolution)? };
    let mut variables = vec![input, weight];
    variables.extend(bias);
    variables.extend(options.initial_state);
    Ok(tape.record_one(&variables, output, move |gradient, _| {
        let backward = if on_cpu { cpu::backward } else { gpu::backward };
        let gradients = backward(&convolution, gradient)?;
        let mut result = vec![Some(gradients.input), Some(gradients.weight)];
        result.extend(convolution.bias.is_some().then_some(gradients.bias));
        result.extend(convolution.initial_state.is_some().then_some(gradients.initial_state));
        Ok(result)
    }))
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
    const OPERATOR: &str = "causal_conv1d_step";
    check::is_float(OPERATOR, "input", input)?;
    check::rank(OPERATOR, "input", input, 2, "[batch, channels]")?;
    check::rank(OPERATOR, "weight", weight, 2, "[channels, width]")?;
    check::rank(OPERATOR, "state", state, 3, "[batch, channels, state length]")?;
    check::is_f32(OPERATOR, "state", state)?;
    let (batch, channels) = (input.shape()[0], input.shape()[1]);
    let (width, length) = (weight.shape()[1], state.shape()[2]);
    check::shape(OPERATOR, "weight", weight, &[channels, width])?;
    if width == 0 || length + 1 < width || state.shape()[..2] != [batch, channels] {
        return Err(Error::Shape {
            operator: OPERATOR,
            argument: "state",
            expected: format!("[{batch}, {channels}, at least {}]", width.saturating_sub(1)),
            found: state.shape().to_vec(),
        });
    }
    if let Some(bias) = bias {
        check::shape(OPERATOR, "bias", bias, &[channels])?;
    }
    let step = if input.device().is_cpu() { cpu::step } else { gpu::step };
    step(state, input, weight, bias, activation)
}

/// What a convolution reads; the shapes fit each other.
struct Convolution {
    input: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    activation: Activation,
    document_start: Option<Tensor>,
    initial_state: Option<Tensor>,
}

/// What the backward pass gives; weight and bias in f32, the others like what they are the gradients of.
struct ConvolutionGradients {
    input: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    initial_state: Option<Tensor>,
}

impl Convolution {
    fn new(input: &Var, weight: &Var, bias: Option<&Var>, options: ConvolutionOptions<'_>) -> Result<Self> {
        check::is_float(OPERATOR, "input", input)?;
        check::is_float(OPERATOR, "weight", weight)?;
        check::rank(OPERATOR, "input", input, 3, "[batch, time, channels]")?;
        check::rank(OPERATOR, "weight", weight, 2, "[channels, width]")?;
        let [batch, time, channels] = *input.shape() else { unreachable!("the rank was checked") };
        let width = weight.shape()[1];
        check::shape(OPERATOR, "weight", weight, &[channels, width.max(1)])?;
        if let Some(bias) = bias {
            check::is_float(OPERATOR, "bias", bias)?;
            check::shape(OPERATOR, "bias", bias, &[channels])?;
        }
        if let Some(starts) = options.document_start {
            check::is_u32(OPERATOR, "document_start", starts)?;
            check::shape(OPERATOR, "document_start", starts, &[batch, time])?;
        }
        if let Some(state) = options.initial_state {
            check::is_float(OPERATOR, "initial_state", state)?;
            check::shape(OPERATOR, "initial_state", state, &[batch, width - 1, channels])?;
            if options.document_start.is_some() {
                let message = "an initial state belongs to one document per row: leave out document_start".to_owned();
                return Err(Error::Invalid { operator: OPERATOR, message });
            }
        }
        let owned = |variable: &Var| variable.tensor().clone();
        Ok(Self {
            input: owned(input),
            weight: owned(weight),
            bias: bias.map(owned),
            activation: options.activation,
            document_start: options.document_start.cloned(),
            initial_state: options.initial_state.map(owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::{DType, gradient_check};

    const PLAIN: ConvolutionOptions<'_> =
        ConvolutionOptions { activation: Activation::Identity, document_start: None, initial_state: None };

    fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_slice(&Device::cpu(), shape, values).unwrap()
    }

    fn run(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, options: ConvolutionOptions<'_>) -> Result<Vec<f32>> {
        let bias = bias.map(Var::constant);
        causal_conv1d(&Tape::inference(), &Var::constant(x), &Var::constant(weight), bias.as_ref(), options)?.to_vec()
    }

    #[test]
    fn the_last_tap_is_the_present_and_documents_do_not_leak() {
        let x = tensor(&[1, 4, 1], &[1.0, 2.0, 3.0, 4.0]);
        let weight = tensor(&[1, 3], &[100.0, 10.0, 1.0]);
        let bias = tensor(&[1], &[0.5]);
        assert_eq!(run(&x, &weight, Some(&bias), PLAIN).unwrap(), [1.5, 12.5, 123.5, 234.5]);
        let starts = Tensor::from_slice(&Device::cpu(), &[1, 4], &[0u32, 0, 2, 2]).unwrap();
        let packed = ConvolutionOptions { document_start: Some(&starts), ..PLAIN };
        assert_eq!(run(&x, &weight, None, packed).unwrap(), [1.0, 12.0, 3.0, 34.0]);
        let state = tensor(&[1, 2, 1], &[8.0, 9.0]);
        let state = Var::constant(&state);
        let continued = ConvolutionOptions { initial_state: Some(&state), ..PLAIN };
        assert_eq!(run(&x, &weight, None, continued).unwrap(), [891.0, 912.0, 123.0, 234.0]);
        let both = ConvolutionOptions { initial_state: Some(&state), document_start: Some(&starts), ..PLAIN };
        assert!(run(&x, &weight, None, both).is_err());
    }

    #[test]
    fn steps_equal_the_whole_with_any_state_length() {
        let x = tensor(&[1, 3, 2], &[1.0, -1.0, 2.0, -2.0, 3.0, 0.5]);
        let weight = tensor(&[2, 3], &[0.3, -0.2, 0.5, 0.1, 0.7, -0.4]);
        let silu = ConvolutionOptions { activation: Activation::Silu, ..PLAIN };
        let whole = run(&x, &weight, None, silu).unwrap();
        for length in [2, 3, 5] {
            let mut state = Tensor::zeros(&Device::cpu(), &[1, 2, length], DType::F32).unwrap();
            for step in 0..3 {
                let input = tensor(&[1, 2], &x.to_vec::<f32>().unwrap()[step * 2..][..2]);
                let output = causal_conv1d_step(&mut state, &input, &weight, None, Activation::Silu).unwrap();
                for (found, expected) in output.to_vec::<f32>().unwrap().iter().zip(&whole[step * 2..]) {
                    assert!((found - expected).abs() < 1e-6);
                }
            }
            assert_eq!(state.to_vec::<f32>().unwrap()[length - 1], 3.0);
        }
    }

    #[test]
    fn gradients_agree_with_differences_across_documents() {
        let values: Vec<f32> = (0..2 * 5 * 3).map(|i| ((i * 29 % 31) as f32 - 15.0) / 10.0).collect();
        let inputs = [tensor(&[2, 5, 3], &values), tensor(&[3, 4], &values[..12]), tensor(&[3], &values[12..15])];
        let starts = Tensor::from_slice(&Device::cpu(), &[2, 5], &[0u32, 0, 2, 2, 2, 0, 1, 1, 1, 4]).unwrap();
        let options = ConvolutionOptions { activation: Activation::Silu, document_start: Some(&starts), ..PLAIN };
        let check = gradient_check(&inputs, 1e-2, |tape, inputs| {
            causal_conv1d(tape, &inputs[0], &inputs[1], Some(&inputs[2]), options)
        })
        .unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 5e-3), "{check:?}");
    }

    #[test]
    fn the_initial_state_gets_its_gradient_even_when_it_is_longer_than_the_input() {
        for time in [0, 1, 2, 5] {
            let wave = |count: usize| (0..count).map(|i| (i as f32 * 1.7).sin()).collect::<Vec<f32>>();
            let inputs = [
                tensor(&[2, time, 3], &wave(2 * time * 3)),
                tensor(&[3, 4], &wave(12)),
                tensor(&[3], &wave(3)),
                tensor(&[2, 3, 3], &wave(18)),
            ];
            let check = gradient_check(&inputs, 1e-2, |tape, inputs| {
                let options =
                    ConvolutionOptions { activation: Activation::Silu, initial_state: Some(&inputs[3]), ..PLAIN };
                causal_conv1d(tape, &inputs[0], &inputs[1], Some(&inputs[2]), options)
            })
            .unwrap();
            assert!(check.worst.iter().all(|worst| *worst <= 5e-3), "time {time}: {check:?}");
        }
    }
}
