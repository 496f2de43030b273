//! What grafter's tests share: plain f64 references of every operator, a check of an operator against its reference,
//! and random numbers that are the same everywhere.

#![forbid(unsafe_code)]

pub mod check;
pub mod random;
pub mod reference;

pub use tools::compare;
