//! The operators, one file each.
//!
//! Conventions:
//! - A sequence tensor is `[batch, time, …]`, innermost dimension last, contiguous.
//! - Floating-point inputs are f32 or bf16. A result has the element type of the operator's main input (the first);
//!   arithmetic is f32 throughout.
//! - Documents: where several documents share a row, `document_start` (u32, `[batch, time]`) holds for every token the
//!   index in its row of its document's first token. It alone says what a token may see: key `j` is visible to query
//!   `i` when `document_start[i] <= j <= i`; a convolution tap before `document_start[i]` is zero; a scan begins anew
//!   where `document_start[i] == i`.

mod attention;
mod causal_conv1d;
mod cross_entropy;
mod decoding;
mod divergence;
mod elementwise;
mod embedding;
mod head_loss;
mod layout;
mod linear;
mod mamba_step;
mod rms_norm;
mod rope;
mod sampling;
mod selective_scan;
mod swiglu;
mod top_log_probabilities;
mod vocabulary_loss;

pub use attention::{AttentionOptions, attention};
pub use causal_conv1d::{Activation, ConvolutionOptions, causal_conv1d, causal_conv1d_step};
pub use cross_entropy::{CrossEntropy, IGNORED_LABEL, cross_entropy};
pub use decoding::{
    CacheStep, advance, attention_cached, attention_step, convolution_state, extend_cache, last_step, with_room,
    write_time,
};
pub use divergence::{Divergence, DivergenceLoss, DivergenceOptions, divergence};
pub(crate) use elementwise::square_sum_gpu;
pub use elementwise::{add, add_in_place, mul, negative_exp, scale, scale_in_place, silu, softplus, sub, sum};
pub use embedding::embedding;
pub use head_loss::{HeadChunks, HeadLabels, HeadLoss, HeadTeacher, TeacherSource, head_loss, head_loss_in_chunks};
pub use layout::{repeat_chunks, split, stack};
pub use linear::{linear, linear_residual, linear_swiglu};
pub use mamba_step::{MambaStepInputs, mamba_step, mamba_step_by_operators};
pub use rms_norm::{rms_norm, rms_norm_residual};
pub use rope::{RotaryScaling, RotaryTable, rope};
pub use sampling::{NO_TOKEN, SamplingOptions, argmax, argmax_into, sample, sample_into};
pub use selective_scan::{
    MOST_GPU_STATES, ScanInputs, ScanOutput, ScanStepInputs, ScanWay, selective_scan, selective_scan_by,
    selective_scan_step,
};
pub use swiglu::swiglu;
pub use top_log_probabilities::TopLogProbabilities;
