//! Sums of squares of many tensors at once: the first pass of a norm.
//!
//! - Layout: a table has a row per tensor. A block takes a segment of neighbouring elements of one of them; its threads take
//!   8 at a time in turn, keep 8 sums each and add them in a fixed order, as [`super::sum::Sum`] does, which then adds the
//!   blocks' sums. A block finds its row by bisection.
//! - Traffic: every element is read once. Bound by memory.

use super::VECTOR;
use crate::asm::{Assembler, Description, F32, LANES, Value, Variable};
use crate::{Element, Kernel, KernelSource, ParameterKind, Target, Work};

const THREADS: u32 = 256;
/// Elements that a block takes at a time.
const ROUND: u32 = THREADS * VECTOR;

const F32_ROW: [ParameterKind; 5] =
    [ParameterKind::Read(Element::F32), ParameterKind::U64, ParameterKind::U64, ParameterKind::U64, ParameterKind::U64];
const BF16_ROW: [ParameterKind; 5] =
    [ParameterKind::Read(Element::Bf16), F32_ROW[1], F32_ROW[2], F32_ROW[3], F32_ROW[4]];

/// Sums of segments' squares: `sums[place + b] = Σ x[i]²` for `b · segment ≤ i < (b + 1) · segment`, one block each.
///
/// Parameters: `sums` (f32, one element per block of every launch for them, written), `table` (a row per tensor: x, its number
/// of elements, the elements of a segment (a multiple of 8), the tensor's first block, its `place`), `rows` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SquareSums {
    /// Type of the elements: f32 or bf16.
    pub element: Element,
}

impl SquareSums {
    /// Words of a row of the table.
    pub const WORDS: usize = F32_ROW.len();
}

impl KernelSource for SquareSums {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("square_sums_{element}"),
            summary:
                "sums[place + b] = sum of x[i]^2 over segment b of one of many tensors; 8 elements per thread at a time"
                    .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: 2 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let sums = k.write("sums", Element::F32);
            let table = k.table("table", if element == Element::F32 { &F32_ROW } else { &BF16_ROW });
            let rows = k.u32("rows");
            let row = table.row_of_block(rows, 3, k.block());
            let block = (k.block() - row.number(3)).named("block");
            let (x, count, segment) = (row.memory(0), row.number(1), row.number(2));
            let begin = (block * segment).named("begin");
            let end = (begin + segment).min(count).named("end");
            let totals: [_; VECTOR as usize] = std::array::from_fn(|_| k.variable(0.0f32));
            let add = |total: &Variable<'_, F32>, value: Value<'_, F32>| total.set(value.fma(value, total.get()));
            let first = k.variable(k.thread().mad(VECTOR, begin)).named("first");
            // Two rounds are read before either is added, so that more is on its way.
            k.while_(
                || (first.get() + (ROUND + VECTOR)).le(end),
                || {
                    let rounds = [0, ROUND].map(|more| x.at(first.get() + more).load_vector::<{ VECTOR as usize }>());
                    for values in rounds {
                        for (total, value) in totals.iter().zip(values) {
                            add(total, value);
                        }
                    }
                    first.set(first.get() + 2 * ROUND);
                },
            );
            k.for_(first.get(), end, ROUND, |first| {
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
            sums.at(row.number(4) + block).store_if(k.thread().eq(0), total);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}
