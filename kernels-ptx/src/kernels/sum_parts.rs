//! Sum of parts: `output[i] = Σₛ parts[s, i]` in f32, added in the order of `s`: the second pass of sums that blocks form
//! independently.
//!
//! - Layout: one thread per element; neighbouring threads read neighbouring elements of each part.
//! - Traffic: `parts + 1` elements of 4 bytes per result. Bound by memory.

use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// Adds equally long f32 vectors in order.
///
/// Parameters: `output` (f32, `count` elements, written), `parts` (f32, `[splits, count]`), `count`, `splits` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SumParts;

impl KernelSource for SumParts {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "sum_parts_f32".to_owned(),
            summary: "output[i] = sum over s of parts[s, i], in the order of s; one thread per element".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count", "splits"],
            work: |sizes: &[u64]| Work { bytes: 4 * sizes[0] * (sizes[1] + 1), operations: sizes[0] * sizes[1] },
        };
        Assembler::assemble(description, |k| {
            let (output, parts) = (k.write("output", Element::F32), k.read("parts", Element::F32));
            let (count, splits) = (k.u32("count"), k.u32("splits"));
            let index = k.global_thread(THREADS).named("index");
            k.return_if(index.ge(count));
            let total = k.variable(0.0f32).named("total");
            k.for_(0u32, splits, 1u32, |part| {
                total.set(total.get() + parts.from_row(part, count).at(index).load());
            });
            output.at(index).store(total);
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self]
    }
}

impl SumParts {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}
