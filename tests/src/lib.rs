//! What grafter's tests share: plain f64 references of every operator, a check of an operator against its reference,
//! and random numbers that are the same everywhere.

#![forbid(unsafe_code)]

pub mod check;
pub mod random;
pub mod reference;

pub use tools::compare;

/// The device that the shared tests run on: `TEST_DEVICE` (`cpu`, `sim`, `cuda:0`), or the CPU.
///
/// # Panics
/// When there is no such device: a test must not pass on another one.
pub fn device() -> runtime::Device {
    let name = std::env::var("TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    match name.parse() {
        Ok(device) => device,
        Err(error) => panic!("TEST_DEVICE={name}: {error}"),
    }
}
