//! Tiles of rows in shared memory for tensor cores.
//!
//! A tile holds rows of one head's bf16. Rows are cut into chunks of 16 bytes whose order is changed from row to row, so
//! that the eight rows that `ldmatrix` reads at a time lie in different banks.

use super::Head;
use crate::asm::{Address, Assembler, F32, U32, Value, Variable};

/// bf16 of 16 bytes.
const CHUNK: u32 = 8;

/// Scores or other products, 16 rows by 8 columns: the registers of a fragment.
pub type Sums<'a> = [Variable<'a, F32>; 4];

/// How a block of threads moves and reads tiles of rows of `size` bf16.
pub struct Tiles<'a> {
    k: &'a Assembler,
    size: u32,
    threads: u32,
    /// Of the thread's copies: the row, its first element, and the place in the tile.
    row: Value<'a, U32>,
    column: Value<'a, U32>,
    target: Value<'a, U32>,
    /// Byte offset of this lane's row and chunk for `ldmatrix`, for each 16 columns: the upper eight rows of 16 come
    /// second and the upper eight columns third, or the other way round.
    rows_first: Vec<Value<'a, U32>>,
    columns_first: Vec<Value<'a, U32>>,
}

impl<'a> Tiles<'a> {
    /// For rows of `size` elements (a power of 2 from 32) and a block of `threads` threads.
    pub fn new(k: &'a Assembler, size: u32, threads: u32) -> Self {
        let chunks = size / CHUNK;
        // Rows of fewer than eight chunks share the 128 bytes of all banks.
        let turn = |row: Value<'a, U32>| if chunks >= 8 { row & 7 } else { (row >> 1) & 3 };
        let (row, chunk) = (k.thread() >> chunks.ilog2(), k.thread() & (chunks - 1));
        let target = (row * size + (chunk ^ turn(row)) * CHUNK) << 1;
        let lane = k.lane();
        let (within, second, third) = (lane & 7, (lane >> 3) & 1, lane >> 4);
        let offsets = |row_half: Value<'a, U32>, column_half: Value<'a, U32>| {
            let row = row_half.mad(8, within);
            let start = (row * size + (column_half ^ turn(row)) * CHUNK) << 1;
            // The step's chunk is above the bits that the halves differ in, and rows are longer than all of them.
            (0..size / 16).map(|step| start ^ (step * 32)).collect()
        };
        Self {
            k,
            size,
            threads,
            row,
            column: chunk * CHUNK,
            target,
            rows_first: offsets(second, third),
            columns_first: offsets(third, second),
        }
    }

    /// Starts copying `rows` rows of `head` from row `first` on to the tile at `tile`; rows from `end` on are zero.
    pub fn copy(&self, rows: u32, head: Head<'a>, first: Value<'a, U32>, end: Value<'a, U32>, tile: Address<'a>) {
        let per_round = self.threads / (self.size / CHUNK);
        let row = first + self.row;
        let target = tile.moved(self.target);
        let mut source = head.row(row).at(self.column).global_address();
        let to_round = head.width.mul_wide(per_round * 2);
        for round in 0..rows / per_round {
            let bytes = (row + round * per_round).lt(end).select::<U32>(16, 0);
            let place = target.plus((round * per_round * self.size).into());
            self.k.copy_16_bytes(place, head.memory.from_address(source).first(), bytes);
            if (round + 1) * per_round < rows {
                source = source + to_round;
            }
        }
    }

    /// Of a tile's 16 rows from `first` on and 16 columns from `16 · step` on: A's fragment, rows × columns.
    pub fn left(&self, tile: Address<'a>, first: u32, step: usize) -> [Value<'a, U32>; 4] {
        self.k.load_matrices(self.place(tile, first, self.rows_first[step]))
    }

    /// Of the same part: B's two fragments for the rows `first..first + 8` and the next eight, columns × rows.
    pub fn right_transposed(&self, tile: Address<'a>, first: u32, step: usize) -> [[Value<'a, U32>; 2]; 2] {
        let [a, b, c, d] = self.k.load_matrices(self.place(tile, first, self.columns_first[step]));
        [[a, b], [c, d]]
    }

    /// Of the same part: B's two fragments for the step's first eight columns and the next eight, rows × columns.
    pub fn right(&self, tile: Address<'a>, first: u32, step: usize) -> [[Value<'a, U32>; 2]; 2] {
        let [a, b, c, d] = self.k.load_matrices_transposed(self.place(tile, first, self.rows_first[step]));
        [[a, b], [c, d]]
    }

    fn place(&self, tile: Address<'a>, first: u32, offset: Value<'a, U32>) -> Address<'a> {
        tile.plus((first * self.size).into()).moved(offset)
    }

    /// `left rightᵀ`: 16 rows by `rows` columns, from the tiles' whole width. `left` gives the fragment of each step.
    pub fn product_transposed(
        &self,
        left: impl Fn(usize) -> [Value<'a, U32>; 4],
        right: Address<'a>,
        rows: u32,
    ) -> Vec<Sums<'a>> {
        let sums = self.zeros(rows / 8);
        for step in 0..self.size as usize / 16 {
            let left = left(step);
            for (pair, sums) in sums.chunks_exact(2).enumerate() {
                let right = self.right_transposed(right, pair as u32 * 16, step);
                self.k.multiply_accumulate(sums[0], left, right[0]);
                self.k.multiply_accumulate(sums[1], left, right[1]);
            }
        }
        sums
    }

    /// `sums += left right`: 16 rows by the tile's width; `left` is 16 rows by as many columns as the tile has rows.
    pub fn add_product(&self, sums: &[Sums<'a>], left: &[Sums<'a>], right: Address<'a>) {
        for (group, left) in left.chunks_exact(2).enumerate() {
            let left = rounded(left);
            for (step, sums) in sums.chunks_exact(2).enumerate() {
                let right = self.right(right, group as u32 * 16, step);
                self.k.multiply_accumulate(sums[0], left, right[0]);
                self.k.multiply_accumulate(sums[1], left, right[1]);
            }
        }
    }

    /// Zeros for 16 rows by `8 · columns`.
    pub fn zeros(&self, columns: u32) -> Vec<Sums<'a>> {
        (0..columns).map(|_| std::array::from_fn(|_| self.k.variable(0.0f32))).collect()
    }

    /// The row of `16 · warp` that the first two registers of this lane's sums are of; the other two are 8 further.
    pub fn sums_row(&self) -> Value<'a, U32> {
        (self.k.warp() << 4) + (self.k.lane() >> 2)
    }

    /// The first of the two neighbouring columns of 8 that this lane's sums are of.
    pub fn sums_column(&self) -> Value<'a, U32> {
        (self.k.lane() & 3) << 1
    }

    /// Writes 16 rows of a head, times a factor per half (rows of the first two registers, rows of the others), from row
    /// `first` of the tile on as far as they are before `end`.
    pub fn store(
        &self,
        sums: &[Sums<'a>],
        factors: [Value<'a, F32>; 2],
        head: Head<'a>,
        first: Value<'a, U32>,
        end: Value<'a, U32>,
    ) {
        for (half, factor) in factors.into_iter().enumerate() {
            let row = first + self.sums_row() + half as u32 * 8;
            self.k.if_(row.lt(end), || {
                let place = head.row(row).at(self.sums_column());
                for (column, sum) in sums.iter().enumerate() {
                    let values = [0, 1].map(|lane| sum[half * 2 + lane].get() * factor);
                    place.plus(column as i64 * 8).store_vector(&values);
                }
            });
        }
    }
}

/// Two neighbouring fragments of sums as A's fragment of bf16: their layouts agree.
fn rounded<'a>(sums: &[Sums<'a>]) -> [Value<'a, U32>; 4] {
    let pair = |sums: &Sums<'a>, half: usize| sums[half].get().pack_bf16(sums[half + 1].get());
    [pair(&sums[0], 0), pair(&sums[0], 2), pair(&sums[1], 0), pair(&sums[1], 2)]
}
