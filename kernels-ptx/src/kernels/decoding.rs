//! The state that a causal convolution leaves after a whole sequence: its last inputs.
//!
//! - Layout: one thread per element of the state.
//! - Traffic: every element of the state is read once, as an input, and written once. Bound by the launch.

use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// The last `width` inputs of every channel, oldest first, zero where the sequence is shorter.
///
/// Parameters: `state` (f32 `[batch, channels, width]`, written), `input` (`[batch, time, channels]`), `count` (u32: elements
/// of the state), `time`, `channels`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConvolutionState {
    /// Type of the input.
    pub element: Element,
}

impl KernelSource for ConvolutionState {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = 4 + element.bytes() as u64;
        let description = Description {
            name: format!("convolution_state_{element}"),
            summary: "state[b, c, w] = input[b, time - width + w, c], zero before the first; one thread per element"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (state, input) = (k.write("state", Element::F32), k.read("input", element));
            let (count, time, channels, width) = (k.u32("count"), k.u32("time"), k.u32("channels"), k.u32("width"));
            let index = k.global_thread(THREADS).named("index");
            k.return_if(index.ge(count));
            let series = index.div(width).named("series");
            let column = index - series * width;
            let row = series.div(channels).named("row");
            let channel = series - row * channels;
            let past_width = time + column;
            let step = row.mad(time, past_width - width);
            let value = input.from_row(step, channels).at(channel).load_if(past_width.ge(width), 0.0);
            state.at(index).store(value);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}

impl ConvolutionState {
    /// Blocks for `count` elements of the state; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}
