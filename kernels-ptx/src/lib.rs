//! GPU kernels as PTX text.
//!
//! A kernel is a plain struct of its compile-time choices; its `build` returns a [`Kernel`]: the text, the entry's name,
//! the declared parameters, the block, and what an ideal device would move and compute for a problem of a given size.
//! This crate knows no driver, no device and no tensor.

#![forbid(unsafe_code)]

mod kernel;
pub mod kernels;

pub use kernel::{Element, Kernel, Parameter, ParameterKind, Target, Work};

/// One instance of every kernel, for tools that print or assemble all of them.
pub fn catalogue() -> Vec<Kernel> {
    vec![kernels::fill::Fill.build(), kernels::axpy::Axpy.build()]
}
