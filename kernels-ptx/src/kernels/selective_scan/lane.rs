//! What the kernels of the scan share: where a lane stands, how it reads, and the arithmetic of single steps.

use super::{STAGE, Scan, TILE};
use crate::Element;
use crate::asm::{Address, Assembler, F32, Global, Pred, Shared, U32, U64, Value, Variable};

/// Channels of a lane.
pub(super) const QUAD: usize = 4;

/// A lane's place: its tile, its channel, its share of channels and states, and the steps of its span.
pub(super) struct Lane<'a> {
    pub k: &'a Assembler,
    pub form: Scan,
    pub time: Value<'a, U32>,
    pub channels: Value<'a, U32>,
    /// Steps of a span.
    pub span: Value<'a, U32>,
    /// Tiles of a row.
    pub tiles: Value<'a, U32>,
    pub row: Value<'a, U32>,
    /// The tile's index in its row.
    pub tile: Value<'a, U32>,
    /// The tile is this half warp's own; the last one is also computed, but not written, by a half without one.
    pub owned: Value<'a, Pred>,
    /// The half of the warp: 0 or 1.
    pub half: Value<'a, U32>,
    /// Which four channels of the tile.
    pub quad: Value<'a, U32>,
    /// Which quarter of the states.
    pub quarter: Value<'a, U32>,
    /// First channel of the tile.
    pub first_channel: Value<'a, U32>,
    /// Channels of the tile.
    pub count: Value<'a, U32>,
    /// The channel that this lane stands for where lanes are channels.
    pub channel: Value<'a, U32>,
    pub channel_exists: Value<'a, Pred>,
    pub b: Group<'a>,
    pub c: Group<'a>,
    /// Lane index bits 0 to 3.
    bits: [Value<'a, Pred>; 4],
}

/// Where a lane reads B or C.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    /// From a token's first element to the one that the lane reads first.
    first: Value<'a, U64>,
    /// Elements of a token.
    stride: Value<'a, U32>,
}

/// The steps of a stage: where a lane reads and writes them.
pub(super) struct Steps<'a> {
    /// The first step.
    first: Value<'a, U32>,
    /// The step after the last that exists.
    end: Value<'a, U32>,
    /// The same, or 0 where the lane has no channel, for reading.
    read_end: Value<'a, U32>,
    /// The same, or 0 where the lane has nothing to write.
    write_end: Value<'a, U32>,
    /// The index of the first step's token among all rows.
    pub token: Value<'a, U32>,
    /// Where the lane's channel of the first step is in a `[batch, time, channels]` tensor.
    pub own: Value<'a, U64>,
}

impl<'a> Steps<'a> {
    /// Whether step `step` of the stage exists.
    pub fn exists(&self, step: usize) -> Value<'a, Pred> {
        (self.first + step as u32).lt(self.end)
    }

    /// Whether the lane writes its channel at step `step` of the stage.
    pub fn written(&self, step: usize) -> Value<'a, Pred> {
        (self.first + step as u32).lt(self.write_end)
    }
}

/// Δ and its derivative with respect to delta.
pub(super) struct StepSize<'a> {
    pub size: Value<'a, F32>,
    pub slope: Value<'a, F32>,
}

impl<'a> Lane<'a> {
    /// Declares the sizes: `items` (batch · tiles), `time`, `channels`, `run` (channels that share their groups), `b_width`,
    /// `c_width` (channels of a group), `span` (steps).
    pub fn new(k: &'a Assembler, form: Scan) -> Self {
        let items = k.u32("items");
        let (time, channels, run) = (k.u32("time"), k.u32("channels"), k.u32("run"));
        let (b_width, c_width, span) = (k.u32("b_width"), k.u32("c_width"), k.u32("span"));
        k.comment("the tile of this half warp, and this lane's place in it");
        let lane = k.lane();
        let half = (lane >> TILE.ilog2()).named("half");
        let within = lane & (TILE - 1);
        let quad = (within >> 2).named("quad");
        let quarter = (within & 3).named("quarter");
        let item = k.block().mad(2u32, half);
        let owned = item.lt(items);
        let item = item.min(items - 1);
        let tiles_per_run = (run + (TILE - 1)) >> TILE.ilog2();
        let tiles = (channels.div(run) * tiles_per_run).named("tiles");
        let row = item.div(tiles).named("row");
        let tile = item.rem(tiles).named("tile");
        let in_run = tile.rem(tiles_per_run) * TILE;
        let first_channel = (tile.div(tiles_per_run).mad(run, in_run)).named("first_channel");
        let count = (run - in_run).min(TILE).named("count");
        let channel = (first_channel + within).named("channel");
        let group = |width| Group {
            first: (first_channel.div(width) * form.states + within).wide(),
            stride: channels.div(width) * form.states,
        };
        let bits = [1u32, 2, 4, 8].map(|bit| (lane & bit).ne(0));
        Self {
            k,
            form,
            time,
            channels,
            span,
            tiles,
            row,
            tile,
            owned,
            half,
            quad,
            quarter,
            first_channel,
            count,
            channel,
            channel_exists: within.lt(count),
            b: group(b_width),
            c: group(c_width),
            bits,
        }
    }

    /// First step of span `span`, and the step after its last.
    pub fn steps(&self, span: Value<'a, U32>) -> (Value<'a, U32>, Value<'a, U32>) {
        let first = (span * self.span).named("first");
        (first, (first + self.span).min(self.time).named("end"))
    }

    /// States of a lane.
    pub fn states(&self) -> usize {
        self.form.states_per_lane() as usize
    }

    /// The stage that begins at step `first`; its steps exist before `end`.
    pub fn stage(&self, first: Value<'a, U32>, end: Value<'a, U32>) -> Steps<'a> {
        let token = self.row.mad(self.time, first);
        Steps {
            first,
            end,
            read_end: self.channel_exists.select(end, 0),
            write_end: (self.channel_exists & self.owned).select(end, 0),
            token,
            own: token.mad_wide(self.channels, self.channel.wide()),
        }
    }

    /// The lane's channel at every step of the stage; `absent` where there is none.
    pub fn load_own(&self, steps: &Steps<'a>, memory: Global<'a>, absent: f32) -> Vec<Value<'a, F32>> {
        let memory = memory.from(steps.own);
        let load = |step| {
            let exists = (steps.first + step).lt(steps.read_end);
            memory.row_after(self.channels, step).load_if(exists, absent)
        };
        (0..STAGE).map(load).collect()
    }

    /// Writes the lane's channel at every step of the stage.
    pub fn store_own(&self, steps: &Steps<'a>, memory: Global<'a>, values: &[Value<'a, F32>]) {
        let memory = memory.from(steps.own);
        for (step, &value) in values.iter().enumerate() {
            memory.row_after(self.channels, step as u32).store_if(steps.written(step), value);
        }
    }

    /// delta at every step of the stage; where there is none, what makes Δ zero.
    pub fn load_delta(&self, steps: &Steps<'a>, delta: Global<'a>) -> Vec<Value<'a, F32>> {
        self.load_own(steps, delta, if self.form.softplus { f32::NEG_INFINITY } else { 0.0 })
    }

    /// B or C of the tile's group at every step of the stage, spread over the half warp. Beyond the states, and where the
    /// step does not exist, zeros.
    pub fn load_group(&self, steps: &Steps<'a>, memory: Global<'a>, group: Group<'a>) -> Vec<Spread<'a>> {
        let states = self.form.states;
        let padded = 4 * self.form.states_per_lane();
        let within = self.k.lane() & (TILE - 1);
        let memory = memory.from(steps.token.mad_wide(group.stride, group.first));
        let load = |step: u32| {
            let place = memory.row_after(group.stride, step);
            let exists = steps.exists(step as usize);
            let part = |part: u32| {
                let fits = (padded < (part + 1) * TILE).then(|| (within + part * TILE).lt(padded));
                let all = states >= (part + 1) * TILE;
                let wanted = if all { exists } else { exists & (within + part * TILE).lt(states) };
                (fits, place.plus(i64::from(part * TILE)).load_if(wanted, 0.0))
            };
            (0..padded.div_ceil(TILE)).map(part).collect()
        };
        (0..STAGE).map(load).collect()
    }

    /// For every step of the stage, whether it begins a document.
    pub fn begins(&self, steps: &Steps<'a>, document_start: Option<Global<'a>>) -> Vec<Option<Value<'a, Pred>>> {
        let first = document_start.map(|starts| starts.from(steps.token.wide()).first());
        let begins = |step: u32| {
            let start = first?.plus(i64::from(step)).load_u32_if(steps.exists(step as usize), u32::MAX);
            Some(start.eq(steps.first + step))
        };
        (0..STAGE).map(begins).collect()
    }

    /// The lane's own channel of a vector over channels; 0 where there is none.
    pub fn own_of(&self, vector: Option<Global<'a>>) -> Value<'a, F32> {
        match vector {
            Some(vector) => vector.at(self.channel).load_if(self.channel_exists, 0.0),
            None => self.k.constant(0.0f32),
        }
    }

    /// Whether the lane's channel `index` of 4 exists.
    fn exists(&self, index: usize) -> Value<'a, Pred> {
        self.quad.mad(QUAD as u32, index as u32).lt(self.count)
    }

    /// For each of the lane's channels, whether it exists and the place of its states in a `[…, channels, states]` tensor
    /// whose outer index is `outer`.
    fn state_places(&self, memory: Global<'a>, outer: Value<'a, U32>) -> Vec<(Value<'a, Pred>, Address<'a>)> {
        let states = self.form.states;
        let first = self.quad.mad(QUAD as u32, self.first_channel);
        let index = first.mad(states, self.quarter * self.form.states_per_lane());
        let place = memory.from_row(outer, self.channels * states).at(index);
        (0..QUAD).map(|channel| (self.exists(channel), place.plus(channel as i64 * i64::from(states)))).collect()
    }

    /// Whether the lanes' states of a channel are whole and can be moved in wide accesses.
    fn whole(&self) -> bool {
        let states = self.states();
        self.form.states as usize == 4 * states && wide(states)
    }

    /// Whether the lane's state `index` exists.
    fn state_exists(&self, index: usize) -> Value<'a, Pred> {
        self.quarter.mad(self.form.states_per_lane(), index as u32).lt(self.form.states)
    }

    /// Fills `[channel][state]` from a `[…, channels, states]` tensor; what does not exist stays as it is.
    pub fn load_states(&self, memory: Global<'a>, outer: Value<'a, U32>, variables: &[Vec<Variable<'a, F32>>]) {
        for ((exists, place), variables) in self.state_places(memory, outer).into_iter().zip(variables) {
            self.k.if_(exists, || {
                if self.whole() {
                    for (variable, word) in variables.iter().zip(place.load_words(variables.len())) {
                        variable.set(word.as_f32());
                    }
                } else {
                    for (index, variable) in variables.iter().enumerate() {
                        variable.set(place.plus(index as i64).load_if(self.state_exists(index), 0.0));
                    }
                }
            });
        }
    }

    /// Writes `[channel][state]` to a `[…, channels, states]` tensor.
    pub fn store_states(&self, memory: Global<'a>, outer: Value<'a, U32>, values: &[Vec<Variable<'a, F32>>]) {
        for ((exists, place), values) in self.state_places(memory, outer).into_iter().zip(values) {
            self.k.if_(exists & self.owned, || {
                if self.whole() {
                    let values: Vec<Value<'a, F32>> = values.iter().map(|value| value.get()).collect();
                    place.store_vector(&values);
                } else {
                    for (index, value) in values.iter().enumerate() {
                        place.plus(index as i64).store_if(self.state_exists(index), value.get());
                    }
                }
            });
        }
    }

    /// `[channel][state]` of zeros.
    pub fn zeros(&self) -> Vec<Vec<Variable<'a, F32>>> {
        (0..QUAD).map(|_| (0..self.states()).map(|_| self.k.variable(0.0f32)).collect()).collect()
    }

    /// A times log₂ e, `[channel][state]`, so that the decay of a step is `2^(Δ A)`; 0 for what does not exist.
    pub fn rates(&self, a: Global<'a>) -> Vec<Vec<Value<'a, F32>>> {
        let variables = self.zeros();
        self.load_states(a, self.k.constant(0u32), &variables);
        let scaled = |value: &Variable<'a, F32>| value.get() * std::f32::consts::LOG2_E;
        variables.iter().map(|values| values.iter().map(scaled).collect()).collect()
    }

    /// Δ from what [`Lane::load_delta`] read, and the bias; 0 where the step does not exist.
    pub fn step_size(
        &self,
        steps: &Steps<'a>,
        step: usize,
        delta: Value<'a, F32>,
        bias: Value<'a, F32>,
    ) -> StepSize<'a> {
        let raw = delta + bias;
        if self.form.softplus {
            return softplus(self.k, raw);
        }
        let exists = steps.exists(step);
        StepSize { size: exists.select(raw, 0.0), slope: exists.select(1.0f32, 0.0) }
    }

    /// Four sums over the lanes that differ in bits 0 and 1 of their index, the quarters of the states: the lane gets the
    /// sum of the value whose index is its quarter.
    pub fn over_quarters(&self, values: [Value<'a, F32>; QUAD]) -> Value<'a, F32> {
        self.scatter(values, 0)
    }

    /// Four sums over the lanes that differ in bits 2 and 3 of their index, the quads of channels: the lane gets the sum
    /// of the value whose index is its quad.
    pub fn over_quads(&self, values: [Value<'a, F32>; QUAD]) -> Value<'a, F32> {
        self.scatter(values, 2)
    }

    fn scatter(&self, [a, b, c, d]: [Value<'a, F32>; QUAD], bit: usize) -> Value<'a, F32> {
        let (low, high) = (self.bits[bit], self.bits[bit + 1]);
        let exchange = |holds: Value<'a, Pred>, mask: u32, first: Value<'a, F32>, second: Value<'a, F32>| {
            let kept = holds.select::<F32>(second, first);
            let sent = holds.select::<F32>(first, second);
            kept + self.k.shuffle_xor(sent, mask)
        };
        let first = exchange(high, 2 << bit, a, c);
        let second = exchange(high, 2 << bit, b, d);
        exchange(low, 1 << bit, first, second)
    }

    /// Sets states to zero where the condition holds.
    pub fn reset_if(&self, condition: Option<Value<'a, Pred>>, states: &[Vec<Variable<'a, F32>>]) {
        if let Some(condition) = condition {
            self.k.if_(condition, || {
                for state in states.iter().flatten() {
                    state.set(0.0f32);
                }
            });
        }
    }
}

/// A stage's values in shared memory. Those per channel are written by the lane that stands for the channel and read four
/// channels at a time; those per state are written as they come and read a quarter at a time.
pub(super) struct Stage<'a> {
    own: Address<'a>,
    quad: Address<'a>,
    group: Address<'a>,
    quarter: Address<'a>,
    /// States of both tiles, each filled up to four quarters.
    group_width: i64,
    states: usize,
}

impl<'a> Stage<'a> {
    /// Shared memory for `per_channel` arrays over the channels and `per_state` arrays over the states.
    pub fn new(lane: &Lane<'a>, per_channel: u32, per_state: u32) -> Self {
        let k = lane.k;
        let padded = 4 * lane.form.states_per_lane();
        let by_channel: Shared<'a> = k.shared(Element::F32, per_channel * STAGE * 32);
        let by_state: Shared<'a> = k.shared(Element::F32, per_state * STAGE * 2 * padded);
        let within = k.lane() & (TILE - 1);
        Self {
            own: by_channel.at(k.lane()),
            quad: by_channel.at(lane.half.mad(TILE, lane.quad * QUAD as u32)),
            group: by_state.at(lane.half.mad(padded, within)),
            quarter: by_state.at(lane.half.mad(padded, lane.quarter * lane.form.states_per_lane())),
            group_width: i64::from(2 * padded),
            states: lane.states(),
        }
    }

    fn by_channel(array: usize, step: usize) -> i64 {
        ((array * STAGE as usize + step) * 32) as i64
    }

    fn by_state(&self, array: usize, step: usize) -> i64 {
        (array * STAGE as usize + step) as i64 * self.group_width
    }

    /// Writes the lane's own channel.
    pub fn put(&self, array: usize, step: usize, value: Value<'a, F32>) {
        self.own.plus(Self::by_channel(array, step)).store(value);
    }

    /// The lane's own channel.
    pub fn own(&self, array: usize, step: usize) -> Value<'a, F32> {
        self.own.plus(Self::by_channel(array, step)).load()
    }

    /// The lane's four channels.
    pub fn quad(&self, array: usize, step: usize) -> [Value<'a, F32>; QUAD] {
        self.quad.plus(Self::by_channel(array, step)).load_vector()
    }

    /// Writes a step of what [`Lane::load_group`] read.
    pub fn put_group(&self, array: usize, step: usize, values: &Spread<'a>) {
        for (part, (exists, value)) in values.iter().enumerate() {
            let place = self.group.plus(self.by_state(array, step) + (part as u32 * TILE) as i64);
            match exists {
                Some(exists) => place.store_if(*exists, *value),
                None => place.store(*value),
            }
        }
    }

    /// The lane's quarter of the states.
    pub fn quarter(&self, array: usize, step: usize) -> Vec<Value<'a, F32>> {
        let place = self.quarter.plus(self.by_state(array, step));
        if wide(self.states) {
            place.load_words(self.states).into_iter().map(Value::as_f32).collect()
        } else {
            (0..self.states).map(|index| place.plus(index as i64).load()).collect()
        }
    }
}

/// Values of B or C spread over a half warp: with each, whether shared memory has a place for it (`None`: it has).
pub(super) type Spread<'a> = Vec<(Option<Value<'a, Pred>>, Value<'a, F32>)>;

/// `ln(1 + e) / e` as a polynomial on 0..1, from the highest power on.
const LOGARITHM: [f32; 9] = [
    0.005_232_695,
    -0.029_505_243,
    0.078_225_97,
    -0.136_632_48,
    0.191_060_08,
    -0.248_429_83,
    0.333_190_97,
    -0.499_994_93,
    0.999_999_97,
];

/// `ln(1 + e^x)` and its derivative.
pub(super) fn softplus<'a>(k: &'a Assembler, x: Value<'a, F32>) -> StepSize<'a> {
    // softplus(x) = max(x, 0) + ln(1 + e) with e = exp(−|x|), and ln(1 + e) = e p(e): accurate also where e is tiny. The
    // polynomial is the one of degree 8 whose relative error on 0..1 is least: 3e-8, and 8e-8 with its coefficients in f32,
    // about as much as the roundings add.
    let e = (x.abs() * -std::f32::consts::LOG2_E).exp2_flushed();
    let mut p = k.constant(LOGARITHM[0]);
    for &coefficient in &LOGARITHM[1..] {
        p = p.fma(e, coefficient);
    }
    let r = (e + 1.0).reciprocal_flushed();
    StepSize { size: e.fma(p, x.max(0.0)), slope: x.ge(0.0).select::<F32>(r, e * r) }
}

/// Whether so many neighbouring words can be moved in wide accesses.
fn wide(words: usize) -> bool {
    words <= 2 || words.is_multiple_of(4)
}
