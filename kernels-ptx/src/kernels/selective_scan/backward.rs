//! The scan's gradients. With λ the gradient of the state and `g` what reaches the state before it, `g_t = ā_{t+1} λ_{t+1}`:
//! `λ_t = g_t + C_t dy_t`; with `e_t = ā_t h_{t−1}`: `du = D dy + Δ Σ λ B`, `dΔ = u Σ λ B + Σ λ A e`, `dA = Σ_t λ Δ e`,
//! `dB = Σ λ Δ u`, `dC = Σ dy h`.

use super::forward::{B, C, DRIVEN, Drive, SIZE, SIZES, advance};
use super::lane::{Lane, QUAD, Stage, Steps};
use super::{STAGE, Scan, THREADS};
use crate::asm::{Assembler, Description, F32, Global, Pred, U32, U64, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

const SUMS_THREADS: u32 = 256;

/// What every span but the first sends back when nothing reaches it from later ones, and its sum of Δ.
///
/// Parameters: `states` (f32 `[batch, spans, channels, states]`, written but for the first span), `sums` (f32 `[batch, spans,
/// channels]`, likewise), `gradient`, `delta` (of the type, `[batch, time, channels]`), `a` (f32 `[channels, states]`), `c` (of
/// the type, `[batch, time, groups, states]`), `gate` (like delta, with a gate), `delta_bias` (f32 `[channels]`, with a bias),
/// `document_start` (u32 `[batch, time]`, with documents), `spans` (u32), and the sizes of
/// [`ScanForward`](super::ScanForward). The grid has `spans − 1` blocks in y.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SpanCarries(pub Scan);

/// All gradients of the scan.
///
/// Parameters, written: `input_gradient`, `delta_gradient` (of the type, `[batch, time, channels]`), `a_parts` (f32 `[batch,
/// spans, channels, states]`), `b_gradient`, `c_gradient` (of the type `[batch, time, groups, states]` where a group is one
/// tile, else f32 `[batch, time, tiles, states]`, with half as many tiles when they are summed in pairs), `d_parts` (f32
/// `[batch, spans, channels]`, with D), `gate_gradient` (with a gate), `bias_parts` (like `d_parts`, with a bias),
/// `state_gradient` (f32 `[batch, channels, states]`, with an initial state). Read: `gradient` (of the output), the inputs of
/// [`ScanForward`](super::ScanForward) from `input` to `document_start`, `chunk_states` (f32 `[batch, chunks, channels,
/// states]`), `carries` (f32 `[batch, spans, channels, states]`: what reaches each span's last state from later ones, when
/// carried), and the sizes of [`ScanForward`](super::ScanForward). The grid has one block in y per span.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ScanBackward {
    /// The inputs.
    pub scan: Scan,
    /// Steps of a chunk.
    pub chunk: u32,
    /// Something reaches the last states of spans.
    pub carried: bool,
    /// The gradient of the initial state is wanted.
    pub initial: bool,
    /// How the gradient of B is written.
    pub b: GroupGradient,
    /// How the gradient of C is written.
    pub c: GroupGradient,
}

/// How the gradient of B or C is written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GroupGradient {
    /// A group is one tile: as it is, of the inputs' type.
    Whole,
    /// One part per tile, f32.
    Tiles,
    /// One part per two tiles, f32.
    Pairs,
}

impl GroupGradient {
    /// The way for groups of `tiles` tiles.
    pub fn of(tiles: u32) -> Self {
        match tiles {
            1 => Self::Whole,
            _ if tiles.is_multiple_of(2) => Self::Pairs,
            _ => Self::Tiles,
        }
    }

    /// Parts of a group of `tiles` tiles.
    pub fn parts(self, tiles: u32) -> u32 {
        match self {
            Self::Whole | Self::Tiles => tiles,
            Self::Pairs => tiles / 2,
        }
    }

    pub(super) fn element(self, element: Element) -> Element {
        match self {
            Self::Whole => element,
            Self::Tiles | Self::Pairs => Element::F32,
        }
    }

    pub(super) fn letter(self) -> &'static str {
        match self {
            Self::Whole => "w",
            Self::Tiles => "t",
            Self::Pairs => "p",
        }
    }
}

/// `output[token, group, n] = Σ_p parts[token, group · parts + p, n]`, in the order of `p`.
///
/// Parameters: `output` (of the type, written), `parts` (f32), `count` (u32: elements of the output), `states`, `splits` (u32:
/// parts of a group).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GroupSums {
    /// Type of the output.
    pub element: Element,
}

/// Arrays of a stage per channel, after those of the way forward.
const SLOPED: usize = 2;
const INPUT: usize = 3;
const SLOPE: usize = 4;
const GATE: usize = 5;

/// `dy` and the factor that makes `y` the gate's gradient.
pub(super) fn gated<'a>(gradient: Value<'a, F32>, gate: Option<Value<'a, F32>>) -> (Value<'a, F32>, Option<Value<'a, F32>>) {
    match gate {
        None => (gradient, None),
        Some(z) => {
            let s = z.sigmoid_flushed();
            let through = gradient * s;
            (through * z, Some(through * z.fma(-s + 1.0, 1.0)))
        }
    }
}

impl KernelSource for SpanCarries {
    fn build(&self) -> Kernel {
        let form = self.0;
        let bytes = form.element.bytes() as u64;
        let arrays = 2 + u64::from(form.gate);
        let description = Description {
            name: form.name("selective_scan_span_carries"),
            summary: "what each span of time sends back when nothing reaches it from later ones, and its sum of step sizes;\n\
                      a warp per two tiles of 16 channels and span"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| Work {
                bytes: bytes * sizes[0] * sizes[1] * (arrays * sizes[2] + sizes[3] * sizes[5]),
                operations: sizes[0] * sizes[1] * sizes[2] * sizes[3] * 5,
            },
        };
        Assembler::assemble(description, |k| {
            let (states, sums) = (k.write("states", Element::F32), k.write("sums", Element::F32));
            let (gradient, delta) = (k.read("gradient", form.element), k.read("delta", form.element));
            let (a, c) = (k.read("a", Element::F32), k.read("c", form.element));
            let gate = form.gate.then(|| k.read("gate", form.element));
            let bias = form.bias.then(|| k.read("delta_bias", Element::F32));
            let document_start = form.documents.then(|| k.read("document_start", Element::U32));
            let spans = k.u32("spans");
            let lane = Lane::new(k, form);
            let span = (k.block_y() + 1).named("this_span");
            let (first, end) = lane.steps(span);
            let stage = Stage::new(&lane, 2, 1);
            let rates = lane.rates(a);
            let bias = lane.own_of(bias);
            let carry = lane.zeros();
            let sum = k.variable(0.0f32).named("sum");
            for_stages_back(k, first, end, |at| {
                let steps = lane.stage(at, end);
                let delta = lane.load_delta(&steps, delta);
                let g = lane.load_own(&steps, gradient, 0.0);
                let z = gate.map(|gate| lane.load_own(&steps, gate, 0.0));
                let c = lane.load_group(&steps, c, lane.c);
                let begins = lane.begins(&steps, document_start);
                for step in 0..STAGE as usize {
                    let size = lane.step_size(&steps, step, delta[step], bias).size;
                    sum.set(sum.get() + size);
                    stage.put(SIZE, step, size);
                    stage.put(DRIVEN, step, gated(g[step], z.as_ref().map(|z| z[step])).0);
                    stage.put_group(0, step, &c[step]);
                }
                k.warp_barrier();
                for (step, &begins) in begins.iter().enumerate().rev() {
                    let (sizes, dy) = (stage.quad(SIZE, step), stage.quad(DRIVEN, step));
                    let c = stage.quarter(0, step);
                    for (channel, carry) in carry.iter().enumerate() {
                        for ((carry, &rate), &c) in carry.iter().zip(&rates[channel]).zip(&c) {
                            let decay = (sizes[channel] * rate).exp2_flushed();
                            let lambda = c.fma(dy[channel], carry.get());
                            carry.set(decay * lambda);
                        }
                    }
                    lane.reset_if(begins, &carry);
                }
                k.warp_barrier();
            });
            let outer = lane.row.mad(spans, span);
            lane.store_states(states, outer, &carry);
            let place = sums.from_row(outer, lane.channels).at(lane.channel);
            place.store_if(lane.owned & lane.channel_exists, sum.get());
        })
    }

    fn configurations() -> Vec<Self> {
        Scan::configurations().into_iter().map(|scan| Self(Scan { skip: false, ..scan })).collect()
    }
}

/// Runs `body` with the first step of every stage from `first` to `end`, the last stage first.
fn for_stages_back<'a>(
    k: &'a Assembler,
    first: Value<'a, U32>,
    end: Value<'a, U32>,
    body: impl FnOnce(Value<'a, U32>),
) {
    let stages = (end - first + (STAGE - 1)) >> STAGE.ilog2();
    k.for_(0u32, stages, 1u32, |done| body((stages - 1 - done).mad(STAGE, first)));
}

impl KernelSource for ScanBackward {
    fn build(&self) -> Kernel {
        let Self { scan: form, chunk, carried, initial, b, c } = *self;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let bytes = form.element.bytes() as u64;
        // u, delta, z and the gradient are read; du, ddelta and dz are written.
        let arrays = 5 + 2 * u64::from(form.gate);
        let name = form.name("selective_scan_backward");
        let description = Description {
            name: format!(
                "{name}_c{chunk}_{}{}{}{}",
                b.letter(),
                c.letter(),
                flag(carried, "_carried"),
                flag(initial, "_initial")
            ),
            summary: format!(
                "gradients of the selective scan; a warp per two tiles of 16 channels and span of time, chunks of {chunk} steps"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| {
                let [batch, time, channels, states, b_groups, c_groups] = *sizes else {
                    unreachable!("six sizes are named")
                };
                Work {
                    bytes: bytes * batch * time * (arrays * channels + 2 * states * (b_groups + c_groups)),
                    operations: batch * time * channels * states * 26,
                }
            },
        };
        Assembler::assemble(description, |k| Backward::new(k, *self).write())
    }

    fn configurations() -> Vec<Self> {
        let of = |scan| {
            [(GroupGradient::Tiles, true), (GroupGradient::Pairs, true), (GroupGradient::Pairs, false)].map(
                |(b, carried)| Self { scan, chunk: super::CHUNK, carried, initial: false, b, c: GroupGradient::Whole },
            )
        };
        Scan::configurations().into_iter().flat_map(of).collect()
    }
}

/// The backward kernel while it is written.
struct Backward<'a> {
    k: &'a Assembler,
    source: ScanBackward,
    outputs: Outputs<'a>,
    gradient: Global<'a>,
    a: Global<'a>,
    c: Global<'a>,
    d: Option<Global<'a>>,
    gate: Option<Global<'a>>,
    bias: Option<Global<'a>>,
    drive: Drive<'a>,
    chunk_states: Global<'a>,
    carries: Option<Global<'a>>,
    lane: Lane<'a>,
    stage: Stage<'a>,
}

struct Outputs<'a> {
    input: Global<'a>,
    delta: Global<'a>,
    a: Global<'a>,
    b: Global<'a>,
    c: Global<'a>,
    d: Option<Global<'a>>,
    gate: Option<Global<'a>>,
    bias: Option<Global<'a>>,
    state: Option<Global<'a>>,
}

/// What a lane keeps while it walks back through its span.
struct Kept<'a> {
    /// A log₂ e.
    rates: Vec<Vec<Value<'a, F32>>>,
    bias: Value<'a, F32>,
    d: Value<'a, F32>,
    /// What reaches the state from later steps.
    carry: Vec<Vec<Variable<'a, F32>>>,
    a_sums: Vec<Vec<Variable<'a, F32>>>,
    d_sum: Variable<'a, F32>,
    bias_sum: Variable<'a, F32>,
}

/// Where the steps of a stage are written, from the first, in elements. Not as the places that were read: those would stay in
/// registers from the way forward.
struct Places<'a> {
    steps: Steps<'a>,
    b: Value<'a, U64>,
    c: Value<'a, U64>,
}

impl<'a> Backward<'a> {
    /// Declares the parameters.
    fn new(k: &'a Assembler, source: ScanBackward) -> Self {
        let form = source.scan;
        let element = form.element;
        let outputs = Outputs {
            input: k.write("input_gradient", element),
            delta: k.write("delta_gradient", element),
            a: k.write("a_parts", Element::F32),
            b: k.write("b_gradient", source.b.element(element)),
            c: k.write("c_gradient", source.c.element(element)),
            d: form.skip.then(|| k.write("d_parts", Element::F32)),
            gate: form.gate.then(|| k.write("gate_gradient", element)),
            bias: form.bias.then(|| k.write("bias_parts", Element::F32)),
            state: source.initial.then(|| k.write("state_gradient", Element::F32)),
        };
        let gradient = k.read("gradient", element);
        let (input, delta) = (k.read("input", element), k.read("delta", element));
        let (a, b, c) = (k.read("a", Element::F32), k.read("b", element), k.read("c", element));
        let d = form.skip.then(|| k.read("d", Element::F32));
        let gate = form.gate.then(|| k.read("gate", element));
        let bias = form.bias.then(|| k.read("delta_bias", Element::F32));
        let document_start = form.documents.then(|| k.read("document_start", Element::U32));
        let chunk_states = k.read("chunk_states", Element::F32);
        let carries = source.carried.then(|| k.read("carries", Element::F32));
        let lane = Lane::new(k, form);
        let stage = Stage::new(&lane, 5 + u32::from(form.gate), 2);
        let drive = Drive::new(input, delta, b, document_start);
        Self { k, source, outputs, gradient, a, c, d, gate, bias, drive, chunk_states, carries, lane, stage }
    }

    fn write(&self) {
        let (k, lane) = (self.k, &self.lane);
        let chunk = self.source.chunk;
        let (first, end) = lane.steps(k.block_y());
        let spans = (lane.time + (lane.span - 1)).div(lane.span);
        let chunks = (lane.time + (chunk - 1)).div(chunk);
        let outer = lane.row.mad(spans, k.block_y()).named("row_span");
        let kept = Kept {
            rates: lane.rates(self.a),
            bias: lane.own_of(self.bias),
            d: lane.own_of(self.d),
            carry: lane.zeros(),
            a_sums: lane.zeros(),
            d_sum: k.variable(0.0f32).named("d_sum"),
            bias_sum: k.variable(0.0f32).named("bias_sum"),
        };
        if let Some(carries) = self.carries {
            lane.load_states(carries, outer, &kept.carry);
        }
        // The states at the start of each stage of the chunk in hand: a lane's own lie 32 vectors apart.
        let states = lane.states() as u32;
        let starts = k.shared(Element::F32, chunk.div_ceil(STAGE) * 32 * QUAD as u32 * states);
        let state = lane.zeros();
        let own_chunks = (end - first + (chunk - 1)).div(chunk);
        k.for_(0u32, own_chunks, 1u32, |done| {
            let chunk_first = (own_chunks - 1 - done).mad(chunk, first).named("chunk_first");
            let chunk_end = (chunk_first + chunk).min(end).named("chunk_end");
            for value in state.iter().flatten() {
                value.set(0.0f32);
            }
            lane.load_states(self.chunk_states, lane.row.mad(chunks, chunk_first.div(chunk)), &state);
            k.comment("forward through the chunk: the states at the start of each stage");
            k.for_(chunk_first, chunk_end, STAGE, |at| {
                let index = (at - chunk_first) >> STAGE.ilog2();
                let place = starts.at(index.mad(32u32, k.lane()) * (QUAD as u32));
                for (channel, values) in per_vector(&state).into_iter().enumerate() {
                    let values: Vec<_> = values.iter().map(|value| value.get()).collect();
                    place.plus(vector_offset(channel, chunk)).store_vector(&values);
                }
                k.if_((at + STAGE).lt(chunk_end), || self.advance_stage(at, chunk_end, &kept, &state));
            });
            k.comment("back through the chunk");
            for_stages_back(k, chunk_first, chunk_end, |at| {
                let index = (at - chunk_first) >> STAGE.ilog2();
                let place = starts.at(index.mad(32u32, k.lane()) * (QUAD as u32));
                for (channel, values) in per_vector(&state).into_iter().enumerate() {
                    let loaded = place.plus(vector_offset(channel, chunk)).load_vector::<QUAD>();
                    for (variable, value) in values.iter().zip(loaded) {
                        variable.set(value);
                    }
                }
                self.stage_back(at, chunk_end, &kept, &state);
            });
        });

        lane.store_states(self.outputs.a, outer, &kept.a_sums);
        for (parts, sum) in [(self.outputs.d, kept.d_sum), (self.outputs.bias, kept.bias_sum)] {
            if let Some(parts) = parts {
                let place = parts.from_row(outer, lane.channels).at(lane.channel);
                place.store_if(lane.owned & lane.channel_exists, sum.get());
            }
        }
        if let Some(state_gradient) = self.outputs.state {
            k.if_(k.block_y().eq(0), || lane.store_states(state_gradient, lane.row, &kept.carry));
        }
    }

    /// Advances the states through a stage, and nothing more.
    fn advance_stage(
        &self,
        at: Value<'a, U32>,
        end: Value<'a, U32>,
        kept: &Kept<'a>,
        state: &[Vec<Variable<'a, F32>>],
    ) {
        let (k, lane, stage) = (self.k, &self.lane, &self.stage);
        let steps = lane.stage(at, end);
        let driven = self.drive.read(lane, &steps);
        for step in 0..STAGE as usize {
            driven.put(lane, stage, &steps, step, kept.bias);
        }
        k.warp_barrier();
        for (step, &begins) in driven.begins.iter().enumerate() {
            advance(lane, stage, step, begins, &kept.rates, state);
        }
        k.warp_barrier();
    }

    /// Forward through a stage again, keeping what its steps kept of the states before them, then back.
    fn stage_back(&self, at: Value<'a, U32>, end: Value<'a, U32>, kept: &Kept<'a>, state: &[Vec<Variable<'a, F32>>]) {
        let (k, lane, stage) = (self.k, &self.lane, &self.stage);
        let steps = lane.stage(at, end);
        let read = self.drive.read(lane, &steps);
        let g = lane.load_own(&steps, self.gradient, 0.0);
        let z = self.gate.map(|gate| lane.load_own(&steps, gate, 0.0));
        let c = lane.load_group(&steps, self.c, lane.c);
        for step in 0..STAGE as usize {
            let size = read.put(lane, stage, &steps, step, kept.bias);
            let (dy, gate) = gated(g[step], z.as_ref().map(|z| z[step]));
            stage.put(SLOPED, step, dy);
            stage.put(INPUT, step, read.u[step]);
            stage.put(SLOPE, step, size.slope);
            if let Some(gate) = gate {
                stage.put(GATE, step, gate);
            }
            stage.put_group(C, step, &c[step]);
        }
        k.warp_barrier();
        // e = ā h of the step before, [step][channel][state].
        let mut remembered: Vec<Vec<Vec<Value<'a, F32>>>> = Vec::new();
        for (step, &begins) in read.begins.iter().enumerate() {
            lane.reset_if(begins, state);
            let (sizes, driven) = (stage.quad(SIZE, step), stage.quad(DRIVEN, step));
            let b = stage.quarter(B, step);
            let mut of_step = Vec::new();
            for (channel, state) in state.iter().enumerate() {
                let mut of_channel = Vec::new();
                for ((state, &rate), &b) in state.iter().zip(&kept.rates[channel]).zip(&b) {
                    let remembered = (sizes[channel] * rate).exp2_flushed() * state.get();
                    state.set(driven[channel].fma(b, remembered));
                    of_channel.push(remembered);
                }
                of_step.push(of_channel);
            }
            remembered.push(of_step);
        }
        // So that decays and reads of the way forward are not kept in registers for the way back.
        k.warp_barrier();
        let places =
            Places { b: self.group_place(self.source.b, &steps), c: self.group_place(self.source.c, &steps), steps };
        for (step, &begins) in read.begins.iter().enumerate().rev() {
            self.step_back(step, begins, &places, kept, &remembered[step]);
            k.warp_barrier();
        }
    }

    fn step_back(
        &self,
        step: usize,
        begins: Option<Value<'a, Pred>>,
        places: &Places<'a>,
        kept: &Kept<'a>,
        remembered: &[Vec<Value<'a, F32>>],
    ) {
        let (k, lane, stage) = (self.k, &self.lane, &self.stage);
        let (sizes, driven, dy) = (stage.quad(SIZE, step), stage.quad(DRIVEN, step), stage.quad(SLOPED, step));
        let (b, c) = (stage.quarter(B, step), stage.quarter(C, step));
        let zero = k.constant(0.0f32);
        let padded = lane.states().next_multiple_of(QUAD);
        let all = || (0..QUAD).flat_map(|channel| (0..lane.states()).map(move |n| (channel, n)));
        let place = lane.channels.mad_wide(step as u32, places.steps.own);
        let wanted = places.steps.written(step);

        k.comment("what follows from the state: the gradients of C and of the gate");
        let (mut y, mut c_sums) = ([zero; QUAD], vec![zero; padded]);
        for (channel, n) in all() {
            let h = driven[channel].fma(b[n], remembered[channel][n]);
            y[channel] = c[n].fma(h, y[channel]);
            c_sums[n] = h.fma(dy[channel], c_sums[n]);
        }
        self.write_group(self.outputs.c, self.source.c, (places.c, step), &places.steps, &c_sums);
        let u = stage.own(INPUT, step);
        if let Some(gate_gradient) = self.outputs.gate {
            let y = kept.d.fma(u, lane.over_quarters(y));
            gate_gradient.from(place).first().store_if(wanted, y * stage.own(GATE, step));
        }

        k.comment("what follows from its gradient");
        let (mut through_b, mut through_a) = ([zero; QUAD], [zero; QUAD]);
        let mut b_sums = vec![zero; padded];
        for (channel, n) in all() {
            let (rate, carry, a_sum) = (kept.rates[channel][n], kept.carry[channel][n], kept.a_sums[channel][n]);
            let lambda = c[n].fma(dy[channel], carry.get());
            let through = lambda * remembered[channel][n];
            through_b[channel] = lambda.fma(b[n], through_b[channel]);
            through_a[channel] = through.fma(rate, through_a[channel]);
            a_sum.set(sizes[channel].fma(through, a_sum.get()));
            b_sums[n] = lambda.fma(driven[channel], b_sums[n]);
            carry.set((sizes[channel] * rate).exp2_flushed() * lambda);
        }
        lane.reset_if(begins, &kept.carry);
        self.write_group(self.outputs.b, self.source.b, (places.b, step), &places.steps, &b_sums);
        let through_b = lane.over_quarters(through_b);
        let through_a = lane.over_quarters(through_a);
        let (size, dy) = (stage.own(SIZE, step), stage.own(SLOPED, step));
        self.outputs.input.from(place).first().store_if(wanted, kept.d.fma(dy, size * through_b));
        let size_gradient = through_a.fma(std::f32::consts::LN_2, u * through_b);
        let delta_gradient = size_gradient * stage.own(SLOPE, step);
        self.outputs.delta.from(place).first().store_if(wanted, delta_gradient);
        if self.outputs.bias.is_some() {
            kept.bias_sum.set(kept.bias_sum.get() + delta_gradient);
        }
        if self.outputs.d.is_some() {
            kept.d_sum.set(dy.fma(u, kept.d_sum.get()));
        }
    }

    /// The tile, or pair of tiles, and how many a row has.
    fn parts(&self, way: GroupGradient) -> (Value<'a, U32>, Value<'a, U32>) {
        let lane = &self.lane;
        match way {
            GroupGradient::Whole | GroupGradient::Tiles => (lane.tile, lane.tiles),
            GroupGradient::Pairs => (lane.tile >> 1, lane.tiles >> 1),
        }
    }

    /// Where the gradient of B or C begins for this lane at the first step of a stage.
    fn group_place(&self, way: GroupGradient, steps: &Steps<'a>) -> Value<'a, U64> {
        let (lane, states) = (&self.lane, self.lane.form.states);
        let (tile, tiles) = self.parts(way);
        let first = lane.quarter.mad(lane.form.states_per_lane(), lane.quad);
        steps.token.mad_wide(tiles * states, tile.mad(states, first).wide())
    }

    /// Writes the gradient of B or C `step` steps after `place`, summed over the channels of the tile.
    fn write_group(
        &self,
        memory: Global<'a>,
        way: GroupGradient,
        (place, step): (Value<'a, U64>, usize),
        steps: &Steps<'a>,
        sums: &[Value<'a, F32>],
    ) {
        let (k, lane) = (self.k, &self.lane);
        let states = lane.form.states;
        let (_, tiles) = self.parts(way);
        let place = memory.from((tiles * states).mad_wide(step as u32, place)).first();
        for (part, sums) in sums.chunks_exact(QUAD).enumerate() {
            let within = lane.quad + (part * QUAD) as u32;
            let mut sum = lane.over_quads([sums[0], sums[1], sums[2], sums[3]]);
            let mut wanted = steps.exists(step) & lane.owned;
            if lane.states() % QUAD != 0 {
                wanted = wanted & within.lt(lane.form.states_per_lane());
            }
            if states != 4 * lane.form.states_per_lane() {
                wanted = wanted & lane.quarter.mad(lane.form.states_per_lane(), within).lt(states);
            }
            if way == GroupGradient::Pairs {
                sum = sum + k.shuffle_xor(sum, super::TILE);
                wanted = wanted & lane.half.eq(0);
            }
            place.plus((part * QUAD) as i64).store_if(wanted, sum);
        }
    }
}

/// The states in vectors of four; those of a lane that has no multiple of four are filled up by the next channel's.
fn per_vector<'a>(state: &[Vec<Variable<'a, F32>>]) -> Vec<Vec<Variable<'a, F32>>> {
    let all: Vec<Variable<'a, F32>> = state.iter().flatten().copied().collect();
    all.chunks(QUAD).map(<[_]>::to_vec).collect()
}

/// Where a lane's vector `index` is kept, from its first.
fn vector_offset(index: usize, chunk: u32) -> i64 {
    (index * chunk.div_ceil(STAGE) as usize * 32 * QUAD) as i64
}

impl GroupSums {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::super::one_thread_per_element(count, SUMS_THREADS)
    }
}

impl KernelSource for GroupSums {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("selective_scan_group_sums_{element}"),
            summary: "sums of the parts of each group, in order; one thread per element".to_owned(),
            block: [SUMS_THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count", "splits"],
            work: move |sizes: &[u64]| Work {
                bytes: sizes[0] * (bytes + 4 * sizes[1]),
                operations: sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (output, parts) = (k.write("output", element), k.read("parts", Element::F32));
            let (count, states, splits) = (k.u32("count"), k.u32("states"), k.u32("splits"));
            let index = k.global_thread(SUMS_THREADS).named("index");
            k.return_if(index.ge(count));
            let group = index.div(states);
            let parts = parts.from_row(group * splits, states).from(index.rem(states).wide());
            let total = k.variable(0.0f32).named("total");
            k.for_(0u32, splits, 1u32, |part| {
                total.set(total.get() + parts.from_row(part, states).first().load());
            });
            output.at(index).store(total);
        })
    }

    fn configurations() -> Vec<Self> {
        super::super::float_elements(|element| Self { element })
    }
}
