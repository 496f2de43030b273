//! The scan forward over whole rows.
//!
//! A block takes a tile, 16 channels by 16 states, or shares of several. Some of its warps scan: a lane holds one channel by [`HELD`] states, and
//! while it takes a step it computes the decays of the next one and the sum of the one before, so that exponentials and
//! products overlap. The others serve: they copy global memory into shared memory, four intervals ahead; and a thread stands
//! for a channel pair (or a state pair) and a step, computes what depends on the channel alone (softplus, gate, D), and adds up
//! what the scanning lanes leave in shared memory, in a fixed order. Both meet at one barrier per interval; what is prepared
//! lies ready for a whole interval before it is scanned, so that the scan's reads run on over the barrier. A chunk of
//! intervals is one piece of text: a branch back costs a warp some 40 cycles, and so does each over text that rarely runs.
//!
//! Shares: where tiles are a few more than two for each multiprocessor, those that get a third would take half as long again.
//! There, the chunks of all tiles are shared out ([`Shares`]): a block takes the end of one tile and the beginning of the next,
//! which it begins with, so that the block after it finds that tile's states when it comes to the tile's end. Its text goes
//! on from tile to tile without a pause: what is sent for, prepared, scanned and finished turns to the next piece one after
//! the other.
//!
//! Copies past the registers are counted in groups, so that one can wait for the oldest alone; whoever waits for a read into a
//! register waits for all that the compiler has put before it, wherever it has put them.
//!
//! Floor at 1 × 16,384 × 4096 × 16 in bf16 on an H100: bytes 0.81 GB, 0.27 ms at 2.96 TB/s (with the states that training
//! saves 0.87 GB, 0.29 ms); exponentials and reciprocals 38 cycles per step and quarter of a multiprocessor, two blocks on
//! each, 0.31 ms at 1.98 GHz; 39 instructions and, counted by a profile, 45 passes of shared memory, 0.37 ms, which is what
//! binds where there are more blocks. States are saved as often as the backward pass over chunks wants them. At
//! 8 × 2,048 × 576 × 16: bytes 0.11 GB, 0.04 ms; 35 chunks for each of 264 blocks at the same speed, 0.05 ms.

use std::collections::VecDeque;

use super::forward::SIZES;
use super::serial::{PAIR, STATES, Tile, Track, TrackVariable, tree_sum};
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
/// Intervals of a chunk: what shared memory has places for, so that a chunk begins in the first place.
const PER_CHUNK: u32 = CHUNK / INTERVAL;
const _: () = assert!(PER_CHUNK == PLACES);
/// f32 of a tile's states, and of what a piece begins with.
const TILE_STATES: u32 = TILE * STATES;
const FRESH: u32 = 2 * TILE_STATES;
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
///
/// When shared, `handed` (f32 `[blocks, 16 channels, states]`, written) and `flags` (u32 `[blocks]`, zeros, written) come after
/// `chunk_states`, and `share` (chunks of a block), `chunks` (of all tiles; both u32) before `time`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SerialForward {
    /// The inputs.
    pub scan: Scan,
    /// Rows start from given states, not from zero.
    pub resumed: bool,
    /// The states at the starts of chunks are saved.
    pub saves: bool,
    /// Blocks take equal shares of all tiles' chunks, not a tile each.
    pub shared: bool,
}

/// How blocks share the chunks of all tiles.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shares {
    /// Blocks.
    pub blocks: u32,
    /// Chunks of a block, at least as many as a tile has; the last block may have fewer.
    pub share: u32,
    /// Chunks of all tiles.
    pub chunks: u32,
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

impl Shares {
    /// Blocks that shares are made for: two on each multiprocessor of an H100. Three of them are hardly quicker than four, as
    /// their warps meet at the same schedulers.
    const BLOCKS: u32 = 2 * 132;
    /// Cycles of a step where two blocks share a multiprocessor, and where three or four do.
    const STEP: [u64; 2] = [57, 102];
    /// Cycles that turning from tile to tile takes, and the launch that zeroes the flags.
    const TURNS: u64 = 6_000;
    /// Chunks that a share has more than a tile, at least: a block finds the states that it goes on from in time when the one
    /// before it has left them two chunks ago.
    const SLACK: u32 = 2;

    /// The shares of a scan; `None` where they would not save time on an H100. The same on every device.
    pub fn of(sizes: &Sizes) -> Option<Self> {
        let tiles = sizes.batch.checked_mul(sizes.channels / TILE)?;
        let whole = sizes.time.div_ceil(CHUNK);
        let even = Self::among(sizes, Self::BLOCKS)?;
        let shares = Self::new(even.chunks, even.share.max(whole + Self::SLACK))?;
        let cycles = |chunks: u32, step: u64| u64::from(chunks) * u64::from(CHUNK) * step;
        let [shared, alone] = [cycles(shares.share, Self::STEP[0]) + Self::TURNS, cycles(whole, Self::STEP[1])];
        (tiles > Self::BLOCKS && shared < alone).then_some(shares)
    }

    /// Shares for so many blocks, or for as many as there are tiles; `None` where chunks and steps cannot be counted.
    pub fn among(sizes: &Sizes, blocks: u32) -> Option<Self> {
        let of_tile = sizes.time.div_ceil(CHUNK);
        let chunks = sizes.batch.checked_mul(sizes.channels / TILE)?.checked_mul(of_tile)?;
        Self::new(chunks, chunks.div_ceil(blocks.max(1)).max(of_tile).max(1))
    }

    fn new(chunks: u32, share: u32) -> Option<Self> {
        // The kernel counts up to a share further than there are chunks, and the steps of a block and some more.
        chunks.checked_add(share)?;
        share.checked_add(2)?.checked_mul(CHUNK)?;
        Some(Self { blocks: chunks.div_ceil(share), share, chunks })
    }
}

impl KernelSource for SerialForward {
    fn build(&self) -> Kernel {
        let Self { scan: form, resumed, saves, shared } = *self;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let bytes = form.element.bytes() as u64;
        let arrays = 3 + u64::from(form.gate);
        let name = form.name("selective_scan_serial_forward");
        let description = Description {
            name: format!("{name}{}{}{}", flag(resumed, "_resumed"), flag(saves, "_saves"), flag(shared, "_shared")),
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
        let forms = [(false, false), (false, true), (true, false), (true, true)];
        let of = |scan| forms.map(|(saves, shared)| Self { scan, resumed: false, saves, shared });
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
    /// The block's tile, or the first of them.
    tile: Tile<'a>,
    share: Option<Share<'a>>,
    /// Chunks of the block; steps that do not exist change nothing.
    chunks: Value<'a, U32>,
    /// Per place of an interval and step: Δ and Δu of each channel; B and C of two states each; whether a document begins. Of
    /// two intervals: C · h of each channel and part of the states.
    drive: Shared<'a>,
    groups: Shared<'a>,
    sums: Shared<'a>,
    begins: Option<Shared<'a>>,
    /// For a piece that begins with an even chunk of the block, and for one with an odd: the tile's part of A, and its states
    /// before the piece.
    fresh: Shared<'a>,
    /// What came from global memory, per [`Array`], place and step; and the first steps of the steps' documents.
    raw: Shared<'a>,
    starts: Option<Shared<'a>>,
}

impl<'a> Forward<'a> {
    /// Declares the parameters.
    fn new(k: &'a Assembler, source: SerialForward) -> Self {
        let SerialForward { scan: form, resumed, saves, shared } = source;
        let element = form.element;
        let output = k.write("output", element);
        let last_state = k.write("last_state", Element::F32);
        let chunk_states = saves.then(|| k.write("chunk_states", Element::F32));
        let handed = shared.then(|| [k.write("handed", Element::F32), k.write("flags", Element::U32)]);
        let (input, delta) = (k.read("input", element), k.read("delta", element));
        let (a, b, c) = (k.read("a", Element::F32), k.read("b", element), k.read("c", element));
        let d = form.skip.then(|| k.read("d", Element::F32));
        let gate = form.gate.then(|| k.read("gate", element));
        let bias = form.bias.then(|| k.read("delta_bias", Element::F32));
        let document_start = form.documents.then(|| k.read("document_start", Element::U32));
        let initial = resumed.then(|| k.read("initial", Element::F32));
        let share = handed.map(|handed| Share::new(k, handed));
        let tile = Tile::new(k, form, |time| share.as_ref().map_or(k.block(), |share| share.last_tile(time)));
        let chunks = match &share {
            Some(share) => share.end - share.first,
            None => chunks_of(tile.time),
        };
        let chunks = chunks.named("chunks");
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
            share,
            chunks,
            drive: k.shared(Element::F32, PLACES * INTERVAL * ROW),
            groups: k.shared(Element::F32, PLACES * INTERVAL * ROW),
            sums: k.shared(Element::F32, 2 * INTERVAL * SUMS_ROW),
            begins: form.documents.then(|| k.shared(Element::U32, PLACES * INTERVAL)),
            fresh: k.shared(Element::F32, 2 * FRESH),
            raw: k.shared(element, (4 + u32::from(form.gate)) * RAW_ARRAY),
            starts: form.documents.then(|| k.shared(Element::U32, RAW_PLACES * INTERVAL)),
        }
    }

    /// Waits for the whole block: scanning and serving warps meet here, each from its own part of the text.
    fn meet(&self) {
        self.k.meet(1, SCANNERS + SERVERS);
    }

    /// The block's first piece, and a course that has come to it.
    fn first_piece(&self) -> (Piece<'a>, Option<Course<'a>>) {
        let bounds = self.share.as_ref().map(|share| share.bounds(&self.tile));
        let course = bounds.map(|bounds| Course::new(self.k, &self.tile, bounds.end));
        (Piece { tile: self.tile, bounds }, course)
    }

    /// Runs `body` for the block's chunks and `late` more; and, `early` chunks before each that begins another piece, `turn`
    /// with the share, that chunk, the tile before it, and the piece.
    fn for_chunks(
        &self,
        course: &Option<Course<'a>>,
        [early, late]: [u32; 2],
        body: impl FnOnce(Value<'a, U32>),
        turn: impl FnOnce(&Share<'a>, Value<'a, U32>, &Tile<'a>, &Piece<'a>),
    ) {
        let k = self.k;
        let end = self.chunks + late;
        let (Some(share), Some(course)) = (&self.share, course) else { return k.for_(0u32, end, 1u32, body) };
        let chunk = k.variable(0u32);
        // What runs for every chunk is one piece of text, without what runs for few of them.
        k.while_(
            || chunk.get().lt(end),
            || {
                let last = course.end.get().eq(self.chunks);
                let stop = last.select(end, course.end.get() - early);
                k.while_(
                    || chunk.get().lt(stop),
                    || {
                        body(chunk.get());
                        chunk.set(chunk.get() + 1);
                    },
                );
                k.if_(!last, || {
                    let before = self.tile.at(course.tile.map(|place| k.constant(place.get())));
                    for (variable, place) in course.tile.iter().zip(before.before()) {
                        variable.set(place);
                    }
                    let first = k.constant(course.end.get());
                    let tile = course.tile_of(self);
                    let bounds = share.bounds(&tile);
                    course.end.set(bounds.end);
                    turn(share, first, &before, &Piece { tile, bounds: Some(bounds) });
                });
            },
        );
    }

    /// What the scanning warps do: in round r they scan interval r − 2.
    fn scan(&self) {
        let k = self.k;
        let lane = Lane::new(self);
        let (piece, course) = self.first_piece();
        let rates = [0; HELD].map(|_| k.variable(0.0f32));
        let exponents = |drive: Drive<'a>| rates.map(|rate| drive[0] * rate.get());
        let states = [0; HELD].map(|_| k.variable(0.0f32));
        // Where the states of the block's first chunk would go, as the tile's chunks lie.
        let saved = self.chunk_states.map(|memory| (memory, k.variable(0u64)));
        let begin = |piece: &Piece<'a>, chunk: Value<'a, U32>| {
            let fresh = self.fresh.at(lane.own_states()).moved((chunk & 1) * (FRESH * 4));
            set_all(&rates, fresh.load_vector().map(|rate| rate * std::f32::consts::LOG2_E));
            set_all(&states, fresh.plus(TILE_STATES.into()).load_vector());
            if let Some((memory, place)) = &saved {
                let tile = &piece.tile;
                let first = lane.states(tile, *memory, tile.row * chunks_of(tile.time)).global_address();
                let size = tile.channels * (STATES * 4);
                place.set(match piece.bounds {
                    Some(bounds) => bounds.first.mad_wide(size, first) - bounds.start.mul_wide(size),
                    None => first,
                });
            }
        };
        let save = |chunk: Value<'a, U32>| {
            if let Some((memory, first)) = &saved {
                let place = chunk.mad_wide(self.tile.channels * (STATES * 4), first.get());
                memory.from_address(place).first().store_vector(&states.map(Variable::get));
            }
        };
        let leave = |tile: &Tile<'a>| {
            lane.states(tile, self.last_state, tile.row).store_vector(&states.map(Variable::get));
        };
        self.meet();
        self.meet();
        begin(&piece, k.constant(0u32));
        let start = lane.places(self);
        // What the next steps need, in variables from chunk to chunk.
        let carried = Carried::new(k, &Ahead::new(&start, exponents));
        let turn = |share: &Share<'a>, chunk: Value<'a, U32>, before: &Tile<'a>, piece: &Piece<'a>| {
            let hand_on = || share.states(k.block(), lane.own_states()).store_vector(&states.map(Variable::get));
            k.if_else(share.cuts(before), hand_on, || leave(before));
            begin(piece, chunk);
            // The decays that are known came from the rates of the piece before.
            carried.set_exponents([0, 1].map(|step| exponents(start.drive(step))));
        };
        let body = |chunk: Value<'a, U32>| {
            save(chunk);
            let mut held = states.map(Variable::get);
            let mut ahead = carried.get();
            for interval in 0..PER_CHUNK {
                let sums = self.sums.at(lane.sum).plus(i64::from(interval % 2 * INTERVAL * SUMS_ROW));
                let mut before: Option<Held<'a>> = None;
                for step in 0..INTERVAL {
                    let place = interval * INTERVAL + step;
                    ahead.drive.push_back(start.drive((place + DRIVE_AHEAD as u32) % CHUNK));
                    ahead.groups.push_back(start.groups((place + GROUPS_AHEAD as u32) % CHUNK));
                    let now = ahead.next(exponents);
                    let mut sum = None;
                    for n in 0..HELD {
                        let product = before.map(|c| sum.map_or_else(|| held[n] * c[n], |sum| held[n].fma(c[n], sum)));
                        sum = product;
                        let state = now.begins.map_or(held[n], |begins| begins.ne(0).select(0.0, held[n]));
                        held[n] = now.decays[n].fma(state, now.driven[n]);
                    }
                    if let Some(sum) = sum {
                        sums.plus(i64::from((step - 1) * SUMS_ROW)).store(sum);
                    }
                    before = Some(now.c);
                }
                if let Some(c) = before {
                    let sum = (1..HELD).fold(held[0] * c[0], |sum, n| held[n].fma(c[n], sum));
                    sums.plus(i64::from((INTERVAL - 1) * SUMS_ROW)).store(sum);
                }
                if interval == PER_CHUNK - 1 {
                    carried.set(&ahead);
                    set_all(&states, held);
                }
                self.meet();
            }
        };
        self.for_chunks(&course, [0, 0], body, turn);
        // A share's last piece ends its tile.
        leave(&course.map_or(self.tile, |course| course.tile_of(self)));
        self.meet();
        self.meet();
    }

    /// What the serving warps do: in round r they finish interval r − 3, prepare interval r, and send for interval r + 4.
    fn serve(&self) {
        let (k, tile) = (self.k, &self.tile);
        let slot = ((k.thread() - SCANNERS) >> 3).named("slot");
        let own = |memory: Shared<'a>, row: u32| memory.at(slot.mad(row, tile.pair * 4));
        let places = Served {
            drive: own(self.drive, ROW),
            groups: own(self.groups, ROW),
            sums: self.sums.at(slot.mad(SUMS_ROW, tile.pair * PAIR as u32)),
            begins: self.begins.map(|begins| begins.at(slot)),
            raw: self.raw.at(slot.mad(TILE, tile.pair * PAIR as u32)),
            row: TILE * self.source.scan.element.bytes() as u32,
            starts: self.starts.map(|starts| starts.at(slot)),
        };
        const ITEMS: u32 = INTERVAL / SLOTS;
        let (piece, course) = self.first_piece();
        let sender = Sender::new(self, &piece);
        const { assert!(SENT_AHEAD == PLACES && SENT_AHEAD + BEHIND < RAW_PLACES) };
        for place in 0..SENT_AHEAD {
            if place == 1 {
                // The scanning warps want it an interval later than the serving ones want the first steps.
                sender.send_fresh(self, &piece, k.constant(0u32));
            }
            sender.send(self, k.constant(place * INTERVAL), k.constant(0u32), place);
        }
        // What is prepared belongs to the piece that was sent for a chunk before, what is finished to an earlier one yet.
        let sent = Serving::new(self, &piece);
        let [prepared, finished] = [0; 2].map(|_| sent.copied());
        // The chunk before which the scanning warps leave states for another block.
        let told = self.share.as_ref().zip(piece.bounds).map(|(share, bounds)| {
            (share, share.cuts(&self.tile).select::<U32>(bounds.end, u32::MAX).named("told"))
        });
        // Before each barrier the interval after it is there; here the serving warps alone meet, each of which has copied a part
        // of the first.
        k.wait_copies(SENT_AHEAD - 1);
        k.meet(2, SERVERS);
        let turn = |_: &Share<'a>, chunk: Value<'a, U32>, _: &Tile<'a>, piece: &Piece<'a>| {
            sender.begin(self, piece);
            sender.send_fresh(self, piece, chunk);
            sent.begin(self, piece);
        };
        let body = |chunk: Value<'a, U32>| {
            let first = chunk.mad(CHUNK, slot);
            // The half of the raw places that this chunk has, and the other.
            let now = (chunk & 1) * PLACES;
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
                        self.finish(&finished, step, sums, raw);
                    }
                };
                if place < BEHIND {
                    k.if_(chunk.gt(0), finish);
                } else {
                    if let (BEHIND, Some((share, told))) = (place, told) {
                        finished.follow(&prepared);
                        k.if_(chunk.eq(told) & k.thread().eq(SCANNERS), || share.tell());
                    }
                    finish();
                }
                for row in items() {
                    let raw = places.raw(half(place), place * INTERVAL + row);
                    self.prepare(&prepared, first + (place * INTERVAL + row), &places, place * INTERVAL + row, raw);
                }
                let ahead = place + SENT_AHEAD;
                sender.send(self, chunk * CHUNK + ahead * INTERVAL, half(ahead), ahead % PLACES);
                k.wait_copies(SENT_AHEAD - 1);
                self.meet();
            }
            if self.share.is_some() {
                prepared.follow(&sent);
            }
        };
        self.for_chunks(&course, [1, 1], body, turn);
        k.wait_copies(0);
    }

    /// Puts what the scan needs of a step into shared memory, `row` steps after the first place.
    fn prepare(
        &self,
        piece: &Serving<'a>,
        step: Value<'a, U32>,
        places: &Served<'a>,
        row: u32,
        raw: Raw<'a>,
    ) {
        let (k, tile) = (self.k, &self.tile);
        let (limit, bias) = (piece.limit.get(), piece.bias.map(Variable::get));
        let exists = step.lt(limit);
        let [u, delta, [b0, b1], [c0, c1]] = [Array::Input, Array::Delta, Array::B, Array::C].map(|array| raw.get(array));
        let sizes = [0, 1].map(|channel| tile.step_size(delta[channel], bias[channel], exists));
        let moved = i64::from(row * ROW);
        places.drive.plus(moved).store_vector(&[sizes[0], sizes[0] * u[0], sizes[1], sizes[1] * u[1]]);
        places.groups.plus(moved).store_vector(&[b0, b1, c0, c1]);
        if let (Some(begins), Some(start)) = (places.begins, raw.start) {
            let begins = begins.plus(i64::from(row));
            let start = start.load_u32();
            // The document's first step, as the block counts its steps.
            let start = if self.share.is_some() { start + (limit - tile.time) } else { start };
            // Where there is no such step the start is 0, which it is not either.
            k.if_(tile.pair.eq(0), || begins.store_u32(start.eq(step).select::<U32>(1u32, 0u32)));
        }
    }

    /// Writes the output of a step from what the scan left at `sums`.
    fn finish(
        &self,
        piece: &Serving<'a>,
        step: Value<'a, U32>,
        sums: Address<'a>,
        raw: Raw<'a>,
    ) {
        let parts: Vec<[Value<'a, F32>; PAIR]> =
            (0..PARTS).map(|part| sums.plus(i64::from(part * TILE)).load_vector()).collect();
        let mut y = tree_sum(&parts);
        if self.d.is_some() {
            let (d, u) = (piece.d.map(Variable::get), raw.get(Array::Input));
            y = [0, 1].map(|channel| d[channel].fma(u[channel], y[channel]));
        }
        if self.gate.is_some() {
            let z = raw.get(Array::Gate);
            y = [0, 1].map(|channel| y[channel] * (z[channel] * z[channel].sigmoid_flushed()));
        }
        piece.output.get().store_if(step.lt(piece.limit.get()), step, y);
    }

    fn output_track(&self, piece: &Piece<'a>) -> Track<'a> {
        piece.track(piece.tile.track(self.output, piece.tile.own))
    }
}

/// Chunks of a tile.
fn chunks_of(time: Value<'_, U32>) -> Value<'_, U32> {
    (time + (CHUNK - 1)) >> CHUNK.ilog2()
}

fn set_all<'a, const N: usize>(variables: &[Variable<'a, F32>; N], values: [Value<'a, F32>; N]) {
    for (variable, value) in variables.iter().zip(values) {
        variable.set(value);
    }
}

/// A block's share of all tiles' chunks, counted from tile to tile.
///
/// The block takes its tiles from the last to the first, each from its first chunk in the share to its last: so it begins with
/// the tile that the next block ends with, and the next block finds the states that it goes on from when it comes to them.
/// Blocks wait for blocks before them only, for what those begin with, which wait for nothing in turn. That GPUs begin blocks in
/// their order, so that none waits for one that has no place, is nowhere promised: it is what they do.
struct Share<'a> {
    k: &'a Assembler,
    handed: Global<'a>,
    flags: Global<'a>,
    first: Value<'a, U32>,
    end: Value<'a, U32>,
}

/// Which chunks of a tile a block takes.
#[derive(Clone, Copy)]
struct Bounds<'a> {
    /// The first, of the tile's.
    first: Value<'a, U32>,
    /// The same and the end, of the block's in the order in which it takes them.
    start: Value<'a, U32>,
    end: Value<'a, U32>,
}

impl<'a> Share<'a> {
    /// Declares the sizes.
    fn new(k: &'a Assembler, [handed, flags]: [Global<'a>; 2]) -> Self {
        let (share, chunks) = (k.u32("share"), k.u32("chunks"));
        let first = (k.block() * share).named("share_first");
        let end = (first + share).min(chunks).named("share_end");
        Self { k, handed, flags, first, end }
    }

    /// The number of the tile that the share ends in.
    fn last_tile(&self, time: Value<'a, U32>) -> Value<'a, U32> {
        (self.end - 1).div(chunks_of(time))
    }

    fn bounds(&self, tile: &Tile<'a>) -> Bounds<'a> {
        let [begin, after] = Self::chunks(tile);
        let from = self.first.max(begin);
        Bounds { first: from - begin, start: self.end.max(after) - after, end: self.end - from }
    }

    /// Another block takes the rest of the tile.
    fn cuts(&self, tile: &Tile<'a>) -> Value<'a, Pred> {
        self.end.lt(Self::chunks(tile)[1])
    }

    /// A tile's first chunk, and the one after its last.
    fn chunks(tile: &Tile<'a>) -> [Value<'a, U32>; 2] {
        let (number, chunks) = (tile.number(), chunks_of(tile.time));
        [number * chunks, number.mad(chunks, chunks)]
    }

    /// Where a block leaves states for the next.
    fn states(&self, block: Value<'a, U32>, state: Value<'a, U32>) -> Address<'a> {
        self.handed.from_row(block, TILE_STATES).at(state)
    }

    /// Tells the next block that the states are there.
    fn tell(&self) {
        self.k.fence();
        self.flags.at(self.k.block()).store_flag(1u32);
    }

    /// Waits until the block before has told.
    fn wait(&self) {
        let flag = self.flags.at(self.k.block() - 1);
        self.k.while_(|| flag.load_flag().eq(0), || ());
        self.k.fence();
    }
}

/// What a block takes of a tile: all of it where tiles are not shared.
struct Piece<'a> {
    tile: Tile<'a>,
    bounds: Option<Bounds<'a>>,
}

impl<'a> Piece<'a> {
    /// The block's steps from here on are none of the tile's.
    fn limit(&self) -> Value<'a, U32> {
        let time = self.tile.time;
        self.bounds.map_or(time, |bounds| time + bounds.start * CHUNK - bounds.first * CHUNK)
    }

    /// A track of the tile by the block's steps.
    fn track(&self, track: Track<'a>) -> Track<'a> {
        self.bounds.map_or(track, |bounds| track.shifted(bounds.start * CHUNK, bounds.first * CHUNK))
    }
}

/// How far some of a block's threads have come.
struct Course<'a> {
    /// The tile's row, and its place there.
    tile: [Variable<'a, U32>; 2],
    /// The block's chunk with which another begins.
    end: Variable<'a, U32>,
}

impl<'a> Course<'a> {
    fn new(k: &'a Assembler, tile: &Tile<'a>, end: Value<'a, U32>) -> Self {
        Self { tile: [k.variable(tile.row), k.variable(tile.tile)], end: k.variable(end) }
    }

    fn tile_of(&self, forward: &Forward<'a>) -> Tile<'a> {
        forward.tile.at(self.tile.map(Variable::get))
    }
}

/// What serving threads need of a piece.
struct Serving<'a> {
    k: &'a Assembler,
    limit: Variable<'a, U32>,
    bias: [Variable<'a, F32>; PAIR],
    d: [Variable<'a, F32>; PAIR],
    output: TrackVariable<'a>,
}

impl<'a> Serving<'a> {
    fn new(forward: &Forward<'a>, piece: &Piece<'a>) -> Self {
        let k = forward.k;
        let variables = |values: [Value<'a, F32>; PAIR]| values.map(|value| k.variable(value));
        Self {
            k,
            limit: k.variable(piece.limit()),
            bias: variables(piece.tile.own_of(forward.bias)),
            d: variables(piece.tile.own_of(forward.d)),
            output: TrackVariable::new(k, forward.output_track(piece)),
        }
    }

    fn begin(&self, forward: &Forward<'a>, piece: &Piece<'a>) {
        self.limit.set(piece.limit());
        set_all(&self.bias, piece.tile.own_of(forward.bias));
        set_all(&self.d, piece.tile.own_of(forward.d));
        self.output.set(forward.output_track(piece));
    }

    fn copied(&self) -> Self {
        let k = self.k;
        Self {
            k,
            limit: k.variable(self.limit.get()),
            bias: self.bias.each_ref().map(|value| k.variable(value.get())),
            d: self.d.each_ref().map(|value| k.variable(value.get())),
            output: self.output.copied(k),
        }
    }

    /// Takes over what another has.
    fn follow(&self, other: &Self) {
        let k = self.k;
        self.limit.set(k.constant(other.limit.get()));
        for (own, value) in self.bias.iter().chain(&self.d).zip(other.bias.iter().chain(&other.d)) {
            own.set(k.constant(value.get()));
        }
        self.output.follow(k, &other.output);
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

    /// The place of its states among a tile's.
    fn own_states(&self) -> Value<'a, U32> {
        self.channel.mad(STATES, self.part * HELD as u32)
    }

    /// The place of its states in a `[…, channels, states]` tensor whose outer index is `outer`.
    fn states(&self, tile: &Tile<'a>, memory: Global<'a>, outer: Value<'a, U32>) -> Address<'a> {
        memory.from_row(outer, tile.channels * STATES).at((tile.tile * (TILE * STATES)) + self.own_states())
    }

    /// Its places in the inputs of a chunk's first step.
    fn places(&self, forward: &Forward<'a>) -> Places<'a> {
        Places {
            drive: forward.drive.at(self.channel * 2),
            groups: forward.groups.at(self.part * (2 * HELD) as u32),
            begins: forward.begins.map(|begins| begins.first()),
        }
    }
}

/// A scanning lane's places in shared memory, which those of a chunk's first step are.
struct Places<'a> {
    drive: Address<'a>,
    groups: Address<'a>,
    begins: Option<Address<'a>>,
}

impl<'a> Places<'a> {
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

/// What a scanning lane has of the next step, and of those after it.
struct Ahead<'a> {
    now: Now<'a>,
    /// Of the step after the next, whose exponentials are the decays.
    exponents: Held<'a>,
    /// Both from the step after the next on.
    drive: VecDeque<Drive<'a>>,
    groups: VecDeque<Groups<'a>>,
}

/// What a step needs.
#[derive(Clone, Copy)]
struct Now<'a> {
    decays: Held<'a>,
    /// Δ u B.
    driven: Held<'a>,
    c: Held<'a>,
    begins: Option<Value<'a, U32>>,
}

impl<'a> Ahead<'a> {
    /// Reads the first steps of a chunk.
    fn new(start: &Places<'a>, exponents: impl Fn(Drive<'a>) -> Held<'a>) -> Self {
        let mut drive: VecDeque<_> = (0..DRIVE_AHEAD as u32).map(|step| start.drive(step)).collect();
        let mut groups: VecDeque<_> = (0..GROUPS_AHEAD as u32).map(|step| start.groups(step)).collect();
        let (Some(first), Some(of_first)) = (drive.pop_front(), groups.pop_front()) else {
            unreachable!("a step at least is read ahead")
        };
        let now = Now::new(exponents(first), first, of_first);
        Self { now, exponents: exponents(drive[0]), drive, groups }
    }

    /// The next step; computes what the one after it needs.
    fn next(&mut self, exponents: impl Fn(Drive<'a>) -> Held<'a>) -> Now<'a> {
        let (Some(drive), Some(groups)) = (self.drive.pop_front(), self.groups.pop_front()) else {
            unreachable!("steps were read ahead")
        };
        let next = Now::new(self.exponents, drive, groups);
        self.exponents = exponents(self.drive[0]);
        std::mem::replace(&mut self.now, next)
    }

    /// All of it, in the order in which [`Carried::get`] takes it.
    fn numbers(&self) -> Vec<Value<'a, F32>> {
        let Now { decays, driven, c, .. } = self.now;
        let groups = self.groups.iter().flat_map(|groups| groups.b.into_iter().chain(groups.c));
        let now = decays.into_iter().chain(self.exponents).chain(driven).chain(c);
        now.chain(self.drive.iter().flatten().copied()).chain(groups).collect()
    }

    fn begins(&self) -> Vec<Value<'a, U32>> {
        self.now.begins.into_iter().chain(self.groups.iter().filter_map(|groups| groups.begins)).collect()
    }
}

impl<'a> Now<'a> {
    fn new(exponents: Held<'a>, [_, driven]: Drive<'a>, Groups { b, c, begins }: Groups<'a>) -> Self {
        Self { decays: exponents.map(Value::exp2_flushed), driven: b.map(|b| driven * b), c, begins }
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
            numbers: ahead.numbers().into_iter().map(|value| k.variable(value)).collect(),
            begins: ahead.begins().into_iter().map(|value| k.variable(value)).collect(),
        }
    }

    /// Replaces what follows from the rates: the exponents of the next step and of the one after it.
    fn set_exponents(&self, [next, after]: [Held<'a>; 2]) {
        for (variable, value) in self.numbers.iter().zip(next.map(Value::exp2_flushed).into_iter().chain(after)) {
            variable.set(value);
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
        let mut held = || std::array::from_fn(|_| next());
        let (decays, exponents, driven, c) = (held(), held(), held(), held());
        let now = Now { decays, driven, c, begins: begins.next().map(|begins| begins.get()) };
        let drive = (1..DRIVE_AHEAD).map(|_| std::array::from_fn(|_| next())).collect();
        let groups = (1..GROUPS_AHEAD).map(|_| {
            let (b, c) = (std::array::from_fn(|_| next()), std::array::from_fn(|_| next()));
            Groups { b, c, begins: begins.next().map(|begins| begins.get()) }
        });
        Ahead { now, exponents, drive, groups: groups.collect() }
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
    warp: Value<'a, U32>,
    /// The first of the elements that the lane copies of a step.
    first: Value<'a, U32>,
    limit: Variable<'a, U32>,
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
    from: TrackVariable<'a>,
    /// In the first place.
    to: Address<'a>,
    /// Elements of a step there, and bytes of an element.
    elements: u32,
    size: u32,
}

impl<'a> Sender<'a> {
    fn new(forward: &Forward<'a>, piece: &Piece<'a>) -> Self {
        let k = forward.k;
        let size = forward.source.scan.element.bytes() as u32;
        let chunk = COPY as u32 / size;
        let chunks = TILE / chunk;
        let first = ((k.lane() & (chunks - 1)) * chunk).named("copied");
        let slot = (k.lane() >> chunks.ilog2()).named("copied_slot");
        let warp = (k.thread() >> LANES.ilog2()) - SCANNERS / LANES;
        let tracks = SentTracks::new(forward, piece, warp, first);
        let source = |from: Track<'a>, array: Value<'a, U32>| Source {
            slot,
            slots: LANES / chunks,
            copy: COPY,
            from: TrackVariable::new(k, from),
            to: forward.raw.at(array.mad(RAW_ARRAY, slot.mad(TILE, first))),
            elements: TILE,
            size,
        };
        let own = source(tracks.own, warp);
        let gate = tracks.gate.map(|gate| (warp.eq(0), source(gate, k.constant(Array::Gate as u32))));
        let starts = tracks.starts.zip(forward.starts).map(|(from, starts)| {
            let (slot, from) = (k.lane(), TrackVariable::new(k, from));
            let source = Source { slot, slots: INTERVAL, copy: 4, from, to: starts.at(slot), elements: 1, size: 4 };
            (warp.eq(1) & slot.lt(INTERVAL), source)
        });
        Self { warp, first, limit: k.variable(piece.limit()), own, gate, starts }
    }

    fn begin(&self, forward: &Forward<'a>, piece: &Piece<'a>) {
        let SentTracks { own, gate, starts } = SentTracks::new(forward, piece, self.warp, self.first);
        self.limit.set(piece.limit());
        self.own.from.set(own);
        for ((_, source), track) in self.gate.iter().zip(gate).chain(self.starts.iter().zip(starts)) {
            source.from.set(track);
        }
    }

    /// Sends for what a piece begins with, which is the block's chunk `chunk`; one of the warps does.
    fn send_fresh(&self, forward: &Forward<'a>, piece: &Piece<'a>, chunk: Value<'a, U32>) {
        const EACH: u32 = COPY as u32 / 4;
        let (k, tile) = (forward.k, &piece.tile);
        k.if_(self.warp.eq(SERVERS / LANES - 1), || {
            let element = k.lane() * EACH;
            let fresh = forward.fresh.at(element).moved((chunk & 1) * (FRESH * 4));
            let send = |to: Address<'a>, from: Address<'a>, bytes: u32| {
                for part in (0..TILE_STATES).step_by((LANES * EACH) as usize) {
                    k.copy_16_bytes(to.plus(part.into()), from.plus(part.into()), bytes);
                }
            };
            let of_tile = |memory: Global<'a>, row: Value<'a, U32>| {
                memory.from_row(row, tile.channels * STATES).at(tile.tile.mad(TILE_STATES, element))
            };
            let rates = of_tile(forward.a, k.constant(0u32));
            send(fresh, rates, 16);
            let states = fresh.plus(TILE_STATES.into());
            let begin = || match forward.initial {
                Some(initial) => send(states, of_tile(initial, tile.row), 16),
                // Zeros.
                None => send(states, rates, 0),
            };
            match (&forward.share, piece.bounds) {
                (Some(share), Some(bounds)) => k.if_else(
                    bounds.first.gt(0),
                    || {
                        share.wait();
                        send(states, share.states(k.block() - 1, element), 16);
                    },
                    begin,
                ),
                _ => begin(),
            }
        });
    }

    /// Sends for the interval that begins with step `first`, into place `place` of a half of the raw places.
    fn send(&self, forward: &Forward<'a>, first: Value<'a, U32>, half: Value<'a, U32>, place: u32) {
        let (k, limit) = (forward.k, self.limit.get());
        let copy = |source: &Source<'a>| {
            let to = source.to.moved(half * (INTERVAL * source.elements * source.size));
            for row in (0..INTERVAL).step_by(source.slots as usize) {
                let step = first + (source.slot + row);
                // What does not exist is zero.
                let bytes = step.lt(limit).select::<U32>(source.copy as u32, 0);
                let to = to.plus(i64::from((place * INTERVAL + row) * source.elements));
                let from = source.from.get().at(step);
                match source.copy {
                    // The tiles beside this one have the rest of the line.
                    COPY => k.copy_16_bytes_of_line(to, from, bytes),
                    size => k.copy_bytes(to, from, size, bytes),
                }
            }
        };
        copy(&self.own);
        for (holds, source) in self.gate.iter().chain(&self.starts) {
            k.if_(*holds, || copy(source));
        }
        k.commit_copies();
    }
}

/// What a lane that serves copies from, of a piece.
struct SentTracks<'a> {
    own: Track<'a>,
    gate: Option<Track<'a>>,
    starts: Option<Track<'a>>,
}

impl<'a> SentTracks<'a> {
    fn new(forward: &Forward<'a>, piece: &Piece<'a>, warp: Value<'a, U32>, first: Value<'a, U32>) -> Self {
        let tile = &piece.tile;
        let from = |memory: Global<'a>, columns| tile.track_from(memory, columns, first);
        let arrays = [
            from(forward.input, tile.own),
            from(forward.delta, tile.own),
            from(forward.b, tile.b),
            from(forward.c, tile.c),
        ];
        Self {
            own: piece.track(Track::chosen(warp, &arrays)),
            gate: forward.gate.map(|gate| piece.track(from(gate, tile.own))),
            starts: forward.document_start.map(|starts| piece.track(tile.starts(starts))),
        }
    }
}
