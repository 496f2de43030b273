//! Attention forward and backward for every head size, in f32 or bf16 with arithmetic in f32.
//!
//! - Layout: a block of 64 threads has 32 queries (or keys) of one head and up to 64 columns of the result; a larger head
//!   has several blocks, each of which forms the same scores. Tiles of 32 keys (or queries) go by. Products are made of
//!   4 × 4 scores per thread from slices of 16 columns in shared memory, stored column by column so that a thread's four
//!   rows are one access. The softmax is formed as tiles go by.
//! - Traffic: as in [`super::forward`], each operand once per block. Bound by arithmetic without tensor cores.

use std::f32::consts::LOG2_E;

use super::forward::LEAST;
use super::{Head, NO_KEY, Problem, QUERIES, SIZES, elements, sees, visible_scores};
use crate::asm::{Address, Assembler, Description, F32, Global, Pred, Shared, U32, Value, Variable};
use crate::kernels::float_elements;
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 64;
/// Rows of a tile, queries or keys.
const ROWS: u32 = 32;
/// Columns of a slice of a tile, in products over the head size.
const SLICE: u32 = 16;
/// Columns of the result that a block has.
const COLUMNS: u32 = 64;
/// Rows and columns of scores that a thread has.
const SIDE: usize = 4;
/// Threads that share rows of scores.
const ACROSS: u32 = ROWS / SIDE as u32;
/// Distance of two columns of a tile that is stored column by column: not all of them begin in the same bank.
const STRIDE: u32 = ROWS + 4;

/// `output = softmax(scale · query keyᵀ + mask) value`.
///
/// Parameters as of [`super::AttentionForward`], with `size` (u32) before `scale`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GeneralForward {
    /// Type of query, key, value and output.
    pub element: Element,
}

/// The gradient of the queries. Parameters as of [`super::AttentionQueryGradient`], with `size` (u32) before `scale`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GeneralQueryGradient {
    /// Type of all but the values per query.
    pub element: Element,
}

/// The gradients of keys and values. Parameters as of [`super::AttentionKeyGradients`], with `size` (u32) before `scale`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GeneralKeyGradients {
    /// Type of all but the values per query.
    pub element: Element,
}

/// A block per head (query head or key head), tile of its time, and columns of the result; `None` when one launch cannot
/// cover them.
pub fn grid(batch: u32, heads: u32, time: u32, size: u32) -> Option<[u32; 3]> {
    let (rows, tiles, parts) = (u64::from(batch) * u64::from(heads), time.div_ceil(ROWS), size.div_ceil(COLUMNS));
    (rows <= i32::MAX as u64 && tiles <= 65_535 && parts <= 65_535).then_some([rows as u32, tiles, parts])
}

impl KernelSource for GeneralForward {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("attention_general_forward_{element}"),
            summary: format!(
                "softmax(scale query key^T + mask) value; a block has {ROWS} queries and {COLUMNS} columns, tiles of {ROWS} keys"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| {
                let (query, key) = elements(sizes);
                Work { bytes: bytes * 2 * (query + key), operations: 4 * sizes[5] * visible_scores(sizes) }
            },
        };
        Assembler::assemble(description, |k| {
            let (output, log_sums) = (k.write("output", element), k.write("log_sums", Element::F32));
            let [query, key, value] = ["query", "key", "value"].map(|name| k.read(name, element));
            let (first, bounds) = (k.read("first", Element::U32), k.read("bounds", Element::U32));
            let problem = Problem::declare(k);
            let size = k.u32("size");
            let scale = (k.f32("scale") * LOG2_E).named("scale_base_2");
            let own = QueryBlock::new(k, &problem, size, bounds);
            let (query, output) = (own.of_query(&problem, query), own.of_query(&problem, output));
            let (key, value) = (own.of_key(&problem, key), own.of_key(&problem, value));
            let slices = Slices::new(k, size);
            let probabilities = k.shared(Element::F32, ROWS * STRIDE);
            let columns = k.shared(Element::F32, ROWS * COLUMNS);
            let firsts = own.firsts(&problem, first, &slices);
            let maxima: [Variable<'_, F32>; SIDE] = std::array::from_fn(|_| k.variable(LEAST).named("maximum"));
            let totals: [Variable<'_, F32>; SIDE] = std::array::from_fn(|_| k.variable(0.0f32).named("total"));
            let sums = slices.zeros();

            k.comment("one tile of keys after the other");
            k.for_(own.begin, own.end, ROWS, |at| {
                let scores = slices.product((query, own.first_query, problem.query_time), (key, at, problem.key_time));
                for (row, scores) in scores.iter().enumerate() {
                    for (column, score) in scores.iter().enumerate() {
                        let seen = sees(at + slices.column + column as u32, firsts[row], own.positions(&slices)[row]);
                        score.set(score.get() * scale);
                        score.set(seen.select(score.get(), f32::NEG_INFINITY));
                    }
                }
                k.comment("softmax so far");
                for row in 0..SIDE {
                    let scores = scores[row];
                    let of_tile = scores[1..].iter().fold(scores[0].get(), |greatest, score| greatest.max(score.get()));
                    let new = k.lanes_max(of_tile, ACROSS).max(maxima[row].get());
                    let factor = (maxima[row].get() - new).exp2_flushed();
                    maxima[row].set(new);
                    for score in scores {
                        score.set((score.get() - maxima[row].get()).exp2_flushed());
                    }
                    let of_tile = scores[1..].iter().fold(scores[0].get(), |total, score| total + score.get());
                    totals[row].set(totals[row].get().fma(factor, of_tile));
                    for sum in sums[row] {
                        sum.set(sum.get() * factor);
                    }
                }
                k.comment("output += probabilities * values");
                k.barrier();
                slices.share(&scores, probabilities);
                own.share_columns(&slices, value, at, problem.key_time, columns);
                k.barrier();
                slices.add_product(&sums, probabilities, columns, problem.key_time - at);
            });

            k.comment("the sums over the lanes of a row; rows without a key are NaN");
            let first_part = k.block_z().eq(0) & (k.thread() & (ACROSS - 1)).eq(0);
            let factors: [Value<'_, F32>; SIDE] = std::array::from_fn(|row| {
                let total = k.lanes_sum(totals[row].get(), ACROSS);
                let invalid = firsts[row].eq(NO_KEY);
                let step = own.first_query + slices.row + row as u32;
                let log_sum = invalid.select(f32::NAN, maxima[row].get() + total.log2());
                let log_sum = step.lt(problem.query_time).select(log_sum, 0.0);
                problem.per_query(log_sums, own.head_row).at(step).store_if(first_part, log_sum);
                invalid.select(f32::NAN, k.constant(1.0f32).div(total))
            });
            own.clear_behind(&problem, log_sums, first_part, &slices);
            slices.store(&sums, factors, output, own.first_query, problem.query_time);
        })
    }

    fn configurations() -> Vec<Self> {
        float_elements(|element| Self { element })
    }
}

impl KernelSource for GeneralQueryGradient {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("attention_general_query_gradient_{element}"),
            summary: format!(
                "gradient of the queries of attention; a block has {ROWS} queries and {COLUMNS} columns, tiles of {ROWS} keys"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| {
                let (query, key) = elements(sizes);
                Work { bytes: bytes * (3 * query + 2 * key), operations: 6 * sizes[5] * visible_scores(sizes) }
            },
        };
        Assembler::assemble(description, |k| {
            let query_gradient = k.write("query_gradient", element);
            let [gradient, query, key, value] =
                ["output_gradient", "query", "key", "value"].map(|name| k.read(name, element));
            let (log_sums, delta) = (k.read("log_sums", Element::F32), k.read("delta", Element::F32));
            let (first, bounds) = (k.read("first", Element::U32), k.read("bounds", Element::U32));
            let problem = Problem::declare(k);
            let size = k.u32("size");
            let scale = k.f32("scale");
            let scale_base_2 = (scale * LOG2_E).named("scale_base_2");
            let own = QueryBlock::new(k, &problem, size, bounds);
            let (query, gradient) = (own.of_query(&problem, query), own.of_query(&problem, gradient));
            let (key, value) = (own.of_key(&problem, key), own.of_key(&problem, value));
            let slices = Slices::new(k, size);
            let shared_slopes = k.shared(Element::F32, ROWS * STRIDE);
            let columns = k.shared(Element::F32, ROWS * COLUMNS);
            let firsts = own.firsts(&problem, first, &slices);
            let per_row = |values| {
                let place = problem.per_query(values, own.head_row).at(own.first_query + slices.row);
                place.load_vector::<SIDE>()
            };
            let (log_sums, deltas) = (per_row(log_sums), per_row(delta));
            let sums = slices.zeros();

            k.comment("one tile of keys after the other");
            k.for_(own.begin, own.end, ROWS, |at| {
                let queries = (query, own.first_query, problem.query_time);
                let gradients = (gradient, own.first_query, problem.query_time);
                let scores = slices.product(queries, (key, at, problem.key_time));
                let slopes = slices.product(gradients, (value, at, problem.key_time));
                for row in 0..SIDE {
                    for column in 0..SIDE {
                        let (score, slope) = (scores[row][column].get(), slopes[row][column]);
                        let seen = sees(at + slices.column + column as u32, firsts[row], own.positions(&slices)[row]);
                        let probability = seen.select(score.fma(scale_base_2, -log_sums[row]).exp2_flushed(), 0.0);
                        slope.set((slope.get() - deltas[row]) * probability);
                    }
                }
                k.comment("query gradient += slopes * keys");
                k.barrier();
                slices.share(&slopes, shared_slopes);
                own.share_columns(&slices, key, at, problem.key_time, columns);
                k.barrier();
                slices.add_product(&sums, shared_slopes, columns, problem.key_time - at);
            });
            let target = own.of_query(&problem, query_gradient);
            slices.store(&sums, [scale; SIDE], target, own.first_query, problem.query_time);
        })
    }

    fn configurations() -> Vec<Self> {
        float_elements(|element| Self { element })
    }
}

impl KernelSource for GeneralKeyGradients {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("attention_general_key_gradients_{element}"),
            summary: format!(
                "gradients of keys and values of attention; a block has {ROWS} keys and {COLUMNS} columns, tiles of {ROWS} queries"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| {
                let (query, key) = elements(sizes);
                Work { bytes: bytes * (2 * query + 4 * key), operations: 8 * sizes[5] * visible_scores(sizes) }
            },
        };
        Assembler::assemble(description, |k| {
            let (key_gradient, value_gradient) = (k.write("key_gradient", element), k.write("value_gradient", element));
            let [gradient, query, key, value] =
                ["output_gradient", "query", "key", "value"].map(|name| k.read(name, element));
            let (log_sums, delta) = (k.read("log_sums", Element::F32), k.read("delta", Element::F32));
            let (first, bounds) = (k.read("first", Element::U32), k.read("bounds", Element::U32));
            let problem = Problem::declare(k);
            let size = k.u32("size");
            let scale = k.f32("scale");
            let scale_base_2 = (scale * LOG2_E).named("scale_base_2");

            k.comment("this block's key head and keys; the first keys are seen by the most queries");
            let batch = k.block().div(problem.key_heads).named("batch");
            let key_head = (k.block() - batch * problem.key_heads).named("key_head");
            let first_key = (k.block_y() * ROWS).named("first_key");
            let last_key = ((first_key + ROWS).min(problem.key_time) - 1).named("last_key");
            let of_key = |memory| Head::new(memory, [batch, problem.key_time], [key_head, problem.key_heads], size);
            let (key, value) = (of_key(key), of_key(value));
            let [begin, end] = problem.tiles_that_see(k, bounds, batch, [first_key, last_key]);
            let begin = (begin * QUERIES).named("queries_begin");
            let end = (end * QUERIES).min(problem.query_time).named("queries_end");

            let slices = Slices::new(k, size);
            let (shared, columns) = (k.shared(Element::F32, ROWS * STRIDE), k.shared(Element::F32, ROWS * COLUMNS));
            let (key_sums, value_sums) = (slices.zeros(), slices.zeros());
            let first_head = key_head * problem.group;
            let one_tile = |head: Value<'_, U32>, at: Value<'_, U32>| {
                let of_query = |memory| Head::new(memory, [batch, problem.query_time], [head, problem.heads], size);
                let (query, gradient) = (of_query(query), of_query(gradient));
                let queries = (query, at, problem.query_time);
                let gradients = (gradient, at, problem.query_time);
                let head_row = batch * problem.heads + head;
                let steps = at + slices.column;
                let scores = slices.product((key, first_key, problem.key_time), queries);
                let log_sums = problem.per_query(log_sums, head_row).at(steps).load_vector::<SIDE>();
                let firsts = problem.per_query(first, batch).at(steps).load_words(SIDE);
                for (row, scores) in (0u32..).zip(&scores) {
                    for (column, score) in scores.iter().enumerate() {
                        let position = problem.offset + steps + column as u32;
                        let seen = sees(first_key + slices.row + row, firsts[column], position);
                        let probability = score.get().fma(scale_base_2, -log_sums[column]).exp2_flushed();
                        score.set(seen.select(probability, 0.0));
                    }
                }
                let first_column = k.block_z() * COLUMNS;
                k.comment("value gradient += probabilities * output gradients");
                k.barrier();
                slices.share(&scores, shared);
                slices.share_columns(gradient, at, problem.query_time, first_column, columns);
                k.barrier();
                slices.add_product(&value_sums, shared, columns, end - at);

                let slopes = slices.product((value, first_key, problem.key_time), gradients);
                let deltas = problem.per_query(delta, head_row).at(steps).load_vector::<SIDE>();
                for (scores, slopes) in scores.iter().zip(&slopes) {
                    for ((score, slope), delta) in scores.iter().zip(slopes).zip(deltas) {
                        slope.set((slope.get() - delta) * score.get());
                    }
                }
                k.comment("key gradient += slopes * queries");
                k.barrier();
                slices.share(&slopes, shared);
                slices.share_columns(query, at, problem.query_time, first_column, columns);
                k.barrier();
                slices.add_product(&key_sums, shared, columns, end - at);
            };
            k.for_(first_head, first_head + problem.group, 1, |head| {
                k.for_(begin, end, ROWS, |at| one_tile(head, at));
            });
            slices.store(&key_sums, [scale; SIDE], of_key(key_gradient), first_key, problem.key_time);
            let one = k.constant(1.0f32);
            slices.store(&value_sums, [one; SIDE], of_key(value_gradient), first_key, problem.key_time);
        })
    }

    fn configurations() -> Vec<Self> {
        float_elements(|element| Self { element })
    }
}

/// A block that has queries: which, and the keys that they see.
struct QueryBlock<'a> {
    k: &'a Assembler,
    size: Value<'a, U32>,
    /// Number of the batch row's head among all.
    head_row: Value<'a, U32>,
    batch: Value<'a, U32>,
    head: Value<'a, U32>,
    first_query: Value<'a, U32>,
    position: Value<'a, U32>,
    begin: Value<'a, U32>,
    end: Value<'a, U32>,
}

impl<'a> QueryBlock<'a> {
    fn new(k: &'a Assembler, problem: &Problem<'a>, size: Value<'a, U32>, bounds: Global<'a>) -> Self {
        k.comment("this block's head and tile; the last tiles have the most keys");
        let head_row = k.block().named("head_row");
        let batch = head_row.div(problem.heads).named("batch");
        let head = (head_row - batch * problem.heads).named("head");
        let tiles = (problem.query_time + (ROWS - 1)) >> ROWS.ilog2();
        let first_query = ((tiles - 1 - k.block_y()) * ROWS).named("first_query");
        let position = (problem.offset + first_query).named("position");
        k.comment("the keys that any query of the tile sees");
        let [least, _] = problem.bounds(bounds, batch, first_query >> QUERIES.ilog2());
        let begin = (least & !(ROWS - 1)).named("keys_begin");
        let end = (position + ROWS).min(problem.key_time).named("keys_end");
        Self { k, size, head_row, batch, head, first_query, position, begin, end }
    }

    fn of_query(&self, problem: &Problem<'a>, memory: Global<'a>) -> Head<'a> {
        Head::new(memory, [self.batch, problem.query_time], [self.head, problem.heads], self.size)
    }

    fn of_key(&self, problem: &Problem<'a>, memory: Global<'a>) -> Head<'a> {
        let head = self.head.div(problem.group);
        Head::new(memory, [self.batch, problem.key_time], [head, problem.key_heads], self.size)
    }

    /// The first visible keys of this thread's rows.
    fn firsts(&self, problem: &Problem<'a>, first: Global<'a>, slices: &Slices<'a>) -> Vec<Value<'a, U32>> {
        problem.per_query(first, self.batch).at(self.first_query + slices.row).load_words(SIDE)
    }

    /// The positions of this thread's rows.
    fn positions(&self, slices: &Slices<'a>) -> [Value<'a, U32>; SIDE] {
        std::array::from_fn(|row| self.position + slices.row + row as u32)
    }

    fn share_columns(
        &self,
        slices: &Slices<'a>,
        head: Head<'a>,
        first: Value<'a, U32>,
        end: Value<'a, U32>,
        columns: Shared<'a>,
    ) {
        slices.share_columns(head, first, end, self.k.block_z() * COLUMNS, columns);
    }

    /// Sets the log-sum-exps to zero that lie behind the last tile of queries.
    fn clear_behind(
        &self,
        problem: &Problem<'a>,
        log_sums: Global<'a>,
        condition: Value<'a, Pred>,
        slices: &Slices<'a>,
    ) {
        let behind = self.first_query + ROWS;
        let last = behind.ge(problem.query_time) & behind.lt(problem.tiles * QUERIES) & condition;
        for row in 0..SIDE as u32 {
            let place = problem.per_query(log_sums, self.head_row).at(behind + slices.row + row);
            place.store_if(last, 0.0);
        }
    }
}

/// Rows of a head: from a first row on, as far as they are before an end; zero from there on.
type Rows<'a> = (Head<'a>, Value<'a, U32>, Value<'a, U32>);

/// [`SIDE`] by [`SIDE`] scores of a thread.
type Scores<'a> = [[Variable<'a, F32>; SIDE]; SIDE];

/// A thread's four rows of the result by the columns `4 t..4 t + 4` and those 32 further.
type Sums<'a> = [[Variable<'a, F32>; 2 * SIDE]; SIDE];

/// How the block's threads share products.
struct Slices<'a> {
    k: &'a Assembler,
    size: Value<'a, U32>,
    left: Shared<'a>,
    right: Shared<'a>,
    /// The first of this thread's rows of scores, and the first of its columns.
    row: Value<'a, U32>,
    column: Value<'a, U32>,
}

impl<'a> Slices<'a> {
    fn new(k: &'a Assembler, size: Value<'a, U32>) -> Self {
        let [left, right] = [(); 2].map(|()| k.shared(Element::F32, SLICE * STRIDE));
        let row = ((k.thread() >> ACROSS.ilog2()) * SIDE as u32).named("row");
        let column = ((k.thread() & (ACROSS - 1)) * SIDE as u32).named("column");
        Self { k, size, left, right, row, column }
    }

    /// `left rightᵀ` over the head size: a tile of scores.
    fn product(&self, left: Rows<'a>, right: Rows<'a>) -> Scores<'a> {
        let k = self.k;
        let scores: Scores<'a> = std::array::from_fn(|_| std::array::from_fn(|_| k.variable(0.0f32)));
        k.for_(0, self.size, SLICE, |first_column| {
            k.barrier();
            self.share_slice(left, first_column, self.left);
            self.share_slice(right, first_column, self.right);
            k.barrier();
            let count = (self.size - first_column).min(SLICE);
            self.for_each_column(count, self.left.at(self.row), self.right.at(self.column), |left, right| {
                let (left, right) = (left.load_vector::<SIDE>(), right.load_vector::<SIDE>());
                for (scores, left) in scores.iter().zip(left) {
                    for (score, right) in scores.iter().zip(right) {
                        score.set(left.fma(right, score.get()));
                    }
                }
            });
        });
        scores
    }

    /// Calls `body` with the places at `left` and `right` in each of `count` columns; the last ones up to a multiple of
    /// four are called as well.
    fn for_each_column(
        &self,
        count: Value<'a, U32>,
        left: Address<'a>,
        right: Address<'a>,
        body: impl Fn(Address<'a>, Address<'a>),
    ) {
        self.k.for_(0, count, 4, |column| {
            let offset = column * (STRIDE * 4);
            let (left, right) = (left.moved(offset), right.moved(offset));
            for unrolled in 0..4 {
                let further = i64::from(unrolled * STRIDE);
                body(left.plus(further), right.plus(further));
            }
        });
    }

    /// Puts [`SLICE`] columns of rows into shared memory, column by column.
    fn share_slice(&self, (head, first, end): Rows<'a>, first_column: Value<'a, U32>, target: Shared<'a>) {
        let k = self.k;
        let (column, row) = (k.thread() & (SLICE - 1), k.thread() >> SLICE.ilog2());
        let inside = (first_column + column).lt(self.size);
        let at = target.at(column.mad(STRIDE, row));
        let per_round = THREADS / SLICE;
        for round in 0..ROWS / per_round {
            let row = first + row + round * per_round;
            let value = head.row(row).at(first_column + column).load_if(inside & row.lt(end), 0.0);
            at.plus((round * per_round).into()).store(value);
        }
    }

    /// Puts scores into shared memory, column by column.
    fn share(&self, scores: &Scores<'a>, target: Shared<'a>) {
        let at = target.at(self.column.mad(STRIDE, self.row));
        for column in 0..SIDE {
            let values = [0, 1, 2, 3].map(|row: usize| scores[row][column].get());
            at.plus(column as i64 * i64::from(STRIDE)).store_vector(&values);
        }
    }

    /// Puts [`COLUMNS`] columns of [`ROWS`] rows into shared memory, row by row; a thread has one column.
    fn share_columns(
        &self,
        head: Head<'a>,
        first: Value<'a, U32>,
        end: Value<'a, U32>,
        first_column: Value<'a, U32>,
        target: Shared<'a>,
    ) {
        let column = first_column + self.k.thread();
        let inside = column.lt(self.size);
        let at = target.at(self.k.thread());
        self.k.for_(0, ROWS, 8, |rows| {
            let at = at.moved(rows * (COLUMNS * 4));
            for unrolled in 0..8 {
                let row = first + rows + unrolled;
                let value = head.row(row).at(column).load_if(inside & row.lt(end), 0.0);
                at.plus((unrolled * COLUMNS).into()).store(value);
            }
        });
    }

    fn zeros(&self) -> Sums<'a> {
        std::array::from_fn(|_| std::array::from_fn(|_| self.k.variable(0.0f32)))
    }

    /// `sums += scores · columns` over the first `count` of the tile's [`ROWS`], or all when there are not so many.
    fn add_product(&self, sums: &Sums<'a>, scores: Shared<'a>, columns: Shared<'a>, count: Value<'a, U32>) {
        let k = self.k;
        let (scores, columns) = (scores.at(self.row), columns.at(self.column));
        k.for_(0, count.min(ROWS), 4, |row| {
            let (scores, columns) = (scores.moved(row * (STRIDE * 4)), columns.moved(row * (COLUMNS * 4)));
            for unrolled in 0..4 {
                let scores = scores.plus(i64::from(unrolled * STRIDE)).load_vector::<SIDE>();
                let columns = columns.plus(i64::from(unrolled * COLUMNS));
                let halves = [columns, columns.plus(i64::from(COLUMNS) / 2)].map(Address::load_vector::<SIDE>);
                for (sums, score) in sums.iter().zip(scores) {
                    for (sum, value) in sums.iter().zip(halves.into_iter().flatten()) {
                        sum.set(score.fma(value, sum.get()));
                    }
                }
            }
        });
    }

    /// Writes the block's columns of rows of a head, each row times its factor, as far as they are inside.
    fn store(
        &self,
        sums: &Sums<'a>,
        factors: [Value<'a, F32>; SIDE],
        head: Head<'a>,
        first: Value<'a, U32>,
        end: Value<'a, U32>,
    ) {
        let first_column = self.k.block_z() * COLUMNS + self.column;
        for (row, (sums, factor)) in (0u32..).zip(sums.iter().zip(factors)) {
            let row = first + self.row + row;
            for (index, sum) in (0u32..).zip(sums) {
                let column = first_column + index / SIDE as u32 * (COLUMNS / 2) + index % SIDE as u32;
                head.row(row).at(column).store_if(row.lt(end) & column.lt(self.size), sum.get() * factor);
            }
        }
    }
}
