//! Attention forward on tensor cores: bf16, head sizes 32, 64 and 128.
//!
//! - Layout: a block of four warps has 64 queries of one head; each warp holds 16 of them and their sums in registers. Tiles
//!   of 64 keys and values come through shared memory, the next one on its way while one is used. The softmax is formed as
//!   tiles go by: sums are scaled down when a greater score comes. Tiles that no query of the block sees are not visited,
//!   and only tiles that some query does not wholly see are masked. Blocks with the most keys start first.
//! - Traffic: queries and output once; keys and values once per block, from the level-2 cache. Bound by arithmetic.

use std::f32::consts::LOG2_E;

use super::tiles::Tiles;
use super::{Head, NO_KEY, Problem, QUERIES, SIZES, elements, sees, visible_scores};
use crate::asm::{Assembler, Description, F32, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

pub(super) const THREADS: u32 = 128;
/// Keys of a tile.
pub(super) const KEYS: u32 = 64;
/// The head sizes that there are kernels on tensor cores for.
pub const HEAD_SIZES: [u32; 3] = [32, 64, 128];
/// Below every score, yet far from what overflows in a difference.
pub(super) const LEAST: f32 = -1e30;

/// `output = softmax(scale · query keyᵀ + mask) value`.
///
/// Parameters: `output` (written, `[batch, query time, heads, size]`), `log_sums` (written, f32 `[batch, heads, padded query
/// time]`: the binary logarithm of the sum of `2^(scores · log₂ e)`; 0 behind the last query), `query` (like `output`),
/// `key`, `value` (`[batch, key time, key heads, size]`), `first`, `bounds` (of [`super::VisibleKeys`]), `query_time`,
/// `key_time`, `heads`, `key_heads` (u32), `scale` (f32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionForward {
    /// Head size, one of [`HEAD_SIZES`].
    pub size: u32,
}

/// A block per head and tile of queries; `None` when one launch cannot cover them.
pub fn grid(batch: u32, heads: u32, time: u32) -> Option<[u32; 3]> {
    let (rows, tiles) = (u64::from(batch) * u64::from(heads), time.div_ceil(QUERIES));
    (rows <= i32::MAX as u64 && tiles <= 65_535).then_some([rows as u32, tiles, 1])
}

impl KernelSource for AttentionForward {
    fn build(&self) -> Kernel {
        let size = self.size;
        let description = Description {
            name: format!("attention_forward_{size}"),
            summary: format!(
                "softmax(scale query key^T + mask) value, heads of {size} bf16; a block has {QUERIES} queries, tiles of {KEYS} \
                 keys"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: SIZES,
            work: |sizes: &[u64]| {
                let (query, key) = elements(sizes);
                Work { bytes: 4 * query + 4 * key, operations: 4 * sizes[5] * visible_scores(sizes) }
            },
        };
        Assembler::assemble(description, |k| {
            let (output, log_sums) = (k.write("output", Element::Bf16), k.write("log_sums", Element::F32));
            let [query, key, value] = ["query", "key", "value"].map(|name| k.read(name, Element::Bf16));
            let (first, bounds) = (k.read("first", Element::U32), k.read("bounds", Element::U32));
            let problem = Problem::declare(k);
            let scale = (k.f32("scale") * LOG2_E).named("scale_base_2");

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
            let (query, output, key, value) = (of_query(query), of_query(output), of_key(key), of_key(value));

            k.comment("the keys that any query of the tile sees");
            let [least, greatest] = problem.bounds(bounds, batch, tile);
            let begin = (least & !(KEYS - 1)).named("keys_begin");
            let end = (position + QUERIES).min(problem.key_time).named("keys_end");

            let tiles = Tiles::new(k, size, THREADS);
            let stages = Stages::new(k, size);
            let (keys, values) = (k.shared(Element::Bf16, 2 * KEYS * size), k.shared(Element::Bf16, 2 * KEYS * size));
            let copy = |at: Value<'_, U32>, stage: Value<'_, U32>| {
                tiles.copy(KEYS, key, at, problem.key_time, keys.first().moved(stage));
                tiles.copy(KEYS, value, at, problem.key_time, values.first().moved(stage));
                k.commit_copies();
            };
            k.comment("queries pass through the stage that is filled last");
            let own = values.first().plus((KEYS * size).into());
            tiles.copy(QUERIES, query, first_query, problem.query_time, own);
            k.commit_copies();
            copy(begin, stages.current());
            k.wait_copies(1);
            k.barrier();
            let own = own.moved((k.warp() * (16 * size)) << 1);
            let queries: Vec<_> = (0..size as usize / 16).map(|step| tiles.left(own, 0, step)).collect();

            k.comment("per half of this lane's rows: first visible key, greatest score, sum of exponentials");
            let firsts = problem.per_query(first, batch).at(first_query + tiles.sums_row());
            let firsts = [firsts.load_u32(), firsts.plus(8).load_u32()];
            let positions = [position + tiles.sums_row(), position + tiles.sums_row() + 8];
            let maxima: [Variable<'_, F32>; 2] = std::array::from_fn(|_| k.variable(LEAST).named("maximum"));
            let totals: [Variable<'_, F32>; 2] = std::array::from_fn(|_| k.variable(0.0f32).named("total"));
            let sums = tiles.zeros(size / 8);

            k.comment("one tile of keys after the other");
            k.for_(begin, end, KEYS, |at| {
                k.wait_copies(0);
                k.barrier();
                k.if_((at + KEYS).lt(end), || copy(at + KEYS, stages.other()));
                let scores = tiles.product_transposed(|step| queries[step], keys.first().moved(stages.current()), KEYS);
                for score in scores.iter().flatten() {
                    score.set(score.get() * scale);
                }
                k.comment("keys that a query does not see");
                k.if_((at + (KEYS - 1)).gt(position) | at.lt(greatest), || {
                    let column = at + tiles.sums_column();
                    for (half, (first, position)) in firsts.into_iter().zip(positions).enumerate() {
                        for (index, (score, lane)) in lanes(&scores, half) {
                            let seen = sees(column + (index * 8 + lane), first, position);
                            score.set(seen.select(score.get(), f32::NEG_INFINITY));
                        }
                    }
                });
                k.comment("softmax so far");
                for half in 0..2 {
                    let (maximum, total) = (maxima[half], totals[half]);
                    let of_tile = lanes(&scores, half).map(|(_, (score, _))| score.get()).reduce(|a, b| a.max(b));
                    let Some(of_tile) = of_tile else { unreachable!("tiles have columns") };
                    let new = k.lanes_max(of_tile, 4).max(maximum.get());
                    let factor = (maximum.get() - new).exp2_flushed();
                    maximum.set(new);
                    for (_, (score, _)) in lanes(&scores, half) {
                        score.set((score.get() - maximum.get()).exp2_flushed());
                    }
                    let of_tile = lanes(&scores, half).map(|(_, (score, _))| score.get()).reduce(|a, b| a + b);
                    let Some(of_tile) = of_tile else { unreachable!("tiles have columns") };
                    total.set(total.get().fma(factor, of_tile));
                    for (_, (sum, _)) in lanes(&sums, half) {
                        sum.set(sum.get() * factor);
                    }
                }
                tiles.add_product(&sums, &scores, values.first().moved(stages.current()));
                stages.advance();
            });

            k.comment("the sums over the four lanes of a row; rows without a key are NaN");
            let totals = totals.map(|total| k.lanes_sum(total.get(), 4));
            let factors = [0, 1].map(|half: usize| {
                let invalid = firsts[half].eq(NO_KEY);
                let row = first_query + tiles.sums_row() + half as u32 * 8;
                let log_sum = invalid.select(f32::NAN, maxima[half].get() + totals[half].log2());
                let log_sum = row.lt(problem.query_time).select(log_sum, 0.0);
                let place = problem.per_query(log_sums, head_row).at(row);
                place.store_if((k.lane() & 3).eq(0), log_sum);
                invalid.select(f32::NAN, totals[half].reciprocal())
            });
            tiles.store(&sums, factors, output, first_query, problem.query_time);
        })
    }

    fn configurations() -> Vec<Self> {
        HEAD_SIZES.map(|size| Self { size }).to_vec()
    }
}

/// The two stages of tiles in shared memory, as byte offsets.
pub(super) struct Stages<'a> {
    current: Variable<'a, U32>,
    bytes: u32,
}

impl<'a> Stages<'a> {
    /// For stages of [`KEYS`] rows of `size` bf16.
    pub(super) fn new(k: &'a Assembler, size: u32) -> Self {
        Self { current: k.variable(0).named("stage"), bytes: KEYS * size * 2 }
    }

    pub(super) fn current(&self) -> Value<'a, U32> {
        self.current.get()
    }

    pub(super) fn other(&self) -> Value<'a, U32> {
        self.current.get() ^ self.bytes
    }

    pub(super) fn advance(&self) {
        self.current.set(self.other());
    }
}

/// Of the sums, the registers of one half of this lane's rows, with the number of their eight columns and of the two
/// neighbours among them.
pub(super) fn lanes<'b, 'a>(
    sums: &'b [super::tiles::Sums<'a>],
    half: usize,
) -> impl Iterator<Item = (u32, (Variable<'a, F32>, u32))> + 'b {
    sums.iter()
        .enumerate()
        .flat_map(move |(index, sum)| [0u32, 1].map(move |lane| (index as u32, (sum[half * 2 + lane as usize], lane))))
}
