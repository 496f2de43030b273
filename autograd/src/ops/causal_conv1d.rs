//! Causal depthwise convolution along time.

use rayon::prelude::*;

use crate::{DType, Error, Result, Tape, Tensor, Var, check, cpu};

/// Time steps whose contributions to the weight's gradient are summed together before the blocks are added in order.
const BLOCK_STEPS: usize = 64;

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
    let x = input.host_f32()?;
    let output = Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
        convolution.for_each_row(output, |row, step, output| {
            convolution.pre_activation(&x, row, step, output);
            if convolution.activation == Activation::Silu {
                for value in output {
                    *value *= cpu::sigmoid(*value);
                }
            }
        });
        Ok(())
    })?;
    let mut variables = vec![input, weight];
    variables.extend(bias);
    variables.extend(options.initial_state);
    let (saved, like_weight) = (input.tensor().clone(), weight.tensor().clone());
    let like_state = options.initial_state.map(|state| state.tensor().clone());
    let has_bias = bias.is_some();
    Ok(tape.record_one(&variables, output, move |gradient, _| {
        let slopes = convolution.slopes(gradient, &saved)?;
        let (weight_gradient, bias_gradient) = convolution.weight_gradients(&slopes, &saved, &like_weight)?;
        let mut gradients = vec![Some(convolution.input_gradient(&slopes, &saved)?), Some(weight_gradient)];
        gradients.extend(has_bias.then_some(Some(bias_gradient)));
        if let Some(state) = &like_state {
            gradients.push(Some(convolution.state_gradient(&slopes, state)?));
        }
        Ok(gradients)
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
    check::on_cpu(OPERATOR, input)?;
    check::rank(OPERATOR, "input", input, 2, "[batch, channels]")?;
    check::rank(OPERATOR, "weight", weight, 2, "[channels, width]")?;
    check::rank(OPERATOR, "state", state, 3, "[batch, channels, state length]")?;
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
    let (x, weight) = (input.host_f32()?, weight.host_f32()?);
    let bias = bias.map(Tensor::host_f32).transpose()?;
    let state = state.make_mut::<f32>()?;
    Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
        for (index, output) in output.iter_mut().enumerate() {
            let channel = index % channels;
            let taps = &weight[channel * width..][..width];
            let columns = &mut state[index * length..][..length];
            // The newest tap is the input itself; the others are the newest columns of the old state.
            let mut sum = bias.as_ref().map_or(0.0, |bias| bias[channel]);
            for (tap, column) in taps.iter().zip(&columns[length + 1 - width..]) {
                sum += tap * column;
            }
            sum += taps[width - 1] * x[index];
            if length > 0 {
                columns.rotate_left(1);
                columns[length - 1] = x[index];
            }
            *output = match activation {
                Activation::Identity => sum,
                Activation::Silu => sum * cpu::sigmoid(sum),
            };
        }
        Ok(())
    })
}

/// Sizes, weights by tap, and what each step may see.
struct Convolution {
    time: usize,
    channels: usize,
    width: usize,
    activation: Activation,
    /// `[width, channels]`: one tap's weights of all channels side by side.
    taps: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// `[batch, time]`: the first step of each step's document.
    document_start: Option<Vec<u32>>,
    /// `[batch, width - 1, channels]`.
    initial_state: Option<Vec<f32>>,
}

impl Convolution {
    fn new(input: &Tensor, weight: &Tensor, bias: Option<&Var>, options: ConvolutionOptions<'_>) -> Result<Self> {
        const OPERATOR: &str = "causal_conv1d";
        check::on_cpu(OPERATOR, input)?;
        check::is_float(OPERATOR, "input", input)?;
        check::rank(OPERATOR, "input", input, 3, "[batch, time, channels]")?;
        check::rank(OPERATOR, "weight", weight, 2, "[channels, width]")?;
        let [batch, time, channels] = *input.shape() else { unreachable!("the rank was checked") };
        let width = weight.shape()[1];
        check::shape(OPERATOR, "weight", weight, &[channels, width.max(1)])?;
        if let Some(bias) = bias {
            check::shape(OPERATOR, "bias", bias, &[channels])?;
        }
        if let Some(starts) = options.document_start {
            check::is_u32(OPERATOR, "document_start", starts)?;
            check::shape(OPERATOR, "document_start", starts, &[batch, time])?;
        }
        if let Some(state) = options.initial_state {
            check::shape(OPERATOR, "initial_state", state, &[batch, width - 1, channels])?;
            if options.document_start.is_some() {
                let message = "an initial state belongs to one document per row: leave out document_start".to_owned();
                return Err(Error::Invalid { operator: OPERATOR, message });
            }
        }
        let by_channel = weight.host_f32()?;
        let taps = (0..width * channels).map(|i| by_channel[i % channels * width + i / channels]).collect();
        Ok(Self {
            time,
            channels,
            width,
            activation: options.activation,
            taps,
            bias: bias.map(|bias| bias.to_f32_vec()).transpose()?,
            document_start: options.document_start.map(Tensor::to_vec).transpose()?,
            initial_state: options.initial_state.map(|state| state.to_f32_vec()).transpose()?,
        })
    }

    /// Calls `function(batch row, step, values)` for every step's `channels` values, in parallel.
    fn for_each_row(&self, values: &mut [f32], function: impl Fn(usize, usize, &mut [f32]) + Sync) {
        if self.channels == 0 || self.time == 0 {
            return;
        }
        values.par_chunks_mut(self.channels).enumerate().for_each(|(index, values)| {
            cpu::simd(
                #[inline(always)]
                || function(index / self.time, index % self.time, values),
            );
        });
    }

    /// The first step that `step` may see.
    fn first_visible(&self, row: usize, step: usize) -> usize {
        self.document_start.as_ref().map_or(0, |starts| starts[row * self.time + step] as usize)
    }

    /// The inputs of tap `tap` at `step`: a step of the sequence, one of the initial state, or nothing.
    #[inline(always)]
    fn source<'a>(&'a self, x: &'a [f32], row: usize, step: usize, tap: usize) -> Option<&'a [f32]> {
        let shifted = step + tap + 1;
        if shifted >= self.width {
            let source = shifted - self.width;
            (source >= self.first_visible(row, step))
                .then(|| &x[(row * self.time + source) * self.channels..][..self.channels])
        } else {
            let column = (row * (self.width - 1) + shifted - 1) * self.channels;
            self.initial_state.as_ref().map(|state| &state[column..][..self.channels])
        }
    }

    #[inline(always)]
    fn pre_activation(&self, x: &[f32], row: usize, step: usize, output: &mut [f32]) {
        match &self.bias {
            Some(bias) => output.copy_from_slice(bias),
            None => output.fill(0.0),
        }
        for tap in 0..self.width {
            if let Some(source) = self.source(x, row, step, tap) {
                let weights = &self.taps[tap * self.channels..][..self.channels];
                for ((output, weight), source) in output.iter_mut().zip(weights).zip(source) {
                    *output += weight * source;
                }
            }
        }
    }

    /// The gradient of the pre-activation q, `[batch, time, channels]`: `dq = dy · activation'(q)`.
    fn slopes(&self, gradient: &Tensor, input: &Tensor) -> Result<Vec<f32>> {
        let (g, x) = (gradient.host_f32()?, input.host_f32()?);
        let channels = self.channels;
        let mut slopes = vec![0.0f32; x.len()];
        self.for_each_row(&mut slopes, |row, step, slope| {
            let g = &g[(row * self.time + step) * channels..][..channels];
            match self.activation {
                Activation::Identity => slope.copy_from_slice(g),
                Activation::Silu => {
                    self.pre_activation(&x, row, step, slope);
                    for (slope, g) in slope.iter_mut().zip(g) {
                        let s = cpu::sigmoid(*slope);
                        *slope = g * s * (1.0 + *slope * (1.0 - s));
                    }
                }
            }
        });
        Ok(slopes)
    }

    /// `dx[t'] = Σ_w weight[w] dq[t' + width - 1 - w]`.
    fn input_gradient(&self, slopes: &[f32], input: &Tensor) -> Result<Tensor> {
        let channels = self.channels;
        Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
            self.for_each_row(output, |row, step, output| {
                output.fill(0.0);
                for tap in 0..self.width {
                    let target = step + self.width - 1 - tap;
                    if target < self.time && step >= self.first_visible(row, target) {
                        let slope = &slopes[(row * self.time + target) * channels..][..channels];
                        let weights = &self.taps[tap * channels..][..channels];
                        for ((output, weight), slope) in output.iter_mut().zip(weights).zip(slope) {
                            *output += weight * slope;
                        }
                    }
                }
            });
            Ok(())
        })
    }

    /// As the input's gradient, for the columns before the first step: column c is seen by step t through tap c - t.
    fn state_gradient(&self, slopes: &[f32], state: &Tensor) -> Result<Tensor> {
        let (channels, columns) = (self.channels, self.width - 1);
        Tensor::compute(state.device(), state.shape(), state.dtype(), |output| {
            output.fill(0.0);
            for (index, output) in output.chunks_exact_mut(channels.max(1)).enumerate() {
                let (row, column) = (index / columns, index % columns);
                for step in 0..self.time.min(column + 1) {
                    let slope = &slopes[(row * self.time + step) * channels..][..channels];
                    let weights = &self.taps[(column - step) * channels..][..channels];
                    for ((output, weight), slope) in output.iter_mut().zip(weights).zip(slope) {
                        *output += weight * slope;
                    }
                }
            }
            Ok(())
        })
    }

    /// `d weight[w] = Σ_t dq[t] x[t - width + 1 + w]`, `d bias = Σ dq`; both f32.
    fn weight_gradients(&self, slopes: &[f32], input: &Tensor, weight: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = input.host_f32()?;
        let channels = self.channels;
        // One row of sums per tap, and one for the bias, for every block of steps.
        let sums_per_block = (self.width + 1) * channels;
        let blocks: Vec<Vec<f32>> = slopes
            .par_chunks((BLOCK_STEPS * channels).max(1))
            .enumerate()
            .map(|(block, slopes)| {
                let mut sums = vec![0.0f32; sums_per_block];
                cpu::simd(
                    #[inline(always)]
                    || {
                        for (index, slope) in slopes.chunks_exact(channels).enumerate() {
                            let index = block * BLOCK_STEPS + index;
                            let (row, step) = (index / self.time, index % self.time);
                            let (tap_sums, bias_sums) = sums.split_at_mut(self.width * channels);
                            for (tap, sums) in tap_sums.chunks_exact_mut(channels).enumerate() {
                                if let Some(source) = self.source(&x, row, step, tap) {
                                    for ((sum, slope), source) in sums.iter_mut().zip(slope).zip(source) {
                                        *sum += slope * source;
                                    }
                                }
                            }
                            for (sum, slope) in bias_sums.iter_mut().zip(slope) {
                                *sum += slope;
                            }
                        }
                    },
                );
                sums
            })
            .collect();
        let mut sums = vec![0.0f32; sums_per_block];
        for block in &blocks {
            for (sum, value) in sums.iter_mut().zip(block) {
                *sum += value;
            }
        }
        let weight_gradient = Tensor::compute(weight.device(), weight.shape(), DType::F32, |output| {
            for (index, output) in output.iter_mut().enumerate() {
                *output = sums[index % self.width * channels + index / self.width];
            }
            Ok(())
        })?;
        let bias_gradient = Tensor::from_slice(weight.device(), &[channels], &sums[self.width * channels..])?;
        Ok((weight_gradient, bias_gradient))
    }
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::gradient_check;

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
