//! grafter
fn main() {}
