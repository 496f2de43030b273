//! parity
fn main() {}
