//! Causal depthwise convolution along time, with optional SiLU: `y[t] = activation(bias + Σ_w weight[w] x[t − (W − 1) + w])`
//! per channel, its gradients, and its decoding step. Tensors are `[batch, time, channels]`.
//!
//! - Layout: a block takes 32 neighbouring groups of [`VECTOR`] channels in 4 stretches of one row's time, one group and
//!   stretch per thread (one access of 8 or 16 bytes per step; a warp lies along the channels). Channels that are no
//!   multiple of [`VECTOR`] are taken one by one.
//! - Forward: a stretch has 8 steps; all that it reads is on its way before anything is computed.
//! - Backward: where rows are long, as many blocks of long stretches as an H100 has room for at a time are followed by blocks of
//!   short ones, which even out that some multiprocessors are faster ([`Stretches`]). A thread walks a stretch, 4 steps in
//!   hand and 12 on their way to shared memory (`Stream`), computes the gradient `dq` of the convolution's sum again from x,
//!   and keeps the `W − 1` sums `dx` under way in registers. What the first `W − 1` steps of a stretch give to the inputs before
//!   it goes to the thread before through shared memory (`Handed`); the last thread of a block walks the `W − 1` steps after its
//!   own itself, and so has fewer of its own.
//! - The gradients of weight and bias are summed per block in a fixed order. A block that comes after all others of its
//!   channels adds their sums in order (`block_sums`).
//! - Traffic: forward reads and writes one element, backward reads two and writes one. Bound by memory.
//! - Documents: tap `w` of step `t` counts when `t − (W − 1) + w ≥ document_start[t]`.
//! - Source: Gu and Dao 2023, "Mamba", section 3.4.

use std::rc::Rc;

use super::block_sums;
use crate::asm::{Address, Assembler, Description, F32, Global, Pred, Shared, U32, U64, Value, Variable, unpack};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Neighbouring channels of a thread.
pub const VECTOR: u32 = 4;
/// Threads that lie side by side along the channels: rows of 256 bytes of bf16 for a block.
const ACROSS: u32 = 32;
/// Threads that follow each other in time.
const GROUPS: u32 = 4;
const THREADS: u32 = ACROSS * GROUPS;
/// Steps of a thread of the forward pass.
const FORWARD_STEPS: u32 = 8;
/// Blocks of the forward pass that share a multiprocessor. The driver's compiler is not held to it unless asked. With
/// documents registers would spill; more than four taps were not looked at.
const FORWARD_RESIDENT: u32 = 8;
/// Multiprocessors of an H100.
const MULTIPROCESSORS: u32 = 132;
/// Steps that a thread of the backward pass works on at a time.
const AHEAD: u32 = 4;
/// The fewest steps of a stretch: with fewer, the steps between stretches and the blocks' sums cost more than they bring.
const LEAST_STEPS: u32 = 16;
/// With fewer steps for each thread of a launch, and with more rows than room, all stretches have the same length.
const LEAST_SHARE: u32 = 64;
/// Blocks of a launch in the second and third dimension, at most.
const MOST_BLOCKS: u32 = 65_535;
/// So many times [`AHEAD`] steps have room in shared memory: all but one are on their way. More bring nothing.
const SLOTS: u32 = 4;
/// So many blocks' sums are read at a time.
const SUMS_AT_A_TIME: u32 = 8;
const STEP_THREADS: u32 = 128;

/// How the backward pass cuts the time of every row: four stretches to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretches {
    /// Blocks of every row that have long stretches; those after them have short ones.
    pub long_blocks: u32,
    /// Steps of a long stretch.
    pub long_steps: u32,
    /// Steps of a short stretch.
    pub short_steps: u32,
    /// Blocks: along the channels, rows, along the time of a row; of the latter one more, which adds up the sums.
    pub grid: [u32; 3],
    /// Words of memory that is zero by which blocks tell each other their sums.
    pub sums: usize,
}

/// What the forward and the backward kernel of a convolution have in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Convolution {
    /// Type of x, y and their gradients.
    pub element: Element,
    /// W, at least 1.
    pub width: u32,
    /// A bias is added.
    pub bias: bool,
    /// SiLU follows.
    pub silu: bool,
    /// Rows hold several documents.
    pub documents: bool,
    /// There are inputs before the first.
    pub initial: bool,
    /// The number of channels is a multiple of [`VECTOR`].
    pub vector: bool,
}

/// The convolution.
///
/// Parameters: `output` (written), `input` (of the type, `[batch, time, channels]`), `weight` (f32 `[channels, width]`), `bias`
/// (f32 `[channels]`, with a bias), `document_start` (u32 `[batch, time]`, with documents), `initial_state` (of the type,
/// `[batch, width − 1, channels]`, oldest first, with an initial state), `time`, `channels` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConvolutionForward(pub Convolution);

/// The gradients of input, weight, bias and initial state.
///
/// Parameters: `input_gradient` (of the type, written), `weight_gradient` (f32 `[channels, width]`, written),
/// `bias_gradient` (f32 `[channels]`, written, with a bias), `state_gradient` (like the initial state, written, with one),
/// `sums` (u32, [`Stretches::sums`] of them, zero before and after), `gradient` (like the output), the inputs of
/// [`ConvolutionForward`] in its order, `long_blocks`, `long_steps`, `short_steps` (u32, of [`Stretches`]).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConvolutionBackward(pub Convolution);

/// One step of decoding: shifts the state left, appends the input, convolves the newest columns.
///
/// Parameters: `output` (of the type, `[batch, channels]`, written), `state` (f32 `[batch, channels, length]`, oldest first,
/// updated), `input` (like the output), `weight` (f32 `[channels, width]`), `bias` (f32 `[channels]`, with a bias), `count`
/// (u32: batch · channels), `channels`, `length` (u32: at least width − 1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConvolutionStep {
    /// Type of input and output.
    pub element: Element,
    /// W, at least 1.
    pub width: u32,
    /// A bias is added.
    pub bias: bool,
    /// SiLU follows.
    pub silu: bool,
}

impl Convolution {
    /// Blocks of the forward pass; `None` when one launch cannot cover them: rows of 65,535 · 32 steps and 65,535 of them at
    /// most.
    pub fn forward_grid(&self, batch: u32, time: u32, channels: u32) -> Option<[u32; 3]> {
        self.grid(FORWARD_STEPS * GROUPS, batch, time, channels)
    }

    /// How the backward pass is shared out; `None` when one launch cannot cover it.
    pub fn stretches(&self, batch: u32, time: u32, channels: u32) -> Option<Stretches> {
        let columns = channels.div_ceil(ACROSS * self.lanes());
        let room = self.resident() * MULTIPROCESSORS / columns.max(1).saturating_mul(batch.max(1));
        // What a stretch gives to the inputs before it must fit in the stretch before.
        let least = LEAST_STEPS.max(self.width - 1).checked_next_multiple_of(AHEAD)?;
        let of_room = time.div_ceil(room.max(1)).checked_add(self.after())?;
        let share = of_room.div_ceil(GROUPS).max(least).checked_next_multiple_of(AHEAD)?;
        // The parts are the best of 72 pairs on an H200 at 16,384 steps of 4096 channels; more short blocks have more sums to tell.
        let (long_blocks, long_steps, short_steps) = match room > 0 && share >= LEAST_SHARE.max(least.checked_mul(4)?) {
            true => (room, share / 8 * 5 / AHEAD * AHEAD, (share / 6).max(least).next_multiple_of(AHEAD)),
            false => (0, share, share),
        };
        let steps_of_block = |steps: u32| Some(steps.checked_mul(GROUPS)? - self.after());
        let rest = time.saturating_sub(long_blocks * steps_of_block(long_steps)?);
        let blocks = long_blocks + rest.div_ceil(steps_of_block(short_steps)?);
        // The threads of the last block begin behind the end.
        time.checked_add(short_steps.checked_mul(2 * GROUPS)?)?;
        batch.checked_mul(time)?;
        let grid = [columns, batch, if blocks == 0 { 0 } else { blocks + 1 }];
        let sums_of_block = (self.width as usize + 1) * (ACROSS * self.lanes()) as usize;
        if grid[1..].iter().any(|&blocks| blocks > MOST_BLOCKS) {
            return None;
        }
        let sums = (grid[0] as usize * blocks as usize * batch as usize).checked_mul(sums_of_block)?;
        Some(Stretches { long_blocks, long_steps, short_steps, grid, sums })
    }

    /// Blocks of the backward pass that share a multiprocessor: as many as it has registers for. The driver's compiler is held
    /// to it but for more than four taps and inputs before the first, which were not looked at.
    fn resident(&self) -> u32 {
        match (self.vector, self.element, self.documents) {
            (false, ..) | (_, Element::Bf16, false) => 4,
            (_, Element::Bf16, true) | (_, _, false) => 3,
            (_, _, true) => 2,
        }
    }

    /// Steps after its own that the last thread of a block of the backward pass walks; it has as many fewer of its own.
    fn after(&self) -> u32 {
        (self.width - 1).next_multiple_of(AHEAD)
    }

    /// Blocks of so many steps: along the channels, along the time of a row, rows.
    fn grid(&self, steps: u32, batch: u32, time: u32, channels: u32) -> Option<[u32; 3]> {
        // Steps of all rows are counted in 32 bits.
        batch.checked_mul(time)?;
        let grid = [channels.div_ceil(ACROSS * self.lanes()), time.div_ceil(steps), batch];
        grid[1..].iter().all(|&blocks| blocks <= MOST_BLOCKS).then_some(grid)
    }

    /// Channels of a thread.
    fn lanes(&self) -> u32 {
        if self.vector { VECTOR } else { 1 }
    }

    fn name(&self, direction: &str) -> String {
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        format!(
            "causal_conv1d_{direction}_{}_w{}{}{}{}{}{}",
            self.element,
            self.width,
            flag(self.bias, "_bias"),
            flag(self.silu, "_silu"),
            flag(self.documents, "_documents"),
            flag(self.initial, "_initial"),
            flag(!self.vector, "_unaligned"),
        )
    }

    /// What models use: width 4 with bias and SiLU, packed documents or not; and the way of channels that are no multiple
    /// of [`VECTOR`].
    fn configurations() -> Vec<Self> {
        let of = |element, documents, vector| Self {
            element,
            width: 4,
            bias: true,
            silu: true,
            documents,
            initial: false,
            vector,
        };
        let forms = [(false, true), (true, true), (false, false)];
        let all = |element| forms.map(|(documents, vector)| of(element, documents, vector));
        super::float_elements(all).concat()
    }
}

/// The inputs of a convolution, and a thread's part of them.
struct Thread<'a> {
    k: &'a Assembler,
    form: Convolution,
    input: Global<'a>,
    initial_state: Option<Global<'a>>,
    document_start: Option<Global<'a>>,
    time: Value<'a, U32>,
    channels: Value<'a, U32>,
    row: Value<'a, U32>,
    channel: Value<'a, U32>,
    /// Its place among those side by side, and among those after each other.
    across: Value<'a, U32>,
    group: Value<'a, U32>,
    /// The thread's steps.
    first: Value<'a, U32>,
    end: Value<'a, U32>,
    /// The thread has channels and steps.
    active: Value<'a, Pred>,
    weight: Global<'a>,
    bias: Option<Global<'a>>,
}

/// A thread's weights: per tap and channel, and the bias per channel.
struct Weights<'a> {
    taps: Vec<Vec<Value<'a, F32>>>,
    bias: Option<Vec<Value<'a, F32>>>,
}

impl<'a> Thread<'a> {
    /// Declares the inputs. `steps` then says, for a thread's place among those after each other, its row, first step and the
    /// one after its last.
    fn new(
        k: &'a Assembler,
        form: Convolution,
        steps: impl FnOnce(Value<'a, U32>) -> [Value<'a, U32>; 3],
    ) -> Self {
        let input = k.read("input", form.element);
        let weight = k.read("weight", Element::F32);
        let bias = form.bias.then(|| k.read("bias", Element::F32));
        let document_start = form.documents.then(|| k.read("document_start", Element::U32));
        let initial_state = form.initial.then(|| k.read("initial_state", form.element));
        let (time, channels) = (k.u32("time"), k.u32("channels"));
        k.comment("this thread's channels and steps");
        let across = k.thread() & (ACROSS - 1);
        let group = k.thread() >> ACROSS.ilog2();
        let channel = (k.block().mad(ACROSS, across) * form.lanes()).named("channel");
        let [row, first, end] = steps(group);
        let (row, first, end) = (row.named("row"), first.named("first"), end.min(time).named("end"));
        let active = channel.lt(channels) & first.lt(time);
        Self {
            k,
            form,
            input,
            initial_state,
            document_start,
            time,
            channels,
            row,
            channel,
            across,
            group,
            first,
            end,
            active,
            weight,
            bias,
        }
    }

    fn weights(&self) -> Weights<'a> {
        let (lanes, width) = (self.form.lanes() as usize, self.form.width as usize);
        let place = self.weight.at(self.channel * self.form.width);
        let by_channel: Vec<Value<'a, F32>> = if self.form.vector {
            place.load_words(lanes * width).into_iter().map(Value::as_f32).collect()
        } else {
            (0..width).map(|tap| place.plus(tap as i64).load()).collect()
        };
        let taps = (0..width).map(|tap| (0..lanes).map(|lane| by_channel[lane * width + tap]).collect()).collect();
        let bias = self.bias.map(|bias| self.load(bias, self.channel));
        Weights { taps, bias }
    }

    /// The thread's channels of the memory from element `at` on.
    fn load(&self, memory: Global<'a>, at: Value<'a, U32>) -> Vec<Value<'a, F32>> {
        let place = memory.at(at);
        if self.form.vector { place.load_vector::<{ VECTOR as usize }>().to_vec() } else { vec![place.load()] }
    }

    /// The thread's first step, counted over all rows.
    fn token(&self) -> Value<'a, U32> {
        self.row.mad(self.time, self.first)
    }

    /// Bytes from one step to the next.
    fn step_bytes(&self) -> Value<'a, U64> {
        self.channels.mul_wide(self.form.element.bytes() as u32)
    }

    /// The place of the thread's channels in step `step`.
    fn step_place(&self, memory: Global<'a>, step: Value<'a, U32>) -> Address<'a> {
        memory.from_row(self.row.mad(self.time, step), self.channels).at(self.channel)
    }

    /// Writes the thread's channels of one row of the memory where the condition holds.
    fn store_if(&self, condition: Value<'a, Pred>, memory: Global<'a>, row: Value<'a, U32>, values: &[Value<'a, F32>]) {
        self.k.if_(condition, || {
            let place = memory.from_row(row, self.channels).at(self.channel);
            if self.form.vector { place.store_vector(values) } else { place.store(values[0]) }
        });
    }

    /// The inputs before the thread's first step: `[j − 1]` is that `j` steps before, zero where there is none.
    fn history(&self) -> Vec<Vec<Variable<'a, F32>>> {
        (1..self.form.width)
            .map(|back| {
                let place = self.step_place(self.input, self.first - back);
                let loaded = values(&self.form, &load_words_if(&self.form, place, self.first.ge(back)));
                let values: Vec<_> = loaded.into_iter().map(|value| self.k.variable(value)).collect();
                let fill = |loaded: Vec<Value<'a, F32>>| {
                    for (variable, value) in values.iter().zip(loaded) {
                        variable.set(value);
                    }
                };
                if let Some(state) = self.initial_state {
                    self.k.if_(self.first.lt(back), || {
                        let columns = self.form.width - 1;
                        let row = self.row.mad(columns, self.first + (columns - back));
                        fill(self.load(state.from_row(row, self.channels), self.channel));
                    });
                }
                values
            })
            .collect()
    }

    /// For `j` from 1 on, whether the input `j` steps before `step` belongs to its document, which begins at `start`.
    fn visible(&self, step: Value<'a, U32>, start: Option<Value<'a, U32>>) -> Option<Vec<Value<'a, Pred>>> {
        start.map(|start| (1..self.form.width).map(|back| (start + back).le(step)).collect())
    }

    /// The values where the input `back` steps before is visible, zero elsewhere.
    fn masked(visible: &Option<Vec<Value<'a, Pred>>>, back: usize, values: &[Value<'a, F32>]) -> Vec<Value<'a, F32>> {
        match visible {
            Some(visible) if back > 0 => values.iter().map(|&value| visible[back - 1].select(value, 0.0)).collect(),
            _ => values.to_vec(),
        }
    }

    /// The visible inputs of a step by how far back they are; `window` ends with the step's own.
    fn taps(
        visible: &Option<Vec<Value<'a, Pred>>>,
        width: usize,
        window: &[Vec<Value<'a, F32>>],
    ) -> Vec<Vec<Value<'a, F32>>> {
        (0..width).map(|back| Self::masked(visible, back, &window[window.len() - 1 - back])).collect()
    }

    /// The convolution's sum, from the oldest tap to the newest.
    fn sum(&self, weights: &Weights<'a>, taps: &[Vec<Value<'a, F32>>]) -> Vec<Value<'a, F32>> {
        let mut sums = weights.bias.clone();
        for (weights, inputs) in weights.taps.iter().zip(taps.iter().rev()) {
            let terms = weights.iter().zip(inputs);
            sums = Some(match sums {
                None => terms.map(|(&weight, &input)| weight * input).collect(),
                Some(sums) => terms.zip(sums).map(|((&weight, &input), sum)| weight.fma(input, sum)).collect(),
            });
        }
        sums.unwrap_or_default()
    }
}

/// Where a thread's channels lie in each of its steps.
struct Places<'a> {
    memory: Global<'a>,
    first: Value<'a, U64>,
    stride: Value<'a, U64>,
}

impl<'a> Places<'a> {
    /// `token` is the thread's first step, counted over all rows.
    fn new(thread: &Thread<'a>, memory: Global<'a>, token: Value<'a, U32>) -> Self {
        let first = memory.from_row(token, thread.channels).at(thread.channel).global_address();
        Self { memory, first, stride: thread.step_bytes() }
    }

    /// The place `offset` steps after the first.
    fn at(&self, offset: u32) -> Address<'a> {
        self.memory.from_address(self.first + self.stride * u64::from(offset)).first()
    }
}

/// What a thread reads step by step, [`AHEAD`] steps at a time, long before its work: by way of shared memory, each thread
/// for itself. (Through registers the driver's compiler sends for them late.) Single elements, which are too small
/// for that, go to registers.
struct Stream<'a> {
    k: &'a Assembler,
    memory: Global<'a>,
    /// The address of the step that is sent for next, and the bytes from one step to the next.
    next: Variable<'a, U64>,
    stride: Value<'a, U64>,
    way: Way<'a>,
}

enum Way<'a> {
    /// The elements of the steps on their way.
    Registers(Vec<Variable<'a, F32>>),
    Shared {
        /// The thread's part of the first step in the first slot.
        own: Address<'a>,
        slots: Rc<Slots<'a>>,
    },
}

impl<'a> Way<'a> {
    fn registers(k: &'a Assembler) -> Self {
        Self::Registers((0..AHEAD).map(|_| k.variable(0.0f32)).collect())
    }

    fn shared(slots: &Rc<Slots<'a>>, memory: Shared<'a>) -> Self {
        Self::Shared { own: slots.own(memory), slots: slots.clone() }
    }
}

/// Which part of their shared memory streams fill and take: slots of [`AHEAD`] steps, one in hand or free, the others on
/// their way.
struct Slots<'a> {
    k: &'a Assembler,
    count: u32,
    /// Words of a thread and step.
    words: usize,
    /// Where the slot begins that is taken next, and the one that was taken last, which is filled next; in bytes.
    take: Variable<'a, U32>,
    free: Variable<'a, U32>,
}

impl<'a> Slots<'a> {
    fn new(thread: &Thread<'a>, words: usize) -> Rc<Self> {
        let k = thread.k;
        let count = Stream::depth(&thread.form) + 1;
        let slots = Self { k, count, words, take: k.variable(0u32), free: k.variable(0u32) };
        slots.free.set((count - 1) * slots.bytes());
        Rc::new(slots)
    }

    /// Bytes of a slot.
    fn bytes(&self) -> u32 {
        AHEAD * THREADS * 4 * self.words as u32
    }

    /// Words from the first step of a slot to this one.
    fn within(&self, offset: u32) -> i64 {
        i64::from(offset) * i64::from(THREADS) * self.words as i64
    }

    /// Goes on, when a slot has been taken and the free one filled.
    fn advance(&self) {
        self.free.set(self.take.get());
        let next = self.take.get() + self.bytes();
        self.take.set(next.lt(self.count * self.bytes()).select(next, 0u32));
    }

    /// Words of a stream's memory.
    fn memory_words(&self) -> u32 {
        self.count * self.bytes() / 4
    }

    /// The thread's part of a stream's memory.
    fn own(&self, memory: Shared<'a>) -> Address<'a> {
        memory.first().cast(Element::U32).moved(self.k.thread() * (4 * self.words as u32))
    }
}

impl<'a> Stream<'a> {
    /// The thread's channels of every step.
    fn of_channels(thread: &Thread<'a>, memory: Global<'a>, way: Way<'a>) -> Self {
        let first = memory.from_row(thread.token(), thread.channels).at(thread.channel);
        Self::new(thread.k, memory, first, thread.step_bytes(), way)
    }

    /// The start of every step's document.
    fn of_documents(thread: &Thread<'a>, slots: &Rc<Slots<'a>>) -> Option<Self> {
        let memory = thread.document_start?;
        let way = Way::shared(slots, thread.k.shared(Element::U32, slots.memory_words()));
        Some(Self::new(thread.k, memory, memory.at(thread.token()), thread.k.constant(4u64), way))
    }

    fn new(k: &'a Assembler, memory: Global<'a>, first: Address<'a>, stride: Value<'a, U64>, way: Way<'a>) -> Self {
        Self { k, memory, next: k.variable(first.global_address()), stride, way }
    }

    /// How many times [`AHEAD`] steps are on their way.
    fn depth(form: &Convolution) -> u32 {
        if form.vector { SLOTS - 1 } else { 1 }
    }

    /// Sends for the next step, the one at `offset` of [`AHEAD`], or for zeros where it does not exist; to this slot, or the
    /// free one.
    fn fetch(&self, slot: Option<u32>, offset: u32, exists: Option<Value<'a, Pred>>) {
        let place = self.memory.from_address(self.next.get()).first();
        match &self.way {
            Way::Registers(elements) => elements[offset as usize].set(match exists {
                Some(exists) => place.load_if(exists, 0.0),
                None => place.load(),
            }),
            Way::Shared { own, slots } => {
                let target = match slot {
                    Some(slot) => own.plus(i64::from(slot * slots.bytes() / 4)),
                    None => own.moved(slots.free.get()),
                };
                let (target, bytes) = (target.plus(slots.within(offset)), 4 * slots.words as u32);
                match exists {
                    Some(exists) => {
                        let there = exists.select::<U32>(bytes, 0);
                        self.k.copy_bytes(target, place, bytes as usize, there);
                    }
                    None => self.k.copy_bytes(target, place, bytes as usize, bytes),
                }
            }
        }
        self.next.set(self.next.get() + self.stride);
    }

    /// The words of the steps that have arrived, an element in each where elements are single.
    fn take(&self) -> Vec<Vec<Value<'a, U32>>> {
        match &self.way {
            Way::Registers(elements) => elements.iter().map(|element| vec![self.k.constant(element.get()).bits()]).collect(),
            Way::Shared { own, slots } => {
                let place = own.moved(slots.take.get());
                (0..AHEAD).map(|offset| place.plus(slots.within(offset)).load_words(slots.words)).collect()
            }
        }
    }
}

/// The words of a thread's channels in one step where the condition holds, zeros elsewhere.
fn load_words_if<'a>(form: &Convolution, place: Address<'a>, condition: Value<'a, Pred>) -> Vec<Value<'a, U32>> {
    match form.vector {
        true => place.load_words_if(condition, VECTOR as usize * form.element.bytes() / 4),
        false => vec![place.load_if(condition, 0.0).bits()],
    }
}

/// The elements in the words of one step.
fn values<'a>(form: &Convolution, words: &[Value<'a, U32>]) -> Vec<Value<'a, F32>> {
    // Single elements are held as f32.
    unpack(if form.vector { form.element } else { Element::F32 }, words)
}

/// The values of `history` from the oldest on.
fn window<'a>(history: &[Vec<Variable<'a, F32>>]) -> Vec<Vec<Value<'a, F32>>> {
    history.iter().rev().map(|values| values.iter().map(|value| value.get()).collect()).collect()
}

/// Makes `history` the newest of `window`.
fn remember<'a>(history: &[Vec<Variable<'a, F32>>], window: &[Vec<Value<'a, F32>>]) {
    // The oldest first: each takes its value from a newer one that is still as it was.
    for (back, variables) in history.iter().enumerate().rev() {
        for (variable, &value) in variables.iter().zip(&window[window.len() - 1 - back]) {
            variable.set(value);
        }
    }
}

impl KernelSource for ConvolutionForward {
    fn build(&self) -> Kernel {
        let form = self.0;
        let bytes = form.element.bytes() as u64;
        let width = u64::from(form.width);
        let description = Description {
            name: form.name("forward"),
            summary: format!(
                "causal convolution along time of {} taps per channel; {} channels and {} steps per thread",
                form.width,
                form.lanes(),
                FORWARD_STEPS
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["batch", "time", "channels"],
            work: move |sizes: &[u64]| {
                let elements = sizes[0] * sizes[1] * sizes[2];
                Work {
                    bytes: 2 * bytes * elements + 4 * (width + 1) * sizes[2],
                    operations: (2 * width + 5) * elements,
                }
            },
        };
        Assembler::assemble(description, |k| {
            if !form.documents && form.width <= 4 {
                k.resident_blocks(FORWARD_RESIDENT);
            }
            let output = k.write("output", form.element);
            let thread = Thread::new(k, form, |group| {
                let first = k.block_y().mad(GROUPS, group) * FORWARD_STEPS;
                [k.block_z(), first, first + FORWARD_STEPS]
            });
            k.return_if(!thread.active);
            k.comment("all that is read");
            let history = thread.history();
            let token = thread.token();
            let inputs = Places::new(&thread, thread.input, token);
            let steps: Vec<_> = (0..FORWARD_STEPS).map(|offset| (offset, thread.first + offset)).collect();
            let fresh: Vec<_> = steps
                .iter()
                .map(|(offset, step)| load_words_if(&form, inputs.at(*offset), step.lt(thread.end)))
                .collect();
            let starts: Option<Vec<_>> = thread.document_start.map(|memory| {
                let place = memory.at(token);
                steps
                    .iter()
                    .map(|(offset, step)| place.plus((*offset).into()).load_u32_if(step.lt(thread.end), 0))
                    .collect()
            });
            let weights = thread.weights();

            k.comment("step by step");
            let outputs = Places::new(&thread, output, token);
            let mut window = window(&history);
            for (index, (offset, step)) in steps.into_iter().enumerate() {
                window.push(values(&form, &fresh[index]));
                let visible = thread.visible(step, starts.as_ref().map(|starts| starts[index]));
                let mut sums = thread.sum(&weights, &Thread::taps(&visible, form.width as usize, &window));
                if form.silu {
                    sums = sums.into_iter().map(|sum| sum * sum.sigmoid_flushed()).collect();
                }
                let place = outputs.at(offset);
                k.if_(step.lt(thread.end), || if form.vector { place.store_vector(&sums) } else { place.store(sums[0]) });
            }
        })
    }

    fn configurations() -> Vec<Self> {
        Convolution::configurations().into_iter().map(Self).collect()
    }
}

impl KernelSource for ConvolutionBackward {
    fn build(&self) -> Kernel {
        let form = self.0;
        let bytes = form.element.bytes() as u64;
        let width = u64::from(form.width);
        let description = Description {
            name: form.name("backward"),
            summary: format!(
                "gradients of a causal convolution along time of {} taps per channel; {} channels and a stretch of time \
                 per thread, blocks' sums for weight and bias added by later blocks",
                form.width,
                form.lanes()
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["batch", "time", "channels"],
            work: move |sizes: &[u64]| {
                let elements = sizes[0] * sizes[1] * sizes[2];
                Work {
                    bytes: 3 * bytes * elements + 8 * (width + 1) * sizes[2],
                    operations: (6 * width + 10) * elements,
                }
            },
        };
        Assembler::assemble(description, |k| backward(k, form))
    }

    fn configurations() -> Vec<Self> {
        Convolution::configurations().into_iter().map(Self).collect()
    }
}

/// [`AHEAD`] steps of the backward pass.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    /// Of any of them it is asked whether it exists, is the thread's own, and completes one.
    Any,
    /// All are the thread's own and complete one, and those to be fetched exist.
    Whole,
    /// The same, but no round is left to be fetched.
    Draining,
}

fn backward<'a>(k: &'a Assembler, form: Convolution) {
    let (width, lanes) = (form.width as usize, form.lanes() as usize);
    if !form.initial && width <= 4 {
        k.resident_blocks(form.resident());
    }
    let input_gradient = k.write("input_gradient", form.element);
    let weight_gradient = k.write("weight_gradient", Element::F32);
    let bias_gradient = form.bias.then(|| k.write("bias_gradient", Element::F32));
    let state_gradient = form.initial.then(|| k.write("state_gradient", form.element));
    let sums_of_blocks = k.write("sums", Element::U32);
    let gradient = k.read("gradient", form.element);
    let thread = Thread::new(k, form, |group| {
        let [long_blocks, long_steps, short_steps] = ["long_blocks", "long_steps", "short_steps"].map(|name| k.u32(name));
        let of_block = |steps: Value<'a, U32>| steps * GROUPS - form.after();
        let (block, long) = (k.block_z(), k.block_z().lt(long_blocks));
        let steps = long.select(long_steps, short_steps);
        let before = long_blocks * of_block(long_steps);
        let of_short = before + (block - long_blocks) * of_block(short_steps);
        let first = group.mad(steps, long.select(block * of_block(long_steps), of_short));
        [k.block_y(), first, first + steps - group.eq(GROUPS - 1).select(form.after(), 0u32)]
    });
    // One row's block adds up the sums of all rows.
    k.return_if(adds(k) & k.block_y().gt(0));
    // Per tap and then for the bias, the sums of the thread's channels.
    let sums: Vec<Vec<_>> = (0..=width).map(|_| (0..lanes).map(|_| k.variable(0.0f32)).collect()).collect();
    // dx of the steps before the one in hand, as far as it is known.
    let pending: Vec<Vec<_>> = (1..width).map(|_| (0..lanes).map(|_| k.variable(0.0f32)).collect()).collect();
    let handed = Handed::new(&thread);
    // The place of the thread's channels in the row that is complete with its first step.
    let first_done = {
        let first = input_gradient.from_row(thread.token(), thread.channels).at(thread.channel).global_address();
        first - thread.step_bytes() * u64::from(form.width - 1)
    };
    let store = |place: Address<'a>, values: &[Value<'a, F32>]| {
        if form.vector { place.store_vector(values) } else { place.store(values[0]) }
    };
    let slots = form.vector.then(|| Slots::new(&thread, VECTOR as usize * form.element.bytes() / 4));
    // What is on its way, and in the end the threads' sums.
    let memory = {
        let words = slots.as_ref().map_or(0, |slots| slots.memory_words());
        k.shared(Element::F32, words.max(BlockSums::words(&thread)))
    };
    k.if_(thread.active, || {
        let last = handed.receives.select(thread.end, thread.end + (form.width - 1)).named("last");
        // Zeros beyond the row's end: nothing comes from there.
        let limit = last.min(thread.time).named("limit");
        let ways = match &slots {
            Some(slots) => {
                let other = k.shared(Element::F32, slots.memory_words());
                [memory, other].map(|memory| Way::shared(slots, memory))
            }
            None => [Way::registers(k), Way::registers(k)],
        };
        let [input_way, gradient_way] = ways;
        let input_steps = Stream::of_channels(&thread, thread.input, input_way);
        let gradient_steps = Stream::of_channels(&thread, gradient, gradient_way);
        let start_slots = form.documents.then(|| Slots::new(&thread, 1));
        let starts = start_slots.as_ref().and_then(|slots| Stream::of_documents(&thread, slots));
        let fetch = |slot: Option<u32>, step: Value<'a, U32>, all: bool| {
            // Step by step, as they are needed.
            for offset in 0..AHEAD {
                let exists = (!all).then(|| (step + offset).lt(limit));
                for stream in [&input_steps, &gradient_steps].into_iter().chain(&starts) {
                    stream.fetch(slot, offset, exists);
                }
            }
        };
        let depth = Stream::depth(&form);
        for slot in 0..depth {
            fetch(Some(slot), thread.first + slot * AHEAD, false);
            k.commit_copies();
        }
        let history = thread.history();
        let weights = thread.weights();
        let next_done = k.variable(first_done);

        let round = |first: Value<'a, U32>, kind: Round| {
            let whole = kind != Round::Any;
            k.wait_copies(depth - 1);
            let (fresh_inputs, fresh_gradients) = (input_steps.take(), gradient_steps.take());
            let fresh_starts = starts.as_ref().map(Stream::take);
            if kind != Round::Draining {
                fetch(None, first + depth * AHEAD, whole);
            }
            k.commit_copies();
            slots.iter().chain(&start_slots).for_each(|slots| slots.advance());
            let mut inputs = window(&history);
            // Every dx under way, from that of the oldest step on.
            let mut open = window(&pending);
            for offset in 0..AHEAD as usize {
                let step = first + offset as u32;
                inputs.push(values(&form, &fresh_inputs[offset]));
                let gradient = values(&form, &fresh_gradients[offset]);
                let visible = thread.visible(step, fresh_starts.as_ref().map(|starts| starts[offset][0]));
                let taps = Thread::taps(&visible, width, &inputs);
                let convolved = form.silu.then(|| thread.sum(&weights, &taps));
                let slopes: Vec<Value<'a, F32>> = gradient
                    .into_iter()
                    .enumerate()
                    .map(|(lane, gradient)| match &convolved {
                        // With s = sigmoid(q), the derivative of q s is s + s (q - q s).
                        Some(convolved) => {
                            let (q, s) = (convolved[lane], convolved[lane].sigmoid_flushed());
                            let outer = gradient * s;
                            outer.fma((-q).fma(s, q), outer)
                        }
                        None => gradient,
                    })
                    .collect();

                let own = (!whole).then(|| step.lt(thread.end));
                for (lane, &slope) in slopes.iter().enumerate() {
                    let slope = own.map_or(slope, |own| own.select(slope, 0.0));
                    for (tap, sums) in sums[..width].iter().enumerate() {
                        sums[lane].set(slope.fma(taps[width - 1 - tap][lane], sums[lane].get()));
                    }
                    if form.bias {
                        sums[width][lane].set(sums[width][lane].get() + slope);
                    }
                }

                // The step's own dx joins those under way; the oldest is complete then.
                open.push(Vec::new());
                let newest = open.len() - 1;
                for back in 0..width {
                    let terms = Thread::masked(&visible, back, &slopes);
                    let weights = &weights.taps[width - 1 - back];
                    let old = std::mem::take(&mut open[newest - back]);
                    open[newest - back] = terms
                        .iter()
                        .zip(weights)
                        .enumerate()
                        .map(|(lane, (&slope, &weight))| match old.get(lane) {
                            Some(&old) => weight.fma(slope, old),
                            None => weight * slope,
                        })
                        .collect();
                }
                let done = &open[newest + 1 - width];
                let place = input_gradient.from_address(next_done.get()).first();
                if whole {
                    store(place, done);
                } else {
                    let early = step.lt(thread.first + (form.width - 1));
                    k.if_(early, || {
                        handed.give(&thread, step - thread.first, done);
                        if let Some(state_gradient) = state_gradient {
                            thread.store_if(thread.first.eq(0), state_gradient, thread.row.mad(form.width - 1, step), done);
                        }
                    });
                    let wanted = step.ge(thread.first + (form.width - 1)) & step.lt(thread.end + (form.width - 1));
                    k.if_(wanted, || store(place, done));
                }
                next_done.set(next_done.get() + thread.step_bytes());
            }
            remember(&history, &inputs);
            remember(&pending, &open);
        };
        let begin = thread.first + (form.width - 1).next_multiple_of(AHEAD);
        let first = k.variable(thread.first);
        let next = |kind| {
            round(first.get(), kind);
            first.set(first.get() + AHEAD);
        };
        let own = || first.get().ge(begin) & (first.get() + AHEAD).le(thread.end);
        k.while_(
            || first.get().lt(last),
            || {
                next(Round::Any);
                k.while_(|| own() & (first.get() + (depth + 1) * AHEAD).le(limit), || next(Round::Whole));
                k.while_(|| own() & (first.get() + depth * AHEAD).ge(last), || next(Round::Draining));
            },
        );
        k.wait_copies(0);
    });

    // No thread's steps are on their way any more: the sums take their place.
    k.barrier();
    let block = BlockSums::new(&thread, memory);
    block.put(&thread, &sums);
    k.barrier();
    k.if_(handed.receives, || {
        k.comment("what the next thread's steps give to the last of this one's");
        let steps = thread.end - thread.first;
        for (row, known) in window(&pending).iter().enumerate() {
            let given = handed.take(&thread, row);
            let done: Vec<_> = known.iter().zip(given).map(|(&known, given)| known + given).collect();
            store(input_gradient.from_address(first_done + thread.step_bytes() * (steps + row as u32).wide()).first(), &done);
        }
    });
    block.finish(&thread, sums_of_blocks, |channel, totals| {
        let place = weight_gradient.at(channel * form.width);
        (0..width).for_each(|tap| place.plus(tap as i64).store(totals[tap]));
        if let Some(bias) = bias_gradient {
            bias.at(channel).store(totals[width]);
        }
    });
}

/// What the first steps of stretches give to the inputs before them, on its way through shared memory to the threads
/// before.
struct Handed<'a> {
    /// f32 `[groups, width - 1, ACROSS, lanes]`; none of one tap.
    place: Option<Shared<'a>>,
    lanes: u32,
    width: u32,
    /// The thread is given something: another one of its block goes on where it ends.
    receives: Value<'a, Pred>,
}

impl<'a> Handed<'a> {
    fn new(thread: &Thread<'a>) -> Self {
        let (width, lanes) = (thread.form.width, thread.form.lanes());
        let place = (width > 1).then(|| thread.k.shared(Element::F32, GROUPS * (width - 1) * ACROSS * lanes));
        let receives = thread.active & thread.group.lt(GROUPS - 1) & thread.end.lt(thread.time);
        Self { place, lanes, width, receives }
    }

    fn at(&self, thread: &Thread<'a>, group: Value<'a, U32>, row: Value<'a, U32>) -> Option<Address<'a>> {
        let row = group.mad(self.width - 1, row);
        Some(self.place?.at(row.mad(ACROSS, thread.across) * self.lanes))
    }

    fn give(&self, thread: &Thread<'a>, row: Value<'a, U32>, values: &[Value<'a, F32>]) {
        if let Some(place) = self.at(thread, thread.group, row) {
            if self.lanes == VECTOR { place.store_vector(values) } else { place.store(values[0]) }
        }
    }

    fn take(&self, thread: &Thread<'a>, row: usize) -> Vec<Value<'a, F32>> {
        let place = self.at(thread, thread.group + 1, thread.k.constant(row as u32));
        place.map_or_else(Vec::new, |place| {
            if self.lanes == VECTOR { place.load_vector::<{ VECTOR as usize }>().to_vec() } else { vec![place.load()] }
        })
    }
}

/// Whether the block has no steps but adds up sums: the last along the time of its row.
fn adds(k: &Assembler) -> Value<'_, Pred> {
    k.block_z().eq(k.blocks_z() - 1)
}

/// The gradients of weight and bias: sums of a block's threads, and then of all blocks.
struct BlockSums<'a> {
    k: &'a Assembler,
    /// f32 `[groups, width + 1, channels]`.
    of_threads: Shared<'a>,
    /// Channels of a block.
    channels: u32,
    /// Sums per channel.
    count: u32,
}

impl<'a> BlockSums<'a> {
    /// In memory of at least [`BlockSums::words`] words, which nobody else uses any more.
    fn new(thread: &Thread<'a>, memory: Shared<'a>) -> Self {
        let (channels, count) = (ACROSS * thread.form.lanes(), thread.form.width + 1);
        Self { k: thread.k, of_threads: memory, channels, count }
    }

    /// Words of the threads' sums.
    fn words(thread: &Thread<'a>) -> u32 {
        GROUPS * (thread.form.width + 1) * ACROSS * thread.form.lanes()
    }

    /// Leaves a thread's sums for the others.
    fn put(&self, thread: &Thread<'a>, sums: &[Vec<Variable<'a, F32>>]) {
        let place = self.of_threads.at(thread.group * (self.count * self.channels) + thread.across * thread.form.lanes());
        for (row, sums) in sums.iter().enumerate() {
            let sums: Vec<_> = sums.iter().map(|sum| sum.get()).collect();
            let place = place.plus((row as u32 * self.channels).into());
            if thread.form.vector { place.store_vector(&sums) } else { place.store(sums[0]) }
        }
    }

    /// After a barrier: adds up the threads' sums of each channel and tells them; the last block along the time of the first row
    /// adds up what all others tell, and has it written.
    fn finish(
        &self,
        thread: &Thread<'a>,
        sums_of_blocks: Global<'a>,
        write: impl FnOnce(Value<'a, U32>, &[Value<'a, F32>]),
    ) {
        let k = self.k;
        let channel = (k.block() * self.channels + k.thread()).named("own_channel");
        k.if_(k.thread().lt(self.channels) & channel.lt(thread.channels), || {
            // The place of the channel's first sum of a block; the others follow `channels` further each.
            let place = |block: Value<'a, U32>| {
                let row = block.mad(k.blocks(), k.block());
                sums_of_blocks.from_row(row, self.count * self.channels).at(k.thread())
            };
            let row_of = |place: Address<'a>, row: u32| place.plus(i64::from(row) * i64::from(self.channels));
            let before = (k.blocks_z() - 1) * k.blocks_y();
            k.if_else(
                adds(k),
                || {
                    k.comment("those of all blocks, in their order");
                    let all: Vec<_> = (0..self.count).map(|_| k.variable(0.0f32)).collect();
                    k.for_(0u32, before, SUMS_AT_A_TIME, |first| {
                        let blocks: Vec<_> = (0..SUMS_AT_A_TIME).map(|block| first + block).collect();
                        // Those that do not exist are the last one once more, which does not count then.
                        let places: Vec<_> = blocks
                            .iter()
                            .flat_map(|&block| {
                                let place = place(block.min(before - 1));
                                (0..self.count).map(move |row| row_of(place, row))
                            })
                            .collect();
                        let taken = block_sums::take(k, &places);
                        for (block, taken) in blocks.iter().zip(taken.chunks_exact(all.len())) {
                            let exists = block.lt(before);
                            for (sum, &taken) in all.iter().zip(taken) {
                                sum.set(exists.select(sum.get() + taken, sum.get()));
                            }
                        }
                    });
                    write(channel, &all.iter().map(|sum| sum.get()).collect::<Vec<_>>());
                },
                || {
                    k.comment("those of the block's threads in the order of their steps");
                    let place = place(k.block_z().mad(k.blocks_y(), k.block_y()));
                    for row in 0..self.count {
                        let of = |group: u32| {
                            let at = (group * self.count + row) * self.channels;
                            self.of_threads.at(k.thread()).plus(at.into()).load()
                        };
                        block_sums::tell(row_of(place, row), (1..GROUPS).fold(of(0), |sum, group| sum + of(group)));
                    }
                },
            );
        });
    }
}

impl ConvolutionStep {
    /// Blocks for `count` channels of all rows together; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, STEP_THREADS)
    }
}

impl KernelSource for ConvolutionStep {
    fn build(&self) -> Kernel {
        let Self { element, width, bias, silu } = *self;
        let bytes = element.bytes() as u64;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let description = Description {
            name: format!("causal_conv1d_step_{element}_w{width}{}{}", flag(bias, "_bias"), flag(silu, "_silu")),
            summary: format!("one step of a causal convolution of {width} taps; one thread per channel"),
            block: [STEP_THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["batch", "channels", "length"],
            work: move |sizes: &[u64]| {
                let count = sizes[0] * sizes[1];
                Work {
                    bytes: count * (2 * bytes + 8 * sizes[2]) + 4 * sizes[1] * u64::from(width + 1),
                    operations: count * u64::from(2 * width + 5),
                }
            },
        };
        Assembler::assemble(description, |k| {
            let (output, state) = (k.write("output", element), k.write("state", Element::F32));
            let (input, weight) = (k.read("input", element), k.read("weight", Element::F32));
            let bias = bias.then(|| k.read("bias", Element::F32));
            let (count, channels, length) = (k.u32("count"), k.u32("channels"), k.u32("length"));
            let index = k.global_thread(STEP_THREADS).named("index");
            k.return_if(index.ge(count));
            let channel = index.rem(channels).named("channel");
            let newest = input.at(index).load().named("newest");
            let columns = state.from_row(index, length);
            let taps = weight.at(channel * width);

            k.comment("the newest columns of the old state, then the input itself");
            let oldest = length - (width - 1);
            let old: Vec<_> = (0..width - 1).map(|tap| columns.at(oldest + tap).load()).collect();
            let mut sum = match bias {
                Some(bias) => bias.at(channel).load(),
                None => k.constant(0.0f32),
            };
            for (tap, column) in old.into_iter().chain([newest]).enumerate() {
                sum = taps.plus(tap as i64).load().fma(column, sum);
            }
            let result = if silu { sum * sum.sigmoid() } else { sum };
            output.at(index).store(result);

            k.comment("the state moves by one column");
            k.if_(length.gt(0), || {
                let last = length - 1;
                k.for_(0u32, last, 1u32, |column| {
                    let next = columns.at(column + 1).load();
                    columns.at(column).store(next);
                });
                columns.at(last).store(newest);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, width: 4, bias: true, silu: true })
    }
}

#[cfg(test)]
mod tests {
    use super::{Convolution, Element, Stretches};

    #[test]
    fn stretches_fill_a_device_once() {
        let form = Convolution {
            element: Element::Bf16,
            width: 4,
            bias: true,
            silu: true,
            documents: false,
            initial: false,
            vector: true,
        };
        let cut = |form: Convolution, [batch, time, channels]: [u32; 3]| form.stretches(batch, time, channels).unwrap();
        let of = |long_blocks, long_steps, short_steps, grid, sums| Stretches { long_blocks, long_steps, short_steps, grid, sums };
        // 16 blocks of long stretches for each of 32 columns, 512 for room of 528; 16 · 636 steps and 37 · 172 for the rest.
        let large = of(16, 160, 44, [32, 1, 54], 32 * 53 * 5 * 128);
        assert_eq!(cut(form, [1, 16_384, 4096]), large);
        // SmolLM2: 12 blocks a row, 480 of 528; with documents 9, 360 of 396. They are too short to be of two kinds.
        let smollm2 = [8, 2048, 576];
        assert_eq!(cut(form, smollm2), of(0, 44, 44, [5, 8, 13], 5 * 8 * 12 * 5 * 128));
        assert_eq!(cut(Convolution { documents: true, ..form }, smollm2), of(0, 60, 60, [5, 8, 10], 5 * 8 * 9 * 5 * 128));
        // Never short, and never shorter than the taps before; more rows than room.
        assert_eq!(cut(form, [1, 3, 8]), of(0, 16, 16, [1, 1, 2], 5 * 128));
        assert_eq!(cut(Convolution { width: 22, ..form }, [1, 3, 8]), of(0, 24, 24, [1, 1, 2], 23 * 128));
        assert_eq!(cut(form, [600, 2048, 576]).grid, [5, 600, 2]);
        // Nothing, and more than a launch covers.
        assert_eq!(cut(form, [0, 0, 0]), of(0, 16, 16, [0, 0, 0], 0));
        assert_eq!(form.stretches(70_000, 1, 8), None);
        assert_eq!(form.stretches(1, u32::MAX, 8192), None);
        assert_eq!(form.stretches(1, u32::MAX, 1 << 20), None);
        assert_eq!(form.stretches(65_535, 70_000, 1), None);
        assert_eq!(form.forward_grid(65_535, 70_000, 1), None);
        assert_eq!(form.forward_grid(1, 65_535 * 32, 1), Some([1, 65_535, 1]));
        assert_eq!(form.forward_grid(1, 65_535 * 32 + 1, 1), None);
    }
}
