//! Model folders and GGUF files: round trips, every spelling, and what happens when something is wrong with them.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod folders;
mod gguf;
mod malformed;
mod merging;
mod round_trips;
mod saving;
