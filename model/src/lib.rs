//! Models: configurations, weights in and out, layers, initialisation and generation.
pub mod config;
