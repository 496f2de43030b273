//! What the binary `profile` measures: launches by kernel, against what the device reaches.

mod ceilings;
mod comparison;
mod operators;
mod step;
mod summary;
mod trace;

pub use ceilings::Ceilings;
pub use comparison::{Change, compare};
pub use operators::{BESIDE, CASES, Case, run_case};
pub use step::{Step, StepOptions};
pub use summary::{KernelSummary, Summary, summarise};
pub use trace::write_trace;
