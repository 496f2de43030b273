//! Axpy: `y[i] = a · x[i] + y[i]` for `0 ≤ i < count`, in f32 with one rounding (fused multiply-add).
//!
//! - Layout: one thread per element, 256 threads per block; the 32 lanes of a warp touch 128 neighbouring bytes of each
//!   operand.
//! - Traffic: 12 bytes per element (x and y read, y written) for two operations. Bound by memory.
//! - Source: BLAS level 1, `saxpy`.

use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// Adds a multiple of one vector to another.
///
/// Parameters: `y` (f32, `count` elements, read and written), `x` (f32, `count` elements), `a` (f32), `count` (u64).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Axpy;

impl KernelSource for Axpy {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "axpy_f32".to_owned(),
            summary: "y[i] = a * x[i] + y[i] for 0 <= i < count; one thread per element, one rounding".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: |sizes: &[u64]| Work { bytes: 12 * sizes[0], operations: 2 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let (y, x) = (k.write("y", Element::F32), k.read("x", Element::F32));
            let (a, count) = (k.f32("a"), k.u64("count"));
            let index = k.block().mad_wide(THREADS, k.thread().wide()).named("index");
            k.return_if(index.ge(count));
            let place = y.from(index).first();
            place.store(a.fma(x.from(index).first().load(), place.load()));
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self]
    }
}

impl Axpy {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}
