//! Functions of each element by itself: sums, products and activations, and the gradients of these.
//!
//! - Layout: each thread takes 16 bytes of neighbouring elements with one access per operand; the last thread takes what is
//!   left one by one.
//! - Traffic: each operand is read once, the result written once. Bound by memory.

use super::lanes_of;
use crate::asm::{Assembler, Description, F32, Value};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// What is computed of a, b and the number `factor`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operation {
    /// `a + b`.
    Add,
    /// `a - b`.
    Sub,
    /// `a · b`.
    Mul,
    /// `factor · a`.
    Scale,
    /// `-e^a`.
    NegativeExp,
    /// `a · sigmoid(a)`.
    Silu,
    /// The gradient of [`Operation::Silu`] at b, times a: with `s = sigmoid(b)`, `a · s (1 + b (1 - s))`.
    SiluGradient,
    /// `ln(1 + e^a)`.
    Softplus,
    /// The gradient of [`Operation::Softplus`] at b, times a: `a · sigmoid(b)`.
    SoftplusGradient,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 9] = [
        Self::Add,
        Self::Sub,
        Self::Mul,
        Self::Scale,
        Self::NegativeExp,
        Self::Silu,
        Self::SiluGradient,
        Self::Softplus,
        Self::SoftplusGradient,
    ];

    /// Whether there is a second operand.
    pub fn is_binary(self) -> bool {
        match self {
            Self::Add | Self::Sub | Self::Mul | Self::SiluGradient | Self::SoftplusGradient => true,
            Self::Scale | Self::NegativeExp | Self::Silu | Self::Softplus => false,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Sub => "sub",
            Self::Mul => "mul",
            Self::Scale => "scale",
            Self::NegativeExp => "negative_exp",
            Self::Silu => "silu",
            Self::SiluGradient => "silu_gradient",
            Self::Softplus => "softplus",
            Self::SoftplusGradient => "softplus_gradient",
        }
    }

    fn formula(self) -> &'static str {
        match self {
            Self::Add => "a + b",
            Self::Sub => "a - b",
            Self::Mul => "a * b",
            Self::Scale => "factor * a",
            Self::NegativeExp => "-exp(a)",
            Self::Silu => "a * sigmoid(a)",
            Self::SiluGradient => "a * s * (1 + b * (1 - s)), s = sigmoid(b)",
            Self::Softplus => "ln(1 + exp(a))",
            Self::SoftplusGradient => "a * sigmoid(b)",
        }
    }

    /// Arithmetic operations per element, an elementary function counted as one.
    fn operations(self) -> u64 {
        match self {
            Self::Add | Self::Sub | Self::Mul | Self::Scale => 1,
            Self::NegativeExp | Self::Softplus | Self::SoftplusGradient => 2,
            Self::Silu => 4,
            Self::SiluGradient => 8,
        }
    }

    fn of_two<'a>(self, a: Value<'a, F32>, b: Value<'a, F32>) -> Value<'a, F32> {
        match self {
            Self::Add => a + b,
            Self::Sub => a - b,
            Self::Mul => a * b,
            Self::SiluGradient => {
                let s = b.sigmoid_precise();
                a * s * b.fma(-s + 1.0, 1.0)
            }
            Self::SoftplusGradient => a * b.sigmoid_precise(),
            _ => unreachable!("{self:?} has one operand"),
        }
    }

    fn of_one<'a>(self, a: Value<'a, F32>) -> Value<'a, F32> {
        match self {
            Self::NegativeExp => -a.exp_precise(),
            Self::Silu => a * a.sigmoid_precise(),
            Self::Softplus => a.softplus(),
            _ => unreachable!("{self:?} has another operand"),
        }
    }
}

/// `output[i] = operation(a[i], b[i])`.
///
/// Parameters: `output` (written; read as well when in place), `a` (not in place, where it is the output), `b` (binary
/// operations; all `count` elements of the type), `factor` (f32; [`Operation::Scale`] only), `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Elementwise {
    /// What is computed.
    pub operation: Operation,
    /// Type of all elements.
    pub element: Element,
    /// The result takes a's place.
    pub in_place: bool,
}

impl KernelSource for Elementwise {
    fn build(&self) -> Kernel {
        let Self { operation, element, in_place } = *self;
        let operands = if operation.is_binary() { 3 } else { 2 };
        let (bytes, operations) = (operands * element.bytes() as u64, operation.operations());
        let (suffix, target) = if in_place { ("_in_place", "a") } else { ("", "output") };
        let description = Description {
            name: format!("{}_{element}{suffix}", operation.name()),
            summary: format!("{target}[i] = {}; {} elements per thread", operation.formula(), lanes_of(element)),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: operations * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let output = k.write(if in_place { "a" } else { "output" }, element);
            let a = if in_place { output } else { k.read("a", element) };
            if operation.is_binary() {
                let b = k.read("b", element);
                let count = k.u32("count");
                super::vectors(k, THREADS, count, &[a, b], &[output], |[a, b]| [operation.of_two(a, b)]);
            } else if operation == Operation::Scale {
                let factor = k.f32("factor");
                let count = k.u32("count");
                super::vectors(k, THREADS, count, &[a], &[output], |[a]| [a * factor]);
            } else {
                let count = k.u32("count");
                super::vectors(k, THREADS, count, &[a], &[output], |[a]| [operation.of_one(a)]);
            }
        })
    }

    fn configurations() -> Vec<Self> {
        let new = |operation, element| Self { operation, element, in_place: false };
        let mut all: Vec<Self> = Operation::ALL
            .into_iter()
            .flat_map(|operation| super::float_elements(|element| new(operation, element)))
            .collect();
        for operation in [Operation::Add, Operation::Scale] {
            all.extend(super::float_elements(|element| Self { in_place: true, ..new(operation, element) }));
        }
        all
    }
}

impl Elementwise {
    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(&self, count: u64) -> Option<[u32; 3]> {
        super::vectors_grid(count, THREADS, self.element)
    }
}
