//! What the kernels that scan whole rows share: the tile that a block takes, and how its serving threads read and write.
//!
//! A block takes one tile: 16 channels by 16 states. Some of its warps scan, each lane with channels and states of its own;
//! the others serve them. A thread that serves stands for a channel pair (or a state pair) and a step: it brings
//! what global memory has into registers or shared memory, computes what depends on the channel alone, and adds up what the
//! scanning lanes leave in shared memory, in a fixed order.

use super::lane::softplus;
use super::{Scan, TILE};
use crate::Element;
use crate::asm::{Address, Assembler, F32, Global, Pred, U32, U64, Value, Variable};

/// States of a channel.
pub(super) const STATES: u32 = 16;
/// Channels, and states, of a thread that serves.
pub(super) const PAIR: usize = 2;

/// A tile that a block takes, and a thread's part of it while it serves.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub k: &'a Assembler,
    pub form: Scan,
    pub time: Value<'a, U32>,
    pub channels: Value<'a, U32>,
    /// Channels of a group of B and of C.
    widths: [Value<'a, U32>; 2],
    /// Tiles of a row.
    tiles: Value<'a, U32>,
    pub row: Value<'a, U32>,
    /// The tile's index in its row.
    pub tile: Value<'a, U32>,
    /// The serving thread's channel pair, which is also its state pair; threads stand for all of them in turn.
    pub pair: Value<'a, U32>,
    pub b: Columns<'a>,
    pub c: Columns<'a>,
    /// The tile's channels in `[batch, time, channels]`.
    pub own: Columns<'a>,
}

/// Where a tile's elements of a token are.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    first: Value<'a, U32>,
    /// Elements of a token.
    stride: Value<'a, U32>,
}

/// Where a serving thread's elements of every step of its row are.
#[derive(Clone, Copy)]
pub(super) struct Track<'a> {
    memory: Global<'a>,
    /// The address of the first step's.
    first: Value<'a, U64>,
    /// Bytes of a token.
    stride: Value<'a, U32>,
}

impl<'a> Track<'a> {
    pub fn at(&self, step: Value<'a, U32>) -> Address<'a> {
        self.memory.from_address(step.mad_wide(self.stride, self.first)).first()
    }

    /// Writes two neighbouring elements of a step where the condition holds.
    pub fn store_if(
        &self,
        condition: Value<'a, Pred>,
        step: Value<'a, U32>,
        [first, second]: [Value<'a, F32>; PAIR],
    ) {
        let place = self.at(step);
        match self.memory.element() {
            Element::Bf16 => place.cast(Element::U32).store_u32_if(condition, first.pack_bf16(second)),
            _ => {
                place.store_if(condition, first);
                place.plus(1).store_if(condition, second);
            }
        }
    }

    /// The same, where `at` is asked for steps from `first` on, and gives those from `second` on.
    pub fn shifted(self, first: Value<'a, U32>, second: Value<'a, U32>) -> Self {
        Self { first: second.mad_wide(self.stride, self.first) - first.mul_wide(self.stride), ..self }
    }

    /// One of those, which are of one type.
    pub fn chosen(index: Value<'a, U32>, tracks: &[Self]) -> Self {
        let fold = |chosen: Self, (other, track): (u32, &Self)| {
            let this = index.eq(other);
            Self {
                first: this.select(track.first, chosen.first),
                stride: this.select(track.stride, chosen.stride),
                ..chosen
            }
        };
        (0..).zip(tracks).skip(1).fold(tracks[0], fold)
    }
}

/// A track of one tile after another.
pub(super) struct TrackVariable<'a> {
    track: Track<'a>,
    first: Variable<'a, U64>,
}

impl<'a> TrackVariable<'a> {
    pub fn new(k: &'a Assembler, track: Track<'a>) -> Self {
        Self { track, first: k.variable(track.first) }
    }

    pub fn get(&self) -> Track<'a> {
        Track { first: self.first.get(), ..self.track }
    }

    pub fn copied(&self, k: &'a Assembler) -> Self {
        Self::new(k, self.get())
    }

    /// Takes over another's track.
    pub fn follow(&self, k: &'a Assembler, other: &Self) {
        self.first.set(k.constant(other.first.get()));
    }

    /// `track` is one of the same array.
    pub fn set(&self, track: Track<'a>) {
        self.first.set(track.first);
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

    /// The same words in registers of their own.
    pub fn copied(&self, k: &'a Assembler) -> Self {
        Self { element: self.element, words: self.words.iter().map(|word| k.variable(word.get())).collect() }
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

    /// Reads them from shared memory.
    pub fn read(&self, place: Address<'a>) {
        self.set_words(place.cast(Element::U32).load_words(self.words.len()));
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
    /// Declares the sizes: `time`, `channels`, `b_width`, `c_width` (channels of a group; all u32). `number` tells the tile's
    /// number, counted over all rows, from the time.
    pub fn new(k: &'a Assembler, form: Scan, number: impl FnOnce(Value<'a, U32>) -> Value<'a, U32>) -> Self {
        assert!(form.states == STATES, "{} states of a channel", form.states);
        let (time, channels) = (k.u32("time"), k.u32("channels"));
        let widths = [k.u32("b_width"), k.u32("c_width")];
        k.comment("the tile, and what this thread does in it");
        let tiles = (channels >> TILE.ilog2()).named("tiles");
        let pair = (k.thread() & (TILE / PAIR as u32 - 1)).named("pair");
        let number = number(time);
        let [row, tile] = [number.div(tiles).named("row"), number.rem(tiles).named("tile")];
        let [own, b, c] = Self::columns(channels, widths, tile);
        Self { k, form, time, channels, widths, tiles, row, tile, pair, own, b, c }
    }

    /// Those of its channels, of B and of C.
    fn columns(channels: Value<'a, U32>, widths: [Value<'a, U32>; 2], tile: Value<'a, U32>) -> [Columns<'a>; 3] {
        let first = tile * TILE;
        let [b, c] =
            widths.map(|width| Columns { first: first.div(width) * STATES, stride: channels.div(width) * STATES });
        [Columns { first, stride: channels }, b, c]
    }

    /// The tile at another place.
    pub fn at(self, [row, tile]: [Value<'a, U32>; 2]) -> Self {
        let [own, b, c] = Self::columns(self.channels, self.widths, tile);
        Self { row, tile, own, b, c, ..self }
    }

    /// The place of the tile before it.
    pub fn before(&self) -> [Value<'a, U32>; 2] {
        let first = self.tile.eq(0);
        [first.select(self.row - 1, self.row), first.select(self.tiles, self.tile) - 1]
    }

    /// Its number, counted over all rows.
    pub fn number(&self) -> Value<'a, U32> {
        self.row.mad(self.tiles, self.tile)
    }

    /// Where the serving thread's two elements of `memory` are.
    pub fn track(&self, memory: Global<'a>, columns: Columns<'a>) -> Track<'a> {
        self.track_from(memory, columns, self.pair * PAIR as u32)
    }

    /// Where the tile's elements of `memory` are, from one of them on.
    pub fn track_from(&self, memory: Global<'a>, columns: Columns<'a>, element: Value<'a, U32>) -> Track<'a> {
        let first = (self.row * self.time).mad_wide(columns.stride, (columns.first + element).wide());
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
    pub fn store(&self, track: Track<'a>, step: Value<'a, U32>, values: [Value<'a, F32>; PAIR]) {
        track.store_if(step.lt(self.time), step, values);
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

    /// Where the first steps of the documents are.
    pub fn starts(&self, document_start: Global<'a>) -> Track<'a> {
        let first = document_start.from((self.row * self.time).wide()).first().global_address();
        Track { memory: document_start, first, stride: self.k.constant(4u32) }
    }
}

/// The sums of parts, two by two.
pub(super) fn tree_sum<'a, const N: usize>(parts: &[[Value<'a, F32>; N]]) -> [Value<'a, F32>; N] {
    match parts {
        [part] => *part,
        _ => {
            let (first, second) = parts.split_at(parts.len() / 2);
            let (first, second) = (tree_sum(first), tree_sum(second));
            std::array::from_fn(|index| first[index] + second[index])
        }
    }
}
