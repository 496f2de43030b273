//! Causal grouped-query attention: `output = softmax(scale · query keyᵀ + mask) value` per head, forward, backward and over
//! a cache.
//!
//! - Query head `h` uses key head `h / (heads / key_heads)`. Queries are the last `query_time` positions of `key_time`.
//! - Forward keeps nothing but the log-sum-exp of every row of scores; backward computes the probabilities again. With
//!   `P` the probabilities, `dP = dO Vᵀ` and `delta = Σ dO·O`: `dS = P (dP − delta)`, `dQ = scale · dS K`,
//!   `dK = scale · dSᵀ Q`, `dV = Pᵀ dO`. Nothing is added to memory by two blocks: one kernel has a block per tile of
//!   queries and gives `dQ`, one has a block per tile of keys, which goes over the queries of all heads that share them,
//!   and gives `dK` and `dV`.
//! - Scores are kept times `log₂ e`, so that the exponentials are powers of 2.
//! - [`forward`] and [`backward`] are for bf16 and the head sizes of models, on tensor cores; [`general`] is for every
//!   head size and element type; [`cached`] is for decoding.
//! - Values that are kept per query (log-sum-exps, `delta`, the first visible key) lie in rows of
//!   [`padded`] `(query_time)`, so that tiles of them need no look at the end.
//! - Source: Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2".

pub mod backward;
pub mod cached;
pub mod forward;
pub mod general;
mod tiles;

pub use backward::{AttentionDelta, AttentionKeyGradients, AttentionQueryGradient};
pub use cached::{CachedAttention, CombineParts};
pub use forward::AttentionForward;
pub use general::{GeneralForward, GeneralKeyGradients, GeneralQueryGradient};

use crate::asm::{Assembler, Description, Global, LANES, Pred, U32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Queries of a tile, and the unit to which the time of values per query is padded.
pub const QUERIES: u32 = 64;

/// What the kernels' sizes mean.
const SIZES: &[&str] = &["batch", "query_time", "key_time", "heads", "key_heads", "head_size"];

/// In place of a first visible key: the document would begin after its token.
const NO_KEY: u32 = u32::MAX;

/// The length of a row of values per query.
pub fn padded(query_time: u32) -> u32 {
    query_time.next_multiple_of(QUERIES)
}

/// Which keys queries see.
///
/// Parameters: `first` (written, u32 `[batch, padded query time]`: the first key that each query sees; the last is its own
/// position; rows behind the last query repeat its), `bounds` (written, u32 `[batch, tiles of 64 queries, 2]`: the least and
/// the greatest `first` of each), `document_start` (u32 `[batch, key time]`; only with `documents`), `query_time`,
/// `key_time`, `window` (u32; 0: none).
///
/// A document that begins after its token gives `u32::MAX`, which the forward kernels turn into NaN.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VisibleKeys {
    /// Whether documents are given.
    pub documents: bool,
}

impl VisibleKeys {
    /// A block per tile of queries; `None` when one launch cannot cover them.
    pub fn grid(batch: u32, query_time: u32) -> Option<[u32; 3]> {
        (batch <= 65_535).then_some([query_time.div_ceil(QUERIES), batch, 1])
    }
}

impl KernelSource for VisibleKeys {
    fn build(&self) -> Kernel {
        let documents = self.documents;
        let description = Description {
            name: format!("visible_keys{}", if documents { "_documents" } else { "" }),
            summary: "the first key that each query sees, and its extremes in each tile of queries; a warp per tile"
                .to_owned(),
            block: [LANES, 1, 1],
            target: Target::Sm80,
            sizes: &["batch", "query_time"],
            work: move |sizes: &[u64]| {
                let bytes = if documents { 8 } else { 4 };
                Work { bytes: bytes * sizes[0] * sizes[1], operations: 4 * sizes[0] * sizes[1] }
            },
        };
        Assembler::assemble(description, |k| {
            let (first, bounds) = (k.write("first", Element::U32), k.write("bounds", Element::U32));
            let document_start = documents.then(|| k.read("document_start", Element::U32));
            let (query_time, key_time, window) = (k.u32("query_time"), k.u32("key_time"), k.u32("window"));
            let (tile, batch) = (k.block().named("tile"), k.block_y().named("batch"));
            let tiles = k.blocks();
            let seen: Vec<_> = (0..QUERIES / LANES)
                .map(|part| {
                    let row = tile.mad(QUERIES, k.lane()) + part * LANES;
                    let position = row.min(query_time - 1) + (key_time - query_time);
                    k.comment("a window reaches back by its length less one");
                    let before = (position + 1) - window.min(position + 1);
                    let window_start = window.eq(0).select::<U32>(0, before);
                    let start = match document_start {
                        Some(starts) => starts.from_row(batch, key_time).at(position).load_u32(),
                        None => k.constant(0),
                    };
                    let late = start.gt(position);
                    let start = start.max(window_start);
                    let place = first.from_row(batch, tiles * QUERIES).at(row);
                    place.store_u32(late.select::<U32>(NO_KEY, start));
                    start.min(position)
                })
                .collect();
            let extreme = |pick: for<'v> fn(Value<'v, U32>, Value<'v, U32>) -> Value<'v, U32>| {
                let mut result = pick(seen[0], seen[1]);
                for distance in [16, 8, 4, 2, 1] {
                    result = pick(result, k.shuffle_xor(result, distance));
                }
                result
            };
            let (least, greatest) = (extreme(|a, b| a.min(b)), extreme(|a, b| a.max(b)));
            k.if_(k.lane().eq(0), || {
                bounds.from_row(batch, tiles * 2).at(tile * 2).store_words(&[least, greatest]);
            });
        })
    }

    fn configurations() -> Vec<Self> {
        [false, true].map(|documents| Self { documents }).to_vec()
    }
}

/// Scores of a problem that are not masked for lying in the future, over all heads.
fn visible_scores(sizes: &[u64]) -> u64 {
    let (batch, query_time, key_time, heads) = (sizes[0], sizes[1], sizes[2], sizes[3]);
    let masked = query_time * query_time.saturating_sub(1) / 2;
    batch * heads * (query_time * key_time - masked)
}

/// Elements of a tensor like the query, and of one like the key.
fn elements(sizes: &[u64]) -> (u64, u64) {
    (sizes[0] * sizes[1] * sizes[3] * sizes[5], sizes[0] * sizes[2] * sizes[4] * sizes[5])
}

/// The numbers that every kernel over tiles takes, and what follows from them.
struct Problem<'a> {
    query_time: Value<'a, U32>,
    key_time: Value<'a, U32>,
    heads: Value<'a, U32>,
    key_heads: Value<'a, U32>,
    /// Query heads per key head.
    group: Value<'a, U32>,
    /// Tiles of [`QUERIES`] queries.
    tiles: Value<'a, U32>,
    /// Position of the first query.
    offset: Value<'a, U32>,
}

impl<'a> Problem<'a> {
    /// Declares the four parameters.
    fn declare(k: &'a Assembler) -> Self {
        let (query_time, key_time) = (k.u32("query_time"), k.u32("key_time"));
        let (heads, key_heads) = (k.u32("heads"), k.u32("key_heads"));
        Self {
            query_time,
            key_time,
            heads,
            key_heads,
            group: heads.div(key_heads).named("group"),
            tiles: ((query_time + (QUERIES - 1)) >> QUERIES.ilog2()).named("tiles"),
            offset: (key_time - query_time).named("offset"),
        }
    }

    /// A row of values per query: number `row` of rows of padded time.
    fn per_query(&self, values: Global<'a>, row: Value<'a, U32>) -> Global<'a> {
        values.from_row(row, self.tiles * QUERIES)
    }

    /// The least and the greatest first visible key of a tile of queries.
    fn bounds(&self, bounds: Global<'a>, batch: Value<'a, U32>, tile: Value<'a, U32>) -> [Value<'a, U32>; 2] {
        let words = bounds.from_row(batch, self.tiles * 2).at(tile * 2).load_words(2);
        [words[0], words[1]]
    }

    /// The tiles of queries, from the first to behind the last, outside which no query sees any of the keys
    /// `first_key..=last_key`. Every lane of the warp takes part.
    fn tiles_that_see(
        &self,
        k: &'a Assembler,
        bounds: Global<'a>,
        batch: Value<'a, U32>,
        [first_key, last_key]: [Value<'a, U32>; 2],
    ) -> [Value<'a, U32>; 2] {
        k.comment("the first tile with a query at or after the first key");
        let before = first_key - self.offset.min(first_key);
        let begin = before >> QUERIES.ilog2();
        k.comment("behind the last tile with a query that looks back to the last key");
        let end = k.variable::<U32>(0).named("tiles_end");
        k.for_(k.lane() + begin, self.tiles, LANES, |tile| {
            let [least, _] = self.bounds(bounds, batch, tile);
            end.set(least.le(last_key).select::<U32>(tile + 1, end.get()));
        });
        let mut greatest = end.get();
        for distance in [16, 8, 4, 2, 1] {
            greatest = greatest.max(k.shuffle_xor(greatest, distance));
        }
        [begin, greatest]
    }
}

/// The memory of one head of `[batch, time, heads, head size]`, from its first row on; rows are `width` apart.
#[derive(Clone, Copy)]
struct Head<'a> {
    memory: Global<'a>,
    /// Elements from a row to the next: heads · head size.
    width: Value<'a, U32>,
}

impl<'a> Head<'a> {
    /// Head `head` of batch row `batch`.
    fn new(
        memory: Global<'a>,
        [batch, time]: [Value<'a, U32>; 2],
        [head, heads]: [Value<'a, U32>; 2],
        size: Value<'a, U32>,
    ) -> Self {
        let width = heads * size;
        Self { memory: memory.from((batch * time).mul_wide(width)).from_row(head, size), width }
    }

    fn row(self, row: Value<'a, U32>) -> Global<'a> {
        self.memory.from_row(row, self.width)
    }
}

/// Whether a query that sees keys from `first` to its own position sees `key`.
fn sees<'a>(key: Value<'a, U32>, first: Value<'a, U32>, position: Value<'a, U32>) -> Value<'a, Pred> {
    // Keys before the first wrap around to large numbers.
    (key - first).le(position - first)
}
