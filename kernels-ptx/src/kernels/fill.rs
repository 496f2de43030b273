//! Fill: `y[i] = value` for `0 ≤ i < count`.
//!
//! - Layout: a block writes 4096 neighbouring elements, each thread 4 times 16 bytes of them, the lanes of a warp 512
//!   neighbouring bytes at a time; the last block writes what is left one by one.
//! - Traffic: 4 bytes written per element, nothing read. Bound by memory.

use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
/// Neighbouring elements that a thread writes at a time.
const VECTOR: u32 = 4;
/// Times that a thread writes.
const TIMES: u32 = 4;
/// Elements of a block.
const BLOCK: u32 = THREADS * VECTOR * TIMES;

/// Writes one pattern of 32 bits into every element of a buffer.
///
/// Parameters: `y` (u32, `count` elements, written), `value` (the pattern), `count` (u64).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fill;

impl KernelSource for Fill {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "fill_u32".to_owned(),
            summary: "y[i] = value for 0 <= i < count; 4 times 4 elements per thread".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: |sizes: &[u64]| Work { bytes: 4 * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (y, value, count) = (k.write("y", Element::U32), k.u32("value"), k.u64("count"));
            let first = k.block().mul_wide(BLOCK).named("first");
            let y = y.from(first);
            let left = (count - first).named("left");
            k.if_else(
                left.ge(u64::from(BLOCK)),
                || {
                    let place = y.at(k.thread() * VECTOR);
                    for time in 0..TIMES {
                        place.plus(i64::from(time * THREADS * VECTOR)).store_words(&[value; VECTOR as usize]);
                    }
                },
                || k.for_(k.thread(), left.narrow(), THREADS, |index| y.at(index).store_u32(value)),
            );
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self]
    }
}

impl Fill {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, BLOCK)
    }
}
