//! The scan forward: the states that spans leave behind, and the scan itself.

use super::lane::{Lane, Spread, Stage, StepSize, Steps};
use super::{STAGE, Scan, THREADS};
use crate::asm::{Assembler, Description, F32, Global, Pred, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// The state that every span but the last leaves behind when it starts from zero, and its sum of Δ.
///
/// Parameters: `states` (f32 `[batch, spans, channels, states]`, written but for the last span), `sums` (f32 `[batch, spans,
/// channels]`, likewise), `input`, `delta` (of the type, `[batch, time, channels]`), `a` (f32 `[channels, states]`), `b` (of
/// the type, `[batch, time, groups, states]`), `delta_bias` (f32 `[channels]`, with a bias), `document_start` (u32 `[batch,
/// time]`, with documents), `spans` (u32), and the sizes of [`ScanForward`]. The grid has `spans − 1` blocks in y.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SpanStates(pub Scan);

/// The scan.
///
/// Parameters: `output` (of the type, `[batch, time, channels]`, written), `last_state` (f32 `[batch, channels, states]`,
/// written), `chunk_states` (f32 `[batch, chunks, channels, states]`, written, when they are saved), `input`, `delta` (like the
/// output), `a` (f32 `[channels, states]`), `b`, `c` (of the type, `[batch, time, groups, states]`), `d` (f32 `[channels]`, with
/// D), `gate` (like the output, with a gate), `delta_bias` (f32 `[channels]`, with a bias), `document_start` (u32 `[batch,
/// time]`, with documents), `start_states` (f32 `[batch, spans, channels, states]`, when resumed), `chunk` (u32: steps of a
/// chunk), and the sizes: `items` (batch · tiles), `time`, `channels`, `run` (channels that share their groups), `b_width`,
/// `c_width` (channels of a group), `span` (steps, a multiple of the chunk; all u32). The grid has one block in y per span.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ScanForward {
    /// The inputs.
    pub scan: Scan,
    /// Spans start from given states, not from zero.
    pub resumed: bool,
    /// The states at the starts of chunks are saved.
    pub saves: bool,
}

/// Where a scan reads Δ, u and B: what moves the state.
pub(super) struct Drive<'a> {
    input: Global<'a>,
    delta: Global<'a>,
    b: Global<'a>,
    document_start: Option<Global<'a>>,
}

/// What a stage reads before anything is computed, by step.
pub(super) struct Driven<'a> {
    delta: Vec<Value<'a, F32>>,
    pub u: Vec<Value<'a, F32>>,
    pub b: Vec<Spread<'a>>,
    /// The step begins a document.
    pub begins: Vec<Option<Value<'a, Pred>>>,
}

impl<'a> Drive<'a> {
    pub fn new(input: Global<'a>, delta: Global<'a>, b: Global<'a>, document_start: Option<Global<'a>>) -> Self {
        Self { input, delta, b, document_start }
    }

    pub fn read(&self, lane: &Lane<'a>, steps: &Steps<'a>) -> Driven<'a> {
        Driven {
            delta: lane.load_delta(steps, self.delta),
            u: lane.load_own(steps, self.input, 0.0),
            b: lane.load_group(steps, self.b, lane.b),
            begins: lane.begins(steps, self.document_start),
        }
    }
}

impl<'a> Driven<'a> {
    /// Puts Δ, Δu and B of a step into shared memory.
    pub fn put(
        &self,
        lane: &Lane<'a>,
        stage: &Stage<'a>,
        steps: &Steps<'a>,
        step: usize,
        bias: Value<'a, F32>,
    ) -> StepSize<'a> {
        let size = lane.step_size(steps, step, self.delta[step], bias);
        stage.put(SIZE, step, size.size);
        stage.put(DRIVEN, step, size.size * self.u[step]);
        stage.put_group(B, step, &self.b[step]);
        size
    }
}

/// Advances the states by step `step` of a stage in shared memory: `h = 2^(Δ A) h + Δu B`.
pub(super) fn advance<'a>(
    lane: &Lane<'a>,
    stage: &Stage<'a>,
    step: usize,
    begins: Option<Value<'a, Pred>>,
    rates: &[Vec<Value<'a, F32>>],
    states: &[Vec<Variable<'a, F32>>],
) {
    lane.reset_if(begins, states);
    let (sizes, driven, b) = (stage.quad(SIZE, step), stage.quad(DRIVEN, step), stage.quarter(B, step));
    for (channel, states) in states.iter().enumerate() {
        for ((state, &rate), &b) in states.iter().zip(&rates[channel]).zip(&b) {
            let decay = (sizes[channel] * rate).exp2_flushed();
            let driven = driven[channel] * b;
            state.set(decay.fma(state.get(), driven));
        }
    }
}

/// Arrays of a stage per channel and, the last two, per state.
pub(super) const SIZE: usize = 0;
pub(super) const DRIVEN: usize = 1;
pub(super) const B: usize = 0;
pub(super) const C: usize = 1;

fn work(element: Element, per_token: u64, groups: u64, exponentials: u64) -> impl Fn(&[u64]) -> Work {
    let bytes = element.bytes() as u64;
    move |sizes: &[u64]| {
        let [batch, time, channels, states, b_groups, c_groups] = *sizes else { unreachable!("six sizes are named") };
        let tokens = batch * time;
        let group_states = states * if groups == 2 { b_groups + c_groups } else { b_groups };
        Work {
            bytes: bytes * tokens * (per_token * channels + group_states),
            operations: tokens * channels * states * 6 * exponentials,
        }
    }
}

pub(super) const SIZES: &[&str] = &["batch", "time", "channels", "states", "b_groups", "c_groups"];

impl KernelSource for SpanStates {
    fn build(&self) -> Kernel {
        let form = self.0;
        let description = Description {
            name: form.name("selective_scan_span_states"),
            summary:
                "the state that each span of time leaves behind when it starts from zero, and its sum of step sizes;\n\
                      a warp per two tiles of 16 channels and span"
                    .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: work(form.element, 2, 1, 1),
        };
        Assembler::assemble(description, |k| {
            let (states, sums) = (k.write("states", Element::F32), k.write("sums", Element::F32));
            let (input, delta) = (k.read("input", form.element), k.read("delta", form.element));
            let (a, b) = (k.read("a", Element::F32), k.read("b", form.element));
            let bias = form.bias.then(|| k.read("delta_bias", Element::F32));
            let document_start = form.documents.then(|| k.read("document_start", Element::U32));
            let spans = k.u32("spans");
            let lane = Lane::new(k, form);
            let (first, end) = lane.steps(k.block_y());
            let stage = Stage::new(&lane, 2, 1);
            let drive = Drive::new(input, delta, b, document_start);
            let rates = lane.rates(a);
            let bias = lane.own_of(bias);
            let state = lane.zeros();
            let sum = k.variable(0.0f32).named("sum");
            k.for_(first, end, STAGE, |at| {
                let steps = lane.stage(at, end);
                let driven = drive.read(&lane, &steps);
                for step in 0..STAGE as usize {
                    sum.set(sum.get() + driven.put(&lane, &stage, &steps, step, bias).size);
                }
                k.warp_barrier();
                for (step, &begins) in driven.begins.iter().enumerate() {
                    advance(&lane, &stage, step, begins, &rates, &state);
                }
                k.warp_barrier();
            });
            let outer = lane.row.mad(spans, k.block_y());
            lane.store_states(states, outer, &state);
            let place = sums.from_row(outer, lane.channels).at(lane.channel);
            place.store_if(lane.owned & lane.channel_exists, sum.get());
        })
    }

    fn configurations() -> Vec<Self> {
        // Neither D nor the gate reaches the state.
        let without = |scan| Self(Scan { skip: false, gate: false, ..scan });
        Scan::configurations().into_iter().map(without).collect()
    }
}

impl KernelSource for ScanForward {
    fn build(&self) -> Kernel {
        let Self { scan: form, resumed, saves } = *self;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let name = form.name("selective_scan_forward");
        let description = Description {
            name: format!("{name}{}{}", flag(resumed, "_resumed"), flag(saves, "_saves")),
            summary: "selective scan; a warp per two tiles of 16 channels and span of time".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: work(form.element, 3 + u64::from(form.gate), 2, 1),
        };
        Assembler::assemble(description, |k| {
            let (output, last_state) = (k.write("output", form.element), k.write("last_state", Element::F32));
            let chunk_states = saves.then(|| k.write("chunk_states", Element::F32));
            let (input, delta) = (k.read("input", form.element), k.read("delta", form.element));
            let (a, b, c) = (k.read("a", Element::F32), k.read("b", form.element), k.read("c", form.element));
            let d = form.skip.then(|| k.read("d", Element::F32));
            let gate = form.gate.then(|| k.read("gate", form.element));
            let bias = form.bias.then(|| k.read("delta_bias", Element::F32));
            let document_start = form.documents.then(|| k.read("document_start", Element::U32));
            let start_states = resumed.then(|| k.read("start_states", Element::F32));
            let chunk = k.u32("chunk");
            let lane = Lane::new(k, form);
            let (first, end) = lane.steps(k.block_y());
            let stage = Stage::new(&lane, 2, 2);
            let drive = Drive::new(input, delta, b, document_start);
            let rates = lane.rates(a);
            let (bias, d) = (lane.own_of(bias), form.skip.then(|| lane.own_of(d)));
            let spans = (lane.time + (lane.span - 1)).div(lane.span);
            let chunks = (lane.time + (chunk - 1)).div(chunk);
            let state = lane.zeros();
            if let Some(start_states) = start_states {
                lane.load_states(start_states, lane.row.mad(spans, k.block_y()), &state);
            }

            k.for_(first, end, chunk, |chunk_first| {
                let chunk_end = (chunk_first + chunk).min(end);
                if let Some(chunk_states) = chunk_states {
                    lane.store_states(chunk_states, lane.row.mad(chunks, chunk_first.div(chunk)), &state);
                }
                k.for_(chunk_first, chunk_end, STAGE, |at| {
                    let steps = lane.stage(at, chunk_end);
                    let driven = drive.read(&lane, &steps);
                    let c = lane.load_group(&steps, c, lane.c);
                    let z = gate.map(|gate| lane.load_own(&steps, gate, 0.0));
                    for (step, c) in c.iter().enumerate() {
                        driven.put(&lane, &stage, &steps, step, bias);
                        stage.put_group(C, step, c);
                    }
                    k.warp_barrier();
                    let mut outputs = Vec::new();
                    for (step, &begins) in driven.begins.iter().enumerate() {
                        advance(&lane, &stage, step, begins, &rates, &state);
                        let c = stage.quarter(C, step);
                        let y = lane.over_quarters(std::array::from_fn(|channel| product(&state[channel], &c)));
                        let y = d.map_or(y, |d| d.fma(driven.u[step], y));
                        outputs.push(match &z {
                            Some(z) => y * (z[step] * z[step].sigmoid_flushed()),
                            None => y,
                        });
                    }
                    lane.store_own(&steps, output, &outputs);
                    k.warp_barrier();
                });
            });
            k.if_(end.eq(lane.time), || lane.store_states(last_state, lane.row, &state));
        })
    }

    fn configurations() -> Vec<Self> {
        let ways = [(false, false), (false, true), (true, false), (true, true)];
        let of = |scan| ways.map(|(resumed, saves)| Self { scan, resumed, saves });
        Scan::configurations().into_iter().flat_map(of).collect()
    }
}

/// `Σ state · c`.
fn product<'a>(states: &[Variable<'a, F32>], c: &[Value<'a, F32>]) -> Value<'a, F32> {
    let mut sum = states[0].get() * c[0];
    for (state, &c) in states[1..].iter().zip(&c[1..]) {
        sum = state.get().fma(c, sum);
    }
    sum
}
