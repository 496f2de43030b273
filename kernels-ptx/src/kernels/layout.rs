//! Moving elements without changing them: columns from one matrix to another, and repeated chunks with the sum that is
//! their gradient.
//!
//! - Layout: one thread takes 8 neighbouring elements (one, where a size or an offset is no multiple of 8).
//! - Traffic: every element is read once and written once (once per repetition). Bound by memory.

use super::{VECTOR, load_part, store_part};
use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// Copies columns: `output[i, output_start + j] = input[i, input_start + j]` for `0 ≤ i < rows` and `0 ≤ j < columns`.
///
/// Parameters: `output` (`[rows, output_width]`, written where named), `input` (`[rows, input_width]`), `rows`, `columns`,
/// `output_width`, `output_start`, `input_width`, `input_start` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CopyColumns {
    /// Type of the elements.
    pub element: Element,
    /// All widths and starts are multiples of 8.
    pub vector: bool,
}

/// Repeats chunks in place: `output[(c · repeats + r) · chunk + j] = input[c · chunk + j]`.
///
/// Parameters: `output` (`count · repeats` elements, written), `input` (`count` elements), `count`, `chunk`, `repeats` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RepeatChunks {
    /// Type of the elements.
    pub element: Element,
    /// The chunk is a multiple of 8.
    pub vector: bool,
}

/// Adds up repeated chunks: `output[c · chunk + j] = Σᵣ input[(c · repeats + r) · chunk + j]`, in the order of r.
///
/// Parameters: `output` (`count` elements, written), `input` (`count · repeats` elements), `count`, `chunk`, `repeats` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SumChunks {
    /// Type of the elements.
    pub element: Element,
    /// The chunk is a multiple of 8.
    pub vector: bool,
}

impl CopyColumns {
    /// Blocks for so many elements of so many rows; `None` when one launch cannot cover them.
    pub fn grid(&self, rows: u32, columns: u32) -> Option<[u32; 3]> {
        grid(u64::from(rows) * u64::from(columns / elements(self.vector)))
    }
}

/// Blocks of [`RepeatChunks`] and [`SumChunks`] for `count` elements of the shorter side; `None` when one launch cannot
/// cover them.
pub fn chunks_grid(vector: bool, count: u32) -> Option<[u32; 3]> {
    grid(u64::from(count / elements(vector)))
}

/// Whether sizes and starts are such that the `vector` kernels may be used.
pub fn takes_vectors(sizes: &[u32]) -> bool {
    sizes.iter().all(|size| size.is_multiple_of(VECTOR))
}

fn grid(threads: u64) -> Option<[u32; 3]> {
    // Indices are 32 bits wide.
    (threads <= u64::from(u32::MAX - THREADS)).then(|| super::one_thread_per_element(threads, THREADS)).flatten()
}

/// Elements that a thread takes.
fn elements(vector: bool) -> u32 {
    if vector { VECTOR } else { 1 }
}

fn suffix(vector: bool) -> &'static str {
    if vector { "" } else { "_scalar" }
}

impl KernelSource for CopyColumns {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let per_thread = elements(vector);
        let description = Description {
            name: format!("copy_columns_{element}{}", suffix(vector)),
            summary: format!(
                "output[i, output_start + j] = input[i, input_start + j]; elements per thread: {per_thread}"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "columns"],
            work: move |sizes: &[u64]| Work { bytes: 2 * bytes * sizes[0] * sizes[1], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (output, input) = (k.write("output", element), k.read("input", element));
            let (rows, columns) = (k.u32("rows"), k.u32("columns"));
            let (output_width, output_start) = (k.u32("output_width"), k.u32("output_start"));
            let (input_width, input_start) = (k.u32("input_width"), k.u32("input_start"));
            let index = k.global_thread(THREADS).named("index");
            let groups = if vector { columns >> VECTOR.ilog2() } else { columns };
            let row = index.div(groups).named("row");
            k.return_if(row.ge(rows));
            let column = ((index - row * groups) * per_thread).named("column");
            let source = input.from_row(row, input_width).at(input_start + column);
            let target = output.from_row(row, output_width).at(output_start + column);
            store_part(target, &load_part(source, vector));
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| [true, false].map(|vector| Self { element, vector })).concat()
    }
}

impl KernelSource for RepeatChunks {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("repeat_chunks_{element}{}", suffix(vector)),
            summary: "output[(c * repeats + r) * chunk + j] = input[c * chunk + j]".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count", "repeats"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0] * (sizes[1] + 1), operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (output, input) = (k.write("output", element), k.read("input", element));
            let (count, chunk, repeats) = (k.u32("count"), k.u32("chunk"), k.u32("repeats"));
            let index = (k.global_thread(THREADS) * elements(vector)).named("index");
            k.return_if(index.ge(count));
            let run = index.div(chunk).named("run");
            let within = (index - run * chunk).named("within");
            let values = load_part(input.at(index), vector);
            k.for_(0, repeats, 1, |repeat| {
                store_part(output.from_row(run.mad(repeats, repeat), chunk).at(within), &values);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}

impl KernelSource for SumChunks {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("sum_chunks_{element}{}", suffix(vector)),
            summary: "output[c * chunk + j] = sum over r of input[(c * repeats + r) * chunk + j]".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count", "repeats"],
            work: move |sizes: &[u64]| Work {
                bytes: bytes * sizes[0] * (sizes[1] + 1),
                operations: sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (output, input) = (k.write("output", element), k.read("input", element));
            let (count, chunk, repeats) = (k.u32("count"), k.u32("chunk"), k.u32("repeats"));
            let index = (k.global_thread(THREADS) * elements(vector)).named("index");
            k.return_if(index.ge(count));
            let run = index.div(chunk).named("run");
            let within = (index - run * chunk).named("within");
            let totals: Vec<_> = (0..elements(vector)).map(|_| k.variable(0.0f32)).collect();
            k.for_(0, repeats, 1, |repeat| {
                let values = load_part(input.from_row(run.mad(repeats, repeat), chunk).at(within), vector);
                for (total, value) in totals.iter().zip(values) {
                    total.set(total.get() + value);
                }
            });
            let totals: Vec<_> = totals.iter().map(|total| total.get()).collect();
            store_part(output.at(index), &totals);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}
