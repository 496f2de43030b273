//! Matrix products of bf16 on the tensor cores, accumulated in f32: `C = A Bᵀ (+ bias) (+ residual)` with A `[m, k]`, B `[n, k]` and C
//! `[m, n]`, where A and B may each be stored transposed (`[k, m]`, `[k, n]`). The three products of a linear layer are
//!
//! | product | A | B |
//! |---|---|---|
//! | forward `Y = X Wᵀ` | X `[rows, in]` | W `[out, in]` |
//! | input gradient `dX = dY W` | dY `[rows, out]` | W, transposed |
//! | weight gradient `dW = dYᵀ X` | dY, transposed | X, transposed |
//!
//! - Layout: a block computes one tile of C, each warp a part of it as 16 × 8 fragments of `mma.sync`. Tiles of A and B, 64
//!   deep, stream through `STAGES` buffers in shared memory by `cp.async`. The 16-byte chunks of a row are stored at
//!   `chunk xor (row mod 8)`, so that both the copies and `ldmatrix` (plain for operands whose depth is contiguous,
//!   transposing for the others) touch every bank once. Blocks walk C in groups of 8 tile rows, which keeps the tiles of
//!   B that they share in the L2 cache.
//! - Deep, narrow products (weight gradients) are split along the depth: each part writes its own C, and [`SumParts`](super::sum_parts::SumParts)
//!   adds them in order, so the result does not depend on timing.
//! - Traffic: `2 (m k + n k) + bytes(C) m n` when every operand is read once; `2 m n k` operations. Bound by arithmetic for all
//!   but thin products.
//! - Operands whose contiguous dimension is no multiple of 8 cannot be copied in 16-byte chunks: a variant loads their
//!   elements one by one.
//! - Source: PTX ISA, "mma.m16n8k16"; the multistage scheme is that of CUTLASS 2.

use crate::asm::{Address, Assembler, Description, F32, Global, Pred, Shared, U32, U64, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

/// Depth of a tile: 128 bytes of a row.
const DEPTH: u32 = 64;
/// Tiles of A and B in shared memory: one in use, the others on their way.
const STAGES: u32 = 3;
/// Elements of a 16-byte chunk.
const CHUNK: u32 = 8;
/// Rows of tiles that are walked together.
const GROUP: u32 = 8;

/// `C = A Bᵀ (+ bias) (+ residual)`.
///
/// Parameters: `c` (of `output`, `[splits, m, n]`, written), `a`, `b` (bf16), `bias` (f32 `[n]`, only with `bias`),
/// `residual` (of `output`, `[m, n]`, only with `residual`), `m`, `n`,
/// `k`, `split_depth` (u32: depth of a part, a multiple of 64).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MatrixProduct {
    /// A is stored `[k, m]`.
    pub a_transposed: bool,
    /// B is stored `[k, n]`.
    pub b_transposed: bool,
    /// Type of C.
    pub output: Element,
    /// A bias is added to every row.
    pub bias: bool,
    /// A matrix like C is added.
    pub residual: bool,
    /// The product is added to what C holds. Neither with a bias nor with a residual, and in one part.
    pub accumulate: bool,
    /// The contiguous dimensions of A and B are multiples of 8, and `n` is even.
    pub aligned: bool,
    /// Size of a block's tile of C.
    pub tile: Tile,
}

/// The part of C that a block computes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Tile {
    /// 128 × 128 by 4 warps of 64 × 64.
    Large,
    /// 64 × 64 by 4 warps of 32 × 32.
    Small,
}

impl Tile {
    /// Rows and columns of the tile.
    pub fn extent(self) -> u32 {
        match self {
            Self::Large => 128,
            Self::Small => 64,
        }
    }

    /// Rows and columns of a warp's part.
    fn warp(self) -> (u32, u32) {
        match self {
            Self::Large => (64, 64),
            Self::Small => (32, 32),
        }
    }

    fn threads(self) -> u32 {
        let (rows, columns) = self.warp();
        (self.extent() / rows) * (self.extent() / columns) * 32
    }
}

/// One operand of the product: its tiles in global and shared memory.
struct Source<'a> {
    k: &'a Assembler,
    /// The tile's rows and columns as they are stored.
    stored: (u32, u32),
    /// The depth is the rows (stored transposed), not the columns.
    transposed: bool,
    aligned: bool,
    threads: u32,
    memory: Global<'a>,
    tile: Shared<'a>,
    /// Address of this thread's first chunk of the next tile, and the bytes to that of the tile after it.
    next: Variable<'a, U64>,
    to_next: Value<'a, U64>,
    /// Bytes from the chunk of one round of copies to that of the next.
    to_round: Value<'a, U64>,
    /// Where the first chunk goes in the first stage.
    target: Address<'a>,
    /// This thread's position along the depth in a tile, and where this block's part of the depth ends.
    own_depth: Value<'a, U32>,
    depth_end: Value<'a, U32>,
    /// This thread's position across the depth, and where the operand ends.
    own: Value<'a, U32>,
    extent: Value<'a, U32>,
}

/// Moves a stage's place, in bytes from the first, to the next one.
fn advance_stage(extent: u32, stage: Variable<'_, U32>) {
    let bytes = extent * DEPTH * Element::Bf16.bytes() as u32;
    let next = stage.get() + bytes;
    stage.set(next.eq(STAGES * bytes).select::<U32>(0, next));
}

impl<'a> Source<'a> {
    /// `first` and `extent`: the tile's first row across the depth, and how many the operand has. `depth`: the operand's,
    /// and begin and end of this block's part.
    fn new(
        k: &'a Assembler,
        threads: u32,
        transposed: bool,
        aligned: bool,
        memory: Global<'a>,
        (first, extent): (Value<'a, U32>, Value<'a, U32>),
        (depth, depth_begin, depth_end): (Value<'a, U32>, Value<'a, U32>, Value<'a, U32>),
        tile: Shared<'a>,
    ) -> Self {
        let bytes = memory.element().bytes() as u32;
        let side = tile.count() / STAGES / DEPTH;
        let stored = if transposed { (DEPTH, side) } else { (side, DEPTH) };
        let chunks = stored.1 / CHUNK;
        let (row, chunk) = (k.thread() >> chunks.ilog2(), k.thread() & (chunks - 1));
        let target = tile.at(row.mad(stored.1, (chunk ^ (row & 7)) * CHUNK));
        let column = chunk * CHUNK;
        let (own_depth, own) = if transposed { (row, first + column) } else { (column, first + row) };
        let (first_row, first_column) = if transposed { (depth_begin + row, own) } else { (own, depth_begin + column) };
        let width = if transposed { extent } else { depth };
        let next = k.variable(memory.from_row(first_row, width).at(first_column).global_address());
        let to_next = if transposed { width.mul_wide(DEPTH * bytes) } else { k.constant(u64::from(DEPTH * bytes)) };
        let to_round = width.mul_wide(threads / chunks * bytes);
        Self {
            k,
            stored,
            transposed,
            aligned,
            threads,
            memory,
            tile,
            next,
            to_next,
            to_round,
            target,
            own_depth,
            depth_end,
            own,
            extent,
        }
    }

    /// Starts copying the next tile, which begins at depth `at`, to the stage `stage` (bytes from the first).
    fn copy(&self, at: Value<'a, U32>, stage: Value<'a, U32>) {
        let (rows, columns) = self.stored;
        let per_round = self.threads / (columns / CHUNK);
        let target = self.target.moved(stage);
        let depth = at + self.own_depth;
        let mut address = self.next.get();
        for round in 0..rows / per_round {
            let (depth, own) = if self.transposed {
                (depth + round * per_round, self.own)
            } else {
                (depth, self.own + round * per_round)
            };
            let inside = |lane: u32| {
                let (depth, own) = if self.transposed { (depth, own + lane) } else { (depth + lane, own) };
                depth.lt(self.depth_end) & own.lt(self.extent)
            };
            let target = target.plus(i64::from(round * per_round * columns));
            let source = self.memory.from_address(address).first();
            if self.aligned {
                self.k.copy_16_bytes(target, source, inside(0).select::<U32>(16, 0));
            } else {
                let values: Vec<_> =
                    (0..CHUNK).map(|lane| source.plus(i64::from(lane)).load_if(inside(lane), 0.0)).collect();
                target.store_vector(&values);
            }
            address = address + self.to_round;
        }
        self.next.set(self.next.get() + self.to_next);
    }

    /// Per group of 16 rows of the operand, the place of this lane's row for `ldmatrix` at the tile's depths 0, 16, 32,
    /// 48. `first` is the warp's first row; `pair_rows`: the lanes' upper halves go along the rows first (as A's fragments
    /// want), or along the depth first (as B's).
    fn places(&self, first: Value<'a, U32>, groups: u32, pair_rows: bool) -> Vec<[Address<'a>; 4]> {
        let k = self.k;
        let lane = k.lane();
        let (within, second, third) = (lane & 7, (lane >> 3) & 1, lane >> 4);
        let (row_half, depth_half) = if pair_rows { (second, third) } else { (third, second) };
        let (_, columns) = self.stored;
        (0..groups)
            .map(|group| {
                let mut at_depth: [Option<Address<'a>>; 4] = [None; 4];
                if self.transposed {
                    // The stored row is the depth, the chunk is the operand's row.
                    let chunk = ((first >> 3) + row_half + group * 2) ^ within;
                    let row = depth_half.mad(8u32, within);
                    let place = self.tile.at(row.mad(columns, chunk * CHUNK));
                    for (step, at) in at_depth.iter_mut().enumerate() {
                        *at = Some(place.plus((step as u32 * 16 * columns).into()));
                    }
                } else {
                    let row = row_half.mad(8u32, within) + first;
                    for (step, at) in at_depth.iter_mut().enumerate() {
                        let chunk = (depth_half ^ within) ^ (2 * step as u32);
                        let place = self.tile.at(row.mad(columns, chunk * CHUNK));
                        *at = Some(place.plus((group * 16 * columns).into()));
                    }
                }
                at_depth.map(|place| match place {
                    Some(place) => place,
                    None => unreachable!("both ways above fill all four"),
                })
            })
            .collect()
    }

    fn fragments(&self, place: Address<'a>, stage: Value<'a, U32>) -> [Value<'a, U32>; 4] {
        let place = place.moved(stage);
        if self.transposed { self.k.load_matrices_transposed(place) } else { self.k.load_matrices(place) }
    }
}

impl MatrixProduct {
    fn name(&self) -> String {
        let letter = |transposed: bool| if transposed { "t" } else { "n" };
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        format!(
            "matrix_product_{}{}_{}_{}{}{}{}{}",
            letter(self.a_transposed),
            letter(self.b_transposed),
            self.output,
            self.tile.extent(),
            flag(self.bias, "_bias"),
            flag(self.residual, "_residual"),
            flag(self.accumulate, "_accumulate"),
            flag(!self.aligned, "_unaligned"),
        )
    }

    /// Blocks for C of `m` by `n`, each in `splits` parts; `None` when one launch cannot cover them.
    pub fn grid(&self, m: u32, n: u32, splits: u32) -> Option<[u32; 3]> {
        let extent = self.tile.extent();
        let tiles = u64::from(m.div_ceil(extent)) * u64::from(n.div_ceil(extent));
        (tiles <= i32::MAX as u64 && splits <= 65_535).then_some([tiles as u32, 1, splits])
    }

    /// How many parts the depth `k` of a product with so few tiles of C is best split into, and the depth of each, on a
    /// device that runs `blocks` blocks at a time.
    pub fn splits(&self, m: u32, n: u32, k: u32, blocks: u32) -> (u32, u32) {
        /// Tiles of depth below which a part is not worth its own pass over C.
        const LEAST: u32 = 8;
        let extent = self.tile.extent();
        let tiles = (m.div_ceil(extent) * n.div_ceil(extent)).max(1);
        let deep = k.div_ceil(DEPTH).max(1);
        let wanted = (blocks / tiles).clamp(1, (deep / LEAST).max(1));
        let split_depth = deep.div_ceil(wanted) * DEPTH;
        (k.div_ceil(split_depth).max(1), split_depth)
    }
}

impl KernelSource for MatrixProduct {
    fn build(&self) -> Kernel {
        let Self { a_transposed, b_transposed, output, bias, residual, accumulate, aligned, tile } = *self;
        let (extent, threads) = (tile.extent(), tile.threads());
        let bytes = output.bytes() as u64;
        let description = Description {
            name: self.name(),
            summary: format!(
                "C [m, n] {} A [m, k] B [n, k]^T{}{} in bf16 with f32 sums; A {}, B {}; tiles of {extent} x {extent} x {DEPTH}",
                if accumulate { "+=" } else { "=" },
                if bias { " + bias" } else { "" },
                if residual { " + residual" } else { "" },
                if a_transposed { "stored [k, m]" } else { "stored [m, k]" },
                if b_transposed { "stored [k, n]" } else { "stored [n, k]" },
            ),
            block: [threads, 1, 1],
            target: Target::Sm80,
            sizes: &["m", "n", "k"],
            work: move |sizes: &[u64]| {
                let (m, n, k) = (sizes[0], sizes[1], sizes[2]);
                let outputs = if residual || accumulate { 2 } else { 1 };
                Work { bytes: 2 * (m * k + n * k) + outputs * bytes * m * n, operations: 2 * m * n * k }
            },
        };
        Assembler::assemble(description, |k| {
            let (c, a, b) = (k.write("c", output), k.read("a", Element::Bf16), k.read("b", Element::Bf16));
            let bias = bias.then(|| k.read("bias", Element::F32));
            let residual = residual.then(|| k.read("residual", output));
            let (m, n, depth, split_depth) = (k.u32("m"), k.u32("n"), k.u32("k"), k.u32("split_depth"));
            let warp = k.warp().named("warp");

            k.comment("the tile of this block: groups of tile rows, column by column");
            let tile_columns = (n + (extent - 1)) >> extent.ilog2();
            let tile_rows = (m + (extent - 1)) >> extent.ilog2();
            let in_group = tile_columns * GROUP;
            let group = k.block().div(in_group);
            let first_row = group * GROUP;
            let rows = (tile_rows - first_row).min(GROUP);
            let position = k.block() - group * in_group;
            let tile_m = ((first_row + position.rem(rows)) * extent).named("tile_m");
            let tile_n = (position.div(rows) * extent).named("tile_n");
            let part = k.block_z().named("part");
            let depth_begin = (part * split_depth).named("depth_begin");
            let depth_end = (depth_begin + split_depth).min(depth).named("depth_end");

            let a_tile = k.shared(Element::Bf16, STAGES * extent * DEPTH);
            let b_tile = k.shared(Element::Bf16, STAGES * extent * DEPTH);
            let source = |memory, transposed: bool, first, rows, tile| {
                Source::new(
                    k,
                    threads,
                    transposed,
                    aligned,
                    memory,
                    (first, rows),
                    (depth, depth_begin, depth_end),
                    tile,
                )
            };
            let a = source(a, a_transposed, tile_m, m, a_tile);
            let b = source(b, b_transposed, tile_n, n, b_tile);

            k.comment("this warp's part of the tile, and the places of its fragments");
            let (warp_rows, warp_columns) = tile.warp();
            let across = extent / warp_columns;
            let warp_m = ((warp >> across.ilog2()) * warp_rows).named("warp_m");
            let warp_n = ((warp & (across - 1)) * warp_columns).named("warp_n");
            let a_places = a.places(warp_m, warp_rows / 16, true);
            let b_places = b.places(warp_n, warp_columns / 16, false);
            // The lane's row and columns in a fragment: found again where they are needed, which takes no registers meanwhile.
            let in_fragment = || {
                let lane = k.lane();
                (lane >> 2, (lane & 3) * 2)
            };
            let at_start = accumulate.then(in_fragment);
            let sums: Vec<Vec<[Variable<'_, F32>; 4]>> = (0..warp_rows / 16)
                .map(|row_group| {
                    (0..warp_columns / 8)
                        .map(|column_group| {
                            std::array::from_fn(|number| {
                                let Some((fragment_row, fragment_column)) = at_start else {
                                    return k.variable(0.0f32);
                                };
                                // Half of a fragment's numbers are 8 rows below the others.
                                let (half, lane) = (number as u32 / 2, number as u32 % 2);
                                let row = tile_m + warp_m + fragment_row + (row_group * 16 + half * 8);
                                let column = tile_n + warp_n + fragment_column + (column_group * 8 + lane);
                                let inside = row.lt(m) & column.lt(n);
                                k.variable(c.from_row(row, n).at(column).load_if(inside, 0.0))
                            })
                        })
                        .collect()
                })
                .collect();

            k.comment("the first tiles set out");
            let loading = k.variable::<U32>(0).named("loading_stage");
            let ahead = k.variable(depth_begin).named("ahead");
            let load_next = || {
                k.if_(ahead.get().lt(depth_end), || {
                    a.copy(ahead.get(), loading.get());
                    b.copy(ahead.get(), loading.get());
                });
                k.commit_copies();
                ahead.set(ahead.get() + DEPTH);
                advance_stage(extent, loading);
            };
            for _ in 0..STAGES - 1 {
                load_next();
            }
            k.comment("one tile after the other");
            let stage = k.variable::<U32>(0).named("stage");
            k.for_(depth_begin, depth_end, DEPTH, |_| {
                k.wait_copies(STAGES - 2);
                k.barrier();
                load_next();
                for step in 0..4 {
                    let a_parts: Vec<_> =
                        a_places.iter().map(|places| a.fragments(places[step], stage.get())).collect();
                    let b_parts: Vec<_> =
                        b_places.iter().map(|places| b.fragments(places[step], stage.get())).collect();
                    for (sums, a_part) in sums.iter().zip(&a_parts) {
                        for (column, sum) in sums.iter().enumerate() {
                            let b_part = b_parts[column / 2];
                            let half = column % 2 * 2;
                            k.multiply_accumulate(*sum, *a_part, [b_part[half], b_part[half + 1]]);
                        }
                    }
                }
                advance_stage(extent, stage);
            });

            k.comment("the sums go out, two neighbouring columns at a time");
            let (fragment_row, fragment_column) = in_fragment();
            let c = c.from(part.mul_wide(m) * n.wide());
            for (row_group, sums) in sums.iter().enumerate() {
                for half in 0..2 {
                    let row = tile_m + warp_m + fragment_row + (row_group as u32 * 16 + half * 8);
                    let row_inside = row.lt(m);
                    let out = c.from_row(row, n);
                    let residual = residual.map(|residual| residual.from_row(row, n));
                    for (column_group, sum) in sums.iter().enumerate() {
                        let column = tile_n + warp_n + fragment_column + column_group as u32 * 8;
                        let values = [sum[half as usize * 2].get(), sum[half as usize * 2 + 1].get()];
                        store_pair(k, out, row_inside, column, n, values, (bias, residual), aligned);
                    }
                }
            }
        })
    }

    fn configurations() -> Vec<Self> {
        let mut all = Vec::new();
        for (tile, aligned) in [(Tile::Large, true), (Tile::Small, true), (Tile::Small, false)] {
            let forward = Self {
                a_transposed: false,
                b_transposed: false,
                output: Element::Bf16,
                bias: false,
                residual: false,
                accumulate: false,
                aligned,
                tile,
            };
            let input_gradient = Self { b_transposed: true, ..forward };
            let weight_gradient = Self { a_transposed: true, b_transposed: true, output: Element::F32, ..forward };
            let (biased, residual) = (Self { bias: true, ..forward }, Self { residual: true, ..forward });
            let added = Self { accumulate: true, ..weight_gradient };
            all.extend([
                forward,
                biased,
                residual,
                Self { bias: true, ..residual },
                input_gradient,
                weight_gradient,
                added,
            ]);
        }
        all
    }
}

/// Writes two neighbouring elements of a row of C, as far as they are inside; at once where the row length allows.
fn store_pair<'a>(
    k: &'a Assembler,
    out: Global<'a>,
    row_inside: Value<'a, Pred>,
    column: Value<'a, U32>,
    n: Value<'a, U32>,
    values: [Value<'a, F32>; 2],
    (bias, residual): (Option<Global<'a>>, Option<Global<'a>>),
    aligned: bool,
) {
    let place = out.at(column);
    let inside = [row_inside & column.lt(n), row_inside & (column + 1).lt(n)];
    let add = |values: [Value<'a, F32>; 2], addend: Option<Global<'a>>| match addend {
        None => values,
        Some(addend) => {
            let place = addend.at(column);
            [values[0] + place.load_if(inside[0], 0.0), values[1] + place.plus(1).load_if(inside[1], 0.0)]
        }
    };
    let values = add(add(values, bias), residual);
    if aligned {
        // n is even: both are inside or neither.
        k.if_(inside[1], || place.store_vector(&values));
    } else {
        place.store_if(inside[0], values[0]);
        place.plus(1).store_if(inside[1], values[1]);
    }
}
