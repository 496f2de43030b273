//! AdamW: one step of Adam with decoupled weight decay on one parameter.
//!
//! - With the gradient `g`: `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
//!   `p ← p − (decay · p + rate · m / (√v · inverse_root + ε))`, where `rate = lr / (1 − β₁ᵗ)`,
//!   `inverse_root = 1 / √(1 − β₂ᵗ)` and `decay = lr · weight decay`. All in f32. `narrow` also writes p rounded to bf16, for
//!   parameters that the model reads in bf16 while the optimizer keeps them in f32.
//! - Layout: elementwise and in place, 8 neighbouring elements per thread. One launch per parameter.
//! - Traffic: reads four numbers of 4 bytes per element and writes three, and two bytes more where `narrow`. Bound by memory.
//! - Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

use super::VECTOR;
use crate::asm::{Assembler, Description, F32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// One step on one parameter.
///
/// Parameters: `rounded` (bf16, written; only where `narrow`), `value`, `first_moment`, `second_moment` (f32, read and
/// written), `gradient` (f32), `old_first`, `new_first`, `old_second`, `new_second`, `rate`, `inverse_root`, `epsilon`,
/// `decay` (f32: β₁, 1 − β₁, β₂, 1 − β₂ and the factors of the [module](self)), `count` (u32). All memory holds `count`
/// elements.
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
            summary: format!("one step of AdamW in place; {VECTOR} elements per thread"),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: 14 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let rounded = narrow.then(|| k.write("rounded", Element::Bf16));
            let value = k.write("value", Element::F32);
            let moments = [k.write("first_moment", Element::F32), k.write("second_moment", Element::F32)];
            let gradient = k.read("gradient", Element::F32);
            let factors = Factors {
                first: (k.f32("old_first"), k.f32("new_first")),
                second: (k.f32("old_second"), k.f32("new_second")),
                rate: k.f32("rate"),
                inverse_root: k.f32("inverse_root"),
                epsilon: k.f32("epsilon"),
                decay: k.f32("decay"),
            };
            let count = k.u32("count");
            let inputs = [value, moments[0], moments[1], gradient];
            match rounded {
                None => {
                    let outputs = [value, moments[0], moments[1]];
                    super::vectors(k, THREADS, count, &inputs, &outputs, |inputs| factors.step(inputs));
                }
                Some(rounded) => {
                    let outputs = [value, moments[0], moments[1], rounded];
                    super::vectors(k, THREADS, count, &inputs, &outputs, |inputs| {
                        let [value, first, second] = factors.step(inputs);
                        [value, first, second, value]
                    });
                }
            }
        })
    }

    fn configurations() -> Vec<Self> {
        [false, true].map(|narrow| Self { narrow }).to_vec()
    }
}

impl AdamW {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::vectors_grid(count, THREADS)
    }
}

/// The numbers of a step; of the moments, the factors of the old one and of the new term.
struct Factors<'a> {
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
        let first = first * self.first.0 + gradient * self.first.1;
        let second = second * self.second.0 + gradient * self.second.1 * gradient;
        let scale = second.root() * self.inverse_root + self.epsilon;
        let value = value - (value * self.decay + (first * self.rate).div(scale));
        [value, first, second]
    }
}
