//! The scan forward over whole rows.
//!
//! A block takes one tile: 16 channels by 16 states. Some of its warps scan: a lane holds one channel by [`HELD`] states, and
//! computes the decays of a step while it takes the step before, so that exponentials and products overlap. The others
//! serve: they copy global memory into shared memory, four intervals ahead; and a thread stands for a channel pair (or a
//! state pair) and a step, computes what depends on the channel alone (softplus, gate, D), and adds up what the scanning lanes
//! leave in shared memory, in a fixed order. Both meet at one barrier per interval; what is prepared lies ready for a whole
//! interval before it is scanned, so that the scan's reads run on over the barrier.
//!
//! Copies past the registers are counted in groups, so that one can wait for the oldest alone; whoever waits for a read into a
//! register waits for all that the compiler has put before it, wherever it has put them.
//!
//! Floor at 1 × 16,384 × 4096 × 16 in bf16 on an H100: bytes 0.81 GB, 0.27 ms at 2.96 TB/s (with the states that training
//! saves 0.87 GB, 0.29 ms); exponentials and reciprocals 38 cycles per step and quarter of a multiprocessor, two blocks on
//! each, 0.31 ms at 1.98 GHz; 38 instructions and, counted by a profile, 50 passes of shared memory, 0.41 ms, which is what
//! binds where there are more blocks. States are saved as often as the backward pass over chunks wants them.

use std::collections::VecDeque;

use super::forward::SIZES;
use super::serial::{PAIR, STATES, Tile, Track, tree_sum};
use super::{CHUNK, Scan, Sizes, TILE};
use crate::asm::{Address, Assembler, Description, F32, Global, LANES, Pred, Shared, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// States of a scanning lane.
const HELD: usize = 4;
/// Lanes that share a channel.
const PARTS: u32 = STATES / HELD as u32;
/// Threads that scan.
const SCANNERS: u32 = TILE * PARTS;
/// Threads that serve.
const SERVERS: u32 = 128;
/// Blocks that share a multiprocessor of an H100 in bf16, where there are so many; in f32, and on an A100, shared memory has
/// room for fewer.
const BLOCKS: u32 = 4;
/// Steps that the serving threads stand for at a time.
const SLOTS: u32 = SERVERS / 8;
/// Steps between two barriers.
const INTERVAL: u32 = 16;
/// Intervals that shared memory has places for.
const PLACES: u32 = 4;
/// Intervals that shared memory has places for as they came from global memory, from when they are sent for until their steps
/// are finished.
const RAW_PLACES: u32 = 2 * PLACES;
/// Intervals from the one that is prepared to the one that is sent for.
const SENT_AHEAD: u32 = 4;
/// Intervals from the one that is finished to the one that is prepared.
const BEHIND: u32 = 3;
/// Bytes of a copy from global to shared memory.
const COPY: usize = 16;
/// Steps between a step and the one whose Δ and Δu a scanning lane reads from shared memory meanwhile, and whose B and C.
const DRIVE_AHEAD: usize = 4;
const GROUPS_AHEAD: usize = 3;
/// f32 of a step that hold two values per channel, or four per state pair.
const ROW: u32 = 2 * TILE;
/// f32 of a step that hold a value per channel of each part of the states, so that neighbouring steps lie in different
/// halves of the banks.
const SUMS_ROW: u32 = PARTS * TILE + TILE;

/// The scan over whole rows, for channels of 16 states whose groups of B and C are multiples of 16 channels.
///
/// Parameters: `output` (of the type, `[batch, time, channels]`, written), `last_state` (f32 `[batch, channels, states]`,
/// written), `chunk_states` (f32 `[batch, chunks, channels, states]`, written, when saved: the states every
/// [`CHUNK`] steps), `input`, `delta` (like the output), `a` (f32 `[channels, states]`), `b`, `c` (of the type, `[batch, time,
/// groups, states]`), `d` (f32 `[channels]`, with D), `gate` (like the output, with a gate), `delta_bias` (f32 `[channels]`, with
/// a bias), `document_start` (u32 `[batch, time]`, with documents), `initial` (f32 `[batch, channels, states]`, when resumed),
/// `time`, `channels`, `b_width`, `c_width` (channels of a group; all u32). A row has less than 2³² elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SerialForward {
    /// The inputs.
    pub scan: Scan,
    /// Rows start from given states, not from zero.
    pub resumed: bool,
    /// The states at the starts of chunks are saved.
    pub saves: bool,
}

impl SerialForward {
    /// Blocks for a scan, one per tile; `None` when it is not of the shape that the kernel takes, or one launch cannot
    /// cover it.
    pub fn grid(sizes: &Sizes, states: u32) -> Option<[u32; 3]> {
        let whole = |width: u32| width > 0 && width.is_multiple_of(TILE);
        let fits = |count: u64| count <= u64::from(u32::MAX);
        let Sizes { batch, time, channels, .. } = *sizes;
        let [batch, time, channels] = [batch, time, channels].map(u64::from);
        let blocks = batch * channels / u64::from(TILE);
        let qualifies = states == STATES && whole(sizes.b_width()) && whole(sizes.c_width());
        // Places within a row are counted in 32 bits.
        let covered = fits(time * channels) && fits(batch * time) && blocks <= i32::MAX as u64;
        (qualifies && covered).then_some([blocks as u32, 1, 1])
    }
}

impl KernelSource for SerialForward {
    fn build(&self) -> Kernel {
        let Self { scan: form, resumed, saves } = *self;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let bytes = form.element.bytes() as u64;
        let arrays = 3 + u64::from(form.gate);
        let name = form.name("selective_scan_serial_forward");
        let description = Description {
            name: format!("{name}{}{}", flag(resumed, "_resumed"), flag(saves, "_saves")),
            summary: "selective scan over whole rows; a block per tile of 16 channels: some warps scan, others \
                      serve"
                .to_owned(),
            block: [SCANNERS + SERVERS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| {
                let [batch, time, channels, states, b_groups, c_groups] = *sizes else {
                    unreachable!("six sizes are named")
                };
                let saved = if saves { 4 * time.div_ceil(CHUNK.into()) * channels * states } else { 0 };
                Work {
                    bytes: batch * (time * bytes * (arrays * channels + states * (b_groups + c_groups)) + saved),
                    operations: batch * time * channels * states * 6,
                }
            },
        };
        Assembler::assemble(description, |k| {
            k.resident_blocks(BLOCKS);
            let forward = Forward::new(k, *self);
            k.if_else(k.thread().lt(SCANNERS), || forward.scan(), || forward.serve());
        })
    }

    fn configurations() -> Vec<Self> {
        let of = |scan| [false, true].map(|saves| Self { scan, resumed: false, saves });
        Scan::configurations().into_iter().flat_map(of).collect()
    }
}

/// The kernel while it is written.
struct Forward<'a> {
    k: &'a Assembler,
    source: SerialForward,
    output: Global<'a>,
    last_state: Global<'a>,
    chunk_states: Option<Global<'a>>,
    input: Global<'a>,
    delta: Global<'a>,
    a: Global<'a>,
    b: Global<'a>,
    c: Global<'a>,
    d: Option<Global<'a>>,
    gate: Option<Global<'a>>,
    bias: Option<Global<'a>>,
    document_start: Option<Global<'a>>,
    initial: Option<Global<'a>>,
    tile: Tile<'a>,
    /// Intervals of a row, made a multiple of [`PLACES`]; steps that do not exist change nothing.
    intervals: Value<'a, U32>,
    /// Per place of an interval and step: Δ and Δu of each channel; B and C of two states each; whether a document begins. Of
    /// two intervals: C · h of each channel and part of the states.
    drive: Shared<'a>,
    groups: Shared<'a>,
    sums: Shared<'a>,
    begins: Option<Shared<'a>>,
    /// What came from global memory, per [`Array`], place and step; and the first steps of the steps' documents.
    raw: Shared<'a>,
    starts: Option<Shared<'a>>,
}

impl<'a> Forward<'a> {
    /// Declares the parameters.
    fn new(k: &'a Assembler, source: SerialForward) -> Self {
        let SerialForward { scan: form, resumed, saves } = source;
        let element = form.element;
        let output = k.write("output", element);
        let last_state = k.write("last_state", Element::F32);
        let chunk_states = saves.then(|| k.write("chunk_states", Element::F32));
        let (input, delta) = (k.read("input", element), k.read("delta", element));
        let (a, b, c) = (k.read("a", Element::F32), k.read("b", element), k.read("c", element));
        let d = form.skip.then(|| k.read("d", Element::F32));
        let gate = form.gate.then(|| k.read("gate", element));
        let bias = form.bias.then(|| k.read("delta_bias", Element::F32));
        let document_start = form.documents.then(|| k.read("document_start", Element::U32));
        let initial = resumed.then(|| k.read("initial", Element::F32));
        let tile = Tile::new(k, form);
        const PERIOD: u32 = PLACES * INTERVAL;
        let intervals = (((tile.time + (PERIOD - 1)) >> PERIOD.ilog2()) * PLACES).named("intervals");
        Self {
            k,
            source,
            output,
            last_state,
            chunk_states,
            input,
            delta,
            a,
            b,
            c,
            d,
            gate,
            bias,
            document_start,
            initial,
            tile,
            intervals,
            drive: k.shared(Element::F32, PLACES * INTERVAL * ROW),
            groups: k.shared(Element::F32, PLACES * INTERVAL * ROW),
            sums: k.shared(Element::F32, 2 * INTERVAL * SUMS_ROW),
            begins: form.documents.then(|| k.shared(Element::U32, PLACES * INTERVAL)),
            raw: k.shared(element, (4 + u32::from(form.gate)) * RAW_ARRAY),
            starts: form.documents.then(|| k.shared(Element::U32, RAW_PLACES * INTERVAL)),
        }
    }

    /// Waits for the whole block: scanning and serving warps meet here, each from its own part of the text.
    fn meet(&self) {
        self.k.meet(1, SCANNERS + SERVERS);
    }

    /// What the scanning warps do: in round r they scan interval r − 2.
    fn scan(&self) {
        let (k, tile) = (self.k, &self.tile);
        let lane = Lane::new(self);
        let rates = lane.load_states(self, self.a, k.constant(0u32)).map(|rate| rate * std::f32::consts::LOG2_E);
        let decays = |drive: Drive<'a>| rates.map(|rate| (drive[0] * rate).exp2_flushed());
        let states = [0; HELD].map(|_| k.variable(0.0f32));
        if let Some(initial) = self.initial {
            for (state, value) in states.iter().zip(lane.load_states(self, initial, tile.row)) {
                state.set(value);
            }
        }
        let chunks = ((tile.time + (CHUNK - 1)) >> CHUNK.ilog2()).named("chunks");
        const PER_CHUNK: u32 = CHUNK / INTERVAL;
        // A whole number of chunks makes a row's intervals.
        const { assert!(PER_CHUNK.is_multiple_of(PLACES)) };
        let save = |interval: Value<'a, U32>| {
            if let Some(chunk_states) = self.chunk_states {
                let outer = tile.row.mad(chunks, interval >> PER_CHUNK.ilog2());
                lane.store_states(self, chunk_states, outer, states.map(Variable::get));
            }
        };
        k.if_(self.intervals.gt(0), || save(k.constant(0u32)));
        self.meet();
        self.meet();
        // What the next steps need, in variables from interval to interval.
        let start = lane.places(self);
        let drive: VecDeque<_> = (0..DRIVE_AHEAD as u32).map(|step| start.drive(step)).collect();
        let groups = (0..GROUPS_AHEAD as u32).map(|step| start.groups(step)).collect();
        let first = Ahead { decays: decays(drive[0]), drive, groups };
        let carried = Carried::new(k, &first);
        k.for_(0u32, self.intervals, 1u32, |interval| {
            let (here, after) = (start.of(interval), start.of(interval + 1));
            let of = |step: u32| if step < INTERVAL { (here, step) } else { (after, step - INTERVAL) };
            let sums = self.sums.at(lane.sum).moved((interval & 1) * (INTERVAL * SUMS_ROW * 4));
            let mut held = states.map(Variable::get);
            let mut ahead = carried.get();
            let mut result = None;
            for step in 0..INTERVAL {
                // Reads do not pass writes, as far as the assembler knows: what is written step by step keeps the reads, and
                // the exponentials that follow from them, apart.
                let write = |(step, result): (u32, Value<'a, F32>)| sums.plus(i64::from(step * SUMS_ROW)).store(result);
                result.map(write);
                let (places, next) = of(step + DRIVE_AHEAD as u32);
                ahead.drive.push_back(places.drive(next));
                let (places, next) = of(step + GROUPS_AHEAD as u32);
                ahead.groups.push_back(places.groups(next));
                let now = ahead.next(decays);
                if let Some(begins) = now.groups.begins {
                    let begins = begins.ne(0);
                    held = held.map(|state| begins.select::<F32>(0.0, state));
                }
                let Groups { b, c, .. } = now.groups;
                held = std::array::from_fn(|n| now.decays[n].fma(held[n], now.driven * b[n]));
                let sum = (1..HELD).fold(held[0] * c[0], |sum, n| held[n].fma(c[n], sum));
                result = Some((step, sum));
                if step == INTERVAL - 1 {
                    result.map(write);
                }
            }
            carried.set(&ahead);
            for (state, value) in states.iter().zip(held) {
                state.set(value);
            }
            let next = interval + 1;
            if self.chunk_states.is_some() {
                k.if_((next & (PER_CHUNK - 1)).eq(0) & next.lt(self.intervals), || save(next));
            }
            self.meet();
        });
        lane.store_states(self, self.last_state, tile.row, states.map(Variable::get));
        self.meet();
        self.meet();
    }

    /// What the serving warps do: in round r they finish interval r − 3, prepare interval r, and send for interval r + 4.
    fn serve(&self) {
        let (k, tile) = (self.k, &self.tile);
        let output = tile.track(self.output, tile.own);
        let (bias, d) = (tile.own_of(self.bias), tile.own_of(self.d));
        let slot = ((k.thread() - SCANNERS) >> 3).named("slot");
        let served = |memory: Shared<'a>, row: u32| memory.at(slot.mad(row, tile.pair * 4));
        let places = Served {
            drive: served(self.drive, ROW),
            groups: served(self.groups, ROW),
            sums: self.sums.at(slot.mad(SUMS_ROW, tile.pair * PAIR as u32)),
            begins: self.begins.map(|begins| begins.at(slot)),
            raw: self.raw.at(slot.mad(TILE, tile.pair * PAIR as u32)),
            row: TILE * self.source.scan.element.bytes() as u32,
            starts: self.starts.map(|starts| starts.at(slot)),
        };
        const ITEMS: u32 = INTERVAL / SLOTS;
        let sender = Sender::new(self);
        const { assert!(SENT_AHEAD == PLACES && SENT_AHEAD + BEHIND < RAW_PLACES) };
        for place in 0..SENT_AHEAD {
            sender.send(self, k.constant(place * INTERVAL), k.constant(0u32), place);
        }
        // Before each barrier the interval after it is there; here the serving warps alone meet, each of which has copied a part
        // of the first.
        k.wait_copies(SENT_AHEAD - 1);
        k.meet(2, SERVERS);
        k.for_(0u32, self.intervals + PLACES, PLACES, |round| {
            let first = round.mad(INTERVAL, slot);
            // The half of the raw places that this round's interval has, and the other.
            let now = round & PLACES;
            let halves = [now, now ^ PLACES];
            let half = |place: u32| halves[(place / PLACES % 2) as usize];
            for place in 0..PLACES {
                let items = || (0..ITEMS).map(|item| item * SLOTS);
                let finish = || {
                    for row in items() {
                        let behind = place + RAW_PLACES - BEHIND;
                        let step = first + (place * INTERVAL + row) - BEHIND * INTERVAL;
                        let sums = places.sums.plus(i64::from(((place + 1) % 2 * INTERVAL + row) * SUMS_ROW));
                        let raw = places.raw(half(behind), behind % PLACES * INTERVAL + row);
                        self.finish(output, step, sums, raw, d);
                    }
                };
                if place < BEHIND {
                    k.if_(round.ge(PLACES), finish);
                } else {
                    finish();
                }
                for row in items() {
                    let raw = places.raw(half(place), place * INTERVAL + row);
                    self.prepare(first + (place * INTERVAL + row), &places, place * INTERVAL + row, raw, bias);
                }
                let ahead = place + SENT_AHEAD;
                sender.send(self, (round + ahead) * INTERVAL, half(ahead), ahead % PLACES);
                k.wait_copies(SENT_AHEAD - 1);
                self.meet();
            }
        });
        k.wait_copies(0);
    }

    /// Puts what the scan needs of a step into shared memory, `row` steps after the first place.
    fn prepare(
        &self,
        step: Value<'a, U32>,
        places: &Served<'a>,
        row: u32,
        raw: Raw<'a>,
        bias: [Value<'a, F32>; PAIR],
    ) {
        let (k, tile) = (self.k, &self.tile);
        let exists = step.lt(tile.time);
        let [u, delta, [b0, b1], [c0, c1]] = [Array::Input, Array::Delta, Array::B, Array::C].map(|array| raw.get(array));
        let sizes = [0, 1].map(|channel| tile.step_size(delta[channel], bias[channel], exists));
        let moved = i64::from(row * ROW);
        places.drive.plus(moved).store_vector(&[sizes[0], sizes[0] * u[0], sizes[1], sizes[1] * u[1]]);
        places.groups.plus(moved).store_vector(&[b0, b1, c0, c1]);
        if let (Some(begins), Some(start)) = (places.begins, raw.start) {
            let begins = begins.plus(i64::from(row));
            // Where there is no such step the start is 0, which it is not either.
            k.if_(tile.pair.eq(0), || begins.store_u32(start.load_u32().eq(step).select::<U32>(1u32, 0u32)));
        }
    }

    /// Writes the output of a step from what the scan left at `sums`.
    fn finish(
        &self,
        output: Track<'a>,
        step: Value<'a, U32>,
        sums: Address<'a>,
        raw: Raw<'a>,
        d: [Value<'a, F32>; PAIR],
    ) {
        let tile = &self.tile;
        let parts: Vec<[Value<'a, F32>; PAIR]> =
            (0..PARTS).map(|part| sums.plus(i64::from(part * TILE)).load_vector()).collect();
        let mut y = tree_sum(&parts);
        if self.d.is_some() {
            let u = raw.get(Array::Input);
            y = [0, 1].map(|channel| d[channel].fma(u[channel], y[channel]));
        }
        if self.gate.is_some() {
            let z = raw.get(Array::Gate);
            y = [0, 1].map(|channel| y[channel] * (z[channel] * z[channel].sigmoid_flushed()));
        }
        tile.store(output, step, y);
    }
}

/// The values of a scanning lane's states.
type Held<'a> = [Value<'a, F32>; HELD];
/// Δ and Δu of a lane's channel at a step.
type Drive<'a> = [Value<'a, F32>; 2];

/// Which channel and states a scanning lane holds. A warp has all channels of two parts of the states; neighbours share a
/// channel, lanes at distance two a part, so that wide reads of shared memory share their passes.
struct Lane<'a> {
    channel: Value<'a, U32>,
    part: Value<'a, U32>,
    /// Its place among the sums of a step.
    sum: Value<'a, U32>,
}

impl<'a> Lane<'a> {
    fn new(forward: &Forward<'a>) -> Self {
        let k = forward.k;
        let channel = ((k.thread() >> 1) & (TILE - 1)).named("channel");
        let part = (((k.thread() >> 5) << 1) | (k.thread() & 1)).named("part");
        Self { channel, part, sum: part.mad(TILE, channel).named("own_sum") }
    }

    /// The place of its states in a `[…, channels, states]` tensor whose outer index is `outer`.
    fn states(&self, forward: &Forward<'a>, memory: Global<'a>, outer: Value<'a, U32>) -> Address<'a> {
        let tile = &forward.tile;
        let channel = tile.tile.mad(TILE, self.channel);
        memory.from_row(outer, tile.channels * STATES).at(channel.mad(STATES, self.part * HELD as u32))
    }

    fn load_states(&self, forward: &Forward<'a>, memory: Global<'a>, outer: Value<'a, U32>) -> Held<'a> {
        self.states(forward, memory, outer).load_vector()
    }

    fn store_states(&self, forward: &Forward<'a>, memory: Global<'a>, outer: Value<'a, U32>, states: Held<'a>) {
        self.states(forward, memory, outer).store_vector(&states);
    }

    /// Its places in the inputs of the first interval.
    fn places(&self, forward: &Forward<'a>) -> Places<'a> {
        Places {
            drive: forward.drive.at(self.channel * 2),
            groups: forward.groups.at(self.part * (2 * HELD) as u32),
            begins: forward.begins.map(|begins| begins.first()),
        }
    }
}

/// A scanning lane's places in an interval.
#[derive(Clone, Copy)]
struct Places<'a> {
    drive: Address<'a>,
    groups: Address<'a>,
    begins: Option<Address<'a>>,
}

impl<'a> Places<'a> {
    /// Those in another interval, from those in the first.
    fn of(self, interval: Value<'a, U32>) -> Self {
        let place = interval & (PLACES - 1);
        let rows = place * (INTERVAL * ROW * 4);
        Self {
            drive: self.drive.moved(rows),
            groups: self.groups.moved(rows),
            begins: self.begins.map(|begins| begins.moved(place * (INTERVAL * 4))),
        }
    }

    fn drive(&self, step: u32) -> Drive<'a> {
        self.drive.plus(i64::from(step * ROW)).load_vector()
    }

    fn groups(&self, step: u32) -> Groups<'a> {
        let pairs: [[Value<'a, F32>; 4]; HELD / PAIR] =
            std::array::from_fn(|pair| self.groups.plus(i64::from(step * ROW) + 4 * pair as i64).load_vector());
        Groups {
            b: std::array::from_fn(|n| pairs[n / PAIR][n % PAIR]),
            c: std::array::from_fn(|n| pairs[n / PAIR][PAIR + n % PAIR]),
            begins: self.begins.map(|begins| begins.plus(i64::from(step)).load_u32()),
        }
    }
}

/// B and C of a scanning lane's states, and whether the step begins a document.
#[derive(Clone, Copy)]
struct Groups<'a> {
    b: Held<'a>,
    c: Held<'a>,
    begins: Option<Value<'a, U32>>,
}

/// What a scanning lane has of the steps before it: the decays of the next one, Δ and Δu, and B and C, from the next one on.
struct Ahead<'a> {
    decays: Held<'a>,
    drive: VecDeque<Drive<'a>>,
    groups: VecDeque<Groups<'a>>,
}

/// What a step needs.
struct Now<'a> {
    decays: Held<'a>,
    driven: Value<'a, F32>,
    groups: Groups<'a>,
}

impl<'a> Ahead<'a> {
    /// Takes the next step; computes the decays of the one after it.
    fn next(&mut self, decays: impl FnOnce(Drive<'a>) -> Held<'a>) -> Now<'a> {
        let (Some([_, driven]), Some(groups)) = (self.drive.pop_front(), self.groups.pop_front()) else {
            unreachable!("steps were read ahead")
        };
        let next = decays(self.drive[0]);
        Now { decays: std::mem::replace(&mut self.decays, next), driven, groups }
    }

    /// In the order in which [`Carried::get`] takes them.
    fn numbers(&self) -> impl Iterator<Item = Value<'a, F32>> {
        let groups = self.groups.iter().flat_map(|groups| groups.b.into_iter().chain(groups.c));
        self.decays.into_iter().chain(self.drive.iter().flatten().copied()).chain(groups)
    }

    fn begins(&self) -> impl Iterator<Item = Value<'a, U32>> {
        self.groups.iter().filter_map(|groups| groups.begins)
    }
}

/// The same in variables.
struct Carried<'a> {
    numbers: Vec<Variable<'a, F32>>,
    begins: Vec<Variable<'a, U32>>,
}

impl<'a> Carried<'a> {
    fn new(k: &'a Assembler, ahead: &Ahead<'a>) -> Self {
        Self {
            numbers: ahead.numbers().map(|value| k.variable(value)).collect(),
            begins: ahead.begins().map(|value| k.variable(value)).collect(),
        }
    }

    fn set(&self, ahead: &Ahead<'a>) {
        for (variable, value) in self.numbers.iter().zip(ahead.numbers()) {
            variable.set(value);
        }
        for (variable, value) in self.begins.iter().zip(ahead.begins()) {
            variable.set(value);
        }
    }

    fn get(&self) -> Ahead<'a> {
        let mut numbers = self.numbers.iter();
        let mut begins = self.begins.iter();
        let mut next = || match numbers.next() {
            Some(variable) => variable.get(),
            None => unreachable!("there are as many as were set"),
        };
        let decays = std::array::from_fn(|_| next());
        let drive = (0..DRIVE_AHEAD).map(|_| std::array::from_fn(|_| next())).collect();
        let groups = (0..GROUPS_AHEAD).map(|_| {
            let (b, c) = (std::array::from_fn(|_| next()), std::array::from_fn(|_| next()));
            Groups { b, c, begins: begins.next().map(|begins| begins.get()) }
        });
        Ahead { decays, drive, groups: groups.collect() }
    }
}

/// A serving lane's first places in shared memory.
struct Served<'a> {
    drive: Address<'a>,
    groups: Address<'a>,
    sums: Address<'a>,
    begins: Option<Address<'a>>,
    raw: Address<'a>,
    /// Bytes of a step of a raw array.
    row: u32,
    starts: Option<Address<'a>>,
}

impl<'a> Served<'a> {
    /// Where a step lies as it came: `row` steps after the first place of a half of the raw places.
    fn raw(&self, half: Value<'a, U32>, row: u32) -> Raw<'a> {
        let passed = |bytes: u32| half * (INTERVAL * bytes);
        Raw {
            first: self.raw.moved(passed(self.row)).plus(i64::from(row * TILE)),
            start: self.starts.map(|starts| starts.moved(passed(4)).plus(i64::from(row))),
        }
    }
}

/// Where a serving lane finds what global memory has of a step.
#[derive(Clone, Copy)]
struct Raw<'a> {
    /// Its two elements of [`Array::Input`].
    first: Address<'a>,
    /// The first step of the step's document.
    start: Option<Address<'a>>,
}

impl<'a> Raw<'a> {
    fn get(&self, array: Array) -> [Value<'a, F32>; PAIR] {
        self.first.plus(array as i64 * i64::from(RAW_ARRAY)).load_vector()
    }
}

/// What has 16 elements of every step in shared memory, as they came from global memory.
#[derive(Clone, Copy)]
enum Array {
    Input,
    Delta,
    B,
    C,
    Gate,
}

/// Elements of such an array.
const RAW_ARRAY: u32 = RAW_PLACES * INTERVAL * TILE;

/// What a serving lane copies of every interval. Each warp has one of the arrays; one has the gate, too, and one the starts of
/// documents.
struct Sender<'a> {
    own: Source<'a>,
    gate: Option<(Value<'a, Pred>, Source<'a>)>,
    starts: Option<(Value<'a, Pred>, Source<'a>)>,
}

/// Where a lane copies from and to.
struct Source<'a> {
    /// Of an interval's steps, the first that it copies of, and how many lie from it to the next.
    slot: Value<'a, U32>,
    slots: u32,
    /// Bytes of a copy.
    copy: usize,
    from: Track<'a>,
    /// In the first place.
    to: Address<'a>,
    /// Elements of a step there, and bytes of an element.
    elements: u32,
    size: u32,
}

impl<'a> Sender<'a> {
    fn new(forward: &Forward<'a>) -> Self {
        let (k, tile) = (forward.k, &forward.tile);
        let size = forward.source.scan.element.bytes() as u32;
        let chunk = COPY as u32 / size;
        let chunks = TILE / chunk;
        let first = ((k.lane() & (chunks - 1)) * chunk).named("copied");
        let slot = (k.lane() >> chunks.ilog2()).named("copied_slot");
        let from = |memory: Global<'a>, columns| tile.track_from(memory, columns, first);
        let source = |from: Track<'a>, array: Value<'a, U32>| Source {
            slot,
            slots: LANES / chunks,
            copy: COPY,
            from,
            to: forward.raw.at(array.mad(RAW_ARRAY, slot.mad(TILE, first))),
            elements: TILE,
            size,
        };
        let warp = (k.thread() >> LANES.ilog2()) - SCANNERS / LANES;
        let arrays = [
            from(forward.input, tile.own),
            from(forward.delta, tile.own),
            from(forward.b, tile.b),
            from(forward.c, tile.c),
        ];
        let own = source(Track::chosen(warp, &arrays), warp);
        let gate = forward.gate.map(|gate| {
            (warp.eq(0), source(from(gate, tile.own), k.constant(Array::Gate as u32)))
        });
        let starts = forward.document_start.zip(forward.starts).map(|(document_start, starts)| {
            let slot = k.lane();
            let from = tile.starts(document_start);
            let source = Source { slot, slots: INTERVAL, copy: 4, from, to: starts.at(slot), elements: 1, size: 4 };
            (warp.eq(1) & slot.lt(INTERVAL), source)
        });
        Self { own, gate, starts }
    }

    /// Sends for the interval that begins with step `first`, into place `place` of a half of the raw places.
    fn send(&self, forward: &Forward<'a>, first: Value<'a, U32>, half: Value<'a, U32>, place: u32) {
        let (k, time) = (forward.k, forward.tile.time);
        let copy = |source: &Source<'a>| {
            let to = source.to.moved(half * (INTERVAL * source.elements * source.size));
            for row in (0..INTERVAL).step_by(source.slots as usize) {
                let step = first + (source.slot + row);
                // What does not exist is zero.
                let bytes = step.lt(time).select::<U32>(source.copy as u32, 0);
                let to = to.plus(i64::from((place * INTERVAL + row) * source.elements));
                k.copy_bytes(to, source.from.at(step), source.copy, bytes);
            }
        };
        copy(&self.own);
        for (holds, source) in self.gate.iter().chain(&self.starts) {
            k.if_(*holds, || copy(source));
        }
        k.commit_copies();
    }
}
