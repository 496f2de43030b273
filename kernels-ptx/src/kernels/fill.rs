//! Fill: `y[i] = value` for `0 ≤ i < count`.
//!
//! - Layout: one thread per element, 256 threads per block; the 32 lanes of a warp write 128 neighbouring bytes.
//! - Traffic: 4 bytes written per element, nothing read. Bound by memory.

use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// Writes one pattern of 32 bits into every element of a buffer.
///
/// Parameters: `y` (u32, `count` elements, written), `value` (the pattern), `count` (u64).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fill;

impl KernelSource for Fill {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "fill_u32".to_owned(),
            summary: "y[i] = value for 0 <= i < count; one thread per element".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: |sizes: &[u64]| Work { bytes: 4 * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (y, value, count) = (k.write("y", Element::U32), k.u32("value"), k.u64("count"));
            let index = k.block().mad_wide(THREADS, k.thread().wide()).named("index");
            k.return_if(index.ge(count));
            y.from(index).first().store_u32(value);
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self]
    }
}

impl Fill {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}
