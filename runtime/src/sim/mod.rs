//! The simulator: runs PTX text on the CPU, and finds what a GPU hides.

mod fault;
mod launch;
mod memory;

pub use fault::Fault;
pub(crate) use launch::Function;
pub(crate) use memory::{Block, GlobalMemory};
