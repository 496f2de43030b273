//! Causal depthwise convolution along time, with optional SiLU: `y[t] = activation(bias + Σ_w weight[w] x[t − (W − 1) + w])`
//! per channel, its gradients, and its decoding step. Tensors are `[batch, time, channels]`.
//!
//! - Layout: a block takes 32 neighbouring groups of [`VECTOR`] channels in 4 stretches of one row's time, one group and
//!   stretch per thread (one access of 8 or 16 bytes per step; a warp lies along the channels). Channels that are no
//!   multiple of [`VECTOR`] are taken one by one.
//! - Forward: a stretch has 16 steps; all that it reads is on its way before anything is computed.
//! - Backward: a stretch has 64 steps, of which 4 are in hand and 12 on their way to shared memory (`Stream`); the last
//!   `W − 1` inputs stay in registers. A thread walks its steps and the `W − 1` after them, computes the gradient `dq` of
//!   the convolution's sum again from x, and keeps the `W` sums `dx` under way in registers. The gradients of weight and
//!   bias are summed per block in a fixed order and written as parts, one per block of time, which
//!   [`ColumnSums`](super::column_sums::ColumnSums) adds in order.
//! - Traffic: forward reads and writes one element, backward reads two and writes one. Bound by memory.
//! - Documents: tap `w` of step `t` counts when `t − (W − 1) + w ≥ document_start[t]`.
//! - Source: Gu and Dao 2023, "Mamba", section 3.4.

use crate::asm::{Address, Assembler, Description, F32, Global, Pred, U32, U64, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Neighbouring channels of a thread.
pub const VECTOR: u32 = 4;
/// Rows of 256 bytes of bf16 for a block: with 128, the kernels are 4 % slower.
const FORWARD: Shape = Shape { across: 32, groups: 4, steps: 16 };
const BACKWARD: Shape = Shape { across: 32, groups: 4, steps: 64 };
/// Blocks of the forward pass that share a multiprocessor. The driver's compiler is not held to it unless asked. With 7 the
/// kernel is faster still, but then registers spill on sm_80; those with documents do with 5, and more than four taps were not
/// looked at.
const FORWARD_RESIDENT: u32 = 5;
/// Steps that a thread of the backward pass works on at a time.
const AHEAD: u32 = 4;
/// So many times [`AHEAD`] steps have room in shared memory: all but one are on their way.
const SLOTS: u32 = 4;
const STEP_THREADS: u32 = 128;

/// How a block's threads share out its part of a row.
#[derive(Clone, Copy)]
struct Shape {
    /// Threads that lie side by side along the channels.
    across: u32,
    /// Threads that follow each other in time.
    groups: u32,
    /// Steps of a thread.
    steps: u32,
}

impl Shape {
    fn threads(self) -> u32 {
        self.across * self.groups
    }

    fn block_steps(self) -> u32 {
        self.groups * self.steps
    }
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
/// Parameters: `input_gradient` (of the type, written), `weight_parts` (f32 `[parts, channels, width]`, written),
/// `bias_parts` (f32 `[parts, channels]`, written, with a bias), `state_gradient` (like the initial state, written, with
/// one), then `gradient` (like the output) and the inputs of [`ConvolutionForward`] in its order.
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
    /// Blocks of the forward pass; `None` when one launch cannot cover them.
    pub fn forward_grid(&self, batch: u32, time: u32, channels: u32) -> Option<[u32; 3]> {
        self.grid(FORWARD, batch, time, channels)
    }

    /// Blocks of the backward pass; their extent in y is the number of parts of the weight's gradient. `None` when one
    /// launch cannot cover them.
    pub fn backward_grid(&self, batch: u32, time: u32, channels: u32) -> Option<[u32; 3]> {
        self.grid(BACKWARD, batch, time, channels)
    }

    fn grid(&self, shape: Shape, batch: u32, time: u32, channels: u32) -> Option<[u32; 3]> {
        let parts = u64::from(batch) * u64::from(time.div_ceil(shape.block_steps()));
        (parts <= 65_535).then_some([channels.div_ceil(shape.across * self.lanes()), parts as u32, 1])
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
    shape: Shape,
    input: Global<'a>,
    initial_state: Option<Global<'a>>,
    document_start: Option<Global<'a>>,
    time: Value<'a, U32>,
    channels: Value<'a, U32>,
    row: Value<'a, U32>,
    channel: Value<'a, U32>,
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
    /// Declares the inputs.
    fn new(k: &'a Assembler, form: Convolution, shape: Shape) -> Self {
        let input = k.read("input", form.element);
        let weight = k.read("weight", Element::F32);
        let bias = form.bias.then(|| k.read("bias", Element::F32));
        let document_start = form.documents.then(|| k.read("document_start", Element::U32));
        let initial_state = form.initial.then(|| k.read("initial_state", form.element));
        let (time, channels) = (k.u32("time"), k.u32("channels"));
        k.comment("this thread's channels and steps");
        let across = k.thread() & (shape.across - 1);
        let group = k.thread() >> shape.across.ilog2();
        let channel = (k.block().mad(shape.across, across) * form.lanes()).named("channel");
        let block_steps = shape.block_steps();
        let blocks = (time + (block_steps - 1)).div(block_steps);
        let row = k.block_y().div(blocks).named("row");
        let first = ((k.block_y() - row * blocks).mad(shape.groups, group) * shape.steps).named("first");
        let end = (first + shape.steps).min(time).named("end");
        let active = channel.lt(channels) & first.lt(time);
        Self {
            k,
            form,
            shape,
            input,
            initial_state,
            document_start,
            time,
            channels,
            row,
            channel,
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
        Self { memory, first, stride: thread.channels.mul_wide(memory.element().bytes() as u32) }
    }

    /// The place `offset` steps after the first.
    fn at(&self, offset: u32) -> Address<'a> {
        self.memory.from_address(self.first + self.stride * u64::from(offset)).first()
    }
}

/// What a thread reads step by step, [`AHEAD`] steps at a time, long before its work: by way of shared memory, each thread
/// for itself. Single elements, which are too small for that, go to registers.
struct Stream<'a> {
    k: &'a Assembler,
    /// Threads of the block.
    threads: u32,
    memory: Global<'a>,
    /// Where the next steps lie, and how many bytes apart.
    pointer: Variable<'a, U64>,
    stride: Value<'a, U64>,
    way: Way<'a>,
}

enum Way<'a> {
    /// The elements of the steps on their way.
    Registers(Vec<Variable<'a, F32>>),
    Shared {
        /// The thread's part of the first step in the first slot.
        own: Address<'a>,
        /// Words of a step.
        words: usize,
        /// The slots that are filled and taken next, as bytes.
        fill: Variable<'a, U32>,
        take: Variable<'a, U32>,
    },
}

impl<'a> Stream<'a> {
    /// The thread's channels of every step, from its first on.
    fn of_channels(thread: &Thread<'a>, memory: Global<'a>) -> Self {
        let token = thread.row.mad(thread.time, thread.first);
        let first = memory.from_row(token, thread.channels).at(thread.channel).global_address();
        let bytes = memory.element().bytes();
        let words = thread.form.vector.then_some(VECTOR as usize * bytes / 4);
        Self::new(thread, memory, first, thread.channels.mul_wide(bytes as u32), words)
    }

    /// The start of every step's document.
    fn of_documents(thread: &Thread<'a>) -> Option<Self> {
        let memory = thread.document_start?;
        let first = memory.at(thread.row.mad(thread.time, thread.first)).global_address();
        Some(Self::new(thread, memory, first, thread.k.constant(4u64), Some(1)))
    }

    /// A stream of so many words per step, or of single elements.
    fn new(
        thread: &Thread<'a>,
        memory: Global<'a>,
        first: Value<'a, U64>,
        stride: Value<'a, U64>,
        words: Option<usize>,
    ) -> Self {
        let (k, threads) = (thread.k, thread.shape.threads());
        let way = match words {
            None => Way::Registers((0..AHEAD).map(|_| k.variable(0.0f32)).collect()),
            Some(words) => {
                let shared = k.shared(Element::U32, SLOTS * AHEAD * threads * words as u32);
                let own = shared.at(k.thread() * words as u32);
                Way::Shared { own, words, fill: k.variable(0u32), take: k.variable(0u32) }
            }
        };
        Self { k, threads, memory, pointer: k.variable(first), stride, way }
    }

    /// How many times [`AHEAD`] steps are on their way.
    fn depth(form: &Convolution) -> u32 {
        if form.vector { SLOTS - 1 } else { 1 }
    }

    /// Sends for the next steps, `step` and those after it, as far as they lie below `limit`; zeros for others.
    fn fetch(&self, step: Value<'a, U32>, limit: Value<'a, U32>) {
        for offset in 0..AHEAD {
            let (place, exists) = (self.memory.from_address(self.pointer.get()).first(), (step + offset).lt(limit));
            match &self.way {
                Way::Registers(elements) => elements[offset as usize].set(place.load_if(exists, 0.0)),
                Way::Shared { own, words, fill, .. } => {
                    let target = own.moved(fill.get()).plus(i64::from(offset * self.threads) * *words as i64);
                    let bytes = exists.select::<U32>(4 * *words as u32, 0);
                    self.k.copy_bytes(target, place, 4 * words, bytes);
                }
            }
            self.pointer.set(self.pointer.get() + self.stride);
        }
        if let Way::Shared { words, fill, .. } = &self.way {
            self.advance(fill, *words);
        }
    }

    /// The words of the steps that have arrived, an element in each where elements are single.
    fn take(&self) -> Vec<Vec<Value<'a, U32>>> {
        match &self.way {
            Way::Registers(elements) => elements.iter().map(|element| vec![self.k.constant(element.get()).bits()]).collect(),
            Way::Shared { own, words, take, .. } => {
                let place = own.moved(take.get());
                let step = |offset| place.plus(i64::from(offset * self.threads) * *words as i64).load_words(*words);
                let taken = (0..AHEAD).map(step).collect();
                self.advance(take, *words);
                taken
            }
        }
    }

    /// Goes on to the next slot.
    fn advance(&self, slot: &Variable<'a, U32>, words: usize) {
        let bytes = AHEAD * self.threads * 4 * words as u32;
        let next = slot.get() + bytes;
        slot.set(next.lt(SLOTS * bytes).select(next, 0u32));
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
    match form.element {
        Element::Bf16 if form.vector => words.iter().flat_map(|word| word.unpack_bf16()).collect(),
        _ => words.iter().map(|word| word.as_f32()).collect(),
    }
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
        let (form, shape) = (self.0, FORWARD);
        let bytes = form.element.bytes() as u64;
        let width = u64::from(form.width);
        let description = Description {
            name: form.name("forward"),
            summary: format!(
                "causal convolution along time of {} taps per channel; {} channels and {} steps per thread",
                form.width,
                form.lanes(),
                shape.steps
            ),
            block: [shape.threads(), 1, 1],
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
            let thread = Thread::new(k, form, shape);
            k.return_if(!thread.active);
            k.comment("all that is read");
            let history = thread.history();
            let token = thread.row.mad(thread.time, thread.first);
            let inputs = Places::new(&thread, thread.input, token);
            let steps: Vec<_> = (0..shape.steps).map(|offset| (offset, thread.first + offset)).collect();
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
        let (form, shape) = (self.0, BACKWARD);
        let bytes = form.element.bytes() as u64;
        let width = u64::from(form.width);
        let description = Description {
            name: form.name("backward"),
            summary: format!(
                "gradients of a causal convolution along time of {} taps per channel; {} channels and {} steps \
                 per thread, weight and bias gradients as one part per block",
                form.width,
                form.lanes(),
                shape.steps
            ),
            block: [shape.threads(), 1, 1],
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
        Assembler::assemble(description, |k| backward(k, form, shape))
    }

    fn configurations() -> Vec<Self> {
        Convolution::configurations().into_iter().map(Self).collect()
    }
}

fn backward(k: &Assembler, form: Convolution, shape: Shape) {
    let (width, lanes) = (form.width as usize, form.lanes() as usize);
    let input_gradient = k.write("input_gradient", form.element);
    let weight_parts = k.write("weight_parts", Element::F32);
    let bias_parts = form.bias.then(|| k.write("bias_parts", Element::F32));
    let state_gradient = form.initial.then(|| k.write("state_gradient", form.element));
    let gradient = k.read("gradient", form.element);
    let thread = Thread::new(k, form, shape);
    // Per channel, the sums of its taps and then of its bias.
    let sums: Vec<Vec<_>> = (0..lanes).map(|_| (0..=width).map(|_| k.variable(0.0f32)).collect()).collect();
    k.if_(thread.active, || {
        let history = thread.history();
        // dx of the steps before the one in hand, as far as it is known.
        let pending: Vec<Vec<_>> = (1..width).map(|_| (0..lanes).map(|_| k.variable(0.0f32)).collect()).collect();
        let last = (thread.end + (form.width - 1)).named("last");
        let limit = last.min(thread.time).named("limit");
        let [input_steps, gradient_steps] = [thread.input, gradient].map(|memory| Stream::of_channels(&thread, memory));
        let starts = Stream::of_documents(&thread);
        let fetch = |step| {
            input_steps.fetch(step, limit);
            // Zeros beyond the row's end: nothing comes from there.
            gradient_steps.fetch(step, limit);
            starts.iter().for_each(|starts| starts.fetch(step, limit));
            k.commit_copies();
        };
        // Where the next complete dx goes.
        let done_places = Places::new(&thread, input_gradient, thread.row.mad(thread.time, thread.first));
        let next_done = k.variable(done_places.first);
        let depth = Stream::depth(&form);
        (0..depth).for_each(|round| fetch(thread.first + round * AHEAD));
        let weights = thread.weights();
        k.for_(thread.first, last, AHEAD, |first| {
            k.wait_copies(depth - 1);
            let (fresh_inputs, fresh_gradients) = (input_steps.take(), gradient_steps.take());
            let fresh_starts = starts.as_ref().map(Stream::take);
            fetch(first + depth * AHEAD);
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
                let slopes: Vec<Value<'_, F32>> = gradient
                    .into_iter()
                    .enumerate()
                    .map(|(lane, gradient)| match &convolved {
                        Some(convolved) => {
                            let (q, s) = (convolved[lane], convolved[lane].sigmoid_flushed());
                            gradient * s * q.fma(-s + 1.0, 1.0)
                        }
                        None => gradient,
                    })
                    .collect();

                let own = step.lt(thread.end);
                for (lane, &slope) in slopes.iter().enumerate() {
                    let slope = own.select(slope, 0.0);
                    for (tap, sum) in sums[lane][..width].iter().enumerate() {
                        sum.set(slope.fma(taps[width - 1 - tap][lane], sum.get()));
                    }
                    if form.bias {
                        sums[lane][width].set(sums[lane][width].get() + slope);
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
                let target = step - (form.width - 1);
                let reached = step.ge(thread.first + (form.width - 1));
                let wanted = reached & target.lt(thread.end);
                k.if_(wanted, || {
                    let place = input_gradient.from_address(next_done.get()).first();
                    if form.vector { place.store_vector(done) } else { place.store(done[0]) }
                    next_done.set(next_done.get() + done_places.stride);
                });
                if let Some(state_gradient) = state_gradient {
                    let before = step.lt(form.width - 1) & thread.first.eq(0);
                    thread.store_if(before, state_gradient, thread.row.mad(form.width - 1, step), done);
                }
            }
            remember(&history, &inputs);
            remember(&pending, &open);
        });
        k.wait_copies(0);
    });

    k.comment("weight and bias gradients of the block: those of its threads in the order of their steps");
    let per_thread = (lanes * (width + 1)) as u32;
    let scratch = k.shared(Element::F32, shape.threads() * per_thread);
    let place = scratch.at(k.thread() * per_thread);
    for (lane, sums) in sums.iter().enumerate() {
        // As the gradients are stored: a thread's taps by channel, then its biases.
        for (tap, sum) in sums.iter().enumerate() {
            let at = if tap < width { lane * width + tap } else { lanes * width + lane };
            place.plus(at as i64).store(sum.get());
        }
    }
    k.barrier();
    k.for_(k.thread(), shape.across * per_thread, shape.threads(), |index| {
        let first = scratch.at(index);
        let stride = i64::from(shape.across * per_thread);
        let total = (1..i64::from(shape.groups)).fold(first.load(), |total, group| total + first.plus(group * stride).load());
        let across = index.div(per_thread);
        let within = index.rem(per_thread);
        let channel = k.block().mad(shape.across, across) * lanes as u32;
        let taps = (lanes * width) as u32;
        let exists = channel.lt(thread.channels);
        let weights = weight_parts.from_row(k.block_y() * form.width, thread.channels);
        k.if_(exists & within.lt(taps), || weights.at(channel.mad(form.width, within)).store(total));
        if let Some(bias_parts) = bias_parts {
            let biases = bias_parts.from_row(k.block_y(), thread.channels);
            k.if_(exists & within.ge(taps), || biases.at(channel + (within - taps)).store(total));
        }
    });
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
