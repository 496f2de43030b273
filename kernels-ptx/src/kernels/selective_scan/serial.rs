//! Where threads stand in the kernel that scans whole rows: who scans and who serves, shared memory, reads and writes.
//!
//! A block takes one tile: 16 channels by 16 states, with two warps that scan and two that serve them. A lane that scans
//! holds 2 channels by 2 states, so a step costs it one 16-byte read each for Δ and Δu of its channels and for B and C of its
//! states. The lanes that serve stand for a channel pair (or a state pair) and every eighth step: they read global memory
//! two intervals ahead, compute what depends on the channel alone (softplus, gate, D), and add up what the scanning lanes
//! leave in shared memory, in a fixed order. Both meet at one barrier per interval.
//!
//! Lane bits of those that scan: bits 0, 4 and 5 choose the channel pair, bits 1 to 3 the state pair, so that of every two
//! neighbours, and of every two lanes at distance two, one pair reads the same place: meant to let wide reads of shared memory
//! share their passes. Which two warps scan alternates from one multiprocessor's first block to its second, since a warp's
//! index decides which quarter of the multiprocessor runs it.

use super::lane::softplus;
use super::{Scan, TILE};
use crate::Element;
use crate::asm::{Address, Assembler, F32, Global, Pred, Shared, U32, U64, Value, Variable};

/// States of a channel.
pub(super) const STATES: u32 = 16;
/// Threads of a block: half of them scan.
pub(super) const THREADS: u32 = 128;
/// Channels, and states, of a lane that scans.
pub(super) const PAIR: usize = 2;
/// Steps that the serving lanes stand for at a time.
pub(super) const SLOTS: u32 = 8;
/// f32 of a step that hold four values per channel pair or state pair.
pub(super) const ROW: u32 = 32;

/// Blocks after which the two halves of a block change places: an H100's multiprocessors.
const BLOCKS_PER_ROUND: u32 = 132;

/// `[channel][state]` of a lane.
pub(super) type Square<T> = [[T; PAIR]; PAIR];

/// A thread's place.
pub(super) struct Tile<'a> {
    pub k: &'a Assembler,
    pub form: Scan,
    pub time: Value<'a, U32>,
    pub channels: Value<'a, U32>,
    pub row: Value<'a, U32>,
    /// The tile's index in its row.
    pub tile: Value<'a, U32>,
    /// The thread scans; else it serves.
    pub scans: Value<'a, Pred>,
    /// Of a thread that scans: its channel pair and its state pair.
    pub channel_pair: Value<'a, U32>,
    pub state_pair: Value<'a, U32>,
    /// Of a thread that serves: its channel pair, which is also its state pair, and its step among [`SLOTS`].
    pub pair: Value<'a, U32>,
    pub slot: Value<'a, U32>,
    pub b: Columns<'a>,
    pub c: Columns<'a>,
    /// The serving thread's channel pair in `[batch, time, channels]`.
    pub own: Columns<'a>,
}

/// Which two elements of a token a serving thread moves.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    first: Value<'a, U64>,
    /// Elements of a token.
    stride: Value<'a, U32>,
}

/// Where a serving thread's two elements of every step of its row are.
#[derive(Clone, Copy)]
pub(super) struct Track<'a> {
    memory: Global<'a>,
    /// The address of the first step's.
    first: Value<'a, U64>,
    /// Bytes of a token.
    stride: Value<'a, U32>,
}

impl<'a> Track<'a> {
    fn at(&self, step: Value<'a, U32>) -> Address<'a> {
        self.memory.from_address(step.mad_wide(self.stride, self.first)).first()
    }
}

/// Two neighbouring elements as they are stored.
#[derive(Clone)]
pub(super) struct Stored<'a> {
    element: Element,
    words: Vec<Variable<'a, U32>>,
}

impl<'a> Stored<'a> {
    /// Zeros.
    pub fn new(k: &'a Assembler, element: Element) -> Self {
        Self { element, words: (0..2 * element.bytes() / 4).map(|_| k.variable(0u32)).collect() }
    }

    pub fn set(&self, other: &Self) {
        for (word, other) in self.words.iter().zip(&other.words) {
            word.set(other.get());
        }
    }

    fn set_words(&self, words: Vec<Value<'a, U32>>) {
        for (word, value) in self.words.iter().zip(words) {
            word.set(value);
        }
    }

    /// As f32.
    pub fn get(&self) -> [Value<'a, F32>; PAIR] {
        match self.element {
            Element::Bf16 => self.words[0].get().unpack_bf16(),
            _ => [self.words[0].get().as_f32(), self.words[1].get().as_f32()],
        }
    }
}

impl<'a> Tile<'a> {
    /// Declares the sizes: `time`, `channels`, `b_width`, `c_width` (channels of a group; all u32).
    pub fn new(k: &'a Assembler, form: Scan) -> Self {
        assert!(form.states == STATES, "{} states of a channel", form.states);
        let (time, channels) = (k.u32("time"), k.u32("channels"));
        let (b_width, c_width) = (k.u32("b_width"), k.u32("c_width"));
        k.comment("the block's tile, and what this thread does in it");
        let tiles = (channels >> TILE.ilog2()).named("tiles");
        let row = k.block().div(tiles).named("row");
        let tile = k.block().rem(tiles).named("tile");
        let turned = k.block().div(BLOCKS_PER_ROUND) & 1;
        let scans = (k.thread() >> 6).eq(turned);
        let worker = (k.thread() & 63).named("worker");
        let channel_pair = ((worker & 1) | ((worker >> 3) & 6)).named("channel_pair");
        let state_pair = ((worker >> 1) & 7).named("state_pair");
        let pair = (worker & 7).named("pair");
        let slot = (worker >> 3).named("slot");
        let first_channel = tile * TILE;
        let group = |width: Value<'a, U32>| Columns {
            first: pair.mad(PAIR as u32, first_channel.div(width) * STATES).wide(),
            stride: channels.div(width) * STATES,
        };
        let own = Columns { first: pair.mad(PAIR as u32, first_channel).wide(), stride: channels };
        Self {
            k,
            form,
            time,
            channels,
            row,
            tile,
            scans,
            channel_pair,
            state_pair,
            pair,
            slot,
            b: group(b_width),
            c: group(c_width),
            own,
        }
    }

    /// Waits for the whole block: scanning and serving warps meet here, each from its own part of the text.
    pub fn meet(&self) {
        self.k.meet(1, THREADS);
    }

    /// Where the serving thread's elements of `memory` are.
    pub fn track(&self, memory: Global<'a>, columns: Columns<'a>) -> Track<'a> {
        let first = (self.row * self.time).mad_wide(columns.stride, columns.first);
        Track {
            memory,
            first: memory.from(first).first().global_address(),
            stride: columns.stride * memory.element().bytes() as u32,
        }
    }

    /// Reads the serving thread's two elements of a step; zeros where there is no such step.
    pub fn load(&self, stored: &Stored<'a>, track: Track<'a>, step: Value<'a, U32>) {
        stored.set_words(track.at(step).load_words_if(step.lt(self.time), stored.words.len()));
    }

    /// Writes the serving thread's two elements of a step, if there is such a step.
    pub fn store(&self, track: Track<'a>, step: Value<'a, U32>, [first, second]: [Value<'a, F32>; PAIR]) {
        let place = track.at(step);
        let exists = step.lt(self.time);
        match track.memory.element() {
            Element::Bf16 => place.cast(Element::U32).store_u32_if(exists, first.pack_bf16(second)),
            _ => {
                place.store_if(exists, first);
                place.plus(1).store_if(exists, second);
            }
        }
    }

    /// The serving thread's two channels of a vector over channels; zeros without one.
    pub fn own_of(&self, vector: Option<Global<'a>>) -> [Value<'a, F32>; PAIR] {
        match vector {
            Some(vector) => vector.at(self.pair.mad(PAIR as u32, self.tile * TILE)).load_vector(),
            None => [self.k.constant(0.0f32), self.k.constant(0.0f32)],
        }
    }

    /// Δ of a step from the stored delta; zero where there is no such step.
    pub fn step_size(
        &self,
        delta: Value<'a, F32>,
        bias: Value<'a, F32>,
        exists: Value<'a, Pred>,
    ) -> Value<'a, F32> {
        let raw = if self.form.bias { delta + bias } else { delta };
        let size = if self.form.softplus { softplus(self.k, raw).size } else { raw };
        exists.select(size, 0.0)
    }

    /// Whether a step begins a document, 1 or 0.
    pub fn load_begins(&self, document_start: Global<'a>, step: Value<'a, U32>) -> Value<'a, U32> {
        let start = document_start.at(self.row.mad(self.time, step)).load_u32_if(step.lt(self.time), u32::MAX);
        start.eq(step).select(1u32, 0u32)
    }

    /// For each of a scanning lane's channels, the place of its states in a `[…, channels, states]` tensor whose outer
    /// index is `outer`.
    fn state_places(&self, memory: Global<'a>, outer: Value<'a, U32>) -> [Address<'a>; PAIR] {
        let channel = self.channel_pair.mad(PAIR as u32, self.tile * TILE);
        let first = channel.mad(STATES, self.state_pair * PAIR as u32);
        let place = memory.from_row(outer, self.channels * STATES).at(first);
        [place, place.plus(i64::from(STATES))]
    }

    /// Reads a scanning lane's square of a `[…, channels, states]` tensor, where the condition holds; else zeros.
    pub fn load_states(
        &self,
        memory: Global<'a>,
        outer: Value<'a, U32>,
        condition: Value<'a, Pred>,
    ) -> Square<Value<'a, F32>> {
        self.state_places(memory, outer).map(|place| {
            let words = place.load_words_if(condition, PAIR);
            [words[0].as_f32(), words[1].as_f32()]
        })
    }

    /// Writes a scanning lane's square to a `[…, channels, states]` tensor.
    pub fn store_states(&self, memory: Global<'a>, outer: Value<'a, U32>, values: &Square<Value<'a, F32>>) {
        for (place, values) in self.state_places(memory, outer).into_iter().zip(values) {
            place.store_vector(values);
        }
    }

    /// A times log₂ e, so that the decay of a step is `2^(Δ A)`.
    pub fn rates(&self, a: Global<'a>) -> Square<Value<'a, F32>> {
        let always = self.channels.gt(0);
        let values = self.load_states(a, self.k.constant(0u32), always);
        values.map(|values| values.map(|value| value * std::f32::consts::LOG2_E))
    }

    /// Registers of zeros that change.
    pub fn zeros(&self) -> Square<Variable<'a, F32>> {
        std::array::from_fn(|_| std::array::from_fn(|_| self.k.variable(0.0f32)))
    }

    /// A scanning lane's place among four values per channel pair.
    pub fn by_channels(&self, memory: Shared<'a>, row: Value<'a, U32>) -> Address<'a> {
        memory.at(row.mad(ROW, self.channel_pair * 4))
    }

    /// A scanning lane's place among four values per state pair.
    pub fn by_states(&self, memory: Shared<'a>, row: Value<'a, U32>) -> Address<'a> {
        memory.at(row.mad(ROW, self.state_pair * 4))
    }

    /// A serving lane's place among four values per pair, at its step of the steps from `row` on.
    pub fn served(&self, memory: Shared<'a>, row: u32) -> Address<'a> {
        memory.at(self.slot.mad(ROW, self.pair * 4)).plus(i64::from(row * ROW))
    }
}

/// The values of variables.
pub(super) fn values<'a>(variables: &Square<Variable<'a, F32>>) -> Square<Value<'a, F32>> {
    variables.map(|variables| variables.map(Variable::get))
}

/// Sets variables; values that are other variables' registers are copied first.
pub(super) fn set<'a>(variables: &Square<Variable<'a, F32>>, values: Square<Value<'a, F32>>) {
    for (variables, values) in variables.iter().zip(values) {
        for (variable, value) in variables.iter().zip(values) {
            variable.set(value);
        }
    }
}

/// The states after a step: `2^(Δ A) h + Δu B`.
pub(super) fn advance<'a>(
    rates: &Square<Value<'a, F32>>,
    states: &Square<Value<'a, F32>>,
    drive: [Value<'a, F32>; 4],
    b: [Value<'a, F32>; PAIR],
) -> Square<Value<'a, F32>> {
    std::array::from_fn(|channel| {
        let (size, driven) = (drive[2 * channel], drive[2 * channel + 1]);
        std::array::from_fn(|n| {
            let decay = (size * rates[channel][n]).exp2_flushed();
            decay.fma(states[channel][n], driven * b[n])
        })
    })
}

/// Zeros where a document begins.
pub(super) fn reset<'a>(
    begins: Option<Value<'a, Pred>>,
    states: Square<Value<'a, F32>>,
) -> Square<Value<'a, F32>> {
    match begins {
        None => states,
        Some(begins) => states.map(|states| {
            states.map(|state| begins.select::<F32>(0.0, state))
        }),
    }
}
