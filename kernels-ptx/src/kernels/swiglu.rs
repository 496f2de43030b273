//! SwiGLU: `output = silu(gate) · up`, elementwise, and its gradient.
//!
//! - Forward: `y = gate · s · up` with `s = sigmoid(gate)`. Backward: `d gate = g · up · s (1 + gate (1 − s))`,
//!   `d up = g · gate · s`.
//! - Layout: each thread takes 16 bytes of neighbouring elements with one access per operand; the last thread takes what is
//!   left one by one.
//! - Traffic: forward reads two elements and writes one, backward reads three and writes two. Bound by memory.
//! - Source: Shazeer 2020, "GLU Variants Improve Transformer".

use super::lanes_of;
use crate::asm::{Assembler, Description};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// Blocks for `count` elements of a type; `None` when one launch cannot cover them.
pub fn grid(count: u64, element: Element) -> Option<[u32; 3]> {
    super::vectors_grid(count, THREADS, element)
}

/// `output = silu(gate) · up`.
///
/// Parameters: `output` (written), `gate`, `up` (all `count` elements of the type), `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SwigluForward {
    /// Type of all elements.
    pub element: Element,
}

/// The gradients of gate and up.
///
/// Parameters: `gate_gradient`, `up_gradient` (written), `gradient`, `gate`, `up` (all `count` elements of the type),
/// `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SwigluBackward {
    /// Type of all elements.
    pub element: Element,
}

impl KernelSource for SwigluForward {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("swiglu_forward_{element}"),
            summary: format!("output = gate * sigmoid(gate) * up; {} elements per thread", lanes_of(element)),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: 3 * bytes * sizes[0], operations: 6 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let (output, gate, up) = (k.write("output", element), k.read("gate", element), k.read("up", element));
            let count = k.u32("count");
            super::vectors(k, THREADS, count, &[gate, up], &[output], |[gate, up]| [gate * gate.sigmoid() * up]);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}

impl KernelSource for SwigluBackward {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("swiglu_backward_{element}"),
            summary: format!("gradients of gate * sigmoid(gate) * up; {} elements per thread", lanes_of(element)),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: 5 * bytes * sizes[0], operations: 12 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let (gate_gradient, up_gradient) = (k.write("gate_gradient", element), k.write("up_gradient", element));
            let inputs = [k.read("gradient", element), k.read("gate", element), k.read("up", element)];
            let count = k.u32("count");
            let outputs = [gate_gradient, up_gradient];
            super::vectors(k, THREADS, count, &inputs, &outputs, |[gradient, gate, up]| {
                let s = gate.sigmoid();
                let through = gradient * s;
                [through * up * gate.fma(-s + 1.0, 1.0), through * gate]
            });
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}
