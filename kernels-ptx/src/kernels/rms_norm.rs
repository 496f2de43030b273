//! Root-mean-square normalisation: `output = weight · x · r` with `r = 1 / √(mean(x²) + epsilon)` over each row, and its
//! gradients, for rows that fit into registers. [`rms_norm_any_width`](super::rms_norm_any_width) takes the others.
//!
//! - With `residual`, `x = input + branch`, which is stored as well: the sum of a residual stream and what a layer adds to
//!   it, and its norm, in one pass. Backward, the sum's own gradient is added to that which comes through the norm.
//! - Rounding: in bf16 the sum and the normalised value `x · r` are rounded before they are used, the latter as Hugging
//!   Face's Llama and Mistral do.
//! - Backward: with `m = mean(g · weight · x)`, `dx = r (g · weight − x r² m)` and `d weight = Σ_rows g · x · r`.
//! - Layout: 1 or 8 warps take a row; it is read once, 8 elements per lane at a time, and stays in registers
//!   ([`Layout`]). Backward, a block stays for many rows: those after the one in hand are on their way to shared memory
//!   meanwhile (`Ring`), and its sums of the weight's gradient stay in registers. Blocks that come after those with rows add
//!   up their sums, in order and 32 columns each (`block_sums`).
//! - Traffic: forward reads and writes each element once, backward reads two and writes one; with `residual` one more is
//!   read each way, and forward one more is written. Bound by memory.
//! - Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

use super::{VECTOR, block_sums};
use crate::asm::{Address, Assembler, Description, F32, Global, LANES, Operand, Pred, Shared, U32, Value, unpack};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / LANES;
/// Vectors of a row that a lane holds at most.
const MOST_VECTORS: u32 = 4;
/// Blocks of the backward pass that take rows, at most: [`RESIDENT`] for each of an H100's 132 multiprocessors.
const BLOCKS: u32 = 264;
/// Bytes of shared memory that rows on their way to a block of the backward pass may take: two blocks share an H100's
/// multiprocessor.
const RING_BYTES: u32 = 108 << 10;
/// The most slots of the ring.
const MOST_SLOTS: u32 = 4;
/// Blocks of the backward pass in bf16 that share a multiprocessor; in f32, and with [`MOST_VECTORS`], registers would spill.
/// With `residual`, NVIDIA's assembler takes just as many registers as that allows; the driver's compiler is not held to it
/// unless asked.
const RESIDENT: u32 = 2;
/// Blocks' sums that a thread takes at a time.
const SUMS_AT_A_TIME: u32 = 16;
/// Rows that each warp or block of the backward pass is given before there are more blocks.
const LEAST_ROWS: u32 = 4;

/// How a row lies in registers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Layout {
    /// Warps that take a row together: 1, or all 8 of a block.
    warps: u32,
    /// Vectors of 8 elements that each lane holds: lane `l` of the row's lanes holds those with index `l + i · lanes`.
    vectors: u32,
}

/// The normalised rows, and the inverse root of each.
///
/// Parameters: `output` (`[rows, width]`), `sum` (the same, with `residual`), `inverse_roots` (f32 `[rows]`; all written),
/// `input`, `branch` (`[rows, width]`, the latter with `residual`), `weight` (`[width]`), `epsilon` (f32), `rows`, `width`
/// (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormForward {
    /// Type of input and output.
    pub element: Element,
    /// Type of the weight.
    pub weight: Element,
    /// Where a row lies.
    pub layout: Layout,
    /// The sum of two inputs is normalised.
    pub residual: bool,
}

/// The gradients of input and weight.
///
/// Parameters: `input_gradient` (`[rows, width]`), `weight_gradient` (f32 `[width]`; both written), `sums` (u32,
/// [`Layout::sums`] of them, zero before and after), `gradient`, `sum_gradient` (with `residual`), `input` (what was
/// normalised; all `[rows, width]`), `weight` (`[width]`), `inverse_roots` (f32 `[rows]`), `rows`, `width`, `row_blocks`
/// ([`Layout::row_blocks`]; u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmsNormBackward {
    /// Type of input and gradients.
    pub element: Element,
    /// Type of the weight.
    pub weight: Element,
    /// Where a row lies.
    pub layout: Layout,
    /// The sum of two inputs was normalised and is an output too.
    pub residual: bool,
}

impl Layout {
    /// The layout for rows of this width; `None` for no multiple of 8, and beyond 8192.
    pub fn of(width: u32) -> Option<Self> {
        let vectors = width / VECTOR;
        let lanes = |warps: u32| warps * LANES;
        let layout = |warps: u32| Self { warps, vectors: vectors.div_ceil(lanes(warps)) };
        match vectors {
            _ if !width.is_multiple_of(VECTOR) || width == 0 => None,
            _ if vectors <= lanes(1) * MOST_VECTORS => Some(layout(1)),
            _ if vectors <= lanes(WARPS) * MOST_VECTORS => Some(layout(WARPS)),
            _ => None,
        }
    }

    /// Rows that a block takes at a time.
    fn block_rows(self) -> u32 {
        WARPS / self.warps
    }

    /// Blocks of the forward pass.
    pub fn forward_grid(self, rows: u32) -> Option<[u32; 3]> {
        Some([rows.div_ceil(self.block_rows()), 1, 1])
    }

    /// Blocks of the backward pass that take rows.
    pub fn row_blocks(self, rows: u32) -> u32 {
        rows.div_ceil(self.block_rows() * LEAST_ROWS).clamp(1, BLOCKS)
    }

    /// Blocks of the backward pass: those that take rows, then those that add up their sums.
    pub fn backward_grid(self, rows: u32, width: u32) -> Option<[u32; 3]> {
        Some([self.row_blocks(rows) + width.div_ceil(LANES), 1, 1])
    }

    /// Words of memory that is zero by which the blocks of the backward pass tell each other their sums.
    pub fn sums(self, rows: u32, width: u32) -> usize {
        self.row_blocks(rows) as usize * width as usize
    }

    fn name(self) -> String {
        format!("{}x{}", self.warps, self.vectors)
    }
}

impl KernelSource for RmsNormForward {
    fn build(&self) -> Kernel {
        let Self { element, weight: weight_element, layout, residual } = *self;
        let bytes = element.bytes() as u64;
        let passes = if residual { 4 } else { 2 };
        let (name, of) = if residual { ("_residual", "input + branch") } else { ("", "input") };
        let description = Description {
            name: format!("rms_norm{name}_forward_{element}_{weight_element}_{}", layout.name()),
            summary: format!(
                "output = weight * x / sqrt(mean(x^2) + epsilon) over each row of x = {of}; {} warps per row",
                layout.warps
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "width"],
            work: move |sizes: &[u64]| Work {
                bytes: passes * bytes * sizes[0] * sizes[1] + 4 * sizes[0],
                operations: (4 + u64::from(residual)) * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            let output = k.write("output", element);
            let sum = residual.then(|| k.write("sum", element));
            let (inverse_roots, input) = (k.write("inverse_roots", Element::F32), k.read("input", element));
            let branch = residual.then(|| k.read("branch", element));
            let weight = k.read("weight", weight_element);
            let (epsilon, rows, width) = (k.f32("epsilon"), k.u32("rows"), k.u32("width"));
            let place = Place::new(k, layout, width);
            let row = place.first_row.named("row");
            k.return_if(row.ge(rows));

            k.comment("the row");
            let mut held = place.load(input.from_row(row, width), None);
            if let (Some(branch), Some(sum)) = (branch, sum) {
                let (branch, sum) = (place.load(branch.from_row(row, width), None), sum.from_row(row, width));
                for (index, (input, branch)) in held.iter_mut().zip(branch).enumerate() {
                    let added: Vec<_> =
                        unpack(element, input).into_iter().zip(unpack(element, &branch)).map(|(a, b)| a + b).collect();
                    *input = pack(element, &added);
                    place.store(sum, index, input);
                }
            }

            k.comment("the sum of squares");
            let squares = held.iter().map(|vector| {
                let values = unpack(element, vector);
                products(&values, &values)
            });
            let total = place.sum(total(squares), k.constant(0u32));
            let mean_square = total.fma(width.to_f32().reciprocal(), epsilon);
            let inverse_root = inverse_root(mean_square).named("inverse_root");
            inverse_roots.at(row).store_if(place.lane.eq(0), inverse_root);

            k.comment("the result");
            let output = output.from_row(row, width);
            // Weights that set out before the barrier would keep the next rows waiting: a sixth more time on an H200. (Where a
            // warp has a row, there is no barrier.)
            let weight = weight.between_barriers();
            for (index, vector) in held.iter().enumerate() {
                let weights = unpack(weight_element, &place.load_one(weight, index, None));
                let results: Vec<_> = unpack(element, vector)
                    .into_iter()
                    .zip(weights)
                    .map(|(value, weight)| {
                        let normal = value * inverse_root;
                        let normal = if element == Element::Bf16 { normal.round_to_bf16() } else { normal };
                        normal * weight
                    })
                    .collect();
                place.store(output, index, &pack(element, &results));
            }
        })
    }

    fn configurations() -> Vec<Self> {
        configurations(|element, weight, layout, residual| Self { element, weight, layout, residual })
    }
}

impl KernelSource for RmsNormBackward {
    fn build(&self) -> Kernel {
        let Self { element, weight: weight_element, layout, residual } = *self;
        let bytes = element.bytes() as u64;
        let passes = if residual { 4 } else { 3 };
        let description = Description {
            name: format!(
                "rms_norm{}_backward_{element}_{weight_element}_{}",
                if residual { "_residual" } else { "" },
                layout.name()
            ),
            summary: format!(
                "gradients of weight * x / sqrt(mean(x^2) + epsilon), blocks' sums for the weight added by later ones; {} warps per row",
                layout.warps
            ),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["rows", "width"],
            work: move |sizes: &[u64]| Work {
                bytes: passes * bytes * sizes[0] * sizes[1] + 4 * sizes[0],
                operations: (10 + u64::from(residual)) * sizes[0] * sizes[1],
            },
        };
        Assembler::assemble(description, |k| {
            if element == Element::Bf16 && layout.vectors < MOST_VECTORS {
                k.resident_blocks(RESIDENT);
            }
            let (input_gradient, weight_gradient) = (k.write("input_gradient", element), k.write("weight_gradient", Element::F32));
            let sums = k.write("sums", Element::U32);
            let gradient = k.read("gradient", element);
            let sum_gradient = residual.then(|| k.read("sum_gradient", element));
            let (input, weight) = (k.read("input", element), k.read("weight", weight_element));
            let (inverse_roots, rows, width) = (k.read("inverse_roots", Element::F32), k.u32("rows"), k.u32("width"));
            let row_blocks = k.u32("row_blocks");
            k.if_(k.block().ge(row_blocks), || add_sums(k, weight_gradient, sums, row_blocks, width));
            k.return_if(k.block().ge(row_blocks));
            let place = Place::new(k, layout, width);
            let parts = layout.vectors as usize;

            k.comment("what stays: the weights, and this thread's sums of the weight's gradient");
            let weights: Vec<_> =
                (0..parts).map(|index| unpack(weight_element, &place.load_one(weight, index, None))).collect();
            let totals: Vec<Vec<_>> = (0..parts).map(|_| (0..VECTOR).map(|_| k.variable(0.0f32)).collect()).collect();

            k.comment("the first rows set out");
            let row = k.variable(place.first_row).named("row");
            let stride = (row_blocks * layout.block_rows()).named("stride");
            // In f32 there is no room for a third row.
            let (third, added_late) = match element {
                Element::Bf16 => (sum_gradient, None),
                _ => (None, sum_gradient),
            };
            let ring = Ring::new(&place, [gradient, input].into_iter().chain(third).collect());
            for slot in 0..ring.slots - 1 {
                ring.send(slot * ring.slot_bytes, row.get() + stride * slot, rows);
            }
            let next_root = k.variable(inverse_roots.at(row.get()).load_if(row.get().lt(rows), 0.0));
            // Of the row in hand, and of the slot that was taken last.
            let slot = k.variable(0u32).named("slot");
            let free = k.variable((ring.slots - 1) * ring.slot_bytes).named("free");
            let scratch = k.variable(0u32).named("scratch");

            k.while_(
                || row.get().lt(rows),
                || {
                    k.wait_copies(ring.slots - 2);
                    let here = k.constant(slot.get());
                    let (gradients, values) = (ring.take(here, 0), ring.take(here, 1));
                    let inverse_root = k.constant(next_root.get()).named("inverse_root");
                    k.comment("another row sets out, to where the one before was");
                    ring.send(free.get(), row.get() + stride * (ring.slots - 1), rows);
                    let next = row.get() + stride;
                    next_root.set(inverse_roots.at(next).load_if(next.lt(rows), 0.0));
                    free.set(slot.get());
                    let after = slot.get() + ring.slot_bytes;
                    slot.set(after.lt(ring.slots * ring.slot_bytes).select(after, 0u32));

                    k.comment("the mean of gradient * weight * input, and the weight's gradient");
                    let terms = (0..parts).map(|index| {
                        let (gradients, values) = (unpack(element, &gradients[index]), unpack(element, &values[index]));
                        let through: Vec<_> = gradients
                            .iter()
                            .zip(&weights[index])
                            .map(|(gradient, weight)| *gradient * *weight)
                            .collect();
                        for (total, (gradient, value)) in totals[index].iter().zip(gradients.iter().zip(&values)) {
                            total.set(gradient.fma(*value * inverse_root, total.get()));
                        }
                        products(&through, &values)
                    });
                    let mean = place.sum(total(terms), scratch.get()) * width.to_f32().reciprocal();
                    scratch.set(scratch.get() ^ WARPS);
                    let factor = (inverse_root * inverse_root * mean).named("factor");

                    k.comment("the input's gradient");
                    let target = input_gradient.from_row(row.get(), width);
                    // Taken once more: there are not registers enough to keep it.
                    let gradients = ring.take(here, 0);
                    let added = match third {
                        Some(_) => Some(ring.take(here, 2)),
                        None => added_late.map(|memory| place.load(memory.from_row(row.get(), width), None)),
                    };
                    for index in 0..parts {
                        let (gradients, values) = (unpack(element, &gradients[index]), unpack(element, &values[index]));
                        let mut results: Vec<_> = gradients
                            .iter()
                            .zip(&weights[index])
                            .zip(values)
                            .map(|((gradient, weight), value)| inverse_root * (-value).fma(factor, *gradient * *weight))
                            .collect();
                        if let Some(added) = &added {
                            for (result, added) in results.iter_mut().zip(unpack(element, &added[index])) {
                                *result = *result + added;
                            }
                        }
                        place.store(target, index, &pack(element, &results));
                    }
                    row.set(row.get() + stride);
                },
            );

            let totals: Vec<Vec<_>> =
                totals.iter().map(|totals| totals.iter().map(|total| total.get()).collect()).collect();
            k.wait_copies(0);
            place.tell_sums(sums.from_row(k.block(), width), &totals, ring.memory);
        })
    }

    fn configurations() -> Vec<Self> {
        configurations(|element, weight, layout, residual| Self { element, weight, layout, residual })
    }
}

/// Rows of some matrices on their way to the block's shared memory. Each thread sends for the vectors that it takes itself,
/// so no barrier is needed.
struct Ring<'a, 'p> {
    place: &'p Place<'a>,
    matrices: Vec<Global<'a>>,
    memory: Shared<'a>,
    /// Rows that the memory holds of each matrix: one in hand or free, the others on their way.
    slots: u32,
    slot_bytes: u32,
}

impl<'a, 'p> Ring<'a, 'p> {
    fn new(place: &'p Place<'a>, matrices: Vec<Global<'a>>) -> Self {
        let vector_bytes = |matrix: &Global<'a>| VECTOR * matrix.element().bytes() as u32;
        let slot_bytes = place.layout.vectors * THREADS * matrices.iter().map(vector_bytes).sum::<u32>();
        let slots = (RING_BYTES / slot_bytes).clamp(2, MOST_SLOTS);
        let memory = place.k.shared(Element::F32, slots * slot_bytes / 4);
        Self { place, matrices, memory, slots, slot_bytes }
    }

    /// Sends for a row, zeros if there is none, to the slot that begins at byte `slot`; one group of copies.
    fn send(&self, slot: impl Operand<'a, U32>, row: Value<'a, U32>, rows: Value<'a, U32>) {
        let k = self.place.k;
        let (exists, target) = (row.lt(rows), self.own().moved(slot));
        let mut pieces = 0..;
        for matrix in &self.matrices {
            let source = matrix.from_row(row, self.place.width);
            for (column, inside) in &self.place.vectors {
                let (source, bytes) = (source.at(*column), (exists & *inside).select::<U32>(16, 0));
                let elements = 16 / matrix.element().bytes();
                for (part, piece) in (0..VECTOR as usize / elements).zip(&mut pieces) {
                    k.copy_16_bytes(target.plus(piece * PIECE), source.plus((part * elements) as i64), bytes);
                }
            }
        }
        k.commit_copies();
    }

    /// The words of a row of one matrix that has arrived, by vector.
    fn take(&self, slot: Value<'a, U32>, matrix: usize) -> Vec<Vec<Value<'a, U32>>> {
        let source = self.own().moved(slot);
        let vectors = self.place.vectors.len();
        let words = |matrix: &Global<'a>| VECTOR as usize * matrix.element().bytes() / 4;
        let before: usize = self.matrices[..matrix].iter().map(|matrix| vectors * words(matrix) / 4).sum();
        let pieces = words(&self.matrices[matrix]) / 4;
        (0..vectors)
            .map(|vector| {
                let first = before + vector * pieces;
                (first..first + pieces).flat_map(|piece| source.plus(piece as i64 * PIECE).load_words(4)).collect()
            })
            .collect()
    }

    /// Where the thread's first 16 bytes of the first slot lie; the others follow [`PIECE`] words apart.
    fn own(&self) -> Address<'a> {
        self.memory.at(self.place.k.thread() * 4)
    }
}

/// Words of 16 bytes for each thread.
const PIECE: i64 = 4 * THREADS as i64;

/// A thread's place in its rows.
struct Place<'a> {
    k: &'a Assembler,
    layout: Layout,
    width: Value<'a, U32>,
    /// The thread's index among those of a row.
    lane: Value<'a, U32>,
    first_row: Value<'a, U32>,
    /// Per vector: its first column, and whether the row has it.
    vectors: Vec<(Value<'a, U32>, Value<'a, Pred>)>,
}

impl<'a> Place<'a> {
    fn new(k: &'a Assembler, layout: Layout, width: Value<'a, U32>) -> Self {
        k.comment("this thread's place");
        let (lane, first_row) = match layout.warps {
            1 => (k.lane(), k.block().mad(WARPS, k.warp())),
            _ => (k.thread(), k.block()),
        };
        let lane = lane.named("lane");
        let vectors = (0..layout.vectors)
            .map(|index| {
                let column = lane.mad(VECTOR, index * layout.warps * LANES * VECTOR);
                (column, column.lt(width))
            })
            .collect();
        Self { k, layout, width, lane, first_row, vectors }
    }

    /// One vector of a row, packed; zeros where the row has ended or the condition does not hold.
    fn load_one(&self, row: Global<'a>, index: usize, condition: Option<Value<'a, Pred>>) -> Vec<Value<'a, U32>> {
        let (_, inside) = self.vectors[index];
        let words = row.element().bytes() * VECTOR as usize / 4;
        self.address(row, index).load_words_if(condition.map_or(inside, |condition| inside & condition), words)
    }

    /// Every vector of a row that this thread holds.
    fn load(&self, row: Global<'a>, condition: Option<Value<'a, Pred>>) -> Vec<Vec<Value<'a, U32>>> {
        (0..self.vectors.len()).map(|index| self.load_one(row, index, condition)).collect()
    }

    fn store(&self, row: Global<'a>, index: usize, words: &[Value<'a, U32>]) {
        self.k.if_(self.vectors[index].1, || self.address(row, index).store_words(words));
    }

    fn address(&self, row: Global<'a>, index: usize) -> Address<'a> {
        row.at(self.vectors[index].0)
    }

    /// The sum over the row's threads, in each of them. `offset` alternates between 0 and the number of warps from one sum
    /// to the next, so that one barrier is enough.
    fn sum(&self, value: Value<'a, F32>, offset: Value<'a, U32>) -> Value<'a, F32> {
        let k = self.k;
        let within = k.warp_sum(value);
        if self.layout.warps == 1 {
            return within;
        }
        let scratch = k.shared(Element::F32, 2 * WARPS);
        scratch.at(offset + k.warp()).store_if(k.lane().eq(0), within);
        k.barrier();
        let first = scratch.at(offset);
        let parts = first.cast(Element::F32).load_vector::<{ WARPS as usize }>();
        total(parts)
    }

    /// Tells the block's sums for every column: those of its warps in order, where each has sums of all columns.
    /// `scratch` may be in use until here, by threads for themselves.
    fn tell_sums(&self, target: Global<'a>, totals: &[Vec<Value<'a, F32>>], scratch: Shared<'a>) {
        let k = self.k;
        k.comment("the block's sums of the weight's gradient");
        let columns = self.layout.vectors * self.layout.warps * LANES * VECTOR;
        let parts = WARPS / self.layout.warps;
        assert!(scratch.count() >= parts * columns, "the sums of a block do not fit");
        k.barrier();
        for ((column, _), totals) in self.vectors.iter().zip(totals) {
            let part = if parts > 1 { k.warp() } else { k.constant(0u32) };
            scratch.at(part.mad(columns, *column)).store_vector(totals);
        }
        k.barrier();
        k.for_(k.thread(), self.width, THREADS, |column| {
            let place = scratch.at(column);
            let total = total((0..parts).map(|part| place.plus(i64::from(part * columns)).load()));
            block_sums::tell(target.at(column), total);
        });
    }
}

/// The gradient of the weight in a block's 32 columns, from the sums of all `row_blocks`: its warps take these in turn.
fn add_sums<'a>(
    k: &'a Assembler,
    weight_gradient: Global<'a>,
    sums: Global<'a>,
    row_blocks: Value<'a, U32>,
    width: Value<'a, U32>,
) {
    k.comment("the weight's gradient in this block's columns");
    let column = (k.block() - row_blocks).mad(LANES, k.lane()).named("column");
    let exists = column.lt(width);
    let sum = k.variable(0.0f32);
    k.if_(exists, || {
        k.for_(k.warp(), row_blocks, WARPS * SUMS_AT_A_TIME, |first| {
            let blocks: Vec<_> = (0..SUMS_AT_A_TIME).map(|index| first + index * WARPS).collect();
            // Those that do not exist are the first once more, which does not count then.
            let places: Vec<_> = blocks
                .iter()
                .map(|block| sums.from_row(block.lt(row_blocks).select(*block, first), width).at(column))
                .collect();
            for (block, taken) in blocks.iter().zip(block_sums::take(k, &places)) {
                sum.set(block.lt(row_blocks).select(sum.get() + taken, sum.get()));
            }
        });
    });

    k.comment("the warps' sums, in order");
    let scratch = k.shared(Element::F32, THREADS);
    scratch.at(k.thread()).store(sum.get());
    k.barrier();
    k.if_(exists & k.warp().eq(0), || {
        let place = scratch.at(k.lane());
        weight_gradient.at(column).store(total((0..WARPS).map(|warp| place.plus(i64::from(warp * LANES)).load())));
    });
}

/// The words that hold a vector's values, rounded to the type.
fn pack<'a>(element: Element, values: &[Value<'a, F32>]) -> Vec<Value<'a, U32>> {
    match element {
        Element::Bf16 => values.chunks_exact(2).map(|pair| pair[0].pack_bf16(pair[1])).collect(),
        _ => values.iter().map(|value| value.bits()).collect(),
    }
}

/// `1 / √x`, nearly as exact as f32 can be: the approximation, and one step of Newton's method.
fn inverse_root<'a>(x: Value<'a, F32>) -> Value<'a, F32> {
    let root = x.reciprocal_root();
    let rest = (x * root).fma(-root, 1.0);
    // Of a root that is infinite or zero there is nothing to improve.
    rest.abs().lt(1.0).select((root * 0.5).fma(rest, root), root)
}

/// The sum of at least one value, in order.
fn total<'a>(values: impl IntoIterator<Item = Value<'a, F32>>) -> Value<'a, F32> {
    match values.into_iter().reduce(|total, value| total + value) {
        Some(total) => total,
        None => unreachable!("a row has at least one vector"),
    }
}

/// `Σ aᵢ bᵢ`.
fn products<'a>(a: &[Value<'a, F32>], b: &[Value<'a, F32>]) -> Value<'a, F32> {
    let mut pairs = a.iter().zip(b);
    match pairs.next() {
        Some((a, b)) => pairs.fold(*a * *b, |sum, (a, b)| a.fma(*b, sum)),
        None => unreachable!("a lane takes at least one element"),
    }
}

/// The types of activations and weight that occur together: weights are kept in f32 while they are trained.
pub(super) fn element_pairs() -> [(Element, Element); 3] {
    [(Element::F32, Element::F32), (Element::Bf16, Element::F32), (Element::Bf16, Element::Bf16)]
}

/// What models use: the widths of the demo's model, SmolLM2-135M and a 15B one.
fn configurations<K>(new: impl Fn(Element, Element, Layout, bool) -> K) -> Vec<K> {
    let mut all = Vec::new();
    for (element, weight) in element_pairs() {
        for layout in [64, 576, 5120].into_iter().filter_map(Layout::of) {
            all.extend([false, true].map(|residual| new(element, weight, layout, residual)));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::Layout;

    #[test]
    fn a_layout_holds_the_whole_row() {
        for width in (8..=8192).step_by(8) {
            let layout = Layout::of(width).unwrap();
            assert!(layout.warps * 32 * layout.vectors * 8 >= width);
            assert!(layout.warps * 32 * (layout.vectors - 1) * 8 < width);
        }
        assert_eq!([0, 4, 12, 8200].map(Layout::of), [None; 4]);
    }
}
