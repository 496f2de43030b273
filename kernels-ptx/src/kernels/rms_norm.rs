//! Root-mean-square normalisation: `output = weight · x · r` with `r = 1 / √(mean(x²) + epsilon)` over each row, and its
//! gradients.
//!
//! - Rounding: in bf16 the normalised value `x · r` is rounded before the product with the weight, as Hugging Face's Llama
//!   and Mistral do.
//! - Backward: with `m = mean(g · weight · x)`, `dx = r (g · weight − x r² m)` and `d weight = Σ_rows g · x · r`.
//! - Layout: one warp per row goes over the row twice; the second time it comes from the cache. For the weight's gradient
//!   a block takes a part of the rows and 32 times as many columns as a lane takes at a time; its warps take rows in turn
//!   and their sums are added in order. [`ColumnSums`](super::column_sums::ColumnSums) then adds the parts in order.
//! - Rows of a multiple of 8 elements are read 8 at a time, others one by one (`vector`).
//! - Traffic: forward reads and writes each element once; the input's gradient reads two and writes one; the weight's
//!   reads two. Bound by memory.
//! - Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

use super::{VECTOR, load_part, store_part};
use crate::asm::{Assembler, Description, F32, LANES, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;

/// The normalised rows, and the inverse root of each.
///
/// Parameters: `output` (`[rows, width]`), `inverse_roots` (f32 `[rows]`; both written), `input` (`[rows, width]`), `weight`
/// (`[width]`), `epsilon` (f32), `rows`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormForward {
    /// Type of input and output.
    pub element: Element,
    /// Type of the weight.
    pub weight: Element,
    /// The width is a multiple of 8.
    pub vector: bool,
}

/// The gradient of the input.
///
/// Parameters: `input_gradient` (`[rows, width]`, written), `gradient`, `input` (`[rows, width]`), `weight` (`[width]`),
/// `inverse_roots` (f32 `[rows]`), `rows`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormInputGradient {
    /// Type of input and gradients.
    pub element: Element,
    /// Type of the weight.
    pub weight: Element,
    /// The width is a multiple of 8.
    pub vector: bool,
}

/// The gradient of the weight, summed over parts of the rows.
///
/// Parameters: `sums` (f32 `[parts, width]`, written), `gradient`, `input` (`[rows, width]`), `inverse_roots` (f32 `[rows]`),
/// `rows`, `width`, `part_rows` (u32: rows of a part).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormWeightGradient {
    /// Type of input and gradient.
    pub element: Element,
    /// The width is a multiple of 8.
    pub vector: bool,
}

/// Blocks for [`RmsNormForward`] and [`RmsNormInputGradient`] over so many rows.
pub fn rows_grid(rows: u32) -> Option<[u32; 3]> {
    Some([rows.div_ceil(WARPS), 1, 1])
}

/// Whether rows of this width take the `vector` kernels.
pub fn takes_vectors(width: u32) -> bool {
    width.is_multiple_of(VECTOR)
}

impl RmsNormWeightGradient {
    /// How many parts so many rows are best split into, and the rows of each.
    pub fn parts(rows: u32) -> (u32, u32) {
        const LEAST: u32 = 64;
        const MOST: u32 = 128;
        let part_rows = rows.div_ceil(MOST).max(LEAST);
        (rows.div_ceil(part_rows).max(1), part_rows)
    }

    /// Blocks for rows of this width in so many parts.
    pub fn grid(&self, width: u32, parts: u32) -> Option<[u32; 3]> {
        (parts <= 65_535).then_some([width.div_ceil(LANES * lane_elements(self.vector)), parts, 1])
    }
}

impl KernelSource for RmsNormForward {
    fn build(&self) -> Kernel {
        let Self { element, weight: weight_element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("rms_norm_forward_{element}_{weight_element}{}", suffix(vector)),
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
            let step = lane_elements(vector);
            let first = (k.lane() * step).named("first");

            k.comment("the sum of squares");
            let total = k.variable(0.0f32).named("total");
            k.for_(first, width, LANES * step, |column| {
                let values = load_part(input.at(column), vector);
                total.set(total.get() + products(&values, &values));
            });
            let mean = k.warp_sum(total.get()).div(width.to_f32());
            let inverse_root = k.constant(1.0f32).div((mean + epsilon).root()).named("inverse_root");
            inverse_roots.at(row).store_if(k.lane().eq(0), inverse_root);

            k.comment("the result");
            k.for_(first, width, LANES * step, |column| {
                let (values, weights) = (load_part(input.at(column), vector), load_part(weight.at(column), vector));
                let results: Vec<_> = values
                    .iter()
                    .zip(&weights)
                    .map(|(value, weight)| {
                        let normal = *value * inverse_root;
                        let normal = if element == Element::Bf16 { normal.round_to_bf16() } else { normal };
                        normal * *weight
                    })
                    .collect();
                store_part(output.at(column), &results);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        element_pairs().into_iter().map(|(element, weight)| Self { element, weight, vector: true }).collect()
    }
}

impl KernelSource for RmsNormInputGradient {
    fn build(&self) -> Kernel {
        let Self { element, weight: weight_element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("rms_norm_input_gradient_{element}_{weight_element}{}", suffix(vector)),
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
            let step = lane_elements(vector);
            let first = (k.lane() * step).named("first");
            // The gradient of the normalised values, and the input.
            let load = |column| {
                let (gradients, weights) =
                    (load_part(gradient.at(column), vector), load_part(weight.at(column), vector));
                let through: Vec<_> = gradients.iter().zip(&weights).map(|(g, weight)| *g * *weight).collect();
                (through, load_part(input.at(column), vector))
            };

            k.comment("the mean of gradient * weight * input");
            let total = k.variable(0.0f32).named("total");
            k.for_(first, width, LANES * step, |column| {
                let (through, values) = load(column);
                total.set(total.get() + products(&through, &values));
            });
            let mean = k.warp_sum(total.get()).div(width.to_f32());
            let factor = (inverse_root * inverse_root * mean).named("factor");

            k.comment("the result");
            k.for_(first, width, LANES * step, |column| {
                let (through, values) = load(column);
                let results: Vec<_> = through
                    .iter()
                    .zip(&values)
                    .map(|(through, value)| inverse_root * (-*value).fma(factor, *through))
                    .collect();
                store_part(input_gradient.at(column), &results);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        element_pairs().into_iter().map(|(element, weight)| Self { element, weight, vector: true }).collect()
    }
}

impl KernelSource for RmsNormWeightGradient {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("rms_norm_weight_gradient_{element}{}", suffix(vector)),
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
            let step = lane_elements(vector);
            let columns = LANES * step;
            let (thread, warp) = (k.thread().named("thread"), k.warp().named("warp"));
            let first_column = (k.block() * columns).named("first_column");
            let part = k.block_y().named("part");
            let begin = (part * part_rows).named("begin");
            let end = (begin + part_rows).min(rows).named("end");

            k.comment("each warp sums every eighth row of the part");
            let within = k.lane() * step;
            let column = (first_column + within).named("column");
            let totals: Vec<_> = (0..step).map(|_| k.variable(0.0f32)).collect();
            k.if_(column.lt(width), || {
                k.for_(begin + warp, end, WARPS, |row| {
                    let inverse_root = inverse_roots.at(row).load();
                    let gradients = load_part(gradient.from_row(row, width).at(column), vector);
                    let values = load_part(input.from_row(row, width).at(column), vector);
                    for (total, (gradient, value)) in totals.iter().zip(gradients.iter().zip(&values)) {
                        total.set(gradient.fma(*value * inverse_root, total.get()));
                    }
                });
            });

            k.comment("the warps' sums, in order");
            let scratch = k.shared(Element::F32, WARPS * columns);
            let totals: Vec<_> = totals.iter().map(|total| total.get()).collect();
            store_part(scratch.at(warp.mad(columns, within)), &totals);
            k.barrier();
            let column = first_column + thread;
            k.return_if(column.ge(width));
            k.if_(thread.lt(columns), || {
                let place = scratch.at(thread);
                let total =
                    (1..WARPS).fold(place.load(), |total, warp| total + place.plus(i64::from(warp * columns)).load());
                sums.from_row(part, width).at(column).store(total);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element, vector: true })
    }
}

/// Elements that a lane takes at a time.
fn lane_elements(vector: bool) -> u32 {
    if vector { VECTOR } else { 1 }
}

fn suffix(vector: bool) -> &'static str {
    if vector { "" } else { "_scalar" }
}

/// The types of activations and weight that occur together: weights are kept in f32 while they are trained.
fn element_pairs() -> [(Element, Element); 3] {
    [(Element::F32, Element::F32), (Element::Bf16, Element::F32), (Element::Bf16, Element::Bf16)]
}

/// `Σ aᵢ bᵢ`.
fn products<'a>(a: &[Value<'a, F32>], b: &[Value<'a, F32>]) -> Value<'a, F32> {
    let mut pairs = a.iter().zip(b);
    match pairs.next() {
        Some((a, b)) => pairs.fold(*a * *b, |sum, (a, b)| a.fma(*b, sum)),
        None => unreachable!("a lane takes at least one element"),
    }
}
