//! Tensors, a tape that records operators, and the operators themselves.
//!
//! - [`Tensor`]: shape, element type and storage on one device; contiguous, row-major, cheap to clone.
//! - [`Tape`] records operators as they run and walks them back to give [`Gradients`]. [`Tape::inference`] records
//!   nothing.
//! - [`ops`]: one file per operator, each with its shape checks, its way on each device and its backward.
//! - [`Parameters`]: named weights in one flat table, for models to read and [`optimizer`]s to update.
//!
//! Numbers: results have the element type of the operator's main input; sums, softmax, scan and losses are computed in
//! f32. Every operator gives the same bits on the same device each time, whatever the number of threads.

#![forbid(unsafe_code)]

mod check;
mod cpu;
mod error;
mod gpu;
mod gradient_check;
pub mod ops;
pub mod optimizer;
mod parameters;
mod tape;
mod tensor;

pub use error::{Error, Result};
pub use gradient_check::{GradientCheck, gradient_check};
pub use parameters::{Parameter, ParameterId, Parameters};
pub use tape::{Gradients, Tape, Var};
pub use tensor::{DType, Element, Tensor, TensorId};
