//! Products of a few rows with a weight, as decoding needs them: `y = x Wᵀ + bias + residual` for x of 1 to 64 rows in bf16,
//! accumulated in f32 on tensor cores. The weight is read once, straight into the registers that the products take.
//!
//! - Layout: a block has 8 rows of the weight, 32 for more than 8 rows of x, since x is read once per block; its warps
//!   take parts of `PART` of the depth in turn and their sums are added in order. Lane `l` with `g = l / 4` and `t = l mod 4` reads 16 bytes of row `g` from column `8 t` of every 32 on,
//!   and the same columns of rows `g`, `g + 8`, … of x. `mma.m16n8k16` wants other columns in these registers, but as both
//!   operands have the same ones, only the order of the sum differs.
//! - [`FewRowsProduct::gated`]: two weights at once, and `silu(x Gᵀ) · (x Uᵀ)` of them, as SwiGLU's kernel after two products would
//!   give it.
//! - How a row's sum is formed depends on the depth alone, not on how many rows there are.
//! - Traffic: the weight once; x once per block, from the caches. Bound by memory.

use crate::asm::{Address, Assembler, Description, Global, LANES, Pred, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;
/// Rows of the weight, columns of the result, of a tile.
const COLUMNS: u32 = 8;
/// Columns of the weight that the lanes of a row read at a time.
const STEP: u32 = 32;
/// Columns of the weight that a warp takes together.
const PART: u32 = 2 * STEP;
/// Columns that the warps of a block take together.
const PASS: u32 = WARPS * PART;
/// Pieces that are on their way or being worked on.
const AHEAD: u32 = 4;
/// 32-bit words of 16 bytes, and bf16 of them.
const WORDS: usize = 4;
const WIDTH: u32 = 8;

/// The most rows of x.
pub const MOST_ROWS: u32 = 64;

/// `output = input weightᵀ + bias + residual`.
///
/// Parameters: `output` (`[rows, outer]`, written), `input` (bf16 `[rows, depth]`), `weight` (bf16 `[outer, depth]`; gated: that of the
/// gate), `up` (like `weight`, when gated), `bias` (f32 `[outer]`, with a bias), `residual` (like the output, with one), `rows`, `outer`, `depth` (u32). The depth is a multiple of 8.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FewRowsProduct {
    /// Type of output and residual.
    pub output: Element,
    /// A bias is added.
    pub bias: bool,
    /// A residual is added.
    pub residual: bool,
    /// Rows that the block's products have room for: 16, 32 or 64.
    pub room: u32,
    /// Tiles of 8 columns of a block: 1 or 4.
    pub tiles: u32,
    /// There are two weights. Without bias and residual.
    pub gated: bool,
}

impl FewRowsProduct {
    /// The best room and tiles for so many rows; `None` above [`MOST_ROWS`].
    pub fn best(rows: u32) -> Option<(u32, u32)> {
        let of = |(most, room, tiles)| (rows <= most).then_some((room, tiles));
        [(8, 16, 1), (16, 16, 4), (32, 32, 4), (MOST_ROWS, 64, 4)].into_iter().find_map(of)
    }

    /// Blocks for so many columns of the result.
    pub fn grid(&self, outer: u32) -> Option<[u32; 3]> {
        Some([outer.div_ceil(COLUMNS * self.tiles), 1, 1])
    }

    /// Steps that a lane takes together: the two of a part, or one of them where tiles are many.
    fn steps(&self) -> usize {
        if self.tiles == 1 { 2 } else { 1 }
    }

    /// Bytes of a block's piece in shared memory.
    fn slot(&self) -> u32 {
        THREADS * self.weights() * self.tiles * self.steps() as u32 * 16
    }

    fn weights(&self) -> u32 {
        if self.gated { 2 } else { 1 }
    }
}

impl KernelSource for FewRowsProduct {
    fn build(&self) -> Kernel {
        let Self { output: output_element, bias, residual, room, tiles, gated } = *self;
        assert!(!gated || !(bias || residual), "a gated product takes neither bias nor residual");
        let (steps, columns) = (self.steps(), COLUMNS * tiles);
        let (slot_bytes, weight_count) = (self.slot(), self.weights());
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let output_bytes = output_element.bytes() as u64 * (1 + u64::from(residual));
        let description = Description {
            name: format!(
                "few_rows_product_{output_element}_{room}x{columns}{}{}{}",
                flag(bias, "_bias"),
                flag(residual, "_residual"),
                flag(gated, "_gated")
            ),
            summary: format!(
                "output = input weight^T for at most {room} rows; {columns} rows of the weight per block, warps share the depth"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "outer", "depth"],
            work: move |sizes: &[u64]| Work {
                bytes: 2 * sizes[2] * (sizes[0] + u64::from(weight_count) * sizes[1])
                    + output_bytes * sizes[0] * sizes[1],
                operations: 2 * u64::from(weight_count) * sizes[0] * sizes[1] * sizes[2],
            },
        };
        Assembler::assemble(description, |k| {
            let output = k.write("output", output_element);
            let (input, weight) = (k.read("input", Element::Bf16), k.read("weight", Element::Bf16));
            let up = gated.then(|| k.read("up", Element::Bf16));
            let bias = bias.then(|| k.read("bias", Element::F32));
            let residual = residual.then(|| k.read("residual", output_element));
            let (rows, outer, depth) = (k.u32("rows"), k.u32("outer"), k.u32("depth"));

            k.comment("this lane's rows of the weight and of x; rows beyond the last repeat it");
            let (group, place) = ((k.lane() >> 2).named("group"), ((k.lane() & 3) << 3).named("place"));
            let first_column = (k.block() * columns).named("first_column");
            let of_tile = |tile| (first_column + group + tile * COLUMNS).min(outer - 1);
            let rows_of_tiles: Vec<_> = (0..tiles).map(of_tile).collect();
            let weights: Vec<_> = [Some(weight), up]
                .into_iter()
                .flatten()
                .flat_map(|weight| rows_of_tiles.iter().map(move |row| weight.from_row(*row, depth)))
                .collect();
            let tile_count = weights.len() as u32;
            // Two rows of x per 16.
            let inputs: Vec<_> =
                (0..room / 8).map(|half| input.from_row((group + half * 8).min(rows - 1), depth)).collect();
            // By rows of x, then by columns.
            let sums: Vec<Vec<[Variable<'_, _>; 4]>> = (0..room / 16)
                .map(|_| (0..tile_count).map(|_| std::array::from_fn(|_| k.variable(0.0f32))).collect())
                .collect();

            k.comment(
                "every lane keeps the words that it will want in its own places of shared memory, some pieces ahead",
            );
            // Sums of one warp: by rows of x, then by weights, then by columns.
            let width = weight_count * columns;
            let sum_count = WARPS * room * width;
            let shared = k.shared(Element::F32, (AHEAD * slot_bytes / 4).max(sum_count));
            let begin = (k.warp() * PART).named("begin");
            let places = shared.at(k.thread() * (WIDTH / 2)).cast(Element::Bf16);
            let ring = Ring { k, places, weights, begin, place, depth, steps, slot_bytes };
            for piece in 0..AHEAD - 1 {
                ring.fetch(k.constant(piece), k.constant(piece));
            }
            let slot = k.variable(0u32).named("slot");
            let parts = (depth - begin.min(depth) + (PASS - 1)) >> PASS.ilog2();
            let pieces = (parts * ring.pieces_of_part()).named("pieces");
            k.for_(0, pieces, 1, |piece| {
                let at = ring.column(piece);
                let inside: Vec<_> = (0..steps as u32).map(|step| (at + STEP * step).lt(depth)).collect();
                let inputs: Vec<_> = inputs.iter().map(|input| load(input.at(at), &inside)).collect();
                let last = slot.get().eq(0).select::<U32>(AHEAD - 1, slot.get() - 1);
                ring.fetch(piece + (AHEAD - 1), last);
                k.wait_copies(AHEAD - 1);
                for step in 0..steps {
                    let weights: Vec<_> = (0..tile_count)
                        .map(|tile| ring.at(slot.get(), step as u32 * tile_count + tile).load_words(WORDS))
                        .collect();
                    for (half, sums) in sums.iter().enumerate() {
                        let (lower, upper) = (&inputs[2 * half][step], &inputs[2 * half + 1][step]);
                        for pair in [0, 2] {
                            let a = [lower[pair], upper[pair], lower[pair + 1], upper[pair + 1]];
                            for (sums, weights) in sums.iter().zip(&weights) {
                                k.multiply_accumulate(*sums, a, [weights[pair], weights[pair + 1]]);
                            }
                        }
                    }
                }
                slot.set((slot.get() + 1).rem(AHEAD));
            });

            k.comment("the sums over the warps, in order");
            k.wait_copies(0);
            k.barrier();
            let own = shared.at(k.warp() * (room * width) + (group * width + (place >> 2)));
            for (half, sums) in (0..).zip(&sums) {
                for (tile, sums) in (0..).zip(sums) {
                    let sums = sums.map(Variable::get);
                    let own = own.plus(half * i64::from(16 * width) + tile * i64::from(COLUMNS));
                    own.store_vector(&sums[..2]);
                    own.plus(i64::from(8 * width)).store_vector(&sums[2..]);
                }
            }
            k.barrier();
            for pass in 0..(room * columns).div_ceil(THREADS) {
                let index = k.thread() + pass * THREADS;
                let row = index >> columns.ilog2();
                let column_of_block = index & (columns - 1);
                let column = first_column + column_of_block;
                k.if_(row.lt(rows) & column.lt(outer), || {
                    let parts = shared.at(row * width + column_of_block);
                    let sum_of = |weight: u32| {
                        let sums =
                            (0..WARPS).map(|warp| parts.plus((warp * room * width + weight * columns).into()).load());
                        let Some(sum) = sums.reduce(|a, b| a + b) else { unreachable!("there are warps") };
                        sum
                    };
                    let mut sum = sum_of(0);
                    if gated {
                        // Rounded as the results of two products are.
                        let (gate, up) = (sum.round_to_bf16(), sum_of(1).round_to_bf16());
                        sum = gate * gate.sigmoid() * up;
                    }
                    if let Some(bias) = bias {
                        sum = sum + bias.at(column).load();
                    }
                    if let Some(residual) = residual {
                        sum = sum + residual.from_row(row, outer).at(column).load();
                    }
                    output.from_row(row, outer).at(column).store(sum);
                });
            }
        })
    }

    fn configurations() -> Vec<Self> {
        let of =
            |(room, tiles), residual| Self { output: Element::Bf16, bias: false, residual, room, tiles, gated: false };
        let mut all: Vec<Self> = [1, 16, 32, MOST_ROWS]
            .into_iter()
            .filter_map(Self::best)
            .flat_map(|best| [of(best, false), of(best, true)])
            .collect();
        all.push(Self { bias: true, ..all[0] });
        all.push(Self { gated: true, ..all[0] });
        all
    }
}

/// A lane's words of the weight on their way through shared memory, in pieces: the warp's parts of the depth, or halves of them.
struct Ring<'a> {
    k: &'a Assembler,
    /// The lane's first place.
    places: Address<'a>,
    /// The lane's rows.
    weights: Vec<Global<'a>>,
    /// The warp's first column.
    begin: Value<'a, U32>,
    /// The lane's first column of a step.
    place: Value<'a, U32>,
    depth: Value<'a, U32>,
    steps: usize,
    slot_bytes: u32,
}

impl<'a> Ring<'a> {
    fn pieces_of_part(&self) -> u32 {
        PART / (self.steps as u32 * STEP)
    }

    /// The lane's first column of a piece. Whatever the pieces, columns come in the same order.
    fn column(&self, piece: Value<'a, U32>) -> Value<'a, U32> {
        let first = self.begin + self.place;
        match self.pieces_of_part() {
            1 => piece.mad(PASS, first),
            _ => (piece >> 1).mad(PASS, (piece & 1).mad(STEP, first)),
        }
    }

    /// The lane's place for one of the steps and tiles of the piece in slot `slot`.
    fn at(&self, slot: Value<'a, U32>, index: u32) -> Address<'a> {
        self.places.moved(slot * self.slot_bytes).plus((index * THREADS * WIDTH).into())
    }

    /// Starts copying a piece to slot `slot`; zeros where the depth has ended.
    fn fetch(&self, piece: Value<'a, U32>, slot: Value<'a, U32>) {
        let first = self.column(piece);
        for step in 0..self.steps as u32 {
            let column = first + step * STEP;
            let inside = column.lt(self.depth);
            // What is not there is not read, but its address is that of something.
            let (column, bytes) = (inside.select::<U32>(column, 0), inside.select::<U32>(16, 0));
            for (tile, weight) in (0..).zip(&self.weights) {
                let target = self.at(slot, step * self.weights.len() as u32 + tile);
                self.k.copy_16_bytes(target, weight.at(column), bytes);
            }
        }
        self.k.commit_copies();
    }
}

/// The lane's words of every step, zeros where the depth has ended.
fn load<'a>(place: Address<'a>, inside: &[Value<'a, Pred>]) -> Vec<Vec<Value<'a, U32>>> {
    let steps = (0..).step_by(STEP as usize).zip(inside);
    steps.map(|(column, inside)| place.plus(column).load_words_if(*inside, WORDS)).collect()
}
