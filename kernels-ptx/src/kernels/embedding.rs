//! Rows of a table by index, and the table's gradient.
//!
//! - Forward: `output[t] = weight[ids[t]]`; an id outside the vocabulary gives a row of NaN, so that it shows in every
//!   result that depends on it.
//! - Backward: `weight_gradient[id] = Σ gradient[t]` over the tokens of that id, in their order, without atomics, and zero
//!   for ids that do not occur. [`EmbeddingOrder`] sorts tokens by id: a token's rank is the number of tokens before it,
//!   found by comparing it with all: `tokens²` comparisons of two instructions (ids are f32 there, and a difference that
//!   is kept between 0 and 1 counts), 0.3·10⁹ for 16,384 tokens, which take less time than a sort in several passes.
//!   [`EmbeddingRuns`] finds where each id's tokens lie in the order. [`EmbeddingBackward`] writes the whole gradient but
//!   the rows of ids that occur more than 64 times, which [`EmbeddingRepeated`] sums by whole blocks: thousands of tokens
//!   of padding take little longer than as many others.
//! - Layout, forward: one warp per token; rows of a multiple of 8 elements are read 8 at a time, others one by one
//!   (`vector`). Backward: one warp per id and 1024 columns, each lane 8 groups of 4 neighbouring columns (of one, where
//!   the width is no multiple of 4), so that accesses of the f32 gradient are whole.
//! - Traffic: forward, every token's row is read once and written once. Backward, every token's row is read once, every
//!   row of the weight's gradient written once. Bound by memory.

use super::{VECTOR, load_part, store_part};
use crate::asm::{Assembler, Description, F32, Global, LANES, Pred, U32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;
/// Neighbouring columns that a lane of the backward pass takes at a time.
const COLUMNS: u32 = 4;
/// Groups of columns of a lane of the backward pass.
const PARTS: u32 = 8;
/// Occurrences of an id beyond which a block sums them.
const MANY: u32 = 64;
/// Rows that each warp has on their way where a block sums.
const AHEAD: u32 = 8;
/// Ids that a block has in shared memory at a time.
const TILE: u32 = 2048;
/// Numbers of tokens and ids are whole in f32 up to here.
const MOST_WHOLE: u32 = 1 << 24;

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
/// Parameters: `order` (u32 `[tokens]`: the sorted tokens, written), `ids` (u32 `[tokens]`), `tokens`, `vocabulary` (u32,
/// both at most 2²⁴).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingOrder;

/// Finds the tokens of each id in the order.
///
/// Parameters: `runs` (u32 `[2, vocabulary]`: where each id's tokens begin, and where they end; written for ids that occur,
/// zero before), `ids`, `order` (u32 `[tokens]`), `tokens`, `vocabulary` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EmbeddingRuns;

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
/// Parameters: `weight_gradient` (f32 `[vocabulary, width]`, written for such ids), `gradient` (`[tokens, width]`), `ids`,
/// `order` (u32 `[tokens]`), `runs` (u32 `[2, vocabulary]`), `vocabulary`, `width` (u32).
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

    /// Blocks for so many tokens.
    pub fn grid(tokens: u32) -> Option<[u32; 3]> {
        Some([tokens.div_ceil(WARPS), 1, 1])
    }
}

impl EmbeddingOrder {
    /// Blocks for so many tokens; `None` beyond 2²⁴ tokens or ids.
    pub fn grid(tokens: u32, vocabulary: u32) -> Option<[u32; 3]> {
        (tokens.max(vocabulary) <= MOST_WHOLE).then_some([tokens.div_ceil(LANES), 1, 1])
    }
}

impl EmbeddingRuns {
    /// Blocks for so many tokens.
    pub fn grid(tokens: u32) -> Option<[u32; 3]> {
        Some([tokens.div_ceil(THREADS), 1, 1])
    }
}

impl EmbeddingBackward {
    /// The kernel for rows of this width.
    pub fn new(gradient: Element, width: u32) -> Self {
        Self { gradient, vector: width.is_multiple_of(COLUMNS) }
    }

    /// Blocks for tables of this size; `None` when one launch cannot cover them.
    pub fn grid(&self, vocabulary: u32, width: u32) -> Option<[u32; 3]> {
        let parts = width.div_ceil(PARTS * LANES * columns(self.vector));
        (parts <= 65_535).then_some([vocabulary.div_ceil(WARPS), parts, 1])
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
        (parts <= 65_535).then_some([tokens.div_ceil(MANY), parts, 1])
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
            summary:
                "sorts tokens by id, stably: each token's rank by comparison with all; one lane per token, each warp \
                      of a block an eighth of the others"
                    .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens"],
            work: |sizes: &[u64]| Work { bytes: 8 * sizes[0], operations: 2 * sizes[0] * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let order = k.write("order", Element::U32);
            let (ids, tokens, vocabulary) = (k.read("ids", Element::U32), k.u32("tokens"), k.u32("vocabulary"));
            let (lane, warp) = (k.lane().named("lane"), k.warp().named("warp"));
            let first = (k.block() * LANES).named("first");
            let token = (first + lane).named("token");
            let key_of = |token| key(ids, token, tokens, vocabulary);
            let key = key_of(token).named("key");
            let after = (key + 1.0).named("after");
            let tile = k.shared(Element::F32, TILE);

            k.comment("how many keys are less; of tokens of earlier blocks, less or equal");
            let counts: [_; 4] = std::array::from_fn(|_| k.variable(0.0f32));
            k.for_(0u32, tokens, TILE, |tile_first| {
                k.barrier();
                for part in 0..TILE / THREADS {
                    let place = k.thread() + part * THREADS;
                    tile.at(place).store(key_of(tile_first + place));
                }
                k.barrier();
                let part_first = warp * (TILE / WARPS);
                k.for_(0u32, TILE / WARPS, LANES, |group| {
                    let place = part_first + group;
                    let bound = (tile_first + place).lt(first).select::<F32>(after, key);
                    for vector in 0..LANES / 4 {
                        let others = tile.at(place).plus(i64::from(4 * vector)).load_vector::<4>();
                        for (count, other) in counts.iter().zip(others) {
                            count.set(count.get() + bound.sub_saturated(other));
                        }
                    }
                });
            });

            k.comment("the sum over the warps, and the block's own tokens of the same id");
            let [a, b, c, d] = counts.map(|count| count.get());
            let scratch = k.shared(Element::F32, THREADS);
            scratch.at(k.thread()).store((a + b) + (c + d));
            k.barrier();
            k.return_if(warp.ne(0));
            let mut rank = (0..WARPS)
                .map(|warp| scratch.at(lane).plus(i64::from(warp * LANES)).load())
                .fold(k.constant(0.0f32), |total, count| total + count);
            for other in 0..LANES {
                let same = k.shuffle_from(key, other).eq(key) & lane.gt(other);
                rank = rank + same.select::<F32>(1.0, 0.0);
            }
            order.at(rank.truncate()).store_u32_if(token.lt(tokens), token);
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self]
    }
}

impl KernelSource for EmbeddingRuns {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "embedding_runs".to_owned(),
            summary: "where the tokens of each id begin and end in the order; one thread per place of the order"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["tokens"],
            work: |sizes: &[u64]| Work { bytes: 16 * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (runs, ids, order) =
                (k.write("runs", Element::U32), k.read("ids", Element::U32), k.read("order", Element::U32));
            let (tokens, vocabulary) = (k.u32("tokens"), k.u32("vocabulary"));
            let place = k.global_thread(THREADS).named("place");
            k.return_if(place.ge(tokens));
            let id_at = |place| id_at(ids, order, place);
            let id = id_at(place).named("id");
            k.return_if(id.ge(vocabulary));
            let last = tokens - 1;
            let before = id_at(place.max(1u32) - 1);
            let after = id_at((place + 1).min(last));
            runs.at(id).store_u32_if(place.eq(0) | before.ne(id), place);
            runs.from(vocabulary.wide()).at(id).store_u32_if(place.eq(last) | after.ne(id), place + 1);
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
                 warp per id"
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
            let id = k.block().mad(WARPS, k.warp()).named("id");
            k.return_if(id.ge(vocabulary));
            let (begin, end) = run(runs, vocabulary, id);
            k.return_if((end - begin).gt(MANY));

            let columns = columns(vector);
            let first = (k.block_y().mad(PARTS * LANES, k.lane()) * columns).named("first");
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
                "weight_gradient[id] = sum of gradient[t] over the more than {MANY} tokens of that id; one block per id, \
                 which that of the first multiple of {MANY} in its run takes"
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
            let [ids, order, runs] = ["ids", "order", "runs"].map(|name| k.read(name, Element::U32));
            let (vocabulary, width) = (k.u32("vocabulary"), k.u32("width"));
            let place = (k.block() * MANY).named("place");
            let id = id_at(ids, order, place).named("id");
            k.return_if(id.ge(vocabulary));
            let (begin, end) = run(runs, vocabulary, id);
            k.return_if((end - begin).le(MANY) | (place - begin).ge(MANY));

            k.comment("every eighth token");
            let columns = columns(vector);
            let within = (k.lane() * columns).named("within");
            let column = k.block_y().mad(LANES * columns, within).named("column");
            let exists = column.lt(width);
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
            let scratch = k.shared(Element::F32, THREADS * columns);
            let totals: Vec<_> = totals.iter().map(|total| total.get()).collect();
            store_part(scratch.at(k.thread() * columns), &totals);
            k.barrier();
            k.return_if(k.warp().ne(0) | !exists);
            let place = scratch.at(within);
            let sums: Vec<_> = (0..columns)
                .map(|lane| {
                    let of_warp = |warp| place.plus(i64::from(lane + warp * LANES * columns)).load();
                    (1..WARPS).fold(of_warp(0), |total, warp| total + of_warp(warp))
                })
                .collect();
            store_part(weight_gradient.from_row(id, width).at(column), &sums);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|gradient| [true, false].map(|vector| Self { gradient, vector })).concat()
    }
}

/// Elements that a lane of the forward pass takes at a time.
fn lane_elements(vector: bool) -> u32 {
    if vector { VECTOR } else { 1 }
}

/// Columns that a lane of the backward pass takes at a time.
fn columns(vector: bool) -> u32 {
    if vector { COLUMNS } else { 1 }
}

fn suffix(vector: bool) -> &'static str {
    if vector { "" } else { "_scalar" }
}

/// What tokens are sorted by: the id, the size of the vocabulary for ids outside it, more than that where there is no token.
fn key<'a>(
    ids: Global<'a>,
    token: Value<'a, U32>,
    tokens: Value<'a, U32>,
    vocabulary: Value<'a, U32>,
) -> Value<'a, F32> {
    let exists = token.lt(tokens);
    let id = ids.at(token).load_u32_if(exists, 0).min(vocabulary);
    exists.select(id.to_f32(), f32::INFINITY)
}

/// The id of the token at a place of the order.
fn id_at<'a>(ids: Global<'a>, order: Global<'a>, place: Value<'a, U32>) -> Value<'a, U32> {
    ids.at(order.at(place).load_u32()).load_u32()
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
