//! AdamW: one step of Adam with decoupled weight decay on many parameters at once.
//!
//! - With the gradient `g`, scaled: `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
//!   `p ← p − (decay · p + rate · m / (√v · inverse_root + ε))`, where `rate = lr / (1 − β₁ᵗ)`,
//!   `inverse_root = 1 / √(1 − β₂ᵗ)` and `decay = lr · weight decay`. All in f32. `narrow` also writes p rounded to bf16, for
//!   parameters that the model reads in bf16 while the optimizer keeps them in f32. A parameter may have a multiple of the
//!   learning rate of its own.
//! - Layout: a table has a row per parameter. A block takes up to 8192 neighbouring elements of one of them, each thread 8
//!   times 4 elements, the lanes of a warp 512 neighbouring bytes of each operand at a time; 128 bytes per thread are on
//!   their way at once. It finds its row by bisection, for which it reads as many words as the number of rows has bits.
//! - Traffic: reads four numbers of 4 bytes per element and writes three, and two bytes more where `narrow`. Bound by memory.
//! - Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

use crate::asm::{Assembler, Description, F32, Global, U32, Value};
use crate::{Element, Kernel, KernelSource, ParameterKind, Target, Work};

const THREADS: u32 = 256;
/// Neighbouring elements of a thread: 16 bytes of f32.
const QUAD: u32 = 4;
/// Elements that a block takes at a time.
const ROUND: u32 = THREADS * QUAD;
/// Rounds whose elements are read before any of them is written.
const AHEAD: u32 = 2;
/// Elements of a block.
const BLOCK: u32 = 4 * AHEAD * ROUND;

const ROW: [ParameterKind; 8] = [
    ParameterKind::Write(Element::F32),
    ParameterKind::Write(Element::F32),
    ParameterKind::Write(Element::F32),
    ParameterKind::Read(Element::F32),
    ParameterKind::U64,
    ParameterKind::U64,
    ParameterKind::U64,
    ParameterKind::U64,
];
const NARROW_ROW: [ParameterKind; 9] =
    [ROW[0], ROW[1], ROW[2], ROW[3], ROW[4], ROW[5], ROW[6], ROW[7], ParameterKind::Write(Element::Bf16)];

/// One step on many parameters.
///
/// Parameters: `table` (a row per parameter: its value, first and second moments (f32, read and written), gradient (f32), the
/// number of elements of each, at least 1, the first block that works on it, 1 if weight decay applies and 0 otherwise, the
/// bits of the f32 by which its learning rate is multiplied, and, where `narrow`, the value in bf16 (written)), `rows` (u32),
/// `scale` (f32: what the gradients are multiplied by), `old_first`, `new_first`, `old_second`, `new_second`, `rate`, `inverse_root`, `epsilon`, `decay` (f32: β₁, 1 − β₁, β₂,
/// 1 − β₂ and the factors of the [module](self)). One block per [`AdamW::blocks`] of each row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AdamW {
    /// Whether the value is written in bf16, too.
    pub narrow: bool,
}

impl KernelSource for AdamW {
    fn build(&self) -> Kernel {
        let narrow = self.narrow;
        let bytes = if narrow { 30 } else { 28 };
        let description = Description {
            name: if narrow { "adamw_bf16" } else { "adamw" }.to_owned(),
            summary: format!("one step of AdamW in place on many parameters; {BLOCK} elements of one per block"),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: 15 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let table = k.table("table", if narrow { &NARROW_ROW } else { &ROW });
            let rows = k.u32("rows");
            let scale = k.f32("scale");
            let first = (k.f32("old_first"), k.f32("new_first"));
            let second = (k.f32("old_second"), k.f32("new_second"));
            let (rate, inverse_root, epsilon) = (k.f32("rate"), k.f32("inverse_root"), k.f32("epsilon"));
            let decay = k.f32("decay");
            let block = k.block();
            let row = table.row_of_block(rows, 5, block);
            let multiple = row.number(7).as_f32();
            let (rate, decay) = (rate * multiple, decay * multiple);
            let decay = row.number(6).ne(0).select(decay, k.constant(0.0f32));
            let factors = Factors { scale, first, second, rate, inverse_root, epsilon, decay };
            let begin = ((block - row.number(5)) * BLOCK).named("begin");
            let left = (row.number(4) - begin).named("left");
            let operands = Operands {
                inputs: [0, 1, 2, 3].map(|word| row.memory(word).from(begin.wide())),
                rounded: narrow.then(|| row.memory(8).from(begin.wide())),
            };
            k.if_else(
                left.ge(BLOCK),
                || {
                    k.for_(k.thread() * QUAD, BLOCK, AHEAD * ROUND, |place| {
                        let places: Vec<_> = (0..AHEAD).map(|round| place + round * ROUND).collect();
                        operands.step_quads(&factors, &places);
                    });
                },
                || {
                    k.for_(k.thread() * QUAD, left, ROUND, |place| {
                        k.if_else(
                            (place + QUAD).le(left),
                            || operands.step_quads(&factors, &[place]),
                            || k.for_(place, left, 1, |index| operands.step_one(&factors, index)),
                        );
                    });
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        [false, true].map(|narrow| Self { narrow }).to_vec()
    }
}

impl AdamW {
    /// Blocks that work on a parameter of `count` elements.
    pub fn blocks(count: u32) -> u32 {
        count.div_ceil(BLOCK)
    }
}

/// The memory of a block's elements.
struct Operands<'a> {
    /// Value, first moment, second moment and gradient.
    inputs: [Global<'a>; 4],
    rounded: Option<Global<'a>>,
}

impl<'a> Operands<'a> {
    /// The step on 4 neighbours from each place on; all are read before the first is written.
    fn step_quads(&self, factors: &Factors<'a>, places: &[Value<'a, U32>]) {
        let read: Vec<_> = places
            .iter()
            .map(|&place| self.inputs.map(|input| input.at(place).load_vector::<{ QUAD as usize }>()))
            .collect();
        for (&place, operands) in places.iter().zip(read) {
            let results: [[Value<'a, F32>; 3]; QUAD as usize] =
                std::array::from_fn(|lane| factors.step(operands.map(|values| values[lane])));
            for (which, output) in self.inputs[..3].iter().enumerate() {
                output.at(place).store_vector(&results.map(|result| result[which]));
            }
            if let Some(rounded) = self.rounded {
                rounded.at(place).store_vector(&results.map(|[value, ..]| value));
            }
        }
    }

    /// The step on one element.
    fn step_one(&self, factors: &Factors<'a>, index: Value<'a, U32>) {
        let results = factors.step(self.inputs.map(|input| input.at(index).load()));
        for (output, result) in self.inputs.iter().zip(results) {
            output.at(index).store(result);
        }
        if let Some(rounded) = self.rounded {
            rounded.at(index).store(results[0]);
        }
    }
}

/// The numbers of a step; of the moments, the factors of the old one and of the new term.
struct Factors<'a> {
    scale: Value<'a, F32>,
    first: (Value<'a, F32>, Value<'a, F32>),
    second: (Value<'a, F32>, Value<'a, F32>),
    rate: Value<'a, F32>,
    inverse_root: Value<'a, F32>,
    epsilon: Value<'a, F32>,
    decay: Value<'a, F32>,
}

impl<'a> Factors<'a> {
    /// From value, moments and gradient to the new value and moments.
    fn step(&self, [value, first, second, gradient]: [Value<'a, F32>; 4]) -> [Value<'a, F32>; 3] {
        let gradient = gradient * self.scale;
        let first = first * self.first.0 + gradient * self.first.1;
        let second = second * self.second.0 + gradient * self.second.1 * gradient;
        let scale = second.root() * self.inverse_root + self.epsilon;
        let value = value - (value * self.decay + (first * self.rate).div(scale));
        [value, first, second]
    }
}
