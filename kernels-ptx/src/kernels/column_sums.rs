//! Column sums: `sums[p, j] = Σᵢ x[i, j]` over the rows `i` of part `p`, in f32. With one part it is the whole sum; with more,
//! [`SumParts`](super::sum_parts::SumParts) adds them in order.
//!
//! - One launch sums up to three matrices that have as many rows: the next one's columns have blocks after the ones before.
//! - Layout: a block takes 32 columns of a part, a lane one of them; its 8 warps take rows in turn, so that 8 · 16 rows
//!   of 32 elements are on their way at a time. Their sums are added in order.
//! - Traffic: every element of x is read once. Bound by memory.

use crate::asm::{Assembler, Description, Global, LANES, Pred, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;
/// Rows that a thread has on their way at a time.
const AHEAD: u32 = 16;

/// The parameters of the matrices after the first: sums, x and columns.
const MORE: [[&str; 3]; 2] =
    [["second_sums", "second_x", "second_columns"], ["third_sums", "third_x", "third_columns"]];

/// Sums matrices over their rows.
///
/// Parameters: `sums` (f32 `[parts, columns]`, written), `x` (`[rows, columns]`), `rows`, `columns`, `part_rows` (u32: rows
/// of a part); then for each matrix after the first, `second_sums`, `second_x` and `second_columns`, and so on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ColumnSums {
    /// Type of x.
    pub element: Element,
    /// Matrices, from 1 to [`MOST_MATRICES`](Self::MOST_MATRICES).
    pub matrices: usize,
}

impl ColumnSums {
    /// Matrices that one launch takes.
    pub const MOST_MATRICES: usize = 1 + MORE.len();

    /// Blocks for matrices of so many columns and parts; `None` when one launch cannot cover them.
    pub fn grid(columns: &[u32], parts: u32) -> Option<[u32; 3]> {
        let blocks = columns.iter().map(|columns| columns.div_ceil(LANES)).sum();
        (parts <= 65_535).then_some([blocks, parts, 1])
    }

    /// How many parts so many rows are best split into, and the rows of each.
    pub fn parts(rows: u32) -> (u32, u32) {
        const ROWS: u32 = 128;
        const MOST: u32 = 256;
        let part_rows = rows.div_ceil(MOST).max(ROWS).next_multiple_of(AHEAD);
        (rows.div_ceil(part_rows).max(1), part_rows)
    }
}

/// The one memory where the condition holds, or else the other.
fn either<'a>(condition: Value<'a, Pred>, one: Global<'a>, other: Global<'a>) -> Global<'a> {
    let [yes, no] = [one, other].map(|memory| memory.first().global_address());
    one.from_address(condition.select(yes, no))
}

impl KernelSource for ColumnSums {
    fn build(&self) -> Kernel {
        let Self { element, matrices } = *self;
        assert!((1..=Self::MOST_MATRICES).contains(&matrices), "{matrices} matrices");
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("column_sums_{element}{}", ["", "_pair", "_triple"][matrices - 1]),
            summary: "sums[p, j] = sum of x[i, j] over the rows i of part p; a block per 32 columns and part"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "columns"],
            work: move |sizes: &[u64]| Work {
                bytes: bytes * sizes[0] * sizes[1] + 4 * sizes[1],
                operations: sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (mut sums, mut x) = (k.write("sums", Element::F32), k.read("x", element));
            let (rows, mut columns, part_rows) = (k.u32("rows"), k.u32("columns"), k.u32("part_rows"));
            let (lane, warp) = (k.lane().named("lane"), k.warp().named("warp"));
            let mut block = k.block();
            for [more_sums, more_x, more_columns] in MORE.into_iter().take(matrices - 1) {
                let (more_sums, more_x) = (k.write(more_sums, Element::F32), k.read(more_x, element));
                let more_columns = k.u32(more_columns);
                k.comment("is the block's matrix a later one?");
                let blocks = (columns + (LANES - 1)) >> LANES.ilog2();
                let here = block.lt(blocks);
                (sums, x) = (either(here, sums, more_sums), either(here, x, more_x));
                columns = here.select(columns, more_columns);
                block = here.select(block, block - blocks);
            }
            let column = block.mad(LANES, lane).named("column");
            let exists = column.lt(columns);
            let part = k.block_y().named("part");
            let first = (part * part_rows).named("first");
            let end = (first + part_rows).min(rows).named("end");
            let totals: [_; AHEAD as usize] = std::array::from_fn(|_| k.variable(0.0f32));
            k.if_(exists, || {
                k.for_(first + warp, end, WARPS * AHEAD, |row| {
                    let values: Vec<_> = (0..AHEAD)
                        .map(|ahead| {
                            let row = row + ahead * WARPS;
                            x.from_row(row, columns).at(column).load_if(row.lt(end), 0.0)
                        })
                        .collect();
                    for (total, value) in totals.iter().zip(values) {
                        total.set(total.get() + value);
                    }
                });
            });

            k.comment("the warps' sums, in order");
            let total = totals[1..].iter().fold(totals[0].get(), |sum, total| sum + total.get());
            let scratch = k.shared(Element::F32, THREADS);
            scratch.at(k.thread()).store(total);
            k.barrier();
            k.if_(exists & warp.eq(0), || {
                let place = scratch.at(lane);
                let total =
                    (1..WARPS).fold(place.load(), |total, warp| total + place.plus(i64::from(warp * LANES)).load());
                sums.from_row(part, columns).at(column).store(total);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        let mut all = super::float_elements(|element| Self { element, matrices: 1 });
        all.extend((2..=Self::MOST_MATRICES).map(|matrices| Self { element: Element::F32, matrices }));
        all
    }
}
