//! Products of a few rows with a weight, as decoding needs them: `y = x Wᵀ + bias + residual` for x of 1 to 64 rows in bf16,
//! accumulated in f32 on tensor cores. The weight is read once, straight into the registers that the products take.
//!
//! - Layout: a block has [`COLUMNS`] rows of the weight; its warps take parts of [`PART`] of the depth in turn and their sums
//!   are added in order. Lane `l` with `g = l / 4` and `t = l mod 4` reads 16 bytes of row `g` from column `8 t` of every 32 on,
//!   and the same columns of rows `g`, `g + 8`, … of x. `mma.m16n8k16` wants other columns in these registers, but as both
//!   operands have the same ones, only the order of the sum differs.
//! - How a row's sum is formed depends on the depth alone, not on how many rows there are.
//! - Traffic: the weight once; x once per block, from the caches. Bound by memory.

use crate::asm::{Address, Assembler, Description, Global, LANES, Pred, U32, Value, Variable};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;
/// Rows of the weight, columns of the result, that a block has.
const COLUMNS: u32 = 8;
/// Columns of the weight that the lanes of a row read at a time.
const STEP: u32 = 32;
/// Such steps that a warp takes together.
const STEPS: usize = 2;
/// Columns of the weight that a warp takes together.
const PART: u32 = STEPS as u32 * STEP;
/// Columns that the warps of a block take together.
const PASS: u32 = WARPS * PART;
/// Parts that are on their way or being worked on.
const AHEAD: u32 = 4;
/// 32-bit words of 16 bytes, and bf16 of them.
const WORDS: usize = 4;
const WIDTH: u32 = 8;
/// Bytes of a block's part in shared memory.
const SLOT: u32 = THREADS * STEPS as u32 * 16;

/// The most rows of x.
pub const MOST_ROWS: u32 = 64;

/// `output = input weightᵀ + bias + residual`.
///
/// Parameters: `output` (`[rows, outer]`, written), `input` (bf16 `[rows, depth]`), `weight` (bf16 `[outer, depth]`), `bias` (f32
/// `[outer]`, with a bias), `residual` (like the output, with one), `rows`, `outer`, `depth` (u32). The depth is a multiple of 8.
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
}

impl FewRowsProduct {
    /// The least room for so many rows; `None` above [`MOST_ROWS`].
    pub fn room(rows: u32) -> Option<u32> {
        [16, 32, MOST_ROWS].into_iter().find(|&room| rows <= room)
    }

    /// Blocks for so many columns of the result.
    pub fn grid(outer: u32) -> Option<[u32; 3]> {
        Some([outer.div_ceil(COLUMNS), 1, 1])
    }
}

impl KernelSource for FewRowsProduct {
    fn build(&self) -> Kernel {
        let Self { output: output_element, bias, residual, room } = *self;
        let flag = |set: bool, name: &'static str| if set { name } else { "" };
        let output_bytes = output_element.bytes() as u64 * (1 + u64::from(residual));
        let description = Description {
            name: format!(
                "few_rows_product_{output_element}_{room}{}{}",
                flag(bias, "_bias"),
                flag(residual, "_residual")
            ),
            summary: format!(
                "output = input weight^T for at most {room} rows; {COLUMNS} rows of the weight per block, warps share the depth"
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "outer", "depth"],
            work: move |sizes: &[u64]| Work {
                bytes: 2 * sizes[2] * (sizes[0] + sizes[1]) + output_bytes * sizes[0] * sizes[1],
                operations: 2 * sizes[0] * sizes[1] * sizes[2],
            },
        };
        Assembler::assemble(description, |k| {
            let output = k.write("output", output_element);
            let (input, weight) = (k.read("input", Element::Bf16), k.read("weight", Element::Bf16));
            let bias = bias.then(|| k.read("bias", Element::F32));
            let residual = residual.then(|| k.read("residual", output_element));
            let (rows, outer, depth) = (k.u32("rows"), k.u32("outer"), k.u32("depth"));

            k.comment("this lane's row of the weight and rows of x; rows beyond the last repeat it");
            let (group, place) = ((k.lane() >> 2).named("group"), ((k.lane() & 3) << 3).named("place"));
            let first_column = (k.block() * COLUMNS).named("first_column");
            let weight = weight.from_row((first_column + group).min(outer - 1), depth);
            // Two rows of x per tile of 16.
            let inputs: Vec<_> =
                (0..room / 8).map(|half| input.from_row((group + half * 8).min(rows - 1), depth)).collect();
            let tiles: Vec<[Variable<'_, _>; 4]> =
                (0..room / 16).map(|_| std::array::from_fn(|_| k.variable(0.0f32))).collect();

            k.comment(
                "every lane keeps the words that it will want in its own places of shared memory, some parts ahead",
            );
            let shared = k.shared(Element::Bf16, AHEAD * SLOT / 2);
            let ring = Ring { k, places: shared.at(k.thread() * WIDTH), weight, place, depth };
            let begin = (k.warp() * PART).named("begin");
            for part in 0..AHEAD - 1 {
                ring.fetch(begin + part * PASS, k.constant(part));
            }
            let slot = k.variable(0u32).named("slot");
            k.for_(begin, depth, PASS, |first| {
                let at = first + place;
                let inside = std::array::from_fn(|step| (at + STEP * step as u32).lt(depth));
                let inputs: Vec<_> = inputs.iter().map(|input| load(input.at(at), inside)).collect();
                let last = slot.get().eq(0).select::<U32>(AHEAD - 1, slot.get() - 1);
                ring.fetch(first + (AHEAD - 1) * PASS, last);
                k.wait_copies(AHEAD - 1);
                for step in 0..STEPS {
                    let weights = ring.at(slot.get(), step as u32).load_words(WORDS);
                    for (tile, sums) in tiles.iter().enumerate() {
                        let (lower, upper) = (&inputs[2 * tile], &inputs[2 * tile + 1]);
                        for pair in [0, 2] {
                            let a =
                                [lower[step][pair], upper[step][pair], lower[step][pair + 1], upper[step][pair + 1]];
                            k.multiply_accumulate(*sums, a, [weights[pair], weights[pair + 1]]);
                        }
                    }
                }
                slot.set((slot.get() + 1).rem(AHEAD));
            });

            k.comment("the sums over the warps, in order");
            let shared = k.shared(Element::F32, WARPS * room * COLUMNS);
            let own = k.warp() * (room * COLUMNS) + (group * COLUMNS + (place >> 2));
            let own = shared.at(own);
            for (tile, sums) in (0..).zip(&tiles) {
                let sums = sums.map(Variable::get);
                own.plus(tile * i64::from(16 * COLUMNS)).store_vector(&sums[..2]);
                own.plus(tile * i64::from(16 * COLUMNS) + i64::from(8 * COLUMNS)).store_vector(&sums[2..]);
            }
            k.barrier();
            for pass in 0..(room * COLUMNS).div_ceil(THREADS) {
                let index = k.thread() + pass * THREADS;
                let row = index >> COLUMNS.ilog2();
                let column = first_column + (index & (COLUMNS - 1));
                k.if_(row.lt(rows) & column.lt(outer), || {
                    let parts = shared.at(index);
                    let sum = (0..WARPS).map(|warp| parts.plus((warp * room * COLUMNS).into()).load());
                    let Some(mut sum) = sum.reduce(|a, b| a + b) else { unreachable!("there are warps") };
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
        let of = |room, residual| Self { output: Element::Bf16, bias: false, residual, room };
        let mut all: Vec<Self> =
            [16, 32, MOST_ROWS].into_iter().flat_map(|room| [of(room, false), of(room, true)]).collect();
        all.push(Self { bias: true, ..of(16, false) });
        all
    }
}

/// A lane's words of the weight on their way through shared memory.
#[derive(Clone, Copy)]
struct Ring<'a> {
    k: &'a Assembler,
    /// The lane's first place.
    places: Address<'a>,
    /// The lane's row.
    weight: Global<'a>,
    /// The lane's first column of a step.
    place: Value<'a, U32>,
    depth: Value<'a, U32>,
}

impl<'a> Ring<'a> {
    /// The lane's place for a step of the part in slot `slot`.
    fn at(&self, slot: Value<'a, U32>, step: u32) -> Address<'a> {
        self.places.moved(slot * SLOT).plus((step * THREADS * WIDTH).into())
    }

    /// Starts copying the part from column `first` on to slot `slot`; zeros where the depth has ended.
    fn fetch(&self, first: Value<'a, U32>, slot: Value<'a, U32>) {
        for step in 0..STEPS as u32 {
            let column = first + self.place + step * STEP;
            let inside = column.lt(self.depth);
            // What is not there is not read, but its address is that of something.
            let source = self.weight.at(inside.select::<U32>(column, 0));
            self.k.copy_16_bytes(self.at(slot, step), source, inside.select::<U32>(16, 0));
        }
        self.k.commit_copies();
    }
}

/// The lane's words of every step, zeros where the depth has ended.
fn load<'a>(place: Address<'a>, inside: [Value<'a, Pred>; STEPS]) -> Vec<Vec<Value<'a, U32>>> {
    let steps = (0..).step_by(STEP as usize).zip(inside);
    steps.map(|(column, inside)| place.plus(column).load_words_if(inside, WORDS)).collect()
}
