//! Attention of a few queries over a cache of keys and values, for decoding: f32 arithmetic, every head size.
//!
//! - Layout: a block has one query of one head, up to 64 columns of the result, and one part of [`PART`] keys, so that long
//!   caches keep many blocks busy. Tiles of 128 keys: eight lanes form each score, then each warp adds every fourth key's
//!   values, two columns per lane. [`CombineParts`] weighs the parts' results by their sums of exponentials. How keys are
//!   divided depends on their places alone: what is in other rows of the batch, or how much room there is, changes no bit.
//! - The queries' positions come from memory where the launch must not depend on them (a graph that is replayed for one token
//!   after the other): blocks then stand for all parts of the room, and those beyond the query end at once.
//! - Traffic: keys and values once per query head, in part from the level-2 cache. Bound by memory.
//! - Source: Dao et al. 2023, "Flash-Decoding for long-context inference".

use std::f32::consts::LOG2_E;

use super::forward::LEAST;
use super::{Head, visible_scores};
use crate::asm::{Assembler, Description, F32, LANES, U32, Value};
use crate::kernels::one_thread_per_element;
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Keys of a part.
pub const PART: u32 = 256;
const THREADS: u32 = 128;
const WARPS: u32 = THREADS / LANES;
/// Lanes that form a score together.
const TOGETHER: u32 = 8;
/// Columns of the result that a block has.
const COLUMNS: u32 = 2 * LANES;
const COMBINE_THREADS: u32 = 256;

/// What the kernels' sizes mean.
const SIZES: &[&str] = &["batch", "query_time", "length", "heads", "key_heads", "head_size"];

/// The result of each part of the keys.
///
/// Parameters: `output` (written, f32 `[batch, query time, heads, parts, size]`; of the type when `whole`), `log_sums` (written,
/// f32 without the last dimension: binary logarithms of the sums of exponentials of 2; not when `whole`), `query` (`[batch, query
/// time, heads, size]`), `keys`, `values` (`[batch, room, key heads, size]`), `positions` (u32 `[batch, query time]`, with
/// `positions`: the last key that each query sees), `query_time`, `room`, `length` (without `positions`: queries are the last
/// positions of it), `heads`, `key_heads`, `size`, `window` (u32; 0: none), `scale` (f32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CachedAttention {
    /// Type of queries, keys and values.
    pub element: Element,
    /// The head size is a multiple of 4.
    pub vector: bool,
    /// There is one part.
    pub whole: bool,
    /// The queries' positions are in memory.
    pub positions: bool,
}

/// The result over all parts.
///
/// Parameters: `output` (written, `[rows, size]`), `part_outputs` (f32 `[rows, parts, size]`), `log_sums` (f32 `[rows,
/// parts]`), `count` (rows · size), `parts`, `size` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CombineParts {
    /// Type of the output.
    pub element: Element,
}

impl CachedAttention {
    /// The kernel for heads of this size and so many parts.
    pub fn new(element: Element, size: u32, parts: u32, positions: bool) -> Self {
        Self { element, vector: size.is_multiple_of(4), whole: parts == 1, positions }
    }

    /// Parts of so many keys; one at least.
    pub fn parts(length: u32) -> u32 {
        length.div_ceil(PART).max(1)
    }

    /// A block per query and head (`rows` of both), part and columns; `None` when one launch cannot cover them.
    pub fn grid(rows: u32, length: u32, size: u32) -> Option<[u32; 3]> {
        let (parts, columns) = (Self::parts(length), size.div_ceil(COLUMNS));
        (rows <= i32::MAX as u32 && parts <= 65_535 && columns <= 65_535).then_some([rows, parts, columns])
    }
}

impl KernelSource for CachedAttention {
    fn build(&self) -> Kernel {
        let Self { element, vector, whole, positions } = *self;
        let bytes = element.bytes() as u64;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let description = Description {
            name: format!(
                "attention_cached_{element}{}{}{}",
                flag(whole, "_whole"),
                flag(positions, "_positions"),
                flag(!vector, "_scalar")
            ),
            summary: format!(
                "attention of one query of one head over up to {PART} cached keys; {COLUMNS} columns of the result per block"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: move |sizes: &[u64]| {
                let (rows, size) = (sizes[0] * sizes[1] * sizes[3], sizes[5]);
                let keys = 2 * sizes[0] * sizes[2] * sizes[4] * size;
                Work { bytes: bytes * (2 * rows * size + keys), operations: 4 * size * visible_scores(sizes) }
            },
        };
        Assembler::assemble(description, |k| {
            let output = k.write("output", if whole { element } else { Element::F32 });
            let log_sums = (!whole).then(|| k.write("log_sums", Element::F32));
            let [query, keys, values] = ["query", "keys", "values"].map(|name| k.read(name, element));
            let positions = positions.then(|| k.read("positions", Element::U32));
            let (query_time, room) = (k.u32("query_time"), k.u32("room"));
            let length = positions.is_none().then(|| k.u32("length"));
            let (heads, key_heads, size) = (k.u32("heads"), k.u32("key_heads"), k.u32("size"));
            let window = k.u32("window");
            let scale = (k.f32("scale") * LOG2_E).named("scale_base_2");

            k.comment("this block's query, and the keys of its part that the query sees");
            let row = k.block().named("query_row");
            let token = row.div(heads).named("token");
            let head = row - token * heads;
            let batch = token.div(query_time).named("batch");
            let step = token - batch * query_time;
            let behind = match (positions, length) {
                (Some(positions), _) => (positions.at(token).load_u32() + 1).min(room),
                (None, Some(length)) => length - query_time + step + 1,
                (None, None) => unreachable!("one of the two is declared"),
            };
            let behind = behind.named("behind");
            let reach = window.eq(0).select::<U32>(behind, window.min(behind));
            let begin = (behind - reach).max(k.block_y() * PART).named("keys_begin");
            let end = behind.min((k.block_y() + 1) * PART).named("keys_end");
            let query = query.from_row(row, size);
            let key_head = head.div(heads.div(key_heads));
            let of_key = |memory| Head::new(memory, [batch, room], [key_head, key_heads], size);
            let (keys, values) = (of_key(keys), of_key(values));

            let shared = k.shared(Element::F32, THREADS);
            let scratch = k.shared(Element::F32, WARPS);
            let maximum = k.variable(LEAST).named("maximum");
            let total = k.variable(0.0f32).named("total");
            let sums = [k.variable(0.0f32), k.variable(0.0f32)];
            let column = (k.block_z() * COLUMNS + k.lane() * 2).named("column");
            let inside = [column.lt(size), (column + 1).lt(size)];

            k.for_(begin, end, THREADS, |at| {
                let count = (end - at).min(THREADS);
                k.comment("a score per eight lanes");
                let (own, lane) = (k.thread() >> TOGETHER.ilog2(), k.thread() & (TOGETHER - 1));
                k.for_(0, count, THREADS / TOGETHER, |first| {
                    let index = first + own;
                    let score = k.variable(0.0f32);
                    k.if_(index.lt(count), || {
                        let key = keys.row(at + index);
                        if vector {
                            k.for_(lane * 4, size, TOGETHER * 4, |column| {
                                let query = query.at(column).load_vector::<4>();
                                for (query, key) in query.into_iter().zip(key.at(column).load_vector::<4>()) {
                                    score.set(query.fma(key, score.get()));
                                }
                            });
                        } else {
                            k.for_(lane, size, TOGETHER, |column| {
                                score.set(query.at(column).load().fma(key.at(column).load(), score.get()));
                            });
                        }
                    });
                    let score = k.lanes_sum(score.get(), TOGETHER) * scale;
                    shared.at(index).store_if(lane.eq(0) & index.lt(count), score);
                });
                k.barrier();
                k.comment("softmax so far; a thread per key");
                let own = k.thread();
                let score = shared.at(own).load_if(own.lt(count), f32::NEG_INFINITY);
                let new = k.block_max(score, THREADS, scratch).max(maximum.get());
                let factor = (maximum.get() - new).exp2_flushed();
                maximum.set(new);
                let weight = (score - maximum.get()).exp2_flushed();
                shared.at(own).store(weight);
                total.set(total.get().fma(factor, weight));
                for sum in sums {
                    sum.set(sum.get() * factor);
                }
                k.barrier();
                k.comment("every fourth key's values");
                k.for_(k.warp(), count, WARPS, |index| {
                    let weight = shared.at(index).load();
                    let value = values.row(at + index).at(column);
                    for (lane, (sum, inside)) in (0..).zip(sums.into_iter().zip(inside)) {
                        sum.set(weight.fma(value.plus(lane).load_if(inside, 0.0), sum.get()));
                    }
                });
                k.barrier();
            });

            k.comment("the sums over the warps, in order");
            let total = k.block_sum(total.get(), THREADS, scratch).named("sum_of_weights");
            let parts = k.shared(Element::F32, WARPS * COLUMNS);
            let place = parts.at(k.warp() * COLUMNS + k.lane() * 2);
            place.store_vector(&sums.map(|sum| sum.get()));
            k.barrier();
            let row = row * k.blocks_y() + k.block_y();
            let any = total.gt(0.0) | total.ne(total);
            let factor = any.select(k.constant(1.0f32).div(total), 0.0);
            let own = k.thread();
            let column = k.block_z() * COLUMNS + own;
            let sum = (0..WARPS).map(|warp| parts.at(own & (COLUMNS - 1)).plus((warp * COLUMNS).into()).load());
            let Some(sum) = sum.reduce(|a, b| a + b) else { unreachable!("there are warps") };
            let stored = own.lt(COLUMNS) & column.lt(size);
            output.from_row(row, size).at(column).store_if(stored, sum * factor);
            if let Some(log_sums) = log_sums {
                let log_sum: Value<'_, F32> = maximum.get() + total.log2().max(-1e30);
                log_sums.at(row).store_if(own.eq(0) & k.block_z().eq(0), log_sum);
            }
        })
    }

    fn configurations() -> Vec<Self> {
        let of = |element| {
            [(false, false), (false, true), (true, true)].map(|(whole, positions)| Self {
                element,
                vector: true,
                whole,
                positions,
            })
        };
        [Element::F32, Element::Bf16].into_iter().flat_map(of).collect()
    }
}

impl CombineParts {
    /// A thread per element of the result; `None` when one launch cannot cover them.
    pub fn grid(count: u32) -> Option<[u32; 3]> {
        one_thread_per_element(count.into(), COMBINE_THREADS).filter(|_| count <= u32::MAX - COMBINE_THREADS)
    }
}

impl KernelSource for CombineParts {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("attention_combine_parts_{element}"),
            summary: "the results of attention over parts of the keys, weighed by their sums; one element per thread"
                .to_owned(),
            block: [COMBINE_THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count", "parts"],
            work: move |sizes: &[u64]| Work {
                bytes: sizes[0] * (4 * sizes[1] + bytes),
                operations: 4 * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let output = k.write("output", element);
            let (part_outputs, log_sums) = (k.read("part_outputs", Element::F32), k.read("log_sums", Element::F32));
            let (count, parts, size) = (k.u32("count"), k.u32("parts"), k.u32("size"));
            let index = k.global_thread(COMBINE_THREADS).named("index");
            k.return_if(index.ge(count));
            let row = index.div(size);
            let column = index - row * size;
            let log_sums = log_sums.from_row(row, parts);
            let greatest = k.variable(f32::NEG_INFINITY).named("greatest");
            k.for_(0, parts, 1, |part| greatest.set(greatest.get().max(log_sums.at(part).load())));
            let (total, sum) = (k.variable(0.0f32).named("total"), k.variable(0.0f32).named("sum"));
            k.for_(0, parts, 1, |part| {
                let weight = (log_sums.at(part).load() - greatest.get()).exp2_flushed();
                total.set(total.get() + weight);
                let value = part_outputs.from_row(row * parts + part, size).at(column).load();
                sum.set(weight.fma(value, sum.get()));
            });
            output.at(index).store(sum.get().div(total.get()));
        })
    }

    fn configurations() -> Vec<Self> {
        crate::kernels::float_elements(|element| Self { element })
    }
}
