//! Matrix products in f32, without tensor cores: `C = A Bᵀ (+ bias) (+ residual)` with A `[m, k]`, B `[n, k]`, C `[m, n]`. A and B may lie
//! in memory in any way that two strides describe, so one text serves all three products of a linear layer.
//!
//! - Layout: a block of 256 threads computes 64 × 64 of C, each thread 4 × 4 of it: rows `4 r + i`, columns `4 c + j`. Tiles of
//!   A and B, 16 deep, are kept in shared memory with the depth outermost, so that a thread's four rows and four
//!   columns are each one 16-byte read.
//! - Deep, narrow products are split along the depth, as in [`super::matrix_product`].
//! - Traffic: `4 (m k + n k + m n)` bytes when every operand is read once; `2 m n k` operations, each with its own
//!   rounding in f32 (fused multiply-add). Bound by arithmetic.

use crate::asm::{Assembler, Description, Global, Shared, U32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
/// Rows and columns of a block's tile.
const EXTENT: u32 = 64;
/// Depth of a tile.
const DEPTH: u32 = 16;
/// Rows and columns of a thread.
const OWN: u32 = 4;

/// `C = A Bᵀ (+ bias) (+ residual)` in f32.
///
/// Parameters: `c` (`[splits, m, n]`, written), `a`, `b`, `bias` (`[n]`, only with `bias`), `residual` (`[m, n]`, only with
/// `residual`), `m`, `n`, `k`, `split_depth` (a
/// multiple of 16), then the strides in elements `a_row`, `a_depth`, `b_row`, `b_depth` (all u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MatrixProductF32 {
    /// A bias is added to every row.
    pub bias: bool,
    /// A matrix like C is added.
    pub residual: bool,
}

impl MatrixProductF32 {
    /// Blocks for C of `m` by `n`, each in `splits` parts; `None` when one launch cannot cover them.
    pub fn grid(m: u32, n: u32, splits: u32) -> Option<[u32; 3]> {
        let (across, down) = (n.div_ceil(EXTENT), m.div_ceil(EXTENT));
        let tiles = u64::from(across) * u64::from(down);
        (tiles <= i32::MAX as u64 && splits <= 65_535).then_some([tiles as u32, 1, splits])
    }

    /// As for [`super::matrix_product::MatrixProduct::splits`].
    pub fn splits(m: u32, n: u32, k: u32, blocks: u32) -> (u32, u32) {
        /// Tiles of depth below which a part is not worth its own pass over C.
        const LEAST: u32 = 16;
        let tiles = (m.div_ceil(EXTENT) * n.div_ceil(EXTENT)).max(1);
        let deep = k.div_ceil(DEPTH).max(1);
        let wanted = (blocks / tiles).clamp(1, (deep / LEAST).max(1));
        let split_depth = deep.div_ceil(wanted) * DEPTH;
        (k.div_ceil(split_depth).max(1), split_depth)
    }
}

/// Copies the tile of one operand that begins at row `first` and depth `at` to shared memory, depth outermost.
fn copy<'a>(
    k: &'a Assembler,
    memory: Global<'a>,
    tile: Shared<'a>,
    (first, rows): (Value<'a, U32>, Value<'a, U32>),
    (at, depth_end): (Value<'a, U32>, Value<'a, U32>),
    (row_stride, depth_stride): (Value<'a, U32>, Value<'a, U32>),
) {
    let thread = k.thread();
    // Neighbouring threads go along the rows: contiguous when the operand is transposed, else 16 rows share the lines that
    // the next rounds read again from the cache.
    let (row, depth) = (thread & (EXTENT - 1), thread >> EXTENT.ilog2());
    for round in 0..EXTENT * DEPTH / THREADS {
        let depth = depth + round * (THREADS / EXTENT);
        let inside = (first + row).lt(rows) & (at + depth).lt(depth_end);
        let place = memory.from_row(first + row, row_stride).from_row(at + depth, depth_stride).first();
        tile.at(depth.mad(EXTENT, row)).store(place.load_if(inside, 0.0));
    }
}

impl KernelSource for MatrixProductF32 {
    fn build(&self) -> Kernel {
        let Self { bias, residual } = *self;
        let ending = match (bias, residual) {
            (false, false) => "",
            (true, false) => "_bias",
            (false, true) => "_residual",
            (true, true) => "_bias_residual",
        };
        let description = Description {
            name: format!("matrix_product_f32{ending}"),
            summary: format!(
                "C [m, n] = A [m, k] B [n, k]^T{}{} in f32; tiles of {EXTENT} x {EXTENT} x {DEPTH}",
                if bias { " + bias" } else { "" },
                if residual { " + residual" } else { "" }
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["m", "n", "k"],
            work: move |sizes: &[u64]| {
                let (m, n, k) = (sizes[0], sizes[1], sizes[2]);
                let outputs = if residual { 2 } else { 1 };
                Work { bytes: 4 * (m * k + n * k + outputs * m * n), operations: 2 * m * n * k }
            },
        };
        Assembler::assemble(description, |k| {
            let (c, a, b) = (k.write("c", Element::F32), k.read("a", Element::F32), k.read("b", Element::F32));
            let bias = bias.then(|| k.read("bias", Element::F32));
            let residual = residual.then(|| k.read("residual", Element::F32));
            let (m, n, depth, split_depth) = (k.u32("m"), k.u32("n"), k.u32("k"), k.u32("split_depth"));
            let a_strides = (k.u32("a_row"), k.u32("a_depth"));
            let b_strides = (k.u32("b_row"), k.u32("b_depth"));

            let across = (n + (EXTENT - 1)) >> EXTENT.ilog2();
            let tile_m = (k.block().div(across) * EXTENT).named("tile_m");
            let tile_n = (k.block().rem(across) * EXTENT).named("tile_n");
            let part = k.block_z().named("part");
            let depth_begin = (part * split_depth).named("depth_begin");
            let depth_end = (depth_begin + split_depth).min(depth).named("depth_end");
            let (a_tile, b_tile) = (k.shared(Element::F32, EXTENT * DEPTH), k.shared(Element::F32, EXTENT * DEPTH));
            let own_row = ((k.thread() >> 4) * OWN).named("own_row");
            let own_column = ((k.thread() & 15) * OWN).named("own_column");
            let sums: [[_; OWN as usize]; OWN as usize] =
                std::array::from_fn(|_| std::array::from_fn(|_| k.variable(0.0f32)));

            k.for_(depth_begin, depth_end, DEPTH, |at| {
                copy(k, a, a_tile, (tile_m, m), (at, depth_end), a_strides);
                copy(k, b, b_tile, (tile_n, n), (at, depth_end), b_strides);
                k.barrier();
                let (a_place, b_place) = (a_tile.at(own_row), b_tile.at(own_column));
                for step in 0..i64::from(DEPTH) {
                    let a_values = a_place.plus(step * i64::from(EXTENT)).load_vector::<{ OWN as usize }>();
                    let b_values = b_place.plus(step * i64::from(EXTENT)).load_vector::<{ OWN as usize }>();
                    for (sums, a) in sums.iter().zip(a_values) {
                        for (sum, b) in sums.iter().zip(b_values) {
                            sum.set(a.fma(b, sum.get()));
                        }
                    }
                }
                k.barrier();
            });

            let c = c.from(part.mul_wide(m) * n.wide());
            for (i, sums) in sums.iter().enumerate() {
                let row = tile_m + own_row + i as u32;
                let out = c.from_row(row, n);
                for (j, sum) in sums.iter().enumerate() {
                    let column = tile_n + own_column + j as u32;
                    let inside = row.lt(m) & column.lt(n);
                    let mut value = sum.get();
                    if let Some(bias) = bias {
                        value = value + bias.at(column).load_if(inside, 0.0);
                    }
                    if let Some(residual) = residual {
                        value = value + residual.from_row(row, n).at(column).load_if(inside, 0.0);
                    }
                    out.at(column).store_if(inside, value);
                }
            }
        })
    }

    fn configurations() -> Vec<Self> {
        [(false, false), (true, false), (false, true), (true, true)]
            .map(|(bias, residual)| Self { bias, residual })
            .to_vec()
    }
}
