//! GPU kernels as PTX text.
//!
//! A kernel is a plain struct of its compile-time choices, a [`KernelSource`]; its `build` returns a [`Kernel`]: the
//! text, the entry's name, the declared parameters, the block, and what an ideal device would move and compute for a
//! problem of a given size. The text is written with the assembler in [`asm`]. This crate knows no driver, no device and
//! no tensor.

#![forbid(unsafe_code)]

pub mod asm;
mod kernel;
pub mod kernels;

pub use kernel::{Element, Kernel, KernelSource, Parameter, ParameterKind, Target, Work};
pub use kernels::catalogue;
