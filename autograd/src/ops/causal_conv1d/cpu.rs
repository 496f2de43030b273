//! The CPU way: the channels of a step side by side, one vector per tap.

use rayon::prelude::*;

use super::{Activation, Convolution, ConvolutionGradients};
use crate::{DType, Result, Tensor, cpu};

/// Time steps whose contributions to the weight's gradient are summed together before the blocks are added in order.
const BLOCK_STEPS: usize = 64;

pub(super) fn forward(convolution: &Convolution) -> Result<Tensor> {
    let values = Values::new(convolution)?;
    let input = &convolution.input;
    let x = input.host_f32()?;
    Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
        values.for_each_row(output, |row, step, output| {
            values.pre_activation(&x, row, step, output);
            if values.activation == Activation::Silu {
                for value in output {
                    *value *= cpu::sigmoid(*value);
                }
            }
        });
        Ok(())
    })
}

pub(super) fn backward(convolution: &Convolution, gradient: &Tensor) -> Result<ConvolutionGradients> {
    let values = Values::new(convolution)?;
    let input = &convolution.input;
    let slopes = values.slopes(gradient, input)?;
    let (weight, bias) = values.weight_gradients(&slopes, input, &convolution.weight)?;
    let initial_state = convolution.initial_state.as_ref();
    Ok(ConvolutionGradients {
        input: values.input_gradient(&slopes, input)?,
        weight,
        bias: Some(bias),
        initial_state: initial_state.map(|state| values.state_gradient(&slopes, state)).transpose()?,
    })
}

pub(super) fn step(
    state: &mut Tensor,
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (channels, width, length) = (input.shape()[1], weight.shape()[1], state.shape()[2]);
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
struct Values {
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

impl Values {
    fn new(convolution: &Convolution) -> Result<Self> {
        let [_, time, channels] = *convolution.input.shape() else { unreachable!("the rank was checked") };
        let width = convolution.weight.shape()[1];
        let by_channel = convolution.weight.host_f32()?;
        let taps = (0..width * channels).map(|i| by_channel[i % channels * width + i / channels]).collect();
        Ok(Self {
            time,
            channels,
            width,
            activation: convolution.activation,
            taps,
            bias: convolution.bias.as_ref().map(Tensor::to_f32_vec).transpose()?,
            document_start: convolution.document_start.as_ref().map(Tensor::to_vec).transpose()?,
            initial_state: convolution.initial_state.as_ref().map(Tensor::to_f32_vec).transpose()?,
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
