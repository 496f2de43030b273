//! Column sums: `sums[p, j] = Σᵢ x[i, j]` over the rows `i` of part `p`, in f32. With one part it is the whole sum; with more,
//! [`SumParts`](super::sum_parts::SumParts) adds them in order.
//!
//! - Layout: one thread per column and part; neighbouring threads read neighbouring elements of a row. Each keeps four
//!   sums of every fourth row, so that four rows are on their way at a time, and adds them in a fixed order.
//! - Traffic: every element of x is read once. Bound by memory.

use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
/// Rows that a thread has on their way at a time.
const AHEAD: u32 = 4;

/// Sums a matrix over its rows.
///
/// Parameters: `sums` (f32 `[parts, columns]`, written), `x` (`[rows, columns]`), `rows`, `columns`, `part_rows` (u32: rows
/// of a part, a multiple of 4).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ColumnSums {
    /// Type of x.
    pub element: Element,
}

impl ColumnSums {
    /// Blocks for so many columns and parts; `None` when one launch cannot cover them.
    pub fn grid(columns: u32, parts: u32) -> Option<[u32; 3]> {
        (parts <= 65_535).then_some([columns.div_ceil(THREADS), parts, 1])
    }

    /// How many parts so many rows are best split into, and the rows of each.
    pub fn parts(rows: u32) -> (u32, u32) {
        const ROWS: u32 = 128;
        const MOST: u32 = 256;
        let part_rows = rows.div_ceil(MOST).max(ROWS).next_multiple_of(AHEAD);
        (rows.div_ceil(part_rows).max(1), part_rows)
    }
}

impl KernelSource for ColumnSums {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("column_sums_{element}"),
            summary: "sums[p, j] = sum of x[i, j] over the rows i of part p; one thread per column and part".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "columns"],
            work: move |sizes: &[u64]| Work {
                bytes: bytes * sizes[0] * sizes[1] + 4 * sizes[1],
                operations: sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (sums, x) = (k.write("sums", Element::F32), k.read("x", element));
            let (rows, columns, part_rows) = (k.u32("rows"), k.u32("columns"), k.u32("part_rows"));
            let column = k.global_thread(THREADS).named("column");
            k.return_if(column.ge(columns));
            let part = k.block_y().named("part");
            let first = (part * part_rows).named("first");
            let end = (first + part_rows).min(rows).named("end");
            let totals: [_; AHEAD as usize] = std::array::from_fn(|_| k.variable(0.0f32));
            k.for_(first, end, AHEAD, |row| {
                for (offset, total) in totals.iter().enumerate() {
                    let row = row + offset as u32;
                    let value = x.from_row(row, columns).at(column).load_if(row.lt(end), 0.0);
                    total.set(total.get() + value);
                }
            });
            let [a, b, c, d] = totals.map(|total| total.get());
            sums.from_row(part, columns).at(column).store((a + b) + (c + d));
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}
