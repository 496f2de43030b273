//! The selective scan of Mamba (Gu and Dao 2023), with grouped B and C.
//!
//! The CPU way takes blocks of up to 16 channels that share their group of B and of C: the states of a block lie side by
//! side, one vector per n, so that every step is vector arithmetic without sums across lanes. A block runs through time
//! on one thread. The forward pass keeps the states at the start of every 64 steps; the backward pass computes the
//! states in between again, chunk by chunk from the end (spec: Gu and Dao 2023, section 3.3.2 and its appendix).

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::{DType, Error, Result, Tape, Tensor, Var, check, cpu};

const OPERATOR: &str = "selective_scan";

/// Channels of a block: the lanes of the widest vectors.
const LANES: usize = 16;
/// Steps between saved states.
const CHUNK: usize = 64;
/// Channels that one thread takes at a time in a decoding step.
const STEP_CHANNELS: usize = 256;

type Lanes = [f32; LANES];

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
    /// f32 `[batch, channels, states]`: the state before the first step. `None`: zeros. Not together with
    /// `document_start`.
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
/// Softplus passes values above 20 through. At the first token of a document the state before it counts as zero.
///
/// # Errors
/// Shape errors that name the argument; groups that do not divide the channels; an initial state together with
/// document starts.
pub fn selective_scan(tape: &Tape<'_>, inputs: ScanInputs<'_>) -> Result<ScanOutput> {
    let scan = Scan::new(&inputs)?;
    let (output, last_state, saved_states) = scan.forward_cpu()?;
    let mut variables = vec![inputs.input, inputs.delta, inputs.a, inputs.b, inputs.c];
    let optional = [inputs.d, inputs.gate, inputs.delta_bias, inputs.initial_state];
    variables.extend(optional.iter().flatten());
    let present = optional.map(|input| input.is_some());
    let mut results = tape.record(&variables, vec![output, last_state], move |gradients, _| {
        let [required @ .., d, gate, delta_bias, initial_state] =
            scan.backward_cpu(gradients[0].as_ref(), gradients[1].as_ref(), &saved_states)?;
        let mut result: Vec<Option<Tensor>> = required.into_iter().collect();
        for (gradient, present) in [d, gate, delta_bias, initial_state].into_iter().zip(present) {
            if present {
                result.push(gradient);
            }
        }
        Ok(result)
    });
    let (last_state, output) = (results.remove(1), results.remove(0));
    Ok(ScanOutput { output, last_state })
}

/// Everything that a scan reads, as tensors, with its sizes.
struct Scan {
    batch: usize,
    time: usize,
    channels: usize,
    states: usize,
    input: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Option<Tensor>,
    gate: Option<Tensor>,
    delta_bias: Option<Tensor>,
    delta_softplus: bool,
    initial_state: Option<Tensor>,
    document_start: Option<Tensor>,
}

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
    fn new(inputs: &ScanInputs<'_>) -> Result<Self> {
        let input = inputs.input;
        check::on_cpu(OPERATOR, input)?;
        check::is_float(OPERATOR, "input", input)?;
        check::rank(OPERATOR, "input", input, 3, "[batch, time, channels]")?;
        check::rank(OPERATOR, "a", inputs.a, 2, "[channels, states]")?;
        let [batch, time, channels] = *input.shape() else { unreachable!("the rank was checked") };
        let states = inputs.a.shape()[1];
        check::shape(OPERATOR, "delta", inputs.delta, input.shape())?;
        check::shape(OPERATOR, "a", inputs.a, &[channels, states])?;
        for (name, group_tensor) in [("b", inputs.b), ("c", inputs.c)] {
            check::rank(OPERATOR, name, group_tensor, 4, "[batch, time, groups, states]")?;
            let groups = group_tensor.shape()[2];
            check::shape(OPERATOR, name, group_tensor, &[batch, time, groups, states])?;
            if groups == 0 || !channels.is_multiple_of(groups) {
                return Err(Error::Invalid {
                    operator: OPERATOR,
                    message: format!("{groups} groups of {name} do not divide {channels} channels"),
                });
            }
        }
        for (name, vector) in [("d", inputs.d), ("delta_bias", inputs.delta_bias)] {
            if let Some(vector) = vector {
                check::shape(OPERATOR, name, vector, &[channels])?;
            }
        }
        if let Some(gate) = inputs.gate {
            check::shape(OPERATOR, "gate", gate, input.shape())?;
        }
        if let Some(state) = inputs.initial_state {
            check::shape(OPERATOR, "initial_state", state, &[batch, channels, states])?;
            if inputs.document_start.is_some() {
                let message = "an initial state belongs to one document per row: leave out document_start".to_owned();
                return Err(Error::Invalid { operator: OPERATOR, message });
            }
        }
        if let Some(starts) = inputs.document_start {
            check::is_u32(OPERATOR, "document_start", starts)?;
            check::shape(OPERATOR, "document_start", starts, &[batch, time])?;
        }
        let owned = |variable: &Var| variable.tensor().clone();
        Ok(Self {
            batch,
            time,
            channels,
            states,
            input: owned(input),
            delta: owned(inputs.delta),
            a: owned(inputs.a),
            b: owned(inputs.b),
            c: owned(inputs.c),
            d: inputs.d.map(owned),
            gate: inputs.gate.map(owned),
            delta_bias: inputs.delta_bias.map(owned),
            delta_softplus: inputs.delta_softplus,
            initial_state: inputs.initial_state.map(owned),
            document_start: inputs.document_start.cloned(),
        })
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
    fn forward_cpu(&self) -> Result<(Tensor, Tensor, Vec<Vec<Lanes>>)> {
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
        let mut state = self.initial_lanes(values, block);
        let mut output = vec![[0.0; LANES]; self.time];
        let mut chunk_states = Vec::with_capacity(self.time.div_ceil(CHUNK) * self.states);
        for (step, output) in output.iter_mut().enumerate() {
            if step % CHUNK == 0 {
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
    fn backward_cpu(
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
        let mut decays = vec![[0.0; LANES]; CHUNK * states];
        let mut kept = vec![[0.0; LANES]; CHUNK * states];
        let mut sizes = [([0.0; LANES], [0.0; LANES]); CHUNK];
        for chunk in (0..self.time.div_ceil(CHUNK)).rev() {
            let first = chunk * CHUNK;
            let length = CHUNK.min(self.time - first);
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
    const OPERATOR: &str = "selective_scan_step";
    let input = inputs.input;
    check::on_cpu(OPERATOR, input)?;
    check::rank(OPERATOR, "input", input, 2, "[batch, channels]")?;
    check::rank(OPERATOR, "b", inputs.b, 3, "[batch, groups, states]")?;
    check::rank(OPERATOR, "c", inputs.c, 3, "[batch, groups, states]")?;
    let (batch, channels, states) = (input.shape()[0], input.shape()[1], inputs.b.shape()[2]);
    let (b_groups, c_groups) = (inputs.b.shape()[1], inputs.c.shape()[1]);
    check::shape(OPERATOR, "delta", inputs.delta, input.shape())?;
    check::shape(OPERATOR, "a", inputs.a, &[channels, states])?;
    check::shape(OPERATOR, "b", inputs.b, &[batch, b_groups, states])?;
    check::shape(OPERATOR, "c", inputs.c, &[batch, c_groups, states])?;
    check::shape(OPERATOR, "state", state, &[batch, channels, states])?;
    for (name, vector) in [("d", inputs.d), ("delta_bias", inputs.delta_bias)] {
        if let Some(vector) = vector {
            check::shape(OPERATOR, name, vector, &[channels])?;
        }
    }
    if let Some(gate) = inputs.gate {
        check::shape(OPERATOR, "gate", gate, input.shape())?;
    }
    for (name, groups) in [("b", b_groups), ("c", c_groups)] {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::Invalid {
                operator: OPERATOR,
                message: format!("{groups} groups of {name} do not divide {channels} channels"),
            });
        }
    }
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

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::gradient_check;

    fn wave(shape: &[usize], phase: f32) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.731 + phase).sin()).collect();
        Tensor::from_slice(&Device::cpu(), shape, &values).unwrap()
    }

    /// input, delta, a, b, c, d, gate, delta_bias, initial_state
    fn tensors(batch: usize, time: usize, channels: usize, states: usize, groups: (usize, usize)) -> [Tensor; 9] {
        let a: Vec<f32> = (0..channels * states).map(|i| -0.2 - (i % 7) as f32 * 0.3).collect();
        [
            wave(&[batch, time, channels], 0.0),
            wave(&[batch, time, channels], 1.0),
            Tensor::from_slice(&Device::cpu(), &[channels, states], &a).unwrap(),
            wave(&[batch, time, groups.0, states], 2.0),
            wave(&[batch, time, groups.1, states], 3.0),
            wave(&[channels], 4.0),
            wave(&[batch, time, channels], 5.0),
            wave(&[channels], 6.0),
            wave(&[batch, channels, states], 7.0),
        ]
    }

    fn inputs<'a>(v: &'a [Var], document_start: Option<&'a Tensor>) -> ScanInputs<'a> {
        ScanInputs {
            input: &v[0],
            delta: &v[1],
            a: &v[2],
            b: &v[3],
            c: &v[4],
            d: Some(&v[5]),
            gate: Some(&v[6]),
            delta_bias: Some(&v[7]),
            delta_softplus: true,
            initial_state: v.get(8),
            document_start,
        }
    }

    #[test]
    fn one_channel_by_hand() {
        let one = |shape: &[usize], values: &[f32]| {
            Var::constant(&Tensor::from_slice(&Device::cpu(), shape, values).unwrap())
        };
        let v = [
            one(&[1, 2, 1], &[2.0, 3.0]),
            one(&[1, 2, 1], &[0.5, 1.0]),
            one(&[1, 1], &[-1.0]),
            one(&[1, 2, 1, 1], &[1.0, 4.0]),
            one(&[1, 2, 1, 1], &[10.0, 1.0]),
        ];
        let inputs = ScanInputs {
            input: &v[0],
            delta: &v[1],
            a: &v[2],
            b: &v[3],
            c: &v[4],
            d: None,
            gate: None,
            delta_bias: None,
            delta_softplus: false,
            initial_state: None,
            document_start: None,
        };
        let result = selective_scan(&Tape::inference(), inputs).unwrap();
        let second = (-1f32).exp() * 1.0 + 12.0;
        let output = result.output.to_vec::<f32>().unwrap();
        assert!((output[0] - 10.0).abs() < 1e-6 && (output[1] - second).abs() < 1e-5, "{output:?}");
        assert!((result.last_state.item().unwrap() - second).abs() < 1e-5);
    }

    #[test]
    fn steps_equal_the_whole() {
        let tensors = tensors(2, 70, 24, 5, (2, 6));
        let v: Vec<Var> = tensors.iter().map(Var::constant).collect();
        let whole = selective_scan(&Tape::inference(), inputs(&v, None)).unwrap();
        let mut state = tensors[8].clone();
        let at = |tensor: &Tensor, step: usize| {
            let width: usize = tensor.shape()[2..].iter().product();
            let values = tensor.to_vec::<f32>().unwrap();
            let rows: Vec<f32> = (0..2).flat_map(|row| values[(row * 70 + step) * width..][..width].to_vec()).collect();
            let mut shape = tensor.shape().to_vec();
            shape.remove(1);
            Tensor::from_slice(&Device::cpu(), &shape, &rows).unwrap()
        };
        for step in 0..70 {
            let [u, delta, b, c, z] = [0, 1, 3, 4, 6].map(|index| at(&tensors[index], step));
            let inputs = ScanStepInputs {
                input: &u,
                delta: &delta,
                a: &tensors[2],
                b: &b,
                c: &c,
                d: Some(&tensors[5]),
                gate: Some(&z),
                delta_bias: Some(&tensors[7]),
                delta_softplus: true,
            };
            let output = selective_scan_step(&mut state, inputs).unwrap().to_vec::<f32>().unwrap();
            let expected = at(&whole.output, step).to_vec::<f32>().unwrap();
            for (found, expected) in output.iter().zip(&expected) {
                assert!((found - expected).abs() <= 1e-5, "step {step}: {found} {expected}");
            }
        }
        for (found, expected) in state.to_vec::<f32>().unwrap().iter().zip(whole.last_state.to_vec::<f32>().unwrap()) {
            assert!((found - expected).abs() <= 1e-5);
        }
    }

    #[test]
    fn gradients_agree_with_differences_with_groups_state_and_documents() {
        let full = tensors(2, 5, 6, 2, (2, 3));
        let check = gradient_check(&full, 1e-2, |tape, v| Ok(selective_scan(tape, inputs(v, None))?.output)).unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
        let check =
            gradient_check(&full, 1e-2, |tape, v| Ok(selective_scan(tape, inputs(v, None))?.last_state)).unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
        let starts = Tensor::from_slice(&Device::cpu(), &[2, 5], &[0u32, 0, 2, 2, 4, 0, 1, 1, 1, 1]).unwrap();
        let check =
            gradient_check(&full[..8], 1e-2, |tape, v| Ok(selective_scan(tape, inputs(v, Some(&starts)))?.output))
                .unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
    }

    /// Output and last state, and the gradients of all inputs under a fixed seed.
    fn run(tensors: &[Tensor], starts: Option<&Tensor>) -> (Vec<f32>, Vec<f32>, Vec<Vec<f32>>) {
        let tape = Tape::new();
        let v: Vec<Var> = tensors.iter().map(|tensor| tape.leaf(tensor)).collect();
        let result = selective_scan(&tape, inputs(&v, starts)).unwrap();
        let (output, last_state) = (result.output.to_vec().unwrap(), result.last_state.to_vec().unwrap());
        let seed = tensors[0].clone();
        let gradients = tape.backward_from(vec![(result.output, seed)]).unwrap();
        let gradients = tensors.iter().map(|tensor| gradients.get(tensor).unwrap().to_vec().unwrap()).collect();
        (output, last_state, gradients)
    }

    #[test]
    fn packed_documents_equal_separate_ones_across_chunks() {
        // Documents that end on a chunk's border, just past one, within one, and after a single token.
        let lengths = [64, 65, 40, 1, 30];
        let total: usize = lengths.iter().sum();
        let tensors = tensors(1, total, 20, 3, (5, 2));
        let starts: Vec<u32> = lengths
            .iter()
            .scan(0u32, |next, &length| {
                let first = *next;
                *next += length as u32;
                Some(std::iter::repeat_n(first, length))
            })
            .flatten()
            .collect();
        let starts = Tensor::from_slice(&Device::cpu(), &[1, total], &starts).unwrap();
        let (packed, packed_state, packed_gradients) = run(&tensors[..8], Some(&starts));
        let cut = |tensor: &Tensor, first: usize, length: usize| {
            let width: usize = tensor.shape()[2..].iter().product();
            let mut shape = tensor.shape().to_vec();
            shape[1] = length;
            let values = &tensor.to_vec::<f32>().unwrap()[first * width..][..length * width];
            Tensor::from_slice(&Device::cpu(), &shape, values).unwrap()
        };
        const BY_TIME: [usize; 5] = [0, 1, 3, 4, 6];
        let mut sums = [vec![0.0; 60], vec![0.0; 20], vec![0.0; 20]];
        let mut first = 0;
        for length in lengths {
            let mut document = tensors[..8].to_vec();
            for index in BY_TIME {
                document[index] = cut(&tensors[index], first, length);
            }
            let (output, state, gradients) = run(&document, None);
            assert_eq!(output, packed[first * 20..][..length * 20]);
            for index in BY_TIME {
                let width = gradients[index].len() / length;
                assert_eq!(gradients[index], packed_gradients[index][first * width..][..length * width], "{index}");
            }
            for (sum, index) in sums.iter_mut().zip([2, 5, 7]) {
                for (sum, value) in sum.iter_mut().zip(&gradients[index]) {
                    *sum += value;
                }
            }
            first += length;
            if first == total {
                assert_eq!(state, packed_state);
            }
        }
        // These sum over time, in another order: f32 rounding of 200 terms of order 1.
        for (sum, index) in sums.iter().zip([2, 5, 7]) {
            for (sum, packed) in sum.iter().zip(&packed_gradients[index]) {
                assert!((sum - packed).abs() <= 1e-4, "{index}: {sum} {packed}");
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let tensors = tensors(2, 70, 40, 4, (2, 5));
        let with_threads = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&tensors, None))
        };
        assert_eq!(with_threads(1), with_threads(3));
    }

    #[test]
    fn not_a_number_reaches_only_its_channel_and_the_future() {
        let mut tensors = tensors(1, 4, 3, 2, (1, 1));
        tensors[0].make_mut::<f32>().unwrap()[2 * 3 + 1] = f32::NAN;
        let (output, _, _) = run(&tensors, None);
        for (index, value) in output.iter().enumerate() {
            assert_eq!(value.is_nan(), index % 3 == 1 && index / 3 >= 2, "{index}");
        }
    }

    #[test]
    fn a_sequence_of_no_steps_keeps_its_state() {
        let tensors = tensors(1, 0, 4, 3, (1, 1));
        let v: Vec<Var> = tensors.iter().map(Var::constant).collect();
        let result = selective_scan(&Tape::inference(), inputs(&v, None)).unwrap();
        assert_eq!(result.output.shape(), [1, 0, 4]);
        assert_eq!(result.last_state.to_vec::<f32>().unwrap(), tensors[8].to_vec::<f32>().unwrap());
    }

    #[test]
    fn groups_that_do_not_divide_and_two_kinds_of_start_are_refused() {
        let v: Vec<Var> = tensors(1, 2, 6, 2, (4, 3)).iter().map(Var::constant).collect();
        let message = selective_scan(&Tape::inference(), inputs(&v, None)).unwrap_err().to_string();
        assert_eq!(message, "selective_scan: 4 groups of b do not divide 6 channels");
        let v: Vec<Var> = tensors(1, 2, 6, 2, (2, 3)).iter().map(Var::constant).collect();
        let starts = Tensor::from_slice(&Device::cpu(), &[1, 2], &[0u32, 1]).unwrap();
        assert!(selective_scan(&Tape::inference(), inputs(&v, Some(&starts))).is_err());
    }
}
