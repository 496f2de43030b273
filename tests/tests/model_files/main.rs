//! Model folders and GGUF files: round trips, every spelling, and what happens when something is wrong with them.

mod folders;
mod gguf;
mod malformed;
mod round_trips;
mod saving;
