//! The CPU way: blocks of up to 16 channels that share their group of B and of C. The states of a block lie side by side, one
//! vector per n, so that every step is vector arithmetic without sums across lanes. A block runs through time on one
//! thread. The forward pass keeps the states at the start of every chunk of steps; the backward pass computes the states in
//! between again, chunk by chunk from the end (Gu and Dao 2023, section 3.3.2 and its appendix).

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::{Scan, ScanStepInputs, ScanWay};
use crate::{DType, Result, Tensor, cpu};

/// Channels of a block: the lanes of the widest vectors.
const LANES: usize = 16;
/// Steps between saved states, unless told otherwise.
const CHUNK: usize = 64;
/// Channels that one thread takes at a time in a decoding step.
const STEP_CHANNELS: usize = 256;

pub(super) type Lanes = [f32; LANES];

/// The same as f32 in host memory.
struct Values<'a> {
    input: Cow<'a, [f32]>,
    delta: Cow<'a, [f32]>,
    a: Cow<'a, [f32]>,
    b: Cow<'a, [f32]>,
    c: Cow<'a, [f32]>,
    d: Option<Cow<'a, [f32]>>,
    gate: Option<Cow<'a, [f32]>>,
    delta_bias: Option<Cow<'a, [f32]>>,
    initial_state: Option<Cow<'a, [f32]>>,
    document_start: Option<&'a [u32]>,
}

/// Channels `first..first + count` of one batch row, which share group `b_group` of B and `c_group` of C.
#[derive(Clone, Copy)]
struct Block {
    row: usize,
    first: usize,
    count: usize,
    b_group: usize,
    c_group: usize,
}

/// What a block computes going forward.
struct BlockForward {
    /// `[time][lane]`.
    output: Vec<Lanes>,
    /// `[state][lane]`.
    last_state: Vec<Lanes>,
    /// `[chunk][state][lane]`: the state before each chunk.
    chunk_states: Vec<Lanes>,
}

/// What a block computes going backward.
struct BlockBackward {
    /// `[time][lane]` each.
    input: Vec<Lanes>,
    delta: Vec<Lanes>,
    gate: Vec<Lanes>,
    /// `[state][lane]` each.
    a: Vec<Lanes>,
    initial_state: Vec<Lanes>,
    d: Lanes,
    delta_bias: Lanes,
    /// `[time][state]` each, summed over the block's lanes.
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Scan {
    /// Steps between saved states.
    fn chunk_steps(&self) -> usize {
        match self.way {
            Some(ScanWay::Chunks(chunk)) => chunk.get(),
            _ => CHUNK,
        }
    }

    fn values(&self) -> Result<Values<'_>> {
        fn optional(tensor: &Option<Tensor>) -> Result<Option<Cow<'_, [f32]>>> {
            tensor.as_ref().map(Tensor::host_f32).transpose()
        }
        Ok(Values {
            input: self.input.host_f32()?,
            delta: self.delta.host_f32()?,
            a: self.a.host_f32()?,
            b: self.b.host_f32()?,
            c: self.c.host_f32()?,
            d: optional(&self.d)?,
            gate: optional(&self.gate)?,
            delta_bias: optional(&self.delta_bias)?,
            initial_state: optional(&self.initial_state)?,
            document_start: self.document_start.as_ref().map(Tensor::host_slice).transpose()?,
        })
    }

    /// All blocks, row by row, channels ascending.
    fn blocks(&self) -> Vec<Block> {
        let (b_width, c_width) = (self.channels / self.b.shape()[2], self.channels / self.c.shape()[2]);
        let mut blocks = Vec::new();
        for row in 0..self.batch {
            let mut first = 0;
            while first < self.channels {
                let (b_group, c_group) = (first / b_width, first / c_width);
                let end = ((b_group + 1) * b_width).min((c_group + 1) * c_width).min(first + LANES);
                blocks.push(Block { row, first, count: end - first, b_group, c_group });
                first = end;
            }
        }
        blocks
    }

    /// The output, the last state, and each block's states at the start of every chunk.
    pub(super) fn forward_cpu(&self) -> Result<(Tensor, Tensor, Vec<Vec<Lanes>>)> {
        let values = self.values()?;
        let blocks = self.blocks();
        let results: Vec<BlockForward> = blocks
            .par_iter()
            .map(|block| {
                cpu::simd(
                    #[inline(always)]
                    || self.block_forward(&values, *block),
                )
            })
            .collect();
        let output = self.by_time(&blocks, &self.input, |index| &results[index].output)?;
        let last_state = self.by_channel(&blocks, |index| &results[index].last_state)?;
        Ok((output, last_state, results.into_iter().map(|result| result.chunk_states).collect()))
    }

    #[inline(always)]
    fn block_forward(&self, values: &Values<'_>, block: Block) -> BlockForward {
        let a = self.lanes_by_state(&values.a, block.first * self.states, block.count);
        let chunk = self.chunk_steps();
        let mut state = self.initial_lanes(values, block);
        let mut output = vec![[0.0; LANES]; self.time];
        let mut chunk_states = Vec::with_capacity(self.time.div_ceil(chunk) * self.states);
        for (step, output) in output.iter_mut().enumerate() {
            if step % chunk == 0 {
                chunk_states.extend_from_slice(&state);
            }
            if self.begins_document(values, block, step) {
                state.fill([0.0; LANES]);
            }
            let at = self.at(block, step);
            let u = load(&values.input, at, block.count);
            let (size, _) = self.step_size(values, block, at);
            let (b, c) = self.b_and_c(values, block, step);
            let mut sum = [0.0; LANES];
            for n in 0..self.states {
                for lane in 0..LANES {
                    let decay = cpu::exp(size[lane] * a[n][lane]);
                    state[n][lane] = decay * state[n][lane] + size[lane] * b[n] * u[lane];
                    sum[lane] += c[n] * state[n][lane];
                }
            }
            if let Some(d) = &values.d {
                let d = load(d, block.first, block.count);
                for lane in 0..LANES {
                    sum[lane] += d[lane] * u[lane];
                }
            }
            if let Some(gate) = &values.gate {
                let z = load(gate, at, block.count);
                for lane in 0..LANES {
                    sum[lane] *= z[lane] * cpu::sigmoid(z[lane]);
                }
            }
            *output = sum;
        }
        BlockForward { output, last_state: state, chunk_states }
    }

    /// Gradients in the order input, delta, a, b, c, d, gate, delta_bias, initial_state.
    pub(super) fn backward_cpu(
        &self,
        output_gradient: Option<&Tensor>,
        last_state_gradient: Option<&Tensor>,
        chunk_states: &[Vec<Lanes>],
    ) -> Result<[Option<Tensor>; 9]> {
        let values = self.values()?;
        let g = match output_gradient {
            Some(gradient) => gradient.host_f32()?,
            None => Cow::Owned(vec![0.0; self.batch * self.time * self.channels]),
        };
        let state_g = last_state_gradient.map(Tensor::to_f32_vec).transpose()?;
        let blocks = self.blocks();
        let results: Vec<BlockBackward> = blocks
            .par_iter()
            .zip(chunk_states)
            .map(|(block, chunk_states)| {
                cpu::simd(
                    #[inline(always)]
                    || self.block_backward(&values, *block, &g, state_g.as_deref(), chunk_states),
                )
            })
            .collect();
        let sum_of_rows = |of: &dyn Fn(&BlockBackward, usize) -> f32| -> Vec<f32> {
            let mut sums = vec![0.0; self.channels];
            for (block, result) in blocks.iter().zip(&results) {
                for lane in 0..block.count {
                    sums[block.first + lane] += of(result, lane);
                }
            }
            sums
        };
        let device = self.input.device();
        let vector = |sums: Vec<f32>| Tensor::from_slice(device, &[self.channels], &sums);
        let mut a_gradient = vec![0.0f32; self.channels * self.states];
        for (block, result) in blocks.iter().zip(&results) {
            for lane in 0..block.count {
                for n in 0..self.states {
                    a_gradient[(block.first + lane) * self.states + n] += result.a[n][lane];
                }
            }
        }
        Ok([
            Some(self.by_time(&blocks, &self.input, |index| &results[index].input)?),
            Some(self.by_time(&blocks, &self.delta, |index| &results[index].delta)?),
            Some(Tensor::from_slice(device, &[self.channels, self.states], &a_gradient)?),
            Some(self.by_group(&blocks, &self.b, |block| block.b_group, |index| &results[index].b)?),
            Some(self.by_group(&blocks, &self.c, |block| block.c_group, |index| &results[index].c)?),
            self.d.is_some().then(|| vector(sum_of_rows(&|result, lane| result.d[lane]))).transpose()?,
            self.gate.as_ref().map(|gate| self.by_time(&blocks, gate, |index| &results[index].gate)).transpose()?,
            self.delta_bias
                .is_some()
                .then(|| vector(sum_of_rows(&|result, lane| result.delta_bias[lane])))
                .transpose()?,
            self.initial_state
                .is_some()
                .then(|| self.by_channel(&blocks, |index| &results[index].initial_state))
                .transpose()?,
        ])
    }

    /// With λ the gradient of the state: `λ_t = C_t dy_t + ā_{t+1} λ_{t+1}`, `e_t = ā_t h_{t-1}`,
    /// `du = D dy + Σ λ Δ B`, `dΔ = Σ λ (B u + A e)`, `dA = Σ_t λ Δ e`, `dB = Σ λ Δ u`, `dC = Σ dy h`.
    #[inline(always)]
    fn block_backward(
        &self,
        values: &Values<'_>,
        block: Block,
        g: &[f32],
        state_g: Option<&[f32]>,
        chunk_states: &[Lanes],
    ) -> BlockBackward {
        let states = self.states;
        let a = self.lanes_by_state(&values.a, block.first * states, block.count);
        let d = values.d.as_ref().map_or([0.0; LANES], |d| load(d, block.first, block.count));
        let mut result = BlockBackward {
            input: vec![[0.0; LANES]; self.time],
            delta: vec![[0.0; LANES]; self.time],
            gate: vec![[0.0; LANES]; self.time],
            a: vec![[0.0; LANES]; states],
            initial_state: Vec::new(),
            d: [0.0; LANES],
            delta_bias: [0.0; LANES],
            b: vec![0.0; self.time * states],
            c: vec![0.0; self.time * states],
        };
        // ā_{t+1} λ_{t+1}: the gradient that reaches the state from later steps.
        let mut carried = match state_g {
            Some(gradient) => {
                self.lanes_by_state(gradient, (block.row * self.channels + block.first) * states, block.count)
            }
            None => vec![[0.0; LANES]; states],
        };
        // Of the chunk in hand: ā and ā h_{t-1} as `[step][state]`, Δ and its slope as `[step]`.
        let chunk_steps = self.chunk_steps().min(self.time.max(1));
        let mut decays = vec![[0.0; LANES]; chunk_steps * states];
        let mut kept = vec![[0.0; LANES]; chunk_steps * states];
        let mut sizes = vec![([0.0; LANES], [0.0; LANES]); chunk_steps];
        for chunk in (0..self.time.div_ceil(chunk_steps)).rev() {
            let first = chunk * chunk_steps;
            let length = chunk_steps.min(self.time - first);
            let mut state = chunk_states[chunk * states..][..states].to_vec();
            for (index, sizes) in sizes[..length].iter_mut().enumerate() {
                let step = first + index;
                let at = self.at(block, step);
                let u = load(&values.input, at, block.count);
                *sizes = self.step_size(values, block, at);
                let (size, _) = *sizes;
                let (b, _) = self.b_and_c(values, block, step);
                if self.begins_document(values, block, step) {
                    state.fill([0.0; LANES]);
                }
                let decays = &mut decays[index * states..][..states];
                let kept = &mut kept[index * states..][..states];
                for n in 0..states {
                    for lane in 0..LANES {
                        let decay = cpu::exp(size[lane] * a[n][lane]);
                        decays[n][lane] = decay;
                        kept[n][lane] = decay * state[n][lane];
                        state[n][lane] = kept[n][lane] + size[lane] * b[n] * u[lane];
                    }
                }
            }
            for index in (0..length).rev() {
                let step = first + index;
                let at = self.at(block, step);
                let u = load(&values.input, at, block.count);
                let (size, slope) = sizes[index];
                let (b, c) = self.b_and_c(values, block, step);
                let g = load(g, at, block.count);
                let gate = values.gate.as_ref().map(|gate| load(gate, at, block.count));
                let mut dy = g;
                if let Some(z) = &gate {
                    for lane in 0..LANES {
                        dy[lane] = g[lane] * z[lane] * cpu::sigmoid(z[lane]);
                    }
                }
                let decays = &decays[index * states..][..states];
                let kept = &kept[index * states..][..states];
                let b_sums = &mut result.b[step * states..][..states];
                let c_sums = &mut result.c[step * states..][..states];
                let mut y = [0.0; LANES];
                let mut du = [0.0; LANES];
                let mut d_size = [0.0; LANES];
                for n in 0..states {
                    let mut b_terms = [0.0; LANES];
                    let mut c_terms = [0.0; LANES];
                    for lane in 0..LANES {
                        let e = kept[n][lane];
                        let state = e + size[lane] * b[n] * u[lane];
                        let lambda = carried[n][lane] + c[n] * dy[lane];
                        let weighted = lambda * size[lane];
                        y[lane] += c[n] * state;
                        du[lane] += weighted * b[n];
                        d_size[lane] += lambda * (b[n] * u[lane] + a[n][lane] * e);
                        result.a[n][lane] += weighted * e;
                        b_terms[lane] = weighted * u[lane];
                        c_terms[lane] = dy[lane] * state;
                        carried[n][lane] = decays[n][lane] * lambda;
                    }
                    b_sums[n] = cpu::across(&b_terms);
                    c_sums[n] = cpu::across(&c_terms);
                }
                if self.begins_document(values, block, step) {
                    carried.fill([0.0; LANES]);
                }
                if let Some(z) = &gate {
                    for lane in 0..LANES {
                        let s = cpu::sigmoid(z[lane]);
                        let y = y[lane] + d[lane] * u[lane];
                        result.gate[step][lane] = g[lane] * y * s * (1.0 + z[lane] * (1.0 - s));
                    }
                }
                for lane in 0..LANES {
                    result.input[step][lane] = du[lane] + d[lane] * dy[lane];
                    result.d[lane] += dy[lane] * u[lane];
                    let d_delta = d_size[lane] * slope[lane];
                    result.delta[step][lane] = d_delta;
                    result.delta_bias[lane] += d_delta;
                }
            }
        }
        result.initial_state = carried;
        result
    }

    /// Δ of a block's channels at one step, and its derivative with respect to `delta`.
    #[inline(always)]
    fn step_size(&self, values: &Values<'_>, block: Block, at: usize) -> (Lanes, Lanes) {
        let mut size = load(&values.delta, at, block.count);
        if let Some(bias) = &values.delta_bias {
            let bias = load(bias, block.first, block.count);
            for lane in 0..LANES {
                size[lane] += bias[lane];
            }
        }
        let mut slope = [1.0; LANES];
        if self.delta_softplus {
            for lane in 0..LANES {
                let raw = size[lane];
                slope[lane] = if raw > 20.0 { 1.0 } else { cpu::sigmoid(raw) };
                size[lane] = cpu::softplus(raw);
            }
        }
        (size, slope)
    }

    #[inline(always)]
    fn b_and_c<'a>(&self, values: &'a Values<'_>, block: Block, step: usize) -> (&'a [f32], &'a [f32]) {
        let token = block.row * self.time + step;
        let b = (token * self.b.shape()[2] + block.b_group) * self.states;
        let c = (token * self.c.shape()[2] + block.c_group) * self.states;
        (&values.b[b..][..self.states], &values.c[c..][..self.states])
    }

    #[inline(always)]
    fn begins_document(&self, values: &Values<'_>, block: Block, step: usize) -> bool {
        values.document_start.is_some_and(|starts| starts[block.row * self.time + step] as usize == step)
    }

    /// Where the block's channels of one step begin in a `[batch, time, channels]` array.
    #[inline(always)]
    fn at(&self, block: Block, step: usize) -> usize {
        (block.row * self.time + step) * self.channels + block.first
    }

    fn initial_lanes(&self, values: &Values<'_>, block: Block) -> Vec<Lanes> {
        match &values.initial_state {
            Some(state) => {
                self.lanes_by_state(state, (block.row * self.channels + block.first) * self.states, block.count)
            }
            None => vec![[0.0; LANES]; self.states],
        }
    }

    /// From `[channel][state]` beginning at `start` to `[state][lane]`; lanes without a channel are zero.
    fn lanes_by_state(&self, values: &[f32], start: usize, count: usize) -> Vec<Lanes> {
        let mut lanes = vec![[0.0; LANES]; self.states];
        for (n, lanes) in lanes.iter_mut().enumerate() {
            for (lane, value) in lanes.iter_mut().take(count).enumerate() {
                *value = values[start + lane * self.states + n];
            }
        }
        lanes
    }

    /// From each block's `[time][lane]` to `[batch, time, channels]`.
    fn by_time<'a>(
        &self,
        blocks: &[Block],
        like: &Tensor,
        part: impl Fn(usize) -> &'a Vec<Lanes> + Sync,
    ) -> Result<Tensor> {
        Tensor::compute(like.device(), like.shape(), like.dtype(), |output| {
            self.for_each_chunk(blocks, output, self.channels, |index, steps, output| {
                let block = &blocks[index];
                for (lanes, output) in part(index)[steps].iter().zip(output.chunks_exact_mut(self.channels)) {
                    store(lanes, &mut output[block.first..][..block.count]);
                }
            });
            Ok(())
        })
    }

    /// From each block's `[state][lane]` to `[batch, channels, states]`.
    fn by_channel<'a>(&self, blocks: &[Block], part: impl Fn(usize) -> &'a Vec<Lanes>) -> Result<Tensor> {
        let shape = [self.batch, self.channels, self.states];
        Tensor::compute(self.input.device(), &shape, DType::F32, |output| {
            for (index, block) in blocks.iter().enumerate() {
                for lane in 0..block.count {
                    let start = (block.row * self.channels + block.first + lane) * self.states;
                    for (n, output) in output[start..][..self.states].iter_mut().enumerate() {
                        *output = part(index)[n][lane];
                    }
                }
            }
            Ok(())
        })
    }

    /// From each block's `[time][state]` to `[batch, time, groups, states]`, adding the blocks of a group in order.
    fn by_group<'a>(
        &self,
        blocks: &[Block],
        like: &Tensor,
        group: impl Fn(&Block) -> usize + Sync,
        part: impl Fn(usize) -> &'a Vec<f32> + Sync,
    ) -> Result<Tensor> {
        let (states, width) = (self.states, like.shape()[2] * self.states);
        Tensor::compute(like.device(), like.shape(), like.dtype(), |output| {
            output.fill(0.0);
            self.for_each_chunk(blocks, output, width, |index, steps, output| {
                let first = group(&blocks[index]) * states;
                let values = part(index)[steps.start * states..steps.end * states].chunks_exact(states);
                for (values, output) in values.zip(output.chunks_exact_mut(width)) {
                    for (sum, value) in output[first..][..states].iter_mut().zip(values) {
                        *sum += value;
                    }
                }
            });
            Ok(())
        })
    }

    /// Calls `function(block, steps, output of those steps)` for every block of a row and every chunk of its steps, the
    /// chunks in parallel, the blocks of each in order. `output` has `width` values for every step. By chunks, not by
    /// steps, so that a block's values are read in long runs.
    fn for_each_chunk(
        &self,
        blocks: &[Block],
        output: &mut [f32],
        width: usize,
        function: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
    ) {
        if output.is_empty() {
            return;
        }
        let per_row = blocks.len() / self.batch;
        output.par_chunks_mut(self.time * width).enumerate().for_each(|(row, output)| {
            output.par_chunks_mut(CHUNK * width).enumerate().for_each(|(chunk, output)| {
                let first = chunk * CHUNK;
                for index in row * per_row..(row + 1) * per_row {
                    function(index, first..first + output.len() / width, output);
                }
            });
        });
    }
}

/// Up to [`LANES`] values from `start` on; the other lanes are zero.
#[inline(always)]
fn load(values: &[f32], start: usize, count: usize) -> Lanes {
    let mut lanes = [0.0; LANES];
    if count == LANES {
        lanes.copy_from_slice(&values[start..][..LANES]);
    } else {
        lanes[..count].copy_from_slice(&values[start..][..count]);
    }
    lanes
}

/// Writes the lanes that have a channel.
#[inline(always)]
fn store(lanes: &Lanes, output: &mut [f32]) {
    if output.len() == LANES {
        output.copy_from_slice(lanes);
    } else {
        output.copy_from_slice(&lanes[..output.len()]);
    }
}

pub(super) fn step(state: &mut Tensor, inputs: ScanStepInputs<'_>) -> Result<Tensor> {
    let input = inputs.input;
    let (channels, states) = (input.shape()[1], inputs.b.shape()[2]);
    let (b_groups, c_groups) = (inputs.b.shape()[1], inputs.c.shape()[1]);
    let (u, delta, a) = (input.host_f32()?, inputs.delta.host_f32()?, inputs.a.host_f32()?);
    let (b, c) = (inputs.b.host_f32()?, inputs.c.host_f32()?);
    let d = inputs.d.map(Tensor::host_f32).transpose()?;
    let gate = inputs.gate.map(Tensor::host_f32).transpose()?;
    let bias = inputs.delta_bias.map(Tensor::host_f32).transpose()?;
    let state = state.make_mut::<f32>()?;
    Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
        let chunks = output.par_chunks_mut(STEP_CHANNELS).zip(state.par_chunks_mut((STEP_CHANNELS * states).max(1)));
        chunks.enumerate().for_each(|(chunk, (output, state))| {
            let first = chunk * STEP_CHANNELS;
            cpu::simd(
                #[inline(always)]
                || {
                    let mut sizes = [0.0; STEP_CHANNELS];
                    for (index, size) in sizes[..output.len()].iter_mut().enumerate() {
                        let index = first + index;
                        *size = delta[index] + bias.as_ref().map_or(0.0, |bias| bias[index % channels]);
                    }
                    if inputs.delta_softplus {
                        for size in &mut sizes {
                            *size = cpu::softplus(*size);
                        }
                    }
                    for (index, output) in output.iter_mut().enumerate() {
                        let state = &mut state[index * states..][..states];
                        let (size, index) = (sizes[index], first + index);
                        let (row, channel) = (index / channels, index % channels);
                        let a = &a[channel * states..][..states];
                        let b = &b[(row * b_groups + channel / (channels / b_groups)) * states..][..states];
                        let c = &c[(row * c_groups + channel / (channels / c_groups)) * states..][..states];
                        let u = u[index];
                        for (state, (a, b)) in state.iter_mut().zip(a.iter().zip(b)) {
                            *state = cpu::exp(size * a) * *state + size * b * u;
                        }
                        *output = cpu::dot(state, c) + d.as_ref().map_or(0.0, |d| d[channel] * u);
                    }
                    if let Some(gate) = &gate {
                        for (output, z) in output.iter_mut().zip(&gate[first..]) {
                            *output *= z * cpu::sigmoid(*z);
                        }
                    }
                },
            );
        });
        Ok(())
    })
}
