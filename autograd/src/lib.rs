//! grafter
