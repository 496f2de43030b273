//! The sum of all elements, and the sum's gradient: one number in every place.
//!
//! - Layout: [`Sum`] gives every block a segment of neighbouring elements; its threads take 8 at a time in turn, keep 8 sums
//!   each and add them in a fixed order. A second launch with one block adds the blocks' sums.
//! - Traffic: every element is read once (or, by [`Broadcast`], written once). Bound by memory.

use super::{VECTOR, lanes_of};
use crate::asm::{Assembler, Description, F32, LANES, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// Sums of segments: `sums[b] = Σ x[i]` for `b · segment ≤ i < (b + 1) · segment`, one block each.
///
/// Parameters: `sums` (f32, one element per block, written), `x` (`count` elements of the type), `count`,
/// `segment` (u32, a multiple of 8).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Sum {
    /// Type of x.
    pub element: Element,
}

/// `output[i] = value[0]`.
///
/// Parameters: `output` (`count` elements of the type, written), `value` (f32, one element), `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Broadcast {
    /// Type of the output.
    pub element: Element,
}

impl Sum {
    /// How many blocks so many elements are best summed by, and the elements of each block's segment.
    pub fn segments(count: u32) -> (u32, u32) {
        // With half as much a gradient norm of many small tensors has more partial sums, and a launch more, to add them.
        const LEAST: u32 = 8 * THREADS * VECTOR;
        const MOST: u32 = 1024;
        let segment = count.div_ceil(MOST).max(LEAST).next_multiple_of(VECTOR);
        (count.div_ceil(segment).max(1), segment)
    }
}

impl KernelSource for Sum {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("sum_{element}"),
            summary: "sums[b] = sum of x[i] over the segment of block b; 8 elements per thread at a time".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let (sums, x) = (k.write("sums", Element::F32), k.read("x", element));
            let (count, segment) = (k.u32("count"), k.u32("segment"));
            let begin = (k.block() * segment).named("begin");
            let end = (begin + segment).min(count).named("end");
            let totals: [_; VECTOR as usize] = std::array::from_fn(|_| k.variable(0.0f32));
            let add = |total: &Variable<'_, F32>, value: Value<'_, F32>| {
                total.set(total.get() + value);
            };
            k.for_(k.thread().mad(VECTOR, begin), end, THREADS * VECTOR, |first| {
                k.if_else(
                    (first + VECTOR).le(end),
                    || {
                        let values = x.at(first).load_vector::<{ VECTOR as usize }>();
                        for (total, value) in totals.iter().zip(values) {
                            add(total, value);
                        }
                    },
                    || k.for_(first, end, 1, |index| add(&totals[0], x.at(index).load())),
                );
            });
            let [a, b, c, d, e, f, g, h] = totals.map(|total| total.get());
            let total = ((a + b) + (c + d)) + ((e + f) + (g + h));
            let total = k.block_sum(total, THREADS, k.shared(Element::F32, THREADS / LANES));
            sums.at(k.block()).store_if(k.thread().eq(0), total);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}

impl KernelSource for Broadcast {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("broadcast_{element}"),
            summary: format!("output[i] = value[0]; {} elements per thread", lanes_of(element)),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (output, value) = (k.write("output", element), k.read("value", Element::F32));
            let count = k.u32("count");
            let value = value.first().load();
            super::vectors(k, THREADS, count, &[], &[output], |[]| [value]);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}

impl Broadcast {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(&self, count: u64) -> Option<[u32; 3]> {
        super::vectors_grid(count, THREADS, self.element)
    }
}

#[cfg(test)]
mod tests {
    use super::Sum;

    #[test]
    fn segments_cover_every_element() {
        for count in [0, 1, 16_383, 16_384, 16_385, 16_777_216, 16_777_217, u32::MAX - 9000] {
            let (blocks, segment) = Sum::segments(count);
            assert!(segment.is_multiple_of(8) && (1..=1024).contains(&blocks));
            assert!(u64::from(blocks) * u64::from(segment) >= u64::from(count));
            assert!(u64::from(blocks - 1) * u64::from(segment) <= u64::from(count));
        }
    }
}
