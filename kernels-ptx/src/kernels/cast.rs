//! Cast: `output[i] = input[i]` in another floating-point type, rounded to nearest even.
//!
//! - Layout: each thread takes 4 neighbouring elements with one access per operand.
//! - Traffic: each element is read once and written once. Bound by memory.

use super::lanes_of;
use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// Converts between f32 and bf16.
///
/// Parameters: `output` (`count` elements of `to`, written), `input` (`count` elements of `from`), `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cast {
    /// Type of the input.
    pub from: Element,
    /// Type of the output.
    pub to: Element,
}

impl KernelSource for Cast {
    fn build(&self) -> Kernel {
        let Self { from, to } = *self;
        let bytes = (from.bytes() + to.bytes()) as u64;
        let description = Description {
            name: format!("cast_{from}_to_{to}"),
            summary: format!("output[i] = input[i], from {from} to {to}; {} elements per thread", lanes_of(Element::F32)),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (output, input, count) = (k.write("output", to), k.read("input", from), k.u32("count"));
            super::vectors(k, THREADS, count, &[input], &[output], |value| value);
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self { from: Element::F32, to: Element::Bf16 }, Self { from: Element::Bf16, to: Element::F32 }]
    }
}

impl Cast {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::vectors_grid(count, THREADS, Element::F32)
    }
}
