//! Models: configurations, weights in and out, layers, initialisation and generation.
//!
//! - [`config::ModelConfig`] is the normal form of every configuration that we read.
//! - [`checkpoint`] reads and writes weights; [`import`] turns other formats into Hugging Face folders, [`merge`]
//!   makes one model of several.
//! - [`Model`] computes; its layers' [`mixer`]s are attention or Mamba.
//! - [`initialise::graft`] makes a hybrid out of a transformer.
//! - [`tokenizer`], [`chat`] and [`generate`] are for text.

#![deny(unsafe_code)]

pub mod architecture;
pub mod batch;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod decoder;
mod error;
pub mod generate;
pub mod gguf;
pub mod import;
pub mod initialise;
mod json;
pub mod merge;
pub mod mixer;
mod model;
pub mod tokenizer;

pub use batch::TokenBatch;
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use model::{Cache, Model, Precision};
