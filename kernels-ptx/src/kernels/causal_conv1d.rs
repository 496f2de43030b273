//! Causal depthwise convolution along time, with optional SiLU: `y[t] = activation(bias + Σ_w weight[w] x[t − (W − 1) + w])`
//! per channel, its gradients, and its decoding step. Tensors are `[batch, time, channels]`.
//!
//! - Layout: a block takes 16 neighbouring groups of [`VECTOR`] channels and 256 steps of one row; each thread takes one
//!   group (one access of 8 or 16 bytes per step) and 32 steps, and keeps the last `W − 1` inputs in registers. While it
//!   works on some steps, those after them are on their way (`Stream`). Channels that are no multiple of [`VECTOR`] are
//!   taken one by one.
//! - Backward: a thread walks its steps and the `W − 1` after them, computes the gradient `dq` of the convolution's sum
//!   again from x, and keeps the `W` sums `dx` under way in registers. The gradients of weight and bias are summed per
//!   block in a fixed order and written as parts, one per block of time, which
//!   [`ColumnSums`](super::column_sums::ColumnSums) adds in order.
//! - Traffic: forward reads and writes one element, backward reads two and writes one. Bound by memory.
//! - Documents: tap `w` of step `t` counts when `t − (W − 1) + w ≥ document_start[t]`.
//! - Source: Gu and Dao 2023, "Mamba", section 3.4.

use crate::asm::{Assembler, Description, F32, Global, Pred, U32, U64, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Neighbouring channels of a thread.
pub const VECTOR: u32 = 4;
/// Threads of a block that lie side by side along the channels.
const ACROSS: u32 = 16;
/// Threads of a block that follow each other in time.
const GROUPS: u32 = 8;
/// Steps of a thread.
const STEPS: u32 = 32;
/// Steps that a thread works on at a time; as many are on their way meanwhile.
const AHEAD: u32 = 4;
/// Steps of a block.
const BLOCK_STEPS: u32 = GROUPS * STEPS;
const THREADS: u32 = ACROSS * GROUPS;
const WARPS: u32 = THREADS / 32;
const STEP_THREADS: u32 = 128;

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
    /// Blocks for these sizes; their extent in y is the number of parts of the weight's gradient. `None` when one launch
    /// cannot cover them.
    pub fn grid(&self, batch: u32, time: u32, channels: u32) -> Option<[u32; 3]> {
        let parts = u64::from(batch) * u64::from(time.div_ceil(BLOCK_STEPS));
        (parts <= 65_535).then_some([channels.div_ceil(ACROSS * self.lanes()), parts as u32, 1])
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
    /// The thread's place along the channels in its block.
    across: Value<'a, U32>,
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
    fn new(k: &'a Assembler, form: Convolution) -> Self {
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
        let blocks = (time + (BLOCK_STEPS - 1)).div(BLOCK_STEPS);
        let row = k.block_y().div(blocks).named("row");
        let first = ((k.block_y() - row * blocks).mad(GROUPS, group) * STEPS).named("first");
        let end = (first + STEPS).min(time).named("end");
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
            across,
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

    /// As [`Thread::load`], from step `step`.
    fn load_step(&self, memory: Global<'a>, step: Value<'a, U32>) -> Vec<Value<'a, F32>> {
        self.load(memory.from_row(self.row.mad(self.time, step), self.channels), self.channel)
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
        let zeros = || (0..self.form.lanes()).map(|_| self.k.variable(0.0f32)).collect::<Vec<_>>();
        (1..self.form.width)
            .map(|back| {
                let values = zeros();
                let fill = |loaded: Vec<Value<'a, F32>>| {
                    for (variable, value) in values.iter().zip(loaded) {
                        variable.set(value);
                    }
                };
                self.k.if_(self.first.ge(back), || fill(self.load_step(self.input, self.first - back)));
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

/// What a thread reads step by step, ahead of its work: [`AHEAD`] steps at a time.
struct Stream<'a> {
    k: &'a Assembler,
    memory: Global<'a>,
    /// Where the next steps lie, and how many bytes apart.
    pointer: Variable<'a, U64>,
    stride: Value<'a, U64>,
    /// Words of the steps on their way.
    words: Vec<Vec<Variable<'a, U32>>>,
    /// A word is one element, of whatever type.
    single: bool,
}

impl<'a> Stream<'a> {
    /// The thread's channels of every step, from its first on.
    fn of_channels(thread: &Thread<'a>, memory: Global<'a>) -> Self {
        let token = thread.row.mad(thread.time, thread.first);
        let bytes = memory.element().bytes();
        let words = if thread.form.vector { VECTOR as usize * bytes / 4 } else { 1 };
        let first = memory.from_row(token, thread.channels).at(thread.channel).global_address();
        Self::new(thread.k, memory, first, thread.channels.mul_wide(bytes as u32), words, !thread.form.vector)
    }

    /// The start of every step's document.
    fn of_documents(thread: &Thread<'a>) -> Option<Self> {
        let memory = thread.document_start?;
        let first = memory.at(thread.row.mad(thread.time, thread.first)).global_address();
        Some(Self::new(thread.k, memory, first, thread.k.constant(4u64), 1, false))
    }

    fn new(
        k: &'a Assembler,
        memory: Global<'a>,
        first: Value<'a, U64>,
        stride: Value<'a, U64>,
        words: usize,
        single: bool,
    ) -> Self {
        let words = (0..AHEAD).map(|_| (0..words).map(|_| k.variable(0u32)).collect()).collect();
        Self { k, memory, pointer: k.variable(first), stride, words, single }
    }

    /// Sends for the next steps, `step` and those after it, as far as they lie below `limit`; zeros for others.
    fn fetch(&self, step: Value<'a, U32>, limit: Value<'a, U32>) {
        for (offset, variables) in (0..AHEAD).zip(&self.words) {
            let (place, exists) = (self.memory.from_address(self.pointer.get()).first(), (step + offset).lt(limit));
            let words = if self.single {
                vec![place.load_if(exists, 0.0).bits()]
            } else {
                place.load_words_if(exists, variables.len())
            };
            for (variable, word) in variables.iter().zip(words) {
                variable.set(word);
            }
            self.pointer.set(self.pointer.get() + self.stride);
        }
    }

    /// The words of the steps that were on their way.
    fn take(&self) -> Vec<Vec<Value<'a, U32>>> {
        self.words.iter().map(|words| words.iter().map(|word| self.k.constant(word.get())).collect()).collect()
    }

    /// The elements in the words of one step.
    fn values(&self, words: &[Value<'a, U32>]) -> Vec<Value<'a, F32>> {
        if self.memory.element() == Element::Bf16 && !self.single {
            words.iter().flat_map(|word| word.unpack_bf16()).collect()
        } else {
            words.iter().map(|word| word.as_f32()).collect()
        }
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
        let form = self.0;
        let bytes = form.element.bytes() as u64;
        let width = u64::from(form.width);
        let description = Description {
            name: form.name("forward"),
            summary: format!(
                "causal convolution along time of {} taps per channel; {} channels and {STEPS} steps per thread",
                form.width,
                form.lanes()
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
            let output = k.write("output", form.element);
            let thread = Thread::new(k, form);
            k.return_if(!thread.active);
            let weights = thread.weights();
            let history = thread.history();
            let (inputs, starts) = (Stream::of_channels(&thread, thread.input), Stream::of_documents(&thread));
            let fetch = |step| {
                inputs.fetch(step, thread.end);
                starts.iter().for_each(|starts| starts.fetch(step, thread.end));
            };
            fetch(thread.first);
            k.for_(thread.first, thread.end, AHEAD, |first| {
                let (fresh, fresh_starts) = (inputs.take(), starts.as_ref().map(Stream::take));
                fetch(first + AHEAD);
                let mut window = window(&history);
                for (offset, fresh) in fresh.iter().enumerate() {
                    let step = first + offset as u32;
                    window.push(inputs.values(fresh));
                    let visible = thread.visible(step, fresh_starts.as_ref().map(|starts| starts[offset][0]));
                    let mut sums = thread.sum(&weights, &Thread::taps(&visible, form.width as usize, &window));
                    if form.silu {
                        sums = sums.into_iter().map(|sum| sum * sum.sigmoid_flushed()).collect();
                    }
                    thread.store_if(step.lt(thread.end), output, thread.row.mad(thread.time, step), &sums);
                }
                remember(&history, &window);
            });
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
                "gradients of a causal convolution along time of {} taps per channel; {} channels and {STEPS} steps per \
                 thread, weight and bias gradients as one part per {BLOCK_STEPS} steps",
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

fn backward(k: &Assembler, form: Convolution) {
    let (width, lanes) = (form.width as usize, form.lanes() as usize);
    let input_gradient = k.write("input_gradient", form.element);
    let weight_parts = k.write("weight_parts", Element::F32);
    let bias_parts = form.bias.then(|| k.write("bias_parts", Element::F32));
    let state_gradient = form.initial.then(|| k.write("state_gradient", form.element));
    let gradient = k.read("gradient", form.element);
    let thread = Thread::new(k, form);
    // Per channel, the sums of its taps and then of its bias.
    let sums: Vec<Vec<_>> = (0..lanes).map(|_| (0..=width).map(|_| k.variable(0.0f32)).collect()).collect();
    k.if_(thread.active, || {
        let weights = thread.weights();
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
        };
        fetch(thread.first);
        k.for_(thread.first, last, AHEAD, |first| {
            let (fresh_inputs, fresh_gradients) = (input_steps.take(), gradient_steps.take());
            let fresh_starts = starts.as_ref().map(Stream::take);
            fetch(first + AHEAD);
            let mut inputs = window(&history);
            // Every dx under way, from that of the oldest step on.
            let mut open = window(&pending);
            for offset in 0..AHEAD as usize {
                let step = first + offset as u32;
                inputs.push(input_steps.values(&fresh_inputs[offset]));
                let gradient = gradient_steps.values(&fresh_gradients[offset]);
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
                thread.store_if(wanted, input_gradient, thread.row.mad(thread.time, target), done);
                if let Some(state_gradient) = state_gradient {
                    let before = step.lt(form.width - 1) & thread.first.eq(0);
                    thread.store_if(before, state_gradient, thread.row.mad(form.width - 1, step), done);
                }
            }
            remember(&history, &inputs);
            remember(&pending, &open);
        });
    });

    k.comment("weight and bias gradients of the block: the two halves of each warp, then the warps in order");
    let per_thread = (lanes * (width + 1)) as u32;
    let scratch = k.shared(Element::F32, WARPS * ACROSS * per_thread);
    let place = scratch.at(k.warp().mad(ACROSS, thread.across) * per_thread);
    let lower = k.lane().lt(ACROSS);
    for (lane, sums) in sums.iter().enumerate() {
        // As the gradients are stored: a thread's taps by channel, then its biases.
        for (tap, sum) in sums.iter().enumerate() {
            let at = if tap < width { lane * width + tap } else { lanes * width + lane };
            let both = sum.get() + k.shuffle_xor(sum.get(), ACROSS);
            place.plus(at as i64).store_if(lower, both);
        }
    }
    k.barrier();
    k.for_(k.thread(), ACROSS * per_thread, THREADS, |index| {
        let first = scratch.at(index);
        let stride = i64::from(ACROSS * per_thread);
        let total = (1..i64::from(WARPS)).fold(first.load(), |total, warp| total + first.plus(warp * stride).load());
        let across = index.div(per_thread);
        let within = index.rem(per_thread);
        let channel = k.block().mad(ACROSS, across) * lanes as u32;
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
