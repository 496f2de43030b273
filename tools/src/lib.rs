//! What kernel developers use, as a library: the comparison of numbers and the parity harness.
//!
//! - [`compare`] says how far results are from what was expected.
//! - [`parity`] runs a folder of cases that other implementations computed.

#![forbid(unsafe_code)]

pub mod compare;
pub mod parity;
pub mod profile;
