//! The scan's gradients over whole rows.
//!
//! A block takes one tile of 16 channels by 16 states; each of its four warps has a task, and all meet at one barrier per
//! round of [`STAGE`] steps. Chunks of [`CHUNK`] steps are taken from the last to the first:
//!
//! - *Prepare*, chunk by chunk in the order of time: read global memory, compute Δ and dy, put what the scans need into shared
//!   memory; add up and write what *forth* leaves: the gradients of the gate and of C.
//! - *Forth*, a round later: the states from the saved ones on; Σ C h and dy h; leaves the state at the start of each stage.
//! - *Back*, a chunk later and against the order of time: the states of a stage again, then λ and what follows from it.
//! - *Finish*, a round later: add up and write the gradients of u, delta and B.
//!
//! A lane that scans holds 2 channels by 4 states. What is summed over lanes is left in shared memory, for the lanes that
//! serve to add in a fixed order. As a chunk is used up from its end while the one before it is prepared from its start, both
//! share little more room than one of them needs.
//!
//! Floor at 1 × 16,384 × 4096 × 16 in bf16 on an H100, two blocks on each multiprocessor: bytes 1.24 GB, and 0.27 GB of parts
//! where four tiles share a group of B, 0.51 ms at 2.96 TB/s; exponentials, two per channel, state and step, 0.58 ms. Instructions
//! per step, counted in the machine code for sm_90: *back* 103, *forth* 67, *prepare* 43, *finish* 27; 240 per tile,
//! 120 cycles of each quarter of a multiprocessor, 1.12 ms; *back* of one block shares its quarter with *finish* of the other,
//! 130 cycles, 1.21 ms. Shared memory and reads of global memory: about 68 passes per tile and step by the rule that neighbouring
//! lanes which read the same place share a pass, 136 cycles, 1.27 ms. So passes bind, and issue right behind.
//! The sums over lanes are 28 of the 68 passes; a lane of 2 × 2 would leave 40 of them.

use super::backward::{GroupGradient, gated};
use super::forward::SIZES;
use super::serial::{self, PAIR, STATES, Stored, Tile, Track};
use super::{CHUNK, Scan, TILE};
use crate::asm::{Address, Assembler, Description, F32, Global, Pred, Shared, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Threads of a block.
const THREADS: u32 = 128;
/// Blocks after which the two halves of a block change places, since a warp's index decides which quarter of the
/// multiprocessor runs it: an H100's multiprocessors.
const BLOCKS_PER_ROUND: u32 = 132;
/// Steps of a round.
const STAGE: u32 = 4;
/// Stages of a chunk.
const STAGES: u32 = CHUNK / STAGE;
/// Stages that shared memory has places for.
const PLACES: u32 = STAGES + 5;
/// Rounds between the reads of global memory and their use.
const AHEAD: u32 = 4;
/// States of a lane that scans.
const QUAD: usize = 4;
/// f32 of a step that hold two values per pair, and four.
const PAIRS_ROW: u32 = 16;
const QUADS_ROW: u32 = 32;
/// f32 of a stage's first states.
const STARTS_ROW: u32 = TILE * STATES;

/// Where what the scans leave of a step begins: Σ C h and dy h of *forth*, `Σ λ B`, `Σ λ A e` and λ Δ u of *back*.
const Y: i64 = 0;
const C_SUMS: i64 = 64;
const THROUGH: i64 = 192;
const B_SUMS: i64 = 320;
/// f32 of a step of it, so that neighbouring steps lie in different halves of the banks.
const SUMS_ROW: u32 = 448 + 16;

/// `[channel][state]` of a lane.
type Patch<T> = [[T; QUAD]; PAIR];

/// All gradients of the scan over whole rows, for the shapes that [`SerialForward`](super::SerialForward) takes, from what it
/// saved.
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
            summary: "gradients of the selective scan over whole rows; a block per tile of 16 channels, a warp per task".to_owned(),
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
    /// Rounds of all chunks.
    rounds: Value<'a, U32>,
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

/// Shared memory. Per place of a stage and step: Δ of each channel; Δu and dy, two channels each at a time; B; C; whether a
/// document begins. Per place: the first states. Per round of two and step: what the scans leave.
struct Memory<'a> {
    sizes: Shared<'a>,
    drive: Shared<'a>,
    b: Shared<'a>,
    c: Shared<'a>,
    begins: Option<Shared<'a>>,
    starts: Shared<'a>,
    sums: Shared<'a>,
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
        let tile = Tile::new(k, form);
        let chunks = ((tile.time + (CHUNK - 1)) >> CHUNK.ilog2()).named("chunks");
        let shared = |stages: u32, row: u32| k.shared(Element::F32, stages * STAGE * row);
        let memory = Memory {
            sizes: shared(PLACES, PAIRS_ROW),
            drive: shared(PLACES, QUADS_ROW),
            b: shared(PLACES, PAIRS_ROW),
            c: shared(PLACES, PAIRS_ROW),
            begins: form.documents.then(|| k.shared(Element::U32, PLACES * STAGE)),
            starts: k.shared(Element::F32, PLACES * STARTS_ROW),
            sums: shared(2, SUMS_ROW),
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
            rounds: (chunks * STAGES).named("rounds"),
            memory,
        }
    }

    fn write(&self) {
        let k = self.k;
        let turned = k.block().div(BLOCKS_PER_ROUND) & 1;
        let scans = (k.thread() >> 6).eq(turned);
        let second = (k.thread() & 32).ne(0);
        k.if_else(
            scans,
            || k.if_else(second, || self.forth(), || self.back()),
            || k.if_else(second, || self.prepare(), || self.finish()),
        );
    }

    fn meet(&self) {
        self.k.meet(1, THREADS);
    }

    fn meet_times(&self, times: u32) {
        self.k.for_(0u32, times, 1u32, |_| self.meet());
    }

    /// The place of the stage that *prepare* takes in a round. Chunks alternate in the direction of their places, so that
    /// one can follow where the one after it is used up; two further places between them, and another two between a chunk
    /// and the second after it, keep what a round of another task still reads.
    fn place(&self, round: Value<'a, U32>) -> Value<'a, U32> {
        let chunk = round >> STAGES.ilog2();
        let stage = round & (STAGES - 1);
        let turned = self.k.constant(STAGES + 2) - stage;
        let place = (chunk & 1).ne(0).select::<U32>(turned, stage);
        // `even mod PLACES` by a product: exact below 2²², and there are fewer chunks.
        const { assert!(PLACES == 21) };
        let even = chunk & !1u32;
        let quotient = even.mul_high(0xc30c_30c4u32) >> 4;
        let moved = (place + PLACES - even) + quotient * PLACES;
        // Of two, the one that is not negative and the least.
        moved.min(moved - PLACES)
    }

    /// The places of the stages of [`AHEAD`] rounds of a chunk from `round` on, or back from it.
    fn places(&self, round: Value<'a, U32>, back: bool) -> Vec<Value<'a, U32>> {
        let first = self.place(round);
        let odd = ((round >> STAGES.ilog2()) & 1).ne(0);
        let (falls, rises) = (u32::MAX, 1u32);
        let way = if back { odd.select::<U32>(rises, falls) } else { odd.select::<U32>(falls, rises) };
        let mut places = vec![first];
        for _ in 1..AHEAD {
            // One further, around the end.
            let moved = places[places.len() - 1] + way;
            places.push(moved.min(moved + PLACES).min(moved - PLACES));
        }
        places
    }

    /// The first step of that stage; of rounds after the last, none that exists.
    fn first_step(&self, round: Value<'a, U32>) -> Value<'a, U32> {
        let chunk = self.chunks - 1 - (round >> STAGES.ilog2());
        chunk.mad(CHUNK, (round & (STAGES - 1)) * STAGE)
    }

    /// The sum of a value over a serving warp's steps, to the lanes of the first.
    fn over_slots(&self, value: Value<'a, F32>) -> Value<'a, F32> {
        let sum = value + self.k.shuffle_xor(value, 8);
        sum + self.k.shuffle_xor(sum, 16)
    }
}

/// Which 2 channels and 4 states a scanning lane holds. Of the bits of its index 1, 3 and 4 choose the channels, 0 and 2
/// the states, for the reason that the way forward has.
struct Lane<'a> {
    /// In the tile.
    pair: Value<'a, U32>,
    quad: Value<'a, U32>,
    rates: Patch<Value<'a, F32>>,
    /// Its places in the first stage that shared memory has a place for.
    first: Places<'a>,
    /// Its places in what the scans leave of the first round.
    sums: Sums<'a>,
}

/// A scanning lane's places in a stage.
#[derive(Clone, Copy)]
struct Places<'a> {
    sizes: Address<'a>,
    drive: Address<'a>,
    b: Address<'a>,
    c: Address<'a>,
    begins: Option<Address<'a>>,
    starts: Address<'a>,
}

impl<'a> Lane<'a> {
    fn new(backward: &Backward<'a>) -> Self {
        let k = backward.k;
        let index = k.lane();
        let pair = (((index >> 1) & 1) | ((index >> 2) & 6)).named("channel_pair");
        let quad = ((index & 1) | ((index >> 1) & 2)).named("state_quad");
        let memory = &backward.memory;
        let (pairs, quads) = (pair * PAIR as u32, quad * QUAD as u32);
        let zero = k.constant(0.0f32);
        let mut lane = Self {
            pair,
            quad,
            rates: [[zero; QUAD]; PAIR],
            first: Places {
                sizes: memory.sizes.at(pairs),
                drive: memory.drive.at(pairs * 2),
                b: memory.b.at(quads),
                c: memory.c.at(quads),
                begins: memory.begins.map(|begins| begins.first()),
                starts: memory.starts.at(index * QUAD as u32),
            },
            sums: Sums {
                by_state: memory.sums.at(pair.mad(STATES, quads)),
                y: memory.sums.at(quad.mad(TILE, pairs)),
                through: memory.sums.at(quad.mad(2 * TILE, pairs * 2)),
            },
        };
        let values = lane.places_in(&backward.tile, backward.a, k.constant(0u32)).map(|place| place.load_vector::<QUAD>());
        lane.rates = values.map(|values| values.map(|value| value * std::f32::consts::LOG2_E));
        lane
    }

    /// For each of its channels, the place of its states in a `[…, channels, states]` tensor whose outer index is `outer`.
    fn places_in(&self, tile: &Tile<'a>, memory: Global<'a>, outer: Value<'a, U32>) -> [Address<'a>; PAIR] {
        let channel = self.pair.mad(PAIR as u32, tile.tile * TILE);
        let place = memory.from_row(outer, tile.channels * STATES).at(channel.mad(STATES, self.quad * QUAD as u32));
        [place, place.plus(i64::from(STATES))]
    }

    fn places(&self, place: Value<'a, U32>) -> Places<'a> {
        let moved = |first: Address<'a>, row: u32| first.moved(place * (row * 4));
        let Places { sizes, drive, b, c, begins, starts } = self.first;
        Places {
            sizes: moved(sizes, STAGE * PAIRS_ROW),
            drive: moved(drive, STAGE * QUADS_ROW),
            b: moved(b, STAGE * PAIRS_ROW),
            c: moved(c, STAGE * PAIRS_ROW),
            begins: begins.map(|begins| moved(begins, STAGE)),
            starts: moved(starts, STARTS_ROW),
        }
    }

    /// Where it leaves what is summed over lanes in a round.
    fn sums_in(&self, round: Value<'a, U32>) -> Sums<'a> {
        let bytes = (round & 1) * (STAGE * SUMS_ROW * 4);
        let Sums { by_state, y, through } = self.sums;
        Sums { by_state: by_state.moved(bytes), y: y.moved(bytes), through: through.moved(bytes) }
    }
}

/// Where a scanning lane leaves what is summed over channel pairs, and over state quads.
struct Sums<'a> {
    by_state: Address<'a>,
    y: Address<'a>,
    through: Address<'a>,
}

/// What a scanning lane reads of a step.
struct Step<'a> {
    sizes: [Value<'a, F32>; PAIR],
    driven: [Value<'a, F32>; PAIR],
    dy: [Value<'a, F32>; PAIR],
    b: [Value<'a, F32>; QUAD],
    c: [Value<'a, F32>; QUAD],
    begins: Option<Value<'a, U32>>,
}

impl<'a> Places<'a> {
    fn sizes(&self, step: u32) -> [Value<'a, F32>; PAIR] {
        self.sizes.plus(i64::from(step * PAIRS_ROW)).load_vector()
    }

    fn driven(&self, step: u32) -> [Value<'a, F32>; PAIR] {
        self.drive.plus(i64::from(step * QUADS_ROW)).load_vector()
    }

    fn b(&self, step: u32) -> [Value<'a, F32>; QUAD] {
        self.b.plus(i64::from(step * PAIRS_ROW)).load_vector()
    }

    fn begins(&self, step: u32) -> Option<Value<'a, U32>> {
        self.begins.map(|begins| begins.plus(i64::from(step)).load_u32())
    }

    fn step(&self, step: u32) -> Step<'a> {
        let [driven @ .., dy0, dy1] = self.drive.plus(i64::from(step * QUADS_ROW)).load_vector::<4>();
        Step {
            sizes: self.sizes(step),
            driven,
            dy: [dy0, dy1],
            b: self.b(step),
            c: self.c.plus(i64::from(step * PAIRS_ROW)).load_vector(),
            begins: self.begins(step),
        }
    }

    /// The two halves of a lane's first states.
    fn starts(&self) -> [Address<'a>; PAIR] {
        [self.starts, self.starts.plus(i64::from(STARTS_ROW / 2))]
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

/// Zeros where a document begins.
fn reset<'a>(begins: Option<Value<'a, Pred>>, values: Patch<Value<'a, F32>>) -> Patch<Value<'a, F32>> {
    match begins {
        None => values,
        Some(begins) => values.map(|values| values.map(|value| begins.select::<F32>(0.0, value))),
    }
}

fn begins<'a>(flag: Option<Value<'a, U32>>) -> Option<Value<'a, Pred>> {
    flag.map(|flag| flag.ne(0))
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

    fn forth(&self) {
        let (k, tile) = (self.k, &self.tile);
        let lane = Lane::new(self);
        let (states, ahead) = (zeros(k), zeros(k));
        let load = |chunk: Value<'a, U32>| {
            let outer = tile.row.mad(self.chunks, chunk);
            set(&ahead, &lane.places_in(tile, self.chunk_states, outer).map(|place| place.load_vector()));
        };
        load(self.chunks - 1);
        self.meet();
        k.for_(0u32, self.rounds, 1u32, |round| {
            let stage = round & (STAGES - 1);
            k.if_(stage.eq(0), || set(&states, &get(&ahead)));
            let later = (round >> STAGES.ilog2()) + 1;
            k.if_(stage.eq(1) & later.lt(self.chunks), || load(self.chunks - 1 - later));
            let places = lane.places(self.place(round));
            let sums = lane.sums_in(round);
            let mut held = get(&states);
            for (place, states) in places.starts().into_iter().zip(&held) {
                place.store_vector(states);
            }
            let mut ahead = Some(places.step(0));
            for step in 0..STAGE {
                let Some(now) = ahead else { unreachable!("a step was read") };
                // Before this step's results are written: reads may not pass those.
                ahead = (step + 1 < STAGE).then(|| places.step(step + 1));
                let decays = self.decays(&lane, now.sizes);
                let before = reset(begins(now.begins), held);
                held = patch(|channel, n| decays[channel][n].fma(before[channel][n], now.driven[channel] * now.b[n]));
                let row = i64::from(step * SUMS_ROW);
                sums.y.plus(Y + row).store_vector(&held.map(|held| dot(held, now.c)));
                let c_sums: [_; QUAD] = std::array::from_fn(|n| dot(now.dy, [held[0][n], held[1][n]]));
                sums.by_state.plus(C_SUMS + row).store_vector(&c_sums);
            }
            set(&states, &held);
            self.meet();
        });
        self.meet_times(STAGES + 1);
    }

    fn back(&self) {
        let (k, tile) = (self.k, &self.tile);
        let lane = Lane::new(self);
        let (carry, a_sums) = (zeros(k), zeros(k));
        if let Some(carries) = self.carries {
            set(&carry, &lane.places_in(tile, carries, tile.row).map(|place| place.load_vector()));
        }
        self.meet_times(STAGES + 1);
        // The stages of a chunk from its end.
        let place_in = |round: Value<'a, U32>| self.place(round ^ (STAGES - 1));
        let place = k.variable(place_in(k.constant(0u32)));
        let first = lane.places(place.get());
        let decays: Vec<_> =
            (0..STAGE).map(|step| self.decays(&lane, first.sizes(step)).map(|values| values.map(|value| k.variable(value)))).collect();
        k.for_(0u32, self.rounds, 1u32, |round| {
            let places = lane.places(place.get());
            let next_place = place_in(round + 1);
            let next = lane.places(next_place);
            let sums = lane.sums_in(round);
            k.comment("forth through the stage: the states before its steps");
            let mut before = Vec::new();
            let mut held = places.starts().map(|place| place.load_vector());
            for step in 0..STAGE {
                held = reset(begins(places.begins(step)), held);
                before.push(held);
                if step + 1 < STAGE {
                    let (driven, b) = (places.driven(step), places.b(step));
                    held = patch(|channel, n| {
                        decays[step as usize][channel][n].get().fma(held[channel][n], driven[channel] * b[n])
                    });
                }
            }
            k.comment("and back; meanwhile the decays of the stage before");
            let mut later: Vec<Patch<Value<'a, F32>>> = Vec::new();
            let mut ahead = Some((places.step(STAGE - 1), next.sizes(0)));
            for step in (0..STAGE).rev() {
                let Some((now, sizes)) = ahead else { unreachable!("a step was read") };
                ahead = (step > 0).then(|| (places.step(step - 1), next.sizes(STAGE - step)));
                let row = i64::from(step * SUMS_ROW);
                let (decays, before) = (get(&decays[step as usize]), before[step as usize]);
                let lambda = patch(|channel, n| now.c[n].fma(now.dy[channel], carry[channel][n].get()));
                let back = patch(|channel, n| decays[channel][n] * lambda[channel][n]);
                let through = patch(|channel, n| back[channel][n] * before[channel][n]);
                for (channel, n) in (0..PAIR).flat_map(|channel| (0..QUAD).map(move |n| (channel, n))) {
                    let sum = a_sums[channel][n];
                    sum.set(now.sizes[channel].fma(through[channel][n], sum.get()));
                }
                later.push(self.decays(&lane, sizes));
                let [first, second] = [0, 1].map(|channel| {
                    [dot(lambda[channel], now.b), dot(through[channel], lane.rates[channel])]
                });
                sums.through.plus(THROUGH + row).store_vector(&[first[0], first[1], second[0], second[1]]);
                let b_sums: [_; QUAD] = std::array::from_fn(|n| dot(now.driven, [lambda[0][n], lambda[1][n]]));
                sums.by_state.plus(B_SUMS + row).store_vector(&b_sums);
                set(&carry, &reset(begins(now.begins), back));
            }
            for (decays, later) in decays.iter().zip(&later) {
                set(decays, later);
            }
            place.set(next_place);
            self.meet();
        });
        self.meet_times(1);
        for (place, values) in lane.places_in(tile, self.outputs.a, tile.row).into_iter().zip(get(&a_sums)) {
            place.store_vector(&values);
        }
        if let Some(state_gradient) = self.outputs.state {
            for (place, values) in lane.places_in(tile, state_gradient, tile.row).into_iter().zip(get(&carry)) {
                place.store_vector(&values);
            }
        }
    }
}

/// What *prepare* has of a step of every [`AHEAD`]th round: what it has read of the step that is coming, and, until the one
/// before is finished, u and what makes `y` the gate's gradient.
struct Item<'a> {
    input: Stored<'a>,
    delta: Stored<'a>,
    gradient: Stored<'a>,
    gate: Option<Stored<'a>>,
    b: Stored<'a>,
    c: Stored<'a>,
    /// The first step of the step's document; compared where it is wanted, since a comparison waits.
    document_start: Option<Variable<'a, U32>>,
    u: Stored<'a>,
    slope: [Variable<'a, F32>; PAIR],
}

/// Where *prepare* reads and writes.
struct Tracks<'a> {
    input: Track<'a>,
    delta: Track<'a>,
    gradient: Track<'a>,
    gate: Option<Track<'a>>,
    b: Track<'a>,
    c: Track<'a>,
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

    /// The serving lane's place in what the scans leave of every second round.
    fn served_sums(&self, odd: bool) -> Address<'a> {
        let slot = self.slot();
        self.memory.sums.at(slot * SUMS_ROW).plus(i64::from(u32::from(odd) * STAGE * SUMS_ROW))
    }

    /// The serving lane's place in a stage's rows of two values per pair, or of four.
    fn served(&self, memory: Shared<'a>, place: Value<'a, U32>, row: u32) -> Address<'a> {
        let width = row / (TILE / PAIR as u32);
        memory.at(self.slot().mad(row, self.tile.pair * width)).moved(place * (STAGE * row * 4))
    }

    /// The step of a stage that a serving lane stands for.
    fn slot(&self) -> Value<'a, U32> {
        self.k.lane() >> 3
    }

    /// The sums over `N` parts that lie `row` apart.
    fn parts<const WIDTH: usize>(&self, first: Address<'a>, parts: u32, row: u32) -> [Value<'a, F32>; WIDTH] {
        let parts: Vec<[Value<'a, F32>; WIDTH]> =
            (0..parts).map(|part| first.plus(i64::from(part * row)).load_vector()).collect();
        super::serial_forward::tree_sum(&parts)
    }

    fn prepare(&self) {
        let (k, tile, inputs) = (self.k, &self.tile, &self.inputs);
        let form = self.source.scan;
        let tracks = Tracks {
            input: tile.track(inputs.input, tile.own),
            delta: tile.track(inputs.delta, tile.own),
            gradient: tile.track(inputs.gradient, tile.own),
            gate: inputs.gate.map(|gate| tile.track(gate, tile.own)),
            b: tile.track(inputs.b, tile.b),
            c: tile.track(inputs.c, tile.c),
            gate_gradient: self.outputs.gate.map(|gate| tile.track(gate, tile.own)),
            c_gradient: self.group_track(self.outputs.c, self.source.c, tile.c),
        };
        let (bias, d) = (tile.own_of(self.bias), tile.own_of(self.d));
        let d_sums = [0, 1].map(|_| k.variable(0.0f32));
        let items: Vec<Item<'a>> = (0..AHEAD)
            .map(|_| Item {
                input: self.stored(),
                delta: self.stored(),
                gradient: self.stored(),
                gate: form.gate.then(|| self.stored()),
                b: self.stored(),
                c: self.stored(),
                document_start: form.documents.then(|| k.variable(0u32)),
                u: self.stored(),
                slope: [0, 1].map(|_| k.variable(0.0f32)),
            })
            .collect();
        // The thread's first steps of these rounds, and of those before.
        let step = k.variable(self.first_step(k.constant(0u32)) + self.slot());
        let before = k.variable(step.get());
        for (index, item) in (0u32..).zip(&items) {
            self.load(item, &tracks, step.get() + index * STAGE);
        }
        k.for_(0u32, self.rounds + STAGES, AHEAD, |first| {
            let next = self.first_step(first + AHEAD) + self.slot();
            let places = self.places(first, false);
            for ((index, item), place) in (0u32..).zip(&items).zip(places) {
                let parity = index % 2 == 1;
                if index < 2 {
                    let step = before.get() + (index + AHEAD - 2) * STAGE;
                    let item = &items[(index + AHEAD - 2) as usize];
                    k.if_(first.gt(0), || self.finish_forth(item, &tracks, step, parity, d));
                } else {
                    let step = step.get() + (index - 2) * STAGE;
                    self.finish_forth(&items[(index - 2) as usize], &tracks, step, parity, d);
                }
                self.prepare_step(item, step.get() + index * STAGE, place, bias, &d_sums);
                self.load(item, &tracks, next + index * STAGE);
                self.meet();
            }
            before.set(step.get());
            step.set(next);
        });
        self.meet_times(2);
        if let Some(parts) = self.outputs.d {
            self.store_channel_sums(parts, &d_sums);
        }
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

    fn load(&self, item: &Item<'a>, tracks: &Tracks<'a>, step: Value<'a, U32>) {
        let tile = &self.tile;
        tile.load(&item.input, tracks.input, step);
        tile.load(&item.delta, tracks.delta, step);
        tile.load(&item.gradient, tracks.gradient, step);
        if let (Some(stored), Some(gate)) = (&item.gate, tracks.gate) {
            tile.load(stored, gate, step);
        }
        tile.load(&item.b, tracks.b, step);
        tile.load(&item.c, tracks.c, step);
        if let (Some(start), Some(document_start)) = (item.document_start, self.inputs.document_start) {
            start.set(tile.load_document_start(document_start, step));
        }
    }

    fn prepare_step(
        &self,
        item: &Item<'a>,
        step: Value<'a, U32>,
        place: Value<'a, U32>,
        bias: [Value<'a, F32>; PAIR],
        d_sums: &[Variable<'a, F32>; PAIR],
    ) {
        let (k, tile, memory) = (self.k, &self.tile, &self.memory);
        let exists = step.lt(tile.time);
        let (u, delta, gradient) = (item.input.get(), item.delta.get(), item.gradient.get());
        let z = item.gate.as_ref().map(Stored::get);
        let sizes = [0, 1].map(|channel| tile.step_size(delta[channel], bias[channel], exists));
        let dy = [0, 1].map(|channel| {
            let (dy, slope) = gated(gradient[channel], z.map(|z| z[channel]));
            if let Some(slope) = slope {
                item.slope[channel].set(slope);
            }
            if self.d.is_some() {
                d_sums[channel].set(dy.fma(u[channel], d_sums[channel].get()));
            }
            dy
        });
        item.u.set(&item.input);
        self.served(memory.sizes, place, PAIRS_ROW).store_vector(&sizes);
        let drive = [sizes[0] * u[0], sizes[1] * u[1], dy[0], dy[1]];
        self.served(memory.drive, place, QUADS_ROW).store_vector(&drive);
        self.served(memory.b, place, PAIRS_ROW).store_vector(&item.b.get());
        self.served(memory.c, place, PAIRS_ROW).store_vector(&item.c.get());
        if let (Some(begins), Some(start)) = (memory.begins, item.document_start) {
            let flag = start.get().eq(step).select::<U32>(1u32, 0u32);
            k.if_(tile.pair.eq(0), || begins.at(place.mad(STAGE, self.slot())).store_u32(flag));
        }
    }

    /// Writes the gradients of the gate and of C.
    fn finish_forth(
        &self,
        item: &Item<'a>,
        tracks: &Tracks<'a>,
        step: Value<'a, U32>,
        odd: bool,
        d: [Value<'a, F32>; PAIR],
    ) {
        let tile = &self.tile;
        let sums = self.served_sums(odd).moved(tile.pair * (PAIR as u32 * 4));
        if let Some(track) = tracks.gate_gradient {
            let y: [_; PAIR] = self.parts(sums.plus(Y), STATES / QUAD as u32, TILE);
            let u = item.u.get();
            let gradient = [0, 1].map(|channel| {
                let y = if self.d.is_some() { d[channel].fma(u[channel], y[channel]) } else { y[channel] };
                y * item.slope[channel].get()
            });
            tile.store(track, step, gradient);
        }
        tile.store(tracks.c_gradient, step, self.parts(sums.plus(C_SUMS), TILE / PAIR as u32, STATES));
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
        let items: Vec<[Stored<'a>; 2]> = (0..AHEAD).map(|_| [self.stored(), self.stored()]).collect();
        let load = |items: &[Stored<'a>; 2], step: Value<'a, U32>| {
            tile.load(&items[0], input, step);
            tile.load(&items[1], delta, step);
        };
        // The step of a round: rounds go against the order of time all along.
        let last = self.rounds.mad(STAGE, self.slot()) - STAGE;
        for (index, items) in (0u32..).zip(&items) {
            load(items, last - index * STAGE);
        }
        self.meet_times(STAGES + 2);
        k.for_(0u32, self.rounds, AHEAD, |first| {
            let first_step = last - first * STAGE;
            let places = self.places(first ^ (STAGES - 1), true);
            for ((index, items), place) in (0u32..).zip(&items).zip(places) {
                let step = first_step - index * STAGE;
                let exists = step.lt(tile.time);
                let sizes: [_; PAIR] = self.served(self.memory.sizes, place, PAIRS_ROW).load_vector();
                let dy: [_; PAIR] =
                    self.served(self.memory.drive, place, QUADS_ROW).plus(PAIR as i64).load_vector();
                let (u, delta) = (items[0].get(), items[1].get());
                let sums = self.served_sums(index % 2 == 1);
                let pairs = sums.moved(tile.pair * (PAIR as u32 * 4));
                let through = sums.moved(tile.pair * (2 * PAIR as u32 * 4)).plus(THROUGH);
                let [b0, a0, b1, a1] = self.parts(through, STATES / QUAD as u32, 2 * TILE);
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
                tile.store(b_gradient, step, self.parts(pairs.plus(B_SUMS), TILE / PAIR as u32, STATES));
                load(items, step - AHEAD * STAGE);
                self.meet();
            }
        });
        if let Some(parts) = self.outputs.bias {
            self.store_channel_sums(parts, &bias_sums);
        }
    }
}
