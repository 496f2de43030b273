//! What the binary `profile` measures: launches by kernel, against what the device reaches.

mod ceilings;
mod comparison;
mod lines;
mod step;
mod summary;
mod table;
mod trace;

pub use ceilings::Ceilings;
pub use comparison::{Change, compare};
pub use lines::{Inputs, Line, Prepared, lines};
pub use step::{Step, StepOptions};
pub use summary::{KernelSummary, Summary, gap_seconds, summarise};
pub use table::{Goal, Launches, Measured, Peer, Stopwatch, Table, launches_of};
pub use trace::write_trace;
