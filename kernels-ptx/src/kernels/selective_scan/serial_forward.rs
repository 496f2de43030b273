//! The scan forward over whole rows.
//!
//! Floor at 1 × 16,384 × 4096 × 16 in bf16 on an H100: bytes 0.81 GB, 0.27 ms at 2.96 TB/s
//! (with the states that training saves 0.87 GB, 0.29 ms);
//! per step and quarter of a multiprocessor, two blocks on each: exponentials and reciprocals 40 cycles, 0.37 ms; instructions
//! (counted in the machine code for sm_90) 25 of the warp that scans and 16 of the one that serves beside it, 41 cycles,
//! 0.39 ms. So issue and exponentials bind alike. One block per multiprocessor takes as long as two. States are saved as often
//! as the backward pass over chunks wants them.

use super::forward::SIZES;
use super::serial::{self, PAIR, ROW, SLOTS, STATES, Stored, THREADS, Tile, Track};
use super::{CHUNK, Scan, Sizes, TILE};
use crate::asm::{Address, Assembler, Description, F32, Global, Shared, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Steps between two barriers.
const INTERVAL: u32 = 16;
/// Steps whose inputs are read from shared memory together, ahead of the steps before them.
const GROUP: usize = 4;
/// f32 of a step that hold two values per state pair and channel pair, so laid out that neighbouring steps lie in
/// different halves of the banks.
const SUMS_ROW: u32 = 8 * 16 + 16;

/// The scan over whole rows, for channels of 16 states whose groups of B and C are multiples of 16 channels.
///
/// Parameters: `output` (of the type, `[batch, time, channels]`, written), `last_state` (f32 `[batch, channels, states]`,
/// written), `chunk_states` (f32 `[batch, chunks, channels, states]`, written, when saved: the states every
/// [`CHUNK`] steps), `input`, `delta` (like the output), `a` (f32 `[channels, states]`), `b`, `c` (of the type, `[batch, time, groups,
/// states]`), `d` (f32 `[channels]`, with D), `gate` (like the output, with a gate), `delta_bias` (f32 `[channels]`, with a
/// bias), `document_start` (u32 `[batch, time]`, with documents), `initial` (f32 `[batch, channels, states]`, when resumed),
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
            summary: "selective scan over whole rows; a block per tile of 16 channels: two warps scan, two serve".to_owned(),
            block: [THREADS, 1, 1],
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
            let forward = Forward::new(k, *self);
            k.if_else(forward.tile.scans, || forward.scan(), || forward.serve());
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
    /// Intervals of a row, made even; steps that do not exist change nothing.
    intervals: Value<'a, U32>,
    /// Two intervals each of: Δ and Δu of two channels; B and C of two states; C · h of two channels and two states; whether a
    /// step begins a document.
    drive: Shared<'a>,
    groups: Shared<'a>,
    sums: Shared<'a>,
    begins: Option<Shared<'a>>,
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
        let intervals = (((tile.time + (2 * INTERVAL - 1)) >> (2 * INTERVAL).ilog2()) * 2).named("intervals");
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
            drive: k.shared(Element::F32, 2 * INTERVAL * ROW),
            groups: k.shared(Element::F32, 2 * INTERVAL * ROW),
            sums: k.shared(Element::F32, 2 * INTERVAL * SUMS_ROW),
            begins: form.documents.then(|| k.shared(Element::U32, 2 * INTERVAL)),
        }
    }

    /// What the scanning warps do.
    fn scan(&self) {
        let (k, tile) = (self.k, &self.tile);
        let rates = tile.rates(self.a);
        let states = tile.zeros();
        if let Some(initial) = self.initial {
            serial::set(&states, tile.load_states(initial, tile.row, tile.channels.gt(0)));
        }
        // The place among the sums of a state pair turns with the state pair, so that lanes do not share banks.
        let turned = tile.channel_pair ^ ((tile.state_pair >> 1) * 2);
        let own_sum = tile.state_pair.mad(16u32, turned * 2).named("own_sum");
        let chunks = ((tile.time + (CHUNK - 1)) >> CHUNK.ilog2()).named("chunks");
        tile.meet();
        k.for_(0u32, self.intervals, 1u32, |interval| {
            if let Some(chunk_states) = self.chunk_states {
                // A multiple of two intervals, so that the interval that makes the row's even begins no chunk.
                const PER_CHUNK: u32 = CHUNK / INTERVAL;
                k.if_((interval & (PER_CHUNK - 1)).eq(0), || {
                    let outer = tile.row.mad(chunks, interval >> PER_CHUNK.ilog2());
                    tile.store_states(chunk_states, outer, &serial::values(&states));
                });
            }
            let row = (interval & 1) * INTERVAL;
            let (drive, groups) = (tile.by_channels(self.drive, row), tile.by_states(self.groups, row));
            let sums = self.sums.at(row.mad(SUMS_ROW, own_sum));
            let begins = self.begins.map(|begins| begins.at(row));
            let mut held = serial::values(&states);
            let mut ahead = Inputs::load(drive, groups, begins, 0);
            for group in 0..INTERVAL as usize / GROUP {
                let now = ahead;
                let next = (group + 1) * GROUP;
                // Before this group's results are written: the reads of the next may not pass those.
                ahead = if next < INTERVAL as usize { Inputs::load(drive, groups, begins, next) } else { Vec::new() };
                let mut results = Vec::new();
                for inputs in &now {
                    let begins = inputs.begins.map(|begins| begins.ne(0));
                    let [b0, b1, c0, c1] = inputs.groups;
                    held = serial::advance(&rates, &serial::reset(begins, held), inputs.drive, [b0, b1]);
                    results.push(held.map(|[first, second]| second.fma(c1, first * c0)));
                }
                for (index, results) in results.iter().enumerate() {
                    let step = (group * GROUP + index) as i64;
                    sums.plus(step * i64::from(SUMS_ROW)).store_vector(results);
                }
            }
            serial::set(&states, held);
            tile.meet();
        });
        tile.store_states(self.last_state, tile.row, &serial::values(&states));
        tile.meet();
    }

    /// What the serving warps do: in round r they finish interval r − 2, prepare interval r and read interval r + 2.
    fn serve(&self) {
        let (k, tile) = (self.k, &self.tile);
        let tracks = Tracks {
            output: tile.track(self.output, tile.own),
            input: tile.track(self.input, tile.own),
            delta: tile.track(self.delta, tile.own),
            gate: self.gate.map(|gate| tile.track(gate, tile.own)),
            b: tile.track(self.b, tile.b),
            c: tile.track(self.c, tile.c),
        };
        let (bias, d) = (tile.own_of(self.bias), tile.own_of(self.d));
        // The place among the sums, by how far it is turned.
        let own_sums = [0u32, 2, 4, 6].map(|turn| tile.slot.mad(SUMS_ROW, (tile.pair ^ turn) * 2));
        // Of even and odd rounds each, the steps that this thread stands for.
        let items: [Vec<Item<'a>>; 2] =
            std::array::from_fn(|_| (0..INTERVAL / SLOTS).map(|_| Item::new(self)).collect());
        for (odd, items) in (0u32..).zip(&items) {
            for (index, item) in (0u32..).zip(items) {
                item.raw.load(self, &tracks, tile.slot + (odd * INTERVAL + index * SLOTS));
            }
        }
        // Two rounds at a time: what is on its way stays in the registers that it was sent to.
        k.for_(0u32, self.intervals + 2, 2u32, |even| {
            for (odd, items) in (0u32..).zip(&items) {
                let first = even.mad(INTERVAL, tile.slot + odd * INTERVAL);
                let row = odd * INTERVAL;
                k.if_(even.ge(2), || {
                    for (index, item) in (0u32..).zip(items) {
                        let step = first + (index * SLOTS) - 2 * INTERVAL;
                        let sums = i64::from((row + index * SLOTS) * SUMS_ROW);
                        self.finish(&tracks, step, own_sums.map(|own| self.sums.at(own).plus(sums)), item, d);
                    }
                });
                for (index, item) in (0u32..).zip(items) {
                    let step = first + index * SLOTS;
                    self.prepare(step, row + index * SLOTS, &item.raw, bias);
                    item.input.set(&item.raw.input);
                    if let (Some(kept), Some(gate)) = (&item.gate, &item.raw.gate) {
                        kept.set(gate);
                    }
                    item.raw.load(self, &tracks, step + 2 * INTERVAL);
                }
                tile.meet();
            }
        });
    }

    /// Puts what the scan needs of a step into shared memory.
    fn prepare(&self, step: Value<'a, U32>, row: u32, raw: &Raw<'a>, bias: [Value<'a, F32>; PAIR]) {
        let (k, tile) = (self.k, &self.tile);
        let exists = step.lt(tile.time);
        let (u, delta) = (raw.input.get(), raw.delta.get());
        let sizes = [0, 1].map(|channel| tile.step_size(delta[channel], bias[channel], exists));
        tile.served(self.drive, row).store_vector(&[sizes[0], sizes[0] * u[0], sizes[1], sizes[1] * u[1]]);
        let ([b0, b1], [c0, c1]) = (raw.b.get(), raw.c.get());
        tile.served(self.groups, row).store_vector(&[b0, b1, c0, c1]);
        if let (Some(begins), Some(flag)) = (self.begins, raw.begins) {
            k.if_(tile.pair.eq(0), || begins.at(tile.slot).plus(i64::from(row)).store_u32(flag.get()));
        }
    }

    /// Writes the output of a step from what the scan left at `sums` (by how far the place is turned).
    fn finish(
        &self,
        tracks: &Tracks<'a>,
        step: Value<'a, U32>,
        sums: [Address<'a>; 4],
        item: &Item<'a>,
        d: [Value<'a, F32>; PAIR],
    ) {
        let tile = &self.tile;
        let parts: Vec<[Value<'a, F32>; PAIR]> =
            (0..STATES as usize / PAIR).map(|pair| sums[pair / 2].plus(pair as i64 * 16).load_vector()).collect();
        let mut y = tree_sum(&parts);
        if self.d.is_some() {
            let u = item.input.get();
            y = [0, 1].map(|channel| d[channel].fma(u[channel], y[channel]));
        }
        if let Some(gate) = &item.gate {
            let z = gate.get();
            y = [0, 1].map(|channel| y[channel] * (z[channel] * z[channel].sigmoid_flushed()));
        }
        tile.store(tracks.output, step, y);
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

/// What a scanning lane reads of a step.
struct Inputs<'a> {
    drive: [Value<'a, F32>; 4],
    groups: [Value<'a, F32>; 4],
    begins: Option<Value<'a, U32>>,
}

impl<'a> Inputs<'a> {
    fn load(drive: Address<'a>, groups: Address<'a>, begins: Option<Address<'a>>, first: usize) -> Vec<Self> {
        let row = i64::from(ROW);
        (first..first + GROUP)
            .map(|step| Self {
                drive: drive.plus(step as i64 * row).load_vector(),
                groups: groups.plus(step as i64 * row).load_vector(),
                begins: begins.map(|begins| begins.plus(step as i64).load_u32()),
            })
            .collect()
    }
}

/// Where a serving lane reads and writes.
struct Tracks<'a> {
    output: Track<'a>,
    input: Track<'a>,
    delta: Track<'a>,
    gate: Option<Track<'a>>,
    b: Track<'a>,
    c: Track<'a>,
}

/// What a serving lane keeps of a step of every second interval.
struct Item<'a> {
    raw: Raw<'a>,
    /// The input and the gate, until the step is finished.
    input: Stored<'a>,
    gate: Option<Stored<'a>>,
}

impl<'a> Item<'a> {
    fn new(forward: &Forward<'a>) -> Self {
        let form = forward.source.scan;
        let stored = || Stored::new(forward.k, form.element);
        Self { raw: Raw::new(forward), input: stored(), gate: form.gate.then(stored) }
    }
}

/// What a serving lane has read of a step that is not yet prepared.
struct Raw<'a> {
    input: Stored<'a>,
    delta: Stored<'a>,
    gate: Option<Stored<'a>>,
    b: Stored<'a>,
    c: Stored<'a>,
    begins: Option<Variable<'a, U32>>,
}

impl<'a> Raw<'a> {
    fn new(forward: &Forward<'a>) -> Self {
        let (k, form) = (forward.k, forward.source.scan);
        let stored = || Stored::new(k, form.element);
        Self {
            input: stored(),
            delta: stored(),
            gate: form.gate.then(stored),
            b: stored(),
            c: stored(),
            begins: form.documents.then(|| k.variable(0u32)),
        }
    }

    fn load(&self, forward: &Forward<'a>, tracks: &Tracks<'a>, step: Value<'a, U32>) {
        let tile = &forward.tile;
        tile.load(&self.input, tracks.input, step);
        tile.load(&self.delta, tracks.delta, step);
        if let (Some(stored), Some(gate)) = (&self.gate, tracks.gate) {
            tile.load(stored, gate, step);
        }
        tile.load(&self.b, tracks.b, step);
        tile.load(&self.c, tracks.c, step);
        if let (Some(begins), Some(document_start)) = (self.begins, forward.document_start) {
            begins.set(tile.load_begins(document_start, step));
        }
    }
}
