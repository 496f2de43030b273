//! What reaches each span from those before it, or after it.

use super::MOST_STATES;
use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const BLOCK: u32 = 128;
/// Spans that are read ahead together.
const AHEAD: u32 = 16;

/// Replaces what each span leaves behind by what reaches it, in the order of time or against it: `carry_k = exp(A ΣΔ_{k−1})
/// carry_{k−1} + states_{k−1}` (`k + 1` for `k − 1` against it). A span in which a document begins lets nothing through.
///
/// Parameters: `states` (f32 `[batch, spans, channels, states]`, replaced), `sums` (f32 `[batch, spans, channels]`: ΣΔ), `a`
/// (f32 `[channels, states]`), `initial` (f32 `[batch, channels, states]`: what reaches the first span, with one),
/// `document_start` (u32 `[batch, time]`, with documents), `rows` (u32: batch · channels), `channels`, `spans`, `time`, `span`
/// (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CombineSpans {
    /// States of a channel.
    pub states: u32,
    /// Against the order of time: from the last span to the first.
    pub reverse: bool,
    /// Something reaches the first span.
    pub initial: bool,
    /// Rows hold several documents.
    pub documents: bool,
}

impl CombineSpans {
    /// Blocks for `count` states of all channels and rows; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::super::one_thread_per_element(count, BLOCK)
    }
}

impl KernelSource for CombineSpans {
    fn build(&self) -> Kernel {
        let Self { states: width, reverse, initial, documents } = *self;
        assert!(width <= MOST_STATES, "{width} states of a channel");
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let description = Description {
            name: format!(
                "selective_scan_combine_n{width}{}{}{}",
                flag(reverse, "_reverse"),
                flag(initial, "_initial"),
                flag(documents, "_documents")
            ),
            summary: "what reaches each span of a scan; one thread per channel and state".to_owned(),
            block: [BLOCK, 1, 1],
            target: Target::Sm80,
            sizes: &["batch", "channels", "states", "spans"],
            work: |sizes: &[u64]| {
                let count = sizes[0] * sizes[1] * sizes[2];
                Work { bytes: count * sizes[3] * 8, operations: count * sizes[3] * 4 }
            },
        };
        Assembler::assemble(description, |k| {
            let (states, sums) = (k.write("states", Element::F32), k.read("sums", Element::F32));
            let a = k.read("a", Element::F32);
            let initial = initial.then(|| k.read("initial", Element::F32));
            let document_start = documents.then(|| k.read("document_start", Element::U32));
            let (rows, channels, spans) = (k.u32("rows"), k.u32("channels"), k.u32("spans"));
            let (time, span) = (k.u32("time"), k.u32("span"));
            let index = k.global_thread(BLOCK).named("index");
            k.return_if(index.ge(rows * width));
            let row_channel = index.div(width);
            let row = row_channel.div(channels).named("row");
            let channel = row_channel.rem(channels).named("channel");
            let state = channel.mad(width, index.rem(width)).named("state");
            let rate = a.at(state).load() * std::f32::consts::LOG2_E;
            let carry = match initial {
                Some(initial) => k.variable(initial.at(index).load()),
                None => k.variable(0.0f32),
            }
            .named("carry");
            k.for_(0u32, spans, AHEAD, |from| {
                // The span `from + ahead` on the way, and whether it exists and passes something on.
                let spans: Vec<_> = (0..AHEAD)
                    .map(|ahead| {
                        let step = from + ahead;
                        let at = if reverse { spans - 1 - step } else { step };
                        let passes = step.lt(spans - 1);
                        let outer = row.mad(spans, at);
                        let place = states.from_row(outer, channels * width).at(state);
                        let left = place.load_if(passes, 0.0);
                        let sum = sums.from_row(outer, channels).at(channel).load_if(passes, 0.0);
                        // A document begins in the span when that of its last step does.
                        let last = ((at + 1) * span).min(time) - 1;
                        let begins = document_start
                            .map(|starts| starts.at(row.mad(time, last)).load_u32_if(passes, 0).ge(at * span));
                        (step.lt(spans), place, left, sum, begins)
                    })
                    .collect();
                for (exists, place, left, sum, begins) in spans {
                    place.store_if(exists, carry.get());
                    let decay = (sum * rate).exp2_flushed();
                    let passed = decay.fma(carry.get(), left);
                    carry.set(match begins {
                        Some(begins) => begins.select(left, passed),
                        None => passed,
                    });
                }
            });
        })
    }

    fn configurations() -> Vec<Self> {
        let of = |reverse, documents| Self { states: 16, reverse, initial: false, documents };
        vec![of(false, false), of(false, true), of(true, false), of(true, true)]
    }
}
