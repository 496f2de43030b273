//! Rows of a table by index, and the table's gradient.
//!
//! - Forward: `output[t] = weight[ids[t]]`; an id outside the vocabulary gives a row of NaN, so that it shows in every
//!   result that depends on it.
//! - Backward: `weight_gradient[id] = Σ gradient[t]` over the tokens of that id, in their order, without atomics.
//!   [`EmbeddingOrder`] gives every token its rank when tokens are sorted by id, found by comparing it with all tokens:
//!   `tokens²` comparisons, 0.3·10⁹ for 16,384 tokens, which take less time than any sort in several passes.
//!   [`EmbeddingBackward`] then sums each run of equal ids. Rows of ids that do not occur stay as they are (zero).
//! - Layout: one warp per token; rows of a multiple of 8 elements are read 8 at a time, others one by one (`vector`).
//!   Backward: one warp per run and 32 times as many columns as a lane takes; warps that stand inside a run end at once.
//! - Traffic: every token's row is read once, and written once by the forward pass. Bound by memory.

use super::{VECTOR, load_part, store_part};
use crate::asm::{Assembler, Description, LANES, U32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;
/// Rows that a warp of the backward pass has on their way at a time.
const AHEAD: u32 = 4;

/// Looks rows up.
///
/// Parameters: `output` (`[tokens, width]`, written), `ids` (u32 `[tokens]`), `weight` (`[vocabulary, width]`), `tokens`,
/// `vocabulary`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingForward {
    /// Type of the table.
    pub weight: Element,
    /// Type of the output.
    pub output: Element,
    /// The width is a multiple of 8.
    pub vector: bool,
}

/// Sorts tokens by id, those of one id in their order.
///
/// Parameters: `order` (u32 `[tokens]`: the sorted tokens), `runs` (u32 `[tokens]`: the length of the run of equal ids that
/// begins at this place of the order, 0 inside a run; both written), `ids` (u32 `[tokens]`), `tokens` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingOrder;

/// Sums the gradients of each id. Ids outside the vocabulary are left out.
///
/// Parameters: `weight_gradient` (f32 `[vocabulary, width]`, written where ids occur), `gradient` (`[tokens, width]`), `ids`,
/// `order`, `runs` (u32 `[tokens]`), `tokens`, `vocabulary`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingBackward {
    /// Type of the output's gradient.
    pub gradient: Element,
    /// The width is a multiple of 8.
    pub vector: bool,
}

impl EmbeddingForward {
    /// The kernel for rows of this width.
    pub fn new(weight: Element, output: Element, width: u32) -> Self {
        Self { weight, output, vector: width.is_multiple_of(VECTOR) }
    }

    /// Blocks for so many tokens.
    pub fn grid(tokens: u32) -> Option<[u32; 3]> {
        Some([tokens.div_ceil(WARPS), 1, 1])
    }
}

impl EmbeddingOrder {
    /// Blocks for so many tokens.
    pub fn grid(tokens: u32) -> Option<[u32; 3]> {
        Some([tokens.div_ceil(WARPS), 1, 1])
    }
}

impl EmbeddingBackward {
    /// The kernel for rows of this width.
    pub fn new(gradient: Element, width: u32) -> Self {
        Self { gradient, vector: width.is_multiple_of(VECTOR) }
    }

    /// Blocks for so many tokens and columns; `None` when one launch cannot cover them.
    pub fn grid(&self, tokens: u32, width: u32) -> Option<[u32; 3]> {
        let parts = width.div_ceil(LANES * lane_elements(self.vector));
        (parts <= 65_535).then_some([tokens.div_ceil(WARPS), parts, 1])
    }
}

impl KernelSource for EmbeddingForward {
    fn build(&self) -> Kernel {
        let Self { weight: weight_element, output: output_element, vector } = *self;
        let bytes = (weight_element.bytes() + output_element.bytes()) as u64;
        let description = Description {
            name: format!("embedding_forward_{weight_element}_to_{output_element}{}", suffix(vector)),
            summary: "output[t] = weight[ids[t]], NaN for an id outside the vocabulary; one warp per token".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens", "width"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0] * sizes[1] + 4 * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (output, ids) = (k.write("output", output_element), k.read("ids", Element::U32));
            let weight = k.read("weight", weight_element);
            let (tokens, vocabulary, width) = (k.u32("tokens"), k.u32("vocabulary"), k.u32("width"));
            let token = k.block().mad(WARPS, k.warp()).named("token");
            k.return_if(token.ge(tokens));
            let id = ids.at(token).load_u32().named("id");
            let (row, output) = (weight.from_row(id, width), output.from_row(token, width));
            let elements = lane_elements(vector);
            let first = (k.lane() * elements).named("first");
            k.if_else(
                id.lt(vocabulary),
                || {
                    k.for_(first, width, LANES * elements, |column| {
                        store_part(output.at(column), &load_part(row.at(column), vector));
                    });
                },
                || {
                    let nothing = k.constant(f32::NAN);
                    k.for_(first, width, LANES * elements, |column| {
                        store_part(output.at(column), &vec![nothing; elements as usize]);
                    });
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|output| super::float_elements(|weight| Self { weight, output, vector: true })).concat()
    }
}

impl KernelSource for EmbeddingOrder {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "embedding_order".to_owned(),
            summary: "sorts tokens by id, stably: each token's rank by comparison with all; one warp per token"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens"],
            work: |sizes: &[u64]| Work { bytes: 12 * sizes[0], operations: 5 * sizes[0] * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let (order, runs) = (k.write("order", Element::U32), k.write("runs", Element::U32));
            let (ids, tokens) = (k.read("ids", Element::U32), k.u32("tokens"));
            let token = k.block().mad(WARPS, k.warp()).named("token");
            k.return_if(token.ge(tokens));
            let id = ids.at(token).load_u32().named("id");
            let [less, equal, before] = ["less", "equal", "before"].map(|name| k.variable(0u32).named(name));
            k.for_(k.lane(), tokens, LANES, |other| {
                let other_id = ids.at(other).load_u32();
                let same = other_id.eq(id);
                for (count, counts) in [(less, other_id.lt(id)), (equal, same), (before, same & other.lt(token))] {
                    count.set(count.get() + counts.select::<U32>(1, 0));
                }
            });
            let [less, equal, before] = [less, equal, before].map(|count| warp_sum(k, count.get()));
            let rank = less + before;
            let first_lane = k.lane().eq(0);
            order.at(rank).store_u32_if(first_lane, token);
            runs.at(rank).store_u32_if(first_lane, before.eq(0).select::<U32>(equal, 0));
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self]
    }
}

impl KernelSource for EmbeddingBackward {
    fn build(&self) -> Kernel {
        let Self { gradient: gradient_element, vector } = *self;
        let bytes = gradient_element.bytes() as u64;
        let description = Description {
            name: format!("embedding_backward_{gradient_element}{}", suffix(vector)),
            summary:
                "weight_gradient[id] = sum of gradient[t] over the tokens of that id, in their order; one warp per id"
                    .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens", "width"],
            work: move |sizes: &[u64]| Work {
                bytes: bytes * sizes[0] * sizes[1] + 12 * sizes[0],
                operations: sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let weight_gradient = k.write("weight_gradient", Element::F32);
            let gradient = k.read("gradient", gradient_element);
            let [ids, order, runs] = ["ids", "order", "runs"].map(|name| k.read(name, Element::U32));
            let (tokens, vocabulary, width) = (k.u32("tokens"), k.u32("vocabulary"), k.u32("width"));
            let place = k.block().mad(WARPS, k.warp()).named("place");
            k.return_if(place.ge(tokens));
            let length = runs.at(place).load_u32().named("length");
            k.return_if(length.eq(0));
            let id = ids.at(order.at(place).load_u32()).load_u32().named("id");
            k.return_if(id.ge(vocabulary));
            let elements = lane_elements(vector);
            let column = (k.block_y().mad(LANES, k.lane()) * elements).named("column");
            k.return_if(column.ge(width));

            let totals: Vec<_> = (0..elements).map(|_| k.variable(0.0f32)).collect();
            let add = |rows: u32, first: Value<'_, U32>| {
                let parts: Vec<_> = (0..rows)
                    .map(|row| {
                        let token = order.at(first + row).load_u32();
                        load_part(gradient.from_row(token, width).at(column), vector)
                    })
                    .collect();
                for part in parts {
                    for (total, value) in totals.iter().zip(part) {
                        total.set(total.get() + value);
                    }
                }
            };
            let end = (place + length).named("end");
            let whole_end = (place + (length & !(AHEAD - 1))).named("whole_end");
            k.for_(place, whole_end, AHEAD, |first| add(AHEAD, first));
            k.for_(whole_end, end, 1, |first| add(1, first));
            let totals: Vec<_> = totals.iter().map(|total| total.get()).collect();
            store_part(weight_gradient.from_row(id, width).at(column), &totals);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|gradient| Self { gradient, vector: true })
    }
}

/// Elements that a lane takes at a time.
fn lane_elements(vector: bool) -> u32 {
    if vector { VECTOR } else { 1 }
}

fn suffix(vector: bool) -> &'static str {
    if vector { "" } else { "_scalar" }
}

/// The sum of counts over the warp.
fn warp_sum<'a>(k: &'a Assembler, count: Value<'a, U32>) -> Value<'a, U32> {
    [16, 8, 4, 2, 1].into_iter().fold(count, |sum, distance| sum + k.shuffle_xor(sum, distance))
}
