//! Attention backward on tensor cores: bf16, head sizes 32, 64 and 128.
//!
//! - [`AttentionDelta`] gives `delta = Σ dO·O` per query; any element type and head size.
//! - [`AttentionQueryGradient`] is built like the forward kernel: a block has 64 queries of one head, and tiles of 64 keys
//!   and values go by.
//! - [`AttentionKeyGradients`] is its mirror image: a block has 64 keys and values of one key head, and tiles of queries and
//!   output gradients of all its query heads go by. Each warp holds the gradients of 16 keys; scores are formed
//!   transposed, so that they are the left side of the products that follow without leaving registers.
//! - Probabilities and their gradients are rounded to bf16 before the products that they enter.
//! - Traffic: as forward, with the output and its gradient. Bound by arithmetic.

use std::f32::consts::LOG2_E;

use super::forward::{HEAD_SIZES, KEYS, Stages, THREADS, lanes};
use super::tiles::Tiles;
use super::{Head, Problem, QUERIES, SIZES, elements, sees, visible_scores};
use crate::asm::{Assembler, Description, F32, U32, Value};
use crate::kernels::{VECTOR, float_elements, load_part};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Lanes that share a row of [`AttentionDelta`].
const DELTA_LANES: u32 = 8;
const DELTA_THREADS: u32 = 256;

/// `delta = Σ output · output gradient` over each head's elements.
///
/// Parameters: `delta` (written, f32 `[batch, heads, padded query time]`, 0 behind the last query), `output_gradient`,
/// `output` (`[batch, query time, heads, size]`), `rows` (batch · heads · padded query time), `query_time`, `heads`, `size`
/// (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionDelta {
    /// Type of output and gradient.
    pub element: Element,
    /// The head size is a multiple of 8.
    pub vector: bool,
}

/// The gradient of the queries.
///
/// Parameters: `query_gradient` (written), `output_gradient`, `query` (`[batch, query time, heads, size]`), `key`, `value`
/// (`[batch, key time, key heads, size]`), `log_sums` (of the forward kernel), `delta`, `first`, `bounds` (of
/// [`super::VisibleKeys`]), `query_time`, `key_time`, `heads`, `key_heads` (u32), `scale` (f32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionQueryGradient {
    /// Head size, one of [`HEAD_SIZES`].
    pub size: u32,
}

/// The gradients of keys and values.
///
/// Parameters: `key_gradient`, `value_gradient` (written), then as [`AttentionQueryGradient`] from `output_gradient` on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionKeyGradients {
    /// Head size, one of [`HEAD_SIZES`].
    pub size: u32,
}

impl AttentionDelta {
    /// The kernel for heads of this size.
    pub fn new(element: Element, size: u32) -> Self {
        Self { element, vector: size.is_multiple_of(VECTOR) }
    }

    /// Blocks for so many rows; `None` when one launch cannot cover them.
    pub fn grid(rows: u32) -> Option<[u32; 3]> {
        Some([rows.div_ceil(DELTA_THREADS / DELTA_LANES), 1, 1])
    }
}

impl KernelSource for AttentionDelta {
    fn build(&self) -> Kernel {
        let Self { element, vector } = *self;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("attention_delta_{element}{}", if vector { "" } else { "_scalar" }),
            summary: format!("sum of output * gradient over every head; {DELTA_LANES} lanes per query and head"),
            block: [DELTA_THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| {
                let (query, _) = elements(sizes);
                Work { bytes: 2 * bytes * query + 4 * query / sizes[5].max(1), operations: 2 * query }
            },
        };
        Assembler::assemble(description, |k| {
            let delta = k.write("delta", Element::F32);
            let (gradient, output) = (k.read("output_gradient", element), k.read("output", element));
            let (rows, query_time) = (k.u32("rows"), k.u32("query_time"));
            let (heads, size) = (k.u32("heads"), k.u32("size"));
            let lane = (k.thread() & (DELTA_LANES - 1)).named("lane");
            let row = (k.block() * (DELTA_THREADS / DELTA_LANES) + (k.thread() >> DELTA_LANES.ilog2())).named("row");
            let padded = (query_time + (QUERIES - 1)) & !(QUERIES - 1);
            let head_row = row.div(padded);
            let step = row - head_row * padded;
            let batch = head_row.div(heads);
            let head = head_row - batch * heads;
            let inside = row.lt(rows) & step.lt(query_time);
            let total = k.variable(0.0f32).named("total");
            k.if_(inside, || {
                let token = batch * query_time + step;
                let [gradient, output] =
                    [gradient, output].map(|memory| memory.from_row(token, heads * size).from_row(head, size));
                let part = if vector { VECTOR } else { 1 };
                k.for_(lane * part, size, DELTA_LANES * part, |index| {
                    let values = load_part(gradient.at(index), vector);
                    for (gradient, output) in values.into_iter().zip(load_part(output.at(index), vector)) {
                        total.set(gradient.fma(output, total.get()));
                    }
                });
            });
            let sum = k.lanes_sum(total.get(), DELTA_LANES);
            delta.at(row).store_if(row.lt(rows) & lane.eq(0), sum);
        })
    }

    fn configurations() -> Vec<Self> {
        float_elements(|element| Self { element, vector: true })
    }
}

impl KernelSource for AttentionQueryGradient {
    fn build(&self) -> Kernel {
        let size = self.size;
        let description = Description {
            name: format!("attention_query_gradient_{size}"),
            summary: format!(
                "gradient of the queries of attention, heads of {size} bf16; a block has {QUERIES} queries, tiles of {KEYS} keys"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: |sizes: &[u64]| {
                let (query, key) = elements(sizes);
                Work { bytes: 6 * query + 4 * key, operations: 6 * sizes[5] * visible_scores(sizes) }
            },
        };
        Assembler::assemble(description, |k| {
            let query_gradient = k.write("query_gradient", Element::Bf16);
            let [gradient, query, key, value] =
                ["output_gradient", "query", "key", "value"].map(|name| k.read(name, Element::Bf16));
            let (log_sums, delta) = (k.read("log_sums", Element::F32), k.read("delta", Element::F32));
            let (first, bounds) = (k.read("first", Element::U32), k.read("bounds", Element::U32));
            let problem = Problem::declare(k);
            let scale = k.f32("scale");
            let scale_base_2 = (scale * LOG2_E).named("scale_base_2");

            k.comment("this block's head and tile; the last tiles have the most keys");
            let head_row = k.block().named("head_row");
            let batch = head_row.div(problem.heads).named("batch");
            let head = (head_row - batch * problem.heads).named("head");
            let tile = (problem.tiles - 1 - k.block_y()).named("tile");
            let first_query = (tile * QUERIES).named("first_query");
            let position = (problem.offset + first_query).named("position");
            let constant_size = k.constant::<U32>(size);
            let of_query =
                |memory| Head::new(memory, [batch, problem.query_time], [head, problem.heads], constant_size);
            let of_key = |memory| {
                let head = head.div(problem.group);
                Head::new(memory, [batch, problem.key_time], [head, problem.key_heads], constant_size)
            };
            let (query, gradient, query_gradient) = (of_query(query), of_query(gradient), of_query(query_gradient));
            let (key, value) = (of_key(key), of_key(value));

            k.comment("the keys that any query of the tile sees");
            let [least, greatest] = problem.bounds(bounds, batch, tile);
            let begin = (least & !(KEYS - 1)).named("keys_begin");
            let end = (position + QUERIES).min(problem.key_time).named("keys_end");

            let tiles = Tiles::new(k, size, THREADS);
            let stages = Stages::new(k, size);
            let (queries, gradients) =
                (k.shared(Element::Bf16, QUERIES * size), k.shared(Element::Bf16, QUERIES * size));
            let (keys, values) = (k.shared(Element::Bf16, 2 * KEYS * size), k.shared(Element::Bf16, 2 * KEYS * size));
            let copy = |at: Value<'_, U32>, stage: Value<'_, U32>| {
                tiles.copy(KEYS, key, at, problem.key_time, keys.first().moved(stage));
                tiles.copy(KEYS, value, at, problem.key_time, values.first().moved(stage));
                k.commit_copies();
            };
            tiles.copy(QUERIES, query, first_query, problem.query_time, queries.first());
            tiles.copy(QUERIES, gradient, first_query, problem.query_time, gradients.first());
            copy(begin, stages.current());
            let of_warp = (k.warp() * (16 * size)) << 1;
            let (queries, gradients) = (queries.first().moved(of_warp), gradients.first().moved(of_warp));

            k.comment("per half of this lane's rows: first visible key, log-sum-exp, delta");
            let row = first_query + tiles.sums_row();
            let firsts = problem.per_query(first, batch).at(row);
            let firsts = [firsts.load_u32(), firsts.plus(8).load_u32()];
            let positions = [position + tiles.sums_row(), position + tiles.sums_row() + 8];
            let halves = |values| {
                let place = problem.per_query(values, head_row).at(row);
                [place.load(), place.plus(8).load()]
            };
            let (log_sums, deltas) = (halves(log_sums), halves(delta));
            let sums = tiles.zeros(size / 8);

            k.comment("one tile of keys after the other");
            k.for_(begin, end, KEYS, |at| {
                k.wait_copies(0);
                k.barrier();
                k.if_((at + KEYS).lt(end), || copy(at + KEYS, stages.other()));
                let (keys, values) = (keys.first().moved(stages.current()), values.first().moved(stages.current()));
                let scores = tiles.product_transposed(|step| tiles.left(queries, 0, step), keys, KEYS);
                for half in 0..2 {
                    let less = -log_sums[half];
                    for (_, (score, _)) in lanes(&scores, half) {
                        score.set(score.get().fma(scale_base_2, less).exp2_flushed());
                    }
                }
                k.comment("keys that a query does not see");
                k.if_((at + (KEYS - 1)).gt(position) | at.lt(greatest), || {
                    let column = at + tiles.sums_column();
                    for (half, (first, position)) in firsts.into_iter().zip(positions).enumerate() {
                        for (index, (score, lane)) in lanes(&scores, half) {
                            let seen = sees(column + (index * 8 + lane), first, position);
                            score.set(seen.select(score.get(), 0.0));
                        }
                    }
                });
                let slopes = tiles.product_transposed(|step| tiles.left(gradients, 0, step), values, KEYS);
                for half in 0..2 {
                    for ((_, (score, _)), (_, (slope, _))) in lanes(&scores, half).zip(lanes(&slopes, half)) {
                        slope.set((slope.get() - deltas[half]) * score.get());
                    }
                }
                tiles.add_product(&sums, &slopes, keys);
                stages.advance();
            });
            tiles.store(&sums, [scale; 2], query_gradient, first_query, problem.query_time);
        })
    }

    fn configurations() -> Vec<Self> {
        HEAD_SIZES.map(|size| Self { size }).to_vec()
    }
}

impl AttentionKeyGradients {
    /// A block per key head and tile of keys; `None` when one launch cannot cover them.
    pub fn grid(batch: u32, key_heads: u32, key_time: u32) -> Option<[u32; 3]> {
        super::forward::grid(batch, key_heads, key_time)
    }

    /// Queries that go by at a time: with heads of 128, the gradients leave no registers for the scores of more.
    fn queries(self) -> u32 {
        if self.size > 64 { 32 } else { QUERIES }
    }
}

impl KernelSource for AttentionKeyGradients {
    fn build(&self) -> Kernel {
        let (size, count) = (self.size, self.queries());
        let description = Description {
            name: format!("attention_key_gradients_{size}"),
            summary: format!(
                "gradients of keys and values of attention, heads of {size} bf16; a block has {KEYS} keys, tiles of {count} queries"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: |sizes: &[u64]| {
                let (query, key) = elements(sizes);
                Work { bytes: 4 * query + 8 * key, operations: 8 * sizes[5] * visible_scores(sizes) }
            },
        };
        Assembler::assemble(description, |k| {
            let (key_gradient, value_gradient) =
                (k.write("key_gradient", Element::Bf16), k.write("value_gradient", Element::Bf16));
            let [gradient, query, key, value] =
                ["output_gradient", "query", "key", "value"].map(|name| k.read(name, Element::Bf16));
            let (log_sums, delta) = (k.read("log_sums", Element::F32), k.read("delta", Element::F32));
            let (first, bounds) = (k.read("first", Element::U32), k.read("bounds", Element::U32));
            let problem = Problem::declare(k);
            let scale = k.f32("scale");
            let scale_base_2 = (scale * LOG2_E).named("scale_base_2");

            k.comment("this block's key head and keys; the first keys are seen by the most queries");
            let batch = k.block().div(problem.key_heads).named("batch");
            let key_head = (k.block() - batch * problem.key_heads).named("key_head");
            let first_key = (k.block_y() * KEYS).named("first_key");
            let last_key = ((first_key + KEYS).min(problem.key_time) - 1).named("last_key");
            let constant_size = k.constant::<U32>(size);
            let of_key =
                |memory| Head::new(memory, [batch, problem.key_time], [key_head, problem.key_heads], constant_size);
            let (key, value) = (of_key(key), of_key(value));

            k.comment("the tiles of queries that see any of the keys, in each of the query heads");
            let [begin, end] = problem.tiles_that_see(k, bounds, batch, [first_key, last_key]);
            let (begin, end) = (begin * QUERIES, end * QUERIES);
            let (begin, end) = (begin.named("queries_begin"), end.named("queries_end"));
            let first_head = (key_head * problem.group).named("first_head");
            let heads_end = (first_head + problem.group).named("heads_end");

            let tiles = Tiles::new(k, size, THREADS);
            let (keys, values) = (k.shared(Element::Bf16, KEYS * size), k.shared(Element::Bf16, KEYS * size));
            let queries = k.shared(Element::Bf16, 2 * count * size);
            let gradients = k.shared(Element::Bf16, 2 * count * size);
            k.comment("per query of each stage: log-sum-exp, delta, first visible key");
            let per_query = [Element::F32, Element::F32, Element::U32].map(|element| k.shared(element, 2 * count));
            let [shared_log_sums, shared_deltas, shared_firsts] = per_query;
            let stage = k.variable::<U32>(0).named("stage");
            let (tile_bytes, row_bytes) = (count * size * 2, count * 4);

            let (ahead_head, ahead) = (k.variable(first_head).named("ahead_head"), k.variable(begin).named("ahead"));
            let copy_next = |stage: Value<'_, U32>| {
                k.if_(ahead_head.get().lt(heads_end), || {
                    let (head, at) = (ahead_head.get(), ahead.get());
                    let of_query =
                        |memory| Head::new(memory, [batch, problem.query_time], [head, problem.heads], constant_size);
                    let bytes = stage * tile_bytes;
                    tiles.copy(count, of_query(query), at, problem.query_time, queries.first().moved(bytes));
                    tiles.copy(count, of_query(gradient), at, problem.query_time, gradients.first().moved(bytes));
                    k.if_(k.thread().lt(count / 4), || {
                        let part = k.thread() * 4;
                        let target = stage * row_bytes + part * 4;
                        let head_row = batch * problem.heads + head;
                        for (shared, values, row) in [
                            (shared_log_sums, log_sums, head_row),
                            (shared_deltas, delta, head_row),
                            (shared_firsts, first, batch),
                        ] {
                            let source = problem.per_query(values, row).at(at + part);
                            k.copy_16_bytes(shared.first().moved(target), source, 16);
                        }
                    });
                    k.comment("the next tile, or the next head's first");
                    let next = at + count;
                    let wraps = next.ge(end);
                    ahead.set(wraps.select::<U32>(begin, next));
                    ahead_head.set(wraps.select::<U32>(head + 1, head));
                });
                k.commit_copies();
            };
            k.comment("keys and values stay; queries and their gradients go by");
            tiles.copy(KEYS, key, first_key, problem.key_time, keys.first());
            tiles.copy(KEYS, value, first_key, problem.key_time, values.first());
            k.if_(begin.ge(end), || ahead_head.set(heads_end));
            copy_next(stage.get());
            let of_warp = (k.warp() * (16 * size)) << 1;
            let (keys, values) = (keys.first().moved(of_warp), values.first().moved(of_warp));
            let own_keys = [first_key + tiles.sums_row(), first_key + tiles.sums_row() + 8];
            let (key_sums, value_sums) = (tiles.zeros(size / 8), tiles.zeros(size / 8));

            let one_tile = |at: Value<'_, U32>| {
                k.wait_copies(0);
                k.barrier();
                copy_next(stage.get() ^ 1);
                let bytes = stage.get() * tile_bytes;
                let (queries, gradients) = (queries.first().moved(bytes), gradients.first().moved(bytes));
                let column = stage.get() * row_bytes + (tiles.sums_column() << 2);
                let scores = tiles.product_transposed(|step| tiles.left(keys, 0, step), queries, count);
                for (index, score) in scores.iter().enumerate() {
                    let place = shared_log_sums.first().moved(column).plus(index as i64 * 8);
                    let log_sums: [Value<'_, F32>; 2] = place.load_vector();
                    for (lane, score) in score.iter().enumerate() {
                        score.set(score.get().fma(scale_base_2, -log_sums[lane % 2]).exp2_flushed());
                    }
                }
                k.comment("keys that a query does not see");
                let position = problem.offset + at;
                let [_, greatest] = problem.bounds(bounds, batch, at >> QUERIES.ilog2());
                k.if_((first_key + (KEYS - 1)).gt(position) | first_key.lt(greatest), || {
                    let position = position + tiles.sums_column();
                    for (index, score) in scores.iter().enumerate() {
                        let index = index as u32 * 8;
                        let firsts = shared_firsts.first().moved(column).plus(index.into()).load_words(2);
                        for (lane, score) in (0u32..).zip(score) {
                            let position = position + (index + lane % 2);
                            let seen = sees(own_keys[lane as usize / 2], firsts[lane as usize % 2], position);
                            score.set(seen.select(score.get(), 0.0));
                        }
                    }
                });
                tiles.add_product(&value_sums, &scores, gradients);
                let slopes = tiles.product_transposed(|step| tiles.left(values, 0, step), gradients, count);
                for (index, (score, slope)) in scores.iter().zip(&slopes).enumerate() {
                    let place = shared_deltas.first().moved(column).plus(index as i64 * 8);
                    let deltas: [Value<'_, F32>; 2] = place.load_vector();
                    for (lane, (score, slope)) in score.iter().zip(slope).enumerate() {
                        slope.set((slope.get() - deltas[lane % 2]) * score.get());
                    }
                }
                tiles.add_product(&key_sums, &slopes, queries);
                stage.set(stage.get() ^ 1);
            };
            k.for_(first_head, heads_end, 1, |_| k.for_(begin, end, count, one_tile));
            k.comment("keys that no query sees are still on their way");
            k.wait_copies(0);
            tiles.store(&key_sums, [scale; 2], of_key(key_gradient), first_key, problem.key_time);
            let one = k.constant(1.0f32);
            tiles.store(&value_sums, [one; 2], of_key(value_gradient), first_key, problem.key_time);
        })
    }

    fn configurations() -> Vec<Self> {
        HEAD_SIZES.map(|size| Self { size }).to_vec()
    }
}
