//! Data, training and evaluation of hybrids, and the command line `grafter`.
//!
//! - [`config`]: what a run does, from a TOML file and flags.
//! - [`data`]: jsonl documents, packed token files, the order of training.
//! - [`stages`]: distillation of a few layers at a time.
//! - [`train`]: the loop behind `grafter distill` and `grafter train`, exactly resumable.
//! - [`rank`]: which layers a model can do without.
//! - [`teach`]: what a teacher says of the training data, kept on the disk.
//! - [`mod@bench`][]: timings.
//! - [`report`]: a run's folder as a page.
//! - [`evaluate`]: how well a model predicts documents, chooses and answers.
//! - [`commands`]: the command line.

#![forbid(unsafe_code)]

mod begun;
pub mod bench;
pub mod commands;
pub mod config;
pub mod data;
pub mod demo;
pub mod evaluate;
pub mod files;
pub mod interruption;
mod memory;
pub mod rank;
pub mod report;
pub mod stages;
pub mod teach;
pub mod train;
mod units;
