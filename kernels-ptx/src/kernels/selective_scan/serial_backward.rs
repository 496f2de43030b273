//! The scan's gradients over whole rows.
//!
//! A block takes one tile of 16 channels by 16 states; its five warps have four tasks. Chunks of [`CHUNK`] steps are
//! taken from the last to the first, in stages of [`STAGE`] steps:
//!
//! - *Prepare*, chunk by chunk in the order of time: copy global memory into shared memory, three stages ahead; compute
//!   Δ and dy, put what the scans need into shared memory; add up and write what *forth* leaves: the gradients of the
//!   gate and of C.
//! - *Forth*: the states from the saved ones on; Σ C h and dy h; leaves the state at the start of each stage.
//! - *Back*, a chunk later and against the order of time: the states of a stage again, then λ and what follows from
//!   it.
//! - *Finish*: add up and write the gradients of u, delta and B.
//!
//! *Back* has two warps, which take the stages in turns. Each first takes λ through its stage, from what the other leaves in shared
//! memory, with nothing between that can wait, since the other waits for it in turn; then the sums, with the decays of its own next
//! stage between them, so that exponentials and products overlap; then the states of that stage.
//!
//! Nothing stops the whole block. Two warps that hand something over have a barrier of their own, at which the one that
//! gives only arrives (but for [`FREED`]); so a warp that is late delays another only when that has nothing left to do.
//! Sums have places for two stages.
//!
//! The loops of all tasks together, 22 KB of text, fit in the multiprocessor's instruction cache, and have to: with half as
//! much again, warps wait for instructions. Thus serving warps have one text for two stages.
//!
//! A lane that scans holds 2 channels by 4 states. What is summed over lanes is left in shared memory, for the lanes
//! that serve to add in a fixed order. As a chunk is used up from its end while the one before it is prepared from
//! its start, both share little more room than one of them needs. In bf16 three blocks fit on a multiprocessor, to the
//! byte where there are documents; in f32 two, as the copies are wider.
//!
//! Floor at 1 × 16,384 × 4096 × 16 in bf16 on an H100, two blocks on each multiprocessor: bytes 1.24 GB, and 0.27 GB
//! of parts where four tiles share a group of B, 0.51 ms at 2.96 TB/s; exponentials, two per channel, state and step,
//! and what the channels need, 0.63 ms. Counted by a profile: 236 instructions per step and tile (*back* 102, *forth*
//! 61, *prepare* 45, *finish* 28), 118 cycles of each quarter of a multiprocessor, 0.98 ms at 1.98 GHz; 68 passes of
//! shared memory, 137 cycles, 1.13 ms, of which 10 passes are the copies'. There no warp alone holds up the others. Measured on 2026-11-28: 1.47 ms; 8 × 2048 × 576 0.278 ms,
//! 64 × 1024 × 4096 5.58 ms.

use std::collections::VecDeque;

use super::backward::{GroupGradient, gated};
use super::forward::SIZES;
use super::serial::{self, PAIR, STATES, Stored, Tile, Track, tree_sum};
use super::{CHUNK, Scan, TILE};
use crate::asm::{Address, Assembler, Description, F32, Global, LANES, Operand, Pred, Shared, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Steps of a stage.
const STAGE: u32 = 4;
/// Stages of a chunk.
const STAGES: u32 = CHUNK / STAGE;
/// Stages that shared memory has places for.
const PLACES: u32 = STAGES + 8;
/// Threads of a block.
const THREADS: u32 = 5 * 32;
/// Blocks that share a multiprocessor of an H100 in bf16, where there are so many; in f32, and on an A100, shared memory has
/// room for fewer.
const BLOCKS: u32 = 3;
/// Stages from the one whose sums *prepare* takes up to the one that it prepares then.
const TO_SUMS: u32 = 3;
/// Stages from the one that *finish* takes up to the first that *prepare* may write in its place.
const TO_FREED: u32 = STAGES + 4;

/// What two warps tell each other of a stage, by its number and another for odd ones: *prepare* has it in shared memory.
const READY: u32 = 1;
/// *Forth* has left its sums.
const SUMMED: u32 = 3;
/// *Prepare* has read them.
const READ: u32 = 5;
/// *Forth* has left where the stages of a chunk start; for each warp of *back*.
const STARTED: u32 = 7;
/// *Back* has left λ for the stage before.
const CARRIED: u32 = 9;
/// *Back* has left its sums.
const LEFT: u32 = 11;
/// *Finish* has read them.
const TAKEN: u32 = 13;
/// *Finish* has done with the stage's place. There is no number left for odd stages: both wait, so that *finish* does not
/// come a second time before *prepare* has come once.
const FREED: u32 = 15;

/// Stages that a serving warp goes through at a time; *finish* reads global memory so many ahead.
const GROUP: u32 = 2;
/// Stages that *prepare* has places for as they come from global memory, and how many ahead it copies them.
const RAW_PLACES: u32 = 4;
const SENT_AHEAD: u32 = RAW_PLACES - 1;
/// Bytes of a copy.
const COPY: usize = 16;
/// States of a lane that scans.
const QUAD: usize = 4;
/// f32 of a tile's states.
const TILE_STATES: u32 = TILE * STATES;
/// Where what a stage is given begins, in f32: Δ, for two channels and two steps each at a time; then for each step Δu
/// and dy, for two channels each at a time, B and C; Δu with dy, and B with C, exchanged in odd steps.
const DELTA: i64 = 0;
const DRIVE: i64 = DELTA + (STAGE * TILE) as i64;
const B: i64 = DRIVE + 2 * TILE as i64;
const C: i64 = B + STATES as i64;
/// From where B is in an even step to where it is in `step`; C is then so much before where it is in an even step. As
/// steps follow each other in whole rounds of the banks, odd ones have both exchanged, so that *prepare* writes to all banks.
fn group_swap(step: u32) -> i64 {
    i64::from(step % 2 * STATES)
}

/// The same for Δu and dy of a channel pair, for *prepare*, which writes each by itself, and *finish*, which reads dy alone.
fn drive_swap(step: u32) -> i64 {
    i64::from(step % 2) * PAIR as i64
}

/// f32 from a step's to the next's.
const STEP_ROW: u32 = 2 * TILE + 2 * STATES;
/// Where the states before a stage begin, after its steps; and, a word each, whether its steps begin documents.
const STARTS: i64 = DRIVE + (STAGE * STEP_ROW) as i64;
const BEGINS: i64 = STARTS + TILE_STATES as i64;

/// f32 from a state quad's part of a sum to the next quad's, for two values per channel pair and for four: apart by
/// so much that the lanes of a scanning warp reach all banks.
const Y_PART: u32 = TILE + 8;
const THROUGH_PART: u32 = 2 * TILE + 8;
/// Where what the scans leave of a step begins: Σ C h and dy h of *forth*, `Σ λ B` with `Σ λ A e`, and λ Δ u of
/// *back*. The first and the third are sums over a lane's states, a part per state quad; the others over its
/// channels, a part per channel pair.
const Y: i64 = 0;
const C_SUMS: i64 = Y + 4 * Y_PART as i64;
const THROUGH: i64 = C_SUMS + 8 * STATES as i64;
const B_SUMS: i64 = THROUGH + 4 * THROUGH_PART as i64;
/// f32 of a step of it, so that neighbouring steps lie in different halves of the banks.
const SUMS_ROW: u32 = B_SUMS as u32 + 8 * STATES + 16;

/// `[channel][state]` of a lane.
type Patch<T> = [[T; QUAD]; PAIR];

/// All gradients of the scan over whole rows, for the shapes that [`SerialForward`](super::SerialForward) takes, from
/// what it saved.
///
/// Parameters: those of [`ScanBackward`](super::ScanBackward) with one span, but for the sizes, which are those of
/// [`SerialForward`](super::SerialForward); gradients of B and C are not summed in pairs of tiles.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SerialBackward {
    /// The inputs.
    pub scan: Scan,
    /// Something reaches the last states.
    pub carried: bool,
    /// The gradient of the initial state is wanted.
    pub initial: bool,
    /// How the gradient of B is written: whole or in tiles.
    pub b: GroupGradient,
    /// How the gradient of C is written: whole or in tiles.
    pub c: GroupGradient,
}

impl KernelSource for SerialBackward {
    fn build(&self) -> Kernel {
        let Self { scan: form, carried, initial, b, c } = *self;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let bytes = form.element.bytes() as u64;
        // u, delta, z and the gradient are read; du, ddelta and dz are written.
        let arrays = 5 + 2 * u64::from(form.gate);
        let name = form.name("selective_scan_serial_backward");
        let description = Description {
            name: format!(
                "{name}_{}{}{}{}",
                b.letter(),
                c.letter(),
                flag(carried, "_carried"),
                flag(initial, "_initial")
            ),
            summary: "gradients of the selective scan over whole rows; a block per tile of 16 channels, five warps for \
                      four tasks"
                .to_owned(),
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
        Assembler::assemble(description, |k| {
            k.resident_blocks(BLOCKS);
            Backward::new(k, *self).write();
        })
    }

    fn configurations() -> Vec<Self> {
        let of = |scan| {
            [GroupGradient::Tiles, GroupGradient::Whole].map(|b| Self {
                scan,
                carried: false,
                initial: false,
                b,
                c: GroupGradient::Whole,
            })
        };
        Scan::configurations().into_iter().flat_map(of).collect()
    }
}

/// The kernel while it is written.
struct Backward<'a> {
    k: &'a Assembler,
    source: SerialBackward,
    outputs: Outputs<'a>,
    inputs: Inputs<'a>,
    a: Global<'a>,
    d: Option<Global<'a>>,
    bias: Option<Global<'a>>,
    chunk_states: Global<'a>,
    carries: Option<Global<'a>>,
    tile: Tile<'a>,
    chunks: Value<'a, U32>,
    /// Stages of all chunks.
    stages: Value<'a, U32>,
    memory: Memory<'a>,
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

/// What *prepare* and *finish* read step by step.
struct Inputs<'a> {
    gradient: Global<'a>,
    input: Global<'a>,
    delta: Global<'a>,
    b: Global<'a>,
    c: Global<'a>,
    gate: Option<Global<'a>>,
    document_start: Option<Global<'a>>,
}

/// Shared memory: the places of stages; per stage of two and step, what the scans leave; what *back* carries to the stage
/// before.
struct Memory<'a> {
    stages: Shared<'a>,
    /// Bytes of a place.
    stage_bytes: u32,
    sums: Shared<'a>,
    carry: Shared<'a>,
    raw: Shared<'a>,
    /// Where the documents of raw steps begin.
    document_starts: Option<Shared<'a>>,
}

impl<'a> Backward<'a> {
    /// Declares the parameters.
    fn new(k: &'a Assembler, source: SerialBackward) -> Self {
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
        let tile = Tile::new(k, form, |_| k.block());
        let chunks = ((tile.time + (CHUNK - 1)) >> CHUNK.ilog2()).named("chunks");
        let stage_row = BEGINS as u32 + if form.documents { STAGE } else { 0 };
        let memory = Memory {
            stages: k.shared(Element::F32, PLACES * stage_row),
            stage_bytes: stage_row * 4,
            sums: k.shared(Element::F32, 2 * STAGE * SUMS_ROW),
            carry: k.shared(Element::F32, TILE_STATES),
            raw: k.shared(element, RAW_PLACES * (5 + u32::from(form.gate)) * STAGE * TILE),
            document_starts: form.documents.then(|| k.shared(Element::U32, RAW_PLACES * STAGE)),
        };
        Self {
            k,
            source,
            outputs,
            inputs: Inputs { gradient, input, delta, b, c, gate, document_start },
            a,
            d,
            bias,
            chunk_states,
            carries,
            tile,
            chunks,
            stages: (chunks * STAGES).named("stages"),
            memory,
        }
    }

    fn write(&self) {
        let k = self.k;
        let warp = k.warp();
        let back = || self.back((warp >> 1).named("second"));
        k.if_else(
            (warp & 1).ne(0),
            back,
            || k.if_else(warp.eq(0), || self.prepare(), || k.if_else(warp.eq(2), || self.forth(), || self.finish())),
        );
    }

    /// Waits for what another warp tells of a stage that is odd (1) or not (0).
    fn wait(&self, what: u32, odd: impl Parity<'a>) {
        self.k.meet(odd.number(what), 2 * LANES);
    }

    /// Tells it, and goes on.
    fn tell(&self, what: u32, odd: impl Parity<'a>) {
        self.k.arrive(odd.number(what), 2 * LANES);
    }

    /// The place of a stage, counted in the order in which *prepare* takes them. Chunks alternate in the direction of
    /// their places, so that one can follow where the one before it in that order is used up; three further places
    /// between them, and another four between a chunk and the second after it, are for what the other tasks are behind.
    ///
    /// Counted in bytes, as all places.
    fn place(&self, index: Value<'a, U32>) -> Value<'a, U32> {
        let chunk = index >> STAGES.ilog2();
        let stage = index & (STAGES - 1);
        let turned = self.k.constant(STAGES + 3) - stage;
        let place = (chunk & 1).ne(0).select::<U32>(turned, stage);
        // `moved mod PLACES` by a product, exact for all of 32 bits.
        const { assert!(PLACES == 24) };
        let moved = (chunk & !1u32) * 2;
        let quotient = moved.mul_high(0xaaaa_aaabu32) >> 4;
        self.around(((place + quotient * PLACES) - moved) * self.memory.stage_bytes)
    }

    /// A place that may lie less than [`PLACES`] before the first or after the last.
    fn around(&self, place: Value<'a, U32>) -> Value<'a, U32> {
        // Of three, the one that is not negative and the least.
        let all = PLACES * self.memory.stage_bytes;
        place.min(place + all).min(place - all)
    }

    /// From a stage's place to that of the stage after it in its chunk, or before it: one further or one back.
    fn way(&self, chunk: Value<'a, U32>, back: bool) -> Value<'a, U32> {
        let rises = self.memory.stage_bytes;
        let falls = rises.wrapping_neg();
        let odd = (chunk & 1).ne(0);
        if back { odd.select(rises, falls) } else { odd.select(falls, rises) }
    }

    /// The first step of that stage; of stages after the last, none that exists.
    fn first_step(&self, index: Value<'a, U32>) -> Value<'a, U32> {
        let chunk = self.chunks - 1 - (index >> STAGES.ilog2());
        chunk.mad(CHUNK, (index & (STAGES - 1)) * STAGE)
    }

    /// The sum of a value over a serving warp's steps, to the lanes of the first.
    fn over_slots(&self, value: Value<'a, F32>) -> Value<'a, F32> {
        let sum = value + self.k.shuffle_xor(value, 8);
        sum + self.k.shuffle_xor(sum, 16)
    }
}

/// Which 2 channels and 4 states a scanning lane holds. Of the bits of its index 1, 3 and 4 choose the channels, 0
/// and 2 the states, for the reason that the way forward has.
struct Lane<'a> {
    /// In the tile.
    pair: Value<'a, U32>,
    quad: Value<'a, U32>,
    rates: Patch<Value<'a, F32>>,
    /// Its places in the first stage that shared memory has a place for.
    first: Places<'a>,
    /// Its places in what it leaves for others.
    sums: Sums<'a>,
    /// Its place in what *back* carries on.
    carry: Address<'a>,
}

/// A scanning lane's places in a stage.
#[derive(Clone, Copy)]
struct Places<'a> {
    /// That of Δ, Δu and dy.
    channels: Address<'a>,
    /// That of B and of C.
    groups: Address<'a>,
    begins: Option<Address<'a>>,
    starts: Address<'a>,
}

impl<'a> Lane<'a> {
    fn new(backward: &Backward<'a>, second: Value<'a, U32>) -> Self {
        let k = backward.k;
        let index = k.lane();
        let pair = (((index >> 1) & 1) | ((index >> 2) & 6)).named("channel_pair");
        let quad = ((index & 1) | ((index >> 1) & 2)).named("state_quad");
        let memory = &backward.memory;
        let (pairs, quads) = (pair * PAIR as u32, quad * QUAD as u32);
        let own = pair.mad(STATES, quads);
        // A warp always has every second stage, whose results lie in its half.
        let sums = second * (STAGE * SUMS_ROW * 4);
        let zero = k.constant(0.0f32);
        let mut lane = Self {
            pair,
            quad,
            rates: [[zero; QUAD]; PAIR],
            first: Places {
                channels: memory.stages.at(pairs * 2),
                groups: memory.stages.at(quads),
                begins: backward.source.scan.documents.then(|| memory.stages.first().plus(BEGINS).cast(Element::U32)),
                starts: memory.stages.at(own).plus(STARTS),
            },
            sums: Sums {
                by_state: memory.sums.at(own).moved(sums),
                y: memory.sums.at(quad.mad(Y_PART, pairs)).moved(sums),
                through: memory.sums.at(quad.mad(THROUGH_PART, pairs * 2)).moved(sums),
            },
            carry: memory.carry.at(own),
        };
        let values = lane.places_in(&backward.tile, backward.a, k.constant(0u32)).map(|place| place.load_vector::<QUAD>());
        lane.rates = values.map(|values| values.map(|value| value * std::f32::consts::LOG2_E));
        lane
    }

    /// For each of its channels, the place of its states in a `[…, channels, states]` tensor whose outer index is
    /// `outer`.
    fn places_in(&self, tile: &Tile<'a>, memory: Global<'a>, outer: Value<'a, U32>) -> [Address<'a>; PAIR] {
        let channel = self.pair.mad(PAIR as u32, tile.tile * TILE);
        let place = memory.from_row(outer, tile.channels * STATES).at(channel.mad(STATES, self.quad * QUAD as u32));
        [place, place.plus(i64::from(STATES))]
    }

    fn places(&self, place: Value<'a, U32>) -> Places<'a> {
        let Places { channels, groups, begins, starts } = self.first;
        Places {
            channels: channels.moved(place),
            groups: groups.moved(place),
            begins: begins.map(|begins| begins.moved(place)),
            starts: starts.moved(place),
        }
    }
}

/// Where a scanning lane leaves what is summed over channel pairs, and over state quads, of its stages.
struct Sums<'a> {
    by_state: Address<'a>,
    y: Address<'a>,
    through: Address<'a>,
}

impl<'a> Sums<'a> {
    fn moved(&self, bytes: Value<'a, U32>) -> Self {
        let Self { by_state, y, through } = *self;
        Self { by_state: by_state.moved(bytes), y: y.moved(bytes), through: through.moved(bytes) }
    }
}

impl<'a> Places<'a> {
    /// Δ of a step and the one after it.
    fn sizes(&self, step: u32) -> [[Value<'a, F32>; PAIR]; 2] {
        let [first @ .., a, b] = self.channels.plus(DELTA + i64::from(step * TILE)).load_vector::<4>();
        [first, [a, b]]
    }

    fn driven(&self, step: u32) -> [Value<'a, F32>; PAIR] {
        self.channels.plus(DRIVE + drive_swap(step) + i64::from(step * STEP_ROW)).load_vector()
    }

    fn driven_and_dy(&self, step: u32) -> [[Value<'a, F32>; PAIR]; 2] {
        let [first @ .., a, b] = self.channels.plus(DRIVE + i64::from(step * STEP_ROW)).load_vector::<4>();
        if drive_swap(step) == 0 { [first, [a, b]] } else { [[a, b], first] }
    }

    fn dy(&self, step: u32) -> [Value<'a, F32>; PAIR] {
        self.channels.plus(DRIVE + PAIR as i64 - drive_swap(step) + i64::from(step * STEP_ROW)).load_vector()
    }

    fn b(&self, step: u32) -> [Value<'a, F32>; QUAD] {
        self.groups.plus(B + group_swap(step) + i64::from(step * STEP_ROW)).load_vector()
    }

    fn c(&self, step: u32) -> [Value<'a, F32>; QUAD] {
        self.groups.plus(C - group_swap(step) + i64::from(step * STEP_ROW)).load_vector()
    }

    /// Whether the stage's steps begin documents.
    fn begins(&self) -> Vec<Option<Value<'a, Pred>>> {
        match self.begins {
            Some(begins) => begins.load_words(STAGE as usize).into_iter().map(|flag| Some(flag.ne(0))).collect(),
            None => vec![None; STAGE as usize],
        }
    }
}

/// The two halves of a lane's values among those of all lanes.
fn halves(first: Address<'_>) -> [Address<'_>; PAIR] {
    [first, first.plus(i64::from(TILE_STATES / 2))]
}

fn load(first: Address<'_>) -> Patch<Value<'_, F32>> {
    halves(first).map(|place| place.load_vector())
}

fn store<'a>(first: Address<'a>, values: &Patch<Value<'a, F32>>) {
    for (place, values) in halves(first).into_iter().zip(values) {
        place.store_vector(values);
    }
}

/// A value per channel and state.
fn patch<T>(of: impl Fn(usize, usize) -> T) -> Patch<T> {
    std::array::from_fn(|channel| std::array::from_fn(|n| of(channel, n)))
}

fn set<'a>(variables: &Patch<Variable<'a, F32>>, values: &Patch<Value<'a, F32>>) {
    for (variable, value) in variables.iter().flatten().zip(values.iter().flatten()) {
        variable.set(*value);
    }
}

fn zeros(k: &Assembler) -> Patch<Variable<'_, F32>> {
    patch(|_, _| k.variable(0.0f32))
}

fn get<'a>(variables: &Patch<Variable<'a, F32>>) -> Patch<Value<'a, F32>> {
    variables.map(|variables| variables.map(Variable::get))
}

/// Where a warp is: its stage's place, and [`Backward::way`].
struct Passing<'a> {
    place: Variable<'a, U32>,
    way: Variable<'a, U32>,
}

/// Whether a stage is odd: known when the kernel is written, or 0 or 1 in a register.
trait Parity<'a> {
    /// The number of what is told of such stages.
    fn number(self, what: u32) -> impl Operand<'a, U32>;
}

impl<'a> Parity<'a> for bool {
    fn number(self, what: u32) -> impl Operand<'a, U32> {
        what + u32::from(self)
    }
}

impl<'a> Parity<'a> for Value<'a, U32> {
    fn number(self, what: u32) -> impl Operand<'a, U32> {
        self + what
    }
}

/// Something of every step of a stage.
fn stage_of<T>(of: impl Fn(usize) -> T) -> [T; STAGE as usize] {
    std::array::from_fn(of)
}

/// Zeros where a document begins.
fn reset<'a>(begins: Option<Value<'a, Pred>>, values: Patch<Value<'a, F32>>) -> Patch<Value<'a, F32>> {
    match begins {
        None => values,
        Some(begins) => values.map(|values| values.map(|value| begins.select::<F32>(0.0, value))),
    }
}

/// The sum of products, first to last.
fn dot<'a, const N: usize>(a: [Value<'a, F32>; N], b: [Value<'a, F32>; N]) -> Value<'a, F32> {
    let first = a[0] * b[0];
    a.into_iter().zip(b).skip(1).fold(first, |sum, (a, b)| a.fma(b, sum))
}

/// The scans.
impl<'a> Backward<'a> {
    fn decays(&self, lane: &Lane<'a>, sizes: [Value<'a, F32>; PAIR]) -> Patch<Value<'a, F32>> {
        patch(|channel, n| (sizes[channel] * lane.rates[channel][n]).exp2_flushed())
    }

    /// The place of the stage that a warp of *back* has next, from the chunk's last on; after all, that of its last.
    fn move_on(&self, place: Variable<'a, U32>, stage: Value<'a, U32>, at_start: impl FnOnce()) {
        let start = || {
            self.k.if_(stage.lt(self.stages), || {
                place.set(self.place(stage ^ (STAGES - 1)));
                at_start();
            });
        };
        let follow = || place.set(self.around(place.get() + self.way(stage >> STAGES.ilog2(), true) * 2));
        self.k.if_else((stage & (STAGES - 2)).eq(0), start, follow);
    }

    fn forth(&self) {
        let (k, tile) = (self.k, &self.tile);
        let lane = Lane::new(self, k.constant(0u32));
        // The states at the start of the chunk that comes next, read while the one before it is gone through.
        let (states, ahead) = (zeros(k), zeros(k));
        let load_saved = |chunk: Value<'a, U32>| {
            let outer = tile.row.mad(self.chunks, chunk);
            set(&ahead, &lane.places_in(tile, self.chunk_states, outer).map(|place| place.load_vector()));
        };
        load_saved(self.chunks - 1);
        let place = k.variable(self.place(k.constant(0u32)));
        let (way, beyond) = (k.variable(0u32), k.variable(0u32));
        // *Prepare* adds up what is of no stage at first.
        self.tell(SUMMED, true);
        self.tell(SUMMED, false);
        self.wait(READY, false);
        self.wait(READ, true);
        self.tell(SUMMED, true);
        // What a step is given is read while the step before it is gone through, and Δ of two steps before the first of
        // them is. A step's decays are computed half ahead: those of its first channel in the step before it, those of the
        // second in its own, so that there are products between exponentials also at the loop's end.
        let first = lane.places(place.get());
        let decays_of = |channel: usize, size: Value<'a, F32>| lane.rates[channel].map(|rate| (size * rate).exp2_flushed());
        let read = |step: u32, places: &Places<'a>| (places.driven_and_dy(step), places.b(step), places.c(step));
        let [[size, second_size], later_sizes] = first.sizes(0);
        let (drive, b, c) = read(0, &first);
        let coming = (
            drive.map(|values| values.map(|value| k.variable(value))),
            b.map(|value| k.variable(value)),
            c.map(|value| k.variable(value)),
            [second_size, later_sizes[0], later_sizes[1]].map(|value| k.variable(value)),
        );
        let decays = decays_of(0, size).map(|value| k.variable(value));
        let stage = k.variable(0u32);
        let step_on = || {
            let odd = stage.get() & 1;
            let sums = lane.sums.moved(odd * (STAGE * SUMS_ROW * 4));
            let places = lane.places(place.get());
            let follows = self.around(place.get() + way.get());
            place.set(stage.get().eq(STAGES - 1).select::<U32>(beyond.get(), follows));
            let next = lane.places(place.get());
            let begins = places.begins();
            let (mut held, mut now) = (get(&states), decays.map(|decay| decay.get()));
            let mut ahead = (
                coming.0.map(|values| values.map(Variable::get)),
                coming.1.map(Variable::get),
                coming.2.map(Variable::get),
            );
            let [second_size, later @ ..] = coming.3.map(Variable::get);
            let mut sizes = VecDeque::from([second_size, later[0], later[1]]);
            for step in 0..STAGE {
                let ([driven, dy], b, c) = ahead;
                if step + 2 == STAGE {
                    self.wait(READY, odd ^ 1);
                }
                // Before this step's results are written: reads may not pass those.
                ahead = if step + 1 < STAGE { read(step + 1, &places) } else { read(0, &next) };
                if step % 2 == 0 {
                    let two = if step + 2 < STAGE { places.sizes(step + 2) } else { next.sizes(0) };
                    sizes.extend(two.into_iter().flatten());
                }
                if step == 0 {
                    self.wait(READ, odd);
                }
                let mut size = || sizes.pop_front().unwrap_or_else(|| unreachable!("sizes were read ahead"));
                let second = decays_of(1, size());
                let decays = [std::mem::replace(&mut now, decays_of(0, size())), second];
                let before = reset(begins[step as usize], held);
                held = patch(|channel, n| decays[channel][n].fma(before[channel][n], driven[channel] * b[n]));
                let row = i64::from(step * SUMS_ROW);
                sums.y.plus(Y + row).store_vector(&held.map(|held| dot(held, c)));
                let c_sums: [_; QUAD] = std::array::from_fn(|n| dot(dy, [held[0][n], held[1][n]]));
                sums.by_state.plus(C_SUMS + row).store_vector(&c_sums);
            }
            decays.iter().zip(now).for_each(|(variable, value)| variable.set(value));
            set(&states, &held);
            coming.0.iter().flatten().zip(ahead.0.iter().flatten()).for_each(|(variable, value)| variable.set(*value));
            coming.1.iter().zip(ahead.1).for_each(|(variable, value)| variable.set(value));
            coming.2.iter().zip(ahead.2).for_each(|(variable, value)| variable.set(value));
            coming.3.iter().zip(sizes).for_each(|(variable, value)| variable.set(value));
            stage.set(stage.get() + 1);
            store(next.starts, &held);
            self.tell(SUMMED, odd);
        };
        // Chunk by chunk, each in two parts: its last stage by itself, as *back* begins when it has begun. What is done between
        // parts costs the loop through stages no branch.
        k.for_(0u32, self.chunks * 2, 1u32, |part| {
            let (last, chunk) = ((part & 1).ne(0), part >> 1);
            let begin_chunk = || {
                stage.set(0u32);
                set(&states, &get(&ahead));
                store(lane.places(place.get()).starts, &get(&states));
                let later = chunk + 1;
                k.if_(later.lt(self.chunks), || load_saved(self.chunks - 1 - later));
                way.set(self.way(chunk, false));
                beyond.set(self.place(later << STAGES.ilog2()));
            };
            let begin_last = || {
                self.tell(STARTED, false);
                self.tell(STARTED, true);
            };
            k.if_else(last, begin_last, begin_chunk);
            let end = last.select::<U32>(STAGES, STAGES - 1);
            k.while_(|| stage.get().lt(end), step_on);
        });
        // What *prepare* tells of no stage.
        self.wait(READ, false);
        self.wait(READY, true);
        self.tell(SUMMED, false);
        for odd in [true, false] {
            self.wait(READ, odd);
            self.wait(READY, !odd);
        }
    }

    /// One warp has the stages of even index, the other, `second`, those between: from the last of a chunk.
    fn back(&self, second: Value<'a, U32>) {
        let (k, tile) = (self.k, &self.tile);
        let lane = Lane::new(self, second);
        let a_sums = zeros(k);
        k.if_(second.eq(0), || match self.carries {
            Some(carries) => {
                store(lane.carry, &lane.places_in(tile, carries, tile.row).map(|place| place.load_vector()))
            }
            None => store(lane.carry, &get(&zeros(k))),
        });
        let place = k.variable(0u32);
        let (decays, before) = (stage_of(|_| zeros(k)), stage_of(|_| zeros(k)));
        k.if_(second.ne(0), || self.tell(CARRIED, false));
        // The states before a stage's first step are kept like the others; with documents, whose resets want registers, they are
        // read again.
        let keeps_first = !self.source.scan.documents;
        // Registers are scarce: the assembler does not read what a step needs before this.
        let apart = |step: u32| {
            if (1..STAGE - 1).contains(&step) {
                k.warp_barrier();
            }
        };
        let to_stage = |stage: Value<'a, U32>| {
            self.move_on(place, stage, || self.wait(STARTED, stage & 1));
            lane.places(place.get())
        };
        let states_of = |places: &Places<'a>| {
            k.comment("forth through the stage: the states before its steps");
            let begins = places.begins();
            let mut held = load(places.starts);
            for step in 0..STAGE {
                let index = step as usize;
                held = reset(begins[index], held);
                if step > 0 || keeps_first {
                    set(&before[index], &held);
                }
                apart(step);
                if step + 1 < STAGE {
                    let (driven, b, decays) = (places.driven(step), places.b(step), get(&decays[index]));
                    held = patch(|channel, n| decays[channel][n].fma(held[channel][n], driven[channel] * b[n]));
                }
            }
        };
        let first = to_stage(second);
        for (decays, sizes) in decays.iter().zip([0, 2].map(|step| first.sizes(step)).as_flattened()) {
            set(decays, &self.decays(&lane, *sizes));
        }
        states_of(&first);
        k.for_(second, self.stages, 2u32, |stage| {
            // Equals `second`; computed anew, so that no register holds each barrier number made from it.
            let odd = stage & 1;
            k.comment("and back: lambda, which the other warp waits for, and what it makes of the states");
            let places = lane.places(place.get());
            let begins = places.begins();
            let read = |step: u32| (places.dy(step), places.c(step));
            let mut ahead = Some(read(STAGE - 1));
            self.wait(CARRIED, odd);
            let mut carry = load(lane.carry);
            let mut chain = stage_of(|_| None);
            for step in (0..STAGE as usize).rev() {
                let Some((dy, c)) = ahead else { unreachable!("a step was read") };
                ahead = (step > 0).then(|| read(step as u32 - 1));
                let decays = get(&decays[step]);
                let lambda = patch(|channel, n| c[n].fma(dy[channel], carry[channel][n]));
                let back = patch(|channel, n| decays[channel][n] * lambda[channel][n]);
                carry = reset(begins[step], back);
                let before = if step > 0 || keeps_first { get(&before[step]) } else { reset(begins[0], load(places.starts)) };
                chain[step] = Some((lambda, patch(|channel, n| back[channel][n] * before[channel][n])));
            }
            store(lane.carry, &carry);
            self.tell(CARRIED, odd ^ 1);
            k.comment("and what is summed, while the decays of the stage after the next are computed");
            let next = to_stage(stage + 2);
            let mut next_sizes = None;
            let read = |step: u32| (places.driven(step), places.b(step));
            let mut ahead = Some(read(STAGE - 1));
            let mut two_sizes = places.sizes(STAGE - 2);
            self.wait(TAKEN, odd);
            for step in (0..STAGE).rev() {
                let (Some((driven, b)), Some((lambda, through))) = (ahead, chain[step as usize]) else {
                    unreachable!("a step was read, and gone through")
                };
                let sizes = two_sizes[(step % 2) as usize];
                apart(step);
                ahead = (step > 0).then(|| read(step - 1));
                if step == 2 {
                    two_sizes = places.sizes(0);
                }
                let row = i64::from(step * SUMS_ROW);
                for (channel, n) in (0..PAIR).flat_map(|channel| (0..QUAD).map(move |n| (channel, n))) {
                    let sum = a_sums[channel][n];
                    sum.set(sizes[channel].fma(through[channel][n], sum.get()));
                }
                let [first, second_sums] =
                    [0, 1].map(|channel| [dot(lambda[channel], b), dot(through[channel], lane.rates[channel])]);
                let sums = [first[0], first[1], second_sums[0], second_sums[1]];
                lane.sums.through.plus(THROUGH + row).store_vector(&sums);
                let b_sums: [_; QUAD] = std::array::from_fn(|n| dot(driven, [lambda[0][n], lambda[1][n]]));
                lane.sums.by_state.plus(B_SUMS + row).store_vector(&b_sums);
                next_sizes = match next_sizes {
                    None => Some(next.sizes(step - 1)),
                    Some(sizes) => {
                        for (sizes, decays) in sizes.into_iter().zip(&decays[step as usize..]) {
                            set(decays, &self.decays(&lane, sizes));
                        }
                        None
                    }
                };
            }
            self.tell(LEFT, odd);
            states_of(&next);
        });
        self.wait(TAKEN, second);
        // Where the first warp left sums that *finish* has read.
        let others = self.memory.sums.at(k.lane() * QUAD as u32).plus(THROUGH);
        let write = |memory: Global<'a>, values: &Patch<Value<'a, F32>>| {
            for (place, values) in lane.places_in(tile, memory, tile.row).into_iter().zip(values) {
                place.store_vector(values);
            }
        };
        k.if_else(
            second.eq(0),
            || {
                store(others, &get(&a_sums));
                self.wait(CARRIED, false);
                self.tell(CARRIED, true);
            },
            || {
                self.wait(CARRIED, true);
                let others = load(others);
                write(self.outputs.a, &patch(|channel, n| others[channel][n] + a_sums[channel][n].get()));
                if let Some(state_gradient) = self.outputs.state {
                    write(state_gradient, &load(lane.carry));
                }
            },
        );
    }
}

/// What *prepare* has of a step.
struct Item<'a> {
    input: Stored<'a>,
    delta: Stored<'a>,
    gradient: Stored<'a>,
    gate: Option<Stored<'a>>,
    b: Stored<'a>,
    c: Stored<'a>,
    /// Where the step's document begins.
    document_start: Option<Variable<'a, U32>>,
}

/// What a lane of *prepare* copies of each stage.
struct Sender<'a> {
    /// The step of a stage that it copies of.
    slot: Value<'a, U32>,
    /// Some arrays at a time: for which lanes, whence, and whither for the first raw place.
    sources: Vec<(Value<'a, Pred>, Track<'a>, Address<'a>)>,
    starts: Option<(Value<'a, Pred>, Track<'a>, Address<'a>)>,
}

/// A serving lane's places in a stage.
#[derive(Clone, Copy)]
struct Served<'a> {
    sizes: Address<'a>,
    drive: Address<'a>,
    dy: Address<'a>,
    b: Address<'a>,
    c: Address<'a>,
}

/// What *prepare* keeps of a step until it adds up what *forth* leaves of it: which it is, u, and what makes `y` the
/// gate's gradient.
struct Kept<'a> {
    step: Variable<'a, U32>,
    u: Stored<'a>,
    slope: [Variable<'a, F32>; PAIR],
}

impl<'a> Kept<'a> {
    fn set(&self, other: &Self) {
        self.step.set(other.step.get());
        self.u.set(&other.u);
        self.slope.iter().zip(other.slope).for_each(|(slope, other)| slope.set(other.get()));
    }
}

/// What *prepare* has read of what *forth* leaves of a step: y, without D, and the gradient of C.
struct ForthSums<'a> {
    y: [Value<'a, F32>; PAIR],
    c: [Value<'a, F32>; PAIR],
}

/// Where *prepare* writes.
struct Tracks<'a> {
    gate_gradient: Option<Track<'a>>,
    c_gradient: Track<'a>,
}

/// The warps that serve.
impl<'a> Backward<'a> {
    fn stored(&self) -> Stored<'a> {
        Stored::new(self.k, self.source.scan.element)
    }

    /// Where the gradient of B or C is written. Tiles are laid out as channels are.
    fn group_track(&self, memory: Global<'a>, way: GroupGradient, whole: serial::Columns<'a>) -> Track<'a> {
        match way {
            GroupGradient::Whole => self.tile.track(memory, whole),
            GroupGradient::Tiles => self.tile.track(memory, self.tile.own),
            GroupGradient::Pairs => panic!("a block has one tile"),
        }
    }

    /// Where the serving lane's two values of a pair begin, in bytes, in what the scans leave of an even or an odd
    /// stage. It moves from stage to stage, as the assembler would compute it again each time otherwise.
    fn served_sums(&self, odd: bool) -> Variable<'a, U32> {
        let bytes = self.slot().mad(SUMS_ROW * 4, self.tile.pair * (PAIR as u32 * 4));
        self.k.variable(bytes + u32::from(odd) * STAGE * SUMS_ROW * 4)
    }

    /// That of a stage, of which it is known whether it is odd; afterwards, that of the next.
    fn take_sums(&self, sums: Variable<'a, U32>, odd: bool) -> Address<'a> {
        let (now, bytes) = (sums.get(), STAGE * SUMS_ROW * 4);
        let place = self.memory.sums.first().moved(now);
        sums.set(if odd { now - bytes } else { now + bytes });
        place
    }

    /// Where the serving lane's values of a stage are in the first place.
    fn served(&self) -> Served<'a> {
        let (slot, pair, stages) = (self.slot(), self.tile.pair, self.memory.stages);
        let (swap, drive_swap) = ((slot & 1) * STATES, (slot & 1) * PAIR as u32);
        let two_steps = (slot >> 1).mad(2 * TILE, (slot & 1) * PAIR as u32);
        Served {
            sizes: stages.at(pair.mad(4, two_steps)).plus(DELTA),
            drive: stages.at(pair.mad(4, slot.mad(STEP_ROW, drive_swap))).plus(DRIVE),
            dy: stages.at(pair.mad(4, slot.mad(STEP_ROW, self.k.constant(PAIR as u32) - drive_swap))).plus(DRIVE),
            b: stages.at(pair.mad(PAIR as u32, slot.mad(STEP_ROW, swap))).plus(B),
            c: stages.at(pair.mad(PAIR as u32, slot.mad(STEP_ROW, self.k.constant(STATES) - swap))).plus(B),
        }
    }

    /// The step of a stage that a serving lane stands for.
    fn slot(&self) -> Value<'a, U32> {
        self.k.lane() >> 3
    }

    /// What the scans leave of a channel pair, a part per state quad, so many f32 apart.
    fn quads<const WIDTH: usize>(&self, first: Address<'a>, part: u32) -> [Value<'a, F32>; WIDTH] {
        let parts = (0..STATES / QUAD as u32).map(|quad| first.plus(i64::from(quad * part)).load_vector());
        tree_sum(&parts.collect::<Vec<_>>())
    }

    /// What the scans leave of a state pair, a part per channel pair.
    fn pairs(&self, first: Address<'a>) -> [Value<'a, F32>; PAIR] {
        let parts = (0..TILE / PAIR as u32).map(|pair| first.plus(i64::from(pair * STATES)).load_vector());
        tree_sum(&parts.collect::<Vec<_>>())
    }

    /// Goes through stages in groups: `head` of a group's first, and `body` of each, which is told whether it is odd.
    ///
    /// What *finish* reads of global memory for a group is asked for at its head, a group before it is used, and copied to other
    /// registers at the head of its own: who waits for one read waits for all that were asked for since.
    fn in_groups(
        &self,
        stages: Value<'a, U32>,
        head: impl FnOnce(Value<'a, U32>),
        body: impl Fn(bool, Value<'a, U32>),
    ) {
        const { assert!(GROUP == 2) };
        self.k.for_(0u32, stages, GROUP, |first| {
            head(first);
            body(false, first);
            body(true, first + 1);
        });
    }

    /// A serving warp's place of the next stage.
    fn follow(&self, passing: &Passing<'a>, odd: bool, stage: Value<'a, U32>, back: bool) {
        let Passing { place, way } = *passing;
        let next = || place.set(self.around(place.get() + way.get()));
        if odd {
            return next();
        }
        let at_start = || {
            way.set(self.way(stage >> STAGES.ilog2(), back));
            place.set(self.place(if back { stage ^ (STAGES - 1) } else { stage }));
        };
        self.k.if_else((stage & (STAGES - 1)).eq(0), at_start, next);
    }

    fn prepare(&self) {
        let (k, tile) = (self.k, &self.tile);
        let form = self.source.scan;
        let tracks = Tracks {
            gate_gradient: self.outputs.gate.map(|gate| tile.track(gate, tile.own)),
            c_gradient: self.group_track(self.outputs.c, self.source.c, tile.c),
        };
        let (bias, d) = (tile.own_of(self.bias), tile.own_of(self.d));
        let d_sums = [0, 1].map(|_| k.variable(0.0f32));
        let item = Item {
            input: self.stored(),
            delta: self.stored(),
            gradient: self.stored(),
            gate: form.gate.then(|| self.stored()),
            b: self.stored(),
            c: self.stored(),
            document_start: form.documents.then(|| k.variable(0u32)),
        };
        let sender = self.sender();
        for stage in 0..SENT_AHEAD {
            self.send(&sender, k.constant(stage), k.constant(stage));
        }
        // Of the stages before a group's, the first first; and of its own.
        let [before, own] = [TO_SUMS, GROUP].map(|stages| (0..stages).map(|_| self.kept()).collect::<Vec<_>>());
        // At first it adds up what is of no step.
        let sums = self.served_sums(true);
        for place in [true, false].map(|odd| self.take_sums(sums, odd)) {
            let zeros = [k.constant(0.0f32); PAIR];
            (0..4).for_each(|quad| place.plus(Y + quad * i64::from(Y_PART)).store_vector(&zeros));
            (0..8).for_each(|pair| place.plus(C_SUMS + pair * i64::from(STATES)).store_vector(&zeros));
        }
        let step = k.variable(0u32);
        let served = self.served();
        let passing = Passing { place: k.variable(0u32), way: k.variable(0u32) };
        let head = |first: Value<'a, U32>| step.set(self.first_step(first) + self.slot());
        self.in_groups(self.stages + TO_SUMS.next_multiple_of(GROUP), head, |odd, stage| {
            self.follow(&passing, odd, stage, false);
            let (index, done) = (usize::from(odd), !odd);
            k.wait_copies(SENT_AHEAD - 1);
            k.warp_barrier();
            self.read_raw(&item, stage & (RAW_PLACES - 1));
            self.send(&sender, stage + SENT_AHEAD, (stage + SENT_AHEAD) & (RAW_PLACES - 1));
            // Of a stage before: what is needed first is read first, so that its time passes unnoticed.
            let place = self.take_sums(sums, done);
            self.wait(SUMMED, done);
            let sums = ForthSums { y: self.quads(place.plus(Y), Y_PART), c: self.pairs(place.plus(C_SUMS)) };
            self.tell(READ, done);
            k.if_(stage.ge(TO_FREED), || self.wait(FREED, false));
            let place = passing.place.get();
            self.prepare_step(&item, &own[index], step.get(), (place, served), bias, &d_sums);
            self.tell(READY, odd);
            self.finish_forth(&before[index], &tracks, sums, d);
            step.set(step.get() + STAGE);
            if odd {
                before[0].set(&before[2]);
                before[1].set(&own[0]);
                before[2].set(&own[1]);
            }
        });
        k.wait_copies(0);
        if let Some(parts) = self.outputs.d {
            self.store_channel_sums(parts, &d_sums);
        }
    }

    /// Of a step that does not exist.
    fn kept(&self) -> Kept<'a> {
        let k = self.k;
        Kept { step: k.variable(u32::MAX), u: self.stored(), slope: [0, 1].map(|_| k.variable(0.0f32)) }
    }

    /// Writes the sums over a warp's steps of its channels.
    fn store_channel_sums(&self, parts: Global<'a>, sums: &[Variable<'a, F32>; PAIR]) {
        let (k, tile) = (self.k, &self.tile);
        let sums = sums.map(|sum| self.over_slots(sum.get()));
        k.if_(self.slot().eq(0), || {
            let channel = tile.pair.mad(PAIR as u32, tile.tile * TILE);
            parts.from_row(tile.row, tile.channels).at(channel).store_vector(&sums);
        });
    }

    fn sender(&self) -> Sender<'a> {
        let (k, tile, inputs) = (self.k, &self.tile, &self.inputs);
        let chunk = (COPY / self.source.scan.element.bytes()) as u32;
        let chunks = TILE / chunk;
        let first = (k.lane() & (chunks - 1)) * chunk;
        let slot = (k.lane() >> chunks.ilog2()) & (STAGE - 1);
        let (together, array) = (LANES / (STAGE * chunks), k.lane() >> (STAGE * chunks).ilog2());
        let own = [Some(inputs.input), Some(inputs.delta), Some(inputs.gradient), inputs.gate];
        let mut arrays: Vec<Track<'a>> =
            own.into_iter().flatten().map(|memory| tile.track_from(memory, tile.own, first)).collect();
        arrays.push(tile.track_from(inputs.b, tile.b, first));
        arrays.push(tile.track_from(inputs.c, tile.c, first));
        let sources = (0..).step_by(together as usize).zip(arrays.chunks(together as usize)).map(|(before, some)| {
            let to = self.memory.raw.at((array + before).mad(STAGE, slot).mad(TILE, first));
            (array.lt(some.len() as u32), Track::chosen(array, some), to)
        });
        let starts = inputs.document_start.zip(self.memory.document_starts).map(|(document_start, starts)| {
            ((array.eq(0)) & first.eq(0), tile.starts(document_start), starts.at(slot))
        });
        Sender { slot, sources: sources.collect(), starts }
    }

    /// Starts copying what a stage is given to a raw place.
    fn send(&self, sender: &Sender<'a>, stage: Value<'a, U32>, place: Value<'a, U32>) {
        let k = self.k;
        let element = self.source.scan.element.bytes() as u32;
        let step = self.first_step(stage) + sender.slot;
        let exists = step.lt(self.tile.time);
        let arrays = 5 + u32::from(self.source.scan.gate);
        let moved = place * (arrays * STAGE * TILE * element);
        // What does not exist is zero.
        let bytes = exists.select::<U32>(COPY as u32, 0);
        for (holds, from, to) in &sender.sources {
            k.if_(*holds, || k.copy_bytes(to.moved(moved), from.at(step), COPY, bytes));
        }
        if let Some((holds, from, to)) = sender.starts {
            let bytes = exists.select::<U32>(4, 0);
            k.if_(holds, || k.copy_bytes(to.moved(place * (STAGE * 4)), from.at(step), 4, bytes));
        }
        k.commit_copies();
    }

    /// Reads what was copied to a raw place.
    fn read_raw(&self, item: &Item<'a>, place: Value<'a, U32>) {
        let element = self.source.scan.element.bytes() as u32;
        let Item { input, delta, gradient, gate, b, c, document_start } = item;
        let arrays: Vec<_> = [Some(input), Some(delta), Some(gradient), gate.as_ref(), Some(b), Some(c)]
            .into_iter()
            .flatten()
            .collect();
        let moved = place * (arrays.len() as u32 * STAGE * TILE * element);
        let first = self.memory.raw.at(self.slot().mad(TILE, self.tile.pair * PAIR as u32)).moved(moved);
        for (index, stored) in (0i64..).zip(arrays) {
            stored.read(first.plus(index * i64::from(STAGE * TILE)));
        }
        if let (Some(start), Some(starts)) = (document_start, self.memory.document_starts) {
            start.set(starts.at(self.slot()).moved(place * (STAGE * 4)).load_words(1)[0]);
        }
    }

    fn prepare_step(
        &self,
        item: &Item<'a>,
        kept: &Kept<'a>,
        step: Value<'a, U32>,
        (place, served): (Value<'a, U32>, Served<'a>),
        bias: [Value<'a, F32>; PAIR],
        d_sums: &[Variable<'a, F32>; PAIR],
    ) {
        let (k, tile) = (self.k, &self.tile);
        let exists = step.lt(tile.time);
        let (u, delta, gradient) = (item.input.get(), item.delta.get(), item.gradient.get());
        let z = item.gate.as_ref().map(Stored::get);
        let sizes = [0, 1].map(|channel| tile.step_size(delta[channel], bias[channel], exists));
        let dy = [0, 1].map(|channel| {
            let (dy, slope) = gated(gradient[channel], z.map(|z| z[channel]));
            if let Some(slope) = slope {
                kept.slope[channel].set(slope);
            }
            if self.d.is_some() {
                d_sums[channel].set(dy.fma(u[channel], d_sums[channel].get()));
            }
            dy
        });
        kept.step.set(step);
        kept.u.set(&item.input);
        served.sizes.moved(place).store_vector(&sizes);
        served.drive.moved(place).store_vector(&[sizes[0] * u[0], sizes[1] * u[1]]);
        served.dy.moved(place).store_vector(&dy);
        served.b.moved(place).store_vector(&item.b.get());
        served.c.moved(place).store_vector(&item.c.get());
        if let Some(flag) = item.document_start {
            let flag = flag.get().eq(step).select::<U32>(1u32, 0u32);
            let begins = self.memory.stages.at(self.slot()).plus(BEGINS).cast(Element::U32);
            k.if_(tile.pair.eq(0), || begins.moved(place).store_u32(flag));
        }
    }

    /// Writes the gradients of the gate and of C.
    fn finish_forth(
        &self,
        kept: &Kept<'a>,
        tracks: &Tracks<'a>,
        sums: ForthSums<'a>,
        d: [Value<'a, F32>; PAIR],
    ) {
        let (tile, step) = (&self.tile, kept.step.get());
        if let Some(track) = tracks.gate_gradient {
            let y = sums.y;
            let u = kept.u.get();
            let gradient = [0, 1].map(|channel| {
                let y = if self.d.is_some() { d[channel].fma(u[channel], y[channel]) } else { y[channel] };
                y * kept.slope[channel].get()
            });
            tile.store(track, step, gradient);
        }
        tile.store(tracks.c_gradient, step, sums.c);
    }

    fn finish(&self) {
        let (k, tile) = (self.k, &self.tile);
        let form = self.source.scan;
        let (input, delta) = (tile.track(self.inputs.input, tile.own), tile.track(self.inputs.delta, tile.own));
        let input_gradient = tile.track(self.outputs.input, tile.own);
        let delta_gradient = tile.track(self.outputs.delta, tile.own);
        let b_gradient = self.group_track(self.outputs.b, self.source.b, tile.b);
        let (bias, d) = (tile.own_of(self.bias), tile.own_of(self.d));
        let bias_sums = [0, 1].map(|_| k.variable(0.0f32));
        let items: Vec<[Stored<'a>; 2]> = (0..GROUP).map(|_| [self.stored(), self.stored()]).collect();
        let load = |items: &[Stored<'a>; 2], step: Value<'a, U32>| {
            tile.load(&items[0], input, step);
            tile.load(&items[1], delta, step);
        };
        let taken: Vec<[Stored<'a>; 2]> = items.iter().map(|items| [items[0].copied(k), items[1].copied(k)]).collect();
        // Its step of a stage: stages go against the order of time all along.
        let last = self.stages.mad(STAGE, self.slot()) - STAGE;
        let load_group = |first: Value<'a, U32>| {
            for (index, items) in (0u32..).zip(&items) {
                load(items, last - (first + index) * STAGE);
            }
        };
        load_group(k.constant(0u32));
        self.tell(TAKEN, false);
        self.tell(TAKEN, true);
        let sums = self.served_sums(false);
        let served = self.served();
        let passing = Passing { place: k.variable(0u32), way: k.variable(0u32) };
        let head = |first: Value<'a, U32>| {
            for (taken, items) in taken.iter().flatten().zip(items.iter().flatten()) {
                taken.set(items);
            }
            load_group(first + GROUP);
        };
        self.in_groups(self.stages, head, |odd, stage| {
            self.follow(&passing, odd, stage, true);
            let (items, place) = (&taken[usize::from(odd)], passing.place.get());
            let step = last - stage * STAGE;
            let exists = step.lt(tile.time);
            self.wait(LEFT, odd);
            let sizes: [_; PAIR] = served.sizes.moved(place).load_vector();
            let dy: [_; PAIR] = served.dy.moved(place).load_vector();
            let (u, delta) = (items[0].get(), items[1].get());
            let place = self.take_sums(sums, odd);
            let first = place.moved(tile.pair * (PAIR as u32 * 4)).plus(THROUGH);
            let [b0, a0, b1, a1] = self.quads(first, THROUGH_PART);
            let b_sums = self.pairs(place.plus(B_SUMS));
            self.tell(TAKEN, odd);
            k.if_((stage + (TO_FREED - TO_SUMS.next_multiple_of(GROUP))).lt(self.stages), || self.wait(FREED, false));
            let through = [(b0, a0), (b1, a1)];
            let mut delta_gradients = Vec::new();
            let input_gradients = [0, 1].map(|channel| {
                let (through_b, through_a) = through[channel];
                let raw = if form.bias { delta[channel] + bias[channel] } else { delta[channel] };
                let size_gradient = through_a.fma(std::f32::consts::LN_2, u[channel] * through_b);
                let gradient =
                    if form.softplus { size_gradient * raw.sigmoid_flushed() } else { size_gradient };
                if form.bias {
                    let gradient = exists.select::<F32>(gradient, 0.0);
                    bias_sums[channel].set(bias_sums[channel].get() + gradient);
                }
                delta_gradients.push(gradient);
                let through = sizes[channel] * through_b;
                if form.skip { d[channel].fma(dy[channel], through) } else { through }
            });
            tile.store(input_gradient, step, input_gradients);
            tile.store(delta_gradient, step, [delta_gradients[0], delta_gradients[1]]);
            tile.store(b_gradient, step, b_sums);
        });
        if let Some(parts) = self.outputs.bias {
            self.store_channel_sums(parts, &bias_sums);
        }
    }
}
