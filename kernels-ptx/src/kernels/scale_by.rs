//! A tensor times a number that the device holds, in place: `values[i] *= factor[0]`.
//!
//! - Layout: a thread takes 8 neighbouring elements at a time, every `blocks · 256`-th such group.
//! - Traffic: one read and one write of each element; nothing where the factor is 1, as that of a loss is in training. Bound
//!   by memory.

use super::VECTOR;
use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
/// Blocks at most: a whole number of an H100's multiprocessors.
const BLOCKS: u64 = 132 * 8;

/// `values[i] *= factor[0]`.
///
/// Parameters: `values` (`count` elements, read and written), `factor` (f32, one element), `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ScaleBy {
    /// Type of the elements.
    pub element: Element,
}

impl ScaleBy {
    /// Blocks for so many elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        // Indices, and the steps beyond the end, are 32 bits wide.
        let blocks = count.div_ceil(u64::from(VECTOR * THREADS)).min(BLOCKS);
        (count <= i32::MAX as u64).then_some([blocks as u32, 1, 1])
    }
}

impl KernelSource for ScaleBy {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("scale_by_{element}"),
            summary: "values[i] *= factor[0]; nothing where the factor is 1".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: 2 * bytes * sizes[0], operations: sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let values = k.write("values", element);
            let factor = k.read("factor", Element::F32).first().load();
            let count = k.u32("count");
            k.return_if(factor.eq(1.0));
            let step = k.blocks() * (THREADS * VECTOR);
            k.for_(k.global_thread(THREADS) * VECTOR, count, step, |first| {
                let place = values.at(first);
                k.if_else(
                    (first + VECTOR).le(count),
                    || {
                        let scaled = place.load_vector::<{ VECTOR as usize }>().map(|value| value * factor);
                        place.store_vector(&scaled);
                    },
                    || k.for_(first, count, 1, |index| values.at(index).store(values.at(index).load() * factor)),
                );
            });
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}
