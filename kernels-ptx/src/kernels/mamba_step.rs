//! One decoding step of the M1-style Mamba mixer between its projections, in one launch: convolution and its state, SiLU,
//! softplus, state-space update, skip and gate.
//!
//! - Of every row, `projected` holds z (`channels`), x, B (`xb` each) and C (`channels`). Chunks of `states` elements of x and B
//!   serve `repeats` chunks of channels each, `channels = repeats · xb`. x is convolved with `taps` taps, before its repetition or
//!   after it (`repeated`: every channel then has taps of its own).
//! - `u = silu(convolution)`, `Δ = softplus(delta + bias)`, `h = e^(−Δ e^a_log) h + Δ u B`, `y = (C · h + D u) · silu(z)`. In bf16, u
//!   is rounded as the operators on whole sequences do.
//! - Layout: a block has the channels of one chunk of x in one row of the batch. A channel's states lie on neighbouring
//!   lanes, eight each. Every lane forms its channel's u; the convolution's state moves on when all
//!   lanes that share it have read it: a channel's (`repeated`), or the block's.
//! - Traffic: both states are read and written once; the rest is small beside them. Bound by memory.
//! - Source: Gu and Dao 2023, "Mamba"; Wang et al. 2025, "M1", for the repetition.

use crate::asm::{Address, Assembler, Description, F32, Global, Pred, U32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 128;
/// States that are moved in one access.
const VECTOR: u32 = 4;
/// States of a lane.
const LANE_STATES: u32 = 8;
/// The most states of a channel: a warp's.
const MOST_STATES: u32 = 256;
/// The most taps.
const MOST_TAPS: u32 = 8;
/// Blocks that share a multiprocessor; more taps than 4 were not looked at. With fewer registers the driver's compiler sends for the states last.
const RESIDENT: u32 = 7;

/// One step of the mixer.
///
/// Parameters: `output` (`[batch, channels]`), `window` (f32 `[batch, convolved channels, taps]`), `state` (f32 `[batch, channels,
/// states]`; all three written), `projected` (`[batch, 2 channels + 2 xb]`), `delta` (`[batch, channels]`, like the output),
/// `taps` (f32 `[convolved channels, taps]`), `taps_bias` (f32 `[convolved channels]`, with one), `a_log` (f32 `[channels,
/// states]`), `d` (f32 `[channels]`), `delta_bias` (f32 `[channels]`, with one), `xb`, `repeats` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MambaStep {
    /// Type of projections and output.
    pub element: Element,
    /// States of a channel, elements of a chunk: a power of two from 4 to 256.
    pub states: u32,
    /// Taps of the convolution, which its state holds too; 1 to 8.
    pub taps: u32,
    /// The convolution has a bias.
    pub taps_bias: bool,
    /// The step size has a bias.
    pub delta_bias: bool,
    /// x is repeated before the convolution.
    pub repeated: bool,
}

impl MambaStep {
    /// Whether there is a kernel for so many states and taps.
    pub fn takes(states: u32, taps: u32) -> bool {
        states.is_power_of_two() && (VECTOR..=MOST_STATES).contains(&states) && (1..=MOST_TAPS).contains(&taps)
    }

    /// Blocks; `None` when one launch cannot cover them.
    pub fn grid(&self, batch: u32, xb: u32, repeats: u32) -> Option<[u32; 3]> {
        // States are counted in 32 bits.
        xb.checked_mul(repeats)?.checked_mul(self.states.max(self.taps))?.checked_mul(batch)?;
        (batch <= 65_535).then_some([xb / self.states, batch, 1])
    }
}

impl KernelSource for MambaStep {
    fn build(&self) -> Kernel {
        let form = *self;
        let Self { element, states, taps, taps_bias, delta_bias, repeated } = form;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let bytes = element.bytes() as u64;
        let (state_bytes, tap_bytes) = (8 * u64::from(states), 8 * u64::from(taps));
        let description = Description {
            name: format!(
                "mamba_step_{element}_n{states}_w{taps}{}{}{}",
                flag(taps_bias, "_taps_bias"),
                flag(delta_bias, "_delta_bias"),
                flag(repeated, "_repeated"),
            ),
            summary: format!(
                "a decoding step of a Mamba mixer; a block has one chunk of x in a row, a lane {LANE_STATES} states"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["batch", "channels", "xb"],
            work: move |sizes: &[u64]| {
                let convolved = if repeated { sizes[1] } else { sizes[2] };
                let of_row = sizes[1] * (state_bytes + 4 * bytes) + 2 * bytes * sizes[2] + tap_bytes * convolved;
                let shared = sizes[1] * (4 * u64::from(states) + 8) + convolved * 4 * u64::from(taps + 1);
                Work { bytes: sizes[0] * of_row + shared, operations: sizes[0] * sizes[1] * u64::from(6 * states + 40) }
            },
        };
        Assembler::assemble(description, |k| {
            if taps <= VECTOR {
                k.resident_blocks(RESIDENT);
            }
            let step = Step::new(k, form);
            let lanes = (states / LANE_STATES).max(1);
            let parts: Vec<u32> = (0..states / (lanes * VECTOR)).map(|part| part * lanes * VECTOR).collect();
            let local = (step.repeats * states).named("channels_of_block");
            k.for_(0, local * lanes, THREADS, |first| {
                let index = first + k.thread();
                let active = index.lt(local * lanes);
                // Lanes without a channel repeat the last one, so that all take part in the sums.
                let item = (index >> lanes.ilog2()).min(local - 1);
                let first_state = (index & (lanes - 1)) * VECTOR;
                let channel = step.first_channel + item;
                let of_row = (step.row * step.channels + channel).named("channel_of_row");

                k.comment("all that is loaded");
                let state = step.state.at(of_row.mad(states, first_state));
                // A lane that repeats another's channel must not read what that one writes.
                let words = parts.iter().flat_map(|part| state.plus(i64::from(*part)).load_words_if(active, 4));
                let values: Vec<_> = words.map(Value::as_f32).collect();
                let window = step.window_place(item);
                let window_values = match repeated {
                    true => step.columns_if(window, active),
                    false => step.columns(window),
                };
                let group = step.channels + step.xb + step.first_of_chunk;
                let b = of_parts(step.projected.at(group + first_state), &parts);
                let chunk = item & !(states - 1);
                let group = step.channels + step.xb * 2 + step.first_channel + chunk;
                let c = of_parts(step.projected.at(group + first_state), &parts);
                let (x, z) = (step.load_x(item), step.projected.at(channel).load());
                let delta = step.delta.at(of_row).load();
                let a_log = of_parts(step.a_log.at(channel.mad(states, first_state)), &parts);
                let convolved = step.convolved(item);
                let weights = step.columns(step.taps.at(convolved * taps));
                let bias = step.taps_bias.map(|bias| bias.at(convolved).load());
                let delta_bias = step.delta_bias.map(|bias| bias.at(channel).load());
                let skip = step.d.at(channel).load();

                k.comment("convolution, step size");
                let mut sum = bias.unwrap_or_else(|| k.constant(0.0f32));
                let moved: Vec<_> = window_values.into_iter().skip(1).chain([x]).collect();
                for (weight, value) in weights.iter().zip(&moved) {
                    sum = weight.fma(*value, sum);
                }
                let u = sum * sum.sigmoid_flushed();
                let u = if element == Element::Bf16 { u.round_to_bf16() } else { u };
                let size = delta_bias.map_or(delta, |bias| delta + bias).softplus();
                let driven = size * u;

                k.comment("the states, the output");
                let mut new = Vec::new();
                let mut sum = k.constant(0.0f32);
                for (((a_log, value), b), c) in a_log.into_iter().zip(values).zip(b).zip(c) {
                    let next = (size * rate(a_log)).exp2_flushed().fma(value, driven * b);
                    sum = c.fma(next, sum);
                    new.push(next);
                }
                let y = skip.fma(u, k.lanes_sum(sum, lanes)) * (z * z.sigmoid_flushed());
                k.if_(active, || {
                    for (part, new) in parts.iter().zip(new.chunks_exact(VECTOR as usize)) {
                        state.plus((*part).into()).store_vector(new);
                    }
                });
                let leads = active & first_state.eq(0);
                step.output.at(of_row).store_if(leads, y);
                if repeated {
                    k.comment("the channel's lanes have read its convolution's state: it moves by one column");
                    k.warp_barrier();
                    k.if_(leads, || step.store_columns(window, &moved));
                }
            });

            if repeated {
                return;
            }
            k.comment("when all have read it, the convolution's state, which several channels share, moves by one column");
            k.barrier();
            k.for_(k.thread(), states, THREADS, |item| {
                let window = step.window_place(item);
                let moved: Vec<_> = step.columns(window).into_iter().skip(1).chain([step.load_x(item)]).collect();
                step.store_columns(window, &moved);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        let of = |element, repeated| Self {
            element,
            states: 16,
            taps: 4,
            taps_bias: true,
            delta_bias: true,
            repeated,
        };
        super::float_elements(|element| [true, false].map(|repeated| of(element, repeated))).concat()
    }
}

/// The parameters, and the block's part of them.
struct Step<'a> {
    form: MambaStep,
    output: Global<'a>,
    window: Global<'a>,
    state: Global<'a>,
    delta: Global<'a>,
    taps: Global<'a>,
    taps_bias: Option<Global<'a>>,
    a_log: Global<'a>,
    d: Global<'a>,
    delta_bias: Option<Global<'a>>,
    xb: Value<'a, U32>,
    repeats: Value<'a, U32>,
    channels: Value<'a, U32>,
    convolved_channels: Value<'a, U32>,
    /// The chunk's first element of x and B.
    first_of_chunk: Value<'a, U32>,
    first_channel: Value<'a, U32>,
    row: Value<'a, U32>,
    /// The row of it.
    projected: Global<'a>,
}

impl<'a> Step<'a> {
    fn new(k: &'a Assembler, form: MambaStep) -> Self {
        let output = k.write("output", form.element);
        let (window, state) = (k.write("window", Element::F32), k.write("state", Element::F32));
        let (projected, delta) = (k.read("projected", form.element), k.read("delta", form.element));
        let taps = k.read("taps", Element::F32);
        let taps_bias = form.taps_bias.then(|| k.read("taps_bias", Element::F32));
        let (a_log, d) = (k.read("a_log", Element::F32), k.read("d", Element::F32));
        let delta_bias = form.delta_bias.then(|| k.read("delta_bias", Element::F32));
        let (xb, repeats) = (k.u32("xb"), k.u32("repeats"));
        let channels = (xb * repeats).named("channels");
        let first_of_chunk = (k.block() * form.states).named("first_of_chunk");
        let first_channel = (first_of_chunk * repeats).named("first_channel");
        let width = ((channels + xb) * 2).named("row_width");
        let row = k.block_y().named("row");
        let projected = projected.from_row(row, width);
        let convolved_channels = if form.repeated { channels } else { xb };
        Self {
            form,
            output,
            window,
            state,
            delta,
            taps,
            taps_bias,
            a_log,
            d,
            delta_bias,
            xb,
            repeats,
            channels,
            convolved_channels,
            first_of_chunk,
            first_channel,
            row,
            projected,
        }
    }

    /// The convolved channel that belongs to a channel of the block.
    fn convolved(&self, item: Value<'a, U32>) -> Value<'a, U32> {
        match self.form.repeated {
            true => self.first_channel + item,
            false => self.first_of_chunk + (item & (self.form.states - 1)),
        }
    }

    /// The element of x for a channel of the block.
    fn load_x(&self, item: Value<'a, U32>) -> Value<'a, F32> {
        let within = item & (self.form.states - 1);
        self.projected.at(self.channels + self.first_of_chunk + within).load()
    }

    /// The convolution's state for a channel of the block.
    fn window_place(&self, item: Value<'a, U32>) -> Address<'a> {
        self.window.at((self.row * self.convolved_channels + self.convolved(item)) * self.form.taps)
    }

    /// As many values as there are taps.
    fn columns(&self, place: Address<'a>) -> Vec<Value<'a, F32>> {
        match self.form.taps {
            VECTOR => place.load_values(VECTOR as usize),
            taps => (0..taps).map(|column| place.plus(column.into()).load()).collect(),
        }
    }

    /// The same where the condition holds, zeros elsewhere.
    fn columns_if(&self, place: Address<'a>, condition: Value<'a, Pred>) -> Vec<Value<'a, F32>> {
        match self.form.taps {
            VECTOR => place.load_words_if(condition, VECTOR as usize).into_iter().map(Value::as_f32).collect(),
            taps => (0..taps).map(|column| place.plus(column.into()).load_if(condition, 0.0)).collect(),
        }
    }

    fn store_columns(&self, place: Address<'a>, values: &[Value<'a, F32>]) {
        if self.form.taps == VECTOR {
            place.store_vector(values);
        } else {
            (0..).zip(values).for_each(|(column, value)| place.plus(column).store(*value));
        }
    }
}

/// `−log₂e · e^a_log`, to 4 units in the last place: what base 2 takes from the argument's precision is made good.
fn rate(a_log: Value<'_, F32>) -> Value<'_, F32> {
    use std::f32::consts::LOG2_E;
    /// log₂ e less its nearest f32.
    const REST: f32 = 1.925_963e-8;
    let scaled = a_log * LOG2_E;
    // Kept small, so that infinite and huge arguments give the limits.
    let lost = a_log.fma(REST, a_log.fma(LOG2_E, -scaled)).max(-1.0).min(1.0);
    // log₂e · (1 + ln 2 · lost)
    scaled.exp2_flushed() * (-lost - LOG2_E)
}

/// Neighbouring values from each of these places on.
fn of_parts<'a>(place: Address<'a>, parts: &[u32]) -> Vec<Value<'a, F32>> {
    let load = |part: &u32| place.plus(i64::from(*part)).load_values(VECTOR as usize);
    parts.iter().flat_map(load).collect()
}
