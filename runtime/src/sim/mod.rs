//! The simulator: runs PTX text on the CPU, and finds what a GPU hides.
//!
//! It reads the text itself, so that what is tested is what a GPU would get. A text goes through these stages:
//!
//! - `lexer`, `syntax`: tokens, then entries with registers, shared arrays and labels resolved.
//! - `decode`: each instruction becomes an operation on slots of a register file (`program`). `control_flow` tells where
//!   diverged lanes meet again (immediate post-dominators), which registers need to be watched because they may be read
//!   unwritten, and which may share a slot.
//! - `block` runs the blocks of a launch, one after the other, each warp until it waits at a barrier or ends; `execute`
//!   runs one warp (`warp`), an instruction for all its lanes at a time.
//! - `spaces` does every access to memory, after checking it: bounds, alignment, whether anything wrote what is read, and,
//!   with the records of `shadow`, whether anything orders it behind the accesses of other threads.
//!
//! A fault ([`Fault`]) ends the launch that it is found in, and names the kernel, the line, the block and the thread. The
//! device stays usable. Everything is deterministic: results and reports are the same in every run and on every machine.
//!
//! What differs from a GPU: atomic operations on floating-point numbers are refused, approximate functions are correct to
//! one unit in the last place, products of tensor cores are summed in f32 in the order of k, and the clock counts
//! instructions.

mod block;
pub mod case;
mod control_flow;
#[cfg(test)]
mod coverage;
mod decode;
mod execute;
mod fault;
mod launch;
mod lexer;
mod memory;
mod numbers;
mod program;
mod shadow;
mod spaces;
mod syntax;
mod text;
mod warp;

pub use case::{Case, CaseParameter, CaseReport};
pub use fault::Fault;
pub(crate) use launch::{Function, LIMITS};
pub use launch::{Statistics, statistics};
pub(crate) use memory::{Block, GlobalMemory};
pub use text::{TextArgument, TextLaunch, TextMemory, run_text};
