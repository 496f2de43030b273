//! Every operator once more as plain loops over f64: slow, and meant to be seen to be right. Tensors are slices in
//! row-major order with the shapes that the operators document; nothing here is shared with the operators.

mod attention;
mod causal_conv1d;
mod elementwise;
mod linear;
mod losses;
mod optimizer;
mod rms_norm;
mod rope;
mod selective_scan;

pub use attention::{Attention, attention};
pub use causal_conv1d::{Convolution, causal_conv1d};
pub use elementwise::{repeat_chunks, sigmoid, silu, softplus, swiglu};
pub use linear::{embedding, linear};
pub use losses::{Kind, cross_entropy, divergence, log_softmax};
pub use optimizer::AdamW;
pub use rms_norm::rms_norm;
pub use rope::{Scaling, inverse_frequencies, rope};
pub use selective_scan::{Scan, ScanResult, selective_scan};
