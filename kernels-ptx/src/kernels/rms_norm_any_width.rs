//! Root-mean-square normalisation of rows of any width, and its gradients: the kernels for rows that
//! [`rms_norm`](super::rms_norm) cannot hold in registers, element by element. Formulas and rounding are the same.
//!
//! - Layout: one warp per row goes over the row twice; the second time it comes from the cache. For the weight's gradient
//!   a block takes a part of the rows and 32 columns; its warps take rows in turn and their sums are added in order.
//!   [`ColumnSums`](super::column_sums::ColumnSums) then adds the parts in order.
//! - Traffic: forward reads and writes each element once; the input's gradient reads two and writes one; the weight's
//!   reads two.

use super::rms_norm::element_pairs;
use crate::asm::{Assembler, Description, LANES};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;

/// The normalised rows, and the inverse root of each.
///
/// Parameters: `output` (`[rows, width]`), `inverse_roots` (f32 `[rows]`; both written), `input` (`[rows, width]`), `weight`
/// (`[width]`), `epsilon` (f32), `rows`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormAnyWidthForward {
    /// Type of input and output.
    pub element: Element,
    /// Type of the weight.
    pub weight: Element,
}

/// The gradient of the input.
///
/// Parameters: `input_gradient` (`[rows, width]`, written), `gradient`, `input` (`[rows, width]`), `weight` (`[width]`),
/// `inverse_roots` (f32 `[rows]`), `rows`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormAnyWidthInputGradient {
    /// Type of input and gradients.
    pub element: Element,
    /// Type of the weight.
    pub weight: Element,
}

/// The gradient of the weight, summed over parts of the rows.
///
/// Parameters: `sums` (f32 `[parts, width]`, written), `gradient`, `input` (`[rows, width]`), `inverse_roots` (f32 `[rows]`),
/// `rows`, `width`, `part_rows` (u32: rows of a part).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormAnyWidthWeightGradient {
    /// Type of input and gradient.
    pub element: Element,
}

/// Blocks for [`RmsNormAnyWidthForward`] and [`RmsNormAnyWidthInputGradient`] over so many rows.
pub fn rows_grid(rows: u32) -> Option<[u32; 3]> {
    Some([rows.div_ceil(WARPS), 1, 1])
}

impl RmsNormAnyWidthWeightGradient {
    /// How many parts so many rows are best split into, and the rows of each.
    pub fn parts(rows: u32) -> (u32, u32) {
        const LEAST: u32 = 64;
        const MOST: u32 = 128;
        let part_rows = rows.div_ceil(MOST).max(LEAST);
        (rows.div_ceil(part_rows).max(1), part_rows)
    }

    /// Blocks for rows of this width in so many parts.
    pub fn grid(width: u32, parts: u32) -> Option<[u32; 3]> {
        (parts <= 65_535).then_some([width.div_ceil(LANES), parts, 1])
    }
}

impl KernelSource for RmsNormAnyWidthForward {
    fn build(&self) -> Kernel {
        let Self { element, weight: weight_element } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("rms_norm_forward_{element}_{weight_element}_any_width"),
            summary: "output = weight * input / sqrt(mean(input^2) + epsilon) over each row; one warp per row"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "width"],
            work: move |sizes: &[u64]| Work {
                bytes: 2 * bytes * sizes[0] * sizes[1] + 4 * sizes[0],
                operations: 4 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let (output, inverse_roots) = (k.write("output", element), k.write("inverse_roots", Element::F32));
            let (input, weight) = (k.read("input", element), k.read("weight", weight_element));
            let (epsilon, rows, width) = (k.f32("epsilon"), k.u32("rows"), k.u32("width"));
            let row = k.block().mad(WARPS, k.warp()).named("row");
            k.return_if(row.ge(rows));
            let (input, output) = (input.from_row(row, width), output.from_row(row, width));
            let first = k.lane().named("first");

            k.comment("the sum of squares");
            let total = k.variable(0.0f32).named("total");
            k.for_(first, width, LANES, |column| {
                let value = input.at(column).load();
                total.set(value.fma(value, total.get()));
            });
            let mean = k.warp_sum(total.get()).div(width.to_f32());
            let inverse_root = k.constant(1.0f32).div((mean + epsilon).root()).named("inverse_root");
            inverse_roots.at(row).store_if(k.lane().eq(0), inverse_root);

            k.comment("the result");
            k.for_(first, width, LANES, |column| {
                let normal = input.at(column).load() * inverse_root;
                let normal = if element == Element::Bf16 { normal.round_to_bf16() } else { normal };
                output.at(column).store(normal * weight.at(column).load());
            });
        })
    }

    fn configurations() -> Vec<Self> {
        element_pairs().into_iter().map(|(element, weight)| Self { element, weight }).collect()
    }
}

impl KernelSource for RmsNormAnyWidthInputGradient {
    fn build(&self) -> Kernel {
        let Self { element, weight: weight_element } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("rms_norm_input_gradient_{element}_{weight_element}_any_width"),
            summary: "the input's gradient of weight * input / sqrt(mean(input^2) + epsilon); one warp per row"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "width"],
            work: move |sizes: &[u64]| Work {
                bytes: 3 * bytes * sizes[0] * sizes[1] + 4 * sizes[0],
                operations: 7 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let input_gradient = k.write("input_gradient", element);
            let (gradient, input) = (k.read("gradient", element), k.read("input", element));
            let (weight, inverse_roots) = (k.read("weight", weight_element), k.read("inverse_roots", Element::F32));
            let (rows, width) = (k.u32("rows"), k.u32("width"));
            let row = k.block().mad(WARPS, k.warp()).named("row");
            k.return_if(row.ge(rows));
            let [input_gradient, gradient, input] =
                [input_gradient, gradient, input].map(|memory| memory.from_row(row, width));
            let inverse_root = inverse_roots.at(row).load().named("inverse_root");
            let first = k.lane().named("first");
            // The gradient of the normalised value, and the input.
            let load = |column| (gradient.at(column).load() * weight.at(column).load(), input.at(column).load());

            k.comment("the mean of gradient * weight * input");
            let total = k.variable(0.0f32).named("total");
            k.for_(first, width, LANES, |column| {
                let (through, value) = load(column);
                total.set(through.fma(value, total.get()));
            });
            let mean = k.warp_sum(total.get()).div(width.to_f32());
            let factor = (inverse_root * inverse_root * mean).named("factor");

            k.comment("the result");
            k.for_(first, width, LANES, |column| {
                let (through, value) = load(column);
                input_gradient.at(column).store(inverse_root * (-value).fma(factor, through));
            });
        })
    }

    fn configurations() -> Vec<Self> {
        element_pairs().into_iter().map(|(element, weight)| Self { element, weight }).collect()
    }
}

impl KernelSource for RmsNormAnyWidthWeightGradient {
    fn build(&self) -> Kernel {
        let Self { element } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("rms_norm_weight_gradient_{element}_any_width"),
            summary:
                "sums[p, j] = sum of gradient * input * inverse_root over the rows of part p; a warp per row at a time"
                    .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "width"],
            work: move |sizes: &[u64]| Work {
                bytes: 2 * bytes * sizes[0] * sizes[1] + 4 * sizes[0],
                operations: 3 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let sums = k.write("sums", Element::F32);
            let (gradient, input) = (k.read("gradient", element), k.read("input", element));
            let inverse_roots = k.read("inverse_roots", Element::F32);
            let (rows, width, part_rows) = (k.u32("rows"), k.u32("width"), k.u32("part_rows"));
            let (lane, warp) = (k.lane().named("lane"), k.warp().named("warp"));
            let column = k.block().mad(LANES, lane).named("column");
            let part = k.block_y().named("part");
            let begin = (part * part_rows).named("begin");
            let end = (begin + part_rows).min(rows).named("end");

            k.comment("each warp sums every eighth row of the part");
            let total = k.variable(0.0f32).named("total");
            k.if_(column.lt(width), || {
                k.for_(begin + warp, end, WARPS, |row| {
                    let normal = input.from_row(row, width).at(column).load() * inverse_roots.at(row).load();
                    total.set(gradient.from_row(row, width).at(column).load().fma(normal, total.get()));
                });
            });

            k.comment("the warps' sums, in order");
            let scratch = k.shared(Element::F32, THREADS);
            scratch.at(k.thread()).store(total.get());
            k.barrier();
            k.if_(warp.eq(0) & column.lt(width), || {
                let place = scratch.at(lane);
                let total =
                    (1..WARPS).fold(place.load(), |total, warp| total + place.plus(i64::from(warp * LANES)).load());
                sums.from_row(part, width).at(column).store(total);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}
