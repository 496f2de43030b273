//! Rows of a table by index, and the table's gradient.
//!
//! - Forward: `output[t] = weight[ids[t]]`; an id outside the vocabulary gives a row of NaN, so that it shows in every
//!   result that depends on it.
//! - Backward: `weight_gradient[id] = Σ gradient[t]` over the tokens of that id, in their order, without atomics, and zero
//!   for ids that do not occur. [`EmbeddingOrder`] sorts tokens by id: each block counts, for its ids, how many tokens each
//!   of its warps has in its share of all tokens, adds these counts up in order, and then walks the tokens again and places
//!   them. Tokens of one id in one step of a warp are found by comparing the ids' bits across its lanes, so that it makes
//!   no difference how often an id occurs. [`EmbeddingBackward`] writes the whole gradient but the rows of ids that occur
//!   more than 64 times, which [`EmbeddingRepeated`] sums by whole blocks: thousands of tokens of padding take little
//!   longer than as many others.
//! - Layout, forward: one warp per token and 4 groups of columns for each of its lanes, 1024 columns of bf16; rows of a
//!   multiple of 8 elements are taken 16 bytes of the wider type at a time, others one by one (`vector`). Backward: one warp
//!   per id and 1024 columns, each lane 8 groups of 4 neighbouring columns (of one, where the width is no multiple of 4), so
//!   that accesses of the f32 gradient are whole; neighbouring warps take neighbouring columns of a row, then the next row, so
//!   that the gradient is written from its beginning to its end. The sort: one block per 512 ids, one thread per id where counts
//!   are added up.
//! - Traffic: forward, every token's row is read once and written once. Backward, every token's row is read once, every
//!   row of the weight's gradient written once. Bound by memory.

use super::{VECTOR, lanes_of, store_part};
use crate::asm::{Assembler, Description, F32, Global, LANES, Pred, U32, Value, unpack};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;
/// Groups of neighbouring columns of a lane of the forward pass, all of them on their way at a time.
const GROUPS: u32 = 4;
/// Neighbouring columns that a lane of the backward pass takes at a time.
const COLUMNS: u32 = 4;
/// Groups of columns of a lane of the backward pass.
const PARTS: u32 = 8;
/// Occurrences of an id beyond which a block sums them.
const MANY: u32 = 64;
/// Rows that each warp has on their way where a block sums.
const AHEAD: u32 = 8;
/// Places of `repeated` that such a block looks at: with one each, blocks without work took 15 µs at 16,384 tokens and 5120
/// columns on an H200.
const PLACES: u32 = 8;
/// Ids that a block of the sort takes, one per thread.
const IDS: u32 = 512;
const SORT_WARPS: u32 = IDS / LANES;
/// Times [`LANES`] tokens that each warp of the sort has on their way. Each is a copy of the loop's text, and long texts are
/// slow here: one with 16, all of whose ballots came first, took 44 µs instead of 17 for 16,384 tokens and 131,072 ids on an
/// H100.
const SORT_AHEAD: u32 = 8;
/// The most tokens and ids that are sorted: sums of two of them are numbers of 32 bits.
const MOST_SORTED: u32 = 1 << 30;

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

/// Sorts tokens by id, those of one id in their order; ids outside the vocabulary come last.
///
/// Parameters: `order` (u32 `[tokens]`: the sorted tokens), `runs` (u32 `[2, vocabulary]`: where each id's tokens begin in the
/// order, and where they end), `repeated` (u32 `[tokens / 64, rounded up]`: the id that occurs more than 64 times and whose
/// tokens' first place that is a multiple of 64 is this multiple, 2³² − 1 where there is none; all written), `ids` (u32
/// `[tokens]`), `tokens`, `vocabulary` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingOrder;

/// Sums the gradients of each id. Ids outside the vocabulary are left out.
///
/// Parameters: `weight_gradient` (f32 `[vocabulary, width]`, written but for ids of more than 64 tokens), `gradient`
/// (`[tokens, width]`), `order` (u32 `[tokens]`), `runs` (u32 `[2, vocabulary]`), `vocabulary`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingBackward {
    /// Type of the output's gradient.
    pub gradient: Element,
    /// The width is a multiple of 4.
    pub vector: bool,
}

/// Sums the gradients of each id that more than 64 tokens have.
///
/// Parameters: `weight_gradient` (f32 `[vocabulary, width]`, written for such ids), `gradient` (`[tokens, width]`), `order`,
/// `runs`, `repeated` (u32, as [`EmbeddingOrder`] writes them), `tokens`, `vocabulary`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingRepeated {
    /// Type of the output's gradient.
    pub gradient: Element,
    /// The width is a multiple of 4.
    pub vector: bool,
}

impl EmbeddingForward {
    /// The kernel for rows of this width.
    pub fn new(weight: Element, output: Element, width: u32) -> Self {
        Self { weight, output, vector: width.is_multiple_of(VECTOR) }
    }

    /// Blocks for so many tokens; `None` when one launch cannot cover them.
    pub fn grid(&self, tokens: u32, width: u32) -> Option<[u32; 3]> {
        let parts = width.div_ceil(GROUPS * LANES * self.elements());
        let blocks = (u64::from(tokens) * u64::from(parts)).div_ceil(WARPS.into());
        // Warps are counted in 32 bits.
        (blocks <= u64::from(u32::MAX / WARPS)).then_some([blocks as u32, 1, 1])
    }

    /// Neighbouring columns that a lane takes at a time.
    fn elements(&self) -> u32 {
        let widest = if self.weight == Element::F32 { self.weight } else { self.output };
        if self.vector { lanes_of(widest) } else { 1 }
    }
}

impl EmbeddingOrder {
    /// Blocks for so many tokens and ids; `None` beyond 2³⁰ of either.
    pub fn grid(tokens: u32, vocabulary: u32) -> Option<[u32; 3]> {
        // What lies outside the vocabulary counts as one more id.
        (tokens.max(vocabulary) <= MOST_SORTED).then_some([(vocabulary + 1).div_ceil(IDS), 1, 1])
    }

    /// The length of `repeated`.
    pub fn repeated(tokens: u32) -> u32 {
        tokens.div_ceil(MANY)
    }
}

impl EmbeddingBackward {
    /// The kernel for rows of this width.
    pub fn new(gradient: Element, width: u32) -> Self {
        Self { gradient, vector: width.is_multiple_of(COLUMNS) }
    }

    /// Blocks for tables of this size; `None` when one launch cannot cover them.
    pub fn grid(&self, vocabulary: u32, width: u32) -> Option<[u32; 3]> {
        let warps = u64::from(vocabulary) * u64::from(width.div_ceil(PARTS * LANES * columns(self.vector)));
        // Warps are counted in 32 bits.
        let blocks = warps.div_ceil(WARPS.into());
        (blocks <= u64::from(u32::MAX / WARPS)).then_some([blocks as u32, 1, 1])
    }
}

impl EmbeddingRepeated {
    /// The kernel for rows of this width.
    pub fn new(gradient: Element, width: u32) -> Self {
        Self { gradient, vector: width.is_multiple_of(COLUMNS) }
    }

    /// Blocks for so many tokens and columns; `None` when one launch cannot cover them.
    pub fn grid(&self, tokens: u32, width: u32) -> Option<[u32; 3]> {
        // A run of more than MANY places has one that is a multiple of it.
        let parts = width.div_ceil(LANES * columns(self.vector));
        (parts <= 65_535).then_some([tokens.div_ceil(MANY * PLACES), parts, 1])
    }
}

impl KernelSource for EmbeddingForward {
    fn build(&self) -> Kernel {
        let Self { weight: weight_element, output: output_element, vector } = *self;
        let bytes = (weight_element.bytes() + output_element.bytes()) as u64;
        let description = Description {
            name: format!("embedding_forward_{weight_element}_to_{output_element}{}", suffix(vector)),
            summary: "output[t] = weight[ids[t]], NaN for an id outside the vocabulary; one warp per token and part of its row".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens", "width"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0] * sizes[1] + 4 * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (output, ids) = (k.write("output", output_element), k.read("ids", Element::U32));
            let weight = k.read("weight", weight_element);
            let (tokens, vocabulary, width) = (k.u32("tokens"), k.u32("vocabulary"), k.u32("width"));
            let elements = self.elements();
            let part_columns = GROUPS * LANES * elements;
            let parts = (width + (part_columns - 1)) >> part_columns.ilog2();
            let index = k.block().mad(WARPS, k.warp());
            let token = index.div(parts).named("token");
            k.return_if(token.ge(tokens));
            let id = ids.at(token).load_u32().named("id");
            let known = id.lt(vocabulary);
            let (row, output) = (weight.from_row(id, width), output.from_row(token, width));
            let first = (index - token * parts).mad(part_columns, k.lane() * elements).named("first");
            let loaded: Vec<_> = (0..GROUPS)
                .map(|group| {
                    let column = first + group * LANES * elements;
                    let (inside, place) = (column.lt(width), row.at(column));
                    let values = if vector {
                        let words = elements as usize * weight_element.bytes() / 4;
                        unpack(weight_element, &place.load_words_if(inside & known, words))
                    } else {
                        vec![place.load_if(inside & known, 0.0)]
                    };
                    (column, inside, values)
                })
                .collect();
            for (column, inside, values) in loaded {
                let values: Vec<_> = values.into_iter().map(|value| known.select(value, f32::NAN)).collect();
                k.if_(inside, || store_part(output.at(column), &values));
            }
        })
    }

    fn configurations() -> Vec<Self> {
        let all = |vector| {
            super::float_elements(|output| super::float_elements(|weight| Self { weight, output, vector })).concat()
        };
        [all(true), all(false)].concat()
    }
}

impl KernelSource for EmbeddingOrder {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "embedding_order".to_owned(),
            summary: format!(
                "sorts tokens by id, stably: {IDS} ids per block, which counts and then places their tokens; each of its \
                 {SORT_WARPS} warps has its own share of all tokens"
            ),
            block: [IDS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens", "vocabulary"],
            work: |sizes: &[u64]| Work {
                bytes: 8 * (sizes[0] + sizes[1]),
                operations: 4 * sizes[0] * (sizes[1] + 1).div_ceil(u64::from(IDS)),
            },
        };
        Assembler::assemble(description, |k| {
            let [order, runs, repeated] = ["order", "runs", "repeated"].map(|name| k.write(name, Element::U32));
            let (ids, tokens, vocabulary) = (k.read("ids", Element::U32), k.u32("tokens"), k.u32("vocabulary"));
            let (lane, warp) = (k.lane().named("lane"), k.warp().named("warp"));
            let first_id = (k.block() * IDS).named("first_id");
            // By warp and id: tokens, and then the place of the next.
            let counters = k.shared(Element::U32, SORT_WARPS * IDS);
            let by_warp: Vec<_> =
                (0..SORT_WARPS).map(|warp| counters.at(k.thread()).plus(i64::from(warp * IDS))).collect();
            by_warp.iter().for_each(|counter| counter.store_u32(0));
            let own = counters.at(warp * IDS);
            let share = ((tokens + (IDS - 1)) >> IDS.ilog2()) * LANES;
            let first = (warp * share).named("first");
            let end = (first + share).min(tokens).named("end");
            let before = k.variable(0u32).named("before");
            let walk = |places: bool| {
                k.for_(first, end, SORT_AHEAD * LANES, |group| {
                    let read: Vec<_> = (0..SORT_AHEAD)
                        .map(|ahead| {
                            let token = group + (lane + ahead * LANES);
                            let exists = token.lt(end);
                            (token, exists, ids.at(token).load_u32_if(exists, u32::MAX))
                        })
                        .collect();
                    for (token, exists, id) in read {
                        let id = id.min(vocabulary);
                        if !places {
                            before.set(before.get() + id.lt(first_id).select::<U32>(1u32, 0u32));
                        }
                        let within = id - first_id;
                        let here = exists & within.lt(IDS);
                        k.if_(k.any(here), || {
                            let same = same_numbers(k, here, within, IDS.ilog2());
                            let earlier = (same & ((k.constant(1u32) << lane) - 1)).count_ones();
                            let counter = own.moved(here.select::<U32>(within, 0u32) * 4);
                            let next = counter.load_u32();
                            k.warp_barrier();
                            counter.store_u32_if(here & earlier.eq(0), next + same.count_ones());
                            k.warp_barrier();
                            if places {
                                order.at(next + earlier).store_u32_if(here, token);
                            }
                        });
                    }
                });
            };
            k.barrier();
            k.comment("how many tokens each warp has of each id, and how many have a lesser id");
            walk(false);

            k.comment("each id's number of tokens; the sum of those of lesser ids, over lanes, warps and other blocks");
            let sums = k.shared(Element::U32, 2 * SORT_WARPS);
            let lesser = (0..LANES.ilog2()).fold(before.get(), |sum, bit| sum + k.shuffle_xor(sum, 1 << bit));
            k.barrier();
            let counts: Vec<_> = by_warp.iter().map(|counter| counter.load_u32()).collect();
            let total = counts.iter().copied().reduce(|sum, count| sum + count).unwrap_or(lesser).named("total");
            let through = (0..LANES.ilog2()).fold(total, |sum, bit| {
                let below = k.shuffle_up(sum, 1 << bit);
                sum + lane.ge(1 << bit).select::<U32>(below, 0u32)
            });
            let last = lane.eq(LANES - 1);
            sums.at(warp).store_u32_if(last, through);
            sums.at(warp).plus(i64::from(SORT_WARPS)).store_u32_if(last, lesser);
            k.barrier();
            let parts = sums.first().load_words(2 * SORT_WARPS as usize);
            let (of_warps, lesser) = parts.split_at(SORT_WARPS as usize);
            let begin = of_warps.iter().zip(0..).fold(through - total, |sum, (&part, other)| {
                sum + warp.gt(other).select::<U32>(part, 0u32)
            });
            let begin = lesser.iter().fold(begin, |sum, &part| sum + part).named("begin");
            let next = k.variable(begin);
            for (counter, count) in by_warp.iter().zip(counts) {
                counter.store_u32(next.get());
                next.set(next.get() + count);
            }
            let end = (begin + total).named("end");
            let id = (first_id + k.thread()).named("id");
            let known = id.lt(vocabulary);
            runs.at(id).store_u32_if(known, begin);
            runs.from(vocabulary.wide()).at(id).store_u32_if(known, end);
            let [first_slot, end_slot] = [begin, end].map(|place| (place + (MANY - 1)) >> MANY.ilog2());
            let taken = (known & total.gt(MANY)).select::<U32>(id, u32::MAX);
            k.for_(first_slot, end_slot, 1, |slot| {
                repeated.at(slot).store_u32(slot.eq(first_slot).select::<U32>(taken, u32::MAX));
            });
            k.barrier();

            k.comment("the tokens to their places");
            walk(true);
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
            summary: format!(
                "weight_gradient[id] = sum of gradient[t] over the at most {MANY} tokens of that id, in their order; one \
                 warp per id and part of its row"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens", "vocabulary", "width"],
            work: move |sizes: &[u64]| Work {
                bytes: (bytes * sizes[0] + 4 * sizes[1]) * sizes[2] + 4 * sizes[0] + 8 * sizes[1],
                operations: sizes[0] * sizes[2],
            },
        };
        Assembler::assemble(description, |k| {
            let weight_gradient = k.write("weight_gradient", Element::F32);
            let gradient = k.read("gradient", gradient_element);
            let [order, runs] = ["order", "runs"].map(|name| k.read(name, Element::U32));
            let (vocabulary, width) = (k.u32("vocabulary"), k.u32("width"));
            // Neighbouring warps write neighbouring columns.
            let columns = columns(vector);
            let part_columns = PARTS * LANES * columns;
            let parts = (width + (part_columns - 1)) >> part_columns.ilog2();
            let index = k.block().mad(WARPS, k.warp());
            let id = index.div(parts).named("id");
            let part = index - id * parts;
            k.return_if(id.ge(vocabulary));
            let (begin, end) = run(runs, vocabulary, id);
            k.return_if((end - begin).gt(MANY));

            let first = (part.mad(PARTS * LANES, k.lane()) * columns).named("first");
            let parts: Vec<(Value<'_, U32>, Value<'_, Pred>)> = (0..PARTS)
                .map(|part| {
                    let column = first + part * LANES * columns;
                    (column, column.lt(width))
                })
                .collect();
            let totals: Vec<Vec<_>> =
                parts.iter().map(|_| (0..columns).map(|_| k.variable(0.0f32)).collect()).collect();
            k.for_(begin, end, 1, |place| {
                let row = gradient.from_row(order.at(place).load_u32(), width);
                let loaded: Vec<_> =
                    parts.iter().map(|(column, exists)| load_columns(row, *column, vector, *exists)).collect();
                for (total, value) in totals.iter().flatten().zip(loaded.into_iter().flatten()) {
                    total.set(total.get() + value);
                }
            });
            let target = weight_gradient.from_row(id, width);
            for ((column, exists), totals) in parts.iter().zip(&totals) {
                let totals: Vec<_> = totals.iter().map(|total| total.get()).collect();
                k.if_(*exists, || store_part(target.at(*column), &totals));
            }
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|gradient| [true, false].map(|vector| Self { gradient, vector })).concat()
    }
}

impl KernelSource for EmbeddingRepeated {
    fn build(&self) -> Kernel {
        let Self { gradient: gradient_element, vector } = *self;
        let description = Description {
            name: format!("embedding_repeated_{gradient_element}{}", suffix(vector)),
            summary: format!(
                "weight_gradient[id] = sum of gradient[t] over the more than {MANY} tokens of that id; a block for those whose \
                 run's first multiple of {MANY} is one of {PLACES}"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens", "width"],
            // What it reads and writes is counted by the kernel before it.
            work: |sizes: &[u64]| Work { bytes: 4 * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let weight_gradient = k.write("weight_gradient", Element::F32);
            let gradient = k.read("gradient", gradient_element);
            let [order, runs, repeated] = ["order", "runs", "repeated"].map(|name| k.read(name, Element::U32));
            let (tokens, vocabulary, width) = (k.u32("tokens"), k.u32("vocabulary"), k.u32("width"));
            let columns = columns(vector);
            let within = (k.lane() * columns).named("within");
            let column = k.block_y().mad(LANES * columns, within).named("column");
            let exists = column.lt(width);
            let scratch = k.shared(Element::F32, THREADS * columns);

            k.comment("the places at which there is an id, as bits: every warp finds the same");
            let places = repeated.from((k.block() * PLACES).wide());
            let count = (tokens + (MANY - 1)) >> MANY.ilog2();
            let there = k.lane().lt(PLACES) & (k.block().mad(PLACES, k.lane())).lt(count);
            let left = k.variable(k.ballot(places.at(k.lane()).load_u32_if(there, u32::MAX).lt(vocabulary)));
            let found = || left.get().ne(0);
            k.while_(found, || {
                let lowest = left.get() & (k.constant(0u32) - left.get());
                left.set(left.get() ^ lowest);
                let id = places.at((lowest - 1).count_ones()).load_u32().named("id");
                let (begin, end) = run(runs, vocabulary, id);

                k.comment("every eighth token");
                let totals: Vec<_> = (0..columns).map(|_| k.variable(0.0f32)).collect();
                k.for_(begin + k.warp(), end, WARPS * AHEAD, |place| {
                    let rows: Vec<_> = (0..AHEAD)
                        .map(|ahead| {
                            let place = place + ahead * WARPS;
                            let inside = place.lt(end);
                            let row = gradient.from_row(order.at(place).load_u32_if(inside, 0), width);
                            load_columns(row, column, vector, exists & inside)
                        })
                        .collect();
                    for row in rows {
                        for (total, value) in totals.iter().zip(row) {
                            total.set(total.get() + value);
                        }
                    }
                });

                k.comment("the warps' sums, in order");
                let totals: Vec<_> = totals.iter().map(|total| total.get()).collect();
                store_part(scratch.at(k.thread() * columns), &totals);
                k.barrier();
                k.if_(k.warp().eq(0) & exists, || {
                    let place = scratch.at(within);
                    let sums: Vec<_> = (0..columns)
                        .map(|lane| {
                            let of_warp = |warp| place.plus(i64::from(lane + warp * LANES * columns)).load();
                            (1..WARPS).fold(of_warp(0), |total, warp| total + of_warp(warp))
                        })
                        .collect();
                    store_part(weight_gradient.from_row(id, width).at(column), &sums);
                });
                // The scratch is free again.
                k.barrier();
            });
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|gradient| [true, false].map(|vector| Self { gradient, vector })).concat()
    }
}

/// Columns that a lane of the backward pass takes at a time.
fn columns(vector: bool) -> u32 {
    if vector { COLUMNS } else { 1 }
}

fn suffix(vector: bool) -> &'static str {
    if vector { "" } else { "_scalar" }
}

/// The lanes where the condition holds and that have the same number as this one, as bits; of `bits` bits each. All lanes
/// take part; it means nothing to those where the condition does not hold.
fn same_numbers<'a>(k: &'a Assembler, condition: Value<'a, Pred>, number: Value<'a, U32>, bits: u32) -> Value<'a, U32> {
    (0..bits).fold(k.ballot(condition), |same, bit| {
        let set = (number & (1 << bit)).ne(0);
        let lanes = k.ballot(set);
        same & set.select::<U32>(lanes, lanes ^ u32::MAX)
    })
}

/// Where the tokens of an id lie in the order: the first place, and the one after the last.
fn run<'a>(runs: Global<'a>, vocabulary: Value<'a, U32>, id: Value<'a, U32>) -> (Value<'a, U32>, Value<'a, U32>) {
    let begin = runs.at(id).load_u32().named("begin");
    (begin, runs.from(vocabulary.wide()).at(id).load_u32().named("end"))
}

/// A lane's neighbouring columns of a row, zeros where the condition does not hold.
fn load_columns<'a>(
    row: Global<'a>,
    column: Value<'a, U32>,
    vector: bool,
    exists: Value<'a, Pred>,
) -> Vec<Value<'a, F32>> {
    let place = row.at(column);
    if !vector {
        return vec![place.load_if(exists, 0.0)];
    }
    let words = place.load_words_if(exists, row.element().bytes() * COLUMNS as usize / 4);
    match row.element() {
        Element::Bf16 => words.into_iter().flat_map(Value::unpack_bf16).collect(),
        _ => words.into_iter().map(Value::as_f32).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Element, EmbeddingBackward, EmbeddingRepeated};

    #[test]
    fn grids_cover_tables_as_far_as_warps_can_be_counted() {
        let backward = |vocabulary, width| EmbeddingBackward::new(Element::Bf16, width).grid(vocabulary, width);
        // Five warps a row of 5120, one of 576; of 577, which is no multiple of 4, three.
        assert_eq!(backward(131_072, 5120), Some([81_920, 1, 1]));
        assert_eq!(backward(49_152, 576), Some([6144, 1, 1]));
        assert_eq!(backward(8, 577), Some([3, 1, 1]));
        assert_eq!(backward(0, 8), Some([0, 1, 1]));
        assert_eq!(backward(u32::MAX - 7, 8), Some([u32::MAX / 8, 1, 1]));
        assert_eq!(backward(u32::MAX, 8), None);
        assert_eq!(backward(1 << 30, 5120), None);
        let repeated = |tokens, width| EmbeddingRepeated::new(Element::Bf16, width).grid(tokens, width);
        assert_eq!(repeated(16_384, 5120), Some([32, 40, 1]));
        assert_eq!(repeated(513, 33), Some([2, 2, 1]));
        assert_eq!(repeated(0, 8), Some([0, 1, 1]));
        assert_eq!(repeated(1, 65_536 * 128), None);
    }
}
