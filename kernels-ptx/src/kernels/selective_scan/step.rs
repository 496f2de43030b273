//! One step of the scan, for decoding.

use super::{MOST_STATES, Scan};
use crate::asm::{Address, Assembler, Description, F32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const BLOCK: u32 = 128;
/// States that a thread has on their way at a time.
const AHEAD: u32 = 16;
/// Neighbouring states that are moved in one access, where all can be.
const VECTOR: u32 = 4;

/// One step: updates the state in place and gives the output.
///
/// Parameters: `output` (of the type, `[batch, channels]`, written), `state` (f32 `[batch, channels, states]`, updated),
/// `input`, `delta` (like the output), `a` (f32 `[channels, states]`), `b`, `c` (of the type, `[batch, groups, states]`), `d`
/// (f32 `[channels]`, with D), `gate` (like the output, with a gate), `delta_bias` (f32 `[channels]`, with a bias), `count`
/// (u32: batch · channels), `channels`, `b_width`, `c_width` (u32: channels of a group).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ScanStep(pub Scan);

impl ScanStep {
    /// Blocks for `count` channels of all rows together; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::super::one_thread_per_element(count, BLOCK)
    }
}

impl KernelSource for ScanStep {
    fn build(&self) -> Kernel {
        let form = self.0;
        assert!(form.states <= MOST_STATES, "{} states of a channel", form.states);
        let bytes = form.element.bytes() as u64;
        let arrays = 3 + u64::from(form.gate);
        let description = Description {
            name: form.name("selective_scan_step"),
            summary: "one step of the selective scan; one thread per channel".to_owned(),
            block: [BLOCK, 1, 1],
            target: Target::Sm80,
            sizes: &["batch", "channels", "states", "b_groups", "c_groups"],
            work: move |sizes: &[u64]| Work {
                bytes: sizes[0]
                    * (sizes[1] * (arrays * bytes + 8 * sizes[2]) + bytes * sizes[2] * (sizes[3] + sizes[4]))
                    + 4 * sizes[1] * sizes[2],
                operations: sizes[0] * sizes[1] * sizes[2] * 6,
            },
        };
        Assembler::assemble(description, |k| {
            let (output, state) = (k.write("output", form.element), k.write("state", Element::F32));
            let (input, delta) = (k.read("input", form.element), k.read("delta", form.element));
            let (a, b, c) = (k.read("a", Element::F32), k.read("b", form.element), k.read("c", form.element));
            let d = form.skip.then(|| k.read("d", Element::F32));
            let gate = form.gate.then(|| k.read("gate", form.element));
            let bias = form.bias.then(|| k.read("delta_bias", Element::F32));
            let (count, channels) = (k.u32("count"), k.u32("channels"));
            let (b_width, c_width) = (k.u32("b_width"), k.u32("c_width"));
            let index = k.global_thread(BLOCK).named("index");
            k.return_if(index.ge(count));
            let channel = index.rem(channels).named("channel");
            // Groups divide the channels, so rows and groups count as one.
            let b = b.from_row(index.div(b_width), form.states);
            let c = c.from_row(index.div(c_width), form.states);
            let a = a.from_row(channel, form.states);
            let state = state.from_row(index, form.states);
            let u = input.at(index).load();
            let raw = delta.at(index).load();
            let raw = bias.map_or(raw, |bias| raw + bias.at(channel).load());
            let size = if form.softplus { super::lane::softplus(k, raw).size } else { raw };
            let driven = size * u;
            let sum = k.variable(0.0f32).named("sum");
            let width = if form.states.is_multiple_of(VECTOR) { VECTOR } else { 1 };
            let (states, a, b, c) = (state.first(), a.first(), b.first(), c.first());
            for first in (0..form.states).step_by(AHEAD as usize) {
                let part: Vec<u32> = (first..(first + AHEAD).min(form.states)).step_by(width as usize).collect();
                let load = |n: &u32| [states, a, b, c].map(|place| load(place.plus(i64::from(*n)), width));
                let values: Vec<_> = part.iter().map(load).collect();
                for (n, [old, a, b, c]) in part.into_iter().zip(values) {
                    let mut new = Vec::new();
                    for lane in 0..width as usize {
                        let decay = (size * a[lane] * std::f32::consts::LOG2_E).exp2_flushed();
                        let state = decay.fma(old[lane], driven * b[lane]);
                        sum.set(c[lane].fma(state, sum.get()));
                        new.push(state);
                    }
                    states.plus(i64::from(n)).store_vector(&new);
                }
            }
            let y = match d {
                Some(d) => d.at(channel).load().fma(u, sum.get()),
                None => sum.get(),
            };
            let y = match gate {
                Some(gate) => {
                    let z = gate.at(index).load();
                    y * (z * z.sigmoid_flushed())
                }
                None => y,
            };
            output.at(index).store(y);
        })
    }

    fn configurations() -> Vec<Self> {
        Scan::configurations().into_iter().filter(|scan| !scan.documents).map(Self).collect()
    }
}

fn load<'a>(place: Address<'a>, width: u32) -> Vec<Value<'a, F32>> {
    if width == VECTOR { place.load_vector::<{ VECTOR as usize }>().to_vec() } else { vec![place.load()] }
}
